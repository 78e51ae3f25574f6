"""A LoRA in words: counts and warnings must be those of the file."""

from __future__ import annotations

import json

import pytest
import torch

from spatialalign.lora import Fitted, LoraPair
from spatialalign.lora_report import base_model, describe, differing, layers, scores_in_words, warnings

PAIR = LoraPair(torch.zeros(4, 12), torch.zeros(12, 4))
TEXT = "condition_embedder.text_embedder.linear_1"
CROSS = [f"blocks.{block}.attn2.to_{part}" for block in range(30) for part in "vk"]


SCORES = {
    "prompts": 96,
    "seeds": [1000, 1001, 1002],
    "strength": 1.0,
    "base": {"correct_at_0.7": 0.333, "invalid_rate": 0.125, "mean_score": None},
    "aligned": {"correct_at_0.7": 0.778, "invalid_rate": 0.09, "mean_score": 0.812},
}


def fitted(modules: list[str], unmatched: tuple[str, ...] = (), **notes: object) -> Fitted:
    """Pairs of rank 4 on these modules, with notes as this project writes them."""
    return Fitted(dict.fromkeys(modules, PAIR), unmatched, {"spatialalign": json.dumps(notes)} if notes else {})


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        ([TEXT, *CROSS], "cross-attention k, v in 30 blocks; text embedding"),
        (["blocks.3.attn1.to_out.0"], "self-attention o in 1 block"),
        (["blocks.0.ffn.net.0.proj", "blocks.1.ffn.net.2"], "feed-forward in 2 blocks"),
        (["blocks.0.attn2.add_k_proj", "proj_out"], "cross-attention k_img in 1 block; head"),
        (["condition_embedder.time_proj"], "time embedding"),
        (
            [
                "caption_projection.linear_1",
                *(f"transformer_blocks.{block}.attn2.to_{part}" for block in (0, 11) for part in "kv"),
            ],
            "cross-attention k, v in 2 blocks; text embedding",
        ),
        (
            ["transformer_blocks.3.attn1.to_out.0", "transformer_blocks.3.ff.net.0.proj"],
            "self-attention out in 1 block; feed-forward in 1 block",
        ),
    ],
)
def test_layers_are_named_by_kind(modules: list[str], words: str) -> None:
    assert layers(modules) == words


def test_the_report_says_what_the_file_states() -> None:
    notes = {"method": "SpatialAlign dpo+zo", "base_model": "miniature", "step": 200, "beta": 50.0, "pairs": 12}
    notes |= {"scores": SCORES}
    text = describe(fitted([TEXT, *CROSS], **notes), 0.5)
    assert text.splitlines() == [
        "Matched 61 of 61 pairs, rank 4: cross-attention k, v in 30 blocks; text embedding",
        "For the base model miniature",
        "Trained with SpatialAlign dpo+zo, 200 steps, 12 pairs, beta 50.0",
        "Scores, base → aligned: Correct@0.7 33.3% → 77.8%, INVALID 12.5% → 9.0%, mean score – → 0.812 (96 prompts, 3 "
        "clips each)",
        "Strength 0.5",
    ]


def test_scores_of_another_strength_or_form() -> None:
    assert scores_in_words({"scores": {**SCORES, "strength": 0.5}}).endswith(
        "0.812 at strength 0.5 (96 prompts, 3 clips each)"
    )
    for odd in ({}, {"scores": None}, {"scores": {"before": 0.4}}, {"scores": {**SCORES, "base": 0.3}}):
        assert scores_in_words(odd) == ""


def test_a_strangers_file_is_said_to_say_little() -> None:
    text = describe(fitted([TEXT]), 0.0)
    assert "not stated in the file" in text
    assert "How it was trained is not stated" in text
    assert "Strength 0: the model is handed on unchanged" in text
    assert base_model(Fitted({}, (), {"modelspec.architecture": "wan2.1/lora"})) == "wan2.1/lora"


def test_a_part_that_does_not_fit_is_a_warning() -> None:
    beyond = ("blocks.30.cross_attn.k.lora_A.weight", "blocks.30.cross_attn.k.lora_B.weight")
    lora = fitted([TEXT], beyond)
    assert "Matched 1 of 2 pairs" in describe(lora, 1)
    assert "WARNING: 1 of 2 pairs fit no layer of this model (e.g. blocks.30.cross_attn.k" in describe(lora, 1)
    (words,) = warnings(fitted([TEXT], ("blocks.0.norm3.diff_b",)))
    assert "1 keys are no A and B matrices (e.g. blocks.0.norm3.diff_b)" in words
    assert warnings(fitted([TEXT])) == []


@pytest.mark.parametrize(
    ("base", "model", "differences"),
    [
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "wan2.1_t2v_1.3B_fp16.safetensors", []),
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", "Wan2_1-T2V-14B_fp8_e4m3fn.safetensors", []),
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", ["version"]),
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", "wan2.1_i2v_480p_14B_fp16.safetensors", ["task"]),
        ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", "wan2.2_ti2v_5B_fp16.safetensors", ["task", "size"]),
        ("miniature", "wan2.1_t2v_1.3B_fp16.safetensors", []),
        ("wan2.1/lora", "my_finetune.safetensors", []),
    ],
)
def test_another_model_of_the_same_size_is_told_by_its_name(base: str, model: str, differences: list[str]) -> None:
    assert differing(base, model) == differences
    found = warnings(fitted([TEXT], base_model=base), model)
    assert [f"another {', '.join(differences)}" in words for words in found] == ([True] if differences else [])
