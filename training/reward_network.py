"""The network that is trained into a VideoReward, and its checkpoint in the released layout (methods: 2.2, 2.4)."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from spatialalign.errors import ModelError
from spatialalign.files import atomic_path, write_json
from spatialalign.rewards.video_reward import LearnedVideoReward
from spatialalign.rewards.video_reward_checkpoint import ADAPTERS, TRAINED
from spatialalign.rewards.video_reward_config import SCORED, LoraSettings, VideoRewardConfig
from spatialalign.rewards.video_reward_layout import EMBEDDING, HEAD, OUTPUT, PEFT, released_name, stored_name
from spatialalign.rewards.video_reward_network import RewardBatch, VideoRewardNetwork
from spatialalign.rewards.video_reward_text import MARKS, TEXT_FILE, VIDEO, Instruction
from spatialalign.tracking.parts import guarded
from training.reward_model_settings import RewardModelSettings

_ROWS = "model.language_model.embed_tokens.rows"


class MarkedEmbedding(nn.Module):
    """Embeddings of which only the rows of some tokens learn.

    Attributes:
        base: all embeddings, frozen; its rows of those tokens are not used.
        marks: ids of the tokens.
        rows: what they are embedded as, ``(len(marks), d)``.
    """

    def __init__(self, base: nn.Embedding, marks: tuple[int, ...]) -> None:
        super().__init__()
        self.base, self.marks = base, marks
        self.rows = nn.Parameter(base.weight.detach()[list(marks)].float().clone())

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings ``(..., d)`` of tokens ``(...)``."""
        out: Tensor = self.base(ids)
        for row, mark in zip(self.rows, self.marks, strict=True):
            out = torch.where((ids == mark)[..., None], row.to(out.dtype), out)
        return out

    def table(self) -> Tensor:
        """All embeddings ``(v, d)`` with the rows in their places, in the dtype of ``base``."""
        whole = self.base.weight.detach().clone()
        whole[list(self.marks)] = self.rows.detach().to(whole.dtype)
        return whole


class TrainedNetwork(VideoRewardNetwork):
    """A network in training.

    Attributes:
        last: read everything at the last token; the tokens of ``marks`` are then in no text.
    """

    def __init__(self, backbone: Any, head: Tensor, marks: tuple[int, ...], last: bool) -> None:
        super().__init__(backbone, head, marks)
        self.last = last

    def forward(self, batch: RewardBatch) -> Tensor:
        """Answers ``(b, 3)`` float32 for VQ, MQ and TA, not normalised."""
        if not self.last:
            return super().forward(batch)
        hidden, ends = self.hidden_states(batch), batch.mask.sum(dim=1) - 1
        read = hidden[torch.arange(len(ends), device=ends.device), ends]
        return functional.linear(read.float(), self.rm_head.weight.float())

    def hidden_states(self, batch: RewardBatch) -> Tensor:
        """As the parent's, computed in the dtype of what does not learn; the head is not, so that answers stay fine."""
        dtype = self.backbone.lm_head.weight.dtype
        with torch.autocast(batch.ids.device.type, dtype, enabled=dtype != torch.float32):
            return super().hidden_states(batch)

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """What learns, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}


def reward_config(model: str, settings: RewardModelSettings) -> VideoRewardConfig:
    """The settings that scoring needs; with statistics under which a score is the network's bare answer."""
    return VideoRewardConfig(
        base=model,
        outputs=settings.outputs,
        lora=LoraSettings(settings.rank, settings.alpha, settings.dropout),
        max_pixels=settings.max_pixels,
        fps=settings.fps,
        frames=settings.frames,
        max_length=settings.max_length,
        mean=(0.0,) * len(SCORED),
        std=(1.0,) * len(SCORED),
    )


def new_judge(
    model: str, settings: RewardModelSettings, instruction: Instruction, device: torch.device, dtype: torch.dtype
) -> LearnedVideoReward:
    """A Qwen2-VL with the new tokens, a LoRA and a new head; what learns is in float32, the rest in ``dtype``.

    Raises:
        ModelError: no model that can be loaded, or one of another kind.
    """
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

    tokenizer = guarded(model, lambda: AutoTokenizer.from_pretrained(model))
    backbone = guarded(model, lambda: Qwen2VLForConditionalGeneration.from_pretrained(model, dtype=dtype))
    if int(tokenizer.convert_tokens_to_ids(VIDEO) or -1) != backbone.config.video_token_id:
        raise ModelError(f"{model}: the tokenizer's {VIDEO} is not the model's; give the folder of a Qwen2-VL model")
    tokenizer.add_tokens(list(MARKS), special_tokens=True)
    marks = tuple(int(tokenizer.convert_tokens_to_ids(mark)) for mark in MARKS)
    config = reward_config(model, settings)
    assert config.lora is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        # the rows behind the last token are padding, of which no checkpoint holds any
        backbone.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        head = nn.Linear(backbone.config.text_config.hidden_size, settings.outputs, bias=False).weight.detach()
        _add_adapters(backbone, config.lora)
    backbone.requires_grad_(False)
    language = backbone.model.language_model
    language.embed_tokens = MarkedEmbedding(language.embed_tokens, marks)
    if settings.checkpointing:
        backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    network = TrainedNetwork(backbone, head, marks, settings.tokens == "last")
    for name, parameter in network.named_parameters():
        if _learns(name, settings):
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()
    return LearnedVideoReward(network.to(device), tokenizer, instruction, config, "training")


def _learns(name: str, settings: RewardModelSettings) -> bool:
    if ".visual." in name:
        return settings.vision == "full" or (settings.vision == "merger" and ".merger." in name)
    if name.endswith(_ROWS):
        return settings.tokens == "special"
    return ".lora_" in name or name == HEAD


def _wrapped(backbone: Any, lora: LoraSettings) -> list[str]:
    """Layers that have, or are to have, an adapter."""
    inner = (".base_layer", ".lora_A.default", ".lora_B.default")
    linear = [
        name.removesuffix(".base_layer")
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith(inner[1:])
    ]
    return lora.wrapped(linear)


def _add_adapters(backbone: Any, lora: LoraSettings) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=_wrapped(backbone, lora),
        bias="none",
    )
    inject_adapter_in_model(settings, backbone)


def rate_of(name: str, settings: RewardModelSettings) -> float:
    """The learning rate of a parameter of :class:`TrainedNetwork`, at full height."""
    given = None
    if ".visual." in name:
        given = settings.vision_lr
    elif name.endswith(_ROWS):
        given = settings.token_lr
    elif name == HEAD:
        given = settings.head_lr
    return settings.lr if given is None else given


def trained_tensors(network: TrainedNetwork, lora: LoraSettings) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(adapters, the rest of what was trained), by the released names and in the dtype of the embeddings.

    Of an output layer that is not the embeddings themselves the rest holds that too: it has grown by the new tokens.
    """
    backbone = network.backbone
    embedding, wrapped = backbone.model.language_model.embed_tokens, _wrapped(backbone, lora)
    adapters: dict[str, Tensor] = {}
    rest = {EMBEDDING: embedding.table()}
    for name, parameter in network.trainable.items():
        inner = name.removeprefix("backbone.")
        if ".lora_" in inner:
            adapters[PEFT + released_name(inner).replace(".default.", ".")] = parameter.detach()
        elif inner != _ROWS:
            rest[inner] = parameter.detach()
    if not backbone.config.tie_word_embeddings:
        rest[OUTPUT] = backbone.lm_head.weight.detach()
    dtype = embedding.base.weight.dtype
    named = {stored_name(name, wrapped, True): tensor for name, tensor in rest.items()}
    return tuple(  # type: ignore[return-value]
        {name: tensor.to("cpu", dtype).contiguous() for name, tensor in part.items()} for part in (adapters, named)
    )


def export(out: Path, judge: LearnedVideoReward, settings: RewardModelSettings, step: int) -> Path:
    """Write ``checkpoint-<step>/``, the instruction and, last, ``model_config.json``; returns the first.

    ``judge.config`` holds the statistics of the scores.
    """
    from safetensors.torch import save_file

    network, config = judge.network, judge.config
    assert isinstance(network, TrainedNetwork) and config.lora is not None
    adapters, rest = trained_tensors(network, config.lora)
    target = out / f"checkpoint-{step}"
    temporary = out / f".tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}-{target.name}"
    temporary.mkdir(parents=True)
    try:
        save_file(adapters, temporary / ADAPTERS)
        torch.save(rest, temporary / TRAINED)
        judge.tokenizer.save_pretrained(temporary / "tokenizer")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    with atomic_path(out / TEXT_FILE) as file:
        file.write_text(judge.instruction.text, encoding="utf-8")
    write_json(out / "model_config.json", model_config(config, settings, str(rest[next(iter(rest))].dtype)))
    return target


def model_config(config: VideoRewardConfig, settings: RewardModelSettings, dtype: str) -> Mapping[str, Any]:
    """The content of ``model_config.json``, in its official sections."""
    lora, special = config.lora, settings.tokens == "special"
    assert lora is not None
    constants: dict[str, float] = {}
    if config.mean is not None and config.std is not None:
        for name, mean, std in zip(SCORED, config.mean, config.std, strict=True):
            constants |= {f"{name}_mean": mean, f"{name}_std": std}
    return {
        "data_config": {
            "max_frame_pixels": config.max_pixels,
            "num_frames": config.frames,
            "fps": config.fps,
            "eval_dim": list(SCORED),
            "prompt_template_type": "detailed_special" if special else "detailed",
            "sample_type": "uniform",
            "use_tied_data": settings.loss == "btt",
        },
        "training_args": {"max_length": config.max_length, **settings.to_dict()},
        "model_config": {
            "model_name_or_path": config.base,
            "output_dim": config.outputs,
            "use_special_tokens": special,
            "reward_token": settings.tokens,
            "loss_type": settings.loss,
            "torch_dtype": dtype.removeprefix("torch."),
        },
        "peft_lora_config": {
            "lora_enable": True,
            "vision_lora": False,
            "lora_r": lora.rank,
            "lora_alpha": lora.alpha,
            "lora_dropout": lora.dropout,
            "lora_namespan_exclude": list(lora.exclude),
            "num_lora_modules": lora.last,
            "lora_task_type": "CAUSAL_LM",
            "use_rslora": lora.rank_stabilised,
        },
        "inference_config": constants or None,
    }
