"""From a rename into the incoming folder to detected, and to READY; and what of that is Modelium's own."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from tests.models import onnx_linear
from tests.service import Served, served

DROPS = 30


class Feed(threading.Thread):
    """Reads `/events` and notes when each subject was first seen."""

    def __init__(self, service: Served):
        super().__init__(daemon=True)
        self.transitions: list[dict[str, Any]] = []
        self.open = threading.Event()
        self._url = service.url + "/events"

    def run(self) -> None:
        with urllib.request.urlopen(self._url, timeout=600) as answer:
            self.open.set()
            for line in answer:
                if line.startswith(b"data:"):
                    event = json.loads(line[5:])
                    if event.get("kind") == "transition":
                        self.transitions.append(event["data"])

    def at(self, subject: str, after: str) -> float | None:
        return next((t["at"] for t in self.transitions if t["subject"] == subject and t["after"] == after), None)


def rows(folder: Path) -> Iterator[tuple[str, str, str]]:
    with served(folder / "root") as service:
        sample = onnx_linear(folder / "sample.onnx")
        service.drop(sample, "warm.onnx")
        service.until_state("warm", "READY")
        feed = Feed(service)
        feed.start()
        feed.open.wait(30)
        detected, own, total = [], [], []
        for number in range(DROPS):
            name = f"m{number:03d}"
            hidden = service.root / f"coming-{name}"
            hidden.write_bytes(sample.read_bytes())
            start = time.time()
            hidden.rename(service.root / "incoming" / f"{name}.onnx")
            service.until(partial(feed.at, name, "READY"), 60, f"{name} to be READY")
            seen = feed.at(f"incoming/{name}.onnx", "DISCOVERED")
            ready = feed.at(name, "READY")
            assert seen is not None and ready is not None
            detected.append(seen - start)
            total.append(ready - start)
            own.append(ready - start - service.model(name)["load_s"])
    yield ("drop by rename until detected, 95%", f"{quantiles(detected, n=20)[-1] * 1000:.0f} ms", "1000 ms")
    yield ("drop to READY, small ONNX, median", f"{median(total) * 1000:.0f} ms", "")
    yield ("of that Modelium's own, median", f"{median(own) * 1000:.0f} ms", "300 ms")
    yield ("of that Modelium's own, 95%", f"{quantiles(own, n=20)[-1] * 1000:.0f} ms", "300 ms")
