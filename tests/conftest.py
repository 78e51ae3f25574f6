"""Shared by all tests: the processor only, no network, few threads, and the folders that may or may not be there."""

from __future__ import annotations

import os
from pathlib import Path

# Before anything imports torch or transformers.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
from hypothesis import settings

# Two shared cores: a slow moment is no failure, and a failure found once is to be found again.
settings.register_profile("spatialalign", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("spatialalign")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the official prompt sets and real clips that lies beside a checkout; skips where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder} with the official prompts and clips")
    return folder


@pytest.fixture(scope="session")
def miniature_weights() -> Path:
    """The shipped weights of the miniature; skips where they have not been built (python -m training.miniature)."""
    folder = ROOT / "spatialalign" / "miniature" / "weights"
    parts = ("wan/model_index.json", "detector/config.json", "segmenter/config.json")
    missing = [part for part in parts if not (folder / part).is_file()]
    if missing:
        pytest.skip(f"the miniature's weights lack {', '.join(missing)}: build them with python -m training.miniature")
    return folder
