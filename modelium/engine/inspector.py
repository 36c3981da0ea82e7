"""Looks at drops through a process of its own, which can be killed: a hostile or broken file costs that drop alone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from modelium.api.types import Completeness, Finding, Inspection, Severity
from modelium.engine.inspect_worker import ERRORS
from modelium.errors import ModelError, ModeliumError, PluginError
from modelium.host import Failure

M = TypeVar("M", bound=BaseModel)

log = logging.getLogger(__name__)

MAX_ANSWER_BYTES = 64 << 20
_DIED, _TIMEOUT = "inspection_died", "inspection_timeout"

START_S = 60.0
"""A first start may have to compile every module."""

PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHONHOME")
"""Of the service's environment: what reads hostile files needs no tokens or passwords."""

PRELOAD = ("onnx", "numpy")
"""Takes half a second to import, which the first drop need not wait for."""


class _Died(Exception):
    """The process ended, or answered what is no answer."""


class _Process:
    """One worker: starts, answers one request at a time, is killed."""

    def __init__(self, process: asyncio.subprocess.Process):
        self._process = process
        self._stderr: deque[str] = deque(maxlen=20)
        self._drain = asyncio.get_running_loop().create_task(self._read_stderr(), name="inspector's stderr")

    @classmethod
    async def start(cls, arguments: Sequence[str]) -> _Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # the working folder may hold anything
            "-m",
            "modelium.engine.inspect_worker",
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=MAX_ANSWER_BYTES,
            env=_environment(),
            cwd="/",
            start_new_session=True,
        )
        return cls(process)

    def send(self, requests: Iterable[Mapping[str, Any]]) -> None:
        """They are answered in their order; a process that has died, or takes none, is found by the first `answer`."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"".join(json.dumps(request).encode() + b"\n" for request in requests))

    async def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        try:
            answer = json.loads(await self._process.stdout.readline() or b"null")
        except ValueError as exc:  # too long, or no JSON
            raise _Died from exc
        if not isinstance(answer, dict):
            raise _Died
        return answer

    async def end(self) -> str:
        """Kill it if it lives, and say how it ended."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        code = await self._process.wait()
        await self._drain
        last = f": {self._stderr[-1][:200]}" if self._stderr else ""
        return f"{signal.Signals(-code).name if code < 0 else f'exit status {code}'}{last}"

    async def ended_by_itself(self) -> str:
        """How it ended, given a moment to do so after it closed its output."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5):
                await self._process.wait()
        return await self.end()

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    async def _read_stderr(self) -> None:
        assert self._process.stderr is not None
        while chunk := await self._process.stderr.read(1 << 16):
            self._stderr.extend(line for line in chunk.decode("utf-8", "replace").splitlines() if line.strip())


def _environment() -> dict[str, str]:
    """The same modules as the service has, and little else."""
    kept = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(os.path.abspath(p) for p in sys.path if p),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUTF8": "1",
        "OMP_NUM_THREADS": "1",  # libraries for numbers reserve memory for every thread
        "OPENBLAS_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


class Inspector:
    """Completeness, inspection and conversion of drops. One drop is looked at at a time; conversions have their own."""

    def __init__(
        self,
        *,
        disabled: Collection[str] = (),
        note: Callable[[Iterable[Failure]], None] | None = None,
        memory_bytes: int = 4 << 30,
        convert_memory_bytes: int = 16 << 30,
        completeness_s: float = 30,
        inspect_s: float = 120,
        convert_s: float = 3600,
    ):
        """`disabled` names plugins that are left out; `note` takes what plugins did wrong (`PluginHost.note`).

        Memory is address space (RLIMIT_AS) of the process; the times are for one call.
        """
        self._disabled = [f"--disable={name}" for name in sorted(disabled)]
        self._note = note
        self._memory_bytes = memory_bytes
        self._convert_memory_bytes = convert_memory_bytes
        self._completeness_s = completeness_s
        self._inspect_s = inspect_s
        self._convert_s = convert_s
        self._process: _Process | None = None
        self._closed = False
        self._turn = asyncio.Lock()
        self._conversions: set[_Process] = set()

    async def start(self) -> None:
        """Start the process before the first drop needs it. Raises `PluginError` when it can't be."""
        async with self._turn:
            if self._process is None:
                self._process = await self._start(self._memory_bytes, preload=True)

    async def completeness(self, path: Path) -> Completeness | None:
        """How much of a drop has arrived; None when no format can tell. Raises `ModelError`, `PluginError`."""
        (answer,) = await self._ask([path], "completeness", self._completeness_s)
        if isinstance(answer, ModeliumError):
            raise answer
        return None if answer is None else self._read(Completeness, path, answer)

    async def inspect(self, path: Path) -> Inspection:
        """Findings and analysis of a complete drop; no analysis when a finding refuses it.

        Raises `ModelError` with the reason when it is no model, a broken one, or one that ended or held up the
        process; `PluginError` when plugins can't agree or the process can't start.
        """
        (found,) = await self.inspect_all([path])
        if isinstance(found, ModeliumError):
            raise found
        return found

    async def inspect_all(self, paths: Sequence[Path]) -> list[Inspection | ModeliumError]:
        """`inspect` for each in turn, without waits in between; what it would raise stands in its place."""
        found: list[Inspection | ModeliumError] = []
        for path, answer in zip(paths, await self._ask(paths, "inspect", self._inspect_s), strict=True):
            try:
                found.append(answer if isinstance(answer, ModeliumError) else self._read(Inspection, path, answer))
            except ModelError as exc:
                found.append(exc)
        return found

    async def convert(self, path: Path, target: Path, findings: Sequence[Finding]) -> str:
        """Make a usable drop at `target` (which must not exist), and return one line that says what was done.

        Raises `ModelError` when nothing can convert it; then there is no `target`.
        """
        refused = [f.message for f in findings if f.severity is Severity.REFUSE]
        if refused:
            raise ModelError(f"{path.name} is not converted: {'; '.join(refused[:3])}", code="not_convertible")
        codes = sorted({f.code for f in findings if f.severity is Severity.CONVERT})
        request = _request(path, "convert", target=str(target.absolute()), codes=codes)
        process = await self._start(self._convert_memory_bytes, cpu_s=int(self._convert_s))
        self._conversions.add(process)
        try:
            process.send([request])
            return str(await self._answer(process, path, self._convert_s))
        except BaseException:
            await process.end()
            await asyncio.to_thread(shutil.rmtree, target, True)
            raise
        finally:
            self._conversions.discard(process)
            await process.end()

    async def close(self) -> None:
        """End all processes; a call that is under way fails with `PluginError`, which blames no drop."""
        self._closed = True
        processes = [*self._conversions, *([self._process] if self._process else [])]
        self._process = None
        for process in processes:
            await process.end()

    # ------------------------------------------------------------------ asking

    async def _ask(self, paths: Sequence[Path], operation: str, within_s: float) -> list[Any]:
        """The answer for each path, which can be a `ModeliumError`; each may take `within_s`."""
        answers: list[Any] = []
        died_at = -1
        async with self._turn:
            while (at := len(answers)) < len(paths):
                answers += await self._attempt(paths[at:], operation, within_s)
                last = answers[-1]
                if isinstance(last, ModelError) and last.code == _DIED and died_at != len(answers) - 1:
                    log.warning("%s; it is looked at once more", last.message)  # something else may have killed it
                    answers.pop()
                    died_at = len(answers)
        return answers

    async def _attempt(self, paths: Sequence[Path], operation: str, within_s: float) -> list[Any]:
        """The answers of one process: all, or those up to the path at which it ended."""
        if self._closed:
            raise _stopping()
        if self._process is None or not self._process.alive:
            self._process = await self._start(self._memory_bytes, preload=True)
        process = self._process
        answers: list[Any] = []
        try:
            process.send(_request(path, operation) for path in paths)
            for path in paths:
                try:
                    answers.append(await self._answer(process, path, within_s))
                except ModeliumError as exc:
                    answers.append(exc)
                    if exc.code in (_DIED, _TIMEOUT):
                        self._process = None
                        break
        except BaseException:  # cancelled: its answers would be taken for the next one's
            self._process = None
            await process.end()
            raise
        return answers

    async def _answer(self, process: _Process, path: Path, within_s: float) -> Any:
        """The result of one request; a process that dies or hangs is ended. Raises what the answer says."""
        try:
            async with asyncio.timeout(within_s):
                answer = await process.answer()
        except TimeoutError:
            await process.end()
            raise ModelError(
                f"looking at {path.name} took more than {within_s:g} s and was given up: it is damaged, or made to "
                "hold up whoever reads it",
                code=_TIMEOUT,
            ) from None
        except _Died:
            how = await process.ended_by_itself()
            if self._closed:
                raise _stopping() from None
            raise ModelError(
                f"looking at {path.name} ended the process that did ({how}): it is damaged, or made to harm whoever "
                "reads it",
                code=_DIED,
            ) from None
        return self._result(answer)

    def _result(self, answer: dict[str, Any]) -> Any:
        if self._note and answer.get("failures"):
            with contextlib.suppress(TypeError):
                self._note([Failure(**failure) for failure in answer["failures"]])
        error = answer.get("error")
        if error is not None:
            cls = ERRORS.get(error["type"], ModelError)
            fields = {k: v for k, v in error.get("fields", {}).items() if k not in ("code", "message", "retry_after_s")}
            raise cls(error["message"], code=error["code"], **fields)
        return answer.get("result")

    async def _start(self, memory_bytes: int, *, cpu_s: int = 0, preload: bool = False) -> _Process:
        modules = [f"--preload={name}" for name in PRELOAD] if preload else []
        limits = [f"--memory-bytes={memory_bytes}", f"--cpu-s={cpu_s}"]
        try:
            process = await _Process.start([*limits, *self._disabled, *modules])
        except OSError as exc:
            raise PluginError(f"the process that looks at drops can't be started: {exc}", code="inspector") from exc
        try:
            async with asyncio.timeout(START_S):
                answer = await process.answer()
            self._result(answer)
        except (_Died, TimeoutError) as exc:
            how = await process.ended_by_itself() if isinstance(exc, _Died) else await process.end()
            raise PluginError(
                f"the process that looks at drops did not start ({how}): see `modelium check`", code="inspector"
            ) from None
        except BaseException:
            await process.end()
            raise
        return process

    @staticmethod
    def _read(model: type[M], path: Path, answer: Any) -> M:
        try:
            return model.model_validate(answer)
        except ValidationError as exc:
            raise ModelError(
                f"looking at {path.name} gave no sensible answer ({exc.error_count()} errors)", code="inspection_failed"
            ) from exc


def _stopping() -> PluginError:
    return PluginError("the service is stopping: the drop is looked at again when it is back", code="inspector")


def _request(path: Path, operation: str, **more: Any) -> dict[str, Any]:
    return {"operation": operation, "path": str(path.absolute()), **more}
