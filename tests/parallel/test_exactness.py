"""Several ranks against one process that has all their samples."""

import functools
from typing import Any

import pytest
import torch
from launch import launch
from programs import PROGRAMS, train, train_all

pytestmark = pytest.mark.xdist_group("exactness")  # the programs are run once for all

LONG = [name for name, program in PROGRAMS.items() if program.steps == 20]  # every curvature, dense and convolutions
SIZES = {
    2: [name for name in PROGRAMS if (name in LONG and "conv" not in name) or PROGRAMS[name].wrap],
    3: [name for name in PROGRAMS if name not in LONG or not PROGRAMS[name].shard],
    4: [name for name in LONG if "conv" in name],
}


@functools.cache
def ranks(size: int) -> list[dict[str, dict[str, Any]]]:
    return launch(size, train_all, SIZES[size])


@functools.cache
def one_process(name: str) -> dict[str, Any]:
    return train(PROGRAMS[name])


@pytest.mark.parametrize(("size", "name"), [(size, name) for size, names in SIZES.items() for name in names])
def test_ranks_make_the_steps_of_one_process(name: str, size: int) -> None:
    found, wanted = [rank[name] for rank in ranks(size)], one_process(name)
    assert [rank.get("error") for rank in found] == [None] * size
    for rank in found:
        for own, first, one in zip(rank["weights"], found[0]["weights"], wanted["weights"], strict=True):
            assert torch.equal(own, first)
            torch.testing.assert_close(own, one, rtol=PROGRAMS[name].apart, atol=PROGRAMS[name].apart)
        if "local" not in name:  # where each rank tells of its own problem
            assert rank["figures"]["layers"] == found[0]["figures"]["layers"]
        figures, expected = (one["figures"]["actual_decrease"] for one in (rank, wanted))
        assert (figures is None) == (expected is None)
        if expected is not None:
            assert figures == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("name", ["local", "local, pictures"])
def test_local_steps_are_not_those_of_one_process(name: str) -> None:
    pairs = zip(ranks(3)[0][name]["weights"], one_process(name)["weights"], strict=True)
    assert max(float((own - one).abs().max()) for own, one in pairs) > 1e-10
