"""Arms: their names, and a comparison on a tiny Wan pipeline with a detector whose answer is known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from spatialalign.backbones.wan import WanBackbone
from spatialalign.errors import ConfigError, DataError
from spatialalign.guidance import GuidanceSettings
from spatialalign.lora import LoraPair, write_pairs
from spatialalign.prompts import Prompt
from spatialalign.rewards.latent import LatentReward, RewardInfo, save_reward
from spatialalign.rewards.wan_trunk import WanTrunk
from spatialalign.search import SearchSettings
from spatialalign.tracking.tracker import Tracker
from tests.training.conftest import PROMPTS
from tests.training.test_evaluate import LeftToRight
from training.arms import Arm, check_given, compare_arms, parse_arms, reference, with_looks
from training.evaluate import Evaluate
from training.guide import GuideSpec
from training.store import Store

SEEDS = (7, 8)
NAMES = "best-of-2, lora, best-of-2+lora"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("base", "base"),
        ("guidance+lora", "lora+guidance"),
        (" pruned-4 + guidance+lora", "lora+guidance+pruned-4"),
        ("particles-8+lora", "lora+particles-8"),
    ],
)
def test_the_order_of_parts_does_not_matter(text: str, name: str) -> None:
    assert Arm.parse(text).name == name
    assert Arm.parse(name) == Arm.parse(text)


def test_an_arm_knows_its_search() -> None:
    assert Arm.parse("lora+pruned-8") == Arm(True, False, SearchSettings("pruned", 8))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lorra", "there is no arm 'lorra'; the nearest is 'lora'"),
        ("lora+best-off-8", "there is no arm 'best-off-8'; the nearest is 'best-of-8'"),
        ("prune-2", "the nearest is 'pruned-2'"),
        ("xyz", "there is no arm 'xyz'; expected base, lora, guidance, best-of-4"),
        ("lora+", "there is no arm ''"),
        ("best-of-0", "found 'best-of-0'"),
        ("lora+lora", "each at most once; found 'lora.lora'"),
        ("base+lora", "found 'base.lora'"),
        ("best-of-2+pruned-2", "found 'best-of-2.pruned-2'"),
    ],
)
def test_arms_that_do_not_exist(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_arms(f"base,{text}")


def test_the_base_comes_first_and_no_arm_twice() -> None:
    assert [arm.name for arm in parse_arms("lora, base")] == ["base", "lora"]
    assert [arm.name for arm in parse_arms("lora")] == ["base", "lora"]
    with pytest.raises(ConfigError, match=r"'lora\+guidance' is given 2 times"):
        parse_arms("lora+guidance,base,guidance+lora")


def test_an_arm_needs_its_file() -> None:
    arms = parse_arms("base,lora,guidance+best-of-2")
    with pytest.raises(ConfigError, match="'lora' needs a LoRA; give its file with --lora"):
        check_given(arms, None, object())
    with pytest.raises(ConfigError, match=r"'guidance\+best-of-2' needs a latent reward; .* --reward"):
        check_given(arms, object(), None)
    check_given(arms, object(), object())


def test_the_largest_plain_best_of_n_is_what_others_are_held_to() -> None:
    assert reference(parse_arms("best-of-2,best-of-16,best-of-4,pruned-32,lora+best-of-64")) == "best-of-16"
    assert reference(parse_arms("base,lora+best-of-64,pruned-8")) is None


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    common: dict[str, Any] = {"model": "miniature", "out": tmp_path, "prompts": "miniature"}
    with pytest.raises(ConfigError, match="give a LoRA with --lora and no reward, or what to compare with --arms"):
        Evaluate(**common)
    with pytest.raises(ConfigError, match="no reward"):
        Evaluate(**common, lora=tmp_path / "lora.safetensors", reward="reward.safetensors")
    with pytest.raises(ConfigError, match="swapped"):
        Evaluate(**common, arms="base,best-of-2", swapped=2)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A LoRA that changes the tiny transformer's output."""
    generator = torch.Generator().manual_seed(1)
    pair = LoraPair(torch.randn(4, 12, generator=generator), torch.randn(12, 4, generator=generator))
    path = tmp_path / "lora.safetensors"
    write_pairs({"blocks.0.attn2.to_k": pair}, path, path.with_suffix(".diffusers.safetensors"), {})
    return path


def measure(backbone: WanBackbone, detector: LeftToRight, out: Path, lora: Path | None) -> dict[str, Any]:
    """Compare on the three prompts."""
    prompts = [Prompt.parse(name, text) for name, text in PROMPTS.items()]
    settings, arms = backbone.default_settings(), parse_arms(NAMES)
    return compare_arms(backbone, Tracker(detector), prompts, SEEDS, arms, out, settings, lora=lora)


def test_every_arm_is_made_once_and_costs_what_it_takes(
    backbone: WanBackbone, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, detector = tmp_path / "out", LeftToRight()
    result = measure(backbone, detector, out, lora)
    rows = {row["name"]: row for row in result["arms"]}
    assert list(rows) == ["base", "best-of-2", "lora", "lora+best-of-2"]
    # The detector sees LR whatever is drawn, one prompt of three; 3 steps with guidance are 6 passes for a candidate.
    assert [row["correct_at_0.7"]["value"] for row in rows.values()] == pytest.approx([1 / 3] * 4)
    assert [row["cost"]["evaluations"] for row in rows.values()] == [6, 12, 6, 12]
    assert [row["cost"]["relative"] for row in rows.values()] == [1, 2, 1, 2]
    assert [row["cost"]["scorings"] for row in rows.values()] == [0, 2, 0, 2]
    assert rows["lora"]["difference"]["correct_at_0.7"]["value"] == 0
    assert rows["lora+best-of-2"]["equal_compute"]["n"] == 2
    assert rows["lora+best-of-2"]["equal_compute"]["difference"]["value"] == pytest.approx(0)
    assert [entry["value"] for entry in result["best_of"]["correct_at_0.7"]] == pytest.approx([1 / 3, 1 / 3])
    assert json.loads((out / "arms.json").read_text()) == json.loads(json.dumps(result))
    assert (out / "arms.md").read_text().startswith("| arm ")
    assert Image.open(out / "arms.png").size == (1200, 680)
    # One clip of each of the types LR, RL and LT by each of four arms.
    assert (out / "arms.html").read_text().count("data:video/mp4") == 12
    assert not getattr(backbone.transformer, "peft_config", {}), "the base model is left without an adapter"

    calls = detector.calls
    capsys.readouterr()
    again = measure(backbone, detector, out, lora)
    assert again == result and detector.calls == calls
    assert capsys.readouterr().out.count("0 done, 6 there before") == 8, "sampling and scoring of four arms"


def test_all_arms_start_from_the_same_noise(backbone: WanBackbone, lora: Path, tmp_path: Path) -> None:
    measure(backbone, LeftToRight(), tmp_path / "out", lora)
    clips = {
        name: Store(tmp_path / "out" / name).sample("0001_LR", 7).read_latents()
        for name in ("base", "best-of-2", "lora", "lora+best-of-2")
    }
    # All candidates score alike here, so that the first one is delivered: the clip without a search.
    torch.testing.assert_close(clips["base"], clips["best-of-2"])
    torch.testing.assert_close(clips["lora"], clips["lora+best-of-2"])
    assert not torch.equal(clips["base"], clips["lora"])


def test_guidance_is_paid_for_in_the_arms_that_have_it(backbone: WanBackbone, tmp_path: Path) -> None:
    torch.manual_seed(0)
    trunk = WanTrunk.from_transformer(backbone.transformer, 1)
    reward = LatentReward(trunk, RewardInfo("tiny", backbone.latent_space), 16, 2)
    torch.nn.init.normal_(reward.head.to_values.weight)
    save_reward(tmp_path / "reward.safetensors", reward)
    guide = GuideSpec(((tmp_path / "reward.safetensors", 1.0),), GuidanceSettings(strength=10.0, end=1.0))
    prompts, settings = [Prompt.parse("0001_LR", PROMPTS["0001_LR"])], backbone.default_settings()
    arms, tracker = parse_arms("guidance,best-of-2"), Tracker(LeftToRight())
    result = compare_arms(backbone, tracker, prompts, [7], arms, tmp_path / "out", settings, guide=guide)
    # Two passes in each of three steps, and in the last two a gradient for three passes of one block of two.
    assert [row["cost"]["relative"] for row in result["arms"]] == [1, 1.5, 2]
    assert result["arms"][1]["equal_compute"]["n"] == 1.5
    assert result["settings"]["guidance"]["strength"] == 10.0


def test_what_is_missing_is_said_before_anything_is_sampled(backbone: WanBackbone, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'lora' needs a LoRA"):
        measure(backbone, LeftToRight(), tmp_path / "out", None)
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="nothing to evaluate"):
        compare_arms(backbone, Tracker(LeftToRight()), [], SEEDS, [Arm()], tmp_path, backbone.default_settings())


def test_looks_are_changed_for_the_arms_that_have_them() -> None:
    base, best, pruned, particles = with_looks(parse_arms("base,best-of-4,pruned-8,particles-4"), True, 1.0, 0.7)
    assert (base, best) == (Arm.parse("base"), Arm.parse("best-of-4"))
    assert (pruned.search.preview_by, pruned.search.keep, pruned.search.threshold) == ("reward", 1.0, 0.7)
    assert particles.search == replace(SearchSettings.parse("particles-4"), preview_by="reward")
