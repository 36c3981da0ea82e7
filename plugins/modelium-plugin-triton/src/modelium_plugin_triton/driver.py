"""The driver: finds, starts or attaches to a Triton, and hands what models need to the session with it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from modelium_plugin_vllm.environment import FOLDER

from modelium.api import (
    Endpoint,
    LoadOutcome,
    LoadRequest,
    Observation,
    ProcessRecord,
    Progress,
    Report,
    RuntimeContext,
    RuntimeInfo,
    UnloadOutcome,
)
from modelium.api.environments import Environment
from modelium.api.measuring import Gpus, key_of
from modelium.api.ports import HOST
from modelium.errors import LoadRejected, ModelError, RuntimeUnavailable
from modelium_plugin_triton import attach, elsewhere, install, locate, reasons, server, vllm, vllm_environment
from modelium_plugin_triton.client import TritonClient
from modelium_plugin_triton.measure import Measurer
from modelium_plugin_triton.session import Attempt, Session
from modelium_plugin_triton.settings import TritonSettings
from modelium_plugin_triton.unfinished import Unfinished

log = logging.getLogger(__name__)

T = TypeVar("T")

ANSWERS_WITHIN_S = 30.0
"""A living server that has been silent for this long is ended and started anew."""


class TritonDriver:
    """`modelium.api.RuntimeDriver` for one Triton: our own, which outlives us, or somebody else's."""

    def __init__(self, context: RuntimeContext):
        assert isinstance(context.settings, TritonSettings)
        self._context = context
        self._settings = context.settings
        self._repository = context.repository.resolve()
        self._session: Session | None = None
        self._info: RuntimeInfo | None = None
        self._environment: Environment | None = None
        self._epoch: attach.Epoch | None = None
        self._gpus: Gpus | None = None
        self._culprits: dict[str, int] = {}
        self._starting = asyncio.Lock()
        self._installs: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    # ------------------------------------------------------------------ starting

    async def start(self) -> RuntimeInfo:
        """Attach to the configured server; else adopt ours when it runs, or start it.

        Raises `DriverError` or `ConfigError` saying what is in the way.
        """
        async with self._starting:
            self._gpus = self._gpus or await asyncio.to_thread(Gpus.open)
            if self._settings.endpoint:
                return await self._attach(self._settings.endpoint)
            name = self._context.name
            record = self._context.processes.find(name)
            if record is not None and await self._answers(record):
                return await self._adopt(record, adopted=True)
            await self._let_go()
            await self._context.processes.stop(name, grace_s=server.EXIT_TIMEOUT_S)  # what is left of it, orphans too
            return await self._adopt(await self._spawn(), adopted=False)

    async def _answers(self, record: ProcessRecord) -> bool:
        """Whether it is a server on our repository that answers, perhaps after it has finished starting."""
        facts = server.facts_of(record)
        if facts["repository"] != str(self._repository):
            log.warning("the Triton that runs (process %d) has another repository: it is ended", record.pid)
            return False
        client = TritonClient(_grpc(facts))
        try:
            async with asyncio.timeout(ANSWERS_WITHIN_S):
                while self._context.processes.find(self._context.name) is not None:
                    if await client.live():
                        return True
                    await asyncio.sleep(0.1)
        except TimeoutError:
            log.warning("Triton (process %d) has been silent for %.0f s: it is ended", record.pid, ANSWERS_WITHIN_S)
        finally:
            await client.close()
        return False

    async def _spawn(self) -> ProcessRecord:
        settings, context = self._settings, self._context
        executable = await asyncio.to_thread(locate.find_executable, settings)
        wheel = None
        if executable is None:
            interpreter = await locate.find_interpreter(settings)
            wheel = await install.prepare(context.cache_dir, interpreter, settings.pip_args, context.report)
            executable = wheel.executable
        await asyncio.to_thread(server.sweep_shm, self._repository)
        ports = await asyncio.to_thread(server.choose_ports, settings, context.state_dir)
        command = server.command(settings, self._repository, ports, executable=executable, wheel=wheel)
        context.report(Progress(stage="starting Triton"))
        record = await context.processes.spawn(context.name, command.argv, env=command.env, facts=command.facts)
        try:
            await self._until_live(record)
        except BaseException:
            await context.processes.stop(context.name, grace_s=0)
            raise
        return record

    async def _until_live(self, record: ProcessRecord) -> None:
        client = TritonClient(_grpc(server.facts_of(record)))
        limit = self._settings.start_timeout_s
        try:
            async with asyncio.timeout(limit):
                while not await client.live():
                    if self._context.processes.find(self._context.name) is None:
                        raise RuntimeUnavailable(f"tritonserver ended while it started:\n{self._last_words()}")
                    await asyncio.sleep(0.05)
        except TimeoutError as error:
            raise RuntimeUnavailable(
                f"tritonserver did not answer within {limit:.0f} s (triton.start_timeout_s):\n{self._last_words()}"
            ) from error
        finally:
            await client.close()

    def _last_words(self) -> str:
        lines = self._context.processes.tail(self._context.name, 1000)
        return "\n".join(reasons.complaints(lines)[-5:] or lines[-5:])

    async def _adopt(self, record: ProcessRecord, *, adopted: bool) -> RuntimeInfo:
        facts = server.facts_of(record)
        folder = Path(str(facts["backends"]))
        backends = await asyncio.to_thread(locate.list_backends, folder)
        self._environment = Environment(Path(str(facts["environment"]))) if facts["environment"] else None
        instance = f"{record.pid}-{record.created_at}"
        processes, name = self._context.processes, self._context.name
        session = self._session
        if session is None or session.instance != instance:
            await self._let_go()
            session = await self._begin(
                Session(
                    client=TritonClient(_grpc(facts)),
                    settings=self._settings,
                    instance=instance,
                    repository=self._repository,
                    memory_file=self._context.state_dir / "native.json",
                    measurer=Measurer(record.pid, self._repository, self._gpus),
                    backends=backends,
                    python_based=await asyncio.to_thread(locate.python_based, folder),
                    tail=lambda lines: processes.tail(name, lines),
                    unfinished=Unfinished(culprits=self._culprits),
                )
            )
        _, version, _ = await session.client.metadata()
        ports = facts["ports"]
        assert isinstance(ports, dict)
        self._info = RuntimeInfo(
            name=name,
            version=version,
            instance=instance,
            adopted=adopted,
            pid=record.pid,
            backends=backends,
            endpoints=(
                Endpoint(protocol="kserve-http", address=f"http://{HOST}:{ports['http']}"),
                Endpoint(protocol="kserve-grpc", address=f"{HOST}:{ports['grpc']}"),
                Endpoint(protocol="metrics", address=f"http://{HOST}:{ports['metrics']}/metrics"),
            ),
            facts={
                "executable": record.argv[0],
                "gpu": self._gpus is not None,
                "environment": facts["environment"],
                "repository": str(self._repository),
                "vllm_environment": str(self._vllm_place),
                "vllm_takes_devices": await asyncio.to_thread(vllm.takes_devices, folder),
                "log": str(record.log),
            },
        )
        return self._info

    async def _attach(self, endpoint: str) -> RuntimeInfo:
        address = attach.grpc_address(self._settings)
        client = TritonClient(address)
        try:
            found = await attach.attach(self._settings, self._repository, client, self._context.name)
        except BaseException:
            await client.close()
            raise
        process = found.process
        measurer = None
        repository = self._repository
        local_backends: tuple[str, ...] = ()
        python_based = frozenset({"python"})
        seen_facts: dict[str, Any] = {}
        if process is not None:
            instance = _identity(process.pid)
            argv = tuple(process.cmdline())
            # It may call our folder by another name.
            repository = Path(server.argument(argv, "--model-repository") or repository)
            measurer = Measurer(process.pid, repository, self._gpus)
            folder = server.argument(argv, "--backend-directory") or str(locate.INSTALLED / "backends")
            # Its own view of the files, which is another one when it runs in a container.
            seen = Path(f"/proc/{process.pid}/root{folder}") if folder.startswith("/") else Path(process.cwd()) / folder
            local_backends = await asyncio.to_thread(locate.list_backends, seen)
            python_based |= await asyncio.to_thread(locate.python_based, seen)
            takes_devices = await asyncio.to_thread(vllm.takes_devices, seen)
            seen_facts = {"gpu": self._gpus is not None, "vllm_takes_devices": takes_devices}
        else:
            self._epoch = attach.Epoch(self._context.state_dir / "external.json", endpoint)
            instance = self._epoch.instance
        session = self._session
        if session is None or session.instance != instance:
            await self._let_go()
            session = await self._begin(
                Session(
                    client=client,
                    settings=self._settings,
                    instance=instance,
                    repository=repository,
                    memory_file=self._context.state_dir / "native.json",
                    measurer=measurer,
                    own=False,
                    python_based=python_based,
                )
            )
        else:
            await client.close()
        known = self._settings.backends or local_backends
        session.backends = tuple(sorted({*known, *session.used_backends} - session.missing_backends))
        self._info = RuntimeInfo(
            name=self._context.name,
            version=found.version,
            instance=instance,
            adopted=True,
            external=True,
            elsewhere=self._settings.metrics_endpoint is not None,
            pid=process.pid if process else None,
            backends=session.backends,
            endpoints=(
                Endpoint(protocol="kserve-http", address=found.http),
                Endpoint(protocol="kserve-grpc", address=found.grpc),
            ),
            facts={"backends_known": bool(known), "repository": str(repository), **seen_facts},
        )
        return self._info

    async def _begin(self, session: Session) -> Session:
        try:
            await session.begin()
        except BaseException:
            await session.client.close()
            raise
        self._session = session
        return session

    # ------------------------------------------------------------------ models

    async def observe(self) -> Observation:
        session = self._need()
        if self._settings.endpoint is None:
            record = self._context.processes.find(self._context.name)
            if record is None or f"{record.pid}-{record.created_at}" != session.instance:
                raise RuntimeUnavailable("tritonserver has ended")
        observation = await session.observe()
        if self._settings.endpoint is not None and self._present(session, observation) != session.instance:
            raise RuntimeUnavailable("the attached Triton was started anew")
        if self._settings.endpoint is not None and self._settings.metrics_endpoint is not None:
            there = await elsewhere.devices(self._context.name, self._settings.metrics_endpoint)
            observation = observation.model_copy(update={"devices": there})
        return observation

    def _present(self, session: Session, observation: Observation) -> str:
        """The instance of the attached server that made this observation."""
        if session.measurer is not None:
            return _identity(session.measurer.pid)
        assert self._epoch is not None
        self._epoch.see({m.name: m.requests or 0 for m in observation.models if m.ready})
        return self._epoch.instance

    async def load(self, request: LoadRequest, report: Report) -> LoadOutcome:
        """Load it, after installing what its way of serving needs in Triton's environment.

        Cancelled, it ends the attempt and waits until nothing of it is left; a revision that was to be replaced goes
        on. Raises `LoadRejected`, `RuntimeUnavailable`, or another `DriverError` where trying again may help.
        """
        session = self._need()
        environment = None
        for pack in request.plan.settings.get("packs") or ():
            if pack == vllm.PACK:
                environment = await self._vllm_environment(report)
            else:
                await self._pack(str(pack), report)
        if request.plan.serving in vllm.SERVINGS:
            try:
                parameters = await asyncio.to_thread(vllm.load_parameters, request, session.repository, environment)
            except (ModelError, OSError, ValueError) as error:
                raise LoadRejected(f"{request.name}: {error}") from error
            request = request.model_copy(update={"parameters": parameters})
        if self._epoch is not None:
            self._epoch.expect(request.name)
        attempt = Attempt()
        task = self._task(session.load(request, report, attempt))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            attempt.given_up.set()
            if not attempt.begun:
                task.cancel()
            await asyncio.wait([task])  # cancelled once more, it ends by itself
            raise

    async def unload(self, name: str) -> UnloadOutcome:
        session = self._need()
        if self._epoch is not None:
            self._epoch.expect(name)
        return await session.unload(name)

    async def _vllm_environment(self, report: Report) -> Path | None:
        """What models that run in vLLM run in; None where Triton is not the wheel's, and has what it has."""
        if self._environment is None:
            return None
        cache, pip_args = self._context.cache_dir, self._settings.pip_args
        return (await vllm_environment.prepare(self._vllm_place, self._environment, cache, pip_args, report)).folder

    @property
    def _vllm_place(self) -> Path:
        return self._settings.vllm_environment or self._context.cache_dir / FOLDER

    async def _pack(self, pack: str, report: Report) -> None:
        """Have a pack in the environment; several loads wait for one installation, which goes on when they give up."""
        environment = self._environment
        if environment is None or await asyncio.to_thread(install.has_pack, environment, pack):
            return  # another server than the wheel's has an environment of its own
        listeners = [report, self._context.report]

        def tell(progress: Progress) -> None:
            for listener in listeners:
                listener(progress)

        task = self._installs.get(pack)
        if task is None or task.done():
            work = install.install_pack(environment, pack, self._settings.pip_args, tell)
            task = self._installs[pack] = self._task(work)
        else:
            report(Progress(stage=f"installing {pack} for Triton"))
        await asyncio.shield(task)

    # ------------------------------------------------------------------ ending

    async def stop(self) -> None:
        """End our server with all its models; somebody else's is left alone."""
        if self._settings.endpoint is None:
            # A load that never ends is not waited for.
            stuck = self._session is not None and bool(self._session.unfinished.names)
            grace_s = server.STUCK_EXIT_S if stuck else server.EXIT_TIMEOUT_S + 15
            await self._context.processes.stop(self._context.name, grace_s=grace_s)
            await asyncio.to_thread(server.sweep_shm, self._repository)
        await self._let_go()

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks))
        await self._let_go()

    def logs(self, model: str | None, lines: int) -> list[str]:
        """What our server wrote; of another one's log nothing is known."""
        if self._settings.endpoint is not None:
            return []
        processes, name = self._context.processes, self._context.name
        if model is None:
            return processes.tail(name, lines)
        return reasons.about(model, processes.tail(name, 20_000))[-lines:] if lines > 0 else []

    # ------------------------------------------------------------------ small things

    def _need(self) -> Session:
        if self._session is None:
            raise RuntimeUnavailable("Triton was not started")
        return self._session

    async def _let_go(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.client.close()

    def _task(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)

        def done(_: asyncio.Task[T]) -> None:
            self._tasks.discard(task)
            if not task.cancelled():
                task.exception()  # whoever asked may have left

        task.add_done_callback(done)
        return task


def _identity(pid: int) -> str:
    key = key_of(pid)
    return f"{pid}-{key[1]}" if key else ""


def _grpc(facts: dict[str, object]) -> str:
    ports = facts["ports"]
    assert isinstance(ports, dict)
    return f"{HOST}:{ports['grpc']}"
