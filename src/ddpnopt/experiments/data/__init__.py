"""The datasets: one entry of ``DATASETS`` each, and one function that loads any of them.

Every set comes back in three parts, train, validation and test, split once and for all (the split does not
depend on a run's seed), and standardised with the statistics of the *train* part only.
"""

from ddpnopt.experiments.data.bundled import SPLIT_SEED, split
from ddpnopt.experiments.data.catalogue import DATASETS, source
from ddpnopt.experiments.data.entry import Arrays, Dataset, Labelled, ModelName, Part, Source
from ddpnopt.experiments.data.loading import load
from ddpnopt.experiments.data.places import FOLDER_VARIABLE, cache

__all__ = [
    "DATASETS",
    "FOLDER_VARIABLE",
    "SPLIT_SEED",
    "Arrays",
    "Dataset",
    "Labelled",
    "ModelName",
    "Part",
    "Source",
    "cache",
    "load",
    "source",
    "split",
]
