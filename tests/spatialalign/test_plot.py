"""Pictures of clips: drawn where they should be, in sizes that can be used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spatialalign import Tracks
from spatialalign.errors import TracksError, VideoError
from spatialalign.plot import COLOURS, contact_sheet, draw_tracks, save_png

T, H, W = 17, 64, 64


def tracks(masks: bool = True) -> Tracks:
    boxes = np.array([[[2.0 + 3 * i, 10, 12 + 3 * i, 22], [28, 30, 40, 44]] for i in range(T)])
    painted = np.zeros((T, 2, H, W), dtype=bool)
    for i in range(T):
        for thing in range(2):
            x0, y0, x1, y1 = boxes[i, thing].astype(int)
            painted[i, thing, y0:y1, x0:x1] = True
    boxes[6:9, 0] = np.nan
    painted[6:9, 0] = False
    return Tracks(boxes, np.full((T, 2), 0.9), ("cat", "box"), (H, W), 8, masks=painted if masks else None)


@pytest.fixture
def frames() -> np.ndarray:
    return np.full((T, H, W, 3), 200, dtype=np.uint8)


def test_boxes_are_drawn_at_their_place_in_an_enlarged_clip(frames: np.ndarray) -> None:
    drawn = draw_tracks(frames, tracks(masks=False), min_side=320)
    assert drawn.dtype == np.uint8 and drawn.shape[0] == T and drawn.shape[2] == 320 and drawn.shape[1] > 320
    assert drawn.shape[1] % 2 == 0 and drawn.shape[2] % 2 == 0
    # Five times larger: the cat's box of frame 4 spans x 70..120 and y 50..110, its outline lies inside that.
    box = (drawn[4] == COLOURS[0]).all(-1)
    rows, columns = np.flatnonzero(box[52:, :].any(1)) + 52, np.flatnonzero(box[100])
    assert rows.max() == 109 and columns.min() == 70 and columns.max() == 119
    assert not (drawn[7] == COLOURS[0]).all(-1).any(), "an absent cat must not be drawn"
    assert (drawn[7] == COLOURS[1]).all(-1).any()


def test_masks_tint_their_pixels_and_leave_the_others(frames: np.ndarray) -> None:
    plain, tinted = draw_tracks(frames, tracks(masks=False)), draw_tracks(frames, tracks())
    # The middle of the cat in frame 2 (x 13, y 16), far from outline and label, at 5 times the size.
    y, x = 5 * 18, 5 * 13
    expected = (0.55 * 200 + 0.45 * np.array(COLOURS[0])).astype(int)
    np.testing.assert_allclose(tinted[2, y, x], expected, atol=1)
    assert (plain[2, y, x] == 200).all()
    np.testing.assert_array_equal(plain[2, 300, 20], tinted[2, 300, 20])
    np.testing.assert_array_equal(draw_tracks(frames, tracks(), masks=False), plain)
    assert (frames == 200).all(), "the input must stay as it is"


def test_the_line_below_says_what_is_absent(frames: np.ndarray) -> None:
    drawn = draw_tracks(frames, tracks(masks=False))
    seen, gone = drawn[5, 320:], drawn[7, 320:]
    # The notice is amber; nothing else below the picture is.
    amber = lambda strip: ((strip[..., 0] > 200) & (strip[..., 2] < 160)).any()  # noqa: E731
    assert amber(gone) and not amber(seen)


def test_large_clips_keep_their_size_and_odd_ones_become_even() -> None:
    boxes = np.full((2, 2, 4), np.nan)
    big = Tracks(boxes, np.zeros((2, 2)), ("cat", "box"), (401, 603), 8)
    drawn = draw_tracks(np.zeros((2, 401, 603, 3), dtype=np.uint8), big)
    assert drawn.shape[2] == 604 and drawn.shape[1] % 2 == 0
    # As it comes back from a file: one pixel larger than the array that was tracked.
    assert draw_tracks(np.zeros((2, 402, 604, 3), dtype=np.uint8), big).shape[2] == 604


def test_foreign_tracks_are_refused(frames: np.ndarray) -> None:
    with pytest.raises(TracksError, match="the clip has 16 frames, the tracks have 17"):
        draw_tracks(frames[1:], tracks())
    with pytest.raises(TracksError, match="the clip is 64 x 32 pixels"):
        draw_tracks(np.ascontiguousarray(frames[:, :, :32]), tracks())


def test_contact_sheet_shows_first_and_last_frame() -> None:
    counting = np.empty((9, 8, 8, 3), dtype=np.uint8)
    counting[:] = (np.arange(9) * 20).reshape(9, 1, 1, 1)
    sheet = contact_sheet([("nine", counting), ("one", counting[:1])], columns=3, tile=64)
    assert sheet.shape == (4 + 2 * (64 + 28), 4 + 3 * 68, 3)
    # Middles of the tiles of the first row: frames 0, 4 and 8.
    assert [int(sheet[4 + 20 + 50, 4 + 68 * i + 40, 0]) for i in range(3)] == [0, 80, 160]
    # The clip of one frame shows it once.
    second = 4 + 92 + 20 + 50
    assert int(sheet[second, 44, 0]) == 0 and int(sheet[second, 4 + 68 + 40, 0]) > 240
    with pytest.raises(VideoError, match="at least one clip"):
        contact_sheet([])


def test_png_round_trip_and_refusal(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    save_png(tmp_path / "a.png", picture)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), picture)
    with pytest.raises(VideoError, match="uint8 of the shape"):
        save_png(tmp_path / "b.png", picture[..., 0])
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
