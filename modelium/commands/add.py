"""`modelium add`: brings in a model and waits until it serves."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import click

from modelium.api.units import human
from modelium.commands.base import Failed, emit, json_option, with_client
from modelium.commands.client import MAX_DEADLINE_S, Client, model_path
from modelium.commands.following import Follower, Show, bar, following
from modelium.commands.staging import Copied, Staged, move

LOOK_S = 1.0
"""How often the service is asked when its feed says nothing."""
GONE_S = 3.0
"""How long a drop may be gone before the model that it became must be there, when nobody told why it went."""
TOLD_S = 0.2
"""The same when its end was told: what it became was told with it."""


@click.command()
@click.argument("path", type=click.Path(path_type=Path, exists=True))
@click.option("--name", metavar="NAME", help="What the model is called (default: as the file or folder is).")
@click.option("--move", "moved", is_flag=True, help="Move the files; without this they stay where they are.")
@click.option("--wait/--no-wait", default=True, help="Wait until the model is READY (default), or only drop it.")
@json_option
@with_client
async def add(client: Client, path: Path, name: str | None, moved: bool, wait: bool, as_json: bool) -> None:
    """Bring in the model at PATH, a file or a folder, and wait until it is READY.

    Files are cloned where the file system can, else copied; --move spares that. Exits with 1 and the reason when
    the model is refused or can't be loaded.
    """
    from modelium.api.names import check_model_name, name_of_drop

    path = Path(os.path.abspath(path))
    if name is None:
        name = path.name if path.is_dir() else name_of_drop(path)
    check_model_name(name)
    entry = name if path.is_dir() else name + path.name[len(str(name_of_drop(path))) :]
    incoming = await _incoming(client)
    if await client.model(name) is not None:
        raise Failed(f"a model named {name} is there already: choose another --name, or `modelium rm {name}` first")
    places = {name, f"incoming/{entry}"}
    with bar(quiet=as_json) as show:
        async with following(client, show, places.__contains__) as follower:
            await _bring(path, incoming, entry, moved, show)
            if wait:
                await _accepted(client, follower, name, f"incoming/{entry}")
                model = await client.post(model_path(name, "load"), deadline_s=MAX_DEADLINE_S)
    if not wait:
        _say({"name": name, "state": "DROPPED", "path": str(incoming / entry)}, as_json, f"dropped {incoming / entry}")
        return
    _say(model, as_json, f"{name} is {model['state']}: {client.url}/v2/models/{name}")


async def _incoming(client: Client) -> Path:
    status = await client.get("/status")
    if status["incoming"] is None:
        raise Failed(
            f"the service manages {status['repository']} as it is and has no incoming folder: give it one "
            "(orchestration.incoming_directory), or put the model into the repository yourself"
        )
    incoming = Path(status["incoming"])
    if not incoming.is_dir():
        raise Failed(
            f"{incoming}, the service's incoming folder, is not on this machine: run `modelium add` over there"
        )
    return incoming


async def _bring(path: Path, incoming: Path, entry: str, moved: bool, show: Show) -> None:
    """In a thread. One that is interrupted stops copying and leaves nothing in the incoming folder."""
    stop = threading.Event()

    def copied(done: int, total: int) -> None:
        if stop.is_set():
            raise Failed("interrupted")
        show(f"copying {human(done)} of {human(total)}", done, total)

    try:
        await asyncio.to_thread(_drop, path, incoming, entry, moved, copied)
    except asyncio.CancelledError:
        stop.set()
        raise


def _drop(path: Path, incoming: Path, entry: str, moved: bool, copied: Copied) -> None:
    if moved and path.is_symlink():
        raise Failed(f"{path} is a link: leave out --move, and what it leads to is added and stays")
    if moved and move(path, incoming, entry):
        return
    staged = Staged(incoming, entry)
    staged.fill(path, copied)
    staged.appear()
    if moved and path.is_dir():
        shutil.rmtree(path)
    elif moved:
        path.unlink()


async def _accepted(client: Client, follower: Follower, name: str, place: str) -> None:
    """Return when the drop has become a model. Raises `Failed` with the reason when it is refused."""
    gone_since: float | None = None
    while True:
        follower.changed.clear()
        model = await client.model(name)
        if model is not None and model["state"] not in ("DISCOVERED", "INVALID"):
            return
        drop = await client.model(place)
        _refuse(model or drop)
        now = asyncio.get_running_loop().time()
        told = follower.last.get(place, {})
        patience = TOLD_S if told and not told["after"] else GONE_S
        if drop is None and model is None:
            gone_since = gone_since or now
            if now - gone_since > patience:
                raise Failed(f"{place}: {told.get('reason', 'it was taken out of the incoming folder')}")
        else:
            gone_since = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(LOOK_S, patience)):
                await follower.changed.wait()


def _refuse(view: dict[str, Any] | None) -> None:
    if view is not None and view["state"] == "INVALID":
        raise Failed(f"{view['name']} is refused: {view['reason']}")


def _say(value: Any, as_json: bool, text: str) -> None:
    if as_json:
        emit(value)
    else:
        click.echo(text)
