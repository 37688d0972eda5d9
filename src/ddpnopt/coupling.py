"""What a state is where samples share each control, as an option: the values that ``coupling`` takes."""

import math
from dataclasses import dataclass, fields
from typing import Literal

from .dense import Dense


@dataclass(frozen=True, repr=False)
class Batch:
    """``coupling=Batch(...)``: the joint problem of all samples, with its options; ``Batch()`` is ``"batch"``.

    With ``relinearise`` each stage of the rollout solves its own quadratic problem at the state it meets, instead of
    following the policy that was affine around the nominal state. With ``f`` a layer, ``y`` its nominal output, and the
    value ahead ``V_y, V_yy`` and ``R`` as they are,

        f(u + du, x_hat) - y = f_x dx + f_u(x_hat) du        (exact for Linear and convolutions)
        du = argmin  V_y' (f_x dx + f_u du) + |f_x dx + f_u du|^2_V_yy / 2 + |du|^2_R / 2 + l_u' du

    so that the product of control and deviation in the dynamics, ``f_ux``, is solved for and never expanded. To
    relinearise is estimation's and model predictive control's word for derivatives taken again at the present state.
    Columns' parameter gradients are formed again from the new inputs, with one more Gram matrix and one more Cholesky
    factorisation per stage (but the first, whose input does not move). Without feedback there is nothing to meet,
    and it has no effect. A layer that runs several times in one forward pass keeps its nominal columns: the inputs of
    its later runs are not known when it moves. Between layers, and in layers that are not linear in their input
    (norms, modules of your own), the deviation still counts to first order. No gain in accuracy was found on DIGITS
    (``docs/results/relinearise.md``). Of ``diagnostics()``, ``"k"`` and ``"feedback"`` are then those of the problem
    at the state that was met, ``"predicted_decrease"`` the nominal one.

    Beyond the published method (Liu, Chen and Theodorou, ICLR 2021, arXiv 2002.08809, whose dynamics are of first
    order); :func:`ddpnopt.reference.dense_step` specifies it.

    With ``local``, where several ranks share the batch, each solves the problem of its own samples as if they stood
    for all, and the ranks' updates are averaged stage by stage, weighted by samples; the curvature is of all samples.
    A step then sends what plain data-parallel SGD sends (one average of all weights' updates) and no columns; it is
    that of the whole batch to first order in ``lr`` only (``docs/results/distributed_bytes.md`` has how far apart).
    In one process it has no effect.

    With ``rounded``, where several ranks share the batch, per-sample gradients in float32 that they send one another
    for Gram matrices (those of convolutions) go out in 18 bits a number; the update is made from whole ones. A float32
    step loses more than that anyway (``docs/results/distributed_rounding.md``). ``False`` sends whole numbers; those in
    float64 always are. In one process, and with ``local``, it has no effect.

    Args:
        relinearise: whether to; default ``False``.
        local: whether ranks couple their own samples only; default ``False``.
        rounded: whether float32 gradients are rounded for Gram matrices; default ``True``.

    Raises:
        TypeError: if an argument is not a bool.
        ValueError: by ``DDPNOpt``, if ``stages`` is given as well: what is inside one moves together, before its
            layers' inputs are known.

    Example:
        >>> import torch
        >>> from ddpnopt import Batch, DDPNOpt, Exact, Identity
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)).double()
        >>> x, y = torch.randn(32, 4).double(), torch.randn(32, 2).double()
        >>> options = {"curvature": Identity(), "terminal": Exact(), "weight_decay": 0.0, "max_change": float("inf")}
        >>> optimizer = DDPNOpt(model, 1e9, coupling=Batch(relinearise=True), **options)
        >>> loss = optimizer.step(lambda: torch.nn.functional.mse_loss(model(x), y))
        >>> states = torch.nn.functional.pad(model[0](x), (0, 1), value=1.0)
        >>> best = states @ torch.linalg.lstsq(states, y).solution  # the last layer's least squares at the new states
        >>> torch.testing.assert_close(model(x), best, rtol=1e-5, atol=1e-5)
    """

    relinearise: bool = False
    local: bool = False
    rounded: bool = True

    def __post_init__(self) -> None:
        for name, given in vars(self).items():
            if not isinstance(given, bool):
                raise TypeError(f"Batch: {name} must be True or False, got {given!r}")

    def __repr__(self) -> str:
        changed = [
            f"{own.name}={getattr(self, own.name)}" for own in fields(self) if getattr(self, own.name) != own.default
        ]
        return f"Batch({', '.join(changed)})"


Coupling = Literal["batch", "sample"] | Batch | Dense


def default_numbers(coupling: Coupling) -> dict[str, float | bool]:
    """Of a group that is told none: what served the suite's tasks best, where nothing published is to be met."""
    joint = is_joint(coupling)
    decay = {"weight_decay": 0.01 if joint else 0.0, "decoupled_weight_decay": joint}
    return {"momentum": 0.5 if joint else 0.0, **decay, "max_change": 0.3 if joint else math.inf}


def is_joint(coupling: Coupling) -> bool:
    """Whether all samples are one state."""
    return coupling == "batch" or isinstance(coupling, Batch)


def relinearises(coupling: Coupling) -> bool:
    """Whether stages are solved again at the state that the rollout meets."""
    return isinstance(coupling, Batch) and coupling.relinearise


def is_local(coupling: Coupling) -> bool:
    """Whether each rank couples its own samples only."""
    return isinstance(coupling, Batch) and coupling.local


def rounds(coupling: Coupling) -> bool:
    """Whether ranks round float32 gradients for Gram matrices."""
    return not isinstance(coupling, Batch) or coupling.rounded
