"""What a rank holds and sends when the model is sharded by ``fully_shard``, beside AdamW and the unsharded form.

    unshare -rn sh -c 'ip link set lo up && python benchmarks/sharded.py'

Writes docs/results/sharded.md. ``unshare`` gives the run a loopback of its own, so that what the kernel counts there is
this run's; without it the table's last column holds what else the machine sends, too.
"""

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from _markdown import command, duration, save_page, table
from _training import RESULTS
from distributed_bytes import BATCH, CYCLE, NETWORKS, _loopback, on_ranks
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ddpnopt import DDPNOpt
from ddpnopt.experiments.environment import version


def _sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for layer in [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _adamw(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    return _sharded(model), torch.optim.AdamW(model.parameters(), 1e-3)


def _whole(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    wrapper = nn.parallel.DistributedDataParallel(model)
    return wrapper, DDPNOpt(wrapper, momentum=0.9)


def _cut(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    return _sharded(model), DDPNOpt(model, momentum=0.9)


METHODS: dict[str, Callable[[nn.Module], tuple[nn.Module, torch.optim.Optimizer]]] = {
    "AdamW, sharded": _adamw,
    "DDPNOpt, whole": _whole,
    "DDPNOpt, sharded": _cut,
}


@dataclass(frozen=True)
class Arguments:
    """Bytes that a rank of a sharded model holds and sends."""

    ranks: tuple[int, ...] = (2, 4)
    """Numbers of processes."""

    steps: int = 2 * CYCLE
    """Steps that are counted, a multiple of ten: factors are exchanged at one in ten."""

    out: Path = RESULTS
    """Folder of the page."""


def _held(tensors: Iterable[Any], *, whole: bool = False) -> int:
    """Bytes of a rank's own pieces, or of the whole tensors that they are of."""
    found = 0
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            piece: Any = tensor if whole or not hasattr(tensor, "to_local") else tensor.to_local()
            found += piece.numel() * piece.element_size()
    return found


def counted(rank: int, size: int, network: str, method: str, steps: int) -> list[float]:
    """Of this rank: bytes of weights, gradients and state between steps, more during one; sent in one by all."""
    torch.manual_seed(0)
    model, optimizer = METHODS[method](NETWORKS[network]())
    criterion = nn.CrossEntropyLoss()
    torch.manual_seed(rank)

    def step() -> None:
        optimizer.zero_grad()
        criterion(model(torch.randn(BATCH, 1, 28, 28)), torch.randint(10, (BATCH,))).backward()
        optimizer.step()

    for _ in range(CYCLE):
        step()
    distributed.barrier()
    before = _loopback()
    distributed.barrier()
    for _ in range(steps):
        step()
    distributed.barrier()
    sent = (_loopback() - before) / steps / size
    weights = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    state = [value for own in optimizer.state.values() for value in own.values()]
    state += getattr(optimizer, "_room", [])  # the weights before the step
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    more = 0
    if method == "DDPNOpt, sharded":
        more = _held([*weights, *state], whole=True)
    return [_held(weights), _held(gradients), _held(state), more, sent]


def main(words: Sequence[str] | None = None) -> int:
    """Count, write the page; returns the exit code."""
    given = tyro.cli(Arguments, args=words)
    began, rows = time.perf_counter(), []
    for network in NETWORKS:
        for size in given.ranks:
            for method in METHODS:
                found = torch.tensor(on_ranks(size, counted, network, method, given.steps)).amax(0).tolist()
                rows.append([network, str(size), method, *(f"{one / 1e3:,.0f}" for one in found)])
    header = ["network", "ranks", "method", "kB of weights", "gradients", "state", "more in a step", "kB sent"]
    page = f"""# What a rank of a sharded model holds and sends

`fully_shard` of every layer and of the model, {BATCH} samples per rank, float32, gloo; DDPNOpt with the default
curvature and momentum 0.9, *whole* in `DistributedDataParallel`. Of the rank that has most: what it holds between steps
(state with the copy of unsharded weights that a step can go back to), what it holds more during one (whole weights and
whole state), and what the kernel counted on the loopback per step, mean over {given.steps}, shared out over the ranks:
`fully_shard`'s own exchanges are in it. Activations and columns are not.

{table(header, rows)}

[distributed.md](../distributed.md) says what is cut and when it is put together.

Command: `{command("sharded.py", given, ("ranks", "steps"))}`, in a network namespace of its own
({duration(time.perf_counter() - began)}), ddpnopt {version("ddpnopt")}, torch {torch.__version__}.
"""
    save_page(given.out, "sharded", page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
