"""Knows what is no model that can be served here, so that its owner is told what it is and what to do with it.

Each claim has a low confidence and a reason in `facts["unsupported"]`: a plugin that serves such a format claims it
with more, or offers a runtime for it, and this one is then not heard.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from modelium.api import Analysis, Completeness, hookimpl
from modelium.api.units import human
from modelium.builtin import hf_folder
from modelium.builtin.files import Entry, Truncated, files, head
from modelium.builtin.safetensors_header import NAMES, read_header
from modelium.builtin.torch_file import ZIP_MAGIC, Kind, kind_of
from modelium.errors import ModelError

CONFIDENCE = 0.2


@dataclass(frozen=True, slots=True)
class Known:
    format: str
    what: str
    """`this is ...`."""
    advice: str


_ONNX = "export it to ONNX"
GGUF = Known(
    "gguf",
    "a GGUF model for llama.cpp",
    "`pip install modelium-plugin-llamacpp`, or drop the Hugging Face folder that it was made from, with safetensors",
)
TENSORRT = Known(
    "tensorrt",
    "a TensorRT engine, which runs only on the kind of GPU and the version that it was built for",
    "put it into a Triton model directory (config.pbtxt with platform: tensorrt_plan, 1/model.plan) and drop that",
)
KERAS = Known("keras", "a Keras model", f"{_ONNX} (tf2onnx, or model.export(..., format='onnx')) and drop that")
SAVED_MODEL = Known(
    "saved-model",
    "a TensorFlow SavedModel",
    f"{_ONNX} (python -m tf2onnx.convert --saved-model), or drop a Triton model directory for the tensorflow backend",
)
TFLITE = Known("tflite", "a TensorFlow Lite model", f"{_ONNX} (python -m tf2onnx.convert --tflite) and drop that")
NUMPY = Known(
    "numpy", "a file of numpy arrays, which are weights without a model", f"{_ONNX} from the program that made it"
)
CHECKPOINT = Known(
    "torch-checkpoint",
    "a PyTorch checkpoint: weights without the model that they belong to",
    "put it into a folder with its Hugging Face config.json and tokenizer, or save the model with torch.jit.save or "
    "torch.onnx.export, and drop that",
)
EXPORTED = Known("torch-export", "a program of torch.export", "save it with torch.onnx.export, and drop that")
PICKLE = Known("pickle", "a Python pickle", f"{_ONNX} (for scikit-learn, skl2onnx) and drop that")
SAFETENSORS = Known(
    "safetensors",
    "a safetensors file: weights without the model that they belong to",
    "put it into a folder with its Hugging Face config.json and tokenizer, named model.safetensors, and drop that",
)
ARCHIVE = Known("archive", "an archive", "unpack it and drop the model that is in it")
DIFFUSERS = Known("diffusers", "a pipeline of diffusers", "drop a Triton model directory that runs it")
ADAPTER = Known(
    "peft",
    "an adapter (PEFT, LoRA) without the model that it adapts",
    "merge it (model.merge_and_unload()), save the result with save_pretrained, and drop that",
)
BOOSTED = Known("boosted-trees", "a model of boosted trees", f"{_ONNX} (onnxmltools) and drop that")
CORE_ML = Known("core-ml", "a Core ML model, which runs on Apple's systems only", f"{_ONNX} from where it was made")

MAGICS: Sequence[tuple[int, bytes, Known]] = (
    (0, b"GGUF", GGUF),
    (0, b"ftrt", TENSORRT),
    (0, b"\x89HDF\r\n\x1a\n", KERAS),
    (4, b"TFL3", TFLITE),
    (0, b"\x93NUMPY", NUMPY),
    (0, b"\x1f\x8b", ARCHIVE),
    (0, b"BZh", ARCHIVE),
    (0, b"\xfd7zXZ\x00", ARCHIVE),
    (0, b"\x28\xb5\x2f\xfd", ARCHIVE),
    (0, b"7z\xbc\xaf\x27\x1c", ARCHIVE),
    (257, b"ustar", ARCHIVE),
)
"""Place, bytes, and what a file that has them is."""

SUFFIXES: Sequence[tuple[tuple[str, ...], Known]] = (
    ((".gguf", ".ggml"), GGUF),
    ((".plan", ".engine", ".trt"), TENSORRT),
    ((".h5", ".keras", ".hdf5"), KERAS),
    ((".tflite",), TFLITE),
    ((".npz", ".npy"), NUMPY),
    ((".pt2",), EXPORTED),
    ((".pkl", ".pickle", ".joblib"), PICKLE),
    ((".safetensors",), SAFETENSORS),
    ((".ubj", ".cbm", ".xgb"), BOOSTED),
    ((".mlmodel", ".mlpackage"), CORE_ML),
    ((".tar", ".tar.gz", ".tgz", ".zip", ".mar", ".nemo", ".7z", ".rar"), ARCHIVE),
)
"""Asked only of files that no magic number told apart."""

KINDS = {Kind.CHECKPOINT: CHECKPOINT, Kind.LEGACY: CHECKPOINT, Kind.EXPORTED: EXPORTED, Kind.PICKLE: PICKLE}

FOLDERS: Sequence[tuple[Callable[[set[str]], bool], Known]] = (
    (lambda names: "saved_model.pb" in names, SAVED_MODEL),
    (lambda names: "model_index.json" in names, DIFFUSERS),
    (lambda names: "adapter_config.json" in names and "config.json" not in names, ADAPTER),
)
"""Asked of the names of the files that lie directly in a dropped folder, or in the only folder in it."""


@hookimpl
def modelium_completeness(path: Path) -> Completeness | None:
    """Safetensors files say how long they are, also where nothing else of the drop is known yet."""
    here = [e for e in files(path) if e.base.endswith(".safetensors")]
    have = want = 0
    reason = ""
    for entry in here:
        have += entry.size
        try:
            want += read_header(entry.path, entry.name).file_bytes
        except Truncated as exc:
            want += exc.want_bytes or entry.size
            reason = reason or exc.message
        except ModelError:
            want += entry.size
    if reason:
        return Completeness(complete=False, reason=reason, have_bytes=have, want_bytes=want)
    if here and not path.is_dir():
        return Completeness(complete=True, have_bytes=have, want_bytes=want)
    return None


@hookimpl
def modelium_analyze(path: Path) -> Analysis | None:
    """Name what it is, and say what its owner can do."""
    found = files(path)
    if not found:
        return None
    known, entry = _folder(path, found) if path.is_dir() else (_file(found[0]), found[0])
    if known is None:
        return None
    size = sum(e.size for e in found)
    summary = f"{known.what}, {human(size)}"
    if known is SAFETENSORS and entry is not None:
        header = read_header(entry.path, entry.name)
        dtypes = header.bytes_by_dtype().most_common(1)
        dtype = NAMES.get(dtypes[0][0], dtypes[0][0]) if dtypes else "no dtype"
        summary = f"{len(header.shapes)} tensors, {header.parameters} numbers, {dtype}"
    name = f"{path.name}: {entry.name}" if path.is_dir() and entry is not None else path.name
    return Analysis(
        analyzer="recognised",
        format=known.format,
        summary=summary,
        confidence=CONFIDENCE,
        entry=entry.name if path.is_dir() and entry is not None else "",
        weights_bytes=size,
        facts={"unsupported": f"{name} is {known.what}; Modelium has no runtime for it here: {known.advice}"},
    )


def _folder(path: Path, found: Sequence[Entry]) -> tuple[Known | None, Entry | None]:
    names = {e.name for e in found}
    if "config.pbtxt" in names or any(n.lower().endswith(".onnx") for n in names):
        return None, None
    tops = {n.split("/", 1)[0] for n in names if "/" in n}
    if len(tops) == 1 and all("/" in n for n in names):
        names = {n.split("/", 1)[1] for n in names}
    for matches, known in FOLDERS:
        if matches(names):
            return known, None
    if _is_hugging_face(path):
        return None, None
    several = [(kind, e) for e in found if (kind := _file(e)) is not None]
    weights = [pair for pair in several if pair[0] not in (ARCHIVE, NUMPY, PICKLE)] or several
    return max(weights, key=lambda pair: pair[1].size, default=(None, None))


def _is_hugging_face(path: Path) -> bool:
    try:
        return hf_folder.find(path) is not None
    except ModelError:
        return True  # it has a config.json that is not right: the analyzer of such folders says so


def _file(entry: Entry) -> Known | None:
    start = head(entry.path, 262)
    lower = entry.base.lower()
    known = next((k for place, magic, k in MAGICS if start[place : place + len(magic)] == magic), None)
    by_suffix = next((k for suffixes, k in SUFFIXES if lower.endswith(suffixes)), None)
    if known is ARCHIVE and by_suffix in (PICKLE, BOOSTED):  # joblib compresses its pickles
        return by_suffix
    if known is not None:
        return known
    if start[:4] in ZIP_MAGIC or start[:1] == b"\x80":
        kind = kind_of(entry.path)
        if kind is Kind.TORCHSCRIPT:
            return None
        if kind in KINDS:
            return KINDS[kind]
        if kind is Kind.ZIP:
            return by_suffix if by_suffix in (KERAS, NUMPY) else ARCHIVE
    return by_suffix
