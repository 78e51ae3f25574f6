"""Two processes on one store: each clip is made and scored once, and what a killed one had begun is finished."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from training.store import Sample, Store

SCORE = """
import sys, time
from pathlib import Path
from tests.training.test_score import TrueTracker
from training.score import score
from training.store import Store

class Slow(TrueTracker):
    def track(self, frames, subject, object, fps):
        time.sleep(float(sys.argv[2]))
        return super().track(frames, subject, object, fps)

print(score(Store(sys.argv[1]), Slow()).text())
"""


def start(argv: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *argv], env=environment, text=True, stderr=subprocess.PIPE, stdout=-1)


def generate(model: Path, prompts: Path, store: Path, steps: int = 3) -> subprocess.Popen[str]:
    argv = ["-m", "training.generate", "--model", str(model), "--prompts", str(prompts), "--store", str(store)]
    return start([*argv, "--seeds", "0-5", "--batch", "1", "--device", "cpu", "--steps", str(steps)])


def score(store: Path, seconds: float) -> subprocess.Popen[str]:
    return start(["-c", SCORE, str(store), str(seconds)])


def end(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        out, errors = process.communicate(timeout=240)
        assert process.returncode == 0, out + errors


def kill_at_work(process: subprocess.Popen[str], root: Path, stage: str) -> None:
    """SIGKILL while it holds a claim, after the first clip was finished."""
    deadline = time.monotonic() + 120
    while True:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        if made(root, stage):
            os.kill(process.pid, signal.SIGSTOP)
            time.sleep(0.05)  # the signal takes a moment
            if process.pid in owners(root, stage):
                process.kill()
                process.communicate()
                return
            os.kill(process.pid, signal.SIGCONT)
        time.sleep(0.02)


def owners(root: Path, stage: str) -> list[int]:
    """Processes that hold a claim."""
    found = []
    for claim in root.glob(f"*/*/.claim-{stage}"):
        try:
            found.append(int(json.loads(claim.read_text())["pid"]))
        except (OSError, ValueError):  # released or not yet written
            continue
    return found


def made(root: Path, stage: str) -> Counter[str]:
    """How often each clip was finished, by the log that the processes share."""
    log = root / "logs" / f"{stage}.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    return Counter(row["sample"] for row in rows if row["event"] == "sample")


def samples(root: Path) -> list[Sample]:
    return Store(root).samples()


def test_two_generators_share_the_work(tiny_wan: Path, prompt_file: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    end(*[generate(tiny_wan, prompt_file, store, steps=20) for _ in range(2)])
    assert len(samples(store)) == 18
    assert all(sample.generated for sample in samples(store))
    assert made(store, "generate") == Counter({sample.name: 1 for sample in samples(store)})
    ends = [json.loads(line) for line in (store / "logs/generate.jsonl").read_text().splitlines() if '"end"' in line]
    assert sum(row["done"] for row in ends) == 18
    assert not list(store.rglob(".claim-*"))


@pytest.mark.parametrize("stage", ["generate", "score"])
def test_the_work_of_a_killed_process_is_taken_over(
    tiny_wan: Path, prompt_file: Path, tmp_path: Path, stage: str
) -> None:
    store = tmp_path / "store"
    if stage == "score":
        end(generate(tiny_wan, prompt_file, store))
        killed, other = score(store, 0.3), score(store, 0.3)
    else:
        killed, other = (generate(tiny_wan, prompt_file, store, steps=20) for _ in range(2))
    kill_at_work(killed, store, stage)
    end(other)
    end(score(store, 0.0) if stage == "score" else generate(tiny_wan, prompt_file, store, steps=20))
    done = samples(store)
    assert len(done) == 18
    assert all(sample.scored if stage == "score" else sample.generated for sample in done)
    # A clip may have been finished at the moment of the kill and not have reached the log any more.
    assert set(made(store, stage).values()) == {1}
    assert len(made(store, stage)) >= 17
    assert not list(store.rglob(".claim-*"))
