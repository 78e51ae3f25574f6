"""How good the shipped models are, measured on clips that no training drew."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from numpy.typing import NDArray
from torch import Tensor

from spatialalign import dsr_score
from spatialalign.geometry import iou
from spatialalign.miniature import FPS, WAN
from spatialalign.miniature.world import Clip, prompts, render
from spatialalign.tracking.segment import FrameSegmenter
from spatialalign.tracking.tracker import Tracker

UNSEEN = 9_000_000
"""Seeds from here on draw clips for measuring; training uses small ones."""


def held_out_clips(every: int = 4) -> list[Clip]:
    """Clean clips of held-out prompts: every type, animal, object and scene among them."""
    return [render(p.dsr, UNSEEN + i) for i, p in enumerate(prompts("eval")[::every])]


def pixels(clips: Sequence[Clip]) -> Tensor:
    """Frames ``(n, 3, t, h, w)`` in [-1, 1]."""
    return torch.from_numpy(np.stack([c.frames for c in clips])).permute(0, 4, 1, 2, 3) / 127.5 - 1


@torch.no_grad()
def autoencoder(clips: Sequence[Clip], folder: Path = WAN / "vae") -> dict[str, float]:
    """PSNR of encoding and decoding, in dB (mean over clips), and how far the latents are from Wan's statistics."""
    vae = AutoencoderKLWan.from_pretrained(folder).eval()
    frames = pixels(clips)
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in frames.split(8)])
    again = torch.cat([vae.decode(part).sample for part in latents.split(8)])
    error = ((again - frames) / 2).square().mean((1, 2, 3, 4))
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    normal = (latents - mean) / std
    return {
        "psnr_db": float((-10 * error.log10()).mean()),
        "largest_latent_mean": float(normal.mean((0, 2, 3, 4)).abs().max()),
        "largest_latent_std_error": float((normal.std((0, 2, 3, 4)) - 1).abs().max()),
    }


def _overlaps(boxes: NDArray[np.float64], truth: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.array([float(iou(box, truth)) for box in boxes])


def detector(clips: Sequence[Clip], tracker: Tracker) -> dict[str, float]:
    """Share of true boxes found at IoU 0.5 with the right phrase, and of found boxes that lie on the other thing."""
    found, total, false, boxes = 0, 0, 0, 0
    for clip in clips:
        labels = (clip.dsr.subject, clip.dsr.object)
        for frame, detections in enumerate(tracker.detector.detect(clip.frames, labels)):
            for phrase in (0, 1):
                mine = detections.of(phrase).boxes
                right = _overlaps(mine, clip.tracks.boxes[frame, phrase])
                wrong = _overlaps(mine, clip.tracks.boxes[frame, 1 - phrase])
                found += bool((right >= 0.5).any())
                total += 1
                boxes += len(mine)
                false += int(((right < 0.5) & (wrong >= 0.5)).sum())
    return {"recall": found / total, "false_phrase": false / max(boxes, 1)}


def segmenter(clips: Sequence[Clip], tracker: Tracker) -> dict[str, float]:
    """Mean IoU of masks from true boxes with the true masks."""
    assert isinstance(tracker.segmenter, FrameSegmenter)
    overlaps = []
    for clip in clips:
        assert clip.tracks.masks is not None
        masks = tracker.segmenter.segment(clip.frames, clip.tracks.boxes).masks
        overlaps.append((masks & clip.tracks.masks).sum((-1, -2)) / (masks | clip.tracks.masks).sum((-1, -2)))
    return {"mask_iou": float(np.mean(overlaps))}


def scores(clips: Sequence[Clip], tracker: Tracker) -> dict[str, float]:
    """Distance of the DSR-Score by our tracker from that of the true boxes; an INVALID clip counts as 1."""
    differences = []
    for clip in clips:
        tracks = tracker.track(clip.frames, clip.dsr.subject, clip.dsr.object, FPS)
        ours, truth = dsr_score(tracks, clip.dsr).score, dsr_score(clip.tracks, clip.dsr).score
        assert truth is not None
        differences.append(1.0 if ours is None else abs(ours - truth))
    return {
        "score_difference_median": float(np.median(differences)),
        "score_difference_over_0.1": float(np.mean(np.array(differences) > 0.1)),
    }
