"""The little that must survive a restart and is not in the repository: pins, measurements, what was loaded.

JSON files in the state folder, each replaced as a whole. Losing all of them costs estimates and pins, never a model.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import TypeAdapter, ValidationError

from modelium.api.types import Frozen, Plan
from modelium.engine.views import Measurement

log = logging.getLogger(__name__)

KEPT_LOADS = 9
"""Load times kept for each key; their median is what the next load is expected to take."""

KEPT_KEYS = 50_000
"""Of those measured last."""

NOTED_GROWTH = 0.01
"""Growth of a loaded model below this share is not written down each time."""


class MeasuredStandby(Frozen):
    host_bytes: int = 0
    device_bytes: int = 0
    wake_s: tuple[float, ...] = ()


class Measured(Frozen):
    loads: int = 0
    memory_bytes: int = 0
    """The largest seen."""
    memory: tuple[int, ...] = ()
    """The peaks of the last loads."""
    load_s: tuple[float, ...] = ()
    standby: Mapping[int, MeasuredStandby] = {}
    """By the level at which it slept."""


class Quarantined(Frozen):
    reason: str
    code: str
    at: float


def measurement_key(content_key: str, plan: Plan) -> str:
    """What a measurement is good for: the same content, runtime, settings and kind of device."""
    return key_of(content_key, plan.runtime, plan.serving, plan.device_kind, plan.settings)


def key_of(content_key: str, runtime: str, serving: str, device_kind: str, settings: Mapping[str, Any]) -> str:
    """The key of `measurement_key`, of its parts."""
    what = [content_key, runtime, serving, device_kind, settings]
    return sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:32]


class Store:
    """Changes are kept at once in memory, and on disk within `delay_s`."""

    def __init__(self, folder: Path, delay_s: float = 0.2):
        self._folder = folder
        self._delay_s = delay_s
        self._dirty: set[str] = set()
        self._task: asyncio.Task[None] | None = None
        self.pins: set[str] = set(self._read("pins", TypeAdapter(list[str]), []))
        self.loaded: dict[str, str] = self._read("loaded", TypeAdapter(dict[str, str]), {})
        """The revision that each loaded model was loaded as."""
        self.measured = self._read("measurements", TypeAdapter(dict[str, Measured]), {})
        self.residue: dict[str, dict[str, int]] = self._read("residue", TypeAdapter(dict[str, dict[str, int]]), {})
        """Bytes that did not come back after unloads, by runtime and way of serving."""
        self.quarantined = self._read("quarantine", TypeAdapter(dict[str, Quarantined]), {})

    # ------------------------------------------------------------------ what callers say

    def pin(self, name: str, pinned: bool) -> None:
        """Written at once, since it is a person's word: a few bytes."""
        if pinned is not (name in self.pins):
            (self.pins.add if pinned else self.pins.discard)(name)
            self._write({"pins": sorted(self.pins)})

    def set_loaded(self, name: str, revision: str | None) -> None:
        if self.loaded.get(name) == revision:
            return
        if revision is None:
            self.loaded.pop(name, None)
        else:
            self.loaded[name] = revision
        self._touch("loaded")

    def measure(self, key: str, memory_bytes: int, load_s: float | None = None) -> None:
        """Take in one load, or (without `load_s`) memory that grew since."""
        old = self.measured.get(key, Measured())
        last = old.memory[-1] if old.memory else old.memory_bytes
        if load_s is None and (not old.loads or memory_bytes <= last * (1 + NOTED_GROWTH)):
            return
        peaks = (*old.memory, 0) if load_s is not None else old.memory or (0,)
        new = old.model_copy(
            update={
                "loads": old.loads + (load_s is not None),
                "memory_bytes": max(old.memory_bytes, memory_bytes),
                "memory": (*peaks[:-1], max(peaks[-1], memory_bytes))[-KEPT_LOADS:],
                "load_s": (*old.load_s, *(() if load_s is None else (round(load_s, 3),)))[-KEPT_LOADS:],
            }
        )
        if new != old:
            self._measured(key, new)

    def measure_parked(self, key: str, level: int, host_bytes: int, device_bytes: int) -> None:
        """Take in what a model holds while it is parked; the largest seen is kept."""
        old = self.measured.get(key, Measured()).standby.get(level, MeasuredStandby())
        most = {"host_bytes": max(old.host_bytes, host_bytes), "device_bytes": max(old.device_bytes, device_bytes)}
        self._measure_standby(key, level, **most)

    def measure_wake(self, key: str, level: int, wake_s: float) -> None:
        before = self.measured.get(key, Measured()).standby.get(level, MeasuredStandby()).wake_s
        self._measure_standby(key, level, wake_s=(*before, round(wake_s, 3))[-KEPT_LOADS:])

    def _measure_standby(self, key: str, level: int, **seen: Any) -> None:
        old = self.measured.get(key, Measured())
        new = old.standby.get(level, MeasuredStandby()).model_copy(update=seen)
        if new != old.standby.get(level):
            self._measured(key, old.model_copy(update={"standby": {**old.standby, level: new}}))

    def _measured(self, key: str, new: Measured) -> None:
        self.measured.pop(key, None)
        self.measured[key] = new
        while len(self.measured) > KEPT_KEYS:
            del self.measured[next(iter(self.measured))]
        self._touch("measurements")

    def measurement(self, key: str) -> Measurement | None:
        found = self.measured.get(key)
        if found is None or not found.memory_bytes:
            return None
        return Measurement(
            loads=found.loads,
            memory_bytes=found.memory_bytes,
            memory_spread_bytes=max(found.memory, default=0) - min(found.memory, default=0),
            load_s=median(found.load_s) if found.load_s else 0.0,
            slowest_s=max(found.load_s, default=0.0),
            wake_s={level: median(s.wake_s) for level, s in found.standby.items() if s.wake_s},
        )

    def note_residue(self, runtime: str, serving: str, size: int) -> None:
        """Memory that did not come back after an unload is remembered against what kept it."""
        kept = self.residue.setdefault(runtime, {})
        kept[serving] = kept.get(serving, 0) + size
        self._touch("residue")

    def set_quarantined(self, name: str, record: Quarantined | None) -> None:
        if record is None:
            self.quarantined.pop(name, None)
        else:
            self.quarantined[name] = record
        self._touch("quarantine")

    # ------------------------------------------------------------------ files

    def _read(self, what: str, adapter: TypeAdapter[Any], default: Any) -> Any:
        path = self._folder / f"{what}.json"
        try:
            return adapter.validate_json(path.read_bytes())
        except FileNotFoundError:
            return default
        except (OSError, ValidationError) as exc:
            log.warning("%s is not usable and starts anew: %s", path, exc)
            return default

    def _touch(self, what: str) -> None:
        self._dirty.add(what)
        if self._task is None or self._task.done():
            try:
                self._task = asyncio.get_running_loop().create_task(self._later())
            except RuntimeError:  # no loop: a command that ends soon
                self.flush()

    async def _later(self) -> None:
        await asyncio.sleep(self._delay_s)
        while self._dirty:
            changed = self._changed()
            await asyncio.to_thread(self._write, changed)

    def _changed(self) -> Mapping[str, Any]:
        """Copies of what has changed, to be written in a thread."""
        values: dict[str, Callable[[], Any]] = {
            "loaded": lambda: dict(self.loaded),
            "residue": lambda: {runtime: dict(kept) for runtime, kept in self.residue.items()},
            "measurements": lambda: dict(self.measured),
            "quarantine": lambda: dict(self.quarantined),
        }
        changed = {what: values[what]() for what in self._dirty}
        self._dirty.clear()
        return changed

    def _write(self, changed: Mapping[str, Any]) -> None:
        for what, value in changed.items():
            try:
                data = json.dumps(value, indent=0, default=lambda record: record.model_dump()).encode()
                replace_file(self._folder / f"{what}.json", data)
            except OSError as exc:
                log.error("could not write %s: %s", self._folder / f"{what}.json", exc)

    def flush(self) -> None:
        self._write(self._changed())


def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old or the new content, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(data)
    os.replace(new, path)
