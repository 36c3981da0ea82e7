"""Long-lived processes of runtimes: started apart from Modelium, found again after any crash, and ended to the last.

Two things identify a process. A JSON record, written before it is started and completed right after, holds its pid,
the kernel's start time of that pid and the boot it belongs to, so that a recycled number is never taken for it. A mark
in its environment, which every descendant inherits, finds it when the record was lost or never completed, and finds
what it left behind when it died. Linux only: it reads `/proc` (proc(5)).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from modelium.api.driver import ProcessRecord
from modelium.errors import ConfigError, DriverError

ROOT_MARK = "MODELIUM_ROOT_ID"
NAME_MARK = "MODELIUM_PROCESS_NAME"

P = ParamSpec("P")
T = TypeVar("T")

_STARTED = "--- started: "
"""How the line begins that each start writes into the log."""

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_KILLED_WITHIN_S = 30.0
"""How long after SIGKILL a process may linger (in the kernel, on a dead mount) before we say so."""
_ORPHAN_GRACE_S = 2.0
"""What is left of a process that has died gets this long: it may not even listen to SIGTERM (Triton's stubs don't)."""


@dataclass(frozen=True, slots=True)
class Living:
    """One process as the kernel shows it; zombies are not among the living."""

    pid: int
    parent: int
    session: int
    started: float
    """Seconds between the boot and its start."""


def look(pid: int) -> Living | None:
    """The living process with this number; None when there is none, or only a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # Field 2, the command's name, may hold spaces and parentheses: count from the last one on. proc_pid_stat(5).
    state, *rest = stat[stat.rindex(")") + 2 :].split()
    if state in "ZX":
        return None
    return Living(pid=pid, parent=int(rest[0]), session=int(rest[2]), started=int(rest[18]) / _TICKS_PER_S)


def everybody() -> Iterator[Living]:
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and (process := look(int(entry.name))) is not None:
            yield process


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class ProcessSupervisor:
    """`modelium.api.driver.Processes` for one root folder.

    `state_dir` holds one record and `log_dir` one log for each name. Two supervisors of the same root (before and
    after a restart of Modelium) see the same processes; supervisors of different roots never see each other's.
    """

    def __init__(
        self, root: Path, *, state_dir: Path, log_dir: Path, max_log_bytes: int = 16 * 2**20, old_logs: int = 2
    ):
        self.root_id = str(root.resolve())
        self.state_dir = state_dir.resolve()
        self.log_dir = log_dir.resolve()
        self.max_log_bytes = max_log_bytes
        self.old_logs = old_logs
        self._children: dict[int, tuple[str, subprocess.Popen[bytes]]] = {}
        self._codes: dict[str, tuple[int, int]] = {}
        """The pid and return code of the last child of a name that has ended."""
        self._turns: dict[str, asyncio.Lock] = {}

    # ------------------------------------------------------------------ starting

    async def spawn(
        self,
        name: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str | None] | None = None,
        cwd: Path | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> ProcessRecord:
        """Start `argv` under `name`, after ending what still runs under it where there is a record of it.

        Without a record nothing is searched for, so that a start is quick: what lost its record lives on beside it.

        Raises `DriverError` when it can't be started and `ConfigError` when its record or log can't be written; then
        nothing runs.
        """
        _check_name(name)
        async with self._turn(name):
            if self._record_of(name).exists():  # it is there before the process is, and until all of it has gone
                await self._end(name, grace_s=30)
            return await _to_the_end(self._spawn, name, tuple(argv), dict(env or {}), cwd, dict(facts or {}))

    def _spawn(
        self, name: str, argv: tuple[str, ...], env: dict[str, str | None], cwd: Path | None, facts: dict[str, Any]
    ) -> ProcessRecord:
        wanted = {**os.environ, **env, ROOT_MARK: self.root_id, NAME_MARK: name}
        environment = {variable: value for variable, value in wanted.items() if value is not None}
        record = ProcessRecord(name=name, pid=0, created_at=0.0, argv=argv, log=self.log_of(name), facts=facts)
        try:
            self.state_dir.mkdir(parents=True, exist_ok=True)
            self.log_dir.mkdir(parents=True, exist_ok=True)
            output = os.open(record.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            os.write(output, f"{_STARTED}{name} {datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}\n".encode())
            self._write(record)  # should we die right after the start, it tells what was about to run
        except OSError as error:
            raise ConfigError(
                f"could not write the record and the log of {name}: {error}. It was not started.", code="storage"
            ) from error
        try:
            child = subprocess.Popen(
                argv,
                env=environment,
                cwd=cwd or self.state_dir,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        except OSError as error:
            self._record_of(name).unlink(missing_ok=True)
            raise DriverError(f"could not start {argv[0]}: {error}", process=name) from error
        finally:
            os.close(output)
        self._children[child.pid] = name, child
        process = look(child.pid)
        # It may have ended already: then a start time that no process has.
        record = replace(record, pid=child.pid, created_at=process.started if process else -1.0)
        try:
            self._write(record)
        except OSError as error:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            raise ConfigError(
                f"could not write {self._record_of(name)}: {error}. {name} was not started.", code="storage"
            ) from error
        return record

    def _write(self, record: ProcessRecord) -> None:
        """Not synced to the disk: after a crash of the machine there is no process to tell of."""
        path = self._record_of(record.name)
        fresh = path.with_suffix(".new")
        value = asdict(record) | {"log": str(record.log), "boot_id": boot_id()}
        with open(fresh, "w", encoding="utf-8", opener=lambda p, f: os.open(p, f, 0o600)) as file:
            json.dump(value, file, indent=1)
        os.replace(fresh, path)

    # ------------------------------------------------------------------ finding

    def find(self, name: str) -> ProcessRecord | None:
        """The living process last started under `name`, by its record or else by its mark; None when it has died."""
        _check_name(name)
        self._reap()
        record = self._recorded(name)
        if record is not None and record.pid:
            return record if _is(look(record.pid), record) else None
        leaders = [p for p in self._marked(name) if p.pid == p.session]
        if not leaders:
            return None
        first = min(leaders, key=lambda p: p.started)  # what it started itself came later
        unwritten = record or ProcessRecord(name=name, pid=0, created_at=0.0, argv=(), log=self.log_of(name))
        return replace(unwritten, pid=first.pid, created_at=first.started, argv=_argv(first.pid))

    def names(self) -> list[str]:
        """The names under which something of this root runs, orphans of a dead process included."""
        return sorted({name for _, name in self._all_marked()})

    def pids(self) -> set[int]:
        """All processes of this root, what they started included."""
        return {process.pid for process, _ in self._all_marked()}

    def _recorded(self, name: str) -> ProcessRecord | None:
        """What was written down, if it is of use; `pid` is 0 while its start had not been confirmed."""
        try:
            value = json.loads(self._record_of(name).read_text(encoding="utf-8"))
            same_boot = value["boot_id"] == boot_id()
            return ProcessRecord(
                name=value["name"],
                pid=value["pid"],
                created_at=value["created_at"] if same_boot else -1.0,
                argv=tuple(value["argv"]),
                log=Path(value["log"]),
                facts=value["facts"],
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _all_marked(self) -> Iterator[tuple[Living, str]]:
        root = f"{ROOT_MARK}={self.root_id}".encode()
        prefix = f"{NAME_MARK}=".encode()
        # Their marks can't be read in the moment in which a program takes the place of the fork that starts it.
        started = {pid: name for pid, (name, _) in list(self._children.items())}
        for process in everybody():
            if process.pid in started:
                yield process, started[process.pid]
                continue
            try:
                environ = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue  # gone, or somebody else's
            if root in environ and process.pid != os.getpid():
                for entry in environ:
                    if entry.startswith(prefix):
                        yield process, entry[len(prefix) :].decode(errors="replace")

    def _marked(self, name: str) -> list[Living]:
        return [process for process, mark in self._all_marked() if mark == name]

    def _members(self, name: str) -> list[Living]:
        """All that lives under `name`: what bears the mark, the leader's session, and their descendants."""
        self._reap()
        members = {p.pid: p for p in self._marked(name)}
        record = self._recorded(name)
        leader = look(record.pid) if record and record.pid else None
        if leader is not None and _is(leader, record):
            members[leader.pid] = leader
        else:
            leader = None
        spared = {os.getpid(), os.getppid(), 1}
        processes = list(everybody())
        grown = True
        while grown:
            grown = False
            for process in processes:
                kin = process.parent in members or (leader is not None and process.session == leader.pid)
                if kin and process.pid not in members and process.pid not in spared:
                    members[process.pid] = process
                    grown = True
        return list(members.values())

    # ------------------------------------------------------------------ ending

    async def stop(self, name: str, *, grace_s: float = 30) -> None:
        """End the process, its group and all its descendants: SIGTERM, and SIGKILL after `grace_s` seconds.

        Returns when every one is gone. Raises `DriverError` naming those that even SIGKILL did not end.
        """
        _check_name(name)
        async with self._turn(name):
            await self._end(name, grace_s)

    async def _end(self, name: str, grace_s: float) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        asked: set[tuple[int, float]] = set()
        while members := await asyncio.to_thread(self._members, name):
            grace = grace_s if self.find(name) else min(grace_s, _ORPHAN_GRACE_S)
            waited = loop.time() - began
            if waited > grace + _KILLED_WITHIN_S:
                pids = ", ".join(str(p.pid) for p in members)
                raise DriverError(f"{name}: SIGKILL did not end process {pids}; look what it waits for in the kernel")
            for process in members:
                if waited >= grace:
                    _signal(process, signal.SIGKILL)
                elif (process.pid, process.started) not in asked:
                    _signal(process, signal.SIGTERM)
                    asked.add((process.pid, process.started))
            await asyncio.sleep(0.05 if waited < 2 else 0.25)
        self._record_of(name).unlink(missing_ok=True)

    def _reap(self) -> None:
        """Collect those of our own children that have ended, so that the kernel may forget them."""
        for pid, (name, child) in list(self._children.items()):
            if (code := child.poll()) is not None:
                self._codes[name] = pid, code
                self._children.pop(pid, None)

    def ended(self, record: ProcessRecord) -> str:
        """How it ended, which only its parent is told: empty for one that was adopted, as for one that lives."""
        self._reap()
        pid, code = self._codes.get(record.name, (0, 0))
        if pid != record.pid:
            return ""
        return f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"

    # ------------------------------------------------------------------ logs

    def log_of(self, name: str) -> Path:
        return self.log_dir / f"{name}.log"

    def tail(self, name: str, lines: int = 200, *, this_run: bool = False) -> list[str]:
        """The last `lines` lines of its log, oldest first; at most the last 4 MiB are read."""
        _check_name(name)
        data = b""
        for path in (self.log_of(name), _old(self.log_of(name), 1)):
            data = _last_bytes(path, lines, 4 * 2**20 - len(data), data)
            if data.count(b"\n") > lines:
                break
        found = data.decode("utf-8", errors="replace").splitlines()[-lines:] if lines > 0 else []
        if this_run:
            begins = next((n for n in range(len(found), 0, -1) if found[n - 1].startswith(_STARTED)), 0)
            found = found[begins:]
        return found

    async def rotate(self) -> None:
        """Keep logs within bounds. The writers go on with the file that they hold, so it is copied and emptied."""
        await _to_the_end(self._rotate)

    def _rotate(self) -> None:
        for log in self.log_dir.glob("*.log"):
            with contextlib.suppress(FileNotFoundError):
                if log.stat().st_size > self.max_log_bytes:
                    self._rotate_one(log)

    def _rotate_one(self, log: Path) -> None:
        for number in range(self.old_logs, 1, -1):
            with contextlib.suppress(FileNotFoundError):
                os.replace(_old(log, number - 1), _old(log, number))
        with open(log, "r+b") as source:
            with (
                contextlib.suppress(OSError),
                open(_old(log, 1), "wb") as target,
            ):  # a full disk: better short than full
                shutil.copyfileobj(source, target)
            source.truncate(0)

    # ------------------------------------------------------------------ small things

    def _record_of(self, name: str) -> Path:
        return self.state_dir / f"{name}.json"

    def _turn(self, name: str) -> asyncio.Lock:
        return self._turns.setdefault(name, asyncio.Lock())


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,219}", name):
        raise DriverError(f"a process can't be called {name!r}: use letters, digits, '.', '_' and '-'")


def _is(process: Living | None, record: ProcessRecord | None) -> bool:
    return process is not None and record is not None and process.started == record.created_at


def _argv(pid: int) -> tuple[str, ...]:
    try:
        return tuple(os.fsdecode(a) for a in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1])
    except OSError:
        return ()


def _signal(process: Living, number: signal.Signals) -> None:
    """Send it a signal, unless the pid is another process's by now."""
    now = look(process.pid)
    if now is not None and now.started == process.started:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


def _old(log: Path, number: int) -> Path:
    return log.with_name(f"{log.name}.{number}")


def _last_bytes(path: Path, lines: int, most: int, after: bytes) -> bytes:
    """`after` with enough of the end of `path` before it to hold `lines` lines, `most` bytes at most."""
    try:
        with open(path, "rb") as file:
            position = file.seek(0, os.SEEK_END)
            floor = max(0, position - most)
            while position > floor and after.count(b"\n") <= lines:
                step = min(64 * 2**10, position - floor)
                position -= step
                file.seek(position)
                after = file.read(step) + after
    except FileNotFoundError:
        pass
    return after


async def _to_the_end(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `work` in a thread; cancelled, still wait until it is over, so that nothing goes on unseen."""
    task = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
