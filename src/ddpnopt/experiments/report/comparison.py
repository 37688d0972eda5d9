"""Write a comparison's files: ``comparison.json``, ``loss.png`` and the page ``index.html``."""

from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ddpnopt.experiments import files
from ddpnopt.experiments.compare import TUNING_SEEDS, CompareConfig, Comparison, run_config
from ddpnopt.experiments.config import resolve
from ddpnopt.experiments.data import Dataset
from ddpnopt.experiments.environment import environment
from ddpnopt.experiments.report.curves import Curve, loss_curve
from ddpnopt.experiments.report.page import render, strict
from ddpnopt.experiments.report.plots import accuracy_figure, loss_figure, save_png, to_svg
from ddpnopt.experiments.report.tables import cells, header, verdict

PAGE, CURVES, NUMBERS = "index.html", "loss.png", "comparison.json"


def write(comparison: Comparison, dataset: Dataset, folder: Path) -> Path:
    """Write the three files into the comparison's folder; returns the page's path."""
    config = comparison.config
    curves: dict[str, Curve] = {
        row.optimizer: loss_curve(f"{row.optimizer}, lr {row.choice.lr:g}", row.folders) for row in comparison.rows
    }
    losses = loss_figure(f"{dataset.source.title}, {config.seeds} seed{'s' * (config.seeds > 1)}", curves)
    accuracies = accuracy_figure(
        {row.optimizer: row.accuracies for row in comparison.rows},
        {row.optimizer: row.accuracy for row in comparison.rows},
    )
    files.write_json(folder / NUMBERS, numbers(comparison))
    save_png(losses, folder / CURVES)
    svg = {
        "loss_svg": to_svg(losses, "loss", "train loss by step and by time"),
        "accuracy_svg": to_svg(accuracies, "accuracy", "test accuracy of every seed"),
    }
    context = _context(comparison, dataset) | {name: Markup(element) for name, element in svg.items()}
    files.write_atomic(folder / PAGE, render("compare.html.j2", context))
    return folder / PAGE


def numbers(comparison: Comparison) -> dict[str, Any]:
    """Return everything the page shows as plain values for JSON: accuracies 0 to 1, no NaN, no paths."""
    return {
        "config": asdict(comparison.config),
        "reference": comparison.reference,
        "tuning_seeds": list(TUNING_SEEDS),
        "environment": environment(1),
        "rows": [
            strict({key: value for key, value in asdict(row).items() if key != "folders"})
            | {"folders": [folder.name for folder in row.folders]}
            for row in comparison.rows
        ],
    }


def command(config: CompareConfig) -> str:
    """Return the command line that asks for this comparison."""
    default, words = CompareConfig(), ["ddpnopt", "compare", config.dataset]
    for field in fields(CompareConfig):
        value, flag = getattr(config, field.name), field.name.replace("_", "-")
        if field.name == "dataset" or value == getattr(default, field.name):
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *(value if isinstance(value, tuple) else [str(value)])]
    return " ".join(words)


def _context(comparison: Comparison, dataset: Dataset) -> dict[str, Any]:
    config = comparison.config
    return {
        "title": f"{dataset.source.title}: {', '.join(config.optimizers)}",
        "verdict": verdict(comparison),
        "header": header(comparison),
        "rows": [(row.difference is None, cells(row)) for row in comparison.rows],
        "seeds": config.seeds,
        "diverged": any(row.diverged for row in comparison.rows),
        "log_every": run_config(config, comparison.reference, None, 0).log_every,
        "untuned": ", ".join(row.optimizer for row in comparison.rows if not row.choice.trials),
        "tuning_seeds": len(TUNING_SEEDS),
        "tunings": [
            {
                "optimizer": row.optimizer,
                "at_edge": row.choice.at_edge,
                "trials": [
                    {"text": f"{trial.lr:g}: {trial.accuracy:.1%}", "chosen": trial.lr == row.choice.lr}
                    for trial in row.choice.trials
                ],
            }
            for row in comparison.rows
            if row.choice.trials
        ],
        "facts": list(_facts(comparison, dataset)),
    }


def _facts(comparison: Comparison, dataset: Dataset) -> Iterator[tuple[str, str]]:
    config, source = comparison.config, dataset.source
    run = resolve(run_config(config, comparison.reference, None, 0))
    network = f"5 dense layers, width {source.width}, {source.activation.title()}"
    yield "command", command(config)
    yield (
        "data",
        f"{source.title}, {source.classes} classes, inputs of shape {' x '.join(map(str, source.shape))}; "
        f"{len(dataset.train)} train, {len(dataset.validation)} validation, {len(dataset.test)} test samples",
    )
    yield "network", network if run.model == "fcn" else "2 convolutions, 2 dense layers, ReLU"
    yield (
        "budget",
        f"{run.epochs} epoch{'s' * (run.epochs != 1)} of batches of {run.batch_size}, for every optimizer",
    )
    sgd = "sgd with momentum 0.9; " * ("sgd" in config.optimizers)
    decay = resolve(run_config(config, "ddpnopt", None, 0)).weight_decay
    own = f"; weight decay {decay:g} for ddpnopt, none for the others" * ("ddpnopt" in config.optimizers)
    yield "settings", f"{sgd}all else each optimizer's own defaults{own}"
    yield (
        "software",
        ", ".join(f"{key} {value}" for key, value in environment(1).items() if value is not None),
    )
