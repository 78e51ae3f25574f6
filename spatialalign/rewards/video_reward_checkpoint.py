"""Reads the released VideoReward checkpoints, whole or not at all (methods: 2.4).

A folder holds ``model_config.json`` and ``checkpoint-<step>/`` with ``tokenizer/`` and either ``model.pth``, every
weight, or ``adapter_model.safetensors`` and ``non_lora_state_dict.pth``, what was trained on top of a base model.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..tracking.parts import guarded
from .video_reward_config import LoraSettings, VideoRewardConfig
from .video_reward_layout import EMBEDDING, HEAD, OUTPUT, Slot, by_side, layout, merged, normalised_name, stored_name
from .video_reward_network import VideoRewardNetwork
from .video_reward_text import MARKS, VIDEO

HUB = "KwaiVGI/VideoReward"
FULL, ADAPTERS, TRAINED = "model.pth", "adapter_model.safetensors", "non_lora_state_dict.pth"
_RELEASED_BASE = "Qwen2-VL-2B-Instruct"
_QWEN2_VL_2B: dict[str, Any] = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": True,
    "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16},
}
"""The base of the released checkpoint, which a full checkpoint needs no files of."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder in the released layout, found and its settings read; no weight is read yet.

    Attributes:
        folder: with ``model_config.json``.
        step: the folder in it with the most steps.
        config: the settings.
        base: folder of the base model, None where there is none here.
    """

    folder: Path
    step: Path
    config: VideoRewardConfig
    base: Path | None

    @classmethod
    def find(cls, folder: str | Path, base: str | Path | None = None) -> Checkpoint:
        """Look into ``folder``; ``base`` is the base model's folder where that of the settings is not one.

        Raises:
            ModelError: a part that is missing.
        """
        root = Path(folder)
        if not (root / "model_config.json").is_file():
            raise ModelError(
                f"{root}: no VideoReward checkpoint (model_config.json) here; download the whole of {HUB} from the "
                f"Hugging Face hub into it: hf download {HUB} --local-dir {root}"
            )
        steps = [p for p in root.glob("checkpoint-*") if p.is_dir() and p.name.rpartition("-")[2].isdigit()]
        if not steps:
            raise ModelError(f"{root}: no folder checkpoint-<step> beside model_config.json; download {HUB} again")
        step = max(steps, key=lambda path: int(path.name.rpartition("-")[2]))
        if not (step / FULL).is_file():
            for name in (ADAPTERS, TRAINED):
                if not (step / name).is_file():
                    raise ModelError(f"{step}: expected {FULL}, or {ADAPTERS} and {TRAINED}; {name} is missing")
        if not (step / "tokenizer").is_dir():
            raise ModelError(f"{step}: the folder tokenizer is missing; download {HUB} again")
        config = VideoRewardConfig.load(root / "model_config.json")
        place = Path(config.base if base is None else base)
        if base is not None and not place.is_dir():
            raise ModelError(f"{place}: no such folder; expected the base model {config.base}")
        return cls(root, step, config, place if place.is_dir() else None)

    @property
    def full(self) -> bool:
        """Whether it holds every weight."""
        return (self.step / FULL).is_file()

    def tokenizer(self) -> Any:
        """The tokenizer, which knows the tokens at which the scores are read."""
        from transformers import AutoTokenizer

        folder = self.step / "tokenizer"
        tokenizer = guarded(str(folder), lambda: AutoTokenizer.from_pretrained(str(folder)))
        missing = [token for token in (*MARKS, VIDEO) if token not in tokenizer.get_vocab()]
        if missing:
            raise ModelError(f"{folder}: the tokenizer lacks {', '.join(missing)}; restore the folder")
        return tokenizer

    def model_config(self, rows: int) -> Any:
        """The ``Qwen2VLConfig`` of the base model with ``rows`` rows of embeddings, the output layer on its own."""
        from transformers import Qwen2VLConfig

        if self.base is not None:
            base = str(self.base)
            config = guarded(base, lambda: Qwen2VLConfig.from_pretrained(base))
        elif self.full and self.config.base.endswith(_RELEASED_BASE):
            config = Qwen2VLConfig(**_QWEN2_VL_2B)
        else:
            raise ModelError(
                f"{self.step} needs the base model {self.config.base}: download it from the Hugging Face hub and "
                "name its folder (base)"
            )
        config.text_config.vocab_size = rows
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
        return config


def load_network(
    checkpoint: Checkpoint, tokenizer: Any, device: str | torch.device, dtype: torch.dtype, merge: bool = True
) -> VideoRewardNetwork:
    """The network, in evaluation mode, with nothing that requires a gradient.

    ``merge`` adds the adapters to the weights that they stand beside; otherwise they stay, as peft's layers.

    Raises:
        ModelError: tensors that are missing, not expected or of another shape, all of them named.
    """
    config = checkpoint.model_config(len(tokenizer))
    marks = tuple(int(tokenizer.convert_tokens_to_ids(mark)) for mark in MARKS)
    if int(tokenizer.convert_tokens_to_ids(VIDEO)) != config.video_token_id:
        raise ModelError(
            f"{checkpoint.step}: the tokenizer's {VIDEO} is not the base model's token {config.video_token_id}; "
            "tokenizer and base model do not belong together"
        )
    lora = checkpoint.config.lora
    shapes, wrapped = model_layout(config, checkpoint.config)
    slots = layout(shapes, wrapped, lora)
    tensors = _read(checkpoint, wrapped, len(tokenizer))
    check(checkpoint.step, slots, tensors)
    parts = by_side(tensors, slots)
    parameters = merged(parts, lora.scaling, dtype) if lora is not None and merge else parts[""]
    head = parameters.pop(HEAD).to(dtype, copy=True)
    backbone = _build(config, parameters, dtype)
    if lora is not None and not merge:
        _add_adapters(backbone, parts, wrapped, lora, dtype)
    return VideoRewardNetwork(backbone, head, marks).to(device).eval().requires_grad_(False)


def model_layout(config: Any, reward: VideoRewardConfig) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Shapes of all parameters, head included, and the names of the layers with adapters. Takes no memory."""
    from transformers import Qwen2VLForConditionalGeneration

    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    shapes[HEAD] = (reward.outputs, config.text_config.hidden_size)
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return shapes, [] if reward.lora is None else reward.lora.wrapped(linear)


def check(folder: Path, slots: Mapping[str, Slot], tensors: Mapping[str, Tensor]) -> None:
    """See that the tensors are those of ``slots``.

    Raises:
        ModelError: naming every one that is missing, not expected, or of another shape.
    """
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    missing = sorted(set(slots) - set(found))
    extra = sorted(set(found) - set(slots))
    misshaped = [
        f"{name} {found[name]} instead of {slots[name].shape}"
        for name in sorted(set(slots) & set(found))
        if found[name] != slots[name].shape
    ]
    wrong = {"missing": missing, "not expected": extra, "of another shape": misshaped}
    if missing or extra or misshaped:
        told = "; ".join(f"{len(names)} {kind}: {', '.join(names)}" for kind, names in wrong.items() if names)
        raise ModelError(
            f"{folder} does not hold the {len(slots)} tensors that its settings ask for, nothing was loaded. {told}. "
            "Download it again, or check model_config.json and the base model"
        )


def _read(checkpoint: Checkpoint, wrapped: list[str], rows: int) -> dict[str, Tensor]:
    """All tensors by their released names, the base model's where the checkpoint holds only what was trained."""
    if checkpoint.full:
        return _named(_read_pth(checkpoint.step / FULL))
    from safetensors.torch import load_file

    adapters = checkpoint.step / ADAPTERS
    base = _read_base(checkpoint, wrapped, rows)
    trained = _named(_read_pth(checkpoint.step / TRAINED))
    tensors = base | trained | _named(guarded(str(adapters), partial(load_file, adapters)))
    output, embedding = (stored_name(name, wrapped, checkpoint.config.lora is not None) for name in (OUTPUT, EMBEDDING))
    if output not in tensors and embedding in tensors:
        # the base model has one matrix for both, and stores it once
        tensors[output] = tensors[embedding]
    return tensors


def _read_base(checkpoint: Checkpoint, wrapped: list[str], rows: int) -> dict[str, Tensor]:
    """Tensors of the base model, the embeddings cut to the tokens that there are (the rest is padding)."""
    from safetensors.torch import load_file

    assert checkpoint.base is not None
    files = sorted(checkpoint.base.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{checkpoint.base}: no *.safetensors of the base model {checkpoint.config.base}")
    peft = checkpoint.config.lora is not None
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in guarded(str(file), partial(load_file, file)).items():
            cut = tensor[:rows] if name.endswith(("embed_tokens.weight", OUTPUT)) else tensor
            tensors[stored_name(_today(name), wrapped, peft)] = cut
    return tensors


def _today(name: str) -> str:
    """Today's name of a parameter of the base model, which the hub's files have by the old one."""
    if name.startswith("visual."):
        return "model." + name
    if name.startswith("model.") and not name.startswith(("model.visual.", "model.language_model.")):
        return "model.language_model." + name.removeprefix("model.")
    return name


def _named(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {normalised_name(name): tensor for name, tensor in tensors.items()}


def _read_pth(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.pth`` file; nothing in it is run."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ModelError(
            f"{path} cannot be read as a file of nothing but tensors ({error}); download it again"
        ) from error
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(f"{path} must hold named tensors and nothing else; download it again")
    return dict(content)


def _build(config: Any, parameters: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """The backbone with these weights; none is drawn at random first."""
    from transformers import Qwen2VLForConditionalGeneration

    return Qwen2VLForConditionalGeneration.from_pretrained(None, config=config, state_dict=parameters, dtype=dtype)


def _add_adapters(
    backbone: Any, parts: Mapping[str, Mapping[str, Tensor]], wrapped: list[str], lora: LoraSettings, dtype: torch.dtype
) -> None:
    """Put peft's layers around the layers named in ``wrapped``, with the weights of the checkpoint."""
    from peft import LoraConfig, inject_adapter_in_model

    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rank_stabilised,
        target_modules=wrapped,
        bias="none",
    )
    inject_adapter_in_model(settings, backbone)
    for module in wrapped:
        layer = backbone.get_submodule(module)
        for side, linears in (("A", layer.lora_A), ("B", layer.lora_B)):
            linears["default"].weight = torch.nn.Parameter(parts[side][f"{module}.weight"].to(dtype, copy=True))
