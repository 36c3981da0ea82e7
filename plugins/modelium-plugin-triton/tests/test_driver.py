"""The driver on the real tritonserver of the wheel."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
from driver_lab import SLEEPS, Lab, TritonContract, code
from modelium_plugin_triton.driver import TritonDriver
from modelium_plugin_triton.install import has_pack
from modelium_plugin_triton.measure import Stub
from modelium_plugin_triton.server import SHM, shm_prefix

from modelium.api import LoadRequest, ObservedModel, Progress
from modelium.api.testing import eventually, silent
from modelium.engine.processes import look
from modelium.errors import DriverError, LoadRejected, RuntimeStuck, RuntimeUnavailable

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(300)]

SLEEPS_WHILE_IMPORTED = code(head="import time; time.sleep(4)")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lab(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("driver"))
    yield lab
    await lab.end()


@pytest_asyncio.fixture
async def driver(lab: Lab) -> AsyncIterator[TritonDriver]:
    driver = lab.driver()
    await driver.start()
    yield driver
    await driver.start()
    for model in (await driver.observe()).models:
        await driver.unload(model.name)
    await driver.close()


class TestTritonDriverKeepsTheContract(TritonContract):
    @pytest.fixture
    def good_model(self, lab: Lab) -> LoadRequest:
        return lab.model("good")

    @pytest.fixture
    def another_model(self, lab: Lab) -> LoadRequest:
        return lab.model("another")

    @pytest.fixture
    def bad_model(self, lab: Lab) -> LoadRequest:
        return lab.model("bad", "def broken(:\n")


async def shown(driver: TritonDriver, name: str) -> ObservedModel | None:
    return next((m for m in (await driver.observe()).models if m.name == name), None)


async def stubs(driver: TritonDriver, name: str) -> list[Stub]:
    session = driver._need()
    return (await session.look()).of(name)


# --------------------------------------------------------------------------- starting


async def test_what_it_says_of_itself(driver: TritonDriver, lab: Lab) -> None:
    info = await driver.start()
    assert info.version == "2.51.0" and info.backends == ("python",) and not info.external
    assert (info.endpoint("kserve-http") or "").startswith("http://127.0.0.1:")
    process = psutil.Process(info.pid)
    listening = {c.laddr for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert {address.ip.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}
    assert len(listening) == 3


async def test_a_crashed_server_comes_back_on_its_ports_without_orphans(driver: TritonDriver, lab: Lab) -> None:
    before = await driver.start()
    await driver.load(lab.model("good"), silent)
    [stub] = await stubs(driver, "good")
    os.kill(stub.key[0], signal.SIGSTOP)  # or it would notice and end by itself
    lab.crash()
    with pytest.raises(RuntimeUnavailable):
        await driver.observe()
    after = await driver.start()
    assert after.endpoints == before.endpoints
    assert look(stub.key[0]) is None
    assert len([p for p in psutil.Process(after.pid).children(recursive=True) if p.name().startswith("triton")]) == 0


async def test_shared_memory_of_a_killed_server_is_swept(driver: TritonDriver, lab: Lab) -> None:
    await driver.load(lab.model("good"), silent)
    prefix = shm_prefix(lab.repository.resolve())
    assert list(SHM.glob(f"{prefix}*"))
    left = SHM / f"{prefix}left-behind"
    left.write_bytes(b"x")
    await driver.stop()
    assert not list(SHM.glob(f"{prefix}*"))


async def test_a_server_on_another_folder_is_not_adopted(driver: TritonDriver, lab: Lab, tmp_path: Path) -> None:
    before = await driver.start()
    (lab.root / "elsewhere").mkdir(exist_ok=True)
    other = lab.driver()
    other._repository = (lab.root / "elsewhere").resolve()
    info = await other.start()
    assert not info.adopted and info.instance != before.instance
    await other.stop()
    await other.close()


async def test_found_again_when_its_record_was_lost(driver: TritonDriver, lab: Lab) -> None:
    before = await driver.start()
    (lab.root / ".modelium/processes/triton.json").unlink()
    second = lab.driver()
    after = await second.start()
    assert after.adopted and after.instance == before.instance and after.endpoints == before.endpoints
    await second.close()


async def test_a_server_that_cannot_start_says_why(lab: Lab, tmp_path: Path) -> None:
    other = Lab(tmp_path)
    driver = other.driver(args=("--no-such-argument",))
    with pytest.raises(RuntimeUnavailable, match="no-such-argument"):
        await driver.start()
    assert other.processes.names() == []
    await driver.close()


async def test_stop_ends_everything(driver: TritonDriver, lab: Lab) -> None:
    await driver.load(lab.model("good"), silent)
    [stub] = await stubs(driver, "good")
    await driver.stop()
    assert lab.processes.names() == [] and look(stub.key[0]) is None
    with pytest.raises(RuntimeUnavailable):
        await driver.observe()


# --------------------------------------------------------------------------- memory and counts


async def test_memory_is_told_apart_by_model(driver: TritonDriver, lab: Lab) -> None:
    small = await driver.load(lab.model("small"), silent)
    held = 150 * 2**20
    big = await driver.load(lab.model("big", code(f"self.held = b'x' * {held}")), silent)
    assert held < big.memory["cpu:0"] < held + 100 * 2**20
    assert small.memory["cpu:0"] < 100 * 2**20
    seen = await driver.observe()
    by_name = {m.name: m.memory["cpu:0"] for m in seen.models}
    assert by_name["big"] - by_name["small"] > 100 * 2**20
    assert 0 < seen.overhead["cpu:0"] < held


async def test_every_instance_counts(driver: TritonDriver, lab: Lab) -> None:
    await driver.load(lab.model("two", count=2), silent)
    assert len(await stubs(driver, "two")) == 2
    one = await driver.load(lab.model("one"), silent)
    two = await shown(driver, "two")
    assert two is not None and two.memory["cpu:0"] > 1.5 * one.memory["cpu:0"]


async def test_processes_that_a_model_starts_are_its_own(driver: TritonDriver, lab: Lab) -> None:
    held = 100 * 2**20
    child = f"import time; held = b'x' * {held}; print(1, flush=True); time.sleep(600)"
    start = f"""
        import subprocess
        self.child = subprocess.Popen(["python3", "-c", {child!r}], stdout=subprocess.PIPE)
        self.child.stdout.readline()
    """
    finalize = "\n    def finalize(self):\n        self.child.kill()\n"
    outcome = await driver.load(lab.model("parent", code(start) + finalize), silent)
    assert outcome.memory["cpu:0"] > held


async def test_requests_are_counted(driver: TritonDriver, lab: Lab) -> None:
    import numpy as np
    from tritonclient.http.aio import InferenceServerClient, InferInput

    info = await driver.start()
    await driver.load(lab.model("double", code(factor=2)), silent)
    address = info.endpoint("kserve-http")
    assert address is not None
    async with InferenceServerClient(address.removeprefix("http://")) as client:
        x = InferInput("x", [3], "FP32")
        x.set_data_from_numpy(np.array([1, 2, 3], np.float32))
        for _ in range(3):
            answer = await client.infer("double", [x])
    assert answer.as_numpy("y").tolist() == [2, 4, 6]

    async def counted() -> bool:  # Triton counts a request after it has answered
        seen = await shown(driver, "double")
        return seen is not None and (seen.requests, seen.versions) == (3, ("1",))

    await eventually(counted, "three requests are counted")


async def test_progress_of_a_load_is_told(driver: TritonDriver, lab: Lab) -> None:
    told: list[Progress] = []
    request = lab.model("steady", code("import time; self.held = b'x' * 50_000_000; time.sleep(1.5)"))
    await driver.load(request.model_copy(update={"memory_bytes": 90_000_000}), told.append)
    assert {p.stage for p in told} == {"loading"} and told[-1].total == 90_000_000
    assert max(p.done for p in told) > 50_000_000


# --------------------------------------------------------------------------- what can be wrong with a model


@pytest.mark.parametrize(
    "text, says",
    [
        ("import no_such_module\n", "No module named 'no_such_module'"),
        (code("raise ValueError('the weights are broken')"), "ValueError: the weights are broken"),
        ("class Other: pass\n", "TritonPythonModel"),
    ],
)
async def test_a_bad_model_is_rejected_with_its_reason(driver: TritonDriver, lab: Lab, text: str, says: str) -> None:
    with pytest.raises(LoadRejected) as caught:
        await driver.load(lab.model("bad", text), silent)
    assert says in caught.value.message.splitlines()[0]
    assert await shown(driver, "bad") is None


async def test_a_traceback_leads_to_the_line(driver: TritonDriver, lab: Lab) -> None:
    text = code("deep()", head="def deep():\n    raise RuntimeError('here')\n")
    with pytest.raises(LoadRejected) as caught:
        await driver.load(lab.model("bad", text), silent)
    lines = caught.value.message.splitlines()
    assert lines[0] == "bad: RuntimeError: here"
    assert lines[-1].endswith("bad/1/model.py, line 3, in deep") and "in initialize" in lines[-2]
    assert any("RuntimeError: here" in line for line in driver.logs("bad", 50))


async def test_a_missing_file_is_told_before_triton_waits_for_ever(driver: TritonDriver, lab: Lab) -> None:
    request = lab.model("empty")
    (lab.repository / "empty/1/model.py").unlink()
    with pytest.raises(LoadRejected, match=r"expected 1/model\.py"):
        await driver.load(request, silent)


async def test_a_missing_folder_and_a_broken_configuration(driver: TritonDriver, lab: Lab) -> None:
    request = lab.model("odd")
    (lab.repository / "odd/config.pbtxt").write_text('name: "odd" backend: "python" nonsense {')
    with pytest.raises(LoadRejected, match="nonsense"):
        await driver.load(request, silent)
    lab.remove("odd")
    with pytest.raises(LoadRejected, match="is not there"):
        await driver.load(request, silent)


async def test_a_configuration_that_only_triton_refuses(driver: TritonDriver, lab: Lab) -> None:
    request = lab.model("odd")
    (lab.repository / "odd/config.pbtxt").write_text('name: "another-name" backend: "python"')
    with pytest.raises(LoadRejected, match="another-name"):
        await driver.load(request, silent)


async def test_a_backend_that_it_lacks(driver: TritonDriver, lab: Lab) -> None:
    with pytest.raises(LoadRejected, match="has python") as caught:
        await driver.load(lab.model("plan", backend="tensorrt"), silent)
    assert caught.value.code == "backend_missing" and caught.value.fields["backend"] == "tensorrt"


async def test_a_process_that_ends_while_loading_may_be_tried_again(driver: TritonDriver, lab: Lab) -> None:
    with pytest.raises(DriverError, match="its process ended") as caught:
        await driver.load(lab.model("dies", code("import os; print('last words', flush=True); os._exit(3)")), silent)
    assert caught.value.code == "process_died" and not isinstance(caught.value, LoadRejected)
    assert "last words" in caught.value.message
    await driver.load(lab.model("dies"), silent)


async def test_a_process_that_ends_while_imported_does_not_hang(driver: TritonDriver, lab: Lab) -> None:
    """Triton itself waits for it without end; other models go on. A new start mends it, once for the same files."""
    dies = lab.model("dies", code(head="import os, time; time.sleep(1); os._exit(3)"))
    with pytest.raises(LoadRejected, match="ended before"):
        await driver.load(dies, silent)
    with pytest.raises(RuntimeStuck, match="waits without end"):
        await driver.load(dies, silent)
    await driver.load(lab.model("good"), silent)
    seen = await shown(driver, "dies")
    assert seen is not None and not seen.ready and "waits without end" in seen.reason
    await driver.stop()
    await driver.start()
    with pytest.raises(LoadRejected, match="ended before"):
        await driver.load(dies, silent)
    with pytest.raises(DriverError, match="after a new start") as caught:
        await driver.load(dies, silent)
    assert caught.value.code == "model_stuck" and not isinstance(caught.value, RuntimeStuck)
    await driver.unload("dies")  # nothing is left of it to unload
    with pytest.raises(DriverError) as caught:
        await driver.load(dies, silent)
    assert caught.value.code == "model_stuck"
    with pytest.raises(RuntimeStuck):
        await driver.load(lab.model("dies"), silent)
    await driver.stop()
    await driver.start()
    await driver.load(lab.model("dies"), silent)


async def test_what_it_waits_for_without_end_is_unloaded_at_once_though_its_folder_is_gone(
    driver: TritonDriver, lab: Lab
) -> None:
    """It is no longer in Triton's index then, and Triton would never answer an unload of it."""
    dies = lab.model("dies", code(head="import os, time; time.sleep(1); os._exit(3)"))
    with pytest.raises(LoadRejected, match="ended before"):
        await driver.load(dies, silent)
    lab.remove("dies")
    seen = await shown(driver, "dies")
    assert seen is not None and not seen.ready
    async with asyncio.timeout(10):
        await driver.unload("dies")
    with pytest.raises(RuntimeStuck):
        await driver.load(lab.model("dies"), silent)
    await driver.stop()


async def test_what_it_waits_for_without_end_is_found_by_the_next_one_too(driver: TritonDriver, lab: Lab) -> None:
    dies = lab.model("dies", code(head="import os, time; time.sleep(1); os._exit(3)"))
    with pytest.raises(LoadRejected, match="ended before"):
        await driver.load(dies, silent)
    await driver.close()
    another = lab.driver()
    await another.start()
    with pytest.raises(LoadRejected, match="ended before"):
        await another.load(lab.model("dies"), silent)
    with pytest.raises(RuntimeStuck):
        await another.load(lab.model("dies"), silent)
    await another.stop()
    await another.close()


async def test_memory_that_is_not_there_may_be_tried_again(driver: TritonDriver, lab: Lab) -> None:
    with pytest.raises(DriverError) as caught:
        await driver.load(lab.model("huge", code("raise MemoryError('no room for the weights')")), silent)
    assert caught.value.code == "out_of_memory" and not isinstance(caught.value, LoadRejected)


async def test_a_load_that_takes_too_long_is_given_up(lab: Lab, driver: TritonDriver) -> None:
    request = lab.model("slow", SLEEPS)
    plan = request.plan.model_copy(update={"settings": {"load_timeout_s": 2}})
    with pytest.raises(DriverError, match="within 2 s") as caught:
        await driver.load(request.model_copy(update={"plan": plan}), silent)
    assert caught.value.code == "load_timeout"
    assert await shown(driver, "slow") is None and not await stubs(driver, "slow")


# --------------------------------------------------------------------------- cancelling


async def test_a_load_cancelled_while_its_code_is_imported(driver: TritonDriver, lab: Lab) -> None:
    """The process that completes the configuration must not be killed: Triton would wait for it without end."""
    task = asyncio.create_task(driver.load(lab.model("slow", SLEEPS_WHILE_IMPORTED), silent))

    async def loading() -> bool:
        return bool(await stubs(driver, "slow"))

    await eventually(loading, "its process is there")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await shown(driver, "slow") is None and not await stubs(driver, "slow")
    await driver.load(lab.model("slow"), silent)


async def test_a_load_cancelled_twice_is_ended_behind_the_scenes(driver: TritonDriver, lab: Lab) -> None:
    task = asyncio.create_task(driver.load(lab.model("slow", SLEEPS), silent))

    async def loading() -> bool:
        return await shown(driver, "slow") is not None

    await eventually(loading, "it shows")
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    # The next load of it waits until the former is out of the way.
    await driver.load(lab.model("slow"), silent)
    assert len(await stubs(driver, "slow")) == 1


async def test_a_cancelled_reload_leaves_the_old_revision_serving(driver: TritonDriver, lab: Lab) -> None:
    await driver.load(lab.model("served"), silent)
    [old] = await stubs(driver, "served")
    request = lab.model("served", SLEEPS).model_copy(update={"replace": True})
    task = asyncio.create_task(driver.load(request, silent))

    async def reloading() -> bool:
        return len(await stubs(driver, "served")) == 2

    await eventually(reloading, "the new revision's process is there")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    seen = await shown(driver, "served")
    assert seen is not None and seen.ready
    assert [stub.key for stub in await stubs(driver, "served")] == [old.key]


# --------------------------------------------------------------------------- reloading


async def test_changed_files_make_a_reload_and_the_same_do_not(driver: TritonDriver, lab: Lab) -> None:
    request = lab.model("versioned")
    await driver.load(request, silent)
    [first] = await stubs(driver, "versioned")
    await driver.load(request.model_copy(update={"replace": True}), silent)
    assert [s.key for s in await stubs(driver, "versioned")] == [first.key]
    lab.model("versioned", code(factor=3))
    await driver.load(request.model_copy(update={"replace": True}), silent)

    async def replaced() -> bool:
        keys = [s.key for s in await stubs(driver, "versioned")]
        return len(keys) == 1 and keys != [first.key]

    await eventually(replaced, "the old revision's process has gone")


async def test_a_change_that_keeps_all_times_is_seen(driver: TritonDriver, lab: Lab) -> None:
    request = lab.model("restamped", code(factor=2))
    file = lab.repository / "restamped/1/model.py"
    times = file.stat()
    await driver.load(request, silent)
    [first] = await stubs(driver, "restamped")
    file.write_text(code(factor=3))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    await driver.load(request.model_copy(update={"replace": True}), silent)
    assert any(stub.key != first.key for stub in await stubs(driver, "restamped"))


async def test_loading_leaves_no_file_in_the_folder(driver: TritonDriver, lab: Lab) -> None:
    request = lab.model("clean")
    before = sorted(p.relative_to(request.path) for p in request.path.rglob("*"))
    await driver.load(request, silent)
    assert sorted(p.relative_to(request.path) for p in request.path.rglob("*")) == before


async def test_a_failed_reload_leaves_the_old_revision_serving(driver: TritonDriver, lab: Lab) -> None:
    await driver.load(lab.model("served"), silent)
    request = lab.model("served", "def broken(:\n").model_copy(update={"replace": True})
    with pytest.raises(LoadRejected):
        await driver.load(request, silent)
    seen = await shown(driver, "served")
    assert seen is not None and seen.ready


async def test_a_model_that_lost_its_process_is_told_and_mended(driver: TritonDriver, lab: Lab) -> None:
    request = lab.model("fragile", count=2)
    await driver.load(request, silent)
    victim = (await stubs(driver, "fragile"))[0].key[0]
    os.kill(victim, signal.SIGKILL)

    async def told() -> bool:
        seen = await shown(driver, "fragile")
        return seen is not None and not seen.ready and "1 of its 2 processes" in seen.reason

    await eventually(told, "the loss shows")
    second = lab.driver()  # one that comes later sees it too
    await second.start()
    seen = await shown(second, "fragile")
    assert seen is not None and not seen.ready
    await second.close()
    await driver.load(request, silent)
    seen = await shown(driver, "fragile")
    assert seen is not None and seen.ready and len(await stubs(driver, "fragile")) == 2


async def test_parameters_of_a_load_are_passed_on(driver: TritonDriver, lab: Lab) -> None:
    request = lab.model("scaled")
    config = {
        "name": "scaled",
        "backend": "python",
        "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [-1]}],
        "output": [{"name": "y", "data_type": "TYPE_FP32", "dims": [-1]}],
        "instance_group": [{"kind": "KIND_CPU", "count": 3}],
    }
    await driver.load(request.model_copy(update={"parameters": {"config": config}}), silent)
    assert len(await stubs(driver, "scaled")) == 3
    with pytest.raises(DriverError, match="load parameter 'odd'"):
        await driver.load(request.model_copy(update={"parameters": {"odd": 1.5}}), silent)


async def test_changed_files_are_seen_under_the_same_override(driver: TritonDriver, lab: Lab) -> None:
    request = lab.model("placed").model_copy(
        update={"parameters": {"config": {"backend": "python", "instance_group": [{"kind": "KIND_CPU", "count": 1}]}}}
    )
    text = (
        code(head="")
        + """
    @staticmethod
    def auto_complete_config(config):
        config.add_input({"name": "x", "data_type": "TYPE_FP32", "dims": [-1]})
        config.add_output({"name": "y", "data_type": "TYPE_FP32", "dims": [-1]})
        return config
"""
    )
    lab.model("placed", text)
    await driver.load(request, silent)
    [first] = await stubs(driver, "placed")
    lab.model("placed", text + "\n# changed\n")
    await driver.load(request.model_copy(update={"replace": True}), silent)
    assert any(stub.key != first.key for stub in await stubs(driver, "placed"))


async def test_packs_are_there_before_the_load(driver: TritonDriver, lab: Lab) -> None:
    requests = []
    for name in ("first", "second"):
        request = lab.model(name, code("import onnxruntime; self.version = onnxruntime.__version__"))
        plan = request.plan.model_copy(update={"settings": {"packs": ["onnx"]}})
        requests.append(request.model_copy(update={"plan": plan}))
    await asyncio.gather(*(driver.load(request, silent) for request in requests))
    assert driver._environment is not None and has_pack(driver._environment, "onnx")
    unknown = requests[0].plan.model_copy(update={"settings": {"packs": ["nonsense"]}})
    with pytest.raises(DriverError, match="nonsense") as caught:
        await driver.load(requests[0].model_copy(update={"plan": unknown}), silent)
    assert caught.value.code == "install_failed"


# --------------------------------------------------------------------------- unloading


async def test_unload_leaves_no_process(driver: TritonDriver, lab: Lab) -> None:
    await driver.load(lab.model("gone", count=2), silent)
    keys = [stub.key[0] for stub in await stubs(driver, "gone")]
    outcome = await driver.unload("gone")
    assert not outcome.residue and not any(look(pid) for pid in keys)


async def test_a_model_whose_folder_was_removed_is_unloaded(driver: TritonDriver, lab: Lab) -> None:
    await driver.load(lab.model("vanished"), silent)
    lab.remove("vanished")
    seen = await shown(driver, "vanished")
    assert seen is not None and seen.ready
    await driver.unload("vanished")
    assert await shown(driver, "vanished") is None and not await stubs(driver, "vanished")


async def test_an_unload_that_takes_too_long_says_so(driver: TritonDriver, lab: Lab) -> None:
    finalize = "\n    def finalize(self):\n        import time; time.sleep(6)\n"
    await driver.load(lab.model("clinging", code() + finalize), silent)
    driver._need().settings = driver._settings.model_copy(update={"unload_timeout_s": 1.0})
    with pytest.raises(DriverError) as caught:
        await driver.unload("clinging")
    assert caught.value.code == "unload_stuck"
    seen = await shown(driver, "clinging")
    assert seen is not None and not seen.ready and seen.memory["cpu:0"] > 0
    driver._need().settings = driver._settings
    await driver.unload("clinging")
    assert await shown(driver, "clinging") is None


async def test_an_ensemble_needs_its_parts_and_holds_nothing_itself(driver: TritonDriver, lab: Lab) -> None:
    await driver.load(lab.model("part", code(factor=2)), silent)
    folder = lab.repository / "whole"
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text("""
name: "whole"
platform: "ensemble"
input [{ name: "x" data_type: TYPE_FP32 dims: [-1] }]
output [{ name: "y" data_type: TYPE_FP32 dims: [-1] }]
ensemble_scheduling { step [{
  model_name: "part" model_version: -1
  input_map { key: "x" value: "x" } output_map { key: "y" value: "y" }
}] }
""")
    request = lab.model("part").model_copy(update={"name": "whole", "path": folder})
    outcome = await driver.load(request, silent)
    assert not outcome.memory
    await driver.unload("whole")
    seen = await shown(driver, "part")
    assert seen is not None and seen.ready  # its parts are others' to unload


async def test_many_at_once(driver: TritonDriver, lab: Lab) -> None:
    requests = [lab.model(f"many{number}") for number in range(6)]
    await asyncio.gather(*(driver.load(request, silent) for request in requests))
    seen = {m.name for m in (await driver.observe()).models if m.ready}
    assert {r.name for r in requests} <= seen
    await asyncio.gather(*(driver.unload(request.name) for request in requests))
    assert not (await driver.observe()).models
