"""Models of other backends than the Python one: a native one compiled on the spot, and a Python-based one."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from driver_lab import CONFIG, Lab, code
from modelium_plugin_triton import folders, install, locate
from modelium_plugin_triton.driver import TritonDriver
from modelium_plugin_triton.settings import TritonSettings

from modelium.api import LoadRequest
from modelium.api.fakes import load_request, silent
from modelium.api.measuring import HOST_MEMORY
from modelium.errors import LoadRejected
from modelium.paths import cache_dir

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(300)]

HELD = 128 << 20

# Triton's C interface for backends (tritonbackend.h), as far as holding memory takes it.
NATIVE = """
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
void *TRITONBACKEND_ModelSetState(void *model, void *state);
void *TRITONBACKEND_ModelState(void *model, void **state);
void *TRITONBACKEND_ModelInitialize(void *model) {
    char *held = malloc(HELD);
    memset(held, 1, HELD);
    return TRITONBACKEND_ModelSetState(model, held);
}
void *TRITONBACKEND_ModelFinalize(void *model) {
    void *held;
    TRITONBACKEND_ModelState(model, &held);
    if (!LEAKY) free(held);
    return NULL;
}
void *TRITONBACKEND_ModelInstanceExecute(void *instance, void **requests, uint32_t count) { return NULL; }
"""


@pytest.fixture(scope="module")
def backends(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backend directory with a native backend, one that never gives memory back, and a Python-based one."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("backends")
    source = folder / "native.c"
    source.write_text(NATIVE)
    for name, leaky in (("native", 0), ("leaky", 1)):
        (folder / name).mkdir()
        library = folder / name / f"libtriton_{name}.so"
        defines = [f"-DHELD={HELD}", f"-DLEAKY={leaky}"]
        subprocess.run([compiler, "-shared", "-fPIC", *defines, source, "-o", library], check=True)
    (folder / "based").mkdir()
    (folder / "based/model.py").write_text(code(f"self.held = b'x' * {HELD}"))
    return folder


@pytest_asyncio.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    lab = Lab(tmp_path)
    yield lab
    await lab.end()


@pytest_asyncio.fixture
async def driver(lab: Lab, backends: Path) -> AsyncIterator[TritonDriver]:
    interpreter = await locate.find_interpreter(TritonSettings())
    wheel = await install.prepare(cache_dir(), interpreter, (), silent)
    python = backends / "python"
    if not python.exists():
        python.symlink_to(wheel.backends / "python")
    driver = lab.driver(args=(f"--backend-directory={backends}",))
    await driver.start()
    yield driver
    await driver.stop()
    await driver.close()


def model(lab: Lab, name: str, backend: str) -> LoadRequest:
    folder = lab.repository / name
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(CONFIG.format(name=name, backend=backend, count=1))
    return load_request(name, folder)


async def held(driver: TritonDriver) -> dict[str, int]:
    seen = await driver.observe()
    return {m.name: m.memory.get(HOST_MEMORY, 0) for m in seen.models} | {"": seen.overhead[HOST_MEMORY]}


def about(size: int) -> bool:
    return HELD * 0.9 < size < HELD * 1.2


async def test_a_native_model_is_measured_by_the_servers_growth(driver: TritonDriver, lab: Lab) -> None:
    assert (await driver.start()).backends == ("based", "leaky", "native", "python")
    before = await held(driver)
    outcomes = await asyncio.gather(  # measured one after the other
        driver.load(model(lab, "one", "native"), silent),
        driver.load(model(lab, "two", "native"), silent),
        driver.load(lab.model("python"), silent),
    )
    assert [about(o.memory[HOST_MEMORY]) for o in outcomes] == [True, True, False]
    seen = await held(driver)
    assert about(seen["one"]) and about(seen["two"]) and not about(seen["python"])
    assert abs(seen[""] - before[""]) < HELD / 2  # models' memory is not the server's own
    second = lab.driver(args=driver._settings.args)  # what was measured is known after a restart of Modelium
    assert (await second.start()).adopted
    again = await held(second)
    assert all(again[name] == seen[name] for name in ("one", "two"))
    await second.close()
    outcome = await driver.unload("one")
    assert not outcome.residue
    assert sorted(await held(driver)) == ["", "python", "two"]


async def test_memory_that_does_not_come_back_is_told(driver: TritonDriver, lab: Lab) -> None:
    await driver.load(model(lab, "leaks", "leaky"), silent)
    before = await held(driver)
    outcome = await driver.unload("leaks")
    assert about(outcome.residue[HOST_MEMORY])
    after = await held(driver)
    assert about(after[""] - before[""])  # it is the server's now


async def test_a_cancelled_native_load_leaves_nothing(driver: TritonDriver, lab: Lab) -> None:
    task = asyncio.create_task(driver.load(model(lab, "one", "native"), silent))
    async with asyncio.timeout(60):
        while "one" not in await held(driver):
            await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    if task.cancelled():  # it was not over yet
        assert sorted(await held(driver)) == [""]


async def test_a_python_based_backends_model_is_its_processes(driver: TritonDriver, lab: Lab) -> None:
    outcome = await driver.load(model(lab, "llm", "based"), silent)
    assert outcome.memory[HOST_MEMORY] > HELD
    assert (await held(driver))["llm"] > HELD
    assert len((await driver._need().look()).of("llm")) == 1
    await driver.unload("llm")
    assert sorted(await held(driver)) == [""]


async def test_a_backend_that_is_not_there(driver: TritonDriver, lab: Lab) -> None:
    with pytest.raises(LoadRejected, match="it has based, leaky, native, python"):
        await driver.load(model(lab, "x", "absent"), silent)


# --------------------------------------------------------------------------- without a server


async def test_a_rendered_model_is_put_on_the_gpus_that_have_room(lab: Lab) -> None:
    request = model(lab, "m", "onnxruntime").model_copy(update={"devices": ("cuda:2",)})
    config = request.path / "config.pbtxt"
    config.write_text(config.read_text().replace("KIND_CPU", "KIND_GPU"))
    assert '"gpus":[2]' in folders.parameters(request)["config"].replace(" ", "")
    theirs = request.model_copy(update={"analysis": request.analysis.model_copy(update={"format": "triton"})})
    assert folders.parameters(theirs) == {}  # a folder of somebody's own says where it runs
    told = request.model_copy(update={"parameters": {"config": "{}"}})
    assert folders.parameters(told) == {"config": "{}"}
    assert folders.parameters(request.model_copy(update={"devices": ("cpu:0",)})) == {}
