"""The shipped miniature as ComfyUI's own objects, so that an example runs without a download."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from .sockets import GROUNDED_SAM_SOCKET

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


class LoadMiniature(io.ComfyNode):
    """Native Wan classes with the miniature's weights, and its GroundedSAM."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpatialAlignLoadMiniature",
            display_name="Load Miniature",
            category="SpatialAlign/Model",
            description=(
                "Loads the tiny text-to-video model that is shipped with SpatialAlign, with its own detector and "
                "segmenter; nothing is downloaded. It draws simple animals about simple objects, 13 frames of 64x64 at "
                "8 frames per second, and knows only the words of the miniature prompt sets. Sample it with euler, the "
                "simple scheduler, 16 steps and cfg 1, on an EmptyHunyuanLatentVideo of 64x64 and 13 frames."
            ),
            inputs=[],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip=(
                        "A Wan 2.1 text-to-video model of 2.3 million parameters. Its schedule is already shifted "
                        "by 3, as it was trained."
                    ),
                ),
                io.Clip.Output(
                    display_name="clip", tooltip="Its text encoder. Words it never saw count as one unknown word."
                ),
                io.Vae.Output(display_name="vae", tooltip="Its video autoencoder, of the class of Wan 2.1's."),
                GROUNDED_SAM_SOCKET.Output(
                    display_name="grounded_sam", tooltip="A detector and a segmenter trained on the miniature's world."
                ),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        from ..spatialalign.files import read_json
        from ..spatialalign.miniature import WAN
        from ..spatialalign.wan_names import transformer_to_original, vae_to_original
        from . import host
        from .tracking import grounded_sam

        settings = read_json(WAN / "spatialalign.json")
        config = read_json(WAN / "text_encoder" / "config.json")
        config["dense_act_fn"] = "gelu_pytorch_tanh"  # ComfyUI's name of what transformers calls gelu_new
        return io.NodeOutput(
            host.wan_model(transformer_to_original(_weights(WAN / "transformer")), settings["shift"]),
            host.wan_clip(_weights(WAN / "text_encoder"), config, WAN / "tokenizer"),
            host.wan_vae(vae_to_original(_weights(WAN / "vae"))),
            grounded_sam("miniature", "miniature", "robust", "float32", False),
        )


def _weights(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {key: tensor for path in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(path).items()}
