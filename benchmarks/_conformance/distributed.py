"""Probe of data-parallel training: two processes with half the batch each against one process with all of it."""

import multiprocessing
import tempfile
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor, distributed, nn

from .methods import Method
from .probing import demand, probe, run, same
from .problems import Problem, mlp


@probe("DistributedDataParallel, 2 processes", torch.float64)
def data_parallel(method: Method) -> str:
    """The loop runs through `DistributedDataParallel(model)`, on gloo, and the optimizer is made for `model`: after
    three steps both processes have the same weights, and they are those of one process with the whole batch.
    """
    problem = mlp()
    start, whole, other = problem.weights(), problem.copy(), problem.reversed()
    with tempfile.TemporaryDirectory() as folder:
        first, second = _ranks(method, problem, Path(folder) / "store")
    alone, reordered = run(method.make(whole.model), whole), run(method.make(other.model), other)
    same(first, second, start, "the processes drift apart")
    same(alone, first, start, "not those of one process", reordered)
    return ""


def _ranks(method: Method, problem: Problem, store: Path) -> list[Tensor]:
    """The weights that each of two processes ends with."""
    context = multiprocessing.get_context("fork")
    receivers, processes = [], []
    for rank in range(2):
        receiver, sender = context.Pipe(duplex=False)
        half = problem.halves()[rank]
        process = context.Process(target=_rank, args=(sender, method, replace(half, last=_whole), rank, store))
        process.start()
        sender.close()
        receivers.append(receiver)
        processes.append(process)
    try:
        found = [receiver.recv() for receiver in receivers]
    finally:
        for process in processes:
            process.kill()
            process.join()
    for answer in found:
        demand(not isinstance(answer, str), str(answer))
    return [torch.tensor(answer, dtype=torch.float64) for answer in found]


def _whole(loss: Tensor) -> Tensor:
    return loss  # DistributedDataParallel takes the mean over processes itself


def _rank(sender: Connection, method: Method, problem: Problem, rank: int, store: Path) -> None:
    try:
        distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
        trainer = method.make(problem.model)
        wrapped = nn.parallel.DistributedDataParallel(problem.model)
        sender.send(run(trainer, replace(problem, model=wrapped)).tolist())
    except Exception as error:
        sender.send(f"{type(error).__name__}: {error}")
