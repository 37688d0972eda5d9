"""What a checkpoint holds beside torch's own, whether it fits the optimizer that loads it, and putting it there.

As hooks of torch's own saving and loading, nearest to it, so that a user's hooks see and may change all of it.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .layers import Block
from .sharded import piece_of

StateDict = dict[str, Any]


@contextlib.contextmanager
def saving(optimizer: torch.optim.Optimizer, own: StateDict) -> Iterator[None]:
    """Add ``own`` to the state that is saved inside."""
    handle = optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, **own}, prepend=True)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def loading(
    optimizer: torch.optim.Optimizer, curvature: str, blocks: Mapping[str, Block], mesh: Any
) -> Iterator[StateDict]:
    """Check the state that is loaded inside before anything is changed; gives what was loaded, once it is.

    Args:
        optimizer: that loads.
        curvature: its curvature's name.
        blocks: by the name of their first parameter.
        mesh: of the ranks over which parameters are sharded, and their state with them; ``None``: they are not.

    Raises:
        ValueError: if the state is of another curvature, or does not fit (see :func:`check_fits`).
    """
    final: StateDict = {}

    def check(_: torch.optim.Optimizer, given: StateDict) -> None:
        if (saved := given.get("curvature", curvature)) != curvature:
            raise ValueError(f"the state is of curvature={saved}(), this optimizer has {curvature}()")
        check_fits(given, optimizer.param_groups, blocks)
        final.update(given)

    def finish(_: torch.optim.Optimizer) -> None:
        keep_precision(final, optimizer.param_groups, optimizer.state, mesh)

    handles = [
        optimizer.register_load_state_dict_pre_hook(check),
        optimizer.register_load_state_dict_post_hook(finish, prepend=True),
    ]
    try:
        yield final
    finally:
        for handle in handles:
            handle.remove()


def with_numbers(state_dict: StateDict) -> StateDict:
    """The same with parameters' numbers as such: ``torch.distributed.checkpoint`` writes them as text."""
    state = state_dict.get("state", {})
    if not any(isinstance(key, str) and key.isdigit() for key in state):
        return state_dict
    return {**state_dict, "state": {int(k) if str(k).isdigit() else k: own for k, own in state.items()}}


def check_fits(state_dict: StateDict, groups: Iterable[Mapping[str, Any]], blocks: Mapping[str, Block]) -> None:
    """Raise ``ValueError``, naming the parameter, where a saved tensor is not of its block's shape.

    Args:
        state_dict: to be loaded.
        groups: the optimizer's parameter groups; where their sizes differ, torch's own message is the better one.
        blocks: by the name of their first parameter.
    """
    saved = [list(group["params"]) for group in state_dict["param_groups"]]
    own = [list(group["params"]) for group in groups]
    if [len(group) for group in saved] != [len(group) for group in own]:
        return
    key_of = dict(zip(chain.from_iterable(own), chain.from_iterable(saved), strict=True))
    for name, block in blocks.items():
        state = state_dict["state"].get(key_of[block.parameters[0]], {})
        if state.get("parameters", len(block.parameters)) != len(block.parameters):
            continue  # the block was of other parameters; the step starts its state anew
        out, fan_in = block.shape
        for key, value in state.items():
            if isinstance(value, Tensor) and value.ndim and not _fits(key, value.shape, out, fan_in):
                raise ValueError(
                    f"the saved state of {name} does not fit: {key!r} has shape {tuple(value.shape)}, and this "
                    f"parameter's block is {out} x {fan_in}. Load the state of an optimizer of the same model"
                )


def keep_precision(
    state_dict: StateDict, groups: Iterable[Mapping[str, Any]], state: dict[Any, Any], mesh: Any
) -> None:
    """Put saved tensors into ``state`` in the precision they were saved with.

    torch casts a parameter's state to the parameter's type; curvature of half-precision weights is in float32.
    """
    saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    own = chain.from_iterable(group["params"] for group in groups)
    for key, parameter in zip(saved, own, strict=True):
        for name, value in state_dict["state"].get(key, {}).items():
            own = value if mesh is None else piece_of(value, mesh)
            kept = own.detach().clone().to(parameter.device) if isinstance(own, Tensor) else own
            state[parameter][name] = kept


def _fits(key: str, shape: Sequence[int], out: int, fan_in: int) -> bool:
    """Whether a state's tensor may have this shape: ``S...`` and ``A...`` are of one side, others of both.

    A side is a matrix, its diagonal, or some of its directions (a basis) and a number for each.
    """
    side = {"S": out, "A": fan_in}.get(key[0])
    if side is None:
        return tuple(shape) == (out, fan_in)
    if key.endswith("_basis"):
        return len(shape) == 2 and shape[0] == side >= shape[1]
    if key.endswith(("_values", "_weights")):
        return len(shape) == 1 and shape[0] <= side
    return tuple(shape) in ((side, side), (side,))
