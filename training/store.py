"""The sample store, under its name among the programs; ComfyUI's collector writes it too, from :mod:`spatialalign`."""

from spatialalign.store import LatentsHeader, Sample, Store

__all__ = ["LatentsHeader", "Sample", "Store"]
