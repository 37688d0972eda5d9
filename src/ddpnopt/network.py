"""What the optimizer knows of the model: its layers and their blocks, its stages, and what fits in neither.

A *layer* is a module with parameters of its own; curvature lives there. A *stage* is a point in the forward
pass where the state is cut, its deviation is measured and the weights of its layers move; by default every layer is
its own stage. A parameter of several layers is *tied*: one block, which moves with the first of them to run. Parameters
that no layer's rule can read are *loose*: the whole batch's gradient is their only column.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from .layers import Block, LayerRule, rule_for

TIED = "shared by several modules: the columns of all uses add up"
SHARED = "shared by several modules, not all of which are read: one update from the whole batch's gradient"
BARE = "not a module's: one update from the whole batch's gradient"

Held = Mapping[nn.Parameter, Tensor]


@dataclass(frozen=True)
class Layer:
    """A module with parameters of its own, the rule that reads it, and its blocks."""

    name: str
    module: nn.Module
    rule: LayerRule
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Stage:
    """A module before whose first run the state is cut, and the indices of the layers that move there."""

    name: str
    module: nn.Module
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Tied:
    """A parameter of several layers: its block, and each owner as a layer with nothing but that parameter."""

    name: str
    block: Block
    owners: tuple[Layer, ...]


@dataclass(frozen=True)
class Loose:
    """A parameter outside every layer: its block, and why it is here."""

    name: str
    block: Block
    why: str


@dataclass(frozen=True)
class Network:
    """Layers, stages, tied and loose parameters; every trained parameter is in exactly one block.

    A layer has no block of its own if all its parameters are tied.
    """

    layers: tuple[Layer, ...]
    stages: tuple[Stage, ...]
    tied: tuple[Tied, ...]
    loose: tuple[Loose, ...]

    def blocks(self) -> list[Block]:
        """Of layers, tied and loose parameters, all."""
        inside = [block for layer in self.layers for block in layer.blocks]
        return inside + [x.block for x in self.tied] + [x.block for x in self.loose]


def read_network(
    model: nn.Module | None,
    group_of: Mapping[nn.Parameter, int],
    stages: Sequence[str | nn.Module] | None,
    refused: Mapping[str, str],
    held: Held,
) -> Network:
    """Read layers, stages and loose parameters off a model.

    Args:
        model: the model, or ``None`` if the optimizer was given bare parameters.
        group_of: parameter group of each parameter to train; one block never spans two groups.
        stages: modules (or their names) whose input is the whole state; ``None``: every layer is a stage.
        refused: names of layers and parameters whose columns could not be had, with the reason; they are loose.
        held: of the blocks.

    Raises:
        ValueError: if ``stages`` names a module that does not exist, or one inside another.
    """
    owners_of = Counter(p for module in model.modules() for p in module._parameters.values()) if model else Counter()
    layers: list[Layer] = []
    loose: list[Loose] = []
    placed: set[nn.Parameter] = set()
    claimed: set[nn.Parameter] = set()  # by a rule, of children that it answers for
    shared: dict[nn.Parameter, dict[nn.Module, tuple[str, str]]] = {}
    for name, module in model.named_modules() if model else ():
        rule = rule_for(module)
        own = {n: p for n, p in rule.parameters(module).items() if p in group_of and p not in claimed}
        claimed.update(set(own.values()).difference(module._parameters.values()))
        placed.update(own.values())
        for parameter_name in [n for n, p in own.items() if owners_of[p] > 1]:
            shared.setdefault(own.pop(parameter_name), {})[module] = name, parameter_name
        apart = {n: own.pop(n) for n in list(own) if _join(name, n) in refused}
        loose += [_loose(_join(name, n), p, refused[_join(name, n)], held) for n, p in apart.items()]
        if reason := refused.get(name) or rule.refuses(module):
            loose += [_loose(_join(name, n), p, reason, held) for n, p in own.items()]
        elif module._parameters:
            layers.append(_layer(name, module, own, group_of, held))
    tied = []
    for parameter, by_owner in shared.items():
        owners = [
            _owner(layer, *by_owner[layer.module], parameter, held) for layer in layers if layer.module in by_owner
        ]
        full_name = _join(*next(iter(by_owner.values())))
        if full_name in refused:
            loose.append(_loose(full_name, parameter, refused[full_name], held))
        elif len(owners) == owners_of[parameter]:
            tied.append(Tied(full_name, owners[0].blocks[0], tuple(owners)))
        else:
            loose.append(_loose(full_name, parameter, SHARED, held))
    own_or_tied = {layer.module for layer in layers if layer.blocks} | {o.module for t in tied for o in t.owners}
    layers = [layer for layer in layers if layer.module in own_or_tied]
    loose += [_loose(f"parameter {i}", p, BARE, held) for i, p in enumerate(group_of) if p not in placed]
    return Network(tuple(layers), _stages(model, layers, stages), tuple(tied), tuple(loose))


def _owner(layer: Layer, name: str, parameter_name: str, parameter: nn.Parameter, held: Held) -> Layer:
    return Layer(name, layer.module, layer.rule, (Block((parameter_name,), (parameter,), held),))


def is_chain(model: nn.Module) -> bool:
    """Whether a model is nested ``nn.Sequential`` of modules that hold no layers inside and share nothing, each once.

    A layer's input is then the whole state.
    """
    modules = flattened(model)
    own = [p for module in modules for p in module._parameters.values() if p is not None]
    return len(set(modules)) == len(modules) and len(own) == len(set(own)) == len(list(model.parameters()))


def is_sequential(module: object) -> bool:
    """Whether a module runs its children one after another and does nothing else."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def flattened(module: nn.Module) -> list[nn.Module]:
    """The modules that nested ``nn.Sequential`` run one after another."""
    if not is_sequential(module) or module._parameters:
        return [module]
    return [inner for child in module._modules.values() if child is not None for inner in flattened(child)]


def block_name(layer: Layer, block: Block) -> str:
    """Of a layer's block, by its first parameter."""
    return _join(layer.name, block.names[0])


def _join(module: str, parameter: str) -> str:
    return f"{module}.{parameter}" if module else parameter


def _loose(name: str, parameter: nn.Parameter, why: str, held: Held) -> Loose:
    return Loose(name, Block(("",), (parameter,), held), why)


def _layer(
    name: str, module: nn.Module, own: Mapping[str, nn.Parameter], group_of: Mapping[nn.Parameter, int], held: Held
) -> Layer:
    rule = rule_for(module)
    blocks = []
    for names in rule.blocks(module, list(own)) if own else ():
        groups = {group_of[own[n]] for n in names}
        for together in [names] if len(groups) == 1 else [(n,) for n in names]:
            blocks.append(Block(together, tuple(own[n] for n in together), held))
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
