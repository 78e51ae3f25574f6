"""DPO on every backbone besides Wan 2.1: a few steps, stopped and continued, exported and verified."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from spatialalign.backbones import load_backbone
from spatialalign.backbones.base import Backbone, ExpertName
from spatialalign.errors import ConfigError, LoraError
from spatialalign.files import write_json
from spatialalign.lora import adapter_metadata
from spatialalign.prompts import Prompt
from training.config import TrainSettings
from training.dpo import train
from training.draws import draw
from training.generate import put_lora
from training.pairs import PromptPairs, manifest
from training.store import LatentsHeader, Store

SETTINGS = TrainSettings(
    steps=4,
    batch_pairs=2,
    rank=2,
    alpha=2,
    beta=20.0,
    shift=12.0,
    lr=5e-3,
    warmup_steps=1,
    held_out=0.5,
    held_out_pairs=2,
    held_out_every=2,
    checkpoint_every=2,
    tensorboard=False,
)

PROMPTS = {
    "0001_LR": "In a quiet room, a cat is on the left of a box, then the cat walks to the right of the box.",
    "0002_RL": "In a quiet room, a dog is on the right of a chair, then the dog runs to the left of the chair.",
}

MODELS: list[tuple[str, ExpertName | None]] = [
    ("tiny_a14b", "high"),
    ("tiny_a14b", "low"),
    ("tiny_ti2v", None),
    ("tiny_ltx", None),
]


def fill(store: Store, backbone: Backbone) -> Store:
    """Random latents and text of two prompts: seed 0 wins, seed 1 loses."""
    settings = backbone.default_settings()
    header = LatentsHeader(backbone.latent_space, backbone.model_id, settings.to_dict(), settings.digest)
    for name, text in PROMPTS.items():
        store.add_prompt(Prompt.parse(name, text))
        store.write_text(name, backbone.encode_text([text])[0], backbone.model_id)
        for seed in (0, 1):
            store.sample(name, seed).write_latents(torch.randn(backbone.latent_shape(settings)), header)
    write_json(store.root / "pairs.json", manifest([PromptPairs(name, (0,), (1,)) for name in PROMPTS], {}))
    return store


@pytest.mark.parametrize(("fixture", "expert"), MODELS)
def test_training_stops_continues_and_exports(
    fixture: str, expert: ExpertName | None, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: Any
) -> None:
    """Two steps, then two more by a freshly loaded model, end with the bits of four steps in one go."""
    torch.manual_seed(0)
    folder = str(request.getfixturevalue(fixture))
    backbone = load_backbone(folder, "cpu", expert=expert)
    store = fill(Store(tmp_path / "store", create=True), backbone)
    pairs = store.root / "pairs.json"
    whole = train(backbone, store, pairs, tmp_path / "whole", SETTINGS)
    assert whole.finished and whole.verified is not None and whole.verified < 1e-4

    cut = tmp_path / "cut"
    monkeypatch.setattr("training.trainer.Trainer.fit", stopped_after(2))
    assert not train(load_backbone(folder, "cpu", expert=expert), store, pairs, cut, SETTINGS).finished
    monkeypatch.undo()
    rest = train(load_backbone(folder, "cpu", expert=expert), store, pairs, cut, SETTINGS)
    assert rest.finished
    assert rest.diffusers is not None and whole.diffusers is not None
    found, expected = tensors(rest.diffusers), tensors(whole.diffusers)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert any(tensor.abs().max() > 0 for name, tensor in expected.items() if "lora_B" in name)
    assert adapter_metadata(whole.diffusers).get("expert") == expert
    assert json.loads((cut / "config.json").read_text()).get("expert") == expert


def stopped_after(step: int) -> Any:
    from training.trainer import Trainer

    fit = Trainer.fit
    return lambda self, stop: fit(self, lambda: self.step >= step)


def tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def test_a_lora_goes_on_the_expert_it_was_trained_on(tiny_a14b: Path, tmp_path: Path) -> None:
    """On the right one it changes the samples; a file that names the other one is refused."""
    low, high = (load_backbone(str(tiny_a14b), "cpu", expert=name) for name in ("low", "high"))  # type: ignore[arg-type]
    store = fill(Store(tmp_path / "store", create=True), low)
    lora = train(low, store, store.root / "pairs.json", tmp_path / "out", SETTINGS).comfy
    assert lora is not None
    text, (negative,) = low.encode_text(["a cat"]), low.encode_text(["blurred"])
    before = low.sample(text, negative, [3], low.default_settings())
    assert torch.equal(high.sample(text, negative, [3], low.default_settings()), before)
    assert put_lora(low, lora, 1.0).startswith(f"{low.model_id}:low+lora:")
    assert not torch.equal(low.sample(text, negative, [3], low.default_settings()), before)
    with pytest.raises(LoraError, match="low-noise expert .*--expert low"):
        put_lora(high, lora, 1.0)


def test_a_checkpoint_of_the_other_expert_is_refused(tiny_a14b: Path, tmp_path: Path) -> None:
    high = load_backbone(str(tiny_a14b), "cpu", expert="high")
    store = fill(Store(tmp_path / "store", create=True), high)
    train(high, store, store.root / "pairs.json", tmp_path / "out", SETTINGS)
    low = load_backbone(str(tiny_a14b), "cpu", expert="low")
    with pytest.raises(ConfigError, match="expert: 'high' -> 'low'"):
        train(low, store, store.root / "pairs.json", tmp_path / "out", SETTINGS)


@pytest.mark.parametrize(("levels", "lowest", "highest"), [((0.875, 1.0), 0.875, 1.0), ((0.0, 0.875), 0.0, 0.874)])
def test_levels_are_drawn_in_the_range_of_the_expert(
    levels: tuple[float, float], lowest: float, highest: float
) -> None:
    drawn = [draw(SETTINGS, "train", index, (1,), None, levels).sigma for index in range(500)]
    assert lowest <= min(drawn) < lowest + 0.05 and highest - 0.05 < max(drawn) <= highest + 1e-3
    watched = [draw(SETTINGS, "held-out", 0, (1,), level, levels).sigma for level in (0, 500, 999)]
    assert watched == sorted(watched, reverse=True)
    assert levels[0] <= watched[-1] and watched[0] <= levels[1]
    with pytest.raises(ConfigError, match="change shift"):
        draw(SETTINGS, "train", 0, (1,), None, (0.0, 1e-4))
