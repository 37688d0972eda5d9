"""Networks that are no chains: a step with the whole state's deviation against dense DDP on that state."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from cases import CURVATURES
from ddpnopt import DDPNOpt, Exact, Gradient, reference
from ddpnopt.curvature import Curvature
from ddpnopt.network import Layer
from graphs import GRAPHS, OTHERS, GraphCase, Step
from test_exact_step import step_size

LR = {"batch": 0.3, "sample": 0.01}  # the paper's form diverges at the larger one
Coupling = Literal["batch", "sample"]
Form = Callable[[DDPNOpt, Callable[[], Tensor]], Any]


def backward_then_step(optimizer: DDPNOpt, loss: Callable[[], Tensor]) -> None:
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()


def closure_with_loss(optimizer: DDPNOpt, loss: Callable[[], Tensor]) -> None:
    optimizer.step(loss)


def controls(layers: list[Layer]) -> list[Tensor]:
    matrices = [[b.matrix([p.detach().clone() for p in b.parameters]).flatten() for b in x.blocks] for x in layers]
    return [torch.cat(of_layer) for of_layer in matrices]


def frozen_R(
    optimizer: DDPNOpt, layers: list[Layer], curvature: Curvature, coupling: Coupling, samples: int
) -> list[Tensor]:
    found, lr = [], LR[coupling]
    lr = step_size(curvature, lr, samples, 1) if coupling == "batch" else lr
    for layer in layers:
        dense = []
        for block in layer.blocks:
            out, fan_in = block.matrix(block.parameters).shape
            state = optimizer.state.get(block.parameters[0], {})
            dense.append(
                curvature.inverse(state, curvature.ridge(lr, 0.0, batch=coupling == "batch")).to_dense(out, fan_in) / lr
            )
        found.append(torch.block_diag(*dense))
    return found


def flat_functions(case: GraphCase, layers: list[Layer]) -> list[reference.Function]:
    """The steps between states on flat states, ``(u [P], s [n]) -> s' [m]``."""

    def called(layer: Layer, u: Tensor, x: Tensor) -> Tensor:
        sizes = [sum(p.numel() for p in block.parameters) for block in layer.blocks]
        values: dict[str, Tensor] = {}
        for block, part in zip(layer.blocks, u.split(sizes), strict=True):
            matrix = part.view(block.matrix(block.parameters).shape)
            values |= zip(block.names, block.split(matrix), strict=True)
        out: Tensor = functional_call(layer.module, values, (x[None],))
        return out[0]

    def flat(layer: Layer, step: Step, shapes: list[torch.Size], u: Tensor, s: Tensor) -> Tensor:
        parts = [p.view(shape) for p, shape in zip(s.split([x.numel() for x in shapes]), shapes, strict=True)]
        return torch.cat([x.flatten() for x in step(partial(called, layer, u), *parts)])

    functions: list[reference.Function] = []
    state: tuple[Tensor, ...] = (case.x[0],)
    for layer, u in zip(layers, controls(layers), strict=True):
        step = case.steps[layer.name]
        functions.append(partial(flat, layer, step, [x.shape for x in state]))
        state = step(partial(called, layer, u), *state)
    return functions


def layers_of(case: GraphCase, optimizer: DDPNOpt) -> list[Layer]:
    """Layers in the order they run, each with the tied blocks of which it is the first owner."""
    network = optimizer._network
    by_name = {layer.name: layer for layer in network.layers}
    assert by_name.keys() == case.steps.keys()
    for x in network.tied:
        first = by_name[x.owners[0].name]
        by_name[first.name] = replace(first, blocks=(*first.blocks, x.block))
    return [by_name[name] for name in case.steps]


def own_loss(y: Tensor, target: Tensor) -> Tensor:
    """Of one sample: cross-entropy of the first three outputs, and the mean of the others' squares."""
    loss = F.cross_entropy(y[None, :3], target[None])
    return loss if len(y) == 3 else loss + y[3:].square().mean()


def batch_loss(output: Any, target: Tensor) -> Tensor:
    if isinstance(output, Tensor):
        return F.cross_entropy(output, target)
    named = output if isinstance(output, dict | tuple) else vars(output)
    logits, features = named if isinstance(named, tuple) else named.values()
    loss: Tensor = F.cross_entropy(logits, target) + features.square().mean()
    return loss


def one_step(
    make: Callable[[], GraphCase],
    curvature: str,
    terminal: str,
    form: Form,
    *,
    own_input: bool = False,
    coupling: Coupling = "batch",
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Controls before and after a step, and those that the dense reference has after it."""
    torch.manual_seed(7)
    case, M = make(), CURVATURES[curvature]
    with torch.no_grad():
        for p in case.model.parameters():
            p.mul_(2)  # so that layers move one another enough to tell states apart
    criterion = nn.CrossEntropyLoss()
    end = {"gradient": Gradient(cap=1), "exact": Exact(criterion)}[terminal]
    stages = list(case.steps) if own_input else None
    optimizer = DDPNOpt(
        case.model, LR[coupling], curvature=M, terminal=end, stages=stages, coupling=coupling, weight_decay=0.0,
        max_change=math.inf,
    )  # fmt: skip
    layers = layers_of(case, optimizer)
    y = torch.arange(len(case.x)) % 3
    before = controls(layers)
    functions = flat_functions(case, layers)
    nominal = case.x.flatten(1)
    for f, u in zip(functions, before, strict=True):
        nominal = torch.stack([f(u, s) for s in nominal])
    wanted = {"gradient": reference.gradient, "exact": reference.exact}[terminal](own_loss, nominal, y)

    def loss() -> Tensor:
        output = case.model(case.x)
        return criterion(output, y) if terminal == "exact" else batch_loss(output, y)

    form(optimizer, loss)
    R = frozen_R(optimizer, layers, M, coupling, len(case.x))
    expected = reference.dense_step(functions, before, case.x.flatten(1), wanted, R=R, coupling=coupling)
    return before, controls(layers), expected.controls


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("terminal", ["gradient", "exact"])
@pytest.mark.parametrize("curvature", ["identity", "kronecker"])
def test_one_step_is_the_dense_reference(graph: str, terminal: str, curvature: str) -> None:
    before, plain, expected = one_step(GRAPHS[graph], curvature, terminal, backward_then_step)
    _, closure, _ = one_step(GRAPHS[graph], curvature, terminal, closure_with_loss)
    for old, new, other, wanted in zip(before, plain, closure, expected, strict=True):
        assert (wanted - old).norm() > 1e-6
        torch.testing.assert_close(new, wanted, rtol=1e-9, atol=1e-9)
        assert torch.equal(new, other)
    _, own, _ = one_step(GRAPHS[graph], curvature, terminal, backward_then_step, own_input=True)
    move = torch.cat([w - o for w, o in zip(expected, before, strict=True)])
    error = torch.cat([w - n for w, n in zip(expected, own, strict=True)])
    print(f"{graph}, {terminal}, {curvature}: step {move.norm():.3g}, own input only {error.norm():.2g}")
    assert error.norm() > 1e-3 * move.norm()


@pytest.mark.parametrize("graph", GRAPHS)
def test_the_papers_form_too(graph: str) -> None:
    before, new, expected = one_step(GRAPHS[graph], "identity", "gradient", backward_then_step, coupling="sample")
    for old, moved, wanted in zip(before, new, expected, strict=True):
        assert (wanted - old).norm() > 1e-6
        torch.testing.assert_close(moved, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", OTHERS)
def test_two_outputs_and_parameters_around_layers(kind: str) -> None:
    before, plain, expected = one_step(OTHERS[kind], "identity", "gradient", backward_then_step)
    _, closure, _ = one_step(OTHERS[kind], "identity", "gradient", closure_with_loss)
    for old, new, other, wanted in zip(before, plain, closure, expected, strict=True):
        assert (wanted - old).norm() > 1e-6
        torch.testing.assert_close(new, wanted, rtol=1e-9, atol=1e-9)
        assert torch.equal(new, other)
