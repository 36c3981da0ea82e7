"""For runtimes that serve each model by an HTTP server process of its own: all of a driver but what is theirs alone.

A `ServerKind` says what to run and what its words mean; `ModelServers` starts, watches, adopts and ends the processes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import aiohttp

from modelium.api.driver import ProcessRecord, RuntimeContext
from modelium.api.measuring import Gpus, Trees, added
from modelium.api.ports import HOST, given_port, listens
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
from modelium.errors import DriverError

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
RETIRE_AFTER_S = 2.0
"""A server that was replaced is told to end this long after the new one answers: by then nobody is sent to it."""
GRACE_S = 30.0
"""How long a server that is told to end may finish what it is doing."""
SECOND = "_2."
LOG_LINES = 400
"""How much of a server's log is looked at for its progress and for what went wrong."""


@dataclass(frozen=True, slots=True)
class ServerCommand:
    """How one model's server is started."""

    argv: Sequence[str]
    env: Mapping[str, str | None] = field(default_factory=dict)
    """Added to Modelium's own; None takes a variable away."""
    exclusive: Collection[str] = ()
    """Devices on which no other such start goes on meanwhile, of whatever runtime, since some measure what is free."""
    note: str = ""
    """What is done otherwise than planned, as `LoadOutcome.note`."""


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
        self._ending: set[str] = set()
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._replaced: dict[str, Server] = {}
        """Those that end while another serves their model."""
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
        """Of those that serve one model, the newest is adopted."""
        names = await asyncio.to_thread(self._context.processes.names)
        known = (*self._servers.values(), *self._loading.values(), *self._replaced.values())
        mine = {server.record.name for server in known}
        left = [name for name in names if self._model_of(name) is not None and name not in mine]
        found = await asyncio.gather(*(self._left_behind(name) for name in left))
        useless = [name for name, server in zip(left, found, strict=True) if server is None]
        for server in sorted((s for s in found if s is not None), key=lambda s: s.record.created_at):
            other = self._servers.get(server.model)
            if other is not None and other.record.created_at > server.record.created_at:
                useless.append(server.record.name)
                continue
            if other is not None:
                useless.append(other.record.name)
            self._servers[server.model] = server
        for name in useless:
            log.warning("%s: what an earlier run left as %s is ended", self._context.name, name)
        await asyncio.gather(*(self._context.processes.stop(name, grace_s=GRACE_S) for name in useless))

    async def _left_behind(self, name: str) -> Server | None:
        """A server of an earlier run that is up, though it may be too busy to say so. None for all else."""
        model, record = self._model_of(name), self._context.processes.find(name)
        port = record.facts.get("port") if record is not None else None
        if model is None or record is None or not isinstance(port, int):
            return None
        server = Server(model, record, port)
        try:
            up = await self._health(server) == 200
        except TimeoutError:
            up = True
        return server if up else None

    def _slots(self, model: str) -> tuple[str, str]:
        """The two names under which a model's process may run: one of them while it replaces the other.

        No runtime's name has a dot, and no model's begins with `_`.
        """
        return f"{self._context.name}.{model}", f"{self._context.name}.{SECOND}{model}"

    def _model_of(self, name: str) -> str | None:
        runtime, _, rest = name.partition(".")
        return rest.removeprefix(SECOND) if runtime == self._context.name and rest else None

    # ------------------------------------------------------------------ observing

    async def observe(self) -> Observation:
        """Those that are starting are there as not ready, since they hold memory."""
        looked_at = [server for name, server in self._servers.items() if name not in self._broken]
        await asyncio.gather(*(self._look(server) for server in looked_at))
        servers = dict(self._servers)  # others may have begun to serve meanwhile
        loading = {name: server for name, server in self._loading.items() if name not in servers}
        memory = await self._measure([*servers.values(), *loading.values(), *self._replaced.values()])
        replaced = {name: memory.get(server.record.name, {}) for name, server in self._replaced.items()}
        models = [
            ObservedModel(
                name=name,
                ready=name not in self._broken and name not in self._ending,
                broken=name in self._broken and name not in self._ending,
                versions=("1",),
                memory=added((memory.get(server.record.name, {}), replaced.get(name, {}))),
                reason="ending" if name in self._ending else self._broken.get(name, ""),
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
        if name in self._ending:
            return
        answers = self._lives(server) and await self._answers(server)
        if self._servers.get(name) is not server or name in self._ending:
            return
        if answers:
            self._misses.pop(name, None)
            return
        if not self._lives(server):
            last = self._context.processes.tail(server.record.name, 20, this_run=True)
            how = self._context.processes.ended(server.record) or "has ended"
            self._broken[name] = f"its process {how}; it said {f'last: {last[-1]}' if last else 'nothing'}"
            return
        self._misses[name] = self._misses.get(name, 0) + 1
        if self._misses[name] >= MISSES:
            self._broken[name] = f"its process does not answer {self._kind.health} any more"

    def _lives(self, server: Server) -> bool:
        record = self._context.processes.find(server.record.name)
        return record is not None and (record.pid, record.created_at) == (server.record.pid, server.record.created_at)

    async def _answers(self, server: Server) -> bool:
        try:
            return await self._health(server) == 200
        except TimeoutError:
            return False

    async def _health(self, server: Server) -> int | None:
        """The status of its health route; None where nothing answers. Raises `TimeoutError` where it takes too long."""
        assert self._http is not None
        try:
            async with self._http.get(server.base + self._kind.health) as answer:
                return answer.status
        except TimeoutError:  # one of OSError's
            raise
        except (aiohttp.ClientError, OSError):
            return None

    async def _measure(self, servers: Sequence[Server]) -> dict[str, dict[str, int]]:
        """Bytes by process name and device."""
        if not servers or self._trees is None:
            return {}
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
            slot = second if old is not None and old.record.name == first else first  # what runs there is ended
            former: DriverError | None = None
            while True:
                try:
                    server, note, began = await self._try(request, slot, former, report)
                    break
                except _NoFurtherTry as error:
                    raise error.reason from None
                except DriverError as error:
                    former = error
            self._servers[name] = server
            self._broken.pop(name, None)
            self._misses.pop(name, None)
            outcome = await self._outcome(server, began, note)
            if old is not None:
                report(Progress(stage="ending the one before", endpoints=outcome.endpoints))
                await self._retire(old)
            return outcome

    async def _try(
        self, request: LoadRequest, slot: str, former: DriverError | None, report: Report
    ) -> tuple[Server, str, float]:
        """Its server, what was done otherwise than planned, and when it began, after what is installed first."""
        with given_port(self._base_port, {s.port for s in self._servers.values()}) as port:
            command = await self._kind.command(request, port, former)
            if command is None:
                assert former is not None
                raise _NoFurtherTry(former)
            began = time.monotonic()
            if former is not None:
                log.warning("%s: %s; tried again: %s", request.name, former.message.splitlines()[0], command.note)
            async with self._alone_on(command.exclusive, report) as settle:
                report(Progress(stage="starting"))
                facts = {"model": request.name, "port": port}
                try:
                    record = await self._context.processes.spawn(slot, command.argv, env=command.env, facts=facts)
                    server = self._loading[request.name] = Server(request.name, record, port)
                    await self._until_up(server, request, report, settle)
                except BaseException:
                    await self._gone(slot, grace_s=1)
                    raise
                finally:
                    self._loading.pop(request.name, None)
            return server, command.note, began

    async def _until_up(self, server: Server, request: LoadRequest, report: Report, settle: Callable[[], None]) -> None:
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
                    if self._kind.settled(lines):
                        settle()
                    # Whoever else listens there may answer too.
                    if await self._answers(server) and await asyncio.to_thread(listens, server.record.pid, server.port):
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
    async def _alone_on(self, devices: Collection[str], report: Report) -> AsyncIterator[Callable[[], None]]:
        """Hold back other starts on these devices, until what it yields is called or all is over."""
        with ExitStack() as held:
            for device in sorted(devices):
                turn = self._context.starting[device]
                if turn.locked():
                    report(Progress(stage=f"waiting for another start on {device}"))
                await turn.acquire()
                held.callback(turn.release)
            yield held.close

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
        """All that runs for a model; it is shown until it is gone."""
        self._ending.add(name)
        try:
            await asyncio.gather(*(self._context.processes.stop(slot, grace_s=GRACE_S) for slot in self._slots(name)))
            self._servers.pop(name, None)
            self._broken.pop(name, None)
            self._misses.pop(name, None)
        finally:
            self._ending.discard(name)

    async def _gone(self, slot: str, grace_s: float) -> None:
        """End what runs there, whatever comes."""
        ending = asyncio.ensure_future(self._context.processes.stop(slot, grace_s=grace_s))
        try:
            await asyncio.shield(ending)
        except asyncio.CancelledError:
            await asyncio.wait([ending])
            raise

    async def _retire(self, server: Server) -> None:
        """End what was replaced, once nobody is sent to it any more."""
        self._replaced[server.model] = server
        try:
            await asyncio.sleep(RETIRE_AFTER_S)
        finally:
            try:
                await self._gone(server.record.name, GRACE_S)
            finally:
                self._replaced.pop(server.model, None)

    async def stop(self) -> None:
        names = await asyncio.to_thread(self._context.processes.names)
        mine = [name for name in names if self._model_of(name) is not None]
        await asyncio.gather(*(self._context.processes.stop(name, grace_s=GRACE_S) for name in mine))
        self._servers.clear()
        self._broken.clear()
        self._misses.clear()

    async def close(self) -> None:
        http, self._http = self._http, None
        if http is not None:
            await http.close()

    def logs(self, model: str | None, lines: int) -> list[str]:
        """A model's own log, also that of a start that failed; without a model the last lines of each."""
        processes = self._context.processes
        if model is not None:
            server = self._servers.get(model) or self._loading.get(model)
            return processes.tail(server.record.name if server else self._slots(model)[0], lines)
        each = max(1, lines // max(1, len(self._servers)))
        found = [
            f"{name}: {line}" for name, s in list(self._servers.items()) for line in processes.tail(s.record.name, each)
        ]
        return found[-lines:] if lines > 0 else []


class _NoFurtherTry(Exception):
    def __init__(self, reason: DriverError):
        self.reason = reason
