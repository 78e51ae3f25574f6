"""SAM 2 video on tiny random weights: what the shortcuts must not change, and where the prompts must land."""

from __future__ import annotations

import copy
import weakref
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import torch
from transformers import Sam2VideoConfig, Sam2VideoModel

from spatialalign.errors import ModelError, TracksError
from spatialalign.tracking.sam2 import Sam2VideoPropagator

BOXES = np.array([[4.0, 22, 14, 32], [30, 20, 46, 36]])
SEED = 4
"""Of random weights whose masks are neither empty nor full."""


@pytest.fixture(scope="module")
def model() -> Any:
    side = 64
    config = Sam2VideoConfig(
        vision_config={
            "model_type": "sam2_vision_model",
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "hidden_size": 8,
                "image_size": [side, side],
                "blocks_per_stage": [1, 1, 2, 1],
                "embed_dim_per_stage": [8, 16, 32, 64],
                "num_attention_heads_per_stage": [1, 1, 2, 2],
                "window_size_per_stage": [4, 4, 4, 4],
                "global_attention_blocks": [3],
            },
            "backbone_channel_list": [64, 32, 16, 8],
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
            "fpn_hidden_size": 128,
        },
        prompt_encoder_config={"hidden_size": 128, "image_size": side, "patch_size": 16, "mask_input_channels": 8},
        mask_decoder_config={"hidden_size": 128, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 32},
        image_size=side,
        memory_attention_hidden_size=128,
        memory_attention_num_layers=1,
        memory_attention_feed_forward_hidden_size=32,
        memory_attention_rope_feat_sizes=[4, 4],
        memory_encoder_hidden_size=128,
        memory_encoder_output_channels=64,
        mask_downsampler_embed_dim=128,
        memory_fuser_embed_dim=128,
        memory_fuser_intermediate_dim=32,
    )
    torch.manual_seed(0)
    model = Sam2VideoModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # The default initialisation is so small that every mask would be empty or full.
            own = torch.Generator().manual_seed(crc32(name.encode()) + SEED)  # the order of names differs by version
            parameter.copy_(torch.randn(parameter.shape, generator=own) * (0.3 if parameter.ndim > 1 else 0.1))
            if "norm" in name and name.endswith("weight"):
                parameter.fill_(1.0)
        model.mask_decoder.pred_obj_score_head.proj_out.bias.fill_(2.0)
    return model


def test_prefilled_features_change_no_bit(model: Any, clip: np.ndarray) -> None:
    # The encoder sees one frame at a time either way (batch 1), so masks and scores must agree exactly.
    lazy = Sam2VideoPropagator.for_model(model, prefill=False).propagate(clip, 2, BOXES)
    ready = Sam2VideoPropagator.for_model(model, batch=1).propagate(clip, 2, BOXES)
    assert 0.02 < lazy.masks.mean() < 0.98, "masks that are all empty or all full would prove nothing"
    np.testing.assert_array_equal(ready.masks, lazy.masks)
    np.testing.assert_array_equal(ready.scores, lazy.scores)


def test_batches_only_round_differently(model: Any, clip: np.ndarray) -> None:
    one = Sam2VideoPropagator.for_model(model, batch=1).propagate(clip, 2, BOXES)
    many = Sam2VideoPropagator.for_model(model, batch=4).propagate(clip, 2, BOXES)
    np.testing.assert_allclose(many.scores, one.scores, atol=1e-4)
    assert (many.masks == one.masks).mean() > 0.995


def test_no_encoder_call_during_propagation(model: Any, clip: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    encode = model.get_image_features

    def counted(pixels: torch.Tensor, **options: Any) -> Any:
        sizes.append(len(pixels))
        return encode(pixels, **options)

    monkeypatch.setattr(model, "get_image_features", counted)
    Sam2VideoPropagator.for_model(model, batch=3).propagate(clip, 2, BOXES)
    assert sizes == [3, 2]


def test_every_frame_is_covered_and_backward_may_start_afresh(model: Any, clip: np.ndarray) -> None:
    shared = Sam2VideoPropagator.for_model(model).propagate(clip, 2, BOXES)
    fresh = Sam2VideoPropagator.for_model(model, fresh_backward=True).propagate(clip, 2, BOXES)
    assert (shared.scores > 0).all() and shared.masks.shape == (5, 2, 48, 64)
    np.testing.assert_array_equal(fresh.masks[2:], shared.masks[2:])
    # A fresh backward pass is the forward pass over the reversed clip.
    reversed_clip = np.ascontiguousarray(clip[::-1])
    mirror = Sam2VideoPropagator.for_model(model).propagate(reversed_clip, 2, BOXES)
    np.testing.assert_array_equal(fresh.masks[:2], mirror.masks[::-1][:2])
    assert (fresh.scores[:2] != shared.scores[:2]).any()


def test_session_equals_the_librarys_own_processor(model: Any, clip: np.ndarray) -> None:
    pytest.importorskip("torchvision")
    import transformers
    from transformers import Sam2VideoProcessor, Sam2VideoVideoProcessor

    newer = transformers.__version__ >= "5"
    images = transformers.Sam2ImageProcessor if newer else transformers.Sam2ImageProcessorFast
    size = {"height": 64, "width": 64}
    processor = Sam2VideoProcessor(images(size=size), Sam2VideoVideoProcessor(size=size))
    session = processor.init_video_session(video=list(clip), dtype=torch.float32)
    processor.add_inputs_to_inference_session(session, 1, [0, 1], input_boxes=[BOXES.tolist()])
    masks, scores = {}, {}
    with torch.inference_mode():
        for output in model.propagate_in_video_iterator(session, start_frame_idx=1):
            found = processor.post_process_masks([output.pred_masks], [[48, 64]], binarize=True)[0]
            masks[output.frame_idx] = found[:, 0].numpy()
            if newer:  # before, the outputs did not carry them
                scores[output.frame_idx] = output.object_score_logits
    ours = Sam2VideoPropagator.for_model(model, batch=1).propagate(clip, 1, BOXES)
    assert sorted(masks) == [1, 2, 3, 4]
    for i, mask in masks.items():
        # The backends' resizes may differ by one grey level.
        assert (mask == ours.masks[i]).mean() > 0.99
        if newer:
            np.testing.assert_allclose(scores[i].sigmoid().reshape(2).numpy(), ours.scores[i], atol=0.01)


def test_prompts_are_scaled_to_the_models_square(model: Any, clip: np.ndarray) -> None:
    propagator = Sam2VideoPropagator.for_model(model)
    session = propagator._session(clip)
    propagator._prompt(session, 1, BOXES, (48, 64))
    # 64 wide stays, 48 high becomes 64: y grows by 4/3. Labels 2 and 3 mark the corners of a box.
    inputs = session.point_inputs_per_obj[0][1]
    np.testing.assert_allclose(inputs["point_coords"].numpy(), [[[[4, 22 * 4 / 3], [14, 32 * 4 / 3]]]], rtol=1e-6)
    assert inputs["point_labels"].tolist() == [[[2, 3]]]


def test_it_loads_from_a_folder_and_names_what_is_missing(model: Any, clip: np.ndarray, tmp_path: Any) -> None:
    model.save_pretrained(tmp_path / "sam2")
    loaded = Sam2VideoPropagator.from_pretrained(tmp_path / "sam2")
    before = Sam2VideoPropagator.for_model(model).propagate(clip[:2], 0, BOXES)
    np.testing.assert_array_equal(loaded.propagate(clip[:2], 0, BOXES).masks, before.masks)
    (tmp_path / "sam2" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"sam2: the model folder lacks model\.safetensors"):
        Sam2VideoPropagator.from_pretrained(tmp_path / "sam2")


def test_bad_prompts(model: Any, clip: np.ndarray) -> None:
    propagator = Sam2VideoPropagator.for_model(model)
    with pytest.raises(TracksError, match="seed frame 5 is not within 0 to 4"):
        propagator.propagate(clip, 5, BOXES)
    with pytest.raises(TracksError, match="two boxes"):
        propagator.propagate(clip, 0, np.full((2, 4), np.nan))


def test_progress_counts_encoded_and_visited_frames(model: Any, clip: np.ndarray) -> None:
    def heard(**options: Any) -> list[tuple[int, int]]:
        calls: list[tuple[int, int]] = []
        seed = options.pop("seed", 2)
        propagator = Sam2VideoPropagator.for_model(model, **options)
        propagator.propagate(clip, seed, BOXES, lambda done, total: calls.append((done, total)))
        return calls

    # Five frames encoded in batches of 2, then 3 frames visited from frame 2 to the end and 3 back to the start.
    assert heard(batch=2) == [(2, 11), (4, 11), (5, 11), *((done, 11) for done in range(6, 12))]
    assert heard(batch=5, seed=0) == [(done, 10) for done in range(5, 11)]
    assert heard(prefill=False) == [(done, 6) for done in range(1, 7)]


@pytest.mark.parametrize("when", [2, 4, 6, 10])
def test_an_interrupted_propagation_keeps_no_features(
    model: Any, clip: np.ndarray, when: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    propagator = Sam2VideoPropagator.for_model(model, batch=2)
    make, sessions, features = propagator._session, [], []

    def kept(frames: np.ndarray) -> Any:
        sessions.append(make(frames))
        return sessions[0]

    def stop(done: int, total: int) -> None:
        if done >= when:
            cached = sessions[0].cache._vision_features.values()
            features.extend(weakref.ref(level) for frame in cached for level in frame["vision_feats"])
            raise KeyboardInterrupt

    monkeypatch.setattr(Sam2VideoPropagator, "_session", lambda _, frames: kept(frames))
    with pytest.raises(KeyboardInterrupt) as held:
        propagator.propagate(clip, 2, BOXES, stop)
    # The exception, and with it every frame of the call, is still there; the features are not.
    assert held.tb is not None and len(features) >= 3 * when // 2 and all(ref() is None for ref in features)
    assert not sessions[0].cache._vision_features and not sessions[0].output_dict_per_obj


def test_a_finished_propagation_keeps_no_features(
    model: Any, clip: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    propagator = Sam2VideoPropagator.for_model(model)
    session = propagator._session(clip)
    monkeypatch.setattr(Sam2VideoPropagator, "_session", lambda *_: session)
    assert propagator.propagate(clip, 0, BOXES).masks.any()
    assert not session.cache._vision_features and not session.output_dict_per_obj


def test_half_precision_moves_no_prompt(model: Any, clip: np.ndarray) -> None:
    propagator = Sam2VideoPropagator.for_model(copy.deepcopy(model).to(torch.bfloat16))
    session = propagator._session(clip)
    assert session.dtype == torch.bfloat16
    # bfloat16 has 8 bits: it would make 45.3 * 4 / 3 = 60.4 a 60.5, and on a side of 1024 be off by up to 2 pixels.
    propagator._prompt(session, 1, BOXES + 9.3, (48, 64))
    corners = session.point_inputs_per_obj[1][1]["point_coords"].numpy()
    np.testing.assert_allclose(corners, [[[[39.3, 29.3 * 4 / 3], [55.3, 45.3 * 4 / 3]]]], rtol=1e-6)
    found = propagator.propagate(clip, 2, BOXES)
    exact = Sam2VideoPropagator.for_model(model).propagate(clip, 2, BOXES)
    assert (found.masks == exact.masks).mean() > 0.97
