"""HAProxy's admin socket: routes are entries of one map, use is what one stick table counts.

Commands and their answers: https://docs.haproxy.org/2.8/management.html#9.3
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from modelium.api.datapath import Carried
from modelium.errors import DriverError, RuntimeUnavailable

TABLE = "usage"
EXPIRE_S = 120
"""How long what is not used stays in the table; what is left of it tells since when."""
ORGANISATIONS = "organisations"
_ROW = re.compile(r"key=(.*?) use=\d+ exp=(\d+) .*gpc0=(\d+) conn_cur=(\d+) http_req_cnt=(\d+)")
_AT_ONCE = 200
"""Commands in one line: HAProxy takes 16 KiB."""


class Admin:
    def __init__(self, socket: Path, map_file: Path):
        self._socket = socket
        self._map = map_file

    async def routes(self) -> dict[str, str]:
        """The map's entries."""
        answer = await self._say(f"show map {self._map}")
        return {key: value for _, key, value in (line.split(" ", 2) for line in answer.splitlines() if line)}

    async def change(self, gone: Sequence[str], new: Mapping[str, str]) -> None:
        """Take entries out, then put others in. One that is replaced is missing for a moment: the service steps in."""
        commands = [f"del map {self._map} {key}" for key in gone]
        commands += [f"add map {self._map} {key} {value}" for key, value in new.items()]
        for start in range(0, len(commands), _AT_ONCE):
            answer = await self._say(";".join(commands[start : start + _AT_ONCE]))
            if answer.strip():
                raise DriverError(f"HAProxy did not take a route: {answer.strip()[:200]}")

    async def use(self) -> dict[str, Carried]:
        """By model; in the table of organisations a key is `MODEL|ORGANISATION`."""
        both = await self._say(f"show table {TABLE};show table {ORGANISATIONS}")
        models: dict[str, Carried] = {}
        organisations: dict[str, dict[str, Carried]] = {}
        for key, left_ms, failures, now, count in _ROW.findall(both):
            carried = Carried(int(count), int(now), max(0.0, EXPIRE_S - int(left_ms) / 1000), int(failures))
            model, named, organisation = key.replace("\\ ", " ").partition("|")
            if named:
                organisations.setdefault(model, {})[organisation] = carried
            else:
                models[model] = carried
        return {name: c._replace(organisations=organisations.get(name, {})) for name, c in models.items()}

    async def answers(self) -> bool:
        return await self.pid() is not None

    async def pid(self) -> int | None:
        """Of the process that answers; None when none does."""
        try:
            found = re.search(r"^Pid: (\d+)", await self._say("show info"), re.MULTILINE)
        except RuntimeUnavailable:
            return None
        return int(found[1]) if found is not None else None

    async def _say(self, command: str) -> str:
        try:
            async with asyncio.timeout(5):
                reader, writer = await asyncio.open_unix_connection(str(self._socket))
                try:
                    writer.write(command.encode() + b"\n")
                    await writer.drain()
                    return (await reader.read()).decode(errors="replace")
                finally:
                    writer.close()
        except (OSError, TimeoutError) as error:
            why = str(error) or "it took too long"
            raise RuntimeUnavailable(f"HAProxy does not answer at {self._socket}: {why}") from error
