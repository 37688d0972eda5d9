"""Probes of what must not happen: poisoned weights, leaks, buffers moved twice, other masks in a second pass."""

import gc
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from .methods import Method
from .probing import demand, finite, probe, run
from .problems import Problem, batch_norm_mlp, dropout_mlp, mlp

LEAK = 6 * 2**20  # bytes; the activations of 180 steps are three times that


@probe("NaN batch leaves the weights finite")
def nan_batch(method: Method) -> str:
    """One NaN in the inputs: the step either raises and leaves the weights as they were, or leaves them finite; and the
    next good batch trains them on.
    """
    problem = mlp()
    trainer = method.make(problem.model)
    before = run(trainer, problem)
    broken = problem.inputs[0].clone()
    broken[3, 2] = float("nan")
    try:
        trainer.step(Problem(problem.model, (broken,), problem.target))
        answer = "skipped" if torch.equal(before, problem.weights()) else "went on"
        demand(finite(problem), "weights are NaN")
    except (RuntimeError, ValueError, ArithmeticError) as error:
        answer = f"{type(error).__name__}: {error}"
        demand(torch.equal(before, problem.weights()), f"weights changed, then {answer}")
    try:
        after = run(trainer, problem, 2)
    except Exception as error:
        demand(False, f"{answer}; then the next good batch fails: {type(error).__name__}: {error}")
    demand(finite(problem), f"{answer}; then weights are NaN after the next good batch")
    demand(not torch.equal(before, after), f"{answer}; then the next good batch does not train")
    return answer


@probe("smaller last batch")
def smaller_batch(method: Method) -> str:
    """One step on 8 samples, one on 5, one on 8: all run, the weights stay finite, and the loss of the 8 falls."""
    problem = mlp()
    trainer, loss = method.make(problem.model), problem.value()
    for batch in (problem, problem.rows(slice(5)), problem):
        trainer.step(batch)
    demand(finite(problem), "weights are not finite")
    demand((now := problem.value()) < loss, f"loss rose from {loss:.4f} to {now:.4f}")
    return ""


def _hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def _held() -> tuple[int, int]:
    """Number of live tensors, and bytes of memory that this process holds (0 where the system does not tell)."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated objects that only looking at them complains about
        tensors = sum(isinstance(thing, Tensor) for thing in gc.get_objects())
    pages = Path("/proc/self/statm")
    return tensors, int(pages.read_text().split()[1]) * 4096 if pages.exists() else 0


@probe("no leak over 200 steps")
def leak(method: Method) -> str:
    """From step 20 to step 200 there are no more live tensors and hooks, and memory grows by less than 6 MiB; kept
    activations would be over 15.
    """
    problem = mlp(batch=64, width=192)
    trainer = method.make(problem.model)
    run(trainer, problem, 20)
    tensors, memory, hooks = *_held(), _hooks(problem.model)
    run(trainer, problem, 180)
    now, memory_now = _held()
    demand(now <= tensors, f"{now - tensors} tensors more")
    demand(_hooks(problem.model) <= hooks, f"{_hooks(problem.model) - hooks} hooks more")
    demand(memory_now - memory < LEAK, f"{(memory_now - memory) / 2**20:.0f} MiB more")
    return ""


@probe("BatchNorm counts once per step")
def batch_norm_count(method: Method) -> str:
    """After one step `num_batches_tracked` is 1."""
    problem = batch_norm_mlp()
    run(method.make(problem.model), problem, 1)
    count = int(problem.model.get_buffer("1.num_batches_tracked"))
    demand(count == 1, f"{count} times")
    return ""


@probe("one dropout mask per step")
def dropout(method: Method) -> str:
    """However often a step runs the model, the dropout mask is the same, and the next step has another."""
    problem = dropout_mlp()
    trainer = method.make(problem.model)
    masks: list[Tensor] = []
    layer = problem.model.get_submodule("2")
    handle = layer.register_forward_hook(lambda module, inputs, output: masks.append(output.detach() == 0))
    run(trainer, problem, 1)
    first = masks[:]
    masks.clear()
    run(trainer, problem, 1)
    handle.remove()
    for step in (first, masks):
        demand(all(torch.equal(mask, step[0]) for mask in step), f"{len(step)} passes, not the same mask")
    demand(not torch.equal(first[0], masks[0]), "the mask never changes")
    return f"{len(first)} passes, same mask" if len(first) > 1 else ""
