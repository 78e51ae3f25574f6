"""Prompt sets: official CSV files in and out, a generator, and splits that share nothing."""

from __future__ import annotations

import csv
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .dsr import DSR, relations_of
from .errors import PromptError
from .files import atomic_path
from .vocabulary import VOCABULARY, Vocabulary

#: The six types of the paper.
PAPER_TYPES = ("LR", "LT", "RL", "RT", "TL", "TR")
#: Columns of the official files, in their order. In eval30 the scene column ends with its comma.
COLUMNS = {
    "eval120": ("group", "type", "prompt_id", "scene", "initial_SR", "final_SR", "animal", "object", "prompt"),
    "eval30": ("type", "prompt_id", "animal", "object", "scene", "initial_SR", "final_SR", "prompt"),
}

_SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def check_prompt_id(prompt_id: str) -> None:
    """Raise :class:`PromptError` unless ``prompt_id`` can name a folder of the sample store on any machine."""
    if not _SAFE_ID.fullmatch(prompt_id):
        raise PromptError(
            f"prompt_id {prompt_id!r}: expected 1 to 100 letters, digits, '.', '_' or '-', beginning with one of the "
            "former two"
        )


@dataclass(frozen=True)
class Prompt:
    """One prompt of a set. ``prompt_id`` names a folder of the sample store: letters, digits, ``.``, ``_``, ``-``.

    ``text`` is what the video model is given; it must be the sentence of ``dsr``. Raises :class:`PromptError`.
    """

    prompt_id: str
    dsr: DSR
    text: str

    def __post_init__(self) -> None:
        check_prompt_id(self.prompt_id)
        if self.text != self.dsr.prompt():
            raise PromptError(f"prompt {self.prompt_id}: text {self.text!r} is not the sentence of its DSR")

    @classmethod
    def of(cls, prompt_id: str, dsr: DSR) -> Prompt:
        """The prompt of a relationship."""
        return cls(prompt_id, dsr, dsr.prompt())

    @classmethod
    def parse(cls, prompt_id: str, text: str) -> Prompt:
        """The prompt of a sentence; white space is normalised."""
        return cls.of(prompt_id, DSR.parse(text))

    @property
    def triple(self) -> tuple[str, str, str]:
        """(subject, object, scene): what train and evaluation sets must not share."""
        return self.dsr.subject, self.dsr.object, self.dsr.scene

    @property
    def group(self) -> str:
        """The ``<group>`` of an official id ``<group>_<type>``, else empty."""
        group, _, kind = self.prompt_id.rpartition("_")
        return group if kind == self.dsr.type_code else ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for prompt.json."""
        return {"prompt_id": self.prompt_id, "text": self.text, "dsr": self.dsr.to_dict()}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Prompt:
        """Inverse of :meth:`to_dict`."""
        try:
            return cls(str(value["prompt_id"]), DSR.from_dict(value["dsr"]), str(value["text"]))
        except KeyError as error:
            raise PromptError(f"a prompt needs the key {error}; found {sorted(value)}") from error


def read_csv(path: str | Path) -> list[Prompt]:
    """Read a prompt file with the official columns, in any order; ``prompt_id`` and ``prompt`` are required.

    The other official columns, where present, must agree with the sentence (a scene may carry its comma, as in
    eval30). Further columns are ignored. Raises :class:`PromptError` naming file, row and column.
    """
    path = Path(path)
    try:
        with open(path, encoding="utf-8-sig", newline="") as handle:
            reader = csv.DictReader(handle, strict=True)
            rows = list(reader)
            columns = reader.fieldnames or []
    except FileNotFoundError as error:
        raise PromptError(f"{path} does not exist") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise PromptError(f"{path} is not a CSV file in UTF-8 ({error})") from error
    missing = {"prompt_id", "prompt"} - set(columns)
    if missing:
        raise PromptError(f"{path}: column {sorted(missing)[0]!r} is missing; found {list(columns)}")
    prompts = [_read_row(f"{path}, row {number}", row) for number, row in enumerate(rows, start=2)]
    _check_unique(str(path), prompts)
    return prompts


def write_csv(path: str | Path, prompts: Sequence[Prompt], layout: Literal["eval120", "eval30"] = "eval120") -> None:
    """Write a prompt file as the official one of that name is written, atomically; ids and sentences must be unique."""
    _check_unique(str(path), prompts)
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(COLUMNS[layout])
        for prompt in prompts:
            values = _columns_of(prompt)
            if layout == "eval30" and values["scene"]:
                values["scene"] += ","
            writer.writerow([values[column] for column in COLUMNS[layout]])


def generate(
    count: int,
    seed: int,
    vocabulary: Vocabulary = VOCABULARY,
    types: Sequence[str] = PAPER_TYPES,
    exclude: Iterable[Prompt] = (),
    first_group: int = 1,
) -> list[Prompt]:
    """``count`` prompts, the same for the same arguments, no two alike, types balanced to within one.

    Every prompt is a group of its own, as in eval120: its (subject, object, scene) triple occurs once, in neither the
    set nor ``exclude`` again, and its id is ``<group>_<type>`` with groups counted from ``first_group``. ``types`` may
    name extended relations (``LU``, ``FB``, ...). Raises :class:`PromptError` when the vocabulary is too small.
    """
    if count < 1 or not types or len(set(types)) != len(types):
        raise PromptError(f"expected a positive count and distinct types, found {count} and {list(types)}")
    relations = {kind: relations_of(kind) for kind in types}
    taken = {prompt.triple for prompt in exclude}
    rng = random.Random(seed)
    # Enough draws to leave out every excluded triple.
    wanted = min(count + len(taken), vocabulary.triples)
    drawn = [vocabulary.triple(index) for index in rng.sample(range(vocabulary.triples), wanted)]
    free = [item for item in drawn if (item[0].name, item[1], item[2]) not in taken][:count]
    if len(free) < count:
        raise PromptError(
            f"expected {count} prompts with different (subject, object, scene), the vocabulary has {len(free)} left; "
            "ask for fewer or add animals, objects or scenes"
        )
    kinds = [types[i % len(types)] for i in range(count)]
    rng.shuffle(kinds)
    prompts = []
    for number, (kind, (animal, thing, scene)) in enumerate(zip(kinds, free, strict=True), start=first_group):
        initial, final = relations[kind]
        motion = rng.choice(animal.verbs(initial, final))
        prompts.append(Prompt.of(f"{number:04d}_{kind}", DSR(animal.name, thing, initial, final, scene, motion)))
    return prompts


def split(prompts: Sequence[Prompt], held_out: float, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """(train, held-out) prompts, about ``held_out`` of them in the second, types kept in proportion.

    Prompts of one (subject, object, scene) triple stay together, so the two share none. Both keep the given order.
    Raises :class:`PromptError` when ``held_out`` is not in (0, 1) or there are fewer than two triples.
    """
    if not 0 < held_out < 1:
        raise PromptError(f"held_out: expected a share between 0 and 1, found {held_out}")
    members: dict[tuple[str, str, str], list[Prompt]] = {}
    for prompt in prompts:
        members.setdefault(prompt.triple, []).append(prompt)
    if len(members) < 2:
        raise PromptError(f"expected at least two (subject, object, scene) triples to split, found {len(members)}")
    strata: dict[tuple[str, ...], list[tuple[str, str, str]]] = {}
    for triple, group in members.items():
        strata.setdefault(tuple(sorted(p.dsr.type_code for p in group)), []).append(triple)
    rng = random.Random(seed)
    ranked: list[tuple[float, tuple[str, ...], tuple[str, str, str]]] = []
    for kinds in sorted(strata):
        rng.shuffle(strata[kinds])
        # The rank inside its stratum interleaves the strata, so that a prefix holds each in proportion.
        ranked += [((i + 0.5) / len(strata[kinds]), kinds, triple) for i, triple in enumerate(strata[kinds])]
    ranked.sort()
    goal = max(1, round(held_out * len(prompts)))
    chosen: set[tuple[str, str, str]] = set()
    size = 0
    for _, _, triple in ranked[:-1]:
        if size >= goal:
            break
        chosen.add(triple)
        size += len(members[triple])
    return [p for p in prompts if p.triple not in chosen], [p for p in prompts if p.triple in chosen]


def _columns_of(prompt: Prompt) -> dict[str, str]:
    dsr = prompt.dsr
    return {
        "group": prompt.group,
        "type": dsr.type_code,
        "prompt_id": prompt.prompt_id,
        "scene": dsr.scene,
        "initial_SR": dsr.initial.initial_phrase,
        "final_SR": dsr.final.final_phrase,
        "animal": dsr.subject,
        "object": dsr.object,
        "prompt": prompt.text,
    }


def _read_row(where: str, row: dict[str, str]) -> Prompt:
    if row.get(None) or None in row.values():  # type: ignore[call-overload]  # csv's marks of a ragged row
        raise PromptError(f"{where}: expected as many fields as the header has columns")
    try:
        prompt = Prompt.parse(row["prompt_id"], row["prompt"])
    except PromptError as error:
        raise PromptError(f"{where}: {error}") from error
    for column, expected in _columns_of(prompt).items():
        found = row.get(column, expected)
        if column == "scene":
            found = found.rstrip(",")
        if column not in ("group", "prompt") and found != expected:
            raise PromptError(f"{where}, column {column!r}: the prompt says {expected!r}, found {found!r}")
    return prompt


def _check_unique(where: str, prompts: Sequence[Prompt]) -> None:
    for name, counts in (
        ("prompt_id", Counter(p.prompt_id for p in prompts)),
        ("prompt", Counter(p.text for p in prompts)),
    ):
        repeated = [value for value, count in counts.items() if count > 1]
        if repeated:
            raise PromptError(f"{where}: {name} {repeated[0]!r} occurs {counts[repeated[0]]} times")
