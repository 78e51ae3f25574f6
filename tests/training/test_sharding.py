"""A base model sharded over two processes: the weights of one process that holds it whole, and none waits for ever."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from spatialalign.backbones.wan import WanBackbone
from spatialalign.errors import ConfigError
from spatialalign.lora import unload_lora
from training.config import TrainSettings, describe_changes
from training.dpo import main
from training.pair_model import PairModel
from training.pairs import PairStream, read_pairs
from training.processes import Processes
from training.sharding import backend, with_launcher
from training.store import Store
from training.trainer import ADAPTER, Trainer
from training.weights import Weighting

from .test_processes import SETTINGS, alone, distance, end, log, options, start

UNEVEN = replace(SETTINGS, steps=4, lr=5e-4, batch_pairs=3, held_out_pairs=3, checkpointing="full", passes="one-sample")
"""Three pairs over two processes: one has none at the end, in a step as in an evaluation."""

PARTS = """
import torch.distributed as dist
from training.processes import launched
from training.sharding import is_sharded, load_sharded
with launched() as processes:
    transformer = load_sharded("miniature", "cpu", "bfloat16", None, processes).transformer
    parts = [parameter.to_local().numel() for parameter in transformer.parameters()]
    print(is_sharded(transformer), sum(parts), sum(parameter.numel() for parameter in transformer.parameters()))
"""

FULL_IN_ONE = """
import torch
from training.dpo import main
from training.pair_model import PairModel
from training.processes import launched_rank

plain = PairModel.gradients

def gradients(self, pairs, indices, beta):
    if launched_rank() == 1 and 7 in indices:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return plain(self, pairs, indices, beta)

PairModel.gradients = gradients
main()
"""


def sharded(
    model: Path, store: Store, out: Path, settings: TrainSettings, program: tuple[str, str] = ("-m", "training.dpo")
) -> list[tuple[int, str]]:
    """Exit status and what was said, of two processes."""
    return end(start([[*program, *options(model, store, out, replace(settings, shard=True))]] * 2))


def test_the_same_weights_afresh_and_from_a_checkpoint_made_whole(
    tiny_wan: Path, paired_store: Store, tmp_path: Path
) -> None:
    """Gradients of the text are added up block by block, not linear by linear, which its embedding's LoRA sees."""
    whole, afresh, continued = (tmp_path / name for name in ("whole", "afresh", "continued"))
    alone(tiny_wan, paired_store, whole, UNEVEN)
    found = sharded(tiny_wan, paired_store, afresh, UNEVEN)
    assert [code for code, _ in found] == [0, 0], found
    assert found[0][1].count("(ComfyUI)") == 1
    assert distance(whole, afresh, 4) < 1e-6

    shutil.copytree(whole / "checkpoints/step-000002", continued / "checkpoints/step-000002")
    found = sharded(tiny_wan, paired_store, continued, UNEVEN)
    assert [code for code, _ in found] == [0, 0], found
    assert "continuing after step 2" in found[0][1]
    assert distance(whole, continued, 4) < 1e-6

    summaries = [json.loads((out / "summary.json").read_text()) for out in (whole, afresh, continued)]
    digests = {summary["lora"]["base_digest"] for summary in summaries}
    assert len(digests) == 1  # of all weights, whoever holds them
    assert all(summary["verified"] < 1e-4 for summary in summaries)


def test_clips_that_one_process_cannot_use(tiny_wan: Path, paired_store: Store, tmp_path: Path) -> None:
    """The process that drew a NaN clip takes part in the other's passes."""
    settings = replace(UNEVEN, held_out=0.0, auto_beta=None, passes="auto", checkpointing="selective", batch_pairs=4)
    sample = paired_store.sample("0001_LR", 1)
    sample.write_latents(sample.read_latents() * float("nan"), sample.read_header())
    alone(tiny_wan, paired_store, tmp_path / "whole", settings)
    found = sharded(tiny_wan, paired_store, tmp_path / "sharded", settings)
    assert [code for code, _ in found] == [0, 0], found
    rows, expected = log(tmp_path / "sharded"), log(tmp_path / "whole")
    assert [row["skipped_pairs"] for row in rows if row["event"] == "train"] == [
        row["skipped_pairs"] for row in expected if row["event"] == "train"
    ]
    assert [row["clip"] for row in rows if row["event"] == "bad_clip"] == ["0001_LR/1"]
    assert distance(tmp_path / "whole", tmp_path / "sharded", 4) < 1e-6

    found = sharded(tiny_wan, paired_store, tmp_path / "none", replace(settings, max_bad_clips=0))
    assert [code for code, _ in found] == [2, 2], found
    assert all("0001_LR/1" in said for _, said in found)


def test_an_error_in_the_middle_of_a_pass_ends_all(tiny_wan: Path, paired_store: Store, tmp_path: Path) -> None:
    """Pair 7 is the second of step 4; the first process is by then inside its pass, or will be."""
    settings = replace(SETTINGS, held_out=0.0, auto_beta=None)
    found = sharded(tiny_wan, paired_store, tmp_path / "out", settings, ("-c", FULL_IN_ONE))
    assert [code for code, _ in found] == [2, 2], found
    assert "lost another one" in found[0][1]
    assert "the memory of the device is full" in found[1][1]
    assert (tmp_path / "out/checkpoints/step-000002/complete").is_file()


@pytest.mark.parametrize("passes", ["batched", "separate", "one-sample"])
@pytest.mark.parametrize("arm", ["dpo+zo", "sft", "rwr"])
def test_without_pairs_the_passes_are_the_same_and_add_nothing(
    backbone: WanBackbone, paired_store: Store, tmp_path: Path, arm: Any, passes: Any
) -> None:
    settings = replace(SETTINGS, arm=arm, passes=passes, auto_beta=None, error_of="noise", checkpointing="full")
    prompts, _ = read_pairs(paired_store.root / "pairs.json")
    scores = {(prompt.prompt_id, seed): float(seed == 0) for prompt in prompts for seed in (0, 1, 2)}
    run = Trainer(backbone, paired_store, prompts, [], settings, tmp_path, {})
    weighting, name = Weighting(prompts, [], scores, settings), prompts[0].prompt_id
    model = PairModel(backbone, run.clips, settings, weighting, tmp_path, Processes(1, 2), name)
    pair, called, velocity = PairStream(prompts, 0).pair(0), list[list[bool]](), backbone.velocity

    def counted(*args: Any) -> Tensor:
        found = velocity(*args)
        called[-1].append(found.requires_grad)
        return found

    backbone.velocity = counted  # type: ignore[method-assign]
    try:
        for pairs, indices in (([pair], [0]), ([], [])):
            run.optimizer.zero_grad()
            called.append([])
            model.gradients(pairs, indices, settings.beta)
            gradients = [parameter.grad for parameter in run.parameters.values() if parameter.grad is not None]
            assert gradients
            assert any(bool(gradient.any()) for gradient in gradients) == bool(pairs)
    finally:
        del backbone.velocity
        unload_lora(backbone.transformer, ADAPTER)
        run.release()
    assert called[0] == called[1]


def test_each_process_holds_half(miniature_weights: Path) -> None:
    found = end(start([["-c", PARTS]] * 2))
    assert [code for code, _ in found] == [0, 0], found
    answers = [said.splitlines()[-1].split() for _, said in found if said]
    parts, sizes = ([int(answer[index]) for answer in answers] for index in (1, 2))
    assert [answer[0] for answer in answers] == ["True", "True"]
    assert sizes[0] == sizes[1] == sum(parts)
    assert all(part == pytest.approx(sizes[0] / 2, rel=0.01) for part in parts)


def test_one_process_is_refused(
    tiny_wan: Path, paired_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(options(tiny_wan, paired_store, tmp_path / "out", replace(SETTINGS, shard=True)))
    assert stopped.value.code == 2
    assert "shard (True) needs several processes, found 1; start them with torchrun" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("other", "value"),
    [("sample_every", 5), ("reference_cache", "bfloat16"), ("base_dtype", "fp8"), ("compile", True)],
)
def test_what_cannot_be_sharded_is_refused_by_name(other: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"shard \(True\) together with {other} \({value}\)"):
        TrainSettings(shard=True, **{other: value})


def test_accelerate_can_ask_for_it(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    assert with_launcher(SETTINGS) is SETTINGS
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with caplog.at_level("INFO"):
        assert with_launcher(SETTINGS) == replace(SETTINGS, shard=True)
    assert "accelerate launch --use_fsdp" in caplog.text


def test_a_checkpoint_may_change_sides() -> None:
    assert describe_changes(SETTINGS.to_dict(), replace(SETTINGS, shard=True).to_dict()) == []


def test_weights_travel_between_cards_by_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    wanted = replace(SETTINGS, shard=True)
    assert [backend(wanted, device) for device in ("auto", "cuda", "cpu")] == ["cpu:gloo,cuda:nccl"] * 2 + ["gloo"]
    assert backend(SETTINGS, "cuda") == "gloo"


@pytest.mark.parametrize(("items", "size"), [(4, 2), (5, 2), (1, 3), (7, 3)])
def test_all_have_as_many_turns(items: int, size: int) -> None:
    turns = [Processes(rank, size).turns(range(items)) for rank in range(size)]
    assert {len(own) for own in turns} == {-(-items // size)}
    assert sorted(item for own in turns for item in own if item is not None) == list(range(items))
