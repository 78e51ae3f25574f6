"""Where a prompt begins: built from words, read from a sentence, or taken from a set."""

from __future__ import annotations

import random
import re
from pathlib import Path, PurePath

from comfy_api.latest import io

from ..spatialalign.backbones.base import NEGATIVE_PROMPT
from ..spatialalign.dsr import DSR, Relation
from ..spatialalign.errors import PromptError
from ..spatialalign.prompts import Prompt, generate, read_csv, split
from . import host
from .sockets import DSR_SOCKET

RELATIONS = {
    "left": Relation.LEFT,
    "right": Relation.RIGHT,
    "top": Relation.TOP,
    "under": Relation.UNDER,
    "in front of": Relation.FRONT,
    "behind": Relation.BEHIND,
}
SETS = ("built-in: train", "built-in: held-out", "miniature: train", "miniature: held-out")

_PROMPT_TIP = "The sentence for the text encoder of the video model."
_NEGATIVE_TIP = "The negative prompt, for the second text encoder."
_DSR_TIP = "Who moves from where to where. Connect it to GroundedSAM Track and to DSR-Score."


class DsrPrompt(io.ComfyNode):
    """A prompt in the grammar, from its words."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        sides = list(RELATIONS)
        return io.Schema(
            node_id="SpatialAlignPrompt",
            display_name="DSR Prompt",
            category="SpatialAlign/Prompt",
            description=(
                "Writes a prompt about a dynamic spatial relationship (DSR): a subject moves from one side of an "
                "object to another. The same words tell the tracker what to look for and the score what to expect."
            ),
            inputs=[
                io.String.Input(
                    "subject",
                    default="cat",
                    tooltip="What moves: a noun of one or more words, such as cat or polar bear. Best in the singular.",
                ),
                io.String.Input("object", default="box", tooltip="What it moves about: another noun. It should stay."),
                io.Combo.Input(
                    "initial", options=sides, default="left", tooltip="Where the subject is at first, from the object."
                ),
                io.Combo.Input(
                    "final",
                    options=sides,
                    default="right",
                    tooltip=(
                        "Where the subject ends; another side than at first. The paper has left, right and top. "
                        "In front of and behind can only be scored from tracks with depth."
                    ),
                ),
                io.String.Input(
                    "motion",
                    default="walks",
                    tooltip="How the subject goes there: a verb such as walks, jumps or runs quickly.",
                ),
                io.String.Input(
                    "scene",
                    multiline=True,
                    default="In a sunny meadow",
                    tooltip="The opening of the sentence. It may be empty. It should name no second subject or object.",
                ),
                io.String.Input(
                    "negative",
                    multiline=True,
                    default=NEGATIVE_PROMPT,
                    tooltip="Handed on as it is. The default is the one recommended for Wan 2.1.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="prompt", tooltip=_PROMPT_TIP),
                io.String.Output(display_name="negative", tooltip=_NEGATIVE_TIP),
                DSR_SOCKET.Output(display_name="dsr", tooltip=_DSR_TIP),
            ],
        )

    @classmethod
    def validate_inputs(cls, subject: str | None = None, object: str | None = None) -> bool | str:
        # The two names only: ComfyUI shows one message at every input that is named here. A linked name is None.
        first = "some subject" if subject is None else noun(subject)
        second = "some object" if object is None else noun(object)
        try:
            DSR(first, second, Relation.LEFT, Relation.RIGHT)
        except PromptError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls, subject: str, object: str, initial: str, final: str, motion: str, scene: str, negative: str
    ) -> io.NodeOutput:
        dsr = DSR(
            subject=noun(subject),
            object=noun(object),
            initial=RELATIONS[initial],
            final=RELATIONS[final],
            scene=" ".join(scene.split()).rstrip(",. "),
            motion=" ".join(motion.lower().split()).rstrip(",. "),
        )
        return io.NodeOutput(dsr.prompt(), negative, dsr)


class DsrFromText(io.ComfyNode):
    """The relationship that a finished prompt is about."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpatialAlignParse",
            display_name="DSR From Text",
            category="SpatialAlign/Prompt",
            description=(
                "Reads the relationship from a prompt of the form '<scene>, a <subject> is on the left of a <object>, "
                "then the <subject> <motion> to the right of the <object>.', as the paper's prompts are written."
            ),
            inputs=[
                io.String.Input(
                    "text",
                    multiline=True,
                    default=DSR("cat", "box", Relation.LEFT, Relation.RIGHT, "In a sunny meadow", "walks").prompt(),
                    tooltip="One sentence in the grammar of the paper's prompts, with its full stop.",
                )
            ],
            outputs=[
                io.String.Output(display_name="prompt", tooltip=_PROMPT_TIP),
                DSR_SOCKET.Output(display_name="dsr", tooltip=_DSR_TIP),
                io.String.Output(display_name="subject", tooltip="What moves."),
                io.String.Output(display_name="object", tooltip="What it moves about."),
                io.String.Output(
                    display_name="type",
                    tooltip="Initial and final relation as letters of L, R, T, U, F, B: LR, TL, ...",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, text: str | None = None) -> bool | str:
        try:
            return text is None or bool(DSR.parse(text))
        except PromptError as error:
            return str(error)

    @classmethod
    def execute(cls, text: str) -> io.NodeOutput:
        dsr = DSR.parse(text)
        return io.NodeOutput(dsr.prompt(), dsr, dsr.subject, dsr.object, dsr.type_code)


class DsrFromSet(io.ComfyNode):
    """One prompt of a set."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpatialAlignPromptSet",
            display_name="DSR From Set",
            category="SpatialAlign/Prompt",
            description=(
                "Takes one prompt of a set: of 600 built-in ones (480 to train on, 120 held out, which share no "
                "subject, object and scene), of the miniature's world, or of a CSV file in ComfyUI's input folder with "
                "the columns prompt_id and prompt."
            ),
            inputs=[
                io.Combo.Input(
                    "set",
                    options=[*SETS, *_csv_names()],
                    tooltip=(
                        "Which set. CSV files (UTF-8, columns of the paper's prompt files) are listed when they lie in "
                        "ComfyUI's input folder; press R to see new ones."
                    ),
                ),
                io.Combo.Input(
                    "pick",
                    options=["index", "seed"],
                    tooltip="index: the number counts through the set, again and again. seed: it draws at random.",
                ),
                io.Int.Input(
                    "number",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The index, from 0, or the seed. The same number always gives the same prompt.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="prompt", tooltip=_PROMPT_TIP),
                io.String.Output(display_name="negative", tooltip=_NEGATIVE_TIP),
                DSR_SOCKET.Output(display_name="dsr", tooltip=_DSR_TIP),
                io.String.Output(display_name="prompt_id", tooltip="The prompt's name in its set, such as 0042_LR."),
                io.Int.Output(display_name="count", tooltip="How many prompts the set has."),
            ],
        )

    @classmethod
    def validate_inputs(cls, set: str | None = None) -> bool | str:
        try:
            return set is None or set in SETS or bool(_csv_path(set))
        except PromptError as error:
            return str(error)

    @classmethod
    def fingerprint_inputs(cls, set: str | None = None, pick: str | None = None, number: int | None = None) -> str:
        """An edited file counts as changed; a missing one is reported when it is read."""
        try:
            state = None if set is None or set in SETS else _csv_path(set).stat()
        except PromptError:
            return "missing"
        return "" if state is None else f"{state.st_mtime_ns} {state.st_size}"

    @classmethod
    def execute(cls, set: str, pick: str, number: int) -> io.NodeOutput:
        prompts = _prompts(set)
        index = number if pick == "index" else random.Random(number).randrange(len(prompts))
        prompt = prompts[index % len(prompts)]
        return io.NodeOutput(prompt.text, NEGATIVE_PROMPT, prompt.dsr, prompt.prompt_id, len(prompts))


def noun(words: str) -> str:
    """A name as the grammar wants it: ``" The Polar  Bear. "`` becomes ``"polar bear"``."""
    plain = " ".join(words.lower().split()).rstrip(",. ")
    return re.sub(r"^(?:an?|the) ", "", plain)


def _prompts(name: str) -> list[Prompt]:
    world, _, part = name.partition(": ")
    if name not in SETS:
        path = _csv_path(name)
        prompts = read_csv(path)
        if not prompts:
            raise PromptError(f"{path} has no prompt below its header; add a row")
        return prompts
    if world == "miniature":
        from ..spatialalign.miniature.world import prompts as drawn

        return drawn("train" if part == "train" else "eval")
    # What `python -m training.prompts --held_out <file>` writes with its defaults.
    train, held_out = split(generate(600, seed=0), held_out=0.2, seed=0)
    return train if part == "train" else held_out


def _csv_names() -> list[str]:
    return sorted(path.name for path in host.input_directory().glob("*.csv"))


def _csv_path(name: str) -> Path:
    folder, asked = host.input_directory(), PurePath(name)
    if not asked.parts or asked.anchor or ".." in asked.parts:
        raise PromptError(f"{name!r} is not a file inside ComfyUI's input folder {folder}; choose one from the list")
    if not (folder / asked).is_file():
        raise PromptError(
            f"{name} is not in ComfyUI's input folder; put the CSV file into {folder} or choose another set"
        )
    return folder / asked
