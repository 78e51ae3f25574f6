"""The choice of the attention kernel. There is no CUDA device here: what is measured is the way of measuring."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

from spatialalign.backbones import attention
from spatialalign.backbones.attention import (
    BACKENDS,
    Attention,
    Timing,
    candidates,
    fastest,
    reset_attention,
    set_attention,
    time_attention,
)
from spatialalign.errors import ConfigError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh() -> None:
    time_attention.cache_clear()


@pytest.fixture
def model() -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=12, text_dim=16, freq_dim=16, ffn_dim=24, num_layers=1
    )


@pytest.mark.parametrize(
    ("capability", "dtype", "expected"),
    [
        ((9, 0), torch.bfloat16, ["native", "cudnn", "flash-3", "flash-2"]),
        ((8, 0), torch.bfloat16, ["native", "cudnn", "flash-2"]),
        ((10, 0), torch.float16, ["native", "cudnn", "flash-2"]),
        ((9, 0), torch.float32, ["native"]),  # the fast kernels know half precision alone
        ((7, 5), torch.float16, ["native"]),
    ],
)
def test_candidates_by_capability(capability: tuple[int, int], dtype: torch.dtype, expected: list[str]) -> None:
    assert candidates(capability, dtype) == expected


def test_names_are_diffusers_names() -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName

    assert {backend.value for backend in AttentionBackendName} >= set(BACKENDS.values())
    assert set(get_args(Attention)) == {"auto", *BACKENDS}


def test_the_fastest_usable_kernel_wins() -> None:
    timings = (Timing("native", 2.0), Timing("cudnn", 1.0), Timing("flash-3", None, "not installed"))
    assert fastest(timings) == "cudnn"
    assert fastest((Timing("cudnn", None, "no"),)) == "native"


def test_every_kernel_is_measured_or_says_why_not() -> None:
    found = {t.name: t for t in time_attention(tuple(BACKENDS), 16, 2, 8, torch.float32, CPU)}
    for name in ("native", "flash", "math"):
        assert found[name].seconds is not None and found[name].seconds > 0
    assert found["cudnn"].seconds is None and "No viable backend" in found["cudnn"].reason
    assert found["flash-3"].seconds is None and "Flash Attention 3" in found["flash-3"].reason


def test_a_kernel_with_another_result_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice as large a gradient of the values: |2 g - g| / |g| = 1."""
    plain = attention._pass

    def wrong(name: str, *tensors: Any) -> Any:
        out, *grads, last = plain("native", *tensors)
        return (out, *grads, 2 * last) if name == "cudnn" else (out, *grads, last)

    monkeypatch.setattr(attention, "_pass", wrong)
    native, cudnn = time_attention(("native", "cudnn"), 16, 2, 8, torch.float32, CPU)
    assert native.seconds is not None
    assert (cudnn.seconds, cudnn.reason) == (None, "its result is 1.000 away from torch's own")


def test_elsewhere_than_on_cuda_nothing_changes(model: Any) -> None:
    for wanted in ("auto", "native"):
        assert set_attention(model, wanted, 8) == "native"  # type: ignore[arg-type]
    assert all(processor._attention_backend is None for processor in model.attn_processors.values())
    with pytest.raises(ConfigError, match="attention 'cudnn' needs a CUDA device, found cpu"):
        set_attention(model, "cudnn", 8)


def test_on_cuda_the_measured_choice_is_set(
    model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A stand-in for the device and its clock; the transformer and diffusers are real."""
    timings = {t.name: t for t in (Timing("native", 3.0), Timing("cudnn", None, "no such kernel"), Timing("math", 1.0))}
    asked: list[Any] = []

    def measured(names: tuple[str, ...], *shape: Any) -> tuple[Any, ...]:
        asked.append((names, *shape))
        return tuple(timings[name] for name in names)

    device = SimpleNamespace(type="cuda")
    parameter = SimpleNamespace(device=device, is_floating_point=lambda: True)
    monkeypatch.setattr(type(model), "parameters", lambda self, *_: iter([parameter]))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 0))
    monkeypatch.setattr(attention, "time_attention", measured)
    monkeypatch.setattr(attention, "candidates", lambda *_: ["native", "math", "cudnn"])
    with caplog.at_level(logging.INFO):
        assert set_attention(model, "auto", 32_760) == "math"
    assert asked == [(("native", "math", "cudnn"), 32_760, 1, 12, torch.float32, device)]
    assert "cudnn: not usable, no such kernel" in caplog.text
    assert {p._attention_backend.value for p in model.attn_processors.values()} == {"_native_math"}
    with pytest.raises(ConfigError, match="'cudnn' cannot be used here: no such kernel; use auto or native"):
        set_attention(model, "cudnn", 32_760)
    reset_attention(model)
    assert {p._attention_backend for p in model.attn_processors.values()} == {None}
