"""LoRA files of Wan and LTX-Video models: the names of every dialect, reading, writing and loading.

Two formats are written, both with alpha folded into B so that every reader's default scale of 1 is right: ComfyUI's
(``diffusion_model.<original name>.lora_A.weight``) and diffusers' (``transformer.<diffusers name>.lora_A.weight`` with
``lora_adapter_metadata``). Every other dialect is read. Modules have the names of diffusers' transformers.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import LoraError
from .files import atomic_path
from .lora_architecture import LTX_WIDTHS, WIDTHS, architecture
from .module_names import diffusers_name, is_ltx, original_name

if TYPE_CHECKING:
    import torch
    from torch import Tensor

logger = logging.getLogger("spatialalign")

_PREFIXES = re.compile(r"(?:(?:base_model\.model|model|diffusion_model|transformer|pipe\.dit)\.)*")
_UNDERSCORED = re.compile(r"(?:lora_unet|lycoris)_+")
_OTHER_KINDS = re.compile(r"lora_magnitude|dora_scale|lora_mid|\.hada_|\.lokr_|\.oft_|\.glora_")
_SUFFIX = re.compile(
    r"^(?P<module>.+?)\.(?:"
    r"(?P<down>lora_A(?:\.[\w-]+)?\.weight|lora_A|lora_down\.weight|lora\.down\.weight)|"
    r"(?P<up>lora_B(?:\.[\w-]+)?\.weight|lora_B|lora_up\.weight|lora\.up\.weight)|"
    r"(?P<alpha>alpha))$"
)


@dataclass(frozen=True)
class LoraPair:
    """One adapted linear: the update of its weight is ``up @ down``, alpha already folded in.

    ``down`` is (rank, in), ``up`` is (out, rank), float32.
    """

    down: Tensor
    up: Tensor


@dataclass(frozen=True)
class Fitted:
    """A LoRA file brought to a model's names and found to fit it.

    Attributes:
        pairs: by diffusers module name.
        unmatched: keys of the file that fit nothing in the model.
        metadata: of the file.
    """

    pairs: dict[str, LoraPair]
    unmatched: tuple[str, ...]
    metadata: dict[str, str]

    @property
    def unmatched_pairs(self) -> int:
        """How many of the file's pairs fit nothing."""
        return sum(1 for key in self.unmatched if (found := _SUFFIX.match(key)) and found["down"])


@dataclass(frozen=True)
class Loaded:
    """What :func:`load_lora` did: modules adapted, and keys of the file that fit nothing."""

    adapter: str
    modules: tuple[str, ...]
    unmatched: tuple[str, ...]


def parse_lora(tensors: Mapping[str, Tensor], modules: Iterable[str]) -> tuple[dict[str, LoraPair], list[str]]:
    """Bring a file of any dialect to diffusers module names, alpha folded in.

    Understood: ``diffusion_model.``, ``transformer.``, ``base_model.model.`` or no prefix; original or diffusers names;
    ``lora_A/B`` (with or without an adapter name, as in the official ``lora_only`` files), ``lora_down/up`` and
    ``lora.down/up``; ``.alpha``; the underscored names of kohya (``lora_unet_``), Wan-Fun (``lora_unet__``) and
    LyCORIS (``lycoris_``).

    Args:
        tensors: the file's content.
        modules: diffusers names of the model's linears; what they do not contain is left over.

    Returns:
        Pairs by diffusers module name, and the keys that fit no module of the model.

    Raises:
        LoraError: a half pair, a pair given twice, or a kind of adapter that is not a plain LoRA.
    """
    known = set(modules)
    underscored = {name.replace(".", "_"): name for name in known}
    underscored |= {original.replace(".", "_"): name for name in known if (original := original_name(name))}
    parts: dict[str, dict[str, Tensor]] = {}
    unmatched = []
    for key, tensor in tensors.items():
        if _OTHER_KINDS.search(key):
            raise LoraError(
                f"{key} belongs to a DoRA, LoHa, LoKr or another adapter that is more than an A and a B matrix; "
                "applying a part of it would be wrong: export it as a plain LoRA"
            )
        found = _SUFFIX.match(key)
        module = _find_module(found["module"], known, underscored) if found else None
        if found is None or module is None:
            unmatched.append(key)
            continue
        role = "down" if found["down"] else "up" if found["up"] else "alpha"
        if parts.setdefault(module, {}).setdefault(role, tensor) is not tensor:
            raise LoraError(f"{key} gives {module} a second LoRA; the file holds two adapters, export one of them")
    pairs = {}
    for module, part in parts.items():
        if "down" not in part or "up" not in part:
            raise LoraError(f"the LoRA has only {', '.join(part)} for {module}; A and B are needed: damaged file")
        down, up = part["down"].float(), part["up"].float()
        if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
            raise LoraError(
                f"the LoRA's A {tuple(down.shape)} and B {tuple(up.shape)} for {module} do not multiply; "
                "expected (rank, in) and (out, rank)"
            )
        scale = float(part["alpha"]) / down.shape[0] if "alpha" in part else 1.0
        pairs[module] = LoraPair(down, up * scale)
    return pairs, unmatched


def _find_module(name: str, known: set[str], underscored: Mapping[str, str]) -> str | None:
    if prefix := _UNDERSCORED.match(name):
        return underscored.get(name[prefix.end() :])
    module = diffusers_name(_PREFIXES.sub("", name, count=1))
    return module if module in known else None


def read_lora(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata of a LoRA file (``.safetensors``, or ``.ckpt``/``.pt``/``.pth`` without code)."""
    path = Path(path)
    if path.suffix == ".safetensors":
        with _open_safetensors(path) as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    if not path.is_file():
        raise LoraError(f"the LoRA file {path} does not exist")
    import pickle

    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise LoraError(
            f"{path} is not a plain tensor file ({error}); code in checkpoints is never run, convert it to safetensors"
        ) from error
    content = content if isinstance(content, dict) else {}
    if not any(".lora_" in str(key) for key in content):  # the official train.py puts the LoRA beside its state_dict
        content = content.get("state_dict", content)
    tensors = {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}
    return tensors, {}


@contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise LoraError(f"the LoRA file {path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise LoraError(
            f"{path} is not a readable safetensors file ({error}); it is damaged or cut short: download or export it "
            "again"
        ) from error


def adapter_metadata(path: str | Path) -> dict[str, Any]:
    """:func:`training_notes` of a file, read without its tensors; empty for a file that is not safetensors."""
    if Path(path).suffix != ".safetensors":
        return {}
    with _open_safetensors(Path(path)) as file:
        return training_notes(file.metadata() or {})


def training_notes(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The JSON block this project writes into its LoRA files (base model, step, hashes, ...); empty for other files."""
    try:
        value = json.loads(metadata.get("spatialalign", "{}"))
    except json.JSONDecodeError:
        logger.warning("the notes in the LoRA file are damaged; the LoRA itself can be used")
        return {}
    return value if isinstance(value, dict) else {}


def linear_names(transformer: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Names and (out, in) sizes of the linears of a transformer, adapters already on it looked through."""
    import torch

    sizes = {}
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and ".lora_" not in name:
            sizes[name.removesuffix(".base_layer")] = (module.out_features, module.in_features)
    return sizes


def fit_lora(path: str | Path, sizes: Mapping[str, tuple[int, int]]) -> Fitted:
    """Read a LoRA file of any dialect and see that it fits a model.

    Args:
        path: the file.
        sizes: (out, in) of the model's linears by diffusers or original name.

    Raises:
        LoraError: the model is neither Wan nor LTX-Video, nothing in the file fits it, or the sizes are another
            model's.
    """
    tensors, metadata = read_lora(path)
    linears = {module: size for name, size in sizes.items() if (module := diffusers_name(name))}
    if not linears:
        raise LoraError(
            f"the model has none of Wan's layers and none of LTX-Video's (it has {_few(sizes)}), so {path} cannot be "
            "loaded into it; connect a native Wan model or LTX-Video"
        )
    pairs, unmatched = parse_lora(tensors, linears)
    if not pairs:
        raise LoraError(
            f"0 of {len(tensors)} keys in {path} fit the model (the file has {_few(tensors)}; the model has "
            f"{_few(sizes)}); is it a LoRA for this model's transformer?"
        )
    for module, pair in pairs.items():
        found = (pair.up.shape[0], pair.down.shape[1])
        if found != linears[module]:
            raise LoraError(
                f"{path} was made for another model size: {module} is {_size(module, linears[module])} here and "
                f"{_size(module, found)} in the file; load it on the model it was trained on"
            )
    return Fitted(pairs, tuple(unmatched), metadata)


def _few(names: Iterable[str]) -> str:
    return ", ".join(list(names)[:3]) or "nothing"


def _size(module: str, size: tuple[int, int]) -> str:
    """``5120x5120 (Wan 14B)``: a layer's size and, where one of its sides is a known width, whose it is."""
    widths = LTX_WIDTHS if is_ltx(module) else WIDTHS
    owner = next((widths[side] for side in size if side in widths), None)
    return f"{size[0]}x{size[1]}" + (f" ({owner})" if owner else "")


def load_lora(transformer: Any, path: str | Path, adapter: str = "spatialalign", scale: float = 1.0) -> Loaded:
    """Load a LoRA file of any dialect into a diffusers Wan or LTX-Video transformer as an active adapter.

    Raises:
        LoraError: nothing in the file fits the model, the sizes are another model's, or the name is taken.
    """
    fitted = fit_lora(path, linear_names(transformer))
    if fitted.unmatched:
        logger.warning("%d keys in %s fit no module, e.g. %s", len(fitted.unmatched), path, fitted.unmatched[0])
    if adapter in getattr(transformer, "peft_config", {}):
        raise LoraError(f"the model already has an adapter named {adapter!r}; unload it first or use another name")
    transformer.load_lora_adapter(_diffusers_tensors(fitted.pairs, ""), prefix=None, adapter_name=adapter)
    transformer.set_adapters(adapter, weights=scale)
    transformer.requires_grad_(False)
    return Loaded(adapter, tuple(fitted.pairs), fitted.unmatched)


def unload_lora(transformer: Any, adapter: str = "spatialalign") -> None:
    """Remove an adapter from a transformer, if it is there; without another, its layers are the base model's again."""
    if adapter in getattr(transformer, "peft_config", {}):
        transformer.delete_adapters(adapter)
        if not getattr(transformer, "peft_config", {}):
            transformer.unload_lora()  # also takes the empty wrappers off, which later adapters would stumble over


def adapter_pairs(transformer: Any, adapter: str) -> dict[str, LoraPair]:
    """The adapter on a transformer, by diffusers module name, float32 on the CPU, alpha folded in."""
    from peft import get_peft_model_state_dict

    config = transformer.peft_config[adapter]
    tensors = get_peft_model_state_dict(transformer, adapter_name=adapter)
    pairs, unmatched = parse_lora(tensors, linear_names(transformer))
    if unmatched or not pairs:
        raise LoraError(f"the adapter {adapter!r} has parts that no LoRA file can hold: {unmatched or 'it is empty'}")
    scale = config.lora_alpha / config.r
    return {
        module: LoraPair(pair.down.detach().cpu(), pair.up.detach().cpu() * scale) for module, pair in pairs.items()
    }


def save_lora(
    transformer: Any, comfy: str | Path, diffusers: str | Path, metadata: Mapping[str, Any], adapter: str
) -> None:
    """Write an adapter in ComfyUI's and in diffusers' names, atomically, with metadata.

    Args:
        transformer: carries the adapter.
        comfy: path of the ComfyUI file.
        diffusers: path of the diffusers file.
        metadata: JSON values for the ``spatialalign`` block; ``base_model`` and ``step`` also fill the model-spec keys.
        adapter: name of the adapter.
    """
    pairs = adapter_pairs(transformer, adapter)
    write_pairs(pairs, comfy, diffusers, metadata)


def write_pairs(
    pairs: Mapping[str, LoraPair],
    comfy: str | Path,
    diffusers: str | Path,
    metadata: Mapping[str, Any],
    headers: Mapping[str, str] | None = None,
) -> None:
    """Write pairs (diffusers module names) in both formats; see :func:`save_lora`.

    ``headers`` are entries of the safetensors header that win over those made here, such as the title of a LoRA that
    somebody else trained.
    """
    from safetensors.torch import save_file

    ranks = sorted({pair.down.shape[0] for pair in pairs.values()})
    model, implementation = architecture(pairs, metadata)
    common = {
        "format": "pt",
        "spatialalign": json.dumps(dict(metadata), sort_keys=True),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": model,
        "modelspec.implementation": implementation,
        "modelspec.title": f"SpatialAlign LoRA for {metadata.get('base_model', 'a model not stated')}",
        "modelspec.description": f"Dynamic spatial relationships, step {metadata.get('step', 'unknown')}",
        "modelspec.license": str(metadata.get("license", "Apache-2.0")),
        "ss_network_module": "networks.lora",
        "ss_network_dim": ",".join(map(str, ranks)),
        "ss_network_alpha": ",".join(map(str, ranks)),
        **(headers or {}),
    }
    original = {}
    for module, pair in pairs.items():
        name = original_name(module)
        if name is None:
            raise LoraError(f"{module} has no name in ComfyUI's model, so its LoRA cannot be exported")
        original[f"diffusion_model.{name}.lora_A.weight"] = pair.down.contiguous()
        original[f"diffusion_model.{name}.lora_B.weight"] = pair.up.contiguous()
    with atomic_path(comfy) as temporary:
        save_file(original, temporary, metadata=common)
    # diffusers would otherwise give every module the first rank; its older versions want the patterns, if only empty
    by_module = {module: pair.down.shape[0] for module, pair in sorted(pairs.items())} if len(ranks) > 1 else {}
    peft_config: dict[str, Any] = {"transformer.r": ranks[0], "transformer.lora_alpha": ranks[0]}
    peft_config |= {"transformer.target_modules": sorted(pairs)}
    peft_config |= {"transformer.rank_pattern": by_module, "transformer.alpha_pattern": by_module}
    with atomic_path(diffusers) as temporary:
        save_file(
            _diffusers_tensors(pairs, "transformer."),
            temporary,
            metadata=common | {"lora_adapter_metadata": json.dumps(peft_config, sort_keys=True)},
        )


def _diffusers_tensors(pairs: Mapping[str, LoraPair], prefix: str) -> dict[str, Tensor]:
    tensors = {}
    for module, pair in pairs.items():
        tensors[f"{prefix}{module}.lora_A.weight"] = pair.down.contiguous()
        tensors[f"{prefix}{module}.lora_B.weight"] = pair.up.contiguous()
    return tensors
