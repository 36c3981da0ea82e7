"""`modelium serve` and `modelium down`."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import click

from modelium.commands.base import configured, emit, json_option, root_options

if TYPE_CHECKING:
    from modelium.paths import Paths

LOOK_S = 1.0


@click.command()
@root_options
@click.option("--host", metavar="ADDRESS", help="Address to bind (default: 127.0.0.1).")
@click.option("--port", type=int, metavar="PORT", help="HTTP (default: 8000).")
@click.option("--grpc-port", type=int, metavar="PORT", help="gRPC (default: 8001).")
@click.option("--stop-runtimes", is_flag=True, help="End the runtimes too when the service ends.")
@click.option("--sample", is_flag=True, help="Bring in a small model, and print a command that asks it.")
@json_option
def serve(
    file: Path | None,
    root: Path | None,
    repository: Path | None,
    host: str | None,
    port: int | None,
    grpc_port: int | None,
    stop_runtimes: bool,
    sample: bool,
    as_json: bool,
) -> None:
    """Run the service until it is interrupted.

    Runtimes and the models in them go on when the service ends, and are taken over by the next; --stop-runtimes and
    `modelium down` end them. With --repository alone, a Triton model repository is managed as it is. --json makes the
    log one JSON object in each line.
    """
    config = configured(file, root=root, repository=repository, host=host, port=port, grpc_port=grpc_port)
    if as_json:
        logging = config.logging.model_copy(update={"format": "json"})
        config = config.model_copy(update={"logging": logging})
    # gRPC's handlers of fork have nothing to do here, and say so each time a process is started
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
    from modelium.app import serve as run

    if sample and config.paths().incoming is None:
        raise click.UsageError("--sample needs an incoming folder, and this repository is managed as it is: use --root")
    run(config, stop_runtimes=stop_runtimes, ready=_bring_sample if sample else None)


def _bring_sample(url: str, paths: Paths) -> None:
    """In a thread, since the service's event loop waits for nobody."""
    threading.Thread(target=_sample, args=(url, paths), daemon=True, name="sample").start()


def _sample(url: str, paths: Paths) -> None:
    """Put the sample into the incoming folder unless it is there, and tell how to ask it once it is READY."""
    from modelium.commands.sample import EXAMPLE, NAME, SPECIES, curl, write_sample

    there = (paths.repository / NAME).exists()
    if paths.incoming is not None and not there:
        hidden = paths.incoming / f".{NAME}.onnx"
        write_sample(hidden)
        hidden.rename(paths.incoming / f"{NAME}.onnx")
    while (state := _state(f"{url}/models/{NAME}")) != "READY":
        if state in ("FAILED", "INVALID"):
            click.echo(f"\nthe sample {NAME} is {state}: `modelium explain {NAME}` tells why\n")
            return
        if state == "COLD" and there:
            _load(f"{url}/models/{NAME}/load")
        time.sleep(LOOK_S)
    click.echo(
        f"\n{NAME} is READY. Ask which iris measures {', '.join(map(str, EXAMPLE))} cm:\n\n  {curl(url)}\n\n"
        f"It answers the probabilities of {', '.join(SPECIES)}.\n"
    )


def _load(url: str) -> None:
    with contextlib.suppress(OSError):
        urllib.request.urlopen(urllib.request.Request(url, method="POST"), timeout=300).close()


def _state(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return str(json.load(answer)["state"])
    except (OSError, ValueError, KeyError, urllib.error.URLError):
        return ""


@click.command()
@root_options
@json_option
def down(file: Path | None, root: Path | None, repository: Path | None, as_json: bool) -> int:
    """End the runtimes of a root folder, and with them all models that they hold.

    Stop the service first: one that runs would start them again.
    """
    config = configured(file, root=root, repository=repository)
    from modelium.app import down as end

    def tell(names: list[str]) -> None:
        click.echo(f"ending {', '.join(names)}; this may take half a minute ...", err=True)

    names = end(config, tell)
    if as_json:
        emit({"ended": names})
    else:
        click.echo(f"ended {', '.join(names)}" if names else "no runtime was running")
    return 0
