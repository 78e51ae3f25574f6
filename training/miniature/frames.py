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
from spatialalign.miniature.world import TYPES, boxes_of, draw, path

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
    return Picture(frame, names, boxes_of(masks[seen]), masks[seen])


@torch.no_grad()
def through_vae(folder: Path, work: Path, clips: int = 320, noise: float = 0.25, seed: int = 5) -> dict[str, Tensor]:
    """Clips as a generator would show them: encoded, disturbed in latent space, decoded; with the masks of the truth.

    Returns ``frames`` (n, 64, 64, 3) uint8, ``masks`` (n, 2, 64, 64) bool (animal, object) and ``names`` (n, 2).
    """
    stored = work / "seen-through-vae.safetensors"
    if stored.exists():
        return load_file(stored)
    vae = AutoencoderKLWan.from_pretrained(folder / "vae").eval()
    spread = torch.tensor(vae.config.latents_std).view(-1, 1, 1, 1)
    frames, masks, names = [], [], []
    for start in tqdm(range(0, clips, 16), desc="frames through the VAE"):
        drawn = []
        for number in range(start, start + 16):
            rng = np.random.default_rng((seed, number))
            animal, thing, scene = (int(rng.integers(4)) for _ in range(3))
            feet, foot, facing = path(str(rng.choice(TYPES)), rng)
            for at in feet:
                things = [(list(OBJECTS)[thing], foot, False), (list(ANIMALS)[animal], at, bool(facing < 0))]
                frame, mask = draw(list(SCENES)[scene], things)
                drawn.append(frame)
                masks.append(mask[::-1].copy())
                names.append((animal, 4 + thing))
        batch = torch.from_numpy(np.stack(drawn)).view(16, -1, HEIGHT, HEIGHT, 3).permute(0, 4, 1, 2, 3) / 127.5 - 1
        generator = torch.Generator().manual_seed(seed + start)
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(batch).latent_dist.mode().float()
            level = noise * torch.rand(16, 1, 1, 1, 1, generator=generator)
            latents = latents + spread * level * torch.randn(latents.shape, generator=generator)
            decoded = vae.decode(latents).sample.float()
        frames.append(((decoded + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 4, 1).flatten(0, 1))
    result = {"frames": torch.cat(frames).contiguous(), "masks": torch.from_numpy(np.stack(masks)),
              "names": torch.tensor(names)}  # fmt: skip
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
        pictures.append(Picture(seen["frames"][index].numpy(), names, boxes_of(masks[visible]), masks[visible]))
    return pictures
