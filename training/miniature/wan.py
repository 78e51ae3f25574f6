"""Stage 3: the video transformer (``WanTransformer3DModel``), imperfect on purpose: see ``latents.py``."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor
from transformers import AutoTokenizer, UMT5EncoderModel

from spatialalign.backbones.padding import collapse_padding, cross_attention_bias
from spatialalign.miniature import FPS, FRAMES, HEIGHT, WIDTH
from spatialalign.miniature.world import TYPES, prompts
from training.miniature.latents import encoded_clips
from training.miniature.loop import Loop

SHIFT = 3.0
RELABELLED = 0.35
"""Share of clips that get the caption of any type at the end of training: what is left to be repaired."""


@torch.no_grad()
def encode_captions(folder: Path, captions: list[str]) -> list[Tensor]:
    """Text embeddings ``(n_i, 4096)`` without padding."""
    encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval()
    words = AutoTokenizer.from_pretrained(folder / "tokenizer")
    return [encoder(**words(text, return_tensors="pt")).last_hidden_state[0] for text in captions]


def build(folder: Path, work: Path, seed: int = 2, steps: int = 8000, batch: int = 48) -> None:
    """Train and write ``folder/transformer``, the scheduler, ``model_index.json`` and ``spatialalign.json``."""
    torch.manual_seed(seed)
    latents, jobs = encoded_clips(folder, work)
    text = encode_captions(folder, [p.text for p in prompts("train")] + [""])
    model = WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=128, in_channels=16, out_channels=16, text_dim=4096, freq_dim=256,
        ffn_dim=512, num_layers=6, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=64,
    )  # fmt: skip

    words, bias = collapse_padding(text)
    numbers = torch.tensor([number for number, _ in jobs])
    fast = torch.compile(model)

    def step(number: int, relabelled: float) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(seed * 1_000_003 + number + (500_000 if relabelled else 0))
        pick = torch.randint(len(latents), (batch,), generator=draw)
        clean = latents[pick].float()
        noise = torch.randn(clean.shape, generator=draw)
        u = torch.rand(batch, generator=draw)
        sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
        drop = torch.rand(batch, generator=draw) < 0.1
        caption = numbers[pick]
        other = caption // len(TYPES) * len(TYPES) + torch.randint(len(TYPES), (batch,), generator=draw)
        caption = torch.where(torch.rand(batch, generator=draw) < relabelled, other, caption)
        caption = torch.where(drop, len(text) - 1, caption)
        level = sigma.view(-1, 1, 1, 1, 1)
        with torch.autocast("cpu", torch.bfloat16), cross_attention_bias(model, bias[caption]):
            noised = (1 - level) * clean + level * noise
            velocity = fast(noised, sigma * 1000, words[caption], return_dict=False)[0]
        error = (velocity.float() - (noise - clean)).square().mean((1, 2, 3, 4))
        return {"loss": error.mean(), "high": error[sigma > 0.8].mean(), "low": error[sigma < 0.4].mean()}

    base = Loop("wan", work, model, steps, lr=1e-3, warmup=200, decay=0.6, ema=0.999, weight_decay=0.02, fan_in=256)
    base.run(lambda number: step(number, 0.0))
    spoil = Loop(
        "wan-relabelled", work, model, 500, lr=4e-4, warmup=20, decay=0.5, ema=0.99, weight_decay=0.02, fan_in=256
    )
    spoil.run(lambda number: step(number, RELABELLED))
    model.eval()
    pipeline = WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float16),
        vae=AutoencoderKLWan.from_pretrained(folder / "vae"),
        transformer=model,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
    )
    pipeline.save_pretrained(folder)
    # diffusers notes where a part was loaded from; a shipped folder should not name a path of this machine.
    config = json.loads((folder / "vae/config.json").read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    (folder / "vae/config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    # the class's name of transformers 5 is unknown to 4, which would also add a row that the encoder does not take
    file = folder / "tokenizer/tokenizer_config.json"
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    config = json.loads(file.read_text(encoding="utf-8")) | named
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    settings = {"frames": FRAMES, "height": HEIGHT, "width": WIDTH, "fps": FPS, "steps": 16, "guidance": 1.0,
                "shift": SHIFT, "negative_prompt": ""}  # fmt: skip
    (folder / "spatialalign.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
