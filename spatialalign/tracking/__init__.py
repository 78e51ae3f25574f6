"""From frames to :class:`~spatialalign.tracks.Tracks`: detectors, segmenters and the rules that join them.

``detect``, ``validity`` and ``segment`` are pure functions and protocols on numpy arrays; ``grounding_dino``, ``sam``,
``sam2`` and ``original`` are the model backends (imported only when used); ``tracker`` joins one detector and one
segmenter; ``keyframes`` takes boxes drawn by hand; ``load`` finds a ready tracker by name or folder.
"""
