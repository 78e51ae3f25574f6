"""A tracker by name or folder, from plain transformers folders."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    SamConfig,
    SamModel,
    SwinConfig,
)

from spatialalign.errors import ModelError
from spatialalign.tracking.grounding_dino import OFFICIAL, GroundingDinoDetector, Matching
from spatialalign.tracking.load import MINIATURE, load_detector, load_segmenter, load_tracker
from spatialalign.tracking.sam import SamFrameSegmenter
from spatialalign.tracking.tracker import Tracker


@pytest.fixture(scope="module")
def folder(
    tokenizer_folder: Path, write_processor: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    from transformers import AutoTokenizer

    made = tmp_path_factory.mktemp("tracker")
    torch.manual_seed(0)
    detector = GroundingDinoConfig(
        backbone_config=SwinConfig(
            image_size=64, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 2], window_size=4,
            out_features=["stage2", "stage3", "stage4"],
        ),
        text_config=BertConfig(
            vocab_size=1030, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        ),
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=8, num_feature_levels=3,
    )  # fmt: skip
    GroundingDinoForObjectDetection(detector).save_pretrained(made / "detector")
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(made / "detector")
    write_processor(made / "detector", "GroundingDino", {"shortest_edge": 64, "longest_edge": 96})
    segmenter = SamConfig(
        vision_config={
            "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64, "patch_size": 8,
            "window_size": 4, "global_attn_indexes": [0], "output_channels": 32, "num_pos_feats": 16, "mlp_dim": 32,
        },
        prompt_encoder_config={"hidden_size": 32, "image_size": 64, "patch_size": 8, "mask_input_channels": 8},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 32},
    )  # fmt: skip
    SamModel(segmenter).save_pretrained(made / "segmenter")
    write_processor(made / "segmenter", "Sam", {"longest_edge": 64}, pad=64)
    return made


def test_a_folder_of_two(folder: Path, clip: np.ndarray) -> None:
    tracker = load_tracker(folder)
    assert isinstance(tracker, Tracker) and tracker.rule == "robust"
    assert isinstance(tracker.detector, GroundingDinoDetector) and isinstance(tracker.segmenter, SamFrameSegmenter)
    assert tracker.detector.matching == Matching() and not tracker.detector.model.training
    tracks = tracker.track(clip, "cat", "box", 8)
    assert tracks.frames == 5 and tracks.size == (48, 64)
    paper = load_tracker(folder, rule="paper")
    assert isinstance(paper.detector, GroundingDinoDetector) and paper.detector.matching == OFFICIAL


def test_two_names_with_a_plus_and_a_detector_alone(folder: Path) -> None:
    both = load_tracker(f"{folder / 'detector'}+{folder / 'segmenter'}")
    assert isinstance(both.segmenter, SamFrameSegmenter)
    shutil.copytree(folder / "detector", folder.parent / "alone" / "detector", dirs_exist_ok=True)
    assert load_tracker(folder.parent / "alone").segmenter is None


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("detector/config.json", r"detector: the model folder lacks config\.json"),
        ("detector/model.safetensors", r"detector: the model folder lacks model\.safetensors"),
        ("detector/processor_config.json", r"detector: the model folder lacks processor_config\.json"),
        ("segmenter/model.safetensors", r"segmenter: the model folder lacks model\.safetensors"),
        ("segmenter/config.json", r"segmenter: the model folder lacks config\.json"),
    ],
)
def test_a_missing_part_is_named(folder: Path, tmp_path: Path, part: str, message: str) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / part).unlink()
    with pytest.raises(ModelError, match=message):
        load_tracker(tmp_path / "copy")


def test_damaged_weights_are_an_error_with_the_folder_in_it(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    weights = tmp_path / "copy" / "segmenter" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="segmenter: the model cannot be loaded"):
        load_tracker(tmp_path / "copy")


def test_names_that_are_none(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        load_tracker(tmp_path / "nothing")
    with pytest.raises(ModelError, match="expected 'miniature', a folder"):
        load_tracker("+")
    with pytest.raises(ModelError, match="is no segmenter"):
        load_tracker(f"{folder / 'detector'}+{folder / 'detector'}")


def test_the_miniature_loads() -> None:
    if not (MINIATURE / "segmenter" / "model.safetensors").is_file():
        pytest.skip(f"no trained weights in {MINIATURE}; python -m training.miniature builds them")
    tracker = load_tracker("miniature")
    assert isinstance(tracker.detector, GroundingDinoDetector) and isinstance(tracker.segmenter, SamFrameSegmenter)


def test_original_files_are_known_by_their_suffix_and_others_are_refused(tmp_path: Path) -> None:
    for name in ("sam2.1_hiera_large.pt", "dino.safetensors"):
        (tmp_path / name).write_bytes(b"weights")
        with pytest.raises(ModelError, match=rf"{name}: a single file of this kind cannot be read; take the model's"):
            load_detector(tmp_path / name)
        with pytest.raises(ModelError, match=rf"{name}: a single file of this kind cannot be read; take the model's"):
            load_segmenter(tmp_path / name)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ModelError, match=r"other\.pth: not a Grounding DINO checkpoint"):
        load_detector(tmp_path / "other.pth")
    with pytest.raises(ModelError, match=r"other\.pth: not a segment-anything checkpoint"):
        load_segmenter(tmp_path / "other.pth")


def test_a_torchvision_of_another_torch_is_named(tmp_path: Path, miniature_weights: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    broken = "raise RuntimeError('operator torchvision::nms does not exist')"
    (tmp_path / "torchvision" / "__init__.py").write_text(broken)
    program = (
        "from spatialalign.errors import ModelError\n"
        "from spatialalign.tracking.load import load_tracker\n"
        "try:\n"
        "    load_tracker('miniature')\n"
        "except ModelError as error:\n"
        "    print(error)\n"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).resolve().parents[3])])
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    # Some versions of transformers never import it, and then nothing is wrong.
    assert not done.stdout or (
        "does not work with torch" in done.stdout
        and "install the torchvision that belongs to this torch" in done.stdout
    )
