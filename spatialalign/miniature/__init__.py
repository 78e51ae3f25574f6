"""The miniature: a tiny drawn world and small models of the real classes, trained on it and shipped with the package."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
WAN = WEIGHTS / "wan"
DETECTOR = WEIGHTS / "detector"
SEGMENTER = WEIGHTS / "segmenter"

HEIGHT = WIDTH = 64
FRAMES = 17
FPS = 8.0
