"""One LoRA file by ComfyUI's own loader, by this pack's node and by diffusers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

STRENGTH = 0.7


@pytest.fixture(scope="module")
def pairs(backbone: Any) -> dict[str, Any]:
    """A random update of every linear, by diffusers' module name, large enough to change the output."""
    import torch

    from spatialalign.lora import LoraPair, linear_names

    generator = torch.Generator().manual_seed(0)
    return {
        name: LoraPair(
            torch.randn(4, inner, generator=generator) / inner**0.5, torch.randn(outer, 4, generator=generator) / 20
        )
        for name, (outer, inner) in linear_names(backbone.transformer).items()
    }


@pytest.fixture(scope="module")
def files(pairs: dict[str, Any], comfy: Path) -> SimpleNamespace:
    """The same LoRA in both dialects, where ComfyUI lists it; and the expected change of each native weight."""
    from spatialalign.lora import write_pairs
    from spatialalign.wan_modules import original_name

    folder = comfy / "models" / "loras"
    write_pairs(pairs, folder / "walk.safetensors", folder / "walk_diffusers.safetensors", {"base_model": "miniature"})
    change = {f"{original_name(name)}.weight": STRENGTH * (pair.up @ pair.down) for name, pair in pairs.items()}
    return SimpleNamespace(
        folder=folder, comfy="walk.safetensors", diffusers="walk_diffusers.safetensors", change=change
    )


@pytest.fixture(autouse=True)
def inference(comfy: Any) -> Iterator[None]:
    """ComfyUI runs its nodes in inference mode, and unloads what a test loaded."""
    import comfy.model_management
    import torch

    with torch.inference_mode():
        yield
    comfy.model_management.unload_all_models()


@pytest.fixture
def weights(miniature: SimpleNamespace) -> dict[str, Any]:
    """The base model's weights, copied."""
    return {key: value.clone() for key, value in miniature.model.model.diffusion_model.state_dict().items()}


@pytest.fixture
def core(files: SimpleNamespace) -> Callable[..., Any]:
    """ComfyUI's own loader: ``core(model, name, strength)``."""
    import nodes

    return lambda model, name, strength=STRENGTH: nodes.LoraLoaderModelOnly().load_lora_model_only(
        model, name, strength
    )[0]


@pytest.fixture
def ours(
    files: SimpleNamespace, module: Callable[[str], ModuleType], execute: Callable[..., Any]
) -> Callable[..., Any]:
    """This pack's node."""
    node = module("nodes.lora").LoadAlignedLora
    return lambda model, name, strength=STRENGTH: execute(node, model=model, lora=name, strength=strength)[0]


@pytest.fixture
def point(backbone: Any) -> tuple[Any, Any]:
    """Two noisy latents and their levels."""
    import torch

    return backbone.noise([1, 2], backbone.default_settings()), torch.tensor([0.9, 0.4])


def _load(model: Any) -> Any:
    import comfy.model_management

    comfy.model_management.load_models_gpu([model])
    return model.model


def _velocity(model: Any, conditioning: Any, point: tuple[Any, Any]) -> Any:
    x, sigma = point
    context = conditioning[0][0].expand(len(x), -1, -1)
    return _load(model).diffusion_model(x, sigma * 1000, context=context)


@pytest.mark.parametrize("loader", ["core", "ours"])
def test_exactly_the_expected_weights_change(
    loader: str,
    miniature: SimpleNamespace,
    weights: dict[str, Any],
    files: SimpleNamespace,
    request: pytest.FixtureRequest,
) -> None:
    import torch

    loaded = _load(request.getfixturevalue(loader)(miniature.model, files.comfy)).diffusion_model.state_dict()
    changed = {key for key, value in loaded.items() if not torch.equal(value, weights[key])}
    assert changed == set(files.change)
    for key, change in files.change.items():
        torch.testing.assert_close(loaded[key], weights[key] + change, rtol=0, atol=1e-5)


def test_three_ways_agree(
    miniature: SimpleNamespace,
    backbone: Any,
    core: Callable[..., Any],
    ours: Callable[..., Any],
    files: SimpleNamespace,
    conditioning: Any,
    prompt: str,
    point: tuple[Any, Any],
) -> None:
    import torch

    from spatialalign.lora import load_lora, unload_lora

    text = [backbone.encode_text([prompt])[0]] * 2
    base = backbone.velocity(*point, text)
    load_lora(backbone.transformer, files.folder / files.diffusers, scale=STRENGTH)
    expected = backbone.velocity(*point, text)
    unload_lora(backbone.transformer)
    assert (expected - base).abs().mean() > 0.05
    for loader, name in ((core, files.comfy), (ours, files.comfy), (ours, files.diffusers)):
        native = _velocity(loader(miniature.model, name), conditioning, point)
        torch.testing.assert_close(native, expected, rtol=0, atol=1e-4)


def test_it_comes_off_again(
    miniature: SimpleNamespace,
    ours: Callable[..., Any],
    files: SimpleNamespace,
    conditioning: Any,
    point: tuple[Any, Any],
) -> None:
    import torch

    before = _velocity(miniature.model, conditioning, point)
    patched = ours(miniature.model, files.comfy)
    assert (_velocity(patched, conditioning, point) - before).abs().mean() > 0.05
    assert torch.equal(_velocity(miniature.model, conditioning, point), before)


def test_it_composes_with_others(
    miniature: SimpleNamespace,
    weights: dict[str, Any],
    core: Callable[..., Any],
    ours: Callable[..., Any],
    files: SimpleNamespace,
) -> None:
    """Two loaders in a row add up, in either order."""
    import torch

    for first, second in ((core, ours), (ours, core)):
        loaded = _load(second(first(miniature.model, files.comfy), files.comfy, -0.5)).diffusion_model.state_dict()
        for key, change in files.change.items():
            expected = weights[key] + change * (1 - 0.5 / STRENGTH)
            torch.testing.assert_close(loaded[key], expected, rtol=0, atol=1e-5)


def test_comfyui_ignores_diffusers_names(
    miniature: SimpleNamespace, core: Callable[..., Any], files: SimpleNamespace
) -> None:
    """Why two files are written: the host passes over these names without an error."""
    assert not core(miniature.model, files.diffusers).patches


def test_what_the_host_does_not_take_is_an_error(
    miniature: SimpleNamespace, module: Callable[[str], ModuleType], pairs: dict[str, Any]
) -> None:
    pair = next(iter(pairs.values()))
    with pytest.raises(module("spatialalign.errors").LoraError, match="did not take the LoRA for 1 of 1 weights"):
        module("nodes.host").with_lora(miniature.model, {"blocks.99.no_such": (pair.down, pair.up)}, 1.0)
