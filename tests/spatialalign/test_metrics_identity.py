"""ID consistency: its arithmetic by hand, its pictures against torchvision, its features by a tiny DINOv2."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from spatialalign.errors import DataError, ModelError
from spatialalign.metrics_identity import IdentityEncoder, identity_consistency, prepare, subject_crops
from spatialalign.tracks import Tracks
from spatialalign.video import Video

SIDE = 28


def write_dino(folder: Path, seed: int = 0) -> Path:
    """A random DINOv2 of the real class: 28 pixels, four patches, one layer."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 2}
    Dinov2Model(Dinov2Config(**sizes, image_size=SIDE, patch_size=14, initializer_range=0.5)).save_pretrained(folder)
    return folder


def moving(frames: int = 6) -> tuple[Video, Tracks]:
    """A patterned subject of 8 x 8 pixels that moves over a black ground, beside an object."""
    pattern = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    pixels = np.zeros((frames, 32, 48, 3), np.uint8)
    boxes = np.empty((frames, 2, 4))
    for k in range(frames):
        pixels[k, 10:18, 4 * k : 4 * k + 8] = pattern
        boxes[k] = [4 * k, 10, 4 * k + 8, 18], [36, 20, 44, 30]
    return Video(pixels, 8.0), Tracks(boxes, np.ones((frames, 2)), ("cat", "box"), (32, 48), 8.0)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> IdentityEncoder:
    return IdentityEncoder.from_pretrained(write_dino(tmp_path_factory.mktemp("models") / "dino"), batch=4)


def test_by_hand() -> None:
    # The second frame is like neither the first nor the one before, the third like the first only.
    assert identity_consistency([[2, 0], [0, 3], [1, 0]]) == pytest.approx(((0 + 0) / 2 + (1 + 0) / 2) / 2)
    assert identity_consistency([[1, 1]] * 3) == pytest.approx(1.0)
    assert identity_consistency([[1, 0], [-5, 0]]) == pytest.approx(-1.0)
    with pytest.raises(DataError, match="at least two frames"):
        identity_consistency([[1.0, 2.0]])


@pytest.mark.parametrize("shape", [(40, 60), (61, 33), (9, 14), (28, 28)])
def test_pictures_are_prepared_as_torchvision_does(shape: tuple[int, int]) -> None:
    v2 = pytest.importorskip("torchvision.transforms.v2")
    crop = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    picture = torch.from_numpy(crop).permute(2, 0, 1) / 255
    sized = v2.CenterCrop(SIDE)(v2.Resize(SIDE, v2.InterpolationMode.BICUBIC, antialias=True)(picture)).clamp(0, 1)
    expected = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(sized)
    # Rounded to whole grey levels, of which half a one is 1 / (2 * 255 * 0.224) here.
    torch.testing.assert_close(prepare(crop, SIDE), expected, atol=0.009, rtol=0)


def test_a_sliver_stays_small() -> None:
    crop = np.random.default_rng(0).integers(0, 256, (400, 1, 3), dtype=np.uint8)
    middle = prepare(crop[198:202], SIDE)
    assert prepare(crop, SIDE).shape == (3, SIDE, SIDE)
    torch.testing.assert_close(prepare(crop, SIDE), middle)


def test_the_subject_keeps_its_looks_while_it_moves(encoder: IdentityEncoder) -> None:
    video, tracks = moving()
    used = np.arange(6)
    assert encoder.side == SIDE
    assert encoder.score(video, tracks, used) == pytest.approx(1.0, abs=1e-5)
    changed = video.frames.copy()
    changed[3:, 10:18] = 255 - changed[3:, 10:18]
    other = encoder.score(Video(changed, 8.0), tracks, used)
    assert other is not None and other < 0.99
    # Outside the subject's box nothing counts, and neither do frames that are not used.
    around = video.frames.copy()
    around[:, 20:] = 200
    around[5] = 90
    assert encoder.score(Video(around, 8.0), tracks, used[:5]) == pytest.approx(1.0, abs=1e-5)
    assert encoder.score(video, tracks, used[:1]) is None


def test_features_are_the_class_token(encoder: IdentityEncoder) -> None:
    video, tracks = moving()
    crops = subject_crops(video, tracks, np.arange(6))
    assert {crop.shape for crop in crops} == {(8, 8, 3)}
    with torch.no_grad():
        hidden = encoder.model(torch.stack([prepare(crop, SIDE) for crop in crops])).last_hidden_state
    np.testing.assert_allclose(encoder.features(crops), hidden[:, 0].numpy(), atol=1e-5)


def test_boxes_are_cut_to_the_picture() -> None:
    video, _ = moving(1)
    boxes = np.array([[[-3.0, 30.2, 5.4, 40.0], [0.0, 0.0, 1.0, 1.0]]])
    tracks = Tracks(boxes, np.ones((1, 2)), ("cat", "box"), (32, 48), 8.0)
    assert subject_crops(video, tracks, np.array([0]))[0].shape == (2, 6, 3)


def test_what_does_not_fit_is_named(encoder: IdentityEncoder, tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    video, tracks = moving()
    with pytest.raises(DataError, match="track it again"):
        encoder.score(Video(video.frames[:4], 8.0), tracks, np.arange(4))
    ViTModel(
        ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16)
    ).save_pretrained(tmp_path / "vit")
    with pytest.raises(ModelError, match="'vit' is no DINOv2; expected a model such as facebook/dinov2-base"):
        IdentityEncoder.from_pretrained(tmp_path / "vit")
    with pytest.raises(ModelError, match="facebook/dinov2-base"):
        IdentityEncoder.from_pretrained("facebook/dinov2-base")  # the tests ask no network
