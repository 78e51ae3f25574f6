"""Named numbers of a clip: how scoring nodes hand them on, and how Pick Best mixes them with the DSR-Score."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from comfy_api.latest import io, ui

from ..spatialalign.errors import DataError
from ..spatialalign.mix import mixed, order
from ..spatialalign.score import DsrScore
from ..spatialalign.summary import Rule, score_by
from . import host
from .rewards import read_weights
from .sockets import VALUES_SOCKET

Values = Mapping[str, float]
DSR_NAME = "dsr"
"""The name of the DSR-Score in a mix."""
DEFAULT_WEIGHTS = f"{DSR_NAME}:1, Overall:1"
"""DSR-Score and VideoReward alike."""


def values_input() -> Any:
    """Values of the same clip from another node, to be joined."""
    return VALUES_SOCKET.Input(
        "values",
        optional=True,
        tooltip="Values of the same clip from another scoring node, to be handed on with these.",
    )


def values_output() -> Any:
    """All values of the clip by name."""
    return VALUES_SOCKET.Output(
        display_name="values", tooltip="The numbers by name, for Pick Best or the next scoring node."
    )


def joined(before: Values | None, own: Values) -> dict[str, float]:
    """The values of two nodes.

    Raises:
        DataError: both give the same one.
    """
    twice = [name for name in own if name in (before or {})]
    if twice:
        raise DataError(f"values: {twice[0]} is given by two nodes; connect each scoring node once")
    return {**(before or {}), **own}


def json_text(report: Mapping[str, Any]) -> str:
    """A report as strict JSON: NaN, which JSON does not have, becomes null."""
    return json.dumps(_plain(report), indent=1, ensure_ascii=False, allow_nan=False)


def shown(cls: type[io.ComfyNode], lines: Sequence[str]) -> dict[str, Any]:
    """What the node shows: its lines as one text."""
    text = "\n".join(lines)
    host.show_text(text, cls.hidden.unique_id)
    return dict(ui.PreviewText(text).as_dict())


def figure(value: float) -> str:
    """A value in words."""
    return "none" if math.isnan(value) else f"{value:.3f}"


def rank_mixed(
    results: Sequence[DsrScore], rule: Rule, values: Sequence[Values], weights: str
) -> tuple[int, float, str]:
    """Place of the best clip, its mixed score (NaN when no clip can be compared), and the ranking in words.

    Args:
        results: of each clip.
        rule: which DSR-Score goes into the mix.
        values: of each clip, in the same order.
        weights: as :func:`.rewards.read_weights` takes them, of :data:`DSR_NAME` and the names in ``values``.

    Raises:
        DataError: not as many values as results.
        ConfigError: weights that cannot be read, or that name what is not there.
    """
    if len(values) != len(results):
        raise DataError(
            f"Pick Best: found {len(results)} results and {len(values)} values; connect the values "
            "of each of the clips, in their order"
        )
    scores = [score_by(result, rule) for result in results]
    names = list(dict.fromkeys(name for one in values for name in one))
    columns = {DSR_NAME: [math.nan if score is None else score for score in scores]}
    columns |= {name: [one.get(name, math.nan) for one in values] for name in names}
    counted = {name: weight for name, weight in read_weights(weights, list(columns)).items() if weight}
    mix = mixed(columns, counted)
    ranked = order(mix)
    title = ", ".join(f"{name} {weight:g}" for name, weight in counted.items())
    lines = [f"by a mix of {title}, each in deviations from its mean over the clips:"]
    if all(math.isnan(value) for value in mix):
        lines = [f"no clip has all of {', '.join(counted)}; the first is handed on:"]
    for place, i in enumerate(ranked, start=1):
        parts = ", ".join(f"{name} {figure(columns[name][i])}" for name in counted)
        lines.append(f"{place}. clip {i}: {'not compared' if math.isnan(mix[i]) else f'{mix[i]:+.3f}'} ({parts})")
    return ranked[0], float(mix[ranked[0]]), "\n".join(lines)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value
