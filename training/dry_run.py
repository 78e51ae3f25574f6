"""A training looked at without running it: every file it would read, and what it would cost; nothing is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from spatialalign.errors import ConfigError, DataError, ModelError, SpatialAlignError
from spatialalign.store import Sample, Store
from training.config import TrainSettings
from training.cost import WanShape, pair_flops, pair_peak
from training.pairs import PromptPairs, read_pairs, scored_by
from training.processes import Processes, launched_size
from training.sharding import check_sharding, with_launcher
from training.weights import block_weights, read_scores

if TYPE_CHECKING:
    from training.dpo import Dpo

_FLOATS = ("F32", "F16", "BF16")


@dataclass
class Files:
    """What the files of a training turned out to be.

    Attributes:
        bad: one line for each file that cannot be used, with its path.
        shapes: number of clips by shape ``(c, f, h, w)`` of their latents.
        latent_bytes: of all usable clips.
    """

    bad: list[str] = field(default_factory=list)
    shapes: Counter[tuple[int, ...]] = field(default_factory=Counter)
    latent_bytes: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The commonest, which every clip must have."""
        return self.shapes.most_common(1)[0][0]


@dataclass(frozen=True)
class Model:
    """What is known of a model without its weights: the space of its latents, and its transformer's ``config.json``."""

    space: str
    config: dict[str, Any]

    @property
    def text_width(self) -> int:
        """Of the text embeddings it takes."""
        return int(self.config["text_dim"] if "text_dim" in self.config else self.config["caption_channels"])


def look(args: Dpo) -> None:
    """Check the files of a training and print what it would cost.

    Raises:
        ConfigError: options that cannot be.
        DataError: files that cannot be used, by name.
    """
    from spatialalign.backbones.loading import pick_device, pick_dtype

    settings, store = with_launcher(args.settings()), Store(args.store)
    for name, value in (("tflops", args.tflops), ("processes", args.processes)):
        if value is not None and not value > 0:
            raise ConfigError(f"{name} must be above 0, found {value}")
    processes = Processes(size=args.processes or launched_size())
    check_sharding(settings, processes)
    pairs = args.pairs or args.store / "pairs.json"
    prompts, _ = read_pairs(pairs)
    model, device = read_model(args.model, args.expert), pick_device(args.device)
    files = check_files(store, prompts, model)
    batched = settings.passes == "batched" or (settings.passes == "auto" and device == "cpu")
    print(report(files, prompts, model, settings, pick_dtype(args.dtype, device).itemsize, batched, processes.size))
    if args.tflops is not None:
        print(seconds_text(model, files, settings, args.tflops))
    refuse_bad(files)
    if settings.arm == "rwr" or settings.pair_weight != "none":
        read_scores(store, prompts, scored_by(pairs))
    block_weights(settings, args.patches, prompts)


def read_model(name: str, expert: str | None) -> Model:
    """Read the configuration of a model as ``load_backbone`` takes it; raises :class:`ModelError`."""
    import spatialalign
    from spatialalign.backbones.loading import read_index

    packaged = Path(spatialalign.__file__).parent / "miniature" / "weights" / "wan"
    source = str(packaged) if name == "miniature" else name
    index = read_index(source)
    pipeline = index.get("_class_name")
    if pipeline == "WanPipeline":
        two = index.get("boundary_ratio") is not None
        return _read_wan(source, "transformer_2" if two and expert == "low" else "transformer")
    if pipeline == "LTXPipeline":
        return _read_ltx(source)
    raise ModelError(f"{name} is a {pipeline}; known are WanPipeline (Wan 2.1 and 2.2) and LTXPipeline (LTX-Video)")


def _read_wan(source: str, part: str) -> Model:
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    from spatialalign.backbones.latent_space import LatentSpace
    from spatialalign.backbones.loading import load_part

    config = load_part(source, part, lambda: WanTransformer3DModel.load_config(source, subfolder=part))
    vae = load_part(source, "vae", lambda: AutoencoderKLWan.load_config(source, subfolder="vae"))
    return Model(LatentSpace.from_config(vae).name, dict(config))


def _read_ltx(source: str) -> Model:
    from diffusers import AutoencoderKLLTXVideo, LTXVideoTransformer3DModel

    from spatialalign.backbones.loading import load_part
    from spatialalign.backbones.ltx import read_space

    def space() -> str:
        folder = Path(source) / "vae"
        if not Path(source).is_dir():  # a hub id; the constants of the latents lie among the VAE's weights
            from huggingface_hub import hf_hub_download

            folder = Path(hf_hub_download(source, "vae/diffusion_pytorch_model.safetensors")).parent
        return read_space(folder, dict(AutoencoderKLLTXVideo.load_config(source, subfolder="vae"))).name

    config = load_part(
        source, "transformer", lambda: LTXVideoTransformer3DModel.load_config(source, subfolder="transformer")
    )
    return Model(load_part(source, "vae", space), dict(config))


def check_files(store: Store, prompts: Sequence[PromptPairs], model: Model) -> Files:
    """Read every prompt, text and latents that the pairs name, and say of each what is wrong with it."""
    from tqdm import tqdm

    files, clips = Files(), list[tuple[tuple[int, ...], Sample]]()
    for prompt in tqdm(prompts, desc="dry run", unit="prompt", disable=None):
        with _noting(files):
            store.prompt(prompt.prompt_id)
        with _noting(files):
            _check_text(store, prompt.prompt_id, model.text_width)
        for seed in (*prompt.winners, *prompt.losers):
            with _noting(files):
                sample = store.sample(prompt.prompt_id, seed)
                shape = _check_latents(sample, model.space)
                clips.append((shape, sample))
                files.shapes[shape] += 1
                files.latent_bytes += sample.latents.stat().st_size
    for shape, sample in clips:
        if shape != files.shape:
            files.bad.append(f"{sample.latents} has shape {shape}, the other clips {files.shape}; generate it again")
    return files


def report(
    files: Files,
    prompts: Sequence[PromptPairs],
    model: Model,
    settings: TrainSettings,
    bytes_each: int,
    batched: bool,
    processes: int = 1,
) -> str:
    """What the training is made of and what it costs, in lines; the arguments are those of :func:`.cost.pair_peak`."""
    pairs = sum(len(prompt.winners) * len(prompt.losers) for prompt in prompts)
    lines = [
        f"{len(prompts)} prompts, {sum(files.shapes.values())} clips, {pairs} pairs, "
        f"{files.latent_bytes / 1e9:.3g} GB of latents",
        f"{settings.steps} steps of {settings.batch_pairs} pairs: {settings.steps * settings.batch_pairs:,} pairs",
    ]
    if not files.shapes:
        return "\n".join([*lines, "operations and memory: not known without a clip"])
    shape = WanShape.of(model.config, files.shape)
    step = pair_flops(shape, settings) * settings.batch_pairs
    peak = pair_peak(shape, settings, batched, bytes_each, processes)
    where = f" of each of {processes} processes" if settings.shard else ""
    return "\n".join(
        [
            *lines,
            f"{shape.tokens:,} tokens a clip, latents {files.shape}",
            f"{step / 1e12:,.4g} TFLOP a step, {step * settings.steps:.3g} FLOP in all",
            f"about {peak / 1e9:.3g} GB at the peak{where}, by formula; "
            "a CUDA context and fragmentation take 1 to 2 GB more",
        ]
    )


def seconds_text(model: Model, files: Files, settings: TrainSettings, tflops: float) -> str:
    """Time of a step and of the training at ``tflops`` TFLOP/s of all processes together."""
    if not files.shapes:
        return "time: not known without a clip"
    shape = WanShape.of(model.config, files.shape)
    step = pair_flops(shape, settings) * settings.batch_pairs / (tflops * 1e12)
    return f"{step:.4g} s a step, {step * settings.steps / 3600:.4g} h in all at {tflops:g} TFLOP/s"


def refuse_bad(files: Files) -> None:
    """Raise :class:`DataError` with every file that cannot be used."""
    if files.bad:
        raise DataError(f"{len(files.bad)} files cannot be used:\n  " + "\n  ".join(files.bad))


@contextmanager
def _noting(files: Files) -> Iterator[None]:
    try:
        yield
    except (SpatialAlignError, OSError) as error:
        files.bad.append(str(error))


def _check_text(store: Store, prompt_id: str, width: int) -> None:
    text, path = store.read_text(prompt_id), store.prompt_folder(prompt_id) / "prompt.safetensors"
    if not text.is_floating_point() or not len(text):
        raise DataError(f"{path} holds {tuple(text.shape)} values of {text.dtype}; expected floats of some tokens")
    if text.shape[1] != width:
        raise DataError(f"{path} is {text.shape[1]} wide, the model takes {width}; generate with that model again")


def _check_latents(sample: Sample, space: str) -> tuple[int, ...]:
    header, latents = sample.read_header(), sample.read_latents()
    if header.space != space:
        raise DataError(f"{sample.latents} is in the latent space {header.space}, the model has {space}")
    with safe_open(sample.latents, framework="pt") as file:
        kind = file.get_slice("latents").get_dtype()
    if kind not in _FLOATS:
        raise DataError(f"{sample.latents} holds {kind}, expected one of {', '.join(_FLOATS)}; generate it again")
    return tuple(latents.shape)
