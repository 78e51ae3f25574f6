"""The reward benchmark: forms of pairs, numbers by hand, and whole runs on drawn clips with a small judge."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spatialalign.dsr import DSR
from spatialalign.errors import ConfigError, DataError, ModelError
from spatialalign.prompts import Prompt
from spatialalign.rewards.vlm_judge import VlmJudge
from spatialalign.score import dsr_score
from spatialalign.tracks import Tracks
from spatialalign.video import write_video
from training.bench_measures import column, label_counts, measure
from training.bench_pairs import Clip, find_videos, read_pairs
from training.bench_scorers import (
    ClipScore,
    DsrScorer,
    JudgeScorer,
    RandomScorer,
    RewardScorer,
    load_scorer,
    score_clips,
)
from training.judge_curve import FrameAnswer, summarise
from training.reward_bench import RewardBench, main, run
from training.store import Store

PROMPT = "In a quiet room, a cat is on the left of a box, then the cat walks to the right of the box."
FRAMES = 10
RED, BLUE, GREY = (250, 30, 30), (30, 30, 250), (110, 110, 110)
"""What the judge takes for left, right, and nothing: see the fixture ``tiny_vlm``."""


def tracks(start: float, end: float) -> Tracks:
    """A cat that goes from ``start`` to ``end`` pixels right of a box that stands still."""
    x = 32 + np.linspace(start, end, FRAMES)
    cat = np.stack([x - 5, np.full(FRAMES, 20.0), x + 5, np.full(FRAMES, 30.0)], axis=1)
    box = np.tile([27.0, 20, 37, 30], (FRAMES, 1))
    return Tracks(np.stack([cat, box], axis=1), np.ones((FRAMES, 2)), ("cat", "box"), (64, 64), 8.0, source="truth")


def paint(where: Tracks | None) -> np.ndarray:
    """Frames that are red while the cat is on the left and blue while it is on the right; grey without tracks."""
    pixels = np.empty((FRAMES, 64, 64, 3), np.uint8)
    pixels[:] = GREY
    if where is not None:
        left = where.boxes[:, 0, 0] < where.boxes[:, 1, 0]
        pixels[left], pixels[~left] = RED, BLUE
    return pixels


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """One prompt; seed 0 does as asked, 1 stays, 2 does as asked but looks grey, 3 is INVALID."""
    store = Store(tmp_path / "store", create=True)
    store.add_prompt(Prompt.parse("0001_LR", PROMPT))
    for seed, (start, end) in enumerate([(-25, 25), (-25, -20), (-25, 25), (-25, 25)]):
        where = tracks(start, end)
        if seed == 3:
            where = Tracks(where.boxes, where.confidence, where.labels, where.size, 8.0, invalid="too many detections")
        sample = store.sample("0001_LR", seed)
        write_video(sample.video, paint(None if seed == 2 else where), 8)
        where.save(sample.tracks)
        sample.write_score(dsr_score(where, DSR.parse(PROMPT)), "truth")
    return store


def csv_file(path: Path, header: str, rows: Sequence[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def seed(number: int) -> str:
    return f"0001_LR/{number}/video.mp4"


@pytest.fixture
def pairs(store: Store) -> Path:
    """Five pairs of the store's clips, one of a clip that is not there, one without any label."""
    rows = [(0, 1, "A"), (1, 0, "B"), (0, 2, "same"), (1, 2, "A"), (0, 3, "A"), (0, 7, "A"), (1, 0, "invalid")]
    return csv_file(
        store.root.parent / "pairs.csv",
        "path_A,path_B,prompt,A_model,B_model,TA,Overall",
        [f'{seed(a)},{seed(b)},"{PROMPT}",m{a},m{b},{label},{label}' for a, b, label in rows],
    )


class TestForms:
    def test_of_videogen_rewardbench(self, tmp_path: Path) -> None:
        path = csv_file(
            tmp_path / "a.csv",
            "prompt,path_A,path_B,A_model,B_model,VQ,MQ,TA,Overall,fps_A",
            ["p,x.mp4,y.mp4,kling,luma,A,same,B,invalid,24", "q,x.mp4,z.mp4,kling,pika,,A,A,B"],
        )
        bench = read_pairs(path)
        assert (bench.form, bench.dimensions) == ("VideoGen-RewardBench", ("VQ", "MQ", "TA", "Overall"))
        assert bench.pairs[0].labels == {"VQ": 1, "MQ": 0, "TA": -1}
        assert bench.pairs[1].labels == {"MQ": 1, "TA": 1, "Overall": -1}
        assert bench.pairs[0].models == ("kling", "luma")
        # One file under two prompts is two clips, for a reward of the text.
        assert bench.clips == [Clip("x.mp4", "p"), Clip("y.mp4", "p"), Clip("x.mp4", "q"), Clip("z.mp4", "q")]
        assert label_counts(bench)["VQ"] == {"A": 1, "B": 0, "same": 0, "none": 1}
        assert len(read_pairs(path, 1).pairs) == 1

    def test_of_genai_bench(self, tmp_path: Path) -> None:
        rows = [
            f"p,l{k}.mp4,r{k}.mp4,sora,gen3,{vote}"
            for k, vote in enumerate(["leftvote", "rightvote", "tievote", "bothbad_vote"])
        ]
        header = "prompt,left_video,right_video,left_model,right_model,vote_type"
        bench = read_pairs(csv_file(tmp_path / "g.csv", header, rows))
        assert (bench.form, bench.dimensions) == ("GenAI-Bench", ("Overall",))
        assert [pair.labels["Overall"] for pair in bench.pairs] == [1, -1, 0, 0]
        assert bench.pairs[3].first == Clip("l3.mp4", "p") and bench.pairs[3].models == ("sora", "gen3")

    @pytest.mark.parametrize(
        ("header", "rows", "message"),
        [
            ("path_A,path_B,prompt", ["a,b,p"], "one of VQ, MQ, TA, Overall"),
            ("a,b", ["1,2"], "found a, b"),
            ("path_A,path_B,prompt,VQ", [], "no pairs"),
            ("path_A,path_B,prompt,VQ", ["a,b,p,A", "a,,p,A"], "row 3: path_B is empty"),
            ("path_A,path_B,VQ,prompt", ["a,b,A"], "row 2: prompt is empty"),
        ],
    )
    def test_what_is_neither_is_refused(self, tmp_path: Path, header: str, rows: list[str], message: str) -> None:
        with pytest.raises(DataError, match=message):
            read_pairs(csv_file(tmp_path / "bad.csv", header, rows))

    def test_a_file_that_is_absent_or_binary(self, tmp_path: Path) -> None:
        (tmp_path / "x.csv").write_bytes(b"\xff\xfe\x00")
        for name, message in (("none.csv", "does not exist"), ("x.csv", "not a CSV file")):
            with pytest.raises(DataError, match=message):
                read_pairs(tmp_path / name)

    def test_videos_lie_by_path_or_by_name(self, tmp_path: Path) -> None:
        for name in ("videos/a.mp4", "b.mp4"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        clips = [Clip("videos/a.mp4", "p"), Clip("https://host/files/b.mp4", "p"), Clip("c.mp4", "p")]
        found = find_videos(clips, tmp_path)
        assert found == {clips[0]: tmp_path / "videos/a.mp4", clips[1]: tmp_path / "b.mp4"}


class TestMeasures:
    def test_which_column_is_compared(self) -> None:
        reward, values = ("VQ", "MQ", "TA", "Overall"), (1.0, 2.0, 4.0, 7.0)
        assert column(values, reward, "MQ", ()) == 2.0
        assert column(values, reward, "Overall", ()) == 7.0
        assert column(values, reward, "Overall", ("TA",)) == 4.0
        assert column(values, reward, "TA", ("VQ",)) == 4.0, "only Overall is chosen anew"
        assert column(values[:3], reward[:3], "Overall", ()) == 7.0, "the sum, where there is no such column"
        assert column((0.5,), ("score",), "VQ", ("TA",)) == 0.5
        assert column((1.0, None), ("initial", "final"), "TA", ()) is None

    def test_by_hand(self, tmp_path: Path) -> None:
        rows = ["a,b,p,m,n,A", "b,c,p,n,o,same", "c,a,p,o,m,A", "a,d,p,m,q,B", "d,e,p,q,r,A"]
        bench = read_pairs(csv_file(tmp_path / "a.csv", "path_A,path_B,prompt,A_model,B_model,TA", rows))
        scores = {
            Clip(name, "p"): ClipScore((value,)) for name, value in zip("abcd", (3.0, 1.0, 1.5, None), strict=True)
        }
        # Margins: +2 for A, -0.5 for a tie, -1.5 for A (wrong); a-d has no score for d; d-e has no file for e.
        found = measure(bench, scores, ("score",))["dimensions"]["TA"]
        assert (found["pairs"], found["scored"]) == (4, 3)
        assert found["without_ties"] == 1 / 2
        assert (found["with_ties"], found["threshold"]) == (2 / 3, 0.5)
        assert found["with_ties_official"] == 2 / 3
        # Of four labels one is a tie: (1 - 1/4) / 2.
        assert found["chance_with_ties"] == 3 / 8
        # Decided: a-b right, c-a wrong, a-d unscored. All: a-b and the tie of four.
        assert found["of_all"] == {"without_ties": 1 / 3, "with_ties": 2 / 4}

    def test_by_generator(self, tmp_path: Path) -> None:
        rows = ["a,b,p,m,n,A", "c,b,p,m,n,same", "a,d,p,m,o,B"]
        bench = read_pairs(csv_file(tmp_path / "a.csv", "path_A,path_B,prompt,A_model,B_model,TA", rows))
        scores = {
            Clip(name, "p"): ClipScore((value,)) for name, value in zip("abcd", (2.0, 1.0, 0.0, 1.0), strict=True)
        }
        table = measure(bench, scores, ("score",))["generators"]
        by_name = {row["model"]: row for row in table["rows"]}
        assert [row["model"] for row in table["rows"]] == ["o", "m", "n"]
        # m: won, tied, lost by people; won, lost, won by the scores 2, 0, 2.
        assert by_name["m"]["human_wins"] == 0.5 and by_name["m"]["scorer_wins"] == pytest.approx(2 / 3)
        assert by_name["m"]["mean_score"] == pytest.approx(4 / 3) and by_name["m"]["without_ties"] == 0.5
        assert by_name["n"]["human_wins"] == 0.25 and by_name["n"]["scorer_wins"] == 0.5
        assert by_name["o"] == {**by_name["o"], "pairs": 1, "human_wins": 1.0, "scorer_wins": 0.0, "mean_score": 1.0}
        # People: o m n; scores: m n o, ranks 1 3 2 against 3 2 1: 1 - 6 * (4 + 1 + 1) / 24 = -0.5.
        assert table["spearman_of_wins"] == pytest.approx(-0.5)

    def test_without_labels_or_scores_there_is_no_number(self, tmp_path: Path) -> None:
        rows = ["a,b,p,invalid,same", "a,b,p,,same"]
        bench = read_pairs(csv_file(tmp_path / "a.csv", "path_A,path_B,prompt,VQ,TA", rows))
        scored = measure(bench, {Clip(n, "p"): ClipScore((1.0,)) for n in "ab"}, ("score",))["dimensions"]
        assert scored["VQ"]["pairs"] == 0 and scored["VQ"]["with_ties"] is None
        assert scored["VQ"]["chance_with_ties"] is None
        assert scored["TA"]["with_ties"] == 1.0 and scored["TA"]["without_ties"] is None
        assert scored["TA"]["of_all"] == {"without_ties": None, "with_ties": 1.0}
        nothing = measure(bench, {Clip(n, "p"): ClipScore((None,)) for n in "ab"}, ("score",))["dimensions"]["TA"]
        assert (nothing["pairs"], nothing["scored"], nothing["with_ties"]) == (2, 0, None)


class TestScorers:
    def test_random_follows_from_clip_and_seed(self, tmp_path: Path) -> None:
        files = [tmp_path / seed(k) for k in range(200)]
        first = RandomScorer(0).score(files, ["p"] * 200)
        assert first == RandomScorer(0).score(files[::-1], ["p"] * 200)[::-1]
        assert first == RandomScorer(0).score([Path("/elsewhere") / seed(k) for k in range(200)], ["p"] * 200)
        assert first != RandomScorer(1).score(files, ["p"] * 200)
        numbers = [row.values[0] for row in first]
        assert len(set(numbers)) == 200 and abs(np.mean(numbers)) < 0.25 and 0.8 < np.std(numbers) < 1.2

    def test_dsr_takes_the_stores_score_and_tracks_the_rest(self, store: Store, tmp_path: Path) -> None:
        class Tracker:
            calls = 0

            def track(self, frames: np.ndarray, subject: str, object: str, fps: float) -> Tracks:
                self.calls += 1
                assert (len(frames), subject, object) == (FRAMES, "cat", "box")
                return tracks(-25, -20)

        tracker = Tracker()
        scorer = DsrScorer("truth", lambda: tracker)  # type: ignore[arg-type, return-value]
        stored = store.sample("0001_LR", 0)
        [there] = scorer.score([stored.video], [PROMPT])
        assert there == ClipScore((stored.read_score().score,)) and tracker.calls == 0
        [invalid] = scorer.score([store.sample("0001_LR", 3).video], [PROMPT])
        assert invalid.values == (None,) and "too many detections" in invalid.reason
        write_video(tmp_path / "loose.mp4", paint(None), 8)
        staying = dsr_score(tracks(-25, -20), DSR.parse(PROMPT)).score
        assert scorer.score([tmp_path / "loose.mp4"], [PROMPT]) == [ClipScore((staying,))]
        # The clip of the store for another prompt is judged anew.
        other = PROMPT.replace("quiet", "dark")
        assert scorer.score([stored.video], [other]) == [ClipScore((staying,))] and tracker.calls == 2

    def test_judge_and_reward_agree_and_unclear_is_named(self, store: Store, tiny_vlm: Path) -> None:
        judge = VlmJudge.from_pretrained(tiny_vlm, dtype=torch.float32)
        files, prompts = [store.sample("0001_LR", k).video for k in (0, 1, 2)], [PROMPT] * 3
        asked = JudgeScorer(judge).score(files, prompts)
        assert [row.values for row in asked] == [(1.0, 1.0), (1.0, 0.0), (None, None)]
        assert asked[2].reason.startswith("unclear about the initial relation: 'maybe'; unclear about the final")
        reward = RewardScorer(judge)
        assert (reward.name, reward.dimensions) == (judge.name, ("initial", "final"))
        assert [row.values for row in reward.score(files, prompts)] == [row.values for row in asked]

    def test_scores_are_kept_and_failures_are_not(self, store: Store, tmp_path: Path) -> None:
        class Counting(RandomScorer):
            batch = 3
            asked: list[Path] = []

            def score(self, files: Sequence[Path], prompts: Sequence[str]) -> list[ClipScore]:
                if any("bad" in file.name for file in files):
                    raise DataError("a bad clip")
                self.asked.extend(files)
                return super().score(files, prompts)

        files = {Clip(f"{name}.mp4", "p"): tmp_path / f"{name}.mp4" for name in ("a", "bad", "c", "d")}
        kept, scorer = tmp_path / "scores.jsonl", Counting()
        scores, summary = score_clips(scorer, files, kept)
        assert (summary.done, summary.skipped, summary.failed) == (3, 0, [("bad.mp4", "a bad clip")])
        assert scores[Clip("bad.mp4", "p")] == ClipScore((None,), "a bad clip")
        # As after a kill in the middle of a line.
        kept.write_text(kept.read_text()[:-9])
        scorer.asked.clear()
        again, summary = score_clips(scorer, files, kept)
        assert again == scores and (summary.done, summary.skipped) == (1, 2)
        assert [file.name for file in scorer.asked] == ["d.mp4"]
        with pytest.raises(DataError, match=r"scores of random, not of DSR-Score \(x\)"):
            score_clips(DsrScorer("x", lambda: None), files, kept)  # type: ignore[arg-type, return-value]

    def test_names(self, tmp_path: Path) -> None:
        assert load_scorer("dsr", "cpu", "float32", 0, 8).name == "DSR-Score (miniature)"
        for spec in ("", "nothing", "reward", "judge:", "dsr:", "random:1"):
            with pytest.raises(ConfigError, match="expected random, dsr"):
                load_scorer(spec, "cpu", "float32", 0, 8)
        for kind in ("reward", "judge"):
            with pytest.raises(ModelError, match="here"):
                (tmp_path / "here").mkdir(exist_ok=True)
                load_scorer(f"{kind}:{tmp_path / 'here'}", "cpu", "float32", 0, 8)


class TestFrames:
    def test_bins_by_hand(self) -> None:
        said = [(-1.0, "no"), (-0.2, "yes"), (0.0, "unclear"), (0.6, "yes"), (1.0, "yes"), (0.9, "no")]
        rows = [FrameAnswer("c", k, "final", ssr, answer, "hm") for k, (ssr, answer) in enumerate(said)]  # type: ignore[arg-type]
        found = summarise([*rows, FrameAnswer("d", 0, "initial", 0.55, "yes", "yes")], bins=4)
        counts = [(b["low"], b["yes"], b["no"], b["unclear"], b["yes_share"]) for b in found["bins"]]
        assert counts == [(-1, 0, 1, 0, 0.0), (-0.5, 1, 0, 0, 1.0), (0, 0, 0, 1, None), (0.5, 3, 1, 0, 0.75)]
        assert found["bins"][3]["initial"]["yes_share"] == 1.0
        assert found["bins"][3]["final"]["yes_share"] == pytest.approx(2 / 3)
        assert (found["clips"], found["yes"], found["no"], found["unclear"]) == (2, 4, 2, 1)
        assert found["unclear_replies"] == ["hm"]
        assert (found["yes_where_below_zero"], found["yes_where_above_zero"]) == (0.5, 0.75)

    def test_a_store_asked(
        self, store: Store, tiny_vlm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (store.root / "0001_LR" / "9").mkdir()
        args = RewardBench(
            out=tmp_path / "out", store=store.root, scorers=f"judge:{tiny_vlm}", frames=4, dtype="float32"
        )
        found = run(args)["frames"]
        # Seeds 0, 1 and 3 show where the cat is: the judge says YES just where SSR is above 0. Seed 2 is grey.
        assert (found["yes_where_above_zero"], found["yes_where_below_zero"]) == (1.0, 0.0)
        # Four frames and two relations each; in every clip one of the two holds, for the cat is never on neither side.
        assert (found["clips"], found["yes"], found["no"], found["unclear"]) == (4, 12, 12, 8)
        assert found["unclear_replies"] == ["maybe"] and found["spearman"] > 0.8
        assert found["left_out"] == [{"sample": "0001_LR/9", "reason": "it has no tracks; run training.score"}]
        assert "32 done, 0 there before" in capsys.readouterr().out
        with Image.open(tmp_path / "out" / "frames.png") as picture:
            assert picture.size == (900, 560)
        assert run(args)["frames"] == found
        assert "0 done, 32 there before" in capsys.readouterr().out


class TestRuns:
    def test_whole(
        self, pairs: Path, store: Store, tiny_vlm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        args = RewardBench(
            out=tmp_path / "out",
            pairs=pairs,
            videos=store.root,
            scorers=f"random,dsr,judge:{tiny_vlm}",
            dtype="float32",
            device="cpu",
        )
        run(args)
        result = json.loads((tmp_path / "out" / "bench.json").read_text())
        bench = result["benchmark"]
        assert (bench["pairs"], bench["clips"], bench["prompts"], bench["pairs_without_video"]) == (7, 5, 1, 1)
        assert bench["absent"] == [seed(7)]
        assert bench["labels"]["TA"] == {"A": 4, "B": 1, "same": 1, "none": 1}
        chance, dsr, judge = result["scorers"]
        assert chance["name"] == "random" and chance["dimensions"]["TA"]["scored"] == 5
        # Seeds 0 and 2 have one and the same score, 1 a lower one, 3 none. Labels: 0 > 1, 0 > 1, 0 = 2, 1 > 2, 0 > 3.
        found = dsr["dimensions"]["Overall"]
        assert (found["pairs"], found["scored"], found["without_ties"]) == (5, 4, 2 / 3)
        assert (found["with_ties"], found["threshold"], found["with_ties_official"]) == (3 / 4, 0.0, 3 / 4)
        assert found["of_all"] == {"without_ties": 2 / 4, "with_ties": 3 / 5}
        assert [row["path"] for row in dsr["unscored"]] == [seed(3)]
        # The judge sees 0 and 3 as asked, 1 half, and nothing in 2: 0 > 1 twice, and 0 = 3 where people say 0 > 3.
        assert judge["name"] == "tiny-vlm" and judge["columns"] == ["initial", "final"]
        assert judge["dimensions"]["TA"]["scored"] == 3 and judge["dimensions"]["TA"]["without_ties"] == 2 / 3
        assert [row["path"] for row in judge["unscored"]] == [seed(2)]
        out = capsys.readouterr().out
        assert "1 have no file" in out and "m0" in out
        text = (tmp_path / "out" / "bench.md").read_text()
        assert "| DSR-Score (miniature) | Overall | 5     | 4      | 66.7 %" in text
        assert f"first: {seed(2)}, unclear about" in text
        html = (tmp_path / "out" / "bench.html").read_text()
        assert html.count("data:image/png;base64,") == 1 and "<script src" not in html
        run(args)
        assert re.findall(r": (\d+) done", capsys.readouterr().out) == ["0", "0", "0"], "all is kept"
        assert json.loads((tmp_path / "out" / "bench.json").read_text()) == result

    def test_ties_everywhere_and_one_class(self, store: Store, tmp_path: Path) -> None:
        for name, label in (("ties", "same"), ("one", "A")):
            rows = [f'{seed(a)},{seed(b)},"{PROMPT}",{label}' for a, b in ((0, 1), (0, 2), (2, 1))]
            path = csv_file(store.root / f"{name}.csv", "path_A,path_B,prompt,TA", rows)
            result = run(RewardBench(out=tmp_path / name, pairs=path, scorers="dsr"))
            found = result["scorers"][0]["dimensions"]["TA"]
            if label == "same":
                assert (found["without_ties"], found["with_ties"], found["chance_with_ties"]) == (None, 1.0, 1.0)
            else:
                assert (found["without_ties"], found["with_ties"], found["threshold"]) == (2 / 3, 2 / 3, None)
            assert result["scorers"][0]["generators"]["rows"] == []
            assert math.isfinite(found["of_all"]["with_ties"])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ([], "nothing to compare"),
            (["--store", "s"], "needs a judge"),
            (["--pairs", "none.csv"], "none.csv does not exist"),
            (["--pairs", "p.csv", "--scorers", "random,random"], "named twice"),
            (["--pairs", "p.csv", "--bins", "0"], "at least 1"),
        ],
    )
    def test_mistakes_are_told(
        self, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit):
            main(["--out", str(tmp_path / "out"), *options])
        assert message in capsys.readouterr().err

    def test_columns_that_no_scorer_has(self, pairs: Path, store: Store, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no scorer has the columns TA"):
            run(RewardBench(out=tmp_path / "out", pairs=pairs, videos=store.root, overall=["TA"]))
