"""What ComfyUI's samplers call after classifier-free guidance so that rewards guide them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..spatialalign.errors import DataError
from .rewards import Reward

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..spatialalign.guidance import GuidanceSettings, RewardGuidance

logger = logging.getLogger("spatialalign")

_RUN = "spatialalign_guidance"
"""Where a run keeps what it needs: in the options that the host makes for each run and drops behind it."""
_TOLERANCE = 1e-6
"""In noise levels: those of a schedule are float32."""


def post_cfg(reward: Reward, settings: GuidanceSettings) -> Callable[[dict[str, Any]], Tensor]:
    """A function for :func:`.host.with_post_cfg`.

    It holds no tensor between runs but the reward's weights.

    Args:
        reward: the sum that is followed.
        settings: how. ``start`` and ``end`` are shares of the model's own schedule, found from noise levels, so that
            part of a schedule, or another one, can be sampled; ``weights`` and ``skip_first`` are not read.

    Raises:
        ConfigError: the form needs a reward that knows noise, and this one does not.
    """
    _engine(reward, settings, (1.0, 0.0))  # refuses here what would otherwise stop a sampler
    key = object()

    def guide(args: dict[str, Any]) -> Tensor:
        runs = args["model_options"].setdefault(_RUN, {})
        if key not in runs:
            runs[key] = _Run(reward, settings, args)
        denoised: Tensor = runs[key].guide(args)
        return denoised

    return guide


class _Run:
    """One pass of a sampler over its noise levels."""

    def __init__(self, reward: Reward, settings: GuidanceSettings, args: dict[str, Any]) -> None:
        for part in reward.parts:
            make_ready(part.network, args["input"].device)
        sigmas = args["model_options"]["transformer_options"]["sample_sigmas"].tolist()
        self._guidance = _guidance(reward, settings, sigmas, args["model"].model_sampling)
        self._texts: dict[int, list[Tensor]] = {}
        self._warned = False

    def guide(self, args: dict[str, Any]) -> Tensor:
        """The prediction of clean latents to take instead of ``denoised``; itself where nothing is to be done."""
        x, denoised, sigma = args["input"], args["denoised"], float(args["sigma"].max())
        if self._guidance is None or not sigma:
            return denoised
        velocity = (x - denoised) / sigma
        guided = self._guidance(x, sigma, velocity, self._text(args["cond"], sigma, len(x)))
        return denoised if guided is velocity else x - sigma * guided

    def _text(self, conds: Sequence[dict[str, Any]], sigma: float, clips: int) -> list[Tensor]:
        """The text of each clip, of the first conditioning that is in force at this noise level."""
        found = [cond["model_conds"].get("c_crossattn") for cond in conds if _in_force(cond, sigma)]
        if not found or found[0] is None:
            raise DataError("Reward Guidance found no text in the positive conditioning; connect a CLIP Text Encode")
        if len(found) > 1 and not self._warned:
            logger.warning("Reward Guidance: %d conditionings are in force at once; it reads the first", len(found))
            self._warned = True
        if id(found[0]) not in self._texts:  # the conditionings live as long as the run
            rows = [unpadded(embedding) for embedding in found[0].cond]
            self._texts[id(found[0])] = [rows[clip % len(rows)] for clip in range(clips)]
        return self._texts[id(found[0])]


def _guidance(
    reward: Reward, settings: GuidanceSettings, sigmas: Sequence[float], sampling: Any
) -> RewardGuidance | None:
    """The engine's guidance for these noise levels; None where none of them is to be guided."""
    first, last = (sampling.percent_to_sigma(percent) + _TOLERANCE for percent in (settings.start, settings.end))
    steps = len(sigmas) - 1
    # where a clip is noise alone there is nothing to read
    guided = [step for step, sigma in enumerate(sigmas[:-1]) if last < sigma <= first and sigma < 1 - _TOLERANCE]
    if not guided:
        return None
    start, end = max(0.0, (guided[0] - 0.5) / steps), (guided[-1] + 0.5) / steps
    return _engine(reward, replace(settings, start=start, end=end, skip_first=0), sigmas)


def _engine(reward: Reward, settings: GuidanceSettings, sigmas: Sequence[float]) -> RewardGuidance:
    from ..spatialalign.guidance import RewardGuidance

    weights = [part.weights for part in reward.parts]
    return RewardGuidance([part.network for part in reward.parts], settings, sigmas, weights)


def _in_force(cond: dict[str, Any], sigma: float) -> bool:
    """Whether the host would use a conditioning at this noise level."""
    return bool(cond.get("timestep_start", sigma) >= sigma >= cond.get("timestep_end", sigma))


def unpadded(embedding: Tensor) -> Tensor:
    """An embedding ``(n, d)`` without the zero rows behind that pad it."""
    real = (embedding != 0).any(dim=1).nonzero()
    if not len(real):
        raise DataError("the positive conditioning is all zeros; connect the encoded prompt")
    return embedding[: int(real[-1]) + 1]


def make_ready(network: torch.nn.Module, device: torch.device) -> None:
    """Make a network on ``device`` usable under autograd.

    The host moves weights in inference mode, which makes them tensors that no gradient can pass; and when memory is
    short, it leaves some behind. A copy made outside that mode is an ordinary tensor; one is made at a time.
    """
    import torch

    def needed(tensor: Tensor) -> bool:
        return tensor.is_inference() or tensor.device != device

    with torch.inference_mode(False), torch.no_grad():
        for module in network.modules():
            for name, weight in module.named_parameters(recurse=False):
                if needed(weight):
                    setattr(module, name, torch.nn.Parameter(weight.to(device, copy=True), requires_grad=False))
            for name, buffer in module.named_buffers(recurse=False):
                if needed(buffer):
                    setattr(module, name, buffer.to(device, copy=True))
