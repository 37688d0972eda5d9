"""Every kind of task, and how a task is made."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from ddpnopt.experiments.environment import code
from ddpnopt.experiments.paper import cost, policy, training, vanishing
from ddpnopt.experiments.study.task import Kind, Task

_DATA = ("data/bundled", "data/entry", "data/formats", "data/loading", "data/published")
_TRAINING = (*_DATA, "job", "team", "train", "paper/training", "paper/methods", "paper/problems", "paper/networks")
_COST = ("job", "team", "paper/cost", "paper/methods", "paper/networks")
KINDS: Mapping[str, Kind] = {
    "train": Kind(training.run, modules=_TRAINING),
    "time": Kind(cost.run_time, modules=_COST, alone=True),
    "memory": Kind(cost.run_memory, modules=_COST, alone=True),
    "policy": Kind(policy.run, modules=(*_TRAINING, "paper/policy")),
    "vanishing": Kind(vanishing.run, modules=(*_TRAINING, "paper/vanishing", "paper/losses", "paper/regulariser")),
}


def task(kind: str, settings: Mapping[str, Any]) -> Task:
    """Make a task; changed source of what decides its figures gives it another key."""
    return Task(kind, settings, _fingerprint(kind))


@lru_cache
def _fingerprint(kind: str) -> str:
    return f"{code(KINDS[kind].modules)} torch {torch.__version__}"
