"""What all end-to-end tests share: models that take long to make, and the check that nothing is left running."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from modelium_plugin_triton.install import Wheel

from tests import fleet, models
from tests.e2e.kit import kill
from tests.service import processes_of

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
    others = processes_of(base).keys()  # of other tests' fixtures, which end later
    yield
    left = {pid: command for pid, command in processes_of(base).items() if not _of(pid, others)}
    for pid in left:
        kill(pid)
    assert not left, f"left running: {left}"


def _of(pid: int, others: Collection[int]) -> bool:
    """Whether it is one of those, or was started by one."""
    try:
        return pid in others or any(parent.pid in others for parent in psutil.Process(pid).parents())
    except psutil.Error:
        return True


@pytest.fixture(scope="session")
def wheel() -> Wheel:
    return fleet.triton_wheel()


@pytest.fixture(scope="session")
def torch_python(wheel: Wheel) -> Path:
    return fleet.torch_python(wheel)


@pytest.fixture(scope="session")
def made(torch_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`made(kind, name, **options)`: a model of `tests.models.make`, made once; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("made")
    known: dict[str, Path] = {}

    def make(kind: str, name: str, **options: Any) -> Path:
        key = repr((kind, name, sorted(options.items())))
        if key not in known:
            known[key] = models.make(torch_python, kind, folder / str(len(known)) / name, **options)
        return known[key]

    return make
