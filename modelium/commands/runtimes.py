"""`modelium runtimes`: the runtimes that are there, and installing what one needs."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import click

from modelium.api.driver import Installable
from modelium.api.types import Progress
from modelium.commands.base import Failed, configured, emit, json_option, root_options, url_option
from modelium.commands.following import bar
from modelium.commands.listing import runtime_table, stage
from modelium.commands.setup import asked
from modelium.commands.text import say, table
from modelium.discovery import suggestion


@click.group(invoke_without_command=True)
@url_option
@json_option
@click.pass_context
def runtimes(ctx: click.Context, url: str | None, as_json: bool) -> None:
    """List runtimes: of the running service, else those that are installed here."""
    if ctx.invoked_subcommand is not None:
        return
    from modelium.commands import machine

    status = asyncio.run(asked("/status", url))
    if status is not None:
        emit(status["runtimes"]) if as_json else say(runtime_table(status["runtimes"]))
        return
    found: list[dict[str, Any]] = [
        {"name": backend.name, "installable": isinstance(backend, Installable)} for backend in machine.backends()
    ]
    if as_json:
        emit(found)
        return
    say("no service runs; what one here would have:")
    rows = [[r["name"], f"modelium runtimes install {r['name']}" if r["installable"] else ""] for r in found]
    say(table(["RUNTIME", "INSTALL WITH"], rows))


@runtimes.command()
@click.argument("name")
@root_options
@json_option
def install(name: str, file: Path | None, root: Path | None, repository: Path | None, as_json: bool) -> None:
    """Install what the runtime NAME needs into the cache folder, unless it is there."""
    from modelium.commands import machine

    config = configured(file, root=root, repository=repository)
    backends = {backend.name: backend for backend in machine.backends(config)}
    backend = backends.get(name)
    if backend is None:
        there = ", ".join(sorted(backends)) or "none"
        raise Failed(f"there is no runtime {name!r}{suggestion(name, backends)}; there is {there}")
    if not isinstance(backend, Installable):
        raise Failed(f"{name} has nothing to install: it finds, or brings, what it needs when it starts")
    settings = machine.section(config, name)
    in_lines = not as_json and not sys.stderr.isatty()  # where no bar is: it may take minutes
    told = ""
    with bar(as_json) as show:

        def report(progress: Progress) -> None:
            nonlocal told
            text = f"{name}: {stage(progress.model_dump())}"
            show(text, progress.done, progress.total)
            if in_lines and progress.stage != told:
                told = progress.stage
                click.echo(text, err=True)

        said = asyncio.run(backend.install(config.paths().cache, settings, report))
    if as_json:
        emit({"name": name, "installed": said})
    else:
        click.echo(said)
