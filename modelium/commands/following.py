"""Follows what happens to a model while a command waits for it, with a progress bar where people look."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from modelium.commands.client import Client, wait_quietly
from modelium.commands.listing import stage
from modelium.commands.text import console

Show = Callable[[str, float | None, float | None], None]
"""Told what is being done, and how much of how much is done."""


@contextmanager
def bar(quiet: bool) -> Iterator[Show]:
    """One line on stderr with a bar; nothing where nobody looks."""
    shown = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        TimeElapsedColumn(),
        console=console(stderr=True),
        transient=True,
        disable=quiet or not sys.stderr.isatty(),
    )
    with shown:
        task: TaskID = shown.add_task("", total=None)

        def show(text: str, done: float | None = None, total: float | None = None) -> None:
            shown.update(task, description=text, completed=done or 0, total=total)

        yield show


@asynccontextmanager
async def following(client: Client, show: Show, concerns: Callable[[str], bool]) -> AsyncIterator[Follower]:
    """Show events of the subjects that concern us (and of runtimes, which models wait for) until the block ends.

    The feed is open when the block begins, so nothing that happens in it is missed.
    """
    follower = Follower(show, concerns)
    async with client.events() as events:
        task = asyncio.create_task(follower.read(events))
        try:
            yield follower
        finally:
            await wait_quietly(task)


class Follower:
    def __init__(self, show: Show, concerns: Callable[[str], bool]):
        self._show = show
        self._concerns = concerns
        self.changed = asyncio.Event()
        """Set at each transition that concerns us, and when the feed ends."""
        self.last: dict[str, dict[str, Any]] = {}
        """The last transition of each such subject."""

    async def read(self, events: AsyncIterator[dict[str, Any]]) -> None:
        async for event in events:
            subject, data = event["subject"], event["data"]
            ours = self._concerns(subject)
            if event["kind"] == "progress" and (ours or subject.startswith("runtime:")):
                self._show(f"{subject.removeprefix('runtime:')}: {stage(data)}", data["done"], data["total"])
            elif event["kind"] == "transition" and ours:
                self._show(f"{subject}: {data['after'].lower() or 'gone'}, {data['reason']}", None, None)
                self.last[subject] = data
                self.changed.set()
        self.changed.set()
