"""Load Latent Reward, Reward Weights and Reward Guidance: what goes in and out. Sampling is tried in tests/host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

SPACE = "wan-vae:0123456789ab"
TEXT = 16


@pytest.fixture
def make(fake_host: Any, module: Callable[[str], ModuleType]) -> Callable[..., Path]:
    """``make(name, ...)``: a small random reward in ``models/latent_rewards``."""

    def write(name: str = "tiny.safetensors", further: tuple[str, ...] = (), space: str = SPACE) -> Path:
        trunk = module("spatialalign.rewards.wan_trunk")
        latent = module("spatialalign.rewards.latent")
        sizes = {"blocks": 1, "depth": 4, "heads": 2, "head_dim": 12, "in_channels": 4, "text_dim": TEXT}
        config = trunk.TrunkConfig(**sizes, freq_dim=16, ffn_dim=32)
        reward = latent.LatentReward(
            trunk.WanTrunk(config), latent.RewardInfo("tiny-wan", space, further=further), 8, 2
        )
        torch.nn.init.normal_(reward.head.to_values.weight)
        path = Path(fake_host.models) / "latent_rewards" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        latent.save_reward(path, reward, torch.float32)
        return path

    return write


@pytest.fixture
def load(make: Callable[..., Path], nodes: dict[str, Any], run: Callable[..., Any]) -> Callable[..., Any]:
    """``load(name, ...)``: the outputs of Load Latent Reward for such a file."""

    def loaded(name: str = "tiny.safetensors", precision: str = "float32", **more: Any) -> Any:
        make(name, **more)
        return run(nodes["SpatialAlignLoadReward"], reward=name, precision=precision).args

    return loaded


@pytest.fixture
def error(module: Callable[[str], ModuleType]) -> type[Exception]:
    """The pack's base error."""
    found: type[Exception] = module("spatialalign.errors").SpatialAlignError
    return found


def test_the_list_has_the_shipped_reward_first_and_every_file(make: Callable[..., Path], nodes: dict[str, Any]) -> None:
    make("a.safetensors")
    make("wan/far.safetensors")
    offered = nodes["SpatialAlignLoadReward"].INPUT_TYPES()["required"]["reward"][1]["options"]
    assert offered == ["miniature", "a.safetensors", "wan/far.safetensors"]


def test_a_loaded_reward_is_the_hosts_and_says_what_it_is(load: Callable[..., Any], fake_host: Any) -> None:
    reward, report = load(further=("quality",))
    (part,) = reward.parts
    assert part.patcher.model[0] is part.network and not fake_host.loaded
    assert not any(weight.requires_grad or weight.is_inference() for weight in part.network.parameters())
    assert report.splitlines() == [
        "tiny.safetensors: weights dsr 1, valid 0, quality 0",
        f"  the first 1 of 4 blocks of tiny-wan, trained on noisy latents of {SPACE}",
        "  a guided step costs about 0.75 passes of the model more",
    ]


def test_precision_is_that_of_the_blocks(load: Callable[..., Any]) -> None:
    network = load(precision="bfloat16")[0].parts[0].network
    assert network.trunk.patch_embedding.weight.dtype == torch.bfloat16
    assert network.head.to_values.weight.dtype == torch.float32


def test_files_that_are_no_rewards(run: Any, nodes: dict[str, Any], make: Callable[..., Path], error: Any) -> None:
    path = make()
    path.write_bytes(path.read_bytes()[:-8])
    for name, words in (
        ("tiny.safetensors", "tiny"),
        ("x.safetensors", "not in models/latent_rewards"),
        ("../x", ".."),
    ):
        with pytest.raises(error, match=words.replace(".", r"\.")):
            run(nodes["SpatialAlignLoadReward"], reward=name)


def test_a_reward_that_was_trained_anew_is_loaded_anew(make: Callable[..., Path], nodes: dict[str, Any]) -> None:
    def seen() -> str:
        found: str = nodes["SpatialAlignLoadReward"].fingerprint_inputs(reward="tiny.safetensors", precision="float32")
        return found

    make()
    before = seen()
    assert seen() == before
    make(further=("quality",))
    assert seen() != before


def test_weights_are_set_and_rewards_joined(run: Any, nodes: dict[str, Any], load: Callable[..., Any]) -> None:
    node = nodes["SpatialAlignRewardWeights"]
    first, second = load("a.safetensors", further=("quality",))[0], load("b.safetensors")[0]
    weighted = run(node, reward=first, weights=" quality : -0.5,\n dsr:2,").args[0]
    joined, report = run(node, reward=second, weights="valid:1e-1", also=weighted).args
    assert [part.weights for part in joined.parts] == [{"valid": 0.1}, {"quality": -0.5, "dsr": 2.0}]
    assert [part.network for part in joined.parts] == [second.parts[0].network, first.parts[0].network]
    assert "b.safetensors: weights dsr 0, valid 0.1\n" in report
    assert "a.safetensors: weights dsr 2, valid 0, quality -0.5\n" in report
    assert first.parts[0].weights == {"dsr": 1.0}  # what another node holds stays as it is


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("motion:1", "no dimension 'motion'; it has dsr, valid"),
        ("dsr", "dsr has the weight ''; write a number"),
        ("dsr:much", "dsr has the weight 'much'"),
        ("dsr:nan", "dsr has the weight 'nan'"),
        ("dsr:1, dsr:2", "dsr is named twice"),
        ("dsr:0", "nothing counts"),
        (" ", "nothing counts"),
    ],
)
def test_weights_that_mean_nothing(
    run: Any, nodes: dict[str, Any], load: Callable[..., Any], error: Any, text: str, words: str
) -> None:
    with pytest.raises(error, match=words):
        run(nodes["SpatialAlignRewardWeights"], reward=load()[0], weights=text)


class Model:
    """A MODEL as far as the node and the host's sampler look at it."""

    def __init__(self) -> None:
        self.functions: list[Any] = []
        self.patchers: list[Any] = []


@pytest.fixture
def model(module: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> Model:
    """A Wan MODEL of four channels whose latents are those of the small rewards."""
    latent_space = module("spatialalign.backbones.latent_space")
    host = module("host")
    found = host.WanModel(64, TEXT, (0.0,) * 4, (1.0,) * 4)
    monkeypatch.setattr(host, "describe_wan", lambda model: found)
    monkeypatch.setattr(latent_space.LatentSpace, "name", SPACE)

    def patched(base: Model, function: Any, patchers: Any) -> Model:
        copy = Model()
        copy.functions, copy.patchers = [*base.functions, function], [*base.patchers, *patchers]
        return copy

    monkeypatch.setattr(host, "with_post_cfg", patched)
    return Model()


@pytest.fixture
def step() -> Callable[..., torch.Tensor]:
    """``step(model, sigma, ...)``: one call behind classifier-free guidance, of a run over 4 levels at a shift of 1."""
    generator = torch.Generator().manual_seed(0)
    x, denoised = (torch.randn(2, 4, 3, 4, 4, generator=generator) for _ in range(2))
    text = torch.randn(1, 5, TEXT, generator=generator)
    text[:, 3:] = 0
    cond = {"model_conds": {"c_crossattn": SimpleNamespace(cond=text)}}
    sampling = SimpleNamespace(percent_to_sigma=lambda percent: 1.0 - percent)

    def call(model: Model, sigma: float, options: Any = None, conds: Any = (cond,)) -> torch.Tensor:
        levels = {"sample_sigmas": torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])}
        args = {
            "input": x,
            "denoised": denoised,
            "sigma": torch.full((2,), sigma),
            "cond": list(conds),
            "uncond": None,
            "model_options": {"transformer_options": levels} if options is None else options,
            "model": SimpleNamespace(model_sampling=sampling),
        }
        with torch.inference_mode():
            found: torch.Tensor = model.functions[0](args)
        return denoised if found is denoised else found

    call.x, call.denoised, call.text = x, denoised, text  # type: ignore[attr-defined]
    return call


def test_a_new_node_guides_as_the_engine_does_by_itself(
    nodes: dict[str, Any], module: Callable[[str], ModuleType]
) -> None:
    settings = module("spatialalign.guidance").GuidanceSettings()
    offered = nodes["SpatialAlignRewardGuidance"].INPUT_TYPES()["required"]
    names = {field.name: getattr(settings, field.name) for field in fields(settings)} | {
        "start_percent": settings.start,
        "end_percent": settings.end,
    }
    for name in offered.keys() - {"model", "reward"}:
        assert offered[name][1].get("default") == names[name], name


@pytest.mark.parametrize("form", ["nrg", "x0"])
def test_one_step_is_the_engines_step(
    run: Any,
    nodes: dict[str, Any],
    load: Callable[..., Any],
    model: Model,
    step: Any,
    module: Callable[[str], ModuleType],
    form: str,
) -> None:
    reward = load()[0]
    guided = run(nodes["SpatialAlignRewardGuidance"], model=model, reward=reward, form=form).args[0]
    assert guided.patchers == [reward.parts[0].patcher] and not model.functions
    engine = module("spatialalign.guidance")
    own = engine.RewardGuidance(
        [reward.parts[0].network], engine.GuidanceSettings(form=form), [1.0, 0.75, 0.5, 0.25, 0.0]
    )
    velocity = (step.x - step.denoised) / 0.75
    expected = step.x - 0.75 * own(step.x, 0.75, velocity, [step.text[0, :3]] * 2)
    torch.testing.assert_close(step(guided, 0.75), expected)
    assert (expected - step.denoised).abs().max() > 0.01


def test_only_the_chosen_part_is_guided(
    run: Any, nodes: dict[str, Any], load: Callable[..., Any], model: Model, step: Any
) -> None:
    """At a shift of 1 percent p is noise level 1 - p; pure noise is never guided."""

    def guided_levels(**changes: Any) -> list[float]:
        inputs = {"end_percent": 1.0, **changes}
        patched = run(nodes["SpatialAlignRewardGuidance"], model=model, reward=load()[0], **inputs).args[0]
        return [sigma for sigma in (1.0, 0.75, 0.5, 0.25) if step(patched, sigma) is not step.denoised]

    assert guided_levels() == [0.75, 0.5, 0.25]
    assert guided_levels(start_percent=0.5) == [0.5, 0.25]
    assert guided_levels(end_percent=0.75) == [0.75, 0.5]
    assert guided_levels(every=2) == [0.75, 0.25]
    assert guided_levels(start_percent=0.3, end_percent=0.4) == []


def test_a_run_reads_its_text_once(
    run: Any, nodes: dict[str, Any], load: Callable[..., Any], model: Model, step: Any, module: Any, monkeypatch: Any
) -> None:
    reward = load()[0]
    network, asked = reward.parts[0].network, []
    embed = network.trunk.embed_text
    monkeypatch.setattr(
        network.trunk, "embed_text", lambda text: asked.append([len(row) for row in text]) or embed(text)
    )
    guided = run(nodes["SpatialAlignRewardGuidance"], model=model, reward=reward).args[0]
    options = {"transformer_options": {"sample_sigmas": torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])}}
    for sigma in (1.0, 0.75, 0.5, 0.25):
        step(guided, sigma, options)
    assert asked == [[3, 3]]


def test_strength_0_hands_the_model_on(
    run: Any, nodes: dict[str, Any], load: Callable[..., Any], model: Model, error: Any
) -> None:
    node = nodes["SpatialAlignRewardGuidance"]
    assert run(node, model=model, reward=load()[0], strength=0.0).args[0] is model
    with pytest.raises(error, match="start 0.9 and end 0.5"):
        run(node, model=model, reward=load()[0], start_percent=0.9, end_percent=0.5)


def test_another_latent_space_is_an_error_with_both(
    run: Any, nodes: dict[str, Any], load: Callable[..., Any], model: Model, error: Any
) -> None:
    with pytest.raises(error, match=f"made with tiny-wan, reads latents of wan-vae:other; this model's are of {SPACE}"):
        run(nodes["SpatialAlignRewardGuidance"], model=model, reward=load(space="wan-vae:other")[0])


def test_a_conditioning_without_text_is_an_error(
    run: Any, nodes: dict[str, Any], load: Callable[..., Any], model: Model, step: Any, error: Any
) -> None:
    guided = run(nodes["SpatialAlignRewardGuidance"], model=model, reward=load()[0]).args[0]
    blank = {"model_conds": {"c_crossattn": SimpleNamespace(cond=torch.zeros(1, 5, TEXT))}}
    for conds, words in (((), "no text"), (({"model_conds": {}},), "no text"), ((blank,), "all zeros")):
        with pytest.raises(error, match=words):
            step(guided, 0.5, conds=conds)


def test_the_latent_space_of_every_wan_is_known(module: Callable[[str], ModuleType], monkeypatch: Any) -> None:
    """By the width of its transformer: the 14B's is that of Wan 2.1's VAE, the miniature's that of its own."""
    latent_space, host = module("spatialalign.backbones.latent_space"), module("host")
    config = module("spatialalign.files").read_json(module("spatialalign.miniature").WAN / "vae" / "config.json")
    asked: list[str] = []
    monkeypatch.setattr(
        module("spatialalign.rewards.latent"), "check_fits", lambda reward, space, text_dim: asked.append(space)
    )
    wan = latent_space.LatentSpace()
    for width in (128, 1536, 5120):
        monkeypatch.setattr(host, "describe_wan", lambda model, w=width: host.WanModel(w, 4096, wan.mean, wan.std))
        module("rewards").check_model(SimpleNamespace(parts=[SimpleNamespace(network=None)]), None)
    assert asked == [latent_space.LatentSpace.from_config(config).name, wan.name, wan.name]
