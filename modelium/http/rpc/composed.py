"""gRPC calls about one model that are answered here, where the model's runtime speaks no gRPC."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from modelium.engine.admission import Lease
from modelium.http.answers import REQUEST_ID, TRACE, BadRequest
from modelium.http.inference import Inference
from modelium.http.interfaces import check_version
from modelium.http.messages import InferRequest, InferResponse
from modelium.http.streams import FINAL, WANT_FINAL, InferenceFailed, request_from_proto, response_to_proto


class Composed:
    """Messages are taken and given as bytes, as where they are passed on."""

    def __init__(self, inference: Inference):
        self._inference = inference

    async def answer(self, method: str, message: bytes, lease: Lease, metadata: Mapping[str, Any]) -> bytes:
        """To `ModelInfer`, `ModelMetadata` or `ModelConfig`."""
        name = method.rpartition("/")[2]
        if name == "ModelInfer":
            response = await self._inference.infer(lease, self._read(message, lease, metadata))
            return bytes(response_to_proto(response).SerializeToString())
        asked = parsed(f"{name}Request", message)
        check_version(lease.model, asked.version)
        if name == "ModelMetadata":
            fields = await self._inference.metadata(lease)
        else:
            fields = {"config": await self._inference.config(lease)}
        return bytes(made(f"{name}Response", fields).SerializeToString())

    async def responses(
        self, message: bytes, lease: Lease, metadata: Mapping[str, Any], number: int
    ) -> AsyncGenerator[bytes, None]:
        """To one message, the `number`th, of a `ModelStreamInfer`. What the runtime says against it is in band."""
        asked = InferRequest([])
        try:
            asked = self._read(message, lease, metadata)
            if number:  # runtimes tell requests apart by their id
                asked.headers = {**asked.headers, REQUEST_ID: f"{asked.headers[REQUEST_ID]}-{number}"}
            async with aclosing(self._inference.responses(lease, asked)) as responses:
                async for response in responses:
                    if response.final and not response.outputs and not asked.parameters.get(WANT_FINAL):
                        continue
                    response.parameters[FINAL] = response.final
                    yield _streamed("", response)
        except (InferenceFailed, BadRequest) as exc:
            yield _streamed(exc.message, InferResponse(lease.model, "", [], asked.id, {FINAL: True}))

    def _read(self, message: bytes, lease: Lease, metadata: Mapping[str, Any]) -> InferRequest:
        asked = parsed("ModelInferRequest", message)
        check_version(lease.model, asked.model_version)
        request = request_from_proto(asked)
        request.headers = {
            name: value for name in (REQUEST_ID, *TRACE) if isinstance(value := metadata.get(name.lower()), str)
        }
        return request


def _streamed(error: str, response: InferResponse) -> bytes:
    from tritonclient.grpc import service_pb2 as pb

    message = pb.ModelStreamInferResponse(error_message=error, infer_response=response_to_proto(response))
    return bytes(message.SerializeToString())


def parsed(kind: str, message: bytes) -> Any:
    """A message of the protocol. `BadRequest` when it is none."""
    from google.protobuf.message import DecodeError
    from tritonclient.grpc import service_pb2 as pb

    try:
        return getattr(pb, kind).FromString(message)
    except DecodeError as exc:
        raise BadRequest(f"expected a {kind}, found something else: {exc}") from None


def made(kind: str, fields: Mapping[str, Any]) -> Any:
    """A message out of what KServe's JSON has."""
    from google.protobuf.json_format import ParseDict
    from tritonclient.grpc import service_pb2 as pb

    return ParseDict(fields, getattr(pb, kind)())
