"""From torch modules to the dynamics and controls of a chain."""

from __future__ import annotations

from functools import partial

import torch
from torch import Size, Tensor, nn
from torch.func import functional_call

from .step import Function
from .terminal import require_float64


def stages_of(model: nn.Sequential, x: Tensor) -> tuple[list[Function], list[Tensor]]:
    """Split a chain of modules into T dynamics and T controls; x [B, ...] is any input of the model.

    A stage is one module with parameters and those without after it (the first stage: also before it). The
    state is one sample's activation, flattened; the control is the module's matrix [out, fan_in + 1] by rows:
    weight.reshape(out, -1), with the bias, where there is one, as last column. No module may mix samples.
    """
    groups: list[list[nn.Module]] = [[]]
    for module in model:
        if list(module.parameters()) and list(nn.Sequential(*groups[-1]).parameters()):
            groups.append([])
        groups[-1].append(module)
    functions, controls = list[Function](), list[Tensor]()
    for group in groups:
        stage = nn.Sequential(*group)
        parameters = dict(stage.named_parameters())
        require_float64(**parameters)
        if [name.partition(".")[2] for name in parameters] not in (["weight"], ["weight", "bias"]):
            raise TypeError(f"a stage needs one weight and may have a bias, but has {list(parameters)}")
        shapes = {name: p.shape for name, p in parameters.items()}
        functions.append(partial(_apply, stage, shapes, x.shape[1:]))
        controls.append(torch.cat([p.reshape(len(p), -1) for p in parameters.values()], 1).flatten().detach())
        x = stage(x).detach()
    return functions, controls


def _apply(stage: nn.Module, shapes: dict[str, Size], shape: Size, u: Tensor, x: Tensor) -> Tensor:
    """Run modules on x [n], reshaped to ``shape``, with the parameters that u [P] holds."""
    widths = [s[1:].numel() for s in shapes.values()]
    columns = u.reshape(-1, sum(widths)).split_with_sizes(widths, dim=1)
    values = {name: c.reshape(shapes[name]) for name, c in zip(shapes, columns, strict=True)}
    y: Tensor = functional_call(stage, values, (x.reshape(1, *shape),))
    return y.flatten()
