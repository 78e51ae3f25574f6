"""What the nodes say in words is drawn on them: the interface leaves the texts among their results out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest


def test_scores_are_shown_on_their_nodes(nodes: dict[str, Any], run: Callable[..., Any], fake_host: Any) -> None:
    import torch

    dsr = run(nodes["SpatialAlignPrompt"])[2]
    masks = torch.zeros(2, 9, 64, 64)
    masks[1, :, 30:50, 28:40] = 1
    for frame, x in enumerate(np.linspace(2, 50, 9).round().astype(int)):
        masks[0, frame, 30:50, x : x + 12] = 1
    tracks = run(nodes["SpatialAlignTracksFromMasks"], subject_mask=masks[0], object_mask=masks[1], dsr=dsr)[0]
    scored = run(nodes["SpatialAlignScore"], hidden={"unique_id": "7"}, tracks=tracks, dsr=dsr)
    summed = run(nodes["SpatialAlignScoreSummary"], hidden={"unique_id": "8"}, results=[scored[6]])
    assert fake_host.shown == {"7": scored.ui["text"][0], "8": summed.ui["text"][0]}
    assert "passes 0.7" in fake_host.shown["7"] and "100.0% of 1 clip" in fake_host.shown["8"]


def test_text_goes_to_the_server_where_there_is_one(
    module: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    show, sent = module("host").show_text, []
    monkeypatch.delitem(sys.modules, "server", raising=False)
    show("said", "3")
    server = SimpleNamespace(PromptServer=type("PromptServer", (), {}))
    monkeypatch.setitem(sys.modules, "server", server)
    show("said", "3")
    server.PromptServer.instance = SimpleNamespace(send_progress_text=lambda *what: sent.append(what))
    show("said", "3")
    assert sent == [("said", "3")]
