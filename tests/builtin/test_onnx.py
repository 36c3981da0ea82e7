from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from modelium.api import Analysis, Completeness, Tensor
from modelium.builtin import onnx as plugin
from modelium.builtin import onnx_wire
from modelium.builtin.onnx_wire import read_skeleton
from modelium.errors import ModelError
from tests.builtin.making import hugging_face, onnx_model, set_external


def analyze(path: Path) -> Analysis:
    found = plugin.modelium_analyze(path)
    assert found is not None
    return found


def completeness(path: Path) -> Completeness:
    found = plugin.modelium_completeness(path)
    assert found is not None
    return found


def save(path: Path, graph: onnx.GraphProto, **more: object) -> Path:
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], **more), path)
    return path


def value(
    name: str, kind: int = TensorProto.FLOAT, shape: Sequence[str | int | None] | None = ("n", 2)
) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


# --------------------------------------------------------------------------- whole models


def test_a_file(tmp_path: Path) -> None:
    found = analyze(onnx_model(tmp_path / "tiny.onnx"))
    assert (found.format, found.entry, found.weights_bytes, found.dtype) == ("onnx", "", 64, "float32")
    assert found.inputs == (Tensor(name="x", datatype="FP32", shape=(-1, 4)),)  # the initialiser `w` is no input
    assert found.outputs == (Tensor(name="y", datatype="FP32", shape=(-1, 4)),)
    assert found.parameters == 16
    assert found.facts["opset"] == 17
    assert found.facts["batch_dim"] is True
    assert found.facts["producer"] == "tests"
    assert found.summary == "ONNX, opset 17, 1 input, 1 output, 64 B of weights"


def test_a_folder_with_external_data(tmp_path: Path) -> None:
    drop = tmp_path / "drop"
    drop.mkdir()
    onnx_model(drop / "net.onnx", external="net.onnx.data")
    found = analyze(drop)
    assert (found.entry, found.weights_bytes, found.facts["external_data"]) == ("net.onnx", 64, ["net.onnx.data"])
    assert completeness(drop).complete


def test_a_folder_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "drop" / "inner").mkdir(parents=True)
    onnx_model(tmp_path / "drop" / "inner" / "net.onnx", external="weights.bin")
    found = analyze(tmp_path / "drop")
    assert (found.entry, found.facts["external_data"]) == ("inner/net.onnx", ["inner/weights.bin"])


def test_several_models_need_a_main_one(tmp_path: Path) -> None:
    onnx_model(tmp_path / "a.onnx")
    onnx_model(tmp_path / "b.onnx")
    with pytest.raises(ModelError, match=r"holds 2 ONNX models \(a.onnx, b.onnx\)"):
        plugin.modelium_analyze(tmp_path)
    onnx_model(tmp_path / "model.onnx")
    assert analyze(tmp_path).entry == "model.onnx"


def test_the_highest_model_is_the_main_one(tmp_path: Path) -> None:
    (tmp_path / "quantized").mkdir()
    onnx_model(tmp_path / "quantized" / "q.onnx")
    onnx_model(tmp_path / "full.onnx")
    assert analyze(tmp_path).entry == "full.onnx"


def test_what_belongs_to_others_is_left_to_them(tmp_path: Path) -> None:
    other = tmp_path / "x.txt"
    other.write_text("x")
    assert plugin.modelium_analyze(other) is None
    assert plugin.modelium_completeness(other) is None
    triton = tmp_path / "triton"
    (triton / "1").mkdir(parents=True)
    onnx_model(triton / "1" / "model.onnx")
    assert analyze(triton).confidence == 0.5  # a version folder: whoever knows Triton is surer
    (triton / "2").mkdir()
    onnx_model(triton / "2" / "model.onnx")
    assert plugin.modelium_analyze(triton) is None
    (triton / "config.pbtxt").write_text("")
    assert plugin.modelium_analyze(triton) is None
    folder = hugging_face(tmp_path / "hf")
    (folder / "onnx").mkdir()
    onnx_model(folder / "onnx" / "model.onnx")
    assert plugin.modelium_analyze(folder) is None
    assert plugin.modelium_completeness(folder) is None
    (folder / "model.safetensors").unlink()  # an export with its configuration
    assert analyze(folder).entry == "onnx/model.onnx"


def test_datatypes_and_shapes(tmp_path: Path) -> None:
    kinds = {
        TensorProto.INT64: "INT64", TensorProto.STRING: "BYTES", TensorProto.BOOL: "BOOL", TensorProto.FLOAT16: "FP16",
        TensorProto.DOUBLE: "FP64", TensorProto.UINT8: "UINT8", TensorProto.BFLOAT16: "BF16",
    }  # fmt: skip
    inputs = [value(f"i{kind}", kind, (2, None, "x")) for kind in kinds] + [value("scalar", shape=())]
    unknown = onnx.ValueInfoProto(name="u")
    unknown.type.tensor_type.elem_type = TensorProto.FLOAT
    graph = helper.make_graph([helper.make_node("Identity", ["scalar"], ["u"])], "g", inputs, [unknown])
    found = analyze(save(tmp_path / "x.onnx", graph))
    assert [t.datatype for t in found.inputs] == [*kinds.values(), "FP32"]
    assert [t.shape for t in found.inputs] == [(2, -1, -1)] * len(kinds) + [()]
    assert found.outputs[0].shape == (-1,)
    assert found.facts["unknown_rank"] == ["u"]
    assert found.facts["batch_dim"] is False


def test_weights_are_counted_wherever_they_lie(tmp_path: Path) -> None:
    inner = helper.make_graph(
        [helper.make_node("Add", ["x", "k"], ["out"])],
        "then",
        [],
        [value("out")],
        [numpy_helper.from_array(np.zeros((300, 2), np.float32), "k")],
    )
    other = helper.make_graph([helper.make_node("Identity", ["x"], ["out2"])], "else", [], [value("out2")])
    constant = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.zeros(1000, np.float64), "c"))
    graph = helper.make_graph(
        [constant, helper.make_node("If", ["cond"], ["y"], then_branch=inner, else_branch=other)],
        "g",
        [value("x"), value("cond", TensorProto.BOOL, ())],
        [value("y")],
    )
    found = analyze(save(tmp_path / "x.onnx", graph))
    assert found.weights_bytes == 300 * 2 * 4 + 1000 * 8


def test_the_weights_are_not_read(tmp_path: Path) -> None:
    path = onnx_model(tmp_path / "big.onnx", size=600)
    skeleton = read_skeleton(path, "big.onnx")
    assert len(skeleton.message) < 1000
    assert skeleton.dropped_bytes == 600 * 600 * 4
    whole, light = onnx.load(path), onnx.ModelProto.FromString(skeleton.message)
    whole.graph.initializer[0].ClearField("raw_data")
    assert light == whole


def test_a_file_beyond_what_protobuf_reads_is_still_judged(tmp_path: Path) -> None:
    """Sparse on disk: three gigabytes that take no room."""
    path = tmp_path / "huge.onnx"
    tail = onnx.ModelProto()
    tail.opset_import.add(version=17)
    size = 3 << 30
    with path.open("wb") as file:
        file.write(b"\x08\x08")  # ir_version: 8
        file.write(b"\x3a" + onnx_wire.encode_varint(size))  # graph
        file.seek(size, 1)
        file.write(tail.SerializeToString())
    with pytest.raises(ModelError, match="more than 2 GiB"):
        plugin.modelium_analyze(path)
    with path.open("r+b") as file:
        file.truncate(2 << 30)
    told = completeness(path)
    assert (told.complete, told.have_bytes) == (False, 2 << 30)
    assert told.want_bytes is not None
    assert told.want_bytes > size


# --------------------------------------------------------------------------- what is not whole


def test_cut_anywhere_it_is_not_complete(tmp_path: Path) -> None:
    whole = onnx_model(tmp_path / "x.onnx").read_bytes()
    assert completeness(tmp_path / "x.onnx").complete
    for kept in range(len(whole)):
        (tmp_path / "x.onnx").write_bytes(whole[:kept])
        told = completeness(tmp_path / "x.onnx")
        assert not told.complete, kept
        assert told.have_bytes == kept
        with pytest.raises(ModelError):
            plugin.modelium_analyze(tmp_path / "x.onnx")


def test_a_file_alone_names_the_data_that_it_lacks(tmp_path: Path) -> None:
    onnx_model(tmp_path / "net.onnx", external="net.weights")
    with pytest.raises(ModelError, match=r"keeps weights in net.weights, which is not in the drop: drop a folder"):
        plugin.modelium_analyze(tmp_path / "net.onnx")
    assert completeness(tmp_path / "net.onnx").complete  # nothing more will come of one file


def test_external_data_that_is_missing_or_short(tmp_path: Path) -> None:
    onnx_model(tmp_path / "net.onnx", external="net.data")
    data = (tmp_path / "net.data").read_bytes()
    (tmp_path / "net.data").write_bytes(data[:-1])
    told = completeness(tmp_path)
    assert not told.complete
    assert "net.data has 63 of at least 64 bytes" in told.reason
    assert told.want_bytes == told.have_bytes + 1
    with pytest.raises(ModelError, match="63 of at least 64"):
        plugin.modelium_analyze(tmp_path)
    (tmp_path / "net.data").unlink()
    assert "net.data, which is not in the drop: copy it" in completeness(tmp_path).reason


def test_offset_and_length_count(tmp_path: Path) -> None:
    onnx_model(tmp_path / "net.onnx", external="net.data")
    set_external(tmp_path / "net.onnx", offset="4096", length="64")
    assert "64 of at least 4160" in completeness(tmp_path).reason


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("location", ["/etc/passwd", "../secret", "a/../../b", "a\\..\\b", "*/_ORT_MEM_ADDR_/*", ""])
def test_external_data_stays_in_the_folder(tmp_path: Path, location: str) -> None:
    onnx_model(tmp_path / "net.onnx", external="net.data")
    set_external(tmp_path / "net.onnx", location=location)
    with pytest.raises(ModelError, match="must lie in the model's own folder") as caught:
        plugin.modelium_analyze(tmp_path)
    assert caught.value.code == "unsafe_path"


def test_external_data_through_a_link_is_not_there(tmp_path: Path) -> None:
    drop = tmp_path / "drop"
    drop.mkdir()
    onnx_model(drop / "net.onnx", external="net.data")
    (drop / "net.data").rename(tmp_path / "net.data")
    (drop / "net.data").symlink_to("../net.data")
    with pytest.raises(ModelError, match=r"net.data, which is not in the drop"):
        plugin.modelium_analyze(drop)


@pytest.mark.parametrize(("key", "number"), [("offset", "-1"), ("length", "-5"), ("offset", "many")])
def test_external_data_at_an_impossible_place(tmp_path: Path, key: str, number: str) -> None:
    onnx_model(tmp_path / "net.onnx", external="net.data")
    set_external(tmp_path / "net.onnx", **{key: number})
    with pytest.raises(ModelError):
        plugin.modelium_analyze(tmp_path)


def test_operators_that_onnxruntime_lacks(tmp_path: Path) -> None:
    onnx_model(tmp_path / "x.onnx", domain="ai.onnx.contrib")
    with pytest.raises(ModelError, match=r"operators of ai.onnx.contrib, which onnxruntime does not carry") as caught:
        plugin.modelium_analyze(tmp_path / "x.onnx")
    assert caught.value.code == "custom_operators"


def test_operators_that_onnxruntime_or_the_model_itself_has(tmp_path: Path) -> None:
    assert analyze(onnx_model(tmp_path / "x.onnx", domain="com.microsoft")).facts["domains"] == ["com.microsoft"]
    local = helper.make_function(
        "my.own", "MatMul", ["a", "b"], ["c"], [helper.make_node("MatMul", ["a", "b"], ["c"])],
        [helper.make_opsetid("", 17)],
    )  # fmt: skip
    model = onnx.load(onnx_model(tmp_path / "y.onnx", domain="my.own"))
    model.functions.append(local)
    onnx.save(model, tmp_path / "y.onnx")
    assert analyze(tmp_path / "y.onnx").facts["domains"] == []


def test_what_kserve_can_not_carry(tmp_path: Path) -> None:
    sequence = helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node("SplitToSequence", ["x"], ["y"])], "g", [value("x")], [sequence])
    with pytest.raises(ModelError, match="'y' is a sequence, and KServe v2 carries tensors only"):
        plugin.modelium_analyze(save(tmp_path / "x.onnx", graph))
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])], "g",
        [value("x", TensorProto.COMPLEX64)], [value("y", TensorProto.COMPLEX64)],
    )  # fmt: skip
    with pytest.raises(ModelError, match="element type 14"):
        plugin.modelium_analyze(save(tmp_path / "y.onnx", graph))


@pytest.mark.parametrize(
    "data",
    [
        b"<html>404</html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
        b"\x1f\x8b\x08\x00" + bytes(30),
        b"GGUF" + bytes(60),
        b"\x80\x02}q\x00.",
        b"\xff" * 40,
        onnx.TensorProto(name="a", dims=[1]).SerializeToString() * 2,  # protobuf, but another message
    ],
)
def test_what_is_no_onnx_file(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.onnx").write_bytes(data)
    with pytest.raises(ModelError, match=r"no ONNX|damaged"):
        plugin.modelium_analyze(tmp_path / "x.onnx")


def test_a_message_that_reaches_beyond_its_own(tmp_path: Path) -> None:
    path = onnx_model(tmp_path / "x.onnx", size=40)
    data = bytearray(path.read_bytes())
    place = data.index(b"\x4a" + onnx_wire.encode_varint(40 * 40 * 4))  # raw_data, which ends the initialiser
    data[place + 1 : place + 3] = b"\xff\x7f"
    path.write_bytes(data)
    with pytest.raises(ModelError, match="damaged"):
        plugin.modelium_analyze(path)
