"""Search at sampling time: what is chosen of several candidates. Settings and the maths, on plain arrays.

Kinds: best-of-N takes N clips to the end and keeps the best. Pruned best-of-N scores the clips part of the way, or
their noise, and takes the better share on. Particles (Feynman-Kac steering, arXiv 2501.06848) are scored several times
on the way and resampled by it. The ways themselves are in :mod:`.search_drivers`.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

SearchKind = Literal["none", "best-of-n", "pruned", "particles"]
Potential = Literal["max", "difference", "sum"]
PreviewBy = Literal["tracker", "reward"]
Floats = NDArray[np.float64]

INVALID_REWARD = 0.0
"""What an INVALID clip counts in a potential: as much as the worst DSR-Score. In an order it stands behind all."""

_FORM = re.compile(r"(best-of|pruned|particles)-([1-9]\d*)")
_NAMES: dict[str, SearchKind] = {"best-of": "best-of-n", "pruned": "pruned", "particles": "particles"}
_LOOK = ("preview", "preview_by", "preview_frames")
_MATTERS: dict[SearchKind, tuple[str, ...]] = {
    "none": (),
    "best-of-n": ("threshold",),
    "pruned": ("keep", *_LOOK, "threshold"),
    "particles": (*_LOOK, "resample_every", "ess", "potential", "temperature", "eta"),
}


@dataclass(frozen=True)
class SearchSettings:
    """How one clip is chosen of several candidates.

    Attributes:
        kind: "none" makes one clip.
        candidates: N, how many are begun.
        keep: share of the candidates that survives the pruning, in (0, 1]; at least one does.
        preview: share of the steps, in (0, 1), after which the clips are first scored; pruning by a reward may do it at
            0, by their noise. None for that, for 0.125 with particles by a reward, and for 0.25 by the tracker.
        preview_by: what scores clips on the way: "tracker" tracks the predicted clean ones, "reward" asks a latent
            reward of the noisy ones.
        preview_frames: how many frames of a predicted clip, evenly spaced, are tracked; None for all.
        threshold: a score that is good enough, so that no further candidates are taken on; None for never.
        resample_every: share of the steps between two scorings of the particles, in (0, 1].
        ess: particles are resampled when their effective sample size is below this share of N, in [0, 1].
        potential: what the particles are weighted by, see :func:`log_potential`.
        temperature: of the weights ``exp(score / temperature)``; above 0.
        eta: how much fresh noise the steps after the first scoring bring, in (0, 1]; 1 for the exact reverse process.
    """

    kind: SearchKind = "none"
    candidates: int = 1
    keep: float = 0.5
    preview: float | None = None
    preview_by: PreviewBy = "tracker"
    preview_frames: int | None = None
    threshold: float | None = None
    resample_every: float = 0.25
    ess: float = 0.5
    potential: Potential = "max"
    temperature: float = 0.1
    eta: float = 1.0

    def __post_init__(self) -> None:
        for name, names in (("kind", SearchKind), ("potential", Potential), ("preview_by", PreviewBy)):
            value = getattr(self, name)
            if value not in get_args(names):
                raise ConfigError(f"search: {name} must be one of {', '.join(get_args(names))}, found {value!r}")
        if self.candidates < 1 or (self.kind == "none" and self.candidates > 1):
            expected = "1 for the kind none" if self.kind == "none" else "at least 1"
            raise ConfigError(f"search: candidates must be {expected}, found {self.candidates}")
        if self.preview_frames is not None and (self.preview_frames < 2 or self.preview_by == "reward"):
            expected = "left out, as a reward tracks none" if self.preview_by == "reward" else "at least 2 or left out"
            raise ConfigError(f"search: preview_frames must be {expected}, found {self.preview_frames}")
        if not (0 < self.first_look < 1 or (self.first_look == 0 and self._sees_noise)):
            expected = "at least 0 and below 1" if self._sees_noise else "between 0 and 1"
            raise ConfigError(f"search: preview must be {expected}, found {self.preview}")
        for name in ("keep", "resample_every", "eta"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"search: {name} must be above 0 and at most 1, found {getattr(self, name)}")
        if not 0 <= self.ess <= 1:
            raise ConfigError(f"search: ess must be in [0, 1], found {self.ess}")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ConfigError(f"search: temperature must be above 0, found {self.temperature}")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ConfigError(f"search: threshold must be a number or left out, found {self.threshold}")
        if self.threshold is not None and self.kind not in ("best-of-n", "pruned"):
            raise ConfigError(
                f"search: a threshold needs best-of-n or pruned, found {self.kind}, which leaves no candidate out"
            )

    @classmethod
    def parse(cls, text: str) -> SearchSettings:
        """``"none"``, ``"best-of-4"``, ``"pruned-8"`` or ``"particles-4"``; raises :class:`ConfigError` for others."""
        if text == "none":
            return cls()
        match = _FORM.fullmatch(text)
        if match is None:
            raise ConfigError(f"a search is none, best-of-<N>, pruned-<N> or particles-<N>, found {text!r}")
        return cls(_NAMES[match[1]], int(match[2]))

    @property
    def text(self) -> str:
        """The form that :meth:`parse` reads: kind and candidates."""
        return "none" if self.kind == "none" else f"{self.kind.removesuffix('-n')}-{self.candidates}"

    @property
    def name(self) -> str:
        """Changes with everything that changes the clip: :attr:`text`, and what else was not left as it is."""
        default = SearchSettings()
        given = [(field, getattr(self, field)) for field in _MATTERS[self.kind]]
        other = [f"{field}={value}" for field, value in given if value != getattr(default, field)]
        return f"{self.text}({','.join(other)})" if other else self.text

    def to_dict(self) -> dict[str, Any]:
        """What matters for the kind, as plain JSON values."""
        values = asdict(self) | {"preview": self.first_look}
        return {field: values[field] for field in ("kind", "candidates", *_MATTERS[self.kind])}

    @property
    def looks(self) -> bool:
        """Whether clips are scored on the way."""
        return self.kind in ("pruned", "particles")

    @property
    def first_look(self) -> float:
        """``preview``, or what stands for it."""
        if self.preview is not None:
            return self.preview
        if self.preview_by == "reward":
            return 0.0 if self.kind == "pruned" else 0.125
        return 0.25

    @property
    def _sees_noise(self) -> bool:
        return self.kind == "pruned" and self.preview_by == "reward"

    def events(self, steps: int) -> tuple[int, ...]:
        """After how many of the steps clips are scored: once when pruning, several times for particles.

        Raises:
            ConfigError: one step, which leaves no way to go after a first look.
        """
        if not self.looks:
            return ()
        if steps < 2:
            raise ConfigError(f"search {self.text} needs at least 2 sampling steps, found {steps}; take best-of-n")
        first = min(max(1, round(self.first_look * steps)), steps - 1) if self.first_look else 0
        if self.kind == "pruned":
            return (first,)
        distance = max(1, round(self.resample_every * steps))
        return tuple(range(first, steps, distance))


def derived_seed(seed: int, what: str) -> int:
    """A seed of 53 bits (JSON keeps it exactly) that follows from another one and a word: SHA-256 of both."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{what}".encode()).digest()[:8], "big") >> 11


def candidate_seed(seed: int, index: int) -> int:
    """The seed of candidate ``index``; the first candidate's is ``seed``, so it is the clip made without a search."""
    return seed if index == 0 else derived_seed(seed, f"candidate {index}")


def best_of(scores: Sequence[float | None]) -> list[int]:
    """Positions of the scores, best first; INVALID ones (None) behind all, equal ones in their order."""
    return sorted(range(len(scores)), key=lambda i: _rank(scores[i]), reverse=True)


def _rank(score: float | None) -> float:
    return -math.inf if score is None else score


def survivors(scores: Sequence[float | None], keep: float) -> list[int]:
    """Which candidates the pruning leaves, best first: ``ceil(keep N)`` of them, at least one."""
    return best_of(scores)[: max(1, math.ceil(keep * len(scores) - 1e-9))]


def preview_rows(frames: int, wanted: int | None) -> list[int]:
    """Which of a clip's frames are tracked in a preview: ``wanted`` of them, evenly spaced with both ends."""
    if wanted is None or wanted >= frames:
        return list(range(frames))
    return [round(i * (frames - 1) / (wanted - 1)) for i in range(wanted)]


def rewards(scores: Sequence[float | None]) -> Floats:
    """Scores ``(n,)`` for potentials, with :data:`INVALID_REWARD` where there is none."""
    return np.array([INVALID_REWARD if score is None else score for score in scores], dtype=np.float64)


def log_potential(potential: Potential, history: Floats, temperature: float) -> Floats:
    """What a scoring adds to the particles' log-weights ``(n,)``, from all their rewards so far ``(k, n)``.

    "max": the highest reward of the way; "sum": the sum of all; "difference": the gain since the last scoring. Each is
    divided by the temperature (Feynman-Kac steering, section 3, with lambda = 1 / temperature). At the end the caller
    adds what is missing to ``reward / temperature``, so all three lead to the same distribution, ``p exp(r / T)``.
    """
    if potential == "max":
        value = history.max(axis=0)
    elif potential == "sum":
        value = history.sum(axis=0)
    else:
        value = history[-1] - (history[-2] if len(history) > 1 else 0.0)
    return np.asarray(value / temperature)


def normalised(log_weights: Floats) -> Floats:
    """Weights ``(n,)`` that sum to 1, safe for logarithms of any size."""
    raised = np.exp(log_weights - log_weights.max())
    return np.asarray(raised / raised.sum())


def effective_sample_size(log_weights: Floats) -> float:
    """``1 / sum w²`` of the normalised weights: from 1, when one has all, to n, when all are equal."""
    return float(1 / np.square(normalised(log_weights)).sum())


def resample(log_weights: Floats, rng: np.random.Generator) -> list[int]:
    """Systematic resampling: which particle each of the n new ones continues.

    One draw ``u`` places n marks ``(u + i) / n`` on the cumulated weights, so a particle of weight w has ``floor(n w)``
    or ``ceil(n w)`` successors, and equal weights change nothing.
    """
    count = len(log_weights)
    cumulated = np.cumsum(normalised(log_weights)) * count
    # A sum that rounding left a hair beside a whole number must not let one of equal particles go.
    whole = np.round(cumulated)
    cumulated = np.where(np.abs(cumulated - whole) < 1e-9 * count, whole, cumulated)
    return [int(i) for i in np.searchsorted(cumulated[:-1], rng.random() + np.arange(count), side="right")]


def renoise(x: Tensor, sigma_from: float, sigma_to: float, noise: Tensor) -> Tensor:
    """From one level to a higher one, by the exact forward transition of ``x_sigma = (1 - sigma) x0 + sigma eps``.

    ``x_to = a x_from + sqrt(sigma_to² - a² sigma_from²) noise`` with ``a = (1 - sigma_to) / (1 - sigma_from)``.
    """
    if not 0 <= sigma_from <= sigma_to <= 1:
        raise ConfigError(f"noise is added from a lower level to a higher one, found {sigma_from} and {sigma_to}")
    if sigma_from == sigma_to:
        return x
    share = (1 - sigma_to) / (1 - sigma_from)
    return share * x + math.sqrt(sigma_to**2 - (share * sigma_from) ** 2) * noise


def lower_level(sigma: float, following: float, eta: float) -> float:
    """The level to step down to before noise is added up to ``following``, from ``sigma`` above it.

    The noise added then has ``eta`` times the standard deviation of the exact reverse transition given x0, which is
    ``s sqrt(1 - (a s / t)²)`` for ``t = sigma``, ``s = following``, ``a = (1 - t) / (1 - s)`` (the eta of DDIM, on the
    flow's path). With eta = 0 this is ``following`` itself.
    """
    exact = following * math.sqrt(max(0.0, 1 - ((1 - sigma) / (1 - following) * following / sigma) ** 2))
    left = math.sqrt(max(0.0, following**2 - (eta * exact) ** 2))
    return left / (1 - following + left)


def ancestral_step(x: Tensor, x0: Tensor, sigma: float, following: float, eta: float, noise: Tensor) -> Tensor:
    """From ``x`` at level ``sigma``, where ``x0`` is predicted, to level ``following`` with fresh noise."""
    lower = lower_level(sigma, following, eta)
    return renoise(x0 + lower / sigma * (x - x0), lower, following, noise)
