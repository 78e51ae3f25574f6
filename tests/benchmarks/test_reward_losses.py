"""The benchmark of reward losses: what its clips show, what its people say, its numbers, and one small run."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from spatialalign.files import read_json
from training.reward_pairs import read_pairs


@pytest.fixture(scope="module")
def parts(repo_root: Path) -> dict[str, ModuleType]:
    """The modules; benchmarks/ is no installed package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repo_root))
        return {name: importlib.import_module(f"benchmarks.{name}") for name in ("reward_losses", "reward_world")}


def test_a_clip_shows_its_truth(parts: dict[str, ModuleType]) -> None:
    """Noise away from the square, the places of the square, and its colour, are all read off the frames."""
    render = parts["reward_world"].render

    def clip(*truth: float) -> np.ndarray:
        return np.asarray(render("red", truth, np.random.default_rng(0)).astype(float))

    flawless = clip(1, 1, 1)
    square = flawless[0] != 110
    assert {tuple(pixel) for pixel in flawless[square.any(axis=-1)[None].repeat(8, 0)][:1]} == {(220.0, 40.0, 40.0)}
    # deviation 40 times (1 - VQ) on the floor's grey, which is far from both ends
    assert clip(0.5, 1, 1)[:, :, :2].std() == pytest.approx(20, rel=0.05)
    rows = [(frame != 110).any(axis=-1).any(axis=1).argmax() for frame in flawless]
    jerky = [(frame != 110).any(axis=-1).any(axis=1).argmax() for frame in clip(1, 0, 1)]
    assert len(set(rows)) == 1 and len(set(jerky)) > 3
    mixed = clip(1, 1, 0)[0]
    assert (mixed != 110).any() and not (mixed == (220, 40, 40)).all(axis=-1).any()


def test_people_tie_as_often_as_asked(parts: dict[str, ModuleType], tmp_path: Path) -> None:
    """Labels follow the truth but for the error of seeing: with none of it, a decided label has the truth's sign."""
    world = parts["reward_world"]
    path, truth = world.write_pairs(tmp_path, world.World(groups=12, clips=3, disagreement=0.0))
    found = read_pairs(path)
    assert len(found) == len(truth) == 36
    ties = (found.preference == 0).mean(axis=0)
    np.testing.assert_allclose(ties, world.TIES, atol=1 / 36)
    decided = found.preference != 0
    np.testing.assert_array_equal(found.preference[decided], np.sign(truth[decided]))
    for index in range(3):
        size = np.abs(truth[:, index])
        assert size[~decided[:, index]].max() <= size[decided[:, index]].min()
    with path.open() as handle:
        rows = list(csv.DictReader(handle))
    assert rows[0]["prompt"] == rows[2]["prompt"] != rows[3]["prompt"]
    np.testing.assert_allclose(found.ratings[:, 0] - found.ratings[:, 1], 4 * truth, atol=1)


def test_how_far_ties_are_from_decided_pairs(parts: dict[str, ModuleType]) -> None:
    """Of the pairs (3, 1), (3, 2), (2, 1), (2, 2) three are above and one is level."""
    above = parts["reward_losses"].above
    assert above(np.array([3.0, 2.0]), np.array([1.0, 2.0])) == 3.5 / 4


def test_a_histogram_has_the_area_1(parts: dict[str, ModuleType]) -> None:
    """Two of four values in the first of four bins half a unit wide; what lies beyond the end is in the last."""
    heights = parts["reward_losses"]._histogram(np.array([0.1, 0.2, 1.2, 9.0]), np.linspace(0, 2, 5))
    assert heights.tolist() == [1.0, 0.0, 0.5, 0.5]


def test_a_small_run(parts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = parts["reward_losses"]
    monkeypatch.setattr(bench, "_DRAWS", 20)
    bench.run(bench.RewardLosses(tmp_path, groups=3, held_out=3, steps=1))
    result = read_json(tmp_path / "reward_losses.json")
    assert [row["recipe"] for row in result["rows"]] == list(bench.RECIPES)
    assert result["test_pairs"] == 18 and set(result["rows"][0]["VQ"]) >= {"without_ties", "rank_correlation"}
    assert (tmp_path / "reward_losses.md").read_text().count("\n") == 7
    assert (tmp_path / "margins.png").read_bytes()[1:4] == b"PNG"
