"""From tracks to a score, and from many scores to a choice or a rate."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io, ui

from ..spatialalign.dsr import DSR
from ..spatialalign.errors import DataError, TracksError
from ..spatialalign.explain import explain
from ..spatialalign.score import DsrScore, dsr_score
from ..spatialalign.summary import RULES, Rule, rank, ranking_text, score_by, summarise, summary_lines
from ..spatialalign.tracks import Tracks
from . import host
from .sockets import DSR_SOCKET, SCORE_SOCKET, TRACKS_SOCKET, VALUES_SOCKET, to_image
from .values import DEFAULT_WEIGHTS, Values, rank_mixed

if TYPE_CHECKING:
    from torch import Tensor


class ScoreDsr(io.ComfyNode):
    """The score of one clip, with its curves, its picture and its reasons."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpatialAlignScore",
            display_name="DSR-Score",
            category="SpatialAlign/Score",
            description=(
                "Scores by geometry how well a tracked clip shows its relationship: from 0, the opposite, through 0.5, "
                "no evidence, to 1. A clip in which the two things are hardly seen is INVALID: a result with a reason, "
                "not an error."
            ),
            inputs=[
                TRACKS_SOCKET.Input("tracks", tooltip="Boxes of both things in every frame of one clip."),
                DSR_SOCKET.Input("dsr", tooltip="The relationship that the clip was asked to show."),
                _threshold_input("From this score on a clip passes. The paper asks for 0.7."),
            ],
            outputs=[
                io.Float.Output(
                    display_name="score", tooltip="DSR-Score by the paper's rule, 0 to 1; NaN when the clip is INVALID."
                ),
                io.Boolean.Output(
                    display_name="passed", tooltip="Whether the score is at least the threshold. INVALID never passes."
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="JSON: the score with its components, the normalised and the robust score, and the curves.",
                ),
                io.Float.Output(
                    display_name="initial_curve",
                    is_output_list=True,
                    tooltip="Spatial relation (SSR) of the initial side in every frame, -1 to 1; NaN where not valid.",
                ),
                io.Float.Output(
                    display_name="final_curve",
                    is_output_list=True,
                    tooltip="Spatial relation (SSR) of the final side in every frame, -1 to 1; NaN where not valid.",
                ),
                io.Image.Output(display_name="plot", tooltip="Both curves, the windows at either end, and the scores."),
                SCORE_SOCKET.Output(display_name="result", tooltip="For Pick Best, Score Summary and Collect Sample."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, tracks: Tracks, dsr: DSR, threshold: float) -> io.NodeOutput:
        from ..spatialalign.score_plot import plot_score

        threshold = _decimal(threshold)
        result = dsr_score(_oriented(tracks, dsr), dsr)
        passed = result.score is not None and result.score >= threshold
        report = {"dsr": dsr.to_dict(), "threshold": threshold, "passed": passed, **result.to_dict()}
        plot = host.intermediate(to_image(plot_score(result, dsr, threshold)))
        return io.NodeOutput(
            math.nan if result.score is None else result.score,
            passed,
            _json(report),
            _every_frame(result, result.initial_ssr.tolist()),
            _every_frame(result, result.final_ssr.tolist()),
            plot,
            result,
            ui=_shown(cls, explain(result, dsr, threshold), plot),
        )


class PickBest(io.ComfyNode):
    """The clip with the highest score."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpatialAlignPickBest",
            display_name="Pick Best",
            category="SpatialAlign/Score",
            description=(
                "Best of N: takes a list of clips with their scores and hands on the clip that scores highest, with "
                "the ranking of all. INVALID clips come last. With values it ranks by a mix of rewards."
            ),
            inputs=[
                io.Image.Input("clips", tooltip="A list of clips, such as the clips of GroundedSAM Track."),
                SCORE_SOCKET.Input("results", tooltip="The result of DSR-Score for each of the clips, in their order."),
                io.Combo.Input(
                    "by",
                    options=list(RULES),
                    tooltip=(
                        "paper: the DSR-Score. normalised: the same on a scale that all types of relationship share. "
                        "robust: the score that also looks between the ends."
                    ),
                ),
                io.Latent.Input(
                    "latents",
                    optional=True,
                    tooltip="The latents of the clips: a list of one for each, or one batch that holds them all.",
                ),
                VALUES_SOCKET.Input(
                    "values",
                    optional=True,
                    tooltip="Further rewards of each of the clips, of VideoReward Score, VLM Judge or Metrics.",
                ),
                io.String.Input(
                    "weights",
                    optional=True,
                    default=DEFAULT_WEIGHTS,
                    tooltip=(
                        "What counts how much when values are connected; dsr is the score that by chooses. Each is "
                        "first put on one scale: deviations from its mean over the clips. Below 0 less is better."
                    ),
                ),
            ],
            outputs=[
                io.Image.Output(display_name="best", tooltip="The clip that scores highest."),
                io.Int.Output(display_name="index", tooltip="Its place in the list, from 0."),
                io.Float.Output(
                    display_name="score", tooltip="Its score by the chosen rule, or by the mix; NaN when none has one."
                ),
                io.String.Output(display_name="ranking", tooltip="All clips from best to worst, a line each."),
                io.Latent.Output(
                    display_name="latent", tooltip="The latent of the best clip; nothing unless latents are connected."
                ),
            ],
            is_input_list=True,
        )

    @classmethod
    def execute(
        cls,
        clips: list[Tensor],
        results: list[DsrScore],
        by: list[Rule],
        latents: list[dict[str, Any]] | None = None,
        values: list[Values] | None = None,
        weights: list[str] | None = None,
    ) -> io.NodeOutput:
        if len(clips) != len(results) or not clips:
            raise DataError(
                f"Pick Best: found {len(clips)} clips and {len(results)} results; connect the clips of one GroundedSAM "
                "Track and the result of the DSR-Score behind it, one for each clip"
            )
        singles = _singles(latents, len(clips))
        if values is None:
            best, score, ranking = _rank(results, by[0])
        else:
            best, score, ranking = rank_mixed(results, by[0], values, weights[0] if weights else DEFAULT_WEIGHTS)
        return io.NodeOutput(clips[best], best, score, ranking, None if singles is None else singles[best])


class ScoreSummary(io.ComfyNode):
    """Correct@tau of many clips."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpatialAlignScoreSummary",
            display_name="Score Summary",
            category="SpatialAlign/Score",
            description=(
                "How many of a list of clips are correct: the share of all clips that score at least the threshold "
                "tau, which the paper calls Correct at tau. INVALID clips count as wrong; their share is given, too."
            ),
            inputs=[
                SCORE_SOCKET.Input("results", tooltip="A list of results of DSR-Score."),
                _threshold_input("tau: from this score on a clip is correct. The paper reports 0.7."),
            ],
            outputs=[
                io.Float.Output(display_name="correct", tooltip="Share of all clips that pass the threshold, 0 to 1."),
                io.Float.Output(display_name="invalid_rate", tooltip="Share of INVALID clips, 0 to 1."),
                io.String.Output(
                    display_name="report",
                    tooltip="JSON: rates with their 95% interval, the mean of the valid scores, and every score.",
                ),
                io.Image.Output(display_name="plot", tooltip="Correct clips against tau, with the 95% interval."),
            ],
            hidden=[io.Hidden.unique_id],
            is_input_list=True,
            is_output_node=True,
        )

    @classmethod
    def execute(cls, results: list[DsrScore], threshold: list[float]) -> io.NodeOutput:
        from ..spatialalign.score_plot import plot_correct

        tau = _decimal(threshold[0])
        report = summarise(results, tau)
        plot = host.intermediate(to_image(plot_correct(report["scores"]["paper"], tau)))
        return io.NodeOutput(
            report["correct"],
            report["invalid_rate"],
            _json(report),
            plot,
            ui=_shown(cls, summary_lines(report), plot),
        )


def _rank(results: list[DsrScore], rule: Rule) -> tuple[int, float, str]:
    """Place of the best, its score (NaN when all are INVALID), and the ranking in words."""
    best = rank(results, rule)[0]
    score = score_by(results[best], rule)
    return best, math.nan if score is None else score, ranking_text(results, rule)


def _threshold_input(tooltip: str) -> io.Float.Input:
    return io.Float.Input("threshold", default=0.7, min=0.0, max=1.0, step=0.01, tooltip=tooltip)


def _decimal(threshold: float) -> float:
    """The decimal that a widget shows: its own arithmetic may give 0.7000000000000001, which a score of 0.7 fails."""
    return round(threshold, 6)


def _oriented(tracks: Tracks, dsr: DSR) -> Tracks:
    try:
        return tracks.oriented(dsr.subject, dsr.object)
    except TracksError as error:
        raise TracksError(f"{error}; connect the same dsr to DSR-Score and to the node that made the tracks") from error


def _every_frame(result: DsrScore, curve: list[float]) -> list[float]:
    """A curve over the valid frames as one value for every frame, NaN for the others."""
    values = [math.nan] * result.frames
    for frame, value in zip(result.frames_used.tolist(), curve, strict=True):
        values[frame] = value
    return values


def _singles(latents: list[dict[str, Any]] | None, clips: int) -> list[dict[str, Any]] | None:
    """One LATENT for each clip, a single batch being cut into its members."""
    if latents is None:
        return None
    if len(latents) == 1 and clips > 1 and latents[0]["samples"].shape[0] == clips:
        return [_member(latents[0], i) for i in range(clips)]
    if len(latents) != clips:
        raise DataError(
            f"Pick Best: found {clips} clips and {len(latents)} latents; connect one latent for each clip, or the one "
            "batch that all clips were decoded from"
        )
    return latents


def _member(batch: dict[str, Any], index: int) -> dict[str, Any]:
    """The ``index``-th of a batch of latents; what all of them share is kept."""
    size, one = batch["samples"].shape[0], slice(index, index + 1)
    own: dict[str, Any] = {
        key: batch[key][one] for key in ("noise_mask", "batch_index") if key in batch and len(batch[key]) == size
    }
    return {**batch, "samples": batch["samples"][one], **own}


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)


def _shown(cls: type[io.ComfyNode], lines: list[str], plot: Tensor) -> dict[str, Any]:
    """What the node shows: its lines as one text, and its picture."""
    host.show_text("\n".join(lines), cls.hidden.unique_id)
    return {**ui.PreviewText("\n".join(lines)).as_dict(), **ui.PreviewImage(plot, cls=cls).as_dict()}
