"""What is said of models that Triton is not done with."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from modelium_plugin_triton import unfinished
from modelium_plugin_triton.unfinished import Unfinished

from modelium.errors import DriverError, RuntimeStuck


class OfTheLoop(dict[str, float]):
    """One that the loop alone reads, since it changes there."""

    def __init__(self) -> None:
        self._mine = threading.get_ident()

    def __iter__(self) -> Iterator[str]:
        assert threading.get_ident() == self._mine
        return super().__iter__()

    def __getitem__(self, name: str) -> float:
        assert threading.get_ident() == self._mine
        return super().__getitem__(name)


@pytest.fixture
def models() -> Unfinished:
    found = Unfinished(_given_up=OfTheLoop())
    found.give_up("m")
    return found


async def test_a_model_may_be_done_with_while_its_files_are_looked_at(
    models: Unfinished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lookers = []

    def newest(folder: Path) -> int:
        lookers.append(threading.get_ident())
        models.culprits["other"] = 1
        dict.clear(models._given_up)
        return 7

    monkeypatch.setattr(unfinished, "newest", newest)
    with pytest.raises(RuntimeStuck, match="goes on without end"):
        await models.check("m", tmp_path, 0, own=True)
    assert lookers != [threading.get_ident()] and models.culprits["m"] == 7
    await models.check("m", tmp_path, 0, own=True)


async def test_a_new_start_is_worth_it_once_for_the_same_files(models: Unfinished, tmp_path: Path) -> None:
    with pytest.raises(DriverError, match="not done yet") as caught:
        await models.check("m", tmp_path, 1e9, own=True)
    assert caught.value.code == "runtime_busy"
    with pytest.raises(RuntimeStuck):
        await models.check("m", tmp_path, 0, own=True)
    with pytest.raises(DriverError, match="after a new start of Triton") as caught:
        await models.check("m", tmp_path, 0, own=True)
    assert caught.value.code == "model_stuck"


async def test_nothing_is_said_of_others(models: Unfinished, tmp_path: Path) -> None:
    await models.check("other", tmp_path, 0, own=True)
    models.forget_done({"m"}, set(), set())
    await models.check("m", tmp_path, 0, own=True)
