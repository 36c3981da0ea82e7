"""Python environments of runtimes' own, in the user's cache: made once, whole or not at all, and shared.

Several Modeliums may share the cache: each thing is made under a lock, beside its place, and renamed into it; each pack
of an environment is finished when its marker is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import glob
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from modelium.api.pip import InstallError, cpu_index_args, run_pip
from modelium.api.types import Progress, Report
from modelium.errors import ConfigError

_PROBE = """
import json, sys, sysconfig
variable = sysconfig.get_config_var
print(json.dumps({
    "version": "%d.%d" % sys.version_info[:2],
    "full_version": "%d.%d.%d" % sys.version_info[:3],
    "prefix": sys.base_prefix,
    "library": variable("INSTSONAME") or "",
    "folders": [f for f in (variable("LIBDIR"), variable("LIBPL")) if f],
    "multiarch": variable("MULTIARCH") or "",
}))
"""


@dataclass(frozen=True, slots=True)
class Interpreter:
    """A Python that is no virtual environment's."""

    executable: Path
    version: str
    """`3.11`."""
    full_version: str
    prefix: Path
    library: Path | None
    """Its shared library, `libpython3.11.so.1.0`, which programs that embed it are linked to; None when it has none."""

    @property
    def library_name(self) -> str:
        return f"libpython{self.version}.so.1.0"


async def find_interpreter(configured: Path | None, versions: Sequence[str], *, what: str, key: str) -> Interpreter:
    """The interpreter for an environment: the configured one, ours, or a fitting one on PATH.

    `versions` are those that will do, as `3.12`; `what` needs it, and `key` is where it is configured, for messages.
    Raises `ConfigError` when none will do.
    """
    listed = " or ".join(versions)
    if configured is not None:
        found = await probe(configured)
        if found is None:
            raise ConfigError(f"{key} is {configured}, and that does not run as a Python interpreter")
        if found.version not in versions:
            raise ConfigError(f"{key} is Python {found.version}; {what} needs {listed}")
        return found
    ours = f"{sys.version_info.major}.{sys.version_info.minor}"
    names = [shutil.which(f"python{version}") for version in versions]
    own = [getattr(sys, "_base_executable", sys.executable)] if ours in versions else []
    for name in [*own, *filter(None, names)]:
        found = await probe(Path(name))
        if found is not None and found.version in versions:
            return found
    section, _, word = key.partition(".")
    raise ConfigError(
        f"{what} needs Python {listed}, and none is on PATH (Modelium runs on {ours}): install one and name it in "
        f"`{section}: {{{word}: /path/to/python{versions[0]}}}`"
    )


async def probe(executable: Path) -> Interpreter | None:
    """What an interpreter says of itself; None when it does not run."""
    try:
        process = await asyncio.create_subprocess_exec(
            executable, "-I", "-c", _PROBE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
        output, _ = await process.communicate()
        facts = json.loads(output)
    except (OSError, ValueError):
        return None
    folders = [*facts["folders"], f"{facts['prefix']}/lib", f"/usr/lib/{facts['multiarch']}"]
    interpreter = Interpreter(
        executable=executable,
        version=facts["version"],
        full_version=facts["full_version"],
        prefix=Path(facts["prefix"]),
        library=None,
    )
    library = next((p for f in folders if (p := Path(f) / interpreter.library_name).is_file()), None)
    return Interpreter(executable, interpreter.version, interpreter.full_version, interpreter.prefix, library)


def has_gpu() -> bool:
    """Whether the NVIDIA driver shows a GPU here; asks the kernel, so it needs no library."""
    return bool(glob.glob("/proc/driver/nvidia/gpus/*")) or bool(glob.glob("/dev/nvidia[0-9]*"))


# --------------------------------------------------------------------------- environments


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment, made of packs: named lists of requirements that are installed together."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def has(self, pack: str, requirements: Sequence[str], constraints: Sequence[str] = ()) -> bool:
        """Whether the pack is installed as it is asked for now."""
        try:
            return self._marker(pack).read_text() == hash_of(list(requirements), list(constraints))
        except OSError:
            return False

    def mark(self, pack: str, requirements: Sequence[str], constraints: Sequence[str] = ()) -> None:
        self._marker(pack).write_text(hash_of(list(requirements), list(constraints)))

    def _marker(self, pack: str) -> Path:
        return self.folder / f".pack-{pack}"


async def make_environment(
    environment: Environment,
    interpreter: Interpreter,
    report: Report,
    *,
    what: str,
    site_files: Mapping[str, str] | None = None,
) -> None:
    """Make an empty one, unless it is there; `site_files` go into its site-packages. Raises `InstallError`."""
    folder = environment.folder
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    async with locked(folder, report, f"making {what}"):
        if folder.is_dir():
            return
        with beside(folder) as fresh:
            # pip works on it from outside: an environment without pip needs no ensurepip, which Debian splits off.
            made = fresh / "made"
            process = await asyncio.create_subprocess_exec(
                interpreter.executable, "-I", "-m", "venv", "--without-pip", made,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )  # fmt: skip
            output, _ = await process.communicate()
            if process.returncode != 0:
                said = output.decode(errors="replace").strip()
                raise InstallError(f"`{interpreter.executable} -m venv` failed: {said}")
            site = made / "lib" / f"python{interpreter.version}" / "site-packages"
            for name, text in (site_files or {}).items():
                (site / name).write_text(text)
            os.replace(made, folder)


async def install_pack(
    environment: Environment,
    pack: str,
    requirements: Sequence[str],
    report: Report,
    *,
    what: str,
    constraints: Sequence[str] = (),
    pip_args: Sequence[str] = (),
    torch: bool = False,
    without_dependencies: Sequence[str] = (),
) -> None:
    """Install a pack, unless it is there; `what` is said of it. Raises `InstallError`.

    `torch`: it brings PyTorch, which is to be its build without CUDA where there is no GPU. `without_dependencies` are
    requirements that are installed last and alone, since what they themselves require is more than they need.
    """
    whole = [*requirements, *without_dependencies]
    if environment.has(pack, whole, constraints):
        return
    async with locked(environment.folder, report, what) as lock:
        if environment.has(pack, whole, constraints):
            return
        extra = list(pip_args)
        if torch and not extra and not has_gpu():
            extra = await cpu_index_args()
        with on_disk(environment.folder), tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "constraints.txt"
            file.write_text("".join(f"{line}\n" for line in constraints))
            for args in ([*requirements], ["--no-deps", *without_dependencies] if without_dependencies else []):
                if args:
                    command = ["install", "--constraint", str(file), *extra, *args]
                    await run_pip(command, what=what, report=report, python=environment.python, lock=lock)
            environment.mark(pack, whole, constraints)


# --------------------------------------------------------------------------- making things in the cache


def hash_of(*what: object) -> str:
    """A short name for what was made of `what`, JSON values."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


@contextlib.asynccontextmanager
async def locked(folder: Path, report: Report, what: str) -> AsyncIterator[int]:
    """Hold the lock of `folder` among all processes of this user; yields its descriptor."""
    lock = os.open(f"{folder}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        waited = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waited:
                    report(Progress(stage=f"{what}: waiting for another Modelium that does it"))
                waited = True
                await asyncio.sleep(0.2)
        yield lock
    finally:
        os.close(lock)


@contextlib.contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder`, removed in the end; what a crash left of it goes first. Under its lock only."""
    fresh = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        yield fresh
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


@contextlib.contextmanager
def on_disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InstallError(
            f"{folder} could not be written: {error.strerror or error}; make room or make it writable"
        ) from error
