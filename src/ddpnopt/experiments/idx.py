"""Read the IDX files in which MNIST and its relatives are published, and refuse damaged ones by name."""

import gzip
import hashlib
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_UNSIGNED_BYTE = 8  # the third byte of the file names the element type; image sets use this one


def read_idx(folder: Path, name: str, md5: str) -> NDArray[np.uint8]:
    """Read one IDX file of unsigned bytes, plain or gzip-compressed.

    Args:
        folder: where the file lies.
        name: file name without ``.gz``; the plain file is taken where both exist.
        md5: the published md5 of the *uncompressed* content, in hexadecimal. (Distributions recompress the
            files, so the sum of the compressed file means nothing.)

    Returns:
        The array in the shape its header states, for instance ``[60000, 28, 28]``.

    Raises:
        ValueError: the file is missing, cannot be unpacked, or is not the published one.
    """
    path = find(folder, name)
    if path is None:
        raise ValueError(f"no file {name} or {name}.gz in {folder}; put it there")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}); fetch it again") from error
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise ValueError(f"{path} is not the published file: md5 {found}, expected {md5}; fetch it again")
    return _decode(content, path)


def find(folder: Path, name: str) -> Path | None:
    """Return the path of ``name`` or ``name.gz`` in ``folder``, or None where neither is there."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _decode(content: bytes, path: Path) -> NDArray[np.uint8]:
    """Header (two zero bytes, element type, number of axes, big-endian lengths), then the elements."""
    axes = content[3] if len(content) > 3 else 0
    start = 4 + 4 * axes
    if content[:3] != bytes([0, 0, _UNSIGNED_BYTE]) or axes == 0 or len(content) < start:
        raise ValueError(f"{path} has no IDX header for unsigned bytes")
    shape = tuple(int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(axes))
    elements = np.frombuffer(content, np.uint8, offset=start)
    if elements.size != np.prod(shape):
        raise ValueError(f"{path} holds {elements.size} elements, but its header says {shape}")
    return elements.reshape(shape)
