"""Claim files: who is working on what, so that several processes share one store and none repeats another's work."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import StoreError

_EMPTY_GRACE_S = 60.0  # a claim is created and then written; an empty one that is older belongs to a killed process


def _started(pid: int) -> str:
    """When a process of this machine started, in clock ticks, so that a reused id is not taken for the old process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return ""


def _alive(pid: int, started: str) -> bool:
    if sys.platform == "win32":  # os.kill(pid, 0) would end the process there
        import ctypes

        handle = ctypes.windll.kernel32.OpenProcess(0x1000, False, pid)
        if handle:
            ctypes.windll.kernel32.CloseHandle(handle)
        return bool(handle)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return not started or _started(pid) == started


def _owner(path: Path) -> str | None:
    """Describe the live owner of a claim; None when there is no claim or its process has ended."""
    try:
        text, modified = path.read_text(encoding="utf-8"), path.stat().st_mtime
    except FileNotFoundError:
        return None
    try:
        claim = json.loads(text)
        host, pid, started = str(claim["host"]), int(claim["pid"]), str(claim["started"])
    except (ValueError, KeyError, TypeError):
        return "a process that is just starting" if time.time() - modified < _EMPTY_GRACE_S else None
    if host == socket.gethostname() and not _alive(pid, started):
        return None
    return f"process {pid} on {host}"


def try_claim(path: Path) -> bool:
    """Create the claim file ``path``; False when a live process holds it. The claim of a dead one is taken over.

    A claim made on another machine cannot be checked and always counts as live.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())})
    for _ in range(3):
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            if _owner(path) is not None:
                return False
            # Renaming decides which of two processes that saw the dead claim removes it.
            aside = path.with_name(f"{path.name}-{uuid.uuid4().hex[:8]}")
            try:
                os.rename(path, aside)
            except FileNotFoundError:
                continue
            if _owner(aside) is not None:  # the other one was faster and this is its new claim: give it back
                os.rename(aside, path)
                return False
            aside.unlink()
            continue
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(content)
        return True
    return False


def release(path: Path) -> None:
    """Remove a claim made by this process."""
    path.unlink(missing_ok=True)


@contextmanager
def exclusive(path: Path, what: str) -> Iterator[None]:
    """Hold a claim for the length of the ``with`` block; raises :class:`StoreError` naming the live owner."""
    if not try_claim(path):
        raise StoreError(
            f"{what} is in use by {_owner(path) or 'another process'}; wait for it, choose another folder, "
            f"or delete {path} if that process no longer exists"
        )
    try:
        yield
    finally:
        release(path)
