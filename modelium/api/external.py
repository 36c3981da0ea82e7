"""For runtimes of somebody else's that speak OpenAI's API: they are shown as they are, and nothing is done there."""

from __future__ import annotations

import aiohttp

from modelium.api.driver import RuntimeContext
from modelium.api.servers import ANSWERS_WITHIN_S
from modelium.api.types import (
    Endpoint,
    LoadOutcome,
    LoadRequest,
    Observation,
    ObservedModel,
    Report,
    RuntimeInfo,
    UnloadOutcome,
)
from modelium.api.urls import unanswered
from modelium.errors import DriverError, LoadRejected, RuntimeUnavailable


async def served(http: aiohttp.ClientSession, base: str, server: str) -> list[str]:
    """The names of a server's models: `GET /v1/models` of OpenAI's API. Raises `RuntimeUnavailable`."""
    try:
        async with http.get(f"{base}/v1/models") as answer:
            if answer.status != 200:
                raise RuntimeUnavailable(f"{base}/v1/models answers {answer.status}, and 200 was expected")
            return [str(model["id"]) for model in (await answer.json(content_type=None))["data"]]
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise RuntimeUnavailable(f"no {server} answers at {base}: {unanswered(error)}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RuntimeUnavailable(f"{base}/v1/models does not answer as OpenAI's API does") from error


class ExternalServer:
    """`modelium.api.RuntimeDriver` for an OpenAI server of somebody else's, by its URL: it has the models that it has.

    What it serves is shown as ready, with where it answers; nothing is loaded or unloaded there.
    """

    def __init__(self, context: RuntimeContext, endpoint: str, *, name: str):
        self._context = context
        self._base = endpoint.rstrip("/").removesuffix("/v1")
        self._name = name
        self._http: aiohttp.ClientSession | None = None

    async def start(self) -> RuntimeInfo:
        if self._http is None:
            self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWERS_WITHIN_S))
        await self._served()
        return RuntimeInfo(
            name=self._context.name,
            version=await self._version(),
            instance=self._base,
            adopted=True,
            external=True,
            facts={"endpoint": self._base},
        )

    async def _served(self) -> list[str]:
        if self._http is None:
            raise RuntimeUnavailable(f"{self._context.name} was not started")
        return await served(self._http, self._base, self._name)

    async def _version(self) -> str:
        """As vLLM tells it; empty for servers that don't."""
        assert self._http is not None
        try:
            async with self._http.get(f"{self._base}/version") as answer:
                return str((await answer.json(content_type=None))["version"]) if answer.status == 200 else ""
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError, TypeError):
            return ""

    async def observe(self) -> Observation:
        endpoint = Endpoint(protocol="openai", address=self._base)
        names = await self._served()
        models = tuple(ObservedModel(name=name, ready=True, versions=("1",), endpoints=(endpoint,)) for name in names)
        return Observation(instance=self._base, models=models)

    async def load(self, request: LoadRequest, report: Report) -> LoadOutcome:
        """Only what it has already is loaded. Raises `LoadRejected` for all else."""
        if request.name not in await self._served():
            raise LoadRejected(f"the {self._name} at {self._base} does not serve {request.name}, and loads nothing")
        return LoadOutcome(memory={}, load_s=0, endpoints=(Endpoint(protocol="openai", address=self._base),))

    async def unload(self, name: str) -> UnloadOutcome:
        if name in await self._served():
            raise DriverError(f"{name} is served at {self._base}, whose models are not ours to unload")
        return UnloadOutcome()

    async def stop(self) -> None:
        await self.close()

    async def close(self) -> None:
        http, self._http = self._http, None
        if http is not None:
            await http.close()

    def logs(self, model: str | None, lines: int) -> list[str]:
        """Of another one's log nothing is known."""
        return []
