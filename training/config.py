"""Settings of a preference training, the refusal of contradictory ones, and the learning-rate schedule."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any, Literal

from spatialalign.errors import ConfigError
from training.objective import Arm, ErrorOf, Form, Objective, Reduction

HARMLESS = frozenset(
    {
        "checkpoint_every",
        "held_out_every",
        "keep_checkpoints",
        "max_bad_clips",
        "max_bad_steps",
        "sample_every",
        "sample_prompts",
        "sample_seeds",
        "shard",
        "tensorboard",
    }
)
"""Settings that may change between a run and its continuation, because no weight depends on them."""

DECIDING = frozenset({"held_out_every", "sample_every", "sample_prompts", "sample_seeds"})
"""Those of them on which the weights do depend once a held-out value decides when to stop or what to export."""


@dataclass(frozen=True)
class TrainSettings:
    """Everything the weights of a trained LoRA depend on, besides model and pairs. The defaults are the paper's.

    The string below a field is its help on the command line. Options that contradict each other are refused by name.
    """

    arm: Arm = "dpo+zo"
    """dpo, dpo+zo (the paper's, with the output anchor), dpo+sft, sft (winners only) or rwr (all, weighted)."""
    seed: int = 0
    """Seed of the LoRA's initial values, the pairs, the noise and the noise levels."""
    steps: int = 3000
    """Optimiser steps."""
    batch_pairs: int = 48
    """Pairs per optimiser step."""
    micro_pairs: int = 1
    """Pairs in memory at once; batch_pairs must be a multiple."""
    rank: int = 16
    """LoRA rank."""
    alpha: float = 16.0
    """LoRA alpha; the update is scaled by alpha / rank."""
    targets: Literal["spatialalign", "cross-kv", "attention", "all-linear"] = "spatialalign"
    """Linears with a LoRA: text embedding and cross-attention k, v; the latter alone; attention q, k, v, o; or all."""
    beta: float = 1.0
    """Weight of the error differences in the margin; it means something only together with reduction."""
    half_beta: bool = False
    """Multiply beta by 1/2, as Flow-DPO and Diffusion-DPO write it."""
    auto_beta: float | None = None
    """Choose beta so that the gradient factor sigmoid(-margin) stays near this, between 0 and 0.5; null: keep beta."""
    error_of: ErrorOf = "velocity"
    """Errors compared in the margin: of the velocity, or of the noise it implies, which is beta (1 - t)^2."""
    reduction: Reduction = "mean"
    """Mean or sum of squared errors over a clip's latent elements."""
    clip: float | None = 5.0
    """The margin is clipped to plus or minus this; null: no clipping."""
    form: Form = "sigmoid"
    """Preference term as a function of the margin: sigmoid (DPO), hinge or ipo."""
    label_smoothing: float = 0.0
    """Assumed share of pairs whose order is wrong, below 0.5; for the sigmoid form."""
    pair_weight: Literal["none", "margin", "rarity"] = "none"
    """Weigh pairs by the difference of their scores or by how rare these scores are; the mean weight is 1."""
    rarity_power: float = 0.5
    """Power of the inverse share of a score in pair_weight rarity."""
    anchor_weight: float = 0.5
    """Weight of the anchor in dpo+zo."""
    sft_weight: float = 1.0
    """Weight of the flow-matching error in dpo+sft, sft and rwr."""
    granular_weight: float = 0.0
    """Weight of the preference term over blocks (Gran-DPO, our reading of it), which needs patches; 0: none."""
    granular_tie: float = 0.0
    """Blocks whose rewards in winner and loser differ by no more do not count."""
    rwr_temperature: float = 1.0
    """A clip's weight in rwr is exp(advantage / this), with scores normalised per prompt to advantages."""
    rwr_clip: float = 20.0
    """Largest weight of a clip in rwr."""
    noise: Literal["independent", "shared"] = "independent"
    """Noise of winner and loser of a pair: independent (the paper) or shared (most other codes)."""
    shift: float = 5.0
    """Timestep shift of the training noise levels; 1 draws them uniformly."""
    bf16_timesteps: bool = False
    """Round timesteps to bfloat16 before they are looked up, as the official code does."""
    lr: float = 1e-4
    """Peak learning rate of AdamW."""
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: a cosine to 0 at the last step, or constant."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    warmup_steps: int = 300
    """Steps of linear warm-up."""
    max_grad_norm: float | None = None
    """Gradient clipping; null: none."""
    held_out: float = 0.1
    """Share of the prompts that is kept out of training and only watched."""
    held_out_pairs: int = 32
    """Pairs drawn from them, each with a fixed noise and noise level."""
    held_out_every: int = 100
    """Steps between two evaluations on the held-out pairs."""
    sample_every: int = 0
    """Steps between samplings from the current adapter, scored by DSR-Score; 0: never."""
    sample_prompts: int = 8
    """Held-out prompts that are sampled (training prompts where none are held out)."""
    sample_seeds: int = 1
    """Clips of each of them."""
    monitor: Literal["accuracy", "loss", "score"] = "accuracy"
    """Value that early_stop and keep_best follow: on held-out pairs, or score of the sampled clips."""
    early_stop: int = 0
    """Evaluations without improvement of monitor after which training stops; 0: never."""
    min_improvement: float = 0.0
    """Change of monitor that counts as an improvement."""
    keep_best: bool = False
    """Export the checkpoint with the best monitor instead of the last one."""
    checkpoint_every: int = 100
    """Steps between two checkpoints."""
    keep_checkpoints: int = 0
    """How many of the newest checkpoints are kept; 0: all."""
    max_bad_clips: int = 10
    """Clips that may be skipped as missing, damaged, not finite or of another shape before training stops."""
    max_bad_steps: int = 5
    """Steps in a row that may be skipped because loss or gradient is not finite before training stops."""
    tensorboard: bool = True
    """Also write TensorBoard files, when it is installed."""

    # Memory and speed: only reference_draws and base_dtype change what is computed by more than rounding.
    checkpointing: Literal["none", "full", "selective"] = "full"
    """Activations computed again in the backward pass: none, all but attention outputs (selective) or all (full)."""
    offload_inputs: bool = False
    """Keep the inputs of checkpointed blocks in host memory until the backward pass."""
    passes: Literal["auto", "batched", "separate", "one-sample"] = "auto"
    """Forward passes of a pair: one for both clips (auto on a CPU), one each (auto elsewhere), one graph at a time."""
    reference_cache: Literal["off", "float32", "bfloat16"] = "off"
    """Keep the reference's predictions on disk in this precision; see reference_folder."""
    reference_draws: int = 0
    """Fixed draws of noise and level per clip, so that kept predictions are used again; 0: a new one for every pair."""
    attention: Literal["auto", "native", "flash", "cudnn", "efficient", "math", "flash-2", "flash-3", "flash-3-hub"] = (
        "auto"
    )
    """Attention kernel on CUDA; auto measures the usable ones at start; elsewhere torch's own (native)."""
    compile: bool = False
    """Compile each transformer block with torch.compile."""
    base_dtype: Literal["model", "fp8"] = "model"
    """Precision in which the frozen base is stored: as loaded, or its blocks in 8 bits."""
    shard: bool = False
    """With several processes: each holds a part of the frozen base; a block is put together when it runs (FSDP2)."""

    def __post_init__(self) -> None:
        _check_ranges(self)
        _check_contradictions(self)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return dataclasses.asdict(self)

    def objective(self, beta: float | None = None) -> Objective:
        """What is minimised, with another beta where it is tuned."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(Objective)}
        return Objective(**values if beta is None else values | {"beta": beta})

    def learning_rate(self, step: int) -> float:
        """Learning rate of optimiser step ``step`` (from 0): linear warm-up, then cosine to 0 (and 0 after) or flat."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.lr_schedule == "constant":
            return self.lr
        done = min(1.0, (step - self.warmup_steps) / (self.steps - self.warmup_steps))
        return self.lr * 0.5 * (1 + math.cos(math.pi * done))

    @property
    def decides_by_monitor(self) -> bool:
        """Whether a held-out value decides when to stop or which checkpoint is exported."""
        return self.early_stop > 0 or self.keep_best


_ABOVE_ZERO = (
    "steps batch_pairs micro_pairs rank alpha beta rarity_power rwr_temperature rwr_clip shift lr held_out_pairs "
    "held_out_every sample_prompts sample_seeds checkpoint_every max_bad_steps"
).split()
_NOT_NEGATIVE = (
    "seed sample_every anchor_weight sft_weight granular_weight granular_tie weight_decay warmup_steps early_stop "
    "min_improvement keep_checkpoints max_bad_clips reference_draws"
).split()


def _check_ranges(settings: TrainSettings) -> None:
    for name in _ABOVE_ZERO:
        require(0 < getattr(settings, name) < math.inf, name, "above 0 and finite", getattr(settings, name))
    for name in _NOT_NEGATIVE:
        require(0 <= getattr(settings, name) < math.inf, name, "0 or more and finite", getattr(settings, name))
    for name in ("clip", "max_grad_norm"):
        value = getattr(settings, name)
        require(value is None or 0 < value < math.inf, name, "above 0 and finite, or null", value)
    require(0 <= settings.held_out < 1, "held_out", "in [0, 1)", settings.held_out)
    require(settings.reference_draws <= 1000, "reference_draws", "at most 1000, the levels", settings.reference_draws)
    require(0 <= settings.label_smoothing < 0.5, "label_smoothing", "in [0, 0.5)", settings.label_smoothing)
    target = settings.auto_beta
    require(target is None or 0 < target < 0.5, "auto_beta", "between 0 and 0.5, or null", target)


def require(holds: bool, name: str, expected: str, found: object) -> None:
    """Raise :class:`ConfigError` unless a setting is as expected."""
    if not holds:
        raise ConfigError(f"{name} must be {expected}, found {found}")


def _check_contradictions(settings: TrainSettings) -> None:
    """Refuse pairs of options of which one makes the other meaningless or impossible, naming both."""
    s = settings
    if s.batch_pairs % s.micro_pairs:
        raise ConfigError(
            f"batch_pairs ({s.batch_pairs}) must be a multiple of micro_pairs ({s.micro_pairs}); lower micro_pairs"
        )
    if s.warmup_steps >= s.steps:
        raise ConfigError(
            f"warmup_steps ({s.warmup_steps}) must be below steps ({s.steps}): the learning rate would never reach its "
            "peak"
        )
    if s.arm in ("sft", "rwr"):
        why = "has no preference term; use arm dpo, dpo+zo or dpo+sft"
        _refuse(s, "arm", "form", s.form != "sigmoid", why)
        _refuse(s, "arm", "label_smoothing", s.label_smoothing > 0, why)
        _refuse(s, "arm", "pair_weight", s.pair_weight != "none", why)
        _refuse(s, "arm", "auto_beta", s.auto_beta is not None, why)
        _refuse(s, "arm", "granular_weight", s.granular_weight > 0, why)
    _refuse(s, "arm", "anchor_weight", s.arm == "dpo+zo" and s.anchor_weight == 0, "is arm dpo; choose that")
    _refuse(s, "arm", "sft_weight", s.arm in ("sft", "rwr") and s.sft_weight == 0, "has nothing to learn")
    _refuse(s, "arm", "sft_weight", s.arm == "dpo+sft" and s.sft_weight == 0, "is arm dpo; choose that")
    idle = s.granular_weight == 0 and s.granular_tie > 0
    _refuse(s, "granular_weight", "granular_tie", idle, "has no blocks to compare")
    _refuse(s, "form", "label_smoothing", s.form != "sigmoid" and s.label_smoothing > 0, "smooths no labels")
    _refuse(s, "form", "auto_beta", s.form != "sigmoid" and s.auto_beta is not None, "has no gradient factor to aim at")
    _refuse(
        s, "form", "clip", s.form == "ipo" and s.clip is not None, "would not pull back what lies beyond; set clip null"
    )
    _refuse(s, "form", "clip", s.form == "hinge" and (s.clip or 1) < 1, "would never reach its end at 1; raise clip")
    if s.auto_beta is not None and s.clip is not None:
        bound = 1 / (1 + math.exp(s.clip))
        _refuse(s, "auto_beta", "clip", s.auto_beta <= bound, "can never be reached; raise either")
    _refuse(
        s,
        "offload_inputs",
        "checkpointing",
        s.offload_inputs and s.checkpointing == "none",
        "has no block inputs to move",
    )
    _refuse(
        s,
        "offload_inputs",
        "compile",
        s.offload_inputs and s.compile and s.checkpointing == "selective",
        "hides the block inputs inside compiled code; use checkpointing full",
    )
    _refuse(
        s,
        "reference_draws",
        "reference_cache",
        s.reference_draws > 0 and s.reference_cache == "off",
        "repeats draws and gains nothing; set reference_cache bfloat16",
    )
    _refuse(s, "shard", "sample_every", s.shard and s.sample_every > 0, "would sample in one process, but needs all")
    _refuse(
        s,
        "shard",
        "reference_cache",
        s.shard and s.reference_cache != "off",
        "would need all processes for a prediction that only one of them lacks",
    )
    _refuse(s, "shard", "base_dtype", s.shard and s.base_dtype == "fp8", "has weights in a form it cannot divide")
    _refuse(s, "shard", "compile", s.shard and s.compile, "is not supported; choose one of them")
    for name, wanted in (("early_stop", s.early_stop > 0), ("keep_best", s.keep_best)):
        by_score = s.monitor == "score"
        _refuse(s, name, "held_out", wanted and s.held_out == 0 and not by_score, "has no held-out pairs to follow")
        _refuse(s, "monitor", "sample_every", wanted and by_score and s.sample_every == 0, "has no scores to follow")


def _refuse(settings: TrainSettings, one: str, other: str, contradict: bool, why: str) -> None:
    if contradict:
        raise ConfigError(f"{one} ({getattr(settings, one)}) together with {other} ({getattr(settings, other)}) {why}")


def cosine_rate(step: int, warmup: int, steps: int) -> float:
    """Factor of the learning rate at optimiser step ``step`` (from 0): linear warm-up, then a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def fingerprint(identity: dict[str, Any]) -> str:
    """Sixteen hexadecimal digits of a JSON value."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def describe_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between the identity of a checkpoint and that of this run, harmless settings left out.

    A setting that a checkpoint of an older version does not know counts as its default.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(TrainSettings)}
    before = {name: value for name, value in defaults.items() if name in now} | before
    if (former := before.pop("gradient_checkpointing", None)) is not None:  # the name of checkpointing until 0.1
        before["checkpointing"] = "full" if former else "none"
    harmless = HARMLESS
    if any(identity.get("early_stop") or identity.get("keep_best") for identity in (before, now)):
        harmless = HARMLESS - DECIDING
    names = sorted((before.keys() | now.keys()) - harmless)
    return [f"{name}: {before.get(name)!r} -> {now.get(name)!r}" for name in names if before.get(name) != now.get(name)]
