"""Stage 1: the video autoencoder (``AutoencoderKLWan``), single frames first, then short clips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from spatialalign.miniature.sprites import ANIMALS, OBJECTS, SCENES
from spatialalign.miniature.world import TYPES, draw, path
from training.miniature.loop import Loop


def random_clips(rng: np.random.Generator, count: int, frames: int) -> Tensor:
    """``(count, 3, frames, 64, 64)`` in [-1, 1]: stretches of random clips, any animal, object, scene and type."""
    clips = []
    for _ in range(count):
        animal, thing, scene = (rng.choice(list(names)) for names in (ANIMALS, OBJECTS, SCENES))
        feet, foot, facing = path(str(rng.choice(TYPES)), rng)
        start = rng.integers(0, len(feet) - frames + 1)
        clips.append(
            [
                draw(scene, [(thing, foot, False), (animal, feet[start + i], facing < 0)])[0]
                for i in range(frames)
            ]
        )
    return torch.from_numpy(np.array(clips)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def psnr(vae: AutoencoderKLWan, clips: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of encoding and decoding ``clips``, pixel values in [0, 1]."""
    with torch.no_grad():
        again = vae.decode(vae.encode(clips).latent_dist.mode()).sample
    return float(-10 * torch.log10(((again - clips) / 2).square().mean()))


def reconstruction(again: Tensor, clips: Tensor) -> dict[str, Tensor]:
    """Reconstruction loss of decoded against true pixels in [-1, 1]."""
    error = again - clips
    # Edges: the difference of neighbouring pixels keeps outlines of small animals sharp.
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    l1, mse = error.abs().mean(), error.square().mean()
    return {"loss": l1 + 4 * mse + 0.5 * edges, "l1": l1, "mse": mse}


def _loss(vae: AutoencoderKLWan, clips: Tensor) -> dict[str, Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(clips).latent_dist
        again = vae.decode(posterior.sample()).sample.float()
    kl = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean()
    parts = reconstruction(again, clips)
    return parts | {"loss": parts["loss"] + 1e-4 * kl, "kl": kl}


@torch.no_grad()
def standardise(vae: AutoencoderKLWan, clips: Tensor) -> None:
    """Fold a per-channel affine map into the convolutions about the latents, so that the latents of ``clips`` get exactly
    the mean and standard deviation that Wan 2.1's own latents have (the config's ``latents_mean`` and ``latents_std``).

    Programs that hard-code those constants then normalise our latents correctly.
    """
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in clips.split(16)])
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    scale = torch.tensor(vae.config.latents_std) / std
    shift = torch.tensor(vae.config.latents_mean) - mean * scale
    channels = len(scale)
    vae.quant_conv.weight[:channels] *= scale[:, None, None, None, None]
    vae.quant_conv.bias[:channels] = vae.quant_conv.bias[:channels] * scale + shift
    vae.quant_conv.bias[channels:] += 2 * scale.log()
    weight = vae.post_quant_conv.weight
    vae.post_quant_conv.bias -= (weight[..., 0, 0, 0] * (shift / scale)).sum(1)
    vae.post_quant_conv.weight.copy_(weight / scale[None, :, None, None, None])


def build(folder: Path, work: Path, seed: int = 0, frame_steps: int = 1400, clip_steps: int = 500, whole_steps: int = 260) -> None:
    """Train and write the autoencoder to ``folder``."""
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(base_dim=8, num_res_blocks=2)

    def step(number: int, count: int, frames: int) -> dict[str, Tensor]:
        torch.manual_seed(number)
        return _loss(vae, random_clips(np.random.default_rng((seed, frames, number)), count, frames))

    Loop("vae-frames", work, vae, frame_steps, lr=2e-3, decay=0.3).run(lambda n: step(n, 12, 1))
    Loop("vae-clips", work, vae, clip_steps, lr=1e-3, decay=0.6).run(lambda n: step(n, 4, 5 if n % 2 else 9))
    # The caches of the causal convolutions reach back further than nine frames: whole clips, or late frames decay.
    Loop("vae-whole", work, vae, whole_steps, lr=1.5e-3, decay=0.8, save_every=100).run(lambda n: step(n, 2, 17))
    vae.eval()
    standardise(vae, random_clips(np.random.default_rng((seed, 1)), 128, 17))
    vae.save_pretrained(folder)
