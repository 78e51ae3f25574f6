"""A LoRA file in words: what of it fits a model, what it was trained on and how, and what looks wrong."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from .lora import Fitted, training_notes
from .module_names import original_name

_KINDS = (
    ("blocks.N.self_attn.", "self-attention"),
    ("blocks.N.cross_attn.", "cross-attention"),
    ("blocks.N.ffn.", "feed-forward"),
    ("blocks.N.attn1.to_", "self-attention"),
    ("blocks.N.attn2.to_", "cross-attention"),
    ("blocks.N.ff.", "feed-forward"),
    ("text_embedding.", "text embedding"),
    ("caption_projection.", "text embedding"),
    ("time_", "time embedding"),
    ("img_emb.", "image embedding"),
    ("head.", "head"),
)
_FACTS = {
    "version": r"wan[ _-]?(2[._]\d)",
    "task": r"(ti2v|t2v|i2v|s2v|flf2v|vace)",
    "size": r"(?<!\d)(1[._]3b|14b|5b)",
}
"""What the names of Wan models tell apart, whoever named the file."""


def describe(fitted: Fitted, strength: float, model: str | None = None) -> str:
    """Lines about a LoRA that fits a model: what matched, its base, its training, its scores; warnings last.

    Args:
        fitted: the LoRA.
        strength: it is applied with.
        model: file name of the model, if it is known.
    """
    notes = training_notes(fitted.metadata)
    matched, total = len(fitted.pairs), len(fitted.pairs) + fitted.unmatched_pairs
    ranks = sorted({pair.down.shape[0] for pair in fitted.pairs.values()})
    lines = [
        f"Matched {matched} of {total} pairs, rank {', '.join(map(str, ranks))}: {layers(fitted.pairs)}",
        f"For the base model {base_model(fitted) or 'not stated in the file'}",
        _training(notes),
        f"Scores, base → aligned: {scores}" if (scores := scores_in_words(notes)) else "",
        f"Strength {strength:g}" + ("" if strength else ": the model is handed on unchanged"),
    ]
    return "\n".join([line for line in lines if line] + [f"WARNING: {words}" for words in warnings(fitted, model)])


def base_model(fitted: Fitted) -> str | None:
    """The model that a LoRA file says it was trained on."""
    stated = training_notes(fitted.metadata).get("base_model")
    if stated:
        return str(stated)
    return fitted.metadata.get("ss_base_model_version") or fitted.metadata.get("modelspec.architecture")


def layers(modules: Iterable[str]) -> str:
    """``cross-attention k, v in 30 blocks; text embedding``, from diffusers module names."""
    found: dict[str, dict[str, set[str]]] = {}
    for module in modules:
        name = original_name(module) or module
        block = re.match(r"(?:transformer_)?blocks\.(\d+)\.", name)
        general = f"blocks.N.{name[block.end() :]}" if block else name
        prefix, kind = next((entry for entry in _KINDS if general.startswith(entry[0])), (general, general))
        parts = found.setdefault(kind, {"parts": set(), "blocks": set()})
        if block:
            parts["blocks"].add(block[1])
            parts["parts"].add(general.removeprefix(prefix).removesuffix(".0"))  # LTX-Video's output is out.0
    words = []
    for kind in sorted(found, key=_place):
        parts = found[kind]
        inner = " " + ", ".join(sorted(parts["parts"])) if parts["parts"] and kind != "feed-forward" else ""
        count = len(parts["blocks"])
        words.append(kind + inner + (f" in {count} block{'s' if count > 1 else ''}" if count else ""))
    return "; ".join(words)


def _place(kind: str) -> int:
    """Where a kind of layer stands in a list; what has no name of its own comes last."""
    names = [name for _, name in _KINDS]
    return names.index(kind) if kind in names else len(names)


def warnings(fitted: Fitted, model: str | None = None) -> list[str]:
    """What a user should know before trusting the LoRA on this model."""
    found = []
    total = len(fitted.pairs) + fitted.unmatched_pairs
    others = len(fitted.unmatched) - 2 * fitted.unmatched_pairs
    if fitted.unmatched_pairs:
        found.append(
            f"{fitted.unmatched_pairs} of {total} pairs fit no layer of this model (e.g. {fitted.unmatched[0]}): the "
            "LoRA is for a model with other layers, and only a part of it works here"
        )
    elif others:
        found.append(
            f"{others} keys are no A and B matrices (e.g. {fitted.unmatched[0]}) and are left out; ComfyUI's own LoRA "
            "loader applies differences of biases and norms"
        )
    base = base_model(fitted)
    if base and model and (differences := differing(base, model)):
        found.append(f"it was trained on {base}, the model here is {model}: another {', '.join(differences)}")
    return found


def differing(base: str, model: str) -> list[str]:
    """Which of version, task and size two names of Wan models state differently; what only one states is no matter."""
    one, other = _facts(base), _facts(model)
    return [fact for fact in _FACTS if fact in one and fact in other and one[fact] != other[fact]]


def _facts(name: str) -> dict[str, str]:
    found = {fact: re.search(pattern, name.lower()) for fact, pattern in _FACTS.items()}
    return {fact: match[1].replace("_", ".") for fact, match in found.items() if match}


def _training(notes: dict[str, Any]) -> str:
    if not notes:
        return "How it was trained is not stated in the file"
    named = ("step", "steps"), ("pairs", "pairs"), ("prompts", "prompts")
    parts = [str(notes["method"])] if "method" in notes else []
    parts += [f"{notes[key]} {unit}" for key, unit in named if key in notes]
    parts += [f"{key} {notes[key]}" for key in ("preset", "beta", "targets", "seed", "date") if key in notes]
    return f"Trained with {', '.join(parts)}" if parts else ""


def scores_in_words(notes: Mapping[str, Any]) -> str:
    """The scores before and after that an evaluation left in a LoRA's notes; empty where there are none."""
    try:
        scores = notes["scores"]
        base, aligned = scores["base"], scores["aligned"]
        parts = [
            f"{name} {_number(base[key], form)} → {_number(aligned[key], form)}"
            for key, name, form in (
                ("correct_at_0.7", "Correct@0.7", ".1%"),
                ("invalid_rate", "INVALID", ".1%"),
                ("mean_score", "mean score", ".3f"),
            )
        ]
        strength = "" if scores["strength"] == 1 else f" at strength {scores['strength']:g}"
        return f"{', '.join(parts)}{strength} ({scores['prompts']} prompts, {len(scores['seeds'])} clips each)"
    except (KeyError, TypeError, ValueError):  # none, or of a form that another version writes
        return ""


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
