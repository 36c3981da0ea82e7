"""Stands in for `triton_python_backend_utils`, so that a model written for Triton's Python backend runs in a replica.

The names and meanings are those of Triton's module
(https://github.com/triton-inference-server/python_backend/blob/main/README.md). What only Triton can do (asking other
models, shared memory) raises `TritonModelException`.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

NAME = "triton_python_backend_utils"

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
TRITONSERVER_REQUEST_RELEASE_RESCHEDULE = 2

DTYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"), "UINT8": np.dtype("u1"), "UINT16": np.dtype("<u2"), "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"), "INT8": np.dtype("i1"), "INT16": np.dtype("<i2"), "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"), "FP16": np.dtype("<f2"), "FP32": np.dtype("<f4"), "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(object),
}  # fmt: skip
"""numpy's types for KServe's. BF16 has none: it is kept as the upper halves of FP32, in UINT16."""


class TritonModelException(Exception):
    """What a model raises, and what it is told when it asks for something that can't be."""


class TritonError:
    """Why a request has no answer. Not an exception: it is put into a response."""

    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)

    def __init__(self, message: str, code: int = INTERNAL):
        self._message = message
        self._code = code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


class Tensor:
    """A named array."""

    def __init__(self, name: str, values: Any):
        array = np.asarray(values)
        if array.dtype.kind in "SU":
            array = array.astype(object)
        self._name = name
        self._array = array
        self._datatype = datatype_of(array.dtype)

    @classmethod
    def of(cls, name: str, datatype: str, array: Any) -> Tensor:
        """With a datatype that numpy need not know."""
        made = cls(name, array)
        made._datatype = datatype
        return made

    @property
    def datatype(self) -> str:
        """KServe's name of it."""
        return self._datatype

    @property
    def values(self) -> Any:
        """The array, BF16 as the upper halves of FP32."""
        return self._array

    def name(self) -> str:
        return self._name

    def triton_dtype(self) -> str:
        return "TYPE_STRING" if self._datatype == "BYTES" else f"TYPE_{self._datatype}"

    def shape(self) -> list[int]:
        return list(self._array.shape)

    def is_cpu(self) -> bool:
        return True

    def as_numpy(self) -> Any:
        if self._datatype == "BF16":
            raise TritonModelException(f"{self._name} is BF16, which numpy has not: take it by to_dlpack()")
        return self._array

    def to_dlpack(self) -> Any:
        if self._datatype == "BF16":
            import torch

            return torch.utils.dlpack.to_dlpack(torch.from_numpy(self._array.view("<i2")).view(torch.bfloat16))
        return self._array.__dlpack__()

    @staticmethod
    def from_dlpack(name: str, capsule: Any) -> Tensor:
        import torch

        tensor = torch.from_dlpack(capsule).cpu()
        if tensor.dtype == torch.bfloat16:
            return Tensor.of(name, "BF16", tensor.contiguous().view(torch.int16).numpy().view("<u2"))
        return Tensor(name, tensor.numpy())

    __dlpack__ = to_dlpack

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


class InferenceResponse:
    """Output tensors, or an error."""

    def __init__(self, output_tensors: Sequence[Tensor] = (), error: TritonError | None = None, parameters: str = ""):
        self._outputs = list(output_tensors)
        self._error = error if error is None or isinstance(error, TritonError) else TritonError(str(error))
        self._parameters = parameters if isinstance(parameters, str) else json.dumps(parameters)

    def output_tensors(self) -> list[Tensor]:
        return self._outputs

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error

    def parameters(self) -> str:
        return self._parameters


Deliver = Callable[["InferenceResponse | None", bool], None]
"""Takes a response, and whether it is the last; called from any thread."""


class ResponseSender:
    """Where a decoupled model sends its answers."""

    def __init__(self, request: InferenceRequest):
        self._request = request
        self._closed = False

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        if self._closed:
            raise TritonModelException("the response sender has been closed: the last response was sent already")
        final = bool(flags & TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        if response is None and not final:
            raise TritonModelException("expected a response, or the flag that says it was the last one")
        self._closed = final
        self._request.deliver(response, final)

    def is_cancelled(self) -> bool:
        return self._request.is_cancelled()


class InferenceRequest:
    """One request, as the model sees it."""

    def __init__(
        self,
        inputs: Sequence[Tensor] = (),
        request_id: str = "",
        correlation_id: int | str = 0,
        requested_output_names: Sequence[str] = (),
        parameters: str = "",
        deliver: Deliver | None = None,
        rows: int = 1,
        **others: Any,
    ):
        if deliver is None or others:
            raise TritonModelException("a model in a Ray replica can't ask other models: only Triton can do that")
        self._inputs = list(inputs)
        self._id = request_id
        self._correlation_id = correlation_id
        self._outputs = list(requested_output_names)
        self._parameters = parameters
        self._cancelled = False
        self._sender: ResponseSender | None = None
        self.deliver = deliver
        self.rows = rows
        """How much of a batch it fills."""

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def request_id(self) -> str:
        return self._id

    def correlation_id(self) -> int | str:
        return self._correlation_id

    def requested_output_names(self) -> list[str]:
        return self._outputs

    def parameters(self) -> str:
        """JSON."""
        return self._parameters

    def flags(self) -> int:
        return 0

    def timeout(self) -> int:
        return 0

    def is_cancelled(self) -> bool:
        return self._cancelled

    def cancel(self) -> None:
        """Nobody waits for its answer any more."""
        self._cancelled = True

    def get_response_sender(self) -> ResponseSender:
        if self._sender is None:
            self._sender = ResponseSender(self)
        return self._sender


class Logger:
    """Writes to the model's log."""

    _log = logging.getLogger("modelium.model")

    @classmethod
    def log(cls, message: str, level: int = logging.INFO) -> None:
        cls._log.log(level, message)

    @classmethod
    def log_info(cls, message: str) -> None:
        cls.log(message)

    @classmethod
    def log_warn(cls, message: str) -> None:
        cls.log(message, logging.WARNING)

    @classmethod
    def log_error(cls, message: str) -> None:
        cls.log(message, logging.ERROR)

    @classmethod
    def log_verbose(cls, message: str) -> None:
        cls.log(message, logging.DEBUG)


class ModelConfig:
    """A configuration that a model completes before it is loaded."""

    def __init__(self, config: Mapping[str, Any]):
        self._config: dict[str, Any] = json.loads(json.dumps(config))

    def as_dict(self) -> dict[str, Any]:
        return self._config

    def add_input(self, tensor: Mapping[str, Any]) -> None:
        self._add("input", tensor)

    def add_output(self, tensor: Mapping[str, Any]) -> None:
        self._add("output", tensor)

    def _add(self, direction: str, tensor: Mapping[str, Any]) -> None:
        known = next((one for one in self._config[direction] if one["name"] == tensor["name"]), None)
        if known is None:
            self._config[direction].append(dict(tensor))
        else:
            known.update(tensor)

    def set_max_batch_size(self, size: int) -> None:
        self._config["max_batch_size"] = size

    def set_dynamic_batching(self) -> None:
        self._config.setdefault("dynamic_batching", {})

    def set_model_transaction_policy(self, policy: Mapping[str, Any]) -> None:
        self._config["model_transaction_policy"] = dict(policy)


# --------------------------------------------------------------------------- functions


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    return next((tensor for tensor in request.inputs() if tensor.name() == name), None)


def get_output_tensor_by_name(response: InferenceResponse, name: str) -> Tensor | None:
    return next((tensor for tensor in response.output_tensors() if tensor.name() == name), None)


def get_input_config_by_name(config: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    return next((tensor for tensor in config.get("input", ()) if tensor["name"] == name), None)


def get_output_config_by_name(config: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    return next((tensor for tensor in config.get("output", ()) if tensor["name"] == name), None)


def using_decoupled_model_transaction_policy(config: Mapping[str, Any]) -> bool:
    return bool(config.get("model_transaction_policy", {}).get("decoupled", False))


def triton_string_to_numpy(name: str) -> Any:
    """numpy's type for `TYPE_FP32`; None for one that it has not."""
    return DTYPES["BYTES"].type if name == "TYPE_STRING" else getattr(DTYPES.get(name[5:]), "type", None)


def numpy_to_triton_type(dtype: Any) -> str:
    name = datatype_of(np.dtype(dtype))
    return "TYPE_STRING" if name == "BYTES" else f"TYPE_{name}"


def datatype_of(dtype: np.dtype[Any]) -> str:
    """KServe's name for numpy's type. Raises `TritonModelException` when there is none."""
    if dtype.kind in "OSU":
        return "BYTES"
    for name, known in DTYPES.items():
        if dtype == known:
            return name
    raise TritonModelException(f"numpy's {dtype} is no type of a tensor: expected one of {', '.join(DTYPES)}")


def install() -> None:
    """Let models of this process find it under Triton's name.

    Names are written out, since what is sent by value takes along only what it names.
    """
    module = ModuleType(NAME)
    for value in (
        InferenceRequest, InferenceResponse, Logger, ModelConfig, ResponseSender, Tensor, TritonError,
        TritonModelException, get_input_config_by_name, get_input_tensor_by_name, get_output_config_by_name,
        get_output_tensor_by_name, numpy_to_triton_type, triton_string_to_numpy,
        using_decoupled_model_transaction_policy,
    ):  # fmt: skip
        setattr(module, value.__name__, value)
    module.TRITONSERVER_RESPONSE_COMPLETE_FINAL = TRITONSERVER_RESPONSE_COMPLETE_FINAL  # type: ignore[attr-defined]
    module.TRITONSERVER_REQUEST_RELEASE_RESCHEDULE = TRITONSERVER_REQUEST_RELEASE_RESCHEDULE  # type: ignore[attr-defined]
    sys.modules[NAME] = module
