"""Every metric of every clip of a store; what was measured before, on the same files by the same model, is kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spatialalign.dsr import DSR
from spatialalign.errors import ConfigError, DataError, SpatialAlignError
from spatialalign.metrics_frames import frame_change, linear_smoothness
from spatialalign.metrics_spatial import ASKED, Answers, ask_both, compbench_score, vbench_score
from spatialalign.score import DsrScore
from spatialalign.tracks import Tracks
from training.monitors import JsonlLog
from training.store import Sample, Store

if TYPE_CHECKING:
    from spatialalign.metrics_identity import IdentityEncoder
    from spatialalign.video import Video

Values = dict[str, float | None]
Key = tuple[str, int]
"""Prompt id and seed."""

METRICS: Mapping[str, tuple[str, ...]] = {
    "vbench": ("vbench",),
    "compbench": ("compbench",),
    "vbench2": ("vbench2",),
    "identity": ("identity",),
    "clip_iqa": ("clip_iqa_natural", "clip_iqa_quality"),
    "smoothness": ("smoothness", "frame_change"),
}
"""The metrics beside the score, and the columns that each fills."""
RULES: Mapping[str, int] = {
    "vbench": 1,
    "compbench": 1,
    "vbench2": 1,
    "identity": 1,
    "clip_iqa": 1,
    "smoothness": 1,
}
"""Version of each metric's rule: one more with every change of its numbers, so that kept values are not mixed."""
MODELS: Mapping[str, tuple[str, str]] = {
    "vbench2": ("vlm", "a chat model that takes pictures, such as Qwen/Qwen2.5-VL-7B-Instruct"),
    "identity": ("dino", "facebook/dinov2-base"),
    "clip_iqa": ("clip", "clip_iqa"),
}
"""The metrics that need a model: the option that names it, and what is usual there."""


NOT_SCORED = "not scored"
"""The reason of a clip without a score: it could not be made or tracked, or was not tried."""


@dataclass(frozen=True)
class MetricOptions:
    """What is measured beside the score; also options of ``training.evaluate``."""

    metrics: str = "all"
    """Metrics beside the score: vbench, compbench, vbench2, identity, clip_iqa, smoothness, separated by commas; or
    all of those whose model is given."""
    dino: str | None = None
    """DINOv2 for identity: a transformers folder or hub id, as facebook/dinov2-base."""
    clip: str | None = None
    """CLIP for clip_iqa: clip_iqa for the paper's (a download of torchmetrics), or a transformers folder or hub id."""
    vlm: str | None = None
    """Judge for vbench2: a folder or hub id of a transformers chat model that takes pictures."""
    vlm_frames: int = ASKED
    """Frames of a clip that vbench2 samples; the first half of them is shown at once."""
    metric_batch: int = 8
    """Pictures given to DINOv2 or CLIP at once."""

    def __post_init__(self) -> None:
        if self.vlm_frames < 2 or self.metric_batch < 1:
            raise ConfigError(f"expected vlm_frames >= 2 and metric_batch >= 1, found {self}")
        for metric in self.named:
            if metric not in METRICS:
                raise ConfigError(f"there is no metric {metric!r}; expected all, or any of {', '.join(METRICS)}")
            if metric in MODELS and self.model_of(metric) is None:
                option, usual = MODELS[metric]
                raise ConfigError(f"the metric {metric} needs a model: give --{option}, for instance {usual}")

    @property
    def named(self) -> tuple[str, ...]:
        """The metrics asked for one by one; none for all."""
        return () if self.metrics == "all" else tuple(part.strip() for part in self.metrics.split(","))

    def model_of(self, metric: str) -> str | None:
        """The model given for a metric."""
        return {"vbench2": self.vlm, "identity": self.dino, "clip_iqa": self.clip}.get(metric)

    @property
    def missing(self) -> dict[str, str]:
        """The metrics of "all" that cannot be had, with the reason."""
        return {
            metric: f"no model was given: --{option}, for instance {usual}"
            for metric, (option, usual) in MODELS.items()
            if not self.named and self.model_of(metric) is None
        }

    @property
    def chosen(self) -> tuple[str, ...]:
        """The metrics to compute, in the order of :data:`METRICS`."""
        return tuple(metric for metric in METRICS if metric not in self.missing and metric in (self.named or METRICS))


@dataclass(frozen=True)
class Subject:
    """A clip as metrics see it: what was asked for, its tracks and score, and its video."""

    dsr: DSR
    tracks: Tracks
    score: DsrScore
    video: Video


@dataclass(frozen=True)
class Row:
    """What is known of one clip of one model.

    Attributes:
        model: name of the model.
        prompt_id, seed, type_code: which clip.
        values: by column; "score", "normalised" and "robust" are always there. None is INVALID or not to be had.
        reason: why the clip is INVALID by the paper's rule, else None.
    """

    model: str
    prompt_id: str
    seed: int
    type_code: str
    values: Values
    reason: str | None


class Measurer:
    """Computes the chosen metrics of clips. Models are loaded when the first clip needs them.

    Attributes:
        failed: ``(model/sample, metric, why)`` for each value that could not be had.
    """

    def __init__(self, options: MetricOptions, device: str = "cpu", log: JsonlLog | None = None) -> None:
        """``log`` keeps every value, clip by clip, and what it holds is not computed again."""
        self.options, self.device = options, device
        self.failed: list[tuple[str, str, str]] = []
        self._log = log
        self._known = {(row["sample"], row["metric"]): row for row in (log.rows() if log is not None else [])}
        self._made = {metric: made_by(options, metric) for metric in options.chosen}
        self._functions: dict[str, Callable[[Subject], Sequence[float | None]]] = {
            "vbench": lambda clip: [vbench_score(clip.tracks, clip.dsr)],
            "compbench": lambda clip: [compbench_score(clip.tracks, clip.dsr)],
            "smoothness": lambda clip: [linear_smoothness(clip.video.frames), frame_change(clip.video.frames)],
        }

    def measure(self, model: str, sample: Sample, dsr: DSR) -> Row:
        """The values of one clip; a clip that has no score is INVALID with :data:`NOT_SCORED`."""
        if not sample.scored:
            empty: Values = dict.fromkeys(("score", "normalised", "robust"))
            return Row(model, sample.prompt_id, sample.seed, dsr.type_code, empty, NOT_SCORED)
        score = sample.read_score()
        robust = None if score.robust is None else score.robust.score
        values: Values = {"score": score.score, "normalised": score.normalised, "robust": robust}
        if sample.video.is_file() and sample.tracks.is_file():
            values |= self._beside(f"{model}/{sample.name}", sample, dsr, score)
        return Row(model, sample.prompt_id, sample.seed, dsr.type_code, values, score.reason)

    def _beside(self, name: str, sample: Sample, dsr: DSR, score: DsrScore) -> Values:
        """The chosen metrics of a clip, from the log where it has them for these very files, rules and models."""
        stamp = _stamp([sample.video, sample.tracks, sample.score])
        values: Values = {}
        clip: Subject | None = None
        for metric in self.options.chosen:
            columns, made = METRICS[metric], self._made[metric]
            known = self._known.get((name, metric))
            if known is not None and known["stamp"] == stamp and is_made_by(known.get("made", {}), made):
                values |= dict(zip(columns, known["values"], strict=True))
                continue
            function = self._function(metric)
            try:
                clip = clip or _read(sample, dsr, score)
                found = list(function(clip))
            except SpatialAlignError as error:
                self.failed.append((name, metric, str(error)))
                found = [None] * len(columns)
            else:
                if self._log is not None:
                    self._log.write({"sample": name, "metric": metric, "made": made, "stamp": stamp, "values": found})
            values |= dict(zip(columns, found, strict=True))
        return values

    def _function(self, metric: str) -> Callable[[Subject], Sequence[float | None]]:
        """How a metric is computed; its model is loaded now if it was not before."""
        if metric not in self._functions:
            self._functions[metric] = self._load(metric)
        return self._functions[metric]

    def _load(self, metric: str) -> Callable[[Subject], Sequence[float | None]]:
        name, batch = str(self.options.model_of(metric)), self.options.metric_batch
        if metric == "identity":
            from spatialalign.metrics_identity import IdentityEncoder

            encoder = IdentityEncoder.from_pretrained(name, self.device, batch)
            return lambda clip: [_identity(encoder, clip)]
        if metric == "clip_iqa":
            from spatialalign.metrics_clip_iqa import ClipIqa

            judge = ClipIqa.from_pretrained(name, self.device, batch)
            return lambda clip: judge.score(clip.video.frames)
        from spatialalign.rewards.vlm_judge import VlmJudge

        vlm = VlmJudge.from_pretrained(name, self.device)
        return lambda clip: [_answered(ask_both(clip.video, clip.dsr, vlm, self.options.vlm_frames))]


def made_by(options: MetricOptions, metric: str) -> dict[str, Any]:
    """What a metric's value hangs on beside the clip, plain JSON values.

    ``rule``: its version in :data:`RULES`. Of metrics with a model also ``model``: its name, and ``files``: a digest of
    the sizes and times of its files, None for one that is no folder here. Of vbench2 also ``frames``: how many are
    sampled, on which the question depends.
    """
    made: dict[str, Any] = {"rule": RULES[metric]}
    if metric in MODELS:
        model = str(options.model_of(metric))
        files = sorted(path for path in Path(model).rglob("*") if path.is_file()) if Path(model).is_dir() else []
        made |= {"model": model, "files": hashlib.sha256(_stamp(files).encode()).hexdigest()[:16] if files else None}
    return made | ({"frames": options.vlm_frames} if metric == "vbench2" else {})


def is_made_by(kept: Mapping[str, Any], made: Mapping[str, Any]) -> bool:
    """Whether a kept value is what would be computed now; a model whose files are not here is known by its name."""
    return all(kept.get(key) == value for key, value in made.items() if value is not None)


def measure_store(measurer: Measurer, model: str, store: Store, only: Iterable[Key] | None = None) -> list[Row]:
    """The rows of a store by prompt and seed; ``only`` these samples, if given, there or not.

    Raises:
        DataError: no clip of the store has a score.
    """
    from tqdm import tqdm

    samples = store.samples() if only is None else [store.sample(*key) for key in only]
    relations = {name: store.prompt(name).dsr for name in dict.fromkeys(sample.prompt_id for sample in samples)}
    if not any(sample.scored for sample in samples):
        raise DataError(f"no clip of {store.root} has a score; run python -m training.score --store {store.root}")
    shown = tqdm(samples, desc=model, unit="clip", disable=None)
    return [measurer.measure(model, sample, relations[sample.prompt_id]) for sample in shown]


def _stamp(files: Iterable[Path]) -> str:
    """Sizes and times of files, which change when a file does."""
    return "/".join(f"{found.st_size}-{found.st_mtime_ns}" for found in (path.stat() for path in files))


def _read(sample: Sample, dsr: DSR, score: DsrScore) -> Subject:
    from spatialalign.video import read_video

    tracks = Tracks.load(sample.tracks).oriented(dsr.subject, dsr.object)
    return Subject(dsr, tracks, score, read_video(sample.video))


def _identity(encoder: IdentityEncoder, clip: Subject) -> float | None:
    """As in the paper, an INVALID clip takes no part."""
    return encoder.score(clip.video, clip.tracks, clip.score.frames_used) if clip.score.valid else None


def _answered(answers: Answers) -> float:
    if answers.score is None:
        raise DataError(f"the judge was unclear (initial relation: {answers.initial}, final: {answers.final})")
    return answers.score
