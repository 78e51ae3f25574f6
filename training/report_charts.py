"""Charts of the report as inline SVG: pure functions from numbers to markup, coloured by the page's style sheet.

Every mark that stands for a number carries ``data-tip``, which the page's script shows on hover and focus. Values that
are not finite are left out of a line, never written into the markup.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Series:
    """One line: its legend ``name``, its colour ``role`` in the style sheet, points, and optionally their intervals."""

    name: str
    role: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    dots: bool = False

    def __post_init__(self) -> None:
        lengths = {len(self.x), len(self.y), *(len(part) for part in (self.low, self.high) if part is not None)}
        if len(lengths) != 1:
            raise ValueError(f"series {self.name!r} has parts of different lengths: {sorted(lengths)}")


@dataclass(frozen=True)
class Frame:
    """The plot area: size of the drawing in its own units and the ranges of both axes."""

    width: float
    height: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    left: float = 44
    right: float = 12
    top: float = 12
    bottom: float = 34

    def px(self, x: float) -> float:
        """Horizontal place of ``x``."""
        low, high = self.x_range
        return self.left + (x - low) / ((high - low) or 1.0) * (self.width - self.left - self.right)

    def py(self, y: float) -> float:
        """Vertical place of ``y`` (the drawing's axis points down)."""
        low, high = self.y_range
        return self.height - self.bottom - (y - low) / ((high - low) or 1.0) * (self.height - self.top - self.bottom)


def finite(value: float | None) -> bool:
    """Whether ``value`` is a number that can be drawn."""
    return value is not None and math.isfinite(value)


def number(value: float) -> str:
    """A coordinate, short."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def stroke(role: str, x1: float, y1: float, x2: float, y2: float) -> str:
    """A straight line."""
    return f'<line class="{role}" x1="{number(x1)}" y1="{number(y1)}" x2="{number(x2)}" y2="{number(y2)}"/>'


def dot(role: str, x: float, y: float, radius: float) -> str:
    """A filled circle."""
    return f'<circle class="dot {role}" cx="{number(x)}" cy="{number(y)}" r="{number(radius)}"/>'


def hit(x: float, y: float, radius: float, tip: str) -> str:
    """An unseen circle that shows ``tip`` when it is pointed at or reached by keyboard."""
    place = f'cx="{number(x)}" cy="{number(y)}" r="{number(radius)}"'
    return f'<circle class="hit" tabindex="0" data-tip="{escape(tip, quote=True)}" {place}/>'


def words(role: str, x: float, y: float, content: str, anchor: str = "start", middle: bool = False) -> str:
    """Text at a point: its baseline there, or its middle line."""
    shift = ' dy=".32em"' if middle else ""
    place = f'x="{number(x)}" y="{number(y)}"{shift} text-anchor="{anchor}"'
    return f'<text class="{role}" {place}>{escape(content)}</text>'


def polyline(frame: Frame, kind: str, role: str, run: Iterable[tuple[float, float]]) -> str:
    """A ``polyline`` or ``polygon`` through points of the plot."""
    points = " ".join(f"{number(frame.px(x))},{number(frame.py(y))}" for x, y in run)
    return f'<{kind} class="{role}" points="{points}"/>'


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About ``count`` round values from ``low`` to ``high``."""
    if not (finite(low) and finite(high)) or high <= low:
        return [low] if finite(low) else []
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, int(math.floor(high / step + 1e-9)) + 1)]


def segments(xs: Sequence[float], ys: Sequence[float | None]) -> list[list[tuple[float, float]]]:
    """The runs of drawable points, split where a value is missing."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(xs, ys, strict=True):
        if y is not None and math.isfinite(y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def axes(
    frame: Frame,
    x_ticks: Iterable[float],
    y_ticks: Iterable[float],
    x_label: str = "",
    y_label: str = "",
    x_format: str = "g",
    y_format: str = "g",
) -> str:
    """Gridlines, tick labels and axis titles."""
    left, right, bottom = frame.left, frame.width - frame.right, frame.height - frame.bottom
    parts = []
    for y in y_ticks:
        label = format(y, y_format) if y else format(0, y_format.replace("+", ""))
        parts.append(stroke("grid", left, frame.py(y), right, frame.py(y)))
        parts.append(words("tick", left - 6, frame.py(y), label.replace("-", "−"), "end", middle=True))
    for x in x_ticks:
        parts.append(words("tick", frame.px(x), bottom + 14, format(x, x_format), "middle"))
    parts.append(stroke("axis", left, bottom, right, bottom))
    if x_label:
        parts.append(words("label", (left + right) / 2, frame.height - 3, x_label, "middle"))
    if y_label:
        parts.append(words("label", left, frame.top - 8, y_label))
    return "".join(parts)


def draw(frame: Frame, series: Series, tip: str = "{name}: {y:.3g} at {x:g}") -> str:
    """The interval band, the line and its dots; ``tip`` is formatted with name, x, y, low and high."""
    parts = []
    lows = series.low or [math.nan] * len(series.x)
    highs = series.high or [math.nan] * len(series.x)
    band = [(x, a, b) for x, a, b in zip(series.x, lows, highs, strict=True) if finite(a) and finite(b)]
    if band:
        outline = [(x, b) for x, _, b in band] + [(x, a) for x, a, _ in reversed(band)]
        parts.append(polyline(frame, "polygon", f"band {series.role}", outline))
    for run in segments(series.x, series.y):
        if len(run) > 1:
            parts.append(polyline(frame, "polyline", f"line {series.role}", run))
        elif not series.dots:
            parts.append(dot(series.role, frame.px(run[0][0]), frame.py(run[0][1]), 1.6))
    if series.dots:
        for x, y, low, high in zip(series.x, series.y, lows, highs, strict=True):
            if y is not None and math.isfinite(y):
                parts.append(dot(series.role, frame.px(x), frame.py(y), 3.2))
                text = tip.format(name=series.name, x=x, y=y, low=low, high=high)
                parts.append(hit(frame.px(x), frame.py(y), 11, text))
    return "".join(parts)


def svg(frame: Frame, body: str, label: str, extra: str = "") -> str:
    """Wrap ``body``; ``label`` is what a screen reader says."""
    box = f"0 0 {number(frame.width)} {number(frame.height)}"
    return f'<svg viewBox="{box}" role="img" aria-label="{escape(label, quote=True)}" {extra}>{body}</svg>'


def correct_chart(arms: Sequence[Series], chance: float | None, tau: float = 0.7) -> str:
    """Correct@tau against tau with 95 % intervals, the chance level as a dotted line, and the headline tau marked."""
    frame = Frame(1036, 380, (0.0, 0.9), (0.0, 1.0), left=48, right=104, top=26, bottom=42)
    body = axes(
        frame,
        [k / 10 for k in range(10)],
        [0, 0.25, 0.5, 0.75, 1.0],
        x_label="threshold τ",
        y_label="share of all videos with score ≥ τ (INVALID counts as wrong)",
        x_format=".1f",
        y_format=".0%",
    )
    bottom, right = frame.height - frame.bottom, frame.width - frame.right
    body += stroke("mark", frame.px(tau), frame.top, frame.px(tau), bottom)
    labels = [(frame.py(series.y[-1] or 0.0), series.name, series.role) for series in arms if series.y]
    if chance is not None and math.isfinite(chance):
        y = frame.py(chance)
        body += stroke("line chance dashed", frame.left, y, right, y)
        tip = f"Chance: {chance:.1%} of the same clips reach {tau:g} for a type they were not asked for"
        body += hit(frame.px(tau), y, 11, tip)
        labels.append((y, f"chance @{tau:g}", "chance"))
    for series in arms:
        body += draw(frame, series, "{name}: {y:.1%} at τ = {x:.1f}, 95 % interval {low:.1%} to {high:.1%}")
    for place, (_, name, role) in zip(spread([at for at, *_ in labels], 15), labels, strict=True):
        body += words(f"end {role}", right + 8, place, name, middle=True)
    return svg(frame, body, "Correct at threshold for the base and the aligned model")


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Move labels apart so that none is nearer than ``gap`` to the next, keeping their order."""
    order = sorted(range(len(places)), key=lambda k: places[k])
    out = list(places)
    for before, after in zip(order, order[1:], strict=False):
        out[after] = max(out[after], out[before] + gap)
    overshoot = [out[k] - places[k] for k in order]
    shift = sum(overshoot) / len(overshoot) if overshoot else 0.0
    return [y - shift for y in out]


def ssr_chart(initial: Sequence[float | None], final: Sequence[float | None], names: tuple[str, str]) -> str:
    """Both SSR curves of one clip over its frames; a missing frame leaves a gap. The page moves the play head."""
    count = max(len(initial), 2)
    frame = Frame(230, 104, (0, count - 1), (-1.05, 1.05), left=22, right=5, top=8, bottom=18)
    ticks = sorted({0, (count - 1) // 2, count - 1})
    body = axes(frame, ticks, [-1, 0, 1], x_format="d", y_format="+.0f")
    xs = list(range(len(initial)))
    body += draw(frame, Series(names[0], "initial", xs, initial))
    body += draw(frame, Series(names[1], "final", xs, final))
    body += stroke("head", frame.left, frame.top, frame.left, frame.height - frame.bottom)
    right = number(frame.width - frame.right)
    extra = f'class="ssr" data-left="{number(frame.left)}" data-right="{right}" data-frames="{count}"'
    return svg(frame, body, f"relation score over the frames: {names[0]} and {names[1]}", extra)


def interval_row(base: tuple[float, float, float], aligned: tuple[float, float, float], label: str) -> str:
    """One line of the per-type table: two points with intervals on a scale from 0 to 100 %."""
    frame = Frame(260, 34, (0.0, 1.0), (0.0, 1.0), left=4, right=4, top=0, bottom=0)
    parts = [stroke("grid", frame.px(x), 0, frame.px(x), frame.height) for x in (0, 0.5, 1)]
    for role, name, y, (value, low, high) in (("base", "base", 11.0, base), ("aligned", "aligned", 23.0, aligned)):
        if finite(value) and finite(low) and finite(high):
            parts.append(stroke(f"whisker {role}", frame.px(low), y, frame.px(high), y))
            parts.append(dot(role, frame.px(value), y, 4))
            tip = f"{label}, {name}: {value:.1%}, 95 % interval {low:.1%} to {high:.1%}"
            parts.append(hit(frame.px(value), y, 8, tip))
    return svg(frame, "".join(parts), f"Correct at 0.7 for {label}")


def curve_chart(title: str, lines: Sequence[Series], reference: float | None = None) -> str:
    """One small training chart: lines over steps on their common range, with an optional reference level."""
    xs = [x for line in lines for x in line.x]
    ys = [y for line in lines for y in line.y if y is not None and math.isfinite(y)]
    if not xs or not ys:
        return ""
    low, high = min(ys), max(ys)
    if reference is not None:
        low, high = min(low, reference), max(high, reference)
    pad = (high - low) * 0.08 or max(abs(high) * 0.1, 1e-6)
    x_range = (min(xs), max(max(xs), min(xs) + 1))
    frame = Frame(320, 170, x_range, (low - pad, high + pad), left=50, right=10, top=10, bottom=34)
    body = axes(frame, nice_ticks(*frame.x_range), nice_ticks(*frame.y_range), x_label="step", y_format=".3g")
    if reference is not None:
        body += stroke("mark", frame.left, frame.py(reference), frame.width - frame.right, frame.py(reference))
    for line in lines:
        body += draw(frame, line)
        ends = [(x, y) for x, y in zip(line.x, line.y, strict=True) if y is not None and math.isfinite(y)]
        if ends and "faint" not in line.role:
            x, value = ends[-1]
            body += dot(line.role, frame.px(x), frame.py(value), 3)
            body += hit(frame.px(x), frame.py(value), 10, f"{line.name}: {value:.4g} at step {x:g}")
    return svg(frame, body, f"{title} over training steps")
