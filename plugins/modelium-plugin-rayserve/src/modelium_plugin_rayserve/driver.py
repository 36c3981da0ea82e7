"""The driver: keeps an application of Ray Serve for each model on a cluster that is there, or is started when needed.

What is loaded is asked of the cluster each time and kept nowhere else.
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
    Progress,
    Report,
    RuntimeContext,
    RuntimeInfo,
    UnloadOutcome,
)
from modelium.api.measuring import Gpus, Trees, key_of
from modelium.errors import DriverError, RuntimeUnavailable
from modelium_plugin_rayserve import applications, packs, reasons
from modelium_plugin_rayserve.applications import Shown
from modelium_plugin_rayserve.cluster import POLL_S, Cluster
from modelium_plugin_rayserve.nodes import Nodes
from modelium_plugin_rayserve.orders import order
from modelium_plugin_rayserve.settings import RayServeSettings

log = logging.getLogger(__name__)

FIRST_ANSWER_S = 30.0
"""How long after an application runs its route may still be unknown to the proxy."""
LOG_BYTES = 256 * 1024
"""How much of a log is fetched from another node."""


class RayServeDriver:
    """`modelium.api.RuntimeDriver` for one cluster: our own, which outlives us, or somebody else's."""

    def __init__(self, context: RuntimeContext):
        assert isinstance(context.settings, RayServeSettings)
        self._context = context
        self._settings = context.settings
        self._cluster = Cluster(context)
        self._loading: dict[str, str] = {}
        """Models that are on their way, and how far they are."""
        self._broken: dict[str, ObservedModel] = {}
        """Models that will not come up by themselves, as they were seen: their applications are deleted, since Ray
        would go on trying for ever."""
        self._cleaning: dict[str, asyncio.Task[None]] = {}
        self._starting = asyncio.Lock()
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
            former, record = self._cluster.record, self._context.processes.find(self._context.name)
            if record is not None and await self._cluster.adopt(record):
                if former is not None and former.pid != record.pid:
                    self._broken.clear()
                return await self._info(adopted=True)
            lost = self._cluster.client is not None
            await self._end()
            adopted = bool(self._cluster.instance) and not lost
            if not adopted:
                self._cluster.instance = secrets.token_hex(8)
            if self._cluster.own and self._settings.enabled is not True:
                return await self._info(adopted=adopted)
            await self._cluster.launch(self._context.report)
            return await self._info(adopted=False)

    async def _info(self, *, adopted: bool) -> RuntimeInfo:
        environment = await packs.environment_for(self._context.cache_dir, self._settings)
        facts: dict[str, Any] = {
            "own": self._cluster.own,
            DEFAULT_SETTINGS: self._settings.default_settings.model_dump(mode="json", exclude_none=True),
            "packs": None,
            "running": self._cluster.client is not None,
        }
        if environment is not None:
            facts["packs"] = [
                pack for pack in packs.PACKS if await asyncio.to_thread(packs.has_pack, environment, pack)
            ]
            facts["installed"] = packs.BASE in facts["packs"]
        version = packs.RAY.partition("==")[2]
        if self._cluster.client is not None:
            status = await self._cluster.client.status(within_s=60)
            version = status["ray"]
            facts |= {"address": status["address"], "url": status["url"], "nodes": len(status["nodes"])}
        return RuntimeInfo(
            name=self._context.name,
            version=version,
            instance=self._cluster.instance,
            adopted=adopted,
            external=not self._cluster.own,
            pid=self._cluster.record.pid if self._cluster.record is not None else None,
            # Each model tells its own endpoint: there is nothing to ask where no model is.
            facts=facts,
        )

    # ------------------------------------------------------------------ observing

    async def observe(self) -> Observation:
        """Applications of models, with what their replicas hold; and the devices of the cluster's other nodes."""
        if self._cluster.client is None:
            return Observation(instance=self._cluster.instance)
        status = await self._cluster.status()
        nodes = Nodes(status)
        ours = {name: shown for name, shown in status["applications"].items() if shown["ours"]}
        memory, overhead = await self._measure(ours, nodes)
        seen = {
            name: applications.observed(name, shown, nodes, memory[name], self._endpoints(status))
            for name, shown in ours.items()
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
            instance=self._cluster.instance,
            models=tuple(({**self._broken, **seen, **coming}).values()),
            overhead=overhead,
            devices=nodes.devices(self._context.name),
        )

    def _give_up(self, name: str, model: ObservedModel) -> None:
        self._broken[name] = model.model_copy(update={"memory": {}})
        if name not in self._cleaning:
            task = self._cleaning[name] = asyncio.get_running_loop().create_task(self._clean_up(name))
            task.add_done_callback(lambda _: self._cleaning.pop(name, None))

    async def _measure(
        self, wanted: Mapping[str, Shown], nodes: Nodes
    ) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
        """Bytes by device of each application, and of what Ray itself holds on this machine."""
        here = {
            f"{name} {pid}": pid
            for name, shown in wanted.items()
            for node, pid in applications.pids(shown)
            if node == nodes.me
        }
        assert self._trees is not None and self._cluster.record is not None
        found = await asyncio.to_thread(self._trees.look, {"": self._cluster.record.pid, **here})
        overhead = found.pop("", {})
        memory: dict[str, dict[str, int]] = {}
        for name, shown in wanted.items():
            held = memory[name] = {}
            for node, pid in applications.pids(shown):
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
        name = request.name

        def tell(progress: Progress) -> None:
            self._loading[name] = progress.stage
            report(progress)

        tell(Progress(stage="waiting for Ray"))
        try:
            await self._up(tell)
            python_packs = [str(pack) for pack in request.plan.settings.get("packs") or ()]
            await packs.install(self._context.cache_dir, self._settings, python_packs, tell)
            await self._forget_broken(name)
            return await self._load(request, tell, time.monotonic())  # what is installed once is no part of it
        finally:
            del self._loading[name]

    async def _up(self, report: Report) -> None:
        async with self._starting:
            if self._cluster.client is not None:
                return
            if not self._cluster.instance:
                raise RuntimeUnavailable("Ray was not started")
            try:
                await self._cluster.launch(report)
            except RuntimeUnavailable as error:
                raise DriverError(error.message, code="ray_not_started") from error

    async def _load(self, request: LoadRequest, report: Report, began: float) -> LoadOutcome:
        name = request.name
        status = await self._cluster.status()
        nodes = Nodes(status)
        wanted = nodes.placed(request.devices)
        shown = status["applications"].get(name)
        if shown is not None and not shown["ours"]:
            raise DriverError(
                f"the cluster has an application {name} that is not Modelium's: rename the model, or delete it",
                code="name_taken",
            )
        serves = shown is not None and applications.serves(shown, nodes)
        sound = serves and shown is not None and shown["status"] == "RUNNING" and set(shown["nodes"]) == set(wanted)
        if sound and not request.replace:
            return await self._outcome(request, began)
        replacing = request.replace and serves
        if shown is not None and not replacing:
            await self._delete(name)
        what = await asyncio.to_thread(
            order, request, own=self._cluster.own, nodes=wanted, log=self._log_of(name), uuid_of=self._uuid
        )
        assert self._cluster.client is not None
        report(Progress(stage="deploying"))
        try:
            async with asyncio.timeout(self._settings.load_timeout_s):
                await _to_the_end(self._cluster.client.call("POST", "/applications", what))
                old = applications.running(shown) if shown and replacing else set()
                await self._until_running(request, report, old)
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
            shown = (await self._cluster.status(within_s=POLL_S))["applications"].get(name)
            if shown is not None:
                if shown["status"] == "RUNNING" and not old & applications.running(shown):
                    return
                if applications.failed(shown):
                    lines = await asyncio.to_thread(self.logs, name, 50)
                    raise reasons.failure(name, shown["message"], lines, own=self._settings.python is None)
                if (stage := applications.stage(shown)) != told:
                    told = stage
                    report(Progress(stage=stage))
            await asyncio.sleep(POLL_S)

    async def _until_answers(self, name: str) -> None:
        """The proxy learns of a new route a little later."""
        url = f"{(await self._cluster.status(within_s=60))['url']}/v2/models/{name}/ready"
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=FIRST_ANSWER_S)) as http:
            async with asyncio.timeout(FIRST_ANSWER_S):
                while True:
                    with contextlib.suppress(aiohttp.ClientConnectionError):
                        async with http.get(url) as answer:
                            if answer.status == 200:
                                return
                    await self._cluster.status(within_s=POLL_S)
                    await asyncio.sleep(POLL_S / 4)

    async def _outcome(self, request: LoadRequest, began: float) -> LoadOutcome:
        status = await self._cluster.status()
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
        assert self._cluster.record is not None
        return self._cluster.record.log.with_name(f"{self._log_name(model)}.log")

    # ------------------------------------------------------------------ ending

    async def unload(self, name: str) -> UnloadOutcome:
        await self._forget_broken(name)
        if self._cluster.client is not None:
            shown = (await self._cluster.status())["applications"].get(name)
            if shown is not None and shown["ours"]:
                await self._delete(name)
        return UnloadOutcome()

    async def _delete(self, name: str) -> None:
        """Return when the application and its processes on this machine are gone."""
        assert self._cluster.client is not None
        left: dict[int, Any] = {}
        try:
            async with asyncio.timeout(self._settings.unload_timeout_s):
                await self._cluster.client.call("DELETE", f"/applications/{name}")
                while True:
                    status = await self._cluster.status(within_s=POLL_S / 2)
                    shown = status["applications"].get(name)
                    if shown is not None:
                        left |= {pid: key_of(pid) for node, pid in applications.pids(shown) if node == status["node"]}
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
            self._cluster.instance = ""

    async def _end(self) -> None:
        self._broken.clear()
        await self._cluster.end()

    async def close(self) -> None:
        for task in list(self._cleaning.values()):
            task.cancel()
            await asyncio.wait([task])
        self._broken.clear()
        self._cluster.let_go()

    def logs(self, model: str | None, lines: int) -> list[str]:
        """What a model wrote, or the controller; also of a load that failed. What lies on other nodes is asked for."""
        processes = self._context.processes
        if model is None:
            return processes.tail(self._context.name, lines)
        found = processes.tail(self._log_name(model), lines)
        client = self._cluster.client
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


async def _to_the_end(work: Coroutine[Any, Any, Any]) -> None:
    """Finish it whatever comes."""
    task = asyncio.get_running_loop().create_task(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
