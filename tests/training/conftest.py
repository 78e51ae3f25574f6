"""A complete but tiny random Wan pipeline folder, and a store filled from it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from spatialalign.backbones.wan import WanBackbone
    from training.store import Store

WORDS = (
    "a an , . the is on left right top of to then cat dog fox box chair bench stone in at by sunny meadow quiet room "
    "walks runs trots moves over blurred static"
).split()


@pytest.fixture(scope="session")
def tiny_wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers ``WanPipeline`` folder: hidden 12, two blocks, text width 16, 16 latent channels, clips 5x32x32."""
    import json

    import torch
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder = tmp_path_factory.mktemp("models") / "tiny-wan"
    WanPipeline(
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        ),
        text_encoder=UMT5EncoderModel(
            UMT5Config(vocab_size=len(vocabulary), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ),
        vae=AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=WanTransformer3DModel(
            num_attention_heads=1,
            attention_head_dim=12,
            text_dim=16,
            freq_dim=16,
            ffn_dim=24,
            num_layers=2,
        ),
    ).save_pretrained(folder)
    settings = {"frames": 5, "height": 32, "width": 32, "steps": 3, "guidance": 4.0, "shift": 3.0, "fps": 8}
    (folder / "spatialalign.json").write_text(json.dumps({**settings, "negative_prompt": "blurred static"}))
    return folder


PROMPTS = {
    "0001_LR": "In a quiet room, a cat is on the left of a box, then the cat walks to the right of the box.",
    "0002_RL": "In a quiet room, a dog is on the right of a chair, then the dog runs to the left of the chair.",
    "0003_LT": "By a sunny meadow, a fox is on the left of a bench, then the fox runs to the top of the bench.",
}


@pytest.fixture(scope="session")
def backbone(tiny_wan: Path) -> WanBackbone:
    """The tiny pipeline; tests leave it without adapters."""
    from spatialalign.backbones import load_backbone

    return load_backbone(str(tiny_wan), device="cpu")


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    """Three prompts as a CSV file."""
    from spatialalign.prompts import Prompt, write_csv

    path = tmp_path / "prompts.csv"
    write_csv(path, [Prompt.parse(name, text) for name, text in PROMPTS.items()])
    return path


@pytest.fixture
def paired_store(tmp_path: Path, backbone: WanBackbone) -> Store:
    """A store with latents and text but no videos: prompts 1 to 3, seed 0 wins, seeds 1 and 2 lose; with pairs.json.

    The winners' latents have mean 0.5, the losers' -0.5, so that a preference can be learnt.
    """
    import torch

    from spatialalign.files import write_json
    from spatialalign.prompts import Prompt
    from training.pairs import PromptPairs, manifest
    from training.store import LatentsHeader, Store

    settings = backbone.default_settings()
    header = LatentsHeader(backbone.latent_space, backbone.model_id, settings.to_dict(), settings.digest)
    store = Store(tmp_path / "store", create=True)
    generator = torch.Generator().manual_seed(0)
    for name, text in PROMPTS.items():
        store.add_prompt(Prompt.parse(name, text))
        store.write_text(name, backbone.encode_text([text])[0], backbone.model_id)
        for seed in (0, 1, 2):
            noise = 0.1 * torch.randn(backbone.latent_shape(settings), generator=generator)
            store.sample(name, seed).write_latents(noise + (0.5 if seed == 0 else -0.5), header)
    write_json(store.root / "pairs.json", manifest([PromptPairs(name, (0,), (1, 2)) for name in PROMPTS], {}))
    return store
