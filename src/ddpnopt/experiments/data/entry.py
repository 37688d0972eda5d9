"""What a dataset is: its entry in the catalogue, what a reader returns, and what training gets."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray
from torch import Tensor

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
        samples: number of samples in the train, validation and test part.
        licence: as stated by whoever hands out the files, and by whom.
        read: reader; gets the folder the user named (or None).
        activation: ``"tanh"`` or ``"relu"``, in the dense network.
        width: units in each hidden layer of the dense network.
        model: network used unless the user names another.
        batch_size: samples per step unless the user says otherwise.
        epochs: passes over the train part unless the user says otherwise.
        by_channel: standardise each feature of a table, or each channel of a picture, by its own mean and
            deviation; otherwise one mean and one deviation serve all, which leaves rare pixels small.
    """

    title: str
    shape: tuple[int, ...]
    classes: int
    samples: tuple[int, int, int]
    licence: str
    read: Callable[[Path | None], Arrays]
    activation: str
    width: int
    model: ModelName
    batch_size: int
    epochs: int
    by_channel: bool


@dataclass(frozen=True)
class Text:
    """A text, from which whoever trains on it cuts samples: read the file.

    Attributes:
        title: the name people use.
        characters: how many it has.
        licence: as stated by whoever hands out the files, and by whom.
    """

    title: str
    characters: int
    licence: str


@dataclass(frozen=True)
class Dataset:
    """A dataset in memory: its entry in ``DATASETS`` and its three parts."""

    name: str
    source: Source
    train: Part
    validation: Part
    test: Part
