"""The searching nodes on ComfyUI's own samplers, with the miniature."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from .test_guidance import file, guided, reward

__all__ = ["file", "guided", "reward"]

STEPS = 8


@pytest.fixture(autouse=True)
def inference(comfy: Any) -> Iterator[None]:
    """ComfyUI runs its nodes in inference mode."""
    import torch

    with torch.inference_mode():
        yield


@pytest.fixture
def empty() -> dict[str, Any]:
    """An empty latent of one clip of 13 frames of 64 x 64."""
    import torch

    return {"samples": torch.zeros(1, 16, 4, 8, 8)}


@pytest.fixture
def sampling(
    miniature: SimpleNamespace, conditioning: Any, module: Callable[[str], ModuleType], empty: dict[str, Any]
) -> Callable[..., Any]:
    """``sampling(name)``: the host's sampler of that name on the miniature, as the nodes hold it."""
    stretches = module("nodes.stretches")

    def make(name: str = "euler", latent: dict[str, Any] | None = None, model: Any = None) -> Any:
        plan = stretches.Plan(name, "simple", STEPS, 1.0, 1.0)
        return stretches.Stretches(model or miniature.model, conditioning, conditioning, latent or empty, plan)

    return make


@pytest.fixture
def native(miniature: SimpleNamespace, conditioning: Any, empty: dict[str, Any]) -> Callable[..., Any]:
    """``native(seed)``: the samples of ComfyUI's own KSampler."""
    import nodes

    def sample(seed: int, name: str = "euler", latent: dict[str, Any] | None = None, model: Any = None) -> Any:
        conds = (conditioning, conditioning, latent or empty)
        return nodes.KSampler().sample(model or miniature.model, seed, STEPS, 1.0, name, "simple", *conds)[0]["samples"]

    return sample


@pytest.mark.parametrize("name", ["euler", "uni_pc", "dpmpp_2m", "heun", "euler_ancestral", "dpmpp_sde", "ddim"])
def test_a_whole_run_is_ksampler_s(sampling: Callable[..., Any], native: Callable[..., Any], name: str) -> None:
    run = sampling(name)
    x, _ = run.run(5, run.begin(5), 0, STEPS)
    ours, theirs = run.latent(x)["samples"], native(5, name)
    assert theirs.std() > 0.5
    assert (ours == theirs).all()


def test_a_cut_changes_nothing_for_euler(sampling: Callable[..., Any]) -> None:
    run = sampling()
    start = run.begin(5)
    whole, _ = run.run(5, start, 0, STEPS)
    half, x0 = run.run(5, start, 0, 3)
    assert (run.run(5, half, 3, STEPS)[0] == whole).all()
    assert x0.std() > 0.3 and (x0 != half).any()


@pytest.mark.parametrize("name", ["uni_pc", "dpmpp_2m", "heun", "euler_ancestral"])
def test_a_cut_sampler_still_ends_at_a_clip(sampling: Callable[..., Any], name: str) -> None:
    """A single step, the middle and the end; what they make is as large as a clip and no noise is left."""
    run = sampling(name)
    x = run.begin(5)
    for first, last in ((0, 1), (1, 5), (5, STEPS)):
        x, x0 = run.run(5, x, first, last)
    import torch

    assert torch.isfinite(x).all() and (x - x0).abs().max() < 0.1


@pytest.fixture(scope="module")
def dsr(module: Callable[[str], ModuleType]) -> Any:
    """The relationship of the prompt."""
    dsr = module("spatialalign.dsr")
    return dsr.DSR("cat", "barrel", dsr.Relation.LEFT, dsr.Relation.RIGHT)


@pytest.fixture
def search(
    execute: Callable[..., tuple[Any, ...]],
    module: Callable[[str], ModuleType],
    miniature: SimpleNamespace,
    conditioning: Any,
    dsr: Any,
    empty: dict[str, Any],
) -> Callable[..., SimpleNamespace]:
    """``search(node, **inputs)``: the outputs by name; what is not given is set for two clips of the miniature."""
    room = module("nodes.search")

    def run(node: str, **inputs: Any) -> SimpleNamespace:
        given = {"model": miniature.model, "positive": conditioning, "negative": conditioning, "latent_image": empty}
        given |= {"vae": miniature.vae, "grounded_sam": miniature.grounded_sam, "dsr": dsr, "seed": 5, "steps": STEPS}
        given |= {"cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0, "preview": 0.4}
        given |= {"by": "paper", "fps": 8.0}
        if node == "BestOfNSampler":
            given |= {"candidates": 2, "keep": 1.0, "stop_at": 0.0}
        else:
            given |= {"particles": 3, "resample_every": 0.3, "noise": 0.5, "potential": "max", "temperature": 0.1}
        outputs = execute(getattr(room, node), **(given | inputs))
        return SimpleNamespace(
            **dict(zip(("latent", "images", "result", "latents", "ranking", "sheet"), outputs, strict=True))
        )

    return run


@pytest.fixture
def patched(miniature: SimpleNamespace, module: Callable[[str], ModuleType]) -> SimpleNamespace:
    """``model`` with a LoRA, and a patch that notes what it is shown: (levels of the schedule, level of the step)."""
    import torch

    generator = torch.Generator().manual_seed(0)
    name, (out, into) = next(iter(module("nodes.host").linear_sizes(miniature.model).items()))
    pair = torch.randn(2, into, generator=generator), torch.randn(out, 2, generator=generator)
    model = module("nodes.host").with_lora(miniature.model, {name: pair}, 0.05)
    found = SimpleNamespace(model=model, steps=[], then=lambda: None)

    def note(args: dict[str, Any]) -> Any:
        levels = args["model_options"]["transformer_options"]["sample_sigmas"]
        found.steps.append((len(levels), int((levels - args["sigma"][0]).abs().argmin())))
        found.then()
        return args["denoised"] * 0.98

    model.set_model_sampler_post_cfg_function(note)
    return found


def test_the_first_candidate_is_ksampler_s_clip(
    search: Callable[..., SimpleNamespace],
    native: Callable[..., Any],
    miniature: SimpleNamespace,
    patched: SimpleNamespace,
) -> None:
    """Also with a LoRA and a patch, which change it."""
    import nodes

    one = search("BestOfNSampler", model=patched.model, candidates=1)
    plain = native(5, model=patched.model)
    assert (one.latent["samples"] == plain).all() and len(one.latents) == 1
    assert not (plain == native(5)).any()
    assert (one.images == nodes.VAEDecode().decode(miniature.vae, {"samples": plain})[0]).all()


def test_every_candidate_is_ksampler_s_clip_of_its_seed(
    search: Callable[..., SimpleNamespace], native: Callable[..., Any]
) -> None:
    found = search("BestOfNSampler", candidates=2)
    seeds = [int(line.partition("seed ")[2].partition(")")[0]) for line in found.ranking.splitlines()[1:3]]
    assert 5 in seeds and len(set(seeds)) == 2 == len(found.latents)
    for seed, latent in zip(seeds, found.latents, strict=True):
        assert (latent["samples"] == native(seed)).all()
    assert (found.latents[0]["samples"] == found.latent["samples"]).all()
    assert found.sheet.shape[0] == 1 and found.images.shape == (13, 64, 64, 3)


def test_pruning_changes_no_finished_clip_of_euler(
    search: Callable[..., SimpleNamespace], native: Callable[..., Any], patched: SimpleNamespace
) -> None:
    """And a patch sees the whole schedule on either side of the look, after 3 of the 8 steps."""
    found = search("BestOfNSampler", model=patched.model, candidates=2, keep=0.5)
    assert patched.steps == [(STEPS + 1, i) for i in (0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7)]
    seed = int(found.ranking.partition("seed ")[2].partition(")")[0])
    assert (found.latent["samples"] == native(seed, model=patched.model)).all()
    assert "taken on: " in found.ranking and len(found.latents) == 1


def test_reward_guidance_counts_its_steps_on_over_the_cut(
    search: Callable[..., SimpleNamespace], native: Callable[..., Any], guided: Callable[..., Any]
) -> None:
    """It acts at every second step; the look is after the third."""
    model = guided(every=2)
    found = search("BestOfNSampler", model=model, candidates=2, keep=0.5)
    seed = int(found.ranking.partition("seed ")[2].partition(")")[0])
    led = native(seed, model=model)
    assert (found.latent["samples"] == led).all() and (led - native(seed)).abs().max() > 0.01


def test_what_a_mask_protects_is_untouched(
    search: Callable[..., SimpleNamespace], native: Callable[..., Any], empty: dict[str, Any]
) -> None:
    import torch

    mask = torch.zeros(1, 4, 8, 8)
    mask[..., 4:] = 1
    latent = {"samples": native(9), "noise_mask": mask}
    found = search("BestOfNSampler", latent_image=latent, candidates=2, keep=0.5)
    seed = int(found.ranking.partition("seed ")[2].partition(")")[0])
    assert (found.latent["samples"] == native(seed, latent=latent)).all()
    after = search("ParticleSampler", latent_image=latent, particles=3).latent["samples"]
    torch.testing.assert_close(after[..., :4], latent["samples"][..., :4], rtol=0, atol=1e-5)
    assert (after[..., 4:] - latent["samples"][..., 4:]).abs().mean() > 0.1


def test_particles_end_at_clips_and_repeat(search: Callable[..., SimpleNamespace], patched: SimpleNamespace) -> None:
    first, again = (search("ParticleSampler", model=patched.model, particles=3) for _ in range(2))
    assert (first.latent["samples"] == again.latent["samples"]).all() and first.ranking == again.ranking
    assert {levels for levels, _ in patched.steps} == {STEPS + 1}
    assert len(first.latents) == 3 and 0.5 < first.latent["samples"].std() < 2
    assert [line.partition(":")[0] for line in first.ranking.splitlines() if line.startswith("after")] == [
        f"after {step} of 8 steps" for step in (3, 5, 7)
    ]


def stopped(patched: SimpleNamespace, evaluation: int) -> None:
    """The user presses stop at this evaluation of the model."""
    from comfy.model_management import interrupt_current_processing

    patched.then = lambda: interrupt_current_processing() if len(patched.steps) == evaluation else None


def test_a_stop_hands_on_what_is_finished(
    search: Callable[..., SimpleNamespace], native: Callable[..., Any], patched: SimpleNamespace
) -> None:
    """The host forgets a stop that it raised, so that what comes behind the node runs."""
    from comfy.model_management import processing_interrupted

    stopped(patched, STEPS + 3)
    found = search("BestOfNSampler", model=patched.model, candidates=3)
    assert len(found.latents) == 1 and len(patched.steps) == STEPS + 3 and not processing_interrupted()
    assert "1 of 3 clips finished, then it was stopped" in found.ranking
    patched.then = lambda: None
    assert (found.latent["samples"] == native(5, model=patched.model)).all()


@pytest.mark.parametrize("node", ["BestOfNSampler", "ParticleSampler"])
def test_a_stop_before_anything_is_finished_is_the_host_s(
    search: Callable[..., SimpleNamespace], patched: SimpleNamespace, node: str
) -> None:
    from comfy.model_management import InterruptProcessingException, processing_interrupted

    stopped(patched, 3)
    with pytest.raises(InterruptProcessingException):
        search(node, model=patched.model)
    assert len(patched.steps) == 3 and not processing_interrupted()


def test_a_batch_is_refused(search: Callable[..., SimpleNamespace], module: Callable[[str], ModuleType]) -> None:
    import torch

    error = module("spatialalign.errors").ConfigError
    with pytest.raises(error, match="one empty clip is needed, found 2 clips"):
        search("BestOfNSampler", latent_image={"samples": torch.zeros(2, 16, 4, 8, 8)})


def test_particles_refuse_a_model_without_a_flow(
    search: Callable[..., SimpleNamespace], miniature: SimpleNamespace, module: Callable[[str], ModuleType]
) -> None:
    from comfy.model_sampling import EPS, ModelSamplingDiscrete

    other = miniature.model.clone()
    other.add_object_patch("model_sampling", type("Sampling", (ModelSamplingDiscrete, EPS), {})())
    with pytest.raises(module("spatialalign.errors").ConfigError, match="does not predict a flow"):
        search("ParticleSampler", model=other, particles=3)
