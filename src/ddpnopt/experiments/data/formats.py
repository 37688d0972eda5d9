"""The formats in which the pictures are published: pure functions from a file's content to arrays."""

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ddpnopt.experiments.data.entry import Labelled

Bytes = NDArray[np.uint8]

_UNSIGNED_BYTE = 8  # the third byte of an IDX file names the element type; picture sets use this one
PICTURE = (3, 32, 32)  # of CIFAR and SVHN
PIXELS = 3 * 32 * 32


def idx(content: bytes) -> Bytes:
    """Decode an IDX file of unsigned bytes, the format of MNIST and its relatives.

    Two zero bytes, the element type, the number of axes, the lengths (four bytes each, big-endian), the elements.

    Returns:
        The array in the shape its header states, for instance ``[60000, 28, 28]``.
    """
    axes = content[3] if len(content) > 3 else 0
    start = 4 + 4 * axes
    if content[:3] != bytes([0, 0, _UNSIGNED_BYTE]) or axes == 0 or len(content) < start:
        raise ValueError("no IDX header for unsigned bytes")
    shape = tuple(int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(axes))
    elements = np.frombuffer(content, np.uint8, offset=start)
    if elements.size != np.prod(shape):
        raise ValueError(f"{elements.size} elements, but the header says {shape}")
    return elements.reshape(shape)


def idx_parts(contents: Sequence[bytes]) -> tuple[Labelled, Labelled]:
    """Train and test part from four IDX files: train pictures, train labels, test pictures, test labels."""
    x, y, test_x, test_y = map(idx, contents)
    return (x, y), (test_x, test_y)


def cifar(content: bytes, label_bytes: int) -> Labelled:
    """Decode a file of CIFAR's binary version: records of labels and 3 x 32 x 32 pixels, channel by channel.

    Args:
        content: of the file.
        label_bytes: 1 for CIFAR-10; 2 for CIFAR-100, whose first label, of the 20 coarse classes, is left out.

    Returns:
        Pictures ``[N, 3, 32, 32]`` and class numbers ``[N]``.
    """
    length = label_bytes + PIXELS
    if len(content) % length:
        raise ValueError(f"{len(content)} bytes are not whole records of {length}")
    records = np.frombuffer(content, np.uint8).reshape(-1, length)
    return records[:, label_bytes:].reshape(-1, *PICTURE), records[:, label_bytes - 1]


def cifar10_parts(contents: Sequence[bytes]) -> tuple[Labelled, Labelled]:
    """Train and test part of CIFAR-10 from its six files, the test file last."""
    *train, test = (cifar(content, label_bytes=1) for content in contents)
    return (np.concatenate([x for x, _ in train]), np.concatenate([y for _, y in train])), test


def cifar100_parts(contents: Sequence[bytes]) -> tuple[Labelled, Labelled]:
    """Train and test part of CIFAR-100 (100 fine classes) from its two files."""
    train, test = (cifar(content, label_bytes=2) for content in contents)
    return train, test


def svhn(content: bytes) -> Labelled:
    """Decode a file of SVHN's cropped digits, a MATLAB 5 file with X ``[32, 32, 3, N]`` and y ``[N, 1]``.

    Returns:
        Pictures ``[N, 3, 32, 32]`` and digits ``[N]``; the file calls the digit 0 10.
    """
    from scipy.io import loadmat  # slow to import, and not needed for the other sets

    found = loadmat(io.BytesIO(content), variable_names=["X", "y"])
    return np.ascontiguousarray(found["X"].transpose(3, 2, 0, 1)), found["y"].reshape(-1) % 10


def svhn_parts(contents: Sequence[bytes]) -> tuple[Labelled, Labelled]:
    """Train and test part of SVHN from its two files."""
    train, test = map(svhn, contents)
    return train, test


def text_parts(_contents: Sequence[bytes]) -> tuple[Labelled, Labelled]:
    """Refuse: a text is not cut into samples with labels."""
    raise ValueError("a text has no samples of its own: read the file, as examples/char_transformer.py does")
