"""Stage 3: more training for the autoencoder's decoder alone, on latents that stay as they are.

The transformer learns those same latents, so it can be trained at the same time.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from training.miniature.latents import denormalise, encoded_clips, frames_of
from training.miniature.loop import Loop
from training.miniature.vae import reconstruction

DONE = "decoder-trained"
"""Empty file beside the autoencoder that says that this stage is through."""


def build(folder: Path, work: Path, seed: int = 6, steps: int = 1200, batch: int = 2) -> None:
    """Train the decoder of ``folder/vae`` and write the autoencoder back."""
    torch.manual_seed(seed)
    latents, jobs = encoded_clips(folder, work)
    vae = AutoencoderKLWan.from_pretrained(folder / "vae")
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)

    def step(number: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((seed, number))
        pick = rng.integers(0, len(latents), batch)
        target = torch.from_numpy(np.stack([frames_of(jobs[i]) for i in pick])).permute(0, 4, 1, 2, 3) / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16):
            again = vae.decode(denormalise(vae, latents[pick].float())).sample.float()
        return reconstruction(again, target)

    Loop("decoder", work, vae, steps, lr=1e-3, warmup=50, decay=0.8, ema=0.99, save_every=100).run(step)
    vae.eval().save_pretrained(folder / "vae")
    (work / DONE).touch()
