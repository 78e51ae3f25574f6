"""What a preference training minimises, as plain values; :mod:`training.losses` computes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Arm = Literal["dpo", "dpo+sft", "dpo+zo", "sft", "rwr"]
ErrorOf = Literal["velocity", "noise"]
Form = Literal["sigmoid", "hinge", "ipo"]
Reduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class Objective:
    """The loss of a pair. With the differences of errors of winner and loser, ``s_w - s_l``:

    Attributes:
        arm: ``dpo`` the preference term alone; ``dpo+zo`` (the paper's) plus the zeroth-order anchor; ``dpo+sft`` plus
            the winner's flow-matching error; ``sft`` that error alone; ``rwr`` all clips' errors weighted by score.
        beta: weight of the difference in the margin; it means something only together with ``reduction``.
        half_beta: multiply beta by 1/2, as Flow-DPO and Diffusion-DPO write it.
        error_of: the prediction whose error is compared, see :func:`training.losses.level_weight`.
        reduction: whether that error is the mean or the sum over a clip's latent elements.
        clip: the margin is clipped to [-clip, clip]; None for no clipping.
        form: of the preference term, see :func:`training.losses.preference_term`.
        label_smoothing: assumed share of wrongly ordered pairs (sigmoid form only).
        anchor_weight: weight of the anchor.
        sft_weight: weight of the flow-matching error in ``dpo+sft``, ``sft`` and ``rwr``.
        granular_weight: weight of the preference term over blocks beside that over whole clips; 0 for none.
    """

    arm: Arm
    beta: float = 1.0
    half_beta: bool = False
    error_of: ErrorOf = "velocity"
    reduction: Reduction = "mean"
    clip: float | None = 5.0
    form: Form = "sigmoid"
    label_smoothing: float = 0.0
    anchor_weight: float = 0.5
    sft_weight: float = 1.0
    granular_weight: float = 0.0
