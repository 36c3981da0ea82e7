"""`modelium ps` and `modelium show`."""

from __future__ import annotations

import asyncio
from typing import Any

import click
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from modelium.api.units import human
from modelium.commands.base import emit, json_option, with_client
from modelium.commands.client import Client, model_path
from modelium.commands.text import clock, console, duration, pairs, plain, say, state, table
from modelium.core.states import State

HOLDING = frozenset({"LOADING", "READY", "DRAINING", "PARKING", "STANDBY", "UNLOADING"})

WATCH_S = 1.0
FOREIGN_SHOWN = 3
"""Of each device; `--json` tells more."""


@click.command()
@click.argument("names", nargs=-1)
@click.option("--devices", is_flag=True, help="List devices and runtimes instead.")
@click.option(
    "--state",
    "only",
    metavar="STATE",
    type=click.Choice(list(State), case_sensitive=False),
    help="Only models in this state.",
)
@click.option("--watch", "-w", is_flag=True, help="Keep the list on the screen, up to date.")
@json_option
@with_client
async def ps(
    client: Client, names: tuple[str, ...], devices: bool, only: str | None, watch: bool, as_json: bool
) -> None:
    """List models: all, or the NAMES given.

    Memory is what a model holds, or in brackets what loading it would take; ~ marks an estimate, everything else was
    measured.
    """
    if watch and as_json:
        raise click.UsageError("--watch is for people: programs follow GET /events")
    query = {} if only is None else {"state": only}

    async def found() -> Any:
        if devices:
            status = await client.get("/status")
            return {"devices": status["devices"], "runtimes": status["runtimes"]}
        models = await client.get("/models", **query)
        return [m for m in models if not names or m["name"] in names]

    picked = bool(names or only)
    render = _devices if devices else lambda models: _models(models, picked=picked)
    if watch:
        await _watch(found, render)
        return
    value = await found()
    if as_json:
        emit(value)
    else:
        say(render(value))
    missing = set(names) - {m["name"] for m in value} if names and not devices else set()
    if missing:
        raise click.ClickException(f"there is no {' or '.join(sorted(missing))}; `modelium ps` lists all")


async def _watch(found: Any, render: Any) -> None:
    shown = console()
    with Live(render(await found()), console=shown, auto_refresh=False, screen=shown.is_terminal) as live:
        while True:
            await asyncio.sleep(WATCH_S)
            live.update(render(await found()), refresh=True)


def _models(models: list[dict[str, Any]], *, picked: bool) -> RenderableType:
    if not models:
        return plain("none" if picked else "no models yet: `modelium add PATH` brings one in")
    columns = ["NAME", "STATE", "RUNTIME", "DEVICE", "MEMORY", "QPS", "IDLE", "REASON"]
    return table(columns, [_row(model) for model in models], right=("MEMORY", "QPS", "IDLE"))


def _row(model: dict[str, Any]) -> list[str | Text]:
    name = Text(model["name"])
    if model["pinned"] or model["always_loaded"]:
        name.append(" pinned" if model["pinned"] else " always", style="dim")
    return [
        name,
        state(model["state"]),
        serving(model),
        " ".join(model["devices"]),
        memory(model),
        f"{model['qps']:.2f}" if model["qps"] else "",
        "in use" if model["in_flight"] else duration(model["idle_s"]),
        _reason(model),
    ]


def _reason(model: dict[str, Any]) -> str:
    reason = str(model["reason"]).partition("\n")[0]
    progress = model.get("progress")
    if progress:
        reason += f" [{stage(progress)}]"
    if model["waiting"]:
        reason += f" ({model['waiting']} waiting)"
    if model["retry_after_s"]:
        reason += f" (again in {duration(model['retry_after_s'])})"
    return reason


def stage(progress: dict[str, Any]) -> str:
    """`copying 1.2 GB of 4.0 GB`."""
    done, total, unit = progress["done"], progress["total"], progress["unit"]
    if not total:
        return str(progress["stage"])
    if unit == "bytes":
        return f"{progress['stage']} {human(done)} of {human(total)}"
    return f"{progress['stage']} {done:g} of {total:g} {unit}".rstrip()


def serving(model: dict[str, Any]) -> str:
    return "/".join(part for part in (model["runtime"], model["serving"]) if part)


def memory(model: dict[str, Any]) -> str:
    if not model["memory_bytes"]:
        return ""
    shown = ("" if model["memory_source"] == "measured" else "~") + human(model["memory_bytes"])
    return shown if model["state"] in HOLDING else f"({shown})"


def _devices(status: dict[str, Any]) -> RenderableType:
    devices = [
        [
            d["id"],
            d["name"],
            human(d["budget_bytes"]),
            human(d["booked_bytes"]),
            human(d["promised_bytes"]),
            human(d["measured_bytes"]),
            human(d["overhead_bytes"]),
            human(d["foreign_bytes"]),
            human(d["unexplained_bytes"]),
            f"{human(d['used_bytes'])} of {human(d['total_bytes'])}",
            "" if d["utilization"] is None else f"{d['utilization']:.0%}",
            " ".join(d["models"]),
        ]
        for d in status["devices"]
    ]
    columns = ["DEVICE", "NAME", "BUDGET", "BOOKED", "PROMISED"]
    columns += ["MEASURED", "OVERHEAD", "FOREIGN", "UNEXPLAINED", "USED", "BUSY", "MODELS"]
    foreign = [
        [d["id"], str(holder["pid"]), holder["name"], human(holder["bytes"])]
        for d in status["devices"]
        for holder in d["foreign"][:FOREIGN_SHOWN]
    ]
    return Group(
        table(columns, devices, right=columns[2:11]),
        "",
        table(["DEVICE", "PID", "FOREIGN PROCESS", "HOLDS"], foreign, right=("PID", "HOLDS")),
        "",
        runtime_table(status["runtimes"]),
    )


def runtime_table(runtimes: list[dict[str, Any]]) -> RenderableType:
    rows: list[list[str | Text]] = [
        [
            r["name"],
            state(r["state"]),
            (r["info"] or {}).get("version", ""),
            str((r["info"] or {}).get("pid") or ""),
            " ".join(r["foreign_models"]),
            r["reason"] + (f" [{stage(r['progress'])}]" if r["progress"] and r["state"] != "UP" else ""),
        ]
        for r in runtimes
    ]
    return table(["RUNTIME", "STATE", "VERSION", "PID", "FOREIGN MODELS", "REASON"], rows)


# --------------------------------------------------------------------------- one model


@click.command()
@click.argument("name")
@json_option
@with_client
async def show(client: Client, name: str, as_json: bool) -> None:
    """Show one model: what it is, how it is served, how it is used."""
    model = await client.get(model_path(name))
    if as_json:
        emit(model)
    else:
        say(details(model))


def details(model: dict[str, Any]) -> Table:
    plan, analysis = model["plan"] or {}, model["analysis"] or {}
    kept = "always loaded" if model["always_loaded"] else "pinned" if model["pinned"] else ""
    return pairs(
        [
            ("name", model["name"]),
            ("state", state(model["state"])),
            ("reason", _reason(model)),
            ("since", clock(model["since"])),
            ("kept", kept),
            ("what", model["summary"]),
            ("task", model["task"] or ""),
            ("served by", serving(model)),
            ("plan", plan.get("reason", "")),
            ("device", " ".join(model["devices"])),
            ("memory", f"{memory(model)} {model['memory_source']}" if model["memory_bytes"] else ""),
            ("load takes", f"{model['load_s']:.1f} s" if model["load_s"] else ""),
            ("requests", _requests(model)),
            ("idle", duration(model["idle_s"])),
            ("inputs", _tensors(analysis.get("inputs", ()))),
            ("outputs", _tensors(analysis.get("outputs", ()))),
            ("needs", " ".join(model["depends_on"])),
            ("needed by", " ".join(model["dependents"])),
            ("findings", "\n".join(f"{f['severity']}: {f['message']}" for f in model["findings"])),
            ("path", model["path"]),
        ]
    )


def _requests(model: dict[str, Any]) -> str:
    if not model["requests"] and not model["in_flight"]:
        return ""
    failed = f", {model['failures']} failed" if model["failures"] else ""
    return f"{model['requests']}{failed}, {model['in_flight']} in flight, {model['qps']:.2f} per s"


def _tensors(tensors: Any) -> str:
    return "\n".join(f"{t['name']}: {t['datatype']} {list(t['shape'])}" for t in tensors)
