"""From recorded passes to the columns of every stage's blocks, and what is refused on the way."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .columns import Columns, OuterColumns, ScaledColumns, over_batches, over_uses
from .conditions import redrawn
from .coupling import relinearises
from .layers import Block, Call, rule_for
from .layers.generic import depends_on
from .linearise import Linearised
from .network import Layer, Network, Stage, Tied, block_name
from .passes import Run, wide
from .rollout import Later
from .task import Outcome, Task

LARGEST = 1 << 26
"""Numbers that a tied parameter's per-sample gradients may hold, where its uses have columns of two forms."""

STRAY = (
    "a parameter of it is used outside its own runs: one update from the whole batch's gradient. For columns of its "
    "own, use the parameter by calling the module"
)
SILENT = (
    "it was not seen to run on the batch: one update from the whole batch's gradient. For columns of its own, let the "
    "model call the module itself on a tensor that leads with the batch, use no functional form of it, and make the "
    "optimizer before torch.compile's code first runs"
)


def blocks_by_stage(
    task: Task, linearised: Sequence[Linearised], outcome: Outcome
) -> dict[Stage, list[tuple[Block, Columns]]]:
    """Blocks with their columns, by stage, in the order the stages ran.

    What a layer's runs hold is let go of as soon as it has been read for the last time, but at the stages that no
    product speaks for (the first): there it stays until the policies are found finite.
    """
    later = _read_later(task.network, linearised)
    known = {m for one in linearised for m, v in one.recorded.visits.items() if any(p is not None for p in v.products)}
    stage_of = {stage.module: stage for stage in task.network.stages}
    visited = list(dict.fromkeys(module for one in linearised for module in one.recorded.visits))
    ran = [stage_of[module] for module in visited if module in stage_of]
    tied_at: dict[nn.Module, list[Tied]] = {}  # a tied parameter moves with the first of its owners
    for tied in task.network.tied:
        owners = {owner.module for owner in tied.owners}
        for first in [module for module in visited if module in owners][:1]:
            tied_at.setdefault(first, []).append(tied)
    found = {}
    for stage in ran:
        pairs = []
        for layer in (task.network.layers[index] for index in stage.layers):
            pairs += without_strays(task, layer, read_layer(task, layer, linearised, outcome), linearised, outcome)
            for tied in tied_at.get(layer.module, ()):
                pairs += read_tied(task, tied, linearised, outcome)
            if stage.module in known and layer.module not in later:
                let_go(task, linearised, layer.module)
        if pairs:
            found[stage] = pairs
    return found


def let_go(task: Task, linearised: Sequence[Linearised], layer: nn.Module | None = None) -> None:
    """Drop what was recorded of a layer's runs, or all layers', and has been read.

    Of passes that are not spent everything stays (no feedback, or something is not finite); gradients stay if stages
    are solved again in the rollout, and at dense layers, whose columns hold them.
    """
    again = relinearises(task.coupling)
    for recorded in (one.recorded for one in linearised if one.recorded.spent):
        for run in recorded.runs:
            if layer is None or run.layer is layer:
                run.let_go(cotangents=not again and rule_for(run.layer).name != "linear")


def _read_later(network: Network, linearised: Sequence[Linearised]) -> set[nn.Module]:
    """Layers whose runs are read more than once: they share a parameter, or run on after another stage's cut."""
    found = {owner.module for tied in network.tied for owner in tied.owners}
    for one in linearised:
        later = one.recorded.state.later.values() if one.recorded.state is not None else ()
        found |= {one.recorded.runs[i].layer for places in later for i in places}
    return found


def read_layer(
    task: Task, layer: Layer, linearised: Sequence[Linearised], outcome: Outcome
) -> list[tuple[Block, Columns]]:
    """The layer's blocks with their columns; none if no gradient reached it or its rule fails."""
    assert task.recorder is not None
    with task.recorder.paused():
        if layer.rule.name != "generic":
            return list(zip(layer.blocks, _columns_of(layer, linearised) or _absent(task, layer), strict=False))
        try:
            pairs = list(zip(layer.blocks, _columns_of(layer, linearised) or _absent(task, layer), strict=False))
        except Exception as error:  # vmap refuses modules in ways of its own, none of them the user's fault
            said = str(error).partition("\n")[0].partition(". ")[0]
            outcome.refused[layer.name] = (
                f"the generic rule failed ({said}): one update from the whole batch's gradient"
            )
            return []
    # a module need not use every parameter it has; one that got no gradient stays, as in torch
    return [(block, columns) for block, columns in pairs if all(p in task.gradients for p in block.parameters)]


def _absent(task: Task, layer: Layer) -> list[Columns]:
    """Columns of zero of a layer on which the loss depends through derivatives of the model alone; else none."""
    runs = [run for one in task.passes for run in one.runs if run.layer is layer.module]
    if not (task.derived and runs) or any(run.misfit or run.stray for run in runs):
        return []
    if not any(p in task.gradients for block in layer.blocks for p in block.parameters):
        return []
    batch = sum(one.batch for one in task.passes)
    found: list[Columns] = []
    for block in layer.blocks:
        numbers = wide(block.parameters[0])
        out, fan_in = block.shape
        found.append(OuterColumns(numbers.new_zeros(1, batch, 1, out), numbers.new_zeros(batch, 1, fan_in)))
    return found


def without_strays(
    task: Task,
    layer: Layer,
    pairs: list[tuple[Block, Columns]],
    linearised: Sequence[Linearised],
    outcome: Outcome,
) -> list[tuple[Block, Columns]]:
    """Refuse parameters that have a gradient though no output of their module depends on them: the loss does, say."""
    found = []
    for block, columns in pairs:
        if layer.rule.name == "generic" and _is_nought(columns, block) and _has_gradient(task, block):
            runs = [run for one in linearised for run in one.recorded.runs if run.layer is layer.module]
            with nullcontext() if task.recorder is None else task.recorder.paused():
                if not any(depends_on(layer.module, block, Call(run.args, run.kwargs, ())) for run in runs):
                    outcome.refused[block_name(layer, block)] = STRAY
                    continue
        found.append((block, columns))
    return found


def _is_nought(columns: Columns, block: Block) -> bool:
    ones = torch.ones(columns.count, columns.batch, dtype=torch.float64, device=block.parameters[0].device)
    return not bool(columns.weighted(ones).any())


def _has_gradient(task: Task, block: Block) -> bool:
    """Any but 0; on several ranks, which have to agree, any."""
    gradient = task.gradient(block)
    return gradient is not None and (task.accord.several or bool(gradient.any()))


def read_tied(
    task: Task, tied: Tied, linearised: Sequence[Linearised], outcome: Outcome
) -> list[tuple[Block, Columns]]:
    """The same of a parameter of several layers: all their columns, or none."""
    modules = {owner.module for owner in tied.owners}
    runs = [run for one in linearised for run in one.recorded.runs if run.layer in modules]
    if any(run.misfit or run.stray for run in runs):
        return []
    uses = [columns for owner in tied.owners for _, columns in read_layer(task, owner, linearised, outcome)]
    if not uses or any(owner.name in outcome.refused for owner in tied.owners):
        return []
    # uses of two forms add up only where each sample's gradient is formed
    forms = {type(use.columns if isinstance(use, ScaledColumns) else use) for use in uses}
    numbers = uses[0].count * uses[0].batch * math.prod(tied.block.shape)
    if len(forms) > 1 and numbers > LARGEST:
        outcome.refused[tied.name] = (
            f"its gradients, sample by sample, are {numbers:,} numbers: one update from the whole batch's gradient. "
            "For columns of its own, give each use a parameter"
        )
        return []
    return [(tied.block, over_uses(uses))]


def read_all(task: Task, linearised: Sequence[Linearised]) -> Iterator[tuple[Block, Columns]]:
    """Every block that has columns; what is refused on the way is not told."""
    for layer in task.network.layers:
        own = read_layer(task, layer, linearised, Outcome())
        yield from without_strays(task, layer, own, linearised, Outcome())
    for tied in task.network.tied:
        yield from read_tied(task, tied, linearised, Outcome())


def _later_columns(
    layer: Layer, linearised: Sequence[Linearised], trained: Collection[Block]
) -> dict[nn.Module, list[tuple[Block, Columns]]]:
    """By stage, the columns of the runs of a layer that follow the stage's cut, where the layer has moved before it.

    Args:
        layer: the layer.
        linearised: passes with the same states.
        trained: the blocks that move.
    """
    found: dict[nn.Module, list[tuple[Block, Columns]]] = {}
    state = linearised[0].recorded.state
    for stage, later in state.later.items() if state is not None else ():
        own = {i: used for i, used in later.items() if linearised[0].recorded.runs[i].layer is layer.module}
        for i, block in enumerate(layer.blocks):
            after = [n for n, used in own.items() if used is None or used.issuperset(block.parameters)]
            runs = [[one.recorded.runs[n] for n in after] for one in linearised]
            if after and block in trained and (columns := _columns_of_runs(layer, linearised, runs)) is not None:
                found.setdefault(stage, []).append((block, columns[i]))
    return found


def later_by_stage(
    task: Task, linearised: Sequence[Linearised], blocks: Mapping[Stage, Sequence[tuple[Block, Columns]]]
) -> dict[Stage, Later]:
    """What is still to run of layers after they have moved; read at the nominal weights, before any moves."""
    assert task.recorder is not None
    found: dict[Stage, Later] = {}
    with task.recorder.paused():
        for stage, pairs in blocks.items():
            if linearised[0].recorded.state is None:
                continue
            moving = {block for block, _ in pairs}
            layers = [task.network.layers[index] for index in stage.layers]
            owners = [owner for tied in task.network.tied if tied.block in moving for owner in tied.owners]
            moving |= {block for owner in owners for block in owner.blocks}
            of_stage: dict[nn.Module, list[tuple[Block, Columns]]] = {}
            for layer in (*layers, *owners):
                for later, own in _later_columns(layer, linearised, moving).items():
                    of_stage.setdefault(later, []).extend(own)
            found[stage] = of_stage
    return found


def name_the_silent(task: Task, read: set[nn.Parameter], outcome: Outcome) -> set[nn.Parameter]:
    """Refuse layers that have a gradient but no columns: they were used other than by a call on the batch.

    Returns:
        parameters of layers that had columns in an earlier step: they sit this one out, and their gradient is that of a
        penalty, or one that was left over.
    """
    absent: set[nn.Parameter] = set()
    for layer in task.network.layers:
        blocks = [block for block in layer.blocks if block_name(layer, block) not in outcome.refused]
        parameters = [p for block in blocks for p in block.parameters if p in task.gradients]
        if layer.name in outcome.refused or not parameters or not read.isdisjoint(parameters):
            continue
        ran = any(run.layer is layer.module for one in task.passes for run in one.runs)
        if not ran and any(block.parameters[0] in task.state for block in blocks):
            absent.update(parameters)
            continue
        stray = any(run.layer is layer.module and run.stray for one in task.passes for run in one.runs)
        outcome.refused[layer.name] = STRAY if stray else SILENT
    return absent


def _columns_of(layer: Layer, linearised: Sequence[Linearised]) -> list[Columns] | None:
    """Columns of each of a layer's blocks over all passes.

    ``None`` if no gradient reached the layer, or its outputs do not lead with the batch; a pass that did not use it
    has columns of zero.
    """
    runs = [[run for run in one.recorded.runs if run.layer is layer.module] for one in linearised]
    if any(run.misfit or run.stray for part in runs for run in part):
        return None
    return _columns_of_runs(layer, linearised, runs)


def _columns_of_runs(
    layer: Layer, linearised: Sequence[Linearised], runs: Sequence[Sequence[Run]]
) -> list[Columns] | None:
    """The same over some runs of each pass; ``None`` if no gradient reached any."""
    parts: list[list[Columns] | None] = []
    for one, own in zip(linearised, runs, strict=True):
        calls = [
            (run, [None if c is None else one.unscaled(c, d) for c, d in zip(run.cotangents, run.dims, strict=True)])
            for run in own
            if any(c is not None for c in run.cotangents)
        ]
        uses = [_columns_of_run(layer, run, cotangents) for run, cotangents in calls]
        found = [over_uses([use[i] for use in uses]) for i in range(len(layer.blocks))] if uses else None
        if found and one.scale is not None:  # gradients are linear in the cotangents, sample by sample
            found = [ScaledColumns(columns, one.scale) for columns in found]
        parts.append(found)
    some = next((part for part in parts if part is not None), None)
    if some is None:
        return None
    batches = [one.recorded.batch for one in linearised]
    filled = [p or [block.absent(batch) for block in some] for p, batch in zip(parts, batches, strict=True)]
    return [over_batches([part[i] for part in filled]) for i in range(len(layer.blocks))]


def _columns_of_run(layer: Layer, run: Run, cotangents: Sequence[Tensor | None]) -> list[Columns]:
    with nullcontext() if run.rng is None else redrawn(layer.module, run.rng):
        args, kwargs = run.args, run.kwargs
        if run.dims[0] and layer.rule.positionwise(layer.module):
            args, kwargs = pytree.tree_map_only(Tensor, lambda x: x.movedim(run.dims[0], 0), (args, kwargs))
        return layer.rule.columns(layer.module, layer.blocks, Call(args, kwargs, cotangents))
