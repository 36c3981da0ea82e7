"""A real `modelium serve` in a process of its own, for end-to-end tests and benchmarks."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from modelium.api.names import SUFFIXES

REPO = Path(__file__).resolve().parent.parent
MODELIUM = [sys.executable, "-m", "modelium.cli"]

ROOT_MARK = "MODELIUM_ROOT_ID"
"""The variable in the environment of every process that a service starts for its runtimes: its root."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def processes_of(root: Path) -> dict[int, str]:
    """The living processes that services of this root, or of one below it, started for runtimes: pid and command."""
    found: dict[int, str] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            mark = process.environ().get(ROOT_MARK)
            if mark and (Path(mark) == root or root in Path(mark).parents) and process.status() != "zombie":
                found[process.pid] = " ".join(process.cmdline())
    return found


class Answer(Exception):
    """An HTTP error answer."""

    def __init__(self, status: int, body: bytes):
        super().__init__(f"{status}: {body[:500]!r}")
        self.status = status
        self.body = body

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Served:
    """One service on one root. `config` is written as its modelium.yaml; everything lies below `root`.

    With a `repository` and no `own_root` that repository is managed as it is, and its state goes to the user's state
    folder: give an `XDG_STATE_HOME` in `env`. `prefix` is put before the command that serves.
    """

    def __init__(
        self,
        root: Path,
        config: Mapping[str, Any] | None = None,
        *,
        repository: Path | None = None,
        own_root: bool = True,
        env: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
    ):
        self.root = root
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.address = f"127.0.0.1:{self.port}"
        self.repository = repository
        self.process: subprocess.Popen[bytes] | None = None
        self.log = root.parent / f"{root.name}.log"
        root.mkdir(parents=True, exist_ok=True)
        self.config = root.parent / f"{root.name}.yaml"
        self.configure(config or {})
        self.env = {**os.environ, **(env or {})}
        self.prefix = list(prefix)
        self._where = ["--root", str(root)] if own_root else []
        self._where += ["--config", str(self.config)]
        if repository is not None:
            self._where += ["--repository", str(repository)]

    def configure(self, config: Mapping[str, Any]) -> None:
        """Write its modelium.yaml, for the next start."""
        self.config.write_text(json.dumps(config))  # JSON is YAML

    # ------------------------------------------------------------------ life

    def start(self, *, ready: bool = True, wait: bool = True, within_s: float = 600) -> Served:
        """Start it and wait until it is ready; the first start on a machine sets up its Triton."""
        command = [*self.prefix, *MODELIUM, "serve", *self._where, "--port", str(self.port), "--grpc-port", "0"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=self.env)
        if wait:
            self.until(lambda: self.answers("/readyz" if ready else "/livez"), within_s, "the service to be ready")
        return self

    def answers(self, path: str) -> bool:
        if self.process is not None and self.process.poll() is not None:
            raise AssertionError(f"the service ended with {self.process.returncode}:\n{self.tail()}")
        try:
            self.get(path)
        except (OSError, Answer):
            return False
        return True

    def stop(self) -> int:
        """End it as a person would; its runtimes stay up."""
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(60)
        self.process = None
        return code

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(60)
        self.process = None

    def down(self) -> None:
        """End everything that belongs to this root; a service that does not end by itself is killed, and told of."""
        stuck = None
        if self.process is not None:
            try:
                self.stop()
            except subprocess.TimeoutExpired as exc:
                stuck = exc
                self.kill()
        command = [*MODELIUM, "down", *self._where]
        done = subprocess.run(command, check=False, env=self.env, capture_output=True, text=True, timeout=120)
        for pid in processes_of(self.root):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert done.returncode == 0, f"down: {done.returncode}\n{done.stdout}{done.stderr}"
        assert stuck is None, f"it did not end on SIGINT:\n{self.tail()}"

    # ------------------------------------------------------------------ talking to it

    def grpc_address(self) -> str:
        """Where gRPC answers."""
        return str(self.get("/status")["listening"]["grpc"])

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 300,
    ) -> bytes:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, method=method, headers=dict(headers or {}))
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as exc:
            raise Answer(exc.code, exc.read()) from exc

    def get(self, path: str) -> Any:
        body = self.request("GET", path)
        with contextlib.suppress(ValueError):
            return json.loads(body)
        return body.decode()

    def post(self, path: str, body: Any = None, **headers: str) -> Any:
        return json.loads(self.request("POST", path, {} if body is None else body, headers) or b"null")

    def model(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.get(f"/models/{name}")
        return found

    def state(self, name: str) -> str:
        try:
            return str(self.model(name)["state"])
        except Answer as exc:
            assert exc.status == 404, exc
            return "-"

    def ps(self) -> dict[str, dict[str, Any]]:
        found = self.get("/models")
        return {m["name"]: m for m in (found["models"] if isinstance(found, dict) else found)}

    def until(self, true: Callable[[], Any], within_s: float = 120, what: str = "") -> Any:
        end = time.monotonic() + within_s
        while time.monotonic() < end:
            found = true()
            if found:
                return found
            time.sleep(0.05)
        states: Any = "?"
        with contextlib.suppress(Exception):
            states = {name: (m["state"], m["reason"]) for name, m in self.ps().items()}
        raise AssertionError(f"waited {within_s} s for {what or true}: {states}\n{self.tail()}")

    def until_state(self, name: str, *states: str, within_s: float = 300) -> None:
        def there() -> bool:
            now = self.state(name)
            if now in ("FAILED", "INVALID") and now not in states:
                raise AssertionError(f"{name} is {now}: {self.model(name)['reason']}")
            if now == "-":
                drops = {f"quarantine/{name}{suffix}" for suffix in ("", *SUFFIXES)}
                refused = {drop: m["reason"] for drop, m in self.ps().items() if drop in drops}
                assert not refused, refused
            return now in states

        self.until(there, within_s, f"{name} to be {' or '.join(states)}")

    def tail(self, lines: int = 60) -> str:
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return ""

    # ------------------------------------------------------------------ dropping

    def drop(self, source: Path, name: str | None = None) -> Path:
        """Rename a copy of `source` into the incoming folder: it arrives in one piece."""
        return self.coming(source, name)()

    def coming(self, source: Path, name: str | None = None) -> Callable[[], Path]:
        """Copy `source` beside the incoming folder; what is returned renames it into that."""
        name = name or source.name
        hidden = self.root / f"coming-{name}"
        if source.is_dir():
            shutil.copytree(source, hidden)
        else:
            shutil.copy(source, hidden)
        incoming = self.root / "incoming"
        incoming.mkdir(exist_ok=True)
        return lambda: hidden.rename(incoming / name)

    def cli(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A command as a person would type it."""
        env = {**self.env, "MODELIUM_URL": self.url, "NO_COLOR": "1", "COLUMNS": "160"}
        done = subprocess.run(
            [*MODELIUM, *arguments], check=False, env=env, capture_output=True, text=True, timeout=300
        )
        if check:
            assert done.returncode == 0, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done


@contextlib.contextmanager
def served(root: Path, config: Mapping[str, Any] | None = None, **options: Any) -> Iterator[Served]:
    """A service that is ended, with all that it started, when the context ends."""
    service = Served(root, config, **options)
    try:
        yield service.start()
    finally:
        service.down()
