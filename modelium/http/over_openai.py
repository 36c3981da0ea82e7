"""KServe's inference for models whose runtime speaks OpenAI alone (vLLM, llama.cpp), so that no client need know which
runtime serves a model.

Such a model has the inputs and outputs that the templates `transformers-text-generation` and
`transformers-feature-extraction` give one: text or a chat or token ids in, `sampling_parameters` (JSON) or an input for
each, text out, with `finish_reason` and counts; for embeddings, texts in, `sentence_embedding` out. What
`sampling_parameters` say goes to the runtime as it is: it knows its own, and refuses others in its own words. Two of
them mean what they mean to Triton's vLLM backend: without `max_tokens` there is one all the same, and `lora_name`
names an adapter.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
from aiohttp import hdrs

from modelium.engine.admission import Lease
from modelium.errors import ModeliumError
from modelium.http.admission import OPENAI, endpoint
from modelium.http.answers import BadRequest, UpstreamFailed
from modelium.http.bodies import LONG_BYTES
from modelium.http.interfaces import EMBEDDING, VERSION, Interface, interface_of
from modelium.http.messages import InferRequest, InferResponse
from modelium.http.openai_common import EMBEDDINGS_ROUTE, SWITCHES
from modelium.http.streams import InferenceFailed
from modelium.http.tensors import TensorValue, check_raw, join_bytes, split_bytes, to_array
from modelium.http.upstream import Upstream

if TYPE_CHECKING:
    from modelium.engine.service import Service

MAX_TOKENS = 256
"""Where a request says none, as the template has it: OpenAI's own 16 are too few to be of use."""
MAX_EVENT_BYTES = 16 * 2**20
"""Of one server-sent event."""

OWN = frozenset({
    "best_of", "echo", "encoding_format", "input", "input_ids", "messages", "model", "n", "prompt", "stream",
    "stream_options", "text_input",
})  # fmt: skip
"""What `sampling_parameters` may not say: it is said otherwise, or has no place in one answer."""
TRITONS = ("priority", "sequence_", "timeout", "triton_")
"""How the names begin of request parameters that are Triton's own."""

RULES: Mapping[str, tuple[Callable[[float], bool], str]] = {
    "max_tokens": (lambda value: value >= 1, "1 or more"),
    "temperature": (lambda value: value >= 0, "0 or more"),
    "top_p": (lambda value: 0 < value <= 1, "more than 0 and at most 1"),
    "repetition_penalty": (lambda value: value > 0, "more than 0"),
}
"""The templates' own: not every runtime refuses what makes no sense."""


# --------------------------------------------------------------------------- the question


@dataclass(frozen=True, slots=True)
class Call:
    """A request of the runtime."""

    path: str
    body: dict[str, Any]
    second: dict[str, Any] | None = None
    """To be asked when the first is refused: without what the client did not ask for."""
    before: str = ""
    """What is put before the text of the answer."""

    def bodies(self) -> list[bytes]:
        """To be sent in turn while they are refused."""
        try:
            return [json.dumps(body, allow_nan=False).encode() for body in (self.body, self.second) if body is not None]
        except ValueError as exc:
            raise BadRequest(f"expected finite numbers as sampling parameters, found another: {exc}") from None


def text_call(model: str, request: InferRequest, *, pieces: bool) -> Call:
    """The completion, or chat, that an inference asks for; in a stream where it wants one and `pieces` can be used."""
    given = {tensor.name: _elements(tensor) for tensor in request.inputs}
    asked = _sampling(given.pop("sampling_parameters", [""])[0])
    asked |= {name: value for name, value in request.parameters.items() if not name.startswith(TRITONS)}
    stream = given.pop("stream", [asked.pop("stream", False)])[0]
    if not isinstance(stream, bool):
        raise BadRequest(f"expected 'stream' to be true or false, found {stream!r:.80}")
    switches = {name: given.pop(name, [asked.pop(name, None)])[0] for name in SWITCHES}  # counts are always told
    repeat = switches["exclude_input_in_output"] is False
    if repeat and (stream or "text_input" not in given):
        raise BadRequest("only a whole answer to text_input can repeat it: send exclude_input_in_output as true")
    stream = stream and pieces
    prompts = sorted(given.keys() & {"text_input", "messages", "input_ids"})
    if len(prompts) != 1:
        raise BadRequest(
            f"{model}: expected one of text_input, messages and input_ids, found {' and '.join(prompts) or 'none'}"
        )
    prompt = given.pop(prompts[0])
    asked |= {name: value if name == "stop" else value[0] for name, value in given.items()}
    if asked.get("n") in (None, 1):
        asked.pop("n", None)
    if refused := sorted(OWN & asked.keys()):
        raise BadRequest(f"{refused[0]!r} is no sampling parameter of {model}: leave it out")
    body = {name: value for name, value in asked.items() if value is not None}
    for name, (kept, rule) in RULES.items():
        if isinstance(value := body.get(name), int | float) and not kept(value):
            raise BadRequest(f"{name} must be {rule}, and is {value}")
    if "repetition_penalty" in body:
        body["repeat_penalty"] = body["repetition_penalty"]  # llama.cpp's name
    body |= {"model": body.pop("lora_name", model), "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    path = "/v1/completions"
    if prompts == ["messages"]:
        path = "/v1/chat/completions"
        body["messages"] = _conversation(prompt[0])
    elif prompts == ["input_ids"]:
        body |= {"prompt": prompt, "return_token_ids": True}  # vLLM's; others answer without them
    else:
        body["prompt"] = prompt[0]
    before = prompt[0] if repeat else ""
    if "max_tokens" in body:
        return Call(path, body, before=before)
    # A context shorter than that is no reason to refuse who asked for nothing.
    return Call(path, {"max_tokens": MAX_TOKENS, **body}, body, before)


def embedding_call(model: str, request: InferRequest) -> Call:
    texts = next(_elements(tensor) for tensor in request.inputs if tensor.name == "text_input")
    if not 0 < len(texts) <= EMBEDDING.max_batch_size:
        raise BadRequest(f"{model} takes 1 to {EMBEDDING.max_batch_size} texts at once, found {len(texts)}")
    asked = {name: value for name, value in request.parameters.items() if not name.startswith(TRITONS)}
    if refused := sorted(OWN & asked.keys()):
        raise BadRequest(f"{refused[0]!r} is no parameter of {model}: leave it out")
    lora = asked.pop("lora_name", model)
    return Call(EMBEDDINGS_ROUTE, {**asked, "model": lora, "input": texts, "encoding_format": "base64"})


def _elements(tensor: TensorValue) -> list[Any]:
    if tensor.datatype != "BYTES":
        return list(to_array(tensor).reshape(-1).tolist())
    try:
        return [element.decode() for element in split_bytes(tensor.name, check_raw(tensor))]
    except UnicodeDecodeError:
        raise BadRequest(f"input {tensor.name!r}: expected text in UTF-8, found other bytes") from None


def _sampling(text: str) -> dict[str, Any]:
    try:
        asked = json.loads(text) if text else {}
    except (ValueError, RecursionError) as exc:
        raise BadRequest(f"expected sampling_parameters to be a JSON object: {exc}") from None
    if not isinstance(asked, dict):
        raise BadRequest(f"expected sampling_parameters to be a JSON object, found {text!r:.80}")
    return asked


def _conversation(text: str) -> Any:
    try:
        messages = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise BadRequest(f"expected messages to be JSON, a list of messages: {exc}") from None
    if not isinstance(messages, list) or not messages:
        raise BadRequest(f"expected messages to be a list of at least one message, found {text!r:.80}")
    return messages


# --------------------------------------------------------------------------- the answer


class Writing:
    """The responses of one generation, out of the objects that the runtime answers with."""

    def __init__(self, model: str, request: InferRequest):
        self._model = model
        self._request = request
        self._reason: str | None = None
        self._usage: Mapping[str, Any] = {}

    def piece(self, answer: Mapping[str, Any]) -> InferResponse | None:
        """The text that `answer` adds; None where it adds none."""
        text, ids = self._take(answer)
        return self._made(text, ids) if text or ids else None

    def whole(self, answer: Mapping[str, Any], before: str = "") -> InferResponse:
        """The one response to an answer that is no stream; `before` goes before its text."""
        text, ids = self._take(answer)
        return self._made(before + text, ids, self._conclusion())

    def end(self) -> InferResponse:
        """The last response of a stream, without text. `UpstreamFailed` when there must be more to come."""
        if self._reason is None:
            raise UpstreamFailed(f"the runtime of {self._model} ended its answer in the middle; ask again")
        return self._made("", [], self._conclusion())

    def _take(self, answer: Mapping[str, Any]) -> tuple[str, list[int]]:
        try:
            self._usage = answer.get("usage") or self._usage
            text: str = ""
            ids: list[int] = []
            for choice in answer["choices"][:1]:  # the event that tells the counts has none
                said = choice.get("message") or choice.get("delta") or choice
                text = said.get("text" if said is choice else "content") or ""
                ids = choice.get("token_ids") or []
                self._reason = choice.get("finish_reason") or self._reason
        except (KeyError, TypeError, AttributeError) as exc:
            raise _wrongly(self._model, answer) from exc
        return text, ids

    def _conclusion(self) -> list[TensorValue]:
        counts = {"num_input_tokens": "prompt_tokens", "num_output_tokens": "completion_tokens"}
        return [
            _text("finish_reason", self._reason or ""),
            *(
                TensorValue(name, "INT32", (1,), np.array([self._usage[key]], "<i4").tobytes())
                for name, key in counts.items()
                if isinstance(self._usage.get(key), int)
            ),
        ]

    def _made(self, text: str, ids: list[int], more: Iterable[TensorValue] = ()) -> InferResponse:
        outputs = [_text("text_output", text), *more]
        if ids:
            outputs.append(TensorValue("output_ids", "INT64", (len(ids),), np.array(ids, "<i8").tobytes()))
        return _response(self._model, self._request, outputs)


def embedding_response(model: str, request: InferRequest, answer: bytes) -> InferResponse:
    """May take long for many texts."""
    try:
        data = sorted(orjson.loads(answer)["data"], key=lambda one: one["index"])
        vectors = np.stack([_vector(one["embedding"]) for one in data])
    except (ValueError, KeyError, TypeError) as exc:
        raise _wrongly(model, answer) from exc
    tensor = TensorValue("sentence_embedding", "FP32", vectors.shape, vectors.tobytes())
    return _response(model, request, [tensor])


def _vector(value: Any) -> Any:
    return np.frombuffer(base64.b64decode(value), "<f4") if isinstance(value, str) else np.array(value, "<f4")


def _text(name: str, text: str) -> TensorValue:
    return TensorValue(name, "BYTES", (1,), join_bytes([text.encode("utf-8", "replace")]))


def _response(model: str, request: InferRequest, outputs: list[TensorValue]) -> InferResponse:
    wanted = {output.name for output in request.outputs} or {tensor.name for tensor in outputs}
    return InferResponse(model, VERSION, [tensor for tensor in outputs if tensor.name in wanted], request.id)


def _wrongly(model: str, answer: Any) -> UpstreamFailed:
    return UpstreamFailed(f"the runtime of {model} answered wrongly: {answer!r:.200}")


def failure(model: str, status: int, answer: bytes) -> InferenceFailed | UpstreamFailed:
    """A runtime's error, with its status and words."""
    if status < 400:
        return UpstreamFailed(f"the runtime of {model} answered {status}, which is no answer to an inference")
    return InferenceFailed(_words(answer) or f"status {status} without a word", status)


def _words(answer: bytes) -> str:
    """What an error says, in whatever of the usual shapes (OpenAI's, vLLM's former one, FastAPI's)."""
    try:
        found = json.loads(answer)
        for key in ("error", "message", "detail"):
            if isinstance(found, dict) and key in found:
                found = found[key]
        return found if isinstance(found, str) else json.dumps(found)
    except (ValueError, RecursionError):
        return answer[:500].decode("utf-8", "replace")


class Events:
    """Server-sent events out of bytes as they arrive: https://html.spec.whatwg.org/multipage/server-sent-events.html"""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of each event that is whole now."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        if len(self._rest) > MAX_EVENT_BYTES:
            raise UpstreamFailed(f"expected server-sent events of at most {MAX_EVENT_BYTES} bytes, found a longer one")
        found = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                found.append(b"\n".join(self._data))
                self._data = []
        return found


# --------------------------------------------------------------------------- asking


class OverOpenAI:
    """Asks runtimes that speak OpenAI alone. Errors as those of `Inference`."""

    def __init__(self, service: Service, upstream: Upstream):
        self._service = service
        self._upstream = upstream

    def interface(self, lease: Lease) -> Interface:
        return interface_of(self._service.view(lease.model).task)

    async def infer(self, lease: Lease, request: InferRequest) -> InferResponse:
        """The whole answer, also where the request wants it in pieces."""
        call = self._call(lease, request, pieces=False)
        async with self._answered(lease, call, request) as pieces:
            answer = b"".join([piece async for piece in pieces])
        if call.path != EMBEDDINGS_ROUTE:
            return Writing(lease.model, request).whole(_object(lease.model, answer), call.before)
        if len(answer) > LONG_BYTES:
            return await asyncio.to_thread(embedding_response, lease.model, request, answer)
        return embedding_response(lease.model, request, answer)

    async def responses(self, lease: Lease, request: InferRequest) -> AsyncGenerator[InferResponse, None]:
        """In pieces as they come, where the request wants them so; the last is marked."""
        call = self._call(lease, request, pieces=True)
        if not call.body.get("stream"):
            response = await self.infer(lease, request)
            response.final = True
            yield response
            return
        writing, events, done = Writing(lease.model, request), Events(), False
        async with self._answered(lease, call, request) as pieces:
            async for piece in pieces:
                for data in events.feed(piece):
                    done = done or data == b"[DONE]"
                    piece_of = None if done else writing.piece(_object(lease.model, data))
                    if piece_of is not None and piece_of.outputs:
                        yield piece_of
        last = writing.end()
        last.final = True
        yield last

    def _call(self, lease: Lease, request: InferRequest, *, pieces: bool) -> Call:
        interface = self.interface(lease)
        interface.check(lease.model, request)
        if interface is EMBEDDING:
            return embedding_call(lease.model, request)
        return text_call(lease.model, request, pieces=pieces)

    @asynccontextmanager
    async def _answered(self, lease: Lease, call: Call, request: InferRequest) -> AsyncIterator[AsyncIterator[bytes]]:
        """What the runtime answers, as it comes. Leaving early ends the runtime's work."""
        base, model = endpoint(lease, OPENAI), lease.model
        headers = {**request.headers, hdrs.CONTENT_TYPE: "application/json"}
        refused: ModeliumError | None = None
        for body in call.bodies():
            async with self._upstream.posting(base, call.path, model, body=body, headers=headers) as (status, pieces):
                if status == 200:
                    yield pieces
                    return
                refused = failure(model, status, b"".join([piece async for piece in pieces]))
            if status != 400:
                break
        assert refused is not None
        raise refused


def _object(model: str, answer: bytes) -> dict[str, Any]:
    """A JSON object of the runtime's; in a stream it may be an error, with a status of its own."""
    try:
        found = json.loads(answer)
    except ValueError as exc:
        raise _wrongly(model, answer) from exc
    if not isinstance(found, dict):
        raise _wrongly(model, answer)
    if "error" in found:
        code = found["error"].get("code") if isinstance(found["error"], dict) else None
        raise failure(model, code if isinstance(code, int) and code >= 400 else 500, answer)
    return found
