"""Names of processes that tell whether one of this machine is still there."""

import os
import uuid
from functools import lru_cache
from hashlib import sha256
from pathlib import Path


def own() -> str:
    """Name of this process, unlike that of any other on any machine at any time."""
    return f"{_place()}:{os.getpid()}:{_birth(os.getpid())}"


def gone(name: str) -> bool:
    """Whether the named process is known to have ended; False where nothing is known, as for other machines."""
    place, number, birth = name.split(":")
    return place == _place() and str(_birth(int(number))) != birth


@lru_cache
def _place() -> str:
    """Digest of what process numbers are unique in: this start of the machine and, within it, this container."""
    try:
        start = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    except OSError:  # no Linux: a place of its own for every process, so that only leases tell
        start = uuid.uuid4().hex
    return sha256(start.encode()).hexdigest()[:12]


def _birth(number: int) -> int | None:
    """Start time of a process in ticks since the machine's: numbers are given again; None if it has ended."""
    try:
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
