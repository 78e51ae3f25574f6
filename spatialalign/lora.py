"""LoRA files of Wan models: the names of every dialect, reading, writing and loading.

Two formats are written, both with alpha folded into B so that every reader's default scale of 1 is right: ComfyUI's
(``diffusion_model.<original name>.lora_A.weight``) and diffusers' (``transformer.<diffusers name>.lora_A.weight`` with
``lora_adapter_metadata``). Every other dialect is read. Modules are named as in diffusers' ``WanTransformer3DModel``.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import LoraError
from .files import atomic_path

if TYPE_CHECKING:
    import torch
    from torch import Tensor

logger = logging.getLogger(__name__)

_TO_ORIGINAL = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "patch_embedding": "patch_embedding",
    "proj_out": "head.head",
}
_TO_ORIGINAL_IN_BLOCK = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "attn2.add_k_proj": "cross_attn.k_img",
    "attn2.add_v_proj": "cross_attn.v_img",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
_TO_DIFFUSERS = {original: name for name, original in _TO_ORIGINAL.items()}
_TO_DIFFUSERS_IN_BLOCK = {original: name for name, original in _TO_ORIGINAL_IN_BLOCK.items()}

_PREFIXES = ("base_model.model.diffusion_model.", "base_model.model.", "diffusion_model.", "transformer.", "pipe.dit.")
_KOHYA = "lora_unet_"
_SUFFIX = re.compile(
    r"^(?P<module>.+?)\.(?:"
    r"(?P<down>lora_A(?:\.\w+)?\.weight|lora_A|lora_down\.weight|lora\.down\.weight)|"
    r"(?P<up>lora_B(?:\.\w+)?\.weight|lora_B|lora_up\.weight|lora\.up\.weight)|"
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
class Loaded:
    """What :func:`load_lora` did: modules adapted, and keys of the file that fit nothing."""

    adapter: str
    modules: tuple[str, ...]
    unmatched: tuple[str, ...]


def original_name(module: str) -> str | None:
    """The original Wan (and ComfyUI) name of a diffusers module; None for a module without one."""
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
    if block is None:
        return _TO_ORIGINAL.get(module)
    inner = _TO_ORIGINAL_IN_BLOCK.get(block[2])
    return None if inner is None else f"blocks.{block[1]}.{inner}"


def diffusers_name(module: str) -> str | None:
    """The diffusers name of a module in original or in diffusers naming; None for an unknown one."""
    if original_name(module) is not None:
        return module
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
    if block is None:
        return _TO_DIFFUSERS.get(module)
    inner = _TO_DIFFUSERS_IN_BLOCK.get(block[2])
    return None if inner is None else f"blocks.{block[1]}.{inner}"


def parse_lora(tensors: Mapping[str, Tensor], modules: Iterable[str]) -> tuple[dict[str, LoraPair], list[str]]:
    """Bring a file of any dialect to diffusers module names, alpha folded in.

    Understood: ``diffusion_model.``, ``transformer.``, ``base_model.model.`` or no prefix; original or diffusers names;
    ``lora_A/B`` (with or without an adapter name, as in the official ``lora_only`` files), ``lora_down/up`` and
    ``lora.down/up``; ``.alpha``; kohya's ``lora_unet_`` names.

    Args:
        tensors: the file's content.
        modules: diffusers names of the model's linears; what they do not contain is left over.

    Returns:
        Pairs by diffusers module name, and the keys that fit no module of the model.

    Raises:
        LoraError: a half pair, or a kind of adapter that is not a plain LoRA.
    """
    known = set(modules)
    underscored = {name.replace(".", "_"): name for name in known}
    underscored |= {original.replace(".", "_"): name for name in known if (original := original_name(name))}
    parts: dict[str, dict[str, Tensor]] = {}
    unmatched = []
    for key, tensor in tensors.items():
        if "lora_magnitude" in key or "dora_scale" in key or ".hada_" in key or ".lokr_" in key:
            raise LoraError(f"{key} belongs to a DoRA, LoHa or LoKr; only plain LoRA (an A and a B matrix) is read")
        found = _SUFFIX.match(key)
        module = _find_module(found["module"], known, underscored) if found else None
        if found is None or module is None:
            unmatched.append(key)
            continue
        role = "down" if found["down"] else "up" if found["up"] else "alpha"
        parts.setdefault(module, {})[role] = tensor
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
    if name.startswith(_KOHYA):
        return underscored.get(name[len(_KOHYA) :].lstrip("_"))
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            name = name[len(prefix) :]
            break
    module = diffusers_name(name)
    return module if module in known else None


def read_lora(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata of a LoRA file (``.safetensors``, or ``.ckpt``/``.pt``/``.pth`` without code)."""
    path = Path(path)
    if not path.is_file():
        raise LoraError(f"the LoRA file {path} does not exist")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
        except SafetensorError as error:
            raise LoraError(f"{path} is not a readable safetensors file ({error})") from error
    import pickle

    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise LoraError(
            f"{path} is not a plain tensor file ({error}); code in checkpoints is never run, convert it to safetensors"
        ) from error
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    tensors = {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}
    return tensors, {}


def adapter_metadata(path: str | Path) -> dict[str, Any]:
    """The JSON block this project writes into its LoRA files (base model, step, hashes, ...); empty for other files."""
    value = json.loads(read_lora(path)[1].get("spatialalign", "{}"))
    return dict(value)


def linear_names(transformer: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Names and (out, in) sizes of the linears of a transformer, adapters already on it looked through."""
    import torch

    sizes = {}
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and ".lora_" not in name:
            sizes[name.removesuffix(".base_layer")] = (module.out_features, module.in_features)
    return sizes


def load_lora(transformer: Any, path: str | Path, adapter: str = "spatialalign", scale: float = 1.0) -> Loaded:
    """Load a LoRA file of any dialect into a diffusers ``WanTransformer3DModel`` as an active adapter.

    Raises:
        LoraError: nothing in the file fits the model, the sizes are another model's, or the name is taken.
    """
    tensors, _metadata = read_lora(path)
    sizes = linear_names(transformer)
    pairs, unmatched = parse_lora(tensors, sizes)
    if not pairs:
        sample = ", ".join(list(tensors)[:3]) or "no tensors"
        raise LoraError(f"0 of {len(tensors)} keys in {path} fit the model (the file has {sample}); is it a Wan LoRA?")
    for module, pair in pairs.items():
        found = (pair.up.shape[0], pair.down.shape[1])
        if found != sizes[module]:
            raise LoraError(
                f"{path} was made for another model size: {module} is {sizes[module][0]}x{sizes[module][1]} here and "
                f"{found[0]}x{found[1]} in the file"
            )
    if unmatched:
        logger.warning("%d of %d keys in %s fit no module, e.g. %s", len(unmatched), len(tensors), path, unmatched[0])
    if adapter in getattr(transformer, "peft_config", {}):
        raise LoraError(f"the model already has an adapter named {adapter!r}; unload it first or use another name")
    transformer.load_lora_adapter(_diffusers_tensors(pairs, ""), prefix=None, adapter_name=adapter)
    transformer.set_adapters(adapter, weights=scale)
    transformer.requires_grad_(False)
    return Loaded(adapter, tuple(pairs), tuple(unmatched))


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
    pairs: Mapping[str, LoraPair], comfy: str | Path, diffusers: str | Path, metadata: Mapping[str, Any]
) -> None:
    """Write pairs (diffusers module names) in both formats; see :func:`save_lora`."""
    from safetensors.torch import save_file

    ranks = sorted({pair.down.shape[0] for pair in pairs.values()})
    common = {
        "format": "pt",
        "spatialalign": json.dumps(dict(metadata), sort_keys=True),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "wan2.1/lora",
        "modelspec.implementation": "https://github.com/Wan-Video/Wan2.1",
        "modelspec.title": f"SpatialAlign LoRA for {metadata.get('base_model', 'Wan 2.1')}",
        "modelspec.description": f"Dynamic spatial relationships, step {metadata.get('step', 'unknown')}",
        "modelspec.license": str(metadata.get("license", "Apache-2.0")),
        "ss_network_module": "networks.lora",
        "ss_network_dim": ",".join(map(str, ranks)),
        "ss_network_alpha": ",".join(map(str, ranks)),
    }
    original = {}
    for module, pair in pairs.items():
        name = original_name(module)
        if name is None:
            raise LoraError(f"{module} has no name in ComfyUI's Wan model, so its LoRA cannot be exported")
        original[f"diffusion_model.{name}.lora_A.weight"] = pair.down.contiguous()
        original[f"diffusion_model.{name}.lora_B.weight"] = pair.up.contiguous()
    with atomic_path(comfy) as temporary:
        save_file(original, temporary, metadata=common)
    peft_config: dict[str, Any] = {"transformer.r": ranks[0], "transformer.lora_alpha": ranks[0]}
    peft_config |= {"transformer.target_modules": sorted(pairs)}
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
