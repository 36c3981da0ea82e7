"""Tiny models of every kind that Modelium serves, made on the spot, and what the original library says they answer.

Writing ONNX needs `onnx` alone. The others need torch and transformers, which the service's environment lacks: their
functions take the path of a Python that has them, where this file runs as a program of its own and is asked line by
line, so that the libraries are imported once.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

HUGGINGFACE = ("text-generation", "text-classification", "feature-extraction", "image-classification")

TORCHSCRIPT = (
    "torchscript", "torchscript-image", "torchscript-tokens", "torchscript-bfloat16", "torchscript-options",
)  # fmt: skip
"""A vector to another; an image to classes; token ids and a mask to two outputs; the first in bfloat16; and a script
with a number and a switch that may be left out, which gives a dictionary."""

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


# --------------------------------------------------------------------------- ONNX


def onnx_linear(path: Path, *, external: bool = False, fixed_batch: int | None = None) -> Path:
    """`y = x W + b`, from `x` FP32 [batch, 4] to `y` FP32 [batch, 3]; W is 1 to 12 by rows, b is (0.5, 1, 1.5).

    `path` is the file to write; with `external` the weights lie beside it in `<file>.data`.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper, save

    weights = [
        numpy_helper.from_array(np.arange(1, 13, dtype=np.float32).reshape(4, 3), "W"),
        numpy_helper.from_array(np.array([0.5, 1.0, 1.5], np.float32), "b"),
    ]
    batch = fixed_batch or "batch"
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "W", "b"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 3])],
        weights,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    # Version 10 of the format and opset 17 are read by every onnxruntime since 1.18.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    save(
        model, path, save_as_external_data=external, all_tensors_to_one_file=True, location=f"{path.name}.data",
        size_threshold=0,
    )  # fmt: skip
    return path


def onnx_image(path: Path) -> Path:
    """`y`, the means of `x` FP32 [batch, 3, height, width], FP32 [batch, 3]; an image has at least 64 by 64 points."""
    from onnx import TensorProto, helper, save

    shrink = helper.make_node("MaxPool", ["x"], ["small"], kernel_shape=[64, 64], strides=[64, 64])
    mean = helper.make_node("ReduceMean", ["small"], ["y"], axes=[2, 3], keepdims=0)
    graph = helper.make_graph(
        [shrink, mean],
        "image",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, "height", "width"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    return path


def onnx_odd(path: Path) -> Path:
    """Everything that is less usual: a scalar, a string, FP16 and BOOL, and an output of unknown rank.

    `words` STRING [n] and `times` INT64 scalar in; `same` STRING [n], `twice` INT64 scalar, `half` FP16 [2],
    `large` BOOL scalar, and `free`, INT64 of no declared shape (`times`, as [1, 1, 1]), out.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper, save

    graph = helper.make_graph(
        [
            helper.make_node("Identity", ["words"], ["same"]),
            helper.make_node("Add", ["times", "times"], ["twice"]),
            helper.make_node("Identity", ["halves"], ["half"]),
            helper.make_node("Greater", ["times", "ten"], ["large"]),
            helper.make_node("Reshape", ["times", "cube"], ["free"]),
        ],
        "odd",
        [
            helper.make_tensor_value_info("words", TensorProto.STRING, ["n"]),
            helper.make_tensor_value_info("times", TensorProto.INT64, []),
        ],
        [
            helper.make_tensor_value_info("same", TensorProto.STRING, ["n"]),
            helper.make_tensor_value_info("twice", TensorProto.INT64, []),
            helper.make_tensor_value_info("half", TensorProto.FLOAT16, [2]),
            helper.make_tensor_value_info("large", TensorProto.BOOL, []),
            helper.make_tensor_value_info("free", TensorProto.INT64, None),
        ],
        [
            numpy_helper.from_array(np.array([0.5, 2.0], np.float16), "halves"),
            numpy_helper.from_array(np.array(10, np.int64), "ten"),
            numpy_helper.from_array(np.array([1, 1, 1], np.int64), "cube"),
        ],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    return path


# --------------------------------------------------------------------------- an input


def png(path: Path, *, width: int = 48, height: int = 40, seed: int = 0) -> Path:
    """A picture of noise, RGB, written without any library."""
    import random
    import struct
    import zlib

    draw = random.Random(seed)
    rows = b"".join(b"\0" + draw.randbytes(3 * width) for _ in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    chunks = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    return path


# --------------------------------------------------------------------------- with another Python


def make(python: Path | str, kind: str, path: Path, **options: Any) -> Path:
    """Write a tiny model of a kind of `HUGGINGFACE` (a folder) or `TORCHSCRIPT` (a file) to `path`.

    Options for Hugging Face: `seed`; `shards` (a number of bytes; more weights than that become several files);
    `tokenizer` False to leave it out; `pooling` (`cls`, `mean`, `max`) to add sentence-transformers' files; `sizes`,
    changes to the model's configuration.
    """
    _other(str(python)).ask("make", kind, str(path), options)
    return path


def original(python: Path | str, kind: str, path: Path, **inputs: Any) -> Any:
    """What the original library answers, as plain JSON; the inputs are those of the `run_` functions below."""
    return _other(str(python)).ask("run", kind, str(path), inputs)


class _Other:
    """This file, running in another Python; it ends when its input does."""

    def __init__(self, python: str):
        self._process = subprocess.Popen(
            [python, str(Path(__file__).resolve())], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        weakref.finalize(self, self._process.terminate)

    def ask(self, *question: Any) -> Any:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the other Python ended with status {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{' '.join(map(str, question))} failed:\n{answer['error']}")
        return answer["value"]


_other = functools.cache(_Other)


def done() -> None:
    """End those that were started."""
    _other.cache_clear()


# --------------------------------------------------------------------------- from here on in that Python


def _tokenizer() -> Any:
    """Bytes as tokens, so that any text can be written and any token be drawn."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<pad>", "<user>", "<assistant>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(special + letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=128,
        additional_special_tokens=["<user>", "<assistant>"],
    )  # fmt: skip


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
LABELS = {0: "cat", 1: "dog", 2: "bird", 3: "fish"}


def make_huggingface(
    kind: str,
    path: Path,
    *,
    seed: int = 0,
    shards: int | None = None,
    tokenizer: bool = True,
    pooling: str | None = None,
    sizes: dict[str, Any] | None = None,
) -> None:
    import torch
    import transformers as t

    torch.manual_seed(seed)
    text = {"vocab_size": 261, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    labels = {"id2label": LABELS, "label2id": {name: index for index, name in LABELS.items()}}
    # The usual spread of weights makes such a small model say nearly the same of everything.
    shape = SIZES | {"initializer_range": 0.4} | (sizes or {})
    model: Any
    if kind == "text-generation":
        model = t.LlamaForCausalLM(t.LlamaConfig(**{"num_key_value_heads": 2, **text, **shape}))
    elif kind == "text-classification":
        model = t.BertForSequenceClassification(t.BertConfig(**text, **labels, **shape))
    elif kind == "feature-extraction":
        model = t.BertModel(t.BertConfig(**text, **shape))
    else:
        model = t.ViTForImageClassification(t.ViTConfig(image_size=32, patch_size=8, **labels, **shape))
        # The Pillow variant by name: the other needs torchvision even to be written.
        from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

        ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(path)
    model.save_pretrained(path, **({"max_shard_size": shards} if shards else {}))
    if tokenizer and kind != "image-classification":
        made = _tokenizer()
        made.chat_template = CHAT_TEMPLATE
        made.save_pretrained(path)
    if pooling:
        modules = [("0", "", "Transformer"), ("1", "1_Pooling", "Pooling"), ("2", "2_Normalize", "Normalize")]
        kinds = "sentence_transformers.models."
        listed = [{"idx": int(i), "name": i, "path": p, "type": kinds + kind} for i, p, kind in modules]
        (path / "modules.json").write_text(json.dumps(listed), encoding="utf-8")
        (path / "1_Pooling").mkdir()
        modes = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max"}
        flags = {f"pooling_mode_{mode}": name == pooling for mode, name in modes.items()}
        (path / "1_Pooling" / "config.json").write_text(json.dumps(flags), encoding="utf-8")


def make_torchscript(kind: str, path: Path) -> None:
    import torch

    torch.manual_seed(0)

    class Tokens(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(50, 8)
            self.head = torch.nn.Linear(8, 3)

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            vectors = self.embedding(ids) * mask.unsqueeze(-1).float()
            return self.head(vectors.sum(1)), vectors

    class Options(torch.nn.Module):
        def forward(self, x: torch.Tensor, scale: float = 2.0, negate: bool = False) -> dict[str, torch.Tensor]:
            scaled = x * scale
            return {"scaled": -scaled if negate else scaled, "positive": scaled > 0}

    if kind == "torchscript-options":
        # Annotations are text here, and TorchScript wants them as types.
        Options.forward.__annotations__ = {"x": torch.Tensor, "scale": float, "negate": bool}
        Options.forward.__annotations__["return"] = dict[str, torch.Tensor]
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.jit.script(Options()).save(str(path))
        return
    if kind in ("torchscript", "torchscript-bfloat16"):
        model: Any = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        example: tuple[Any, ...] = (torch.zeros(1, 4),)
    elif kind == "torchscript-image":
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(1))
        example = (torch.zeros(1, 3, 16, 16),)
    else:
        model, example = Tokens(), (torch.zeros(1, 5, dtype=torch.int64), torch.ones(1, 5, dtype=torch.int64))
    if kind == "torchscript-bfloat16":
        model, example = model.bfloat16(), (example[0].bfloat16(),)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.jit.trace(model.eval(), example).save(str(path))


def run_text_generation(path: Path, *, texts: list[str], max_tokens: int = 8, **options: Any) -> list[dict[str, Any]]:
    """For each text the likeliest tokens, and as text, and the prompt's number of them; options are `generate`'s."""
    import transformers as t

    tokenizer = t.AutoTokenizer.from_pretrained(path)
    model = t.AutoModelForCausalLM.from_pretrained(path).eval()
    answers = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=max_tokens, do_sample=False, **options)[0]
        made = out[ids["input_ids"].shape[1] :].tolist()
        told = tokenizer.decode(made, skip_special_tokens=True)
        answers.append({"text": told, "ids": made, "prompt": ids["input_ids"].shape[1]})
    return answers


def run_text_classification(path: Path, *, texts: list[str], pairs: list[str] | None = None) -> list[list[float]]:
    """The logits of each text, computed alone."""
    import torch
    import transformers as t

    tokenizer = t.AutoTokenizer.from_pretrained(path)
    model = t.AutoModelForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        each = zip(texts, pairs or itertools.repeat(None), strict=pairs is not None)
        return [model(**tokenizer(a, b, return_tensors="pt")).logits[0].tolist() for a, b in each]


def run_feature_extraction(path: Path, *, texts: list[str]) -> list[list[list[float]]]:
    """The last hidden state of each text, computed alone: [length, width]."""
    import torch
    import transformers as t

    tokenizer = t.AutoTokenizer.from_pretrained(path)
    model = t.AutoModel.from_pretrained(path).eval()
    with torch.no_grad():
        return [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].tolist() for text in texts]


def run_image_classification(path: Path, *, images: list[str]) -> list[list[float]]:
    """The logits of each image file."""
    import torch
    import transformers as t
    from PIL import Image

    processor = t.AutoImageProcessor.from_pretrained(path, backend="pil")
    model = t.AutoModelForImageClassification.from_pretrained(path).eval()
    with torch.no_grad():
        inputs = [processor(images=Image.open(image).convert("RGB"), return_tensors="pt") for image in images]
        return [model(**one).logits[0].tolist() for one in inputs]


def run_torchscript(path: Path, *, inputs: list[Any], dtypes: list[str]) -> list[Any]:
    """All outputs for the inputs, nested lists of numbers."""
    import torch

    given = [torch.tensor(one, dtype=getattr(torch, dtype)) for one, dtype in zip(inputs, dtypes, strict=True)]
    with torch.no_grad():
        out = torch.jit.load(str(path))(*given)
    parts = list(out.values()) if isinstance(out, dict) else list(out) if isinstance(out, tuple) else [out]
    return [one.tolist() for one in parts]


def answer(verb: str, kind: str, path: str, given: dict[str, Any]) -> Any:
    if verb == "make":
        return (make_torchscript if kind in TORCHSCRIPT else make_huggingface)(kind, Path(path), **given)
    runners: dict[str, Callable[..., Any]] = {
        "text-generation": run_text_generation,
        "text-classification": run_text_classification,
        "feature-extraction": run_feature_extraction,
        "image-classification": run_image_classification,
    }
    return runners.get(kind, run_torchscript)(Path(path), **given)


def main() -> None:
    """Answer the questions that come, a line each, in JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        try:
            said = {"value": answer(*json.loads(line))}
        except Exception:
            said = {"error": traceback.format_exc()}
        print(json.dumps(said), file=answers, flush=True)


if __name__ == "__main__":
    main()
