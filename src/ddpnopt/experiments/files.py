"""The files of a run folder: written so that a kill at any moment leaves a folder that can be continued.

``config.json`` and ``environment.json`` are written once; ``metrics.jsonl`` only grows, and is cut back to
the checkpoint when the run continues; ``checkpoint.pt`` and ``result.json`` appear whole or not at all.
"""

import io
import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ddpnopt.experiments.study import identity

CONFIG, ENVIRONMENT, METRICS = "config.json", "environment.json", "metrics.jsonl"
CHECKPOINT, RESULT = "checkpoint.pt", "result.json"


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file by new content; after a crash it holds the old content or the new, never a part.

    Several processes may write the same file: the last one's content stands. What one that was killed on this machine
    left half written beside the file is deleted.
    """
    writer = identity.own().replace(":", "-")  # another process's file is not to be cut off or moved
    temporary = path.with_name(f"{path.name}.{writer}.tmp")
    _sweep(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the new name is safe only once its folder is on disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _sweep(path: Path) -> None:
    """Delete what processes that have ended left of :func:`write_atomic` on this file."""
    start, end = f"{path.name}.", ".tmp"
    for left in path.parent.iterdir():
        if left.name.startswith(start) and left.name.endswith(end):
            writer = left.name.removeprefix(start).removesuffix(end).split("-")
            if len(writer) == 3 and identity.gone(":".join(writer)):
                left.unlink(missing_ok=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write strict JSON (no NaN) atomically."""
    write_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; a missing or damaged file is refused by name."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path.parent} is not a run folder: it has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete the folder and start the run again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged (not a JSON object); delete the folder and start the run again")
    return value


def save_checkpoint(path: Path, payload: Mapping[str, Any]) -> None:
    """Write tensors and plain values atomically; loads with ``weights_only=True``."""
    buffer = io.BytesIO()
    torch.save(dict(payload), buffer)
    write_atomic(path, buffer.getvalue())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; one that is torn, altered or not ours is refused by name."""
    advice = "delete it to start the run from the beginning, or restore it from a copy"
    try:
        with zipfile.ZipFile(path) as archive:  # checks the sum of every entry, which torch.load does not
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"checksum of {damaged} is wrong")
        payload = torch.load(path, weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is damaged ({error}); {advice}") from error
    missing = {"config", "step", "seconds", "pending", "metrics_size", "random", "model", "optimizer"}
    if not isinstance(payload, dict) or missing - set(payload):
        raise ValueError(f"{path} is not a checkpoint of a run; {advice}")
    return payload


class Metrics:
    """The open ``metrics.jsonl`` of a run: one JSON object a line, appended.

    Args:
        path: the file.
        size: keep this many bytes of what is there (what the checkpoint knows of) and drop the rest.
    """

    def __init__(self, path: Path, size: int = 0) -> None:
        if size:
            read_metrics(path, size)
        self._file: BinaryIO = path.open("r+b" if size else "wb")
        self._file.truncate(size)
        self._file.seek(size)

    def append(self, **values: str | float | None) -> None:
        """Write one line; it can be followed from outside at once."""
        self._file.write((json.dumps(values, allow_nan=False) + "\n").encode())
        self._file.flush()

    def sync(self) -> int:
        """Bring everything to disk; returns the size in bytes, for the checkpoint."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path, size: int | None = None) -> list[dict[str, Any]]:
    """Read the lines of ``metrics.jsonl``, or its first ``size`` bytes; damage is refused by name."""
    try:
        content = path.read_bytes()
        if size is not None and len(content) < size:
            raise ValueError(f"{len(content)} bytes where the checkpoint knows of {size}")
        return [json.loads(line) for line in content[:size].splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete {CHECKPOINT} to start the run again") from error
