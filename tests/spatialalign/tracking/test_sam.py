"""SAM per frame on tiny random weights, against transformers' own processor and against the original package."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import SamConfig, SamModel

from spatialalign.errors import ModelError, TracksError
from spatialalign.tracking.original import OriginalSam, build_sam
from spatialalign.tracking.preprocess import Preprocess
from spatialalign.tracking.sam import SamFrameSegmenter

SIDE = 64
BOXES = np.array([[[4.0 + 10 * i, 22, 14 + 10 * i, 32], [30, 20, 46, 36]] for i in range(5)])


def sam_preprocess() -> Preprocess:
    return Preprocess({"longest_edge": SIDE}, pad=(SIDE, SIDE))


def shake(model: torch.nn.Module, quality: str) -> None:
    """Weights large enough for masks that are neither empty nor full, and scores within (0, 1)."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.1))
            if name.startswith(quality):
                parameter.mul_(0.01).add_(0.5 if parameter.ndim == 1 else 0.0)


@pytest.fixture(scope="module")
def model() -> Any:
    config = SamConfig(
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": 8,
            "window_size": 4,
            "global_attn_indexes": [1],
            "output_channels": 32,
            "num_pos_feats": 16,
            "mlp_dim": 64,
        },
        prompt_encoder_config={"hidden_size": 32, "image_size": SIDE, "patch_size": 8, "mask_input_channels": 8},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 2, "iou_head_hidden_dim": 32},
    )
    torch.manual_seed(0)
    model = SamModel(config).eval()
    shake(model, "mask_decoder.iou_prediction_head.proj_out")
    return model


def test_equals_the_librarys_processor_and_model(model: Any, clip: np.ndarray) -> None:
    pytest.importorskip("torchvision")
    from transformers import SamImageProcessor, SamProcessor

    image = SamImageProcessor(size={"longest_edge": SIDE}, pad_size={"height": SIDE, "width": SIDE})
    processor = SamProcessor(image)
    inputs = processor(images=list(clip), input_boxes=BOXES.tolist(), return_tensors="pt")
    with torch.inference_mode():
        output = model(
            pixel_values=inputs["pixel_values"], input_boxes=inputs["input_boxes"].float(), multimask_output=False
        )
    masks = processor.post_process_masks(
        output.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"], binarize=True
    )
    expected = torch.stack(masks)[:, :, 0].numpy()
    found = SamFrameSegmenter(model, sam_preprocess(), batch=2).segment(clip, BOXES)
    assert 0.02 < expected.mean() < 0.98
    np.testing.assert_array_equal(found.masks, expected)
    np.testing.assert_allclose(found.scores, output.iou_scores[..., 0].clamp(0, 1).numpy(), atol=1e-5)


def test_boxes_are_scaled_to_the_models_pixels(model: Any, clip: np.ndarray) -> None:
    # The same clip at twice the size, boxes doubled: prompts reach the model in the same place.
    prompts: list[torch.Tensor] = []
    handle = model.prompt_encoder.register_forward_pre_hook(
        lambda _, __, kwargs: prompts.append(kwargs["input_boxes"].clone()), with_kwargs=True
    )
    try:
        segmenter = SamFrameSegmenter(model, sam_preprocess())
        segmenter.segment(clip, BOXES)
        segmenter.segment(clip.repeat(2, axis=1).repeat(2, axis=2), BOXES * 2)
    finally:
        handle.remove()
    np.testing.assert_allclose(prompts[0].numpy(), BOXES, rtol=1e-6)
    np.testing.assert_allclose(prompts[1].numpy(), BOXES, rtol=1e-6)


def test_half_precision_moves_no_prompt(model: Any, clip: np.ndarray) -> None:
    half = copy.deepcopy(model).to(torch.bfloat16)
    prompts: list[torch.Tensor] = []
    half.prompt_encoder.register_forward_pre_hook(
        lambda _, __, kwargs: prompts.append(kwargs["input_boxes"].clone()), with_kwargs=True
    )
    found = SamFrameSegmenter(half, sam_preprocess()).segment(clip, BOXES + 0.3)
    # bfloat16 would make 32.3 a 32.25, and on SAM's side of 1024 pixels be off by up to 2.
    np.testing.assert_allclose(prompts[0].numpy(), BOXES + 0.3, rtol=1e-6)
    exact = SamFrameSegmenter(model, sam_preprocess()).segment(clip, BOXES + 0.3)
    assert (found.masks == exact.masks).mean() > 0.9


def test_progress_counts_the_frames_that_have_boxes(model: Any, clip: np.ndarray) -> None:
    calls: list[tuple[int, int]] = []
    holed = BOXES.copy()
    holed[3] = np.nan
    SamFrameSegmenter(model, sam_preprocess(), batch=3).segment(clip, holed, lambda *call: calls.append(call))
    assert calls == [(3, 4), (4, 4)]


def test_absent_boxes_give_empty_masks_and_change_no_other(model: Any, clip: np.ndarray) -> None:
    segmenter = SamFrameSegmenter(model, sam_preprocess(), batch=3)
    full = segmenter.segment(clip, BOXES)
    holed = BOXES.copy()
    holed[1, 0] = holed[3] = np.nan
    found = segmenter.segment(clip, holed)
    gone = np.isnan(holed[..., 0])
    assert not found.masks[gone].any() and (found.scores[gone] == 0).all()
    np.testing.assert_array_equal(found.masks[~gone], full.masks[~gone])


def test_folder_round_trip_and_missing_parts(
    model: Any, clip: np.ndarray, write_processor: Callable[..., None], tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "sam")
    with pytest.raises(ModelError, match=r"lacks processor_config\.json or preprocessor_config\.json"):
        SamFrameSegmenter.from_pretrained(tmp_path / "sam")
    write_processor(tmp_path / "sam", "Sam", {"longest_edge": SIDE}, pad=SIDE)
    loaded = SamFrameSegmenter.from_pretrained(tmp_path / "sam", batch=5)
    assert loaded.preprocess == sam_preprocess()
    expected = SamFrameSegmenter(model, sam_preprocess(), batch=5).segment(clip, BOXES)
    np.testing.assert_array_equal(loaded.segment(clip, BOXES).masks, expected.masks)


def test_wrong_processor_is_refused(model: Any) -> None:
    with pytest.raises(ModelError, match="pads to .128, 128., the model takes 64 x 64"):
        SamFrameSegmenter(model, Preprocess({"longest_edge": 128}, pad=(128, 128)))


def test_boxes_must_match_the_frames(model: Any, clip: np.ndarray) -> None:
    with pytest.raises(TracksError, match=r"shape \(5, 2, 4\), found \(4, 2, 4\)"):
        SamFrameSegmenter(model, sam_preprocess()).segment(clip, BOXES[:4])


@pytest.fixture(scope="module")
def original() -> Any:
    """A tiny segment-anything model with 8 heads in the decoder, as every release has."""
    modeling = pytest.importorskip("segment_anything").modeling
    from functools import partial

    torch.manual_seed(2)
    sam = modeling.Sam(
        image_encoder=modeling.ImageEncoderViT(
            depth=3,
            embed_dim=32,
            img_size=SIDE,
            num_heads=2,
            patch_size=8,
            use_rel_pos=True,
            global_attn_indexes=(1,),
            window_size=4,
            out_chans=32,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        ),
        prompt_encoder=modeling.PromptEncoder(
            embed_dim=32, image_embedding_size=(8, 8), input_image_size=(SIDE, SIDE), mask_in_chans=8
        ),
        mask_decoder=modeling.MaskDecoder(
            num_multimask_outputs=3,
            transformer=modeling.TwoWayTransformer(depth=2, embedding_dim=32, mlp_dim=48, num_heads=8),
            transformer_dim=32,
            iou_head_hidden_dim=24,
        ),
    ).eval()
    shake(sam, "mask_decoder.iou_prediction_head.layers.2")
    return sam


def test_original_checkpoint_is_rebuilt_from_its_weights(original: Any, clip: np.ndarray, tmp_path: Path) -> None:
    torch.save(original.state_dict(), tmp_path / "sam.pth")
    loaded = OriginalSam.from_pth(tmp_path / "sam.pth")
    holed = BOXES.copy()
    holed[2, 1] = np.nan
    calls: list[tuple[int, int]] = []
    found = loaded.segment(clip, holed, lambda *call: calls.append(call))
    assert calls == [(done, 5) for done in range(1, 6)]
    from segment_anything import SamPredictor

    predictor = SamPredictor(original)
    for i, frame in enumerate(clip):
        predictor.set_image(frame)
        for thing in range(2):
            if np.isnan(holed[i, thing, 0]):
                assert not found.masks[i, thing].any() and found.scores[i, thing] == 0
                continue
            masks, quality, _ = predictor.predict(box=holed[i, thing], multimask_output=False)
            np.testing.assert_array_equal(found.masks[i, thing], masks[0])
            assert found.scores[i, thing] == pytest.approx(float(np.clip(quality[0], 0, 1)), abs=1e-5)
    assert 0.02 < found.masks.mean() < 0.98


def test_sizes_of_a_real_release_are_read_off_its_shapes() -> None:
    modeling = pytest.importorskip("segment_anything").modeling
    from segment_anything import sam_model_registry

    with torch.device("meta"):
        reference = sam_model_registry["vit_b"]()
        rebuilt = build_sam(reference.state_dict())
    assert isinstance(rebuilt, modeling.Sam)
    shapes = {key: value.shape for key, value in rebuilt.state_dict().items()}
    assert shapes == {key: value.shape for key, value in reference.state_dict().items()}
    for ours, theirs in zip(rebuilt.image_encoder.blocks, reference.image_encoder.blocks, strict=True):
        assert (ours.window_size, ours.attn.num_heads) == (theirs.window_size, theirs.attn.num_heads)


def test_unsafe_or_foreign_checkpoints_are_refused(tmp_path: Path) -> None:
    import pickle

    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"a": print}))
    with pytest.raises(ModelError, match=r"evil\.pth: cannot be read safely"):
        OriginalSam.from_pth(tmp_path / "evil.pth")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ModelError, match=r"other\.pth: not a segment-anything checkpoint"):
        OriginalSam.from_pth(tmp_path / "other.pth")
    with pytest.raises(ModelError, match=r"none\.pth: no such checkpoint"):
        OriginalSam.from_pth(tmp_path / "none.pth")
