"""Small files in the published formats, for the tests of the datasets."""

import hashlib

import numpy as np
from numpy.typing import NDArray

from ddpnopt.experiments.data import formats
from ddpnopt.experiments.data.packages import Package
from ddpnopt.experiments.data.published import File, FileSet

NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx(array: NDArray[np.uint8]) -> bytes:
    lengths = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return bytes([0, 0, 8, array.ndim]) + lengths + array.tobytes()


def idx_contents() -> dict[str, bytes]:
    """12 + 4 pictures of 2 x 2 pixels and their labels."""
    random = np.random.RandomState(0)
    arrays = [random.randint(0, 256, shape).astype(np.uint8) for shape in ((12, 2, 2), (12,), (4, 2, 2), (4,))]
    return {name: idx(array) for name, array in zip(NAMES, arrays, strict=True)}


def file_set(key: str, package: Package | None = None) -> FileSet:
    """The set of these pictures, the last 5 of its 12 held out."""
    files = tuple(
        File(name, hashlib.md5(content, usedforsecurity=False).hexdigest()) for name, content in idx_contents().items()
    )
    return FileSet(key, files, formats.idx_parts, package, held_out=5)
