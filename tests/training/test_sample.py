"""Guided and searched clips in a store: the miniature from end to end, and what the files say of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from spatialalign.backbones import load_backbone
from spatialalign.backbones.base import SampleSettings
from spatialalign.backbones.wan import WanBackbone
from spatialalign.errors import ConfigError, ModelError, StoreError
from spatialalign.guidance import GuidanceSettings
from spatialalign.prompts import Prompt, read_csv
from spatialalign.rewards.latent import LatentReward, RewardInfo, load_reward, save_reward
from spatialalign.rewards.wan_trunk import WanTrunk
from spatialalign.search import SearchSettings, candidate_seed
from spatialalign.tracking.load import load_tracker
from spatialalign.tracking.tracker import Tracker
from spatialalign.tracks import Tracks
from spatialalign.video import read_video
from training.generate import generate
from training.guide import GuideOptions, GuideSpec, guide_spec
from training.sample import main, sample_clips, sampling_path, together
from training.score import score
from training.store import Sample, Store

SEED = 3100
PROMPT = Prompt.parse(
    "0001_LR", "In a cozy room, a cat is on the left of a crate, then the cat walks to the right of the crate."
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", create=True)


def record_of(sample: Sample) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(sampling_path(sample).read_text())
    return record


class Brightness:
    """Stands for detector and segmenter: the brighter the clip, the farther its subject gets over the object."""

    source = "brightness"

    def __init__(self) -> None:
        self.frames: list[int] = []
        self.stop_after = 10**9

    def track(self, frames: np.ndarray, subject: str, object: str, fps: float) -> Tracks:
        if len(self.frames) >= self.stop_after:
            raise KeyboardInterrupt
        self.frames.append(len(frames))
        size = frames.shape[1]
        way = np.linspace(0, 1, len(frames)) * (frames.mean() / 255) * size
        subject_boxes = np.stack([way, way * 0, way + 4, way * 0 + 4], axis=1)
        boxes = np.stack([subject_boxes, np.tile([size / 2, 0, size / 2 + 4, 4.0], (len(frames), 1))], axis=1)
        confidence = np.ones((len(frames), 2))
        return Tracks(boxes, confidence, (subject, object), frames.shape[1:3], fps, source=self.source)


def make(
    backbone: WanBackbone, store: Store, prompts: Sequence[Prompt], tracker: Any, search: SearchSettings, batch: int = 4
) -> tuple[int, int, int]:
    settings = backbone.default_settings()
    summary = sample_clips(backbone, store, prompts, [SEED], settings, tracker, search=search, batch=batch)
    assert not summary.failed
    return summary.done, summary.skipped, summary.busy


BEST_OF_2, BEST_OF_4 = SearchSettings.parse("best-of-2"), SearchSettings.parse("best-of-4")


# --- the real miniature, one run of each kind ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def miniature(miniature_weights: Path) -> SimpleNamespace:
    """Backbone, tracker and settings of few steps."""
    backbone = load_backbone("miniature", device="cpu")
    settings: SampleSettings = replace(backbone.default_settings(), steps=4)
    return SimpleNamespace(backbone=backbone, tracker=load_tracker("miniature"), settings=settings)


@pytest.fixture(scope="module")
def plain(miniature: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """The clip without any search, made by training.generate, scored by training.score."""
    store = Store(tmp_path_factory.mktemp("plain") / "store", create=True)
    generate(miniature.backbone, store, [PROMPT], [SEED], miniature.settings)
    score(store, miniature.tracker)
    return store.sample(PROMPT.prompt_id, SEED)


@pytest.mark.parametrize(
    ("search", "evaluations", "scorings"),
    [
        (SearchSettings(), 4, 0),
        (SearchSettings("best-of-n", 2), 8, 2),
        (SearchSettings("pruned", 2, preview=0.5), 2 * 2 + 2, 3),
        (SearchSettings("particles", 2, preview=0.5, resample_every=0.5), 8, 4),
    ],
)
def test_the_miniature_is_searched(
    miniature: SimpleNamespace, plain: Sample, store: Store, search: SearchSettings, evaluations: int, scorings: int
) -> None:
    backbone, tracker = miniature.backbone, miniature.tracker
    sample_clips(backbone, store, [PROMPT], [SEED], miniature.settings, tracker, search=search)
    sample = store.sample(PROMPT.prompt_id, SEED)
    record = record_of(sample)
    assert record["seeds"] == [candidate_seed(SEED, index) for index in range(search.candidates)]
    assert (record["evaluations"], record["scorings"]) == (evaluations, scorings)
    if search.kind == "none":
        torch.testing.assert_close(sample.read_latents(), plain.read_latents(), atol=1e-4, rtol=1e-4)
        assert sample.read_header().model == "miniature"
        assert not sample.scored
        return
    assert sample.read_header().model == f"miniature+{search.name}"
    if search.kind == "best-of-n":  # no clip is worse than the one without a search, which is a candidate
        assert record["candidates"] == [0, 1]
        assert record["scores"][0] == pytest.approx(plain.read_score().score, abs=1e-3)
    found = sample.read_score()
    assert found.score == record["scores"][record["candidates"].index(record["chosen"])]
    assert found.score == max((score for score in record["scores"] if score is not None), default=None)
    # and training.score finds the same in the stored video
    sample.score.unlink()
    sample.tracks.unlink()
    score(store, tracker)
    assert sample.read_score().to_dict() == found.to_dict()


# --- what the store holds, with a tracker of known answers -----------------------------------------------------------


@pytest.fixture
def prompts(prompt_file: Path) -> list[Prompt]:
    return read_csv(prompt_file)[:1]


def test_the_brightest_candidate_is_delivered(backbone: WanBackbone, store: Store, prompts: list[Prompt]) -> None:
    assert make(backbone, store, prompts, Brightness(), BEST_OF_4) == (1, 0, 0)
    sample, settings = store.sample("0001_LR", SEED), backbone.default_settings()
    seeds = [candidate_seed(SEED, index) for index in range(4)]
    text, negative = backbone.encode_text([prompts[0].text]), backbone.encode_text([settings.negative_prompt])[0]
    latents = backbone.sample(text * 4, negative, seeds, settings)
    bright = [float(frames.mean()) for frames in backbone.decode(latents)]
    record = record_of(sample)
    assert record["chosen"] == bright.index(max(bright))
    torch.testing.assert_close(sample.read_latents(), latents[record["chosen"]], atol=1e-4, rtol=1e-4)
    assert read_video(sample.video).frames.mean() == pytest.approx(max(bright), abs=2)
    # three steps of two passes for each of four candidates
    assert (record["evaluations"], record["scorings"], record["ended"]) == (24, 4, "all")
    assert (record["tracker"], record["guidance"]) == ("brightness", None)
    assert not list(store.root.glob(".tmp-*"))


def test_a_second_run_makes_only_what_is_missing(backbone: WanBackbone, store: Store, prompt_file: Path) -> None:
    prompts, tracker = read_csv(prompt_file), Brightness()
    assert make(backbone, store, prompts[:2], tracker, BEST_OF_2) == (2, 0, 0)
    first, second = (store.sample(prompt.prompt_id, SEED) for prompt in prompts[:2])
    latents = second.read_latents()
    second.video.unlink()
    kept = first.latents.stat().st_mtime_ns
    with store.sample(prompts[2].prompt_id, SEED).claim("generate"):
        assert make(backbone, store, prompts, tracker, BEST_OF_2) == (1, 1, 1)
    assert first.latents.stat().st_mtime_ns == kept
    torch.testing.assert_close(second.read_latents(), latents, atol=1e-4, rtol=1e-4)
    with pytest.raises(StoreError, match="best-of-2 there.*best-of-3 now"):
        make(backbone, store, prompts, tracker, SearchSettings.parse("best-of-3"))


@pytest.mark.parametrize(("threshold", "ended", "taken"), [(0.0, "threshold", 1), (2.0, "all", 3)])
def test_a_threshold_ends_the_search(
    backbone: WanBackbone, store: Store, prompts: list[Prompt], threshold: float, ended: str, taken: int
) -> None:
    make(backbone, store, prompts, Brightness(), SearchSettings("best-of-n", 3, threshold=threshold), batch=1)
    record = record_of(store.sample("0001_LR", SEED))
    assert (record["ended"], len(record["scores"]), record["search"]["threshold"]) == (ended, taken, threshold)


def test_a_preview_may_look_at_few_frames(backbone: WanBackbone, store: Store, prompts: list[Prompt]) -> None:
    tracker = Brightness()
    make(backbone, store, prompts, tracker, SearchSettings("pruned", 4, preview_frames=3))
    assert tracker.frames == [3] * 4 + [5] * 2


def test_a_stopped_run_is_continued(backbone: WanBackbone, store: Store, prompt_file: Path) -> None:
    prompts, tracker = read_csv(prompt_file)[:2], Brightness()
    tracker.stop_after = 3  # in the second prompt's first candidate's turn
    with pytest.raises(KeyboardInterrupt):
        make(backbone, store, prompts, tracker, BEST_OF_2, 2)
    whole, cut = (store.sample(prompt.prompt_id, SEED) for prompt in prompts)
    assert whole.generated and whole.scored
    assert not cut.latents.exists() and not cut.video.exists()
    assert make(backbone, store, prompts, Brightness(), BEST_OF_2, 2) == (1, 1, 0)


def test_a_candidate_that_cannot_be_scored_is_invalid(
    backbone: WanBackbone, store: Store, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = backbone.noise

    def poisoned(seeds: Sequence[int], settings: SampleSettings) -> torch.Tensor:
        found = noise(seeds, settings)
        found[0] = float("nan")
        return found

    monkeypatch.setattr(backbone, "noise", poisoned)
    make(backbone, store, prompts, Brightness(), BEST_OF_2)
    record = record_of(store.sample("0001_LR", SEED))
    assert (record["scores"][0], record["chosen"]) == (None, 1)
    log = [json.loads(line) for line in (store.root / "logs/sample.jsonl").read_text().splitlines()]
    assert [row["event"] for row in log] == ["start", "unscored", "sample", "end"]
    assert "not finite" in log[1]["reason"]


def test_a_clip_without_any_finite_candidate_fails_alone(
    backbone: WanBackbone, store: Store, prompt_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = backbone.noise

    def poisoned(seeds: Sequence[int], settings: SampleSettings) -> torch.Tensor:
        found = noise(seeds, settings)
        found[:1] = float("nan")
        return found

    monkeypatch.setattr(backbone, "noise", poisoned)
    prompts, settings = read_csv(prompt_file)[:2], backbone.default_settings()
    summary = sample_clips(backbone, store, prompts, [SEED], settings, batch=2)
    assert summary.done == 1
    assert [name for name, _ in summary.failed] == [f"0001_LR/{SEED}"]
    assert not store.sample("0001_LR", SEED).latents.exists()


# --- guidance --------------------------------------------------------------------------------------------------------


@pytest.fixture
def reward(backbone: WanBackbone, tmp_path: Path) -> Path:
    """A random reward on the first of the tiny model's two blocks."""
    torch.manual_seed(0)
    made = LatentReward(
        WanTrunk.from_transformer(backbone.transformer, 1), RewardInfo("tiny", backbone.latent_space), 16, 2
    )
    torch.nn.init.normal_(made.head.to_values.weight)
    path = tmp_path / "reward.safetensors"
    save_reward(path, made)
    return path


def guided(backbone: WanBackbone, store: Store, prompts: list[Prompt], guide: GuideSpec | None) -> Sample:
    settings = backbone.default_settings()
    summary = sample_clips(backbone, store, prompts, [SEED], settings, guide=guide)
    assert (summary.done, summary.failed) == (1, [])
    return store.sample("0001_LR", SEED)


def test_guidance_moves_the_clip_and_is_paid_for(
    backbone: WanBackbone, tmp_path: Path, prompts: list[Prompt], reward: Path
) -> None:
    plain = guided(backbone, Store(tmp_path / "plain", create=True), prompts, None)
    moved = GuideSpec(((reward, 1.0),), GuidanceSettings(strength=10.0, end=1.0))
    other = guided(backbone, Store(tmp_path / "guided", create=True), prompts, moved)
    assert (other.read_latents() - plain.read_latents()).abs().max() > 1e-3
    assert other.read_header().model == f"{backbone.model_id}+{moved.name}"
    assert record_of(other)["guidance"]["rewards"] == [[str(reward), 1.0]]
    # two passes in each of three steps, and in two of them a gradient, three passes of half a model
    assert record_of(plain)["evaluations"] == 6
    assert record_of(other)["evaluations"] == 6 + 2 * 1.5

    off = guide_spec([f"{reward}:2"], {"strength": 0.0})
    assert off is not None
    still = guided(backbone, Store(tmp_path / "off", create=True), prompts, off)
    assert torch.equal(still.read_latents(), plain.read_latents())


def test_a_weighted_file_counts_as_much_as_its_weight(
    backbone: WanBackbone, tmp_path: Path, prompts: list[Prompt], reward: Path
) -> None:
    once = GuideSpec(((reward, 2.0),), GuidanceSettings(strength=3.0))
    twice = GuideSpec(((reward, 1.0), (reward, 1.0)), GuidanceSettings(strength=3.0))
    one, two = (
        guided(backbone, Store(tmp_path / str(number), create=True), prompts, guide)
        for number, guide in enumerate((once, twice))
    )
    torch.testing.assert_close(one.read_latents(), two.read_latents(), atol=1e-4, rtol=1e-4)
    assert once.name != twice.name


def test_a_reward_scores_clips_on_the_way(
    backbone: WanBackbone, store: Store, prompts: list[Prompt], reward: Path
) -> None:
    tracker, settings = Brightness(), backbone.default_settings()
    search = SearchSettings("pruned", 4, preview=0.4, preview_by="reward")
    summary = sample_clips(backbone, store, prompts, [SEED], settings, tracker, None, search, preview_reward=reward)
    assert (summary.done, summary.failed) == (1, [])
    sample = store.sample("0001_LR", SEED)
    record = record_of(sample)
    # the reward's own answer after one of three steps, at that step's noisy clips
    text, negative = backbone.encode_text([prompts[0].text]) * 4, backbone.encode_text([settings.negative_prompt])[0]
    with backbone.flow(text, negative, settings) as flow:
        x, _ = flow.step(backbone.noise(record["seeds"], settings), 0)
        expected = load_reward(reward)(x, torch.full((4,), flow.sigmas[1]), text).values[:, 0]
    (event,) = record["history"]
    assert event["scores"] == pytest.approx(expected.tolist(), abs=1e-4)
    assert event["kept"] == expected.argsort(descending=True).tolist()[:2]
    # a step of two passes for each of the four, a look of half a pass, two steps for each of the two that are kept
    assert (record["evaluations"], record["scorings"]) == (4 * 2 + 4 * 0.5 + 2 * 4, 2)
    assert tracker.frames == [5, 5]
    assert record["preview_reward"] == str(reward)
    content = hashlib.sha256(reward.read_bytes()).hexdigest()
    assert sample.read_header().model.endswith(f"+pruned-4(preview=0.4,preview_by=reward)+preview:{content[:12]}")


def test_a_look_and_its_reward_belong_together(
    backbone: WanBackbone, store: Store, prompts: list[Prompt], reward: Path
) -> None:
    settings, tracker = backbone.default_settings(), Brightness()
    by_reward = SearchSettings("pruned", 2, preview_by="reward")
    for search, file in ((by_reward, None), (SearchSettings.parse("pruned-2"), reward), (BEST_OF_2, reward)):
        with pytest.raises(ConfigError, match="preview_by reward"):
            sample_clips(backbone, store, prompts, [1], settings, tracker, None, search, preview_reward=file)
    clean = load_reward(reward)
    clean.info = replace(clean.info, trained_on="clean")
    save_reward(reward, clean)
    with pytest.raises(ModelError, match="trained on noisy"):
        sample_clips(backbone, store, prompts, [1], settings, tracker, None, by_reward, preview_reward=reward)


def test_guidance_on_the_command_line(reward: Path) -> None:
    options = {"strength": 4.0, "guide_form": "x0", "guide_end": 0.5, "guide_weights": {"valid": 2.0}}
    spec = guide_spec([f"{reward}:0.5", str(reward)], options)
    assert spec is not None
    assert spec.rewards == ((reward, 0.5), (reward, 1.0))
    assert spec.settings == GuidanceSettings(form="x0", strength=4.0, end=0.5, weights={"valid": 2.0})
    assert guide_spec([], {}) is None
    assert {field.name.removeprefix("guide_") for field in fields(GuideOptions)} == {
        field.name for field in fields(GuidanceSettings)
    }


def test_a_weight_without_a_dimension_is_refused(
    backbone: WanBackbone, store: Store, prompts: list[Prompt], reward: Path
) -> None:
    wrong = GuideSpec(((reward, 1.0),), GuidanceSettings(weights={"beauty": 1.0}))
    with pytest.raises(ConfigError, match="'beauty'.*dsr"):
        guided(backbone, store, prompts, wrong)


def test_how_many_clips_are_searched_at_once() -> None:
    assert together(BEST_OF_4, 16) == 4
    assert together(BEST_OF_4, 2) == 1
    assert together(SearchSettings("pruned", 32, keep=0.125), 16) == 4
    assert together(SearchSettings("best-of-n", 4, threshold=0.7), 16) == 16


def test_what_does_not_fit_is_refused(backbone: WanBackbone, store: Store, prompts: list[Prompt]) -> None:
    with pytest.raises(ConfigError, match="best-of-2 needs a tracker"):
        make(backbone, store, prompts, None, BEST_OF_2)
    settings = replace(backbone.default_settings(), steps=1)
    tracker: Tracker = Brightness()  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="at least 2 sampling steps"):
        sample_clips(backbone, store, prompts, [1], settings, tracker, None, SearchSettings.parse("pruned-2"))
    assert not list(store.root.iterdir())


def test_the_program(tiny_wan: Path, prompt_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--model", str(tiny_wan), "--prompts", str(prompt_file), "--seeds", "3", "--steps", "2"]
    common += ["--device", "cpu", "--store", str(tmp_path / "store")]
    main(common)
    assert "sample: 3 done" in capsys.readouterr().out
    for wrong, word in (
        (["--search", "best"], "best-of-<N>"),
        (["--strength", "3"], "at least one reward"),
        (["--reward", "nowhere.safetensors:0.5"], "nowhere.safetensors does not exist"),
        (["--search", "best-of-2", "--keep", "0"], "keep"),
        (["--search", "pruned-2", "--preview_reward", "nowhere.safetensors"], "nowhere.safetensors does not exist"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*common, *wrong])
        assert stopped.value.code == 2
        assert word in capsys.readouterr().err
