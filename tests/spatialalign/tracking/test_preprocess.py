"""Sizes and pixels that go into the models, against the library's rules."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spatialalign.errors import ModelError
from spatialalign.tracking.preprocess import Preprocess

SIDES = st.integers(8, 2000)


@given(SIDES, SIDES, st.integers(32, 900), st.integers(0, 600))
def test_detector_sizes_equal_the_librarys(height: int, width: int, short: int, more: int) -> None:
    from transformers.image_transforms import get_size_with_aspect_ratio

    ours = Preprocess({"shortest_edge": short, "longest_edge": short + more}).target(height, width)
    assert ours == tuple(get_size_with_aspect_ratio((height, width), short, short + more))


@pytest.mark.parametrize(
    ("size", "frame", "expected"),
    [
        ({"shortest_edge": 800, "longest_edge": 1333}, (480, 832), (769, 1333)),
        ({"longest_edge": 1024}, (480, 832), (591, 1024)),
        ({"height": 1024, "width": 1024}, (480, 832), (1024, 1024)),
        ({"shortest_edge": 64, "longest_edge": 64}, (64, 64), (64, 64)),
    ],
)
def test_sizes_of_known_models(size: dict[str, int], frame: tuple[int, int], expected: tuple[int, int]) -> None:
    assert Preprocess(size).target(*frame) == expected


def test_pixels_at_their_own_size_are_only_normalised() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 6, 8, 3), dtype=np.uint8)
    made = Preprocess({"longest_edge": 8}, mean=(0.5,) * 3, std=(0.25,) * 3, pad=(8, 8))
    x = made(frames, torch.device("cpu"), torch.float32).numpy()
    assert x.shape == (2, 3, 8, 8) and (x[:, :, 6:] == 0).all()
    np.testing.assert_allclose(x[:, :, :6], (frames.transpose(0, 3, 1, 2) / 255 - 0.5) / 0.25, atol=1e-6)


def test_enlarging_is_antialiased_bilinear_in_whole_grey_levels() -> None:
    frames = np.zeros((1, 1, 2, 3), dtype=np.uint8)
    frames[0, 0, 1] = 100
    made = Preprocess({"height": 1, "width": 4}, mean=(0.0,) * 3, std=(1.0,) * 3)
    x = made(frames, torch.device("cpu"), torch.float32)[0, 0, 0] * 255
    # Centres of the four pixels lie at -0.25, 0.25, 0.75 and 1.25 of the old ones.
    torch.testing.assert_close(x, torch.tensor([0.0, 25, 75, 100]))


def test_configuration_files(tmp_path: Path) -> None:
    old = {
        "size": {"longest_edge": 64},
        "pad_size": {"height": 64, "width": 64},
        "image_mean": [0.5] * 3,
        "resample": 3,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    assert Preprocess.from_pretrained(tmp_path) == Preprocess(
        {"longest_edge": 64}, (0.5,) * 3, pad=(64, 64), resample=3
    )
    with pytest.raises(ModelError, match="no preprocessor_config.json or processor_config.json"):
        Preprocess.from_pretrained(tmp_path / "none")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "has no 'size'"),
        ({"size": {"shortest_edge": 224}}, "expected shortest_edge with longest_edge"),
        ({"size": {"longest_edge": 64}, "resample": 0}, "expected 2 .bilinear. or 3"),
    ],
)
def test_files_of_other_models_are_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Preprocess.from_config(config)
