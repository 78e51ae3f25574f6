"""Sizes of low-rank updates and how alike two of them are, without forming a full matrix.

An update of a weight is ``up @ down`` with ``down (r, in)`` and ``up (out, r)``; full matrices would be ``(out, in)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from spatialalign.lora import LoraPair


def update_norm(pair: LoraPair) -> float:
    """Frobenius norm of ``up @ down``, from triangular factors: ``up = Q R``, ``down.T = P S``, norm of ``R S.T``."""
    left = torch.linalg.qr(pair.up.double(), mode="r").R
    right = torch.linalg.qr(pair.down.double().T, mode="r").R
    return float((left @ right.T).norm())


def inner_product(a: LoraPair, b: LoraPair) -> float:
    """Sum of the products of the entries of two updates: ``<U D, V E> = <U.T V, D E.T>``."""
    return float(((a.up.double().T @ b.up.double()) * (a.down.double() @ b.down.double().T)).sum())


def stacked(a: LoraPair, b: LoraPair, factor: float = 1.0) -> LoraPair:
    """The pair of rank ``r_a + r_b`` whose update is ``a + factor * b``."""
    return LoraPair(torch.cat([a.down, b.down]), torch.cat([a.up, factor * b.up], dim=1))


@dataclass(frozen=True)
class Likeness:
    """Two updates of one weight, or of all weights together.

    Attributes:
        norm_a, norm_b: Frobenius norms.
        inner: sum of the products of their entries.
        distance: norm of ``b - a``.
    """

    norm_a: float
    norm_b: float
    inner: float
    distance: float

    @property
    def cosine(self) -> float | None:
        """Cosine of the angle between them; None where one of them is zero."""
        size = self.norm_a * self.norm_b
        return None if size == 0 else max(-1.0, min(1.0, self.inner / size))

    @property
    def relative_difference(self) -> float | None:
        """``|b - a| / |a|``; None where ``a`` is zero."""
        return None if self.norm_a == 0 else self.distance / self.norm_a


def likeness(a: LoraPair | None, b: LoraPair | None) -> Likeness:
    """Compare two updates of one weight; None is no update."""
    if a is None or b is None:
        norm_a, norm_b = (0.0 if pair is None else update_norm(pair) for pair in (a, b))
        return Likeness(norm_a, norm_b, 0.0, norm_a + norm_b)
    return Likeness(update_norm(a), update_norm(b), inner_product(a, b), update_norm(stacked(b, a, -1.0)))


def compare(a: Mapping[str, LoraPair], b: Mapping[str, LoraPair]) -> dict[str, Likeness]:
    """Compare two adapters, by module; a module that only one of them adapts counts as zero in the other."""
    return {module: likeness(a.get(module), b.get(module)) for module in sorted(a.keys() | b.keys())}


def together(parts: Mapping[str, Likeness]) -> Likeness:
    """The comparison over all modules, as of one long vector."""
    norm_a, norm_b, distance = (
        math.sqrt(sum(getattr(part, name) ** 2 for part in parts.values())) for name in ("norm_a", "norm_b", "distance")
    )
    return Likeness(norm_a, norm_b, sum(part.inner for part in parts.values()), distance)
