"""Turns what Triton says of a failed load into errors that a person can use."""

from __future__ import annotations

import re
from collections.abc import Sequence

from modelium_plugin_vllm import reasons as vllm

from modelium.errors import DriverError, LoadRejected

_PREFIX = re.compile(r"^load failed for model '[^']*': ")
_VERSION = re.compile(r"version (\d+) is at UNAVAILABLE state: ")
_STATUS = re.compile(r"^(?:Internal|Invalid argument|Not found|Unavailable|Unknown|Unsupported|Already exists): ")
"""Triton's names of its error codes (core/src/status.cc), put before each message."""
_FRAME = re.compile(r"^\s*(\S.*)\((\d+)\): (\S+)$")
"""A line of pybind11's traceback: file, line, function, innermost first."""
_NO_BACKEND = re.compile(r"unable to find backend library for backend '([^']*)'")
_MEMORY = re.compile(
    r"out of memory|OutOfMemory|MemoryError|Cannot allocate memory|can't allocate memory|bad_alloc"
    r"|No space left on device|memory usage exceeds|failed to allocate",
    re.IGNORECASE,
)
_DIED = re.compile(r"Stub process '[^']*' is not healthy")
_ENGINE = "Engine core initialization failed"
"""What vLLM's frontend says of an engine that did not start, whose process has written why."""
_ENGINE_SAID = re.compile(r"^\((?:EngineCore|\w*Worker)\S* pid=\d+\)")
POLL_FAILED = "failed to poll from model repository"
FRAMES = 12
"""How many lines of a traceback are kept; those nearest to the error."""

_ENTRY = re.compile(r"^[IWEF]\d{4} \d\d:\d\d:\d\d\.\d+ ")
"""How Triton's own log lines begin; what follows without it is a model's output, or belongs to the line before."""


def failure(name: str, said: str, *, backends: Sequence[str] = (), log: Sequence[str] = ()) -> DriverError:
    """The error for a load that Triton refused saying `said`; `log` is what it wrote meanwhile."""
    reason, frames = _read(said)
    if missing := _NO_BACKEND.search(said):
        has = f"it has {', '.join(backends)}" if backends else "which it has is not known"
        return LoadRejected(
            f"{name} needs the backend {missing[1]!r}, which this Triton does not have; {has}. Use a Triton with that "
            "backend, or drop the model alone for Modelium to choose how to serve it",
            code="backend_missing",
            backend=missing[1],
        )
    if POLL_FAILED in said:
        reason = next(filter(None, (_poll_failure(name, line) for line in reversed(log))), "")
        return LoadRejected(
            f"{name}: Triton can't use its folder: "
            + (reason or "it is not in its repository, or its config.pbtxt is wrong; Triton's log says which")
        )
    if _ENGINE in said:
        return _engine_failure(name, said, log)
    if _DIED.search(said):
        output = [line for line in log if not _ENTRY.match(line)][-FRAMES:]
        return DriverError(
            "\n".join([f"{name}: its process ended while it was loading, perhaps for lack of memory", *output]),
            code="process_died",
        )
    message = "\n".join([f"{name}: {reason}", *frames])
    if _MEMORY.search(said):
        return DriverError(message, code="out_of_memory", reason=reason)
    return LoadRejected(message, reason=reason)


def _engine_failure(name: str, said: str, log: Sequence[str]) -> DriverError:
    error = vllm.failure(name, [*filter(_ENGINE_SAID.match, log), said])
    if error.code in (vllm.SHORT_CACHE, vllm.TOO_LONG):  # here nothing would be set otherwise the next time
        return LoadRejected(error.message, code=error.code, **error.fields)
    return error


def _read(said: str) -> tuple[str, list[str]]:
    """The reason in one line, and the last frames of the traceback, the innermost last."""
    text = _PREFIX.sub("", said.strip())
    parts = _VERSION.split(text)
    if len(parts) > 1:  # several versions may have failed: the newest tells enough
        text = parts[-1]
    text = _STATUS.sub("", text.strip().rstrip(";").strip())
    head, _, tail = text.partition("\n\nAt:\n")
    frames = [match for line in tail.splitlines() if (match := _FRAME.match(line))]
    shown = [f"  at {m[1]}, line {m[2]}, in {m[3]}" for m in frames if not m[1].startswith("<frozen ")]
    return " ".join(head.split()) or "Triton gave no reason", shown[:FRAMES][::-1]


def _poll_failure(name: str, line: str) -> str:
    marker = f"Poll failed for model directory '{name}': "
    return line.partition(marker)[2].strip().strip('"') if marker in line else ""


# --------------------------------------------------------------------------- the log


def about(name: str, lines: Sequence[str]) -> list[str]:
    """The lines that name a model, with what belongs to them: the rest of an entry, a traceback.

    Triton writes tracebacks in one line; they are unfolded.
    """
    names = re.compile(rf"(?<![\w.-]){re.escape(name)}(?:_\d+_\d+)?(?![\w.-])")
    kept: list[str] = []
    wanted = False
    for line in lines:
        if _ENTRY.match(line):
            wanted = bool(names.search(line))
        elif names.search(line):
            wanted = True
        if wanted:
            kept += unfold(line)
    return kept


def since_load(name: str, lines: Sequence[str]) -> list[str]:
    """What was written since the last load of a model began."""
    for index in range(len(lines) - 1, -1, -1):
        if f'"loading: {name}:' in lines[index]:
            return list(lines[index + 1 :])
    return list(lines)


def complaints(lines: Sequence[str]) -> list[str]:
    """What sounds like a reason for ending; the usage that tritonserver prints after a wrong argument does not."""
    word = re.compile(r"^(?![\s|+-]).*(error|unrecognized|invalid|failed|unable|cannot|can't)", re.IGNORECASE)
    return [line for line in lines if (line.startswith("E") and _ENTRY.match(line)) or word.search(line)]


def unfold(line: str) -> list[str]:
    r"""Triton quotes messages and writes their line ends as \n."""
    return [part for part in line.replace("\\n", "\n").splitlines() if part.strip(' "')] or [line]
