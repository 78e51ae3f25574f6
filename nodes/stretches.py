"""ComfyUI's sampling cut into stretches, which a search can look at, drop or go on with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..spatialalign.errors import ConfigError
from . import host

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """The widgets of ComfyUI's KSampler without its seed."""

    sampler: str
    scheduler: str
    steps: int
    cfg: float
    denoise: float


class Stretches:
    """KSampler's work on one clip at a time, from any of its noise levels to any later one.

    Between two levels a clip is in the model's space and as the sampler left it: a cut changes nothing for a sampler
    without memory, and masks, LoRAs and patches of the MODEL work as ever.

    Attributes:
        sigmas: the noise levels, down to 0; one more than there are steps.
        evaluations: passes of the model so far: with classifier-free guidance two of a step, with some samplers more.
        is_flow: whether a level is ``(1 - sigma) x0 + sigma noise``, as in Wan.
    """

    def __init__(self, model: Any, positive: Any, negative: Any, latent: Mapping[str, Any], plan: Plan) -> None:
        """Prepare to sample; KSampler's inputs.

        Raises:
            ConfigError: ``latent`` is not of one clip, or the schedule has no step.
        """
        import torch

        samples = latent["samples"]
        if not isinstance(samples, torch.Tensor) or len(samples) != 1:
            found = f"{len(samples)} clips" if isinstance(samples, torch.Tensor) else type(samples).__name__
            raise ConfigError(f"latent_image: one empty clip is needed, found {found}; set its batch size to 1")
        self._model, self._guidance, self._plan = model, (positive, negative, plan.cfg), plan
        self._latent = host.sampling_latent(model, latent)
        self.sigmas, self.is_flow = host.sampling_levels(model, plan.sampler, plan.scheduler, plan.steps, plan.denoise)
        if len(self.sigmas) < 2:
            raise ConfigError(f"the scheduler {plan.scheduler} gives no step for denoise {plan.denoise:g}; raise it")
        self._preview, self.evaluations = host.preview(model), 0

    @property
    def steps(self) -> int:
        """How many steps there are; some schedulers give another number than they are asked for."""
        return len(self.sigmas) - 1

    def begin(self, seed: int) -> Tensor:
        """What KSampler begins with for this seed, ``(1, c, f, h, w)`` on the CPU."""
        found: list[Tensor] = []

        def nothing(function: Any, wrapped: Any, x: Tensor, sigmas: Tensor, **rest: Any) -> Tensor:
            found.append(x)
            return x

        host.sample(self._model, self._guidance, self._latent, "euler", self.sigmas[:1].clone(), (seed, seed), nothing)
        return found[0].cpu()

    def run(
        self, seed: int, x: Tensor, first: int, last: int, step: Callable[[Any], None] = lambda preview: None
    ) -> tuple[Tensor, Tensor]:
        """Take a clip from level ``first`` to level ``last``.

        A step by itself is one of euler: there the others have nothing to remember, and some take no single step.

        Args:
            seed: the clip's. A later stretch draws noise of its own, where the sampler draws any.
            x: the clip at the first level, from :meth:`begin` or from a stretch before.
            first: index of that level.
            last: index of a later one.
            step: called after each step with its preview, which may be None.

        Returns:
            The clip at the last level, and its end as it was predicted last; float32 on the CPU.
        """
        found: dict[str, Tensor] = {}
        passes: list[int] = []

        def counted(model: Any, x: Tensor, *given: Any, **named: Any) -> Any:
            passes.append(len(x))
            return model(x, *given, **named)

        def steps(function: Any, wrapped: Any, start: Tensor, sigmas: Tensor, extra_args: Any, **rest: Any) -> Tensor:
            # Patches find the number of a step among the levels of the whole schedule.
            options = extra_args["model_options"]["transformer_options"]
            options["sample_sigmas"] = self.sigmas
            # What the host calls about each pass of the model; it makes these options anew for every run.
            options.setdefault("wrappers", {}).setdefault("apply_model", {})["spatialalign"] = [counted]

            def told(state: Mapping[str, Any]) -> None:
                found["x0"] = state["denoised"]
                step(self._preview(state["denoised"]))

            rest["callback"] = told
            end: Tensor = function(wrapped, x.to(start, copy=True), sigmas, extra_args=extra_args, **rest)
            found["end"] = end
            if last == self.steps:  # uni_pc ends above 0, and says so in the levels that it was given
                found["end"] = self._model.get_model_object("model_sampling").inverse_noise_scaling(sigmas[-1], end)
            return end

        sampler = "euler" if last - first == 1 < self.steps else self._plan.sampler
        levels, seeds = self.sigmas[first : last + 1].clone(), (seed, (seed + first) % 2**64)
        host.sample(self._model, self._guidance, self._latent, sampler, levels, seeds, steps)
        self.evaluations += sum(passes)
        end = found["end"].float().cpu()
        return end, found["x0"].float().cpu() if "x0" in found else end

    def latent(self, x: Tensor) -> dict[str, Any]:
        """A clip in the model's space as a LATENT."""
        return {**self._latent, "samples": host.intermediate(self._model.model.process_latent_out(x))}
