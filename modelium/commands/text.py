"""Tables and figures for people."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence

import click
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

PIPE_WIDTH = 10_000
"""Where nobody looks, nothing is cut off."""

COLOURS = {
    "READY": "green",
    "UP": "green",
    "LOADING": "cyan",
    "QUEUED": "cyan",
    "STARTING": "cyan",
    "DISCOVERED": "cyan",
    "RECOVERING": "cyan",
    "DRAINING": "yellow",
    "PARKING": "yellow",
    "STANDBY": "blue",
    "UNLOADING": "yellow",
    "STOPPING": "yellow",
    "FAILED": "red",
    "INVALID": "red",
    "CRASHED": "red",
    "DOWN": "red",
}


def console(*, stderr: bool = False) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else PIPE_WIDTH, highlight=False)


def plain(text: str | Text) -> Text:
    """As it is: brackets in names and reasons are no markup."""
    return text if isinstance(text, Text) else Text(text)


def say(shown: RenderableType) -> None:
    """Print to stdout; into a pipe without the blanks that fill up columns."""
    shown = plain(shown) if isinstance(shown, str) else shown
    out = console()
    if out.is_terminal:
        out.print(shown)
        return
    with out.capture() as captured:
        out.print(shown)
    click.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


def table(columns: Sequence[str], rows: Iterable[Sequence[str | Text]], *, right: Sequence[str] = ()) -> Table:
    """Columns without lines; the last one takes what room is left."""
    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        last = column == columns[-1]
        made.add_column(column, justify="right" if column in right else "left", no_wrap=not last, overflow="fold")
    for row in rows:
        made.add_row(*map(plain, row))
    return made


def pairs(rows: Iterable[tuple[str, str | Text]]) -> Table:
    """Names and values, the empty ones left out."""
    made = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows:
        if str(value):
            made.add_row(name, plain(value))
    return made


def state(name: str) -> Text:
    return Text(name, style=COLOURS.get(name, ""))


def duration(seconds: float | None) -> str:
    """`12s`, `3m`, `2h`, `5d`; nothing for None."""
    if seconds is None:
        return ""
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f}{unit}"
    return f"{seconds:.0f}s"


def clock(at: float) -> str:
    """The time of day, with the date when that is not today."""
    when = time.localtime(at)
    today = time.localtime()[:3] == when[:3]
    return time.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M:%S", when)
