"""The `vllm:` section of the configuration, and what a plan may set for one model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, field_validator

from modelium.api.options import check_options
from modelium.api.settings import plan_settings
from modelium.api.urls import BaseUrl

Count = Annotated[int, Field(ge=1)]
Port = Annotated[int, Field(ge=0, le=65535)]

ALIASES: Mapping[str, str] = {"half": "float16", "float": "float32"}
"""vLLM's other names of dtypes."""

Dtype = Annotated[
    Literal["auto", "bfloat16", "float16", "float32"],
    BeforeValidator(lambda word: ALIASES.get(word, word) if isinstance(word, str) else word),
]
LoadFormat = Annotated[str, StringConstraints(to_lower=True, min_length=1)]
"""Its plugins bring some of their own, so that vLLM alone can tell which there are."""

MODULE_OF: Mapping[str, str] = {
    "fastsafetensors": "fastsafetensors",
    "runai_streamer": "runai_model_streamer",
    "runai_streamer_sharded": "runai_model_streamer",
}
"""The package that a load format takes beside vLLM."""

REPOSITORY, DEVICE_BYTES = "repository", "device_bytes"
"""What a plan carries beside these settings, for the files that Triton would read."""

LEVELS = (1, 2)
"""Of sleep: 1 keeps the weights in host memory; 2 drops them, and they are read again from disk."""

OURS = frozenset(
    {
        "model", "host", "port", "uds", "served-model-name", "gpu-memory-utilization", "root-path", "api-server-count",
        "data-parallel-size", "headless", "config", "grpc", "omni", "api-key", "ssl-keyfile", "ssl-certfile",
        "ssl-ca-certs",
    }
)  # fmt: skip
"""Arguments of vLLM's server that are not a user's to give: they say what is served where, and with how much."""


class EngineSettings(BaseModel):
    """How vLLM's engine computes one model, whatever process it runs in."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    dtype: Dtype = "auto"
    """Of weights that are not quantised, and of what is computed. `auto`: the checkpoint's own in two bytes; float32 on
    a CPU that has no arithmetic for them. `half` is float16, and `float` is float32."""
    quantization: str | None = None
    """vLLM's name of a method; by default as the checkpoint says. `fp8` has a GPU quantise plain weights as they come.
    """
    max_model_len: Count | None = None
    """Tokens of one request, prompt and answer together; by default what the model was trained for, at most 8192 on a
    GPU and 4096 on a CPU."""
    max_num_seqs: Count | None = None
    """Requests that are computed at once; more wait. By default as vLLM thinks best."""
    max_num_batched_tokens: Count | None = None
    """Tokens that are computed at once. By default as vLLM thinks best."""
    concurrent: Count = 4
    """Requests of `max_model_len` tokens that the cache of keys and values has room for; shorter ones are more."""
    kv_cache_memory_bytes: Count | None = None
    """Of the cache on all devices together; by default what `concurrent` requests take, or less where less is there."""
    kv_cache_dtype: str = "auto"
    """`fp8` halves the cache where vLLM can; `auto` is as the model computes."""
    tensor_parallel_size: Count | None = None
    """GPUs that each layer is divided over. By default as many as it takes for the weights to fit."""
    pipeline_parallel_size: Count = 1
    """Groups of GPUs that the layers are divided over."""
    load_format: LoadFormat = "auto"
    """How weights are read, as vLLM names it. `fastsafetensors` (GPUDirect Storage) and `runai_streamer` take packages
    of these names in vLLM's environment."""
    enforce_eager: bool | None = None
    """Compute without compiling first. By default so on a CPU, where compiling takes minutes and a compiler."""
    threads: int = Field(default=0, ge=0)
    """On a CPU: 0 is one for each core but one, which is the server's own."""


class ModelSettings(EngineSettings):
    """How one model is served. A brain's rule may set each of these, and `default_settings` all of them at once."""

    lora_adapters: Mapping[str, str] = Field(default_factory=dict)
    """Adapters by name, asked for as `MODEL:NAME`: folders in the one that was dropped, or absolute paths."""
    max_lora_rank: Count = 16
    """The largest rank among the adapters: 8, 16, 32, 64, 128, 256, 320 or 512."""
    sleep: bool = False
    """Whether it can be put to sleep: its weights go to host memory, or away, and its GPU's memory is free. It takes
    a GPU, and is to be set in `default_settings`."""
    args: tuple[str, ...] = ()
    """Further arguments of vLLM's server by their full names, such as `--enable-auto-tool-choice`."""

    @field_validator("args")
    @classmethod
    def _not_ours(cls, args: tuple[str, ...]) -> tuple[str, ...]:
        check_options(args, OURS)
        return args

    @field_validator("lora_adapters")
    @classmethod
    def _plain_names(cls, adapters: Mapping[str, str]) -> Mapping[str, str]:
        for name, path in adapters.items():
            if not name or "=" in name or any(c.isspace() for c in name):
                raise ValueError(f"an adapter can't be called {name!r}: use letters, digits, '-', '_' and '.'")
            if not path or ".." in Path(path).parts:
                raise ValueError(
                    f"the adapter {name} lies at {path!r}, and an absolute path or one in the model was meant"
                )
        return adapters


class VllmSettings(BaseModel):
    """How vLLM is found and run: a server process for each model, or somebody else's server by its URL."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    enabled: bool | Literal["auto"] = "auto"
    """Whether models are served by vLLM; `auto`: where it is installed."""
    python: Path | None = None
    """An interpreter that has vLLM; by default that of the environment that `modelium runtimes install vllm` makes."""
    base_interpreter: Path | None = None
    """The Python of which that environment is made; by default Modelium's own kind."""
    pip_args: tuple[str, ...] = ()
    """Further arguments of `pip install`, such as `--index-url URL`; with any, none is added by itself."""
    endpoint: BaseUrl | None = None
    """URL of a vLLM that somebody else runs, as `http://10.0.0.5:8000`: its models are used as they are, and none is
    started here."""
    base_port: Port = 8100
    """The first port on loopback to try for a model's server; 0: any free one."""
    load_timeout_s: float = Field(default=1800, gt=0)
    """A load that takes longer is given up."""
    env: Mapping[str, str] = Field(default_factory=dict)
    """Further environment of vLLM's servers, such as `VLLM_LOGGING_LEVEL` or what a store of weights is to be read
    with. It is written and shown nowhere."""
    default_settings: ModelSettings = ModelSettings()
    """For every model whose plan says nothing else."""


def model_settings(settings: Mapping[str, Any]) -> ModelSettings:
    """The settings of a plan. Raises `ModelError` naming those that are wrong."""
    ours = {k: v for k, v in settings.items() if k not in (REPOSITORY, DEVICE_BYTES)}
    return plan_settings(ModelSettings, ours, "vLLM")


def engine_settings(settings: Mapping[str, Any]) -> EngineSettings:
    """Those of a plan that are the engine's, among others. Raises `ModelError` naming those that are wrong."""
    ours = {k: v for k, v in settings.items() if k in EngineSettings.model_fields and v is not None}
    return plan_settings(EngineSettings, ours, "vLLM")
