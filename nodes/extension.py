"""The list of nodes, in the order ComfyUI is given them."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .bridges import TracksFromBoxes, TracksFromMasks
from .dataset import CollectSample
from .grounded_sam import LoadGroundedSam
from .learned_rewards import JudgeByVlm, LoadVideoReward, LoadVlm, VideoRewardScore
from .lora import LoadAlignedLora
from .metrics import ClipMetrics
from .miniature import LoadMiniature
from .patches import LoadPatchReward, PatchRewardHeatmap
from .prompt import DsrFromSet, DsrFromText, DsrPrompt
from .sampling import LoadLatentReward, RewardGuidance, RewardWeights
from .scoring import PickBest, ScoreDsr, ScoreSummary
from .search import BestOfNSampler, ParticleSampler
from .tracking import DrawTracks, GroundedSamTrack

NODES: list[type[io.ComfyNode]] = [
    DsrPrompt,
    DsrFromText,
    DsrFromSet,
    LoadGroundedSam,
    GroundedSamTrack,
    TracksFromMasks,
    TracksFromBoxes,
    DrawTracks,
    ScoreDsr,
    PickBest,
    ScoreSummary,
    LoadVideoReward,
    VideoRewardScore,
    LoadVlm,
    JudgeByVlm,
    ClipMetrics,
    LoadPatchReward,
    PatchRewardHeatmap,
    LoadAlignedLora,
    LoadLatentReward,
    RewardWeights,
    RewardGuidance,
    BestOfNSampler,
    ParticleSampler,
    CollectSample,
    LoadMiniature,
]


class SpatialAlignExtension(ComfyExtension):
    """What ComfyUI asks for the nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All nodes of the pack."""
        return NODES
