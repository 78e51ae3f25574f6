"""The report page, made from drawn clips with known tracks."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from spatialalign.errors import DataError
from spatialalign.files import write_json
from spatialalign.miniature import FRAMES
from training.report import Report, choose, run
from training.report_charts import Frame, Series, curve_chart, nice_ticks, segments, spread
from training.report_html import percent, summary

VOID = {"meta", "input", "br", "line", "rect", "circle", "polyline", "polygon"}
SEEDS = (0, 1)


def entry(value: float, half: float = 0.05) -> dict[str, float]:
    """A number with its interval."""
    return {"value": value, "low": value - half, "high": value + half}


def arm(rate: float) -> dict[str, Any]:
    """Numbers of one model, as training.evaluate writes them."""
    rows = [{"tau": k / 10, **entry(rate + (0.7 - k / 10) / 10)} for k in range(10)]
    kinds = {
        code: {"videos": 2, "correct_at_0.7": entry(rate), "invalid_rate": entry(0.02), "mean_score": entry(0.6)}
        for code in ("LR", "TL")
    }
    measures = {
        name: entry(rate + shift)
        for name, shift in {
            "correct_at_0.7": 0.0,
            "normalised_correct_at_0.7": 0.01,
            "robust_correct_at_0.7": -0.02,
            "invalid_rate": -0.2,
            "mean_score": 0.2,
            "mean_normalised": 0.21,
            "mean_robust": 0.19,
        }.items()
    }
    return {"videos": 4, "correct_at": rows, "robust_correct_at": rows, "per_type": kinds, **measures}


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation folder: two prompts, two seeds; the base draws a subject that stays, the aligned one obeys."""
    from spatialalign.miniature.world import prompts, render
    from spatialalign.score import dsr_score
    from spatialalign.video import write_video
    from training.store import Store

    folder = tmp_path_factory.mktemp("evaluation")
    chosen = [prompt for prompt in prompts("eval") if prompt.dsr.type_code in ("LR", "TL")][:2]
    samples = []
    for prompt in chosen:
        for seed in SEEDS:
            row: dict[str, Any] = {"prompt_id": prompt.prompt_id, "seed": seed, "type": prompt.dsr.type_code}
            for name, shown in (("base", prompt.dsr.type_code[0] * 2), ("aligned", None)):
                store = Store(folder / name, create=True)
                store.add_prompt(prompt)
                sample = store.sample(prompt.prompt_id, seed)
                clip = render(prompt.dsr, seed, shown)
                tracks = clip.tracks
                if name == "base" and seed == 1:
                    boxes = tracks.boxes.copy()
                    boxes[2:, 0] = float("nan")
                    tracks = type(tracks)(boxes, tracks.confidence, tracks.labels, tracks.size, tracks.fps)
                score = dsr_score(tracks, prompt.dsr)
                write_video(sample.video, clip.frames, 8.0)
                tracks.save(sample.tracks)
                write_json(sample.score, score.to_dict())
                row[name] = {"score": score.score, "reason": score.reason}
            samples.append(row)
    result = {
        "version": 1,
        "prompts": 2,
        "seeds": list(SEEDS),
        "stores": {"base": "base", "aligned": "aligned"},
        "base": arm(0.2345),
        "aligned": arm(0.5678),
        "difference": {k: entry(0.3333, 0.01) for k in ("correct_at_0.7", "invalid_rate", "mean_score")},
        "controls": {"chance": {"base": entry(0.0789), "aligned": entry(0.0654)}},
        "settings": {"model": "miniature", "lora": "<a & b>"},
        "versions": {"python": "3.11"},
        "samples": samples,
    }
    write_json(folder / "metrics.json", result)
    rows: list[dict[str, Any]] = [
        {"event": "train", "step": k, "loss": 0.7 - k / 100, "accuracy": 0.5 + k / 50, "margin": None}
        for k in range(1, 9)
    ]
    rows += [{"event": "held_out", "step": k, "loss": 0.69, "accuracy": 0.6} for k in (0, 4, 8)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"event": "tr')
    return folder


@pytest.fixture(scope="module")
def html(evaluation: Path) -> str:
    """The page of that folder."""
    out = run(Report(evaluation=evaluation, training_log=evaluation / "train.jsonl", title="Aligned <b> & base"))
    assert out == evaluation / "report.html"
    return out.read_text(encoding="utf-8")


class Balance(HTMLParser):
    """Checks that every element that opens closes, and collects attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)


def parsed(html: str) -> Balance:
    """The page after the balance check."""
    parser = Balance()
    parser.feed(html)
    assert not parser.open
    return parser


def test_the_page_is_well_formed_and_self_contained(html: str) -> None:
    page = parsed(html)
    for tag, name, value in page.attributes:
        if name in ("src", "href", "poster", "data", "action"):
            assert value.startswith("data:"), f"<{tag} {name}={value[:60]!r}> reaches outside the page"
    code = re.sub(r"base64,[A-Za-z0-9+/=]+", "", html)
    assert not re.findall(r"(?:https?:)?//[a-z0-9]", re.sub(r"(?m)^\s*//.*$", "", code)), "an address in the page"
    assert "@import" not in code and not re.search(r"url\((?!data:)", code)


def test_the_page_shows_the_numbers(html: str, evaluation: Path) -> None:
    text = " ".join(parsed(html).words)
    for shown in ("23.4 %", "56.8 %", "+33.3", "7.9 %", "6.5 %", "Correct@τ", "INVALID", "python"):
        assert shown in text, f"{shown} is not on the page"
    assert "(2.42 times)" in text
    assert "Aligned <b> & base" in text and "<a & b>" in text, "text from outside must be escaped, not dropped"
    for row in json.loads((evaluation / "metrics.json").read_text())["samples"]:
        if row["aligned"]["score"] is not None:
            assert f"{row['aligned']['score']:.2f}" in text


def test_no_nan_reaches_the_page(html: str) -> None:
    page = parsed(html)
    values = [value for _, name, value in page.attributes if name not in ("src",)] + page.words
    assert not [value for value in values if re.search(r"\b(nan|NaN|inf|Infinity|None|undefined)\b", value)]


def test_the_clips_are_playable(html: str, tmp_path: Path) -> None:
    from spatialalign.video import read_video

    clips = re.findall(r'src="data:video/mp4;base64,([A-Za-z0-9+/=]+)"', html)
    assert len(clips) == 2 * 4, "four pairs of clips: two types by position, one gain each of the other seed"
    path = tmp_path / "clip.mp4"
    path.write_bytes(base64.b64decode(clips[0]))
    video = read_video(path)
    assert video.frames.shape == (FRAMES, 256, 256, 3) and video.fps == 8


def test_boxes_belong_to_frames(html: str) -> None:
    sets = [json.loads(value) for _, name, value in parsed(html).attributes if name == "data-boxes"]
    assert all(len(frames) == FRAMES and all(len(pair) == 2 for pair in frames) for frames in sets)
    absent = [frames for frames in sets if frames[5][0] is None]
    assert len(absent) == 2, "the two clips whose subject is lost after two frames"


def test_the_log_with_a_cut_line_is_drawn(html: str) -> None:
    assert "Implicit accuracy over training steps" in html and "Loss over training steps" in html
    assert "Margin over training steps" not in html, "a monitor without a number has no chart"


def test_choice_is_by_position_then_by_gain() -> None:
    def row(name: str, code: str, base: float | None, aligned: float | None) -> dict[str, Any]:
        return {"prompt_id": name, "seed": 0, "type": code, "base": {"score": base}, "aligned": {"score": aligned}}

    rows = [
        row("a", "LR", 0.5, 0.5),
        row("b", "LR", 0.2, 0.9),  # gain 0.7
        row("c", "LR", None, 0.9),  # gain 0.9
        row("d", "TR", 0.5, 0.4),
        row("e", "TR", 0.9, 0.1),  # loss
        row("f", "TR", 0.5, 0.5),
    ]
    assert [(r["prompt_id"], why.split()[-1]) for r, why in choose(rows[::-1], 2)] == [
        *(("a", "LR"), ("d", "TR")),
        *(("c", "gains"), ("b", "gains"), ("e", "losses")),
    ]
    assert len(choose(rows, 0)) == 2


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(0.1, 0.3, "more often than"), (-0.3, -0.1, "less often than"), (-0.1, 0.1, "is not told apart")],
)
def test_the_summary_says_what_the_interval_says(low: float, high: float, words: str) -> None:
    result = {
        "prompts": 3,
        "seeds": [0],
        "base": {"correct_at_0.7": {"value": 0.0}, "invalid_rate": {"value": 0.0}},
        "aligned": {"correct_at_0.7": {"value": 0.2}, "invalid_rate": {"value": 0.0}},
        "difference": {"correct_at_0.7": {"value": 0.2, "low": low, "high": high}},
    }
    assert words in summary(result) and "times" not in summary(result), "no ratio to a base of zero"


def test_a_missing_evaluation_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="training.evaluate"):
        run(Report(evaluation=tmp_path))
    write_json(tmp_path / "metrics.json", {"base": {}})
    with pytest.raises(DataError, match="lacks aligned, difference"):
        run(Report(evaluation=tmp_path))


def test_chart_helpers() -> None:
    nan = float("nan")
    assert segments([0, 1, 2, 3, 4], [1.0, None, nan, 2.0, 3.0]) == [[(0, 1.0)], [(3, 2.0), (4, 3.0)]]
    assert nice_ticks(0.0, 1.0) == [0.0, 0.25, 0.5, 0.75, 1.0] or nice_ticks(0.0, 1.0) == [0.0, 0.5, 1.0]
    assert nice_ticks(3.0, 3.0) == [3.0] and nice_ticks(nan, 1.0) == []
    frame = Frame(100, 50, (0, 10), (0, 1), left=0, right=0, top=0, bottom=0)
    assert (frame.px(5), frame.py(0), frame.py(1)) == (50, 50, 0)
    places = spread([10.0, 11.0, 40.0], 15)
    assert places[1] - places[0] >= 15 and places[2] - places[1] >= 15
    assert curve_chart("nothing", [Series("a", "base", [1, 2], [nan, None])]) == ""
    assert percent(nan) == percent(None) == "–"
    with pytest.raises(ValueError, match="different lengths"):
        Series("a", "base", [1, 2], [1.0])


def test_chromium_renders_the_page(html: str, evaluation: Path, tmp_path: Path) -> None:
    """In a real browser: no script error, the clips have a picture, and boxes and play heads were moved."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next((path for path in map(shutil.which, names) if path), None)
    if browser is None:
        pytest.skip("no Chromium on this machine: the page was not looked at in a browser")
    probe = """
<script>
window.failures = [];
addEventListener("error", (event) => failures.push(event.message));
addEventListener("load", () => setTimeout(() => {
  const clips = [...document.querySelectorAll("video")];
  const facts = {
    failures, clips: clips.length, decoded: clips.filter((clip) => clip.videoWidth > 0).length,
    wide: document.documentElement.scrollWidth - innerWidth,
    boxes: document.querySelectorAll(".screen rect[x]").length,
    charts: [...document.querySelectorAll("svg")].filter((svg) => svg.getBoundingClientRect().width > 0).length,
  };
  const note = document.createElement("pre");
  note.id = "facts"; note.textContent = JSON.stringify(facts); document.body.append(note);
}, 1500));
</script>"""
    page = tmp_path / "page.html"
    page.write_text(html.replace("<head>", "<head>" + probe, 1), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [browser, *flags, "--window-size=1200,2400", "--virtual-time-budget=6000", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    match = re.search(r'<pre id="facts">(.*?)</pre>', done.stdout)
    assert match, f"the page did not come to rest: {done.stderr[-500:]}"
    facts = json.loads(match.group(1))
    assert facts["failures"] == []
    assert facts["clips"] == 8 and facts["decoded"] == 8, "every clip has a picture (H.264 is decoded)"
    assert facts["boxes"] >= 8 and facts["charts"] >= 10
    assert facts["wide"] <= 0, "the page is no wider than the window"
