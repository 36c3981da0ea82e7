"""What would happen, what happened, and why: plan, explain, logs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click
from rich.console import Group, RenderableType
from rich.text import Text

from modelium.api.units import human
from modelium.commands.base import FAILED, emit, json_option, with_client
from modelium.commands.client import Client, model_path
from modelium.commands.listing import details
from modelium.commands.text import clock, pairs, say, table


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--name", metavar="NAME", help="What the model would be called (default: as the file or folder is).")
@json_option
@with_client
async def plan(client: Client, path: Path, name: str | None, as_json: bool) -> int:
    """Tell what would happen if PATH were dropped: what it is, how it would be served, what would be evicted.

    Nothing is done. Exits with 1 when it would be refused.
    """
    asked = {"path": os.path.abspath(path)} | ({} if name is None else {"name": name})
    preview = await client.post("/plan", asked)
    if as_json:
        emit(preview)
    else:
        say(_preview(preview))
    return FAILED if preview["refused"] else 0


def _preview(preview: dict[str, Any]) -> RenderableType:
    chosen, analysis, layout = preview["plan"] or {}, preview["analysis"] or {}, preview["layout"] or {}
    if preview["refused"]:
        what = "accepted, and can't be loaded" if chosen else "refused"
        outcome = Text(f"{what}: {preview['refused']}", style="red")
    elif preview["would_load"]:
        outcome = Text(f"loaded at once on {preview['device']}", style="green")
    else:
        outcome = Text("kept ready to load: there is no room that nobody needs", style="yellow")
    files = [f"{there} from {here}" for there, here in layout.get("files", {}).items()]
    return pairs(
        [
            ("name", preview["name"]),
            ("outcome", outcome),
            ("what", analysis.get("summary", "")),
            ("served by", f"{chosen['runtime']}/{chosen['serving']} on {chosen['device_kind']}" if chosen else ""),
            ("because", chosen.get("reason", "")),
            ("not taken", "\n".join(chosen.get("alternatives", ()))),
            ("memory", f"{human(chosen['memory_bytes'])} estimated" if chosen else ""),
            ("load takes", f"about {chosen['load_s']:.0f} s" if chosen else ""),
            ("before that", _installs(preview["installs"], chosen)),
            ("a request", f"would evict {', '.join(preview['would_evict'])}" if preview["would_evict"] else ""),
            ("room", preview["room"]),
            ("files", "\n".join([*files, *layout.get("texts", {})])),
            ("findings", "\n".join(f"{f['severity']}: {f['message']}" for f in preview["findings"])),
        ]
    )


def _installs(packs: list[str], chosen: dict[str, Any]) -> str:
    return f"{', '.join(packs)} is installed for {chosen['runtime']}, once, which may take minutes" if packs else ""


@click.command()
@click.argument("name")
@json_option
@with_client
async def explain(client: Client, name: str, as_json: bool) -> None:
    """Tell why a model is where it is: its plan, estimates against measurements, last transitions, what comes next."""
    found = await client.get(model_path(name, "explain"))
    if as_json:
        emit(found)
    else:
        say(_explanation(found))


def _explanation(found: dict[str, Any]) -> RenderableType:
    chosen = found["model"]["plan"] or {}
    parts: list[RenderableType] = [
        details(found["model"]),
        pairs(
            [
                ("not taken", "\n".join(chosen.get("alternatives", ()))),
                ("confidence", f"{chosen['confidence']:.0%}" if chosen else ""),
                ("estimated", human(found["estimate_bytes"]) if found["estimate_bytes"] else ""),
                ("measured", _measured(found["measured"])),
                ("room", found["room"]),
                ("next", found["next"]),
            ]
        ),
    ]
    if found["transitions"]:
        rows = [
            [clock(t["at"]), f"{t['before'] or 'new'} -> {t['after'] or 'gone'}", t["reason"]]
            for t in found["transitions"]
        ]
        parts += ["", table(["WHEN", "TRANSITION", "REASON"], rows)]
    return Group(*parts)


def _measured(measured: dict[str, Any] | None) -> str:
    if measured is None:
        return "never yet"
    memory, loads = human(measured["memory_bytes"]), measured["loads"]
    if measured["memory_spread_bytes"]:
        memory += f" at most, {human(measured['memory_spread_bytes'])} less at least"
    took = f"{measured['load_s']:.1f} s to load"
    if measured["slowest_s"] > measured["load_s"]:
        took += f", {measured['slowest_s']:.1f} s the slowest"
    told = [memory, took, f"{loads} {'load' if loads == 1 else 'loads'}"]
    told += [f"{wake_s:.2g} s to wake from level {level}" for level, wake_s in sorted(measured["wake_s"].items())]
    return "; ".join(told)


@click.command()
@click.argument("name")
@click.option("--lines", "-n", type=click.IntRange(1, 10_000), default=200, show_default=True, help="How many.")
@json_option
@with_client
async def logs(client: Client, name: str, lines: int, as_json: bool) -> None:
    """Show the last lines that a runtime wrote, or that it wrote about a model. NAME is a model's or a runtime's."""
    text = await client.get(model_path(name, "logs"), lines=str(lines))
    if as_json:
        emit({"name": name, "lines": text.splitlines()})
    elif text:
        click.echo(text, nl=False)
    else:
        click.echo(f"nothing is in a log about {name} yet", err=True)
