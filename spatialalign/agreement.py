"""How well one judgement agrees with another: preferences of pairs with and without ties, ranks, yes and no.

A pair of clips A and B has a human label of +1 (A is better), -1 (B is better) or 0 (a tie) and a margin, the score of
A minus that of B. Pure functions on arrays; numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import DataError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class TieAccuracy:
    """Accuracy over all pairs at the best tie threshold.

    Attributes:
        accuracy: share of agreeing pairs, ties included.
        threshold: margins up to it, in size, are predicted ties; None when no tie is predicted.
    """

    accuracy: float
    threshold: float | None


def accuracy_without_ties(labels: ArrayLike, margins: ArrayLike) -> float | None:
    """Share of the pairs with a decided label whose margin has its sign; a margin of 0 is wrong.

    None when every label is a tie. Raises :class:`DataError` as :func:`accuracy_with_ties`.
    """
    label, margin = _pairs(labels, margins)
    decided = label != 0
    return float((label * margin > 0)[decided].mean()) if decided.any() else None


def accuracy_with_ties(labels: ArrayLike, margins: ArrayLike) -> TieAccuracy:
    """Accuracy with ties after Deutsch et al. 2023 (arXiv 2305.14324), in O(n log n).

    For a threshold e a pair is predicted a tie when ``|margin| <= e``, else by the sign of its margin. Every threshold
    that predicts otherwise than another is tried, "no ties" among them; of the best, the lowest is given.

    Raises:
        DataError: no pairs, lengths that differ, labels other than -1, 0 and +1, or margins that are not finite.
    """
    label, margin = _pairs(labels, margins)
    agreeing, sizes = _sweep(label, margin)
    # Pairs of one size are tied together: a threshold between equal margins cannot be had.
    ends = np.flatnonzero(np.append(sizes[1:] != sizes[:-1], True)) + 1
    tied = np.concatenate([[0], ends])
    best = int(tied[np.argmax(agreeing[tied])])
    return TieAccuracy(int(agreeing[best]) / len(label), float(sizes[best - 1]) if best else None)


def official_accuracy_with_ties(labels: ArrayLike, margins: ArrayLike) -> float:
    """What the published ``calc_accuracy.py`` of VideoAlign computes, for comparison.

    It never tries "no ties", and it stops within pairs of one margin, in the order given, where no threshold can.
    The former takes from a judge that is right in all pairs; the latter may add. Both vanish for many pairs with
    margins that all differ. Raises as :func:`accuracy_with_ties`.
    """
    label, margin = _pairs(labels, margins)
    return int(_sweep(label, margin)[0][1:].max()) / len(label)


def chance_with_ties(labels: ArrayLike) -> float:
    """Accuracy with ties that margins without any meaning reach in the long run: max(p, (1 - p) / 2), never below 1/3.

    With a share p of ties among the labels and a share q of predicted ties it is ``p q + (1 - p)(1 - q) / 2``, which is
    linear in q, hence best where all or nothing is called a tie. A few pairs reach more, as the threshold is chosen by
    looking.
    """
    label, _ = _pairs(labels, np.zeros(np.shape(labels)))
    ties = float((label == 0).mean())
    return max(ties, (1 - ties) / 2)


def spearman(first: ArrayLike, second: ArrayLike) -> float | None:
    """Spearman's rank correlation of two series ``(n,)``; equal values share their mean rank.

    None for fewer than two values or a series that is all alike, which has no order. Raises :class:`DataError` for
    lengths that differ or values that are not finite.
    """
    a, b = _series(first, second)
    if len(a) < 2 or (a == a[0]).all() or (b == b[0]).all():
        return None
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


@dataclass(frozen=True)
class Confusion:
    """Counts of things that two judgements passed or failed."""

    both: int
    first_only: int
    second_only: int
    neither: int

    @property
    def agreement(self) -> float | None:
        """Share on which they agree; None for nothing."""
        total = self.both + self.first_only + self.second_only + self.neither
        return (self.both + self.neither) / total if total else None


def confusion(
    first: ArrayLike, second: ArrayLike, first_threshold: float = 0.7, second_threshold: float = 0.7
) -> Confusion:
    """How often each of two scores ``(n,)`` reaches its threshold. Raises as :func:`spearman`."""
    a, b = _series(first, second)
    passed, other = a >= first_threshold, b >= second_threshold
    counts = [passed & other, passed & ~other, ~passed & other, ~passed & ~other]
    return Confusion(*(int(count.sum()) for count in counts))


def _sweep(label: Floats, margin: Floats) -> tuple[NDArray[np.int64], Floats]:
    """Agreeing pairs ``(n + 1,)`` when the k smallest margins are ties, for every k; the sizes ``(n,)`` in order."""
    order = np.argsort(np.abs(margin), kind="stable")
    ties = np.cumsum(np.append(0, (label == 0)[order]))
    right = np.cumsum(np.append(0, (label * margin > 0)[order]))
    return ties + right[-1] - right, np.abs(margin)[order]


def _pairs(labels: ArrayLike, margins: ArrayLike) -> tuple[Floats, Floats]:
    label, margin = _series(labels, margins)
    if not len(label):
        raise DataError("no pairs: there is nothing to agree about")
    if not np.isin(label, (-1, 0, 1)).all():
        wrong = label[~np.isin(label, (-1, 0, 1))][0]
        raise DataError(f"a label must be +1 (A is better), -1 (B is better) or 0 (a tie), found {wrong:g}")
    return label, margin


def _series(first: ArrayLike, second: ArrayLike) -> tuple[Floats, Floats]:
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise DataError(f"expected two series of one length, found {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise DataError("some values are NaN or infinite; leave out what was not scored, and count it")
    return a, b


def _ranks(values: Floats) -> Floats:
    """Ranks from 1, equal values sharing their mean rank."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[place], dtype=np.float64)
