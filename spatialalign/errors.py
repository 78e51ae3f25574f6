"""Errors a user can act on: each message names the thing, what was expected, what was found and the remedy."""


class SpatialAlignError(ValueError):
    """Base of every error this package raises on purpose."""


class PromptError(SpatialAlignError):
    """A prompt or prompt set outside the grammar."""


class TracksError(SpatialAlignError):
    """Tracks with impossible shapes or values, or a tracks file that cannot be read."""


class VideoError(SpatialAlignError):
    """A video that cannot be decoded or encoded."""


class StoreError(SpatialAlignError):
    """A sample store that is locked, damaged or not a store."""


class DataError(SpatialAlignError):
    """Samples that cannot be used: non-finite latents, wrong shapes, no winners or no losers."""


class ModelError(SpatialAlignError):
    """A model folder with a missing or mismatched part."""


class LoraError(SpatialAlignError):
    """A LoRA file that does not fit the model it is loaded into."""


class ConfigError(SpatialAlignError):
    """Contradictory or out-of-range settings."""
