"""Dense options for small networks: every sample's full ``V_xx``, Tikhonov, second-order dynamics.

Algorithm 3 of Liu, Chen and Theodorou (ICLR 2021, arXiv 2002.08809) without its outer-product factorisation: per
sample, with ``u, x, y`` the control, the state entering and the state leaving a stage, ``y = f(u, x)``,

    V_xx <- V_xx + eps I                    as it enters the stage
    Q_u  = f_u' V_x + stage cost            Q_x  = f_x' V_x
    Q_ux = f_u' V_xx f_x + V_x . f_ux       Q_xx = f_x' V_xx f_x + V_x . f_xx       Q_uu = R
    V_x  <- Q_x - Q_ux' R^-1 Q_u            V_xx <- Q_xx - Q_ux' R^-1 Q_ux

``V_x . f_ux`` and ``V_x . f_xx`` only with dynamics to second order. A block's columns are here ``Q_u`` and the
``n`` columns of ``Q_ux``; the weights on them, ``(1, dx)``, make the update ``-R^-1 (Q_u + Q_ux dx)``.

Shapes: ``B`` samples, ``n`` numbers per sample in ``x``, ``m`` in ``y``. Jacobians and the recursion are in float64.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vjp, vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from .bellman import BlockTerms, StagePolicy, block_policy, gram_and_cost
from .columns import Columns, DenseColumns, over_uses
from .curvature import Curvature
from .errors import StepError
from .joined import joined
from .layers import Block, Call
from .linearise import Linearised, TerminalValue, inner_products
from .network import Layer, Network, Stage, flattened, is_sequential
from .passes import Run
from .value import DensePolicy, SampleValue

OTHERWISE = "use coupling='batch' or coupling='sample', which take any model"
RANDOM = (_DropoutNd, nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)

TermsOf = Callable[[Block, Columns], BlockTerms]
Swept = tuple[Linearised, dict[Stage, list[tuple[Block, Columns]]], dict[Stage, StagePolicy]]


@dataclass(frozen=True)
class Dense:
    """``coupling=Dense(...)``: the sample form with a full matrix ``V_xx`` per sample, for small networks.

    Algorithm 3 of the paper (arXiv 2002.08809) with its dense options. ``Dense()`` is ``coupling="sample"`` at
    ``B n^2`` times the memory (``n``: numbers per sample in the widest activation); with ``second_order`` a layer of
    ``P`` parameters takes ``B P n``. With ``feedback=False`` nothing here has a part: the step is the adapted
    optimizer's.

    The model must be an ``nn.Sequential`` (nested ones are flattened) of layers, each used once and with all
    parameters its own, and modules without parameters. A stage is a layer with what follows it; frozen layers
    count as without parameters. The loss may look at the model's output only, and modules must treat every sample
    alike and by itself: BatchNorm in training mode (and without running statistics), Dropout with ``p > 0``, RReLU
    and fractional pooling in training mode are refused; modules of your own are not looked into.

    Args:
        eps: Tikhonov term, ``V_xx + eps I``, added to each ``V_xx`` as it enters a stage, that of the loss
            included; in units of a sample's own loss over the square of an activation. Default 0.
        second_order: expand the dynamics to second order: ``Q_ux`` gains ``V_x . f_ux`` and ``Q_xx`` gains
            ``V_x . f_xx``; ``Q_uu`` stays ``R``. Default ``False``.

    Raises:
        ValueError: if ``eps`` is not a finite number >= 0; by ``DDPNOpt``, if the model is not such a chain.
        TypeError: if ``second_order`` is not a bool.

    Example:
        >>> import torch
        >>> from ddpnopt import DDPNOpt, Dense, Identity
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Sigmoid(), torch.nn.Linear(8, 3))
        >>> dense = Dense(eps=1e-3, second_order=True)
        >>> optimizer = DDPNOpt(model, lr=0.1, curvature=Identity(), coupling=dense)
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> for _ in range(20):
        ...     optimizer.zero_grad()
        ...     loss = torch.nn.functional.cross_entropy(model(x), y)
        ...     loss.backward()
        ...     optimizer.step()
        >>> bool(torch.nn.functional.cross_entropy(model(x), y) < loss)
        True
    """

    eps: float = 0.0
    second_order: bool = False

    def __post_init__(self) -> None:
        if not (isinstance(self.eps, int | float) and math.isfinite(self.eps) and self.eps >= 0):
            raise ValueError(f"Dense: eps must be a finite number >= 0, got {self.eps!r}")
        if not isinstance(self.second_order, bool):
            raise TypeError(f"Dense: second_order must be True or False, got {self.second_order!r}")


def chain_of(model: object) -> list[nn.Module]:
    """The modules of a chain in the order they run.

    Raises:
        ValueError: if ``model`` is not a chain in the sense of :class:`Dense`; says why, and what to use instead.
    """
    if not is_sequential(model):
        kind = f"a {type(model).__name__}" if isinstance(model, nn.Module) else "parameters without their module"
        raise ValueError(f"Dense() needs the model itself, an nn.Sequential, got {kind}; {OTHERWISE}")
    assert isinstance(model, nn.Sequential)
    modules = flattened(model)
    parameters = [p for module in modules for p in module.parameters()]
    if len(set(parameters)) < len(parameters):
        raise ValueError(f"Dense() needs a chain that uses each layer once, but parameters are shared; {OTHERWISE}")
    for module in modules:
        name = type(module).__name__
        if len(list(module.parameters())) > len(list(module.parameters(recurse=False))):
            raise ValueError(f"Dense() needs a chain of single layers, but {name} has layers inside; {OTHERWISE}")
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(f"Dense() takes samples one by one, but {name} mixes them; {OTHERWISE}, or model.eval()")
        if module.training and isinstance(module, RANDOM) and getattr(module, "p", 1) > 0:
            raise ValueError(f"Dense() cannot follow the random numbers of {name}; {OTHERWISE}, or model.eval()")
    return modules


def _stages(model: nn.Module, network: Network) -> list[tuple[Stage, Layer, list[nn.Module]]]:
    """Each stage with its layer, and the modules that make up ``f``: the layer and what follows it."""
    found: list[tuple[Stage, Layer, list[nn.Module]]] = []
    stage_of = {stage.module: (stage, network.layers[stage.layers[0]]) for stage in network.stages}
    for module in chain_of(model):
        if module in stage_of:
            found.append((*stage_of[module], []))
        if found:
            found[-1][2].append(module)
    return found


class Expansion(NamedTuple):
    """A stage's dynamics around the nominal trajectory, per sample; ``n`` is 0 where nothing moves before the stage."""

    pulled: Tensor  # V_x and the columns of V_xx f_x, pulled back to the layer's output: [1 + n, B, ...]
    Q_x: Tensor  # [B, n]
    Q_xx: Tensor  # [B, n, n]
    V_x_f_ux: Mapping[str, Tensor]  # by parameter name [n, B, *shape]; empty to first order


def expand(
    f: Sequence[nn.Module], u: Mapping[str, Tensor], x: Tensor, V_x: Tensor, V_xx: Tensor | None, *, second_order: bool
) -> Expansion:
    """Expand ``f(u, x)``, a layer with parameters ``u`` and what follows it, around states ``x [B, ...]``.

    Args:
        f: the modules, the layer first.
        u: the layer's trained parameters by name, in float64.
        x: as the layer got it.
        V_x: at the stage's output, ``[B, m]``.
        V_xx: likewise, ``[B, m, m]``; ``None`` if nothing moves before the stage, so that ``x`` does not either.
        second_order: see :class:`Dense`.
    """
    x = x.double() if x.is_floating_point() else x
    h = _run(f[:1], u, x)
    y, pull_tail, *_ = vjp(lambda h: _run(f[1:], {}, h.clone()), h)  # a clone: activations may work in place
    if V_xx is None:
        return Expansion(pull_tail(V_x.view_as(y))[0][None], V_x[:, :0], V_x[:, :0, None], {})
    _, pull_layer, *_ = vjp(lambda x: _run(f[:1], u, x), x)
    f_x = vmap(lambda column: pull_layer(*pull_tail(column)))(_unit_columns(y))[0].flatten(2)  # [m, B, n]
    V_xx_f_x = torch.einsum("bml,lbn->nbm", V_xx, f_x)
    Q_x = torch.einsum("mbn,bm->bn", f_x, V_x)
    Q_xx = torch.einsum("mbi,jbm->bij", f_x, V_xx_f_x)
    (pulled,) = vmap(pull_tail)(torch.cat([V_x[None], V_xx_f_x]).view(-1, *y.shape))
    if not second_order:
        return Expansion(pulled, Q_x, Q_xx, {})

    def hamiltonian(u: Mapping[str, Tensor], x: Tensor, V_x: Tensor) -> Tensor:
        return V_x @ _run(f, u, x[None]).flatten()

    second = vmap(jacrev(grad(hamiltonian, argnums=1), argnums=(0, 1)), in_dims=(None, 0, 0))
    f_xu, f_xx = second(u, x, V_x)
    f_ux = {name: value.flatten(1, x.ndim - 1).transpose(0, 1) for name, value in f_xu.items()}
    return Expansion(pulled, Q_x, Q_xx + f_xx.reshape(Q_xx.shape), f_ux)


def _run(modules: Sequence[nn.Module], u: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Modules in turn, in float64; ``u`` replaces parameters of the first."""
    for module in modules:
        tensors = chain(module.named_parameters(), module.named_buffers())
        wide = {name: t.detach().double() if t.is_floating_point() else t for name, t in tensors}
        x = functional_call(module, {**wide, **u}, (x,))
        u = {}
    return x


def _unit_columns(x: Tensor) -> Tensor:
    """The unit vectors of each sample of ``x [B, ...]`` as columns ``[n, B, ...]``, at least in float32."""
    n = x[0].numel()
    eye = torch.eye(n, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    return eye.view(n, 1, *x.shape[1:]).expand(n, *x.shape)


def sweep(
    dense: Dense, network: Network, parts: Sequence[Linearised], end: TerminalValue, curvature: Curvature,
    *, model: nn.Module, terms_of: TermsOf,
) -> Swept:  # fmt: skip
    """The backward pass over a chain with full ``V_xx``.

    Args:
        dense: the options.
        network: the chain's layers; each is a stage.
        parts: the recorded passes with their columns, a run of the model itself among their runs.
        end: coordinates of the loss's value in the columns.
        curvature: ``M``'s settings.
        model: the chain.
        terms_of: what a block brings, given its columns.

    Returns:
        all passes as one, its columns at every stage but the first the unit vectors, so that ``r = P' dx`` is
        ``dx``; the blocks with their columns ``(Q_u, Q_ux)``, by stage; the policies, by stage.

    Raises:
        ValueError: if the model is not a chain any more.
        StepError: if no gradient of single samples reached the output, passes do not stack, or a module refuses.
    """
    whole = joined(parts)
    if whole is None:
        raise StepError("Dense() needs micro-batches whose samples have one shape")
    P = torch.cat([one.columns(_cotangent(_run_of(one, model))) for one in parts], 1).flatten(2).double()
    V_x = torch.einsum("rbm,rb->bm", P, end.a.to(P))
    V_xx = torch.einsum("rbm,rbl->bml", P[: end.curved], P[: end.curved])
    ones = torch.ones_like(P[:1, :, 0])
    one_column = SampleValue.terminal(ones, 1, end.weight)
    visits = dict(whole.recorded.visits)
    blocks: dict[Stage, list[tuple[Block, Columns]]] = {}
    policies: dict[Stage, StagePolicy] = {}
    stages = _stages(model, network)
    for stage, layer, f in reversed(stages):
        first = stage is stages[0][0]
        x = torch.cat([_run_of(one, layer.module).args[0] for one in parts])
        u = {n: p.detach().double() for b in layer.blocks for n, p in zip(b.names, b.parameters, strict=True)}
        V_xx = V_xx + dense.eps * torch.eye(V_xx.shape[1]).to(V_xx)
        try:
            expansion = expand(f, u, x, V_x, None if first else V_xx, second_order=dense.second_order)
            columns = _columns(layer, x, expansion)
        except RuntimeError as error:
            kind = type(layer.module).__name__
            raise StepError(f"Dense() cannot expand stage {stage.name}, {kind}: {error}; {OTHERWISE}") from error
        ready = []
        for block, (Q_u, Q) in zip(layer.blocks, columns, strict=True):
            # M is built from Q_u, as the sample form builds it from its only column
            policy = block_policy(terms_of(block, Q_u), curvature, one_column, ones, 1)
            ready.append(replace(policy, terms=replace(policy.terms, columns=Q)))
        gram, d = gram_and_cost(ready, joint=False)
        # Q_u' R^-1 Q_u, then Q_ux' R^-1 Q_u: [1 + n, B], with the stage cost in the right Q_u only
        change = gram[:, :, 0].mT if d is None else gram[:, :, 0].mT + d
        policies[stage] = StagePolicy(DensePolicy(change, end.weight), tuple(ready), gram)
        blocks[stage] = [(block, Q) for block, (_, Q) in zip(layer.blocks, columns, strict=True)]
        visit = visits[layer.module]
        none: list[Tensor | None] = [None] * len(visit.shapes)
        unit = None if first else _unit_columns(x)
        visits[layer.module] = replace(
            visit,
            cotangents=none if unit is None else [unit],
            products=none if unit is None else [inner_products(unit, x)],
        )
        V_x, V_xx = expansion.Q_x - change[1:].mT, expansion.Q_xx - gram[:, 1:, 1:]
    return Linearised(replace(whole.recorded, visits=visits), None), blocks, policies


def _run_of(one: Linearised, module: nn.Module) -> Run:
    """The only run of a module in a pass."""
    runs = [run for run in one.recorded.runs if run.layer is module]
    if len(runs) != 1 or runs[0].misfit or len(runs[0].cotangents) != 1 or len(runs[0].args[0]) != one.recorded.batch:
        name = type(module).__name__
        raise StepError(f"Dense() needs one input and one output that lead with the batch, of {name}; {OTHERWISE}")
    return runs[0]


def _cotangent(run: Run) -> Tensor:
    (cotangent,) = run.cotangents
    if cotangent is None:
        raise StepError("no gradient reached the model's output: Dense() needs a loss of what the model returned")
    return cotangent


def _columns(layer: Layer, x: Tensor, expansion: Expansion) -> list[tuple[Columns, Columns]]:
    """Of each block the columns ``Q_u``, and ``(Q_u, Q_ux)``, stage cost left out."""
    dtype = torch.promote_types(layer.blocks[0].parameters[0].dtype, torch.float32)
    found: list[tuple[Columns, Columns]] = []
    first_order = layer.rule.columns(layer.module, layer.blocks, Call((x,), {}, [expansion.pulled.to(dtype)]))
    for block, columns in zip(layer.blocks, first_order, strict=True):
        Q = columns
        if expansion.V_x_f_ux:
            tensors = [expansion.V_x_f_ux[name].to(dtype) for name in block.names]
            V_x_f_ux: Tensor = vmap(vmap(lambda *sample, block=block: block.matrix(sample)))(*tensors)
            Q = over_uses([columns, DenseColumns(torch.cat([torch.zeros_like(V_x_f_ux[:1]), V_x_f_ux]))])
        found.append((columns.first(1), Q))
    return found
