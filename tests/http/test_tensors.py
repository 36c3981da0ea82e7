"""The tensor codec, against tritonclient's own encoder and decoder."""

from __future__ import annotations

import json
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import tritonclient.http as triton
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tritonclient.utils import np_to_triton_dtype

from modelium.http.answers import BadRequest
from modelium.http.messages import (
    InferRequest,
    InferResponse,
    WantedOutput,
    decode_request,
    decode_response,
    encode_request,
    encode_response,
)
from modelium.http.streams import from_proto, to_proto
from modelium.http.tensors import DTYPES, TensorValue, from_array, to_array, to_json, to_raw

Array = npt.NDArray[Any]

shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
texts = st.text(st.characters(codec="utf-8"), max_size=12)


@st.composite
def arrays(draw: st.DrawFn) -> Array:
    kind = draw(st.sampled_from([*DTYPES, "BYTES"]))
    shape = draw(shapes)
    if kind == "BYTES":
        array = np.empty(int(np.prod(shape)), dtype=object)
        array[:] = [draw(st.one_of(texts.map(str.encode), st.binary(max_size=8))) for _ in range(array.size)]
        return array.reshape(shape)
    return draw(hnp.arrays(DTYPES[kind], shape))


def same(a: Array, b: Array) -> bool:
    return a.shape == b.shape and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def name_of(array: Array) -> str:
    return str(np_to_triton_dtype(array.dtype))


def json_able(array: Array) -> bool:
    """Whether tritonclient writes it as JSON, and JSON can hold it."""
    if array.dtype == object:
        try:
            return all(isinstance(e.decode(), str) for e in array.flat)
        except UnicodeDecodeError:
            return False
    return array.dtype != np.float16 and (array.dtype.kind != "f" or bool(np.isfinite(array).all()))


@settings(deadline=None)
@given(st.lists(arrays(), min_size=1, max_size=4), st.data())
def test_requests_of_tritonclient_are_understood(given_arrays: list[Array], data: st.DataObject) -> None:
    inputs = []
    for number, array in enumerate(given_arrays):
        tensor = triton.InferInput(f"in{number}", list(array.shape), name_of(array))
        tensor.set_data_from_numpy(array, binary_data=not json_able(array) or data.draw(st.booleans()))
        inputs.append(tensor)
    named = data.draw(st.booleans())
    outputs = [triton.InferRequestedOutput("out", binary_data=True, class_count=3)] if named else None
    body, length = triton.InferenceServerClient.generate_request_body(
        inputs, outputs=outputs, request_id="id7", parameters={"n": 1, "s": "x", "b": True}
    )
    request = decode_request(bytes(body), length)
    assert request.id == "id7"
    assert request.parameters == {"n": 1, "s": "x", "b": True}
    if named:
        assert request.outputs == [WantedOutput("out", True, {"classification": 3})]
    else:
        assert (request.outputs, request.binary_output) == ([], True)
    assert [tensor.name for tensor in request.inputs] == [f"in{n}" for n in range(len(given_arrays))]
    for tensor, array in zip(request.inputs, given_arrays, strict=True):
        assert tensor.datatype == name_of(array)
        assert same(to_array(tensor), array)

    again, again_length = encode_request(request)
    repeated = decode_request(again, again_length)
    assert [(t.name, t.shape, bytes(t.raw or b"")) for t in repeated.inputs] == [
        (t.name, t.shape, bytes(t.raw or b"")) for t in request.inputs
    ]

    proto = to_proto("m", "1", request)
    assert [bytes(t.raw or b"") for t in request.inputs] == list(proto.raw_input_contents)
    assert (proto.id, proto.parameters["n"].int64_param, proto.parameters["b"].bool_param) == ("id7", 1, True)


@settings(deadline=None)
@given(st.lists(arrays(), min_size=1, max_size=4), st.data())
def test_tritonclient_understands_answers(given_arrays: list[Array], data: st.DataObject) -> None:
    outputs = [
        TensorValue(f"out{n}", name_of(a), a.shape, _raw(a), {"p": 1} if n else {}) for n, a in enumerate(given_arrays)
    ]
    response = InferResponse("m", "3", outputs, "id7")
    wanted = [WantedOutput(f"out{n}", not json_able(a) or data.draw(st.booleans())) for n, a in enumerate(given_arrays)]
    body, length = encode_response(response, InferRequest([], outputs=wanted))
    assert (length is None) == (not any(w.binary for w in wanted))
    result = triton.InferenceServerClient.parse_response_body(body, header_length=length)
    assert result.get_response()["model_version"] == "3"
    for number, array in enumerate(given_arrays):
        found = result.as_numpy(f"out{number}")
        if array.dtype == object and not wanted[number].binary:  # tritonclient leaves texts from JSON as str
            found = np.array([str(e).encode() for e in found.flat], dtype=object).reshape(found.shape)
        assert same(found.reshape(array.shape), array)
    repeated = decode_response(body, length)
    assert [(t.name, t.datatype, t.shape, t.parameters) for t in repeated.outputs] == [
        (t.name, t.datatype, t.shape, t.parameters) for t in outputs
    ]
    for tensor, array in zip(repeated.outputs, given_arrays, strict=True):
        assert same(to_array(tensor), array)


@settings(deadline=None)
@given(hnp.arrays(np.float32, shapes, elements=st.floats(width=32)))
def test_bf16_is_as_tritonclient_has_it(array: Array) -> None:
    raw = from_array("x", "BF16", array)
    found = to_array(TensorValue("x", "BF16", array.shape, raw))
    tensor = triton.InferInput("x", list(array.shape), "BF16")
    exact = np.where(np.isnan(found), np.float32("nan"), found).astype(np.float32).reshape(array.shape)
    tensor.set_data_from_numpy(exact.astype(ml_dtypes.bfloat16))
    body, length = triton.InferenceServerClient.generate_request_body([tensor])
    assert same(to_array(decode_request(bytes(body), length).inputs[0]), exact)
    finite = np.isfinite(array) & (np.abs(array) < 1e38) & (np.abs(array) > 1e-37)
    assert (np.abs(found[finite] - array[finite]) <= np.abs(array[finite]) * 2**-8).all()
    assert np.array_equal(np.isnan(found), np.isnan(array))


def test_protobuf_contents_that_are_not_raw() -> None:
    from tritonclient.grpc import service_pb2 as pb

    message = pb.ModelInferResponse(model_name="m", model_version="1", id="7")
    message.parameters["done"].bool_param = True
    values = {
        "BOOL": ("bool_contents", [True, False]), "INT8": ("int_contents", [-128, 127]),
        "UINT16": ("uint_contents", [0, 65535]), "INT64": ("int64_contents", [-(2**63), 2**63 - 1]),
        "UINT64": ("uint64_contents", [0, 2**64 - 1]), "FP32": ("fp32_contents", [0.5, -2.0]),
        "FP64": ("fp64_contents", [1e300, 0.0]), "BYTES": ("bytes_contents", [b"\xff", b""]),
    }  # fmt: skip
    for datatype, (place, elements) in values.items():
        tensor = message.outputs.add(name=datatype, datatype=datatype, shape=[2])
        getattr(tensor.contents, place).extend(elements)
    response = from_proto(message)
    assert (response.model, response.version, response.id, response.parameters) == ("m", "1", "7", {"done": True})
    assert {t.name: to_array(t).tolist() for t in response.outputs} == {k: v for k, (_, v) in values.items()}


@settings(deadline=None)
@given(st.sampled_from(sorted(DTYPES)), st.lists(st.one_of(st.integers(-(2**70), 2**70), st.booleans())))
def test_integers_are_exact_or_refused(datatype: str, values: list[int]) -> None:
    dtype = DTYPES[datatype]
    try:
        raw = to_raw("x", datatype, [len(values)], values)
    except BadRequest as exc:
        assert "tensor 'x': expected" in exc.message
        bounds = np.iinfo(dtype) if dtype.kind in "iu" else None
        assert not bounds or any(type(v) is bool or not bounds.min <= v <= bounds.max for v in values)
        return
    if dtype.kind in "iu":
        assert np.frombuffer(raw, dtype).tolist() == [int(v) for v in values]
    elif dtype.kind == "b":
        assert np.frombuffer(raw, dtype).tolist() == [bool(v) for v in values]


def head(**tensor: Any) -> bytes:
    value = {"name": "x", "datatype": "FP32", "shape": [2], "data": [1, 2], **tensor}
    return json.dumps({"inputs": [{k: v for k, v in value.items() if v is not None}]}).encode()


@pytest.mark.parametrize(
    ("body", "length", "words"),
    [
        (b"", None, "expected JSON"),
        (b"[1]", None, "expected a JSON object, found list"),
        (b"[" * 100_000, None, "expected JSON"),
        (b'{"inputs": 1}', None, "'inputs' to be a list of objects"),
        (b'{"inputs": [1]}', None, "'inputs' to be a list of objects"),
        (b'{"inputs": [{}]}', None, "'name' of an input"),
        (b'{"inputs": [], "parameters": 1}', None, "'parameters' to be an object"),
        (b'{"inputs": [], "id": 7}', None, "'id' to be a text"),
        (b'{"inputs": [], "outputs": [{}]}', None, "'name' of an output"),
        (head(), 0, "from 1 to the body's"),
        (head(), 10_000, "found 10000"),
        (head(shape="x"), None, "expected a shape"),
        (head(shape=[-1]), None, "not negative"),
        (head(shape=[True]), None, "expected a shape"),
        (head(shape=[3]), None, "expected 3 elements for shape [3], found 2"),
        (head(datatype="FP99"), None, "expected one of BOOL"),
        (head(datatype=7), None, "'datatype' of input 'x'"),
        (head(data=None), None, "expected data, or binary_data_size"),
        (head(data=[1, "a"]), None, "expected numbers, as FP32 has, found texts"),
        (head(data=[1, None]), None, "found a mixture"),
        (head(data=[[1], [2, 3]]), None, "unequal lengths"),
        (head(data={"a": 1}), None, "expected 2 elements"),
        (head(datatype="INT32", data=[1.5, 2]), None, "expected integers, as INT32 has, found fractions"),
        (head(datatype="INT8", data=[1, 300]), None, "from -128 to 127"),
        (head(datatype="BOOL", data=[1, 2]), None, "expected true or false"),
        (head(datatype="BYTES", data=["a", 1]), None, "expected texts"),
        (head(datatype="BYTES", data=["a", "\ud800"]), None, "expected texts"),
        (head(datatype="BYTES", data=["a"]), None, "expected 2 elements"),
        (head(data=None, parameters={"binary_data_size": 8}), None, "(0 do)"),
        (head(data=None, parameters={"binary_data_size": -1}), None, "found -1"),
        (head(data=None, parameters={"binary_data_size": "8"}), None, "found '8'"),
    ],
)
def test_what_is_wrong_is_said(body: bytes, length: int | None, words: str) -> None:
    with pytest.raises(BadRequest) as caught:
        decode_request(body, length)
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("datatype", "size", "data", "words"),
    [
        ("FP32", 8, b"1234567", "found 8"),
        ("FP32", 7, b"1234567", "expected 8 bytes for FP32 [2], found 7"),
        ("BF16", 2, b"12", "expected 4 bytes for BF16 [2]"),
        ("BYTES", 8, b"\1\0\0\0a\0\0\0", "found an element cut off"),
        ("BYTES", 5, b"\1\0\0\0a", "expected 2 elements for shape [2], found 1"),
        ("BYTES", 5, b"\xff\xff\xff\xffa", "found an element cut off"),
        ("FP32", 8, b"123456789", "found 1 bytes more"),
    ],
)
def test_binary_data_must_be_as_it_is_declared(datatype: str, size: int, data: bytes, words: str) -> None:
    text = head(datatype=datatype, data=None, parameters={"binary_data_size": size})
    with pytest.raises(BadRequest) as caught:
        decode_request(text + data, len(text))
    assert words in caught.value.message


def test_bytes_that_are_no_text_have_no_json() -> None:
    with pytest.raises(BadRequest, match="binary_data"):
        to_json(TensorValue("x", "BYTES", (1,), b"\1\0\0\0\xff"))


def test_shared_memory_needs_no_data() -> None:
    body = head(data=None, parameters={"shared_memory_region": "r", "shared_memory_byte_size": 8})
    request = decode_request(body)
    assert request.inputs[0].raw is None
    assert len(to_proto("m", "", request).raw_input_contents) == 0
    with pytest.raises(BadRequest, match="has no data"):
        to_array(request.inputs[0])


def _raw(array: Array) -> bytes:
    if array.dtype == object:
        return b"".join(len(e).to_bytes(4, "little") + e for e in array.flat)
    return from_array("x", name_of(array), array)
