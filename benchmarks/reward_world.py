"""Clips whose quality, motion and text alignment are known, people who label them, and a tiny Qwen2-VL to judge them.

A square drifts over a grey floor. Noise spoils visual quality (VQ), jerks spoil motion quality (MQ), and a colour that
is mixed with another one spoils the alignment with its prompt (TA).
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spatialalign.video import write_video

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 70, 225),
}
SCENES = ("a grey floor", "a quiet floor", "the floor", "the ground", "a wide ground", "a plain")
TIES = (0.47, 0.59, 0.37)
"""Share of ties in VQ, MQ and TA: those of VideoGen-RewardBench (methods: 2.6, chance with ties)."""
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"),
    "<|video_pad|>",
)
TEMPLATE = "\nquality <|VQ_reward|> motion <|MQ_reward|> prompt {text_prompt} text <|TA_reward|>\n"
SIDE, FRAMES, FPS = 42, 8, 4.0
MAX_PIXELS = 800
"""Makes the network see 28 x 28 pixels: 2 x 2 tokens of 14 x 14."""
_SQUARE, _NOISE, _JERK = 18, 40.0, 10.0
_WORDS = "system user assistant You are a helpful . quality motion prompt text square on".split()


@dataclass(frozen=True)
class World:
    """Groups of clips of one prompt each; every two clips of a group are a pair.

    Attributes:
        groups, clips: how many groups, and clips in each.
        seed: of everything.
        disagreement: deviation of what a person sees from the truth, whose range is 1.
    """

    groups: int
    clips: int = 4
    seed: int = 0
    disagreement: float = 0.05


def render(colour: str, truth: Sequence[float], random: np.random.Generator) -> NDArray[np.uint8]:
    """A clip ``(8, 42, 42, 3)`` of a square with VQ, MQ and TA in [0, 1], 1 being flawless."""
    vq, mq, ta = truth
    other = random.choice([name for name in COLOURS if name != colour])
    paint = ta * np.array(COLOURS[colour]) + (1 - ta) * np.array(COLOURS[other])
    frames = np.full((FRAMES, SIDE, SIDE, 3), 110.0)
    way = np.linspace(4, SIDE - _SQUARE - 4, FRAMES)[:: random.choice((-1, 1))]
    top = random.uniform(6, SIDE - _SQUARE - 6)
    for frame, left in zip(frames, way, strict=True):
        # jerks of one length in random directions, so that a clip's steadiness is in all its frames
        angle = random.uniform(0, 2 * np.pi)
        x = int(np.clip(round(left + (1 - mq) * _JERK * np.cos(angle)), 0, SIDE - _SQUARE))
        y = int(np.clip(round(top + (1 - mq) * _JERK * np.sin(angle)), 0, SIDE - _SQUARE))
        frame[y : y + _SQUARE, x : x + _SQUARE] = paint
    frames += (1 - vq) * _NOISE * random.standard_normal(frames.shape)
    return np.asarray(np.clip(frames, 0, 255).round().astype(np.uint8))


def write_pairs(folder: Path, world: World) -> tuple[Path, NDArray[np.float64]]:
    """Render the clips that are missing and write ``pairs.csv``; returns it and the true differences ``(n, 3)``.

    People see each clip's truth with some error. They call a pair a tie where what they see differs little: by how much
    is such that the share of ties is ``TIES``. Their ratings are 1 + 4 times what they see, rounded.
    """
    random = np.random.default_rng([world.seed, 1])
    truth = random.random((world.groups, world.clips, 3))
    seen = truth + world.disagreement * random.standard_normal(truth.shape)
    first, second = np.triu_indices(world.clips, 1)
    gaps = seen[:, first] - seen[:, second]
    limits = [float(np.quantile(np.abs(gaps[..., index]), share)) for index, share in enumerate(TIES)]
    labels = np.where(np.abs(gaps) <= limits, "same", np.where(gaps > 0, "A", "B"))
    ratings = np.clip((1 + 4 * seen).round(), 1, 5).astype(int)
    names = list(COLOURS)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "pairs.csv").open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        dimensions = ("VQ", "MQ", "TA")
        marks = [f"MOS_{side}_{name}" for side in "AB" for name in dimensions]
        writer.writerow(["path_A", "path_B", "prompt", *dimensions, *marks])
        for group in range(world.groups):
            colour = names[group % len(names)]
            prompt = f"a {colour} square on {SCENES[group // len(names) % len(SCENES)]}"
            for clip in range(world.clips):
                path = folder / f"{group}-{clip}.mp4"
                if not path.is_file():
                    own = np.random.default_rng([world.seed, 2, group, clip])
                    write_video(path, render(colour, truth[group, clip], own), FPS)
            for pair, (a, b) in enumerate(zip(first, second, strict=True)):
                rated = [*ratings[group, a], *ratings[group, b]]
                writer.writerow([f"{group}-{a}.mp4", f"{group}-{b}.mp4", prompt, *labels[group, pair], *rated])
    return folder / "pairs.csv", (truth[:, first] - truth[:, second]).reshape(-1, 3)


def write_base(folder: Path, seed: int = 0) -> Path:
    """A Qwen2-VL with random weights, 64 wide, and a tokenizer of whole words; returns its folder."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration

    scenes = {word for scene in SCENES for word in scene.split()}
    words = [*SPECIAL, "<unk>", *dict.fromkeys([*_WORDS, *COLOURS, *sorted(scenes)])]
    tokens = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens.add_special_tokens(list(SPECIAL))
    PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token=SPECIAL[0], unk_token="<unk>").save_pretrained(folder)
    ids = {f"{name}_token_id": words.index(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    config = Qwen2VLConfig(
        text_config={
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": len(words) + 8,
            "rope_theta": 1e4,  # in the form of before transformers 5, which it still reads
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
            "initializer_range": 0.1,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "tie_word_embeddings": True,
        },
        vision_config={"depth": 1, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "patch_size": 7},
        image_token_id=words.index("<|image_pad|>"),
        video_token_id=words.index("<|video_pad|>"),
        tie_word_embeddings=True,
        **ids,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    return folder
