"""Turns what Ray Serve says of a failed deployment into errors that a person can use."""

from __future__ import annotations

import re
from collections.abc import Sequence

from modelium.errors import DriverError, LoadRejected

_ERROR = "Error:\n"
"""What Ray writes before the error of a replica that did not start."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_TRACEBACK = "Traceback (most recent call last):\n"
_FRAME = re.compile(r'^  File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')
_INSIDE = ("/ray/", "/modelium_plugin_rayserve/", "<frozen ", "/concurrent/futures/", "/importlib/")
"""Parts of paths of frames that are not the model's or its libraries'."""
_DIED = re.compile(r"ActorDiedError|ActorUnavailableError|WorkerCrashedError|actor died|NodeDiedError")
_MEMORY = re.compile(
    r"OutOfMemory|out of memory|MemoryError|Cannot allocate memory|can't allocate memory|bad_alloc"
    r"|Failed to allocate memory|low on memory",
    re.IGNORECASE,
)
_MISSING = re.compile(r"^ModuleNotFoundError: No module named '([\w.]+)'")
FRAMES = 6
"""How many lines of a traceback are kept; those nearest to the error."""
OUTPUT = 8
"""How many of a dead process's last lines."""


def failure(name: str, said: str, log: Sequence[str] = (), *, own: bool = True) -> DriverError:
    """The error for a deployment that failed saying `said`; `log` is what the model wrote meanwhile, and `own` whether
    its libraries are those that Modelium installs."""
    text = _COLOUR.sub("", said).strip()
    _, _, error = text.partition(_ERROR)
    if _DIED.search(error or text) and _TRACEBACK not in error:
        output = [line for line in log if line.strip()][-OUTPUT:]
        code = "out_of_memory" if _MEMORY.search("\n".join([text, *output])) else "process_died"
        why = "for lack of memory" if code == "out_of_memory" else "perhaps for lack of memory"
        return DriverError("\n".join([f"{name}: its process ended while it was loading, {why}", *output]), code=code)
    reason, frames = _read(error or text)
    message = "\n".join([f"{name}: {reason}", *frames])
    if _MEMORY.search(reason):
        return DriverError(message, code="out_of_memory", reason=reason)
    if missing := _MISSING.match(reason):
        where = "its code imports it, and Modelium's environment for Ray does not have it"
        if not own:
            where = "install it for the Python that the cluster's nodes run"
        return LoadRejected(
            f"{name} needs the Python module {missing[1]}: {where}", code="module_missing", module=missing[1]
        )
    return LoadRejected(message, reason=reason)


def _read(text: str) -> tuple[str, list[str]]:
    """The reason in one line, and the frames of the innermost traceback, the one nearest to the error last."""
    last = text.rpartition(_TRACEBACK)[2]
    lines = last.splitlines()
    frames = []
    for line in lines:
        if (match := _FRAME.match(line)) and not any(part in match["file"] for part in _INSIDE):
            frames.append(f"  at {match['file']}, line {match['line']}, in {match['function']}")
    words = [line for line in lines if line and not line.startswith(" ")]
    return " ".join(" ".join(words).split()) or "Ray gave no reason", frames[-FRAMES:]


def tells_why(said: str) -> bool:
    """Whether a start has failed, and Ray says why."""
    return _ERROR in said


def in_short(said: str) -> str:
    """One line of what Ray says of an application."""
    text = _COLOUR.sub("", said).strip()
    _, _, error = text.partition(_ERROR)
    return _read(error)[0] if error else text.partition("\n")[0]
