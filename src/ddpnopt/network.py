"""What the optimizer knows of the model: its layers and their blocks, its stages, and what fits in neither.

A *layer* is a module with parameters of its own; curvature lives there. A *stage* is a point in the forward
pass where the state's deviation is measured and where the weights of its layers move; in a chain every layer is
its own stage. Parameters that belong to no layer, or to several, are *loose*: the whole batch's gradient is
their only column.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from .layers import Block, LayerRule, rule_for

SHARED = "shared by several modules: one update from the whole batch's gradient"
BARE = "not a module's: one update from the whole batch's gradient"


@dataclass(frozen=True)
class Layer:
    """A module with parameters of its own, the rule that reads it, and its blocks."""

    name: str
    module: nn.Module
    rule: LayerRule
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Stage:
    """A module at whose input the state's deviation is measured, and the indices of the layers it moves."""

    name: str
    module: nn.Module
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Loose:
    """A parameter outside every layer: its block, and why it is here."""

    name: str
    block: Block
    why: str


@dataclass(frozen=True)
class Network:
    """Layers, stages and loose parameters; every trained parameter is in exactly one block."""

    layers: tuple[Layer, ...]
    stages: tuple[Stage, ...]
    loose: tuple[Loose, ...]

    def blocks(self) -> list[Block]:
        """Of layers and loose parameters, all."""
        return [b for layer in self.layers for b in layer.blocks] + [x.block for x in self.loose]


def read_network(
    model: nn.Module | None,
    group_of: Mapping[nn.Parameter, int],
    stages: Sequence[str | nn.Module] | None,
    refused: Mapping[str, str],
) -> Network:
    """Read layers, stages and loose parameters off a model.

    Args:
        model: the model, or ``None`` if the optimizer was given bare parameters.
        group_of: parameter group of each parameter to train; one block never spans two groups.
        stages: modules (or their names) whose input is the whole state; ``None``: every layer is a stage.
        refused: names of layers whose rule failed before, with the reason; their parameters are loose.

    Raises:
        ValueError: if ``stages`` names a module that does not exist, or one inside another.
    """
    owners = Counter(p for module in model.modules() for p in module._parameters.values()) if model else Counter()
    layers: list[Layer] = []
    loose: list[Loose] = []
    placed: set[nn.Parameter] = set()
    for name, module in model.named_modules() if model else ():
        own = {n: p for n, p in module._parameters.items() if p is not None and p in group_of}
        placed.update(own.values())
        for parameter_name in [n for n, p in own.items() if owners[p] > 1]:
            parameter = own.pop(parameter_name)
            if parameter not in {item.block.parameters[0] for item in loose}:
                loose.append(_loose(_join(name, parameter_name), parameter, SHARED))
        if name in refused:
            loose += [_loose(_join(name, n), p, refused[name]) for n, p in own.items()]
        elif own:
            layers.append(_layer(name, module, own, group_of))
    loose += [_loose(f"parameter {i}", p, BARE) for i, p in enumerate(group_of) if p not in placed]
    return Network(tuple(layers), _stages(model, layers, stages), tuple(loose))


def _join(module: str, parameter: str) -> str:
    return f"{module}.{parameter}" if module else parameter


def _loose(name: str, parameter: nn.Parameter, why: str) -> Loose:
    return Loose(name, Block(("",), (parameter,)), why)


def _layer(
    name: str, module: nn.Module, own: Mapping[str, nn.Parameter], group_of: Mapping[nn.Parameter, int]
) -> Layer:
    rule = rule_for(module)
    blocks = []
    for names in rule.blocks(module, list(own)):
        groups = {group_of[own[n]] for n in names}
        for together in [names] if len(groups) == 1 else [(n,) for n in names]:
            blocks.append(Block(together, tuple(own[n] for n in together)))
    return Layer(name, module, rule, tuple(blocks))


def _stages(
    model: nn.Module | None, layers: Sequence[Layer], stages: Sequence[str | nn.Module] | None
) -> tuple[Stage, ...]:
    if stages is None:
        return tuple(Stage(layer.name, layer.module, (i,)) for i, layer in enumerate(layers))
    if model is None:
        raise ValueError("stages needs the model itself: pass the module instead of its parameters")
    modules = dict(model.named_modules())
    names = {module: name for name, module in modules.items()}
    chosen: dict[str, nn.Module] = {}
    for stage in stages:
        name = stage if isinstance(stage, str) else names.get(stage)
        if name is None or name not in modules:
            raise ValueError(f"stages: {stage!r} is not a module of the model; use names from model.named_modules()")
        chosen[name] = modules[name]
    inside: dict[str, list[int]] = {name: [] for name in chosen}
    alone = []
    for i, layer in enumerate(layers):
        holders = [name for name in chosen if name in ("", layer.name) or layer.name.startswith(f"{name}.")]
        if len(holders) > 1:
            raise ValueError(f"stages: {holders[0]!r} and {holders[1]!r} lie inside one another; name one of them")
        if holders:
            inside[holders[0]].append(i)
        else:
            alone.append(Stage(layer.name, layer.module, (i,)))
    return (*alone, *(Stage(name, chosen[name], tuple(inside[name])) for name in chosen if inside[name]))


def matrix_of(block: Block, tensors: Sequence[Tensor]) -> Tensor:
    """A block's tensors, detached, as its matrix: a view where the block is one tensor, else a copy."""
    return block.matrix([tensor.detach() for tensor in tensors])
