"""Tiny VideoReward checkpoints with the names and files of the released one, written without the loader's help."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"),
    *("<|video_pad|>", "<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"),
)
TEMPLATE = "\nA <|VQ_reward|> B <|MQ_reward|>\nC: {text_prompt} <|TA_reward|>\n"
SECTIONS = {
    "data_config": {
        "meta_data": "somewhere.csv",
        "data_dir": "somewhere",
        "max_frame_pixels": 56 * 56,
        "num_frames": None,
        "fps": 2.0,
        "eval_dim": ["VQ", "MQ", "TA"],
        "prompt_template_type": "detailed_special",
        "sample_type": "uniform",
        "use_tied_data": True,
    },
    "training_args": {"max_length": 6144, "bf16": True},
    "model_config": {
        "model_name_or_path": "Qwen/Qwen2-VL-2B-Instruct",
        "output_dim": 1,
        "use_special_tokens": True,
        "reward_token": "special",
        "loss_type": "btt",
        "torch_dtype": "bfloat16",
    },
    "peft_lora_config": {
        "lora_enable": True,
        "vision_lora": False,
        "lora_r": 4,
        "lora_alpha": 12,
        "lora_dropout": 0.05,
        "lora_namespan_exclude": ["lm_head", "rm_head", "embed_tokens", "visual"],
        "num_lora_modules": -1,
        "use_rslora": False,
    },
    "inference_config": {
        "VQ_mean": 3.6757,
        "VQ_std": 2.2476,
        "MQ_mean": 1.1646,
        "MQ_std": 1.3811,
        "TA_mean": 2.8105,
        "TA_std": 2.5121,
    },
}


@dataclass(frozen=True)
class Sizes:
    """Of a Qwen2-VL: text width, inner width, layers, width of keys, vision width and blocks, rows, rank, head rows."""

    width: int = 32
    inner: int = 48
    layers: int = 2
    keys: int = 16
    vision: int = 32
    blocks: int = 2
    rows: int = 256 + len(SPECIAL)
    rank: int = 4
    outputs: int = 1


def base_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Tensors of the base model, by the names of the hub's files."""
    w, v = sizes.width, sizes.vision
    shapes: dict[str, tuple[int, ...]] = {"visual.patch_embed.proj.weight": (v, 3, 2, 14, 14)}
    for block in range(sizes.blocks):
        for name, out, ins in (
            *(("attn.qkv", 3 * v, v), ("attn.proj", v, v)),
            *(("mlp.fc1", 4 * v, v), ("mlp.fc2", v, 4 * v)),
        ):
            shapes |= {f"visual.blocks.{block}.{name}.weight": (out, ins), f"visual.blocks.{block}.{name}.bias": (out,)}
        for norm in ("norm1", "norm2"):
            shapes |= {f"visual.blocks.{block}.{norm}.{leaf}": (v,) for leaf in ("weight", "bias")}
    shapes |= {"visual.merger.ln_q.weight": (v,), "visual.merger.ln_q.bias": (v,)}
    shapes |= {"visual.merger.mlp.0.weight": (4 * v, 4 * v), "visual.merger.mlp.0.bias": (4 * v,)}
    shapes |= {"visual.merger.mlp.2.weight": (w, 4 * v), "visual.merger.mlp.2.bias": (w,)}
    shapes["model.embed_tokens.weight"] = (sizes.rows, w)
    for layer in range(sizes.layers):
        for name, (out, ins) in linears(sizes).items():
            shapes[f"model.layers.{layer}.{name}.weight"] = (out, ins)
        for name, out in (("q", w), ("k", sizes.keys), ("v", sizes.keys)):
            shapes[f"model.layers.{layer}.self_attn.{name}_proj.bias"] = (out,)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{norm}.weight"] = (w,)
    return shapes | {"model.norm.weight": (w,), "lm_head.weight": (sizes.rows, w)}


def linears(sizes: Sizes) -> dict[str, tuple[int, int]]:
    """The layers with adapters in one layer of the language model: output and input width."""
    w, i, k = sizes.width, sizes.inner, sizes.keys
    attention = {"q": (w, w), "k": (k, w), "v": (k, w), "o": (w, w)}
    mlp = {"gate": (i, w), "up": (i, w), "down": (w, i)}
    return {f"self_attn.{name}_proj": shape for name, shape in attention.items()} | {
        f"mlp.{name}_proj": shape for name, shape in mlp.items()
    }


def adapter_shapes(sizes: Sizes, infix: str = "") -> dict[str, tuple[int, ...]]:
    """The adapters, by the names of ``adapter_model.safetensors`` (or with ``default.`` inside)."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(sizes.layers):
        for name, (out, ins) in linears(sizes).items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            shapes[f"{module}.lora_A.{infix}weight"] = (sizes.rank, ins)
            shapes[f"{module}.lora_B.{infix}weight"] = (out, sizes.rank)
    return shapes


def with_prefix(name: str) -> str:
    """A base model's name as ``model.pth`` has it."""
    if "_proj." in name and name.startswith("model."):
        module, _, leaf = name.rpartition(".")
        name = f"{module}.base_layer.{leaf}"
    return f"base_model.model.{name}"


def full_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """All of ``model.pth``."""
    stored = {with_prefix(name): shape for name, shape in base_shapes(sizes).items()}
    head = {"base_model.model.rm_head.weight": (sizes.outputs, sizes.width)}
    return stored | head | adapter_shapes(sizes, "default.")


def random(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Noise in bfloat16, large enough that everything matters; around 1 where a norm multiplies."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        noise = 0.2 * torch.randn(shape, generator=generator)
        norm = "norm" in name or "ln_q" in name
        tensors[name] = (noise + 1 if norm and name.endswith("weight") else noise).bfloat16()
    return tensors


def tokenizer() -> Any:
    """Single bytes, and the special tokens behind them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokens = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens.decoder = decoders.ByteLevel()
    tokens.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<|endoftext|>", model_input_names=["input_ids", "attention_mask"]
    )


def base_config() -> dict[str, Any]:
    """``config.json`` of the base model, flat as the hub's."""
    sizes = Sizes()
    return {
        "model_type": "qwen2_vl",
        "hidden_size": sizes.width,
        "intermediate_size": sizes.inner,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": sizes.rows + 14,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "bos_token_id": 256,
        "eos_token_id": 258,
        "vision_start_token_id": 259,
        "vision_end_token_id": 260,
        "image_token_id": 261,
        "video_token_id": 262,
        "tie_word_embeddings": True,
        "vision_config": {"depth": sizes.blocks, "embed_dim": 32, "hidden_size": 32, "num_heads": 2},
    }


Write = Callable[..., Path]


@pytest.fixture
def video_reward_folder(tmp_path: Path) -> Write:
    """``write(full=True, outputs=1, change=None, sections=None)`` makes a checkpoint, with the base beside it.

    Both layouts hold the same weights. ``change`` edits the tensors of ``model.pth``; ``sections`` replaces sections.
    """

    def write(full: bool = True, outputs: int = 1, change: Any = None, sections: dict[str, Any] | None = None) -> Path:
        from safetensors.torch import save_file

        sizes = Sizes(outputs=outputs)
        root = tmp_path / f"reward-{full}-{outputs}"
        step, base = root / "checkpoint-10", tmp_path / "base"
        (root / "checkpoint-9").mkdir(parents=True)
        tensors = random(full_shapes(sizes), 1)
        tensors["base_model.model.lm_head.weight"] = tensors["base_model.model.model.embed_tokens.weight"].clone()
        if change is not None:
            change(tensors)
        tokenizer().save_pretrained(step / "tokenizer")
        content = json.loads(json.dumps({**SECTIONS, **(sections or {})}))
        content["model_config"] |= {"output_dim": outputs, "model_name_or_path": str(base)}
        (root / "model_config.json").write_text(json.dumps(content))
        (root / "prompt_template.txt").write_text(TEMPLATE)
        base.mkdir(exist_ok=True)
        (base / "config.json").write_text(json.dumps(base_config()))
        if full:
            torch.save(tensors, step / "model.pth")
            return root
        trained = {n: t for n, t in tensors.items() if any(p in n for p in ("visual.", "rm_head", "embed_tokens"))}
        torch.save(trained, step / "non_lora_state_dict.pth")
        lora = {n.replace(".default.", "."): t for n, t in tensors.items() if "lora_" in n}
        save_file(lora, step / "adapter_model.safetensors")
        untrained = {name: tensors[with_prefix(name)] for name in base_shapes(sizes) if name != "lm_head.weight"}
        # a base model that was not trained: other embeddings, and rows of padding
        untrained["model.embed_tokens.weight"] = torch.zeros(sizes.rows + 14, sizes.width, dtype=torch.bfloat16)
        save_file(untrained, base / "model.safetensors")
        return root

    return write


@pytest.fixture(scope="session")
def released_shapes() -> Callable[..., dict[str, tuple[int, ...]]]:
    """``released_shapes(**sizes)``: every tensor of a ``model.pth`` of these :class:`Sizes`."""
    return lambda **sizes: full_shapes(Sizes(**sizes))
