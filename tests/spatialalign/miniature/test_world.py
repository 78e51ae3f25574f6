"""The drawn world: its truth, its captions, and the separation that makes chance 1/6."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from spatialalign import DSR, Relation, dsr_score
from spatialalign.miniature import FRAMES, HEIGHT, WIDTH
from spatialalign.miniature.sprites import ANIMALS, OBJECTS, SCENES
from spatialalign.miniature.world import TYPES, draw, prompts, render, triples
from spatialalign.tracking.segment import boxes_from_masks


def _dsr(code: str) -> DSR:
    return DSR("cat", "crate", Relation(code[0]), Relation(code[1]), scene="On a sunny meadow", motion="walks")


def test_a_clip_is_what_its_seed_says() -> None:
    first, again, other = (render(_dsr("LT"), seed) for seed in (3, 3, 4))
    assert first.frames.shape == (FRAMES, HEIGHT, WIDTH, 3) and first.frames.dtype == np.uint8
    np.testing.assert_array_equal(first.frames, again.frames)
    assert (first.frames != other.frames).any()


@pytest.mark.parametrize("shown", TYPES)
def test_only_the_right_type_is_correct(shown: str) -> None:
    """A clean clip of one type is a winner for that type alone, so guessing the type is right one time in six."""
    for seed in range(4):
        clip = render(_dsr(shown), seed)
        for asked in TYPES:
            score = dsr_score(clip.tracks, _dsr(asked)).score
            assert score is not None
            assert (score >= 0.7) == (asked == shown), (shown, asked, seed, score)


@pytest.mark.parametrize("code", ["L", "R", "T"])
def test_an_animal_that_stays_is_never_a_winner(code: str) -> None:
    clip = render(_dsr("LR"), 1, 2 * code)
    assert all((dsr_score(clip.tracks, _dsr(asked)).score or 0) < 0.7 for asked in TYPES)


def test_true_boxes_hold_exactly_the_visible_pixels() -> None:
    """Boxes are compared with a pixel-by-pixel search of the masks, the masks with what drawing the animal changed."""
    foot, far = np.array([20.0, 50.0]), np.array([45.0, 44.0])
    empty, _ = draw("In a cozy room", [("rock", far, False)])
    frame, masks = draw("In a cozy room", [("rock", far, False), ("dog", foot, False)])
    changed = (frame != empty).any(-1)
    assert not (masks[1] & ~changed).any()
    ys, xs = np.nonzero(masks[1])
    np.testing.assert_array_equal(boxes_from_masks(masks)[1], [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])


def test_train_and_eval_share_no_triple_and_every_word_is_known() -> None:
    train, held_out = set(triples("train")), set(triples("eval"))
    assert not train & held_out and len(train | held_out) == 64
    assert {(a, o) for a, o, _ in train} == set(itertools.product(ANIMALS, OBJECTS))
    assert {s for _, _, s in train} == set(SCENES)
    assert len({p.prompt_id for p in prompts("train") + prompts("eval")}) == 384
    assert all(DSR.parse(p.text) == p.dsr for p in prompts("eval"))
    with pytest.raises(ValueError, match="split"):
        prompts("test")
