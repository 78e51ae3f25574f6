"""The file form of :class:`~spatialalign.tracks.Tracks`: safetensors (compact) or JSON (readable). No pickle.

Safetensors: tensors ``boxes`` (T, 2, 4) and ``confidence`` (T, 2) float64, optionally ``depth`` (T, 2) float64 and
``masks`` (n,) uint8, the deflated packed bits of the (T, 2, H, W) masks; the rest in the header's metadata. JSON: the
same names, null for absent boxes, masks as base64 of the same bytes. Both carry ``format`` and ``version``.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import SpatialAlignError, TracksError
from .files import atomic_path, read_json, write_json
from .tracks import Tracks

FORMAT = "spatialalign.tracks"
VERSION = 1


def save_tracks(tracks: Tracks, path: Path) -> None:
    """Write by suffix, atomically. Raises :class:`TracksError` for another suffix."""
    if path.suffix == ".safetensors":
        _save_safetensors(tracks, path)
    elif path.suffix == ".json":
        _save_json(tracks, path)
    else:
        raise TracksError(f"{path}: tracks are written as .safetensors or .json, found suffix {path.suffix!r}")


def load_tracks(path: Path) -> Tracks:
    """Read by suffix; every defect of the file becomes a :class:`TracksError` that names it."""
    if path.suffix not in (".safetensors", ".json"):
        raise TracksError(f"{path}: tracks are read from .safetensors or .json, found suffix {path.suffix!r}")
    if not path.is_file():
        raise TracksError(f"{path} does not exist; run the tracking stage that writes it")
    try:
        return _load_safetensors(path) if path.suffix == ".safetensors" else _load_json(path)
    except SpatialAlignError as error:
        raise TracksError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, zlib.error, binascii.Error) as error:
        raise TracksError(f"{path} is not a valid tracks file ({error!r}); delete it and track again") from error


def _header(tracks: Tracks) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "labels": list(tracks.labels),
        "size": list(tracks.size),
        "fps": tracks.fps,
        "invalid": tracks.invalid,
        "source": tracks.source,
    }


def _check_header(header: dict[str, Any]) -> None:
    if header.get("format") != FORMAT:
        raise TracksError(f"expected format {FORMAT!r}, found {header.get('format')!r}")
    if header.get("version") != VERSION:
        raise TracksError(f"expected version {VERSION}, found {header.get('version')!r}; track the video again")


def _made(header: dict[str, Any], boxes: Any, confidence: Any, depth: Any, packed: bytes | None) -> Tracks:
    boxes = np.asarray(boxes, dtype=np.float64)
    height, width = (int(side) for side in header["size"])
    masks = None if packed is None else _unpack(packed, (len(boxes), 2, height, width))
    return Tracks(
        boxes=boxes,
        confidence=confidence,
        labels=(header["labels"][0], header["labels"][1]),
        size=(height, width),
        fps=header["fps"],
        masks=masks,
        depth=depth,
        invalid=header["invalid"],
        source=header["source"],
    )


def _pack(masks: NDArray[np.bool_]) -> bytes:
    return zlib.compress(np.packbits(masks).tobytes(), level=6)


def _unpack(packed: bytes, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    count = int(np.prod(shape))
    expected = (count + 7) // 8
    # The limit keeps a damaged or hostile file from inflating to more than the masks it claims to hold.
    bits = zlib.decompressobj().decompress(packed, expected + 1)
    if len(bits) != expected:
        raise TracksError(f"masks: expected {expected} packed bytes for shape {shape}, found {len(bits)}")
    return np.unpackbits(np.frombuffer(bits, dtype=np.uint8), count=count).astype(np.bool_).reshape(shape)


def _save_safetensors(tracks: Tracks, path: Path) -> None:
    from safetensors.numpy import save_file

    tensors: dict[str, NDArray[Any]] = {
        "boxes": np.ascontiguousarray(tracks.boxes),
        "confidence": np.ascontiguousarray(tracks.confidence),
    }
    if tracks.depth is not None:
        tensors["depth"] = np.ascontiguousarray(tracks.depth)
    if tracks.masks is not None:
        tensors["masks"] = np.frombuffer(_pack(tracks.masks), dtype=np.uint8)
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"spatialalign": json.dumps(_header(tracks), ensure_ascii=False)})


def _load_safetensors(path: Path) -> Tracks:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as handle:
            metadata = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}
    except SafetensorError as error:
        raise TracksError(f"not a readable safetensors file ({error}); delete it and track the video again") from error
    if "spatialalign" not in metadata:
        raise TracksError(f"a safetensors file without tracks (tensors {sorted(tensors)})")
    header = json.loads(metadata["spatialalign"])
    _check_header(header)
    packed = tensors["masks"].tobytes() if "masks" in tensors else None
    return _made(header, tensors["boxes"], tensors["confidence"], tensors.get("depth"), packed)


def _save_json(tracks: Tracks, path: Path) -> None:
    absent = np.isnan(tracks.boxes[..., 0])
    value = _header(tracks) | {
        "boxes": [
            [None if absent[t, i] else tracks.boxes[t, i].tolist() for i in range(2)] for t in range(tracks.frames)
        ],
        "confidence": tracks.confidence.tolist(),
    }
    if tracks.depth is not None:
        value["depth"] = [[None if np.isnan(d) else float(d) for d in pair] for pair in tracks.depth]
    if tracks.masks is not None:
        value["masks"] = base64.b64encode(_pack(tracks.masks)).decode("ascii")
    write_json(path, value)


def _load_json(path: Path) -> Tracks:
    value = read_json(path)
    if not isinstance(value, dict):
        raise TracksError(f"expected a JSON object, found {type(value).__name__}")
    _check_header(value)
    boxes = [[[np.nan] * 4 if box is None else box for box in pair] for pair in value["boxes"]]
    depth = value.get("depth")
    if depth is not None:
        depth = [[np.nan if d is None else d for d in pair] for pair in depth]
    packed = base64.b64decode(value["masks"], validate=True) if value.get("masks") is not None else None
    return _made(value, boxes, value["confidence"], depth, packed)
