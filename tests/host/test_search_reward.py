"""Looks by a latent reward in ComfyUI's samplers against those of ``training.sample``, on the miniature."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from .test_guidance import file, guided, normalised, reward
from .test_search import STEPS, dsr, empty, inference, native, search

__all__ = ["dsr", "empty", "file", "guided", "inference", "native", "reward", "search"]

SEED = 5


@pytest.fixture(scope="module")
def shipped(module: Callable[[str], ModuleType], execute: Callable[..., tuple[Any, ...]], pack: ModuleType) -> Any:
    """The miniature's own reward, as Load Latent Reward hands it out."""
    return execute(module("nodes.sampling").LoadLatentReward, reward="miniature", precision="float32")[0]


@pytest.fixture(scope="module")
def headless(backbone: Any, prompt: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """``headless(search)``: the stored sample and its ``sampling.json`` of ``training.sample`` for the same clip."""
    from dataclasses import replace

    import torch

    from spatialalign.files import read_json
    from spatialalign.miniature import REWARD
    from spatialalign.prompts import Prompt
    from spatialalign.tracking.load import load_tracker
    from training.sample import sample_clips, sampling_path
    from training.store import Store

    def run(search: Any) -> Any:
        store = Store(tmp_path_factory.mktemp("store"), create=True)
        settings = replace(backbone.default_settings(), steps=STEPS, guidance=1.0)
        prompts, tracker = [Prompt.parse("0001_LR", prompt)], load_tracker("miniature")
        with torch.inference_mode(False):
            made = sample_clips(
                backbone, store, prompts, [SEED], settings, tracker, search=search, preview_reward=REWARD
            )
        assert made.done == 1
        sample = store.sample("0001_LR", SEED)
        return sample, read_json(sampling_path(sample))

    return run


def looks(ranking: str) -> list[tuple[int, list[float], list[int]]]:
    """What a ranking says of each look by the reward: steps done, scores, and who went on."""
    found = re.findall(
        r"after (\d+) of \d+ steps, by the reward: ([-\d., ]+); (?:taken on|continued): ([\d, ]+)", ranking
    )
    return [
        (int(step), [float(score) for score in scores.split(", ")], [int(one) for one in kept.split(", ")])
        for step, scores, kept in found
    ]


@pytest.mark.parametrize(
    ("preview", "keep", "threshold"), [(0.0, 1.0, 0.7), (0.4, 0.5, None)], ids=["noise", "three steps"]
)
def test_looks_and_account_are_those_of_training_sample(
    search: Callable[..., SimpleNamespace],
    headless: Callable[..., Any],
    shipped: Any,
    preview: float,
    keep: float,
    threshold: float | None,
) -> None:
    """The same seeds are the same noise; 8 steps of "simple" at the miniature's shift are the engine's levels."""
    import torch

    from spatialalign.search import SearchSettings

    settings = SearchSettings("pruned", 4, keep=keep, preview=preview, preview_by="reward", threshold=threshold)
    sample, record = headless(settings)
    found = search(
        "BestOfNSampler", reward=shipped, candidates=4, keep=keep, preview=preview, stop_at=threshold or 0.0, seed=SEED
    )
    ((step, scores, kept),) = looks(found.ranking)
    (event,) = record["history"]
    assert step == event["step"] == round(preview * STEPS)
    assert scores == pytest.approx(event["scores"], abs=1e-3) and len(set(scores)) == 4
    assert kept == event["kept"]
    # Both stop at the first that is good enough; the tracker reads a stored video there and the frames here.
    assert len(found.latents) == len(record["candidates"])
    assert f"\n{round(record['evaluations'], 2):g} passes of the model" in found.ranking
    assert f"{record['scorings']} clip" in found.ranking.splitlines()[-1]
    best = int(re.findall(r"^1\. clip (\d)", found.ranking, re.MULTILINE)[0])
    assert best == record["chosen"]
    torch.testing.assert_close(normalised(found.latent["samples"])[0], sample.read_latents(), rtol=0, atol=1e-3)


def test_particles_are_looked_at_as_the_reward_sees_them(
    search: Callable[..., SimpleNamespace],
    shipped: Any,
    backbone: Any,
    prompt: str,
    module: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every look is the headless reward's answer for that very clip, and the host has the reward loaded for it."""
    import comfy.model_management
    import torch

    from spatialalign.backbones.flow import sampling_sigmas
    from spatialalign.miniature import REWARD
    from spatialalign.rewards.latent import load_reward

    kind, asked = module("nodes.looking").RewardLook, []
    answer = kind.__call__

    def noted(self: Any, x: Any, sigma: float) -> Any:
        scores = answer(self, x, sigma)
        assert shipped.parts[0].patcher.model in [
            one.model.model for one in comfy.model_management.current_loaded_models
        ]
        asked.append((x.clone(), sigma, scores))
        return scores

    monkeypatch.setattr(kind, "__call__", noted)
    found = search("ParticleSampler", reward=shipped, particles=3, preview=0.25, resample_every=0.25, noise=1.0)
    network, text = load_reward(REWARD), backbone.encode_text([prompt])
    levels = sampling_sigmas(STEPS, 3.0)
    assert len(asked) == 9 and [sigma for _, sigma, _ in asked[::3]] == pytest.approx(levels[[2, 4, 6]].tolist())
    for x, sigma, scores in asked:
        expected = network(x, torch.tensor([sigma], dtype=torch.float32), text).values[:, 0]
        assert scores == pytest.approx(expected.tolist(), abs=1e-3)
    assert [step for step, _, _ in looks(found.ranking)] == [2, 4, 6]
    # Three clips of eight steps, nine looks of a third of a pass.
    assert found.ranking.endswith("27 passes of the model, 3.38 times those of one clip; 3 clips scored")


def test_a_reward_can_look_and_lead(
    search: Callable[..., SimpleNamespace], native: Callable[..., Any], guided: Callable[..., Any], reward: Any
) -> None:
    """The same network: a look, which needs no gradient, leaves it as the guidance behind it needs it."""
    model = guided(every=2)
    found = search("BestOfNSampler", model=model, reward=reward, candidates=2, keep=0.5)
    seed = int(found.ranking.partition("seed ")[2].partition(")")[0])
    assert (found.latent["samples"] == native(seed, model=model)).all()
    assert (found.latent["samples"] - native(seed)).abs().max() > 0.01


@pytest.mark.parametrize(
    ("name", "cfg", "texts", "passes"),
    [("euler", 1.0, 1, 8), ("euler", 3.0, 1, 16), ("heun", 3.0, 1, 30), ("euler", 1.0, 2, 16)],
)
def test_passes_are_those_of_the_model(
    module: Callable[[str], ModuleType],
    miniature: SimpleNamespace,
    conditioning: Any,
    empty: dict[str, Any],
    name: str,
    cfg: float,
    texts: int,
    passes: int,
) -> None:
    """Two for a step of classifier-free guidance, two for each of heun's but the last, one for each text in force."""
    stretches = module("nodes.stretches")
    plan = stretches.Plan(name, "simple", STEPS, cfg, 1.0)
    run = stretches.Stretches(miniature.model, conditioning * texts, conditioning, empty, plan)
    half, _ = run.run(SEED, run.begin(SEED), 0, 3)
    run.run(SEED, half, 3, STEPS)
    assert run.evaluations == passes
    assert "wrappers" not in miniature.model.model_options["transformer_options"]


def test_a_reward_for_other_latents_is_refused(
    search: Callable[..., SimpleNamespace],
    miniature: SimpleNamespace,
    shipped: Any,
    module: Callable[[str], ModuleType],
) -> None:
    """A transformer as wide as Wan 1.3B's reads the latents of Wan 2.1's VAE, not the miniature's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(miniature.model.model.diffusion_model, "dim", 1536)
        for node in ("BestOfNSampler", "ParticleSampler"):
            with pytest.raises(module("spatialalign.errors").ModelError, match="reads latents of wan-vae:"):
                search(node, reward=shipped)
