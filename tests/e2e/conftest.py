"""What all end-to-end tests share: models that take long to make, and the check that nothing is left running."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import models
from tests.e2e.kit import alive, kill, processes_of

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first test of a machine sets up its Triton, which may take minutes."""
    for item in items:
        if HERE in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session", autouse=True)
def nothing_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Every process that the tests' services started is gone at the end; one that is not is ended, and named."""
    base = tmp_path_factory.getbasetemp()
    yield
    left = processes_of(base)
    for pid in left:
        kill(pid)
    assert not left, f"left running: {left}"
    assert not alive(left)
