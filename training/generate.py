"""Fill a sample store with clips: ``python -m training.generate``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spatialalign.errors import DataError, LoraError
from spatialalign.prompts import Prompt, read_csv
from spatialalign.video import write_video
from training.cli import command
from training.monitors import JsonlLog
from training.stages import StageSummary, batches, parse_seeds, stage_log
from training.store import LatentsHeader, Sample, Store

if TYPE_CHECKING:
    from torch import Tensor
    from tqdm import tqdm

    from spatialalign.backbones.base import Backbone, SampleSettings

_TEXT_BATCH = 16


@dataclass(frozen=True)
class Generate:
    """Generate clips for every prompt and seed that the store lacks; several processes may work on one store."""

    model: str
    """A diffusers folder (Wan 2.1, 2.2 or LTX-Video), a hub id, or "miniature"."""
    prompts: Path
    """CSV file of prompts with the official columns."""
    store: Path
    """Sample store; made when missing."""
    seeds: str = "0-4"
    """Seeds of each prompt, as 0-4 or 0,3,7."""
    lora: Path | None = None
    """LoRA file of any dialect to sample with."""
    lora_scale: float = 1.0
    """Strength of the LoRA."""
    batch: int = 4
    """Clips generated at once."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    dtype: str = "auto"
    """auto (bfloat16 on CUDA, else float32), float32, bfloat16, float16."""
    expert: Literal["high", "low"] | None = None
    """Expert of Wan 2.2 A14B that the LoRA is put on: high (also null) or low; both sample."""
    frames: int | None = None
    """Frames of a clip; null for the model's own, as in the options below."""
    height: int | None = None
    """Height in pixels."""
    width: int | None = None
    """Width in pixels."""
    steps: int | None = None
    """Sampling steps."""
    guidance: float | None = None
    """Classifier-free guidance scale; 1 is none."""
    guidance_2: float | None = None
    """The same for the low-noise expert of Wan 2.2 A14B."""
    shift: float | None = None
    """Timestep shift."""
    negative_prompt: str | None = None
    """Negative prompt."""

    def settings(self, default: SampleSettings) -> SampleSettings:
        """The model's settings with the options given on top."""
        names = [field.name for field in dataclasses.fields(default)]
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return dataclasses.replace(default, **given)


def generate(
    backbone: Backbone,
    store: Store,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    settings: SampleSettings,
    batch: int = 4,
    model: str | None = None,
) -> StageSummary:
    """Make the clips that the store lacks; what is complete stays as it is.

    A sample whose latents exist without a video is only decoded; unreadable latents are made again. A clip that is not
    finite becomes a failure in the summary.

    Args:
        backbone: the generator, with or without an adapter.
        store: where prompts, text embeddings, latents and videos go.
        prompts: each gets every seed.
        seeds: of the initial noise.
        settings: how to sample.
        batch: clips at once.
        model: name of the generator in the files, when it is more than ``backbone.model_id`` (a LoRA on it).

    Raises:
        StoreError: the store holds samples of these prompts made with another model or other settings.
    """
    from tqdm import tqdm

    log, summary = stage_log(store.root, "generate"), StageSummary("generate")
    header = LatentsHeader(
        backbone.latent_space, model or backbone.model_id, {**settings.to_dict(), "fps": backbone.fps}, settings.digest
    )
    backbone.latent_shape(settings)  # a size that does not fit should be said before anything is written
    samples = [store.sample(prompt.prompt_id, seed) for prompt in prompts for seed in seeds]
    damaged = {sample.name for sample in store.check_same_settings(samples, header)}
    for prompt in prompts:
        store.add_prompt(prompt, {"model": header.model, "settings": header.settings})
    todo = [sample for sample in samples if not sample.generated or sample.name in damaged]
    summary.skipped = len(samples) - len(todo)
    texts, negative = read_texts(backbone, store, {sample.prompt_id: None for sample in todo}, prompts, settings)
    log.write({"event": "start", "model": header.model, "settings": header.settings, "todo": len(todo)})
    bar: tqdm[Any]
    with tqdm(total=len(samples), initial=summary.skipped, desc="generate", unit="clip", disable=None) as bar:
        for group in batches(todo, batch):
            with ExitStack() as claims:
                held = [sample for sample in group if claims.enter_context(sample.claim("generate"))]
                mine = [sample for sample in held if not sample.generated or sample.name in damaged]
                summary.busy += len(group) - len(held)
                summary.skipped += len(held) - len(mine)
                latents = _latents(backbone, mine, texts, negative, settings, header, bar)
                _write(backbone, mine, latents, summary, log)
            bar.update(len(group))
    log.write({"event": "end", **summary.to_dict()})
    if summary.failed and not summary.done and not summary.skipped:
        raise DataError(f"none of {len(summary.failed)} clips could be made; the first: {summary.failed[0][1]}")
    return summary


def read_texts(
    backbone: Backbone,
    store: Store,
    wanted: dict[str, None],
    prompts: Sequence[Prompt],
    settings: SampleSettings,
) -> tuple[dict[str, Tensor], Tensor]:
    """Embeddings of the wanted prompts, cached in the store, and of the negative prompt."""
    import torch

    if not wanted:
        return {}, torch.zeros(1, 1)
    missing = [p for p in prompts if p.prompt_id in wanted and not store.has_text(p.prompt_id, backbone.model_id)]
    for group in batches(missing, _TEXT_BATCH):
        for prompt, embedding in zip(group, backbone.encode_text([p.text for p in group]), strict=True):
            store.write_text(prompt.prompt_id, embedding, backbone.model_id)
    negative = backbone.encode_text([settings.negative_prompt])[0]
    backbone.release_text_encoder()
    return {prompt_id: store.read_text(prompt_id) for prompt_id in wanted}, negative


def _latents(
    backbone: Backbone,
    samples: Sequence[Sample],
    texts: dict[str, Tensor],
    negative: Tensor,
    settings: SampleSettings,
    header: LatentsHeader,
    bar: tqdm[Any],
) -> dict[str, Tensor]:
    """Latents by sample name: read where a run was cut after writing them, generated and written elsewhere."""
    import torch

    found: dict[str, Tensor] = {}
    for sample in samples:
        if sample.latents.is_file():
            try:
                found[sample.name] = sample.read_latents()
            except DataError:
                sample.latents.unlink()
    fresh = [sample for sample in samples if sample.name not in found]
    if fresh:
        made = backbone.sample(
            [texts[sample.prompt_id] for sample in fresh],
            negative,
            [sample.seed for sample in fresh],
            settings,
            lambda step, steps: bar.set_postfix_str(f"step {step}/{steps}"),
        )
        for sample, latents in zip(fresh, made, strict=True):
            found[sample.name] = latents
            if torch.isfinite(latents).all():
                sample.write_latents(latents.to(backbone.dtype), header)
    return found


def _write(
    backbone: Backbone, samples: Sequence[Sample], latents: dict[str, Tensor], summary: StageSummary, log: JsonlLog
) -> None:
    """Decode and write the videos; a clip that cannot be decoded takes no other down with it."""
    import torch

    if not samples:
        return
    try:
        clips = list(backbone.decode(torch.stack([latents[s.name] for s in samples]), [s.name for s in samples]))
    except DataError as error:
        if len(samples) == 1:
            summary.fail(samples[0].name, str(error), log)
            samples[0].latents.unlink(missing_ok=True)
            return
        for sample in samples:
            _write(backbone, [sample], latents, summary, log)
        return
    for sample, frames in zip(samples, clips, strict=True):
        write_video(sample.video, frames, backbone.fps)
        summary.done += 1
        log.write({"event": "sample", "sample": sample.name, "seconds": round(summary.seconds, 3)})


def lora_model_name(model: str, lora: Path, scale: float) -> str:
    """Name of a base model with a LoRA on it: changes with the file's tensors, not its metadata, and the strength."""
    from spatialalign.lora_record import tensors_digest

    return f"{model}+lora:{tensors_digest(lora)[:12]}@{scale:g}"


def put_lora(backbone: Backbone, lora: Path, scale: float) -> str:
    """Load a LoRA onto the transformer that is trained; returns the name of the model that this makes.

    Raises:
        LoraError: the file does not fit, or says that it was trained on the other expert.
    """
    from spatialalign.lora import adapter_metadata, load_lora

    made_for = adapter_metadata(lora).get("expert")
    if backbone.expert is not None and made_for not in (None, backbone.expert):
        raise LoraError(
            f"{lora} was trained on the {made_for}-noise expert and would be put on the {backbone.expert}-noise one; "
            f"load the model with --expert {made_for}"
        )
    load_lora(backbone.transformer, lora, scale=scale)
    model = backbone.model_id if backbone.expert is None else f"{backbone.model_id}:{backbone.expert}"
    return lora_model_name(model, lora, scale)


def run(args: Generate) -> StageSummary:
    """Load the model and generate."""
    prompts, seeds = read_csv(args.prompts), parse_seeds(args.seeds)

    from spatialalign.backbones import load_backbone

    backbone = load_backbone(args.model, args.device, args.dtype, args.expert)
    name = None if args.lora is None else put_lora(backbone, args.lora, args.lora_scale)
    store = Store(args.store, create=True)
    summary = generate(backbone, store, prompts, seeds, args.settings(backbone.default_settings()), args.batch, name)
    print(summary.text())
    return summary


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m training.generate``."""
    command(Generate, run, argv)


if __name__ == "__main__":
    main()
