"""What `modelium.api.servers.ModelServers` has to know of vLLM's server."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from modelium.api import DEFAULT_SETTINGS, LoadRequest, Progress, RuntimeContext
from modelium.api.measuring import Gpus
from modelium.api.servers import LOG_LINES, Server, ServerCommand
from modelium.errors import ConfigError, DriverError
from modelium_plugin_vllm import arguments, cpu, memory, reasons
from modelium_plugin_vllm.environment import FOLDER, INSTALL, Vllm, find
from modelium_plugin_vllm.registry import known
from modelium_plugin_vllm.settings import ModelSettings, VllmSettings, model_settings

LAUNCHER = Path(__file__).with_name("launcher") / "serve.py"

SHORTEST = 256
"""Tokens that a request must at least have when a smaller cache is tried."""
DIES_WITHIN_S = 10.0
"""A server whose engine has died ends within this."""


class VllmKind:
    """`modelium.api.servers.ServerKind`."""

    protocol = "openai"
    health = "/health"

    def __init__(self, context: RuntimeContext, settings: VllmSettings):
        self._context = context
        self._settings = settings
        self._vllm: Vllm | None = None
        self._gpus: Gpus | None = None
        self._changed: dict[str, dict[str, Any]] = {}
        """What is set otherwise than planned in the tries at a load, by model."""
        self._tried: dict[str, set[str]] = {}
        """Codes of failures after which another try was made, by model."""
        self._free: dict[str, int] = {}
        """Bytes that the last try found free on a device, by model."""

    async def prepare(self) -> tuple[str, Mapping[str, Any]]:
        """Raises `ConfigError` where there is no vLLM, unless `enabled` is `auto`."""
        self._vllm = vllm = await find(self._context.cache_dir, self._settings)
        if vllm is None:
            if self._settings.enabled is True:
                raise ConfigError(
                    f"vLLM is not installed: `{INSTALL}`, or name an interpreter that has it: vllm.python"
                )
            return "not installed", {"installed": False, "install": INSTALL}
        self._gpus = await asyncio.to_thread(Gpus.open)
        found = await asyncio.to_thread(cpu.features)
        await asyncio.to_thread(known, vllm.package)
        return vllm.version, {
            "installed": True,
            "kind": vllm.kind,
            "python": str(vllm.python),
            "package": str(vllm.package),
            "bf16": cpu.computes_bf16(found),
            "int4": cpu.computes_int4(found),
            "repository": str(self._context.repository),
            DEFAULT_SETTINGS: self._settings.default_settings.model_dump(mode="json", exclude_unset=True),
        }

    # ------------------------------------------------------------------ starting one

    async def command(self, request: LoadRequest, port: int, former: DriverError | None) -> ServerCommand | None:
        """Once more for each reason: with a smaller cache, shorter requests, or another port."""
        if self._vllm is None:
            raise DriverError(f"{request.name} is to be served by vLLM, which is not installed: `{INSTALL}`")
        name = request.name
        settings = model_settings(request.plan.settings)
        note = ""
        if former is None:
            self._changed[name], self._tried[name] = {}, set()
            self._free.pop(name, None)
        elif former.code in self._tried[name]:
            return None
        else:
            self._tried[name].add(former.code)
            change, note = _otherwise(request, settings.model_copy(update=self._changed[name]), former)
            if not change and former.code != reasons.NO_PORT:
                return None
            self._changed[name] |= change
            if "free_bytes" in former.fields:
                self._free[name] = int(former.fields["free_bytes"])
        settings = settings.model_copy(update=self._changed[name])
        kind = request.plan.device_kind
        engine = arguments.server_args(request.analysis, settings, kind, len(request.devices))
        cache = self._context.cache_dir / FOLDER / "cache"
        env = {**arguments.environment(self._vllm, settings, kind, cache), **self._settings.env}
        if kind == "cuda":
            least = min(request.device_bytes[device] for device in request.devices)
            each = request.memory_bytes / len(request.devices)
            if name in self._free:  # vLLM does not begin where less is free than its share
                each = min(each, self._free[name] * memory.USABLE)
            engine["gpu_memory_utilization"] = arguments.share(each, least)
            env["CUDA_VISIBLE_DEVICES"] = self._visible(request)
        model = arguments.model_folder(request.path, request.analysis)
        argv = await asyncio.to_thread(
            arguments.command_line, self._vllm, LAUNCHER, engine, settings, name=name, model=model, port=port
        )
        return ServerCommand(argv, env=env, exclusive=request.devices if kind == "cuda" else (), note=note)

    def _visible(self, request: LoadRequest) -> str:
        """The GPUs that it may see, by names that mean the same in whatever order they are counted."""
        if self._gpus is None:
            raise DriverError(f"{request.name} is to be loaded on {', '.join(request.devices)}, and NVML shows no GPU")
        return ",".join(self._gpus.uuid(device) for device in request.devices)

    # ------------------------------------------------------------------ following it

    def progress(self, lines: Sequence[str]) -> Progress | None:
        return reasons.progress(lines)

    def settled(self, lines: Sequence[str]) -> bool:
        return reasons.settled(lines)

    def failure(self, request: LoadRequest, lines: Sequence[str]) -> DriverError:
        return reasons.failure(request.name, lines)

    async def check(self, server: Server, request: LoadRequest, http: aiohttp.ClientSession) -> None:
        """A first token, or a first embedding, under the model's name."""
        try:
            await self.first_answer(server, http)
        except DriverError as error:
            raise await self._explained(server, error) from error

    async def first_answer(self, server: Server, http: aiohttp.ClientSession) -> None:
        """Which of the two it gives, it knows itself. Raises `DriverError` when it gives none."""
        asked = {"model": server.model}
        # However long the first token takes: the load as a whole has a bound.
        timeout = aiohttp.ClientTimeout(total=None)
        said = ""
        for path, body in (
            ("/v1/completions", {**asked, "prompt": "Hello", "max_tokens": 1, "temperature": 0}),
            ("/v1/embeddings", {**asked, "input": "Hello"}),
        ):
            try:
                async with http.post(server.base + path, json=body, timeout=timeout) as answer:
                    if answer.status == 200:
                        return
                    said = f"{answer.status} {await answer.text()}"
            except (aiohttp.ClientError, OSError) as error:
                said = str(error) or type(error).__name__
            if not said.startswith("404"):
                break
        raise DriverError(f"{server.model} has no first answer: {said:.300}", code="no_answer")

    async def _explained(self, server: Server, error: DriverError) -> DriverError:
        """A server whose engine died of the question says why in its log, and then ends; so does one whose port another
        has, who answered in its place."""
        processes = self._context.processes
        try:
            async with asyncio.timeout(DIES_WITHIN_S):
                while processes.find(server.record.name) is not None:
                    await asyncio.sleep(0.1)
        except TimeoutError:
            return error
        return reasons.failure(server.model, processes.tail(server.record.name, LOG_LINES, this_run=True))


def _otherwise(request: LoadRequest, settings: ModelSettings, former: DriverError) -> tuple[dict[str, Any], str]:
    """What to set after a failure, and what a person should know of it; nothing where no other setting would help."""
    kind, count = request.plan.device_kind, len(request.devices)
    length = memory.length(request.analysis, settings, kind)
    if former.code in (reasons.TOO_LONG, reasons.SHORT_CACHE):
        fits = int(former.fields.get("fits") or 0)
        least = 1 if former.code == reasons.TOO_LONG else min(SHORTEST, length)
        if not least <= fits < length:
            return {}, ""
        why = "the model takes no more" if former.code == reasons.TOO_LONG else "its cache has room for no more"
        return {"max_model_len": fits}, f"with requests of {fits} instead of {length} tokens, since {why}"
    if former.code != reasons.NO_MEMORY or not settings.kv_cache_memory_bytes:
        return {}, ""
    cache = settings.kv_cache_memory_bytes
    free = int(former.fields.get("free_bytes") or cache)
    wanted = min(cache // 2, int(free * memory.USABLE))
    one = memory.requests(request.analysis, settings, kind, count, 1)
    if one <= wanted:
        return {"kv_cache_memory_bytes": wanted}, "with a smaller cache, since memory was short: fewer requests at once"
    shorter = length * wanted // one // memory.BLOCK_TOKENS * memory.BLOCK_TOKENS
    if shorter < SHORTEST:
        return {}, ""
    changed = settings.model_copy(update={"max_model_len": shorter})
    cache = memory.requests(request.analysis, changed, kind, count, 1)
    note = f"with requests of {shorter} instead of {length} tokens, since memory was short"
    return {"max_model_len": shorter, "kv_cache_memory_bytes": cache}, note
