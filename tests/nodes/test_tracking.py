"""The tracking node on drawn clips with known boxes, and on detectors that are told what to say."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

Module = Callable[[str], ModuleType]
Run = Callable[..., Any]
H, W = 24, 32


@pytest.fixture
def world(module: Module) -> ModuleType:
    return module("spatialalign.miniature.world")


@pytest.fixture
def errors(module: Module) -> ModuleType:
    return module("spatialalign.errors")


@pytest.fixture
def node(module: Module, fake_host: Any) -> Any:
    return module("tracking").GroundedSamTrack


@pytest.fixture
def miniature(module: Module, fake_host: Any, miniature_weights: object) -> Any:
    return module("tracking").grounded_sam("miniature", "miniature", "robust", "float32", False)


@pytest.fixture
def clip(world: ModuleType) -> Any:
    """Thirteen frames of 64 x 64 with true boxes and masks."""
    return world.render(world.prompts("eval")[0].dsr, 3)


def image(frames: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(frames).float() / 255


def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of boxes (..., 4), written out here so that the engine's own is not the judge; 0 for an absent one."""
    a, b = np.nan_to_num(a), np.nan_to_num(b)
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    shared = sides.clip(0).prod(-1)
    return shared / ((a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - shared)


# --- what is found --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 40, 70])
def test_drawn_things_are_found_where_they_are(
    node: Any, run: Run, miniature: Any, world: ModuleType, number: int
) -> None:
    clip = world.render(world.prompts("eval")[number].dsr, number)
    found = run(node, grounded_sam=miniature, dsr=clip.dsr, images=image(clip.frames), fps=8.0)
    (tracks,), (subject,), (thing,), (drawn,), (frames,) = found
    assert tracks.invalid is None and tracks.fps == 8 and tracks.labels == (clip.dsr.subject, clip.dsr.object)
    agreement = overlap(tracks.boxes, clip.tracks.boxes)
    assert np.median(agreement) >= 0.8 and (agreement >= 0.5).mean() >= 0.8
    for mask, index in ((subject, 0), (thing, 1)):
        assert mask.shape == (13, 64, 64) and mask.dtype == torch.float32 and set(mask.unique().tolist()) <= {0.0, 1.0}
        truth = clip.tracks.masks[:, index]
        both, either = mask.numpy().astype(bool) & truth, mask.numpy().astype(bool) | truth
        assert both.sum() / either.sum() >= 0.75
    assert torch.equal(frames, image(clip.frames)) and len(drawn) == 13


def test_a_batch_of_clips_is_cut_and_each_is_tracked_alone(
    node: Any, run: Run, miniature: Any, world: ModuleType, fake_host: Any
) -> None:
    dsr = world.prompts("eval")[0].dsr
    clips = [world.render(dsr, seed) for seed in (1, 2, 3)]
    together = image(np.concatenate([clip.frames for clip in clips]))
    found = run(node, grounded_sam=miniature, dsr=dsr, images=together, frames_per_clip=13)
    assert [len(output) for output in found.args] == [3] * 5
    assert fake_host.loaded == list(miniature.patchers)
    for i, clip in enumerate(clips):
        alone = run(node, grounded_sam=miniature, dsr=dsr, images=image(clip.frames))
        assert found[0][i] == alone[0][0]
        for output in range(1, 5):
            assert torch.equal(found[output][i], alone[output][0])


def test_progress_runs_from_the_first_to_the_last_frame(
    node: Any, run: Run, miniature: Any, clip: Any, fake_host: Any
) -> None:
    twice = image(np.concatenate([clip.frames, clip.frames]))
    run(node, grounded_sam=miniature, dsr=clip.dsr, images=twice, frames_per_clip=13)
    done = [step for step, total in fake_host.progress if total == 26]
    assert len(done) == len(fake_host.progress) >= 26 and done == sorted(done) and done[-1] == 26
    # Detection of the first clip ends at half of its share.
    assert 0 < done[0] <= 1 and 6 in done and 13 in done


def test_a_video_brings_its_frames_and_its_rate(
    node: Any, run: Run, miniature: Any, clip: Any, video: Callable[..., Any]
) -> None:
    given = {"grounded_sam": miniature, "dsr": clip.dsr}
    by_video = run(node, **given, video=video(image(clip.frames), 12.5), fps=99.0)
    by_images = run(node, **given, images=image(clip.frames), fps=12.5)
    assert by_video[0] == by_images[0] and by_video[0][0].fps == 12.5
    assert torch.equal(by_video[1][0], by_images[1][0])


def test_the_node_and_the_command_line_find_the_same(
    node: Any, run: Run, miniature: Any, clip: Any, module: Module
) -> None:
    by_node = run(node, grounded_sam=miniature, dsr=clip.dsr, images=image(clip.frames), fps=8.0)[0][0]
    tracker = module("spatialalign.tracking.load").load_tracker("miniature")
    by_program = tracker.track(clip.frames, clip.dsr.subject, clip.dsr.object, 8.0)
    # The batch size differs, so confidences may in the last digits.
    np.testing.assert_array_equal(by_node.boxes, by_program.boxes)
    np.testing.assert_allclose(by_node.confidence, by_program.confidence, atol=1e-5)
    assert by_node.source == by_program.source


def test_half_precision_finds_the_same_things(node: Any, run: Run, module: Module, clip: Any) -> None:
    half = module("tracking").grounded_sam("miniature", "miniature", "robust", "bfloat16", False)
    tracks = run(node, grounded_sam=half, dsr=clip.dsr, images=image(clip.frames))[0][0]
    assert np.median(overlap(tracks.boxes, clip.tracks.boxes)) >= 0.8


# --- overlay --------------------------------------------------------------------------------------------------------


def test_without_overlay_the_frames_come_back_untouched(node: Any, run: Run, miniature: Any, clip: Any) -> None:
    images = image(clip.frames)
    found = run(node, grounded_sam=miniature, dsr=clip.dsr, images=images, overlay=False)
    assert found[3][0].data_ptr() == images.data_ptr() == found[4][0].data_ptr()


def test_draw_tracks_draws_what_the_overlay_shows(
    node: Any, run: Run, miniature: Any, clip: Any, module: Module
) -> None:
    images = image(clip.frames)
    found = run(node, grounded_sam=miniature, dsr=clip.dsr, images=images)
    draw = module("tracking").DrawTracks
    drawn = run(draw, images=images, tracks=found[0][0])[0]
    assert torch.equal(drawn, found[3][0]) and drawn.dtype == torch.float32 and 0 <= drawn.min() <= drawn.max() <= 1
    # Enlarged five times to a side of 320, with a strip of text below; the pixels between the things are the frames'.
    assert drawn.shape[0] == 13 and drawn.shape[2] == 320 and drawn.shape[1] > 320
    corner = images[:, 60:62, :2].repeat_interleave(5, 1).repeat_interleave(5, 2)
    torch.testing.assert_close(drawn[:, 300:310, :10], corner, atol=1 / 255, rtol=0)
    plain = run(draw, images=images, tracks=found[0][0], masks=False)[0]
    assert not torch.equal(plain, drawn)


def test_tracks_of_another_clip_are_not_drawn(run: Run, clip: Any, module: Module, errors: Any, fake_host: Any) -> None:
    draw, images = module("tracking").DrawTracks, image(clip.frames)
    with pytest.raises(errors.TracksError, match="the clip has 12 frames, the tracks have 13"):
        run(draw, images=images[1:], tracks=clip.tracks)
    with pytest.raises(errors.TracksError, match="the clip is 48 x 64 pixels, the tracks are for"):
        run(draw, images=images[:, :48], tracks=clip.tracks)


# --- what cannot be tracked is a result -----------------------------------------------------------------------------


@pytest.mark.parametrize("segmenter", ["miniature", "none"])
@pytest.mark.parametrize("frames", [1, 13])
def test_a_clip_without_anything_is_invalid_with_a_reason(
    node: Any, run: Run, world: ModuleType, module: Module, miniature_weights: object, segmenter: str, frames: int
) -> None:
    loaded = module("tracking").grounded_sam("miniature", segmenter, "robust", "float32", False)
    dsr = world.prompts("eval")[0].dsr
    found = run(node, grounded_sam=loaded, dsr=dsr, images=torch.zeros(frames, 64, 64, 3))
    (tracks,), (subject,), (thing,), (drawn,), (clips,) = found
    assert tracks.invalid == (
        "the clip has 1 frame; a movement needs at least 2"
        if frames == 1
        else "no frame shows both the subject and the object (found: neither)"
    )
    assert np.isnan(tracks.boxes).all() and len(drawn) == len(clips) == frames
    assert subject.shape == thing.shape == (frames, 64, 64) and not subject.any() and not thing.any()
    score = module("spatialalign.score").dsr_score(tracks, dsr)
    assert not score.valid and score.reason


@pytest.mark.parametrize("rule", ["robust", "paper"])
def test_one_frame_is_invalid_though_both_are_in_it(
    node: Any, run: Run, clip: Any, module: Module, miniature_weights: object, rule: Any
) -> None:
    loaded = module("tracking").grounded_sam("miniature", "miniature", rule, "float32", False)
    found = run(node, grounded_sam=loaded, dsr=clip.dsr, images=image(clip.frames[:1]))
    assert "1 frame" in found[0][0].invalid and found[0][0].frames == 1
    assert found[1][0].shape == (1, 64, 64) and not found[1][0].any()


# --- output length == input length, whatever was seen ---------------------------------------------------------------


@pytest.fixture
def told(module: Module) -> Callable[..., Any]:
    """``told(pattern, segmenter)``: GroundedSam that sees ``pattern[i] = (subjects, objects)`` boxes in frame i."""
    detect, segment = module("spatialalign.tracking.detect"), module("spatialalign.tracking.segment")
    tracker = module("spatialalign.tracking.tracker").Tracker

    def detect_frames(pattern: list[tuple[int, int]]) -> Any:
        def found(counts: tuple[int, int]) -> Any:
            phrases = np.repeat([0, 1], counts)
            corner = np.stack([4.0 * np.arange(len(phrases)), 6.0 * phrases], axis=1)
            return detect.Detections(
                np.concatenate([corner, corner + 4], axis=1), np.full(len(phrases), 0.8), phrases, ("",) * len(phrases)
            )

        def run_over(frames: np.ndarray, phrases: Any, progress: Any = None) -> Any:
            for done in range(1, len(frames) + 1):
                progress(done, len(frames))
            return [found(pattern[round(float(frame[0, 0, 0]))]) for frame in frames]

        return SimpleNamespace(detect=run_over)

    def outline(frames: np.ndarray, boxes: np.ndarray, progress: Any = None) -> Any:
        masks = np.zeros((len(frames), 2, H, W), dtype=bool)
        for i, thing in np.argwhere(~np.isnan(boxes[..., 0])):
            x0, y0, x1, y1 = boxes[i, thing].astype(int)
            masks[i, thing, y0:y1, x0:x1] = True
        return segment.Propagation(masks, np.full((len(frames), 2), 0.9))

    def make(pattern: list[tuple[int, int]], segmenter: bool, rule: str = "robust") -> Any:
        part = SimpleNamespace(segment=outline) if segmenter else None
        return module("tracking").GroundedSam(tracker(detect_frames(pattern), part, rule=rule), ())

    return make


often_one = st.sampled_from([1, 1, 1, 1, 0, 2])
counts = st.tuples(often_one, often_one)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pattern=st.lists(counts, min_size=1, max_size=9),
    clips=st.integers(1, 3),
    segmenter=st.booleans(),
    rule=st.sampled_from(["robust", "paper"]),
)
@example(pattern=[(1, 1), (0, 1), (1, 1), (1, 0), (0, 0), (1, 1)], clips=2, segmenter=True, rule="robust")
@example(pattern=[(1, 1)] * 4, clips=1, segmenter=True, rule="paper")
def test_no_frame_is_ever_lost(
    node: Any, run: Run, told: Any, world: ModuleType, pattern: list[tuple[int, int]], clips: int, segmenter: bool,
    rule: str,
) -> None:  # fmt: skip
    dsr = world.prompts("eval")[0].dsr
    frames = np.zeros((len(pattern), H, W, 3), dtype=np.uint8)
    frames[:, 0, 0, 0] = np.arange(len(pattern))
    found = run(
        node,
        grounded_sam=told(pattern, segmenter, rule),
        dsr=dsr,
        images=image(np.concatenate([frames] * clips)),
        frames_per_clip=len(pattern),
    )
    assert [len(output) for output in found.args] == [clips] * 5
    for tracks, subject, thing, drawn, clip in zip(*found.args, strict=True):
        assert tracks.frames == len(subject) == len(thing) == len(drawn) == len(clip) == len(pattern)
        assert subject.shape == thing.shape == (len(pattern), H, W)
        for i, seen in enumerate(pattern):
            for mask, amount, box in zip((subject, thing), seen, tracks.boxes[i], strict=True):
                assert bool(amount) == (not np.isnan(box[0]))
                # One box of 4 x 4 where something is seen; with a segmenter, only if the rule let it begin at all.
                begun = tracks.invalid is None or not segmenter
                shown = box if rule == "robust" or not segmenter else box + [0, 0, 1, 1]
                if amount and begun:
                    x0, y0, x1, y1 = shown.astype(int)
                    assert mask[i].sum() == 16 and mask[i, y0:y1, x0:x1].all()
                else:
                    assert not mask[i].any()


# --- inputs that cannot be right ------------------------------------------------------------------------------------


def test_exactly_one_of_images_and_video(
    node: Any, run: Run, told: Any, clip: Any, errors: Any, video: Callable[..., Any]
) -> None:
    loaded, images = told([(1, 1)] * 13, False), image(clip.frames)
    with pytest.raises(errors.VideoError, match="connect images or video: neither is connected"):
        run(node, grounded_sam=loaded, dsr=clip.dsr)
    with pytest.raises(errors.VideoError, match="connect images or video: both are connected"):
        run(node, grounded_sam=loaded, dsr=clip.dsr, images=images, video=video(images, 8))


@pytest.mark.parametrize("length", [5, 12, 14])
def test_clips_of_unequal_length_are_refused(
    node: Any, run: Run, told: Any, clip: Any, errors: Any, fake_host: Any, length: int
) -> None:
    message = f"frames_per_clip is {length}, but 13 frames cannot be cut into clips of {length}; set it to the length"
    with pytest.raises(errors.ConfigError, match=message):
        run(node, grounded_sam=told([], False), dsr=clip.dsr, images=image(clip.frames), frames_per_clip=length)
    assert fake_host.loaded == []


@pytest.mark.parametrize("shape", [(0, 8, 8, 3), (8, 8, 3), (2, 8, 8, 1), (1, 2, 8, 8, 3)])
def test_what_is_no_clip(node: Any, run: Run, told: Any, clip: Any, errors: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(errors.VideoError, match=r"images: expected .*found the shape \("):
        run(node, grounded_sam=told([(1, 1)] * 9, False), dsr=clip.dsr, images=torch.zeros(shape))


def test_frames_with_nan_and_with_alpha(node: Any, run: Run, told: Any, clip: Any, errors: Any) -> None:
    pattern = [(1, 1)] * 3
    with pytest.raises(errors.VideoError, match="NaN or infinite"):
        run(node, grounded_sam=told(pattern, False), dsr=clip.dsr, images=torch.full((3, H, W, 3), torch.nan))
    found = run(node, grounded_sam=told(pattern, False), dsr=clip.dsr, images=torch.zeros(3, H, W, 4))
    assert found[0][0].invalid is None and found[3][0].shape[-1] == 3 and found[4][0].shape[-1] == 4


def test_one_name_for_both_things_is_refused(
    node: Any, run: Run, told: Any, clip: Any, errors: Any, module: Module
) -> None:
    dsr = module("spatialalign.dsr")
    twins = SimpleNamespace(subject="cat", object="a cat")
    with pytest.raises(errors.ConfigError, match="nothing can tell them apart"):
        run(node, grounded_sam=told([(1, 1)] * 13, False), dsr=twins, images=image(clip.frames))
    words = dsr.DSR("polar bear", "sofa bed", dsr.Relation.LEFT, dsr.Relation.RIGHT)
    found = run(node, grounded_sam=told([(1, 1)] * 256, False), dsr=words, images=torch.zeros(2, H, W, 3))
    assert found[0][0].labels == ("polar bear", "sofa bed")


def test_memory_grows_with_the_clip_and_with_the_models_picture(miniature: Any) -> None:
    # The miniature's detector enlarges 64 x 64 frames; a batch and what is remembered per frame are proportional.
    one, more = miniature.memory(13, 64, 64), miniature.memory(26, 64, 64)
    rows, columns = miniature.preprocess.target(64, 64)
    assert more - one == 13 * 16 * rows * columns and one > 2 * 1000 * rows * columns
