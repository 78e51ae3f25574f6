"""Samplers that make several clips, score them by geometry, and hand on the best."""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import io, ui

from ..spatialalign.dsr import DSR
from ..spatialalign.errors import ConfigError
from ..spatialalign.search import SearchSettings, candidate_seed
from ..spatialalign.summary import RULES, Rule
from . import host
from .bridges import fps_input
from .candidates import Candidates, Judge
from .grounded_sam import GroundedSam
from .looking import RewardLook
from .rewards import Reward
from .sockets import DSR_SOCKET, GROUNDED_SAM_SOCKET, REWARD_SOCKET, SCORE_SOCKET, to_image
from .stretches import Plan, Stretches

CATEGORY = "SpatialAlign/Sampling"
_log = logging.getLogger("spatialalign")


class BestOfNSampler(io.ComfyNode):
    """The best of several clips of one prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpatialAlignBestOfNSampler",
            display_name="Best of N Sampler",
            category=CATEGORY,
            description=(
                "Samples several clips of one prompt one after the other, decodes, tracks and scores each, and hands "
                "on the best. The first is the clip that KSampler makes with this seed, so when all are finished the "
                "result scores at least as high. With keep below 1 all are looked at part of the way and only the "
                "better ones are finished. A latent reward can take that look at their noise, before the first step."
            ),
            inputs=[
                *_model_inputs(),
                *_sampler_inputs("The sampler. With keep below 1 it is cut at the look; euler does not notice."),
                io.Int.Input(
                    "candidates", default=4, min=1, max=256, tooltip="How many clips are begun; 1 is a plain KSampler."
                ),
                io.Float.Input(
                    "keep",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "Share of the clips that is taken on after the look. 1 finishes all: without a look, but with "
                        "a reward and stop_at in the order of its look."
                    ),
                ),
                io.Float.Input(
                    "preview",
                    default=0.4,
                    min=0.0,
                    max=0.95,
                    step=0.01,
                    tooltip="Share of the steps after which the look is taken; 0, only with a reward: at the noise.",
                ),
                io.Float.Input(
                    "stop_at",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="No further clip is made once one scores at least this; 0 makes all of them.",
                ),
                *_score_inputs(),
                _reward_input(),
            ],
            outputs=_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        negative: Any,
        latent_image: dict[str, Any],
        vae: Any,
        grounded_sam: GroundedSam,
        dsr: DSR,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        denoise: float,
        candidates: int,
        keep: float,
        preview: float,
        stop_at: float,
        by: Rule,
        fps: float,
        reward: Reward | None = None,
    ) -> io.NodeOutput:
        threshold = round(stop_at, 6) or None  # a widget's own arithmetic may give 0.7000000000000001
        looks = keep < 1 or (reward is not None and threshold is not None)
        if looks and reward is None and not preview:
            raise ConfigError(
                "preview: at 0 a clip is noise, in which the tracker finds nothing; connect a reward, or set it above 0"
            )
        settings = SearchSettings(
            "pruned" if looks else "best-of-n",
            candidates,
            keep=keep,
            preview=preview if looks else None,
            preview_by="tracker" if reward is None else "reward",
            threshold=threshold,
        )
        look = None if reward is None else RewardLook(reward, model, positive)
        plan = Plan(sampler_name, scheduler, steps, cfg, denoise)
        stretches = Stretches(model, positive, negative, latent_image, plan)
        return _searched(cls, stretches, settings, seed, Judge(vae, grounded_sam, dsr, by, fps), look)


class ParticleSampler(io.ComfyNode):
    """The best of several clips that were resampled on the way."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpatialAlignParticleSampler",
            display_name="Particle Sampler",
            category=CATEGORY,
            description=(
                "Samples several clips of one prompt side by side and scores on the way what they are becoming: clips "
                "that do badly are dropped, and those that do well are continued more than once, with fresh noise. "
                "Feynman-Kac steering; for flow models such as Wan. The best clip of the end is handed on. The scores "
                "on the way are the tracker's or a latent reward's."
            ),
            inputs=[
                *_model_inputs(),
                *_sampler_inputs("The sampler of the steps before the first scoring; from there on they are euler's."),
                io.Int.Input(
                    "particles",
                    default=4,
                    min=3,  # two are never resampled: their effective number is at least one, half of them
                    max=256,
                    tooltip="How many clips there are at any time.",
                ),
                io.Float.Input(
                    "preview",
                    default=0.4,
                    min=0.05,
                    max=0.95,
                    step=0.01,
                    tooltip="Share of the steps after which the clips are scored for the first time.",
                ),
                io.Float.Input(
                    "resample_every",
                    default=0.15,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "Share of the steps between two scorings. Each decodes and tracks every clip, or asks the "
                        "reward."
                    ),
                ),
                io.Float.Input(
                    "noise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="How much fresh noise each step brings after the first scoring; 1 for the exact process.",
                ),
                io.Combo.Input(
                    "potential",
                    options=["max", "difference", "sum"],
                    tooltip=(
                        "What clips are weighted by: the best score on their way, the gain since the last scoring, or "
                        "the sum of all scores."
                    ),
                ),
                io.Float.Input(
                    "temperature",
                    default=0.1,
                    min=0.001,
                    max=10.0,
                    step=0.001,
                    tooltip="A clip that scores higher by this much weighs e times as much. Lower is stricter.",
                ),
                *_score_inputs(),
                _reward_input(),
            ],
            outputs=_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        negative: Any,
        latent_image: dict[str, Any],
        vae: Any,
        grounded_sam: GroundedSam,
        dsr: DSR,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        denoise: float,
        particles: int,
        preview: float,
        resample_every: float,
        noise: float,
        potential: Any,
        temperature: float,
        by: Rule,
        fps: float,
        reward: Reward | None = None,
    ) -> io.NodeOutput:
        settings = SearchSettings(
            "particles",
            particles,
            preview=preview,
            preview_by="tracker" if reward is None else "reward",
            resample_every=resample_every,
            potential=potential,
            temperature=temperature,
            eta=noise,
        )
        plan = Plan(sampler_name, scheduler, steps, cfg, denoise)
        stretches = Stretches(model, positive, negative, latent_image, plan)
        if not stretches.is_flow:
            raise ConfigError(
                f"Particle Sampler: the model ({type(model.model).__name__}) does not predict a flow, and fresh noise "
                "is added by a flow's rule; use a native Wan model, or Best of N Sampler"
            )
        look = None if reward is None else RewardLook(reward, model, positive)
        return _searched(cls, stretches, settings, seed, Judge(vae, grounded_sam, dsr, by, fps), look)


def _searched(
    cls: type[io.ComfyNode],
    stretches: Stretches,
    settings: SearchSettings,
    seed: int,
    judge: Judge,
    look: RewardLook | None,
) -> io.NodeOutput:
    """Search, and what either node hands on of it."""
    import torch

    from ..spatialalign.search_drivers import search

    seeds = [candidate_seed(seed, row) for row in range(settings.candidates)]
    candidates = Candidates(stretches, judge, look, seeds, settings)
    noise = torch.cat([stretches.begin(one) for one in seeds])
    (found,) = search(candidates, noise, settings, [seed], stop_on=(host.interruption(),))
    report = candidates.report(found, settings)
    if found.ended == "interrupted":
        _log.warning("%s was stopped; the graph goes on with %d finished", settings.text, len(found.candidates))
    else:
        candidates.done()
    rows = [found.candidates[place] for place in found.order]
    latents = [stretches.latent(found.latents[place][None]) for place in found.order]
    sheet = host.intermediate(to_image(candidates.sheet(rows)))
    host.show_text(report, cls.hidden.unique_id)
    shown = {**ui.PreviewText(report).as_dict(), **ui.PreviewImage(sheet, cls=cls).as_dict()}
    return io.NodeOutput(latents[0], candidates.best, candidates.results[rows[0]], latents, report, sheet, ui=shown)


def _model_inputs() -> list[Any]:
    return [
        io.Model.Input("model", tooltip="The model, with its LoRAs and patches, Reward Guidance among them."),
        io.Conditioning.Input("positive", tooltip="The encoded prompt."),
        io.Conditioning.Input("negative", tooltip="The encoded negative prompt; it does nothing at cfg 1."),
        io.Latent.Input("latent_image", tooltip="An empty latent video of one clip, or one to be sampled anew."),
        io.Vae.Input("vae", tooltip="Decodes the clips for the score."),
        GROUNDED_SAM_SOCKET.Input("grounded_sam", tooltip="From Load GroundedSAM or Load Miniature; tracks the clips."),
        DSR_SOCKET.Input("dsr", tooltip="The relationship that the clips are scored for."),
    ]


def _sampler_inputs(sampler: str) -> list[Any]:
    samplers, schedulers = host.sampler_choices()
    return [
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=True,
            tooltip="The seed of the first clip; those of the others follow from it and are told in the ranking.",
        ),
        io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Steps of one clip."),
        io.Float.Input(
            "cfg",
            default=5.0,
            min=0.0,
            max=100.0,
            step=0.1,
            round=0.01,
            tooltip="Classifier-free guidance; 1 leaves the negative prompt out and takes half the time.",
        ),
        io.Combo.Input("sampler_name", options=samplers, default="euler", tooltip=sampler),
        io.Combo.Input("scheduler", options=schedulers, default="simple", tooltip="How the noise goes down."),
        io.Float.Input(
            "denoise",
            default=1.0,
            min=0.01,
            max=1.0,
            step=0.01,
            tooltip="How much of latent_image is replaced; 1 makes new clips.",
        ),
    ]


def _score_inputs() -> list[Any]:
    rules = "paper: the DSR-Score. normalised: on a scale that all types share. robust: looks between the ends, too."
    return [io.Combo.Input("by", options=list(RULES), tooltip=rules), fps_input()]


def _reward_input() -> Any:
    return REWARD_SOCKET.Input(
        "reward",
        optional=True,
        tooltip="A latent reward that takes the looks on the way, at the noisy clips; without one the tracker does.",
    )


def _outputs() -> list[Any]:
    return [
        io.Latent.Output(display_name="latent", tooltip="The best clip, before it is decoded."),
        io.Image.Output(display_name="images", tooltip="The frames of the best clip."),
        SCORE_SOCKET.Output(display_name="result", tooltip="Its score, for Collect Sample or Score Summary."),
        io.Latent.Output(
            display_name="latents", is_output_list=True, tooltip="All finished clips, from best to worst, as a list."
        ),
        io.String.Output(
            display_name="ranking", tooltip="Every clip with its seed and score, and what the search took."
        ),
        io.Image.Output(display_name="sheet", tooltip="Frames of the finished clips with their scores, best first."),
    ]
