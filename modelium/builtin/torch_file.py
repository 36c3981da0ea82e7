"""What PyTorch writes, told apart and read without PyTorch: TorchScript, checkpoints, and the pickles of old.

Since 1.6 `torch.save` writes a zip without compression: `<root>/data.pkl` describes, `<root>/data/<key>` holds the
numbers. Before that it wrote five pickles (a magic number, the protocol, the machine's sizes, the value, the storages'
keys) and then each storage as its count of elements, 8 bytes, and its numbers. `torch.jit.save` writes such a zip with
`<root>/constants.pkl` and the program under `<root>/code/`. See torch/serialization.py and
caffe2/serialize/ in PyTorch.
"""

from __future__ import annotations

import io
import lzma
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO

from modelium.api.units import human
from modelium.builtin.files import Truncated, head
from modelium.builtin.pickles import Refused, Storage, Survey, TensorView, load, survey
from modelium.errors import ModelError

MAX_PICKLE_BYTES = 64 << 20
"""A description of fifty thousand tensors has about 8 MB."""

LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""torch.serialization.MAGIC_NUMBER as a pickle, after its two bytes of protocol."""

ZIP_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")


class Kind(StrEnum):
    TORCHSCRIPT = "torchscript"
    CHECKPOINT = "checkpoint"
    EXPORTED = "exported program"
    LEGACY = "legacy checkpoint"
    PICKLE = "pickle"
    ZIP = "zip"
    OTHER = ""


def kind_of(path: Path) -> Kind:
    """What a file is, by its own bytes. Raises `Truncated` for a zip that has no end."""
    start = head(path, 16)
    if start[:4] in ZIP_MAGIC:
        with open_zip(path) as archive:
            return _zip_kind(archive.namelist())
    if start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05" and len(start) > 2:
        return Kind.LEGACY if start[2:].startswith(LEGACY_MAGIC) else Kind.PICKLE
    return Kind.OTHER


def _zip_kind(names: list[str]) -> Kind:
    roots = {name.removesuffix("data.pkl") for name in names if name.rpartition("/")[2] == "data.pkl"}
    for root in sorted(r for r in roots if r.count("/") <= 1):
        script = f"{root}constants.pkl" in names and any(n.startswith(f"{root}code/") for n in names)
        return Kind.TORCHSCRIPT if script else Kind.CHECKPOINT
    if any(n.rpartition("/")[2] == "archive_format" for n in names):
        return Kind.EXPORTED
    return Kind.ZIP


@contextmanager
def open_zip(path: Path, name: str | None = None) -> Iterator[zipfile.ZipFile]:
    """The archive at `path`. Raises `Truncated` where the list at its end is missing, `ModelError` where it is bad."""
    name = name or path.name
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if len(set(names)) != len(names):  # of two, one reader takes the first and another the last
                raise ModelError(f"{name} is an archive that holds two entries of one name: it was tampered with")
            yield archive
    except zipfile.BadZipFile as exc:
        if "File is not a zip file" in str(exc):
            size = path.stat().st_size
            raise Truncated(
                f"{name} begins as a zip archive and has no end: {human(size)} of it are here; copy it again, whole",
                size,
            ) from exc
        raise ModelError(f"{name} is a damaged zip archive: {exc}") from exc
    except (RuntimeError, NotImplementedError, zlib.error, lzma.LZMAError, struct.error, EOFError, ValueError) as exc:
        raise ModelError(f"{name} is a zip archive that can't be read: {exc}") from exc
    except OSError as exc:
        raise ModelError(f"{name} can't be read: {exc}", code="unreadable") from exc


def zip_entry(archive: zipfile.ZipFile, name: str, limit: int = MAX_PICKLE_BYTES) -> bytes:
    """One entry whole. Raises `ModelError` beyond `limit`, whatever the archive's list says of its size."""
    with archive.open(name) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ModelError(f"{name} in the archive has more than {human(limit)}, which such a file never needs")
    return data


def survey_archive(archive: zipfile.ZipFile, result: Survey) -> None:
    """What the pickles in an archive ask for, by their suffix."""
    for info in archive.infolist():
        if info.filename.endswith((".pkl", ".pickle")):
            survey(io.BytesIO(zip_entry(archive, info.filename)), result)


def survey_file(path: Path, kind: Kind) -> Survey:
    """What all pickles in a file ask for, none of them run."""
    result = Survey()
    if kind is Kind.TORCHSCRIPT:  # its pickles are read by PyTorch's C++ reader, which knows no Python names
        return result
    if kind in (Kind.CHECKPOINT, Kind.ZIP, Kind.EXPORTED):
        with open_zip(path) as archive:
            survey_archive(archive, result)
        return result
    with path.open("rb") as file:
        for _ in range(5 if kind is Kind.LEGACY else 100):
            survey(file, result)
            following = file.read(2)
            if result.problem or len(following) < 2 or following[0] != 0x80 or following[1] not in range(2, 6):
                break
            file.seek(-2, io.SEEK_CUR)
    return result


# --------------------------------------------------------------------------- the weights of a checkpoint


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A state dict, and where its numbers lie."""

    path: Path
    tensors: Mapping[str, TensorView]
    root: str
    """Of the zip; unused when legacy."""
    places: Mapping[str, int]
    """Where each storage's numbers begin, legacy only."""
    file_bytes: int
    """What the file must have; 0 for a zip, which says so by itself."""

    @contextmanager
    def storage(self, storage: Storage) -> Iterator[BinaryIO]:
        """A stream of a storage's bytes, from its first. Raises `ModelError` where they are not there."""
        if self.places:
            with self.path.open("rb") as file:
                file.seek(self.places[storage.key])
                yield file
            return
        with open_zip(self.path) as archive:
            try:
                info = archive.getinfo(f"{self.root}data/{storage.key}")
            except KeyError as exc:
                raise ModelError(f"{self.path.name} lacks its storage {storage.key!r:.40}") from exc
            if info.file_size != storage.nbytes:
                raise ModelError(
                    f"{self.path.name}: storage {storage.key} has {info.file_size} bytes, and its tensors need "
                    f"{storage.nbytes}: it is damaged"
                )
            with archive.open(info) as stream:
                yield stream  # type: ignore[misc]


def read_checkpoint(path: Path) -> Checkpoint:
    """The tensors of a state dict, as views; their numbers are not read.

    Raises `Refused` when the pickle asks for more than tensors, `Truncated` when the file is cut short, `ModelError`
    when it holds something else than a state dict.
    """
    kind = kind_of(path)
    if kind is Kind.CHECKPOINT:
        return _read_zip(path)
    if kind is Kind.LEGACY:
        return _read_legacy(path)
    raise ModelError(f"{path.name} is no PyTorch checkpoint{f' but a {kind}' if kind else ''}: it can't be converted")


def _read_zip(path: Path) -> Checkpoint:
    with open_zip(path) as archive:
        names = archive.namelist()
        roots = sorted({n.removesuffix("data.pkl") for n in names if n.rpartition("/")[2] == "data.pkl"})
        if len(roots) != 1:
            raise ModelError(f"{path.name} holds {len(roots)} checkpoints, and one was expected")
        order = f"{roots[0]}byteorder"
        if order in names and zip_entry(archive, order, 64) != b"little":
            raise ModelError(f"{path.name} was written on a big-endian machine: convert it there to safetensors")
        value = load(io.BytesIO(zip_entry(archive, f"{roots[0]}data.pkl")))
    return Checkpoint(path, _state_dict(value, path.name), roots[0], {}, 0)


def _read_legacy(path: Path) -> Checkpoint:
    size = path.stat().st_size
    storages: dict[str, Storage] = {}
    with path.open("rb") as file:
        try:
            load(file)
            protocol = load(file)
            sizes = load(file)
            value = load(file, storages)
            keys = load(file)
            position = file.tell()
        except Refused as exc:
            if exc.message.startswith("the pickle is damaged") and file.tell() >= size:
                raise Truncated(f"{path.name} ends inside its description of the weights", size) from exc
            raise
        if protocol != 1001 or not isinstance(sizes, dict) or not sizes.get("little_endian"):
            raise ModelError(f"{path.name} is in PyTorch's old format, of a kind that is not known: save it again")
        tensors = _state_dict(value, path.name)
        if not isinstance(keys, list) or not all(isinstance(k, str) for k in keys) or set(keys) != storages.keys():
            raise ModelError(f"{path.name}: its list of storages is not that of its tensors: it is damaged")
        places: dict[str, int] = {}
        for key in keys:
            file.seek(position)
            count = int.from_bytes(file.read(8), "little")
            if position + 8 <= size and count != storages[key].count:
                raise ModelError(f"{path.name}: storage {key} has {count} elements, not {storages[key].count}")
            places[key] = position + 8
            position += 8 + storages[key].nbytes
    if size < position:
        raise Truncated(
            f"{path.name} has {size} of the {position} bytes that its own description announces: copy it again, whole",
            size,
            position,
        )
    return Checkpoint(path, tensors, "", places, position)


def _state_dict(value: Any, name: str) -> dict[str, TensorView]:
    if not isinstance(value, dict) or not value:
        raise ModelError(f"{name} holds no state dict: save the model's `state_dict()` alone")
    for key, tensor in value.items():
        if not isinstance(key, str) or not isinstance(tensor, TensorView):
            what = f"{type(tensor).__name__} under {key!r:.60}"
            raise ModelError(f"{name} holds more than weights ({what}): save the model's `state_dict()` alone")
    return value
