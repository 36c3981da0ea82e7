"""For runtimes that serve each model by an HTTP server process of its own: all of a driver but what is theirs alone.

A `ServerKind` says what to run and what its words mean; `ModelServers` starts, watches, adopts and ends the processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import aiohttp

from modelium.api.driver import ProcessRecord, RuntimeContext
from modelium.api.measuring import Gpus, Trees
from modelium.api.ports import HOST, free_port
from modelium.api.types import (
    Endpoint,
    LoadOutcome,
    LoadRequest,
    Observation,
    ObservedModel,
    Progress,
    Report,
    RuntimeInfo,
    UnloadOutcome,
)
from modelium.errors import DriverError, LoadRejected, RuntimeUnavailable

log = logging.getLogger(__name__)

POLL_S = 0.2
"""How often a starting server is looked at, at the least."""
FIRST_POLL_S = 0.01
POLLS_PER_START = 25
"""Looks are closer together in the beginning: what a quick start waits for them stays a small part of it."""
ANSWERS_WITHIN_S = 5.0
"""A living server that does not answer its health route within this missed a look."""
MISSES = 5
"""Looks in a row that a living server may miss before it is taken for broken."""
RETIRE_AFTER_S = 5.0
"""A server that was replaced is told to end this long after the new one answers: by then nobody is sent to it."""
GRACE_S = 30.0
"""How long a server that is told to end may finish what it is doing."""
LOG_LINES = 400
"""How much of a server's log is looked at for its progress and for what went wrong."""


@dataclass(frozen=True, slots=True)
class ServerCommand:
    """How one model's server is started."""

    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    exclusive: Collection[str] = ()
    """Devices on which no other server of this runtime may start meanwhile, since it measures what is free there."""
    note: str = ""
    """What a person should know of it."""


@dataclass(frozen=True, slots=True)
class Server:
    """One model's server while it runs."""

    model: str
    record: ProcessRecord
    port: int

    @property
    def base(self) -> str:
        """Its base URL."""
        return f"http://{HOST}:{self.port}"


class ServerKind(Protocol):
    """What one kind of server is like."""

    protocol: str
    """That it speaks, as `Endpoint` names them: `openai`."""
    health: str
    """The path that answers 200 while it serves, and not before: `/health`."""

    async def prepare(self) -> tuple[str, Mapping[str, Any]]:
        """See that it can be run; returns its version and facts for people. Raises `DriverError` or `ConfigError`."""

    async def command(self, request: LoadRequest, port: int, former: DriverError | None) -> ServerCommand | None:
        """How to serve the model on this port of loopback.

        `former` is why the last try at this load failed; None when it is the first. Returns None for no further try.
        Raises `LoadRejected` for what can't be served.
        """

    def progress(self, lines: Sequence[str]) -> Progress | None:
        """How far a start is, by the log of this run; None where that does not tell."""

    def settled(self, lines: Sequence[str]) -> bool:
        """Whether it has measured and taken its memory: then the next may start on its devices."""

    def failure(self, request: LoadRequest, lines: Sequence[str]) -> DriverError:
        """What the log of a start that failed amounts to."""

    async def check(self, server: Server, request: LoadRequest, http: aiohttp.ClientSession) -> None:
        """Ask it for a first answer. Raises `DriverError` when it has none."""


class ModelServers:
    """`modelium.api.RuntimeDriver` for servers of one kind."""

    def __init__(self, context: RuntimeContext, kind: ServerKind, *, base_port: int = 0, load_timeout_s: float = 900):
        self._context = context
        self._kind = kind
        self._base_port = base_port
        self._load_timeout_s = load_timeout_s
        self._servers: dict[str, Server] = {}
        self._loading: dict[str, Server] = {}
        self._broken: dict[str, str] = {}
        """Why a server that had been loaded is of no use any more, by model."""
        self._misses: dict[str, int] = {}
        self._ports: set[int] = set()
        """Given to servers that don't listen yet."""
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._starting: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._measuring = asyncio.Lock()
        self._retiring: dict[str, asyncio.Task[None]] = {}
        self._started = False
        self._trees: Trees | None = None
        self._http: aiohttp.ClientSession | None = None

    # ------------------------------------------------------------------ starting

    async def start(self) -> RuntimeInfo:
        """Adopt the servers that run and answer; those that don't are ended, as is what dead ones left."""
        version, facts = await self._kind.prepare()
        if self._trees is None:
            self._trees = Trees(await asyncio.to_thread(Gpus.open))
        if self._http is None:
            self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWERS_WITHIN_S))
        await self._adopt()
        adopted, self._started = self._started or bool(self._servers), True
        return RuntimeInfo(
            name=self._context.name,
            version=version,
            # Its servers come and go one by one: it is never started anew as a whole.
            instance=self._context.name,
            adopted=adopted,
            facts=dict(facts),
        )

    async def _adopt(self) -> None:
        names = await asyncio.to_thread(self._context.processes.names)
        mine = {s.record.name for s in (*self._servers.values(), *self._loading.values())} | self._retiring.keys()
        found = [name for name in names if self._model_of(name) is not None and name not in mine]
        await asyncio.gather(*(self._adopt_one(name) for name in found))

    async def _adopt_one(self, name: str) -> None:
        model, record = self._model_of(name), self._context.processes.find(name)
        assert model is not None
        port = record.facts.get("port") if record is not None else None
        if record is not None and isinstance(port, int):
            server = Server(model, record, port)
            other = self._servers.get(model)
            if await self._answers(server) and (other is None or other.record.created_at < record.created_at):
                self._servers[model] = server
                if other is not None:
                    await self._stop(other)
                return
        log.warning("%s: what an earlier run left of %s is ended", self._context.name, model)
        await self._context.processes.stop(name, grace_s=GRACE_S)

    def _slots(self, model: str) -> tuple[str, str]:
        """The two names under which a model's process may run: one of them while it replaces the other."""
        return f"{self._context.name}.{model}", f"{self._context.name}-2.{model}"

    def _model_of(self, name: str) -> str | None:
        for prefix in (f"{self._context.name}.", f"{self._context.name}-2."):
            if name.startswith(prefix):
                return name.removeprefix(prefix)
        return None

    # ------------------------------------------------------------------ observing

    async def observe(self) -> Observation:
        """Those that are starting are there as not ready, since they hold memory."""
        servers = dict(self._servers)
        await asyncio.gather(*(self._look(server) for server in servers.values() if server.model not in self._broken))
        loading = {name: server for name, server in self._loading.items() if name not in servers}
        memory = await self._measure([*servers.values(), *loading.values()])
        models = [
            ObservedModel(
                name=name,
                ready=name not in self._broken,
                broken=name in self._broken,
                versions=("1",),
                memory=memory.get(server.record.name, {}),
                reason=self._broken.get(name, ""),
                endpoints=self._endpoints(server),
            )
            for name, server in servers.items()
        ]
        models += [
            ObservedModel(name=name, ready=False, memory=memory.get(server.record.name, {}), reason="starting")
            for name, server in loading.items()
        ]
        return Observation(instance=self._context.name, models=tuple(models))

    async def _look(self, server: Server) -> None:
        name = server.model
        if not self._lives(server):
            last = self._context.processes.tail(server.record.name, 20, this_run=True)
            self._broken[name] = f"its process has ended: {last[-1] if last else 'it said nothing'}"
            return
        if await self._answers(server):
            self._misses.pop(name, None)
            return
        if self._servers.get(name) is not server:
            return
        self._misses[name] = self._misses.get(name, 0) + 1
        if self._misses[name] >= MISSES or not self._lives(server):
            self._broken[name] = f"its process does not answer {self._kind.health} any more"

    def _lives(self, server: Server) -> bool:
        record = self._context.processes.find(server.record.name)
        return record is not None and (record.pid, record.created_at) == (server.record.pid, server.record.created_at)

    async def _answers(self, server: Server) -> bool:
        assert self._http is not None
        try:
            async with self._http.get(server.base + self._kind.health) as answer:
                return answer.status == 200
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False

    async def _measure(self, servers: Sequence[Server]) -> dict[str, dict[str, int]]:
        """Bytes by process name and device."""
        if not servers or self._trees is None:
            return {}
        async with self._measuring:
            return await asyncio.to_thread(self._trees.look, {s.record.name: s.record.pid for s in servers})

    def _endpoints(self, server: Server) -> tuple[Endpoint, ...]:
        return (Endpoint(protocol=self._kind.protocol, address=server.base),)

    # ------------------------------------------------------------------ loading

    async def load(self, request: LoadRequest, report: Report) -> LoadOutcome:
        """Start its server, once more with other settings where the kind of server knows some that may do.

        One that serves already is left until the new one answers if the request says `replace`, and is as good as
        loaded if it does not. Cancelled, it ends what it started. Raises `LoadRejected` or another `DriverError`.
        """
        name = request.name
        async with self._turns[name]:
            began = time.monotonic()
            old = self._servers.get(name)
            if old is not None and not request.replace and name not in self._broken and self._lives(old):
                return await self._outcome(old, began)
            if old is not None and not request.replace:
                await self._end(name)
                old = None
            first, second = self._slots(name)
            slot = second if old is not None and old.record.name == first else first
            await self._retired(slot)
            former: DriverError | None = None
            while True:
                try:
                    server, note = await self._try(request, slot, former, report)
                    break
                except _NoFurtherTry as error:
                    raise error.reason from None
                except DriverError as error:
                    former = error
            self._servers[name] = server
            self._broken.pop(name, None)
            self._misses.pop(name, None)
            if old is not None:
                self._retire(old)
            return await self._outcome(server, began, note)

    async def _try(
        self, request: LoadRequest, slot: str, former: DriverError | None, report: Report
    ) -> tuple[Server, str]:
        port = free_port(self._base_port, self._ports | {s.port for s in self._servers.values()})
        self._ports.add(port)
        try:
            command = await self._kind.command(request, port, former)
            if command is None:
                assert former is not None
                raise _NoFurtherTry(former)
            if former is not None:
                log.warning("%s: %s; tried again: %s", request.name, former.message.splitlines()[0], command.note)
            async with self._alone_on(command.exclusive) as settled:
                report(Progress(stage="starting"))
                facts = {"model": request.name, "port": port}
                record = await self._context.processes.spawn(slot, command.argv, env=command.env, facts=facts)
                server = Server(request.name, record, port)
                self._loading[request.name] = server
                try:
                    await self._until_up(server, request, report, settled)
                except BaseException:
                    await self._killed(slot)
                    raise
                finally:
                    self._loading.pop(request.name, None)
            return server, command.note
        finally:
            self._ports.discard(port)

    async def _until_up(self, server: Server, request: LoadRequest, report: Report, settled: asyncio.Event) -> None:
        slot, began = server.record.name, time.monotonic()
        told: Progress | None = None
        try:
            async with asyncio.timeout(self._load_timeout_s):
                while True:
                    lines = self._context.processes.tail(slot, LOG_LINES, this_run=True)
                    if not self._lives(server):
                        raise self._kind.failure(request, self._context.processes.tail(slot, LOG_LINES, this_run=True))
                    progress = self._kind.progress(lines)
                    if progress is not None and progress != told:
                        report(progress)
                        told = progress
                    if not settled.is_set() and self._kind.settled(lines):
                        settled.set()
                    if await self._answers(server):
                        break
                    since = time.monotonic() - began
                    await asyncio.sleep(min(POLL_S, max(FIRST_POLL_S, since / POLLS_PER_START)))
                report(Progress(stage="asking for a first answer"))
                assert self._http is not None
                try:
                    await self._kind.check(server, request, self._http)
                except DriverError:
                    await asyncio.sleep(POLL_S)  # what it says of it may come a little later
                    if not self._lives(server):
                        lines = self._context.processes.tail(slot, LOG_LINES, this_run=True)
                        raise self._kind.failure(request, lines) from None
                    raise
        except TimeoutError as error:
            lines = self._context.processes.tail(slot, 5, this_run=True)
            raise DriverError(
                f"{request.name}: its server did not answer within {self._load_timeout_s:.0f} s; it said last:\n"
                + "\n".join(lines),
                code="load_timeout",
            ) from error

    @asynccontextmanager
    async def _alone_on(self, devices: Collection[str]) -> AsyncIterator[asyncio.Event]:
        """Hold back other starts on these devices until the event is set, or all is over."""
        settled = asyncio.Event()
        held = [self._starting[device] for device in sorted(devices)]
        for lock in held:
            await lock.acquire()

        async def release() -> None:
            try:
                await settled.wait()
            finally:
                for lock in held:
                    lock.release()

        task = asyncio.get_running_loop().create_task(release())
        await asyncio.sleep(0)  # from here on it releases, come what may
        try:
            yield settled
        finally:
            settled.set()
            await asyncio.wait([task])

    async def _outcome(self, server: Server, began: float, note: str = "") -> LoadOutcome:
        memory = await self._measure([server])
        return LoadOutcome(
            memory=memory.get(server.record.name, {}),
            load_s=time.monotonic() - began,
            note=note,
            endpoints=self._endpoints(server),
        )

    # ------------------------------------------------------------------ ending

    async def unload(self, name: str) -> UnloadOutcome:
        async with self._turns[name]:
            await self._end(name)
        return UnloadOutcome()

    async def _end(self, name: str) -> None:
        """All that runs for a model."""
        server = self._servers.pop(name, None)
        self._broken.pop(name, None)
        self._misses.pop(name, None)
        for slot in self._slots(name):
            await self._retired(slot)
        if server is not None:
            await self._stop(server)

    async def _stop(self, server: Server) -> None:
        await self._context.processes.stop(server.record.name, grace_s=GRACE_S)

    async def _killed(self, slot: str) -> None:
        """End a start that failed or was given up, whatever comes."""
        ending = asyncio.ensure_future(self._context.processes.stop(slot, grace_s=1))
        try:
            await asyncio.shield(ending)
        except asyncio.CancelledError:
            await asyncio.wait([ending])
            raise

    def _retire(self, server: Server) -> None:
        async def retire() -> None:
            await asyncio.sleep(RETIRE_AFTER_S)
            await self._stop(server)

        slot = server.record.name
        task = asyncio.get_running_loop().create_task(retire(), name=f"retire {slot}")
        self._retiring[slot] = task
        task.add_done_callback(lambda _: self._retiring.pop(slot, None))

    async def _retired(self, slot: str) -> None:
        """Nothing runs under a slot any more that was replaced."""
        task = self._retiring.get(slot)
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
            await self._context.processes.stop(slot, grace_s=GRACE_S)

    async def stop(self) -> None:
        names = await asyncio.to_thread(self._context.processes.names)
        await self._give_up_retiring()
        mine = [name for name in names if self._model_of(name) is not None]
        await asyncio.gather(*(self._context.processes.stop(name, grace_s=GRACE_S) for name in mine))
        self._servers.clear()
        self._broken.clear()
        self._misses.clear()

    async def close(self) -> None:
        await self._give_up_retiring()
        http, self._http = self._http, None
        if http is not None:
            await http.close()

    async def _give_up_retiring(self) -> None:
        for task in list(self._retiring.values()):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def logs(self, model: str | None, lines: int) -> list[str]:
        """A model's own log, also that of a start that failed; without a model the last lines of each."""
        processes = self._context.processes
        if model is not None:
            server = self._servers.get(model) or self._loading.get(model)
            return processes.tail(server.record.name if server else self._slots(model)[0], lines)
        each = max(1, lines // max(1, len(self._servers)))
        found = [f"{name}: {line}" for name, s in self._servers.items() for line in processes.tail(s.record.name, each)]
        return found[-lines:] if lines > 0 else []


class _NoFurtherTry(Exception):
    def __init__(self, reason: DriverError):
        self.reason = reason


class ExternalServer:
    """`modelium.api.RuntimeDriver` for an OpenAI server of somebody else's, by its URL: it has the models that it has.

    What it serves is shown as ready, with where it answers; nothing is loaded or unloaded there.
    """

    def __init__(self, context: RuntimeContext, endpoint: str, *, name: str):
        self._context = context
        self._base = endpoint.rstrip("/").removesuffix("/v1")
        self._name = name
        self._http: aiohttp.ClientSession | None = None

    async def start(self) -> RuntimeInfo:
        if self._http is None:
            self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWERS_WITHIN_S))
        await self._served()
        return RuntimeInfo(
            name=self._context.name,
            version=await self._version(),
            instance=self._base,
            adopted=True,
            external=True,
            facts={"endpoint": self._base},
        )

    async def _served(self) -> list[str]:
        """The names of its models: `GET /v1/models` of OpenAI's API."""
        if self._http is None:
            raise RuntimeUnavailable(f"{self._context.name} was not started")
        try:
            async with self._http.get(f"{self._base}/v1/models") as answer:
                if answer.status != 200:
                    raise RuntimeUnavailable(f"{self._base}/v1/models answers {answer.status}, and 200 was expected")
                return [str(model["id"]) for model in (await answer.json(content_type=None))["data"]]
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise RuntimeUnavailable(
                f"no {self._name} answers at {self._base}: {error or type(error).__name__}"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise RuntimeUnavailable(f"{self._base}/v1/models does not answer as OpenAI's API does") from error

    async def _version(self) -> str:
        """As vLLM tells it; empty for servers that don't."""
        assert self._http is not None
        try:
            async with self._http.get(f"{self._base}/version") as answer:
                return str((await answer.json(content_type=None))["version"]) if answer.status == 200 else ""
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError, TypeError):
            return ""

    async def observe(self) -> Observation:
        endpoint = Endpoint(protocol="openai", address=self._base)
        names = await self._served()
        models = tuple(ObservedModel(name=name, ready=True, versions=("1",), endpoints=(endpoint,)) for name in names)
        return Observation(instance=self._base, models=models)

    async def load(self, request: LoadRequest, report: Report) -> LoadOutcome:
        """Only what it has already is loaded. Raises `LoadRejected` for all else."""
        if request.name not in await self._served():
            raise LoadRejected(f"the {self._name} at {self._base} does not serve {request.name}, and loads nothing")
        return LoadOutcome(memory={}, load_s=0, endpoints=(Endpoint(protocol="openai", address=self._base),))

    async def unload(self, name: str) -> UnloadOutcome:
        if name in await self._served():
            raise DriverError(f"{name} is served at {self._base}, whose models are not ours to unload")
        return UnloadOutcome()

    async def stop(self) -> None:
        await self.close()

    async def close(self) -> None:
        http, self._http = self._http, None
        if http is not None:
            await http.close()

    def logs(self, model: str | None, lines: int) -> list[str]:
        """Of another one's log nothing is known."""
        return []
