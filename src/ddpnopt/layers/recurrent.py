"""Recurrent layers and cells: gradients are outer products over time, of gates and what enters them.

The fused kernels do not tell the gradients at their gates, so the cell's equations run once more in plain tensor
operations, all samples together, and are differentiated at the gates. Shapes: ``S`` times, ``G`` gate entries, ``H``
features of the hidden state, ``L`` layers times directions; inside this file time leads: ``[S, B, ...]``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..columns import Columns, OuterColumns
from .base import BatchDims, Block, Call, LayerRule, argument

State = tuple[Tensor, ...]
Equations = Callable[[Tensor, Tensor, State], State]
"""``(of_input [B, G], of_state [B, G], state) -> state``; a state is ``(h,)`` or ``(h, c)``."""


@dataclass(frozen=True)
class Site:
    """Where a weight acts: what it multiplies, ``[S, B, fan_in]``, and a zero added to the product, to be a leaf."""

    inputs: Tensor
    leaf: Tensor


class RecurrentRule(LayerRule):
    """``nn.RNN``, ``nn.LSTM`` and ``nn.GRU`` with all their options, on batches of sequences of one length.

    Packed sequences are not read, nor is dropout between layers on a GPU, whose random numbers the fused kernel keeps
    to itself.
    """

    name = "recurrent"
    why = "outer products over time; gradients at the gates by the cell's equations, all samples at once"

    def blocks(self, module: nn.Module, trained: Sequence[str]) -> list[tuple[str, ...]]:
        places = dict.fromkeys(name.split("_", 1)[1] for name in trained)
        pairs = [(f"weight_{place}", f"bias_{place}") for place in places]
        return [tuple(name for name in pair if name in trained) for pair in pairs]

    def reads(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        x = argument(args, kwargs, 0, "input")
        return isinstance(x, Tensor) and x.ndim == 3 and not (x.is_cuda and self.draws(module))

    def batch_dims(self, module: nn.Module) -> BatchDims:
        dims = (0 if module.batch_first else 1, 1)  # a hidden state never leads with the batch
        return BatchDims(dims, dims)

    def draws(self, module: nn.Module) -> bool:
        assert isinstance(module, nn.RNNBase)
        return module.training and module.dropout > 0 and module.num_layers > 1

    def columns(self, module: nn.Module, blocks: Sequence[Block], call: Call) -> list[Columns]:
        assert isinstance(module, nn.RNNBase)
        weights = _weights(module, call)
        x = argument(call.args, call.kwargs, 0, "input").to(weights["weight_ih_l0"])
        x = x.transpose(0, 1) if module.batch_first else x
        first = _states(module, argument(call.args, call.kwargs, 1, "hx"), x)
        directions = ("", "_reverse") if module.bidirectional else ("",)
        last: list[State] = []
        sites: dict[str, Site] = {}
        with torch.enable_grad():
            for layer in range(module.num_layers):
                if layer and self.draws(module):
                    x = F.dropout(x, module.dropout)
                runs = []
                for direction in directions:
                    start = tuple(h[len(last)] for h in first)
                    run, end = _scan(module, x, start, weights, f"_l{layer}{direction}", sites)
                    runs.append(run)
                    last.append(end)
                x = torch.cat(runs, 2)
            outputs = [x.transpose(0, 1), *(torch.stack(h, 1) for h in zip(*last, strict=True))]
        return _columns(blocks, sites, outputs, call)


class CellRule(LayerRule):
    """``nn.RNNCell``, ``nn.LSTMCell`` and ``nn.GRUCell`` on batches; one that runs over time is used several times."""

    name = "recurrent cell"
    why = RecurrentRule.why

    def blocks(self, module: nn.Module, trained: Sequence[str]) -> list[tuple[str, ...]]:
        return RecurrentRule().blocks(module, trained)

    def reads(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        ndim: int = argument(args, kwargs, 0, "input").ndim
        return ndim == 2

    def columns(self, module: nn.Module, blocks: Sequence[Block], call: Call) -> list[Columns]:
        weights = _weights(module, call)
        x = argument(call.args, call.kwargs, 0, "input").to(weights["weight_ih"])[None]
        first = _states(module, argument(call.args, call.kwargs, 1, "hx"), x)
        sites: dict[str, Site] = {}
        with torch.enable_grad():
            _, outputs = _scan(module, x, first, weights, "", sites)
        return _columns(blocks, sites, outputs, call)


def _weights(module: nn.Module, call: Call) -> dict[str, Tensor]:
    """The module's parameters in the columns' precision."""
    dtype = next(v.dtype for v in call.cotangents if v is not None)
    return {name: p.detach().to(dtype) for name, p in module.named_parameters(recurse=False)}


def _states(module: nn.Module, given: Any, x: Tensor) -> State:
    """The first states as the module was given them, in ``x``'s precision: zeros where it was not."""
    if given is not None:
        return tuple(h.to(x) for h in (given if isinstance(given, tuple | list) else (given,)))
    assert isinstance(module, nn.RNNBase | nn.RNNCellBase)
    size: int = module.hidden_size
    if isinstance(module, nn.RNNCellBase):
        return (x.new_zeros(x.shape[1], size),) * (2 if isinstance(module, nn.LSTMCell) else 1)
    several = module.num_layers * (2 if module.bidirectional else 1)
    sizes = [module.proj_size or size, *([size] if isinstance(module, nn.LSTM) else [])]
    return tuple(x.new_zeros(several, x.shape[1], width) for width in sizes)


def _scan(
    module: nn.Module, x: Tensor, state: State, weights: Mapping[str, Tensor], end: str, sites: dict[str, Site]
) -> tuple[Tensor, State]:
    """One layer in one direction: hidden states ``[S, B, H]`` in the order of ``x [S, B, F]``, and the last state.

    ``end``: of the names of its parameters. ``sites`` gets an entry for each weight, by its name without the kind.
    """
    at_input = x.new_zeros(*x.shape[:2], len(weights[f"weight_ih{end}"]), requires_grad=True)
    gru = isinstance(module, nn.GRU | nn.GRUCell)
    # the gates of an RNN and an LSTM see one sum; a GRU's reset gate comes in between
    at_state = torch.zeros_like(at_input, requires_grad=True) if gru else at_input
    project = weights.get(f"weight_hr{end}")
    at_hidden = None if project is None else x.new_zeros(*x.shape[:2], len(project), requires_grad=True)
    equations = _equations(module)
    of_input = F.linear(x, weights[f"weight_ih{end}"], weights.get(f"bias_ih{end}")) + at_input
    before: dict[int, Tensor] = {}
    raw: dict[int, Tensor] = {}
    after: dict[int, Tensor] = {}
    times = range(len(x))
    for t in reversed(times) if end.endswith("_reverse") else times:
        before[t] = state[0]
        of_state = F.linear(state[0], weights[f"weight_hh{end}"], weights.get(f"bias_hh{end}"))
        h, *c = equations(of_input[t], of_state + at_state[t] if gru else of_state, state)
        if project is not None and at_hidden is not None:
            raw[t], h = h, h @ project.mT + at_hidden[t]
        after[t], state = h, (h, *c)

    def over_time(values: Mapping[int, Tensor]) -> Tensor:
        return torch.stack([values[t] for t in times])

    sites[f"ih{end}"] = Site(x.detach(), at_input)
    sites[f"hh{end}"] = Site(over_time(before).detach(), at_state)
    if at_hidden is not None:
        sites[f"hr{end}"] = Site(over_time(raw).detach(), at_hidden)
    return over_time(after), state


def _equations(module: nn.Module) -> Equations:
    if isinstance(module, nn.LSTM | nn.LSTMCell):
        return _lstm
    if isinstance(module, nn.GRU | nn.GRUCell):
        return _gru
    assert isinstance(module, nn.RNN | nn.RNNCell)
    activation = torch.relu if module.nonlinearity == "relu" else torch.tanh
    return lambda of_input, of_state, state: (activation(of_input + of_state),)


def _lstm(of_input: Tensor, of_state: Tensor, state: State) -> State:
    i, f, g, o = (of_input + of_state).chunk(4, 1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(of_input: Tensor, of_state: Tensor, state: State) -> State:
    (r, z, n), (r_h, z_h, n_h) = of_input.chunk(3, 1), of_state.chunk(3, 1)
    z = (z + z_h).sigmoid()
    n = torch.tanh(n + (r + r_h).sigmoid() * n_h)
    return ((1 - z) * n + z * state[0],)


def _columns(
    blocks: Sequence[Block], sites: Mapping[str, Site], outputs: Sequence[Tensor], call: Call
) -> list[Columns]:
    """Columns of every block, from outputs that lead with the batch and their gradients."""
    leaves = list({id(site.leaf): site.leaf for site in sites.values()}.values())
    reached = [(out, v) for out, v in zip(outputs, call.cotangents, strict=True) if v is not None]
    tensors = [out for out, _ in reached]
    pulled = [
        torch.autograd.grad(tensors, leaves, [v[r] for _, v in reached], retain_graph=True, materialize_grads=True)
        for r in range(len(reached[0][1]))
    ]
    at = {id(leaf): torch.stack(columns).transpose(1, 2) for leaf, *columns in zip(leaves, *pulled, strict=True)}
    found: list[Columns] = []
    for block in blocks:
        site = sites[block.names[0].split("_", 1)[1]]
        x = site.inputs.transpose(0, 1)
        sides = {"weight": x, "bias": x.new_ones(*x.shape[:2], 1)}
        kinds = [name.split("_", 1)[0] for name in block.names]
        found.append(OuterColumns(at[id(site.leaf)], torch.cat([sides[kind] for kind in kinds], 2)))
    return found
