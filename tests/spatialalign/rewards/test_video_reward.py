"""VideoReward on tiny random checkpoints in the released layout: every weight, every score."""

from __future__ import annotations

import logging
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spatialalign.errors import ConfigError, ModelError
from spatialalign.rewards.video_reward import LearnedVideoReward, load_video_reward
from spatialalign.rewards.video_reward_checkpoint import Checkpoint, model_layout
from spatialalign.rewards.video_reward_config import LoraSettings, VideoRewardConfig
from spatialalign.rewards.video_reward_layout import layout
from spatialalign.video import Video

Write = Callable[..., Path]
PROMPTS = ["a cat walks to the left of a box", "a dog"]
MEAN, STD = (3.6757, 1.1646, 2.8105), (2.2476, 1.3811, 2.5121)


def clip(frames: int, height: int, width: int, seed: int) -> Video:
    random = np.random.default_rng(seed)
    return Video(random.integers(0, 256, (frames, height, width, 3), dtype=np.uint8), 4.0)


VIDEOS = [clip(12, 84, 84, 0), clip(5, 70, 100, 1)]
"""As the network sees them, 6 frames of 56 x 56 and 4 of 28 x 56: 12 and 4 tokens."""


def load(folder: Path, **changed: Any) -> LearnedVideoReward:
    return load_video_reward(folder, dtype=torch.float32, **changed)


def stored(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(folder / "checkpoint-10" / "model.pth", weights_only=True)
    return found


# --- the checkpoint -------------------------------------------------------------------------------------------------


def test_the_released_checkpoint_has_its_tensors(
    released_shapes: Callable[..., dict[str, tuple[int, ...]]], tmp_path: Path
) -> None:
    """Names and shapes of Qwen2-VL-2B with rank 64; their sum is the released file's size, two bytes a number."""
    config = VideoRewardConfig(lora=LoraSettings(rank=64, alpha=128))
    (tmp_path / "model.pth").touch()
    model = Checkpoint(tmp_path, tmp_path, config, base=None).model_config(rows=151_660)
    shapes, wrapped = model_layout(model, config)
    slots = layout(shapes, wrapped, config.lora)
    expected = released_shapes(
        width=1536, inner=8960, layers=28, keys=256, vision=1280, blocks=32, rows=151_660, rank=64, outputs=1
    )
    assert {name: slot.shape for name, slot in slots.items()} == expected
    assert len(slots) == 1123
    assert sum(int(np.prod(slot.shape)) for slot in slots.values()) == 2_515_372_032


def test_every_tensor_lands_where_it_belongs(video_reward_folder: Write) -> None:
    folder = video_reward_folder()
    network, tensors = load(folder).network, stored(folder)
    parameters = dict(network.backbone.named_parameters()) | {"rm_head.weight": network.rm_head.weight}
    seen = set()
    for name, found in parameters.items():
        old = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        module, _, leaf = f"base_model.model.{old}".rpartition(".")
        if f"{module}.base_layer.{leaf}" in tensors:
            expected = tensors[f"{module}.base_layer.{leaf}"].float()
            seen.add(f"{module}.base_layer.{leaf}")
            if leaf == "weight":
                sides = [f"{module}.lora_{side}.default.weight" for side in "BA"]
                b, a = (tensors[side].float() for side in sides)
                expected = expected + 3 * (b @ a)  # alpha 12 over rank 4
                seen.update(sides)
        else:
            expected = tensors[f"{module}.{leaf}"].float()
            seen.add(f"{module}.{leaf}")
        assert torch.equal(found, expected), name
    assert seen == set(tensors)
    assert not any(parameter.requires_grad for parameter in parameters.values())


def test_merging_rounds_once(video_reward_folder: Write) -> None:
    """In bfloat16 the sum is rounded, not the product."""
    folder = video_reward_folder()
    network, tensors = load_video_reward(folder).network, stored(folder)
    start = "base_model.model.model.layers.1.mlp.down_proj."
    weight, b, a = (
        tensors[start + leaf].float()
        for leaf in ("base_layer.weight", "lora_B.default.weight", "lora_A.default.weight")
    )
    found = network.backbone.model.language_model.layers[1].mlp.down_proj.weight
    assert torch.equal(found, (weight + 3 * (b @ a)).bfloat16())
    assert all(parameter.dtype == torch.bfloat16 for parameter in network.parameters())


def test_both_layouts_and_kept_adapters_score_the_same(video_reward_folder: Write) -> None:
    expected = load(video_reward_folder(full=True)).score(VIDEOS, PROMPTS)
    parts = video_reward_folder(full=False)
    assert np.array_equal(load(parts).score(VIDEOS, PROMPTS), expected)
    kept = load(parts, merge=False)
    layer = kept.network.backbone.model.language_model.layers[0].mlp.up_proj
    assert type(layer).__module__.startswith("peft.") and layer.scaling == {"default": 3.0}
    np.testing.assert_allclose(kept.score(VIDEOS, PROMPTS), expected, atol=1e-4)


def test_todays_names_are_understood(video_reward_folder: Write) -> None:
    """Checkpoints written again with a newer transformers have its names."""

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            today = name.replace("model.visual.", "model.model.visual.")
            today = today.replace("model.model.layers.", "model.model.language_model.layers.")
            tensors[today] = tensors.pop(name)

    folder = video_reward_folder(change=rename)
    assert any(name.startswith("base_model.model.model.language_model.layers.0.") for name in stored(folder))
    expected = load(video_reward_folder(full=False)).score(VIDEOS, PROMPTS)
    assert np.array_equal(load(folder).score(VIDEOS, PROMPTS), expected)


def test_adapters_matter(video_reward_folder: Write) -> None:
    def without(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if "lora_B" in name:
                tensors[name].zero_()

    plain = load(video_reward_folder(outputs=3, change=without)).score(VIDEOS, PROMPTS)
    assert (np.abs(plain - load(video_reward_folder()).score(VIDEOS, PROMPTS)) > 1e-3).all()


def test_all_that_is_wrong_is_told_at_once(video_reward_folder: Write) -> None:
    start = "base_model.model."
    wrong = {
        "missing": [f"{start}visual.blocks.1.norm1.bias", f"{start}model.layers.0.mlp.up_proj.lora_A.default.weight"],
        "not expected": [f"{start}model.layers.2.mlp.up_proj.base_layer.weight", f"{start}visual.extra"],
    }
    misshaped = [f"{start}rm_head.weight", f"{start}model.embed_tokens.weight"]

    def spoil(tensors: dict[str, Tensor]) -> None:
        for name in wrong["missing"]:
            del tensors[name]
        tensors.update({name: torch.zeros(2) for name in wrong["not expected"]})
        tensors.update({name: torch.zeros(3, 32) for name in misshaped})

    with pytest.raises(ModelError) as error:
        load(video_reward_folder(change=spoil))
    message = str(error.value)
    for kind, names in wrong.items():
        assert f"2 {kind}: {', '.join(sorted(names))}" in message
    for name, rows in zip(misshaped, (1, 266), strict=True):
        assert f"{name} (3, 32) instead of ({rows}, 32)" in message
    assert "checkpoint-10" in message and "2 of another shape" in message


class Trap:
    """Runs when unpickled by a careless loader."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_in_a_file_is_run(video_reward_folder: Write, tmp_path: Path) -> None:
    folder = video_reward_folder()
    torch.save({"weight": Trap(tmp_path / "sprung")}, folder / "checkpoint-10" / "model.pth")
    with pytest.raises(ModelError, match=r"model\.pth cannot be read as a file of nothing but tensors"):
        load(folder)
    assert not (tmp_path / "sprung").exists()


def test_missing_parts_are_named(video_reward_folder: Write, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="hf download KwaiVGI/VideoReward"):
        load(tmp_path / "nowhere")
    parts = video_reward_folder(full=False)
    with pytest.raises(ModelError, match=r"another: no such folder; expected the base model"):
        load(parts, base=tmp_path / "another")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ModelError, match="needs the base model"):
        load(parts)
    assert load(parts, base=tmp_path / "moved").name.startswith("reward-False-1/checkpoint-10")
    (parts / "checkpoint-10" / "non_lora_state_dict.pth").unlink()
    with pytest.raises(ModelError, match=r"non_lora_state_dict\.pth is missing"):
        load(parts)


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"data_config": {"sample_type": "multi_pts"}}, "multi_pts"),
        ({"model_config": {"use_special_tokens": False}}, "use_special_tokens"),
        ({"peft_lora_config": {"lora_enable": True}}, "lora_r"),
        ({"inference_config": {"VQ_mean": 1.0}}, "MQ_mean"),
    ],
)
def test_settings_that_cannot_be_used(video_reward_folder: Write, sections: dict[str, Any], told: str) -> None:
    with pytest.raises(ModelError) as error:
        load(video_reward_folder(sections=sections))
    assert told in str(error.value) and "model_config.json" in str(error.value)


# --- the scores -----------------------------------------------------------------------------------------------------


def by_hand(reward: LearnedVideoReward, positions: Callable[[Any], Tensor]) -> np.ndarray:
    """The scores of the first clip: its tokens put among the words', the language model run at ``positions``."""
    batch, network = reward.collate(VIDEOS[:1], PROMPTS[:1]), reward.network
    model = network.backbone.model
    with torch.inference_mode():
        words = model.language_model.embed_tokens(batch.ids)
        seen = model.visual(batch.patches, grid_thw=batch.grid)
        words[batch.ids == 262] = seen if isinstance(seen, Tensor) else seen.pooler_output  # transformers 4 and 5
        hidden = model.language_model(inputs_embeds=words, position_ids=positions(batch)).last_hidden_state[0]
    row = batch.ids[0].tolist()
    read = hidden[[row.index(mark) for mark in (263, 264, 265)]]
    weight = network.rm_head.weight.expand(3, -1)
    scores = ((read * weight).sum(1).numpy() - MEAN) / STD
    return np.append(scores, scores.sum())


@pytest.mark.parametrize("outputs", [1, 3])
def test_scores_by_hand(video_reward_folder: Write, outputs: int) -> None:
    """One position after another, read at the three tokens: by one row for all or by each one's own; normalised."""
    reward = load(video_reward_folder(outputs=outputs))
    assert reward.dimensions == ("VQ", "MQ", "TA", "Overall")
    assert reward.network.rm_head.weight.shape == (outputs, 32)
    expected = by_hand(reward, lambda batch: torch.arange(batch.ids.shape[1])[None])
    np.testing.assert_allclose(reward.score(VIDEOS[:1], PROMPTS[:1])[0], expected, atol=1e-5)


def test_positions_in_the_picture_would_score_otherwise(video_reward_folder: Write) -> None:
    reward = load(video_reward_folder())

    def placed(batch: Any) -> Tensor:
        model = reward.network.backbone.model
        # transformers 5 asks for the kinds of the tokens, 4 for the grid of pictures, of which there are none
        newer = "mm_token_type_ids" in signature(model.get_rope_index).parameters
        kinds = (batch.ids == 262).int() * 2 if newer else None
        found: Tensor = model.get_rope_index(batch.ids, kinds, video_grid_thw=batch.grid)[0]
        return found

    expected = by_hand(reward, placed)
    assert (np.abs(reward.score(VIDEOS[:1], PROMPTS[:1])[0] - expected) > 1e-3).all()


def test_without_constants_the_scores_are_bare(video_reward_folder: Write) -> None:
    bare = load(video_reward_folder(outputs=3, sections={"inference_config": None}))
    scores = bare.score(VIDEOS, PROMPTS)
    other = load(video_reward_folder(full=False, outputs=3)).score(VIDEOS, PROMPTS)
    np.testing.assert_allclose((scores[:, :3] - MEAN) / STD, other[:, :3], atol=1e-9)
    assert any("bare" in note for note in bare.notes)


def test_the_prompt_only_changes_text_alignment(video_reward_folder: Write) -> None:
    reward = load(video_reward_folder())
    one, other = reward.score([VIDEOS[0]] * 2, PROMPTS)
    np.testing.assert_allclose(one[:2], other[:2], atol=1e-5)
    assert abs(one[2] - other[2]) > 1e-3


def test_a_batch_scores_as_one_by_one(video_reward_folder: Write) -> None:
    """Clips and prompts of other lengths, so that one row is padded; and the clips do matter.

    A token a byte: 74 of the chat and the template, 12 and 4 of the clips, 32 and 5 of the prompts.
    """
    folder = video_reward_folder()
    together, alone = load(folder, batch=2), load(folder, batch=1)
    assert together.collate(VIDEOS, PROMPTS).mask.sum(1).tolist() == [118, 83]
    expected = alone.score(VIDEOS, PROMPTS)
    np.testing.assert_allclose(together.score(VIDEOS, PROMPTS), expected, atol=1e-5)
    assert (np.abs(alone.score(VIDEOS[::-1], PROMPTS) - expected) > 1e-3).all()


def test_bfloat16_is_near(video_reward_folder: Write) -> None:
    folder = video_reward_folder()
    near = load_video_reward(folder).score(VIDEOS, PROMPTS)
    np.testing.assert_allclose(near, load(folder).score(VIDEOS, PROMPTS), atol=0.2)


def test_clips_that_cannot_be_scored(video_reward_folder: Write, caplog: pytest.LogCaptureFixture) -> None:
    reward = load(video_reward_folder())
    videos = [clip(1, 84, 84, 0), VIDEOS[1], clip(4, 1, 300, 0)]
    scores = reward.score(videos, ["a cat", PROMPTS[1], "a cat"])
    assert np.isnan(scores).all(axis=1).tolist() == [True, False, True]
    np.testing.assert_allclose(scores[1], reward.score(VIDEOS[1:], PROMPTS[1:])[0], atol=1e-6)
    assert "clip 0: a clip of 1 frames" in caplog.text and "clip 2" in caplog.text
    assert reward.score([], []).shape == (0, 4)
    with pytest.raises(ConfigError, match="3 clips and 1 prompts"):
        reward.score(videos, ["a cat"])


def test_our_own_instruction_is_told(video_reward_folder: Write, caplog: pytest.LogCaptureFixture) -> None:
    folder = video_reward_folder()
    published = load(folder)
    assert published.notes == () and published.name == "reward-True-1/checkpoint-10"
    (folder / "prompt_template.txt").unlink()
    with caplog.at_level(logging.WARNING, logger="spatialalign"):
        own = load(folder)
    assert "not comparable with published ones" in caplog.text and "prompt_template.py" in own.notes[0]
    assert own.name == "reward-True-1/checkpoint-10 (instruction not the published one)"
    assert np.isfinite(own.score(VIDEOS, PROMPTS)).all()
