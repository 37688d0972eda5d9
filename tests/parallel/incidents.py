"""What goes wrong on one of several ranks, and what all of them make of it."""

import copy
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from programs import shard, whole
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ddpnopt import Batch, DDPNOpt, Dense, Matched

AT = 1
"""The rank on which it goes wrong."""


class Trap(nn.Module):
    """Does something when it runs for the n-th time."""

    def __init__(self, spring: Callable[[], None]) -> None:
        super().__init__()
        self.left, self.spring = -1, spring

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            self.spring()
        return x


def _broken() -> None:
    raise KeyError("the model broke")


def _model(spring: Callable[[], None] = _broken, *, last: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(4, 5), nn.Tanh(), Trap(spring), nn.Linear(5, 3)]
    return nn.Sequential(*(layers[:2] + layers[3:] + layers[2:3] if last else layers))


def _trap(model: nn.Sequential) -> Trap:
    (trap,) = (module for module in model if isinstance(module, Trap))
    return trap


def _batch(rank: int, size: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(12, 4, generator=generator), torch.randint(3, (12,), generator=generator)
    return x.tensor_split(size)[rank], y.tensor_split(size)[rank]


class Loop:
    """Steps, and what came of each."""

    def __init__(
        self, rank: int, size: int, model: nn.Sequential | None = None, *, sharded: bool = False, **settings: Any
    ) -> None:
        self.rank, self.size, self.criterion = rank, size, nn.CrossEntropyLoss()
        self.model = model or _model()
        if sharded:
            shard(self.model, size, "children")
        self.optimizer = DDPNOpt(self.model, **settings)
        self.told: list[str] = []
        self.step_number = 0

    def step(self, change: Callable[[Tensor], Tensor] = lambda x: x, *, backward: bool = True) -> None:
        x, y = _batch(self.rank, self.size, self.step_number)
        self.step_number += 1
        before = self.pieces(), copy.deepcopy(self.optimizer.state_dict()["state"])
        try:
            self.optimizer.zero_grad()
            if backward:
                self.criterion(self.model(change(x)), y).backward()
            self.optimizer.step()
            self.told.append("")
        except Exception as error:
            self.told.append(f"{type(error).__name__}: {error}")
            assert all(map(torch.equal, before[0], self.pieces()))
            after = self.optimizer.state_dict()["state"]
            assert str(before[1]) == str(after)

    def pieces(self) -> list[Tensor]:
        held: list[Any] = [p.detach() for group in self.optimizer.param_groups for p in group["params"]]
        return [p.to_local().clone() if hasattr(p, "to_local") else p.clone() for p in held]

    def result(self) -> dict[str, Any]:
        return {"told": self.told, "weights": whole(self.model), "figures": self.optimizer.diagnostics()}


def spoiled(rank: int, size: int, **settings: Any) -> dict[str, Any]:
    loop = Loop(rank, size, **settings)
    loop.step()
    loop.step(lambda x: x * float("nan") if rank == AT else x)
    loop.step()
    return loop.result()


def skipping(rank: int, size: int) -> dict[str, Any]:
    return spoiled(rank, size, on_nonfinite="skip")


def breaking(rank: int, size: int, *, last: bool = False, which: int = 2, sharded: bool = False) -> dict[str, Any]:
    loop = Loop(rank, size, _model(last=last), sharded=sharded)
    loop.step()
    if rank == AT:
        _trap(loop.model).left = which  # 1: the forward pass, 2: the second one, inside step()
    loop.step()
    loop.step()
    return loop.result()


def breaking_last(rank: int, size: int) -> dict[str, Any]:
    return breaking(rank, size, last=True)


def without_backward(rank: int, size: int) -> dict[str, Any]:
    loop = Loop(rank, size)
    loop.step()
    loop.step(backward=rank != AT)
    loop.step()
    return loop.result()


def nobody(rank: int, size: int) -> dict[str, Any]:
    loop = Loop(rank, size)
    x, y = _batch(rank, size, 0)
    try:
        loop.criterion(loop.model(x[:0]), y[:0]).backward()
        loop.optimizer.step()
    except Exception as error:
        loop.told.append(f"{type(error).__name__}: {error}")
    loop.step()
    return loop.result()


def scaler_found_inf(rank: int, size: int) -> dict[str, Any]:
    loop = Loop(rank, size)
    loop.step()
    if rank == AT:
        loop.optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    loop.step()
    loop.optimizer.__dict__.pop("found_inf", None)
    loop.step()
    return loop.result()


class Fork(nn.Module):
    """Takes one way or the other."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.way = nn.Linear(4, 3), nn.Linear(4, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = (self.right if self.way else self.left)(x)
        return out


def two_ways(rank: int, size: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Fork()
    loop = Loop(rank, size, model)  # type: ignore[arg-type]
    loop.step()
    model.way = int(rank == AT)
    loop.step()
    model.way = 0
    loop.step()
    return loop.result()


def refused(rank: int, size: int) -> dict[str, Any]:
    told = []
    for coupling in (Dense(), Batch(relinearise=True)):
        loop = Loop(rank, size, nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), coupling=coupling)
        loop.step()
        told += loop.told
    return {"told": told}


def gradients_in_a_wrapper(rank: int, size: int) -> dict[str, Any]:
    """A wrapper averages gradients before the optimizer is there and once it is closed, and leaves them while it is."""
    torch.manual_seed(0)
    plain = nn.Linear(4, 3)
    model = copy.deepcopy(plain)
    wrapper: Any = nn.parallel.DistributedDataParallel(model)
    x, _ = _batch(rank, size, 0)

    def gradient(module: nn.Module, parameter: Tensor) -> Tensor:
        parameter.grad = None
        module(x).square().mean().backward()
        assert parameter.grad is not None
        return parameter.grad.clone()

    optimizer = DDPNOpt(wrapper)
    own, held = gradient(plain, plain.weight), gradient(wrapper, model.weight)
    mean = own.clone()
    distributed.all_reduce(mean)
    optimizer.close()
    return {"own": own, "held": held, "mean": mean / size, "closed": gradient(wrapper, model.weight)}


def traffic(rank: int, size: int) -> dict[str, Any]:
    loop = Loop(rank, size, terminal=None)
    loop.step()
    loop.step()
    return loop.result()


def long_run(
    rank: int, size: int, folder: str, first: int, last: int, killed: int, *, sharded: bool = False
) -> dict[str, Any]:
    """Steps ``first`` to ``last`` with a checkpoint after each; a rank dies inside step ``killed`` (-1: none does).

    Args:
        rank, size: of this process.
        folder: of the checkpoints, where the last one is loaded from if ``first`` is not 0.
        first, last, killed: steps; -2: none is killed, and there are no checkpoints.
        sharded: whether the model is.
    """
    model = _model(lambda: os._exit(9))
    loop = Loop(rank, size, model, sharded=sharded, terminal=Matched(nn.CrossEntropyLoss()), momentum=0.5)
    loop.criterion = loop.optimizer.terminal.criterion  # type: ignore[assignment]
    if first:
        saved = Path(folder) / f"{size} of {rank}"
        dcp_to_torch_save(Path(folder) / f"step {first - 1}", saved)
        state = torch.load(saved, weights_only=True)
        if sharded:
            load({"model": model.state_dict()}, checkpoint_id=str(Path(folder) / f"step {first - 1}"))
        else:
            model.load_state_dict(state["model"])
        loop.optimizer.load_state_dict(state["optimizer"])
    for loop.step_number in range(first, last):
        step = loop.step_number
        if step == killed and rank == AT:
            _trap(model).left = 2
        loop.step()
        if loop.told[-1]:
            break
        state = {"model": model.state_dict(), "optimizer": loop.optimizer.state_dict()}
        if killed != -2:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                save(state, checkpoint_id=str(Path(folder) / f"step {step}"))
    return loop.result()
