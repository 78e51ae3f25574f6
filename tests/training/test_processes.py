"""A training by several processes: the same weights as by one, one writer, and one moment to stop."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spatialalign.errors import ConfigError
from training.checkpoint import latest_checkpoint
from training.config import TrainSettings
from training.dpo import main
from training.processes import Processes, launched
from training.store import Store

SETTINGS = TrainSettings(
    steps=6,
    batch_pairs=2,
    rank=2,
    alpha=4,
    beta=20.0,
    lr=5e-3,
    warmup_steps=2,
    auto_beta=0.3,
    held_out=0.3,
    held_out_pairs=4,
    held_out_every=2,
    checkpoint_every=2,
    checkpointing="none",
    tensorboard=False,
)
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
}

DISK_FULL = """
import errno, os
from pathlib import Path
from training import checkpoint, monitors
from training.dpo import main
from training.processes import launched_rank

FULL = Path({path!r})

def full(write):
    def instead(*args, **kwargs):
        if FULL.parent.joinpath("step-000002").exists() and not FULL.exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*args, **kwargs)
    return instead

if {where!r} == "checkpoint":
    checkpoint.save_file = full(checkpoint.save_file)
elif launched_rank() == 0:
    monitors.JsonlLog.write = full(monitors.JsonlLog.write)
main()
"""
"""From the checkpoint of step 2 on, the first process can write no other, or no log."""


def options(model: Path, store: Store, out: Path, settings: TrainSettings = SETTINGS) -> list[str]:
    argv = ["--model", str(model), "--store", str(store.root), "--out", str(out), "--device", "cpu"]
    for name, value in settings.to_dict().items():
        if value is not None:
            argv += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    return argv


def environment(rank: int | None = None, size: int = 2, port: int = 0) -> dict[str, str]:
    found = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    if rank is not None:
        own = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_PORT": port}
        found |= {name: str(value) for name, value in own.items()} | {"MASTER_ADDR": "127.0.0.1"}
    return found


def start(argv: list[list[str]]) -> list[subprocess.Popen[str]]:
    """One process for each list of arguments, told about each other as a launcher would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=environment(rank, len(argv), port),
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, arguments in enumerate(argv)
    ]


def end(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit status and what was said, by process."""
    try:
        found = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, out + errors) for process, (out, errors) in zip(processes, found, strict=True)]


def alone(model: Path, store: Store, out: Path, settings: TrainSettings = SETTINGS) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        main(options(model, store, out, settings))
    finally:
        torch.set_num_threads(threads)


def state(out: Path, step: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / f"checkpoints/step-{step:06d}/state.json").read_text())
    return found


def log(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def distance(one: Path, other: Path, step: int) -> float:
    """Largest difference of any LoRA weight between two runs' checkpoints of a step."""
    a, b = (load_file(out / f"checkpoints/step-{step:06d}/lora.safetensors") for out in (one, other))
    assert a.keys() == b.keys()
    assert all(value.any() for value in a.values())
    return max(float((a[key] - b[key]).abs().max()) for key in a)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_equal_one_with_accumulation_two(
    tiny_wan: Path, paired_store: Store, tmp_path: Path, launcher: str
) -> None:
    """Two pairs a step, one in memory: one process takes them in turn, two take one each.

    Options in a file, as torchrun takes some after the module's name for its own, --monitor for one.
    """
    alone(tiny_wan, paired_store, tmp_path / "one")
    argv = [sys.executable, "-m", *LAUNCHERS[launcher], "-m", "training.dpo"]
    folders = {"model": tiny_wan, "store": paired_store.root, "out": tmp_path / "two"}
    named = {name: str(folder) for name, folder in folders.items()} | {"device": "cpu"}
    (tmp_path / "run.yaml").write_text(json.dumps(named | SETTINGS.to_dict()))
    argv += ["--config", str(tmp_path / "run.yaml")]
    found = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("(ComfyUI)") == 1
    assert distance(tmp_path / "one", tmp_path / "two", 6) < 1e-6
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    assert [row["event"] for row in one] == [row["event"] for row in two]
    for a, b in zip(one, two, strict=True):
        del a["event"], b["event"]
        assert a == pytest.approx(b, rel=1e-3, abs=1e-6)
    assert state(tmp_path / "two", 6)["progress"]["processes"] == 2
    tuners = [state(tmp_path / name, 6)["progress"]["tuner"]["average"] for name in ("one", "two")]
    assert tuners[0] == pytest.approx(tuners[1], rel=1e-4)


def test_a_signal_to_one_stops_all_and_one_process_continues(
    tiny_wan: Path, paired_store: Store, tmp_path: Path
) -> None:
    """SIGTERM to the second process only, then the rest by one process: still the weights of one process throughout."""
    long, out = replace(SETTINGS, steps=60, warmup_steps=30, checkpoint_every=1000), tmp_path / "out"
    running = start([["-m", "training.dpo", *options(tiny_wan, paired_store, out, long)]] * 2)
    deadline = time.monotonic() + 120
    while not (out / "train.jsonl").is_file() or len((out / "train.jsonl").read_text().splitlines()) < 4:
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in running), end(running)
        time.sleep(0.01)
    running[1].send_signal(signal.SIGTERM)
    found = end(running)
    assert [code for code, _ in found] == [0, 0], found
    assert "stopped after step" in found[0][1]
    assert "stopped after step" not in found[1][1]
    stopped = latest_checkpoint(out / "checkpoints")
    assert stopped is not None
    assert 0 < stopped.step < 60
    assert not (out / ".lock").exists()

    program = [sys.executable, "-m", "training.dpo", *options(tiny_wan, paired_store, out, long)]
    resumed = subprocess.run(program, env=environment(), capture_output=True, text=True, timeout=240)
    assert resumed.returncode == 0, resumed.stderr
    assert "processes: 2 -> 1" in resumed.stderr
    alone(tiny_wan, paired_store, tmp_path / "straight", long)
    assert distance(out, tmp_path / "straight", 60) < 1e-6


def test_a_bad_clip_of_one_counts_for_all(tiny_wan: Path, paired_store: Store, tmp_path: Path) -> None:
    """Six pairs a step over two processes; the mean is over the pairs that are left."""
    sample = paired_store.sample("0001_LR", 1)
    sample.write_latents(sample.read_latents() * float("nan"), sample.read_header())
    settings = replace(SETTINGS, steps=3, warmup_steps=1, batch_pairs=6, held_out=0.0, auto_beta=None)
    program = ["-m", "training.dpo"]
    found = end(start([[*program, *options(tiny_wan, paired_store, tmp_path / "two", settings)]] * 2))
    assert [code for code, _ in found] == [0, 0], found
    alone(tiny_wan, paired_store, tmp_path / "one", settings)
    bad = [[row for row in log(tmp_path / name) if row["event"] == "bad_clip"] for name in ("one", "two")]
    assert [row["clip"] for row in bad[1]] == ["0001_LR/1"]
    assert bad[0] == bad[1]
    skipped = [[row["skipped_pairs"] for row in log(tmp_path / n) if row["event"] == "train"] for n in ("one", "two")]
    assert skipped[0] == skipped[1]
    assert sum(skipped[0]) > 0
    assert distance(tmp_path / "one", tmp_path / "two", 3) < 1e-6

    found = end(
        start([[*program, *options(tiny_wan, paired_store, tmp_path / "none", replace(settings, max_bad_clips=0))]] * 2)
    )
    assert [code for code, _ in found] == [2, 2], found
    assert all("0001_LR/1" in said for _, said in found)


@pytest.mark.parametrize(
    ("where", "others"), [("checkpoint", "process 0 of 2: the checkpoint"), ("log", "process 1 of 2 lost another one")]
)
def test_a_full_disk_ends_all_with_one_error(
    tiny_wan: Path, paired_store: Store, tmp_path: Path, where: str, others: str
) -> None:
    out = tmp_path / "out"
    path = out / "checkpoints/step-000004"
    script = DISK_FULL.format(path=str(path), where=where)
    found = end(start([["-c", script, *options(tiny_wan, paired_store, out)]] * 2))
    assert [code for code, _ in found] == [2, 2], found
    for _, said in found:
        assert "Traceback" not in said
        assert "run the same command again to continue" in said
    assert "No space left on device" in found[0][1]
    assert str(path if where == "checkpoint" else out) in found[0][1]
    assert others in found[1][1]
    assert [folder.name for folder in (out / "checkpoints").iterdir()] == ["step-000002"]
    kept = latest_checkpoint(out / "checkpoints")
    assert kept is not None and kept.step == 2
    assert not (out / ".lock").exists()


def test_different_options_are_named(tiny_wan: Path, paired_store: Store, tmp_path: Path) -> None:
    argv = [options(tiny_wan, paired_store, tmp_path / "out", replace(SETTINGS, lr=lr)) for lr in (1e-3, 2e-3)]
    found = end(start([["-m", "training.dpo", *arguments] for arguments in argv]))
    assert [code for code, _ in found] == [2, 2]
    assert "lr is 0.002 in process 1 and 0.001 in process 0" in found[0][1]


def test_more_processes_than_micro_batches(tiny_wan: Path, paired_store: Store, tmp_path: Path) -> None:
    argv = options(tiny_wan, paired_store, tmp_path / "out", replace(SETTINGS, micro_pairs=2))
    found = end(start([["-m", "training.dpo", *argv]] * 2))
    assert [code for code, _ in found] == [2, 2]
    assert "start at most 1, or lower micro_pairs" in found[0][1]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_cover_everything_once(size: int) -> None:
    shares = [Processes(rank, size).share(range(0, 12, 2)) for rank in range(size)]
    assert sorted(item for share in shares for item in share) == list(range(0, 12, 2))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_an_environment_of_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match="RANK.*torchrun"), launched():
        pass
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match="WORLD_SIZE must be a number"), launched():
        pass


def test_every_process_has_its_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert Processes().device("cuda:1") == "cuda:1"
    assert Processes(5, 8, 1).device("auto") == "cuda:1"
    assert Processes(5, 8, 1).device("cpu") == "cpu"
    with pytest.raises(ConfigError, match="one card"):
        Processes(1, 2, 1).device("cuda:0")
    with pytest.raises(ConfigError, match="2 cards"):
        Processes(2, 4, 2).device("cuda")
