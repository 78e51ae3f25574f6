"""The house: what the packaging files promise is what the tree holds."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:  # the standard library has it from 3.11 on; pytest brings tomli before that
    import tomli as tomllib

# What ComfyUI brings and therefore alone may choose; a pack that lists one of these can break its user's installation.
OWNED_BY_COMFYUI = {
    *("torch", "torchvision", "torchaudio", "torchsde", "numpy", "scipy", "transformers", "tokenizers", "safetensors"),
    *("pillow", "opencv-python", "opencv-python-headless", "opencv-contrib-python", "av", "tqdm", "einops", "kornia"),
    *("aiohttp", "pyyaml", "psutil", "sentencepiece", "huggingface-hub", "pydantic"),
}
SKIPPED_FOLDERS = {".git", ".venv", "venv", "demo", "build", "dist", "__pycache__", "store", "runs", "out"}
LOCK_FILES = {"poetry.lock", "uv.lock", "pdm.lock", "Pipfile.lock", "pylock.toml", "conda-lock.yml"}
REGISTRIES = r"--(extra-)?index-url|--find-links|pypi\.org/simple|download\.pytorch\.org|files\.pythonhosted\.org"
MIB = 1 << 20


def tree(root: Path) -> list[Path]:
    """The files of the project: what git would track, or all but environments and outputs where git is absent."""
    listing = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"], capture_output=True
    )
    if listing.returncode == 0 and listing.stdout:
        names = listing.stdout.decode().split("\0")
        return [root / name for name in names if name and (root / name).is_file()]
    return [
        path
        for path in root.rglob("*")
        if path.is_file() and not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
    ]


def requirement_name(line: str) -> str:
    """The normalised distribution name of one requirement line."""
    match = re.match(r"[A-Za-z0-9._-]+", line.strip())
    assert match, f"not a requirement: {line!r}"
    return re.sub(r"[-_.]+", "-", match.group()).lower()


@pytest.fixture(scope="module")
def project(repo_root: Path) -> dict:  # type: ignore[type-arg]
    """The parsed pyproject.toml."""
    return tomllib.loads((repo_root / "pyproject.toml").read_text(encoding="utf-8"))


def test_comfyui_keeps_what_it_owns(repo_root: Path) -> None:
    lines = (repo_root / "requirements.txt").read_text(encoding="utf-8").splitlines()
    named = {requirement_name(line) for line in lines if line.strip() and not line.lstrip().startswith("#")}
    assert not named & OWNED_BY_COMFYUI
    # The manager installs line by line, so options such as -r or --index-url do not do what they seem to.
    assert not [line for line in lines if line.lstrip().startswith("-")]


def test_the_core_needs_numpy_alone(project: dict) -> None:  # type: ignore[type-arg]
    assert {requirement_name(line) for line in project["project"]["dependencies"]} == {"numpy"}
    assert set(project["project"]["optional-dependencies"]) == {"train", "original", "metrics", "test"}


def test_publishing_completes_the_metadata(repo_root: Path, tmp_path: Path) -> None:
    """The release workflow adds what the registry asks for; its step is run here on a copy."""
    import yaml

    workflow = yaml.safe_load((repo_root / ".github" / "workflows" / "publish.yml").read_text(encoding="utf-8"))
    steps = workflow["jobs"]["publish"]["steps"]
    (script,) = [step["run"] for step in steps if "PUBLISHER" in step.get("env", {})]
    (tmp_path / "pyproject.toml").write_bytes((repo_root / "pyproject.toml").read_bytes())
    given = {"PUBLISHER": "someone", "HOME_PAGE": "https://a.b/c", "ICON": "https://a.b/icon.svg"}
    subprocess.run(["bash", "-ec", script], cwd=tmp_path, env=os.environ | given, check=True)
    completed = tomllib.loads((tmp_path / "pyproject.toml").read_text(encoding="utf-8"))
    assert completed["project"]["urls"]["Repository"] == "https://a.b/c"
    told = completed["tool"]["comfy"]
    assert (told["PublisherId"], told["Icon"]) == ("someone", "https://a.b/icon.svg")
    assert told["DisplayName"] and told["requires-comfyui"].startswith(">=")
    # Named here and in __init__.py, the web folder would be served twice.
    assert "web" not in told
    assert (repo_root / "web" / "icon.svg").is_file()


def test_version_is_one(project: dict) -> None:  # type: ignore[type-arg]
    import spatialalign

    assert project["project"]["version"] == spatialalign.__version__


def test_constraints_are_exact_and_cover_the_extras(repo_root: Path, project: dict) -> None:  # type: ignore[type-arg]
    lines = (repo_root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.split(";")[0].strip() for line in lines if line.strip() and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", pin) for pin in pins), pins
    pinned = {requirement_name(pin) for pin in pins}
    extras = project["project"]["optional-dependencies"].values()
    wanted = {requirement_name(line) for lines in extras for line in lines}
    assert wanted <= pinned, f"not in constraints.txt: {sorted(wanted - pinned)}"
    assert {"torch", "torchvision", "numpy"} <= pinned


def test_no_lock_file_and_no_registry_address(repo_root: Path) -> None:
    files = tree(repo_root)
    assert not [path for path in files if path.name in LOCK_FILES]
    address = re.compile(REGISTRIES)
    texts = {".txt", ".toml", ".cfg", ".ini", ".yaml", ".yml", ".md", ".sh", ""}
    found = []
    for path in files:
        if path.suffix in texts and path.stat().st_size < MIB:
            if address.search(path.read_text(encoding="utf-8", errors="ignore")):
                found.append(str(path.relative_to(repo_root)))
    assert not found


def test_no_file_is_large(repo_root: Path) -> None:
    large = {str(path.relative_to(repo_root)): path.stat().st_size for path in tree(repo_root)}
    assert not {name: size for name, size in large.items() if size > 16 * MIB}


def test_the_miniature_is_shipped_and_small(repo_root: Path) -> None:
    weights = repo_root / "spatialalign" / "miniature" / "weights"
    for part in ("wan/model_index.json", "detector/config.json", "segmenter/config.json"):
        assert (weights / part).is_file(), f"{weights / part} is missing: build it with python -m training.miniature"
    assert sum(path.stat().st_size for path in weights.rglob("*") if path.is_file()) <= 40 * MIB


def test_readme_commands_exist(repo_root: Path) -> None:
    readme = (repo_root / "README.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", (repo_root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"demo", "test", "lint", "bench"} <= targets
    assert set(re.findall(r"(?:`|^ {4})make ([a-z]+)\b", readme, re.MULTILINE)) <= targets
    programs = set(re.findall(r"python -m training\.([a-z_]+)", readme))
    assert {"generate", "score", "mine", "dpo", "evaluate", "report", "demo"} <= programs
    for program in programs:
        home = repo_root / "training" / program
        assert home.with_suffix(".py").is_file() or (home / "__main__.py").is_file(), f"README names {program}"


def test_readme_examples_parse(repo_root: Path) -> None:
    """Every example command of a program names options that exist, with values of their type."""
    from importlib import import_module

    from training.cli import parse

    readme = (repo_root / "README.md").read_text(encoding="utf-8")
    examples = re.findall(r"^ {4}python -m training\.([a-z]+) (--.*)$", readme, re.MULTILINE)
    assert len(examples) >= 7
    for program, options in examples:
        arguments = getattr(import_module(f"training.{program}"), program.capitalize())
        assert isinstance(parse(arguments, options.split()), arguments)


def test_documents_link_to_files_that_exist(repo_root: Path) -> None:
    missing = []
    for page in [*repo_root.glob("*.md"), *repo_root.glob("docs/**/*.md"), *repo_root.glob("benchmarks/*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                missing.append(f"{page.relative_to(repo_root)} -> {target}")
    assert not missing


def test_package_data_reach_a_wheel(repo_root: Path, project: dict) -> None:  # type: ignore[type-arg]
    """Everything beside the code that the packages read is matched by a package-data pattern."""
    data = project["tool"]["setuptools"]["package-data"]
    for package in ("spatialalign", "training"):
        folder = repo_root / package
        matched = {path for pattern in data[package] for path in folder.glob(pattern)}
        others = {
            path
            for path in folder.rglob("*")
            if path.is_file() and path.suffix not in {".py", ".pyc"} and not path.name.startswith(".")
        }
        assert others <= matched, f"not packaged: {sorted(str(p) for p in others - matched)}"


def test_continuous_integration_runs_the_readme_command(repo_root: Path) -> None:
    run = repo_root / ".ci" / "run"
    assert run.stat().st_mode & 0o111, f"{run} is not executable"
    assert re.search(r"^make .*\btest\b", run.read_text(encoding="utf-8"), re.MULTILINE)
    assert "make test" in (repo_root / "README.md").read_text(encoding="utf-8")


def test_nothing_is_pickled_or_unfinished(repo_root: Path) -> None:
    """Nothing is pickled, no module left open, and every torch.load says weights_only=True."""
    found = []
    for path in [p for folder in ("spatialalign", "training", "nodes") for p in (repo_root / folder).rglob("*.py")]:
        name = path.relative_to(repo_root)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import) and {alias.name for alias in node.names} & {"dill", "cloudpickle"}:
                found.append(f"{name}:{node.lineno} imports a pickler")
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle" and "Error" not in node.attr:
                found.append(f"{name}:{node.lineno} uses pickle.{node.attr}")
            if isinstance(node, ast.Name) and node.id == "NotImplementedError":
                found.append(f"{name}:{node.lineno} is not implemented")
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                safe = [k for k in node.keywords if k.arg == "weights_only" and ast.unparse(k.value) == "True"]
                if not safe:
                    found.append(f"{name}:{node.lineno} loads without weights_only=True")
    assert not found
