"""The clips the miniature is trained on, and their latents.

Of the clips one part shows another relationship than the caption asks for, and another part an animal that stays where
it begins: the two failures of real generators that preference training is to repair.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from spatialalign.dsr import DSR
from spatialalign.files import atomic_path
from spatialalign.miniature import HOLD, POSES
from spatialalign.miniature.world import TYPES, Clip, prompts, render

CLIPS_PER_PROMPT = 24
WRONG, STAYS = 0.20, 0.14
"""Shares of clips that show another type, and an animal that stays."""
SEED = 2

Job = tuple[int, int]
"""Number of the caption and of the clip drawn for it."""


@cache
def captions() -> tuple[DSR, ...]:
    """The relationships of the training prompts."""
    return tuple(prompt.dsr for prompt in prompts("train"))


def shown_type(dsr: DSR, rng: np.random.Generator) -> str:
    """What the clip of a caption shows."""
    draw = rng.random()
    if draw < WRONG:
        return str(rng.choice([code for code in TYPES if code != dsr.type_code]))
    return 2 * dsr.initial.code if draw < WRONG + STAYS else dsr.type_code


def clip_of(job: Job) -> Clip:
    """Draw the clip of a job."""
    dsr = captions()[job[0]]
    shown = shown_type(dsr, np.random.default_rng((SEED, *job, 1)))
    return render(dsr, (SEED, *job), shown)


def _statistics(vae: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    mean, std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
    return mean.view(-1, 1, 1, 1), std.view(-1, 1, 1, 1)


def normalise(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Latents of the autoencoder → latents of the transformer, as diffusers' Wan pipelines do."""
    mean, std = _statistics(vae)
    return (latents - mean) / std


def denormalise(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """The inverse of :func:`normalise`."""
    mean, std = _statistics(vae)
    return latents * std + mean


@torch.no_grad()
def encoded_clips(folder: Path, work: Path, shard: int = 288) -> tuple[Tensor, list[Job]]:
    """Normalised latents ``(n, 16, 4, 8, 8)`` float16 of all training clips, and their jobs; kept shard by shard."""
    jobs = [(number, copy) for copy in range(CLIPS_PER_PROMPT) for number in range(len(captions()))]
    vae = None
    latents = []
    for start in tqdm(range(0, len(jobs), shard), desc="latents"):
        path = work / f"latents-{start // shard:03d}.safetensors"
        if not path.exists():
            vae = vae or AutoencoderKLWan.from_pretrained(folder / "vae").eval()
            # One frame of each pose is enough: the autoencoder treats frames singly (vae.inflate) and poses are held.
            poses = np.stack([clip_of(job).frames[::HOLD] for job in jobs[start : start + shard]])
            flat = torch.from_numpy(poses).flatten(0, 1).permute(0, 3, 1, 2)[:, :, None]
            parts = []
            for part in flat.split(64):
                with torch.autocast("cpu", torch.bfloat16):
                    parts.append(vae.encode(part / 127.5 - 1).latent_dist.mode().float())
            encoded = normalise(vae, torch.cat(parts)).unflatten(0, (-1, POSES)).squeeze(3).transpose(1, 2)
            with atomic_path(path) as temporary:
                save_file({"latents": encoded.half().contiguous()}, temporary)
        latents.append(load_file(path)["latents"])
    return torch.cat(latents), jobs
