"""Training of a VideoReward network on a tiny random Qwen2-VL: what learns, the checkpoint, exact resume, bad input."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from spatialalign.errors import ConfigError, DataError, ModelError
from spatialalign.rewards.video_reward import LearnedVideoReward, load_video_reward
from spatialalign.rewards.video_reward_text import MARKS, Instruction
from spatialalign.video import read_video, write_video
from training.monitors import JsonlLog
from training.reward_losses import pair_losses
from training.reward_model import main, train
from training.reward_model_settings import RewardModelSettings
from training.reward_model_trainer import PairOrder, RewardModelTrainer, accuracies, joined
from training.reward_network import TrainedNetwork, new_judge, rate_of
from training.reward_pairs import RewardPairs, read_pairs

SETTINGS = RewardModelSettings(
    rank=4,
    alpha=8.0,
    dropout=0.1,
    fps=4.0,
    max_pixels=800,
    steps=4,
    batch_pairs=4,
    micro_pairs=2,
    lr=1e-2,
    held_out=0.4,
    held_out_every=2,
    checkpoint_every=2,
    keep_checkpoints=0,
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(repo_root: Path) -> ModuleType:
    """The benchmark's clips and tiny model; benchmarks/ is no installed package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repo_root))
        return importlib.import_module("benchmarks.reward_world")


@pytest.fixture(scope="module")
def base(world: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = world.write_base(tmp_path_factory.mktemp("base"))
    return path


@pytest.fixture(scope="module")
def table(world: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three prompts with three clips, hence three pairs, each."""
    path, _ = world.write_pairs(tmp_path_factory.mktemp("pairs"), world.World(groups=3, clips=3))
    return Path(path)


@pytest.fixture
def judge(base: Path, world: ModuleType) -> Callable[..., LearnedVideoReward]:
    """``judge(**changes)``: an untrained network of the settings, changed."""

    def make(**changes: Any) -> LearnedVideoReward:
        return new_judge(
            str(base), replace(SETTINGS, **changes), Instruction(world.TEMPLATE, "test"), CPU, torch.float32
        )

    return make


def trainer(judge: LearnedVideoReward, pairs: RewardPairs, out: Path, **changes: Any) -> RewardModelTrainer:
    settings = replace(SETTINGS, **changes)
    return RewardModelTrainer(judge, pairs, pairs.take([]), settings, out, settings.to_dict())


def state(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize(
    ("changes", "learning"),
    [
        ({}, {"lora", "rows", "rm_head", "merger", "vision"}),
        ({"vision": "merger"}, {"lora", "rows", "rm_head", "merger"}),
        ({"vision": "frozen", "tokens": "last", "outputs": 3}, {"lora", "rm_head"}),
    ],
)
def test_only_what_is_meant_to_learns(
    judge: Callable[..., LearnedVideoReward], table: Path, tmp_path: Path, changes: dict[str, Any], learning: set[str]
) -> None:
    def part(name: str) -> str:
        kinds = {"lora_": "lora", ".rows": "rows", "rm_head": "rm_head", ".merger.": "merger", ".visual.": "vision"}
        return next((kind for mark, kind in kinds.items() if mark in name), "language model")

    made = judge(**changes)
    before = state(made.network)
    one = trainer(made, read_pairs(table), tmp_path, **changes)
    for _ in range(3):
        assert one._train_step()
    changed = {name for name, tensor in made.network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {part(name) for name in changed} == learning
    # every adapter of both layers, of q, k, v, o, gate, up and down, learns: B from the first step, A from the second
    assert len([name for name in changed if "lora_" in name]) == 2 * 7 * 2
    assert not any(".visual." in name for name in changed if "lora_" in name)


def test_only_the_new_rows_of_the_embeddings_learn(
    judge: Callable[..., LearnedVideoReward], base: Path, table: Path, tmp_path: Path
) -> None:
    """In the written file all but the last three rows are those of the base model to the bit."""
    result = train(judge(), read_pairs(table), None, tmp_path / "out", SETTINGS)
    assert result.finished and result.checkpoint == tmp_path / "out"
    stored = torch.load(tmp_path / "out" / "checkpoint-4" / "non_lora_state_dict.pth", weights_only=True)
    found = stored["base_model.model.model.embed_tokens.weight"]
    untrained = judge().network.backbone.model.language_model.embed_tokens.table()
    expected = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    tokens = len(untrained) - len(MARKS)
    assert torch.equal(found[:tokens], expected[:tokens])
    assert (found[tokens:] != untrained[tokens:]).all()
    assert not any("lora_" in name or ".layers." in name for name in stored)


@pytest.mark.parametrize("changes", [{}, {"outputs": 3, "vision": "frozen"}])
def test_the_checkpoint_scores_as_the_network_did(
    judge: Callable[..., LearnedVideoReward], table: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Read by the loader of the released weights; standardised over the held-out clips."""
    made, settings, pairs = judge(**changes), replace(SETTINGS, **changes), read_pairs(table)
    train(made, pairs, None, tmp_path, settings)
    loaded = load_video_reward(tmp_path, dtype=torch.float32)
    _, held = pairs.split(settings.held_out, settings.seed)
    clips = list(dict.fromkeys((clip, held.prompts[row]) for row in range(len(held)) for clip in held.clips[row]))
    videos, prompts = [read_video(clip) for clip, _ in clips], [prompt for _, prompt in clips]
    scores = loaded.score(videos, prompts)
    assert scores[:, :3].mean(axis=0) == pytest.approx(0, abs=1e-3)
    assert scores[:, :3].std(axis=0) == pytest.approx(1, abs=1e-3)
    made.network.eval()
    np.testing.assert_allclose(made.score(videos, prompts), scores, atol=1e-3)
    assert loaded.instruction.text == made.instruction.text
    assert json.loads((tmp_path / "model_config.json").read_text())["model_config"]["loss_type"] == "btt"


def test_half_precision_is_for_what_does_not_learn(base: Path, world: ModuleType, table: Path, tmp_path: Path) -> None:
    """What learns is kept in float32, where a step of 1e-5 is not lost; the checkpoint is in bfloat16 throughout."""
    instruction, pairs = Instruction(world.TEMPLATE, "test"), read_pairs(table)
    made = new_judge(str(base), SETTINGS, instruction, CPU, torch.bfloat16)
    kinds = {parameter.dtype: parameter.requires_grad for parameter in made.network.parameters()}
    assert kinds == {torch.float32: True, torch.bfloat16: False}
    train(made, pairs, None, tmp_path, replace(SETTINGS, lr=1e-5))
    stored = torch.load(tmp_path / "checkpoint-4" / "non_lora_state_dict.pth", weights_only=True)
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    before = new_judge(str(base), SETTINGS, instruction, CPU, torch.bfloat16).network.state_dict()
    assert not torch.equal(made.network.state_dict()["rm_head.weight"], before["rm_head.weight"])
    videos = [read_video(clip) for clip in pairs.clips[0]]
    answers = made.network(made.collate(videos, ["a square"] * 2))
    assert answers.dtype == torch.float32 and not torch.equal(answers, answers.bfloat16().float())
    assert np.isfinite(load_video_reward(tmp_path, dtype=torch.bfloat16).score(videos, ["a square"] * 2)).all()


def test_scores_at_the_last_token(judge: Callable[..., LearnedVideoReward], table: Path, tmp_path: Path) -> None:
    """The tokens of the dimensions are in no text, padding does not matter, and the loader says it cannot read it."""
    changes = {"tokens": "last", "outputs": 3}
    made, pairs = judge(**changes), read_pairs(table)
    one = trainer(made, pairs, tmp_path, **changes)
    short = one.reader.read((pairs.clips[0][0], "a square"))
    long = one.reader.read((pairs.clips[0][1], "a red square on the floor"))
    assert short is not None and long is not None
    assert not torch.isin(long.ids, torch.tensor(made.network.marks)).any()
    with torch.no_grad():
        made.network.eval()
        together = made.network(joined([short, long], 0))
        torch.testing.assert_close(together, torch.cat([made.network(short), made.network(long)]), atol=1e-5, rtol=0)
        hidden = made.network.hidden_states(short)[0, -1]
        torch.testing.assert_close(together[0], made.network.rm_head.weight @ hidden, atol=1e-5, rtol=0)
    train(made, pairs, None, tmp_path / "out", replace(SETTINGS, **changes))
    with pytest.raises(ModelError, match="special tokens"):
        load_video_reward(tmp_path / "out")


def test_parts_of_a_step_add_up(judge: Callable[..., LearnedVideoReward], table: Path, tmp_path: Path) -> None:
    """The gradient of a step in parts is that of the mean over all its pairs and dimensions, unknown ones included."""
    pairs = read_pairs(table)
    pairs.preference[0, 1] = np.nan
    gradients = []
    for parts in (1, 4):
        one = trainer(judge(dropout=0.0), pairs, tmp_path, micro_pairs=parts, dropout=0.0)
        for start in range(0, 4, parts):
            one._backward(np.arange(4)[start : start + parts])
        gradients.append(one.network.rm_head.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-3)
    one = trainer(judge(dropout=0.0), pairs, tmp_path)
    found = one.answers([(clip, pairs.prompts[row]) for row in range(4) for clip in pairs.clips[row]])
    sides = [
        torch.tensor(np.array([found[pairs.clips[row][side], pairs.prompts[row]] for row in range(4)]))
        for side in (0, 1)
    ]
    expected = pair_losses("btt", sides[0], sides[1], one._labels(range(4))).mean()
    measured = sum(one._backward(np.array([row]))["loss"] for row in range(4)) / 4
    assert measured == pytest.approx(expected.item(), abs=1e-5)


def test_a_stopped_run_ends_with_the_same_bits(
    judge: Callable[..., LearnedVideoReward], table: Path, tmp_path: Path
) -> None:
    pairs = read_pairs(table)
    train(judge(), pairs, None, tmp_path / "whole", SETTINGS)
    calls = iter([False, True])
    with pytest.MonkeyPatch.context() as patch:
        fit = RewardModelTrainer.fit
        patch.setattr(RewardModelTrainer, "fit", lambda self, stop: fit(self, lambda: next(calls)))
        part = train(judge(), pairs, None, tmp_path / "parts", SETTINGS)
    assert not part.finished and part.step == 2 and not (tmp_path / "parts" / "model_config.json").exists()
    assert train(judge(), pairs, None, tmp_path / "parts", SETTINGS).finished
    one, two = (tmp_path / name / "checkpoint-4" for name in ("whole", "parts"))
    adapters = [load_file(folder / "adapter_model.safetensors") for folder in (one, two)]
    rest = [torch.load(folder / "non_lora_state_dict.pth", weights_only=True) for folder in (one, two)]
    for first, second in (adapters, rest):
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    rows = JsonlLog(tmp_path / "parts" / "train.jsonl").rows()
    assert [row["step"] for row in rows if row["event"] == "train"] == [1, 2, 3, 4]
    assert set(rows[-1]) >= {"VQ", "VQ_with_ties", "TA"} and rows[-1]["event"] == "held_out"
    with pytest.raises(ConfigError, match="theta: 5.0 -> 4.0"):
        train(judge(), pairs, None, tmp_path / "parts", replace(SETTINGS, theta=4.0))
    with pytest.raises(ConfigError, match="pairs_digest"):
        train(judge(), pairs.take(range(8)), None, tmp_path / "parts", SETTINGS)


def test_it_learns_which_clip_is_noisy(
    judge: Callable[..., LearnedVideoReward], world: ModuleType, tmp_path: Path
) -> None:
    """Of two clips one is noisy and one is not; people call the clean one better, and two clean ones a tie."""
    files = []
    for number in range(6):
        clean = world.render("red", (1, 1, 1), np.random.default_rng(number))
        noisy = world.render("red", (0, 1, 1), np.random.default_rng(number))
        for name, frames in (("clean", clean), ("noisy", noisy)):
            files.append(tmp_path / f"{name}{number}.mp4")
            write_video(files[-1], frames, 4.0)
    rows = [f"{files[2 * n].name},{files[2 * n + 1].name},a red square,A,same," for n in range(6)]
    rows += [f"{files[2 * n].name},{files[2 * (n + 1) % 12].name},a red square,same,same," for n in range(6)]
    (tmp_path / "pairs.csv").write_text("\n".join(["path_A,path_B,prompt,VQ,MQ,TA", *rows]))
    pairs = read_pairs(tmp_path / "pairs.csv")
    changes = {"steps": 40, "batch_pairs": 12, "micro_pairs": 12, "lr": 3e-3, "dropout": 0.0}
    one = trainer(judge(**changes), pairs, tmp_path / "out", **changes)
    while one.step < one.steps:
        one._train_step()
    margins = one.margins(pairs)
    assert accuracies(pairs, margins)["VQ"] == 1
    # past ln 5 a decided label is likelier than not; a tie, at D = 0, is sought where labels say so
    assert margins[:6, 0].min() > np.log(5) and np.abs(margins[6:, 0]).max() < np.log(5)
    assert np.abs(margins[:, 1]).max() < np.log(5)


def test_clips_of_no_use_are_named_and_left_out(
    judge: Callable[..., LearnedVideoReward], table: Path, tmp_path: Path
) -> None:
    pairs = read_pairs(table)
    short, damaged = tmp_path / "short.mp4", tmp_path / "damaged.mp4"
    write_video(short, np.zeros((1, 42, 42, 3), np.uint8), 4.0)
    damaged.write_bytes(b"no video")
    clips = list(pairs.clips)
    clips[0], clips[1] = (short, clips[0][1]), (clips[1][0], damaged)
    one = trainer(judge(), replace(pairs, clips=tuple(clips)), tmp_path / "out")
    assert one._backward(np.array([0, 1])) == {}
    assert one._backward(np.array([0, 2]))["pairs"] == 1
    named = {Path(name.split(" of ")[0]): reason for name, reason in one.reader.left_out.items()}
    assert "at least 2" in named[short] and "cannot be read" in named[damaged] and len(named) == 2
    assert np.isnan(one.margins(one.pairs)[:2]).all()
    none = trainer(judge(), replace(pairs.take([0]), clips=((short, damaged),)), tmp_path / "out", max_bad_steps=1)
    assert none._train_step() == {}
    with pytest.raises(DataError, match="none of its clips can be used, more than max_bad_steps"):
        none._train_step()


def test_prompts_that_cannot_be_read_are_left_out(
    judge: Callable[..., LearnedVideoReward], table: Path, tmp_path: Path
) -> None:
    pairs = read_pairs(table)
    prompts = ["a square " * 500, *pairs.prompts[1:-1], f"a {MARKS[0]} square"]
    odd = replace(pairs, prompts=tuple(prompts))
    made = judge(max_length=300)
    result = train(made, odd, None, tmp_path, replace(SETTINGS, max_length=300, steps=1))
    assert result.finished and sum("the reward reads 300" in reason for reason in result.left_out.values()) == 1
    assert sum("must not hold the model's own token" in reason for reason in result.left_out.values()) == 1
    with pytest.raises(DataError, match="none of 9 pairs can be used; the first: the prompt"):
        train(judge(max_length=10), pairs, None, tmp_path / "none", replace(SETTINGS, max_length=10))


def test_every_pair_once_an_epoch() -> None:
    order = PairOrder(10, 4, seed=0)
    seen = np.concatenate([order.step(step) for step in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert list(seen[:10]) != list(seen[10:])
    assert list(order.step(3)) == list(PairOrder(10, 4, seed=0).step(3)) != list(PairOrder(10, 4, seed=1).step(3))
    assert RewardModelSettings().total_steps(180_000) == 11_250  # two epochs of 32 pairs a step


def test_rates_of_the_parts(judge: Callable[..., LearnedVideoReward]) -> None:
    settings = replace(SETTINGS, lr=1.0, vision_lr=2.0, token_lr=3.0, head_lr=4.0)
    network = judge().network
    assert isinstance(network, TrainedNetwork)
    rates = {name: rate_of(name, settings) for name in network.trainable}
    assert all((rate == 2.0) == (".visual." in name) for name, rate in rates.items())
    assert all((rate == 1.0) == ("lora_" in name) for name, rate in rates.items())
    assert [name for name, rate in rates.items() if rate == 3.0][0].endswith("embed_tokens.rows")
    assert [name for name, rate in rates.items() if rate == 4.0] == ["rm_head.weight"]
    # 5 % of 100 steps: 1/5, 2/5, ... then 1
    assert [replace(settings, warmup=0.05).rate(step, 100) for step in (0, 1, 4, 5, 99)] == [0.2, 0.4, 1, 1, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": "last"}, "set outputs to 3"),
        ({"outputs": 2}, "outputs must be 1 or 3"),
        ({"theta": 1.0}, "theta must be above 1"),
        ({"micro_pairs": 3}, r"batch_pairs \(4\) must be a multiple of micro_pairs \(3\)"),
        ({"steps": 0}, "steps must be null, or above 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(SETTINGS, **changes)


def test_the_program(
    base: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], world: ModuleType
) -> None:
    (tmp_path / "prompt_template.txt").write_text(world.TEMPLATE)
    where = ["--pairs", str(table), "--model", str(base), "--out", str(tmp_path / "out"), "--device", "cpu"]
    options = "--rank 2 --fps 4 --max_pixels 800 --steps 2 --batch_pairs 2 --held_out 0.4 --loss bt-ratings"
    main([*where, *options.split(), "--instruction", str(tmp_path), "--checkpointing", "true"])
    out = capsys.readouterr().out
    assert "VQ_with_ties: " in out and str(tmp_path / "out") in out
    assert load_video_reward(tmp_path / "out", dtype=torch.float32).config.lora is not None
    with pytest.raises(SystemExit) as stopped:
        main([*where, *options.split(), "--model", str(tmp_path / "none")])
    assert stopped.value.code == 2 and "none: the model cannot be loaded" in capsys.readouterr().err
