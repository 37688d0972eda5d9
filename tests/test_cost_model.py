"""The model of benchmarks/network.py, and what benchmarks/two_machines.py finds wrong."""

import shutil
from pathlib import Path

import network
import pytest
from _network.model import ALL, OWN, Fitted, Processor, Step, Wire, fitted, processor, sending
from two_machines import Killing, Note, story

POINTS = [(p, b) for p in (1, 2, 4) for b in (8, 32, 64)]


def test_counts_that_are_sums_of_the_terms_are_found_and_carried_on() -> None:
    found = fitted(
        {**OWN, **ALL}, {(p, b): 100.0 + 7 * b + 0.5 * (p * b) ** 2 + 0.01 * (p * b) ** 3 for p, b in POINTS}
    )
    assert found.worst < 1e-9
    assert found(256, 32) == pytest.approx(100 + 7 * 32 + 0.5 * 8192**2 + 0.01 * 8192**3)
    assert found.part(list(OWN), 256, 32) == pytest.approx(100 + 7 * 32)


def test_a_processor_is_found_from_its_times() -> None:
    found = processor([(flops, 0.01 + flops / 2e9) for flops in (1e6, 1e8, 1e9)])
    assert [found.overhead, found.rate] == pytest.approx([0.01, 2e9])


def test_what_sending_costs_the_processor_is_found_from_exchanges_and_bytes() -> None:
    found = sending([(n, sent, 1e-3 * n + 2e-9 * sent) for n, sent in ((2, 1e6), (8, 1e7), (34, 2e6))])
    assert found == pytest.approx((1e-3, 2e-9))


def test_a_step_is_bound_by_messages_on_a_slow_ring_and_by_less_on_a_tree() -> None:
    flops, sent = Fitted({**OWN, **ALL}, {"b": 10.0, "N": 1.0}, 0.0), Fitted(OWN, {"1": 1e4}, 0.0)
    messages = Fitted({"(p - 1)": lambda p, b: p - 1}, {"(p - 1)": 3.0}, 0.0)
    step = Step(flops, sent, messages, Processor(0.001, 1e6))
    ring = step.spent(64, 32, Wire("ring", 1e-3, 1e7))
    assert [ring.own, ring.algebra] == pytest.approx([0.00132, 64 * 32 / 1e6])
    assert [ring.messages, ring.bytes] == pytest.approx([3 * 63e-3, 1e-3])
    assert ring.binds == "messages"
    assert step.spent(64, 32, Wire("tree", 1e-3, 1e7, tree=True)).messages == pytest.approx(3 * 6e-3)
    assert ring.total == pytest.approx(ring.own + ring.algebra + ring.messages + ring.bytes)


CALM = [
    Note(1.0, "a", "running", "one"),
    Note(1.5, "b", "running", "two"),
    Note(2.0, "b", "done", "two"),
    Note(63.0, "a", "waiting", None),
    Note(63.1, "a", "running", "two"),
    Note(64.0, "a", "done", "two"),
]


@pytest.mark.parametrize(
    ("more", "right"),
    [
        ([], True),
        ([Note(65.0, "b", "running", "three"), Note(66.0, "b", "done", "three")], False),
        ([Note(65.0, "c", "running", "three")], False),
    ],
)
def test_a_run_that_is_done_twice_or_lost_is_noticed(more: list[Note], right: bool) -> None:
    rows, found = story(Killing("one", "two", "a", 2.5, 2.4), [*CALM, *more])
    assert found == right
    assert ["and after the kill", "60.6 s"] in rows


def test_the_page_is_what_its_record_says(tmp_path: Path) -> None:
    folder = Path(network.__file__).parents[1] / "docs" / "results"
    (tmp_path / "records").mkdir()
    shutil.copy(folder / "records" / "network.json", tmp_path / "records")
    assert network.main(["--read", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "network.md").read_text() == (folder / "network.md").read_text()
