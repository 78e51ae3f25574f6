"""Kept reference predictions: the same training from them, once made, and a refusal to use them for anything else."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from spatialalign.backbones.flow import training_sigmas
from spatialalign.backbones.wan import WanBackbone
from spatialalign.errors import ConfigError, DataError
from spatialalign.lora import unload_lora
from training.config import TrainSettings
from training.fixed_draws import fixed_draw, fixed_draw_number
from training.pairs import PreferencePair, read_pairs
from training.reference_cache import tensor_digest, weights_digest
from training.store import LatentsHeader, Store
from training.trainer import ADAPTER, Trainer, add_adapter

SETTINGS = TrainSettings(
    steps=4,
    batch_pairs=2,
    rank=2,
    beta=20.0,
    lr=5e-3,
    warmup_steps=0,
    checkpointing="none",
    passes="separate",
    held_out_pairs=2,
    held_out_every=2,
    checkpoint_every=2,
    tensorboard=False,
)
SHAPE = (16, 2, 4, 4)


@pytest.fixture(autouse=True)
def clean(backbone: WanBackbone) -> Iterator[None]:
    """A copy of the transformer for each test: 8-bit storage rounds its weights for good."""
    shared, backbone.transformer = backbone.transformer, copy.deepcopy(backbone.transformer)
    yield
    backbone.transformer = shared


def trainer(backbone: WanBackbone, store: Store, out: Path, references: Path | None = None, **changes: Any) -> Trainer:
    unload_lora(backbone.transformer, ADAPTER)
    settings = replace(SETTINGS, **changes)
    prompts, _ = read_pairs(store.root / "pairs.json")
    return Trainer(backbone, store, prompts[:2], prompts[2:], settings, out, settings.to_dict(), None, references)


def trained(run: Trainer) -> dict[str, Tensor]:
    run.fit()
    return {name: parameter.detach().clone() for name, parameter in run.parameters.items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_training_from_kept_predictions_is_the_same(
    backbone: WanBackbone, paired_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: live (each side is a pass of one clip, as the kept ones are made), first kept, and then read."""
    live = trained(trainer(backbone, paired_store, tmp_path / "live"))
    folder = tmp_path / "kept"
    made = trained(trainer(backbone, paired_store, tmp_path / "made", folder, reference_cache="float32"))
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.safetensors"))
    assert len(files) == 4 * 2 * 2  # steps, pairs, sides
    again = trainer(backbone, paired_store, tmp_path / "read", folder, reference_cache="float32")
    passes = count_passes(backbone, monkeypatch)
    read = trained(again)
    assert equal(live, made) and equal(live, read)
    assert any(parameter.any() for parameter in live.values())
    # With a graph: two a pair. Without: two pairs' reference and three evaluations of the held-out pairs.
    assert passes == {"graph": 4 * 2 * 2, "none": 2 * 2 + 3 * 2 * 2}


def count_passes(backbone: WanBackbone, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    seen = {"graph": 0, "none": 0}
    plain = backbone.velocity

    def velocity(*args: Any) -> Tensor:
        out = plain(*args)
        seen["graph" if out.requires_grad else "none"] += 1
        return out

    monkeypatch.setattr(backbone, "velocity", velocity)
    return seen


@pytest.mark.parametrize("draws", [0, 3])
def test_stopped_and_continued_equals_one_go(
    backbone: WanBackbone, paired_store: Store, tmp_path: Path, draws: int
) -> None:
    """In pairs of two and batched passes too: a kept prediction does not depend on what else is asked for with it."""
    options: dict[str, Any] = {"reference_cache": "bfloat16", "reference_draws": draws, "micro_pairs": 2}
    options["passes"] = "batched"
    straight = trained(trainer(backbone, paired_store, tmp_path / "straight", **options))
    parts = trainer(backbone, paired_store, tmp_path / "parts", **options)
    assert not parts.fit(lambda: parts.step == 2)
    # killed after some predictions of the third step were kept, one of which is lost again
    parts._train_step()
    next((tmp_path / "parts" / "reference").rglob("*.safetensors")).unlink()
    continued = trainer(backbone, paired_store, tmp_path / "parts", **options)
    continued.resume()
    assert continued.step == 2
    assert equal(trained(continued), straight)


def test_fixed_draws_are_made_once(backbone: WanBackbone, paired_store: Store, tmp_path: Path) -> None:
    """Two draws for each of the six training clips, however many pairs."""
    run = trainer(
        backbone, paired_store, tmp_path / "out", steps=20, reference_cache="bfloat16", reference_draws=2, batch_pairs=4
    )
    run.fit()
    files = list((tmp_path / "out" / "reference").rglob("*.safetensors"))
    assert len(files) == 2 * 3 * 2
    assert {path.name for path in files} == {"fixed-0.safetensors", "fixed-1.safetensors"}
    assert all(load_file(path)["velocity"].dtype == torch.bfloat16 for path in files)


def first_file(folder: Path) -> Path:
    return sorted(folder.rglob("*.safetensors"))[0]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"shift": 3.0}, "shift 5.0 there, 3.0 now"),
        ({"seed": 1}, "seed 0 there, 1 now"),
        ({"noise": "shared"}, "noise 'independent' there, 'shared' now"),
        ({"reference_draws": 2}, "draws 0 there, 2 now"),
        ({"reference_cache": "bfloat16"}, "precision 'float32' there, 'bfloat16' now"),
        ({"base_dtype": "fp8"}, "weights '.*' there, '.*' now"),
        ({"bf16_timesteps": True}, "bf16_timesteps False there, True now"),
    ],
)
def test_predictions_made_otherwise_are_refused(
    backbone: WanBackbone, paired_store: Store, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    folder = tmp_path / "kept"
    options: dict[str, Any] = {"reference_cache": "float32", "steps": 1}
    trainer(backbone, paired_store, tmp_path / "one", folder, **options).fit()
    with pytest.raises(ConfigError, match=f"kept were made otherwise: .*{named}.* Name another folder"):
        trainer(backbone, paired_store, tmp_path / "two", folder, **options | changes)


def test_another_base_model_is_refused(backbone: WanBackbone, paired_store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    trainer(backbone, paired_store, tmp_path / "one", folder, reference_cache="float32", steps=1).fit()
    weight = backbone.transformer.proj_out.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[0, 0] += 1e-3
        with pytest.raises(ConfigError, match="weights"):
            trainer(backbone, paired_store, tmp_path / "two", folder, reference_cache="float32", steps=1)
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_adapters_do_not_change_the_digest_of_the_base(backbone: WanBackbone) -> None:
    transformer: Any = backbone.transformer
    plain = weights_digest(transformer)
    add_adapter(backbone, SETTINGS)
    assert weights_digest(transformer) == plain
    unload_lora(transformer, ADAPTER)
    add_adapter(backbone, replace(SETTINGS, targets="all-linear", rank=4))
    assert weights_digest(transformer) == plain


def test_changed_latents_or_text_are_refused(backbone: WanBackbone, paired_store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    options: dict[str, Any] = {"reference_cache": "float32", "steps": 1}
    trainer(backbone, paired_store, tmp_path / "one", folder, **options).fit()
    settings = backbone.default_settings()
    header = LatentsHeader(backbone.latent_space, backbone.model_id, settings.to_dict(), settings.digest)
    backup = shutil.copytree(paired_store.root, tmp_path / "backup")
    for name in ("0001_LR", "0002_RL"):
        for seed in (0, 1, 2):
            sample = paired_store.sample(name, seed)
            sample.write_latents(sample.read_latents() + 1e-3, header)
    with pytest.raises(DataError, match=r"kept/000._../\d/train-0.safetensors was made for another noisy latents"):
        trainer(backbone, paired_store, tmp_path / "two", folder, **options).fit()

    restored = Store(backup)
    for name in ("0001_LR", "0002_RL"):
        restored.write_text(name, backbone.encode_text(["a stone"])[0], backbone.model_id)
    with pytest.raises(DataError, match=r"train-0.safetensors was made for another text"):
        trainer(backbone, restored, tmp_path / "three", folder, **options).fit()


def test_a_damaged_file_is_named(backbone: WanBackbone, paired_store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    options: dict[str, Any] = {"reference_cache": "float32", "steps": 1}
    trainer(backbone, paired_store, tmp_path / "one", folder, **options).fit()
    path = first_file(folder)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match=rf"{path.name} cannot be read .*delete it, and it is made again"):
        trainer(backbone, paired_store, tmp_path / "two", folder, **options).fit()
    path.unlink()
    trainer(backbone, paired_store, tmp_path / "three", folder, **options).fit()
    assert path.is_file()


def test_a_kept_file_says_what_it_is_for(backbone: WanBackbone, paired_store: Store, tmp_path: Path) -> None:
    from safetensors import safe_open

    run = trainer(backbone, paired_store, tmp_path / "out", reference_cache="float32", steps=1)
    run.fit()
    folder = tmp_path / "out" / "reference"
    identity = json.loads((folder / "reference.json").read_text())
    assert identity["model"] == backbone.model_id
    assert identity["weights"] == weights_digest(backbone.transformer)
    with safe_open(first_file(folder), framework="pt") as file:
        assert set(file.metadata()) == {"noisy latents", "noise level", "text"}
        assert float(file.metadata()["noise level"]) in training_sigmas(5.0).float().tolist()


def test_a_digest_tells_tensors_apart() -> None:
    one = torch.arange(6.0)
    assert tensor_digest(one) == tensor_digest(one.clone())
    assert tensor_digest(one) != tensor_digest(one + 1e-7)
    assert tensor_digest(one.bfloat16()) != tensor_digest(one)


# --- fixed draws ----------------------------------------------------------------------------------------------------

FIXED = replace(SETTINGS, reference_cache="bfloat16", reference_draws=4)


def test_the_levels_of_a_prompt_cover_the_schedule() -> None:
    """Draw k of 4 lies in the k-th quarter of the 1000 levels, at a place that differs between prompts."""
    places = {}
    levels = training_sigmas(5.0).float().tolist()
    for prompt in ("a", "b", "c"):
        draws = [fixed_draw(FIXED, PreferencePair(prompt, 0, 1), number, SHAPE) for number in range(4)]
        where = [levels.index(torch.tensor(d.sigma).item()) for d in draws]
        assert [place // 250 for place in where] == [0, 1, 2, 3]
        places[prompt] = where
    assert len({tuple(where) for where in places.values()}) == 3
    one = replace(FIXED, reference_draws=1)
    drawn = [fixed_draw(one, PreferencePair(str(i), 0, 1), 0, (1,)).sigma for i in range(2000)]
    # as for free draws: mean 0.748, deviation about 0.25, within 4 standard errors
    assert sum(drawn) / 2000 == pytest.approx(0.748, abs=4 * 0.25 / 2000**0.5)


def test_a_clip_has_its_noise_whatever_it_is_paired_with() -> None:
    one = fixed_draw(FIXED, PreferencePair("a", 0, 1), 2, SHAPE)
    other = fixed_draw(FIXED, PreferencePair("a", 1, 2), 2, SHAPE)
    assert torch.equal(one.loser, other.winner)
    assert one.sigma == other.sigma
    assert not torch.equal(one.winner, one.loser)
    for different in (
        fixed_draw(FIXED, PreferencePair("a", 0, 1), 3, SHAPE),
        fixed_draw(FIXED, PreferencePair("b", 0, 1), 2, SHAPE),
        fixed_draw(replace(FIXED, seed=1), PreferencePair("a", 0, 1), 2, SHAPE),
    ):
        assert not torch.equal(different.winner, one.winner)
    shared = fixed_draw(replace(FIXED, noise="shared"), PreferencePair("a", 0, 1), 2, SHAPE)
    assert torch.equal(shared.winner, shared.loser)


def test_draws_are_used_evenly() -> None:
    """8000 pairs over 4 draws: 2000 each, within 4 standard deviations of sqrt(8000 x 3/16)."""
    numbers = torch.tensor([fixed_draw_number(FIXED, index) for index in range(8000)])
    assert torch.all((torch.bincount(numbers, minlength=4) - 2000).abs() <= 4 * (8000 * 3 / 16) ** 0.5)


def test_rounded_timesteps_reach_fixed_draws() -> None:
    drawn = fixed_draw(replace(FIXED, bf16_timesteps=True), PreferencePair("a", 0, 1), 0, (1,))
    assert drawn.told * 1000 == float(torch.tensor(drawn.told * 1000).bfloat16())
