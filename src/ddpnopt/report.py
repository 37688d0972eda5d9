"""What the optimizer will do with every parameter, and at what cost, told before training."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from .columns import WIDEST
from .curvature import Curvature, Identity, Kronecker
from .network import BARE, SHARED, TIED, Layer, Network, Tied

FROZEN = "frozen: requires_grad is False"
REMEDIES = {
    "generic": "none needed while small; else use the plain Linear, Conv or norm class (a subclass has its own type)",
    SHARED: "nothing is left out; for columns of their own, give the modules a parameter each",
    BARE: "pass the model itself, DDPNOpt(model), with every parameter in the module that is called with it",
    FROZEN: "requires_grad_(True) trains it from the next step on",
}
"""By rule or by the reason why there is none."""

FAILED = "let every sample's output depend on that sample alone, along the first dimension"
HELD = (
    "held: numbers kept per column (per position, where a layer has several); gram: multiply-adds per pair of columns"
)


@dataclass(frozen=True)
class Row:
    """One layer or loose parameter.

    Args:
        name, kind, parameters: where, what, how many numbers are in it (those trained; frozen ones have a row of
            their own).
        rule, why: which rule reads it, ``"base"`` for an update from the whole batch's gradient, ``"none"`` for none.
        curvature: used there.
        held, gram: numbers kept and multiply-adds of the Gram matrix, see ``HELD``; a batch of B samples with R
            columns each has ``R B`` columns, and ``(R B)^2`` pairs in the batch form, ``R^2 B`` in the sample form.
        remedy: what to do about it, where there is something.
    """

    name: str
    kind: str
    parameters: int
    rule: str
    why: str
    curvature: str
    held: int
    gram: int
    remedy: str = ""


@dataclass(frozen=True)
class Report:
    """Rows for every parameter; ``print(optimizer.report())`` is a table."""

    curvature: str
    coupling: str
    feedback: str
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        head = ("layer", "type", "parameters", "rule", "curvature", "held", "gram", "why")
        cells = [
            (r.name, r.kind, f"{r.parameters:,}", r.rule, r.curvature, f"{r.held:,}", f"{r.gram:,}", r.why)
            for r in self.rows
        ]
        widths = [max(len(row[i]) for row in (head, *cells)) for i in range(len(head))]
        numbers = {head.index(name) for name in ("parameters", "held", "gram")}
        lines = [
            "  ".join(
                cell.rjust(w) if i in numbers else cell.ljust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in (head, *cells)
        ]
        remedies = [f"{row.name}: {row.remedy}" for row in self.rows if row.remedy]
        return "\n".join(
            [f"coupling {self.coupling}, curvature {self.curvature}, feedback {self.feedback}", *lines, HELD, *remedies]
        )


def describe(
    network: Network,
    curvature: Curvature,
    coupling: str,
    names: Mapping[nn.Parameter, str],
    frozen: Mapping[str, nn.Parameter],
    *,
    feedback: str,
    columns: bool,
) -> Report:
    """The report of a network under a curvature.

    Args:
        network: of what is trained.
        curvature, coupling: the optimizer's.
        names: of loose parameters; those that have none keep the network's.
        frozen: parameters that are not trained, by name.
        feedback: whether stages answer to deviations, in words.
        columns: whether the optimizer forms columns at all; plain SGD and RMSprop need none.
    """
    rows = [_of_layer(layer, curvature, columns=columns) for layer in network.layers if layer.blocks]
    rows += [_of_tied(tied, curvature, columns=columns) for tied in network.tied]
    base = _kind(curvature.without_factors())
    for loose in network.loose:
        parameter = loose.block.parameters[0]
        n = parameter.numel()
        remedy = REMEDIES.get(loose.why, FAILED if "failed" in loose.why else "")
        name = names.get(parameter, loose.name) if loose.why == BARE else loose.name
        rows.append(Row(name, "parameter", n, "base", loose.why, base, n, n, remedy))
    rows += [
        Row(name, "parameter", p.numel(), "none", FROZEN, "", 0, 0, REMEDIES[FROZEN]) for name, p in frozen.items()
    ]
    return Report(repr(curvature), coupling, feedback, tuple(rows))


def _of_layer(layer: Layer, curvature: Curvature, *, columns: bool) -> Row:
    # a curvature that is no Kronecker product needs the gradients of single samples
    factored = layer.rule.name == "linear" and isinstance(curvature, Identity | Kronecker)
    sides = [block.shape for block in layer.blocks]
    held = sum(out + fan_in if layer.rule.name == "linear" else out * fan_in for out, fan_in in sides)
    gram = sum(out + fan_in if factored else out * fan_in for out, fan_in in sides)
    wide = any(max(out, fan_in) > WIDEST for out, fan_in in sides) and curvature.needs_columns
    return Row(
        layer.name or "(model)",
        type(layer.module).__name__,
        sum(p.numel() for block in layer.blocks for p in block.parameters),
        layer.rule.name,
        layer.rule.why,
        _kind(curvature) + (f" (diagonal beyond {WIDEST:,})" if wide else ""),
        held if columns else 0,
        gram if columns else 0,
        REMEDIES.get(layer.rule.name, "") if columns else "",
    )


def _of_tied(tied: Tied, curvature: Curvature, *, columns: bool) -> Row:
    owners = [_of_layer(owner, curvature, columns=columns) for owner in tied.owners]
    rules, n = " + ".join(owner.rule for owner in owners), tied.block.parameters[0].numel()
    held, gram = sum(owner.held for owner in owners), max(owner.gram for owner in owners)
    return Row(tied.name, "parameter", n, rules, TIED, owners[0].curvature, held, gram, "")


def _kind(curvature: Curvature) -> str:
    return type(curvature).__name__
