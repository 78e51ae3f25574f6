"""Block scores of teachers, their file, and the training of a patch reward on them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from scipy.stats import spearmanr

from spatialalign.backbones.wan import WanBackbone
from spatialalign.blocks import BlockGrid
from spatialalign.errors import ConfigError, DataError, ModelError
from spatialalign.rewards.latent import LatentReward, RewardInfo, save_reward
from spatialalign.rewards.patch import PatchReward, load_patch_reward
from spatialalign.rewards.vlm_blocks import vlm_teacher
from spatialalign.rewards.wan_trunk import WanTrunk
from spatialalign.video import write_video
from training import patch_reward, patch_scores
from training.monitors import JsonlLog
from training.patch_reward import PatchSettings, PatchTrainer, reward_loss, split_clips
from training.patch_scores import PatchScores, judge_blocks, read_patches, teach, write_patches
from training.store import Store

GRID = BlockGrid(1, 2, 2)
SETTINGS = PatchSettings(steps=6, batch_pairs=2, warmup_steps=1, held_out=0.3, checkpoint_every=2)


@pytest.fixture
def filled(paired_store: Store) -> Store:
    """The store with videos: black, but for a white lower right quarter in seed 0."""
    for sample in paired_store.samples():
        frames = np.zeros((5, 32, 32, 3), np.uint8)
        if sample.seed == 0:
            frames[:, 16:, 16:] = 255
        write_video(sample.video, frames, 8)
    return paired_store


def brightness(frames: NDArray[np.uint8], prompt: str) -> float:
    """A teacher."""
    assert prompt.endswith(".")
    return float(frames.mean()) / 255


def labels_of(store: Store) -> PatchScores:
    """Random numbers."""
    random, values = np.random.default_rng(0), {}
    for sample in store.samples():
        values[sample.prompt_id, sample.seed] = random.random(GRID.shape).astype(np.float32)
    return PatchScores(GRID, "random", values)


def video_reward(backbone: WanBackbone) -> LatentReward:
    torch.manual_seed(0)
    info = RewardInfo(backbone.model_id, backbone.latent_space)
    reward = LatentReward(WanTrunk.from_transformer(backbone.transformer, 1), info, head_width=16)
    torch.nn.init.normal_(reward.head.to_values.weight, std=0.1)
    return reward


def trainer(
    reward: PatchReward, store: Store, labels: PatchScores, out: Path, settings: PatchSettings = SETTINGS
) -> PatchTrainer:
    return PatchTrainer(reward, store, labels, settings, out, {})


def test_any_callable_is_a_teacher(filled: Store, tmp_path: Path) -> None:
    scores = teach(filled, filled.samples(), GRID, brightness, "brightness")
    assert len(scores.values) == 9
    assert scores.of("0001_LR", 0)[0] == pytest.approx(np.array([[0, 0], [0, 1]]), abs=0.02)
    assert scores.of("0001_LR", 1) == pytest.approx(np.zeros(GRID.shape), abs=0.02)
    write_patches(tmp_path / "scores.safetensors", scores)
    found = read_patches(tmp_path / "scores.safetensors")
    assert (found.grid, found.source, found.digest) == (GRID, "brightness", scores.digest)
    assert np.array_equal(found.of("0003_LT", 0), scores.of("0003_LT", 0))
    with pytest.raises(DataError, match="0001_LR/7"):
        found.of("0001_LR", 7)


def test_a_vlm_is_a_teacher() -> None:
    """Yes is 1, no 0, anything else unknown; it sees its window of frames, the first and the last among them."""
    seen = []

    class Judge:
        window = 3

        def __call__(self, frames: NDArray[np.uint8], asked: str) -> str:
            seen.append((frames[:, 0, 0, 0].tolist(), asked))
            return ["no", "yes", "unclear"][len(seen) - 1]

    frames = np.arange(9, dtype=np.uint8).repeat(12).reshape(9, 2, 2, 3)
    teacher = vlm_teacher(Judge())  # type: ignore[arg-type]
    values = [teacher(frames, "a prompt"), teacher(frames[:2], "a prompt"), teacher(frames[:1], "a prompt")]
    assert values[:2] == [0.0, 1.0] and np.isnan(values[2])
    assert [shown for shown, _ in seen] == [[0, 4, 8], [0, 1], [0]]
    assert all("defects" in asked and "yes or no" in asked for _, asked in seen)


def test_files_that_are_no_block_scores(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("hello")
    save_file({"a/0": np.zeros((1, 1, 1), np.float32)}, tmp_path / "other.safetensors", metadata={"format": "x"})
    wrong = {"format": patch_scores.FORMAT, "grid": "1x2x2", "source": "x"}
    save_file({"a/0": np.zeros((1, 1, 1), np.float32)}, tmp_path / "shape.safetensors", metadata=wrong)
    for name, words in (("absent", "not exist"), ("text", "damaged"), ("other", "no block scores"), ("shape", "1x2x2")):
        with pytest.raises(DataError, match=words):
            read_patches(tmp_path / f"{name}.safetensors")


def test_the_loss_by_hand() -> None:
    """Errors 1, -1, 0.5 and unknown: 2.25 / 3. Pairs: (2, 1) decided, logit 3 - 0.5; (0, unknown) not."""
    values, labels = torch.tensor([3.0, -1.0, 1.5, 0.5]), torch.tensor([2.0, 0.0, 1.0, float("nan")])
    squared = (1.0 + 1.0 + 0.25) / 3
    assert reward_loss(values, labels, 0.1, 0.0).item() == pytest.approx(squared)
    ordered = float(np.log1p(np.exp(-1.5)))
    assert reward_loss(values, labels, 0.1, 2.0).item() == pytest.approx(squared + 2 * ordered)
    assert reward_loss(values, labels, 1.0, 2.0).item() == pytest.approx(squared)
    assert reward_loss(values * torch.nan, labels, 0.1, 2.0).isnan()  # a broken value is no missing label


def test_the_rank_correlation_is_of_the_known_blocks_of_held_out_clips(
    filled: Store, backbone: WanBackbone, tmp_path: Path
) -> None:
    """Against scipy's, with one block unknown; None where all labels of the held-out clips are alike."""
    reward, labels = PatchReward.from_video(video_reward(backbone), GRID), labels_of(filled)
    held_out = split_clips(labels, SETTINGS.held_out, SETTINGS.seed)[1]
    labels.values[held_out[0]][0, 0, 0] = np.nan
    found = trainer(reward, filled, labels, tmp_path).measure()
    scores = judge_blocks(filled, filled.samples(), reward, "x")
    values, targets = (np.concatenate([side.of(*clip).ravel() for clip in held_out]) for side in (scores, labels))
    assert len(targets) == 12 and np.isnan(targets).sum() == 1
    expected = spearmanr(values[~np.isnan(targets)], targets[~np.isnan(targets)]).statistic
    assert found == pytest.approx(expected, abs=1e-6)
    alike = {clip: np.ones(GRID.shape, np.float32) for clip in held_out}
    assert trainer(reward, filled, replace(labels, values=labels.values | alike), tmp_path).measure() is None


def test_looks_and_bad_steps_are_logged(filled: Store, backbone: WanBackbone, tmp_path: Path) -> None:
    reward = PatchReward.from_video(video_reward(backbone), GRID)
    settings = replace(SETTINGS, held_out_every=2, steps=4, max_bad_steps=2)
    assert trainer(reward, filled, labels_of(filled), tmp_path / "good", settings).fit()
    rows = JsonlLog(tmp_path / "good" / "train.jsonl").rows()
    assert [row["step"] for row in rows if row["event"] == "held_out"] == [2, 4]
    assert all(-1 <= row["rank_correlation"] <= 1 for row in rows if row["event"] == "held_out")
    with torch.no_grad():
        reward.head.to_values.bias.fill_(torch.inf)
    with pytest.raises(DataError, match=r"step 3: loss .* is not finite, more than max_bad_steps \(2\)"):
        trainer(reward, filled, labels_of(filled), tmp_path / "bad", settings).fit()


def test_steps_of_whole_clips_are_a_share_and_pairs_share_a_prompt(
    filled: Store, backbone: WanBackbone, tmp_path: Path
) -> None:
    reward = PatchReward.from_video(video_reward(backbone), GRID)
    one = trainer(reward, filled, labels_of(filled), tmp_path, replace(SETTINGS, video_share=0.25))
    draws = [one.draw(step) for step in range(400)]
    assert 0.18 < np.mean([whole for _, _, whole in draws]) < 0.32
    pairs = [pair for first, other, _ in draws for pair in zip(first, other, strict=True)]
    assert all(first[0] == second[0] and first != second for first, second in pairs)
    assert {clip for pair in pairs for clip in pair} == set(one.train)
    assert not {prompt for prompt, _ in one.train} & {prompt for prompt, _ in one.held_out}
    assert one.draw(3) == one.draw(3)


def test_values_come_back_on_the_teachers_scale(filled: Store, backbone: WanBackbone, tmp_path: Path) -> None:
    reward, labels = PatchReward.from_video(video_reward(backbone), GRID), labels_of(filled)
    labels = replace(labels, values={clip: 10 + 5 * value for clip, value in labels.values.items()})
    one = trainer(reward, filled, labels, tmp_path)
    before = judge_blocks(filled, filled.samples()[:2], reward, "x")
    one.rescale()
    after = judge_blocks(filled, filled.samples()[:2], reward, "x")
    known = np.concatenate([labels.values[clip].ravel() for clip in one.train])
    for clip, value in before.values.items():
        assert after.values[clip] == pytest.approx(known.mean() + known.std() * value, rel=1e-4)


def test_stopped_and_continued_equals_one_go_to_the_bit(filled: Store, backbone: WanBackbone, tmp_path: Path) -> None:
    labels, video = labels_of(filled), video_reward(backbone)
    straight = patch_reward.train(PatchReward.from_video(video, GRID), filled, labels, tmp_path / "straight", SETTINGS)
    calls = iter([False, False, True])
    first = patch_reward.train(
        PatchReward.from_video(video, GRID), filled, labels, tmp_path / "twice", SETTINGS, lambda: next(calls)
    )
    assert (first.finished, first.step, first.file) == (False, 3, None)
    second = patch_reward.train(PatchReward.from_video(video, GRID), filled, labels, tmp_path / "twice", SETTINGS)
    assert straight.file is not None and second.file is not None
    expected, found = load_file(straight.file), load_file(second.file)
    assert expected.keys() == found.keys()
    assert all(np.array_equal(found[name], tensor) for name, tensor in expected.items())
    with pytest.raises(ConfigError, match="lr"):
        changed = replace(SETTINGS, lr=0.5)
        patch_reward.train(PatchReward.from_video(video, GRID), filled, labels, tmp_path / "twice", changed)


def test_both_programs(filled: Store, backbone: WanBackbone, tmp_path: Path) -> None:
    """Labels, a reward from the command line, its scores of the store's blocks: finite, on the reward's grid."""
    save_reward(tmp_path / "video.safetensors", video_reward(backbone))
    write_patches(tmp_path / "labels.safetensors", labels_of(filled))
    out, scores = tmp_path / "out", tmp_path / "scores.safetensors"
    options = ["--store", str(filled.root), "--labels", str(tmp_path / "labels.safetensors"), "--out", str(out)]
    options += ["--reward", str(tmp_path / "video.safetensors"), "--device", "cpu", "--steps", "3"]
    patch_reward.main([*options, "--batch_pairs", "2", "--warmup_steps", "1"])
    reward = load_patch_reward(out / patch_reward.FILE)
    assert (reward.grid, reward.info.teacher) == (GRID, "random")
    patch_scores.main(
        ["--store", str(filled.root), "--out", str(scores), "--reward", str(out / patch_reward.FILE), "--device", "cpu"]
    )
    found = read_patches(scores)
    assert found.grid == GRID and len(found.values) == 9
    assert all(np.isfinite(value).all() for value in found.values.values())
    with pytest.raises(SystemExit):
        patch_scores.main(["--store", str(filled.root), "--out", str(scores)])
    reward.info = replace(reward.info, latent_space="wan-vae:9")
    with pytest.raises(ModelError, match="wan-vae:9"):
        judge_blocks(filled, filled.samples(), reward, "x")


def test_labels_that_teach_nothing(filled: Store, backbone: WanBackbone, tmp_path: Path) -> None:
    reward, labels = PatchReward.from_video(video_reward(backbone), GRID), labels_of(filled)
    flat = replace(labels, values={clip: np.ones_like(value) for clip, value in labels.values.items()})
    with pytest.raises(DataError, match="nothing to learn"):
        trainer(reward, filled, flat, tmp_path)
    lonely = replace(labels, values={clip: value for clip, value in labels.values.items() if clip[1] == 0})
    with pytest.raises(DataError, match="two labelled clips"):
        trainer(reward, filled, lonely, tmp_path)
    assert split_clips(labels, 0.0, 0)[1] == []
