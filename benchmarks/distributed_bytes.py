"""Bytes and messages that a step over several ranks sends, beside plain data-parallel SGD; and what `local` costs.

    unshare -rn sh -c 'ip link set lo up && python benchmarks/distributed_bytes.py'

Writes docs/results/distributed_bytes.md. ``unshare`` gives the run a loopback of its own, so that what the kernel
counts there is this run's; without it the tables' last column holds what else the machine sends, too.
"""

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from _markdown import command, duration, save_page, table
from _training import RESULTS
from torch import Tensor, distributed, nn

from ddpnopt import Batch, DDPNOpt
from ddpnopt.experiments.data import load
from ddpnopt.experiments.environment import version
from ddpnopt.experiments.paper.networks import cnn, fcn
from ddpnopt.ranks import Ranks

BATCH = 32
CYCLE = 10
"""Steps after which the curvature's work repeats."""
RATES = (0.01, 0.1, 1.0)
TRAINED_ON = 4
"""Processes on which the local form is compared with the exact one."""
COUNTERS = Path("/proc/self/net/dev")


def mlp() -> nn.Module:
    """The dense network of docs/cost.md."""
    hidden = [nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(1024, 10))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MLP 784-1024-1024-1024-10": mlp,
    "the paper's CNN on 28 x 28": lambda: cnn((1, 28, 28), 10),
}


@dataclass(frozen=True)
class Arguments:
    """Bytes and messages of a step over several ranks, and how far the local form is from the exact one."""

    ranks: tuple[int, ...] = (2, 4, 8)
    """Numbers of processes."""

    steps: int = 100
    """Steps that are counted, the first: factors are exchanged at 29 of a hundred, later at one in ten."""

    training: int = 100
    """Steps of training that compare the local form with the exact one, on four processes."""

    out: Path = RESULTS
    """Folder of the page."""


@dataclass(frozen=True)
class Sent:
    """By one rank in one step, on average: payload in bytes, messages, and bytes on the loopback."""

    bytes: float
    messages: float
    wire: float


def _sgd(model: Any, ranks: Ranks, dtype: torch.dtype = torch.float32) -> torch.optim.Optimizer:
    """``dtype``: of what is sent; with float16 the hook does what torch's ``fp16_compress_hook`` does."""

    def hook(state: object, bucket: Any) -> torch.futures.Future[Tensor]:
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(ranks.sum(bucket.buffer().to(dtype).div_(ranks.size)).to(bucket.buffer().dtype))
        return done

    hook.__annotations__.pop("bucket")  # torch looks at it
    model.register_comm_hook(None, hook)
    return torch.optim.SGD(model.parameters(), 0.01)


def _ddpnopt(model: Any, ranks: Ranks, coupling: Batch | None = None) -> torch.optim.Optimizer:
    optimizer = DDPNOpt(model, coupling=coupling or Batch())
    optimizer.traffic = ranks.traffic
    return optimizer


METHODS: dict[str, Callable[[Any, Ranks], torch.optim.Optimizer]] = {
    "SGD": _sgd,
    "SGD, half precision": partial(_sgd, dtype=torch.float16),
    "DDPNOpt": _ddpnopt,
    "DDPNOpt, `rounded=False`": partial(_ddpnopt, coupling=Batch(rounded=False)),
    "DDPNOpt, `local=True`": partial(_ddpnopt, coupling=Batch(local=True)),
}


def on_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``function(rank, size, *arguments)`` gives on each of ``size`` processes of one gloo group."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        jobs = [context.Process(target=_run, args=(r, size, folder, function, arguments)) for r in range(size)]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()
        return [torch.load(Path(folder) / str(rank)) for rank in range(size)]


def _run(rank: int, size: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    torch.save(function(rank, size, *arguments), f"{folder}/{rank}")
    os._exit(0)


def _loopback() -> int:
    """Bytes that have been sent over the loopback since it is up; 0 where the system does not tell."""
    lines = COUNTERS.read_text().splitlines() if COUNTERS.exists() else []
    return next((int(line.split()[9]) for line in lines if line.strip().startswith("lo:")), 0)


def counted(rank: int, size: int, network: str, method: str, steps: int) -> tuple[int, int, int]:
    """Bytes and messages of this rank, bytes of all on the loopback, over some steps."""
    torch.manual_seed(0)
    model: Any = nn.parallel.DistributedDataParallel(NETWORKS[network]())
    ranks = Ranks(distributed.group.WORLD)
    optimizer, criterion = METHODS[method](model, ranks), nn.CrossEntropyLoss()
    torch.manual_seed(rank)

    def step() -> None:
        optimizer.zero_grad()
        criterion(model(torch.randn(BATCH, 1, 28, 28)), torch.randint(10, (BATCH,))).backward()
        optimizer.step()

    distributed.barrier()
    ranks.traffic.bytes = ranks.traffic.messages = 0
    before = _loopback()
    distributed.barrier()
    for _ in range(steps):
        step()
    distributed.barrier()
    return ranks.traffic.bytes, ranks.traffic.messages, _loopback() - before


def measure(size: int, network: str, method: str, steps: int) -> Sent:
    """Of the rank that sends most; the loopback's bytes are shared out evenly."""
    found = on_ranks(size, counted, network, method, steps)
    return Sent(max(one[0] for one in found) / steps, max(one[1] for one in found) / steps, found[0][2] / steps / size)


def trained(rank: int, size: int, lr: float, local: bool, steps: int) -> tuple[Tensor, float]:
    """The first step's update, and the training loss after all, of a dense network on DIGITS."""
    data = load("digits").train
    x, y = torch.as_tensor(data.x), torch.as_tensor(data.y)
    torch.manual_seed(0)
    model, criterion = fcn((64,), 32, 10, "tanh"), nn.CrossEntropyLoss()
    optimizer = DDPNOpt(model, lr, coupling=Batch(local=local), momentum=0.0)
    start = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    update = start
    for step in range(steps):
        picked = torch.randint(len(x), (BATCH * size,), generator=torch.Generator().manual_seed(step))
        own = picked.tensor_split(size)[rank]
        optimizer.zero_grad()
        criterion(model(x[own].flatten(1)), y[own]).backward()
        optimizer.step()
        if not step:
            update = torch.nn.utils.parameters_to_vector(model.parameters()).detach() - start
    with torch.no_grad():
        return update, float(criterion(model(x.flatten(1)), y))


def traffic_rows(given: Arguments) -> list[list[str]]:
    """A row per network, number of ranks and method."""
    rows = []
    for network in NETWORKS:
        for size in given.ranks:
            of = {method: measure(size, network, method, given.steps) for method in METHODS}
            for method, one in of.items():
                against = f"{one.bytes / of['SGD'].bytes:.2f}"
                numbers = [f"{one.bytes / 1e3:,.0f}", against, f"{one.messages:.0f}", f"{one.wire / 1e3:,.0f}"]
                rows.append([network, str(size), method, *numbers])
    return rows


def local_rows(given: Arguments) -> list[list[str]]:
    """A row per learning rate."""
    size, rows = TRAINED_ON, []
    for lr in RATES:
        (exact, loss), (local, other) = (on_ranks(size, trained, lr, form, given.training)[0] for form in (False, True))
        apart = float((local - exact).norm() / exact.norm())
        rows.append([f"{lr:g}", f"{100 * apart:.1f} %", f"{loss:.4f}", f"{other:.4f}"])
    return rows


def main(words: Sequence[str] | None = None) -> int:
    """Count, train, write the page; returns the exit code."""
    given = tyro.cli(Arguments, args=words)
    began = time.perf_counter()
    traffic = table(
        ["network", "ranks", "method", "kB sent", "over SGD's", "messages", "kB on the loopback"], traffic_rows(given)
    )
    local = table(["lr", "first updates apart", "training loss, exact", "`local`"], local_rows(given))
    page = f"""# What a step over several ranks sends

Per rank and step, {BATCH} samples per rank, float32, gloo, the model in `DistributedDataParallel`, the default
curvature and momentum; means over the first {given.steps} steps, in which factors are exchanged most often. *kB sent*
is payload as counted in `ddpnopt/ranks.py`, where it is handed to torch's collectives, by the ring these run; SGD's is
that of the wrapper's own average of the gradients, counted in the same way, and again with the gradients sent in half
precision, as torch's `fp16_compress_hook` does. *Messages* counts every hop of the ring. The last column is what the
kernel counted on the loopback, shared out over the ranks: headers, acknowledgements and gloo's own words are in it.

{traffic}

By default convolutions' per-sample gradients go out in 18 bits, `Batch(rounded=False)` sends them whole: what that
costs is in [distributed_rounding.md](distributed_rounding.md). The half precision of SGD's gradients is that of its
update. [distributed.md](../distributed.md) says what is sent.

## How far `Batch(local=True)` is from the exact step

DIGITS, the paper's dense network of width 32, {TRAINED_ON} ranks, {BATCH} samples each, {given.training} steps,
one seed: the distance between the two forms' first updates over the length of the exact one's, and the loss over all
training samples at the end.

{local}

Command: `{command("distributed_bytes.py", given, ("ranks", "steps", "training"))}`, in a network namespace of its own
({duration(time.perf_counter() - began)}), ddpnopt {version("ddpnopt")}, torch {torch.__version__}.
"""
    save_page(given.out, "distributed_bytes", page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
