"""The one simple form: what fits is asked, what does not is told what would."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from modelium.api import Tensor
from modelium.http.answers import BadRequest
from modelium.http.messages import InferRequest, InferResponse, decode_request, encode_response
from modelium.http.predict import PIECE, build, fit, parse, render
from modelium.http.tensors import TensorValue, to_array
from tests.http.conftest import Surface
from tests.http.test_kserve import ask
from tests.http.upstreams import Recorder


def tensor(name: str, datatype: str = "FP32", *shape: int) -> Tensor:
    return Tensor(name=name, datatype=datatype, shape=shape)


@pytest.mark.parametrize(
    ("shape", "value", "found", "added"),
    [
        ((3,), [1, 2, 3], (3,), 0),
        ((-1, 3), [[1, 2, 3]], (1, 3), 0),
        ((-1, 3), [1, 2, 3], (1, 3), 1),
        ((1, 3), [1, 2, 3], (1, 3), 1),
        ((-1, -1), 7, (1, 1), 2),
        ((1,), 7, (1,), 1),
        ((), 7, (), 0),
        ((-1, 2, 2), [[1, 2], [3, 4]], (1, 2, 2), 1),
        ((-1,), [], (0,), 0),
        ((3,), [1, 2], None, 0),
        ((-1, 3), [[1, 2]], None, 0),
        ((-1, -1, 3), [1, 2, 3], None, 0),
        ((2, 3), [1, 2, 3], None, 0),
        ((3,), [[1, 2, 3]], None, 0),
        ((-1, 3), 7, None, 0),
    ],
)
def test_shapes_fit_or_are_told(shape: tuple[int, ...], value: Any, found: tuple[int, ...] | None, added: int) -> None:
    if found is None:
        with pytest.raises(BadRequest) as caught:
            fit(tensor("x", "FP32", *shape), value)
        assert f"expected FP32 of shape {list(shape)}" in caught.value.message
        assert f"found shape {list(np.shape(value))}" in caught.value.message
        return
    fitted, count = fit(tensor("x", "FP32", *shape), value)
    assert (fitted.shape, count) == (found, added)
    assert to_array(fitted).ravel().tolist() == np.ravel(value).tolist()


@pytest.mark.parametrize(
    ("datatype", "value", "words"),
    [
        ("INT32", [1.5], "expected integers, as INT32 has, found fractions"),
        ("INT32", ["a"], "expected INT32, found ['a']"),
        ("FP32", {"b64": "eA=="}, "expected FP32"),
        ("FP32", None, "expected FP32"),
        ("FP32", [[1], [1, 2]], "unequal lengths"),
        ("BYTES", [["a"], ["b", "c"]], "unequal lengths"),
        ("BYTES", 7, "expected a text, found 7"),
        ("BYTES", {"b64": "?"}, "expected base64"),
        ("BYTES", {"b65": "eA=="}, "expected a text"),
    ],
)
def test_values_of_another_kind_are_told(datatype: str, value: Any, words: str) -> None:
    with pytest.raises(BadRequest) as caught:
        fit(tensor("x", datatype, -1), value)
    assert words in caught.value.message


ONE = [tensor("x", "FP32", -1, 2)]
TWO = [*ONE, tensor("y", "INT64", -1, 1)]
LLM = [tensor("text_input", "BYTES", 1), tensor("max_tokens", "INT32", 1), tensor("stop", "BYTES", -1)]


@pytest.mark.parametrize(
    ("inputs", "optional", "body", "names", "parameters", "added"),
    [
        (ONE, (), {"inputs": {"x": [1, 2]}}, ["x"], {}, 1),
        (ONE, (), {"inputs": [1, 2]}, ["x"], {}, 1),
        (ONE, (), [[1, 2]], ["x"], {}, 0),
        (TWO, ("y",), {"inputs": [1, 2]}, ["x"], {}, 1),
        (TWO, (), {"inputs": {"x": [1, 2], "y": [[5]]}}, ["x", "y"], {}, 0),
        (TWO, (), {"inputs": [1, 2], "parameters": {"y": 5, "z": "p"}}, ["x", "y"], {"z": "p"}, 1),
        (LLM, ("max_tokens", "stop"), {"text": "hi"}, ["text_input"], {}, 1),
        (LLM, ("max_tokens", "stop"), {"text": "hi", "parameters": {"max_tokens": 9, "seed": 1}},
         ["text_input", "max_tokens"], {"seed": 1}, 1),
        ([tensor("s", "BYTES", -1, 1)], (), {"text": ["a", "b"]}, None, {}, 0),
        ([tensor("s", "BYTES", -1)], (), {"text": ["a", "b"]}, ["s"], {}, 0),
    ],
)  # fmt: skip
def test_the_body_becomes_a_request(
    inputs: list[Tensor], optional: tuple[str, ...], body: Any, names: list[str] | None, parameters: Any, added: int
) -> None:
    if names is None:
        with pytest.raises(BadRequest):
            build(inputs, frozenset(optional), parse(body))
        return
    request, count = build(inputs, frozenset(optional), parse(body))
    assert ([t.name for t in request.inputs], request.parameters, count) == (names, parameters, added)


@pytest.mark.parametrize(
    ("inputs", "body", "words"),
    [
        (ONE, None, "found nothing"),
        (ONE, {}, "found an empty object"),
        (ONE, {"x": [1, 2]}, "found x"),
        (ONE, {"inputs": {}, "text": "a"}, "found inputs, text"),
        (ONE, {"inputs": {"x": [1, 2]}, "parameters": 3}, "'parameters' to be an object"),
        (ONE, {"inputs": {"z": 1}}, "there is no input 'z'; expected inputs: x (FP32 [-1, 2])"),
        (ONE, {"inputs": {}}, "the input 'x' is missing; expected inputs: x (FP32 [-1, 2])"),
        (TWO, {"inputs": [1, 2]}, "needs a model with one input; expected inputs: x (FP32 [-1, 2]), y (INT64 [-1, 1])"),
        (ONE, {"text": "a"}, "no one input for text"),
        ([tensor("a", "BYTES", 1), tensor("b", "BYTES", 1)], {"text": "a"}, "no one input for text"),
    ],
)
def test_what_was_expected_is_named(inputs: list[Tensor], body: Any, words: str) -> None:
    with pytest.raises(BadRequest) as caught:
        build(inputs, frozenset(), parse(body))
    assert words in caught.value.message


@settings(deadline=None)
@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)), st.integers(0, 2))
def test_answers_are_nested_lists_without_what_was_added(array: np.ndarray[Any, Any], added: int) -> None:
    shape = (1,) * added + array.shape
    response = InferResponse("m", "1", [TensorValue("y", "FP32", shape, array.tobytes())])
    found = json.loads(render(response, added, False))
    assert (found["model"], found["version"]) == ("m", "1")
    expected = [v if np.isfinite(v) else None for v in array.ravel().tolist()]
    values = np.ravel(np.array(found["outputs"]["y"], dtype=object)).tolist()
    assert [v if v is None else float(np.float32(v)) for v in values] == expected  # in as few digits as FP32 needs
    if array.size:
        assert np.shape(found["outputs"]["y"]) == array.shape


def test_texts_and_bytes_are_answered() -> None:
    raw = b"\2\0\0\0hi\1\0\0\0\xff"
    response = InferResponse("m", "", [TensorValue("text_output", "BYTES", (2,), raw)])
    assert json.loads(render(response, 0, True)) == {
        "model": "m", "outputs": {"text_output": ["hi", {"b64": "/w=="}]}, "text": ["hi", {"b64": "/w=="}]
    }  # fmt: skip


def test_a_large_answer_is_the_same_as_a_small_one() -> None:
    for shape in ((3, 2, -1), (-1,), (-1, 3), (1, -1), (2, -1, 1)):
        array = np.arange(PIECE * 6, dtype=np.int64).reshape(shape)
        response = InferResponse("m", "1", [TensorValue("y", "INT64", array.shape, array.tobytes())])
        assert json.loads(render(response, 0, False))["outputs"]["y"] == array.tolist()


def test_many_texts_are_answered() -> None:
    count = PIECE + 1
    response = InferResponse("m", "1", [TensorValue("y", "BYTES", (count,), b"\1\0\0\0a" * count)])
    assert json.loads(render(response, 0, False))["outputs"]["y"] == ["a"] * count


# --------------------------------------------------------------------------- over HTTP


def runtime(upstream: Recorder, inputs: list[Tensor], optional: tuple[str, ...] = ()) -> None:
    """Make the recorder a model that gives its inputs back, in binary, `x` as `x_out`."""

    async def answer(request: web.Request, body: bytes) -> web.StreamResponse:
        described = [{"name": t.name, "datatype": t.datatype, "shape": list(t.shape)} for t in inputs]
        if request.path.endswith("/config"):
            return web.json_response({"input": [{"name": t.name, "optional": t.name in optional} for t in inputs]})
        if request.method == "GET":
            return web.json_response({"name": "m", "inputs": described, "outputs": []})
        asked = decode_request(body, int(request.headers["Inference-Header-Content-Length"]))
        if any(tensor.raw == b"" for tensor in asked.inputs):
            return web.json_response({"error": "empty"}, status=400)
        outputs = [TensorValue(f"{t.name}_out", t.datatype, t.shape, t.raw) for t in asked.inputs]
        packed, length = encode_response(InferResponse("m", "4", outputs), InferRequest([], binary_output=True))
        headers = {"Inference-Header-Content-Length": str(length)} if length else {}
        return web.Response(body=packed, headers=headers)

    upstream.answer = answer


async def test_predict(surface: Surface, upstream: Recorder) -> None:
    runtime(upstream, TWO, optional=("y",))
    status, answer, _ = await ask(surface, "POST", "/predict/m", data=b'{"inputs": [1, 2]}')
    assert (status, answer) == (200, {"model": "m", "version": "4", "outputs": {"x_out": [1.0, 2.0]}})
    body = b'{"inputs": {"x": [[1, 2], [3, 4]], "y": [[5], [6]]}}'
    status, answer, _ = await ask(surface, "POST", "/predict/m", data=body)
    assert (status, answer["outputs"]) == (200, {"x_out": [[1.0, 2.0], [3.0, 4.0]], "y_out": [[5], [6]]})
    usage = surface.service.usage.model("m")
    assert (usage.in_flight, usage.requests, usage.failures) == (0, 2, 0)


async def test_predict_text(surface: Surface, upstream: Recorder) -> None:
    runtime(upstream, LLM, optional=("max_tokens", "stop"))
    status, answer, _ = await ask(surface, "POST", "/predict/m", data=b'{"text": "hi"}')
    assert (status, answer["text"], answer["outputs"]) == (200, "hi", {"text_input_out": "hi"})


async def test_the_requests_id_and_trace_go_along(surface: Surface, upstream: Recorder) -> None:
    runtime(upstream, LLM, optional=("max_tokens", "stop"))
    told = {"X-Request-ID": "mine", "traceparent": "00-1-2-01", "tracestate": "a=b", "Authorization": "x"}
    await ask(surface, "POST", "/predict/m", data=b'{"text": "hi"}', headers=told)
    seen = upstream.seen[-1]
    assert {name: seen.headers.get(name) for name in told} == {**told, "Authorization": None}
    assert decode_request(seen.body, int(seen.headers["Inference-Header-Content-Length"])).id == "mine"


async def test_predict_says_what_is_wrong_before_anything_is_loaded(surface: Surface, upstream: Recorder) -> None:
    surface.service.put("m", "COLD")
    for wrong in (b"", b"x", b"{}", b'{"a": 1}'):
        status, answer, _ = await ask(surface, "POST", "/predict/m", data=wrong)
        assert (status, answer["error"]["code"]) == (400, "bad_request")
    assert surface.service.calls == []


async def test_the_runtimes_own_errors_keep_their_words(surface: Surface, upstream: Recorder) -> None:
    runtime(upstream, [tensor("x", "FP32", -1)])
    status, answer, _ = await ask(surface, "POST", "/predict/m", data=b'{"inputs": []}')
    assert (status, answer["error"]) == (400, {"code": "inference_failed", "message": "empty"})

    async def broken(request: web.Request, body: bytes) -> web.StreamResponse:
        return web.Response(status=500, text="no JSON at all")

    upstream.answer = broken
    status, answer, _ = await ask(surface, "POST", "/predict/m", data=b'{"inputs": []}')
    assert (status, answer["error"]["message"]) == (500, "no JSON at all")
    assert surface.service.usage.model("m").failures == 1


async def test_a_model_of_a_runtime_that_speaks_otherwise(surface: Surface) -> None:
    surface.service.runtime("other", kserve_grpc="127.0.0.1:1")
    surface.service.add("m", runtime="other")
    for path in ("/predict/m", "/v2/models/m/infer"):
        status, answer, _ = await ask(surface, "POST", path, data=b'{"inputs": 1}')
        assert (status, "which speaks kserve-grpc, not kserve-http" in json.dumps(answer)) == (400, True)
    assert surface.service.usage.model("m").in_flight == 0
