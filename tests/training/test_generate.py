"""Generation into a store: complete, resumable, shared, and careful with what is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from spatialalign.backbones.wan import WanBackbone
from spatialalign.claims import try_claim
from spatialalign.errors import ConfigError, DataError, StoreError
from spatialalign.lora import LoraPair, write_pairs
from spatialalign.prompts import read_csv
from spatialalign.video import read_video
from training.generate import generate, main
from training.stages import parse_seeds
from training.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", create=True)


def test_every_prompt_and_seed_gets_a_clip(backbone: WanBackbone, store: Store, prompt_file: Path) -> None:
    settings = backbone.default_settings()
    prompts = read_csv(prompt_file)
    summary = generate(backbone, store, prompts, [0, 5], settings, batch=4)
    assert (summary.done, summary.skipped, summary.failed) == (6, 0, [])
    for sample in store.samples():
        assert sample.generated
        video = read_video(sample.video)
        assert video.frames.shape == (5, 32, 32, 3)
        assert video.fps == 8
        header = sample.read_header()
        assert (header.space, header.model) == (backbone.latent_space, backbone.model_id)
        assert header.settings["steps"] == 3

    text, (negative,) = backbone.encode_text([prompts[1].text]), backbone.encode_text([settings.negative_prompt])
    torch.testing.assert_close(store.read_text(prompts[1].prompt_id), text[0])
    alone = backbone.sample(text, negative, [5], settings)[0]
    torch.testing.assert_close(store.sample(prompts[1].prompt_id, 5).read_latents(), alone, atol=1e-4, rtol=1e-4)


def test_a_second_run_makes_only_what_is_missing(backbone: WanBackbone, store: Store, prompt_file: Path) -> None:
    prompts, settings = read_csv(prompt_file), backbone.default_settings()
    generate(backbone, store, prompts[:2], [0], settings)
    kept, redone, decoded = store.sample("0001_LR", 0), store.sample("0002_RL", 0), store.sample("0001_LR", 1)
    before, times = redone.latents.read_bytes(), kept.latents.stat().st_mtime_ns

    # killed between latents and video; and with latents cut short
    redone.video.unlink()
    redone.tracks.write_bytes(b"of the former video")
    summary = generate(backbone, store, prompts[:2], [0], settings)
    assert (summary.done, summary.skipped) == (1, 1)
    assert redone.latents.read_bytes() == before
    assert kept.latents.stat().st_mtime_ns == times

    redone.latents.write_bytes(before[: len(before) // 2])
    with pytest.raises(DataError, match="cannot be read"):
        redone.read_latents()
    generate(backbone, store, prompts[:2], [0, 1], settings)
    torch.testing.assert_close(redone.read_latents(), store.sample("0002_RL", 0).read_latents())
    assert redone.generated
    assert decoded.generated


def test_a_claimed_sample_is_left_to_its_owner(backbone: WanBackbone, store: Store, prompt_file: Path) -> None:
    sample = store.sample("0002_RL", 0)
    assert try_claim(sample.folder / ".claim-generate")
    summary = generate(backbone, store, read_csv(prompt_file), [0], backbone.default_settings())
    assert (summary.done, summary.busy) == (2, 1)
    assert not sample.latents.exists()


def test_a_clip_that_is_not_finite_is_a_failure_of_its_own(
    backbone: WanBackbone, store: Store, prompt_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = backbone.sample

    def poisoned(*args: object) -> torch.Tensor:
        latents = plain(*args)  # type: ignore[arg-type]
        latents[1] = float("nan")
        return latents

    monkeypatch.setattr(backbone, "sample", poisoned)
    summary = generate(backbone, store, read_csv(prompt_file), [0], backbone.default_settings())
    assert summary.done == 2
    assert [name for name, _ in summary.failed] == ["0002_RL/0"]
    assert "not finite" in summary.text()
    assert not store.sample("0002_RL", 0).latents.exists()
    log = [json.loads(line) for line in (store.root / "logs/generate.jsonl").read_text().splitlines()]
    assert [row["event"] for row in log] == ["start", "sample", "failed", "sample", "end"]


def test_other_settings_need_another_store(backbone: WanBackbone, store: Store, prompt_file: Path) -> None:
    from dataclasses import replace

    settings, prompts = backbone.default_settings(), read_csv(prompt_file)[:1]
    generate(backbone, store, prompts, [0], settings)
    before = store.sample("0001_LR", 0).latents.read_bytes()
    with pytest.raises(StoreError, match="steps 3 there, 2 now"):
        generate(backbone, store, prompts, [0, 1], replace(settings, steps=2))
    assert store.sample("0001_LR", 0).latents.read_bytes() == before


def test_the_program_samples_with_a_lora(tiny_wan: Path, prompt_file: Path, tmp_path: Path) -> None:
    module = "blocks.0.attn2.to_v"
    pair = {module: LoraPair(torch.randn(2, 12), torch.randn(12, 2))}
    write_pairs(pair, tmp_path / "lora.safetensors", tmp_path / "d.safetensors", {})
    common = ["--model", str(tiny_wan), "--prompts", str(prompt_file), "--seeds", "3", "--steps", "2"]
    common += ["--device", "cpu"]
    main([*common, "--store", str(tmp_path / "base")])
    main([*common, "--store", str(tmp_path / "lora"), "--lora", str(tmp_path / "lora.safetensors")])
    base, aligned = (Store(tmp_path / name).sample("0001_LR", 3) for name in ("base", "lora"))
    assert "+lora:" in aligned.read_header().model
    assert not torch.allclose(base.read_latents(), aligned.read_latents())


@pytest.mark.parametrize(("text", "expected"), [("0-2", [0, 1, 2]), ("7", [7]), ("0,3, 5-6", [0, 3, 5, 6])])
def test_seeds(text: str, expected: list[int]) -> None:
    assert parse_seeds(text) == expected


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,,2", "1,1", "-3"])
def test_odd_seeds_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="seeds"):
        parse_seeds(text)
