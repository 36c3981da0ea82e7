"""What commands share: options, exit codes, JSON or text, and how the configuration is found."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from modelium.errors import ModeliumError

if TYPE_CHECKING:
    from modelium.config import Config

FAILED = 1
UNREACHABLE = 3

F = TypeVar("F", bound=Callable[..., Any])


class Failed(ModeliumError):
    """The command did not do what it was asked; its message goes to stderr and its exit code is 1."""

    code = "failed"


class Unreachable(ModeliumError):
    """No service answers."""

    code = "unreachable"

    def __init__(self, message: str):
        super().__init__(message, exit_code=UNREACHABLE)


# --------------------------------------------------------------------------- options

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")

url_option = click.option("--url", envvar="MODELIUM_URL", metavar="URL", help="Where the service is.")


def root_options(command: F) -> F:
    """Which configuration, root and repository."""
    folder = click.Path(path_type=Path, file_okay=False)
    file = click.Path(path_type=Path, exists=True, dir_okay=False)
    for option in (
        click.option("--repository", type=folder, help="A Triton model repository, managed as it is."),
        click.option("--root", type=folder, help="The folder that holds everything (default: ./models)."),
        click.option(
            "--config", "file", type=file, help="The configuration (default: ./modelium.yaml, if there is one)."
        ),
    ):
        command = option(command)
    return command


def configured(file: Path | None, *, root: Path | None = None, repository: Path | None = None, **server: Any) -> Config:
    """The configuration with these flags over it. `server` are keys of that section."""
    from modelium.config import load_config

    given = {"orchestration.root": ("--root", root), "orchestration.model_repository": ("--repository", repository)}
    given |= {f"server.{key}": (f"--{key.replace('_', '-')}", value) for key, value in server.items()}
    flags = {key: (flag, value) for key, (flag, value) in given.items() if value is not None}
    return load_config(file, flags=flags)


# --------------------------------------------------------------------------- talking to the service


def with_client(command: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Any]:
    """Run an async command with a `Client` as its first argument; adds `--url`."""

    @url_option
    @functools.wraps(command)
    def run(*args: Any, url: str | None, **kwargs: Any) -> Any:
        from modelium.commands.client import Client

        async def connected() -> Any:
            task = asyncio.current_task()
            assert task is not None
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)  # clean up, as after Ctrl-C
            async with Client(*service_address(url)) as client:
                return await command(client, *args, **kwargs)

        return asyncio.run(connected())

    return run


def service_address(url: str | None) -> tuple[str, Path | None]:
    """The URL that was given, else the configuration's, and the certificate to trust besides the system's."""
    if url:
        return url if "://" in url else f"http://{url}", None
    if not Path("modelium.yaml").exists() and not any(key.startswith("MODELIUM_") for key in os.environ):
        return "http://127.0.0.1:8000", None
    server = configured(None).server
    return server.url, server.tls.certificate


def emit(value: Any) -> None:
    """Print a value as JSON."""
    click.echo(json.dumps(value, indent=2, default=str, ensure_ascii=False))
