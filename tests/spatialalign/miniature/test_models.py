"""The shipped models do what they are shipped for, measured on clips that no training saw."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from spatialalign import dsr_score
from spatialalign.geometry import iou
from spatialalign.miniature import DETECTOR, FRAMES, SEGMENTER, WAN, WEIGHTS
from spatialalign.miniature.world import Clip, prompts, render
from spatialalign.tracking.load import load_tracker
from spatialalign.tracking.tracker import Tracker

UNSEEN = 9_000_000
"""Seeds from here on draw clips for measuring; training uses small ones."""


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    """24 clean clips of held-out prompts, every type, animal, object and scene among them."""
    return [render(p.dsr, UNSEEN + i) for i, p in enumerate(prompts("eval")[::4])]


@pytest.fixture(scope="module")
def tracker() -> Tracker:
    return load_tracker("miniature")


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_the_autoencoder_keeps_the_picture(clips: list[Clip]) -> None:
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(WAN / "vae").eval()
    frames = torch.from_numpy(np.stack([c.frames for c in clips])).permute(0, 4, 1, 2, 3) / 127.5 - 1
    with torch.no_grad():
        again = torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample for part in frames.split(8)])
    error = ((again - frames) / 2).square().mean((1, 2, 3, 4))
    assert float((-10 * error.log10()).mean()) >= PSNR_DB


PSNR_DB = 28.0


def test_latents_have_the_statistics_that_wan_programs_assume(clips: list[Clip]) -> None:
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(WAN / "vae").eval()
    assert vae.config.latents_mean == AutoencoderKLWan(base_dim=8).config.latents_mean
    frames = torch.from_numpy(np.stack([c.frames for c in clips])).permute(0, 4, 1, 2, 3) / 127.5 - 1
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mode() for part in frames.split(8)])
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    normal = (latents - mean) / std
    assert normal.mean((0, 2, 3, 4)).abs().max() < 0.3
    assert (normal.std((0, 2, 3, 4)) - 1).abs().max() < 0.2


def _best(boxes: NDArray[np.float64], truth: NDArray[np.float64]) -> float:
    return max((float(iou(box, truth)) for box in boxes), default=0.0)


def test_the_detector_finds_what_is_asked_for_and_names_it_rightly(clips: list[Clip], tracker: Tracker) -> None:
    found, total, false, boxes = 0, 0, 0, 0
    for clip in clips:
        labels = (clip.dsr.subject, clip.dsr.object)
        for frame, detections in enumerate(tracker.detector.detect(clip.frames, labels)):
            for phrase in (0, 1):
                truth, other = clip.tracks.boxes[frame, phrase], clip.tracks.boxes[frame, 1 - phrase]
                mine = detections.of(phrase).boxes
                found += _best(mine, truth) >= 0.5
                total += 1
                boxes += len(mine)
                false += sum(float(iou(b, truth)) < 0.5 <= float(iou(b, other)) for b in mine)
    assert total == 2 * FRAMES * len(clips)
    assert found / total >= 0.97
    assert false / boxes <= 0.02


def test_the_segmenter_outlines_what_a_box_points_at(clips: list[Clip], tracker: Tracker) -> None:
    overlaps = []
    for clip in clips:
        assert tracker.segmenter is not None and clip.tracks.masks is not None
        masks = tracker.segmenter.segment(clip.frames, clip.tracks.boxes).masks  # type: ignore[union-attr]
        both = (masks & clip.tracks.masks).sum((-1, -2))
        overlaps.append(both / (masks | clip.tracks.masks).sum((-1, -2)))
    assert float(np.mean(overlaps)) >= 0.85


def test_scores_from_our_tracker_equal_those_from_the_truth(clips: list[Clip], tracker: Tracker) -> None:
    differences = []
    for clip in clips:
        tracks = tracker.track(clip.frames, clip.dsr.subject, clip.dsr.object, 8.0)
        ours, truth = dsr_score(tracks, clip.dsr).score, dsr_score(clip.tracks, clip.dsr).score
        assert truth is not None
        differences.append(1.0 if ours is None else abs(ours - truth))
    assert float(np.median(differences)) <= 0.05
    assert float(np.mean(np.array(differences) > 0.1)) <= 0.2


def test_every_folder_loads_with_the_plain_library_classes() -> None:
    from diffusers import WanPipeline
    from transformers import GroundingDinoForObjectDetection, SamModel

    pipeline = WanPipeline.from_pretrained(WAN)
    assert type(pipeline.transformer).__name__ == "WanTransformer3DModel"
    pipeline.set_progress_bar_config(disable=True)
    video = pipeline(
        prompts("eval")[0].text, height=64, width=64, num_frames=FRAMES, num_inference_steps=2, guidance_scale=1.0,
        output_type="np",
    ).frames  # fmt: skip
    assert video.shape == (1, FRAMES, 64, 64, 3) and np.isfinite(video).all()
    GroundingDinoForObjectDetection.from_pretrained(DETECTOR)
    SamModel.from_pretrained(SEGMENTER)


def test_the_weights_are_small() -> None:
    sizes = [path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()]
    assert max(sizes) <= 16_000_000
    assert sum(sizes) <= 40_000_000
