"""What goes wrong on one of several ranks, and what all of them make of it."""

import copy
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from programs import Mixed, shard, whole
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from ddpnopt import Batch, DDPNOpt, Dense, Identity, Matched

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


def sharded_spoiled(rank: int, size: int) -> dict[str, Any]:
    return spoiled(rank, size, sharded=True)


def sharded_skipping(rank: int, size: int) -> dict[str, Any]:
    return spoiled(rank, size, sharded=True, on_nonfinite="skip", momentum=0.5)


def sharded_breaking(rank: int, size: int) -> dict[str, Any]:
    return breaking(rank, size, sharded=True)


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


def refused_shards(rank: int, size: int) -> dict[str, Any]:
    """What is said to ways of sharding, and of training sharded models, that do not go."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mesh = init_device_mesh("cpu", (size,))
        two = init_device_mesh("cpu", (1, size), mesh_dim_names=("first", "second"))

    def model(**settings: Any) -> nn.Sequential:
        made = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        shard(made, size, "root", **settings)
        return made

    def planned(*, sharded: bool = False) -> nn.Module:
        made = nn.Sequential(nn.Linear(4, 6))
        parallelize_module(made, two["second"] if sharded else mesh, {"0": ColwiseParallel()})
        return fully_shard(made, mesh=two["first"]) if sharded else made  # type: ignore[return-value]

    def hybrid() -> nn.Module:
        return fully_shard(nn.Sequential(nn.Linear(4, 6)), mesh=two)  # type: ignore[return-value]

    def closure(optimizer: DDPNOpt) -> None:
        assert optimizer.model is not None
        module, x = optimizer.model, torch.ones(2, 4)
        optimizer.step(lambda: module(x).square().mean())

    def unscaled(optimizer: DDPNOpt) -> None:
        optimizer.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
        optimizer.step()

    tries: dict[str, Callable[[], Any]] = {
        "plan": lambda: DDPNOpt(planned()),
        "bare": lambda: DDPNOpt(model().parameters()),
        "precision": lambda: DDPNOpt(model(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))),
        "mesh": lambda: DDPNOpt(hybrid()),
        "plan, then sharded": lambda: DDPNOpt(planned(sharded=True)),
        "offload": lambda: DDPNOpt(model(offload_policy=CPUOffloadPolicy(pin_memory=False))),
        "group": lambda: DDPNOpt(model(), process_group=_of_one(rank, size)),
        "base": lambda: DDPNOpt(model(), curvature=Identity(), coupling="sample", feedback=False),
        "closure": lambda: closure(DDPNOpt(model())),
        "unscaled": lambda: unscaled(DDPNOpt(model())),
    }
    told = {}
    for name, attempt in tries.items():
        try:
            attempt()
            told[name] = ""
        except Exception as error:
            told[name] = f"{type(error).__name__}: {error}"
    return {"told": told}


def kept_gradients(rank: int, size: int) -> dict[str, Any]:
    """Which parameters' gradients a rank keeps whole after a backward pass."""
    torch.manual_seed(0)
    model = Mixed()
    shard(model, size, "children")
    optimizer = DDPNOpt(model)
    names = {p: name for name, p in model.named_parameters()}
    model(torch.randn(3, 6)).square().mean().backward()
    assert optimizer._recorder is not None
    gradients = optimizer._recorder.shards.gradients
    return {"heard": len(gradients), "kept": [names[p] for p, gradient in gradients.items() if not gradient.is_meta]}


def _of_one(rank: int, size: int) -> Any:
    return [distributed.new_group([other]) for other in range(size)][rank]


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


INCIDENTS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    f.__name__: f
    for f in (
        spoiled, skipping, breaking, breaking_last, without_backward, nobody, scaler_found_inf, two_ways, refused,
        sharded_spoiled, sharded_skipping, sharded_breaking, refused_shards, kept_gradients,
        gradients_in_a_wrapper, traffic,
    )
}  # fmt: skip


def all_incidents(rank: int, size: int) -> dict[str, dict[str, Any]]:
    return {name: incident(rank, size) for name, incident in INCIDENTS.items()}


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
