"""A reward that looks at latents while they are sampled, and the patch that lets it lead a MODEL."""

from __future__ import annotations

from typing import Any, Literal

from comfy_api.latest import io

from . import host
from .grounded_sam import MINIATURE
from .guiding import post_cfg
from .rewards import FOLDER, Reward, check_model, load, reward_file
from .sockets import REWARD_SOCKET


class LoadLatentReward(io.ComfyNode):
    """A latent reward from the models folder, or the miniature's."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpatialAlignLoadReward",
            display_name="Load Latent Reward",
            category="SpatialAlign/Sampling",
            description=(
                "Loads a network that reads the latents of a clip while it is still noise and predicts how well it "
                "will show the relationship of its prompt. Reward Guidance follows it, Best of N Sampler and Particle "
                "Sampler look with it. python -m training.latent_reward trains one for a model; it works for every "
                "model with the same latents and text encoder."
            ),
            inputs=[
                io.Combo.Input(
                    "reward",
                    options=[MINIATURE, *host.model_names(FOLDER)],
                    default=MINIATURE,
                    tooltip="The miniature's own, or a file in models/latent_rewards.",
                ),
                io.Combo.Input(
                    "precision",
                    options=["float32", "bfloat16"],
                    default="float32",
                    tooltip="Number format of its transformer blocks. bfloat16 halves their memory.",
                ),
            ],
            outputs=[
                REWARD_SOCKET.Output(
                    display_name="reward",
                    tooltip="For Reward Guidance or a searching sampler. Only its prediction of the DSR-Score counts.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="The model it is for and the dimensions it predicts. Preview Any shows it.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, reward: str, precision: str) -> str:
        """The file's time and size: a reward that was trained anew under its old name is loaded anew."""
        stat = reward_file(reward).stat()
        return f"{stat.st_mtime_ns}-{stat.st_size}"

    @classmethod
    def execute(cls, reward: str, precision: str) -> io.NodeOutput:
        loaded = load(reward, precision)
        return io.NodeOutput(loaded, loaded.report())


class RewardWeights(io.ComfyNode):
    """What counts how much, in one reward or in several."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpatialAlignRewardWeights",
            display_name="Reward Weights",
            category="SpatialAlign/Sampling",
            description=(
                "Says which of a reward's predictions count and how much, and joins rewards. Guidance follows the "
                "weighted sum. dsr is the predicted DSR-Score, valid says that both things are to be seen; a reward "
                "may have more, such as quality. Load Latent Reward names them in its report."
            ),
            inputs=[
                REWARD_SOCKET.Input("reward", tooltip="The reward whose dimensions are weighted."),
                io.String.Input(
                    "weights",
                    default="dsr:1, valid:0.2",
                    tooltip="Dimensions and their weights. What is not named counts nothing; below 0 it is avoided.",
                ),
                REWARD_SOCKET.Input(
                    "also", optional=True, tooltip="A further reward, with the weights that it comes with, to be added."
                ),
            ],
            outputs=[
                REWARD_SOCKET.Output(display_name="reward", tooltip="The weighted reward, or the sum of both."),
                io.String.Output(
                    display_name="report", tooltip="Every reward in the sum and its weights. Preview Any shows it."
                ),
            ],
        )

    @classmethod
    def execute(cls, reward: Reward, weights: str, also: Reward | None = None) -> io.NodeOutput:
        own = reward.weighted(weights)
        joined = own if also is None else Reward(own.parts + also.parts)
        return io.NodeOutput(joined, joined.report())


class RewardGuidance(io.ComfyNode):
    """A patch of a MODEL that turns its predictions towards a higher reward."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpatialAlignRewardGuidance",
            display_name="Reward Guidance",
            category="SpatialAlign/Sampling",
            description=(
                "Lets a reward lead the sampler: in the chosen part of the schedule each prediction of the model is "
                "moved towards a higher reward. For native Wan models and every sampler, with LoRAs, masks and any "
                "cfg. It needs no training of the model; a guided step costs more, as the report of the reward says."
            ),
            inputs=[
                io.Model.Input("model", tooltip="A native Wan model. LoRAs and other patches on it are kept."),
                REWARD_SOCKET.Input("reward", tooltip="From Load Latent Reward or Reward Weights."),
                io.Float.Input(
                    "strength",
                    default=1000.0,
                    min=0.0,
                    max=10000.0,
                    step=1.0,
                    tooltip="How hard the reward pulls; 0 leaves the model unchanged. step_cap limits the outcome.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where guidance starts: 0 is noise. Where things stand is decided early.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=0.6,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where guidance ends: 1 is the finished clip. Ending earlier saves time.",
                ),
                io.Int.Input(
                    "every",
                    default=1,
                    min=1,
                    max=100,
                    tooltip="Guide every so manieth step of that part: 2 halves the price.",
                ),
                io.Combo.Input(
                    "form",
                    options=["nrg", "x0"],
                    default="x0",
                    tooltip=(
                        "nrg asks the reward about the noisy clip, for rewards that know noise; x0 asks about the clip "
                        "that the model expects to end at."
                    ),
                ),
                io.Float.Input(
                    "step_cap",
                    default=0.5,
                    min=0.01,
                    max=10.0,
                    step=0.01,
                    tooltip="Longest push of a step, as a share of what the model itself predicts. Lower is safer.",
                ),
                io.Float.Input(
                    "factor_cap",
                    default=5.0,
                    min=0.01,
                    max=1000.0,
                    step=0.01,
                    tooltip="For nrg: limit of the factor sigma / (1 - sigma), which is huge where a clip is noise.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The guided model, for any sampler.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        reward: Reward,
        strength: float,
        start_percent: float,
        end_percent: float,
        every: int,
        form: Literal["nrg", "x0"],
        step_cap: float,
        factor_cap: float,
    ) -> io.NodeOutput:
        from ..spatialalign.guidance import GuidanceSettings

        settings = GuidanceSettings(
            form=form,
            strength=strength,
            start=start_percent,
            end=end_percent,
            every=every,
            factor_cap=factor_cap,
            step_cap=step_cap,
        )
        check_model(reward, model)
        if strength == 0:
            return io.NodeOutput(model)
        patchers = [part.patcher for part in reward.parts]
        return io.NodeOutput(host.with_post_cfg(model, post_cfg(reward, settings), patchers))
