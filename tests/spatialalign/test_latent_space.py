"""The latent space: named by what defines it, whoever wrote the VAE's configuration."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLWan

from spatialalign.backbones import load_backbone
from spatialalign.backbones.latent_space import WAN21_MEAN, WAN21_STD, LatentSpace
from spatialalign.errors import ModelError
from spatialalign.files import read_json


def test_the_defaults_are_those_of_diffusers() -> None:
    defaults = {n: p.default for n, p in inspect.signature(AutoencoderKLWan.__init__).parameters.items()}
    assert LatentSpace.from_config(defaults) == LatentSpace()
    assert LatentSpace().channels == defaults["z_dim"] == 16


def test_the_name_does_not_depend_on_who_wrote_the_configuration() -> None:
    """Other keys, missing keys, and constants that went through float32 or a string of a tensor name the same space."""
    name = LatentSpace().name
    assert name.startswith("wan-vae:")
    assert LatentSpace.from_config({}).name == name
    assert LatentSpace.from_config({"_diffusers_version": "0.99", "is_residual": False, "base_dim": 96}).name == name
    through_float32 = {"latents_mean": torch.tensor(WAN21_MEAN).tolist(), "latents_std": torch.tensor(WAN21_STD)}
    assert through_float32["latents_mean"] != list(WAN21_MEAN)
    assert LatentSpace.from_config(through_float32).name == name


@pytest.mark.parametrize(
    "change",
    [
        {"width": 8},
        {"mean": (*WAN21_MEAN[:-1], 0.0)},
        {"std": (*WAN21_STD[:-1], 1.0)},
        {"mean": WAN21_MEAN[:4], "std": WAN21_STD[:4]},
    ],
)
def test_the_name_changes_with_all_that_defines_the_space(change: dict[str, object]) -> None:
    assert replace(LatentSpace(), **change).name != LatentSpace().name  # type: ignore[arg-type]


def test_the_miniature_states_its_own_width(miniature_weights: object) -> None:
    backbone = load_backbone("miniature", device="cpu")
    config = read_json(f"{miniature_weights}/wan/vae/config.json")
    assert backbone.latent_space == LatentSpace(width=config["base_dim"]).name != LatentSpace().name


def test_normalising_is_per_channel_and_inverted() -> None:
    space = LatentSpace(mean=(1.0, -2.0), std=(2.0, 4.0))
    raw = torch.stack([torch.full((1, 2, 3), 5.0), torch.full((1, 2, 3), 2.0)])[None]
    normalised = space.normalise(raw)
    assert normalised[0, 0].unique().tolist() == [2.0]  # (5 - 1) / 2
    assert normalised[0, 1].unique().tolist() == [1.0]  # (2 + 2) / 4
    assert torch.equal(space.denormalise(normalised), raw)


@pytest.mark.parametrize("values", [((), ()), ((1.0,), (1.0, 2.0)), ((1.0,), (0.0,))])
def test_impossible_constants_are_refused(values: tuple[tuple[float, ...], tuple[float, ...]]) -> None:
    with pytest.raises(ModelError, match="latents_mean"):
        LatentSpace(8, *values)
