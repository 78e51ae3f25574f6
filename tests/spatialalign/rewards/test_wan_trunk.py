"""The trunk against diffusers' own transformer: same tokens, same gradients, at any precision."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from spatialalign.backbones.padding import pad_text
from spatialalign.errors import ModelError
from spatialalign.rewards.wan_trunk import WanTrunk

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 14,  # a third of 14 / 2 pairs does not come out even: 3 for time, 2 and 2 for space
    "in_channels": 48,
    "out_channels": 48,
    "text_dim": 10,
    "freq_dim": 8,
    "ffn_dim": 20,
    "num_layers": 3,
}


def random_transformer(**changed: Any) -> WanTransformer3DModel:
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(**{**TINY, **changed}).eval()
    for parameter in transformer.parameters():  # norms that do something, and biases that are not 0
        torch.nn.init.normal_(parameter, mean=0.1, std=0.3)
    return transformer


def miniature(folder: Any) -> WanTransformer3DModel:
    return WanTransformer3DModel.from_pretrained(folder / "wan" / "transformer").eval()


def batch(transformer: Any, lengths: Sequence[int] = (3, 7)) -> tuple[Tensor, Tensor, list[Tensor]]:
    config = transformer.config
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(lengths), config.in_channels, 3, 4, 6, generator=generator)
    text = [torch.randn(length, config.text_dim, generator=generator) for length in lengths]
    return x, torch.linspace(0.2, 0.93, len(lengths)), text


def tokens_after(transformer: Any, blocks: int, x: Tensor, sigma: Tensor, text: Sequence[Tensor]) -> Tensor:
    """What comes out of a block of the real class, which attends to all 512 rows of padded text."""
    seen = []
    handle = transformer.blocks[blocks - 1].register_forward_hook(lambda _module, _args, out: seen.append(out))
    transformer(x, 1000 * sigma, pad_text(text), return_dict=False)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_tokens_of_the_miniature(miniature_weights: Any, blocks: int) -> None:
    transformer = miniature(miniature_weights)
    trunk, given = WanTrunk.from_transformer(transformer, blocks), batch(transformer)
    with torch.no_grad():
        expected = tokens_after(transformer, blocks, *given)
        found = trunk(*given[:2], trunk.embed_text(given[2]))
    assert found.tokens.shape == (2, 3, 2, 3, 128)
    torch.testing.assert_close(found.tokens.flatten(1, 3), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changed", [{}, {"cross_attn_norm": False}, {"eps": 1e-2}, {"patch_size": (1, 1, 2)}])
def test_tokens_and_gradients_of_a_random_model(changed: dict[str, Any]) -> None:
    transformer = random_transformer(**changed)
    trunk, (x, sigma, text) = WanTrunk.from_transformer(transformer, 2), batch(transformer, (1, 512, 600))
    gradients = []
    for read in (
        lambda x: tokens_after(transformer, 2, x, sigma, text),
        lambda x: trunk(x, sigma, trunk.embed_text(text)).tokens.flatten(1, 3),
    ):
        point = x.clone().requires_grad_(True)
        tokens = read(point)
        gradients.append((tokens, torch.autograd.grad(tokens.square().mean(), point)[0]))
    (expected, expected_gradient), (found, gradient) = gradients
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-4 * float(gradient.abs().max()), rtol=0)


def test_bfloat16_is_as_near_as_that_of_diffusers(miniature_weights: Any) -> None:
    """diffusers keeps norms, time embedding and modulation in float32; here they are only computed in it."""
    folder = miniature_weights / "wan" / "transformer"
    half = WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.bfloat16).eval()
    full = miniature(miniature_weights)
    x, sigma, text = batch(full)
    trunk = WanTrunk.from_transformer(full, 2).to(torch.bfloat16)
    with torch.no_grad():
        exact = tokens_after(full, 2, x, sigma, text)
        theirs = tokens_after(half, 2, x.bfloat16(), sigma, [row.bfloat16() for row in text])
        found = trunk(x, sigma, trunk.embed_text(text))
    assert found.tokens.dtype == torch.bfloat16 and found.time.dtype == torch.float32
    ours, error = ((t.float() - exact).square().mean().sqrt() for t in (found.tokens.flatten(1, 3), theirs))
    assert 0 < ours < 1.2 * error


def test_text_that_was_embedded_before_and_padding() -> None:
    trunk = WanTrunk.from_transformer(random_transformer(), 1)
    text = [torch.randn(2, 10), torch.randn(5, 10)]
    embedded = trunk.embed_text(text)
    assert embedded.real.tolist() == [[True] * 2 + [False] * 4, [True] * 5 + [False]]
    assert embedded.bias.exp()[0].tolist() == pytest.approx([1, 1] + [(512 - 2) / 4] * 4)
    layer = trunk.condition_embedder.text_embedder
    torch.testing.assert_close(embedded.rows[1, :5], layer(text[1]))
    torch.testing.assert_close(embedded.rows[0, 2:], layer(torch.zeros(4, 10)))


def test_what_is_refused() -> None:
    transformer = random_transformer()
    with pytest.raises(ModelError, match="1 to 3 blocks .* found 4"):
        WanTrunk.from_transformer(transformer, 4)
    with pytest.raises(ModelError, match="found 0"):
        WanTrunk.from_transformer(transformer, 0)
    with pytest.raises(ModelError, match="image-to-video"):
        WanTrunk.from_transformer(random_transformer(added_kv_proj_dim=28, image_dim=8), 1)
    with pytest.raises(ModelError, match="one latent frame, found 3"):
        WanTrunk.from_transformer(random_transformer(patch_size=(3, 2, 2)), 1)
    tensors = transformer.state_dict()
    tensors["blocks.0.attn1.to_q.base_layer.weight"] = tensors.pop("blocks.0.attn1.to_q.weight")
    with pytest.raises(ModelError, match=r"lacks blocks.0.attn1.to_q.weight .*LoRA"):
        WanTrunk.from_weights(transformer.config, tensors, 1)


def test_it_runs_where_there_is_no_diffusers(repo_root: Any) -> None:
    program = (
        "import sys; sys.modules['diffusers'] = sys.modules['transformers'] = None\n"
        "import torch, spatialalign.guidance, spatialalign.rewards.latent\n"
        "from spatialalign.rewards.wan_trunk import *\n"
        "trunk = WanTrunk(TrunkConfig(1, 2, 1, 12, 4, 6, 8, 16))\n"
        "trunk(torch.zeros(1, 4, 1, 2, 2), torch.ones(1), trunk.embed_text([torch.zeros(2, 6)]))"
    )
    subprocess.run([sys.executable, "-c", program], cwd=repo_root, check=True)
