"""How long the service takes to know a big repository, and what it holds then."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil

from tests.service import Served

CONFIG = """name: "{name}"
backend: "python"
max_batch_size: 0
input [{{ name: "x" data_type: TYPE_FP32 dims: [ -1 ] }}]
output [{{ name: "y" data_type: TYPE_FP32 dims: [ -1 ] }}]
instance_group [{{ kind: KIND_CPU }}]
"""
MODEL = "class TritonPythonModel:\n    def execute(self, requests):\n        return []\n"


def repository(path: Path, count: int) -> Path:
    """A Triton repository as somebody else would have made it."""
    for number in range(count):
        name = f"model-{number:05d}"
        (path / name / "1").mkdir(parents=True)
        (path / name / "config.pbtxt").write_text(CONFIG.format(name=name))
        (path / name / "1/model.py").write_text(MODEL)
    return path


def knows(service: Served, count: int) -> bool:
    return bool(sum(service.get("/status")["models"].values()) >= count)


def rows(folder: Path) -> Iterator[tuple[str, str, str]]:
    for count, seconds, megabytes in ((1_000, 3, 200), (10_000, 15, 400)):
        theirs = repository(folder / f"repository-{count}", count)
        service = Served(folder / f"root-{count}", repository=theirs)
        try:
            for when in ("first", "second"):
                start = time.perf_counter()
                service.start(ready=False)
                answering = time.perf_counter() - start
                service.until(partial(knows, service, count), 600, "all models")
                knowing = time.perf_counter() - start
                assert service.process is not None
                process = psutil.Process(service.process.pid)
                own = process.memory_info().rss / 1e6
                yield (
                    f"{when} start on {count:,} models",
                    f"answers after {answering:.1f} s, knows all after {knowing:.1f} s, {own:.0f} MB",
                    f"{seconds} s, {megabytes} MB",
                )
                service.stop()
        finally:
            service.down()
