"""One thread, one seed, float64 and a heap of its own for every test; warnings are errors (pyproject.toml)."""

import gc
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let groups be seen: pytest-xdist 3.8 writes them into ``_nodeid``, where pytest 9.2 no longer looks."""
    for item in items:
        if "_nodeid" in vars(item):
            item._id = type(item.id).parse(vars(item)["_nodeid"])


@pytest.fixture(autouse=True)
def fixed_conditions() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    gc.freeze()  # what is counted or collected is then the test's own, which takes milliseconds
    yield
    gc.unfreeze()
    torch.set_default_dtype(before)
