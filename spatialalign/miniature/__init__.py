"""The miniature: a tiny drawn world, and small models of the real classes that were trained on it."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
WAN = WEIGHTS / "wan"
DETECTOR = WEIGHTS / "detector"
SEGMENTER = WEIGHTS / "segmenter"
REWARD = WEIGHTS / "reward" / "latent_reward.safetensors"
PATCH_REWARD = WEIGHTS / "reward" / "patch_reward.safetensors"

HEIGHT = WIDTH = 64
HOLD = 4
"""Frames that a pose is held: the world is animated on fours, in step with the autoencoder's groups of four frames."""
POSES = 4
FRAMES = 1 + HOLD * (POSES - 1)
FPS = 8.0
