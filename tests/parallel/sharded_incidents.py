"""What goes wrong on ranks of a sharded model, what is refused, and all incidents by name."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from incidents import (
    breaking,
    breaking_last,
    gradients_in_a_wrapper,
    nobody,
    refused,
    scaler_found_inf,
    skipping,
    spoiled,
    traffic,
    two_ways,
    without_backward,
)  # fmt: skip
from networks import Mixed
from programs import shard
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from ddpnopt import DDPNOpt, Identity


def sharded_spoiled(rank: int, size: int) -> dict[str, Any]:
    return spoiled(rank, size, sharded=True)


def sharded_skipping(rank: int, size: int) -> dict[str, Any]:
    return spoiled(rank, size, sharded=True, on_nonfinite="skip", momentum=0.5)


def sharded_breaking(rank: int, size: int) -> dict[str, Any]:
    return breaking(rank, size, sharded=True)


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
