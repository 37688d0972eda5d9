"""Every kind of task, and how a task is made."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from ddpnopt.experiments.environment import code
from ddpnopt.experiments.paper import training
from ddpnopt.experiments.study.task import Kind, Task

KINDS: Mapping[str, Kind] = {
    "train": Kind(training.run, modules=("paper/training", "paper/methods", "paper/problems", "paper/networks")),
}


def task(kind: str, settings: Mapping[str, Any]) -> Task:
    """Make a task; changed source of what decides its figures gives it another key."""
    return Task(kind, settings, _fingerprint(kind))


@lru_cache
def _fingerprint(kind: str) -> str:
    return f"{code(KINDS[kind].modules)} torch {torch.__version__}"
