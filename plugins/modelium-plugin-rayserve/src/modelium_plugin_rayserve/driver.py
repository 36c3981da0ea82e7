"""The driver: starts, finds or connects to a Ray cluster, and keeps an application of Ray Serve for each model.

The cluster is talked to by a process of Ray's own Python (`onray.controller`), which outlives Modelium; the cluster
that Modelium starts lives as long as that process. What is loaded is asked of the cluster each time and kept nowhere
else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any

import aiohttp

from modelium.api import (
    DEFAULT_SETTINGS,
    Endpoint,
    LoadOutcome,
    LoadRequest,
    Observation,
    ObservedModel,
    ProcessRecord,
    Progress,
    Report,
    RuntimeContext,
    RuntimeInfo,
    UnloadOutcome,
)
from modelium.api.measuring import Gpus, Trees, key_of
from modelium.errors import DriverError, RuntimeUnavailable
from modelium_plugin_rayserve import launch, packs, reasons
from modelium_plugin_rayserve.client import Client
from modelium_plugin_rayserve.nodes import Nodes
from modelium_plugin_rayserve.orders import GRACE_S, order
from modelium_plugin_rayserve.settings import RayServeSettings

log = logging.getLogger(__name__)

POLL_S = 0.2
"""How often an application that comes or goes is looked at."""
ANSWERS_WITHIN_S = 30.0
"""A living controller that has been silent for this long is ended and started anew."""
FIRST_ANSWER_S = 30.0
"""How long after an application runs its route may still be unknown to the proxy."""
LOG_BYTES = 256 * 1024
"""How much of a log is fetched from another node."""

Shown = Mapping[str, Any]
"""An application, as the controller shows it."""


class RayServeDriver:
    """`modelium.api.RuntimeDriver` for one cluster: our own, which outlives us, or somebody else's."""

    def __init__(self, context: RuntimeContext):
        assert isinstance(context.settings, RayServeSettings)
        self._context = context
        self._settings = context.settings
        self._own = context.settings.address is None
        self._client: Client | None = None
        """Of the controller that is there; None while our own cluster has not been needed yet."""
        self._record: ProcessRecord | None = None
        self._instance = ""
        self._loading: dict[str, str] = {}
        """Models that are on their way, and how far they are."""
        self._broken: dict[str, ObservedModel] = {}
        """Models that will not come up by themselves, as they were seen: their applications are deleted, since Ray
        would go on trying for ever."""
        self._cleaning: dict[str, asyncio.Task[None]] = {}
        self._starting = asyncio.Lock()
        self._measuring = asyncio.Lock()
        self._trees: Trees | None = None
        self._gpus: Gpus | None = None

    # ------------------------------------------------------------------ starting

    async def start(self) -> RuntimeInfo:
        """Adopt the controller that runs, with its cluster; else connect to the configured cluster. Our own is started
        now only where the configuration says so, else by the first load.

        Raises `DriverError` or `ConfigError` saying what is in the way.
        """
        async with self._starting:
            if self._trees is None:
                self._gpus = await asyncio.to_thread(Gpus.open)
                self._trees = Trees(self._gpus)
            record = self._context.processes.find(self._context.name)
            if record is not None and await self._adopt(record):
                return await self._info(adopted=True)
            lost = self._client is not None
            await self._end()
            adopted = bool(self._instance) and not lost
            if not adopted:
                self._instance = secrets.token_hex(8)
            if self._own and self._settings.enabled is not True:
                return await self._info(adopted=adopted)
            await self._launch(self._context.report)
            return await self._info(adopted=False)

    async def _adopt(self, record: ProcessRecord) -> bool:
        """Whether the controller is of the cluster that is configured, and answers, perhaps after it has started."""
        facts = record.facts
        if facts.get("address") != self._settings.address or "socket" not in facts:
            log.warning("the controller that runs (process %d) is of another cluster: it is ended", record.pid)
            return False
        if self._record is not None and self._record.pid != record.pid:
            self._let_go()
        client = self._client or Client(Path(facts["socket"]))
        try:
            async with asyncio.timeout(ANSWERS_WITHIN_S):
                while self._alive(record):
                    with contextlib.suppress(RuntimeUnavailable):
                        await client.status()
                        self._client, self._record = client, record
                        self._instance = facts["instance"]
                        return True
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            log.warning("Ray's controller (process %d) has been silent: it is ended", record.pid)
        client.close()
        return False

    async def _launch(self, report: Report) -> None:
        """Start the controller, and with it our own cluster. Raises `RuntimeUnavailable` with its last words."""
        context, settings = self._context, self._settings
        python = await packs.install(context.cache_dir, settings, (), report)
        if self._own:
            await asyncio.to_thread(launch.sweep, context.state_dir)
        command = await asyncio.to_thread(launch.command, settings, python, context.state_dir, self._instance)
        report(Progress(stage="starting Ray" if self._own else f"connecting to Ray at {settings.address}"))
        record = await context.processes.spawn(context.name, command.argv, env=command.env, facts=command.facts)
        client = Client(Path(command.facts["socket"]))
        try:
            async with asyncio.timeout(settings.start_timeout_s):
                while True:
                    with contextlib.suppress(RuntimeUnavailable):
                        await client.status()
                        break
                    if not self._alive(record):
                        raise RuntimeUnavailable(f"Ray did not start: {self._last_words()}")
                    await asyncio.sleep(POLL_S)
        except BaseException as error:
            client.close()
            await self._end()
            if isinstance(error, TimeoutError):
                raise RuntimeUnavailable(
                    f"Ray was not up within {settings.start_timeout_s:.0f} s (ray_serve.start_timeout_s): "
                    + self._last_words()
                ) from error
            raise
        self._client, self._record = client, record

    async def _info(self, *, adopted: bool) -> RuntimeInfo:
        environment = await packs.environment_for(self._context.cache_dir, self._settings)
        facts: dict[str, Any] = {
            "own": self._own,
            DEFAULT_SETTINGS: self._settings.default_settings.model_dump(mode="json", exclude_none=True),
            "packs": None,
            "running": self._client is not None,
        }
        if environment is not None:
            facts["packs"] = [
                pack for pack in packs.PACKS if await asyncio.to_thread(packs.has_pack, environment, pack)
            ]
            facts["installed"] = packs.BASE in facts["packs"]
        version = packs.RAY.partition("==")[2]
        if self._client is not None:
            status = await self._client.status(within_s=60)
            version = status["ray"]
            facts |= {"address": status["address"], "url": status["url"], "nodes": len(status["nodes"])}
        return RuntimeInfo(
            name=self._context.name,
            version=version,
            instance=self._instance,
            adopted=adopted,
            external=not self._own,
            pid=self._record.pid if self._record is not None else None,
            # Each model tells its own endpoint: there is nothing to ask where no model is.
            facts=facts,
        )

    def _alive(self, record: ProcessRecord) -> bool:
        found = self._context.processes.find(self._context.name)
        return found is not None and (found.pid, found.created_at) == (record.pid, record.created_at)

    def _last_words(self) -> str:
        """What the controller said of an error, else what it said last."""
        lines = self._context.processes.tail(self._context.name, 200, this_run=True)
        said = [line for line in lines if "Error" in line] or lines
        return said[-1] if said else "it said nothing"

    # ------------------------------------------------------------------ observing

    async def observe(self) -> Observation:
        """Applications of models, with what their replicas hold; and the devices of the cluster's other nodes."""
        if self._client is None:
            return Observation(instance=self._instance)
        status = await self._status()
        nodes = Nodes(status)
        ours = {name: shown for name, shown in status["applications"].items() if shown["ours"]}
        memory, overhead = await self._measure(ours, nodes)
        seen = {
            name: _observed(name, shown, nodes, memory[name], self._endpoints(status)) for name, shown in ours.items()
        }
        for name, model in seen.items():
            if model.broken and name not in self._loading:
                self._give_up(name, model)
        coming = {
            name: ObservedModel(name=name, ready=False, reason=stage)
            for name, stage in self._loading.items()
            if name not in seen
        }
        return Observation(
            instance=self._instance,
            models=tuple(({**self._broken, **seen, **coming}).values()),
            overhead=overhead,
            devices=nodes.devices(self._context.name),
        )

    def _give_up(self, name: str, model: ObservedModel) -> None:
        self._broken[name] = model.model_copy(update={"memory": {}})
        if name not in self._cleaning:
            task = self._cleaning[name] = asyncio.get_running_loop().create_task(self._clean_up(name))
            task.add_done_callback(lambda _: self._cleaning.pop(name, None))

    async def _status(self, within_s: float = 0.0) -> dict[str, Any]:
        """Raises `RuntimeUnavailable` when the cluster is gone."""
        if self._client is None or self._record is None:
            raise RuntimeUnavailable("Ray was not started")
        if not self._alive(self._record):
            raise RuntimeUnavailable(f"Ray's controller (process {self._record.pid}) has ended")
        return await self._client.status(within_s)

    async def _measure(
        self, applications: Mapping[str, Shown], nodes: Nodes
    ) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
        """Bytes by device of each application, and of what Ray itself holds on this machine."""
        here = {f"{name} {pid}": pid for name, a in applications.items() for node, pid in _pids(a) if node == nodes.me}
        assert self._trees is not None and self._record is not None
        async with self._measuring:
            found = await asyncio.to_thread(self._trees.look, {"": self._record.pid, **here})
        overhead = found.pop("", {})
        memory: dict[str, dict[str, int]] = {}
        for name, shown in applications.items():
            held = memory[name] = {}
            for node, pid in _pids(shown):
                part = found.get(f"{name} {pid}", {}) if node == nodes.me else nodes.held(node, pid)
                for device, size in part.items():
                    held[device] = held.get(device, 0) + size
        return memory, overhead

    @staticmethod
    def _endpoints(status: Mapping[str, Any]) -> tuple[Endpoint, ...]:
        return (Endpoint(protocol="kserve-http", address=status["url"]),)

    # ------------------------------------------------------------------ loading

    async def load(self, request: LoadRequest, report: Report) -> LoadOutcome:
        """Deploy the model's application, after installing what it needs, and return when it answers.

        One that runs already where it is wanted is as good as loaded, unless the request says `replace`: then the old
        revision serves until the new one does. Cancelled, a new application is deleted again, and a replacement goes
        on. Raises `LoadRejected`, `RuntimeUnavailable`, or another `DriverError` where trying again may help.
        """
        name, began = request.name, time.monotonic()

        def tell(progress: Progress) -> None:
            self._loading[name] = progress.stage
            report(progress)

        tell(Progress(stage="waiting for Ray"))
        try:
            await self._up(tell)
            python_packs = [str(pack) for pack in request.plan.settings.get("packs") or ()]
            await packs.install(self._context.cache_dir, self._settings, python_packs, tell)
            await self._forget_broken(name)
            return await self._load(request, tell, began)
        finally:
            del self._loading[name]

    async def _up(self, report: Report) -> None:
        async with self._starting:
            if self._client is not None:
                return
            if not self._instance:
                raise RuntimeUnavailable("Ray was not started")
            try:
                await self._launch(report)
            except RuntimeUnavailable as error:
                raise DriverError(error.message, code="ray_not_started") from error

    async def _load(self, request: LoadRequest, report: Report, began: float) -> LoadOutcome:
        name = request.name
        status = await self._status()
        nodes = Nodes(status)
        wanted = nodes.placed(request.devices)
        shown = status["applications"].get(name)
        if shown is not None and not shown["ours"]:
            raise DriverError(
                f"the cluster has an application {name} that is not Modelium's: rename the model, or delete it",
                code="name_taken",
            )
        serves = shown is not None and _serves(shown, nodes)
        sound = serves and shown is not None and shown["status"] == "RUNNING" and set(shown["nodes"]) == set(wanted)
        if sound and not request.replace:
            return await self._outcome(request, began)
        replacing = request.replace and serves
        if shown is not None and not replacing:
            await self._delete(name)
        what = await asyncio.to_thread(
            order, request, own=self._own, nodes=wanted, log=self._log_of(name), uuid_of=self._uuid
        )
        assert self._client is not None
        report(Progress(stage="deploying"))
        try:
            async with asyncio.timeout(self._settings.load_timeout_s):
                await _to_the_end(self._client.call("POST", "/applications", what))
                await self._until_running(request, report, _running(shown) if shown and replacing else set())
                await self._until_answers(name)
        except BaseException as error:
            if not replacing:
                await _to_the_end(self._clean_up(name))
            if isinstance(error, TimeoutError):
                last = self._context.processes.tail(self._log_name(name), 5)
                raise DriverError(
                    f"{name}: its replicas were not ready within {self._settings.load_timeout_s:.0f} s "
                    "(ray_serve.load_timeout_s); its log ends:\n" + "\n".join(last),
                    code="load_timeout",
                ) from error
            raise
        return await self._outcome(request, began)

    async def _until_running(self, request: LoadRequest, report: Report, old: set[str]) -> None:
        """`old` are the replicas that are to be replaced."""
        name, told = request.name, ""
        while True:
            shown = (await self._status(within_s=POLL_S))["applications"].get(name)
            if shown is not None:
                if shown["status"] == "RUNNING" and not old & _running(shown):
                    return
                if _failed(shown):
                    lines = await asyncio.to_thread(self.logs, name, 50)
                    raise reasons.failure(name, shown["message"], lines, own=self._settings.python is None)
                if (stage := _stage(shown)) != told:
                    told = stage
                    report(Progress(stage=stage))
            await asyncio.sleep(POLL_S)

    async def _until_answers(self, name: str) -> None:
        """The proxy learns of a new route a little later."""
        url = f"{(await self._status(within_s=60))['url']}/v2/models/{name}/ready"
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=FIRST_ANSWER_S)) as http:
            async with asyncio.timeout(FIRST_ANSWER_S):
                while True:
                    with contextlib.suppress(aiohttp.ClientConnectionError):
                        async with http.get(url) as answer:
                            if answer.status == 200:
                                return
                    await self._status(within_s=POLL_S)
                    await asyncio.sleep(POLL_S / 4)

    async def _outcome(self, request: LoadRequest, began: float) -> LoadOutcome:
        status = await self._status()
        shown = status["applications"].get(request.name)
        if shown is None:
            raise DriverError(f"{request.name}: its application was deleted by somebody", code="deleted")
        memory, _ = await self._measure({request.name: shown}, Nodes(status))
        return LoadOutcome(
            memory=memory[request.name], load_s=time.monotonic() - began, endpoints=self._endpoints(status)
        )

    def _uuid(self, device: str) -> str:
        if self._gpus is None:
            raise DriverError(f"{device} is not there: NVML shows no GPU", code="no_gpu")
        return self._gpus.uuid(device)

    def _log_name(self, model: str) -> str:
        return f"{self._context.name}.{model}"

    def _log_of(self, model: str) -> Path:
        """Beside the controller's log, so that it is rotated with the others."""
        assert self._record is not None
        return self._record.log.with_name(f"{self._log_name(model)}.log")

    # ------------------------------------------------------------------ ending

    async def unload(self, name: str) -> UnloadOutcome:
        await self._forget_broken(name)
        if self._client is not None:
            shown = (await self._status())["applications"].get(name)
            if shown is not None and shown["ours"]:
                await self._delete(name)
        return UnloadOutcome()

    async def _delete(self, name: str) -> None:
        """Return when the application and its processes on this machine are gone."""
        assert self._client is not None
        left: dict[int, Any] = {}
        try:
            async with asyncio.timeout(self._settings.unload_timeout_s):
                await self._client.call("DELETE", f"/applications/{name}")
                while True:
                    status = await self._status(within_s=POLL_S / 2)
                    shown = status["applications"].get(name)
                    if shown is not None:
                        left |= {pid: key_of(pid) for node, pid in _pids(shown) if node == status["node"]}
                    elif not any(key is not None and key_of(pid) == key for pid, key in left.items()):
                        return
                    await asyncio.sleep(POLL_S / 2)
        except TimeoutError as error:
            raise DriverError(
                f"{name}: its application was not gone within {self._settings.unload_timeout_s:.0f} s "
                "(ray_serve.unload_timeout_s)",
                code="unload_stuck",
            ) from error

    async def _clean_up(self, name: str) -> None:
        """After a load that failed or was given up, or when an application is broken."""
        try:
            await self._delete(name)
        except DriverError as error:
            log.warning("%s could not be cleaned up: %s", name, error.message)

    async def _forget_broken(self, name: str) -> None:
        if (task := self._cleaning.get(name)) is not None:
            await asyncio.wait([task])
        self._broken.pop(name, None)

    async def stop(self) -> None:
        """End our cluster with all its models; somebody else's is left alone, with what it serves."""
        async with self._starting:
            await self._end()
            self._instance = ""

    async def _end(self) -> None:
        self._let_go()
        self._record = None
        await self._context.processes.stop(self._context.name, grace_s=GRACE_S)
        await asyncio.to_thread(launch.sweep, self._context.state_dir)

    async def close(self) -> None:
        for task in list(self._cleaning.values()):
            task.cancel()
            await asyncio.wait([task])
        self._let_go()

    def _let_go(self) -> None:
        self._broken.clear()
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def logs(self, model: str | None, lines: int) -> list[str]:
        """What a model wrote, or the controller; also of a load that failed. What lies on other nodes is asked for."""
        processes = self._context.processes
        if model is None:
            return processes.tail(self._context.name, lines)
        found = processes.tail(self._log_name(model), lines)
        client = self._client
        if client is None or lines <= 0:
            return found
        with contextlib.suppress(DriverError):
            status = client.ask("GET", "/status")
            nodes = Nodes(status)
            shown = status["applications"].get(model, {"nodes": []})
            for node in shown["nodes"]:
                if node != nodes.me and nodes.alive(node):
                    text = client.ask("GET", f"/applications/{model}/log/{node}/{LOG_BYTES}")["text"]
                    found += [f"{nodes.names[node]}: {line}" for line in text.splitlines()[-lines:]]
        return found[-lines:]


# --------------------------------------------------------------------------- what an application shows


def _pids(shown: Shown) -> list[tuple[str, int]]:
    """Node and number of each replica's process."""
    return [(replica["node"], replica["pid"]) for replica in shown["replicas"] if replica["pid"]]


def _running(shown: Shown) -> set[str]:
    """The names of the replicas that serve."""
    return {replica["id"] for replica in shown["replicas"] if replica["state"] == "RUNNING"}


def _failed(shown: Shown) -> bool:
    """Whether it will not come up by itself. Ray starts one whose process has ended again, and calls it unhealthy until
    then; when that fails too, the message says why."""
    if shown["status"] == "DEPLOY_FAILED":
        return True
    starting = any(replica["state"] == "STARTING" for replica in shown["replicas"])
    return shown["status"] == "UNHEALTHY" and (not starting or reasons.tells_why(shown["message"]))


def _serves(shown: Shown, nodes: Nodes) -> bool:
    return shown["status"] != "DELETING" and any(
        replica["state"] == "RUNNING" and nodes.alive(replica["node"]) for replica in shown["replicas"]
    )


def _observed(
    name: str, shown: Shown, nodes: Nodes, memory: Mapping[str, int], endpoints: tuple[Endpoint, ...]
) -> ObservedModel:
    ready = _serves(shown, nodes)
    broken, reason = False, ""
    if not ready:
        lost = [node for node in shown["nodes"] if not nodes.alive(node)]
        if shown["nodes"] and len(lost) == len(shown["nodes"]):
            broken, reason = True, "the node that it was on has left the Ray cluster"
        elif _failed(shown):
            broken, reason = True, reasons.in_short(shown["message"]) or "Ray says that it is unhealthy"
        else:
            reason = _stage(shown)
    return ObservedModel(
        name=name,
        ready=ready,
        broken=broken,
        versions=("1",),
        memory=memory,
        reason=reason,
        endpoints=endpoints if ready else (),
    )


def _stage(shown: Shown) -> str:
    """How far it is, for a person."""
    if shown["status"] == "DELETING":
        return "being deleted"
    if shown["message"]:
        return reasons.in_short(shown["message"])
    running = sum(replica["state"] == "RUNNING" for replica in shown["replicas"])
    target = shown["target"] or 1
    if running and target > 1:
        return f"{running} of {target} replicas are ready"
    if any(replica["pid"] for replica in shown["replicas"]):
        return "loading"
    return "starting its process"


async def _to_the_end(work: Coroutine[Any, Any, Any]) -> None:
    """Finish it whatever comes."""
    task = asyncio.get_running_loop().create_task(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
