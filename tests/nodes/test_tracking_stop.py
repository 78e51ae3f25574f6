"""The tracking node when the user stops it."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from .test_tracking import Module, Run, clip, image, miniature, node, world

__all__ = ["clip", "miniature", "node", "world"]


def test_a_stop_is_heard_within_a_batch_and_leaves_nothing_behind(
    node: Any, run: Run, miniature: Any, clip: Any, fake_host: Any
) -> None:
    given = {"grounded_sam": miniature, "dsr": clip.dsr, "images": image(clip.frames)}
    before = run(node, **given)
    checks = fake_host.checks
    assert checks == 7 + 7 + 1  # two models, 13 frames in twos, and the finished clip
    for stop in (0, 3, 6, 9, 14):
        fake_host.checks, fake_host.interrupt_at = 0, stop
        fake_host.progress.clear()
        with pytest.raises(Exception, match="^$") as raised:
            run(node, **given)
        assert type(raised.value).__name__ == "Interrupted" and len(fake_host.progress) == stop
    fake_host.interrupt_at = None
    after = run(node, **given)
    assert after[0] == before[0] and torch.equal(after[1][0], before[1][0])


def tiny_sam2() -> Any:
    """A SAM 2 video model of a few thousand weights, for 64 x 64 pixels."""
    from transformers import Sam2VideoConfig, Sam2VideoModel

    backbone = {
        "model_type": "sam2_hiera_det_model", "hidden_size": 8, "image_size": [64, 64],
        "blocks_per_stage": [1, 1, 2, 1], "embed_dim_per_stage": [8, 16, 32, 64],
        "num_attention_heads_per_stage": [1, 1, 2, 2], "window_size_per_stage": [4, 4, 4, 4],
        "global_attention_blocks": [3],
    }  # fmt: skip
    config = Sam2VideoConfig(
        vision_config={
            "model_type": "sam2_vision_model", "backbone_config": backbone, "fpn_hidden_size": 128,
            "backbone_channel_list": [64, 32, 16, 8], "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        },
        prompt_encoder_config={"hidden_size": 128, "image_size": 64, "patch_size": 16, "mask_input_channels": 8},
        mask_decoder_config={"hidden_size": 128, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 32},
        image_size=64, memory_attention_hidden_size=128, memory_attention_num_layers=1,
        memory_attention_feed_forward_hidden_size=32, memory_attention_rope_feat_sizes=[4, 4],
        memory_encoder_hidden_size=128, memory_encoder_output_channels=64, mask_downsampler_embed_dim=128,
        memory_fuser_embed_dim=128, memory_fuser_intermediate_dim=32,
    )  # fmt: skip
    torch.manual_seed(0)
    return Sam2VideoModel(config).eval()


def held() -> int:
    """Bytes in the storages of all tensors that are alive; views share theirs."""
    gc.collect()
    stores = [one.untyped_storage() for one in gc.get_objects() if type(one) is torch.Tensor]
    return sum({store.data_ptr(): store.nbytes() for store in stores}.values())


@pytest.mark.parametrize("when", [9, 15, 20, 25])
def test_sam2_returns_its_memory_when_stopped_in_mid_track(
    node: Any, run: Run, miniature: Any, clip: Any, fake_host: Any, module: Module, monkeypatch: Any, when: int
) -> None:
    propagator = module("spatialalign.tracking.sam2").Sam2VideoPropagator.for_model(tiny_sam2(), batch=2)
    tracker = module("spatialalign.tracking.tracker").Tracker(miniature.tracker.detector, propagator)
    loaded = module("tracking").GroundedSam(tracker, miniature.patchers)
    images = image(clip.frames)
    check, working = fake_host.check_interrupt, []

    def checked() -> None:
        if fake_host.checks == when:
            working.append(held())
        check()

    run(node, grounded_sam=loaded, dsr=clip.dsr, images=images)
    total = fake_host.checks
    assert total > 26
    monkeypatch.setattr(fake_host, "check_interrupt", checked)
    fake_host.checks, fake_host.interrupt_at = 0, when
    before = held()
    with pytest.raises(Exception, match="^$") as raised:
        run(node, grounded_sam=loaded, dsr=clip.dsr, images=images)
    # The exception still holds every frame of the call, as it does while ComfyUI reports it.
    assert type(raised.value).__name__ == "Interrupted" and raised.tb is not None
    assert working[0] - before > 500_000, "the features of at least two frames were held when the stop came"
    assert held() - before < 0.5 * (working[0] - before)
