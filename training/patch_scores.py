"""Scores of space-time blocks of clips, from a teacher or a patch reward: ``python -m training.patch_scores``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from spatialalign.blocks import BlockGrid, crops
from spatialalign.errors import ConfigError, DataError
from spatialalign.files import atomic_path
from spatialalign.rewards.vlm_blocks import Teacher
from training.cli import command
from training.store import Sample, Store

if TYPE_CHECKING:
    from spatialalign.rewards.patch import PatchReward

Clip = tuple[str, int]
"""A clip: prompt id and seed."""

FORMAT = "spatialalign-patches-1"


@dataclass(frozen=True, eq=False)
class PatchScores:
    """Scores of the blocks of clips.

    Attributes:
        grid: of the blocks.
        source: who scored them.
        values: ``(F, R, C)`` float32 by clip, larger being better; NaN for unknown.
    """

    grid: BlockGrid
    source: str
    values: Mapping[Clip, NDArray[np.float32]]

    def __post_init__(self) -> None:
        for (prompt_id, seed), value in self.values.items():
            if value.shape != self.grid.shape or np.isinf(value).any():
                raise DataError(
                    f"the block scores of clip {prompt_id}/{seed} must be finite or NaN, {self.grid} of them; found "
                    f"shape {value.shape}"
                )

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that change with any score."""
        digest = hashlib.sha256(f"{self.grid} {self.source}".encode())
        for clip in sorted(self.values):
            digest.update(repr(clip).encode() + np.ascontiguousarray(self.values[clip]).tobytes())
        return digest.hexdigest()[:16]

    def of(self, prompt_id: str, seed: int) -> NDArray[np.float32]:
        """The scores of a clip; raises :class:`DataError` naming one that has none."""
        if (prompt_id, seed) not in self.values:
            raise DataError(
                f"clip {prompt_id}/{seed} has no block scores of {self.source}; run training.patch_scores again"
            )
        return self.values[prompt_id, seed]


def write_patches(path: Path, scores: PatchScores) -> None:
    """Write a file of block scores atomically: one tensor for each clip, named ``<prompt_id>/<seed>``."""
    from safetensors.numpy import save_file

    tensors = {f"{name}/{seed}": np.ascontiguousarray(value) for (name, seed), value in scores.values.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"format": FORMAT, "grid": str(scores.grid), "source": scores.source})


def read_patches(path: Path) -> PatchScores:
    """Read a file of block scores; raises :class:`DataError` naming it when it cannot be used."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise DataError(f"{path} does not exist; write it with python -m training.patch_scores")
    values: dict[Clip, NDArray[np.float32]] = {}
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise DataError(f"{path} holds no block scores ({FORMAT}); write it with training.patch_scores")
            for name in file.keys():
                prompt_id, _, seed = name.rpartition("/")
                values[prompt_id, int(seed)] = file.get_tensor(name).astype(np.float32)
        return PatchScores(BlockGrid.parse(metadata["grid"]), metadata["source"], values)
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise DataError(f"{path} is a damaged file of block scores ({error}); write it again") from error


def teach(store: Store, samples: Sequence[Sample], grid: BlockGrid, teacher: Teacher, source: str) -> PatchScores:
    """Ask a teacher about every block of the samples' videos."""
    from spatialalign.video import read_video

    prompts = {prompt.prompt_id: prompt.text for prompt in store.prompts()}
    values = {}
    for sample in samples:
        pixels = crops(read_video(sample.video).frames, grid, sample.read_latents().shape[1])
        found = [teacher(crop, prompts[sample.prompt_id]) for crop in pixels]
        values[sample.prompt_id, sample.seed] = np.array(found, dtype=np.float32).reshape(grid.shape)
    return PatchScores(grid, source, values)


def judge_blocks(
    store: Store, samples: Sequence[Sample], reward: PatchReward, source: str, batch: int = 16
) -> PatchScores:
    """Score the samples' blocks by a patch reward, from latents and cached texts.

    Raises:
        ModelError: it reads another latent space.
    """
    import torch

    from spatialalign.rewards.patch import check_fits

    values: dict[Clip, NDArray[np.float32]] = {}
    with torch.no_grad():
        for start in range(0, len(samples), batch):
            some = samples[start : start + batch]
            for sample in some:
                check_fits(reward, sample.read_header().space)
            device = reward.trunk.patch_embedding.weight.device
            latents = torch.stack([sample.read_latents() for sample in some]).to(device)
            found = reward(latents, [store.read_text(sample.prompt_id) for sample in some]).blocks.cpu().numpy()
            values |= {(s.prompt_id, s.seed): row for s, row in zip(some, found, strict=True)}
    return PatchScores(reward.grid, source, values)


@dataclass(frozen=True)
class ScorePatches:
    """Score the space-time blocks of every clip of a store by a patch reward, or by a vision-language model."""

    store: Path
    """Sample store with latents, and videos for a judge or cached texts for a reward."""
    out: Path
    """Safetensors file of the block scores."""
    reward: Path | None = None
    """Patch reward of training.patch_reward."""
    judge: str | None = None
    """Folder or hub id of a vision-language model that chats about pictures: a teacher for training.patch_reward."""
    grid: str = "1x2x2"
    """Blocks along time, height and width that a judge is asked about; a reward has its own."""
    batch: int = 16
    """Clips at once, for a reward."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""


def run(args: ScorePatches) -> PatchScores:
    """Score every sample and write the file."""
    if (args.reward is None) == (args.judge is None):
        raise ConfigError(f"give either reward or judge, found {args.reward} and {args.judge}")
    if args.batch < 1:
        raise ConfigError(f"batch must be at least 1, found {args.batch}")
    store = Store(args.store)
    samples = [sample for sample in store.samples() if sample.generated]
    if not samples:
        raise DataError(f"{args.store} holds no clip with latents and video; run training.generate")

    from spatialalign.backbones.loading import pick_device

    device = pick_device(args.device)
    if args.reward is not None:
        from spatialalign.rewards.patch import load_patch_reward

        reward = load_patch_reward(args.reward, device)
        scores = judge_blocks(store, samples, reward, args.reward.name, args.batch)
    else:
        from spatialalign.rewards.vlm_blocks import vlm_teacher
        from spatialalign.rewards.vlm_judge import VlmJudge

        judge = VlmJudge.from_pretrained(str(args.judge), device)
        scores = teach(store, samples, BlockGrid.parse(args.grid), vlm_teacher(judge), judge.name)
    write_patches(args.out, scores)
    print(f"{args.out}: {scores.grid} blocks of {len(scores.values)} clips, by {scores.source}")
    return scores


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m training.patch_scores``."""
    command(ScorePatches, run, argv)


if __name__ == "__main__":
    main()
