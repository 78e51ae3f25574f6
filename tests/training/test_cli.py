"""The command line made from a dataclass, and that no program's --help loads a heavy library."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import pytest

from spatialalign.errors import DataError
from training.cli import command, parse
from training.config import PRESETS, TrainSettings
from training.dpo import Dpo


@dataclass(frozen=True)
class Arguments:
    """Do a thing."""

    name: str
    """What to call it."""
    count: int = 3
    """How many."""
    path: Path | None = None
    """Where."""
    kind: Literal["a", "b"] = "a"
    """Which."""


def test_options_come_from_the_fields() -> None:
    assert parse(Arguments, ["--name", "x"]) == Arguments("x")
    assert parse(Arguments, ["--name=x", "--count", "7", "--path", "y", "--kind", "b"]) == Arguments(
        "x", 7, Path("y"), "b"
    )


def test_a_yaml_file_sets_them_and_later_options_win(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("name: from file\ncount: 5\n")
    assert parse(Arguments, ["--config", str(file), "--count", "6"]) == Arguments("from file", 6)


@pytest.mark.parametrize("argv", [[], ["--name", "x", "--count", "many"], ["--name", "x", "--kind", "c"], ["--odd"]])
def test_wrong_options_exit_with_two(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(Arguments, argv)
    assert stopped.value.code == 2
    assert "error" in capsys.readouterr().err


def test_help_shows_the_docstrings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(Arguments, ["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "Do a thing." in text
    assert "How many." in text


def test_our_errors_end_with_two_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def run(_: Arguments) -> None:
        raise DataError("the thing is missing")

    with pytest.raises(SystemExit) as stopped:
        command(Arguments, run, ["--name", "x"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith("error: the thing is missing\n")


def test_dpo_options_cover_every_setting_and_default_to_the_preset() -> None:
    options = {field.name for field in fields(Dpo)}
    assert {field.name for field in fields(TrainSettings)} <= options
    required = ["--model", "m", "--store", "s", "--out", "o"]
    assert parse(Dpo, required).settings() == PRESETS["paper"]
    changed = parse(Dpo, [*required, "--preset", "miniature", "--lr", "1e-3", "--steps", "50"]).settings()
    assert (changed.lr, changed.steps, changed.beta) == (1e-3, 50, PRESETS["miniature"].beta)


VERBS = sorted(
    path.stem
    for path in (Path(__file__).parents[2] / "training").glob("*.py")
    if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
)


def test_the_programs_are_there() -> None:
    assert {"prompts", "generate", "score", "mine", "dpo"} <= set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_loads_nothing_heavy(verb: str, repo_root: Path) -> None:
    """In a process of its own; what was imported is listed by the interpreter."""
    heavy = ("torch", "transformers", "diffusers", "peft", "matplotlib", "av", "accelerate", "safetensors.torch")
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", f"training.{verb}", "--help"],
        capture_output=True,
        text=True,
        cwd=repo_root,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"training.{verb}" in done.stdout
    loaded = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert not {name for name in loaded if name.split(".")[0] in heavy or name in heavy}
