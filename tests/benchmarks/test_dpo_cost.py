"""The benchmarks of a pair's cost: the meter against counts by hand, the official emulation, the promised ratios."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from spatialalign.backbones import checkpointing
from spatialalign.errors import ConfigError

PARTS = ("meter", "wan_shapes", "official", "dpo_cost", "dpo_gpu")
BLOCKS, WIDTH, TEXT, TOKENS, INNER = 30, 1536, 512, 32_760, 8960


@pytest.fixture(scope="module")
def parts(repo_root: Path) -> Any:
    """The modules; benchmarks/ is no installed package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repo_root))
        yield {name: importlib.import_module(f"benchmarks.{name}") for name in PARTS}


@pytest.fixture
def bench(parts: dict[str, ModuleType]) -> ModuleType:
    return parts["dpo_cost"]


# --- the meter ------------------------------------------------------------------------------------------------------


def test_bytes_alive(parts: dict[str, Any]) -> None:
    """4 bytes a float: 400 from the start; 800 more, a view takes nothing; 400 are freed before the last 1200."""
    start = torch.empty(100, device="meta")
    with parts["meter"].Meter([start]) as meter:
        one, two = torch.empty(100, device="meta"), torch.empty(100, device="meta")
        view = one[:50].reshape(5, 10)
        assert (meter.live, meter.peak) == (1200, 1200)
        del two
        assert (meter.live, meter.peak) == (800, 1200)
        three = torch.empty(300, device="meta")
        assert (meter.live, meter.peak) == (2000, 2000)
        del one, three
        assert meter.live == 800  # the view still holds its storage
    assert view.shape == (5, 10)


def test_operations_of_a_product_and_an_attention(parts: dict[str, Any]) -> None:
    """2 m n k for a product, and as much for the gradient of one factor; 4 b h n m d and 8 b h n m d for attention."""
    x = torch.empty(7, 11, device="meta", requires_grad=True)
    with parts["meter"].Meter() as meter:
        F.linear(x, torch.empty(5, 11, device="meta")).sum().backward()
    assert meter.flops == 2 * 7 * 11 * 5 * 2
    q = torch.empty(2, 3, 32, 16, device="meta", dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.empty(2, 3, 48, 16, device="meta", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    with parts["meter"].attention_in_one_operator(), parts["meter"].Meter() as meter:
        out = F.scaled_dot_product_attention(q, k, v)
        assert meter.flops == 4 * 2 * 3 * 32 * 48 * 16
        out.sum().backward()
    assert meter.flops == 12 * 2 * 3 * 32 * 48 * 16
    assert F.scaled_dot_product_attention(torch.ones(1, 1, 1, 1), *(torch.ones(1, 1, 1, 1),) * 2).item() == 1


def test_the_meter_agrees_with_torchs_own_counter(parts: dict[str, Any]) -> None:
    shapes, meters = parts["wan_shapes"], parts["meter"]
    backbone = shapes.build(shapes.TINY, "meta")
    side = shapes.side(shapes.TINY, "meta")
    found = []
    for counter in (meters.Meter(), FlopCounterMode(display=False)):
        with meters.attention_in_one_operator(), counter, torch.no_grad():
            backbone.velocity(side.noisy, side.told, side.text)
        found.append(counter.flops if isinstance(counter, meters.Meter) else counter.get_total_flops())
    assert found[0] == found[1] > 0


# --- the official recipe --------------------------------------------------------------------------------------------


def test_the_official_emulation_and_the_trainer_agree(parts: dict[str, Any]) -> None:
    """Two models and their own loss, or one model and the trainer's: the same gradient of the same pair."""
    bench, shapes, official = parts["dpo_cost"], parts["wan_shapes"], parts["official"]
    torch.manual_seed(0)
    backbone = shapes.build(shapes.TINY, "cpu", torch.float32)
    reference = official.reference_copy(backbone.transformer)
    parameters = bench.add_adapter(backbone, bench.PAPER)
    for parameter in parameters.values():
        torch.nn.init.normal_(parameter, std=0.05)
    winner, loser = (shapes.side(shapes.TINY, "cpu", seed=seed) for seed in (0, 1))
    backbone.transformer.enable_gradient_checkpointing()
    official.official_gradients(backbone.transformer, reference, winner, loser)
    expected = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    for settings in (replace(bench.PAPER, passes="separate"), bench.LOW_MEMORY):
        for parameter in parameters.values():
            parameter.grad = None
        bench.set_up(backbone, settings, shapes.TINY.latents)
        bench.gradients(backbone, winner, loser, settings, None)
        bench.take_down(backbone)
        for name, value in expected.items():
            assert value.any()
            assert (parameters[name].grad - value).norm() <= 1e-5 * value.norm()


# --- the full shape -------------------------------------------------------------------------------------------------


def test_the_promised_ratios_at_the_full_shape(
    bench: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line of JSON from the program, and its operations by hand.

    Selective checkpointing computes no attention again: for two clips, ``4 d n (n + 512)`` in each block. A kept
    reference saves two forward passes: in each block that attention, four products of n x d x d in self- and two in
    cross-attention, two of 512 x d x d, and two of n x d x 8960; outside the blocks far less than 1 %.
    """
    counted: list[Any] = []
    plain = bench.official_cost
    monkeypatch.setattr(bench, "official_cost", lambda shape: counted.append(plain(shape)) or counted[0])
    bench.main(["--json"])
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert set(found) == {"flops_selective", "flops_cached_reference", "peak_default", "peak_low_memory"}
    assert found["flops_selective"] <= 0.86
    assert found["flops_cached_reference"] <= 0.64
    assert found["peak_default"] <= 0.85
    assert found["peak_low_memory"] <= 0.62

    (official,) = counted
    attention = BLOCKS * 4 * WIDTH * TOKENS * (TOKENS + TEXT)
    assert found["flops_selective"] == pytest.approx(1 - 2 * attention / official.flops, abs=1e-4)
    products = 2 * (6 * TOKENS * WIDTH**2 + 2 * TEXT * WIDTH**2 + 2 * TOKENS * WIDTH * INNER)
    forward = attention + BLOCKS * products
    saved = (found["flops_selective"] - found["flops_cached_reference"]) * official.flops
    assert saved == pytest.approx(2 * forward, rel=5e-3)
    # two graphs of 30 block inputs, the weights twice in bfloat16, and the working set of one block
    inputs, weights = 2 * BLOCKS * TOKENS * WIDTH * 2, 1.419e9 * 2
    assert inputs + 2 * weights < official.peak < inputs + 2 * weights + 5e9


def test_the_table_names_every_recipe(bench: Any) -> None:
    costs = {name: bench.Cost(10, 20) for name in bench.RECIPES}
    text = bench.table(bench.Cost(20, 40), costs)
    assert all(f"| {name} | 0.0 | 0.500 | 0.00 | 0.500 |" in text for name in costs)


def test_the_miniature_trains_faster_than_the_official_recipe(
    miniature_weights: Path, bench: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Measured in one run, in turn; a factor 3 is left for a busy machine."""
    seconds = bench.miniature_seconds(rounds=3, pairs=4)
    lines = bench.seconds_table(seconds)
    assert [len(values) for values in seconds.values()] == [3, 3]
    ratio = sorted(seconds["trainer"])[1] / sorted(seconds["official"])[1]
    assert ratio < 0.5
    assert lines[-1].endswith(f"| {ratio:.3f} |")


# --- the CUDA benchmark, on a CPU -----------------------------------------------------------------------------------


@pytest.fixture
def gpu(parts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(checkpointing, "COMPILE_BACKEND", "aot_eager")
    return parts["dpo_gpu"]


def test_every_stage_runs(gpu: Any, parts: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = gpu.DpoGpu(out=tmp_path, pairs=1, warm_up=1, device="cpu", peak_tflops=1e-6)
    rows = gpu.measure(args, parts["wan_shapes"].TINY, torch.float32)
    assert [row.name for row in rows] == ["official", *gpu.STAGES]
    assert [row.error for row in rows] == [""] * len(rows)
    assert all(row.median > 0 for row in rows)
    text = (tmp_path / "dpo_gpu.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    written = json.loads((tmp_path / "dpo_gpu.json").read_text())
    assert [row["name"] for row in written["rows"]] == [row.name for row in rows]
    mfu = written["needed_tflop_a_pair"] / rows[0].median / 1e-6
    assert f"| 1.00x |  |  | {100 * mfu:.0f} % |" in text


def test_a_stage_that_fails_is_reported_and_the_next_goes_on(
    gpu: Any, parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = gpu.set_up

    def full(backbone: Any, settings: Any, shape: Any) -> None:
        if settings.checkpointing == "selective":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore")
        plain(backbone, settings, shape)

    monkeypatch.setattr(gpu, "set_up", full)
    args = gpu.DpoGpu(
        out=tmp_path, pairs=1, warm_up=0, device="cpu", peak_tflops=1.0, stages="selective ch,one sample at"
    )
    rows = gpu.measure(args, parts["wan_shapes"].TINY, torch.float32)
    assert [row.name for row in rows] == ["official", "+ selective checkpointing", "one sample at a time"]
    assert [row.median is not None for row in rows] == [True, False, True]
    assert rows[1].error == "OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB"
    assert "did not run: OutOfMemoryError" in (tmp_path / "dpo_gpu.md").read_text()


def test_without_a_card_the_program_says_so(gpu: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a CUDA device is needed"):
        gpu.run(gpu.DpoGpu(out=tmp_path))
    with pytest.raises(ConfigError, match="fits none of"):
        gpu.DpoGpu(stages="warp").chosen()
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--out", str(tmp_path)])
    assert stopped.value.code == 2
