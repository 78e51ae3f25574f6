"""The program on clips drawn by hand: every metric with tiny models, kept values, folders of videos, an evaluation."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spatialalign.backbones.wan import WanBackbone
from spatialalign.dsr import DSR, Relation
from spatialalign.errors import ConfigError, DataError, ModelError, StoreError
from spatialalign.metrics_spatial import compbench_score
from spatialalign.prompts import Prompt, write_csv
from spatialalign.score import dsr_score
from spatialalign.tracking.tracker import Tracker
from spatialalign.tracks import Tracks
from spatialalign.video import write_video
from tests.spatialalign.test_metrics_clip_iqa import write_clip
from tests.spatialalign.test_metrics_identity import write_dino
from tests.training.test_evaluate import LeftToRight, lora, make_prompts, measure  # noqa: F401  (lora is a fixture)
from training import metric_values
from training.cli import parse
from training.evaluate import Evaluate
from training.evaluate import main as evaluate_main
from training.metric_values import MetricOptions, is_made_by, made_by
from training.metrics import Metrics, measure_evaluation, measure_models, parse_models, run
from training.store import Store
from training.video_folder import find_videos, import_videos, is_video_folder

DSRS = [DSR("cat", "box", Relation.LEFT, Relation.RIGHT, "In a room", "walks")]
RED, BLUE = (250, 30, 30), (30, 30, 250)
"""The judge of the fixture says of red pictures that the cat is on the left, of blue ones that it is on the right."""


def draw(path: Path, last: tuple[int, int, int] = BLUE) -> None:
    """Nine frames: red, and the last three of another colour."""
    frames = np.empty((9, 32, 32, 3), np.uint8)
    frames[:], frames[6:] = RED, last
    write_video(path, frames, 8.0)


def tracks(obeys: bool) -> Tracks:
    """The cat passes the box from left to right, or stays on its left."""
    boxes = np.empty((9, 2, 4))
    for k in range(9):
        x = 3.0 * k if obeys else 0.0
        boxes[k] = [x, 12, x + 6, 20], [12, 12, 20, 20]
    return Tracks(boxes, np.ones((9, 2)), ("cat", "box"), (32, 32), 8.0)


def store(folder: Path, obeys: bool, seeds: tuple[int, ...] = (0, 1)) -> Store:
    """A scored store of one prompt; the last seed has a video but no score."""
    made = Store(folder, create=True)
    made.add_prompt(Prompt.of("p0", DSRS[0]))
    for seed in seeds:
        sample = made.sample("p0", seed)
        draw(sample.video, BLUE if obeys else RED)
        if seed == seeds[-1]:
            continue
        tracks(obeys).save(sample.tracks)
        sample.write_score(dsr_score(tracks(obeys), DSRS[0]), "hand")
    return made


def rows(out: Path) -> list[dict[str, str]]:
    """The lines of clips.csv."""
    with (out / "clips.csv").open(encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def test_every_metric_and_nothing_twice(tmp_path: Path, tiny_vlm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store(tmp_path / "still", obeys=False)
    store(tmp_path / "moves", obeys=True)
    vlm, dino, clip = tmp_path / "vlm", write_dino(tmp_path / "dino"), write_clip(tmp_path / "clip")
    shutil.copytree(tiny_vlm, vlm)
    options = {"dino": str(dino), "clip": str(clip), "vlm": str(vlm), "vlm_frames": 6}
    names = f"still={tmp_path / 'still'}, moves={tmp_path / 'moves'}"
    args = Metrics(models=names, out=tmp_path / "out", device="cpu", options=options)
    result = run(args)
    assert (result["not_computed"], result["failed"]) == ({}, [])
    still, moves = result["models"]
    assert (still["name"], still["videos"], moves["name"]) == ("still", 2, "moves")
    # One of two clips has no score, which is INVALID; the other obeys or does not.
    assert (still["correct_at_0.7"]["value"], moves["correct_at_0.7"]["value"]) == (0.0, 0.5)
    assert moves["invalid_rate"]["value"] == 0.5 and moves["invalid_reasons"] == {"not scored": 1}
    # Frames 0 to 3 are to be left of the box, 4 to 8 right of it; the boxes overlap from 3 to 5 and meet in frame 4.
    stays, passes = rows(tmp_path / "out")[0], rows(tmp_path / "out")[2]
    assert (stays["model"], passes["model"]) == ("still", "moves")
    assert float(stays["vbench"]) == 1.0 and float(stays["compbench"]) == pytest.approx((4 + 5 * 0.4) / 9)
    assert float(passes["compbench"]) > float(stays["compbench"])
    # The judge sees three red pictures and a last one.
    assert (float(stays["vbench2"]), float(passes["vbench2"])) == (0.0, 1.0)
    assert 0 <= float(stays["clip_iqa_quality"]) <= 1 and -1 <= float(stays["identity"]) <= 1
    assert float(stays["smoothness"]) == pytest.approx(1.0, abs=0.01)
    assert float(passes["frame_change"]) == pytest.approx((220 + 0 + 220) / 3 / 255 / 8, abs=0.01)
    assert json.loads((tmp_path / "out" / "leaderboard.json").read_text()) == json.loads(json.dumps(result))
    for name in ("leaderboard.html", "leaderboard.png", "leaderboard.md", "leaderboard.csv", "agreement.csv"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    assert "| Correct@0.7, %" in capsys.readouterr().out
    # Again without any model: every value is read.
    for folder in (vlm, dino, clip):
        shutil.rmtree(folder)
    assert run(args)["models"] == result["models"]
    # A video that has changed is measured again, for which the models would be needed.
    draw(tmp_path / "moves" / "p0" / "0" / "video.mp4", RED)
    with pytest.raises(ModelError):
        run(args)


def test_values_of_another_rule_or_model_are_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = {"base": store(tmp_path / "base", obeys=False)}
    options = MetricOptions(metrics="vbench,compbench")

    def values() -> list[float]:
        measure_models(base, tmp_path / "out", options)
        return [float(rows(tmp_path / "out")[0][metric]) for metric in ("vbench", "compbench")]

    before = values()
    # From here on the rules would give other numbers, which shows what is computed and what is read.
    monkeypatch.setattr(metric_values, "vbench_score", lambda *_: 0.25)
    monkeypatch.setattr(metric_values, "compbench_score", lambda *_: 0.75)
    assert values() == before
    monkeypatch.setattr(metric_values, "RULES", {**metric_values.RULES, "vbench": 2})
    assert values() == [0.25, before[1]]
    # The newer value is the kept one now, and values from before rules had versions are of no known rule.
    monkeypatch.setattr(metric_values, "vbench_score", lambda *_: 0.5)
    assert values() == [0.25, before[1]]
    log = tmp_path / "out" / "values.jsonl"
    log.write_text(log.read_text().replace('"made"', '"by"'))
    assert values() == [0.5, 0.75]


def test_a_value_hangs_on_its_model_and_on_the_frames_of_its_questions(tmp_path: Path) -> None:
    folder = tmp_path / "dino"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    dino = MetricOptions(metrics="identity", dino=str(folder))
    kept = made_by(dino, "identity")
    assert (kept["rule"], kept["model"]) == (1, str(folder)) and is_made_by(kept, made_by(dino, "identity"))
    (folder / "model.safetensors").write_bytes(b"other weights")
    assert not is_made_by(kept, made_by(dino, "identity"))
    shutil.rmtree(folder)
    assert is_made_by(kept, made_by(dino, "identity")), "without its files a model is known by its name"
    assert not is_made_by(kept, made_by(MetricOptions(metrics="identity", dino="facebook/dinov2-base"), "identity"))
    few, many = (made_by(MetricOptions(vlm="org/judge", vlm_frames=count), "vbench2") for count in (6, 64))
    assert is_made_by(few, few) and not is_made_by(few, many)


def test_a_judge_that_is_unclear_is_no_verdict(tmp_path: Path, tiny_vlm: Path) -> None:
    grey = store(tmp_path / "grey", obeys=True)
    draw(grey.sample("p0", 0).video, (110, 110, 110))
    options = MetricOptions(metrics="vbench2", vlm=str(tiny_vlm), vlm_frames=6)
    result = measure_models({"grey": grey}, tmp_path / "out", options)
    assert [(name, metric) for name, metric, _ in result["failed"]] == [("grey/p0/0", "vbench2")]
    assert "final: unclear" in result["failed"][0][2]
    assert result["models"][0]["vbench2"]["value"] is None


def test_what_was_not_given_is_named_and_what_was_asked_for_must_be_there(tmp_path: Path) -> None:
    options = MetricOptions()
    assert options.chosen == ("vbench", "compbench", "smoothness")
    assert set(options.missing) == {"vbench2", "identity", "clip_iqa"}
    assert "--dino, for instance facebook/dinov2-base" in options.missing["identity"]
    assert MetricOptions(metrics="smoothness, vbench").chosen == ("vbench", "smoothness")
    assert MetricOptions(metrics="smoothness").missing == {}
    with pytest.raises(ConfigError, match="identity needs a model: give --dino"):
        MetricOptions(metrics="identity")
    with pytest.raises(ConfigError, match="there is no metric 'vbench3'; expected all, or any of vbench, compbench"):
        MetricOptions(metrics="vbench3")
    base = store(tmp_path / "base", obeys=True)
    with pytest.raises(ModelError, match="facebook/dinov2-base"):
        measure_models({"base": base}, tmp_path / "out", MetricOptions(dino="facebook/dinov2-base"))
    unscored = Store(tmp_path / "none", create=True)
    unscored.add_prompt(Prompt.of("p0", DSRS[0]))
    with pytest.raises(DataError, match="no clip of .*none has a score; run python -m training.score"):
        measure_models({"base": unscored}, tmp_path / "out", MetricOptions())


@pytest.mark.parametrize("text", ["base", "base=", "=a", "a=x,a=y", "a/b=x", "a=x,"])
def test_models_are_names_and_folders(text: str) -> None:
    with pytest.raises(ConfigError, match="expected <name>=<folder>"):
        parse_models(text)


def test_a_folder_of_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, prompts = tmp_path / "videos", make_prompts()
    write_csv(tmp_path / "prompts.csv", prompts)
    for name in ("0_LR_F81_seed00.mp4", "0_LR_F81_seed01.mp4", "1_RL_F81_seed00.mp4"):
        draw(folder / name)
    (folder / "1_RL_F81_seed01.mp4").write_bytes(b"no video")
    draw(folder / "overview.mp4")
    assert is_video_folder(folder) and not is_video_folder(tmp_path)
    detector = LeftToRight()
    made = Store(tmp_path / "store", create=True)
    summary = import_videos(folder, tmp_path / "prompts.csv", made, Tracker(detector))
    assert (summary.done, [name for name, _ in summary.failed]) == (3, ["1_RL/1"])
    scores = {sample.name: sample.scored and sample.read_score().score for sample in made.samples()}
    assert scores["0_LR/0"] == scores["0_LR/1"] > 0.9 > 0.1 > scores["1_RL/0"]
    calls = detector.calls
    again = import_videos(folder, tmp_path / "prompts.csv", made, Tracker(detector))
    assert (again.skipped, again.done, detector.calls) == (3, 0, calls)
    (folder / "0_LR_F81_seed00.mp4").unlink()
    draw(folder / "0_LR_F81_seed00.mp4", RED)
    assert import_videos(folder, tmp_path / "prompts.csv", made, Tracker(detector)).done == 1
    # What cannot be read is INVALID, not left out.
    result = measure_models({"other": made}, tmp_path / "out", MetricOptions(metrics="vbench"))
    assert result["models"][0]["videos"] == 4 and result["models"][0]["invalid_rate"]["value"] == 0.25
    assert result["models"][0]["correct_at_0.7"]["value"] == 0.5
    with pytest.raises(ConfigError, match="a folder of videos needs its prompts"):
        run(Metrics(models=f"other={folder}", out=tmp_path / "out2"))
    with pytest.raises(StoreError, match="does not exist"):
        run(Metrics(models=f"other={tmp_path / 'nowhere'}", out=tmp_path / "out2"))


def test_videos_are_found_by_the_longest_id(tmp_path: Path) -> None:
    relation = DSRS[0]
    prompts = [Prompt.of("cat", relation), Prompt.of("cat_LR", relation)]
    for name in ("cat_LR_seed3.mp4", "cat_F81_seed03.mp4"):
        draw(tmp_path / name)
    found = find_videos(tmp_path, prompts)
    assert {key: path.name for key, path in found.items()} == {
        ("cat", 3): "cat_F81_seed03.mp4",
        ("cat_LR", 3): "cat_LR_seed3.mp4",
    }
    draw(tmp_path / "cat_seed3.mp4")
    with pytest.raises(DataError, match="are of one prompt and seed"):
        find_videos(tmp_path, prompts)
    (tmp_path / "cat_seed3.mp4").unlink()
    draw(tmp_path / "dog_seed3.mp4")
    with pytest.raises(DataError, match="begins with none of the 2 prompt ids"):
        find_videos(tmp_path, prompts)


def test_beside_an_evaluation(
    backbone: WanBackbone,
    lora: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    result: dict[str, Any] = measure(backbone, LeftToRight(), lora, out)
    # A clip of another run in the same store takes no part.
    extra = Store(out / "base").sample("0_LR", 99)
    shutil.copytree(Store(out / "base").sample("0_LR", 7).folder, extra.folder)
    measure_evaluation(out, result, MetricOptions(metrics="compbench"), "cpu")
    board = json.loads((out / "metrics" / "leaderboard.json").read_text())
    for arm in ("base", "aligned"):
        model = next(model for model in board["models"] if model["name"] == arm)
        assert model["videos"] == 6
        for key in ("correct_at_0.7", "invalid_rate", "mean_score", "robust_correct_at_0.7"):
            assert model[key] == pytest.approx(result[arm][key])
    # The boxes touch nowhere but in the middle; LR is right in both halves, RL in neither, LT in the first.
    by_type = {line["type"]: float(line["compbench"]) for line in rows(out / "metrics")}
    assert by_type["RL"] == pytest.approx(0.4) and by_type["LR"] > by_type["LT"] > by_type["RL"]
    given = parse(
        Evaluate, ["--model", "m", "--out", "o", "--prompts", "p", "--lora", "l", "--metrics", "all", "--dino", "d"]
    )
    assert given.metric_options == {"metrics": "all", "dino": "d"}
    with pytest.raises(ConfigError, match="there is no metric 'x'"):
        Evaluate(model="m", out=out, prompts="p", lora=lora, metric_options={"metrics": "x"})


def test_beside_arms_on_the_miniature(miniature_weights: Path, tmp_path: Path) -> None:
    out, reward = tmp_path / "out", miniature_weights / "reward" / "latent_reward.safetensors"
    given = f"--model miniature --prompts miniature --limit 2 --seeds 0 --steps 3 --arms guidance --reward {reward}"
    evaluate_main([*given.split(), "--out", str(out), "--device", "cpu", "--metrics", "all"])
    arms = json.loads((out / "arms.json").read_text())
    board = json.loads((out / "metrics" / "leaderboard.json").read_text())
    assert set(board["not_computed"]) == {"vbench2", "identity", "clip_iqa"} and board["failed"] == []
    for arm, model in zip(arms["arms"], board["models"], strict=True):
        assert (arm["name"], model["videos"]) == (model["name"], 2)
        for key in ("correct_at_0.7", "invalid_rate", "mean_score", "robust_correct_at_0.7"):
            assert model[key] == pytest.approx(arm[key])
    lines = rows(out / "metrics")
    assert [line["model"] for line in lines] == ["base", "base", "guidance", "guidance"]
    for line in lines:
        sample = Store(out / line["model"]).sample(line["prompt_id"], 0)
        dsr = Store(out / line["model"]).prompt(line["prompt_id"]).dsr
        expected = compbench_score(Tracks.load(sample.tracks), dsr)
        assert float(line["compbench"]) == pytest.approx(expected) and 0 < float(line["smoothness"]) <= 1
