"""The private tritonserver of the wheel and its Python environment, in the user's cache.

Several Modeliums may share the cache: each thing is made under a lock, beside its place, and renamed into it; each pack
of the environment is finished when its marker is there.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from modelium.api import Progress, Report, environments
from modelium.api.environments import Environment, Interpreter, beside, hash_of, locked, make_environment, on_disk
from modelium.api.pip import InstallError, run_pip
from modelium.errors import ConfigError
from modelium_plugin_triton.packs import BASE, CONSTRAINTS, PACKS, SERVER, SITE_FILES

STUB = "triton_python_backend_stub"
FETCH_WITHIN_S = 120.0
"""apt-get has no bound of its own where nothing answers."""
MACHINES = "Linux on x86-64 with glibc 2.35 or newer"
"""Those that the wheel is built for."""
_SERVER_PARTS = ("pytriton/tritonserver/bin/", "pytriton/tritonserver/backends/", "nvidia_pytriton.libs/")
"""Of the wheel. Its libraries find each other by paths relative to themselves, so the layout is kept."""


@dataclass(frozen=True, slots=True)
class Wheel:
    """Everything that the wheel's server takes to be started."""

    executable: Path
    backends: Path
    libraries: Path
    """A folder that holds the interpreter's shared library and nothing else."""
    environment: Environment


async def prepare(cache: Path, interpreter: Interpreter, pip_args: Sequence[str], report: Report) -> Wheel:
    """The wheel's server with its environment: there at once when it was made before.

    Raises `InstallError` when it can't be made.
    """
    cache = cache / "triton"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the cache folder {cache} can't be made: {error.strerror}; make it writable") from error
    with on_disk(cache):
        libraries = await _libraries(cache, interpreter, report)
        server = await _server(cache, interpreter, report)
        await _check_stub(server, libraries, interpreter)
        environment = Environment(cache / f"env-{interpreter.version}-{_environment_key(interpreter)}")
        if not has_pack(environment, BASE):
            await make_environment(
                environment, interpreter, report, what="Triton's Python environment", site_files=SITE_FILES
            )
            await install_pack(environment, BASE, pip_args, report)
    return Wheel(
        executable=server / "pytriton/tritonserver/bin/tritonserver",
        backends=server / "pytriton/tritonserver/backends",
        libraries=libraries,
        environment=environment,
    )


def has_pack(environment: Environment, pack: str) -> bool:
    """Whether Triton's environment has it."""
    return pack in PACKS and environment.has(pack, PACKS[pack], CONSTRAINTS)


async def install_pack(environment: Environment, pack: str, pip_args: Sequence[str], report: Report) -> None:
    """Install a pack, unless it is there. Raises `InstallError`."""
    if pack not in PACKS:
        raise InstallError(f"a plan asks for the pack {pack!r} of Triton's environment; there are {', '.join(PACKS)}")
    await environments.install_pack(
        environment,
        pack,
        PACKS[pack],
        report,
        what=f"installing {pack} for Triton",
        constraints=CONSTRAINTS,
        pip_args=pip_args,
        torch=pack == "torch",
    )


# --------------------------------------------------------------------------- the server


async def _server(cache: Path, interpreter: Interpreter, report: Report) -> Path:
    folder = cache / f"server-{SERVER.partition('==')[2]}-{interpreter.version}"
    if folder.is_dir():
        return folder
    async with locked(folder, report, "downloading Triton") as lock:
        if folder.is_dir():
            return folder
        with beside(folder) as fresh:
            args = ["download", "--no-deps", "--only-binary", ":all:", "--dest", str(fresh), SERVER]
            await run_pip(args, what="downloading Triton", report=report, lock=lock, builds_for=MACHINES)
            wheel = next(fresh.glob("*.whl"))
            report(Progress(stage="unpacking Triton"))
            await asyncio.to_thread(_unpack, wheel, fresh / "unpacked", interpreter.version)
            os.replace(fresh / "unpacked", folder)
    return folder


def _unpack(wheel: Path, target: Path, version: str) -> None:
    """The server's parts of the wheel, with the stub for this Python where its backend looks for it.

    Raises `InstallError` for an archive that is not as expected; entries outside of `target` are never written.
    """
    stub = f"pytriton/tritonserver/python_backend_stubs/{version}/{STUB}"
    try:
        with zipfile.ZipFile(wheel) as archive:
            for entry in archive.infolist():
                place = f"pytriton/tritonserver/backends/python/{STUB}" if entry.filename == stub else entry.filename
                parts = PurePosixPath(place).parts
                if not place.startswith(_SERVER_PARTS) or entry.is_dir() or ".." in parts:
                    continue
                path = target.joinpath(*parts)
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as source, path.open("wb") as file:
                    shutil.copyfileobj(source, file, 2**20)
                path.chmod(0o755 if path.name in ("tritonserver", STUB) else 0o644)
    except zipfile.BadZipFile as error:
        raise InstallError(f"{wheel.name} is no whole wheel ({error}); try again") from error
    for needed in ("bin/tritonserver", "backends/python/libtriton_python.so", f"backends/python/{STUB}"):
        if not (target / "pytriton/tritonserver" / needed).is_file():
            raise InstallError(f"{wheel.name} holds no {needed} for Python {version}")


async def _check_stub(server: Path, libraries: Path, interpreter: Interpreter) -> None:
    """Triton waits without end for a stub that can't start: see that it can. Without arguments its status is 1."""
    stub = server / "pytriton/tritonserver/backends/python" / STUB
    process = await asyncio.create_subprocess_exec(
        stub,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "LD_LIBRARY_PATH": str(libraries)},
    )
    output, _ = await process.communicate()
    if process.returncode != 1:
        said = output.decode(errors="replace").strip().splitlines()
        raise InstallError(
            f"Triton's Python stub does not start with {interpreter.executable} "
            f"(status {process.returncode}): {said[-1] if said else 'it said nothing'}"
        )


# --------------------------------------------------------------------------- the interpreter's library


async def _libraries(cache: Path, interpreter: Interpreter, report: Report) -> Path:
    """A folder with nothing but the interpreter's shared library: in LD_LIBRARY_PATH its own folder's other libraries
    would come before those that Python packages bring."""
    folder = cache / f"lib-{hash_of((str(interpreter.prefix), interpreter.full_version))}"
    link = folder / interpreter.library_name
    if link.exists():
        return folder
    async with locked(folder, report, "looking for Python's shared library"):
        folder.mkdir(exist_ok=True)
        if interpreter.library is not None:
            fresh = folder / f".{interpreter.library_name}"
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(interpreter.library)
            os.replace(fresh, link)
        elif not link.exists():
            await _fetch_library(folder, interpreter, report)
    return folder


async def _fetch_library(folder: Path, interpreter: Interpreter, report: Report) -> None:
    """Debian and Ubuntu keep it in a package of its own: unpack that here, which takes no root."""
    package = f"libpython{interpreter.version}"
    missing = f"{interpreter.executable} has no shared library {interpreter.library_name}, which Triton's stub needs: "
    if interpreter.prefix != Path("/usr") or not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise InstallError(
            f"{missing}on Debian and Ubuntu the package `{package}` brings it for the system's Python (which "
            f"`triton: {{python: /usr/bin/python{interpreter.version}}}` chooses); a Python of your own is to be built "
            "with --enable-shared"
        )
    report(Progress(stage=f"fetching {package}"))
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        said = await _run("apt-get", "download", package, cwd=scratch)
        archives = list(Path(scratch).glob("*.deb"))
        if archives:
            said = await _run("dpkg", "-x", archives[0].name, "unpacked", cwd=scratch)
        found = [p for p in Path(scratch).glob(f"unpacked/usr/lib/**/{interpreter.library_name}") if p.is_file()]
        try:
            if not found:
                raise OSError(said or "the package does not hold it")
            await asyncio.to_thread(ctypes.CDLL, str(found[0].resolve()))
        except OSError as error:
            raise InstallError(
                missing + f"install it with `sudo apt-get install {package}` (fetching it without root failed: {error})"
            ) from error
        os.replace(found[0].resolve(), folder / interpreter.library_name)


async def _run(*command: str, cwd: str) -> str:
    """Run it and return its last line of output."""
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=cwd,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(FETCH_WITHIN_S):
            output, _ = await process.communicate()
    except TimeoutError:
        return f"{command[0]} took more than {FETCH_WITHIN_S:.0f} s"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    lines = output.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


# --------------------------------------------------------------------------- the environment


def _environment_key(interpreter: Interpreter) -> str:
    """Another interpreter or other pins make another environment: what runs in the old one is left alone."""
    return hash_of((interpreter.full_version, str(interpreter.prefix), PACKS, CONSTRAINTS, SITE_FILES))
