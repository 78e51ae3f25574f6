"""A pool of candidates, all finished and looked at before every step, so that any pruning of them is arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from spatialalign.files import read_json, write_json
from training.measure import TAU

if TYPE_CHECKING:
    from spatialalign.backbones.base import Backbone
    from spatialalign.prompts import Prompt
    from spatialalign.rewards.latent import LatentReward
    from spatialalign.tracking.tracker import Tracker

Floats = NDArray[np.float64]
Look = tuple[int, int]
"""After how many steps the candidates are looked at, 0 for their noise, and how many of them go on."""


@dataclass(frozen=True, eq=False)
class Pool:
    """Candidates of some prompts.

    Attributes:
        scores: the tracker's of the finished clips, ``(prompts, N)``; NaN where INVALID.
        looks: for each number of steps what the reward expected then, ``(prompts, N)``.
        steps: of a clip.
        price: of one look, in passes.
    """

    scores: Floats
    looks: dict[int, Floats]
    steps: int
    price: float

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Which candidates reach 0.7, ``(prompts, N)``."""
        return np.asarray(self.scores >= TAU)  # false for NaN


def fill(
    backbone: Backbone, tracker: Tracker, reward: LatentReward, prompts: Sequence[Prompt], seed: int, n: int, out: Path
) -> Pool:
    """Make what the folder lacks of the candidates of a seed, and read all of it."""
    for prompt in prompts:
        if not (out / f"{prompt.prompt_id}.json").is_file():
            write_json(out / f"{prompt.prompt_id}.json", _made(backbone, tracker, reward, prompt, seed, n))
    records = [read_json(out / f"{prompt.prompt_id}.json") for prompt in prompts]
    dsr = reward.dimensions.index("dsr")
    looks = {
        int(step): np.array([record["values"][step] for record in records])[..., dsr] for step in records[0]["values"]
    }
    scores = [[np.nan if score is None else score for score in record["scores"]] for record in records]
    return Pool(np.array(scores, dtype=np.float64), looks, backbone.default_settings().steps, reward.blocks_share)


def _made(
    backbone: Backbone, tracker: Tracker, reward: LatentReward, prompt: Prompt, seed: int, n: int
) -> dict[str, object]:
    """All candidates of one prompt: seeds, scores, and the reward's values by the number of steps done."""
    import torch

    from spatialalign.score import dsr_score
    from spatialalign.search import candidate_seed
    from spatialalign.video import read_video, write_video

    settings = backbone.default_settings()
    seeds = [candidate_seed(seed, index) for index in range(n)]
    text = backbone.encode_text([prompt.text]) * n
    values: dict[str, list[list[float]]] = {}
    with backbone.flow(text, text[0], settings) as flow, torch.no_grad():
        x, prepared = backbone.noise(seeds, settings), reward.prepare(text)
        for index in range(flow.steps):
            values[str(index)] = reward(x, torch.full((n,), flow.sigmas[index]), prepared).values.tolist()
            x, _ = flow.step(x, index)
    found = []
    with TemporaryDirectory() as folder:
        for clip in x:
            video = Path(folder) / "clip.mp4"
            write_video(video, backbone.decode(clip[None], [prompt.prompt_id])[0], backbone.fps)
            read = read_video(video)
            found.append(
                dsr_score(tracker.track(read.frames, prompt.dsr.subject, prompt.dsr.object, read.fps), prompt.dsr)
            )
    robust = [None if one.robust is None else one.robust.score for one in found]
    return {"seeds": seeds, "scores": [one.score for one in found], "robust": robust, "values": values}


def prune(pool: Pool, looks: Sequence[Look], stop: bool = False) -> tuple[Floats, Floats]:
    """What pruning would have found, and its passes over those of all candidates, both ``(prompts,)``.

    Args:
        pool: the candidates.
        looks: in the order of their steps.
        stop: whether the survivors, which are finished in the order of the last look, stop at the first correct one.

    Returns:
        1 for a prompt with a correct survivor, else 0; and the cost.
    """
    count = pool.scores.shape[1]
    order = np.tile(np.arange(count), (len(pool.scores), 1))
    passes: float = 0.0
    done = 0
    for step, kept in looks:
        passes += order.shape[1] * (step - done + pool.price)
        expected = np.take_along_axis(pool.looks[step], order, 1)
        best = np.argsort(-expected, 1, kind="stable")[:, :kept]
        order, done = np.take_along_axis(order, best, 1), step
    correct = np.take_along_axis(pool.correct, order, 1)
    hit = correct.any(1)
    finished = np.where(hit & stop, correct.argmax(1) + 1, order.shape[1])
    cost: Floats = np.asarray((passes + finished * (pool.steps - done)) / (count * pool.steps), dtype=np.float64)
    found: Floats = np.asarray(hit, dtype=np.float64)
    return found, cost
