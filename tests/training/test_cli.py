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
from training.config import TrainSettings
from training.dpo import Dpo
from training.dpo import main as dpo
from training.presets import PRESETS


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


REQUIRED = ["--model", "m", "--store", "s", "--out", "o"]


def test_dpo_options_cover_every_setting_and_default_to_the_preset() -> None:
    assert parse(Dpo, REQUIRED).settings() == PRESETS["spatialalign"]
    for name in PRESETS:
        assert parse(Dpo, [*REQUIRED, "--preset", name]).settings() == PRESETS[name]
    every = PRESETS["miniature"].to_dict()
    argv = [word for name, value in every.items() for word in (f"--{name}", str(value).lower())]
    argv = [
        "null" if word == "none" and argv[at - 1] in ("--clip", "--auto_beta") else word for at, word in enumerate(argv)
    ]
    assert parse(Dpo, [*REQUIRED, *argv]).settings() == PRESETS["miniature"]
    changed = parse(Dpo, [*REQUIRED, "--preset", "miniature", "--lr", "1e-3", "--steps", "50"]).settings()
    assert (changed.lr, changed.steps, changed.beta) == (1e-3, 50, PRESETS["miniature"].beta)


def test_null_is_a_value_where_a_setting_takes_it(tmp_path: Path) -> None:
    assert parse(Dpo, [*REQUIRED, "--clip", "null"]).settings().clip is None
    file = tmp_path / "a.yaml"
    file.write_text("clip: null\nbeta: 3\n")
    settings = parse(Dpo, [*REQUIRED, "--config", str(file)]).settings()
    assert (settings.clip, settings.beta) == (None, 3)
    with pytest.raises(SystemExit):
        parse(Dpo, [*REQUIRED, "--beta", "null"])


def test_help_of_dpo_explains_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(Dpo, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in fields(TrainSettings):
        assert f"--{field.name} " in text
    assert "Largest weight of a clip in rwr." in text


def test_a_misspelt_key_in_the_file_suggests_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("btea: 2\nlr: 1e-4\nwarmup: 3\n")
    with pytest.raises(SystemExit) as stopped:
        parse(Dpo, [*REQUIRED, "--config", str(file)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert f"{file}: there is no option 'btea'; the nearest is 'beta'" in error
    assert "there is no option 'warmup'; the nearest is 'warmup_steps'" in error
    assert "'lr'" not in error


def test_a_misspelt_option_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, expected in (
        (["--batch-pairs", "4"], "there is no option 'batch-pairs'; the nearest is 'batch_pairs'"),
        (["--xyzzy=4"], "there is no option 'xyzzy'\n"),
    ):
        with pytest.raises(SystemExit) as stopped:
            parse(Dpo, [*REQUIRED, *argv])
        assert stopped.value.code == 2
        assert expected in capsys.readouterr().err


def test_contradictions_end_the_program_with_both_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        dpo([*REQUIRED, "--form", "ipo"])
    assert stopped.value.code == 2
    assert "form (ipo) together with clip (5.0)" in capsys.readouterr().err


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
