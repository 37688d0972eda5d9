"""From a dataset's name to its three parts, standardised with the statistics of the train part only."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ddpnopt.experiments.data.catalogue import source
from ddpnopt.experiments.data.entry import Dataset, Labelled, Part


def load(name: str, folder: Path | None = None) -> Dataset:
    """Load a dataset.

    Args:
        name: a key of ``DATASETS``.
        folder: where the files of a set that is not bundled lie, there or in a folder named after the set; None
            (default) looks into the cache (see :func:`ddpnopt.experiments.data.cache`), then where a system
            package would put them.
    """
    entry = source(name)
    arrays = entry.read(folder)
    mean, deviation = statistics(arrays.train[0], entry.by_channel)
    return Dataset(
        name,
        entry,
        *(_part(part, entry.shape, mean, deviation) for part in (arrays.train, arrays.validation, arrays.test)),
    )


def statistics(x: NDArray[Any], by_channel: bool) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and deviation of ``x`` ``[N, ...]``, in a shape that broadcasts against it.

    Args:
        x: samples ``[N, C, ...]``.
        by_channel: one value for each index of axis 1; otherwise one for all.
    """
    parts = [x[:, channel] for channel in range(x.shape[1])] if by_channel else [x]
    shape = (-1, *(1,) * (x.ndim - 2))  # one axis at a time: over several, NumPy's deviation is ten times slower
    mean = np.array([part.mean(dtype=np.float64) for part in parts]).reshape(shape)
    deviation = np.array([part.std(dtype=np.float64) for part in parts]).reshape(shape)
    return mean, np.where(deviation > 0, deviation, 1.0)  # a constant feature becomes 0, not NaN


def _part(part: Labelled, shape: tuple[int, ...], mean: NDArray[np.float64], deviation: NDArray[np.float64]) -> Part:
    x, y = part
    standardised = x.astype(np.float32)  # a copy, changed in place: the colour sets take 0.6 GB
    standardised -= mean.astype(np.float32)
    standardised /= deviation.astype(np.float32)
    return Part(torch.from_numpy(standardised.reshape(len(x), *shape)), torch.from_numpy(y.astype(np.int64)))
