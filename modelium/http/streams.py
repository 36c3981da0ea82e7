"""Inference on decoupled models, which Triton answers over gRPC streams only: one request in, all responses out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

import grpc
import grpc.aio

from modelium.errors import ModeliumError, RuntimeUnavailable
from modelium.http.answers import BadRequest, UpstreamFailed, check_process, unreachable
from modelium.http.messages import InferRequest, InferResponse, WantedOutput
from modelium.http.rpc.channels import Channels, lost
from modelium.http.tensors import Parameters, TensorValue, join_bytes, split_bytes, to_raw

METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"
FINAL = "triton_final_response"
"""Parameter of a stream's last response."""
WANT_FINAL = "triton_enable_empty_final_response"

_CONTENTS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip
"""Where values lie in a protobuf tensor that is not sent raw."""


STATUS = {grpc.StatusCode.INVALID_ARGUMENT: 400, grpc.StatusCode.UNAVAILABLE: 503}
"""Of errors that a runtime ends a stream with; 500 for any other."""


class InferenceFailed(ModeliumError):
    """The runtime answered an inference with an error."""

    code = "inference_failed"

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class Streams:
    """Streams to runtimes, each for one request."""

    def __init__(self, channels: Channels) -> None:
        self._channels = channels

    async def infer(self, address: str, model: str, version: str, request: InferRequest) -> list[InferResponse]:
        """All responses to `request`, in their order. Cancelling it cancels the inference."""
        return [response async for response in self.stream(address, model, version, request)]

    async def stream(
        self, address: str, model: str, version: str, request: InferRequest
    ) -> AsyncGenerator[InferResponse, None]:
        """The responses to `request` as they come, no faster than they are taken.

        To be closed by who does not take them all (`contextlib.aclosing`): that cancels the inference.
        """
        from tritonclient.grpc import service_pb2 as pb

        # Errors come in band. The metadata `triton_grpc_error` would make them statuses, but Triton 2.51 then crashes,
        # now and then, on an inference that fails.
        call = self._channels.stream(address, METHOD)(
            _one(to_proto(model, version, request).SerializeToString()),
            metadata=tuple((name.lower(), value) for name, value in request.headers.items()),
        )
        begun, failure = False, ""
        try:
            async for answer in call:  # to the end, which comes by itself after the one request's last response
                message = pb.ModelStreamInferResponse.FromString(answer)
                failure = failure or message.error_message
                response = from_proto(message.infer_response)
                final = response.parameters.pop(FINAL, False)
                if not failure and (response.outputs or not final):
                    begun = True
                    yield response
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # not the caller was cancelled, but the channel closed under it
            raise _unanswered(address, model, "the service ends") from None
        except grpc.aio.AioRpcError as exc:
            error = _error(exc, address, model, begun)
            if isinstance(error, RuntimeUnavailable):
                self._channels.drop(address)  # its runtime may never come back there
            raise error from exc
        finally:
            call.cancel()  # when the client left; else it is over
        if failure:
            check_process(failure.encode(), model)
            raise InferenceFailed(failure, status_in_band(failure))


async def _one(message: bytes) -> AsyncIterator[bytes]:
    yield message


def status_in_band(message: str) -> int:
    """For an error in band, which has no code: as Triton's generate answers, but for what is plainly no 400."""
    if message.startswith("Request for unknown model"):
        return 404 if message.endswith("is not found") else 503
    return 500 if message.startswith("Failed to process the request(s)") else 400


def _error(exc: grpc.aio.AioRpcError, address: str, model: str, begun: bool) -> ModeliumError:
    code, details = exc.code(), exc.details() or "no details"
    if not lost(exc):
        return InferenceFailed(details, STATUS.get(code, 500))
    if "failed to connect" in details and not begun:
        return unreachable(model, address, details)
    return _unanswered(address, model, details)


def _unanswered(address: str, model: str, details: str) -> UpstreamFailed:
    return UpstreamFailed(f"the runtime of {model} at {address} took the request and did not answer ({details})")


# --------------------------------------------------------------------------- messages


def to_proto(model: str, version: str, request: InferRequest) -> Any:
    """A `ModelInferRequest`, its values raw."""
    from tritonclient.grpc import service_pb2 as pb

    message = pb.ModelInferRequest(model_name=model, model_version=version, id=request.id)
    _set_parameters(message.parameters, {**request.parameters, WANT_FINAL: True})
    for tensor in request.inputs:
        value = message.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        _set_parameters(value.parameters, tensor.parameters)
        if tensor.raw is not None:
            message.raw_input_contents.append(bytes(tensor.raw))
    for wanted in request.outputs:
        _set_parameters(message.outputs.add(name=wanted.name).parameters, wanted.parameters)
    return message


def from_proto(message: Any) -> InferResponse:
    """From a `ModelInferResponse`, its values raw or not."""
    outputs = _tensors(message.outputs, message.raw_output_contents)
    return InferResponse(
        message.model_name, message.model_version, outputs, message.id, _get_parameters(message.parameters)
    )


def request_from_proto(message: Any) -> InferRequest:
    """From a `ModelInferRequest`, its values raw or not. `BadRequest` when they are not what they are said to be."""
    inputs = _tensors(message.inputs, message.raw_input_contents)
    wanted = [WantedOutput(one.name, True, _get_parameters(one.parameters)) for one in message.outputs]
    return InferRequest(inputs, message.id, _get_parameters(message.parameters), wanted)


def response_to_proto(response: InferResponse) -> Any:
    """A `ModelInferResponse`, its values raw."""
    from tritonclient.grpc import service_pb2 as pb

    message = pb.ModelInferResponse(model_name=response.model, model_version=response.version, id=response.id)
    _set_parameters(message.parameters, response.parameters)
    for tensor in response.outputs:
        message.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        message.raw_output_contents.append(bytes(tensor.raw or b""))
    return message


def _tensors(values: Any, raws: Sequence[bytes]) -> list[TensorValue]:
    found, rest = [], iter(raws)
    for value in values:
        tensor = TensorValue(value.name, value.datatype, tuple(value.shape), None, _get_parameters(value.parameters))
        if "shared_memory_region" not in tensor.parameters:
            if raws:
                tensor.raw = next(rest, b"")
            elif (contents := _CONTENTS.get(value.datatype)) is not None:
                elements = list(getattr(value.contents, contents))
                tensor.raw = to_raw(tensor.name, tensor.datatype, tensor.shape, elements)
        found.append(tensor)
    return found


def _set_parameters(target: Any, parameters: Parameters) -> None:
    for key, value in parameters.items():
        if isinstance(value, bool):
            target[key].bool_param = value
        elif isinstance(value, int) and -(2**63) <= value < 2**63:
            target[key].int64_param = value
        elif isinstance(value, float):
            target[key].double_param = value
        elif isinstance(value, str):
            target[key].string_param = value
        else:
            raise BadRequest(f"parameter {key!r}: expected a text, a number, true or false, found {value!r:.80}")


def _get_parameters(parameters: Any) -> Parameters:
    return {key: getattr(value, value.WhichOneof("parameter_choice")) for key, value in parameters.items()}


def join(model: str, responses: Sequence[InferResponse]) -> InferResponse:
    """One response out of many: a single one as it is; pieces of text, each output one BYTES element, put together.

    `BadRequest` where the pieces are no text: only a stream can carry them.
    """
    if not responses:
        return InferResponse(model, "", [])
    first = responses[0]
    if len(responses) == 1:
        return first
    pieces: dict[str, list[bytes]] = {}
    for response in responses:
        for tensor in response.outputs:
            elements = list(split_bytes(tensor.name, tensor.raw or b"")) if tensor.datatype == "BYTES" else []
            if len(elements) != 1:
                raise BadRequest(
                    f"{model} answered with {len(responses)} responses, and {tensor.datatype} {tensor.name!r} can't be "
                    f"put together as pieces of text can: ask /v2/models/{model}/generate_stream, or gRPC's "
                    "ModelStreamInfer"
                )
            pieces.setdefault(tensor.name, []).append(elements[0])
    shapes = {tensor.name: tensor.shape for response in responses for tensor in response.outputs}
    outputs = [
        TensorValue(name, "BYTES", shapes[name], join_bytes([b"".join(parts)])) for name, parts in pieces.items()
    ]
    return InferResponse(first.model, first.version, outputs, first.id, first.parameters)
