"""Video files: what goes in comes out, and damaged files say so."""

from __future__ import annotations

import wave
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from spatialalign.errors import VideoError
from spatialalign.video import Video, is_own, read_video, write_video


def clip(frames: int = 17, height: int = 64, width: int = 64) -> np.ndarray:
    """Flat grey frames that count in steps of 12, with a moving square: every frame can be told from its neighbours."""
    made = np.empty((frames, height, width, 3), dtype=np.uint8)
    for i in range(frames):
        made[i] = 20 + 12 * i
        made[i, 8:24, 2 * i : 2 * i + 16] = (200, 60, 40)
    return made


def test_frames_come_back_in_order_and_nearly_unchanged(tmp_path: Path) -> None:
    frames = clip()
    write_video(tmp_path / "a.mp4", frames, 8)
    video = read_video(tmp_path / "a.mp4")
    assert video.frames.shape == frames.shape and video.fps == 8 and video.size == (64, 64)
    error = np.abs(video.frames.astype(int) - frames)
    # Neighbouring frames differ by 12 in the background.
    assert error[:, 40:].max() <= 3 and error.mean() < 1
    # Half colour resolution at 64 pixels would be off by some 60 at the square's edges.
    assert error.max() < 30
    assert [int(frame[50, 50, 0].round()) for frame in video.frames] == pytest.approx(
        [20 + 12 * i for i in range(17)], abs=3
    )


def test_the_file_is_what_browsers_play(tmp_path: Path) -> None:
    import av

    write_video(tmp_path / "a.mp4", clip(3), 29.97)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert is_own(container.metadata)
        assert abs(stream.average_rate - Fraction(2997, 100)) < Fraction(1, 100)
        assert stream.frames == 3


@pytest.mark.parametrize(
    ("height", "width", "stored"),
    # Tiny clips are stored at twice their size, larger ones as they are; sides become even.
    [(33, 35, (66, 70)), (1, 1, (2, 2)), (48, 64, (96, 128)), (131, 163, (132, 164)), (128, 160, (128, 160))],
)
def test_every_size_comes_back(tmp_path: Path, height: int, width: int, stored: tuple[int, int]) -> None:
    import av

    frames = np.full((2, height, width, 3), 77, dtype=np.uint8)
    frames[:, height // 2 :] = 140
    write_video(tmp_path / "a.mp4", frames, 8)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.height, stream.width) == stored
    video = read_video(tmp_path / "a.mp4")
    assert video.size == (height, width)
    # One row may be soft where the grey changes.
    soft = np.abs(video.frames.astype(int) - frames) > 2
    assert soft.any(axis=(0, 2, 3)).sum() <= 2


def test_a_note_that_does_not_fit_the_frames_is_ignored(tmp_path: Path) -> None:
    import av

    frames = np.full((3, 64, 64, 3), 77, dtype=np.uint8)
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        container.metadata["comment"] = "spatialalign size=64x64 scale=2"
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    assert read_video(tmp_path / "a.mp4").size == (64, 64)


def test_one_frame_and_a_limit(tmp_path: Path) -> None:
    write_video(tmp_path / "one.mp4", clip(1), 16)
    assert read_video(tmp_path / "one.mp4").frames.shape[0] == 1
    write_video(tmp_path / "many.mp4", clip(9), 16)
    assert read_video(tmp_path / "many.mp4", max_frames=4).frames.shape[0] == 4
    assert read_video(tmp_path / "many.mp4", max_frames=40).frames.shape[0] == 9
    with pytest.raises(VideoError, match="max_frames must be at least 1"):
        read_video(tmp_path / "many.mp4", max_frames=0)


@pytest.mark.parametrize("kept", [0.02, 0.3, 0.6, 0.99])
def test_cut_off_files_are_errors_that_name_the_file(tmp_path: Path, kept: float) -> None:
    file = tmp_path / "clip.mp4"
    write_video(file, clip(), 8)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(VideoError, match=r"clip\.mp4: .*(generate|give a file)"):
        read_video(file)


def test_a_stream_that_ends_early_is_an_error(tmp_path: Path) -> None:
    """A transport of whole packets, but fewer than announced, as an interrupted remux leaves behind."""
    file = tmp_path / "clip.mp4"
    write_video(file, clip(), 8)
    content = bytearray(file.read_bytes())
    # 'stsz' lists a size for each of the 17 frames; making the last ones empty takes their packets away.
    at = content.index(b"stsz")
    assert int.from_bytes(content[at + 12 : at + 16], "big") == 17
    for i in range(12, 17):
        content[at + 16 + 4 * i : at + 20 + 4 * i] = b"\0\0\0\0"
    file.write_bytes(content)
    with pytest.raises(VideoError, match=r"clip\.mp4"):
        read_video(file)


def test_files_that_are_no_videos(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"none\.mp4: no such video file"):
        read_video(tmp_path / "none.mp4")
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(VideoError, match=r"empty\.mp4: the file is empty"):
        read_video(tmp_path / "empty.mp4")
    (tmp_path / "text.mp4").write_text("not a video " * 50)
    with pytest.raises(VideoError, match=r"text\.mp4: cannot be read as a video"):
        read_video(tmp_path / "text.mp4")
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(b"\0\0" * 800)
    with pytest.raises(VideoError, match=r"sound\.wav: no video stream \(streams found: audio\)"):
        read_video(tmp_path / "sound.wav")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "clip.mp4"
    write_video(file, clip(3), 8)
    before = file.read_bytes()
    with pytest.raises(VideoError, match="uint8"):
        write_video(file, clip(3).astype(np.float32) / 255, 8)
    with pytest.raises(VideoError, match="fps must be a positive number"):
        write_video(file, clip(3), 0)
    with pytest.raises(VideoError, match=r"clip\.mp4: cannot be written"):
        write_video(file, clip(3), 8, crf=-7)
    assert file.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


def test_nan_frames_are_called_that() -> None:
    with pytest.raises(VideoError, match="NaN or infinite values"):
        Video(np.full((2, 4, 4, 3), np.nan), 8)
    with pytest.raises(VideoError, match="fps must be a positive number, found nan"):
        Video(clip(2), float("nan"))


def test_files_of_others_are_not_our_own() -> None:
    assert not is_own({}) and not is_own({"comment": "made with love"}) and not is_own({"title": "spatialalign"})
