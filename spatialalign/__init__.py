"""SpatialAlign: score how a subject moves about an object in a video, and teach a video model to do it better.

The public names below are loaded when they are first asked for; importing the package loads numpy at most.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .dsr import DSR, Relation
    from .geometry import ssr
    from .score import DsrScore, aggregate_dsr, dsr_score
    from .tracks import Tracks

__version__ = "0.1.0"

_HOMES = {
    "DSR": "dsr",
    "Relation": "dsr",
    "Tracks": "tracks",
    "DsrScore": "score",
    "dsr_score": "score",
    "aggregate_dsr": "score",
    "ssr": "geometry",
}

__all__ = ["DSR", "DsrScore", "Relation", "Tracks", "aggregate_dsr", "dsr_score", "ssr"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
