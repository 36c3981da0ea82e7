"""What is true survives: restarts and crashes of Modelium and of Triton, files that change or go, others' things."""

from __future__ import annotations

import asyncio
import functools
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import models
from tests.e2e.kit import (
    Got,
    Straight,
    Toy,
    alive,
    ensemble,
    eventually,
    fingerprint,
    helpers_of,
    infer,
    kill,
    refused,
    stubs_of,
    toy,
    transitions,
    triton,
    triton_address,
    tritonserver,
    web,
    write_toy_config,
    x_body,
)
from tests.service import MODELIUM, Served, processes_of, served

CONFIG = {
    "orchestration": {
        "settle_s": 0.5,
        "rescan_interval_s": 1,
        "policies": {"crash_budget": 1000, "retry_s": 0.5, "min_resident_seconds": 0},
    }
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("lifecycle") / "root", CONFIG) as service:
        yield service


@pytest.fixture
def service(shared: Served) -> Iterator[Served]:
    """The module's service, started again if a test left it down, and without the models of the test before."""
    if shared.process is None or shared.process.poll() is not None:
        shared.process = None
        shared.start()
    yield shared
    if shared.process is not None:
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda name: shared.request("DELETE", f"/models/{name}"), shared.ps()))


Drop = Callable[..., Toy]


@pytest.fixture
def drop(service: Served, tmp_path: Path) -> Drop:
    """`drop(name, ...)`: a toy in the service, READY."""

    def drop(name: str, **options: Any) -> Toy:
        made = toy(tmp_path / name, **options)
        service.drop(made.path)
        service.until_state(name, "READY")
        return Toy(service.root / "repository" / name, made.control)

    return drop


def pid_of(service: Served) -> int:
    assert service.process is not None
    return service.process.pid


def successes(service: Served, name: str) -> int:
    """Finished requests by Triton's own count, which begins anew with each load."""
    (one,) = service.get(f"/v2/models/{name}/stats")["model_stats"]
    return int(one["inference_stats"]["success"]["count"])


# --------------------------------------------------------------------------- Modelium goes


def test_killed_and_started_again_it_adopts_what_is_loaded(service: Served, drop: Drop, tmp_path: Path) -> None:
    first, second = drop("first"), drop("second", factor=3)
    service.drop(models.onnx_linear(tmp_path / "linear.onnx"))
    service.until_state("linear", "READY")
    service.post("/models/second/pin")
    for _ in range(5):
        infer(service, "first")
    pid, helpers, address = triton(service)["info"]["pid"], helpers_of(service), triton_address(service)
    held = processes_of(service.root)

    service.kill()
    assert infer(Straight(address), "first", [1]) == [2]  # Triton did not notice
    _, left = psutil.wait_procs(helpers, timeout=30)
    assert not left, left

    service.start()
    for name in ("first", "second", "linear"):
        service.until_state(name, "READY")
        assert transitions(service, name)[-1] == ("RECOVERING", "READY")
    assert triton(service)["info"]["pid"] == pid and triton(service)["info"]["adopted"]
    assert (first.count("loads"), second.count("loads")) == (1, 1)
    assert successes(service, "first") == 6
    assert processes_of(service.root) == held
    assert service.model("second")["pinned"] and not service.model("first")["pinned"]
    assert infer(service, "second", [1]) == [3]
    service.post("/models/second/unpin")


def test_killed_while_a_model_loads_it_finds_it_loaded(service: Served, tmp_path: Path) -> None:
    model = toy(tmp_path / "midway")
    with model.holding("hold-load") as go_on:
        service.drop(model.path)
        service.until(lambda: model.count("loads") == 1, what="the load")
        service.kill()
        service.start()
        service.until(lambda: triton(service)["state"] == "UP", what="Triton to be adopted")
        go_on()
        assert infer(service, "midway", [1]) == [2]
    service.until_state("midway", "READY")
    assert model.count("loads") == 1


def test_killed_while_it_takes_a_drop_in_nothing_is_lost(service: Served, tmp_path: Path) -> None:
    """Wherever it was cut off, the model arrives once and whole, and answers."""
    for number in range(3):
        model = toy(tmp_path / f"cut-{number}")
        before = fingerprint(model.path)
        incoming = service.drop(model.path)
        if number:  # at once, when it was seen, and when it was taken
            service.until(functools.partial(_taken, service, incoming, number), what="it to be noticed")
        service.kill()
        service.start()
        # when it had arrived and its first load was cut off, it loads when it is asked
        service.until_state(model.name, "READY", "COLD")
        assert infer(service, model.name, [1]) == [2]
        assert fingerprint(service.root / "repository" / model.name) == before
        assert not list((service.root / "incoming").iterdir())


def _taken(service: Served, incoming: Path, number: int) -> bool:
    return not incoming.exists() or (number == 1 and service.state(f"incoming/{incoming.name}") != "-")


def test_interrupted_it_leaves_triton_and_down_ends_it(service: Served, drop: Drop) -> None:
    model = drop("stays")
    pid, address = triton(service)["info"]["pid"], triton_address(service)
    assert service.stop() == 0
    assert f"still running: haproxy, triton; `modelium down --root {service.root}` ends what is left" in service.tail()
    assert alive([pid])
    assert infer(Straight(address), "stays", [2]) == [4]

    service.start()
    service.until_state("stays", "READY")
    assert model.count("loads") == 1
    busy = subprocess.run(
        [*MODELIUM, "down", "--root", str(service.root)], capture_output=True, text=True, check=False, timeout=60
    )
    assert busy.returncode == 1 and f"served already by process {pid_of(service)}" in busy.stderr

    service.stop()
    pids = list(processes_of(service.root))
    assert pid in pids and stubs_of(service.root, "stays")
    done = service.cli("down", "--root", str(service.root))
    assert "ended haproxy, triton" in done.stdout
    assert not alive(pids) and not processes_of(service.root)
    assert "no runtime" in service.cli("down", "--root", str(service.root)).stdout


def test_requests_that_wait_are_told_when_it_stops(service: Served, tmp_path: Path) -> None:
    model = toy(tmp_path / "late")

    async def ask() -> Got:
        async with web(service) as asking:
            with model.holding("hold-load"):
                await asyncio.to_thread(service.drop, model.path)
                await eventually(lambda: service.state("late") == "LOADING", "the load")
                waiting = asyncio.ensure_future(asking("/v2/models/late/infer", x_body()))
                await eventually(lambda: service.model("late")["waiting"] == 1, "it to wait")
                await asyncio.to_thread(service.stop)
                got: Got = await waiting
                return got

    got = asyncio.run(ask())
    assert got.status == 503 and "stopping" in got.body and "Retry-After" in got.headers


# --------------------------------------------------------------------------- files change, or go


def test_a_removed_folder_is_drained_unloaded_and_forgotten(service: Served, drop: Drop, tmp_path: Path) -> None:
    model = drop("leaving")

    async def leave() -> tuple[Got, Got]:
        async with web(service) as ask:
            with model.holding("hold-infer") as go_on:
                held = asyncio.ensure_future(ask("/v2/models/leaving/infer", x_body()))
                await eventually(lambda: model.count("requests") == 1, "the request to arrive")
                model.path.rename(tmp_path / "taken-away")
                await eventually(lambda: service.state("leaving") == "DRAINING", "it to drain")
                refused = await ask("/v2/models/leaving/infer", x_body())
                go_on()
                return await held, refused

    held, refused = asyncio.run(leave())
    assert held.status == 200 and refused.status == 404
    service.until(lambda: service.state("leaving") == "-", what="it to be forgotten")
    assert not stubs_of(service.root, "leaving")
    assert "leaving" not in service.request("GET", "/metrics").decode()
    live = {m["name"] for m in service.get("/v2/models/stats")["model_stats"]}
    assert "leaving" not in live
    (tmp_path / "taken-away").rename(model.path)  # and it may come back
    assert service.until(lambda: service.state("leaving") == "COLD", what="it to be known again")
    assert infer(service, "leaving", [1]) == [2]
    assert model.count("loads") == 2


def test_changed_files_are_loaded_while_the_old_ones_answer(service: Served, drop: Drop) -> None:
    model = drop("changing", factor=2)
    answers: list[Got] = []

    async def change() -> None:
        async with web(service) as ask:
            done = False

            async def hammer() -> None:
                while not done:
                    answers.append(await ask("/v2/models/changing/infer", x_body([1])))

            hammering = [asyncio.create_task(hammer()) for _ in range(4)]
            await eventually(lambda: len(answers) > 50, "some answers")
            with model.holding("hold-load") as go_on:
                write_toy_config(model.path, factor=5, control=model.control)
                await eventually(lambda: model.count("loads") == 2, "the new files to load")
                so_far = len(answers)
                await eventually(lambda: len(answers) > so_far + 100, "the old ones to go on answering")
                assert all('"data":[2.0]' in got.body for got in answers)
                go_on()
                await eventually(lambda: '"data":[5.0]' in answers[-1].body, "the new ones to answer")
            done = True
            await asyncio.gather(*hammering)

    asyncio.run(change())
    assert {got.status for got in answers} == {200}, [got for got in answers if got.status != 200][:3]
    assert ("READY", "DRAINING") not in transitions(service, "changing")
    service.until(lambda: len(stubs_of(service.root, "changing")) == 1, what="the old one to be gone")
    assert service.model("changing")["loaded_revision"] == service.model("changing")["revision"]


def test_files_that_change_to_broken_ones_leave_the_old_serving(service: Served, drop: Drop) -> None:
    model = drop("breaking", factor=2)
    code = model.path / "1" / "model.py"
    good = code.read_text()
    _replace(code, "raise RuntimeError('half an edit')\n")
    service.until(lambda: "half an edit" in service.model("breaking")["reason"], what="the new load to fail")
    assert service.state("breaking") == "READY" and infer(service, "breaking", [1]) == [2]
    _replace(code, good + "# mended\n")
    service.until(lambda: model.count("loads") == 2, what="the mended files to load")
    service.until(
        lambda: service.model("breaking")["loaded_revision"] == service.model("breaking")["revision"], what="the change"
    )
    assert infer(service, "breaking", [1]) == [2]


def _replace(path: Path, text: str) -> None:
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    os.replace(new, path)


def test_a_rescan_undoes_no_unload(service: Served, drop: Drop) -> None:
    gone, mark = drop("gone"), drop("mark")
    service.post("/models/gone/unload")
    for factor in (3, 4):  # each such change is seen by a rescan alone: no folder at the top changes
        write_toy_config(mark.path, factor=factor, control=mark.control)
        service.until(functools.partial(_gives, service, "mark", factor), what="a rescan")
    assert service.state("gone") == "COLD" and gone.count("loads") == 1
    (gone.path / "touched").touch()  # changed files are no reason to load what was unloaded
    revision = service.model("gone")["revision"]
    service.until(lambda: service.model("gone")["revision"] != revision, what="the change to be seen")
    service.kill()
    service.start()
    service.until(lambda: service.state("gone") == "COLD", what="the repository to be read")
    service.until_state("mark", "READY")
    assert gone.count("loads") == 1


def _gives(service: Served, name: str, factor: float) -> bool:
    return infer(service, name, [1]) == [factor]


def test_remove_keeps_the_files(service: Served, drop: Drop) -> None:
    model = drop("trashed")
    before = fingerprint(model.path)
    moved = service.cli("rm", "trashed", "--json").stdout
    assert service.state("trashed") == "-"
    (kept,) = (service.root / "trash").glob("trashed*")
    assert str(kept) in moved and fingerprint(kept) == before
    assert not stubs_of(service.root, "trashed")


# --------------------------------------------------------------------------- Triton goes


def comes_back(service: Served, name: str) -> None:
    """READY again; on the way it is FAILED, since its runtime was lost."""
    service.until(lambda: service.state(name) == "READY", what=f"{name} to come back")


def test_a_killed_stub_is_noticed(service: Served, drop: Drop) -> None:
    model = drop("fragile")
    (stub,) = stubs_of(service.root, "fragile")
    kill(stub)
    service.until(lambda: _answers(service, "fragile"), what="the model to answer again")
    assert model.count("loads") == 2
    assert len(stubs_of(service.root, "fragile")) == 1


def _answers(service: Served, name: str) -> bool:
    got: Got = asyncio.run(_ask(service, name))
    assert got.status in (200, 502, 503), got  # its process is gone: that is no fault inside
    return got.status == 200


async def _ask(service: Served, name: str) -> Got:
    async with web(service) as ask:
        got: Got = await ask(f"/v2/models/{name}/infer", x_body())
        return got


def test_triton_killed_comes_back_with_what_was_in_use(service: Served, drop: Drop) -> None:
    used, unused, busy = drop("used"), drop("unused"), drop("busy")
    infer(service, "used")
    before, old = triton(service)["info"]["pid"], processes_of(service.root)

    async def crash() -> list[Got]:
        async with web(service) as ask:
            with busy.holding("hold-infer"):
                held = [asyncio.ensure_future(ask("/v2/models/busy/infer", x_body())) for _ in range(3)]
                await eventually(lambda: busy.count("requests") >= 1, "a request to be worked on")
                await eventually(lambda: service.model("busy")["in_flight"] == 3, "three in flight")
                kill(before)
                return list(await asyncio.gather(*held))

    for got in asyncio.run(crash()):
        # HAProxy closes the client's connection where the service would say 502; nobody sends it again either way
        assert got.status in (0, 502), got
        assert got.status == 0 or "not sent again" in got.body
    service.until(lambda: triton(service)["info"]["pid"] != before, what="Triton to come back")
    for name in ("used", "busy"):
        comes_back(service, name)
    assert (used.count("loads"), busy.count("loads")) == (2, 2)
    assert infer(service, "used", [1]) == [2]
    assert service.state("unused") in ("FAILED", "COLD") and unused.count("loads") == 1
    assert infer(service, "unused", [1]) == [2]  # and it comes when it is asked for
    assert not alive(pid for pid, command in old.items() if "/haproxy " not in command)
    assert len(stubs_of(service.root)) == 3
    status = service.get("/status")
    assert status["waiting"] == 0
    booked = {d["id"]: d["booked_bytes"] for d in status["devices"]}
    assert booked["cpu:0"] == sum(m["memory_bytes"] for m in service.ps().values() if m["state"] == "READY")


def test_a_request_right_after_the_crash_waits_for_triton(service: Served, drop: Drop) -> None:
    drop("patient")
    infer(service, "patient")

    async def crash() -> list[Got]:
        async with web(service) as ask:
            kill(triton(service)["info"]["pid"])
            return list(await asyncio.gather(*(ask("/v2/models/patient/infer", x_body()) for _ in range(20))))

    found = asyncio.run(crash())
    # What reached the dead server's address before its end was noticed is told so; nobody is left without an answer.
    # HAProxy closes a connection where the service would say 502
    assert {got.status for got in found} <= {0, 200, 502, 503}, found
    comes_back(service, "patient")
    assert infer(service, "patient", [1]) == [2]


def test_both_killed(service: Served, drop: Drop) -> None:
    model = drop("survivor")
    infer(service, "survivor")
    old = processes_of(service.root)
    service.kill()
    kill(next(pid for pid, command in old.items() if "tritonserver" in command.split()[0]))
    service.start()
    assert infer(service, "survivor", [1]) == [2]
    assert model.count("loads") == 2
    assert not alive(pid for pid, command in old.items() if "/haproxy " not in command)


# --------------------------------------------------------------------------- other people's things


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A repository that somebody else made, and uses."""
    repository = tmp_path / "foreign"
    repository.mkdir()
    for name, factor in (("double", 2.0), ("triple", 3.0)):
        toy(repository / name, factor=factor, control=tmp_path / f"{name}.control")
    toy(repository / "versions", versions=(1, 2), control=tmp_path / "versions.control")
    ensemble(repository / "six", "double", "triple")
    (repository / "wants-a-gpu" / "1").mkdir(parents=True)
    (repository / "wants-a-gpu" / "config.pbtxt").write_text('backend: "tensorrt"\nmax_batch_size: 0\n')
    (repository / "wants-a-gpu" / "1" / "model.plan").write_bytes(b"ftrt")
    (repository / "README").write_text("ours\n")
    (repository / ".hidden").mkdir()
    return repository


def test_a_foreign_repository_is_managed_without_changing_a_file(foreign: Path, tmp_path: Path) -> None:
    before = fingerprint(foreign)
    env = {"XDG_STATE_HOME": str(tmp_path / "state")}
    service = Served(tmp_path / "unused", CONFIG, repository=foreign, own_root=False, env=env)
    try:
        service.start()
        service.until(lambda: len(service.ps()) == 5, what="the repository to be read")
        known = {"COLD", "INVALID"}
        service.until(lambda: {m["state"] for m in service.ps().values()} == known, what="all to be known")
        assert infer(service, "six", [1]) == [6]
        assert infer(service, "versions", [1]) == [4]
        assert service.state("wants-a-gpu") == "INVALID" and "tensorrt" in service.model("wants-a-gpu")["reason"]
        service.post("/models/versions/pin")
        refusal = refused(service, "DELETE", "/models/double")
        assert refusal.status == 409 and "does not change" in refusal.json["error"]["message"]
        said = service.cli("add", str(tmp_path / "unused.log"), check=False)
        assert said.returncode == 1 and "no incoming folder" in said.stderr
        assert service.get("/status")["incoming"] is None
        service.kill()
        service.start()
        service.until_state("six", "READY")
        service.until_state("versions", "READY")
        assert service.model("versions")["pinned"]
        toy(foreign / "newcomer", factor=7, control=tmp_path / "newcomer.control")
        service.until(lambda: service.state("newcomer") == "COLD", what="the newcomer to be seen")
        assert infer(service, "newcomer", [1]) == [7]
        shutil.rmtree(foreign / "newcomer")
        service.until(lambda: service.state("newcomer") == "-", what="it to be forgotten")
    finally:
        service.down()
    assert fingerprint(foreign) == before
    assert not processes_of(tmp_path)


def attached(endpoint: str, grpc: str, **changes: Any) -> dict[str, Any]:
    """A configuration with that Triton and no other runtime."""
    triton = {"endpoint": endpoint, "grpc_endpoint": grpc, "backends": ["python"], **changes}
    return {**CONFIG, "triton": triton, "plugins": {"disable": ["llamacpp", "rayserve", "tensorrt", "vllm"]}}


def test_attached_to_a_triton_that_somebody_started(wheel: Any, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "repository").mkdir(parents=True)
    with tritonserver(wheel, root / "repository", "--model-control-mode=explicit") as external:
        with served(root, attached(external.http, external.grpc)) as service:
            shown = triton(service)["info"]
            assert shown["external"] and shown["pid"] in (None, external.process.pid)
            model = toy(tmp_path / "guest")
            service.drop(model.path)
            service.until_state("guest", "READY")
            assert infer(service, "guest", [1]) == [2]
            service.stop()
            service.start()
            service.until_state("guest", "READY")
            assert model.count("loads") == 1
            assert service.get("/check")["ok"], service.get("/check")
        assert external.process.poll() is None  # `down` leaves it alone
        Straight(external.http).request("GET", "/v2/models/guest/ready")


@pytest.mark.parametrize(
    ("mode", "folder", "words"),
    [
        ("--model-control-mode=none", "repository", ("explicit",)),
        ("--model-control-mode=explicit", "elsewhere", ("repository",)),
    ],
    ids=["another mode", "another folder"],
)
def test_attached_to_one_that_is_not_as_it_must_be(
    wheel: Any, tmp_path: Path, mode: str, folder: str, words: tuple[str, ...]
) -> None:
    root = tmp_path / "root"
    for name in ("repository", "elsewhere"):
        (root / name).mkdir(parents=True)
    with tritonserver(wheel, root / folder, mode) as external:
        service = Served(root, attached(external.http, external.grpc))
        model = toy(tmp_path / "guest")
        try:
            service.start(ready=False)
            service.drop(model.path)
            service.until(lambda: _told(service, words), what=f"the mistake to be told ({words})")
            checked = service.get("/check")
            wrong = [c for c in checked["checks"] if not c["ok"]]
            assert any(all(w in f"{c['found']} {c['advice']}" for w in words) for c in wrong), checked
            assert model.count("loads") == 0
        finally:
            service.down()
        assert external.process.poll() is None


def _told(service: Served, words: tuple[str, ...]) -> bool:
    shown = service.get("/status")["runtimes"]  # none before the service has begun with them
    return bool(shown) and shown[0]["state"] != "UP" and all(word in shown[0]["reason"] for word in words)


def test_attached_to_nobody(tmp_path: Path) -> None:
    service = Served(tmp_path / "root", attached("http://127.0.0.1:9", "127.0.0.1:9"))
    try:
        service.start(ready=False)
        service.until(lambda: _told(service, ("127.0.0.1:9",)), what="the mistake to be told")
        assert refused(service, "GET", "/readyz").status == 503
        assert service.get("/health")["status"] == "degraded"
        checked = service.get("/check")
        assert not checked["ok"] and any("127.0.0.1:9" in c["found"] for c in checked["checks"])
    finally:
        service.down()


def test_a_second_service_on_one_root_is_refused(service: Served) -> None:
    second = subprocess.run(
        [*MODELIUM, "serve", "--root", str(service.root), "--port", "0"],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert second.returncode == 1
    assert "served already by process" in second.stderr and "Traceback" not in second.stderr
    assert service.get("/livez") == "ok\n"


def test_stop_runtimes_ends_everything(tmp_path: Path) -> None:
    service = Served(tmp_path / "root", CONFIG)
    service._where.append("--stop-runtimes")
    try:
        service.start()
        service.drop(toy(tmp_path / "brief").path)
        service.until_state("brief", "READY")
        pids = list(processes_of(service.root))
        assert service.process is not None
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(60) == 0
        service.process = None
        assert not alive(pids)
    finally:
        service._where.remove("--stop-runtimes")
        service.down()
