"""Scores, choices and rates as the graph gets them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

T = 16
Run = Callable[..., Any]


@pytest.fixture
def make(module: Callable[[str], Any]) -> SimpleNamespace:
    """The pack's own nodes and value types, and clips with scores that can be told from the rule."""
    dsr, tracks, score = (module(f"spatialalign.{name}") for name in ("dsr", "tracks", "score"))
    errors, scoring = module("spatialalign.errors"), module("scoring")
    lr = dsr.DSR("cat", "box", dsr.Relation.LEFT, dsr.Relation.RIGHT)

    def path(places: Any, labels: tuple[str, str] = ("cat", "box"), **more: Any) -> Any:
        """Tracks of a cat at (x from the box's centre) ``places``, NaN where it is absent; both are 10 x 10."""
        across = np.asarray(places, dtype=float)
        boxes = np.array([[[95 + x, 50 + 0 * x, 105 + x, 60 + 0 * x], [95, 50, 105, 60]] for x in across])
        return tracks.Tracks(boxes, np.full((len(across), 2), 0.9), labels, (100, 200), 16, **more)

    def result(value: float | None, robust: float | None = 0.5) -> Any:
        """A result with a given score and robust score."""
        full = score.dsr_score(path(np.linspace(-50, 50, T)), lr)
        void = score.dsr_score(path([math.nan] * T), lr)
        beside = void.robust if robust is None else replace(full.robust, score=robust)
        return replace(void if value is None else replace(full, score=value), robust=beside)

    return SimpleNamespace(dsr=dsr, errors=errors, lr=lr, path=path, result=result, score=score, nodes=scoring)


def strict(text: str) -> Any:
    """JSON as every reader takes it: without NaN and Infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def picture(ui: dict[str, Any], host: Any, index: int = 0) -> np.ndarray:
    """The preview that the user interface would show."""
    saved = ui["images"][index]
    assert saved["type"] == "temp"
    return np.asarray(Image.open(host.temp / saved["subfolder"] / saved["filename"]).convert("RGB"))


# --- DSR-Score ------------------------------------------------------------------------------------------------------

# A cat level with the box and clear of it has an SSR of 1 on its side, -1 on the other. Each component of the rule is
# then 1 for a passage; for a cat that stays, the means are +1 and -1 and the gaps 0.
PASSAGE = [-50] * 6 + [-20, -10, 10, 20] + [50] * 6


@pytest.mark.parametrize(
    ("places", "expected"), [(PASSAGE, 1.0), (PASSAGE[::-1], 0.0), ([-50] * T, 0.5), ([50] * T, 0.5)]
)
def test_the_score_is_the_rule_s(run: Run, make: SimpleNamespace, places: list[float], expected: float) -> None:
    answer = run(make.nodes.ScoreDsr, tracks=make.path(places), dsr=make.lr)
    score, passed, report, initial, final, plot, result = answer.args
    assert score == expected and passed is (expected >= 0.7)
    told = strict(report)
    assert told["score"] == score and told["passed"] is passed and told["threshold"] == 0.7
    assert told["dsr"] == make.lr.to_dict() and told["normalised"] == score
    assert told["robust"]["score"] == result.robust.score
    sides = [-1.0 if x < 0 else 1.0 for x in places]
    clear = [i for i, x in enumerate(places) if abs(x) >= 20]
    assert [final[i] for i in clear] == [sides[i] for i in clear] and [initial[i] for i in clear] == [
        -sides[i] for i in clear
    ]
    assert isinstance(result, make.score.DsrScore) and result.score == score
    assert plot.shape == (1, 420, 960, 3) and plot.dtype == torch.float32 and 0 <= plot.min() < plot.max() <= 1


def test_the_user_sees_words_and_the_picture(run: Run, make: SimpleNamespace, fake_host: Any) -> None:
    answer = run(make.nodes.ScoreDsr, tracks=make.path(PASSAGE[::-1]), dsr=make.lr)
    (text,) = answer.ui["text"]
    lines = text.splitlines()
    assert lines[0] == "DSR-Score 0.000 fails 0.7; normalised 0.000"
    assert lines[1].startswith("Robust score 0.000 fails 0.7") and "16 of 16 frames are valid" in lines
    assert "- the cat does not begin clearly on the left of the box (-1.00)" in lines
    assert "- the cat does not end clearly to the right of the box (-1.00)" in lines
    shown = picture(answer.ui, fake_host)
    np.testing.assert_allclose(shown, answer.args[5][0].numpy() * 255, atol=1.01)
    # ComfyUI joins the values of a list of clips key by key.
    assert all(isinstance(value, list | tuple) for value in answer.ui.values())
    other = run(make.nodes.ScoreDsr, tracks=make.path(PASSAGE), dsr=make.lr).ui
    merged = {key: [item for ui in (answer.ui, other) for item in ui[key]] for key in answer.ui}
    assert len(merged["text"]) == len(merged["images"]) == 2
    assert (picture(merged, fake_host, 1) != shown).any()


def test_absent_things_are_a_result(run: Run, make: SimpleNamespace) -> None:
    answer = run(make.nodes.ScoreDsr, tracks=make.path([math.nan] * T), dsr=make.lr)
    score, passed, report, initial, final, _, result = answer.args
    assert math.isnan(score) and passed is False and result.score is None
    assert len(initial) == len(final) == T and all(math.isnan(value) for value in (*initial, *final))
    told = strict(report)
    assert told["score"] is None and told["valid"] is False and told["passed"] is False
    # 20 of 81 valid frames, scaled to 16 and rounded up.
    assert told["reason"] == "frames: 0 of 16 frames are valid, at least 4 are needed"
    assert answer.ui["text"][0].startswith(f"INVALID: {told['reason']}\n")
    assert run(make.nodes.ScoreDsr, tracks=make.path([math.nan] * T), dsr=make.lr, threshold=0.0).args[1] is False


def test_what_the_tracker_refused_stays_refused(run: Run, make: SimpleNamespace) -> None:
    answer = run(make.nodes.ScoreDsr, tracks=make.path(PASSAGE, invalid="two cats in 9 frames"), dsr=make.lr)
    assert math.isnan(answer.args[0]) and strict(answer.args[2])["reason"] == "tracker: two cats in 9 frames"
    assert "two cats in 9 frames" in answer.ui["text"][0]


def test_curves_have_a_value_for_every_frame(run: Run, make: SimpleNamespace) -> None:
    places = [-50.0] * 3 + [math.nan] * 4 + [50.0] * 9
    initial, final = run(make.nodes.ScoreDsr, tracks=make.path(places), dsr=make.lr).args[3:5]
    assert [None if math.isnan(value) else value for value in initial] == [1.0] * 3 + [None] * 4 + [-1.0] * 9
    assert [None if math.isnan(value) else value for value in final] == [-1.0] * 3 + [None] * 4 + [1.0] * 9


@pytest.mark.parametrize(("threshold", "passed"), [(0.5, True), (0.5000000000000001, True), (0.51, False), (0.0, True)])
def test_a_score_of_the_threshold_passes(run: Run, make: SimpleNamespace, threshold: float, passed: bool) -> None:
    """Also where the widget's own arithmetic is a little above the decimal it shows."""
    answer = run(make.nodes.ScoreDsr, tracks=make.path([50] * T), dsr=make.lr, threshold=threshold)
    assert answer.args[0] == 0.5 and answer.args[1] is passed
    assert strict(answer.args[2])["threshold"] == round(threshold, 2)
    assert f"0.500 {'passes' if passed else 'fails'} {threshold:.2g}" in answer.ui["text"][0]


def test_limits_follow_the_length_of_the_clip(run: Run, make: SimpleNamespace) -> None:
    for frames in (13, 81):
        tracks = make.path(np.linspace(-50, 50, frames))
        told = strict(run(make.nodes.ScoreDsr, tracks=tracks, dsr=make.lr).args[2])
        expected = {13: (4, 1), 81: (20, 3)}[frames]  # ceil(20 T/81), round(3 T/81)
        assert (told["limits"]["min_valid"], told["limits"]["window"]) == expected


def test_swapped_things_are_put_in_order(run: Run, make: SimpleNamespace) -> None:
    tracks = make.path(PASSAGE)
    swapped = replace(tracks, boxes=tracks.boxes[:, ::-1], confidence=tracks.confidence[:, ::-1], labels=("box", "cat"))
    straight, other = (run(make.nodes.ScoreDsr, tracks=one, dsr=make.lr).args for one in (tracks, swapped))
    assert straight[0] == other[0] == 1.0 and straight[2] == other[2]


def test_tracks_of_other_things_are_refused_with_the_remedy(run: Run, make: SimpleNamespace) -> None:
    with pytest.raises(make.errors.TracksError) as error:
        run(make.nodes.ScoreDsr, tracks=make.path(PASSAGE, labels=("dog", "box")), dsr=make.lr)
    assert "('dog', 'box')" in str(error.value) and "('cat', 'box')" in str(error.value)
    assert "connect the same dsr to DSR-Score and to the node that made the tracks" in str(error.value)


def test_depth_relations_say_what_they_need(run: Run, make: SimpleNamespace) -> None:
    front = make.dsr.DSR("cat", "box", make.dsr.Relation.FRONT, make.dsr.Relation.RIGHT)
    with pytest.raises(make.errors.TracksError, match="FRONT needs the mean disparity .* or use a left, right"):
        run(make.nodes.ScoreDsr, tracks=make.path(PASSAGE), dsr=front)


# --- Pick Best ------------------------------------------------------------------------------------------------------


def clips(count: int) -> list[torch.Tensor]:
    """Clips whose grey names them."""
    return [torch.full((3, 4, 4, 3), i / 10) for i in range(count)]


def test_the_highest_score_is_handed_on(run: Run, make: SimpleNamespace) -> None:
    results = [make.result(value) for value in (0.4, None, 0.9, 0.0, 0.9)]
    best, index, score, ranking, latent = run(make.nodes.PickBest, clips=clips(5), results=results).args
    assert (index, score, latent) == (2, 0.9, None) and torch.equal(best, clips(5)[2])
    lines = ranking.splitlines()
    assert lines[0] == "by the paper score:"
    # Equal ones stay in order; INVALID is behind 0.
    assert lines[1:5] == ["1. clip 2: 0.900", "2. clip 4: 0.900", "3. clip 0: 0.400", "4. clip 3: 0.000"]
    assert lines[5].startswith("5. clip 1: INVALID, frames: 0 of 16")


def test_each_rule_has_its_own_best(run: Run, make: SimpleNamespace) -> None:
    left_top = replace(make.result(0.85, robust=0.2), type_code="LT")
    results = [make.result(0.86, robust=None), left_top, make.result(0.3, robust=0.8)]
    # 0.85 of at most 0.8953 is more than 0.86 of 1: 1/2 + 0.35 / (2 x 0.39528) = 0.9427.
    for by, index, score in (("paper", 0, 0.86), ("normalised", 1, 0.9427), ("robust", 2, 0.8)):
        answer = run(make.nodes.PickBest, clips=clips(3), results=results, by=[by]).args
        assert answer[1] == index and answer[2] == pytest.approx(score, abs=5e-5)
        assert answer[3].startswith(f"by the {by} score:")
    assert "3. clip 0: INVALID, initial: both things are seen in 0 of the" in answer[3]


def test_all_invalid_is_a_result_too(run: Run, make: SimpleNamespace) -> None:
    results = [make.result(None, None)] * 2
    best, index, score, ranking, latent = run(
        make.nodes.PickBest, clips=clips(2), results=results, latents=[{"samples": torch.zeros(2, 1)}]
    ).args
    assert index == 0 and math.isnan(score) and torch.equal(best, clips(2)[0]) and latent["samples"].shape == (1, 1)
    assert ranking.startswith("every clip is INVALID; the first is handed on:\n1. clip 0: INVALID, frames")


@pytest.mark.parametrize(("shown", "scored"), [(1, 2), (3, 2), (0, 0)])
def test_lists_of_different_lengths_are_refused(run: Run, make: SimpleNamespace, shown: int, scored: int) -> None:
    with pytest.raises(make.errors.DataError, match=f"found {shown} clips and {scored} results; connect the clips of"):
        run(make.nodes.PickBest, clips=clips(shown), results=[make.result(0.5)] * scored)


def test_the_latent_of_the_best_clip_comes_along(run: Run, make: SimpleNamespace) -> None:
    results = [make.result(value) for value in (0.1, 0.9, 0.3)]
    batch = {
        "samples": torch.arange(3.0).reshape(3, 1, 1, 1, 1),
        "noise_mask": torch.arange(3.0).reshape(3, 1, 1),
        "batch_index": [7, 8, 9],
        "downscale_ratio_spacial": 8,
    }
    singles = [{"samples": batch["samples"][i : i + 1]} for i in range(3)]
    for latents in (singles, [batch]):
        latent = run(make.nodes.PickBest, clips=clips(3), results=results, latents=latents).args[4]
        assert latent["samples"].tolist() == [[[[[1.0]]]]]
    assert latent["noise_mask"].tolist() == [[[1.0]]] and latent["batch_index"] == [8]
    assert latent["downscale_ratio_spacial"] == 8
    assert batch["samples"].shape[0] == 3, "the input must stay as it is"
    shared = batch | {"noise_mask": torch.ones(1, 1, 1)}
    latent = run(make.nodes.PickBest, clips=clips(3), results=results, latents=[shared]).args[4]
    assert latent["noise_mask"].shape == (1, 1, 1)
    with pytest.raises(make.errors.DataError, match="found 3 clips and 2 latents; connect one latent for each clip"):
        run(make.nodes.PickBest, clips=clips(3), results=results, latents=singles[:2])
    with pytest.raises(make.errors.DataError, match="found 3 clips and 1 latents"):
        run(make.nodes.PickBest, clips=clips(3), results=results, latents=singles[:1])


# --- Score Summary --------------------------------------------------------------------------------------------------


def test_rates_count_invalid_clips_as_wrong(run: Run, make: SimpleNamespace, fake_host: Any) -> None:
    results = [make.result(value, robust) for value, robust in ((0.7, 0.9), (0.9, 0.1), (0.2, 0.1), (None, None))]
    answer = run(make.nodes.ScoreSummary, results=results)
    correct, invalid, report, plot = answer.args
    # 2 of 4 reach 0.7, one exactly; 1 of 4 is INVALID.
    assert (correct, invalid) == (0.5, 0.25)
    told = strict(report)
    assert told["correct"] == 0.5 and told["clips"] == 4 and told["invalid"] == 1 and told["robust_correct"] == 0.25
    assert told["mean_score"] == pytest.approx(0.6) and told["scores"]["paper"] == [0.7, 0.9, 0.2, None]
    assert told["scores"]["robust"] == [0.9, 0.1, 0.1, None]
    assert [row["threshold"] for row in told["curve"]] == [i / 10 for i in range(10)]
    assert [row["correct"] for row in told["curve"]] == [0.75] * 3 + [0.5] * 5 + [0.25] * 2
    # Resampling 4 clips of which 2 pass: the 2.5 % quantile of Binomial(4, 1/2) is 0, the 97.5 % quantile 4.
    assert told["interval_95"] == [0.0, 1.0]
    lines = answer.ui["text"][0].splitlines()
    assert lines[0] == "Correct@0.7: 50.0% of 4 clips, 95% interval 0% to 100%"
    assert "INVALID, counted as wrong: 1 of 4" in lines and "mean score of the valid clips: 0.600" in lines
    assert plot.shape == (1, 420, 720, 3)
    np.testing.assert_allclose(picture(answer.ui, fake_host), plot[0].numpy() * 255, atol=1.01)


def test_the_threshold_is_the_decimal_that_is_shown(run: Run, make: SimpleNamespace) -> None:
    results = [make.result(0.7)]
    widget = 70 * 0.01
    assert widget > 0.7, "the arithmetic of a widget with a step of 0.01"
    answer = run(make.nodes.ScoreSummary, results=results, threshold=[widget])
    assert answer.args[0] == 1.0 and strict(answer.args[2])["threshold"] == 0.7
    assert run(make.nodes.ScoreSummary, results=results, threshold=[0.71]).args[0] == 0.0


def test_a_single_clip_has_no_interval(run: Run, make: SimpleNamespace) -> None:
    answer = run(make.nodes.ScoreSummary, results=[make.result(None, None)])
    told = strict(answer.args[2])
    assert answer.args[:2] == (0.0, 1.0) and told["interval_95"] is None and told["mean_score"] is None
    assert answer.ui["text"][0].splitlines()[0] == "Correct@0.7: 0.0% of 1 clip"
    assert "no clip has a score" in answer.ui["text"][0]


def test_no_results_are_refused(run: Run, make: SimpleNamespace) -> None:
    with pytest.raises(make.errors.DataError, match="no scores"):
        run(make.nodes.ScoreSummary, results=[])
