"""Fill a sample store with clips that were guided and searched for: ``python -m training.sample``."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from spatialalign.errors import ConfigError, DataError
from spatialalign.files import write_json
from spatialalign.prompts import Prompt, read_csv
from spatialalign.search import SearchSettings, candidate_seed, survivors
from training.cli import command, options_of
from training.generate import put_lora, read_texts
from training.guide import GuideOptions, GuideSpec, digest, guide_spec, load_noisy
from training.monitors import JsonlLog
from training.stages import StageSummary, batches, parse_seeds, stage_log
from training.store import LatentsHeader, Store
from training.store import Sample as StoredSample

if TYPE_CHECKING:
    from torch import Tensor
    from tqdm import tqdm

    from spatialalign.backbones.base import Backbone, SampleSettings
    from spatialalign.guidance import RewardGuidance
    from spatialalign.rewards.latent import LatentReward
    from spatialalign.search_work import SearchResult
    from spatialalign.tracking.tracker import Tracker
    from training.candidates import Candidates

VERSION = 1
"""Of sampling.json."""


@dataclass(frozen=True)
class Sample:
    """Sample with reward guidance, search, both or neither: one clip for every prompt and seed that the store lacks."""

    model: str
    """A diffusers folder (Wan 2.1, 2.2 or LTX-Video), a hub id, or "miniature"."""
    prompts: Path
    """CSV file of prompts with the official columns."""
    store: Path
    """Sample store; made when missing."""
    seeds: str = "0-4"
    """Seeds of each prompt, as 0-4 or 0,3,7."""
    search: str = "none"
    """none, best-of-<N>, pruned-<N> or particles-<N>: kind and candidates at once; more options of it are below."""
    reward: str | None = None
    """Latent rewards that guide, <file> or <file>:<weight>, several joined by commas; more options of it are below."""
    preview_reward: Path | None = None
    """Latent reward that scores clips on the way, for pruned-<N> and particles-<N>; null for the tracker."""
    lora: Path | None = None
    """LoRA file of any dialect to sample with."""
    lora_scale: float = 1.0
    """Strength of the LoRA."""
    tracker: str = "miniature"
    """Tracking models of the search: "miniature", a folder with detector/ and segmenter/, or hub ids joined by +."""
    rule: Literal["robust", "paper"] = "robust"
    """Tracking rule."""
    batch: int = 4
    """Clips in one pass of the model."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    dtype: str = "auto"
    """auto (bfloat16 on CUDA, else float32), float32, bfloat16, float16."""
    expert: Literal["high", "low"] | None = None
    """Expert of Wan 2.2 A14B that the LoRA is put on: high (also null) or low; both sample."""
    steps: int | None = None
    """Sampling steps; null for the model's own, as below."""
    guidance: float | None = None
    """Classifier-free guidance scale; 1 is none."""
    guidance_2: float | None = None
    """The same for the low-noise expert of Wan 2.2 A14B."""
    guide_options: dict[str, Any] = options_of(GuideOptions)
    search_options: dict[str, Any] = options_of(SearchSettings)

    def settings(self, default: SampleSettings) -> SampleSettings:
        """The model's settings with the options given on top."""
        names = ("steps", "guidance", "guidance_2")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return dataclasses.replace(default, **given)

    def searching(self) -> dict[str, Any]:
        """The options of the search; where a reward for it is given, clips are looked at by that."""
        return ({} if self.preview_reward is None else {"preview_by": "reward"}) | self.search_options


def sample_clips(
    backbone: Backbone,
    store: Store,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    settings: SampleSettings,
    tracker: Tracker | None = None,
    guide: GuideSpec | None = None,
    search: SearchSettings | None = None,
    batch: int = 4,
    model: str | None = None,
    preview_reward: Path | None = None,
) -> StageSummary:
    """Make the clips that the store lacks; what is complete stays as it is.

    The first candidate of every clip starts from the noise that ``training.generate`` gives it, the others from seeds
    derived from that one. Beside the chosen clip lies ``sampling.json``, and, where a search scored it, tracks and
    score as ``training.score`` writes them. A run that is stopped leaves a clip either whole or not made.

    Args:
        backbone: the generator, with or without an adapter.
        store: where everything goes.
        prompts: each gets every seed.
        seeds: of the initial noise.
        settings: how to sample.
        tracker: finds subject and object; a search needs it.
        guide: reward guidance, if any.
        search: how a clip is chosen of several candidates; None for no search.
        batch: clips in one pass of the model.
        model: name of the generator in the files, when it is more than ``backbone.model_id`` (a LoRA on it).
        preview_reward: file of the latent reward that scores clips on the way, for a search with ``preview_by``
            "reward".

    Raises:
        ConfigError: a search without a tracker, with too few steps, or without the reward that it looks by.
        ModelError: a reward made for other latents or texts, or of clean clips when it is to score noisy ones.
        StoreError: the store holds samples of these prompts made otherwise.
    """
    from tqdm import tqdm

    search = search or SearchSettings()
    if search.kind != "none" and tracker is None:
        raise ConfigError(f"the search {search.text} needs a tracker to score its candidates")
    if (search.looks and search.preview_by == "reward") != (preview_reward is not None):
        raise ConfigError(
            "a reward scores clips on the way in a search pruned or particles with preview_by reward; found "
            f"{search.name} and {'no reward' if preview_reward is None else preview_reward}"
        )
    search.events(settings.steps)  # what does not fit should be said before anything is written
    backbone.latent_shape(settings)
    log, summary = stage_log(store.root, "sample"), StageSummary("sample")
    name = "+".join([model or backbone.model_id, *_additions(guide, search, preview_reward)])
    header = LatentsHeader(backbone.latent_space, name, {**settings.to_dict(), "fps": backbone.fps}, settings.digest)
    samples = [store.sample(prompt.prompt_id, seed) for prompt in prompts for seed in seeds]
    damaged = {sample.name for sample in store.check_same_settings(samples, header)}
    for prompt in prompts:
        store.add_prompt(prompt, {"model": header.model, "settings": header.settings})

    def missing(sample: StoredSample) -> bool:
        return not (sample.generated and sampling_path(sample).is_file()) or sample.name in damaged

    todo = [sample for sample in samples if missing(sample)]
    summary.skipped = len(samples) - len(todo)
    texts, negative = read_texts(backbone, store, {sample.prompt_id: None for sample in todo}, prompts, settings)
    adjust = guide.load(backbone, negative.shape[-1]) if guide and todo else None
    reward = load_noisy(preview_reward, backbone, negative.shape[-1]) if preview_reward and todo else None
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    job = _Job(backbone, by_id, texts, negative, settings, header, tracker, search, preview_reward, reward, log)
    log.write({"event": "start", "model": header.model, "settings": header.settings, "todo": len(todo)})
    bar: tqdm[Any]
    with tqdm(total=len(samples), initial=summary.skipped, desc="sample", unit="clip", disable=None) as bar:
        for group in batches(todo, together(search, batch)):
            with ExitStack() as claims:
                held = [sample for sample in group if claims.enter_context(sample.claim("generate"))]
                mine = [sample for sample in held if missing(sample)]
                summary.busy += len(group) - len(held)
                summary.skipped += len(held) - len(mine)
                if mine:
                    job.make(mine, batch, guide, adjust, summary, bar)
            bar.update(len(group))
    log.write({"event": "end", **summary.to_dict()})
    if summary.failed and not summary.done and not summary.skipped:
        raise DataError(f"none of {len(summary.failed)} clips could be made; the first: {summary.failed[0][1]}")
    return summary


def sampling_path(sample: StoredSample) -> Path:
    """Where it stands how a clip was sampled: candidates, their scores, and what they cost."""
    return sample.folder / "sampling.json"


def together(search: SearchSettings, batch: int) -> int:
    """How many clips are searched at once, so that their candidates fill a batch.

    With a threshold a batch holds few candidates of many clips, else all of a few clips that are taken to the end.
    """
    finished = len(survivors([None] * search.candidates, search.keep)) if search.kind == "pruned" else search.candidates
    return batch if search.threshold is not None else max(1, batch // finished)


def _additions(guide: GuideSpec | None, search: SearchSettings, preview_reward: Path | None) -> list[str]:
    looked = [] if preview_reward is None else [f"preview:{digest(preview_reward)[:12]}"]
    return [*([] if guide is None else [guide.name]), *([] if search.kind == "none" else [search.name]), *looked]


@dataclass(frozen=True)
class _Job:
    """What all clips of a run share."""

    backbone: Backbone
    prompts: dict[str, Prompt]
    texts: dict[str, Tensor]
    negative: Tensor
    settings: SampleSettings
    header: LatentsHeader
    tracker: Tracker | None
    search: SearchSettings
    preview_reward: Path | None
    reward: LatentReward | None
    log: JsonlLog

    def make(
        self,
        samples: Sequence[StoredSample],
        batch: int,
        guide: GuideSpec | None,
        adjust: Callable[[Sequence[float]], RewardGuidance] | None,
        summary: StageSummary,
        bar: tqdm[Any],
    ) -> None:
        """Search the clips of some samples together and write them."""
        from spatialalign.backbones.flow import sampling_sigmas
        from spatialalign.search_drivers import search
        from training.candidates import Candidates

        rows = [(sample, index) for sample in samples for index in range(self.search.candidates)]
        seeds = [candidate_seed(sample.seed, index) for sample, index in rows]
        text = [self.texts[sample.prompt_id] for sample, _ in rows]
        prompts = [self.prompts[sample.prompt_id] for sample, _ in rows]
        guidance = adjust(sampling_sigmas(self.settings.steps, self.settings.shift).tolist()) if adjust else None
        with (
            TemporaryDirectory(prefix=".tmp-", dir=samples[0].folder.parent.parent) as folder,
            self.backbone.flow(text, self.negative, self.settings, guidance) as flow,
        ):
            frames = self.search.preview_frames
            candidates = Candidates(
                self.backbone, flow, text, prompts, self.tracker, Path(folder), frames, self.log, self.reward
            )
            started = time.perf_counter()
            results = search(
                candidates,
                self.backbone.noise(seeds, self.settings),
                self.search,
                [sample.seed for sample in samples],
                batch,
                progress=lambda done, total: bar.set_postfix_str(f"{100 * done // total} %"),
            )
            seconds = (time.perf_counter() - started) / len(samples)
            if guidance is not None and guidance.skipped:
                self.log.write({"event": "unguided", "gradients": guidance.skipped})
            for number, (sample, result) in enumerate(zip(samples, results, strict=True)):
                first = number * self.search.candidates
                record = {
                    "version": VERSION,
                    "search": self.search.to_dict(),
                    "guidance": None if guide is None else guide.to_dict(),
                    "preview_reward": None if self.preview_reward is None else str(self.preview_reward),
                    "tracker": None if self.tracker is None else self.tracker.source,
                    "seeds": seeds[first : first + self.search.candidates],
                    "seconds": round(seconds, 3),
                    **result.to_dict(),
                }
                self._write(candidates, first, sample, result, record, summary)

    def _write(
        self,
        candidates: Candidates,
        first: int,
        sample: StoredSample,
        result: SearchResult,
        record: dict[str, Any],
        summary: StageSummary,
    ) -> None:
        """Write the best of the candidates, which are the rows from ``first`` on; its video last."""
        finite = [place for place in result.order if result.latents[place].isfinite().all()]
        if not finite:
            summary.fail(sample.name, f"{sample.name}: no candidate's latents are finite; generate it again", self.log)
            return
        best, chosen = finite[0], result.candidates[finite[0]]
        latents = result.latents[best]
        sample.write_latents(latents.to(self.backbone.dtype), self.header)
        write_json(sampling_path(sample), {**record, "chosen": chosen})
        try:
            candidates.deliver(first + chosen, latents, sample)
        except DataError as error:
            sample.latents.unlink(missing_ok=True)
            summary.fail(sample.name, str(error), self.log)
            return
        summary.done += 1
        told = {"seconds": record["seconds"], "evaluations": result.evaluations, "score": result.scores[best]}
        self.log.write({"event": "sample", "sample": sample.name, **told, "ended": result.ended})


def run(args: Sample) -> StageSummary:
    """Load the models and sample."""
    prompts, seeds = read_csv(args.prompts), parse_seeds(args.seeds)
    search = dataclasses.replace(SearchSettings.parse(args.search), **args.searching())
    guide = guide_spec(args.reward.split(",") if args.reward else [], args.guide_options)

    from spatialalign.backbones import load_backbone
    from spatialalign.tracking.load import load_tracker

    backbone = load_backbone(args.model, args.device, args.dtype, args.expert)
    name = None if args.lora is None else put_lora(backbone, args.lora, args.lora_scale)
    tracker = None if search.kind == "none" else load_tracker(args.tracker, str(backbone.device), args.rule)
    settings = args.settings(backbone.default_settings())
    store = Store(args.store, create=True)
    summary = sample_clips(
        backbone, store, prompts, seeds, settings, tracker, guide, search, args.batch, name, args.preview_reward
    )
    print(summary.text())
    return summary


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m training.sample``."""
    command(Sample, run, argv)


if __name__ == "__main__":
    main()
