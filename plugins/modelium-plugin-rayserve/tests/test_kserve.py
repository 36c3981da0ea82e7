"""What a replica reads and writes, against Triton's own client library."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from modelium_plugin_rayserve.onray import kserve
from modelium_plugin_rayserve.onray.kserve import Problem, Signature
from modelium_plugin_rayserve.onray.pb_utils import InferenceResponse, Tensor
from tritonclient.http import InferInput, InferRequestedOutput, InferResult
from tritonclient.http._utils import _get_inference_request

ARRAYS = {
    "BOOL": np.array([[True, False]]),
    "INT8": np.array([[-128, 127]], np.int8),
    "UINT64": np.array([[0, 2**64 - 1]], np.uint64),
    "INT64": np.array([[-(2**63), 2**63 - 1]], np.int64),
    "FP16": np.array([[1.5, -2]], np.float16),
    "FP32": np.array([[1e-7, 3.4e38]], np.float32),
    "FP64": np.array([[0.1, -1e300]]),
    "BYTES": np.array([["ü", "b\n"]], dtype=object),
}


def signature(max_batch_size: int = 0, **inputs: tuple[str, list[int]]) -> Signature:
    tensors = [{"name": name, "data_type": f"TYPE_{kind}", "dims": dims} for name, (kind, dims) in inputs.items()]
    for tensor in tensors:
        if tensor["data_type"] == "TYPE_BYTES":
            tensor["data_type"] = "TYPE_STRING"
    return Signature.of("m", "1", {"max_batch_size": max_batch_size, "input": tensors, "output": tensors})


def body_of(inputs: list[InferInput], **how: Any) -> tuple[bytes, int | None]:
    """As Triton's client writes it."""
    defaults: dict[str, Any] = {
        "outputs": None, "request_id": "", "sequence_id": 0, "sequence_start": False, "sequence_end": False,
        "priority": 0, "timeout": None,
    }  # fmt: skip
    body, length = _get_inference_request(inputs=inputs, custom_parameters=None, **defaults | how)
    return (body if isinstance(body, bytes) else body.encode()), length


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("datatype", [name for name in ARRAYS if name != "FP16"])
def test_tensors_come_and_go_as_tritons_client_has_them(datatype: str, binary: bool) -> None:
    array = ARRAYS[datatype]
    there = InferInput("x", list(array.shape), datatype)
    there.set_data_from_numpy(array, binary_data=binary)
    wanted = [InferRequestedOutput("x", binary_data=binary)]
    known = signature(x=(datatype, [1, 2]))
    asked = kserve.read_infer(*body_of([there], outputs=wanted, request_id="7"), known)
    assert asked.id == "7" and asked.inputs[0].datatype == datatype
    answer, length = kserve.write_infer(InferenceResponse(asked.inputs), asked, known)
    back = InferResult.from_response_body(answer, header_length=length)
    assert back.get_response()["model_name"] == "m" and back.get_response()["id"] == "7"
    got = back.as_numpy("x")
    if datatype == "BYTES" and binary:
        got = np.array([[element.decode() for element in row] for row in got], dtype=object)
    np.testing.assert_array_equal(got, array)
    assert (length is not None) == binary


def test_bf16_is_rounded_and_kept() -> None:
    known = signature(x=("BF16", [3]))
    values = [1.0, 3.14159, -1e30]
    head = {"inputs": [{"name": "x", "datatype": "BF16", "shape": [3], "data": values}]}
    asked = kserve.read_infer(json.dumps(head).encode(), None, known)
    text, _ = kserve.write_infer(InferenceResponse(asked.inputs), asked, known)
    np.testing.assert_allclose(json.loads(text)["outputs"][0]["data"], values, rtol=2**-8)
    asked.binary = True
    body, length = kserve.write_infer(InferenceResponse(asked.inputs), asked, known)
    assert body[length:][:2] == b"\x80\x3f"  # 1.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "z"}, "unexpected inference input 'z'"),
        ({"datatype": "INT32", "data": [1, 2]}, "data-type is 'INT32'"),
        ({"datatype": "FP128"}, "no datatype 'FP128'"),
        ({"shape": [2, 1]}, "unexpected shape"),
        ({"shape": [1, -1]}, "expected a shape"),
        ({"data": [1]}, "expected 2 elements"),
        ({"data": [[1, 2], [3]]}, "regular lists"),
        ({"data": ["a", "b"]}, "values that FP32 has"),
        ({"data": None}, "values that FP32 has"),
        ({"parameters": {"binary_data_size": 8}}, "binary_data_size"),
        ({"parameters": {"shared_memory_region": "r"}}, "shared memory"),
    ],
)
def test_what_the_model_does_not_take_is_refused(change: dict[str, Any], words: str) -> None:
    known = signature(x=("FP32", [1, 2]))
    value = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]} | change
    with pytest.raises(Problem, match=words):
        kserve.read_infer(json.dumps({"inputs": [value]}).encode(), None, known)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "parse"),
        (b"[]", "JSON object"),
        (b"{}", "missing required input"),
        (b'{"inputs": {}}', "list of objects"),
        (b'{"inputs": [{"name": 1}]}', "'name'"),
        (b"[" * 100_000, "parse"),
    ],
)
def test_a_broken_body_is_refused(body: bytes, words: str) -> None:
    with pytest.raises(Problem, match=words):
        kserve.read_infer(body, None, signature(x=("FP32", [1])))


def test_binary_data_that_nobody_declares_or_that_ends_early_are_refused() -> None:
    known = signature(x=("BYTES", [1]))
    there = InferInput("x", [1], "BYTES")
    there.set_data_from_numpy(np.array(["abc"], dtype=object))
    body, length = body_of([there])
    with pytest.raises(Problem, match="left over"):
        kserve.read_infer(body + b"!", length, known)
    with pytest.raises(Problem, match="binary_data_size"):
        kserve.read_infer(body[:-1], length, known)
    with pytest.raises(Problem, match="from 1 to"):
        kserve.read_infer(body, len(body) + 1, known)
    cut = body.replace(b"\x03\0\0\0abc", b"\x04\0\0\0abc")
    with pytest.raises(Problem, match="cut off"):
        kserve.read_infer(cut, length, known)


def test_a_batch_is_as_large_as_all_its_inputs_say_and_no_larger() -> None:
    known = signature(4, a=("INT32", [1]), b=("INT32", [1]))

    def ask(*sizes: int) -> int:
        inputs = []
        for name, size in zip("ab", sizes, strict=True):
            tensor = InferInput(name, [size, 1], "INT32")
            tensor.set_data_from_numpy(np.zeros((size, 1), np.int32))
            inputs.append(tensor)
        return kserve.read_infer(*body_of(inputs), known).rows

    assert ask(3, 3) == 3
    with pytest.raises(Problem, match="same batch size"):
        ask(2, 3)
    with pytest.raises(Problem, match="from 1 to 4"):
        ask(5, 5)
    assert known.metadata()["inputs"][0] == {"name": "a", "datatype": "INT32", "shape": [-1, 1]}


def test_only_wanted_outputs_are_sent() -> None:
    known = signature(a=("INT32", [1]), b=("INT32", [1]))
    inputs = [{"name": n, "datatype": "INT32", "shape": [1], "data": [1]} for n in "ab"]
    head = {"inputs": inputs, "outputs": [{"name": "b"}]}
    asked = kserve.read_infer(json.dumps(head).encode(), None, known)
    text, _ = kserve.write_infer(InferenceResponse(asked.inputs), asked, known)
    assert [output["name"] for output in json.loads(text)["outputs"]] == ["b"]
    head["outputs"] = [{"name": "c"}]
    with pytest.raises(Problem, match="unexpected inference output 'c'"):
        kserve.read_infer(json.dumps(head).encode(), None, known)


def test_generate_takes_values_by_name_and_others_as_parameters() -> None:
    known = signature(text_input=("BYTES", [1]), stop=("BYTES", [-1]), seed=("INT64", [1]))
    body = {"text_input": "hello", "stop": ["a", "b"], "parameters": {"seed": 3}, "other": 0.5, "id": "9"}
    asked = kserve.read_generate(json.dumps(body).encode(), known)
    assert {t.name(): t.as_numpy().tolist() for t in asked.inputs} == {
        "text_input": [b"hello"], "stop": [b"a", b"b"], "seed": [3],
    }  # fmt: skip
    assert asked.parameters == {"other": 0.5} and asked.id == "9"
    answer = InferenceResponse([Tensor("text_output", np.array(["hi"], dtype=object)), Tensor("ids", np.arange(2))])
    assert json.loads(kserve.write_generate(answer, asked, known)) == {
        "model_name": "m", "model_version": "1", "id": "9", "text_output": "hi", "ids": [0, 1],
    }  # fmt: skip


def test_pieces_of_text_are_put_together() -> None:
    pieces = [InferenceResponse([Tensor("text_output", [word])]) for word in ("a", "b")]
    last = InferenceResponse([Tensor("text_output", ["c"]), Tensor("count", np.array([3]))])
    found = {t.name(): t.as_numpy().tolist() for t in kserve.joined([*pieces, last]).output_tensors()}
    assert found == {"text_output": [b"abc"], "count": [3]}
