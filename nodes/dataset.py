"""From a graph to a training set: finished clips go into the sample store that ``python -m training.dpo`` reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_api.latest import io, ui

from ..spatialalign.backbones.latent_space import LatentSpace
from ..spatialalign.collect import Clip, check_set_name, collect, derived_id, describe_set, settings_digest
from ..spatialalign.dsr import DSR
from ..spatialalign.errors import DataError, SpatialAlignError
from ..spatialalign.prompts import Prompt, check_prompt_id
from ..spatialalign.score import DsrScore
from ..spatialalign.store import LatentsHeader, Store
from ..spatialalign.tracks import Tracks
from ..spatialalign.video import Video
from . import graph, host
from .sockets import DSR_SOCKET, SCORE_SOCKET, TRACKS_SOCKET, clip_inputs, frames_of, to_uint8

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

TEXT_WIDTH = 4096
"""Width of the embeddings of Wan's text encoder, UMT5-XXL."""
IMAGE_TO_VIDEO = ("concat_latent_image", "clip_vision_output", "reference_latents", "vace_frames")
"""Keys of a CONDITIONING that shows the model pictures beside the text."""


class CollectSample(io.ComfyNode):
    """One clip of a preference set."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpatialAlignCollect",
            display_name="Collect Sample",
            category="SpatialAlign/Training",
            description=(
                "Adds one generated clip to a training set in ComfyUI's output folder, under spatialalign: the latent "
                "in the model's space, the prompt's embedding, the video, and its tracks and score if they are "
                "connected. python -m training.score, training.mine and training.dpo read the set. Queue it over many "
                "seeds and prompts; queueing an unchanged graph again adds nothing. For Wan 2.1 text-to-video."
            ),
            inputs=[
                DSR_SOCKET.Input("dsr", tooltip="The relationship that the clip was asked to show."),
                io.Latent.Input("latent", tooltip="What the sampler gave: one clip, before it is decoded."),
                io.Conditioning.Input("positive", tooltip="The encoded prompt that the sampler was given."),
                io.Vae.Input("vae", tooltip="The Wan 2.1 VAE that decodes this latent; it names the latent space."),
                io.String.Input(
                    "set_name",
                    default="my_set",
                    tooltip="Folder of the set. One set holds clips that were made in one way.",
                ),
                io.String.Input(
                    "prompt_id",
                    default="",
                    tooltip="Name of the prompt in the set; empty for one that is made from the relationship.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    tooltip="The seed of this clip. Connect the number that the sampler gets, too.",
                ),
                io.Float.Input(
                    "fps",
                    default=16.0,
                    min=1.0,
                    max=120.0,
                    step=0.01,
                    tooltip="Frame rate of images: 16 for Wan 2.1, 8 for the miniature. A VIDEO brings its own.",
                ),
                io.String.Input(
                    "base_model",
                    default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
                    tooltip="The model in diffusers' form, as python -m training.dpo --model will be given it.",
                ),
                *clip_inputs(
                    "The decoded frames. Connect these or video.", "The decoded clip. Connect this or images."
                ),
                TRACKS_SOCKET.Input(
                    "tracks", optional=True, tooltip="Tracks of this clip; without them training.score makes them."
                ),
                SCORE_SOCKET.Input(
                    "result", optional=True, tooltip="DSR-Score's result for these tracks, checked against them."
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="The folder of the sample.")],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def validate_inputs(cls, set_name: str | None = None, prompt_id: str | None = None) -> bool | str:
        # Said before the sampler has worked for minutes. What is linked is None here and checked when the node runs.
        try:
            check_set_name("linked" if set_name is None else set_name)
            check_prompt_id((prompt_id or "").strip() or "derived")
        except SpatialAlignError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(
        cls,
        dsr: DSR,
        latent: dict[str, Any],
        positive: list[Any],
        vae: Any,
        set_name: str,
        prompt_id: str,
        seed: int,
        fps: float,
        base_model: str,
        images: Tensor | None = None,
        video: Any = None,
        tracks: Tracks | None = None,
        result: DsrScore | None = None,
    ) -> bool:
        """Whether the set is there: an unchanged graph runs again after the set was deleted, and not otherwise."""
        return set_name is not None and _set_folder(set_name).is_dir()

    @classmethod
    def execute(
        cls,
        dsr: DSR,
        latent: dict[str, Any],
        positive: list[Any],
        vae: Any,
        set_name: str,
        prompt_id: str,
        seed: int,
        fps: float,
        base_model: str,
        images: Tensor | None = None,
        video: Any = None,
        tracks: Tracks | None = None,
        result: DsrScore | None = None,
    ) -> io.NodeOutput:
        check_set_name(set_name)
        space = LatentSpace(host.vae_width(vae))
        frames, rate = frames_of(images, video, fps)
        clip = Clip(_latents(latent, space), _text(positive), Video(to_uint8(frames), rate), tracks, result)
        prompt = Prompt.of(prompt_id.strip() or derived_id(dsr), dsr)
        at = cls.hidden.prompt, cls.hidden.unique_id, "latent"
        store = Store(_set_folder(set_name), create=True)
        written = collect(store, prompt, seed, clip, _header(clip, space.name, base_model.strip(), at))
        folder = store.sample(prompt.prompt_id, seed).folder
        lines = [
            f"{folder}: " + (f"added {', '.join(written)}" if written else "there already, nothing was added"),
            f"{set_name}: {describe_set(store)}",
        ]
        if other := graph.seeds(*at) - {seed}:
            lines.append(f"WARNING: this sample is kept under seed {seed}, but a sampler states {min(other)}")
        host.show_text("\n".join(lines), cls.hidden.unique_id)
        return io.NodeOutput(str(folder), ui=ui.PreviewText("\n".join(lines)))


def _set_folder(set_name: str) -> Path:
    return host.output_directory() / "spatialalign" / set_name


def _header(clip: Clip, space: str, base_model: str, at: tuple[graph.Graph | None, str, str]) -> LatentsHeader:
    """What the sample says of its making: the model with its LoRAs, the size, and what the graph states."""
    if not base_model:
        raise DataError("base_model is empty; give the folder or hub id that training.dpo will be given as --model")
    frames, height, width = clip.video.frames.shape[:3]
    settings = {"frames": frames, "height": height, "width": width, "fps": clip.video.fps}
    settings |= graph.sampling_settings(*at)
    model = base_model + "".join(f"+lora:{lora}" for lora in graph.loras(*at))
    return LatentsHeader(space, model, settings, settings_digest(settings))


def _latents(latent: dict[str, Any], space: LatentSpace) -> Tensor:
    """LATENT of one clip as ``(c, f, h, w)`` in the model's space; ComfyUI hands latents around in the VAE's."""
    import torch

    samples = latent["samples"]
    remedy = "connect the latent of a Wan 2.1 text-to-video sampler"
    if not isinstance(samples, torch.Tensor):
        raise DataError(f"latent: a bundle of several latents ({type(samples).__name__}) cannot be collected; {remedy}")
    if samples.ndim != 5 or samples.shape[1] != space.channels:
        raise DataError(
            f"latent: expected (1, {space.channels}, frames, height, width), found the shape {tuple(samples.shape)}; "
            f"Wan 2.1's latents are supported (not those of Wan 2.2 5B, which have 48 channels): {remedy}"
        )
    if samples.shape[0] != 1:
        raise DataError(
            f"latent: it holds {samples.shape[0]} clips, and one seed names one clip; set the batch size to 1 and "
            "queue once for every seed"
        )
    return space.normalise(samples.detach().cpu().float())[0]


def _text(positive: list[Any]) -> Tensor:
    """The embedding ``(n, d)`` of a CONDITIONING, without the zero rows that pad it."""
    if len(positive) != 1:
        raise DataError(
            f"positive: it holds {len(positive)} conditionings, a training sample has one text; connect one CLIP Text "
            "Encode, without combining or scheduling"
        )
    embedding, options = positive[0]
    shown = [key for key in IMAGE_TO_VIDEO if options.get(key) is not None]
    if shown:
        raise DataError(f"positive: it shows the model pictures ({shown[0]}); collect clips of text-to-video only")
    if embedding.ndim != 3 or embedding.shape[0] != 1 or embedding.shape[2] != TEXT_WIDTH:
        raise DataError(
            f"positive: expected an embedding (1, tokens, {TEXT_WIDTH}), found {tuple(embedding.shape)}; encode the "
            "prompt with Wan's text encoder (CLIP loader of type wan)"
        )
    rows = embedding[0].detach().cpu().float()
    real = (rows != 0).any(dim=1).nonzero()
    if not len(real):
        raise DataError("positive: the embedding is all zeros; connect the encoded prompt, not a zeroed conditioning")
    return rows[: int(real[-1]) + 1]
