"""The `llamacpp:` section of the configuration, and what a plan may set for one model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from modelium.api import Analysis
from modelium.api.options import check_options
from modelium.api.settings import plan_settings

CacheType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]
Count = Annotated[int, Field(ge=1)]

EMBEDDING, PROJECTOR = "embedding", "projector"
"""What a plan carries beside these settings: how embeddings are pooled where they are wanted, and the projector."""

OURS = frozenset(
    {
        "model", "model-url", "hf-repo", "hf-file", "docker-repo", "models-dir", "models-preset", "alias", "host",
        "port", "reuse-port", "api-prefix", "ctx-size", "parallel", "n-gpu-layers", "gpu-layers", "api-key",
        "api-key-file", "ssl-key-file", "ssl-cert-file",
    }
)  # fmt: skip
"""Arguments of llama-server that are not a user's to give: they say what is served where, and with how much."""


class ModelSettings(BaseModel):
    """How one model is served. A brain's rule may set each of these, and `default_settings` all of them at once."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    ctx: int = Field(default=8192, ge=0)
    """Tokens that one request may have, prompt and answer together; at most what the model was trained for. 0: that."""
    parallel: Count = 2
    """Requests that are answered at a time, each with a context of its own; more wait."""
    n_gpu_layers: int | None = Field(default=None, ge=0)
    """Layers on the GPU; by default all of them on a GPU, and none on a CPU."""
    threads: int = Field(default=0, ge=0)
    """0: as many as llama.cpp takes, one for each core."""
    ubatch: int | None = Field(default=None, ge=1)
    """Tokens of prompts that are computed at once: 512, and the whole context where a model makes embeddings."""
    cache_type_k: CacheType = "f16"
    """How keys are kept."""
    cache_type_v: CacheType = "f16"
    """How values are kept; anything smaller than f16 takes flash attention."""
    flash_attention: Literal["auto", "on", "off"] = "auto"
    """`auto`: where llama.cpp can; without it long contexts take more memory."""
    mmap: bool | None = None
    """Whether weights are mapped from the file rather than read. By default they are, but for quantised ones on a CPU:
    llama.cpp rewrites most of those for the processor, and would hold them twice."""
    args: tuple[str, ...] = ()
    """Further arguments of llama-server by their full names, such as `--chat-template-file`."""

    @field_validator("args")
    @classmethod
    def _not_ours(cls, args: tuple[str, ...]) -> tuple[str, ...]:
        check_options(args, OURS)
        return args


class LlamaCppSettings(BaseModel):
    """How llama.cpp is found and run: a server process for each model."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    enabled: bool = True
    """Whether models are served by llama.cpp at all."""
    executable: Path | None = None
    """The llama-server to run; by default the one on PATH, else the one that is installed for Modelium."""
    python: Path | None = None
    """The interpreter for the environment of the installed one; by default Modelium's own kind."""
    pip_args: tuple[str, ...] = ()
    """Further arguments of `pip install`, such as `--index-url URL` for a build with CUDA."""
    base_port: int = Field(default=0, ge=0, le=65535)
    """The first port on loopback to try for a model's server; 0: any free one."""
    load_timeout_s: float = Field(default=900, gt=0)
    """A load that takes longer is given up."""
    default_settings: ModelSettings = ModelSettings()
    """For every model whose plan says nothing else."""


UNKNOWN_CTX = 4096
"""Tokens of a request where a model does not say how many it was trained for."""


def capped(settings: ModelSettings, analysis: Analysis) -> ModelSettings:
    """With a context that the model has."""
    most = analysis.facts.get("max_length")
    ctx = settings.ctx or most or UNKNOWN_CTX
    return settings.model_copy(update={"ctx": min(ctx, most) if most else ctx})


def model_settings(settings: Mapping[str, Any]) -> ModelSettings:
    """The settings of a plan. Raises `ModelError` naming those that are wrong."""
    ours = {key: value for key, value in settings.items() if key not in (EMBEDDING, PROJECTOR)}
    return plan_settings(ModelSettings, ours, "llama.cpp")
