"""Shared by all tests: the processor only, no network, few threads, and the folders that may or may not be there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# Before anything imports torch or transformers.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
from hypothesis import settings

# Two shared cores: a slow moment is no failure, and a failure found once is to be found again.
settings.register_profile("spatialalign", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("spatialalign")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the official prompt sets and real clips that lies beside a checkout; skips where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder} with the official prompts and clips")
    return folder


@pytest.fixture(scope="session")
def miniature_weights() -> Path:
    """The shipped weights of the miniature; skips where they have not been built (python -m training.miniature)."""
    folder = ROOT / "spatialalign" / "miniature" / "weights"
    parts = ("wan/model_index.json", "detector/config.json", "segmenter/config.json")
    missing = [part for part in parts if not (folder / part).is_file()]
    if missing:
        pytest.skip(f"the miniature's weights lack {', '.join(missing)}: build them with python -m training.miniature")
    return folder


def _text_parts(encoder: str) -> dict[str, Any]:
    """A word tokenizer and a random text encoder of width 16, "t5" or "umt5"."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    words = "<pad> </s> <unk> a an , . the is on left right top of to then cat dog fox box chair bench in at by blurred"
    vocabulary = {word: index for index, word in enumerate(words.split())}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    sizes = {"vocab_size": len(vocabulary), "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return {
        "tokenizer": PreTrainedTokenizerFast(
            tokenizer_object=tokens, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        ),
        "text_encoder": T5EncoderModel(T5Config(**sizes)) if encoder == "t5" else UMT5EncoderModel(UMT5Config(**sizes)),
    }


def _settings_file(folder: Path, **settings: object) -> Path:
    import json

    (folder / "spatialalign.json").write_text(json.dumps({**settings, "negative_prompt": "blurred"}))
    return folder


def _wan_transformer(channels: int) -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=channels,
        out_channels=channels,
        text_dim=16,
        freq_dim=16,
        ffn_dim=24,
        num_layers=2,
    )


@pytest.fixture(scope="session")
def tiny_a14b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wan 2.2 A14B folder: two random transformers, boundary 0.875, clips 5x32x32, three steps with shift 12."""
    import torch
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("models") / "a14b"
    WanPipeline(
        **_text_parts("umt5"),
        vae=AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=12.0),
        transformer=_wan_transformer(16),
        transformer_2=_wan_transformer(16),
        boundary_ratio=0.875,
    ).save_pretrained(folder)
    sizes = {"frames": 5, "height": 32, "width": 32, "fps": 8}
    return _settings_file(folder, **sizes, steps=3, guidance=4.0, guidance_2=3.0, shift=12.0)


@pytest.fixture(scope="session")
def tiny_ti2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wan 2.2 TI2V-5B folder: 48 latent channels, 16 pixels a latent, a timestep for each token; clips 5x64x64."""
    import torch
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline

    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("models") / "ti2v"
    vae = AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=48,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=torch.linspace(-0.5, 0.5, 48).tolist(),
        latents_std=torch.linspace(0.5, 1.5, 48).tolist(),
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
    )
    WanPipeline(
        **_text_parts("umt5"),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        transformer=_wan_transformer(48),
        expand_timesteps=True,
    ).save_pretrained(folder)
    return _settings_file(folder, frames=5, height=64, width=64, steps=3, guidance=4.0, shift=5.0, fps=8)


@pytest.fixture(scope="session")
def tiny_ltx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An LTX-Video folder: 8 latent channels, a latent of 8 frames and 32 x 32 pixels; clips 9x64x64."""
    import torch
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )

    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("models") / "ltx"
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )
    vae.latents_mean.copy_(torch.linspace(-0.5, 0.5, 8))
    vae.latents_std.copy_(torch.linspace(0.5, 1.5, 8))
    LTXPipeline(
        **_text_parts("t5"),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        transformer=LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=12,
            cross_attention_dim=24,
            num_layers=2,
            caption_channels=16,
        ),
    ).save_pretrained(folder)
    return _settings_file(folder, frames=9, height=64, width=64, steps=3, guidance=4.0, shift=5.0, fps=8)


@pytest.fixture(scope="session")
def tiny_vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA folder taught (seconds) to answer whether something is on the left or right in 1 or 3 pictures.

    A red picture shows it on the left, a blue one on the right; of a grey one it says "maybe".
    """
    import numpy as np
    import torch
    from PIL import Image
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    from spatialalign.dsr import DSR, Relation
    from spatialalign.rewards.vlm_judge import question

    words = "<pad> <s> </s> <unk> <image> yes no maybe left right".split()
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special: dict[str, Any] = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    special["model_input_names"] = ["input_ids", "attention_mask"]
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
        PreTrainedTokenizerFast(tokenizer_object=tokens, extra_special_tokens={"image_token": "<image>"}, **special),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{% for m in messages %}{% for c in m['content'] %}"
        "{{ '<image> ' if c['type'] == 'image' else c['text'] + ' ' }}{% endfor %}{% endfor %}<s>",
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "initializer_range": 0.15}
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**sizes, num_hidden_layers=1, image_size=8, patch_size=4),
            text_config=LlamaConfig(
                **{**sizes, "hidden_size": 32}, num_hidden_layers=2, vocab_size=len(words), max_position_embeddings=64
            ),
            image_token_index=words.index("<image>"),
            vision_feature_layer=-1,
            image_seq_length=4,
        )
    )
    model.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    colours = {Relation.LEFT: (250, 30, 30), Relation.RIGHT: (30, 30, 250), None: (110, 110, 110)}
    dsr = DSR("cat", "box", Relation.LEFT, Relation.RIGHT, "In a room", "walks")
    cases = [(shown, asked) for shown in colours for asked in (Relation.LEFT, Relation.RIGHT)]
    answers = torch.tensor([["yes no maybe".split().index(_answer(*case)) + 5, 2] for case in cases])
    batches = []
    for frames in (1, 3):
        chats = []
        for shown, asked in cases:
            picture = Image.fromarray(np.full((16, 16, 3), colours[shown], np.uint8))
            text = {"type": "text", "text": question(dsr, asked, frames)}
            chats.append([{"role": "user", "content": [*[{"type": "image", "image": picture}] * frames, text]}])
        batches.append(
            processor.apply_chat_template(
                chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        )
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(120):
        batch = batches[step % 2]
        ids = torch.cat([batch["input_ids"], answers[:, :1]], dim=1)
        logits = model(input_ids=ids, pixel_values=batch["pixel_values"]).logits[:, -2:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    folder = tmp_path_factory.mktemp("models") / "tiny-vlm"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _answer(shown: object, asked: object) -> str:
    return "maybe" if shown is None else "yes" if shown is asked else "no"
