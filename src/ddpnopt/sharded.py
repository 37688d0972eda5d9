"""``fully_shard`` around the model: weights are put together for the length of a step, and cut into pieces after it.

Every rank keeps a piece of each parameter, a ``DTensor``, which is what the optimizer was given; the module holds
the whole one while it runs. Here a step sees whole parameters by their pieces, under one key, as if nothing was cut.
Weights are moved in the whole ones alone; a step that fails drops them, and the pieces are as they were.
"""

import contextlib
import sys
import weakref
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, distributed, nn

from .columns.parcel import as_bytes
from .ranks import Ranks

LAYER = "and a layer's policy needs all of the layer"
ALONE = "keep the model whole on every rank, in DistributedDataParallel or in a plain process group"
PLAIN = "use fully_shard alone, on a mesh of one dimension"
OFFLOAD = "leave offload_policy out"


def is_piece(tensor: object) -> bool:
    """Whether a tensor is a ``DTensor``."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)  # not imported: there are none
    return kind is not None and isinstance(tensor, kind)


class Shards:
    """The parameters of a model that ``fully_shard`` has cut.

    Args:
        model: the model; ``None``, or one that is not sharded, has none of them.
        every: whether a step needs the gradients of all of them.

    Attributes:
        modules: to which ``fully_shard`` was applied.
        held: whole parameters by their pieces, while a step holds them; empty otherwise.
        gradients: of the pieces' parameters, whole and of this rank's samples alone, since they were forgotten;
            without numbers (on the device ``meta``) for those in ``unneeded``, which takes no memory.
        unneeded: parameters of whose gradients the next step needs to know no more than that there is one.

    Raises:
        ValueError: naming the parameter, for a way of sharding in which a step would not be right.
    """

    def __init__(self, model: nn.Module | None, *, every: bool = False):
        self.every = every
        kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
        self.modules: list[Any] = [m for m in model.modules() if isinstance(m, kind)] if model is not None else []
        self.held: dict[nn.Parameter, Tensor] = {}
        self.gradients: dict[nn.Parameter, Tensor] = {}
        self.unneeded: frozenset[nn.Parameter] = frozenset()
        self._heard: set[Tensor] = set()
        self.reshard()
        names = {p: name for name, p in model.named_parameters()} if self.modules and model is not None else {}
        self._pieces = {p.sharded_param for p in self._parameters()}
        for parameter in self._parameters():
            _check(names.get(parameter.sharded_param, "a parameter"), parameter, self.mesh)

    def __contains__(self, parameter: nn.Parameter) -> bool:
        return parameter in self._pieces

    def __bool__(self) -> bool:
        return bool(self._pieces)

    @property
    def mesh(self) -> Any:
        """The ranks between which parameters are cut."""
        return next(self._parameters()).sharded_param.device_mesh

    def group(self, given: Any) -> Any:
        """The process group of these ranks; that which is ``given``, where it is one and parameters are not cut.

        Raises:
            ValueError: if ``given`` is of other ranks.
        """
        if not self:
            return given
        own, ranks = self.mesh.get_group(), distributed.get_process_group_ranks
        if given is not None and set(ranks(given)) != set(ranks(own)):
            raise ValueError(
                f"process_group is of ranks {ranks(given)}, and the parameters are sharded over ranks "
                f"{ranks(own)}, which share the batch: leave process_group out"
            )
        return own

    def reshard(self) -> None:
        """Let modules have their pieces for parameters."""
        for module in self.modules:
            module.reshard()

    def pieces(self) -> dict[Any, nn.Parameter]:
        """Pieces by whatever modules may hold in their place at present."""
        found = {}
        for p in self._parameters():
            for name in ("_unsharded_param", "_sharded_post_forward_param"):
                if (other := getattr(p, name, None)) is not None:
                    found[other] = p.sharded_param
        return found

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Whole parameters on every rank, in ``held`` and in the modules, as long as the body runs.

        Modules run in it as they would in a recomputation for the backward pass, which leaves all as it is.
        """
        if not self:
            yield
            return
        states = [module._get_fsdp_state() for module in self.modules]
        recomputing = sys.modules["torch.distributed.fsdp._fully_shard._fsdp_common"].TrainingState.PRE_BACKWARD
        before = [state._training_state for state in states]
        try:
            self.reshard()
            for module in self.modules:
                module.unshard()
            self.held.update({piece: whole for whole, piece in self.pieces().items()})
            for state in states:
                state._training_state = recomputing
            yield
        finally:
            for state, was in zip(states, before, strict=True):
                state._training_state = was
            self.held.clear()
            self.reshard()

    def keep(self) -> None:
        """Write the whole parameters' values into the pieces."""
        with torch.no_grad():
            for parameter in self._parameters():
                piece: Any = parameter.sharded_param
                piece.to_local().copy_(_cut(self.held[piece].detach(), piece.device_mesh, piece.placements[0].dim))

    def cut(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """A parameter's state with pieces of its tensors; whole, where parameters are whole."""
        return {name: piece_of(value, self.mesh) for name, value in state.items()} if self else dict(state)

    def listen(self) -> list[Any]:
        """Hear of gradients at whole parameters that were not there before; returns handles."""
        handles, known = [], weakref.ref(self)
        for whole, piece in self.pieces().items():
            if whole not in self._heard and whole.requires_grad and whole.is_leaf and not is_piece(whole):
                self._heard.add(whole)
                handles.append(whole.register_hook(_Ear(known, piece)))
        return handles

    def _parameters(self) -> Iterator[Any]:
        """torch's records of them."""
        for module in self.modules:
            for group in module._get_fsdp_state()._fsdp_param_groups:
                yield from group.fsdp_params


class _Ear:
    """Adds up the gradients of one parameter."""

    def __init__(self, shards: "weakref.ref[Shards]", piece: nn.Parameter):
        self._to = shards, piece

    def __call__(self, gradient: Tensor) -> None:
        shards, piece = self._to[0](), self._to[1]
        if shards is not None:
            before = shards.gradients.get(piece)
            if piece in shards.unneeded or (before is not None and before.is_meta):
                shards.gradients[piece] = gradient.new_empty(gradient.shape, device="meta")
            else:
                own = gradient.detach()
                shards.gradients[piece] = own.clone() if before is None else before + own


def gathered(state: Mapping[str, Any], ranks: Ranks) -> dict[str, Any]:
    """A parameter's state with whole tensors, from everybody's pieces of them."""
    cut = {name: value for name, value in state.items() if is_piece(value)}
    if not cut:
        return dict(state)
    sizes = [_sizes(value, ranks.size) for value in cut.values()]
    sent = as_bytes([value.to_local() for value in cut.values()])
    parts = ranks.gather(sent, [sum(own) for own in zip(*sizes, strict=True)])
    by_rank = [part.split(list(own)) for part, own in zip(parts, zip(*sizes, strict=True), strict=True)]
    whole = {
        name: torch.cat(pieces).view(value.dtype).view(value.shape)
        for (name, value), pieces in zip(cut.items(), zip(*by_rank, strict=True), strict=True)
    }
    return {**state, **whole}


def piece_of(value: Any, mesh: Any) -> Any:
    """This rank's rows of a state's tensor, as ``fully_shard`` cuts a parameter; anything else as it is."""
    if not isinstance(value, Tensor) or is_piece(value) or not value.ndim:
        return value
    from torch.distributed.tensor import DTensor, Shard

    value = value.contiguous()
    own = _cut(value, mesh, 0).clone()
    return DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=value.shape, stride=value.stride())


def _cut(tensor: Tensor, mesh: Any, dim: int) -> Tensor:
    """This rank's piece."""
    pieces, own = tensor.chunk(mesh.size(), dim), mesh.get_local_rank()
    return pieces[own] if own < len(pieces) else tensor.narrow(dim, 0, 0)


def _sizes(piece: Tensor, ranks: int) -> list[int]:
    """How many bytes each rank's piece has."""
    rows = [len(part) for part in torch.arange(len(piece)).chunk(ranks)] if len(piece) else []
    row = prod(piece.shape[1:]) * piece.element_size()
    return [row * n for n in (*rows, *[0] * (ranks - len(rows)))]


def _check(name: str, parameter: Any, mesh: Any) -> None:
    """Raise ``ValueError`` for a parameter that is not cut as a step can take it."""
    dtype = parameter.mp_policy.param_dtype
    if parameter.is_dtensor:
        raise ValueError(f"{name} is sharded by a parallelize plan before fully_shard, {LAYER}: {ALONE}, or {PLAIN}")
    if parameter.sharded_param.device_mesh != mesh or mesh.ndim != 1:
        raise ValueError(
            f"{name} is sharded over the mesh {parameter.sharded_param.device_mesh}; a step takes one mesh of one "
            "dimension for all parameters, init_device_mesh(device, (ranks,)), whose ranks share the batch"
        )
    if dtype not in (None, parameter.sharded_param.dtype):
        raise ValueError(
            f"{name} is kept in {parameter.sharded_param.dtype} and run in {dtype} (MixedPrecisionPolicy), and a step "
            "moves the very weights that run: leave param_dtype out and run the model under torch.autocast"
        )
    if parameter.offload_to_cpu:
        raise ValueError(f"{name} is offloaded to the CPU, and a step moves weights where they run: {OFFLOAD}")
