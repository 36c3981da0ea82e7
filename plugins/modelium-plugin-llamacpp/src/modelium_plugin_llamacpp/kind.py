"""One llama.cpp server: how it is started for a model, and what its log means."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp

from modelium.api import DEFAULT_SETTINGS, LoadRequest, Progress, RuntimeContext
from modelium.api.external import served
from modelium.api.measuring import Gpus
from modelium.api.ports import HOST
from modelium.api.servers import Server, ServerCommand
from modelium.errors import DriverError, LoadRejected, RuntimeUnavailable
from modelium_plugin_llamacpp import memory
from modelium_plugin_llamacpp.install import PACKAGE, Program, install, installed
from modelium_plugin_llamacpp.layout import model_file
from modelium_plugin_llamacpp.settings import (
    EMBEDDING,
    PROJECTOR,
    LlamaCppSettings,
    ModelSettings,
    capped,
    model_settings,
)

ENVIRONMENT: Mapping[str, str | None] = {
    "LLAMA_ARG_FIT": "off",
    "LLAMA_ARG_CACHE_RAM": "0",
    "LLAMA_ARG_UI": "0",
    "LLAMA_ARG_ENDPOINT_SLOTS": "0",
    "LLAMA_ARG_CORS_ORIGINS": "localhost",
    "LLAMA_ARG_OFFLINE": "1",
    "LLAMA_API_KEY": None,
}
"""For llama-server, whose older versions leave alone what they don't know of it: settings are the plan's and are not
fitted to what happens to be free; no prompts are kept in memory that nobody booked; no pages but ours; no key, since
Modelium asks without one."""

ALL_LAYERS = 999
"""More than any model has: older versions take no `all`."""

BATCH = 2048
"""llama-server's own default of `--batch-size`."""

SMALLEST_CTX = 512
"""What a request must at least have when a smaller context is tried."""

NO_MEMORY, NO_PORT = "out_of_memory", "no_port"

_PREFIX = re.compile(r"^[\d.]+ [A-Z] (?:\S+\s+)?(?=\S+:)")
"""Of a line of its log: time, level, and the part of the program."""

LOADED = "model loaded"
"""It says so when it has taken all its memory."""

STAGES = (
    ("loading model", "reading the weights"),
    ("threadpool init", "warming up"),
    (LOADED, "ready"),
)
"""Words of its log, in the order in which they come, and what they mean."""

MEMORY = re.compile(
    r"failed to allocate|out of memory|cannot allocate memory|bad_alloc|unable to allocate|ErrorOutOfDeviceMemory",
    re.IGNORECASE,
)
PORT = re.compile(r"couldn't bind|failed to bind|address already in use", re.IGNORECASE)
ARCHITECTURE = re.compile(r"unknown (model architecture|pre-tokenizer type): '?([^'\s]+)")
REFUSED = re.compile(r"error loading model: (.+)")
CONTEXT = re.compile(r"llama_init_from_model: (.+)")
ARGUMENT = re.compile(r"(?:error: |^)(?:unrecognized arguments|invalid argument|argument )(.*)")


class LlamaCppKind:
    """`modelium.api.servers.ServerKind` for llama.cpp."""

    protocol = "openai"
    health = "/health"

    def __init__(self, context: RuntimeContext, settings: LlamaCppSettings):
        self._context = context
        self._settings = settings
        self._program: Program | None = None
        self._gpus: Gpus | None = None
        self._again: dict[str, set[str]] = {}
        """Codes of what was tried to mend, by model: each once in a load."""

    async def prepare(self) -> tuple[str, Mapping[str, Any]]:
        """What there is is looked at; what is missing is installed when the first model is loaded."""
        self._program = await installed(self._context.cache_dir, self._settings)
        self._gpus = await asyncio.to_thread(Gpus.open)
        program = self._program
        facts = {
            "installed": program is not None,
            "gpu": program is not None and program.gpu,
            DEFAULT_SETTINGS: self._settings.default_settings.model_dump(mode="json", exclude_unset=True),
        }
        return (program.version if program else PACKAGE.replace("==", " ")), facts

    async def command(self, request: LoadRequest, port: int, former: DriverError | None) -> ServerCommand | None:
        settings = capped(model_settings(request.plan.settings), request.analysis)
        note = ""
        again = self._again.setdefault(request.name, set())
        if former is None:
            again.clear()
        elif (
            former.code in again
            or former.code not in (NO_PORT, NO_MEMORY)
            or (former.code == NO_MEMORY and settings.ctx <= SMALLEST_CTX)
        ):
            return None
        else:
            again.add(former.code)
        if NO_MEMORY in again:
            smaller = max(settings.ctx // 2, SMALLEST_CTX)
            note = f"with a context of {smaller} instead of {settings.ctx} tokens, since memory was short"
            settings = settings.model_copy(update={"ctx": smaller})
        if self._program is None:
            self._program = await install(self._context.cache_dir, self._settings, self._context.report)
        argv = [*self._program.argv, *self._arguments(request, settings, port)]
        # What it takes meanwhile would be missing from what another server finds free there.
        exclusive = request.devices if request.plan.device_kind == "cuda" else ()
        return ServerCommand(argv, env={**ENVIRONMENT, **self._devices(request)}, exclusive=exclusive, note=note)

    def _arguments(self, request: LoadRequest, settings: ModelSettings, port: int) -> list[str]:
        on_gpu = request.plan.device_kind != "cpu"
        embedding = bool(request.plan.settings.get(EMBEDDING))
        ubatch = memory.ubatch_of(settings, embedding=embedding)
        layers = settings.n_gpu_layers if settings.n_gpu_layers is not None else ALL_LAYERS
        options: dict[str, object] = {
            "--model": model_file(request.path, request.analysis),
            "--alias": request.name,
            "--ctx-size": settings.ctx * settings.parallel,
            "--parallel": settings.parallel,
            "--n-gpu-layers": layers if on_gpu else 0,
            "--batch-size": max(BATCH, ubatch),
            "--ubatch-size": ubatch,
            "--cache-type-k": settings.cache_type_k,
            "--cache-type-v": settings.cache_type_v,
            "--flash-attn": settings.flash_attention,
        }
        if settings.threads:
            options["--threads"] = settings.threads
        if len(request.devices) > 1:
            options["--tensor-split"] = ",".join("1" for _ in request.devices)
        if embedding:
            options["--pooling"] = request.plan.settings[EMBEDDING]
        if projector := request.plan.settings.get(PROJECTOR):
            options["--mmproj"] = request.path / "1" / str(projector)
        argv = [str(word) for option in options.items() for word in option]
        if embedding:
            argv.append("--embedding")
        if not maps(request, settings):
            argv.append("--no-mmap")
        return [*argv, *settings.args, "--host", HOST, "--port", str(port)]

    def _devices(self, request: LoadRequest) -> dict[str, str]:
        """The GPUs that it may see, by names that mean the same in whatever order they are counted."""
        if request.plan.device_kind != "cuda":
            return {"CUDA_VISIBLE_DEVICES": ""}
        if self._gpus is None:
            raise DriverError(f"{request.name} is to be loaded on {', '.join(request.devices)}, and NVML shows no GPU")
        return {"CUDA_VISIBLE_DEVICES": ",".join(self._gpus.uuid(device) for device in request.devices)}

    def progress(self, lines: Sequence[str]) -> Progress | None:
        for words, stage in reversed(STAGES):
            if any(words in line for line in lines):
                return Progress(stage=stage)
        return None

    def settled(self, lines: Sequence[str]) -> bool:
        return any(LOADED in line for line in lines)

    def failure(self, request: LoadRequest, lines: Sequence[str]) -> DriverError:
        text = "\n".join(lines)
        name = request.name
        if match := ARCHITECTURE.search(text):
            version = self._program.version if self._program else "llama.cpp"
            return LoadRejected(
                f"{name}: {version} does not know the {match[1].removeprefix('model ')} {match[2]!r}: use a newer "
                "llama-server (`llamacpp: {executable: PATH}`), or another model",
                code="unknown_architecture",
            )
        if MEMORY.search(text):
            line = next(_plain(line) for line in lines if MEMORY.search(line))
            return DriverError(
                f"{name}: llama.cpp had too little memory ({line}): give it a smaller `ctx` or `parallel`, or a model "
                "that is quantised more",
                code=NO_MEMORY,
            )
        if PORT.search(text):
            return DriverError(f"{name}: the port that was chosen for it was taken meanwhile", code=NO_PORT)
        if match := REFUSED.search(text):
            return LoadRejected(f"{name}: llama.cpp refuses the model: {match[1]}")
        if match := CONTEXT.search(text):
            return LoadRejected(f"{name}: llama.cpp refuses its settings: {match[1]}", code="bad_settings")
        if match := ARGUMENT.search(text):
            return LoadRejected(
                f"{name}: llama.cpp's server does not take its arguments: {match[0].strip()}: see `args` in its "
                "settings, and the version of the server",
                code="bad_settings",
            )
        said = "; it said last: " + " | ".join(_plain(line) for line in lines[-3:]) if lines else ""
        errors = any(re.match(r"[\d.]+ E ", line) for line in lines)
        killed = "" if errors else ", as the kernel ends what takes the last memory (see `dmesg`)"
        return DriverError(f"{name}: its llama.cpp server has ended{killed}{said}", code="process_died")

    async def check(self, server: Server, request: LoadRequest, http: aiohttp.ClientSession) -> None:
        """It has computed a first token to warm up before it was healthy: another would take as long again."""
        try:
            names = await served(http, server.base, "llama.cpp")
        except RuntimeUnavailable as error:
            raise DriverError(f"{request.name} does not tell its name: {error.message}", code="no_answer") from error
        if request.name not in names:
            raise DriverError(f"expected {request.name} on port {server.port}, found {names}", code="no_answer")


def maps(request: LoadRequest, settings: ModelSettings) -> bool:
    """Whether its weights are mapped from the file."""
    if settings.mmap is not None:
        return settings.mmap
    return request.plan.device_kind != "cpu" or not request.analysis.facts.get("quantization")


def _plain(line: str) -> str:
    return _PREFIX.sub("", line).strip()
