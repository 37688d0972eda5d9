"""The datasets: one entry of ``DATASETS`` each, and one function that loads any of them.

Every set comes back in three parts, train, validation and test, split once and for all (the split does not
depend on a run's seed), and standardised with the statistics of the *train* part only. To add a set, write a
reader (a function from an optional folder to :class:`Arrays`) and one :class:`Source`.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpnopt.experiments.idx import find, read_idx

SPLIT_SEED = 20210503  # of the fixed stratified split; never the seed of a run
FOLDER_VARIABLE = "DDPNOPT_DATA"

ModelName = Literal["fcn", "cnn"]
Labelled = tuple[NDArray[Any], NDArray[Any]]


@dataclass(frozen=True)
class Arrays:
    """What a reader returns: raw inputs ``[N, *shape]`` and integer labels ``[N]`` of each part."""

    train: Labelled
    validation: Labelled
    test: Labelled


@dataclass(frozen=True)
class Part:
    """Samples ready for training.

    Attributes:
        x: inputs, float32 ``[N, *shape]``, standardised.
        y: class numbers, int64 ``[N]``.
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Source:
    """One dataset: where it comes from, what it looks like, and the settings it is trained with by default.

    Attributes:
        title: the name people use.
        shape: shape of one input: ``(features,)`` or ``(channels, height, width)``.
        classes: number of classes.
        read: reader; gets the folder the user named (or None).
        activation: ``"tanh"`` or ``"relu"``, in the dense network.
        width: units in each hidden layer of the dense network.
        model: network used unless the user names another.
        batch_size: samples per step unless the user says otherwise.
        epochs: passes over the train part unless the user says otherwise.
        by_feature: standardise each feature by its own mean and deviation (tables); pictures have one mean
            and one deviation for all pixels, which leaves rare pixels small.
    """

    title: str
    shape: tuple[int, ...]
    classes: int
    read: Callable[[Path | None], Arrays]
    activation: str
    width: int
    model: ModelName
    batch_size: int
    epochs: int
    by_feature: bool


@dataclass(frozen=True)
class Dataset:
    """A dataset in memory: its entry in ``DATASETS`` and its three parts."""

    name: str
    source: Source
    train: Part
    validation: Part
    test: Part


def source(name: str) -> Source:
    """Return the entry called ``name`` (lower case)."""
    if name not in DATASETS:
        raise ValueError(f"unknown dataset {name!r}; choose one of: {', '.join(DATASETS)}")
    return DATASETS[name]


def load(name: str, folder: Path | None = None) -> Dataset:
    """Load a dataset.

    Args:
        name: a key of ``DATASETS``.
        folder: where the files of a set that is not bundled lie; None (default) looks into the folder named
            by the environment variable DDPNOPT_DATA, then where a system package would put them.
    """
    entry = source(name)
    arrays = entry.read(folder)
    x = arrays.train[0]
    mean, deviation = _statistics(x, entry.by_feature)
    return Dataset(
        name,
        entry,
        *(_part(part, entry.shape, mean, deviation) for part in (arrays.train, arrays.validation, arrays.test)),
    )


def split(y: NDArray[Any], seed: int = SPLIT_SEED) -> tuple[NDArray[np.int64], ...]:
    """Split rows 70/10/20 within each class.

    Args:
        y: class numbers ``[N]``.
        seed: of the shuffle; the frozen ``RandomState`` stream, hence the same on every machine.

    Returns:
        Row numbers of train, validation and test, each ascending.
    """
    random = np.random.RandomState(seed)
    parts: tuple[list[NDArray[np.int64]], ...] = ([], [], [])
    for label in np.unique(y):
        rows = random.permutation(np.flatnonzero(y == label))
        test, validation = round(0.2 * len(rows)), round(0.1 * len(rows))
        for part, chosen in zip(parts, np.split(rows, [len(rows) - test - validation, len(rows) - test]), strict=True):
            part.append(chosen)
    return tuple(np.sort(np.concatenate(part)) for part in parts)


def _statistics(x: NDArray[Any], by_feature: bool) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    axes = 0 if by_feature else None
    mean = np.asarray(x.mean(axes, dtype=np.float64))
    deviation = np.asarray(x.std(axes, dtype=np.float64))
    return mean, np.where(deviation > 0, deviation, 1.0)  # a constant feature becomes 0, not NaN


def _part(part: Labelled, shape: tuple[int, ...], mean: NDArray[np.float64], deviation: NDArray[np.float64]) -> Part:
    x, y = part
    standardised = (x.astype(np.float32) - mean.astype(np.float32)) / deviation.astype(np.float32)
    return Part(torch.from_numpy(standardised.reshape(len(x), *shape)), torch.from_numpy(y.astype(np.int64)))


def _bundled(name: str, _folder: Path | None) -> Arrays:
    """A table that scikit-learn ships, split 70/10/20."""
    from sklearn import datasets  # slow to import, and not needed for the other sets

    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    train, validation, test = split(y)
    return Arrays((x[train], y[train]), (x[validation], y[validation]), (x[test], y[test]))


@dataclass(frozen=True)
class IdxFiles:
    """A set published as four IDX files with a standard train/test split.

    The last 5,000 training samples are the validation part.

    Attributes:
        key: name of the set's own folder.
        md5: of the uncompressed train images, train labels, test images, test labels.
        system: folder in which a system package puts the files.
        package: what to install to get them there.
    """

    key: str
    md5: tuple[str, str, str, str]
    system: Path
    package: str
    held_out: int = 5000

    def __call__(self, folder: Path | None) -> Arrays:
        """Read and check the four files; ``folder`` None looks where :func:`load` says."""
        home = self._home(folder)
        x, y, test_x, test_y = (read_idx(home, name, md5) for name, md5 in zip(_IDX_NAMES, self.md5, strict=True))
        cut = len(y) - self.held_out
        return Arrays((x[:cut], y[:cut]), (x[cut:], y[cut:]), (test_x, test_y))

    def _home(self, folder: Path | None) -> Path:
        named = folder or (Path(os.environ[FOLDER_VARIABLE]) if os.environ.get(FOLDER_VARIABLE) else None)
        places = [self.system] if named is None else [named / self.key, named]
        for place in places:
            if find(place, _IDX_NAMES[0]):
                return place
        raise ValueError(
            f"{self.key} is not in {places[-1]}; install the Debian package {self.package}, or name by "
            f"--data or {FOLDER_VARIABLE} the folder with {_IDX_NAMES[0]}[.gz] and its three fellows"
        )


_IDX_NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)

# Width and activation of the dense network are the paper's, batch sizes within its range. The paper does not
# state its splits of WINE and DIGITS, nor the number of epochs.
_WINE = Source(
    title="WINE",
    shape=(13,),
    classes=3,
    read=partial(_bundled, "wine"),
    activation="tanh",
    width=16,
    model="fcn",
    batch_size=16,
    epochs=20,
    by_feature=True,
)
_IRIS = replace(_WINE, title="IRIS", shape=(4,), read=partial(_bundled, "iris"))
_DIGITS = Source(
    title="DIGITS",
    shape=(64,),
    classes=10,
    read=partial(_bundled, "digits"),
    activation="tanh",
    width=32,
    model="fcn",
    batch_size=16,
    epochs=5,
    by_feature=False,
)
_FASHION_MNIST = Source(
    title="Fashion-MNIST",
    shape=(1, 28, 28),
    classes=10,
    read=IdxFiles(
        key="fashion-mnist",
        md5=(
            "f4a8712d7a061bf5bd6d2ca38dc4d50a",
            "9018921c3c673c538a1fc5bad174d6f9",
            "8181f5470baa50b63fa0f6fddb340f0a",
            "15d484375f8d13e6eb1aabb0c3f46965",
        ),
        system=Path("/usr/share/datasets/fashion-mnist"),
        package="dataset-fashion-mnist",
    ),
    activation="relu",
    width=32,
    model="fcn",
    batch_size=128,
    epochs=1,
    by_feature=False,
)
DATASETS: Mapping[str, Source] = {
    "wine": _WINE,
    "iris": _IRIS,
    "digits": _DIGITS,
    "digits-images": replace(_DIGITS, title="DIGITS as 8x8 pictures", shape=(1, 8, 8), model="cnn"),
    "fashion-mnist": _FASHION_MNIST,
}
