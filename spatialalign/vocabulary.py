"""What prompts are made of: animals with verbs that suit them, objects, and scenes they belong to. Our own words."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product

from .dsr import DSR, Relation, article
from .errors import PromptError


@dataclass(frozen=True)
class Animal:
    """A subject: its noun, the verbs it crosses level ground with, and those it gets on or off a thing with."""

    name: str
    walks: tuple[str, ...]
    climbs: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.walks or not self.climbs:
            raise PromptError(f"animal {self.name!r}: expected at least one verb of either kind")

    def verbs(self, initial: Relation, final: Relation) -> tuple[str, ...]:
        """The verbs that suit a type: climbing ones when the top is involved."""
        return self.climbs if Relation.TOP in (initial, final) else self.walks


@dataclass(frozen=True)
class Setting:
    """Scenes of one kind (without trailing comma) and the objects that may stand in them."""

    name: str
    objects: tuple[str, ...]
    scenes: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.objects or not self.scenes:
            raise PromptError(f"setting {self.name!r}: expected at least one object and one scene")
        if len(set(self.objects)) != len(self.objects) or len(set(self.scenes)) != len(self.scenes):
            raise PromptError(f"setting {self.name!r}: an object or a scene is named twice")


@dataclass(frozen=True)
class Vocabulary:
    """Animals and settings. Every scene is checked to show no second animal or object that a detector could take."""

    animals: tuple[Animal, ...]
    settings: tuple[Setting, ...]

    def __post_init__(self) -> None:
        names = [animal.name for animal in self.animals]
        if not names or not self.settings or len(set(names)) != len(names):
            raise PromptError("vocabulary: expected animals and settings, each animal once")
        nouns = {*names, *(thing for setting in self.settings for thing in setting.objects)}
        for setting in self.settings:
            for scene in setting.scenes:
                # Plurals count too: "stools" shows a stool.
                words = set(re.findall(r"[a-z]+", scene.lower()))
                clash = sorted(noun for noun in nouns if words & {noun, noun + "s", noun + "es"})
                if clash:
                    raise PromptError(f"scene {scene!r} shows {clash[0]!r}, which may be a subject or an object")
            for noun in setting.objects:
                # Making a DSR checks the words against the grammar.
                DSR(names[0], noun, Relation.LEFT, Relation.RIGHT, setting.scenes[0], self.animals[0].walks[0])

    @property
    def triples(self) -> int:
        """Number of different (subject, object, scene) triples."""
        return sum(len(self.animals) * len(s.objects) * len(s.scenes) for s in self.settings)

    def triple(self, index: int) -> tuple[Animal, str, str]:
        """The ``index``-th triple, 0 <= index < :attr:`triples`."""
        for setting in self.settings:
            count = len(self.animals) * len(setting.objects) * len(setting.scenes)
            if index < count:
                index, animal = divmod(index, len(self.animals))
                scene, thing = divmod(index, len(setting.objects))
                return self.animals[animal], setting.objects[thing], setting.scenes[scene]
            index -= count
        raise IndexError(index)


def compose_scenes(
    prepositions_places: tuple[tuple[str, str], ...], adjectives: tuple[str, ...], tails: tuple[str, ...]
) -> tuple[str, ...]:
    """All scenes ``<Preposition> a <adjective> <place> with <tail>``."""
    return tuple(
        f"{preposition} {article(adjective)} {adjective} {place} with {tail}"
        for (preposition, place), adjective, tail in product(prepositions_places, adjectives, tails)
    )


_SMALL_CLIMBS = ("jumps", "climbs", "scrambles")

ANIMALS = (
    Animal("cat", ("walks", "trots", "strolls", "slinks"), ("jumps", "leaps", "climbs")),
    Animal("dog", ("walks", "trots", "runs", "ambles"), ("jumps", "bounds", "climbs")),
    Animal("rabbit", ("hops", "runs", "scurries"), ("hops", "jumps", "leaps")),
    Animal("fox", ("trots", "walks", "slinks"), ("jumps", "leaps", "climbs")),
    Animal("otter", ("waddles", "scampers", "runs"), _SMALL_CLIMBS),
    Animal("owl", ("walks", "hops", "glides"), ("flies", "hops", "flutters")),
    Animal("raccoon", ("walks", "ambles", "scurries"), _SMALL_CLIMBS),
    Animal("hedgehog", ("walks", "shuffles", "scurries"), ("climbs", "clambers", "scrambles")),
    Animal("chicken", ("walks", "struts", "runs"), ("flutters", "hops", "jumps")),
    Animal("goose", ("waddles", "walks", "runs"), ("flutters", "hops", "climbs")),
    Animal("parrot", ("walks", "hops", "waddles"), ("flies", "hops", "flutters")),
    Animal("frog", ("hops", "crawls", "leaps"), ("hops", "jumps", "leaps")),
    Animal("lizard", ("crawls", "darts", "scurries"), ("climbs", "crawls", "scrambles")),
    Animal("ferret", ("scampers", "runs", "darts"), _SMALL_CLIMBS),
    Animal("monkey", ("walks", "runs", "bounds"), ("climbs", "jumps", "swings")),
    Animal("goat", ("walks", "trots", "ambles"), ("jumps", "climbs", "leaps")),
    Animal("penguin", ("waddles", "walks", "shuffles"), ("hops", "jumps", "climbs")),
    Animal("armadillo", ("walks", "trots", "shuffles"), ("climbs", "clambers", "scrambles")),
)

_LIGHT = ("sunlit", "quiet", "tidy", "airy", "old", "bright", "calm", "plain")

INDOOR = Setting(
    "indoor",
    ("armchair", "ottoman", "suitcase", "drum", "stool", "crate", "toolbox", "dresser", "hamper", "piano"),
    compose_scenes(
        (
            ("In", "kitchen"),
            ("In", "classroom"),
            ("In", "hallway"),
            ("In", "bedroom"),
            ("In", "workshop"),
            ("In", "gallery"),
            ("Inside", "barn"),
            ("In", "sunroom"),
            ("In", "cellar"),
            ("In", "lobby"),
        ),
        _LIGHT,
        (
            "a tall window",
            "a striped carpet",
            "whitewashed walls",
            "wooden floorboards",
            "evening light on the wall",
            "a hanging lantern",
            "pale curtains",
            "a brick fireplace",
        ),
    ),
)

OUTDOOR = Setting(
    "outdoor",
    ("boulder", "barrel", "stump", "wheelbarrow", "trough", "bench", "anvil", "mailbox", "haystack", "sled"),
    compose_scenes(
        (
            ("On", "beach"),
            ("In", "courtyard"),
            ("In", "orchard"),
            ("On", "village green"),
            ("In", "vineyard"),
            ("On", "hilltop"),
            ("In", "backyard"),
            ("On", "terrace"),
            ("By", "lakeside"),
            ("In", "clearing"),
        ),
        _LIGHT,
        (
            "short green grass",
            "morning mist",
            "low stone walls",
            "distant mountains",
            "fallen leaves",
            "a wide blue sky",
            "long afternoon shadows",
            "a row of poplars",
        ),
    ),
)

#: The vocabulary that prompts are generated from unless told otherwise.
VOCABULARY = Vocabulary(ANIMALS, (INDOOR, OUTDOOR))
