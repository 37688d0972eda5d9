"""Whatever fails on one rank fails on all, nobody hangs, and a run goes on from its last checkpoint."""

import functools
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from incidents import AT, long_run
from launch import launch
from sharded_incidents import all_incidents
from torch import Tensor

pytestmark = pytest.mark.xdist_group("failures")  # the incidents are run once for all

SIZE = 3


@functools.cache
def incidents() -> list[dict[str, dict[str, Any]]]:
    return launch(SIZE, all_incidents)


def told(name: str, step: int = 1) -> list[str]:
    """What each rank raised in a step, empty if nothing; the steps around it must have gone well."""
    found = [rank[name] for rank in incidents()]
    for rank in found:
        assert [word for i, word in enumerate(rank["told"]) if i != step and word] == []
        assert equal(rank["weights"], found[0]["weights"])
    return [rank["told"][step] for rank in found]


def equal(ones: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def others(words: list[str]) -> list[str]:
    return [word for rank, word in enumerate(words) if rank != AT]


def test_a_batch_with_nan_on_one_rank_is_refused_by_all() -> None:
    words = told("spoiled")
    assert words[AT].startswith("NonFiniteError: the columns of the batch are not finite: the input of layer '0'")
    for word in others(words):
        assert word.startswith(f"NonFiniteError: rank {AT} of {SIZE}: the columns of the batch are not finite")
        assert "layer '0' (Linear)" in word
        assert word.count("weights and optimizer state are unchanged") == 1


def test_or_left_out_by_all() -> None:
    assert told("skipping") == [""] * SIZE
    assert [rank["skipping"]["figures"]["skipped_steps"] for rank in incidents()] == [1] * SIZE
    assert equal(incidents()[0]["skipping"]["weights"], incidents()[0]["spoiled"]["weights"])


@pytest.mark.parametrize("name", ["breaking", "breaking_last"])
def test_a_model_that_raises_in_its_second_pass_on_one_rank(name: str) -> None:
    words = told(name)
    assert words[AT] == "KeyError: 'the model broke'"
    for word in others(words):
        assert word == f"StepError: rank {AT} of {SIZE}: KeyError: 'the model broke'; no rank has moved"


def test_a_step_without_a_backward_pass_on_one_rank() -> None:
    words = told("without_backward")
    assert words[AT].startswith("StepError: step() found no gradient")
    for word in others(words):
        assert word.startswith(f"StepError: rank {AT} of {SIZE}: step() found no gradient")


def test_a_batch_that_is_empty_on_all_ranks() -> None:
    assert told("nobody", 0) == ["StepError: the batch is empty on every rank"] * SIZE


def test_what_a_scaler_finds_on_one_rank_all_leave_out() -> None:
    assert told("scaler_found_inf") == [""] * SIZE
    assert [rank["scaler_found_inf"]["figures"]["skipped_steps"] for rank in incidents()] == [1] * SIZE


def test_ranks_that_run_different_layers() -> None:
    for word in told("two_ways"):
        assert word.startswith("StepError: ranks 0 and 1 took different ways through the model: left.weight on one")
        assert "right.weight" in word


def test_what_works_in_one_process_only_is_refused_by_name() -> None:
    for rank in incidents():
        dense, relinearised = rank["refused"]["told"]
        assert dense.startswith(f"StepError: this process group has {SIZE} ranks, and coupling=Dense(")
        assert "coupling=Batch(relinearise=True)" in relinearised


def test_a_failure_on_one_rank_of_a_sharded_model() -> None:
    assert all("the columns of the batch are not finite" in word for word in told("sharded_spoiled"))
    assert told("sharded_skipping") == [""] * SIZE
    assert [rank["sharded_skipping"]["figures"]["skipped_steps"] for rank in incidents()] == [1] * SIZE
    words = told("sharded_breaking")
    assert words[AT] == "KeyError: 'the model broke'"
    assert others(words) == [f"StepError: rank {AT} of {SIZE}: KeyError: 'the model broke'; no rank has moved"] * 2
    for rank in incidents():
        for one, other in (("spoiled", "sharded_spoiled"), ("breaking", "sharded_breaking")):
            for own, wanted in zip(rank[other]["weights"], rank[one]["weights"], strict=True):
                torch.testing.assert_close(own, wanted, rtol=1e-10, atol=1e-10)


REFUSED = {
    "plan": ["ValueError: 0.weight is sharded over ranks", "fully_shard alone", "DistributedDataParallel"],
    "plan, then sharded": [
        "ValueError: 0.weight is sharded by a parallelize plan before fully_shard",
        "fully_shard alone",
    ],
    "mesh": ["ValueError: 0.weight is sharded over the mesh", "one mesh of one dimension"],
    "bare": ["ValueError: parameter 0 is sharded over ranks", "give the optimizer the module itself"],
    "precision": ["ValueError: 0.weight is kept in torch.float64 and run in torch.bfloat16", "torch.autocast"],
    "offload": ["ValueError: 0.weight is offloaded to the CPU", "leave offload_policy out"],
    "group": ["ValueError: process_group is of ranks", "leave process_group out"],
    "base": ["ValueError: coupling='sample' with feedback=False", "torch.optim.SGD"],
    "closure": ["StepError: ", "the model is sharded", "call loss.backward() in the closure"],
    "unscaled": ["StepError: ", "the model is sharded", "leave out scaler.unscale_"],
}


def test_whole_gradients_are_kept_only_where_no_columns_are_read() -> None:
    for rank in incidents():
        assert rank["kept_gradients"] == {"heard": 11, "kept": ["block.scale"]}


@pytest.mark.parametrize("name", REFUSED)
def test_ways_of_sharding_that_do_not_go_are_refused_by_name(name: str) -> None:
    for rank in incidents():
        assert [part for part in REFUSED[name] if part not in rank["refused_shards"]["told"][name]] == []


def test_a_wrapper_leaves_gradients_to_their_rank_as_long_as_the_optimizer_is_open() -> None:
    for rank in incidents():
        found = rank["gradients_in_a_wrapper"]
        assert torch.equal(found["held"], found["own"])
        torch.testing.assert_close(found["closed"], found["mean"])
        assert not torch.allclose(found["own"], found["mean"])


STEPS, KILLED = 5, 3


def test_a_killed_rank_ends_the_others_and_the_run_resumes_on_any_number(tmp_path: Path) -> None:
    undisturbed = launch(SIZE, long_run, str(tmp_path / "undisturbed"), 0, STEPS, -1)
    began = time.monotonic()
    broken = launch(SIZE, long_run, str(tmp_path), 0, STEPS, KILLED)
    assert time.monotonic() - began < 30
    assert broken[AT] is None
    for rank in broken[:AT] + broken[AT + 1 :]:
        assert [*map(bool, rank["told"])] == [False] * KILLED + [True]
        assert "lost the others in the middle of a step" in rank["told"][-1]
        assert equal(rank["weights"], broken[0]["weights"])
    for size in (SIZE, SIZE - 1):
        resumed = launch(size, long_run, str(tmp_path), KILLED, STEPS, -2)
        for rank in resumed:
            assert not any(rank["told"])
            if size == SIZE:
                assert equal(rank["weights"], undisturbed[0]["weights"])
            for own, one in zip(rank["weights"], undisturbed[0]["weights"], strict=True):
                torch.testing.assert_close(own, one, rtol=1e-10, atol=1e-10)


def test_a_sharded_run_resumes_on_any_number_of_ranks_and_on_one_whole_model(tmp_path: Path) -> None:
    saved = launch(SIZE, functools.partial(long_run, sharded=True), str(tmp_path), 0, STEPS, -1)
    fewer = launch(SIZE - 1, functools.partial(long_run, sharded=True), str(tmp_path), KILLED, STEPS, -2)
    whole = long_run(0, 1, str(tmp_path), KILLED, STEPS, -2)
    for run in (*saved, *fewer, whole):
        assert not any(run["told"])
        for own, one in zip(run["weights"], saved[0]["weights"], strict=True):
            torch.testing.assert_close(own, one, rtol=1e-10, atol=1e-10)
