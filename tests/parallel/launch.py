"""Run a function on several processes of one gloo group, which meet in a file: no port is taken."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

TIMEOUT = 20.0
"""Seconds until gloo gives a silent rank up."""


def launch(size: int, function: Callable[..., Any], *arguments: Any, timeout: float = TIMEOUT) -> list[Any]:
    """What ``function(rank, size, *arguments)`` returns on each of ``size`` ranks; ``None`` of one that ended early.

    The result is saved by ``torch.save``; an exception is raised here again, as text.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed.checkpoint", "ddpnopt"])  # imported once for all
    with tempfile.TemporaryDirectory() as folder:
        jobs = [
            context.Process(target=_run, args=(rank, size, folder, timeout, function, arguments))
            for rank in range(size)
        ]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()
        return [_read(Path(folder) / str(rank)) for rank in range(size)]


def _run(
    rank: int, size: int, folder: str, timeout: float, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
    )
    try:
        found = function(rank, size, *arguments)
    except BaseException:
        found = RuntimeError(traceback.format_exc())
    torch.save(found, f"{folder}/{rank}")
    os._exit(0)  # a group whose members are dead is not worth waiting for


def _read(path: Path) -> Any:
    found = torch.load(path, weights_only=False) if path.exists() else None
    if isinstance(found, RuntimeError):
        raise found
    return found
