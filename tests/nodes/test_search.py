"""The searching nodes on a sampler whose clips are known beforehand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

Run = Callable[..., Any]
STEPS = 10
# The score of a cat at (x from the box's centre): a passage from left to right, staying, the opposite, hardly seen.
PLACES = {
    1.0: [-50] * 6 + [-20, -10, 10, 20] + [50] * 6,
    0.5: [-50] * 16,
    0.0: [50] * 6 + [20, 10, -10, -20] + [-50] * 6,
    None: [math.nan] * 16,
}
GREYS = {0.2: 1.0, 0.4: 0.5, 0.6: 0.0, 0.8: None}
"""How the clip of each score looks."""


def grey(score: float | None) -> float:
    return next(shade for shade, shown in GREYS.items() if shown == score)


@dataclass
class Sampler:
    """Takes the place of ``Stretches``: clip ``i`` of a search ends as ``ends[i]``, and looks like ``looks[i]``."""

    ends: Sequence[float | None]
    looks: Sequence[float | None] = ()
    is_flow: bool = True
    passes: int = 1
    """Of the model in a step."""
    evaluations: int = 0
    seeds: list[int] = field(default_factory=list)
    stretches: list[tuple[int, int, int]] = field(default_factory=list)
    """What was sampled: (clip, first, last)."""
    given: tuple[Any, ...] = ()
    sigmas = torch.linspace(1, 0, STEPS + 1)
    steps = STEPS

    def __call__(self, *given: Any) -> Sampler:
        self.given = given
        return self

    def begin(self, seed: int) -> torch.Tensor:
        self.seeds.append(seed)
        return torch.full((1, 1, 1, 1, 1), float(len(self.seeds) - 1))

    def run(self, seed: int, x: torch.Tensor, first: int, last: int, step: Any) -> tuple[torch.Tensor, torch.Tensor]:
        clip = round(x.item())
        assert seed == self.seeds[clip]
        for _ in range(first, last):
            step(None)
        self.evaluations += self.passes * (last - first)
        self.stretches.append((clip, first, last))
        end = torch.full_like(x, grey(self.ends[clip]))
        return (end, end) if last == STEPS else (x, torch.full_like(x, grey(self.looks[clip])))

    def latent(self, x: torch.Tensor) -> dict[str, Any]:
        return {"samples": x}


@pytest.fixture
def make(module: Callable[[str], Any], run: Run, fake_host: Any, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """``make.search(node, sampler, **inputs)`` is the answer of a node that samples with ``sampler``."""
    dsr, tracks = module("spatialalign.dsr"), module("spatialalign.tracks")
    search, sam = module("search"), module("grounded_sam")
    spec = dsr.DSR("cat", "box", dsr.Relation.LEFT, dsr.Relation.RIGHT)

    def track(frames: Any, subject: str, thing: str, fps: float, progress: Any) -> Any:
        assert (subject, thing, fps) == ("cat", "box", 8.0)
        progress(len(frames), len(frames))
        across = np.array(PLACES[GREYS[round(float(frames.mean()) / 255, 1)]], dtype=float)
        boxes = np.array([[[95 + x, 50 + 0 * x, 105 + x, 60 + 0 * x], [95, 50, 105, 60]] for x in across])
        return tracks.Tracks(boxes, np.full((len(across), 2), 0.9), ("cat", "box"), (100, 200), fps)

    vae = SimpleNamespace(decode=lambda x: x.reshape(1, 1, 1, 1, 1).expand(1, 16, 100, 200, 3))
    grounded = sam.GroundedSam(SimpleNamespace(track=track, segmenter=None), ("patcher",))

    def searched(node: str, sampler: Sampler, **inputs: Any) -> Any:
        monkeypatch.setattr(search, "Stretches", sampler)
        sockets = {"positive": "p", "negative": "n", "latent_image": "l", "vae": vae, "grounded_sam": grounded}
        sockets["model"] = SimpleNamespace(model="a model")
        return run(getattr(search, node), {"unique_id": "7"}, **sockets, dsr=spec, fps=8.0, **inputs)

    return SimpleNamespace(search=searched, errors=module("spatialalign.errors"), stretches=module("stretches"))


def names(answer: Any) -> SimpleNamespace:
    keys = ("latent", "images", "result", "latents", "ranking", "sheet")
    return SimpleNamespace(**dict(zip(keys, answer.args, strict=True)))


def test_the_best_is_handed_on_and_the_rest_ranked(make: SimpleNamespace, fake_host: Any) -> None:
    sampler = Sampler(ends=[0.5, None, 1.0, 0.0])
    answer = make.search("BestOfNSampler", sampler, candidates=4, seed=3, steps=STEPS, cfg=6.0, denoise=0.9)
    out = names(answer)
    assert out.latent["samples"].item() == pytest.approx(grey(1.0)) and out.result.score == 1.0
    assert out.images.shape == (16, 100, 200, 3) and out.images.mean().item() == pytest.approx(grey(1.0))
    assert [round(one["samples"].item(), 1) for one in out.latents] == [grey(score) for score in (1.0, 0.5, 0.0, None)]
    lines = out.ranking.splitlines()
    assert lines[0] == "best-of-4, by the paper score:"
    assert lines[1] == f"1. clip 2 (seed {sampler.seeds[2]}): 1.000" and lines[2] == "2. clip 0 (seed 3): 0.500"
    assert lines[4].endswith("INVALID, frames: 0 of 16 frames are valid, at least 4 are needed")
    assert lines[5:] == ["4 of 4 clips finished", "40 passes of the model, 4 times those of one clip; 4 clips scored"]
    assert sampler.stretches == [(clip, 0, STEPS) for clip in range(4)]
    assert sampler.given[1:4] == ("p", "n", "l") and sampler.given[4].cfg == 6.0 and sampler.given[4].denoise == 0.9
    assert fake_host.progress[-1] == (40, 40) and [done for done, _ in fake_host.progress[:40]] == list(range(1, 41))
    assert fake_host.loaded == ["patcher"] * 4
    # Six frames of 120 and a caption for each clip.
    assert out.sheet.shape[0] == 1 and out.sheet.shape[2] == 4 + 6 * 124 and out.sheet.shape[1] > 4 * 60
    assert answer.ui["text"] == (out.ranking,) == (fake_host.shown["7"],) and len(answer.ui["images"]) == 1


def test_the_first_seed_is_the_user_s_and_the_others_fit_a_widget(make: SimpleNamespace) -> None:
    """The interface keeps whole numbers up to 2 ** 53 only."""
    sampler, again, other = (Sampler(ends=[0.5] * 5) for _ in range(3))
    for one, seed in ((sampler, 3), (again, 3), (other, 4)):
        make.search("BestOfNSampler", one, candidates=5, seed=seed)
    assert sampler.seeds == again.seeds and sampler.seeds[0] == 3
    assert len({*sampler.seeds, *other.seeds}) == 10 and max(sampler.seeds) < 2**53


def test_nothing_more_is_made_once_one_is_good_enough(make: SimpleNamespace, fake_host: Any) -> None:
    sampler = Sampler(ends=[0.0, 0.5, 1.0, 1.0])
    out = names(make.search("BestOfNSampler", sampler, candidates=4, stop_at=0.5000000000000001))
    assert [clip for clip, _, _ in sampler.stretches] == [0, 1] and len(out.latents) == 2
    assert "2 of 4 clips finished, then one was good enough" in out.ranking
    assert fake_host.progress[-1] == (40, 40)


def test_only_those_that_look_good_are_finished(make: SimpleNamespace, fake_host: Any) -> None:
    sampler = Sampler(ends=[1.0, 0.0, 0.5, 0.5], looks=[None, 0.5, 1.0, 0.0], passes=2)
    out = names(make.search("BestOfNSampler", sampler, candidates=4, keep=0.5, preview=0.3))
    assert sampler.stretches == [*((clip, 0, 3) for clip in range(4)), (2, 3, STEPS), (1, 3, STEPS)]
    assert out.result.score == 0.5 and len(out.latents) == 2
    lines = out.ranking.splitlines()
    assert "after 3 of 10 steps: INVALID, 0.500, 1.000, 0.000; taken on: 2, 1" in lines
    assert lines[-1] == "52 passes of the model, 2.6 times those of one clip; 6 clips scored"
    assert fake_host.progress[-1] == (26, 26)


def test_all_invalid_is_a_result(make: SimpleNamespace) -> None:
    out = names(make.search("BestOfNSampler", Sampler(ends=[None] * 3), candidates=3))
    assert out.result.score is None and out.images.mean().item() == pytest.approx(grey(None))
    assert out.ranking.startswith(
        "best-of-3, by the paper score: every clip is INVALID, the first is handed on\n1. clip 0"
    )


class Swarm(Sampler):
    """Its clips begin at 0, 1, 2, ... and are known by where they are; above 1.5 they look good."""

    def run(self, seed: int, x: torch.Tensor, first: int, last: int, step: Any) -> tuple[torch.Tensor, torch.Tensor]:
        for _ in range(first, last):
            step(None)
        self.evaluations += self.passes * (last - first)
        self.stretches.append((0, first, last))
        look = torch.full_like(x, grey(0.0 if x.item() < 1.5 else 1.0))
        return (torch.full_like(x, grey(1.0)), look) if last == STEPS else (x, look)


def test_particles_are_continued_where_they_do_well(make: SimpleNamespace) -> None:
    """Of three only the last does well: at a temperature of 0.1 it has all the weight, and all go on from it."""
    sampler = Swarm(ends=[])
    out = names(make.search("ParticleSampler", sampler, particles=3, resample_every=1.0))
    assert "after 4 of 10 steps: 0.000, 0.000, 1.000; continued: 2, 2, 2\n3 of 3" in out.ranking
    # The way to the step before the scoring in one go, then step by step, as noise is added after each.
    assert {(first, last) for _, first, last in sampler.stretches} == {(0, 3), *((i, i + 1) for i in range(3, 10))}
    assert out.result.score == 1.0 and len(out.latents) == 3 and "seed" not in out.ranking
    assert out.ranking.endswith("30 passes of the model, 3 times those of one clip; 6 clips scored")


# --- Looks by a reward -----------------------------------------------------------------------------------------------


class Look:
    """Takes the place of ``RewardLook``: clip ``i`` will be as good as ``scores[i]``."""

    share = 0.25

    def __init__(self, scores: Sequence[float | None]) -> None:
        self.scores, self.given, self.asked = scores, (), []  # type: ignore[var-annotated]

    def __call__(self, *given: Any) -> Any:
        if not self.given:
            self.given = given
            return self
        x, sigma = given
        self.asked += [(round(clip), round(sigma, 3)) for clip in x.flatten().tolist()]
        return [self.scores[round(clip)] for clip in x.flatten().tolist()]


@pytest.fixture
def look(module: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Look]:
    def made(*scores: float | None) -> Look:
        found = Look(scores)
        monkeypatch.setattr(module("search"), "RewardLook", found)
        return found

    return made


def test_a_reward_orders_the_noise_until_one_is_good_enough(
    make: SimpleNamespace, look: Callable[..., Look], fake_host: Any
) -> None:
    """Of four noises the third promises most, then the second; that one is the first to be good enough."""
    sampler, reward = Sampler(ends=[1.0, 1.0, 0.0, 1.0], passes=2), look(0.1, 0.5, 0.7, None)
    out = names(
        make.search("BestOfNSampler", sampler, candidates=4, keep=1.0, preview=0.0, stop_at=0.7, reward="the reward")
    )
    assert reward.given[0] == "the reward" and reward.given[2] == "p"
    assert reward.asked == [(clip, 1.0) for clip in range(4)]
    assert sampler.stretches == [(2, 0, STEPS), (1, 0, STEPS)] and out.result.score == 1.0
    lines = out.ranking.splitlines()
    assert "after 0 of 10 steps, by the reward: 0.100, 0.500, 0.700, INVALID; taken on: 2, 1, 0, 3" in lines
    # Two clips of ten steps with two passes each, and four looks of a quarter of one.
    assert lines[-1] == "41 passes of the model, 2.05 times those of one clip; 2 clips scored"
    assert fake_host.progress[-1] == (40, 40) and fake_host.loaded == ["patcher"] * 2


def test_a_reward_looks_where_the_widget_says(make: SimpleNamespace, look: Callable[..., Look]) -> None:
    sampler, reward = Sampler(ends=[0.5] * 4, looks=[None] * 4), look(0.1, 0.5, 0.7, 0.2)
    out = names(make.search("BestOfNSampler", sampler, candidates=4, keep=0.5, preview=0.3, reward="r"))
    assert reward.asked == [(clip, 0.7) for clip in range(4)]
    assert sampler.stretches[4:] == [(2, 3, STEPS), (1, 3, STEPS)]
    assert out.ranking.endswith("27 passes of the model, 2.7 times those of one clip; 2 clips scored")


def test_no_look_is_taken_that_would_change_nothing(make: SimpleNamespace, look: Callable[..., Look]) -> None:
    reward = look(0.1, 0.5)
    out = names(make.search("BestOfNSampler", Sampler(ends=[0.5] * 2), candidates=2, preview=0.0, reward="r"))
    assert not reward.asked and out.ranking.startswith("best-of-2,")
    assert names(make.search("BestOfNSampler", Sampler(ends=[0.5] * 2), candidates=2, preview=0.0)).ranking


def test_the_tracker_cannot_look_at_noise(make: SimpleNamespace) -> None:
    with pytest.raises(make.errors.ConfigError, match="at 0 a clip is noise, .*connect a reward, or set it above 0"):
        make.search("BestOfNSampler", Sampler(ends=[0.5] * 4), keep=0.5, preview=0.0)


def test_particles_are_weighed_by_a_reward(make: SimpleNamespace, look: Callable[..., Look], fake_host: Any) -> None:
    """As by the tracker above, but no clip is decoded on the way."""
    sampler, reward = Swarm(ends=[]), look(0.0, 0.0, 1.0)
    out = names(make.search("ParticleSampler", sampler, particles=3, resample_every=1.0, reward="r"))
    assert "after 4 of 10 steps, by the reward: 0.000, 0.000, 1.000; continued: 2, 2, 2\n3 of 3" in out.ranking
    assert reward.asked == [(clip, 0.6) for clip in range(3)] and fake_host.loaded == ["patcher"] * 3
    assert out.ranking.endswith("30.75 passes of the model, 3.08 times those of one clip; 3 clips scored")


def test_new_nodes_search_as_the_engine_does_by_itself(nodes: dict[str, Any], module: Callable[[str], Any]) -> None:
    offered = nodes["SpatialAlignParticleSampler"].INPUT_TYPES()["required"]
    engine = module("spatialalign.search").SearchSettings("particles", 4)
    assert offered["noise"][1]["default"] == engine.eta and offered["potential"][1]["options"][0] == engine.potential
    assert offered["temperature"][1]["default"] == engine.temperature


# --- A stop ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checks", [11, 15, 21])
def test_a_stop_hands_on_what_is_finished(
    make: SimpleNamespace, fake_host: Any, checks: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Each clip is 10 steps and one scoring, each with a check: the stop comes in the second clip."""
    fake_host.interrupt_at = checks
    sampler = Sampler(ends=[0.5, 1.0, 1.0])
    out = names(make.search("BestOfNSampler", sampler, candidates=3))
    assert len(out.latents) == 1 and out.result.score == 0.5
    assert "1 of 3 clips finished, then it was stopped" in out.ranking
    assert "best-of-3 was stopped; the graph goes on with 1 finished" in caplog.text
    assert not [clip for clip, _, _ in sampler.stretches if clip == 2]


@pytest.mark.parametrize(("node", "checks"), [("BestOfNSampler", 10), ("ParticleSampler", 30)])
def test_a_stop_before_anything_is_finished_stops_the_graph(
    make: SimpleNamespace, fake_host: Any, node: str, checks: int
) -> None:
    fake_host.interrupt_at = checks
    with pytest.raises(BaseException) as stop:
        make.search(node, Swarm(ends=[0.5] * 4) if node == "ParticleSampler" else Sampler(ends=[0.5] * 4))
    assert type(stop.value).__name__ == "Interrupted"


# --- What is refused -------------------------------------------------------------------------------------------------


def test_particles_need_a_flow(make: SimpleNamespace) -> None:
    with pytest.raises(make.errors.ConfigError, match="does not predict a flow"):
        make.search("ParticleSampler", Sampler(ends=[0.5] * 4, is_flow=False))


@pytest.mark.parametrize(("samples", "found"), [(torch.zeros(2, 16, 4, 8, 8), "2 clips"), ([1], "list")])
def test_one_clip_is_asked_for(make: SimpleNamespace, samples: Any, found: str) -> None:
    plan = make.stretches.Plan("euler", "simple", STEPS, 1.0, 1.0)
    with pytest.raises(make.errors.ConfigError, match=f"one empty clip is needed, found {found}"):
        make.stretches.Stretches(None, "p", "n", {"samples": samples}, plan)


def test_a_look_needs_a_step_after_it(make: SimpleNamespace) -> None:
    sampler = Sampler(ends=[0.5] * 4)
    sampler.steps, sampler.sigmas = 1, torch.tensor([1.0, 0.0])  # type: ignore[misc]
    with pytest.raises(make.errors.ConfigError, match="at least 2 sampling steps"):
        make.search("BestOfNSampler", sampler, keep=0.5)
