"""Everything the pack asks of ComfyUI. No other file of the pack names ``comfy`` or ``folder_paths``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from ..spatialalign.errors import LoraError, ModelError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MODEL_FOLDERS = tuple("grounding-dino sam2 sams latent_rewards patch_rewards video_reward VLM dinov2 clip_iqa".split())
"""Folders below ``models`` that the pack adds to the host's own list."""

_WEIGHTS = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
_PREFIX = "diffusion_model."


def input_directory() -> Path:
    """ComfyUI's input folder."""
    import folder_paths

    return Path(folder_paths.get_input_directory())


def output_directory() -> Path:
    """ComfyUI's output folder."""
    import folder_paths

    return Path(folder_paths.get_output_directory())


def temp_directory() -> Path:
    """ComfyUI's folder for files that live as long as the server."""
    import folder_paths

    return Path(folder_paths.get_temp_directory())


def _roots(folder: str) -> list[Path]:
    import folder_paths

    if folder in MODEL_FOLDERS:  # appends at most: paths given by extra_model_paths.yaml or another pack stay
        folder_paths.add_model_folder_path(folder, os.path.join(folder_paths.models_dir, folder))
    return [Path(root) for root in folder_paths.get_folder_paths(folder)]


def model_names(folder: str) -> list[str]:
    """Sorted names below ``models/<folder>``: weight files, and sub-folders with a ``config.json`` as one name each."""
    names = set()
    for root in _roots(folder):
        for path, folders, files in os.walk(root, followlinks=True):
            where = Path(path)
            if where != root and "config.json" in files:
                names.add(where.relative_to(root).as_posix())
                folders.clear()
                continue
            folders[:] = [name for name in folders if not name.startswith(".")]
            names |= {(where / name).relative_to(root).as_posix() for name in files if name.endswith(_WEIGHTS)}
    return sorted(names)


def model_path(folder: str, name: str) -> Path:
    """The file or folder of a name from :func:`model_names`.

    Raises:
        ModelError: there is none, or the name leads out of the folder.
    """
    roots = _roots(folder)
    asked = PurePath(name)
    if not asked.parts or asked.anchor or ".." in asked.parts:
        raise ModelError(f"{name!r} is not a name inside models/{folder}; choose one from the node's list")
    for root in roots:
        if (root / asked).exists():
            return root / asked
    raise ModelError(
        f"{name} is not in models/{folder}; put the file, or the whole model folder with its config.json, "
        f"into {roots[0]} and refresh the page"
    )


def lora_names() -> list[str]:
    """Names of the LoRA files that ComfyUI lists."""
    import folder_paths

    return list(folder_paths.get_filename_list("loras"))


def lora_path(name: str) -> Path:
    """The file of a name from :func:`lora_names`; raises :class:`ModelError` as :func:`model_path` does."""
    return model_path("loras", name)


def patcher(module: torch.nn.Module) -> Any:
    """A ``ModelPatcher`` about a module, so that the host decides when it is on the device.

    The patcher's ``model`` is a ``ModuleList`` that holds the module: the host sets attributes on it, which
    transformers' models refuse.
    """
    import torch
    from comfy import model_management
    from comfy.model_patcher import ModelPatcher

    return ModelPatcher(
        torch.nn.ModuleList([module]),
        load_device=model_management.get_torch_device(),
        offload_device=model_management.unet_offload_device(),
    )


def load(patchers: Sequence[Any], memory: int = 0) -> torch.device:
    """Bring models to the device, whole, and return it; ``memory`` is what their work needs beside them, in bytes."""
    from comfy import model_management

    model_management.load_models_gpu(list(patchers), memory_required=memory, force_full_load=True)
    return model_management.get_torch_device()


def check_interrupt() -> None:
    """Raise the host's interrupt exception when the user pressed stop."""
    from comfy import model_management

    model_management.throw_exception_if_processing_interrupted()


def show_text(text: str, node: str) -> None:
    """Show lines of text on the running node ``node``.

    The interface draws the pictures among a node's results, but of the texts only those of some nodes of its own. What
    it does draw on every node is the text that a node reports while it works. Without a server nobody looks.
    """
    server = sys.modules.get("server")
    if server is not None and hasattr(server.PromptServer, "instance"):
        server.PromptServer.instance.send_progress_text(text, node)


class Progress:
    """The progress bar of the running node; every update is also a point where the user can stop it."""

    def __init__(self, total: int) -> None:
        from comfy.utils import ProgressBar

        self._bar = ProgressBar(total)
        self._total = total

    def update(self, done: int, preview: Any = None) -> None:
        """Show ``done`` of the total, with a preview ``("JPEG", picture, largest side)`` if there is one."""
        check_interrupt()
        self._bar.update_absolute(done, self._total, preview)


def intermediate(tensor: Tensor) -> Tensor:
    """The tensor as float32 where the host keeps what passes between nodes."""
    import torch
    from comfy import model_management

    return tensor.to(model_management.intermediate_device(), torch.float32)


def linear_sizes(model: Any) -> dict[str, tuple[int, int]]:
    """(out, in) of the linears of a MODEL, by their name in ComfyUI without ``diffusion_model.``."""
    import torch

    # The Linear of ComfyUI's quantised models is not derived from torch's.
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.model.diffusion_model.named_modules()
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Linear"
    }


def with_lora(model: Any, pairs: Mapping[str, tuple[Tensor, Tensor]], strength: float) -> Any:
    """A clone of a MODEL with weight patches, which compose with those of other LoRA loaders.

    Args:
        model: the MODEL.
        pairs: ``(down (rank, in), up (out, rank))`` by a name from :func:`linear_sizes`, alpha folded in.
        strength: factor of the update ``up @ down``.

    Raises:
        LoraError: the host did not take a pair.
    """
    import comfy.lora

    keys = {f"{_PREFIX}{name}": f"{_PREFIX}{name}.weight" for name in pairs}
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in pairs.items():
        tensors |= {f"{_PREFIX}{name}.lora_A.weight": down, f"{_PREFIX}{name}.lora_B.weight": up}
    patched = model.clone()
    taken = set(patched.add_patches(comfy.lora.load_lora(tensors, keys), strength))
    refused = sorted(set(keys.values()) - taken)
    if refused:
        raise LoraError(f"ComfyUI did not take the LoRA for {len(refused)} of {len(keys)} weights, e.g. {refused[0]}")
    return patched


def vae_width(vae: Any) -> int:
    """Width (``base_dim``) of a Wan 2.1 VAE, the part of its latent space that its files may differ in.

    Raises:
        ModelError: the VAE is not Wan 2.1's.
    """
    from comfy.ldm.wan.vae import WanVAE

    if not isinstance(vae.first_stage_model, WanVAE):
        found = type(vae.first_stage_model).__name__
        raise ModelError(
            f"the VAE is a {found}, a Wan 2.1 VAE is needed (the one of Wan 2.2 A14B, too); connect the VAE that "
            "decodes this latent"
        )
    return int(vae.first_stage_model.dim)


def wan_model(state_dict: dict[str, Tensor], shift: float) -> Any:
    """A MODEL from a Wan 2.1 transformer in original names, in float32, its noise schedule shifted by ``shift``."""
    import copy

    import comfy.sd
    import torch

    model = comfy.sd.load_diffusion_model_state_dict(state_dict, model_options={"dtype": torch.float32})
    if model is None:
        raise ModelError("ComfyUI does not recognise the weights as a Wan 2.1 model; their names or sizes are wrong")
    sampling = copy.deepcopy(model.get_model_object("model_sampling"))
    sampling.set_parameters(shift=shift)
    model.add_object_patch("model_sampling", sampling)
    return model


def wan_vae(state_dict: dict[str, Tensor]) -> Any:
    """A VAE from the weights of a Wan 2.1 VAE in original names, in float32."""
    import comfy.sd
    import torch

    return comfy.sd.VAE(sd=state_dict, dtype=torch.float32)


def wan_clip(state_dict: dict[str, Tensor], config: Mapping[str, Any], tokenizer: Path) -> Any:
    """A CLIP from a UMT5 encoder of any size: 512 tokens with the padding's output zeroed, as ComfyUI's Wan has them.

    Args:
        state_dict: weights in transformers' names.
        config: the encoder's configuration in ComfyUI's terms.
        tokenizer: folder of a fast tokenizer that ends each text with one token.
    """
    from functools import partial

    import comfy.sd
    import folder_paths
    import torch
    from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer, SDClipModel, SDTokenizer
    from comfy.supported_models_base import ClipTarget
    from comfy.text_encoders.t5 import T5
    from transformers import PreTrainedTokenizerFast

    encoder = partial(
        SDClipModel,
        textmodel_json_config=dict(config),
        special_tokens={"end": 1, "pad": 0},
        model_class=T5,
        enable_attention_masks=True,
        zero_out_masked=True,
    )
    words = partial(
        SDTokenizer,
        str(tokenizer),
        tokenizer_class=PreTrainedTokenizerFast,
        embedding_key="umt5xxl",
        embedding_size=config["d_model"],
        has_start_token=False,
        pad_with_end=False,
        pad_token=0,
        pad_to_max_length=False,
        max_length=99999999,
        min_length=512,
    )
    target = ClipTarget(
        partial(SD1Tokenizer, name="umt5xxl", tokenizer=words),
        partial(SD1ClipModel, name="umt5xxl", clip_model=encoder),
    )
    return comfy.sd.CLIP(
        target,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        parameters=sum(tensor.numel() for tensor in state_dict.values()),
        state_dict=[state_dict],
        model_options={"dtype": torch.float32},
    )


@dataclass(frozen=True)
class WanModel:
    """What tells the latents and texts of a Wan MODEL: width of its transformer, width of the text embeddings it
    takes, and mean and deviation of each channel of its latents."""

    width: int
    text_dim: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def describe_wan(model: Any) -> WanModel:
    """The sizes of a Wan MODEL.

    Raises:
        ModelError: the MODEL is of another family, or does not predict a flow.
    """
    from comfy.latent_formats import Wan21
    from comfy.model_base import WAN21
    from comfy.model_sampling import CONST

    base, sampling = model.model, model.get_model_object("model_sampling")
    if not isinstance(base, WAN21) or not isinstance(base.latent_format, Wan21) or not isinstance(sampling, CONST):
        raise ModelError(
            f"the model is a {type(base).__name__} with {type(base.latent_format).__name__} latents, sampled by "
            f"{type(sampling).__name__}; a Wan 2.1 or 2.2 model that predicts a flow is needed: connect a native one"
        )
    network, (mean, std) = base.diffusion_model, (base.latent_format.latents_mean, base.latent_format.latents_std)
    return WanModel(
        int(network.dim), int(network.text_dim), tuple(mean.flatten().tolist()), tuple(std.flatten().tolist())
    )


def with_post_cfg(model: Any, function: Callable[[dict[str, Any]], Tensor], patchers: Sequence[Any]) -> Any:
    """A clone of a MODEL that calls ``function`` after classifier-free guidance at each of its evaluations.

    Args:
        model: the MODEL. What others added to it is kept and called before.
        function: of the host's arguments (``denoised``, ``input``, ``sigma``, ``cond``, ...); the new ``denoised``. A
            plain function: the host copies the rest deeply, an object's networks included.
        patchers: whose models the function uses: the host loads them beside the MODEL, for as long as it samples.
    """
    patched = model.clone()
    patched.set_model_sampler_post_cfg_function(function)
    kept = patched.get_additional_models_with_key("spatialalign")
    patched.set_additional_models("spatialalign", [*kept, *patchers])
    return patched


def sampler_choices() -> tuple[list[str], list[str]]:
    """Names of ComfyUI's samplers, and of its noise schedules."""
    from comfy.samplers import KSampler

    return list(KSampler.SAMPLERS), list(KSampler.SCHEDULERS)


def interruption() -> type[BaseException]:
    """The exception of a user's stop; the host raises it once for each stop."""
    from comfy.model_management import InterruptProcessingException

    return InterruptProcessingException


def sampling_levels(model: Any, sampler: str, scheduler: str, steps: int, denoise: float) -> tuple[Tensor, bool]:
    """KSampler's noise levels, and whether a level is ``(1 - sigma) x0 + sigma noise``."""
    from comfy.model_sampling import CONST
    from comfy.samplers import KSampler

    plan = KSampler(model, steps, model.load_device, sampler, scheduler, denoise, model.model_options)
    return plan.sigmas, isinstance(model.get_model_object("model_sampling"), CONST)


def sampling_latent(model: Any, latent: Mapping[str, Any]) -> dict[str, Any]:
    """A LATENT as KSampler takes it for this MODEL: an empty one gets the MODEL's shape."""
    from comfy.sample import fix_empty_latent_channels

    # Newer hosts note in an empty latent which scale it was made for.
    scale = {key: value for key, value in latent.items() if key.startswith("downscale_ratio_")}
    kept = {key: value for key, value in latent.items() if key not in scale}
    return {**kept, "samples": fix_empty_latent_channels(model, latent["samples"], **scale)}


def sample(
    model: Any, guidance: Any, latent: Any, sampler: str, sigmas: Tensor, seeds: tuple[int, int], steps: Any
) -> None:
    """Begin as KSampler does, then ``steps(function of the sampler, model, x, sigmas, **what else it takes)``.

    ``guidance`` is positive, negative and cfg; ``seeds`` that of the noise and that of what a sampler draws.
    """
    from comfy.sample import prepare_noise, sample_custom
    from comfy.samplers import KSAMPLER, sampler_object

    method, start = sampler_object(sampler), latent["samples"]
    own = KSAMPLER(lambda *args, **rest: steps(method.sampler_function, *args, **rest), {}, method.inpaint_options)
    noise, mask = prepare_noise(start, seeds[0], latent.get("batch_index")), latent.get("noise_mask")
    more = {"noise_mask": mask, "disable_pbar": True, "seed": seeds[1]}
    sample_custom(model, noise, guidance[2], own, sigmas, *guidance[:2], start, **more)


def preview(model: Any) -> Callable[[Tensor], Any]:
    """What draws a clip in the MODEL's space for :class:`Progress`; its pictures are None where previews are off."""
    from latent_preview import get_previewer

    shows = get_previewer(model.load_device, model.model.latent_format)
    return lambda x0: None if shows is None else shows.decode_latent_to_preview_image("JPEG", x0)
