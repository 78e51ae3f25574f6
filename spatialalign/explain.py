"""A score in plain words: whether it passes, and what pulled it down."""

from __future__ import annotations

from .dsr import DSR
from .robust import RobustParts, RobustScore
from .robust_settings import RobustSettings
from .score import DsrScore

#: Below these a component of the paper's rule is worth a word; a mean reaches 1, a gap 1/2 for perpendicular relations.
_WEAK_MEAN, _WEAK_GAP = 0.5, 0.25


def verdict(score: float, threshold: float) -> str:
    """``0.823 passes 0.7`` or ``0.655 fails 0.7``, with as many digits as the verdict needs to be seen."""
    short = f"{score:.3f}"
    passes = score >= threshold
    return (
        f"{short if (float(short) >= threshold) == passes else score} {'passes' if passes else 'fails'} {threshold:g}"
    )


def explain(score: DsrScore, dsr: DSR, threshold: float = 0.7) -> list[str]:
    """A few lines: the score or INVALID with its reason, the other two scores, and what pulled either down."""
    if score.score is None:
        lines = [f"INVALID: {score.reason}", "An INVALID clip has no score and does not pass."]
    else:
        lines = [f"DSR-Score {verdict(score.score, threshold)}; normalised {score.normalised:.3f}"]
    if score.robust is not None:
        lines.append(_robust_line(score.robust))
    lines.append(f"{len(score.frames_used)} of {score.frames} frames are valid")
    weak = [] if score.score is None else _weak_ends(score, dsr)
    if score.robust is not None and score.robust.parts is not None:
        weak += objections(score.robust.parts, dsr)
    return lines + [f"- {words}" for words in weak]


def objections(parts: RobustParts, dsr: DSR) -> list[str]:
    """What the robust score holds against a clip, one phrase for every check that took something off."""
    full = RobustSettings().full_coverage
    found = [
        (parts.initial_coverage < full, f"only {parts.initial_coverage:.0%} of the first frames show both things"),
        (parts.final_coverage < full, f"only {parts.final_coverage:.0%} of the last frames show both things"),
        (
            parts.continuity < 1,
            f"{parts.unseen_share:.0%} of the passage was not seen (jumps: {parts.jumps}, the rest in long gaps)",
        ),
        (parts.presence < 1, f"one of the two is missing for long ({parts.absent_share:.0%} of the clip)"),
        (parts.in_picture < 1, f"the {dsr.subject} leaves the picture ({parts.left_share:.0%} of the clip)"),
        (
            parts.direction < 1,
            f"only {parts.efficiency:.0%} of the {dsr.subject}'s way leads from the first side to the last",
        ),
        (parts.static_object < 1, f"the {dsr.object} moves too ({parts.object_share:.0%} of all motion)"),
    ]
    return [words for applies, words in found if applies]


def _robust_line(robust: RobustScore) -> str:
    if robust.score is None:
        return f"Robust score: INVALID, {robust.reason}"
    return f"Robust score {verdict(robust.score, robust.threshold)}"


def _weak_ends(score: DsrScore, dsr: DSR) -> list[str]:
    """The paper's components that are low, in the order of the clip."""
    first, last = f"{dsr.initial.initial_phrase} the {dsr.object}", f"{dsr.final.final_phrase} the {dsr.object}"
    found = (
        (score.initial_mean, _WEAK_MEAN, f"the {dsr.subject} does not begin clearly {first}"),
        (score.initial_gap, _WEAK_GAP, f"it hardly ceases to be {first}"),
        (score.final_mean, _WEAK_MEAN, f"the {dsr.subject} does not end clearly {last}"),
        (score.final_gap, _WEAK_GAP, f"it hardly comes to be {last}"),
    )
    return [f"{words} ({value:+.2f})" for value, limit, words in found if value is not None and value < limit]
