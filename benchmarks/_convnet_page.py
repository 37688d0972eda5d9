"""The page that benchmarks/convnet.py writes: a function of the comparisons, in Markdown."""

from collections.abc import Sequence

from _convnet_study import Comparison, Row, failures
from _markdown import duration, number, plural, table, verdict
from _training import TUNING_SEEDS

from ddpnopt.experiments import data
from ddpnopt.experiments.config import OPTIMIZERS, resolve

_INTRODUCTION = f"""# A small convolutional network

Two 3x3 convolutions of stride 2 (16 and 32 channels) and two dense layers, ReLU. DDPNOpt runs with its default
settings but for weight decay, of which neither has any, *not tuned at all*, in the drop-in form `loss.backward();
optimizer.step()`; Adam runs with the learning rate that is best on validation data, chosen anew for each number of
steps. This page is written by the command named under each dataset, from the runs in [`records`](records); it reports
what they say, gains and losses alike.

* **Same for both**: initial weights and order of the samples (paired by seed), batch size, number of steps.
  *Not* the same: computing time; the cost of a step stands under each table.
* **Split**: fixed; DIGITS 70 % train, 10 % validation, 20 % test within each class; Fashion-MNIST its own test part,
  validation on the last 5,000 training samples. Intervals cover initial weights and order of samples, not the split.
* **Tuning**: Adam's learning rate is the one of highest mean validation accuracy over {len(TUNING_SEEDS)} seeds that
  are not among those reported; ties go to the lower final train loss. The test part chooses nothing.
  Not tuned, for either: moving averages, weight decay (none), batch size, schedule (constant).
* **Numbers**: test accuracy in percent, mean over seeds ± 95 % t interval; differences paired by seed.
"""


def page(comparisons: Sequence[Comparison], command: str) -> str:
    """Return the whole page.

    Args:
        comparisons: one for each dataset that is complete.
        command: what repeats a dataset's part, less its name.
    """
    return "\n".join([_INTRODUCTION, *(_section(comparison, command) for comparison in comparisons)])


def _section(comparison: Comparison, command: str) -> str:
    study, source = comparison.study, data.source(comparison.study.dataset)
    batch = resolve(study.run("adam", study.adam_lrs[0], 0).config).batch_size
    own, adam = 1000 * comparison.own_step, 1000 * comparison.adam_step
    cost = f"{len(study.runs())} runs, {duration(comparison.seconds)} of computing on one thread"
    return f"""## {source.title}

Batch {batch}, {plural(study.seeds, "seed")}.

{_leads(comparison)}

A step took DDPNOpt {own:.2f} ms and Adam {adam:.2f} ms: {own / adam:.1f} times as long.
Diverged runs of DDPNOpt: {comparison.diverged} of {study.seeds}.

Adam with each learning rate (bold: the one chosen on validation data):

{_rates(comparison)}

{_claims(comparison)}

Command: `{command} --dataset {study.dataset}` ({cost}, torch {", ".join(comparison.torch)}).

Settings:
* `{comparison.methods[0]}`, learning rate {OPTIMIZERS["ddpnopt"].lr:g}
* `{comparison.methods[1]}`
"""


def _leads(comparison: Comparison) -> str:
    header = ["steps", "DDPNOpt", "Adam, tuned", "its learning rate", "DDPNOpt minus Adam", "DDPNOpt is"]
    return table(header, (_lead(row) for row in comparison.rows))


def _lead(row: Row) -> list[str]:
    lead = number(row.lead, sign=True)
    return [str(row.steps), number(row.own), number(row.adam), f"{row.adam_lr:g}", lead, verdict(row.lead)]


def _rates(comparison: Comparison) -> str:
    header = ["steps", *(f"{lr:g}" for lr in comparison.study.adam_lrs)]
    return table(header, ([str(row.steps), *_rate_cells(row)] for row in comparison.rows))


def _rate_cells(row: Row) -> list[str]:
    cells = {lr: f"{interval.mean:.1f}" for lr, interval in row.by_rate.items()}
    return [f"**{cell}**" if lr == row.adam_lr else cell for lr, cell in cells.items()]


def _claims(comparison: Comparison) -> str:
    faults = list(failures(comparison))
    if not faults:
        return "The checks of `--check` hold here."
    return "\n".join(["Of the checks of `--check`, these do **not** hold:", "", *(f"* {fault}" for fault in faults)])
