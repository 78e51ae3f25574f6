"""Collect Sample: what it writes is a store that the training programs read, and what does not fit is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from spatialalign.backbones.latent_space import WAN21_MEAN, WAN21_STD, LatentSpace
from spatialalign.prompts import write_csv
from spatialalign.score import dsr_score
from spatialalign.store import Store
from spatialalign.tracks import Tracks
from spatialalign.video import read_video

TEXT = "In a sunny meadow, a cat is on the left of a box, then the cat walks to the right of the box."
FRAMES, SIDE = 13, 64
GRAPH = {
    "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "wan.safetensors", "weight_dtype": "default"}},
    "2": {"class_type": "ModelSamplingSD3", "inputs": {"model": ["1", 0], "shift": 3.0}},
    "3": {"class_type": "PrimitiveInt", "inputs": {"value": 7}},
    "4": {
        "class_type": "KSampler",
        "inputs": {
            "model": ["2", 0],
            "positive": ["5", 0],
            "seed": ["3", 0],
            "steps": 16,
            "cfg": 5.0,
            "sampler_name": "euler",
            "scheduler": "simple",
            "denoise": 1.0,
        },
    },
    "9": {"class_type": "SpatialAlignCollect", "inputs": {"latent": ["4", 0], "seed": ["3", 0]}},
}


@pytest.fixture
def node(module: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The node; every VAE given to it is as wide as its number says."""
    monkeypatch.setattr(module("host"), "vae_width", lambda vae: vae)
    return module("dataset").CollectSample


@pytest.fixture
def errors(module: Callable[[str], Any]) -> Any:
    """The pack's errors."""
    return module("spatialalign.errors")


def walk(pack_engine: Callable[[str], Any], across: bool) -> Any:
    """The pack's Tracks of a cat that walks from left to right of a box, or stays on its left."""
    x = np.linspace(0, 48, FRAMES) if across else np.zeros(FRAMES)
    cat = np.stack([x, x * 0 + 40, x + 16, x * 0 + 56], axis=1)
    box = np.tile([24.0, 40, 40, 56], (FRAMES, 1))
    boxes = np.stack([cat, box], axis=1)
    tracks = pack_engine("spatialalign.tracks").Tracks
    return tracks(boxes, np.ones((FRAMES, 2)), ("cat", "box"), (SIDE, SIDE), 8.0, source="truth")


@pytest.fixture
def clip(module: Callable[[str], Any]) -> dict[str, Any]:
    """One clip of the miniature's size, all required inputs."""
    generator = torch.Generator().manual_seed(0)
    text = torch.zeros(1, 512, 4096)
    text[0, :20] = torch.randn(20, 4096, generator=generator)
    return {
        "dsr": module("spatialalign.dsr").DSR.parse(TEXT),
        "latent": {"samples": torch.randn(1, 16, 4, 8, 8, generator=generator)},
        "positive": [[text, {"pooled_output": None}]],
        "vae": 8,
        "set_name": "cats",
        "seed": 7,
        "fps": 8.0,
        "base_model": "miniature",
        "images": torch.linspace(0, 1, SIDE)[None, :, None, None].expand(FRAMES, SIDE, SIDE, 3),
    }


def told(output: Any) -> str:
    """The text under the node."""
    return output.ui.as_dict()["text"][0]  # type: ignore[no-any-return]


def test_a_sample_is_complete_and_in_the_models_space(run: Any, node: Any, clip: Any, module: Any) -> None:
    tracks = walk(module, across=True)
    output = run(node, hidden={"prompt": GRAPH, "unique_id": "9"}, tracks=tracks, **clip)
    folder = Path(output.args[0])
    assert folder.parent.parent == module("host").output_directory() / "spatialalign" / "cats"
    assert folder.name == "7"
    store = Store(folder.parent.parent)
    (prompt,) = store.prompts()
    assert re.fullmatch("[0-9a-f]{8}_LR", prompt.prompt_id)
    assert prompt.text == TEXT

    sample = store.sample(prompt.prompt_id, 7)
    raw = clip["latent"]["samples"][0]
    for channel in (0, 15):
        expected = (raw[channel] - WAN21_MEAN[channel]) / WAN21_STD[channel]
        torch.testing.assert_close(sample.read_latents()[channel], expected)
    header = sample.read_header()
    assert (header.space, header.model) == (LatentSpace(width=8).name, "miniature")
    stated = {"steps": 16, "guidance": 5.0, "sampler": "euler", "scheduler": "simple", "denoise": 1.0, "shift": 3.0}
    size = {"frames": 13, "height": 64, "width": 64, "fps": 8.0}
    assert header.settings == {**size, **stated, "checkpoint": "wan.safetensors"}
    text = store.read_text(prompt.prompt_id)
    assert torch.equal(text, clip["positive"][0][0][0, :20])  # the padding is not stored
    video = read_video(sample.video)
    assert (video.frames.shape, video.fps) == ((FRAMES, SIDE, SIDE, 3), 8.0)
    assert np.abs(video.frames - clip["images"].numpy() * 255).max() < 12  # a smooth picture through H.264
    score = dsr_score(Tracks.load(sample.tracks), prompt.dsr)
    assert score.score is not None
    assert sample.read_score().to_dict() == score.to_dict()
    assert json.loads(sample.score.read_text())["tracker"] == "truth"
    assert "added latents, video, tracks, score" in told(output)
    assert "1 clips of 1 prompts, 1 of them scored: 1 winners, 0 losers, 0 INVALID; 0 pairs" in told(output)
    assert "WARNING" not in told(output)


def test_the_same_again_adds_nothing_and_what_is_missing_is_added(
    run: Any, node: Any, clip: Any, module: Any, video: Any
) -> None:
    clip["prompt_id"] = "0001_LR"
    folder = Path(run(node, **clip).args[0])
    assert folder.parent.name == "0001_LR"
    before = {path: path.read_bytes() for path in folder.rglob("*")}
    assert {path.name for path in before} == {"latents.safetensors", "video.mp4"}
    # The last bits differ when a GPU computes the same clip twice; and a VIDEO holds the same frames as the IMAGE.
    moving = video(clip.pop("images"), 8.0)
    again = dict(clip, latent={"samples": clip["latent"]["samples"] + 1e-5}, video=moving)
    output = run(node, **again)
    assert "there already, nothing was added" in told(output)
    assert {path: path.read_bytes() for path in folder.rglob("*")} == before

    (folder / "video.mp4").unlink()
    output = run(node, **again, tracks=walk(module, across=False))
    assert "added video, tracks, score" in told(output)
    assert (folder / "latents.safetensors").read_bytes() == before[folder / "latents.safetensors"]
    assert "0 winners, 1 losers" in told(output)


def test_another_clip_under_the_same_seed_is_refused(run: Any, node: Any, clip: Any, errors: Any) -> None:
    folder = Path(run(node, **clip).args[0])
    before = (folder / "latents.safetensors").read_bytes()
    other = dict(clip, latent={"samples": torch.randn(1, 16, 4, 8, 8, generator=torch.Generator().manual_seed(1))})
    with pytest.raises(errors.StoreError, match=r"another clip of the same prompt and seed.*another set"):
        run(node, **other)
    assert (folder / "latents.safetensors").read_bytes() == before
    assert [path for path in folder.iterdir() if path.name.startswith(".")] == []
    run(node, **(other | {"seed": 8}))


def test_one_set_is_made_in_one_way(run: Any, node: Any, clip: Any, errors: Any) -> None:
    hidden = {"prompt": GRAPH, "unique_id": "9"}
    run(node, hidden=hidden, **clip)
    clip["seed"] = 8
    sampler = GRAPH["4"] | {"inputs": GRAPH["4"]["inputs"] | {"cfg": 6.0}}
    for change, inputs, words in (
        ({"4": sampler}, {}, "guidance 5.0 there, 6.0 now"),
        ({"4": GRAPH["4"] | {"inputs": GRAPH["4"]["inputs"] | {"model": ["1", 0]}}}, {}, "shift 3.0 there, not stated"),
        ({}, {"vae": 96}, "latent space wan-vae"),
        ({}, {"base_model": "other"}, "model miniature there, other now"),
        ({}, {"fps": 16.0}, "fps 8.0 there, 16.0 now"),
    ):
        with pytest.raises(errors.StoreError, match=f"made otherwise .*{words}"):
            run(node, hidden={"prompt": GRAPH | change, "unique_id": "9"}, **(clip | inputs))
    run(node, hidden=hidden, **clip)


def test_a_lora_on_the_way_is_part_of_the_model(run: Any, node: Any, clip: Any) -> None:
    loader = {"lora_name": "x.safetensors", "strength_model": 0.5, "model": ["1", 0]}
    ours = {"lora": "y.safetensors", "strength": 1.0, "model": ["6", 0]}
    off = {"lora": "z.safetensors", "strength": 0, "model": ["7", 0]}
    graph = GRAPH | {
        "6": {"class_type": "LoraLoaderModelOnly", "inputs": loader},
        "7": {"class_type": "SpatialAlignLoadLora", "inputs": ours},
        "8": {"class_type": "SpatialAlignLoadLora", "inputs": off},
        "2": {"class_type": "ModelSamplingSD3", "inputs": {"model": ["8", 0], "shift": 3.0}},
    }
    folder = Path(run(node, hidden={"prompt": graph, "unique_id": "9"}, **clip).args[0])
    (sample,) = Store(folder.parent.parent).samples()
    assert sample.read_header().model == "miniature+lora:y.safetensors@1+lora:x.safetensors@0.5"


def test_a_seed_that_is_not_the_samplers_is_noticed(run: Any, node: Any, clip: Any) -> None:
    output = run(node, hidden={"prompt": GRAPH, "unique_id": "9"}, **(clip | {"seed": 3}))
    assert "kept under seed 3, but a sampler states 7" in told(output)


def test_another_text_under_one_id_is_refused(run: Any, node: Any, clip: Any, errors: Any, module: Any) -> None:
    run(node, **clip)
    clip |= {"seed": 8}
    with pytest.raises(errors.StoreError, match="another text embedding"):
        run(node, **(clip | {"positive": [[clip["positive"][0][0].flip(2), {}]]}))
    other = module("spatialalign.dsr").DSR.parse(TEXT.replace("cat", "dog"))
    run(node, **(clip | {"dsr": other}))  # an id of its own
    clip |= {"prompt_id": "0001_LR", "set_name": "named"}
    run(node, **clip)
    with pytest.raises(errors.StoreError, match="another text: 'In a sunny meadow, a cat"):
        run(node, **(clip | {"dsr": other}))


SOMEWHERE = torch.zeros(1, 16, 4, 8, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent": {"samples": torch.zeros(2, 16, 4, 8, 8)}}, "2 clips.*batch size to 1"),
        ({"latent": {"samples": torch.zeros(1, 48, 4, 4, 4)}}, r"\(1, 48, 4, 4, 4\).*Wan 2.2 5B"),
        ({"latent": {"samples": torch.zeros(1, 16, 8, 8)}}, r"\(1, 16, 8, 8\)"),
        ({"latent": {"samples": SimpleNamespace(tensors=[SOMEWHERE])}}, "several latents"),
        ({"latent": {"samples": SOMEWHERE / 0}}, "latents hold NaN"),
        ({"latent": {"samples": torch.zeros(1, 16, 3, 8, 8)}}, "9 frames of 64x64, the video has 13 frames of 64x64"),
        ({"latent": {"samples": torch.zeros(1, 16, 4, 8, 10)}}, "13 frames of 80x64, the video has 13 frames of 64x64"),
        ({"positive": []}, "0 conditionings"),
        ({"positive": [[SOMEWHERE, {}], [SOMEWHERE, {}]]}, "2 conditionings.*without combining"),
        ({"positive": [[torch.ones(1, 77, 768), {}]]}, r"\(1, 77, 768\).*Wan's text encoder"),
        ({"positive": [[torch.ones(2, 5, 4096), {}]]}, r"\(2, 5, 4096\)"),
        ({"positive": [[torch.zeros(1, 5, 4096), {}]]}, "all zeros"),
        ({"positive": [[torch.full((1, 5, 4096), torch.inf), {}]]}, "text embedding hold NaN"),
        ({"positive": [[torch.ones(1, 5, 4096), {"concat_latent_image": SOMEWHERE}]]}, "concat_latent_image"),
        ({"base_model": " "}, "base_model is empty"),
    ],
)
def test_parts_that_cannot_be_trained_on_are_refused(
    run: Any, node: Any, clip: Any, errors: Any, module: Any, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(errors.DataError, match=message):
        run(node, **(clip | change))
    assert not list(module("host").output_directory().rglob("*.*"))


def test_frames_come_from_one_socket(run: Any, node: Any, clip: Any, errors: Any, video: Any) -> None:
    with pytest.raises(errors.VideoError, match="both are connected"):
        run(node, **clip, video=video(clip["images"], 8.0))
    del clip["images"]
    with pytest.raises(errors.VideoError, match="neither is connected"):
        run(node, **clip)


def test_tracks_and_result_must_be_of_this_clip(run: Any, node: Any, clip: Any, errors: Any, module: Any) -> None:
    engine = module("spatialalign.score")
    across, stays = (walk(module, across=value) for value in (True, False))
    right, wrong = (engine.dsr_score(tracks, clip["dsr"]) for tracks in (across, stays))
    with pytest.raises(errors.DataError, match="connect the tracks, too"):
        run(node, **clip, result=right)
    with pytest.raises(errors.DataError, match=r"score \(0\.500\) is not that of the tracks.*\(1\.000\)"):
        run(node, **clip, tracks=across, result=wrong)
    short = module("spatialalign.tracks").Tracks(
        across.boxes[:9], across.confidence[:9], across.labels, across.size, across.fps
    )
    with pytest.raises(errors.DataError, match="tracks are of 9 frames"):
        run(node, **clip, tracks=short)
    dog = module("spatialalign.dsr").DSR.parse(TEXT.replace("cat", "dog"))
    with pytest.raises(errors.DataError, match="'dog', 'box'.*connect the tracks"):
        run(node, **(clip | {"dsr": dog}), tracks=across)
    assert "score" in told(run(node, **clip, tracks=across, result=right))


@pytest.mark.parametrize("name", ["", "..", "a/b", "a\\b", "/tmp/x", "C:x", ".hidden", "a.", "a ", "x" * 101])
def test_names_that_leave_the_folder_are_refused(run: Any, node: Any, clip: Any, errors: Any, name: str) -> None:
    with pytest.raises(errors.StoreError, match="cannot name a folder"):
        run(node, **(clip | {"set_name": name}))
    assert "cannot name a folder" in node.validate_inputs(set_name=name)
    with pytest.raises(errors.PromptError, match="prompt_id"):
        run(node, **(clip | {"prompt_id": "../" + name}))


def test_names_are_checked_before_the_graph_runs(node: Any) -> None:
    assert node.validate_inputs() is True  # both linked
    assert node.validate_inputs(set_name="Katzen und Hunde 2", prompt_id="") is True
    assert "prompt_id" in node.validate_inputs(set_name="cats", prompt_id="a/b")


def test_an_unchanged_graph_runs_again_when_its_set_was_deleted(run: Any, node: Any, clip: Any) -> None:
    unlinked = dict.fromkeys(clip) | {"set_name": "cats", "prompt_id": ""}
    before = node.fingerprint_inputs(**unlinked)
    run(node, **clip)
    after = node.fingerprint_inputs(**unlinked)
    assert before != after
    assert node.fingerprint_inputs(**unlinked) == after


def test_the_training_programs_take_the_set_over(
    run: Any, node: Any, module: Any, tmp_path: Path, capsys: Any, miniature_weights: Path
) -> None:
    """Clips of the miniature as ComfyUI would hand them over: mined, trained on, and continued with the same base."""
    pytest.importorskip("diffusers", reason="training needs the extra train")
    from spatialalign.backbones import load_backbone
    from training.dpo import main as dpo
    from training.generate import main as generate
    from training.mine import main as mine
    from training.score import main as score

    backbone, space = load_backbone("miniature", device="cpu"), LatentSpace(width=8)
    settings = replace(backbone.default_settings(), steps=2, guidance=1.0)
    sentences = [TEXT, TEXT.replace("cat", "dog")]
    texts = backbone.encode_text(sentences)
    latents = backbone.sample([texts[0], texts[0], texts[1], texts[1]], texts[0], [0, 1, 0, 1], settings)
    frames = backbone.decode(latents)
    for number in range(4):
        dsr = module("spatialalign.dsr").DSR.parse(sentences[number // 2])
        truth = walk(module, across=number % 2 == 0)
        output = run(
            node,
            dsr=dsr,
            latent={"samples": space.denormalise(latents[number : number + 1])},
            positive=[[torch.nn.functional.pad(texts[number // 2], (0, 0, 0, 480))[None, :512], {}]],
            vae=8,
            set_name="animals",
            seed=number % 2,
            fps=8.0,
            base_model="miniature",
            images=torch.from_numpy(frames[number]).float() / 255,
            tracks=replace(truth, labels=(dsr.subject, dsr.object)),
        )
    assert "4 clips of 2 prompts, 4 of them scored: 2 winners, 2 losers, 0 INVALID; 2 pairs" in told(output)
    root = Path(output.args[0]).parent.parent
    store = Store(root)
    cats = next(prompt for prompt in store.prompts() if prompt.dsr.subject == "cat")
    sample = store.sample(cats.prompt_id, 1)
    torch.testing.assert_close(sample.read_latents(), latents[1], atol=1e-5, rtol=1e-5)
    assert torch.equal(store.read_text(cats.prompt_id), texts[0])
    assert sample.read_header().space == backbone.latent_space

    score(["--store", str(root), "--device", "cpu"])
    assert "0 done, 4 there before" in capsys.readouterr().out
    mine(["--store", str(root), "--model", "miniature"])
    common = ["--model", "miniature", "--store", str(root), "--device", "cpu"]
    few = ["--steps", "2", "--warmup_steps", "1", "--batch_pairs", "1", "--micro_pairs", "1", "--held_out", "0"]
    dpo([*common, "--out", str(tmp_path / "lora"), "--preset", "miniature", *few])
    assert (tmp_path / "lora" / "lora_comfyui.safetensors").is_file()

    write_csv(tmp_path / "prompts.csv", [cats])
    prompts = [*common, "--prompts", str(tmp_path / "prompts.csv"), "--steps", "1", "--guidance", "1"]
    with pytest.raises(SystemExit):
        generate([*prompts, "--seeds", "0"])
    assert re.search(r"made otherwise \(.*steps not stated there, 1 now.*another store", capsys.readouterr().err)
    generate([*prompts, "--seeds", "5"])
    assert store.sample(cats.prompt_id, 5).generated
