"""Detections of named things in frames, and how token scores become phrases. No model here, numpy only."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, TracksError
from ..geometry import iou
from .parts import Progress

NO_PHRASE = -1
"""Phrase index of a box whose label is none of the phrases (official string rule only)."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Detections:
    """The boxes found in one frame, best first.

    ``boxes`` (n, 4) xyxy pixels, right and bottom exclusive; ``scores`` (n,) in [0, 1]; ``phrases`` (n,) index into the
    phrases asked for, or ``NO_PHRASE``; ``texts`` the label of each box as the detector reads it.
    """

    boxes: Floats
    scores: Floats
    phrases: NDArray[np.int64]
    texts: tuple[str, ...]

    def __post_init__(self) -> None:
        count = len(self.scores)
        if self.boxes.shape != (count, 4) or self.phrases.shape != (count,) or len(self.texts) != count:
            raise TracksError(
                f"detections: {count} scores, but boxes {self.boxes.shape}, phrases {self.phrases.shape}, "
                f"{len(self.texts)} texts"
            )
        if not np.isfinite(self.boxes).all() or not ((self.scores >= 0) & (self.scores <= 1)).all():
            raise TracksError("detections: boxes must be finite and scores in [0, 1]; the detector gave other numbers")

    def __len__(self) -> int:
        return len(self.scores)

    @classmethod
    def empty(cls) -> Detections:
        """No boxes."""
        return cls(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64), ())

    def of(self, phrase: int) -> Detections:
        """Only the boxes of one phrase, best first."""
        return self.take(np.flatnonzero(self.phrases == phrase))

    def take(self, indices: NDArray[np.int64]) -> Detections:
        """The boxes at ``indices``, in that order."""
        texts = tuple(self.texts[i] for i in indices)
        return Detections(self.boxes[indices], self.scores[indices], self.phrases[indices], texts)


@runtime_checkable
class Detector(Protocol):
    """Finds named things in frames."""

    def detect(
        self, frames: NDArray[np.uint8], phrases: Sequence[str], progress: Progress | None = None
    ) -> list[Detections]:
        """One :class:`Detections` per frame of ``frames`` (T, H, W, 3), for short noun phrases ("polar bear").

        ``progress`` is only given by callers who want to know; a detector that cannot tell may do without.
        """
        ...


def clean_phrase(phrase: str) -> str:
    """Lower case, single spaces, no leading article, no final period: the form a caption is built from.

    Raises :class:`ConfigError` for a phrase that is empty or would read as two ("cat. dog").
    """
    text = re.sub(r"\s+", " ", phrase).strip().lower().rstrip(". ")
    text = re.sub(r"^(a|an|the) (?=\S)", "", text)
    if not text or "." in text or "?" in text:
        raise ConfigError(f"phrase {phrase!r}: expected a short noun phrase without '.' or '?', such as 'polar bear'")
    return text


def caption(phrases: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """The detector's text, ``"cat. box."``, and the character span of each phrase in it (period left out)."""
    text, spans = "", []
    for phrase in phrases:
        cleaned = clean_phrase(phrase)
        text += " " if text else ""
        spans.append((len(text), len(text) + len(cleaned)))
        text += cleaned + "."
    return text, spans


def token_spans(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Positions of the tokens that make up each phrase, from a tokenizer's ``offset_mapping``.

    Special tokens have the empty offset (0, 0) and belong to none. Raises :class:`ConfigError` when a phrase has no
    token left (the caption was cut off by the tokenizer's maximum length).
    """
    found = [[i for i, (a, b) in enumerate(offsets) if b > a and a < stop and b > start] for start, stop in spans]
    for number, tokens in enumerate(found):
        if not tokens:
            raise ConfigError(f"phrase {number} has no token in the caption; shorten the phrases")
    return found


def phrase_scores(probabilities: Floats, tokens: Sequence[Sequence[int]]) -> Floats:
    """``S[q, p]`` = largest probability of box ``q`` over the tokens of phrase ``p``; (q, n) -> (q, phrases)."""
    return np.stack([probabilities[:, list(group)].max(axis=1) for group in tokens], axis=1)


def suppress(boxes: Floats, scores: Floats, overlap: float) -> NDArray[np.int64]:
    """Greedy non-maximum suppression: indices kept, best first; a box with IoU above ``overlap`` to a kept one goes."""
    kept: list[int] = []
    for i in np.argsort(-scores, kind="stable"):
        if not kept or not (iou(boxes[i][None], boxes[kept]) > overlap).any():
            kept.append(int(i))
    return np.array(kept, dtype=np.int64)


def from_spans(
    boxes: Floats,
    scores: Floats,
    phrases: Sequence[str],
    threshold: float,
    overlap: float = 0.7,
    same: float = 0.95,
) -> Detections:
    """Detections from ``boxes`` (q, 4) and phrase scores (q, p), matched by token spans.

    Every box goes to the phrase it scores highest on, boxes below ``threshold`` are dropped, then boxes of one phrase
    that overlap by more than ``overlap`` are merged into the best. Two boxes of *different* phrases that coincide
    (IoU above ``same``) are one thing read twice, and the better reading keeps it.
    """
    owner, best = scores.argmax(axis=1), scores.max(axis=1)
    kept: list[int] = []
    for phrase in range(scores.shape[1]):
        mine = np.flatnonzero((owner == phrase) & (best > threshold))
        kept += mine[suppress(boxes[mine], best[mine], overlap)].tolist()
    order = np.array(sorted(kept, key=lambda i: -best[i]), dtype=np.int64)
    order = order[suppress(boxes[order], best[order], same)]
    return Detections(boxes[order], best[order], owner[order], tuple(phrases[owner[i]] for i in order))


def from_texts(boxes: Floats, scores: Floats, texts: Sequence[str], phrases: Sequence[str]) -> Detections:
    """Detections by the official rule: a box belongs to the phrase whose text its decoded label *equals*.

    No suppression, no second guess (official ``detection.py``): "cat box" or "##rel" is ``NO_PHRASE``.
    """
    names = [clean_phrase(phrase) for phrase in phrases]
    index = [names.index(text) if text in names else NO_PHRASE for text in texts]
    order = np.argsort(-scores, kind="stable")
    found = Detections(boxes, scores, np.array(index, dtype=np.int64), tuple(texts))
    return found.take(order)
