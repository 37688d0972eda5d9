"""Bytes and messages that a step sends, per rank: DDPNOpt beside plain data-parallel SGD, on gloo.

    unshare -rn sh -c 'ip link set lo up && python benchmarks/distributed_bytes.py'

Writes docs/results/distributed_bytes.md. ``unshare`` gives the run a loopback of its own, so that what the kernel counts
there is this run's; without it the page's last column holds what else the machine sends, too.
"""

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from _training import RESULTS
from torch import Tensor, distributed, nn

from ddpnopt import DDPNOpt
from ddpnopt.experiments.paper.networks import cnn
from ddpnopt.ranks import Ranks

BATCH = 32
CYCLE = 10
"""Steps after which the curvature's work repeats."""
SENT = Path("/sys/class/net/lo/statistics/tx_bytes")


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024),
        nn.ReLU(), nn.Linear(1024, 10),
    )  # fmt: skip


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MLP 784-1024-1024-1024-10": mlp,
    "the paper's CNN": lambda: cnn((1, 28, 28), 10),
}


@dataclass(frozen=True)
class Arguments:
    """Bytes and messages of a step over several ranks."""

    ranks: tuple[int, ...] = (2, 4)
    """Numbers of processes."""

    steps: int = 2 * CYCLE
    """Steps that are counted, a multiple of ten: factors are exchanged at one in ten."""

    out: Path = RESULTS
    """Folder of the page."""


@dataclass(frozen=True)
class Sent:
    """By one rank in one step, on average: payload in bytes, messages, and bytes on the loopback."""

    bytes: float
    messages: float
    wire: float


def _sgd(model: Any, ranks: Ranks) -> torch.optim.Optimizer:
    def hook(state: object, bucket: Any) -> torch.futures.Future[Tensor]:
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(ranks.sum(bucket.buffer()) / ranks.size)
        return done

    hook.__annotations__.pop("bucket")
    model.register_comm_hook(None, hook)
    return torch.optim.SGD(model.parameters(), 0.01)


def _ddpnopt(model: Any, ranks: Ranks) -> torch.optim.Optimizer:
    optimizer = DDPNOpt(model)
    optimizer.traffic = ranks.traffic
    return optimizer


METHODS: dict[str, Callable[[Any, Ranks], torch.optim.Optimizer]] = {"SGD": _sgd, "DDPNOpt": _ddpnopt}


def _run(rank: int, size: int, folder: str, network: str, method: str, steps: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    torch.manual_seed(0)
    model: Any = nn.parallel.DistributedDataParallel(NETWORKS[network]())
    ranks = Ranks(distributed.group.WORLD)
    optimizer, criterion = METHODS[method](model, ranks), nn.CrossEntropyLoss()
    torch.manual_seed(rank)

    def step() -> None:
        optimizer.zero_grad()
        criterion(model(torch.randn(BATCH, 1, 28, 28)), torch.randint(10, (BATCH,))).backward()
        optimizer.step()

    for _ in range(CYCLE):
        step()
    distributed.barrier()
    ranks.traffic.bytes = ranks.traffic.messages = 0
    before = int(SENT.read_text()) if SENT.exists() else 0
    distributed.barrier()
    for _ in range(steps):
        step()
    distributed.barrier()
    wire = (int(SENT.read_text()) if SENT.exists() else 0) - before
    torch.save((ranks.traffic.bytes, ranks.traffic.messages, wire), f"{folder}/{rank}")
    os._exit(0)


def measure(size: int, network: str, method: str, steps: int) -> Sent:
    """Of the rank that sends most; the loopback's bytes are shared out evenly."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        jobs = [context.Process(target=_run, args=(r, size, folder, network, method, steps)) for r in range(size)]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()
        found = [torch.load(Path(folder) / str(rank)) for rank in range(size)]
    most = [max(one[i] for one in found) / steps for i in range(2)]
    return Sent(most[0], most[1], found[0][2] / steps / size)


def main(given: Arguments) -> None:
    rows = []
    for network in NETWORKS:
        for size in given.ranks:
            sgd = measure(size, network, "SGD", given.steps)
            for method in METHODS:
                one = sgd if method == "SGD" else measure(size, network, method, given.steps)
                print(network, size, method, one, one.bytes / sgd.bytes, flush=True)
                rows.append([network, str(size), method, f"{one.bytes / 1e3:,.0f}", f"{one.bytes / sgd.bytes:.2f}",
                             f"{one.messages:.0f}", f"{one.wire / 1e3:,.0f}"])  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Arguments))
