"""The outcome of rounds as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def table(entries: Sequence[Mapping[str, Any]]) -> str:
    """Correct@0.7 after each round as a Markdown table: on the held-out prompts, and on the clips it was trained on."""
    rows = [["model", "held-out Correct@0.7, %", "difference to base", "INVALID, %", "pairs it was trained on"]]
    if entries and entries[0]["held_out"]:
        first = entries[0]["held_out"]
        rows.append(["base", _share(first["intervals"]["base"]), "", f"{100 * first['base']['invalid_rate']:.1f}", ""])
    for entry in entries:
        measured, pairs = entry["held_out"], str(entry["training_clips"]["pairs"])
        cells = ["–", "–", "–"]
        if measured:
            invalid = f"{100 * measured['aligned']['invalid_rate']:.1f}"
            cells = [_share(measured["intervals"]["aligned"]), _share(measured["difference"], "+.1f"), invalid]
        rows.append([f"round {entry['round']}", *cells, pairs])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [f"| {' | '.join(text.ljust(width) for text, width in zip(row, widths, strict=True))} |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _share(interval: Mapping[str, float], form: str = ".1f") -> str:
    value, low, high = (format(100 * interval[key], form) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
