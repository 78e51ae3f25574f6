"""Training of a latent reward: labels from tracks, exact resume, and that it learns."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from spatialalign.backbones.wan import WanBackbone
from spatialalign.dsr import DSR
from spatialalign.errors import ConfigError, DataError, ModelError
from spatialalign.prompts import Prompt
from spatialalign.rewards.latent import load_reward
from spatialalign.rewards.values import RewardValues
from spatialalign.rewards.wan_trunk import EmbeddedText
from spatialalign.score import dsr_score
from spatialalign.tracks import Tracks
from training.latent_labels import Captions, counterfactual, latent_curves, read_further, read_labels
from training.latent_reward import FILE, new_reward, train
from training.latent_reward import main as latent_reward
from training.latent_reward_settings import RewardSettings
from training.latent_reward_trainer import PairDraws, RewardTrainer, rate_factor, split_rows
from training.monitors import JsonlLog
from training.store import LatentsHeader, Store

SETTINGS = RewardSettings(
    blocks=1,
    steps=4,
    batch_pairs=4,
    micro_pairs=2,
    warmup_steps=1,
    lr=3e-3,
    head_width=8,
    held_out=0.4,
    held_out_every=2,
    checkpoint_every=2,
    keep_checkpoints=0,
)
PROMPTS = {
    "0001_LR": "In a quiet room, a cat is on the left of a box, then the cat walks to the right of the box.",
    "0002_RL": "In a quiet room, a dog is on the right of a chair, then the dog runs to the left of the chair.",
    "0003_LT": "By a sunny meadow, a fox is on the left of a bench, then the fox runs to the top of the bench.",
}


def crossing(dsr: DSR, leftwards: bool = False) -> Tracks:
    """Five frames of a subject that crosses an object from left to right (or back), 10 pixels square both."""
    centres = np.array([-20.0, -10.0, 0.0, 10.0, 20.0]) * (-1 if leftwards else 1)
    boxes = np.zeros((5, 2, 4))
    for frame, centre in enumerate(centres):
        boxes[frame, 0] = 50 + centre, 40, 60 + centre, 50
        boxes[frame, 1] = 50, 40, 60, 50
    return Tracks(boxes, np.ones((5, 2)), (dsr.subject, dsr.object), (100, 100), 8.0)


@pytest.fixture
def scored_store(tmp_path: Path, backbone: WanBackbone) -> Store:
    """Three prompts with four clips each: latents with mean 0.5 show a crossing to the right, those with -0.5 one to
    the left; a fifth clip of the first prompt has no tracks of use."""
    settings = backbone.default_settings()
    header = LatentsHeader(backbone.latent_space, backbone.model_id, settings.to_dict(), settings.digest)
    store, generator = Store(tmp_path / "store", create=True), torch.Generator().manual_seed(0)
    for name, text in PROMPTS.items():
        prompt = Prompt.parse(name, text)
        store.add_prompt(prompt)
        for seed in range(5 if name == "0001_LR" else 4):
            sample, leftwards = store.sample(name, seed), seed % 2 == 1
            noise = 0.1 * torch.randn(backbone.latent_shape(settings), generator=generator)
            sample.write_latents(noise + (-0.5 if leftwards else 0.5), header)
            tracks = crossing(prompt.dsr, leftwards)
            if seed == 4:
                tracks = replace(tracks, invalid="redundant boxes")
            tracks.save(sample.tracks)
            sample.write_score(dsr_score(tracks, prompt.dsr), "by hand")
    return store


def trainer(backbone: WanBackbone, store: Store, out: Path, **changes: Any) -> RewardTrainer:
    settings, (labels, _) = replace(SETTINGS, **changes), read_labels(store)
    captions = Captions(out / "texts", backbone.model_id)
    captions.write(backbone, store.prompts(), labels.codes)
    reward = new_reward(backbone, settings, labels.names)
    return RewardTrainer(reward, store, labels, captions, settings, out, settings.to_dict())


def test_a_clip_is_judged_for_every_type(scored_store: Store) -> None:
    """The curves of a crossing to the right: SSR(L) is 1, 1, 0, -1, -1 and SSR(R) its negative, SSR(T) 0 throughout.

    Two latent frames: the first frame, and the mean over the four others, -1/4 for L.
    LR scores (1 + 1 + 1 + 1) / 8 + 1/2 = 1 (a window of round(3 * 5 / 81) = 0, hence 1), RL 0, and LT has
    I: mean 1, gap 1, F: 0, 0, hence 2 / 8 + 1/2 = 3/4.
    """
    labels, left_out = read_labels(scored_store)
    assert not left_out and len(labels.clips) == 13
    assert labels.codes == ("LR", "LT", "RL", "RT", "TL", "TR")
    row = labels.clips.index(("0003_LT", 0))
    assert labels.codes[labels.own[row]] == "LT"
    np.testing.assert_allclose(labels.scores[row], [1, 0.75, 0, 0.25, 0.25, 0.75], atol=1e-6)
    np.testing.assert_allclose(labels.curves[row, 0], [[1, -1], [-0.25, 0.25]], atol=1e-6)
    np.testing.assert_allclose(labels.curves[row, 5], [[0, -1], [0, 0.25]], atol=1e-6)
    mirrored = labels.clips.index(("0003_LT", 1))
    np.testing.assert_allclose(labels.scores[mirrored], [0, 0.25, 1, 0.75, 0.75, 0.25], atol=1e-6)


def test_an_invalid_clip_has_curves_but_no_score(scored_store: Store) -> None:
    labels, _ = read_labels(scored_store)
    row = labels.clips.index(("0001_LR", 4))
    assert labels.valid[row] == 0 and np.isnan(labels.scores[row]).all()
    np.testing.assert_allclose(labels.curves[row, 0], [[1, -1], [-0.25, 0.25]], atol=1e-6)
    assert labels.valid.sum() == 12


def test_frames_by_latent_frame() -> None:
    curves = np.array([[5.0], [1.0], [np.nan], [np.nan], [np.nan], [2.0], [4.0], [np.nan], [6.0]])
    np.testing.assert_array_equal(latent_curves(curves, 3), [[5.0], [1.0], [4.0]])
    assert np.isnan(latent_curves(np.full((5, 2), np.nan), 2)).all()
    assert latent_curves(curves[:1], 1).tolist() == [[5.0]]
    for frames, latent_frames in ((9, 4), (9, 1), (1, 2)):
        with pytest.raises(DataError, match=f"{frames} tracked frames do not fit {latent_frames} latent frames"):
            latent_curves(curves[:frames], latent_frames)


def test_clips_without_a_score_are_named(scored_store: Store) -> None:
    scored_store.sample("0002_RL", 3).score.unlink()
    scored_store.sample("0002_RL", 2).tracks.write_bytes(b"damaged")
    labels, left_out = read_labels(scored_store)
    assert len(labels.clips) == 11 and set(left_out) == {"0002_RL/2", "0002_RL/3"}
    assert "run training.score" in left_out["0002_RL/3"] and "tracks.safetensors" in left_out["0002_RL/2"]
    for sample in scored_store.samples():
        sample.score.unlink(missing_ok=True)
    with pytest.raises(DataError, match="no clip of .* can be used.*0001_LR/0"):
        read_labels(scored_store)


def test_clips_of_two_sizes_are_refused(scored_store: Store, backbone: WanBackbone) -> None:
    sample = scored_store.sample("0002_RL", 3)
    tracks, score = Tracks.load(sample.tracks), sample.read_score()
    sample.write_latents(torch.zeros(16, 2, 4, 6), sample.read_header())
    tracks.save(sample.tracks)
    sample.write_score(score, "by hand")
    with pytest.raises(DataError, match=r"one size.*0001_LR/0.*0002_RL/3 has \(16, 2, 4, 6\)"):
        read_labels(scored_store)


def test_captions_are_the_backbones_own(scored_store: Store, backbone: WanBackbone, tmp_path: Path) -> None:
    captions = Captions(tmp_path / "texts", backbone.model_id)
    captions.write(backbone, scored_store.prompts(), ("LR", "TL"))
    text = "In a quiet room, a dog is on the top of a chair, then the dog runs to the left of the chair."
    assert counterfactual(DSR.parse(PROMPTS["0002_RL"]), "TL").prompt() == text
    torch.testing.assert_close(captions.of("0002_RL", "TL"), backbone.encode_text([text])[0])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "texts").iterdir()}
    captions.write(backbone, scored_store.prompts(), ("LR", "TL"))
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "texts").iterdir()}
    Captions(tmp_path / "texts", "another model").write(backbone, scored_store.prompts(), ("LR", "TL"))
    assert before != {path: path.stat().st_mtime_ns for path in (tmp_path / "texts").iterdir()}


def test_further_labels(tmp_path: Path, scored_store: Store) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("prompt_id,seed,quality,speed\n0001_LR,0,2.5,1\n0001_LR,1,-1,\n0002_RL,0,0.5,3\n")
    labels, _ = read_labels(scored_store, path)
    assert labels.names == ("quality", "speed")
    row = labels.further[labels.clips.index(("0001_LR", 1))]
    assert row[0] == -1 and np.isnan(row[1])
    assert np.isnan(labels.further[labels.clips.index(("0003_LT", 2))]).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prompt_id,quality\na,1\n", "expected the columns prompt_id, seed"),
        ("prompt_id,seed\na,1\n", "expected the columns prompt_id, seed"),
        ("prompt_id,seed,dsr\na,1,2\n", "'dsr' is learned from the tracks"),
        ("prompt_id,seed,quality\na,1,good\n", "line 2: expected an id, a seed and numbers"),
        ("prompt_id,seed,quality\na,1\n", "line 2: expected an id, a seed and numbers"),
        ("prompt_id,seed,quality\na,1,inf\n", "line 2: expected finite numbers"),
        ("prompt_id,seed,quality\na,1,1\na,1,2\n", "line 3: clip a/1 is there twice"),
        ("prompt_id,seed,quality\nelse,0,1\nelse,1,2\n", "'quality' tells no two clips"),
    ],
)
def test_bad_further_labels_are_named(tmp_path: Path, scored_store: Store, content: str, message: str) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_labels(scored_store, path)
    with pytest.raises(DataError, match="does not exist"):
        read_further(tmp_path / "nothing.csv")


def test_draws_depend_on_seed_and_step_alone(scored_store: Store) -> None:
    labels, _ = read_labels(scored_store)
    rows = np.arange(len(labels.clips))
    settings = replace(SETTINGS, batch_pairs=400, micro_pairs=400)
    one, again = (PairDraws(labels, rows, settings).step(7) for _ in range(2))
    for name in ("one", "other", "caption", "sigma"):
        np.testing.assert_array_equal(getattr(one, name), getattr(again, name))
    assert one.noise_seed == again.noise_seed != PairDraws(labels, rows, settings).step(8).noise_seed
    assert (labels.group[one.one] == labels.group[one.other]).all() and (one.one != one.other).all()
    # 0.4 of the captions are the clips' own, and a sixth of the others by chance: 1/2
    assert (one.caption == labels.own[one.one]).mean() == pytest.approx(0.5, abs=0.08)
    # shift 3 moves the median of the levels to 3 * 0.5 / 2 = 0.75; a quarter of them is even
    assert np.median(one.sigma) == pytest.approx(0.71, abs=0.06) and one.sigma.min() < 0.1
    assert not PairDraws(labels, rows, replace(settings, noisy=False)).step(7).sigma.any()


def test_triples_stay_together(scored_store: Store) -> None:
    labels, _ = read_labels(scored_store)
    kept, held = split_rows(labels, 0.4, 0)
    assert len(kept) + len(held) == 13 and not set(labels.group[kept]) & set(labels.group[held])
    assert len(set(labels.group[held])) == 1
    assert len(split_rows(labels, 0.0, 0)[1]) == 0


def test_wide_matrices_learn_more_slowly() -> None:
    assert rate_factor("trunk.a", torch.zeros(8, 4096), 128, 0.5) == 0.5 * 128 / 4096
    assert rate_factor("trunk.a", torch.zeros(8), 128, 0.5) == 0.5
    assert rate_factor("head.a", torch.zeros(8, 64), 128, 0.5) == 1.0


def test_both_clips_of_a_pair_have_the_same_noise(scored_store: Store, backbone: WanBackbone, tmp_path: Path) -> None:
    one = trainer(backbone, scored_store, tmp_path)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    judge = one._judge

    def watch(rows: Any, noise: torch.Tensor, sigma: torch.Tensor, texts: Any, twice: bool) -> Any:
        seen.append((noise, sigma))
        return judge(rows, noise, sigma, texts, twice)

    one._judge = watch  # type: ignore[method-assign]
    one._train_step()
    assert len(seen) == 2
    for noise, sigma in seen:
        assert torch.equal(noise[:2], noise[2:]) and torch.equal(sigma[:2], sigma[2:])
        assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(seen[0][0], seen[1][0])


class Oracle(torch.nn.Module):
    """Knows the right answer for a text and a direction, which it reads off the sign of the latents' mean."""

    def __init__(self, one: RewardTrainer) -> None:
        super().__init__()
        self.labels, self.trunk = one.labels, one.reward.trunk
        self.texts = [
            (clip, code, one.captions.of(clip[0], code)) for clip in one.labels.clips for code in one.labels.codes
        ]

    def prepare(self, texts: list[torch.Tensor]) -> EmbeddedText:
        found = [next(i for i, (*_, text) in enumerate(self.texts) if torch.equal(text, asked)) for asked in texts]
        index = torch.tensor(found)
        return EmbeddedText(index, index, index)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, text: EmbeddedText) -> RewardValues:
        values, curves = [], []
        for clip, index in zip(x, text.rows.tolist(), strict=True):
            (name, _), code, _ = self.texts[index]
            row = self.labels.clips.index((name, 0 if clip.mean() > 0 else 1))
            column = self.labels.codes.index(code)
            values.append([float(self.labels.scores[row, column]), 20.0])
            curves.append(torch.from_numpy(self.labels.curves[row, column]))
        return RewardValues(torch.tensor(values), torch.stack(curves))


def test_labels_belong_to_clip_and_caption(scored_store: Store, backbone: WanBackbone, tmp_path: Path) -> None:
    """Who knows what a text asks of a clip has no loss, whichever captions are drawn; who mixes them up has."""
    one = trainer(backbone, scored_store, tmp_path, batch_pairs=40, micro_pairs=40, noisy=False, held_out=0.0)
    one.reward = Oracle(one)  # type: ignore[assignment]
    draw, generator = one._draws.step(0), torch.Generator()
    losses = one._losses(draw, slice(0, 40), generator)
    assert losses["score"].item() == pytest.approx(0, abs=1e-9) and losses["curves"].item() == pytest.approx(
        0, abs=1e-9
    )
    mixed_up = replace(draw, caption=(draw.caption + 2) % 6)
    one._text = lambda row, column: one.captions.of(one.labels.clips[row][0], one.labels.codes[(column - 2) % 6])  # type: ignore[method-assign]
    assert one._losses(mixed_up, slice(0, 40), generator)["score"].item() > 0.1


def test_it_learns_what_a_clip_shows(scored_store: Store, backbone: WanBackbone, tmp_path: Path) -> None:
    """Clips of two prompts that ask for a way to the right come out in the right order, at low and at high noise."""
    changes = {"steps": 60, "held_out": 0.0, "own_caption": 1.0, "lr": 1e-2, "batch_pairs": 8, "micro_pairs": 8}
    one = trainer(backbone, scored_store, tmp_path, **changes)
    rows = np.array([row for row, (name, _) in enumerate(one.labels.clips) if name != "0002_RL"])
    one._draws, one.held_out_rows = PairDraws(one.labels, rows, one.settings), rows
    before = one.held_out()
    assert one.fit()
    after = one.held_out()
    assert [row["pairs"] for row in after] == [8] * 5
    for low in (0, 1):
        assert after[low]["accuracy"] == 1 and after[low]["correlation"] > 0.8
        assert after[low]["error"] < 0.5 * before[low]["error"]
    assert after[3]["correlation"] > 0.3


def test_a_stopped_run_ends_with_the_same_bits(scored_store: Store, backbone: WanBackbone, tmp_path: Path) -> None:
    whole = train(backbone, scored_store, tmp_path / "whole", SETTINGS)
    assert whole.finished and whole.file == tmp_path / "whole" / FILE
    calls = iter([False, True])
    part = trainer(backbone, scored_store, tmp_path / "parts")
    part.identity = json.loads((tmp_path / "whole" / "config.json").read_text())
    del part.identity["config_digest"]
    assert not part.fit(lambda: next(calls)) and part.step == 2
    rest = train(backbone, scored_store, tmp_path / "parts", SETTINGS)
    assert rest.finished and rest.file is not None
    one, two = load_file(whole.file), load_file(rest.file)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    steps = [row["step"] for row in JsonlLog(tmp_path / "parts" / "train.jsonl").rows() if row["event"] == "train"]
    assert steps == [1, 2, 3, 4]
    with pytest.raises(ConfigError, match="lr: 0.003 -> 0.1"):
        train(backbone, scored_store, tmp_path / "parts", replace(SETTINGS, lr=0.1))


def test_steps_that_are_not_finite_are_skipped_and_then_stop(
    scored_store: Store, backbone: WanBackbone, tmp_path: Path
) -> None:
    one = trainer(backbone, scored_store, tmp_path, max_bad_steps=2, held_out=0.0)
    with torch.no_grad():
        one.reward.head.to_values.bias[0] = math.inf
    before = one.reward.head.to_curves.weight.clone()
    with pytest.raises(DataError, match=r"step 3: loss .* is not finite, more than max_bad_steps \(2\)"):
        one.fit()
    assert torch.equal(one.reward.head.to_curves.weight, before)
    events = [row["event"] for row in JsonlLog(tmp_path / "train.jsonl").rows()]
    assert events.count("skipped_step") == 2 and "train" not in events


def test_the_file_says_what_it_is(scored_store: Store, backbone: WanBackbone, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    rows = [f"{name},{seed},{10 + 5 * (seed % 2)}" for name in PROMPTS for seed in range(4)]
    labels.write_text("\n".join(["prompt_id,seed,quality", *rows]))
    result = train(backbone, scored_store, tmp_path / "out", replace(SETTINGS, noisy=False), labels)
    assert result.file is not None
    reward = load_reward(result.file)
    assert reward.dimensions == ("dsr", "valid", "quality") and reward.info.trained_on == "clean"
    assert reward.info.latent_space == backbone.latent_space and reward.blocks_share == 1 / 2
    assert reward.info.statistics["clips"] + reward.info.statistics["held_out_clips"] == 13
    found, _ = read_labels(scored_store, labels)
    kept, _ = split_rows(found, SETTINGS.held_out, SETTINGS.seed)
    captions = Captions(tmp_path / "out" / "texts", backbone.model_id)
    clips = [found.clips[row] for row in kept]
    latents = torch.stack([scored_store.sample(*clip).read_latents() for clip in clips])
    text = [captions.of(name, found.codes[found.own[row]]) for (name, _), row in zip(clips, kept, strict=True)]
    quality = reward(latents, torch.zeros(len(clips)), text).values[:, 2]
    assert quality.mean().item() == pytest.approx(0, abs=0.05)
    assert quality.std(correction=0).item() == pytest.approx(1, abs=0.05)
    assert [(row["from"], row["to"]) for row in result.held_out][::4] == [(0.0, 0.3), (0.9, 1.0)]
    assert set(result.held_out[0]) >= {"accuracy", "correlation", "valid", "further.quality"}


def test_clips_of_another_latent_space_are_refused(
    scored_store: Store, backbone: WanBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WanBackbone, "latent_space", property(lambda self: "wan-vae:another"))
    with pytest.raises(ModelError, match="wan-vae:another; give the model that made them"):
        train(backbone, scored_store, tmp_path / "out", SETTINGS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": 0}, "blocks must be above 0"),
        ({"batch_pairs": 5}, r"batch_pairs \(5\) must be a multiple of micro_pairs \(2\)"),
        ({"own_caption": 1.5}, "own_caption must be in"),
        ({"held_out": 1.0}, "held_out must be in"),
        ({"warmup_steps": 4}, r"warmup_steps \(4\) must be below steps \(4\)"),
        ({"lr": math.nan}, "lr must be above 0"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SETTINGS, **changes)


def test_the_program(
    scored_store: Store, tiny_wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], backbone: WanBackbone
) -> None:
    options = "--blocks 1 --steps 2 --batch_pairs 2 --micro_pairs 2 --warmup_steps 1 --held_out 0.4 --head_width 8"
    where = ["--model", str(tiny_wan), "--store", str(scored_store.root), "--out", str(tmp_path / "out")]
    latent_reward([*where, *options.split(), "--device", "cpu"])
    out = capsys.readouterr().out
    assert "| 0.9 to 1 |" in out and FILE in out
    assert load_reward(tmp_path / "out" / FILE).info.statistics["steps"] == 2
    with pytest.raises(SystemExit) as stopped:
        latent_reward([*where, "--blocks", "9", "--device", "cpu"])
    assert stopped.value.code == 2
    assert "blocks" in capsys.readouterr().err
