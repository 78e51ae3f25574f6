"""One finished clip into a sample store: it is checked that its parts belong together, then written as a whole."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .dsr import DSR
from .errors import DataError, StoreError, TracksError
from .prompts import Prompt
from .score import DsrScore, dsr_score
from .store import LatentsHeader, Sample, Store, classify
from .tracks import Tracks
from .video import Video, write_video

if TYPE_CHECKING:
    from torch import Tensor

_SET_NAME = re.compile(r"\w(?:[\w .-]{0,98}[\w-])?")
_SAME = 0.01
"""Largest relative difference between two computations of the same values; another seed differs by about 1."""


@dataclass(frozen=True, eq=False)
class Clip:
    """What is known of one generated clip.

    Attributes:
        latents: ``(c, f, h, w)`` in the model's normalised space.
        text: ``(n, d)``, the prompt's embedding without padding.
        video: the decoded frames.
        tracks: of the video, if it was tracked.
        result: the score somebody made of these tracks, to be compared; None when there is none.
    """

    latents: Tensor
    text: Tensor
    video: Video
    tracks: Tracks | None = None
    result: DsrScore | None = None


def check_set_name(name: str) -> None:
    """Raise :class:`StoreError` unless ``name`` can name one folder on any machine."""
    if not _SET_NAME.fullmatch(name):
        raise StoreError(
            f"the set name {name!r} cannot name a folder; use letters, digits, '_', '-' and, inside, '.' and spaces, "
            "without separators such as '/', at most 100 characters"
        )


def derived_id(dsr: DSR) -> str:
    """An id for a relationship without one: ``<digest>_<type>``, the form of the official ids."""
    return f"{hashlib.sha256(dsr.prompt().encode()).hexdigest()[:8]}_{dsr.type_code}"


def settings_digest(settings: dict[str, Any]) -> str:
    """Sixteen hexadecimal digits that change with any setting."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def collect(store: Store, prompt: Prompt, seed: int, clip: Clip, header: LatentsHeader) -> tuple[str, ...]:
    """Add a clip to a store, or what the store lacks of it; nothing that is there is changed.

    Tracks bring their score with them, as ``training.score`` writes it.

    Returns:
        The parts that were written, of "latents", "video", "tracks" and "score"; nothing when all were there.

    Raises:
        DataError: the parts do not belong together, or hold NaN.
        StoreError: the store holds clips made otherwise, another clip of this prompt and seed, another text under this
            id, or another process is at work on the sample.
    """
    score = _checked(clip, prompt.dsr)
    sample = store.sample(prompt.prompt_id, seed)
    damaged = store.check_same_settings(store.samples(), header)
    text_is_new = _check_text(store, prompt, clip.text)
    store.add_prompt(prompt, {"model": header.model, "settings": header.settings})
    with sample.claim("generate") as held:
        if not held:
            raise StoreError(f"another process is at work on {sample.folder}; wait for it and queue again")
        if text_is_new:
            store.write_text(prompt.prompt_id, clip.text, header.model)
        return tuple(_write(sample, clip, score, header, sample in damaged))


def _write(sample: Sample, clip: Clip, score: DsrScore | None, header: LatentsHeader, damaged: bool) -> list[str]:
    written = []
    if damaged or not sample.latents.is_file():
        sample.write_latents(clip.latents, header)
        written.append("latents")
    elif not _alike(clip.latents, sample.read_latents()):
        raise StoreError(
            f"{sample.folder} holds another clip of the same prompt and seed; give the seed that made this clip, "
            "choose another set, or delete that folder"
        )
    if not sample.video.is_file():
        write_video(sample.video, clip.video.frames, clip.video.fps)
        written.append("video")
    if clip.tracks is not None and score is not None and not sample.scored:
        clip.tracks.save(sample.tracks)
        sample.write_score(score, clip.tracks.source)
        written += ["tracks", "score"]
    return written


def _checked(clip: Clip, dsr: DSR) -> DsrScore | None:
    """Raise :class:`DataError` unless the parts are of one clip; the score of its tracks, if it has any."""
    import torch

    for what, values in (("latents", clip.latents), ("text embedding", clip.text)):
        if not torch.isfinite(values).all():
            raise DataError(f"the {what} hold NaN or infinite values; the sampler or the model failed, generate again")
    _, frames, height, width = clip.latents.shape
    expected, found = (4 * (frames - 1) + 1, 8 * height, 8 * width), clip.video.frames.shape[:3]
    if found != expected:
        raise DataError(
            f"the latents are of {_extent(expected)}, the video has {_extent(found)}; connect the frames that were "
            "decoded from this latent, neither cut nor resized"
        )
    if clip.tracks is None:
        if clip.result is not None:
            raise DataError("a score without its tracks cannot be checked or scored again; connect the tracks, too")
        return None
    tracked = (clip.tracks.frames, *clip.tracks.size)
    if tracked != expected:
        raise DataError(
            f"the tracks are of {_extent(tracked)}, the video has {_extent(found)}; connect the tracks of this clip"
        )
    try:
        score = dsr_score(clip.tracks.oriented(dsr.subject, dsr.object), dsr)
    except TracksError as error:
        raise DataError(f"{error}; connect the tracks that were made for this dsr") from error
    if clip.result is not None and clip.result.to_dict() != score.to_dict():
        raise DataError(
            f"the score ({_number(clip.result)}) is not that of the tracks for this prompt ({_number(score)}); connect "
            "the DSR-Score of the same tracks and dsr"
        )
    return score


def _check_text(store: Store, prompt: Prompt, text: Tensor) -> bool:
    """Whether the store lacks the prompt's embedding; :class:`StoreError` when it holds another one."""
    if not store.has_text(prompt.prompt_id):
        return True
    if not _alike(text, store.read_text(prompt.prompt_id)):
        raise StoreError(
            f"{store.root} holds another text embedding for the prompt {prompt.prompt_id}; connect the conditioning of "
            "this prompt's own sentence, from the same text encoder, or give another prompt_id"
        )
    return False


def _alike(new: Tensor, old: Tensor) -> bool:
    """Equal but for the last bits, which differ between runs on a GPU."""
    new, old = new.float().cpu(), old.float().cpu()
    return new.shape == old.shape and bool((new - old).norm() <= _SAME * old.norm())


def _extent(size: tuple[int, ...]) -> str:
    frames, height, width = size
    return f"{frames} frames of {width}x{height}"


def _number(score: DsrScore) -> str:
    return "INVALID" if score.score is None else f"{score.score:.3f}"


def describe_set(store: Store) -> str:
    """How many clips a store holds, how they scored, and whether pairs can be made of them."""
    sides: dict[str, Counter[str | None]] = {}
    clips = 0
    for sample in store.samples():
        clips += sample.generated
        if sample.generated and sample.scored:
            try:
                side = classify(sample.read_score().score)
            except DataError:
                continue  # training.score makes it again
            sides.setdefault(sample.prompt_id, Counter())[side] += 1
    total = sum(sides.values(), Counter[str | None]())
    pairs = sum(side["winner"] * side["loser"] for side in sides.values())
    return (
        f"{clips} clips of {len(store.prompts())} prompts, {total.total()} of them scored: {total['winner']} winners, "
        f"{total['loser']} losers, {total[None]} INVALID; {pairs} pairs"
    )
