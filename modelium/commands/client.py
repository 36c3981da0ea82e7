"""The service's own HTTP surface, as commands use it."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlencode

import aiohttp
from yarl import URL

from modelium.api.datapath import AWAY
from modelium.api.urls import unanswered
from modelium.commands.base import Failed, Unreachable
from modelium.errors import ModeliumError

CONNECT_S = 5.0
ANSWER_S = 60.0
"""For questions; orders take as long as they take."""

MAX_DEADLINE_S = 3600.0
"""The longest that the service lets anybody wait for a load."""


class Client:
    """One service. Raises `Unreachable` when nobody answers, and the service's own errors as `ModeliumError`."""

    def __init__(self, url: str, certificate: Path | None = None):
        """`certificate` is one to trust besides those that the system trusts."""
        self.url = url.rstrip("/")
        try:
            parsed = URL(self.url)
            good = parsed.scheme in ("http", "https") and parsed.host and parsed.path in ("", "/") and parsed.port
        except ValueError:
            good = False
        if not good:
            raise ModeliumError(f"{url} is no address: expected http://HOST:PORT", exit_code=2)
        self._certificate = certificate
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
        context = True if self._certificate is None else ssl.create_default_context(cafile=self._certificate)
        self._session = aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(ssl=context))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def get(self, path: str, **query: str) -> Any:
        url = f"{path}?{urlencode(query)}" if query else path
        return await self._ask("GET", url, timeout=aiohttp.ClientTimeout(total=ANSWER_S, sock_connect=CONNECT_S))

    async def post(self, path: str, body: Any = None, *, deadline_s: float | None = None) -> Any:
        headers = {} if deadline_s is None else {"x-modelium-deadline-s": f"{deadline_s:g}"}
        return await self._ask("POST", path, json=body, headers=headers)

    async def delete(self, path: str) -> Any:
        return await self._ask("DELETE", path)

    async def _ask(self, method: str, path: str, **options: Any) -> Any:
        async with self._reached(method, path, **options) as response:
            text = await response.text()
            if response.status >= 400:
                raise _error(self.url, path, response.status, text)
            if response.content_type == "text/html":
                raise _error(self.url, path, response.status, text)
            return json.loads(text) if response.content_type == "application/json" else text

    @asynccontextmanager
    async def _reached(self, method: str, path: str, **options: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        assert self._session is not None, "a Client is used by `async with`"
        try:
            async with self._session.request(method, URL(self.url + path, encoded=True), **options) as response:
                yield response
        except (aiohttp.ClientConnectionError, TimeoutError) as exc:
            raise Unreachable(
                f"no Modelium answers at {self.url} ({unanswered(exc)}): start it with "
                "`modelium serve`, or say where it is with --url"
            ) from exc

    @asynccontextmanager
    async def events(self) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        """What happens from now on, as `EventView` objects; ends when the service does."""
        async with self._reached("GET", "/events", headers={"Accept": "text/event-stream"}) as response:
            if response.status >= 400:
                raise _error(self.url, "/events", response.status, await response.text())
            yield _events(response)

    async def model(self, name: str) -> dict[str, Any] | None:
        """A model, or None when there is none of that name."""
        try:
            found: dict[str, Any] = await self.get(model_path(name))
        except ModeliumError as exc:
            if exc.code == "model_not_found":
                return None
            raise
        return found


def model_path(name: str, action: str = "") -> str:
    """`/models/NAME[/ACTION]`; a drop's name has a slash in it."""
    path = URL.build(path=f"/models/{name}").raw_path
    return f"{path}/{action}" if action else path


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """Server-sent events' `data` lines; other kinds than ours (`missed`) have no subject and are passed over."""
    try:
        async for raw in response.content:
            line = raw.decode().rstrip("\r\n")
            if line.startswith("data:"):
                event = json.loads(line.removeprefix("data:"))
                if "subject" in event:
                    yield event
    except aiohttp.ClientError:
        return


def _error(url: str, path: str, status: int, text: str) -> ModeliumError:
    if status == 503 and AWAY in text:
        return Unreachable(
            f"Modelium does not run at {url}; its data path does, and serves what is loaded: start it with "
            "`modelium serve`"
        )
    try:
        error = json.loads(text)["error"]
        fields = {k: v for k, v in error.items() if k not in ("code", "message", "retry_after_s", "exit_code")}
        return ModeliumError(error["message"], code=error["code"], retry_after_s=error.get("retry_after_s"), **fields)
    except (ValueError, KeyError, TypeError, AttributeError):
        found = " ".join(text.split())[:120]
        return Failed(f"{url} answers, but not as Modelium does: {path} gave {status} {found!r}; check the address")


async def wait_quietly(task: asyncio.Task[Any]) -> None:
    """Cancel a task and let it end."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
