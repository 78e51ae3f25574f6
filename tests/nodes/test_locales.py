"""The translations, as the interface reads them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def texts(value: Any) -> Iterator[str]:
    """Every text in a file of translations."""
    if isinstance(value, str):
        yield value
    else:
        for part in value.values():
            yield from texts(part)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_text_is_taken_for_a_formula(repo_root: Path, language: str) -> None:
    """The interface reads translations as messages in which ``@ { } |`` have a meaning of their own.

    With one of them in a node's description ComfyUI 0.8.0's interface registers no node at all, of any pack.
    """
    file = repo_root / "locales" / language / "nodeDefs.json"
    found = list(texts(json.loads(file.read_text(encoding="utf-8"))))
    assert len(found) > 200
    assert not [text for text in found if set("@{}|") & set(text)]


def test_chinese_is_chinese(repo_root: Path) -> None:
    """No description or tooltip was left in English."""
    words = json.loads((repo_root / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
    for one, node in words.items():
        entries = [*node.get("inputs", {}).values(), *node["outputs"].values()]
        for text in (node["display_name"], node["description"], *(entry["tooltip"] for entry in entries)):
            assert any("\u4e00" <= letter <= "\u9fff" for letter in text) or text == "DSR", f"{one}: {text}"


def test_every_help_page_is_there_in_chinese(repo_root: Path) -> None:
    """The interface asks for ``docs/<node>/zh.md`` first, and takes the paths of its pictures from ``docs``."""
    pages = repo_root / "web" / "docs"
    words = json.loads((repo_root / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert {path.parent.name for path in pages.glob("*/zh.md")} == set(words)
    for one, node in words.items():
        page = (pages / one / "zh.md").read_text(encoding="utf-8")
        tips = [entry["tooltip"] for entry in (*node.get("inputs", {}).values(), *node["outputs"].values())]
        assert not [tip for tip in tips if tip not in page], f"{one}/zh.md is older than the translated tooltips"
        pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", page)
        assert pictures and all((pages / picture).is_file() for picture in pictures), f"{one}/zh.md shows {pictures}"
