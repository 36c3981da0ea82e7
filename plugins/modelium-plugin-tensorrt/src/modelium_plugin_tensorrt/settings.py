"""The `tensorrt:` section of the configuration, and what a plan may say of one model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from modelium.errors import ModelError

Precision = Literal["auto", "fp32", "fp16", "bf16", "int8"]
Shape = tuple[Annotated[int, Field(ge=1)], ...]


class TensorRTSettings(BaseModel):
    """What is made of models while nobody needs their devices."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    enabled: bool = True
    """Without it nothing is made, and what was made is put back as it was dropped."""
    models: tuple[str, ...] = ("*",)
    """Which models, by names or patterns as in a shell."""
    precision: Precision = "auto"
    """Of engines; `auto` is the model's own. A rule of the brain sets it for some models:
    `settings: {tensorrt: {precision: fp16}}`."""
    workspace_bytes: int = Field(default=1 << 30, ge=1 << 20)
    """The most GPU memory that one layer of an engine may use for a moment."""
    trtexec: str | None = None
    """TensorRT's own program; by default that of PATH or of NVIDIA's containers."""
    python: Path | None = None
    """A Python with `tensorrt` and PyTorch; by default the one of Triton's Python models, else Modelium's own."""
    onnx_on_cpu: bool = False
    """Serve models of transformers and TorchScript by ONNX Runtime where they are on the CPU, once that has turned out
    to be equal and no slower."""
    pip_args: tuple[str, ...] = ()
    """Further arguments of `pip install` for the environment that exports models."""


class Profile(BaseModel):
    """The shapes of one input that an engine is made for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min: Shape
    opt: Shape
    max: Shape

    @model_validator(mode="after")
    def _in_order(self) -> Profile:
        if not len(self.min) == len(self.opt) == len(self.max):
            raise ValueError(f"min {self.min}, opt {self.opt} and max {self.max} have different numbers of dimensions")
        if not all(a <= b <= c for a, b, c in zip(self.min, self.opt, self.max, strict=True)):
            raise ValueError(f"expected min <= opt <= max, found {self.min}, {self.opt}, {self.max}")
        return self


class Wanted(BaseModel):
    """What a plan's settings may hold under `tensorrt`, beside false for a model that is to stay as it is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    precision: Precision | None = None
    workspace_bytes: int | None = Field(default=None, ge=1 << 20)
    profiles: Mapping[str, Profile] = {}
    """By input; for those with dimensions that nothing else bounds."""
    calibration: Path | None = None
    """For int8: a file of numpy's `savez` with an array of sample rows for each input."""


def wanted(settings: Mapping[str, Any]) -> Wanted | None:
    """What a plan's settings say; None for a model that is to stay as it is. Raises `ModelError`."""
    given = settings.get("tensorrt", {})
    if given is False:
        return None
    try:
        return Wanted.model_validate(given)
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(map(str, ("tensorrt", *first["loc"])))
        raise ModelError(f"the plan's setting {where} is wrong: {first['msg']}") from exc
