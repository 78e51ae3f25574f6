"""The dynamic spatial relationship (DSR): its vocabulary of relations and the grammar of its prompts.

A prompt is one sentence in two clauses (official ``eval_csv`` files, methods of arXiv 2602.22745)::

    <scene>, <a|an> <subject> is <initial phrase> <a|an> <object>,
    then the <subject> <motion> <final phrase> the <object>.

Note the official asymmetry: *on* the left of at first, *to* the left of at last. Left, right and top are the paper's;
under, in front of and behind are ours, and use one phrase in both places.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from .errors import PromptError


class Relation(Enum):
    """Where the subject is, seen from the object. The value is the one-letter code of the official type column."""

    LEFT = "L"
    RIGHT = "R"
    TOP = "T"
    UNDER = "U"
    FRONT = "F"
    BEHIND = "B"

    @property
    def code(self) -> str:
        """The letter in a type code such as ``LR``."""
        return str(self.value)

    @property
    def initial_phrase(self) -> str:
        """The words of the first clause, e.g. ``on the left of``."""
        return _PHRASES[self.value][0]

    @property
    def final_phrase(self) -> str:
        """The words of the second clause, e.g. ``to the left of``."""
        return _PHRASES[self.value][1]

    @property
    def is_paper(self) -> bool:
        """True for the paper's relations (left, right, top); the others are extensions of this package."""
        return self.value in "LRT"

    @property
    def is_depth(self) -> bool:
        """True for the relations that need a disparity beside the boxes (in front of, behind)."""
        return self.value in "FB"

    @property
    def opposite(self) -> Relation:
        """The relation whose score is the negative of this one's."""
        return Relation(_OPPOSITE[self.value])

    @property
    def mirrored(self) -> Relation:
        """The relation in the mirror image: left and right swap, the others stay."""
        return self.opposite if self.value in "LR" else self


_PHRASES = {
    "L": ("on the left of", "to the left of"),
    "R": ("on the right of", "to the right of"),
    "T": ("on the top of", "to the top of"),
    "U": ("under", "under"),
    "F": ("in front of", "in front of"),
    "B": ("behind", "behind"),
}
_OPPOSITE = {"L": "R", "R": "L", "T": "U", "U": "T", "F": "B", "B": "F"}

# Words that hold the sentence together. A noun or a motion made of them could be cut in more than one way.
_RESERVED = frozenset({"a", "an", "the", "is", "then", "of", "on", "to", "in", "under", "behind"})
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_JOINT = ", then the "
_INITIAL = re.compile(
    r" is (?P<phrase>" + "|".join(re.escape(pair[0]) for pair in _PHRASES.values()) + r") (?P<article>an?) "
)


def article(noun: str) -> str:
    """``a`` or ``an`` for a lower-case noun, by its first sound: *an owl*, *an hourglass*, *a unicorn*."""
    if re.match(r"(?:hour|heir|hono)", noun):
        return "an"
    if re.match(r"(?:uni(?![nm])|us[aeu]|ut[ei]|uk|uri|eu|ew|one\b|once)", noun):
        return "a"
    return "an" if noun[:1] in "aeiou" else "a"


def relations_of(type_code: str) -> tuple[Relation, Relation]:
    """``"LR"`` -> (LEFT, RIGHT); :class:`PromptError` for anything but two different letters of L R T U F B."""
    try:
        first, last = (Relation(letter) for letter in type_code)
    except ValueError as error:
        raise PromptError(f"type {type_code!r}: expected two letters of L, R, T, U, F, B, such as 'LR'") from error
    if first is last:
        raise PromptError(f"type {type_code!r}: the initial and the final relation must differ")
    return first, last


@dataclass(frozen=True)
class DSR:
    """A subject that moves from one side of an object to another.

    ``subject`` and ``object`` are nouns of one or more lower-case words, without article; ``motion`` is a verb in the
    third person, with an adverb or preposition if need be ("jumps over"); ``scene`` is the opening phrase without
    its trailing comma, or empty. Raises :class:`PromptError` naming the part that breaks the grammar.
    """

    subject: str
    object: str
    initial: Relation
    final: Relation
    scene: str = ""
    motion: str = "moves"

    def __post_init__(self) -> None:
        for part, words in (("subject", self.subject), ("object", self.object), ("motion", self.motion)):
            _check_words(part, words)
        for part, relation in (("initial relation", self.initial), ("final relation", self.final)):
            if not isinstance(relation, Relation):
                raise PromptError(f"{part}: expected a Relation, found {relation!r}")
        if self.initial is self.final:
            raise PromptError(f"final relation: {self.final.name} is the initial relation too; the two must differ")
        if self.subject == self.object:
            raise PromptError(f"object: {self.object!r} is the subject too; a detector could not tell them apart")
        if self.scene != " ".join(self.scene.split()) or self.scene.endswith((",", ".")):
            raise PromptError(f"scene: expected single spaces, no comma or full stop at the end, found {self.scene!r}")
        if _JOINT in self.scene + ", ":
            raise PromptError(f"scene: must not contain {_JOINT.strip()!r}, found {self.scene!r}")

    @property
    def type_code(self) -> str:
        """Two letters, initial then final: ``LR``, ``TL``, ..."""
        return self.initial.code + self.final.code

    @property
    def is_paper(self) -> bool:
        """True when both relations are the paper's; otherwise the score follows our extension."""
        return self.initial.is_paper and self.final.is_paper

    def prompt(self) -> str:
        """The sentence; ``DSR.parse(dsr.prompt()) == dsr`` always holds."""
        lead = article(self.subject)
        opening = f"{self.scene}, {lead}" if self.scene else lead.capitalize()
        return (
            f"{opening} {self.subject} is {self.initial.initial_phrase} {article(self.object)} {self.object}"
            f"{_JOINT}{self.subject} {self.motion} {self.final.final_phrase} the {self.object}."
        )

    def mirrored(self) -> DSR:
        """What the mirror image of a correct video shows: left and right swapped (the scene's words are kept)."""
        return replace(self, initial=self.initial.mirrored, final=self.final.mirrored)

    def reversed(self) -> DSR:
        """What a correct video shows when it is played backwards: initial and final swapped."""
        return replace(self, initial=self.final, final=self.initial)

    def to_dict(self) -> dict[str, str]:
        """Plain strings, for JSON; relations as their letters."""
        return {
            "subject": self.subject,
            "object": self.object,
            "initial": self.initial.code,
            "final": self.final.code,
            "scene": self.scene,
            "motion": self.motion,
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> DSR:
        """Inverse of :meth:`to_dict`."""
        try:
            initial, final = relations_of(str(value["initial"]) + str(value["final"]))
            return cls(
                subject=str(value["subject"]),
                object=str(value["object"]),
                initial=initial,
                final=final,
                scene=str(value.get("scene", "")),
                motion=str(value.get("motion", "moves")),
            )
        except KeyError as error:
            raise PromptError(f"a DSR needs the key {error}; found {sorted(value)}") from error

    @classmethod
    def parse(cls, text: str) -> DSR:
        """Read a prompt. White space is normalised; everything else must follow the grammar to the letter.

        Raises :class:`PromptError` naming the failing part (scene, subject, initial relation, object, second clause,
        motion, final relation), what was expected and what was found.
        """
        text = " ".join(text.split())
        if not text.endswith("."):
            raise PromptError(f"end of prompt: expected a full stop, found {text[-20:]!r}")
        clauses = text[:-1].split(_JOINT)
        if len(clauses) != 2:
            times = len(clauses) - 1
            raise PromptError(f"second clause: expected {_JOINT.strip()!r} once, found it {times} times in {text!r}")
        scene, subject, initial, noun = _parse_first(clauses[0])
        motion, final = _parse_second(clauses[1], subject, noun)
        return cls(subject=subject, object=noun, initial=initial, final=final, scene=scene, motion=motion)


def _check_words(part: str, words: str) -> None:
    """One or more lower-case words (hyphens and apostrophes inside are fine), none of them a hinge of the sentence."""
    found = words.split(" ")
    if not all(_WORD.fullmatch(word) and word == word.lower() for word in found):
        raise PromptError(f"{part}: expected lower-case words, found {words!r}")
    hinges = [word for word in found if word in _RESERVED]
    if hinges:
        raise PromptError(f"{part}: {words!r} is ambiguous, {hinges[0]!r} belongs to the sentence around it")


def _parse_noun(part: str, text: str) -> str:
    """``"an owl"`` -> ``"owl"``, with the article checked."""
    lead, _, noun = text.partition(" ")
    if lead not in ("a", "an") or not noun:
        raise PromptError(f"{part}: expected 'a' or 'an' and a noun, found {text!r}")
    _check_words(part, noun)
    if lead != article(noun):
        raise PromptError(f"{part}: expected '{article(noun)} {noun}', found {text!r}")
    return noun


def _parse_first(clause: str) -> tuple[str, str, Relation, str]:
    """``[<scene>, ]a <subject> is <initial phrase> a <object>`` -> scene, subject, relation, object."""
    matches = list(_INITIAL.finditer(clause))
    if not matches:
        found = clause.rpartition(", ")[2]
        raise PromptError(
            f"initial relation: expected '<subject> is <relation> a <object>' with one of {_listed(0)}, found {found!r}"
        )
    match = matches[-1]
    scene, comma, subject_text = clause[: match.start()].rpartition(", ")
    if comma and not scene:
        raise PromptError(f"scene: expected words before the comma, found {clause!r}")
    if not comma:
        # Without a scene the sentence begins with the subject, hence with a capital article.
        if not subject_text.startswith(("A ", "An ")):
            raise PromptError(
                f"scene or subject: expected '<scene>, a <subject>' or 'A <subject>' first, found {subject_text!r}"
            )
        subject_text = subject_text[0].lower() + subject_text[1:]
    relation = next(r for r in Relation if r.initial_phrase == match["phrase"])
    subject, thing = _parse_noun("subject", subject_text), _parse_noun("object", clause[match.end("phrase") + 1 :])
    return scene, subject, relation, thing


def _parse_second(clause: str, subject: str, noun: str) -> tuple[str, Relation]:
    """``<subject> <motion> <final phrase> the <object>`` -> motion, relation."""
    if not clause.startswith(subject + " "):
        raise PromptError(f"second clause: expected 'the {subject}', the subject of the first, found 'the {clause}'")
    rest, the, last = clause[len(subject) :].rpartition(" the ")
    if not the or last != noun:
        raise PromptError(f"second clause: expected it to end in 'the {noun}', found {clause!r}")
    for relation in Relation:
        if rest.endswith(" " + relation.final_phrase):
            motion = rest[: -len(relation.final_phrase)].strip()
            if not motion:
                raise PromptError(f"motion: expected a verb between the subject and {relation.final_phrase!r}")
            _check_words("motion", motion)
            return motion, relation
    raise PromptError(f"final relation: expected one of {_listed(1)} before 'the {noun}', found {rest.strip()!r}")


def _listed(place: int) -> str:
    return ", ".join(repr(pair[place]) for pair in _PHRASES.values())
