"""From token scores to detections: hand-set numbers, recorded token layouts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spatialalign.errors import ConfigError, TracksError
from spatialalign.tracking.detect import (
    Detections,
    caption,
    clean_phrase,
    from_spans,
    from_texts,
    phrase_scores,
    suppress,
    token_spans,
)

# Offsets that bert-base-uncased gives for "polar bear. sofa bed. sofa." ([CLS] and [SEP] are empty).
LAYOUT = [(0, 0), (0, 5), (6, 10), (10, 11), (12, 16), (17, 20), (20, 21), (22, 26), (26, 27), (0, 0)]


def test_caption_and_spans_of_phrases_that_share_a_word() -> None:
    text, spans = caption(["a Polar  bear", "sofa bed.", "the sofa"])
    assert text == "polar bear. sofa bed. sofa."
    assert [text[a:b] for a, b in spans] == ["polar bear", "sofa bed", "sofa"]
    # The second "sofa" has its own token; periods belong to no phrase.
    assert token_spans(LAYOUT, spans) == [[1, 2], [4, 5], [7]]


def test_word_pieces_belong_to_their_word() -> None:
    # "hamster. pot." as ham ##ster . pot .
    offsets = [(0, 0), (0, 3), (3, 7), (7, 8), (9, 12), (12, 13), (0, 0)]
    assert token_spans(offsets, caption(["hamster", "pot"])[1]) == [[1, 2], [4]]


@pytest.mark.parametrize("phrase", ["", " . ", "cat. dog", "cat?"])
def test_phrases_that_are_none(phrase: str) -> None:
    with pytest.raises(ConfigError, match="short noun phrase"):
        clean_phrase(phrase)


def test_a_caption_cut_off_by_the_tokenizer_is_an_error() -> None:
    with pytest.raises(ConfigError, match="phrase 1 has no token"):
        token_spans(LAYOUT[:4], caption(["polar bear", "sofa bed"])[1])


@given(st.lists(st.sampled_from(["cat", "polar bear", "sofa bed", "a box", "fox"]), min_size=1, max_size=5))
def test_spans_cut_the_caption_into_its_phrases(phrases: list[str]) -> None:
    text, spans = caption(phrases)
    assert [text[a:b] for a, b in spans] == [clean_phrase(phrase) for phrase in phrases]
    assert text == " ".join(f"{clean_phrase(phrase)}." for phrase in phrases)


def test_scores_are_the_best_token_of_the_phrase() -> None:
    # Tokens: [CLS] polar bear . cat. A box that only fires on "bear" is a polar bear all the same.
    probabilities = np.array([[0.1, 0.05, 0.8, 0.9, 0.2], [0.0, 0.3, 0.1, 0.0, 0.6]])
    np.testing.assert_array_equal(phrase_scores(probabilities, [[1, 2], [4]]), [[0.8, 0.2], [0.3, 0.6]])


def test_a_merged_label_goes_to_the_larger_score() -> None:
    # One box, active on "cat" 0.55 and "box" 0.6: the string rule reads "cat box" and rejects the frame.
    boxes = np.array([[0.0, 0, 10, 10]])
    spans = from_spans(boxes, np.array([[0.55, 0.6]]), ["cat", "box"], 0.3)
    assert spans.texts == ("box",) and spans.phrases.tolist() == [1]
    strings = from_texts(boxes, np.array([0.6]), ["cat box"], ["cat", "box"])
    assert strings.phrases.tolist() == [-1]


def test_suppression_is_within_a_phrase() -> None:
    # IoU of the first two is 90/110 = 0.818; the cat on the box overlaps it as much and stays.
    boxes = np.array([[0.0, 0, 10, 10], [1, 0, 11, 10], [1, 0, 11, 10], [40, 0, 50, 10]])
    scores = np.array([[0.9, 0.1], [0.8, 0.1], [0.1, 0.7], [0.2, 0.1]])
    found = from_spans(boxes, scores, ["cat", "box"], 0.3)
    assert found.texts == ("cat", "box") and found.scores.tolist() == [0.9, 0.7]


def test_one_thing_read_as_both_is_the_better_one() -> None:
    boxes = np.array([[0.0, 0, 10, 10], [0, 0, 10, 10.1]])
    found = from_spans(boxes, np.array([[0.4, 0.1], [0.2, 0.8]]), ["sofa bed", "sofa"], 0.3)
    assert found.texts == ("sofa",)


def test_exact_strings_only() -> None:
    boxes = np.zeros((4, 4))
    found = from_texts(boxes, np.array([0.5, 0.9, 0.6, 0.7]), ["cat", "polar bear", "##ter", ""], ["Polar bear", "cat"])
    assert found.scores.tolist() == [0.9, 0.7, 0.6, 0.5]
    assert found.phrases.tolist() == [0, -1, -1, 1]
    assert found.of(1).texts == ("cat",)


@given(st.integers(0, 12), st.integers(0, 2**32 - 1))
def test_suppression_keeps_the_best_and_no_two_that_overlap(count: int, seed: int) -> None:
    from spatialalign.geometry import iou

    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 20, (count, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(1, 20, (count, 2))], axis=1)
    scores = rng.uniform(0, 1, count)
    kept = suppress(boxes, scores, 0.5)
    overlaps = iou(boxes[:, None], boxes[None]) if count else np.zeros((0, 0))
    assert not (overlaps[np.ix_(kept, kept)] - np.eye(len(kept)) > 0.5).any()
    # What is gone overlaps something kept that is at least as good.
    for i in set(range(count)) - set(kept.tolist()):
        assert any(overlaps[i, k] > 0.5 and scores[k] >= scores[i] for k in kept)


def test_impossible_detections_are_refused() -> None:
    with pytest.raises(TracksError, match="boxes must be finite"):
        Detections(np.full((1, 4), np.nan), np.array([0.5]), np.array([0]), ("cat",))
    with pytest.raises(TracksError, match="detections: 1 scores"):
        Detections(np.zeros((2, 4)), np.array([0.5]), np.array([0]), ("cat",))
