"""What a person needs before, and beside, a running service: check, init, plugins, hookspecs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import click
from rich.text import Text

from modelium.commands.base import (
    FAILED,
    Failed,
    Unreachable,
    configured,
    emit,
    json_option,
    root_options,
    service_address,
    url_option,
)
from modelium.commands.text import pairs, say, table

FILE = "modelium.yaml"


@click.command()
@root_options
@url_option
@click.option("--schema", is_flag=True, help="Print the JSON Schema of modelium.yaml instead.")
@json_option
def check(
    file: Path | None, root: Path | None, repository: Path | None, url: str | None, schema: bool, as_json: bool
) -> int:
    """Check that all is well: of the running service, or of this machine when none runs.

    Exits with 1 when something is not.
    """
    from modelium.commands import machine

    if schema:
        from modelium.configdoc import schema_text

        click.echo(schema_text(machine.sections()), nl=False)
        return 0
    config = configured(file, root=root, repository=repository)
    running: Any = None
    if root is None and repository is None:
        running = asyncio.run(asked("/check", url or (config.server.url if file else None)))
    rows: list[dict[str, Any]] = running["checks"] if running else machine.checks(config)
    ok = all(row["ok"] for row in rows)
    if as_json:
        emit({"ok": ok, "service": running is not None, "checks": rows})
        return 0 if ok else FAILED
    say("the service:" if running else "no service runs; this machine, for one that would:")
    marks = {True: Text("ok", style="green"), False: Text("!!", style="red")}
    say(table(["", "WHAT", "FOUND"], [[marks[r["ok"]], r["name"], _found(r)] for r in rows]))
    return 0 if ok else FAILED


def _found(row: dict[str, Any]) -> str:
    return f"{row['found']}; {row['advice']}" if row["advice"] else str(row["found"])


async def asked(path: str, url: str | None) -> Any:
    """The service's answer, None when no service answers."""
    from modelium.commands.client import Client

    try:
        async with Client(*service_address(url)) as client:
            return await client.get(path)
    except Unreachable:
        return None


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), default=".")
@click.option("--force", is_flag=True, help="Replace a modelium.yaml that is there.")
@json_option
def init(folder: Path, force: bool, as_json: bool) -> None:
    """Write modelium.yaml into FOLDER (here, by default): every key with its default and what it means.

    Beside it goes modelium.schema.json, by which editors complete and check it.
    """
    from modelium.commands.machine import sections
    from modelium.configdoc import SCHEMA_FILE, commented_yaml, schema_text

    target, schema = folder / FILE, folder / SCHEMA_FILE
    if target.exists() and not force:
        raise Failed(f"{target} is there already: edit it, or replace it with --force")
    models = sections()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        target.write_text(commented_yaml(models), encoding="utf-8")
        schema.write_text(schema_text(models), encoding="utf-8")
    except OSError as exc:
        raise Failed(f"can't write into {folder}: {exc.strerror}") from exc
    if as_json:
        emit({"written": [str(target), str(schema)]})
    else:
        click.echo(f"wrote {target} and {schema}; `modelium serve` reads {FILE} where it is run")


@click.command()
@url_option
@click.option("--traceback", "tracebacks", is_flag=True, help="Show where each error came from.")
@json_option
def plugins(url: str | None, tracebacks: bool, as_json: bool) -> None:
    """List plugins with the hooks that they implement, and those that are left out with the reason.

    Asks the running service; when none runs, looks at what is installed here.
    """
    from modelium.commands import machine

    running = asyncio.run(asked("/plugins", url))
    found = running if running is not None else machine.plugins()
    if as_json:
        emit(found)
        return
    rows = [[p["name"], f"{p['distribution']} {p['version']}", _use(p)] for p in found]
    say(table(["PLUGIN", "FROM", "USE"], rows))
    for plugin in found:
        if tracebacks and plugin["traceback"]:
            say(f"\n{plugin['name']} ({plugin['distribution']}):\n{plugin['traceback']}")


def _use(plugin: dict[str, Any]) -> Text:
    if plugin["error"]:
        return Text(f"left out: {plugin['error']}", style="red")
    use = Text(", ".join(hook.removeprefix("modelium_") for hook in plugin["hooks"]))
    for failure in plugin["failures"]:
        use.append(f"\n{failure}", style="yellow")
    return use


@click.command()
@click.argument("name", required=False)
@json_option
def hookspecs(name: str | None, as_json: bool) -> None:
    """Show the hooks that plugins can implement: all that an author needs, or one hook by NAME."""
    from modelium import hookdocs
    from modelium.discovery import suggestion

    described = hookdocs.described()
    if name is not None:
        name = name if name.startswith("modelium_") else f"modelium_{name}"
        if name not in described:
            raise Failed(f"there is no hook {name!r}{suggestion(name, described)}")
        described = {name: described[name]}
    if as_json:
        emit([{"name": hook, **parts} for hook, parts in described.items()])
    elif name is None:
        click.echo(hookdocs.render(), nl=False)
    else:
        parts = described[name]
        say(pairs([("hook", parts["signature"]), ("does", parts["text"]), ("example", parts["example"])]))
