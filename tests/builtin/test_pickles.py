from __future__ import annotations

import io
import pickle
import subprocess
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

from modelium.builtin import pickles, torch_file
from modelium.builtin.files import Truncated
from modelium.builtin.pickles import Refused, load, survey
from modelium.builtin.torch_file import Kind, kind_of, read_checkpoint, survey_file
from modelium.errors import ModelError
from tests.builtin.making import Touch, evil_pickle, zip_checkpoint

MARK, STOP = b"(", b"."


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def tensor(shape: str, stride: str, *, offset: bytes = b"K\x00", count: bytes = b"K\x06", key: str = "0") -> bytes:
    """A call of _rebuild_tensor_v2 on a storage of `count` floats; shapes are pickled numbers between brackets."""
    storage = MARK + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + count + b"tQ"
    ints = {name: MARK + b"".join(b"I%d\n" % int(n) for n in value.split()) + b"t" for name, value in
            (("shape", shape), ("stride", stride))}  # fmt: skip
    call = MARK + storage + offset + ints["shape"] + ints["stride"] + b"\x89N" + b"t"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + call + b"R"


def run(data: bytes) -> Any:
    return load(io.BytesIO(data))


@pytest.mark.parametrize(
    "value",
    [
        None, True, 0, -5, 2**40, 2**200, 1.5, "text", b"bytes", [1, [2]], (1, 2, 3, 4), {"a": {"b": 1}},
        {"k": [None, (True, False)]}, "x" * 300, [1] * 2000, ("a",), ("a", "b"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_are_read_as_python_reads_them(value: Any, protocol: int) -> None:
    if isinstance(value, bytes) and protocol < 3:  # old protocols have bytes as a call, which weights never make
        with pytest.raises(Refused, match=r"_codecs\.encode"):
            run(pickle.dumps(value, protocol))
        return
    assert run(pickle.dumps(value, protocol)) == value


def test_a_state_dict_that_is_an_ordered_dict() -> None:
    value = OrderedDict(a=1)
    value._metadata = {"version": 1}  # type: ignore[attr-defined]
    assert run(pickle.dumps(value, 2)) == {"a": 1}


def test_every_way_to_lie_in_a_storage(torch_files: Path) -> None:
    found = read_checkpoint(torch_files / "state_dict.pt").tensors
    assert found["plain"].storage == found["tied"].storage == found["row"].storage
    assert (found["transposed"].shape, found["transposed"].stride) == ((4, 6), (1, 4))
    assert found["row"].offset == 8
    assert found["repeated"].stride == (0, 1)
    assert (found["bfloat"].dtype, found["float8"].dtype, found["flags"].dtype) == ("BF16", "F8_E4M3", "BOOL")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("state_dict.pt", Kind.CHECKPOINT),
        ("legacy.pt", Kind.LEGACY),
        ("script.pt", Kind.TORCHSCRIPT),
        ("whole_module.pt", Kind.CHECKPOINT),
        ("expected.safetensors", Kind.OTHER),
    ],
)
def test_kinds_of_files(torch_files: Path, name: str, kind: Kind) -> None:
    assert kind_of(torch_files / name) is kind


def test_weights_ask_for_nothing_foreign(torch_files: Path) -> None:
    for name in ("state_dict.pt", "legacy.pt", "bert/pytorch_model.bin"):
        found = survey_file(torch_files / name, kind_of(torch_files / name))
        assert (found.foreign, found.problem) == ([], ""), name
        assert found.names


def test_a_whole_module_asks_for_its_class(torch_files: Path) -> None:
    found = survey_file(torch_files / "whole_module.pt", Kind.CHECKPOINT)
    assert "torch.nn.modules.linear.Linear" in found.foreign
    with pytest.raises(Refused, match=r"asks for torch.nn.modules.linear.Linear"):
        read_checkpoint(torch_files / "whole_module.pt")


def test_more_than_a_state_dict(torch_files: Path) -> None:
    with pytest.raises(ModelError, match=r"holds more than weights \(dict under 'state_dict'\)"):
        read_checkpoint(torch_files / "training.pt")
    with pytest.raises(Refused, match="_rebuild_sparse_tensor"):
        read_checkpoint(torch_files / "sparse.pt")


# --------------------------------------------------------------------------- pickles made to harm


class Popen:
    def __reduce__(self) -> tuple[Any, ...]:
        return subprocess.Popen, (["touch", "/nonexistent/marker"],)


class Evaluated:
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("open('/nonexistent/marker', 'w')",)


@pytest.mark.parametrize("protocol", range(6))
def test_a_call_is_named_and_not_made(tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "marker"
    data = evil_pickle(marker, protocol)
    assert survey(io.BytesIO(data)).foreign == ["posix.system"]
    with pytest.raises(Refused, match=r"asks for posix\.system"):
        run(data)
    assert not marker.exists()
    pickle.loads(data)
    assert marker.exists()  # the sample does harm where pickle itself reads it


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (pickle.dumps(Popen()), "subprocess.Popen"),
        (pickle.dumps(Evaluated()), "builtins.eval"),
        (b"cos\nsystem\n(S'id'\ntR.", "os.system"),
        (b"(S'id'\nios\nsystem\n.", "os.system"),  # INST
        (b"(cos\nsystem\nS'id'\no.", "os.system"),  # OBJ
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02id\x85R.", "os.system"),  # STACK_GLOBAL
        (b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94h\x00h\x01\x93.", "os.system"),  # by way of the memo
        (b"\x80\x04K\x01K\x02\x93.", "a name made.at run time"),  # neither module nor name are text
        (b"\x80\x02\x82\x01.", "copyreg.extension 1"),  # EXT1
        (b"\x80\x02cos\nsystem\n)\x81.", "os.system"),  # NEWOBJ
        (b"\x80\x04cos\nsystem\n)}\x92.", "os.system"),  # NEWOBJ_EX
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\ncos\nsystem\n\x86R.", "os.system"),
        (b"\x80\x02ctorch.storage\n_load_from_bytes\n(C\x01xtR.", "torch.storage._load_from_bytes"),
    ],
)
def test_every_way_to_name_something(data: bytes, name: str) -> None:
    assert name in survey(io.BytesIO(data)).foreign
    with pytest.raises(Refused):
        run(data)


def test_what_follows_a_harmless_pickle_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "two.pkl"
    path.write_bytes(pickle.dumps({"a": 1}) + pickle.dumps(Touch(tmp_path / "marker")))
    assert survey_file(path, kind_of(path)).foreign == ["posix.system"]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x80\x02}", "damaged or cut short"),
        (b"\x80\x02K\x01", "damaged or cut short"),
        (b"\x80\x02.", "damaged or cut short"),
        (b"\x80\x02h\x05.", "damaged or cut short"),  # a memo that is empty
        (b"\x80\x02\x85.", "damaged or cut short"),
        (b"\x80\x02(K\x01K\x02u.", "damaged or cut short"),
        (b"\x80\x02)K\x01a.", "no list"),
        (b"\x80\x02]K\x01K\x02s.", "no dict"),
        (b"\x80\x02}))s.", "neither names nor numbers"),
        (b"\x80\x02]}b.", "state of an object"),
        (b"\x80\x02K\x01Q.", "no storage of a tensor"),
        (b"\x80\x02Pid\n.", "PERSID"),
        (b"\x80\x05\x97.", "NEXT_BUFFER"),
        (b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b".", "single value of"),
        (b"\xff\xff", "damaged or cut short"),
        (b"", "damaged or cut short|has no end"),
    ],
)
def test_broken_pickles_end_in_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        run(data)
    survey(io.BytesIO(data))  # and a survey never fails


def test_a_pickle_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "MAX_OPCODES", 1000)
    with pytest.raises(Refused, match="more than 1000 steps"):
        run(b"\x80\x02" + b"N0" * 1000 + b"N.")


def test_nesting_without_end_is_no_trouble() -> None:
    value = run(b"\x80\x02)" + b"\x85" * 200_000 + b".")
    assert isinstance(value, tuple)


@pytest.mark.parametrize(
    ("shape", "stride", "more"),
    [
        ("2 3", "3 1", {"offset": b"K\x01"}),  # one beyond the end
        ("7", "1", {}),
        ("2 3", "4 1", {}),
        ("-1", "1", {}),
        ("2", "-1", {}),
        ("2 3", "3", {}),
        ("2", "1", {"offset": b"J\xff\xff\xff\xff"}),
        ("2", "1", {"count": b"J\xff\xff\xff\xff"}),
        (str(2**70), "0", {}),
        (" ".join(["1"] * 65), " ".join(["1"] * 65), {}),
    ],
)
def test_tensors_lie_in_their_storages(shape: str, stride: str, more: dict[str, bytes]) -> None:
    whole = run(b"\x80\x02" + tensor("2 3", "3 1") + STOP)
    assert (whole.shape, whole.stride, whole.offset) == ((2, 3), (3, 1), 0)
    with pytest.raises(Refused):
        run(b"\x80\x02" + tensor(shape, stride, **more) + STOP)  # type: ignore[arg-type]


def test_a_storage_has_one_size() -> None:
    with pytest.raises(Refused, match="two sizes"):
        run(b"\x80\x02" + tensor("1", "1") + tensor("1", "1", count=b"K\x07") + b"\x86.")


# --------------------------------------------------------------------------- files


def test_a_zip_without_its_numbers(tmp_path: Path) -> None:
    data = b"\x80\x02}" + text("a") + tensor("2 3", "3 1") + b"s."
    checkpoint = read_checkpoint(zip_checkpoint(tmp_path / "x.pt", data))
    with pytest.raises(ModelError, match="lacks its storage '0'"), checkpoint.storage(checkpoint.tensors["a"].storage):
        pass
    checkpoint = read_checkpoint(zip_checkpoint(tmp_path / "y.pt", data, {"data/0": bytes(20)}))
    with (
        pytest.raises(ModelError, match="has 20 bytes, and its tensors need 24"),
        checkpoint.storage(checkpoint.tensors["a"].storage),
    ):
        pass


def test_a_big_endian_checkpoint(tmp_path: Path) -> None:
    path = zip_checkpoint(tmp_path / "x.pt", b"\x80\x02}.")
    data = path.read_bytes().replace(b"little", b"bigbig")
    path.write_bytes(data)
    with pytest.raises(ModelError):
        read_checkpoint(path)


def test_a_description_that_unpacks_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_file, "MAX_PICKLE_BYTES", 1000)
    path = zip_checkpoint(tmp_path / "x.pt", b"\x80\x02" + b"N0" * 1000 + b"N.")
    monkeypatch.setattr(torch_file.zip_entry, "__defaults__", (1000,))
    with pytest.raises(ModelError, match="has more than"):
        read_checkpoint(path)


def test_a_legacy_file_cut_anywhere(tmp_path: Path, torch_files: Path) -> None:
    whole = (torch_files / "legacy.pt").read_bytes()
    path = tmp_path / "x.pt"
    path.write_bytes(whole)
    assert read_checkpoint(path).file_bytes == len(whole)
    for kept in range(200, len(whole), 101):
        path.write_bytes(whole[:kept])
        with pytest.raises(Truncated):
            read_checkpoint(path)
