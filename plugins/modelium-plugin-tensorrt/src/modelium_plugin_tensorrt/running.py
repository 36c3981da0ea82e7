"""Runs the programs of this package in other Pythons, and hears what they say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelium.api import Job, Progress
from modelium.errors import DriverError, ModelError

_HERE = Path(__file__).parent
# Last on the path, so that no module of ours hides one of theirs.
_RUN = (
    "import runpy, sys; sys.path.append(sys.argv.pop(1)); "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)

ENVIRONMENT: Mapping[str, str] = {
    # What the user's own Python setup brings in is not what was tested.
    "PYTHONNOUSERSITE": "1",
    "PYTHONPATH": "",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONUNBUFFERED": "1",
    # The other processors are for requests; and a busy machine slows one thread of each alike.
    "OMP_NUM_THREADS": "1",
}


async def run_program(
    job: Job, python: Path, program: str, request: Path, *, env: Mapping[str, str] | None = None
) -> None:
    """Run `programs.PROGRAM` with a request.

    Raises `ModelError` when it refuses the model, `DriverError` when it fails otherwise.
    """
    refused: list[str] = []

    def tell(line: str) -> None:
        said = _said(line)
        if "refused" in said:
            refused.append(str(said["refused"]))
        elif "stage" in said:
            done, total = said.get("done", 0), said.get("total")
            job.report(Progress(stage=said["stage"], done=done, total=total, unit="steps" if total else ""))

    argv = [str(python), "-c", _RUN, str(_HERE), f"programs.{program}", str(request)]
    try:
        await job.run(argv, env={**ENVIRONMENT, **(env or {})}, tell=tell)
    except DriverError as exc:
        if refused:
            raise ModelError(refused[-1]) from exc
        raise


def _said(line: str) -> Mapping[str, Any]:
    if not line.startswith("@"):
        return {}
    try:
        value = json.loads(line[1:])
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
