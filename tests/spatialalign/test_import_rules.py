"""The import rules of the house, read from the syntax trees, and what importing really loads, in fresh processes."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import spatialalign

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("spatialalign", "training", "nodes")
HEAVY = {"torch", "transformers", "diffusers", "peft", "matplotlib", "av", "accelerate"}
VERBS = (
    *("prompts", "generate", "score", "mine", "dpo", "evaluate", "report", "demo", "miniature"),
    *("lora", "rounds", "import_official", "sample", "latent_reward", "label"),
    *("metrics", "reward_bench", "reward_model", "patch_reward", "patch_scores"),
)
HOST = ("comfy", "folder_paths", "execution", "server", "node_helpers", "latent_preview")
SKIPPED = {"venv", ".venv", "build", "dist", "store", "runs", "out", "__pycache__", "node_modules"}


def sources(*folders: str) -> list[Path]:
    """The Python files of these folders of the repository; of all of it when none is named."""
    tops = [ROOT / folder for folder in folders] or [ROOT]
    files = [path for top in tops for path in top.rglob("*.py")]
    return [
        path
        for path in files
        if not any(part in SKIPPED or part.startswith(".") for part in path.relative_to(ROOT).parts)
    ]


def module_name(path: Path) -> tuple[str, bool]:
    """``spatialalign/tracking/__init__.py`` -> (``spatialalign.tracking``, True)."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    package = parts[-1] == "__init__"
    return ".".join(parts[:-1] if package else parts), package


def absolute(node: ast.ImportFrom, module: str, package: bool) -> str:
    """The full name a ``from`` import means inside ``module``; ``..`` in front when it leaves the top package."""
    if node.level == 0:
        return node.module or ""
    base = module.split(".")
    keep = len(base) - node.level + (1 if package else 0)
    if keep < 1:
        return ".." + (node.module or "")
    return ".".join([*base[:keep], *([node.module] if node.module else [])])


def imported(tree: ast.AST, module: str, package: bool) -> Iterator[tuple[int, str, bool]]:
    """(line, full name, relative) of every import below ``tree``, ``import_module("...")`` included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            target = absolute(node, module, package)
            yield node.lineno, target, node.level > 0
            # ``from . import x`` and ``from training import dpo`` may name modules, too.
            yield from ((node.lineno, f"{target}.{alias.name}", node.level > 0) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                name = node.args[0].value
                dots = len(name) - len(name.lstrip("."))
                meant = ast.ImportFrom(module=name[dots:] or None, names=[], level=dots)
                yield node.lineno, absolute(meant, module, package), dots > 0


def is_of(name: str, *tops: str) -> bool:
    return name.split(".")[0] in tops


def is_host(name: str) -> bool:
    """A module of ComfyUI other than its public ``comfy_api``."""
    top = name.split(".")[0]
    return top in HOST or (top.startswith("comfy") and top != "comfy_api")


def broken_rules(source: str, module: str, package: bool = False) -> list[str]:
    """Every import in ``source``, taken as the text of ``module``, that its room does not allow."""
    room, found = module.split(".")[0], []
    for line, name, relative in imported(ast.parse(source), module, package):
        if room == "spatialalign":
            allowed = (relative and is_of(name, "spatialalign")) or (
                not relative and not is_of(name, *ROOMS, "comfy_api") and not is_host(name)
            )
        elif room == "training":
            allowed = not relative and not is_of(name, "nodes", "comfy_api") and not is_host(name)
        else:
            ours = is_of(name, *ROOMS) or name.startswith("..")
            # The pack's parent has no fixed name: the engine is ``..spatialalign``, the programs are out of bounds.
            allowed = (relative and "training" not in name.split(".")) or (
                not relative and not ours and (not is_host(name) or module == "nodes.host")
            )
        if not allowed:
            found.append(f"{module}:{line} imports {name}")
    return sorted(set(found))


def sys_path_edits(source: str) -> list[int]:
    """Lines that change ``sys.path`` or take hold of it by ``from sys import path``."""

    def is_sys_path(node: ast.AST) -> bool:
        return (
            isinstance(node, ast.Attribute)
            and node.attr == "path"
            and isinstance(node.value, ast.Name)
            and node.value.id == "sys"
        )

    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign | ast.Delete):
            touched = list(node.targets)
        elif isinstance(node, ast.AugAssign):
            touched = [node.target]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr != "index":
            touched = [node.func.value]
        elif isinstance(node, ast.ImportFrom) and node.module == "sys":
            lines += [node.lineno for alias in node.names if alias.name == "path"]
            continue
        else:
            continue
        touched = [target.value if isinstance(target, ast.Subscript) else target for target in touched]
        lines += [node.lineno for target in touched if is_sys_path(target)]
    return lines


def at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The import statements that run when the module is imported: not in functions, not under TYPE_CHECKING."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from at_import(node.orelse)
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.For | ast.While | ast.ClassDef):
            for part in ("body", "orelse", "finalbody"):
                yield from at_import(getattr(node, part, []))
            for handler in getattr(node, "handlers", []):
                yield from at_import(handler.body)


def file_of(module: str) -> Path | None:
    """The file of one of our modules, if there is one of that name."""
    base = ROOT.joinpath(*module.split("."))
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)


def heavy_at_import(start: str) -> list[str]:
    """Heavy libraries that importing module ``start`` loads, by the syntax, followed through our modules."""
    found, seen, waiting = [], set(), [start]
    while waiting:
        name = waiting.pop()
        path = file_of(name)
        if name in seen or path is None or not is_of(name, *ROOMS):
            continue
        seen.add(name)
        module, package = module_name(path)
        # Importing a.b.c imports a and a.b as well.
        waiting += [module.rpartition(".")[0]] if "." in module else []
        for node in at_import(ast.parse(path.read_text(encoding="utf-8")).body):
            for line, target, _ in imported(node, module, package):
                if is_of(target, *HEAVY):
                    found.append(f"{module}:{line} imports {target}")
                waiting.append(target)
    return sorted(set(found))


def verb_module(verb: str) -> str:
    """``training.dpo``, or ``training.miniature.__main__`` where the verb is a package."""
    return f"training.{verb}" if (ROOT / "training" / f"{verb}.py").is_file() else f"training.{verb}.__main__"


# --- the rules on the tree ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_they_may(room: str) -> None:
    files = sources(room)
    broken = [rule for f in files for rule in broken_rules(f.read_text(encoding="utf-8"), *module_name(f))]
    assert broken == []
    # A room must not look empty to this test.
    assert len(files) >= (8 if room == "nodes" else 11)


def test_nobody_edits_sys_path() -> None:
    files = sources()
    assert len(files) > 40
    assert {str(f): lines for f in files if (lines := sys_path_edits(f.read_text(encoding="utf-8")))} == {}


@pytest.mark.parametrize(
    "module", ["spatialalign", *(f"spatialalign.{home}" for home in set(spatialalign._HOMES.values()))]
)
def test_public_names_import_nothing_heavy(module: str) -> None:
    assert file_of(module) is not None
    assert heavy_at_import(module) == []


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_import_nothing_heavy(verb: str) -> None:
    assert file_of(verb_module(verb)) is not None, f"training has no program {verb}"
    assert heavy_at_import(verb_module(verb)) == []


# --- the rules on processes -----------------------------------------------------------------------------------------


def in_fresh_process(code: str) -> dict[str, list[str]]:
    """Run ``code`` in a new interpreter; what it leaves in ``result`` and the top-level modules that were loaded."""
    program = f"import sys, json\nbefore = set(sys.modules)\nresult = []\n{code}\n" + (
        "after = {name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
        "sys.stderr.write('\\n' + json.dumps({'result': result, 'loaded': sorted(after)}))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    answer: dict[str, list[str]] = json.loads(done.stderr.splitlines()[-1])
    return answer | {"stdout": done.stdout.splitlines()}


def test_importing_the_package_loads_numpy_at_most() -> None:
    assert set(in_fresh_process("import spatialalign")["loaded"]) - {"numpy"} == {"spatialalign"}
    names = "import spatialalign\nresult = [getattr(spatialalign, n).__name__ for n in spatialalign.__all__]"
    answer = in_fresh_process(names)
    assert answer["result"] == spatialalign.__all__
    assert set(answer["loaded"]) == {"spatialalign", "numpy"}


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_light(verb: str) -> None:
    answer = in_fresh_process(
        "import runpy\n"
        f"sys.argv = [{verb!r}, '--help']\n"
        "try:\n"
        f"    runpy.run_module('training.{verb}', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end:\n"
        "    result = [end.code or 0]"
    )
    assert answer["result"] == [0]
    assert any("--help" in line for line in answer["stdout"])
    assert set(answer["loaded"]) & HEAVY == set()
    assert "training" in answer["loaded"]


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'DSRR'"):
        spatialalign.DSRR  # noqa: B018
    assert set(spatialalign.__all__) <= set(dir(spatialalign))


# --- the rules themselves: each must be able to fail -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("spatialalign.x", "import training"),
        ("spatialalign.x", "from training.store import Store"),
        ("spatialalign.x", "from spatialalign.dsr import DSR"),
        ("spatialalign.x", "import folder_paths"),
        ("spatialalign.x", "def f():\n    import comfy.utils"),
        ("spatialalign.x", "from comfy_api.latest import io"),
        ("spatialalign.x", "from ..training import store"),
        ("spatialalign.x", "from importlib import import_module\nimport_module('nodes.host')"),
        ("training.x", "from . import store"),
        ("training.x", "import nodes.host"),
        ("training.x", "from comfy import samplers"),
        ("nodes.x", "from spatialalign import DSR"),
        ("nodes.x", "from ..training import store"),
        ("nodes.x", "from .. import training"),
        ("nodes.x", "import comfy.model_management"),
        ("nodes.x", "import folder_paths"),
    ],
)
def test_the_checker_sees_forbidden_imports(module: str, line: str) -> None:
    assert broken_rules(line, module)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("spatialalign.tracking.x", "from ..dsr import DSR"),
        ("spatialalign.x", "import numpy\nfrom importlib import import_module\nimport_module('.dsr', __name__)"),
        ("training.x", "from spatialalign import DSR\nfrom training.store import Store\nimport torch"),
        ("nodes.x", "from comfy_api.latest import io\nfrom ..spatialalign.dsr import DSR\nfrom . import host"),
        ("nodes.host", "import comfy.model_management\nimport folder_paths"),
    ],
)
def test_the_checker_allows_the_rest(module: str, line: str) -> None:
    assert broken_rules(line, module) == []


@pytest.mark.parametrize(
    "line",
    ["sys.path.insert(0, '.')", "sys.path += ['.']", "sys.path[0] = '.'", "sys.path = []", "from sys import path"],
)
def test_the_checker_sees_edits_of_sys_path(line: str) -> None:
    assert sys_path_edits("import sys\n" + line) == [2]
    assert sys_path_edits("import sys\nprint(sys.path)\n") == []


def test_the_checker_follows_imports_but_not_into_functions() -> None:
    guarded = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\ndef f():\n    import torch\n"
    assert [ast.unparse(node) for node in at_import(ast.parse(guarded).body)] == ["from typing import TYPE_CHECKING"]
    hidden = "try:\n    import av\nexcept ImportError:\n    import torch\n"
    assert [ast.unparse(node) for node in at_import(ast.parse(hidden).body)] == ["import av", "import torch"]
    # A module of ours that is heavy by right is seen to be so.
    assert heavy_at_import("training.losses")
