"""The process that looks at drops: `python -m modelium.engine.inspect_worker`.

What was dropped may be made to exhaust or to break whatever reads it, so that it is read here, under limits, and a
death costs one drop. Requests come as lines of JSON on standard input and are answered so on standard output, one at a
time: the service never unpickles, nor otherwise trusts, what comes back. The end of standard input ends the process.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import hashlib
import importlib
import itertools
import json
import os
import resource
import select
import signal
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from modelium.api.types import Inspection, Severity
from modelium.builtin.files import listed_once
from modelium.errors import ConfigError, ModelError, ModeliumError, PluginError

NICENESS = 5
EDGE_BYTES = 64 << 10
"""How much of each file's beginning and end goes into the content key; see `Inspection.content_key`."""
MAX_KEY_FILES = 50_000

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38  # linux/prctl.h
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000  # linux/sched.h

ERRORS: dict[str, type[ModeliumError]] = {
    cls.__name__: cls for cls in (ModelError, PluginError, ConfigError, ModeliumError)
}
"""Errors that cross to the service as what they are; others become the nearest of these."""

Answer = dict[str, Any]


# --------------------------------------------------------------------------- limits


def limit_self(memory_bytes: int, cpu_s: int) -> None:
    """No more memory and processor time than given, no core dumps, no new rights, no network where the kernel lets us.

    `cpu_s` of 0 is no limit.
    """
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_AS, memory_bytes)
    if cpu_s:
        _lower(resource.RLIMIT_CPU, cpu_s)
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        _leave_network(libc)


def _lower(which: int, value: int) -> None:
    _, hard = resource.getrlimit(which)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))


def _leave_network(libc: ctypes.CDLL) -> None:
    """A network namespace of our own has no way out. Without the right to make one, by way of a user namespace."""
    if libc.unshare(_CLONE_NEWNET) == 0:
        return
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")


# --------------------------------------------------------------------------- what is asked of it


def _check_name(path: Path) -> None:
    try:
        str(path).encode()
    except UnicodeEncodeError as exc:
        shown = os.fsencode(path.name).decode("utf-8", "backslashreplace")
        raise ModelError(f"{shown} has a name that is not UTF-8: rename it and drop it again", code="bad_name") from exc


def inspect(host: Any, path: Path) -> Inspection:
    """Scan, then analyse unless something refuses the drop already. Raises `ModelError`, `PluginError`."""
    with listed_once():
        findings = host.scan(path)
        severities = {finding.severity for finding in findings}
        key, total = content_key(path)
        analysis = None
        if Severity.REFUSE not in severities:
            try:
                analysis = host.analyze(path)
            except ModelError:
                if Severity.CONVERT not in severities:  # what is converted first is analysed again
                    raise
    return Inspection(content_key=key, total_bytes=total, findings=findings, analysis=analysis)


def content_key(path: Path) -> tuple[str, int]:
    """A hash over names, sizes and both edges of each file, and the sum of sizes. A single file's name is left out."""
    digest = hashlib.sha256()
    total = 0
    for name, file in itertools.islice(_files(path), MAX_KEY_FILES):
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as stream:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                continue
            digest.update(f"{len(name)}:{found.st_size}:".encode() + name)
            digest.update(stream.read(EDGE_BYTES))
            if found.st_size > EDGE_BYTES:
                stream.seek(max(EDGE_BYTES, found.st_size - EDGE_BYTES))
                digest.update(stream.read(EDGE_BYTES))
        total += found.st_size
    return digest.hexdigest(), total


def _files(path: Path) -> Iterator[tuple[bytes, str]]:
    """Ordinary files in a fixed order, and links to them, without following links to folders."""
    if not path.is_dir():
        if path.is_file():
            yield b"", str(path)
        return
    for root, folders, names in os.walk(path):
        folders.sort()
        for name in sorted(names):
            file = os.path.join(root, name)
            if os.path.isfile(file):
                yield os.fsencode(os.path.relpath(file, path)), file


def convert(host: Any, path: Path, target: Path, codes: Sequence[str]) -> str:
    """Let the first converter that takes the drop write it anew. Raises `ModelError` when none does."""
    for converter in host.converters():
        if converter.accepts(path, codes):
            return str(converter.convert(path, target))
    raise ModelError(
        f"{path.name} would have to be converted ({', '.join(codes)}), and no converter takes it as it is",
        code="not_convertible",
    )


# --------------------------------------------------------------------------- answering


class Worker:
    def __init__(self, host: Any):
        self.host = host
        self.told: dict[Any, int] = {}

    def answer(self, request: dict[str, Any]) -> Answer:
        """One request's answer: `result`, or `error`; with what plugins did wrong since the last one."""
        path = Path(request["path"])
        operations: dict[str, Callable[[], Any]] = {
            "completeness": lambda: self._completeness(path),
            "inspect": lambda: inspect(self.host, path).model_dump(mode="json"),
            "convert": lambda: convert(self.host, path, Path(request["target"]), request["codes"]),
        }
        try:
            _check_name(path)
            answer: Answer = {"result": operations[request["operation"]]()}
        except ModeliumError as exc:
            answer = {"error": _as_json(exc)}
        except (MemoryError, RecursionError) as exc:
            error = (
                f"{path.name} needs more than the inspector may use ({type(exc).__name__}): it is too large, or damaged"
            )
            answer = {"error": _as_json(ModelError(error, code="inspection_failed"))}
        except OSError as exc:
            error = f"{path.name} can't be read: {exc.strerror or exc}"
            answer = {"error": _as_json(ModelError(error, code="unreadable"))}
        except Exception as exc:  # a converter's mistake, or ours: it costs this drop, not the process
            error = f"looking at {path.name} failed: {type(exc).__name__}: {exc}"
            answer = {"error": _as_json(ModelError(error, code="inspection_failed"))}
        answer["failures"] = self.new_failures()
        return answer

    def _completeness(self, path: Path) -> Any:
        found = self.host.completeness(path)
        return None if found is None else found.model_dump(mode="json")

    def new_failures(self) -> list[dict[str, Any]]:
        """What plugins did wrong since last asked."""
        fresh = []
        for failure in self.host.failures():
            key = (failure.plugin, failure.where, failure.error)
            if failure.count > self.told.get(key, 0):
                fresh.append({**dataclasses.asdict(failure), "count": failure.count - self.told.get(key, 0)})
                self.told[key] = failure.count
        return fresh


def _as_json(error: ModeliumError) -> dict[str, Any]:
    kind = next(cls.__name__ for cls in type(error).__mro__ if cls.__name__ in ERRORS)
    return {"type": kind, "code": error.code, "message": error.message, "fields": error.fields}


def _send(out: IO[bytes], answer: Answer) -> None:
    out.write(json.dumps(answer, default=str).encode() + b"\n")
    out.flush()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory-bytes", type=int, required=True)
    parser.add_argument("--cpu-s", type=int, default=0)
    parser.add_argument("--disable", action="append", default=[])
    parser.add_argument("--preload", action="append", default=[], help="modules to import while nothing is asked")
    options = parser.parse_args(argv)
    limit_self(options.memory_bytes, options.cpu_s)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not be taken for an answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the service, which ends us

    from modelium.host import PluginHost

    worker = Worker(PluginHost.load(options.disable))
    _send(out, {"result": "ready", "failures": worker.new_failures()})
    for module in options.preload:
        if select.select([sys.stdin], [], [], 0)[0]:
            break
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    for line in sys.stdin.buffer:
        _send(out, worker.answer(json.loads(line)))


if __name__ == "__main__":
    main()
