"""Nodes that judge a clip block by block, and show where it is bad."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from ..spatialalign.blocks import BlockGrid, crops, frame_slices
from ..spatialalign.errors import ConfigError, DataError, SpatialAlignError
from . import host
from .grounded_sam import MINIATURE
from .guiding import make_ready, unpadded
from .rewards import latent_space
from .sockets import PATCH_REWARD_SOCKET, VLM_SOCKET, to_image, to_uint8
from .values import Values, figure, joined, json_text, shown, values_input, values_output

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ..spatialalign.backbones.latent_space import LatentSpace
    from ..spatialalign.rewards.patch import PatchReward
    from .learned_rewards import LoadedVlm

CATEGORY = "SpatialAlign/Score"
FOLDER = "patch_rewards"
"""Below ``models``."""
VALUE = "patch"
"""The name of a clip's mean among its values."""
_FRAMES = 4
"""Frames in a latent frame of Wan, the first of a clip apart."""


@dataclass(frozen=True)
class LoadedPatchReward:
    """A patch reward.

    Attributes:
        name: as it was chosen.
        network: the reward; it is on the device only after ``host.load``.
        patcher: the host's, about it.
    """

    name: str
    network: PatchReward
    patcher: Any

    def memory(self, latents: Tensor) -> int:
        """About how many bytes judging ``latents (1, c, f, h, w)`` takes beside the weights.

        Where a block of the trunk takes most, its feed-forward part, it holds two rows of the inner width and
        six of the outer one for each token, in float32. Found for a block of Wan 1.3B: 0.95 of that.
        """
        trunk = self.network.trunk.config
        tokens = latents[0, 0].numel() // math.prod(trunk.patch)
        return 4 * tokens * (2 * trunk.ffn_dim + 6 * trunk.width)

    def report(self) -> str:
        """What it is, in words."""
        info = self.network.info
        return (
            f"{self.name}: made with {info.base_model}, reads latents of {info.latent_space}\n"
            f"  {self.network.grid} blocks (time x height x width), taught by {info.teacher or 'nobody yet'}"
        )


class LoadPatchReward(io.ComfyNode):
    """A patch reward from the models folder, or the miniature's."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpatialAlignLoadPatchReward",
            display_name="Load Patch Reward",
            category=CATEGORY,
            description=(
                "Loads a network that scores the space-time blocks of a finished clip from its latents. Patch Reward "
                "Heatmap shows its scores. python -m training.patch_reward trains one; it works for every model with "
                "the same latents and text encoder."
            ),
            inputs=[
                io.Combo.Input(
                    "reward", options=_choices(), tooltip="The miniature's own, or a file in models/patch_rewards."
                ),
            ],
            outputs=[
                PATCH_REWARD_SOCKET.Output(display_name="patch_reward", tooltip="For Patch Reward Heatmap."),
                io.String.Output(
                    display_name="report",
                    tooltip="The model and the latents it is for, its blocks and its teacher. Preview Any shows it.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, reward: str) -> str:
        """The file's time and size: a reward that was trained anew under its old name is loaded anew."""
        stat = _file(reward).stat()
        return f"{stat.st_mtime_ns}-{stat.st_size}"

    @classmethod
    def execute(cls, reward: str) -> io.NodeOutput:
        from ..spatialalign.rewards.patch import load_patch_reward

        network = load_patch_reward(_file(reward))
        loaded = LoadedPatchReward(reward, network, host.patcher(network))
        return io.NodeOutput(loaded, loaded.report())


class PatchRewardHeatmap(io.ComfyNode):
    """The scores of a clip's blocks, over its frames."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpatialAlignPatchRewardHeatmap",
            display_name="Patch Reward Heatmap",
            category=CATEGORY,
            description=(
                "Scores the space-time blocks of a clip and lays a veil over each that is the stronger the worse it "
                "is. The judge is a patch reward, which reads the clip's latent and prompt in one pass, or a chat "
                "model, which is asked of every block whether it is free of visible defects."
            ),
            inputs=[
                io.Image.Input("images", tooltip="The decoded frames of one clip."),
                io.String.Input(
                    "grid",
                    default="3x2x2",
                    tooltip="Blocks along time, height and width for vlm; a patch reward has its own.",
                ),
                io.Float.Input(
                    "worst",
                    default=0.0,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    tooltip="The score under the strongest veil. Equal to best: the clip's own lowest score.",
                ),
                io.Float.Input(
                    "best",
                    default=0.0,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    tooltip="The score from which there is no veil. Equal to worst: the clip's own highest score.",
                ),
                PATCH_REWARD_SOCKET.Input(
                    "patch_reward",
                    optional=True,
                    tooltip="From Load Patch Reward; it needs latent, positive and model. Connect this or vlm.",
                ),
                io.Latent.Input(
                    "latent", optional=True, tooltip="For patch_reward: what the sampler gave for this one clip."
                ),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="For patch_reward: the encoded prompt that the sampler was given.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="For patch_reward: the model that made the latent, which says how to read it.",
                ),
                VLM_SOCKET.Input("vlm", optional=True, tooltip="From Load VLM. Connect this or patch_reward."),
                values_input(),
            ],
            outputs=[
                io.Image.Output(
                    display_name="overlay", tooltip="The frames under their scores, with a line of text below."
                ),
                io.Float.Output(display_name="mean", tooltip="Mean of the known scores; NaN when none is known."),
                io.Float.Output(display_name="worst", tooltip="The lowest known score of a block."),
                io.String.Output(
                    display_name="report",
                    tooltip="JSON: the judge, the grid, and the scores by time, row and column; null for unknown.",
                ),
                values_output(),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(
        cls, grid: str | None = None, worst: float | None = None, best: float | None = None
    ) -> bool | str:
        # Said before the sampler has worked for minutes. What is linked is None here and checked when the node runs.
        try:
            BlockGrid.parse("1x1x1" if grid is None else grid)
            if worst is not None and best is not None:
                _scale(worst, best)
        except SpatialAlignError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls,
        images: Tensor,
        grid: str,
        worst: float,
        best: float,
        patch_reward: LoadedPatchReward | None = None,
        latent: dict[str, Any] | None = None,
        positive: list[Any] | None = None,
        model: Any = None,
        vlm: LoadedVlm | None = None,
        values: Values | None = None,
    ) -> io.NodeOutput:
        from ..spatialalign.patch_plot import draw_patches

        frames, scale = to_uint8(images), _scale(worst, best)
        if patch_reward is not None and vlm is None:
            scores, latent_frames = _by_reward(patch_reward, latent, positive, model)
            judge = patch_reward.name
        elif vlm is not None and patch_reward is None:
            scores, latent_frames = _by_vlm(vlm, frames, BlockGrid.parse(grid))
            judge = vlm.judge.name
        else:
            found = "neither is" if vlm is None else "both are"
            raise DataError(f"Patch Reward Heatmap: connect patch_reward or vlm: {found} connected, one is needed")
        overlay = host.intermediate(to_image(draw_patches(frames, scores, latent_frames, scale)))
        cut, (mean, least) = BlockGrid(*scores.shape), _mean_and_worst(scores)
        report = {"judge": judge, "grid": str(cut), "mean": mean, "worst": least, "scores": scores.tolist()}
        lines = _lines(judge, scores, frame_slices(cut, len(frames), latent_frames))
        own = joined(values, {VALUE: mean})
        return io.NodeOutput(overlay, mean, least, json_text(report), own, ui=shown(cls, lines))


def _choices() -> list[str]:
    from ..spatialalign.miniature import PATCH_REWARD

    return [*([MINIATURE] if PATCH_REWARD.is_file() else []), *host.model_names(FOLDER)]


def _file(name: str) -> Path:
    """The file of a name from :func:`_choices`."""
    from ..spatialalign.miniature import PATCH_REWARD

    return PATCH_REWARD if name == MINIATURE else host.model_path(FOLDER, name)


def _scale(worst: float, best: float) -> tuple[float, float] | None:
    if worst > best:
        raise ConfigError(
            f"Patch Reward Heatmap: the scale runs from worst {worst:g} up to best {best:g}; swap them, or set both to "
            "0 for the scores of the clip itself"
        )
    return (worst, best) if worst < best else None


def _by_reward(
    reward: LoadedPatchReward, latent: dict[str, Any] | None, positive: list[Any] | None, model: Any
) -> tuple[np.ndarray, int]:
    """Scores ``(F, R, C)`` by a patch reward, and the latent frames of the clip."""
    from ..spatialalign.rewards.patch import check_fits

    if latent is None or positive is None or model is None:
        given = {"latent": latent, "positive": positive, "model": model}
        missing = " and ".join(name for name, value in given.items() if value is None)
        raise DataError(
            f"Patch Reward Heatmap: patch_reward reads the clip's latent and prompt; connect {missing} as well"
        )
    space = latent_space(host.describe_wan(model))
    check_fits(reward.network, space.name)
    clip, text = _clip(latent, space), _text(positive, reward.network.trunk.config.text_dim)
    host.check_interrupt()
    device = host.load([reward.patcher], reward.memory(clip))
    make_ready(reward.network, device)
    scores: np.ndarray = reward.network(clip.to(device), [text.to(device)]).blocks[0].cpu().numpy()
    return scores, clip.shape[2]


def _by_vlm(vlm: LoadedVlm, frames: np.ndarray, grid: BlockGrid) -> tuple[np.ndarray, int]:
    """The same by a chat model, which is asked about every block; the user can stop it between two."""
    import numpy as np

    from ..spatialalign.rewards.vlm_blocks import vlm_teacher

    latent_frames, teacher = _latent_frames(len(frames)), vlm_teacher(vlm.judge)
    blocks = crops(frames, grid, latent_frames)
    bar = host.Progress(len(blocks))
    host.check_interrupt()
    host.load([vlm.patcher])
    scores = []
    for block in blocks:
        scores.append(teacher(block, ""))
        bar.update(len(scores))
    return np.array(scores, dtype=np.float32).reshape(grid.shape), latent_frames


def _clip(latent: dict[str, Any], space: LatentSpace) -> Tensor:
    """LATENT of one clip as ``(1, c, f, h, w)`` in the model's space; ComfyUI hands latents around in the VAE's."""
    import torch

    samples = latent["samples"]
    found = tuple(samples.shape) if isinstance(samples, torch.Tensor) else type(samples).__name__
    if not isinstance(found, tuple) or len(found) != 5 or found[:2] != (1, space.channels):
        raise DataError(
            f"latent: expected one clip (1, {space.channels}, frames, height, width) of the connected model, found "
            f"{found}; connect what its sampler gave, with a batch size of 1"
        )
    return space.normalise(samples.float())


def _text(positive: list[Any], width: int) -> Tensor:
    """The embedding ``(n, width)`` of a CONDITIONING, without the zero rows that pad it."""
    shapes = [tuple(embedding.shape) for embedding, _ in positive]
    if len(shapes) != 1 or len(shapes[0]) != 3 or (shapes[0][0], shapes[0][2]) != (1, width):
        raise DataError(
            f"positive: expected one text (1, tokens, {width}), found {shapes}; connect one CLIP Text Encode of the "
            "text encoder that the patch reward was trained with"
        )
    return unpadded(positive[0][0][0].float())


def _latent_frames(frames: int) -> int:
    """Latent frames of a clip as Wan has them; where Wan could not have made as many frames, each counts by itself."""
    groups, rest = divmod(frames - 1, _FRAMES)
    return frames if rest else groups + 1


def _mean_and_worst(scores: np.ndarray) -> tuple[float, float]:
    """Of the known scores; NaN where none is known."""
    import numpy as np

    known = scores[~np.isnan(scores)]
    return (float(known.mean()), float(known.min())) if known.size else (math.nan, math.nan)


def _lines(judge: str, scores: np.ndarray, times: list[slice]) -> list[str]:
    """The scores in words, and where the worst block is; ``times`` are the frames of the blocks along time."""
    import numpy as np

    (mean, worst), (_, rows, columns) = _mean_and_worst(scores), scores.shape
    lines = [f"{BlockGrid(*scores.shape)} blocks by {judge}: mean {figure(mean)}, worst {figure(worst)}"]
    unknown = int(np.isnan(scores).sum())
    if unknown < scores.size:
        time, row, column = np.unravel_index(np.nanargmin(scores), scores.shape)
        held = times[time]
        lines.append(
            f"worst: frames {held.start} to {held.stop - 1}, row {row + 1} of {rows}, column {column + 1} of {columns}"
        )
    return lines + ([f"{unknown} of {scores.size} blocks are unknown"] if unknown else [])
