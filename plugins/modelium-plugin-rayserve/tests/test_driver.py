"""The driver with a real cluster, which all tests here share: the contract, and what is Ray's own."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
from modelium_plugin_rayserve.driver import RayServeDriver
from ray_lab import Lab, answer_of

from modelium.api import LoadRequest, ObservedModel, RuntimeDriver
from modelium.api.fakes import silent
from modelium.api.testing import DriverContract, eventually
from modelium.errors import DriverError, LoadRejected

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


# --------------------------------------------------------------------------- what is Ray's own


@pytest.fixture
async def driver(lab: Lab) -> AsyncIterator[RayServeDriver]:
    driver = lab.driver()
    await driver.start()
    yield driver
    for model in (await driver.observe()).models:
        await driver.unload(model.name)
    await driver.close()


async def held(driver: RayServeDriver, name: str) -> ObservedModel | None:
    return next((model for model in (await driver.observe()).models if model.name == name), None)


async def is_ready(driver: RayServeDriver, name: str) -> bool:
    found = await held(driver, name)
    return found is not None and found.ready


def replacing(request: LoadRequest) -> LoadRequest:
    return request.model_copy(update={"replace": True})


async def test_the_old_revision_serves_until_the_new_one_does(lab: Lab, driver: RayServeDriver) -> None:
    outcome = await driver.load(lab.python_model("m", factor=2), silent)
    answers: list[float] = []

    async def ask() -> None:
        while True:
            answers.append(await answer_of(outcome, "m", 1))

    asking = asyncio.create_task(ask())
    await driver.load(replacing(lab.python_model("m", factor=3, initialize="import time; time.sleep(1)")), silent)

    async def changed() -> bool:
        return answers[-1:] == [3]

    await eventually(changed, "the new revision answers")
    asking.cancel()
    assert set(answers) == {2, 3} and answers == sorted(answers)

    torn = replacing(lab.python_model("m", initialize="raise RuntimeError('torn')"))
    with pytest.raises(LoadRejected, match="torn"):
        await driver.load(torn, silent)
    assert await is_ready(driver, "m") and await answer_of(outcome, "m", 1) == 3
    await driver.load(replacing(lab.python_model("m", factor=4)), silent)
    assert await answer_of(outcome, "m", 1) == 4


async def test_a_replica_that_is_killed_comes_back_and_one_that_can_not_is_broken(
    lab: Lab, driver: RayServeDriver
) -> None:
    request = lab.python_model("m", factor=2)
    outcome = await driver.load(request, silent)

    async def kill() -> None:
        (replica,) = (await driver._cluster.status())["applications"]["m"]["replicas"]
        os.kill(replica["pid"], signal.SIGKILL)

        async def noticed() -> bool:
            shown = (await driver._cluster.status())["applications"]["m"]
            return all(one["id"] != replica["id"] for one in shown["replicas"])

        await eventually(noticed, "Ray notices that its process has ended")

    await kill()

    async def ready() -> bool:
        return await is_ready(driver, "m")

    await eventually(ready, "Ray has started another")
    assert await answer_of(outcome, "m", 1) == 2

    code = request.path / "1/model.py"
    text = code.read_text()
    code.write_text("raise RuntimeError('half a file')")
    await kill()

    async def broken() -> bool:
        found = await held(driver, "m")
        return found is not None and found.broken and not found.ready

    await eventually(broken, "a model that can't be started again is told to be broken")
    found = await held(driver, "m")
    assert found is not None and "half a file" in found.reason

    async def given_up() -> bool:
        return "m" not in (await driver._cluster.status())["applications"]

    await eventually(given_up, "Ray does not go on trying")
    assert await broken(), "it still shows"
    code.write_text(text)
    await driver.load(request, silent)
    assert await is_ready(driver, "m")


async def test_replicas_are_processes_and_all_are_counted(lab: Lab, driver: RayServeDriver) -> None:
    one = await driver.load(lab.python_model("one"), silent)
    two = await driver.load(lab.python_model("two", replicas=2), silent)
    assert two.memory["cpu:0"] > 1.5 * one.memory["cpu:0"]
    shown = (await driver._cluster.status())["applications"]["two"]
    assert len({replica["pid"] for replica in shown["replicas"]}) == 2
    assert (await driver.observe()).overhead["cpu:0"] > one.memory["cpu:0"]


async def test_a_load_that_takes_too_long_is_given_up(
    lab: Lab, driver: RayServeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "_settings", driver._settings.model_copy(update={"load_timeout_s": 1}))
    with pytest.raises(DriverError) as caught:
        await driver.load(lab.python_model("slow", initialize="import time; time.sleep(600)"), silent)
    assert caught.value.code == "load_timeout"
    assert await held(driver, "slow") is None


async def test_a_process_that_dies_while_it_loads_is_told_by_its_last_words(lab: Lab, driver: RayServeDriver) -> None:
    dying = lab.python_model("dying", initialize="import os; print('no room'); os._exit(9)")
    with pytest.raises(DriverError, match="no room") as caught:
        await driver.load(dying, silent)
    assert caught.value.code == "process_died" and not isinstance(caught.value, LoadRejected)


FOREIGN = """
import ray, sys
from ray import serve
ray.init(sys.argv[1], log_to_driver=False)

@serve.deployment(ray_actor_options={"num_cpus": 0})
class Other:
    async def __call__(self, request):
        return "mine"

serve.run(Other.bind(), name="theirs", route_prefix="/theirs")
"""


async def test_somebody_elses_application_is_neither_shown_nor_touched(lab: Lab, driver: RayServeDriver) -> None:
    await driver.load(lab.python_model("m"), silent)
    info = await driver.start()
    record = lab.processes.find("ray_serve")
    assert record is not None
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    environment["RAY_AUTH_TOKEN_PATH"] = str(lab.root / ".modelium/runtimes/ray_serve/token")
    command = [record.argv[0], "-c", FOREIGN, info.facts["address"]]
    await asyncio.to_thread(subprocess.run, command, env=environment, check=True)
    assert [model.name for model in (await driver.observe()).models] == ["m"]
    with pytest.raises(DriverError, match="not Modelium's") as caught:
        await driver.load(lab.python_model("theirs"), silent)
    assert caught.value.code == "name_taken"
    await driver.unload("theirs")
    assert "theirs" in (await driver._cluster.status())["applications"]


async def test_a_cluster_of_another_address_is_not_adopted(lab: Lab, driver: RayServeDriver) -> None:
    await driver.load(lab.python_model("m"), silent)
    other = Lab(lab.root, address="127.0.0.1:1").driver()
    with pytest.raises(DriverError, match=r"nothing answers at 127\.0\.0\.1:1"):
        await other.start()
    await other.close()
    assert not lab.processes.names()
    with pytest.raises(DriverError, match="has ended"):
        await driver.observe()
    await driver.start()
