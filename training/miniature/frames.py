"""Single pictures with true boxes and masks, for the detector and the segmenter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from spatialalign.files import atomic_path
from spatialalign.miniature import HEIGHT
from spatialalign.miniature.sprites import ANIMALS, OBJECTS, SCENES
from spatialalign.miniature.world import TYPES, draw, path
from spatialalign.tracking.segment import boxes_from_masks

NAMES = (*ANIMALS, *OBJECTS)


@dataclass(frozen=True)
class Picture:
    """``frame`` (h, w, 3) uint8; ``names``, ``boxes`` (n, 4) xyxy pixels and ``masks`` (n, h, w) of what is in it."""

    frame: NDArray[np.uint8]
    names: tuple[str, ...]
    boxes: NDArray[np.float64]
    masks: NDArray[np.bool_]


def picture(rng: np.random.Generator) -> Picture:
    """Half from the paths of real clips, half scattered freely; a tenth lacks the animal or the object."""
    scene = str(rng.choice(list(SCENES)))
    animal, thing = str(rng.choice(list(ANIMALS))), str(rng.choice(list(OBJECTS)))
    if rng.random() < 0.6:
        feet, foot, facing = path(str(rng.choice(TYPES)), rng)
        things = [(thing, foot, False), (animal, feet[rng.integers(len(feet))], facing < 0)]
    else:
        spots = rng.uniform((9, 18), (HEIGHT - 9, HEIGHT - 2), (2, 2))
        things = [(thing, spots[0], False), (animal, spots[1], bool(rng.random() < 0.5))]
    if rng.random() < 0.1:
        things.pop(rng.integers(2))
    frame, masks = draw(scene, things)
    seen = masks.sum((1, 2)) > 25
    names = tuple(name for (name, _, _), ok in zip(things, seen, strict=True) if ok)
    return Picture(frame, names, boxes_from_masks(masks[seen]), masks[seen])


@torch.no_grad()
def through_vae(folder: Path, work: Path, count: int = 3200, noise: float = 0.25, seed: int = 5) -> dict[str, Tensor]:
    """Pictures as a generator would show them: encoded, disturbed in latent space, decoded; with the true masks.

    Returns ``frames`` (n, 64, 64, 3) uint8, ``masks`` (n, 2, 64, 64) bool and ``names`` (n, 2), numbers into NAMES.
    """
    stored = work / "seen-through-vae.safetensors"
    if stored.exists():
        return load_file(stored)
    vae = AutoencoderKLWan.from_pretrained(folder / "vae").eval()
    spread = torch.tensor(vae.config.latents_std).view(-1, 1, 1, 1)
    drawn = [picture(np.random.default_rng((seed, number))) for number in range(count)]
    drawn = [item for item in drawn if len(item.names) == 2]
    frames = torch.from_numpy(np.stack([item.frame for item in drawn]))
    generator = torch.Generator().manual_seed(seed)
    seen = []
    for part in tqdm(frames.permute(0, 3, 1, 2)[:, :, None].split(64), desc="frames through the VAE"):
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(part / 127.5 - 1).latent_dist.mode().float()
            level = noise * torch.rand(len(part), 1, 1, 1, 1, generator=generator)
            latents = latents + spread * level * torch.randn(latents.shape, generator=generator)
            decoded = vae.decode(latents).sample.float()
        seen.append(((decoded[:, :, 0] + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1))
    result = {
        "frames": torch.cat(seen).contiguous(),
        "masks": torch.from_numpy(np.stack([item.masks for item in drawn])),
        "names": torch.tensor([[NAMES.index(name) for name in item.names] for item in drawn]),
    }
    with atomic_path(stored) as temporary:
        save_file(result, temporary)
    return result


def batch_of(rng: np.random.Generator, count: int, seen: dict[str, Tensor] | None) -> list[Picture]:
    """A training batch, half drawn and half seen through the autoencoder; all drawn when there is none."""
    if seen is None:
        return [picture(rng) for _ in range(count)]
    pictures = [picture(rng) for _ in range(count - count // 2)]
    for index in rng.integers(0, len(seen["frames"]), count // 2):
        masks = seen["masks"][index].numpy()
        visible = masks.sum((1, 2)) > 25
        names = tuple(NAMES[i] for i, ok in zip(seen["names"][index], visible, strict=True) if ok)
        pictures.append(Picture(seen["frames"][index].numpy(), names, boxes_from_masks(masks[visible]), masks[visible]))
    return pictures
