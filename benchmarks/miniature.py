"""``python -m benchmarks.miniature``: how good the shipped small models are, as one line of JSON."""

from __future__ import annotations

import json


def main() -> None:
    """Measure on one clip of every held-out prompt."""
    from spatialalign.tracking.load import load_tracker
    from training.miniature import check

    clips, tracker = check.held_out_clips(every=1), load_tracker("miniature")
    parts = (check.autoencoder(clips), *(f(clips, tracker) for f in (check.detector, check.segmenter, check.scores)))
    print(json.dumps({key: round(value, 4) for part in parts for key, value in part.items()} | {"clips": len(clips)}))


if __name__ == "__main__":
    main()
