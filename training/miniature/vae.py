"""Stage 1: the video autoencoder (``AutoencoderKLWan``), single frames first, then short clips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import Tensor
from torch.nn import functional

from spatialalign.miniature import POSES
from spatialalign.miniature.sprites import ANIMALS, OBJECTS, SCENES
from spatialalign.miniature.world import TYPES, draw, held, path
from training.miniature.loop import Loop


def random_clips(rng: np.random.Generator, count: int, poses: int) -> tuple[Tensor, Tensor]:
    """Stretches of ``poses`` poses of random clips, any animal, object, scene and type.

    Returns clips ``(count, 3, t, 64, 64)`` in [-1, 1] and weights ``(count, 1, t, 64, 64)``: an animal is 4 % of the
    picture, and a plain mean would rather lose it than blur the rest.
    """
    clips, masks = [], []
    for _ in range(count):
        animal, thing, scene = (rng.choice(list(names)) for names in (ANIMALS, OBJECTS, SCENES))
        feet, foot, facing = path(str(rng.choice(TYPES)), rng)
        start = rng.integers(0, len(feet) - poses + 1)
        drawn = [draw(scene, [(thing, foot, False), (animal, at, facing < 0)]) for at in feet[start : start + poses]]
        clips.append(held(np.stack([frame for frame, _ in drawn])))
        masks.append(held(np.stack([mask[1] for _, mask in drawn])))
    near = functional.max_pool2d(torch.from_numpy(np.stack(masks)).float(), 5, 1, 2)
    return torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3) / 127.5 - 1, 1 + 7 * near[:, None]


def reconstruction(again: Tensor, clips: Tensor, weight: Tensor | None = None) -> dict[str, Tensor]:
    """Reconstruction loss of decoded against true pixels in [-1, 1]; ``weight`` (broadcastable) counts some more."""
    error = again - clips
    squared, absolute = error.square(), error.abs()
    # Edges: the difference of neighbouring pixels keeps outlines of small animals sharp.
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    parts = {"l1": absolute.mean(), "mse": squared.mean()}
    if weight is not None:
        squared, absolute = squared * weight / weight.mean(), absolute * weight / weight.mean()
        parts["weighted"] = squared.mean()
    return {"loss": absolute.mean() + 4 * squared.mean() + 0.5 * edges, **parts}


def _loss(vae: AutoencoderKLWan, clips: Tensor, weight: Tensor) -> dict[str, Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(clips).latent_dist
        again = vae.decode(posterior.sample()).sample.float()
    kl = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean()
    parts = reconstruction(again, clips, weight)
    return parts | {"loss": parts["loss"] + 1e-4 * kl, "kl": kl}


@torch.no_grad()
def standardise(vae: AutoencoderKLWan, clips: Tensor) -> None:
    """Fold a per-channel affine map into the convolutions about the latents: those of ``clips`` then have exactly the
    mean and standard deviation that Wan 2.1's own latents have (the config's ``latents_mean`` and ``latents_std``).

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


@torch.no_grad()
def inflate(vae: AutoencoderKLWan) -> None:
    """Turn an autoencoder trained on single pictures into one for video that treats each frame as it did a picture.

    A causal convolution that has only seen single frames has trained its last tap alone; the taps on the past are as
    random as they were made, and are set to zero. Halving in time keeps every second frame, doubling repeats it.
    """
    for name, module in vae.named_modules():
        if isinstance(module, WanCausalConv3d) and module.weight.shape[2] == 3:
            module.weight[:, :, :2] = 0
            if name.endswith("time_conv"):
                out, inner = module.weight.shape[:2]
                module.weight[:, :, 2, 0, 0] = torch.eye(inner).repeat(out // inner, 1)
                module.bias.zero_()


def build(folder: Path, work: Path, seed: int = 0) -> None:
    """Train and write the autoencoder to ``folder``."""
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(base_dim=8, num_res_blocks=2)

    def step(number: int, count: int, poses: int) -> dict[str, Tensor]:
        torch.manual_seed(number)
        return _loss(vae, *random_clips(np.random.default_rng((seed, poses, number)), count, poses))

    Loop("vae-frames", work, vae, 1400, lr=2e-3, decay=0.3).run(lambda n: step(n, 12, 1))
    inflate(vae)
    vae.eval()
    standardise(vae, random_clips(np.random.default_rng((seed, 1)), 128, POSES)[0])
    vae.save_pretrained(folder)
