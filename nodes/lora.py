"""A LoRA of any dialect onto a Wan model, with words about what it is and never silently without effect."""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import io

from . import graph, host

logger = logging.getLogger("spatialalign")


class LoadAlignedLora(io.ComfyNode):
    """Weight patches from a LoRA file whose names may be anybody's."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpatialAlignLoadLora",
            display_name="Load Aligned LoRA",
            category="SpatialAlign/Model",
            description=(
                "Applies a LoRA to a native Wan model and says what matched, which model it is for and how it was "
                "trained. It reads the files of training.dpo and every other dialect: ComfyUI, diffusers, PEFT, kohya, "
                "Wan-Fun and LyCORIS names. A file that fits nothing, or another model size, is an error; a part that "
                "does not fit is a warning. Wan 2.2 A14B has two experts: use one node and one file for each model."
            ),
            inputs=[
                io.Model.Input("model", tooltip="A native Wan model. Other LoRAs may be on it; they add up."),
                io.Combo.Input(
                    "lora",
                    options=host.lora_names(),
                    tooltip="A file in models/loras: lora_comfyui.safetensors of training.dpo, or another Wan LoRA.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-4.0,
                    max=4.0,
                    step=0.05,
                    tooltip="Factor of the LoRA: 1 as it was trained, 0 leaves the model unchanged.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the LoRA on it."),
                io.String.Output(
                    display_name="report",
                    tooltip="What matched, the base model, the training, and warnings. Preview Any shows it.",
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, model: Any, lora: str, strength: float) -> str:
        """The file's time and size: a LoRA that was trained anew under its old name is loaded anew."""
        stat = host.lora_path(lora).stat()
        return f"{stat.st_mtime_ns}-{stat.st_size}"

    @classmethod
    def execute(cls, model: Any, lora: str, strength: float) -> io.NodeOutput:
        from ..spatialalign.lora import fit_lora
        from ..spatialalign.lora_report import describe, warnings
        from ..spatialalign.module_names import diffusers_name

        sizes = host.linear_sizes(model)
        fitted = fit_lora(host.lora_path(lora), sizes)
        file = graph.model_file(cls.hidden.prompt, cls.hidden.unique_id, "model")
        for words in warnings(fitted, file):
            logger.warning("%s: %s", lora, words)
        report = f"{lora}\n{describe(fitted, strength, file)}"
        if strength == 0:
            return io.NodeOutput(model, report)
        found = {name: fitted.pairs.get(diffusers_name(name) or "") for name in sizes}
        pairs = {name: (pair.down, pair.up) for name, pair in found.items() if pair is not None}
        return io.NodeOutput(host.with_lora(model, pairs, strength), report)
