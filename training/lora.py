"""Convert, inspect, merge and compare LoRA files of Wan and LTX-Video models: ``python -m training.lora <command>``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spatialalign.errors import ConfigError, LoraError
from spatialalign.lora import LoraPair, parse_lora, read_lora, training_notes, write_pairs
from spatialalign.lora_architecture import guess_base
from spatialalign.lora_report import layers, scores_in_words
from spatialalign.module_names import linears
from training.cli import subcommands

if TYPE_CHECKING:
    from torch import Tensor

    from training.lora_updates import Likeness

_OWN_HEADERS = {"format", "spatialalign", "lora_adapter_metadata", "ss_network_dim", "ss_network_alpha"}
"""What describes the file and not the LoRA, and is written anew for a converted one."""


@dataclass(frozen=True)
class Convert:
    """Write a LoRA of any dialect as a ComfyUI file and a diffusers file."""

    lora: Path
    """LoRA file: .safetensors, or .ckpt, .pt, .pth without code, such as the official lora_only.ckpt."""
    out: Path
    """Folder for <name>_comfyui.safetensors and <name>_diffusers.safetensors."""
    base_model: str | None = None
    """The model it was trained on, for the files' metadata; null for what the file says itself."""
    partial: bool = False
    """Convert although some keys of the file fit no linear of such a model, and leave these out."""
    replace: bool = False
    """Overwrite files that are there."""


@dataclass(frozen=True)
class Inspect:
    """Say what a LoRA file is: dialect, modules, rank, size of the updates, metadata, likely base model."""

    lora: Path
    """LoRA file of any dialect."""


@dataclass(frozen=True)
class Merge:
    """Add a LoRA to the weights of a base model and write the sum as a new folder, whole or not at all."""

    base: Path
    """Folder of a diffusers WanTransformer3DModel or LTXVideoTransformer3DModel (config.json and safetensors); it is
    not changed."""
    lora: Path
    """LoRA file of any dialect."""
    out: Path
    """New folder."""
    scale: float = 1.0
    """Strength of the LoRA."""


@dataclass(frozen=True)
class Compare:
    """Compare two adapters: angle and relative difference of their updates, by module and overall."""

    a: Path
    """LoRA file of any dialect."""
    b: Path
    """The other one; differences are relative to the first."""
    shown: int = 10
    """How many modules are listed, the most different ones first; 0 for all."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA file read without a model.

    Attributes:
        pairs: by diffusers module name.
        unmatched: keys that name no linear of a Wan or LTX-Video model.
        dialect: how its keys are written.
        metadata: of the file.
    """

    pairs: dict[str, LoraPair]
    unmatched: tuple[str, ...]
    dialect: str
    metadata: dict[str, str]


def read_adapter(path: Path) -> Adapter:
    """Read a LoRA of any dialect; raises :class:`LoraError` when nothing in it is for Wan or LTX-Video."""
    tensors, metadata = read_lora(path)
    blocks = [int(found[1]) for key in tensors if (found := re.search(r"blocks[._](\d+)[._]", key))]
    pairs, unmatched = parse_lora(tensors, linears(max(blocks, default=-1) + 1))
    if not pairs:
        raise LoraError(
            f"none of the {len(tensors)} keys in {path} names a linear of a Wan or LTX-Video model "
            f"(e.g. {next(iter(tensors), 'nothing at all')}); is it a LoRA for such a transformer?"
        )
    return Adapter(pairs, tuple(unmatched), dialect_of(key for key in tensors if key not in set(unmatched)), metadata)


def dialect_of(keys: Iterable[str]) -> str:
    """How most keys are written: the tool it comes from, whose module names, and the names of the two matrices."""
    return Counter(map(_dialect_of_key, keys)).most_common(1)[0][0]


def _dialect_of_key(key: str) -> str:
    if prefix := re.match(r"lora_unet_+|lycoris_+", key):
        tool = {"lora_unet_": "kohya", "lora_unet__": "Wan-Fun"}.get(prefix[0], "LyCORIS")
    elif re.search(r"\.lora_[AB]\.[\w-]+\.weight$", key):
        tool = "PEFT with an adapter name (the official lora_only form)"
    else:
        tools = {
            "diffusion_model.": "ComfyUI",
            "transformer.": "diffusers",
            "base_model.model.": "PEFT",
            "pipe.dit.": "DiffSynth",
        }
        tool = next((name for start, name in tools.items() if key.startswith(start)), "no prefix")
    if re.search(r"transformer_blocks[._]|caption_projection[._]", key):
        names = "LTX-Video"
    else:
        names = "diffusers" if re.search(r"attn[12][._]|condition_embedder|ffn[._]net", key) else "original"
    matrices = "lora_A/lora_B" if re.search(r"lora_[AB]", key) else "lora_down/lora_up"
    return f"{tool}, {names} module names, {matrices}"


def convert(args: Convert) -> tuple[Path, Path]:
    """Convert; returns the ComfyUI file and the diffusers file."""
    found = read_adapter(args.lora)
    if found.unmatched and not args.partial:
        raise LoraError(
            f"{len(found.unmatched)} keys of {args.lora} fit no linear of a Wan or LTX-Video model (e.g. "
            f"{found.unmatched[0]}); set --partial true to leave them out"
        )
    comfy, diffusers = (args.out / f"{args.lora.stem}_{name}.safetensors" for name in ("comfyui", "diffusers"))
    for path in (comfy, diffusers):
        if path.exists() and not args.replace:
            raise ConfigError(f"{path} exists; name another folder or set --replace true")
    write_pairs(found.pairs, comfy, diffusers, *_described(found, args))
    print(f"{len(found.pairs)} modules from {found.dialect}\n{comfy}\n{diffusers}")
    return comfy, diffusers


def _described(found: Adapter, args: Convert) -> tuple[dict[str, Any], dict[str, str]]:
    """The notes and headers of a converted file: what the original says, and where it comes from."""
    notes = training_notes(found.metadata)
    step = re.search(r"step[=_-]?(\d+)", args.lora.name)
    base = args.base_model or notes.get("base_model") or found.metadata.get("ss_base_model_version")
    ranks = sorted({pair.down.shape[0] for pair in found.pairs.values()})
    notes |= {"rank": ranks[0] if len(ranks) == 1 else ranks, "converted_from": args.lora.name}
    notes |= {"alpha": notes["rank"], "dialect": found.dialect}  # alpha is folded into B
    notes |= {"base_model": base} if base else {}
    notes |= {"step": int(step[1])} if step and "step" not in notes else {}
    if found.unmatched:  # the scores are those of the whole
        notes.pop("scores", None)
    headers = {key: value for key, value in found.metadata.items() if key not in _OWN_HEADERS}
    headers.setdefault("modelspec.title", args.lora.stem)
    headers.setdefault("modelspec.description", f"Converted from {args.lora.name}")
    headers.setdefault("modelspec.license", str(notes.get("license", "not stated")))
    return notes, headers


def inspect(args: Inspect) -> dict[str, Any]:
    """Describe a file; prints it and returns it as plain values."""
    import torch

    from training.lora_updates import update_norm

    found = read_adapter(args.lora)
    damaged = [name for name, pair in found.pairs.items() if not _finite(pair.down) or not _finite(pair.up)]
    norms = {name: update_norm(pair) for name, pair in found.pairs.items() if name not in damaged}
    result: dict[str, Any] = {
        "dialect": found.dialect,
        "modules": len(found.pairs),
        "layers": layers(found.pairs),
        "ranks": sorted({pair.down.shape[0] for pair in found.pairs.values()}),
        "parameters": sum(pair.down.numel() + pair.up.numel() for pair in found.pairs.values()),
        "norm": float(torch.tensor(list(norms.values()), dtype=torch.float64).norm()),
        "largest": max(norms, key=lambda name: norms[name], default=None),
        "zero": sum(value == 0 for value in norms.values()),
        "not_finite": damaged,
        "unmatched": list(found.unmatched),
        "base_guess": guess_base(found.pairs),
        "notes": training_notes(found.metadata),
        "metadata": {key: value for key, value in found.metadata.items() if key != "spatialalign"},
    }
    print(_in_words(args.lora, result, norms))
    return result


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _in_words(path: Path, facts: Mapping[str, Any], norms: Mapping[str, float]) -> str:
    lines = [
        f"{path}: {facts['dialect']}",
        f"{facts['modules']} modules, rank {', '.join(map(str, facts['ranks']))}, {facts['parameters']:,} parameters: "
        f"{facts['layers']}",
        f"norm of all updates (alpha folded in) {facts['norm']:.4g}",
        f"base model by its sizes: {facts['base_guess'] or 'unknown'}",
    ]
    if facts["largest"] is not None:
        lines.append(f"largest update {norms[facts['largest']]:.4g} in {facts['largest']}")
    if facts["zero"]:
        lines.append(f"{facts['zero']} updates are zero")
    if scores := scores_in_words(facts["notes"]):
        lines.append(f"scores, base → aligned: {scores}")
    for title in ("notes", "metadata"):
        lines += [f"{title}: {key} = {str(value)[:200]}" for key, value in sorted(facts[title].items())]
    if facts["not_finite"]:
        lines.append(
            f"WARNING: NaN or infinite values in {len(facts['not_finite'])} modules, e.g. {facts['not_finite'][0]}"
        )
    if facts["unmatched"]:
        lines.append(
            f"WARNING: {len(facts['unmatched'])} keys fit no linear of a Wan or LTX-Video model, e.g. "
            f"{facts['unmatched'][0]}"
        )
    return "\n".join(lines)


def merge(args: Merge) -> list[str]:
    """Merge; returns the modules that were changed."""
    from training.lora_merge import merge_lora

    changed = merge_lora(args.base, args.lora, args.out, args.scale)
    print(f"{len(changed)} modules changed: {layers(changed)}\n{args.out}")
    return changed


def compare(args: Compare) -> dict[str, Any]:
    """Compare; prints a table and returns every module's numbers and the overall ones."""
    from training.lora_updates import compare as compare_pairs
    from training.lora_updates import together

    a, b = read_adapter(args.a), read_adapter(args.b)
    _check_same_sizes(args, a.pairs, b.pairs)
    parts = compare_pairs(a.pairs, b.pairs)
    overall = together(parts)
    only = {"a": sorted(a.pairs.keys() - b.pairs.keys()), "b": sorted(b.pairs.keys() - a.pairs.keys())}
    ordered = sorted(parts, key=lambda name: -parts[name].distance)
    rows = [(name, parts[name]) for name in (ordered[: args.shown] if args.shown else ordered)]
    lines = [f"{'module':<48} {'|a|':>10} {'|b|':>10} {'cosine':>8} {'|b-a|/|a|':>10}"]
    lines += [_row(name, part) for name, part in [("all", overall), *rows]]
    lines += [f"only in {side}: {len(names)} modules, {layers(names)}" for side, names in only.items() if names]
    print("\n".join(lines))
    return {
        "overall": _numbers(overall),
        "modules": {name: _numbers(part) for name, part in parts.items()},
        "only_in_a": only["a"],
        "only_in_b": only["b"],
    }


def _check_same_sizes(args: Compare, a: Mapping[str, LoraPair], b: Mapping[str, LoraPair]) -> None:
    for module in a.keys() & b.keys():
        sizes = [(pair.up.shape[0], pair.down.shape[1]) for pair in (a[module], b[module])]
        if sizes[0] != sizes[1]:
            raise LoraError(
                f"{module} is {sizes[0][0]}x{sizes[0][1]} in {args.a} and {sizes[1][0]}x{sizes[1][1]} in {args.b}; "
                "only adapters for models of one size can be compared"
            )


def _row(name: str, part: Likeness) -> str:
    cosine = "-" if part.cosine is None else f"{part.cosine:.4f}"
    difference = "-" if part.relative_difference is None else f"{part.relative_difference:.4g}"
    return f"{name:<48} {part.norm_a:>10.4g} {part.norm_b:>10.4g} {cosine:>8} {difference:>10}"


def _numbers(part: Likeness) -> dict[str, float | None]:
    return {**asdict(part), "cosine": part.cosine, "relative_difference": part.relative_difference}


VERBS: dict[str, tuple[type, Callable[[Any], object]]] = {
    "convert": (Convert, convert),
    "inspect": (Inspect, inspect),
    "merge": (Merge, merge),
    "compare": (Compare, compare),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m training.lora``."""
    subcommands(VERBS, __doc__ or "", argv)


if __name__ == "__main__":
    main()
