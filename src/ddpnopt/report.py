"""What the optimizer will do with every parameter, told before training."""

from dataclasses import dataclass

from .curvature import Curvature
from .network import TIED, Network


@dataclass(frozen=True)
class Row:
    """One layer or loose parameter: where, what, how many numbers, read by which rule, and why."""

    name: str
    kind: str
    parameters: int
    rule: str
    why: str


@dataclass(frozen=True)
class Report:
    """Rows for every trained parameter; ``print(optimizer.report())`` is a table."""

    curvature: str
    coupling: str
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        head = ("layer", "type", "parameters", "rule", "why")
        cells = [(r.name, r.kind, f"{r.parameters:,}", r.rule, r.why) for r in self.rows]
        widths = [max(len(row[i]) for row in (head, *cells)) for i in range(5)]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (head, *cells)
        ]
        return "\n".join([f"coupling {self.coupling}, curvature {self.curvature}", *lines])


def describe(network: Network, curvature: Curvature, coupling: str) -> Report:
    """The report of a network under a curvature."""
    rows = [
        Row(
            layer.name or "(model)",
            type(layer.module).__name__,
            sum(p.numel() for block in layer.blocks for p in block.parameters),
            layer.rule.name,
            layer.rule.why,
        )
        for layer in network.layers
        if layer.blocks
    ]
    for tied in network.tied:
        rules = " + ".join(owner.rule.name for owner in tied.owners)
        rows.append(Row(tied.name, "parameter", tied.block.parameters[0].numel(), rules, TIED))
    rows += [Row(x.name, "parameter", sum(p.numel() for p in x.block.parameters), "base", x.why) for x in network.loose]
    return Report(repr(curvature), coupling, tuple(rows))
