"""SpatialAlign as a ComfyUI custom node: this version holds the engine and the training programs, and no nodes."""
