"""What Fig. 3 is measured on: three networks, the methods and the batch sizes of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ddpnopt.experiments.paper.cost import DENSE

BATCHES = (8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Group:
    """What is measured on one network.

    Attributes:
        words: the network in words.
        short: the same in few, for a picture.
        network: as a case has it.
        timed, remembered: methods of which time and memory are measured; dense DDP as far as its limit lets it.
        batches, quick_batches: batch sizes.
        turns, quick_turns: timed blocks of each method.
        repeats: of the memory's measurement; a quick run makes one.
    """

    words: str
    short: str
    network: str | Sequence[int]
    timed: Sequence[str]
    remembered: Sequence[str]
    batches: Sequence[int]
    quick_batches: Sequence[int]
    turns: int
    quick_turns: int
    repeats: int


_MAIN = ("adam", "ekfac", "share-ekfac", "batch", "emsa")
GROUPS: Mapping[str, Group] = {
    "fcn": Group(
        "dense network 784-32-32-32-32-10, ReLU (MNIST's shape)",
        "dense network 784-32-32-32-32-10",
        (784, 32, 5),
        (*_MAIN, "share-rmsprop", "share-sgd", "vanilla"),
        _MAIN,
        BATCHES,
        (8, 32, 128),
        turns=5,
        quick_turns=5,
        repeats=1,
    ),
    "cnn": Group(
        "four convolutions of 32 channels and two dense layers (MNIST's shape)",
        "four convolutions of 32 channels",
        "cnn",
        (*_MAIN, "share-sgd"),
        ("adam", "ekfac", "share-ekfac", "batch"),
        (8, 32, 128),  # the others would take a quarter of an hour
        (32,),
        turns=3,
        quick_turns=2,
        repeats=1,
    ),
    "digits": Group(
        "dense network 64-32-32-32-32-10, ReLU (DIGITS' shape)",
        "dense network 64-32-32-32-32-10",
        (64, 32, 5),
        ("adam", "ekfac", "share-ekfac", "batch", "vanilla", DENSE),
        ("adam", "share-ekfac", "batch", "vanilla", DENSE),
        (8, 16, 32, 64, 128),
        (8, 32),
        turns=5,
        quick_turns=3,
        repeats=1,
    ),
}
