"""Rebuild the miniature's weights from seeds: ``python -m training.miniature``, stage by stage."""
