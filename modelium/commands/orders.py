"""Orders about one model: load, unload, pin, unpin, rm."""

from __future__ import annotations

from typing import Any

import click

from modelium.commands.base import emit, json_option, with_client
from modelium.commands.client import Client, model_path
from modelium.commands.following import bar, following


@click.command()
@click.argument("name")
@click.option("--deadline", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="Wait no longer.")
@json_option
@with_client
async def load(client: Client, name: str, deadline: float | None, as_json: bool) -> None:
    """Load a model, evicting others where needed, and wait until it is READY."""
    with bar(quiet=as_json) as show:
        async with following(client, show, lambda subject: subject == name):
            model = await client.post(model_path(name, "load"), deadline_s=deadline)
    _say(model, as_json, f"{name} is {model['state']}")


@click.command()
@click.argument("name")
@json_option
@with_client
async def unload(client: Client, name: str, as_json: bool) -> None:
    """Unload a model once nothing of it is in flight; the next request loads it again."""
    with bar(quiet=as_json) as show:
        async with following(client, show, lambda subject: subject == name):
            model = await client.post(model_path(name, "unload"))
    _say(model, as_json, f"{name} is {model['state']}")


@click.command()
@click.argument("name")
@json_option
@with_client
async def pin(client: Client, name: str, as_json: bool) -> None:
    """Keep a model loaded whatever happens; it is loaded if it is not."""
    _say(await client.post(model_path(name, "pin")), as_json, f"{name} is pinned")


@click.command()
@click.argument("name")
@json_option
@with_client
async def unpin(client: Client, name: str, as_json: bool) -> None:
    """Let a model be unloaded again when it is idle or others need the room."""
    _say(await client.post(model_path(name, "unpin")), as_json, f"{name} is no longer pinned")


@click.command()
@click.argument("name")
@json_option
@with_client
async def rm(client: Client, name: str, as_json: bool) -> None:
    """Unload a model and move it to the trash folder; a refused drop goes there too. Nothing is deleted."""
    removed = await client.delete(model_path(name))
    _say(removed, as_json, f"{name} is gone; its files are kept in {removed['moved_to']}")


def _say(value: Any, as_json: bool, text: str) -> None:
    if as_json:
        emit(value)
    else:
        click.echo(text)
