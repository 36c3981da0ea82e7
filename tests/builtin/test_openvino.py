"""OpenVINO models: what the XML says, what is still arriving, and what is no model of that kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from modelium.api import Analysis, Tensor
from modelium.builtin import openvino as plugin
from modelium.builtin import scanners
from modelium.builtin.openvino_xml import NotOpenVino
from modelium.errors import ModelError
from modelium.host import PluginHost
from tests.openvino_models import Network, linear, odd


def analysed(path: Path) -> Analysis:
    found = plugin.modelium_analyze(path)
    assert found is not None
    return found


def test_inputs_outputs_and_weights(tmp_path: Path) -> None:
    found = analysed(linear(tmp_path / "drop" / "net.xml"))
    assert (found.format, found.entry, found.dtype) == ("openvino", "net.xml", "float32")
    assert found.inputs == (Tensor(name="x", datatype="FP32", shape=(-1, 4)),)
    assert found.outputs == (Tensor(name="y", datatype="FP32", shape=(-1, 3)),)
    assert (found.weights_bytes, found.parameters) == (60, 15)
    assert found.summary == "OpenVINO, version 11, 1 input, 1 output, 60 B of weights"
    assert found.facts == {
        "ir_version": 11,
        "weights": "net.bin",
        "packed_bytes": 60,
        "batch_dim": True,
        "unknown_rank": [],
        "unnamed": [],
    }
    assert not analysed(linear(tmp_path / "fixed" / "net.xml", batch=2)).facts["batch_dim"]


def test_scalars_and_names(tmp_path: Path) -> None:
    found = analysed(odd(tmp_path / "drop" / "net.xml"))
    assert found.inputs == (
        Tensor(name="times", datatype="INT64", shape=()),
        Tensor(name="nameless", datatype="FP32", shape=(2,)),
    )
    assert found.outputs == (
        Tensor(name="twice", datatype="INT64", shape=(-1,)),
        Tensor(name="last", datatype="FP32", shape=(2,)),
    )
    assert found.facts["unnamed"] == ["nameless", "last"]
    assert found.facts["unknown_rank"] == ["twice"]


def test_half_precision_is_computed_in_single(tmp_path: Path) -> None:
    net = Network()
    x = net.parameter("x", (1, 8), "f16")
    net.result(net.layer("Add", (x, net.constant(np.ones((1, 8), np.float16))), (1, 8), names="y"))
    found = analysed(net.write(tmp_path / "drop" / "net.xml"))
    assert (found.weights_bytes, found.facts["packed_bytes"], found.dtype) == (16, 32, "float16")


def test_bodies_of_loops_have_inputs_of_their_own(tmp_path: Path) -> None:
    folder = linear(tmp_path / "drop" / "net.xml")
    xml = folder / "net.xml"
    body = xml.read_text().split("?>\n", 1)[1].replace("<net ", "<body ").replace("</net>", "</body>")
    body = body.replace('name="x"', 'name="inner"').replace('offset="48"', 'offset="60"')
    xml.write_text(xml.read_text().replace("</layers>", f'<layer id="90" name="l" type="Loop">{body}</layer></layers>'))
    with pytest.raises(ModelError, match="60 of at least 72 bytes"):
        plugin.modelium_analyze(folder)
    (folder / "net.bin").write_bytes(bytes(72))
    found = analysed(folder)
    assert [t.name for t in (*found.inputs, *found.outputs)] == ["x", "y"]
    assert found.weights_bytes == 120


def test_what_is_still_arriving(tmp_path: Path) -> None:
    folder = linear(tmp_path / "drop" / "net.xml")
    text, weights = (folder / "net.xml").read_bytes(), (folder / "net.bin").read_bytes()
    whole = plugin.modelium_completeness(folder)
    assert whole is not None and whole.complete and whole.have_bytes == whole.want_bytes == len(text) + 60
    for length in range(text.index(b"<layers>"), len(text.rstrip()) - 1, 7):
        (folder / "net.xml").write_bytes(text[:length])
        said = plugin.modelium_completeness(folder)
        assert said is not None and not said.complete and "middle of its XML" in said.reason, length
    (folder / "net.xml").write_bytes(text)
    (folder / "net.bin").write_bytes(weights[:-1])
    said = plugin.modelium_completeness(folder)
    assert said is not None and said.reason == "net.bin has 59 of at least 60 bytes: copy it again, whole"
    assert said.want_bytes == len(text) + 60
    (folder / "net.bin").unlink()
    with pytest.raises(ModelError, match="copy it into the folder"):
        plugin.modelium_analyze(folder)
    with pytest.raises(ModelError, match="drop a folder that holds both"):
        plugin.modelium_analyze(folder / "net.xml")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (('version="11"', 'version="7"'), "version 7"),
        (("<net ", '<!DOCTYPE net [<!ENTITY a "aaaa">]><net '), "document type"),
        (("<net ", '<!DOCTYPE net SYSTEM "file:///etc/passwd"><net '), "document type"),
        (("</layers>", "</net>"), "damaged"),
        (('size="48"', 'size="many"'), "whole number"),
        (('size="48"', f'size="{"9" * 19}"'), "whole number"),
        (("<dim>4</dim>", "<dim>four</dim>"), "whole number"),
        (('type="Result"', 'type="Other"'), "gives nothing"),
        (('element_type="f32"', 'element_type="string"'), "element type 'string'"),
        (('shape="?,4"', 'shape="..."'), "any number of dimensions"),
        (("<layers>", "<layers>" + "<a>" * 70), "too many or too deep"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, change: tuple[str, str], reason: str) -> None:
    folder = linear(tmp_path / "drop" / "net.xml")
    text = (folder / "net.xml").read_text()
    assert change[0] in text
    text = text.replace(*change, 1)
    if "..." in change[1]:  # a tensor of any rank has no dimensions either
        text = text.replace("<dim>-1</dim><dim>4</dim>", "", 1)
    (folder / "net.xml").write_text(text)
    with pytest.raises(ModelError, match=reason) as caught:
        plugin.modelium_analyze(folder)
    assert "stops in the middle" not in caught.value.message


def test_a_state_between_requests_is_not_served(tmp_path: Path) -> None:
    folder = linear(tmp_path / "drop" / "net.xml")
    text = (folder / "net.xml").read_text()
    (folder / "net.xml").write_text(text.replace("</layers>", '<layer id="9" name="s" type="ReadValue"/></layers>'))
    assert "keeps a state" in analysed(folder).facts["unsupported"]


def test_the_one_among_several(tmp_path: Path) -> None:
    for name in ("a.xml", "b.xml"):
        linear(tmp_path / "drop" / name)
    with pytest.raises(ModelError, match=r"2 OpenVINO models \(a\.xml, b\.xml\)"):
        plugin.modelium_analyze(tmp_path / "drop")
    linear(tmp_path / "drop" / "openvino_model.xml")
    assert analysed(tmp_path / "drop").entry == "openvino_model.xml"
    linear(tmp_path / "deep" / "sub" / "net.xml")
    assert analysed(tmp_path / "deep").entry == "sub/net.xml"


def test_what_is_not_ours_is_left_to_others(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.xml").write_text("<?xml version='1.0'?><network><layers/></network>")
    (tmp_path / "other" / "x.bin").write_bytes(b"x")
    linear(tmp_path / "triton" / "1" / "model.xml")
    (tmp_path / "triton" / "config.pbtxt").write_text("")
    for name in ("other", "triton"):
        assert plugin.modelium_analyze(tmp_path / name) is None
        assert plugin.modelium_completeness(tmp_path / name) is None
    assert plugin.modelium_analyze(tmp_path / "other" / "x.bin") is None


def test_weights_that_look_like_a_pickle_by_chance(tmp_path: Path) -> None:
    """`c` asks for a name in a pickle; here it is a part of a number."""
    folder = linear(tmp_path / "drop" / "net.xml")
    (folder / "net.bin").write_bytes(b"cabc\ndef\n." + bytes(50))
    assert PluginHost.load(entry_points=False).scan(folder) == ()
    (folder / "other.bin").write_bytes(b"cabc\ndef\n." + bytes(50))
    assert [f.path for f in scanners.modelium_scan(folder)] == ["other.bin"]
    with pytest.raises(NotOpenVino):
        (folder / "net.xml").write_text("<net version='3'></net>")
        plugin.modelium_analyze(folder)
