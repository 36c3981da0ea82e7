"""The driver with a real cluster, which all tests here share: the contract, and what is Ray's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from modelium_plugin_rayserve.driver import RayServeDriver
from ray_lab import Lab

from modelium.api import LoadRequest, RuntimeDriver
from modelium.api.testing import DriverContract

pytestmark = pytest.mark.timeout(900)  # the first load makes Ray's environment and starts a cluster


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("ray"))
    yield lab
    lab.end()


@pytest.fixture
def make_driver(lab: Lab) -> Callable[[], RayServeDriver]:
    return lab.driver


class TestContract(DriverContract):
    @pytest.fixture
    def good_model(self, lab: Lab) -> LoadRequest:
        return lab.python_model("good")

    @pytest.fixture
    def another_model(self, lab: Lab) -> LoadRequest:
        return lab.python_model("another")

    @pytest.fixture
    def bad_model(self, lab: Lab) -> LoadRequest:
        return lab.python_model("bad", initialize="raise RuntimeError('the weights are torn')")

    @pytest.fixture
    def slow_model(self, lab: Lab) -> LoadRequest:
        return lab.python_model("slow", initialize="import time; time.sleep(8)")

    @pytest.fixture
    def crash(self, lab: Lab) -> Callable[[], None]:
        return lab.crash

    async def test_start_twice_is_one_runtime(self, driver: RuntimeDriver) -> None:
        """Other than elsewhere it tells no endpoint of its own: each model tells where it answers."""
        first, second = await driver.start(), await driver.start()
        assert first.instance == second.instance
        assert second.adopted
        assert not second.endpoints
