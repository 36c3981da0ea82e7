"""Turns a Hugging Face folder with pickled weights into one with safetensors, without PyTorch and without unpickling.

The description of the weights is read by the interpreter of `pickles`, which can do no more than describe tensors;
their numbers are copied as bytes. It runs in a process of its own, with limits that the engine sets.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from modelium.api import Converter, hookimpl
from modelium.api.units import human
from modelium.builtin import hf_folder
from modelium.builtin.files import files
from modelium.builtin.safetensors_writer import write_index, write_safetensors
from modelium.builtin.torch_file import Checkpoint, read_checkpoint
from modelium.errors import ConfigError, ModelError

LEFT_OUT = (".py", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".ot", ".onnx", ".tflite",
            ".safetensors")  # fmt: skip
"""Weights in any other form, and programs: the copy has no use for them."""


class PickleConverter:
    name = "pickle"

    def accepts(self, path: Path, codes: Sequence[str]) -> bool:
        """A Hugging Face folder whose weights are pickles, where nothing else is in the way."""
        if set(codes) != {"pickle"}:
            return False
        try:
            folder = hf_folder.find(path)
            return folder is not None and hf_folder.find_weights(folder).kind == "pickle"
        except ModelError:
            return False

    def convert(self, path: Path, target: Path) -> str:
        """Write the folder anew at `target` (which must not exist), its weights as safetensors.

        Raises `ModelError` when the weights are not tensors alone, `ModeliumError` (code `storage`) when `target` can't
        be written; what was written until then is removed.
        """
        folder = hf_folder.find(path)
        if folder is None:
            raise ModelError(f"{path.name} is no Hugging Face folder: there is nothing here to convert")
        weights = hf_folder.find_weights(folder)
        if weights.kind != "pickle" or not all(weights.shards.values()):
            raise ModelError(f"{path.name} does not hold all of its pickled weights: there is nothing to convert yet")
        checkpoints = [read_checkpoint(entry.path) for entry in weights.shards.values() if entry]
        _check_names(checkpoints)
        try:
            target.mkdir()
            try:
                _copy_rest(folder, target)
                total = _write(checkpoints, target)
            except BaseException:
                shutil.rmtree(target, ignore_errors=True)
                raise
        except OSError as exc:
            raise ConfigError(f"{target} can't be written: {exc.strerror}", code="storage") from exc
        count = sum(len(c.tensors) for c in checkpoints)
        return f"{count} tensors ({human(total)}) of {', '.join(weights.shards)} were written as safetensors"


def _check_names(checkpoints: Sequence[Checkpoint]) -> None:
    seen: dict[str, str] = {}
    for checkpoint in checkpoints:
        for name in checkpoint.tensors:
            if name in seen:
                raise ModelError(f"tensor {name!r:.80} is in both {seen[name]} and {checkpoint.path.name}")
            seen[name] = checkpoint.path.name


def _copy_rest(folder: hf_folder.Folder, target: Path) -> None:
    """Configuration, tokenizer and the like; links inside the drop become the files that they lead to."""
    for entry in files(folder.drop):
        if not entry.name.startswith(folder.prefix) or entry.base.lower().endswith(LEFT_OUT):
            continue
        if entry.base in (hf_folder.PICKLE_INDEX, hf_folder.INDEX):
            continue
        place = target / entry.name.removeprefix(folder.prefix)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(entry.path, place)


def _write(checkpoints: Sequence[Checkpoint], target: Path) -> int:
    if len(checkpoints) == 1:
        return write_safetensors(checkpoints[0], target / hf_folder.SINGLE)
    total = 0
    weight_map: dict[str, str] = {}
    for number, checkpoint in enumerate(checkpoints, 1):
        name = f"model-{number:05}-of-{len(checkpoints):05}.safetensors"
        total += write_safetensors(checkpoint, target / name)
        weight_map |= dict.fromkeys(checkpoint.tensors, name)
    write_index(target / hf_folder.INDEX, weight_map, total)
    return total


@hookimpl
def modelium_converters() -> Iterable[Converter]:
    """The converter of pickled weights."""
    return [PickleConverter()]
