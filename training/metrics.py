"""Every metric over the clips of one or several models: ``python -m training.metrics``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from spatialalign.errors import ConfigError
from spatialalign.files import write_json
from training.cli import command, options_of
from training.leaderboard import leaderboard, only_shared
from training.leaderboard_report import table, write_report
from training.metric_values import NOT_SCORED, Key, Measurer, MetricOptions, measure_store
from training.monitors import JsonlLog
from training.store import Store

VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass(frozen=True)
class Metrics:
    """Measure scored clips, or videos of any generator, and write a leaderboard as CSV, Markdown, PNG and HTML."""

    models: str
    """Models as <name>=<folder>, separated by commas; a folder is a sample store with scores, or holds videos named
    <prompt_id>_..._seed<number>.mp4. The others are compared with the first."""
    out: Path
    """Output folder. What was measured before is read from its values.jsonl."""
    prompts: Path | None = None
    """CSV file of prompts with the official columns, for folders of videos."""
    shared: bool = False
    """Take only the prompts that every model has, instead of refusing models of other prompts."""
    tracker: str = "miniature"
    """Tracking models for folders of videos: "miniature", a folder with detector/ and segmenter/, or
    <detector>+<segmenter> hub ids."""
    rule: Literal["robust", "paper"] = "robust"
    """Tracking rule for folders of videos."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    options: dict[str, Any] = options_of(MetricOptions)


def measure_models(
    stores: Mapping[str, Store],
    out: Path,
    options: MetricOptions,
    device: str = "cpu",
    only: Iterable[Key] | None = None,
    shared: bool = False,
) -> dict[str, Any]:
    """Measure every clip of every store and write the leaderboard's files into ``out``.

    Args:
        stores: by name of the model, with scores; the first is the one that the others are compared with.
        out: output folder; ``values.jsonl`` in it keeps what was measured, clip by clip.
        options: which metrics, by which models.
        device: of the metrics' models.
        only: prompts and seeds to take; those without a score count as INVALID. None for every sample there is.
        shared: take only the prompts that every store has.

    Returns:
        The content of ``leaderboard.json``.

    Raises:
        DataError: a store without scores, or stores of other prompts.
        ModelError: a metric's model cannot be loaded.
    """
    from training.leaderboard_chart import leaderboard_chart
    from training.versions import versions

    measurer = Measurer(options, device, JsonlLog(out / "values.jsonl"))
    keys = None if only is None else list(only)
    rows = {name: measure_store(measurer, name, store, keys) for name, store in stores.items()}
    if shared:
        rows = {name: list(some) for name, some in only_shared(rows).items()}
    result: dict[str, Any] = {
        "version": VERSION,
        **leaderboard(rows),
        "not_computed": options.missing,
        "failed": measurer.failed,
        "settings": {"stores": {name: str(store.root) for name, store in stores.items()}, **asdict(options)},
        "versions": versions(),
    }
    write_json(out / "leaderboard.json", result)
    write_report(out, result, [row for some in rows.values() for row in some], leaderboard_chart(result))
    return result


def measure_evaluation(out: Path, result: Mapping[str, Any], options: MetricOptions, device: str) -> None:
    """Measure the stores of an evaluation on its prompts and seeds, write into ``out/metrics``, and print the table.

    Args:
        out: the evaluation's folder.
        result: what :func:`~training.evaluate.evaluate` or :func:`~training.arms.compare_arms` returned.
        options: which metrics, by which models.
        device: of the metrics' models; "auto" is allowed.
    """
    from spatialalign.backbones.loading import pick_device

    stores = {name: Store(out / folder) for name, folder in result["stores"].items()}
    keys = [(str(row["prompt_id"]), int(row["seed"])) for row in result["samples"]]
    print(told(measure_models(stores, out / "metrics", options, pick_device(device), keys), out / "metrics"))


def told(result: Mapping[str, Any], out: Path) -> str:
    """The table, what was not computed, and where the page is."""
    lines = [table(result)]
    for model in result["models"]:
        if count := model["invalid_reasons"].get(NOT_SCORED):
            lines.append(f"{count} clips of {model['name']} have no score and count as INVALID; see training.score")
    lines += [f"{metric} was not computed: {reason}" for metric, reason in result["not_computed"].items()]
    if result["failed"]:
        sample, metric, why = result["failed"][0]
        lines.append(f"{len(result['failed'])} values could not be had; the first, {metric} of {sample}: {why}")
    return "\n".join([*lines, str(out / "leaderboard.html")])


def parse_models(text: str) -> dict[str, Path]:
    """``"base=a,tuned=b/c"`` -> folders by name; :class:`ConfigError` for anything else."""
    found: dict[str, Path] = {}
    for part in text.split(","):
        name, equals, folder = (piece.strip() for piece in part.partition("="))
        if not (_NAME.fullmatch(name) and equals and folder) or name in found:
            raise ConfigError(
                f"models: expected <name>=<folder>, names all different and of letters, digits, '.', '_', '+', '-', "
                f"found {part.strip()!r}"
            )
        found[name] = Path(folder)
    return found


def open_models(folders: Mapping[str, Path], args: Metrics) -> dict[str, Store]:
    """The stores among ``folders``, and for folders of videos a store in ``out``, tracked and scored."""
    from training.video_folder import import_videos, is_video_folder

    others = {name: folder for name, folder in folders.items() if is_video_folder(folder)}
    if others and args.prompts is None:
        raise ConfigError(f"{', '.join(others)}: a folder of videos needs its prompts; give --prompts file.csv")
    tracker = None
    stores = {}
    for name, folder in folders.items():
        if name not in others:
            stores[name] = Store(folder)
            continue
        if tracker is None:
            from spatialalign.backbones.loading import pick_device
            from spatialalign.tracking.load import load_tracker

            tracker = load_tracker(args.tracker, pick_device(args.device), args.rule)
        assert args.prompts is not None, "asked for above"
        stores[name] = Store(args.out / "stores" / name, create=True)
        print(import_videos(folder, args.prompts, stores[name], tracker).text(), flush=True)
    return stores


def run(args: Metrics) -> dict[str, Any]:
    """Open or import the models, measure, and print the table."""
    options, folders = MetricOptions(**args.options), parse_models(args.models)
    stores = open_models(folders, args)

    from spatialalign.backbones.loading import pick_device

    result = measure_models(stores, args.out, options, pick_device(args.device), shared=args.shared)
    print(told(result, args.out))
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m training.metrics``."""
    command(Metrics, run, argv)


if __name__ == "__main__":
    main()
