"""The candidates of a search inside ComfyUI: sampled by its samplers, judged by geometry, told of in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..spatialalign.dsr import DSR
from ..spatialalign.score import DsrScore, dsr_score
from ..spatialalign.search import SearchSettings, best_of, survivors
from ..spatialalign.summary import Rule, clips, score_by
from . import host
from .grounded_sam import GroundedSam
from .looking import RewardLook
from .sockets import to_uint8
from .stretches import Stretches

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ..spatialalign.search_work import SearchResult

SHEET_CLIPS, TILE = 16, 120
"""How many of the best clips the contact sheet shows, and how wide a frame is on it, in pixels."""
_ENDED = {
    "all": "",
    "threshold": ", then one was good enough",
    "interrupted": ", then it was stopped; queue with another seed to go on",
}


@dataclass(frozen=True)
class Judge:
    """Scores a LATENT: decoded, tracked, and scored by a rule of :data:`~spatialalign.summary.RULES`."""

    vae: Any
    grounded_sam: GroundedSam
    dsr: DSR
    rule: Rule
    fps: float

    def __call__(self, latent: dict[str, Any]) -> tuple[Tensor, DsrScore]:
        """The clip as an IMAGE, and its score."""
        decoded = self.vae.decode(latent["samples"])
        clip = decoded.reshape(-1, *decoded.shape[-3:])
        host.load(self.grounded_sam.patchers, self.grounded_sam.memory(*clip.shape[:3]))
        names = self.dsr.subject, self.dsr.object
        tracks = self.grounded_sam.tracker.track(to_uint8(clip), *names, self.fps, lambda *_: host.check_interrupt())
        return clip, dsr_score(tracks, self.dsr)


class Candidates:
    """The sampler that :func:`~spatialalign.search_drivers.search` asks for; row ``i`` is the clip of seed ``i``.

    Attributes:
        sigmas: the noise levels.
        results: of the finished clips, by row.
        best: the IMAGE of the best clip so far; of the others only :attr:`small` is kept, as N clips are large.
        small: finished clips for the contact sheet, ``(T, h, w, 3)`` uint8, by row.
    """

    def __init__(
        self,
        stretches: Stretches,
        judge: Judge,
        look: RewardLook | None,
        seeds: Sequence[int],
        settings: SearchSettings,
    ) -> None:
        """Prepare one search; ``look`` scores clips on the way, None leaves that to ``judge``."""
        self._stretches, self._judge, self._look, self._seeds = stretches, judge, look, seeds
        self.sigmas = tuple(stretches.sigmas.tolist())
        self.results: dict[int, DsrScore] = {}
        self.small: dict[int, np.ndarray] = {}
        self.best: Tensor | None = None
        self._looks, self._taken, self._shown = 0, 0, 0
        self._total = _steps(settings, stretches.steps)
        self._bar = host.Progress(self._total)

    @property
    def evaluations(self) -> float:
        """Passes of the model so far; the reward's looks are their share of one."""
        return self._stretches.evaluations + (0.0 if self._look is None else self._looks * self._look.share)

    def advance(self, x: Tensor, first: int, last: int, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Each row by itself, so that N clips need no more memory than one."""
        import torch

        run = self._stretches.run
        ends = [run(self._seeds[row], clip[None], first, last, self._step) for clip, row in zip(x, rows, strict=True)]
        self._taken += len(rows) * (last - first)
        return torch.cat([end for end, _ in ends]), torch.cat([clean for _, clean in ends])

    def _step(self, preview: Any) -> None:
        self._shown += 1
        self._bar.update(min(self._shown, self._total), preview)

    def preview(self, x: Tensor, x0: Tensor, step: int, rows: Sequence[int]) -> list[float | None]:
        """Scores of clips on the way, by the reward from their noise, else of the predicted ones."""
        if self._look is not None:
            self._looks += len(rows)
            return self._look(x, self.sigmas[step])
        return [score_by(self._judge(self._stretches.latent(clip[None]))[1], self._judge.rule) for clip in x0]

    def score(self, x0: Tensor, rows: Sequence[int]) -> list[float | None]:
        """Scores of finished clips, which are kept."""
        for clip, row in zip(x0, rows, strict=True):
            image, result = self._judge(self._stretches.latent(clip[None]))
            before = [score_by(one, self._judge.rule) for one in self.results.values()]
            self.results[row] = result
            if best_of([*before, score_by(result, self._judge.rule)])[0] == len(before):
                self.best = image
            skip = max(1, image.shape[2] // TILE)
            self.small[row] = to_uint8(image[:, ::skip, ::skip])
        return [score_by(self.results[row], self._judge.rule) for row in rows]

    def sheet(self, order: Sequence[int]) -> np.ndarray:
        """A picture of the rows with their scores."""
        from ..spatialalign.plot import contact_sheet

        shown = list(enumerate(order[:SHEET_CLIPS], start=1))
        captions = [f"{place}. clip {row}: {_value(self._score(row))}" for place, row in shown]
        return contact_sheet(
            [(text, self.small[row]) for text, (_, row) in zip(captions, shown, strict=True)], tile=TILE
        )

    def report(self, found: SearchResult, settings: SearchSettings) -> str:
        """The finished clips from best to worst, those that were given up, what was seen on the way, and the price."""
        order = [found.candidates[place] for place in found.order]
        title = f"{settings.text}, by the {self._judge.rule} score:"
        if all(score is None for score in found.scores):
            title += " every clip is INVALID, the first is handed on"
        lines = [title]
        for place, row in enumerate(order, start=1):
            seed = "" if settings.kind == "particles" else f" (seed {self._seeds[row]})"
            lines.append(f"{place}. clip {row}{seed}: {_value(self._score(row))}{self._reason(row)}")
        by = "" if self._look is None else ", by the reward"
        for event in found.history:
            if event.step == self._stretches.steps:  # the scores of the end, which are above
                continue
            when = f"after {event.step} of {self._stretches.steps} steps"
            scores = ", ".join(_value(score) for score in event.scores)
            lines.append(f"{when}{by}: {scores}; {_kept(event.kept, settings)}")
        lines.append(f"{len(order)} of {clips(settings.candidates)} finished{_ENDED[found.ended]}")
        # A patch may answer in the model's place, so that nothing was counted.
        one = self._stretches.steps * self._stretches.evaluations / self._taken or 1.0
        price = f"{round(found.evaluations, 2):g} passes of the model, {found.evaluations / one:.3g} times those of one"
        return "\n".join([*lines, f"{price} clip; {clips(found.scorings)} scored"])

    def done(self) -> None:
        """Nothing is left to do."""
        self._bar.update(self._total)

    def _score(self, row: int) -> float | None:
        return score_by(self.results[row], self._judge.rule)

    def _reason(self, row: int) -> str:
        result, robust = self.results[row], self.results[row].robust
        if self._score(row) is not None:
            return ""
        return f", {robust.reason if self._judge.rule == 'robust' and robust is not None else result.reason}"


def _steps(settings: SearchSettings, steps: int) -> int:
    """Steps of all clips, if none is stopped."""
    if settings.kind != "pruned" or settings.candidates == 1:
        return settings.candidates * steps
    (first,) = settings.events(steps)
    kept = len(survivors([None] * settings.candidates, settings.keep))
    return settings.candidates * first + kept * (steps - first)


def _value(score: float | None) -> str:
    return "INVALID" if score is None else f"{score:.3f}"


def _kept(kept: Sequence[int], settings: SearchSettings) -> str:
    return ("continued: " if settings.kind == "particles" else "taken on: ") + ", ".join(str(one) for one in kept)
