"""Encoders of transformers, loaded as the templates load them."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from .original import OPSET, Arrays, Original, Refused

# Must be set before transformers is imported: nothing is ever fetched.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

LENGTH = 16
"""Of the texts that a network is exported with; both dimensions are free afterwards."""
LONG = 512
"""The longest text that both are run on."""
MAX_PROTOBUF_BYTES = 1_500_000_000
"""A protobuf message may have 2 GiB: weights of more than this go into a file of their own."""


class Transformers(Original):
    """An encoder, loaded as the templates load it."""

    def __init__(self, request: dict[str, Any]):
        import torch
        import transformers

        sys.path.append(request["templates"])
        on_torch: Any = importlib.import_module("on_torch")

        self.torch = torch
        self.task = request["task"]
        self.max_batch = max(1, int(request["max_batch"]))
        folder = Path(request["source"])
        kinds = {
            "text-classification": ("AutoModelForSequenceClassification", ()),
            "feature-extraction": ("AutoModel", ("pooler",)),
            "image-classification": ("AutoModelForImageClassification", ()),
        }
        name, may_lack = kinds[self.task]
        # Computed in FP32, as on a CPU: in a lower precision the original would be no better than what it is held to.
        self.model = on_torch.pretrained(
            getattr(transformers, name), folder, torch.device("cpu"), torch.float32, may_lack=may_lack
        )
        self.shapes = request["shapes"]
        self.random = np.random.default_rng(0)
        width = self.model.config.get_text_config().hidden_size if self.task == "feature-extraction" else -1
        if self.task == "image-classification":
            self._of_images(folder)
            self.inputs = [{"name": "pixel_values", "datatype": "FP32", "shape": [-1, *self.image]}]
        else:
            self._of_texts(on_torch, folder)
            self.inputs = [{"name": n, "datatype": "INT64", "shape": [-1, -1]} for n in self.names]
        self.output = "last_hidden_state" if self.task == "feature-extraction" else "logits"
        shape = [-1, -1, width] if self.task == "feature-extraction" else [-1, self.model.config.num_labels]
        self.outputs = [{"name": self.output, "datatype": "FP32", "shape": shape}]
        self.check_shapes()

    def _of_texts(self, on_torch: Any, folder: Path) -> None:
        tokenizer = on_torch.tokenizer(folder)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        config = self.model.config.get_text_config()
        if config.pad_token_id is None:
            config.pad_token_id = tokenizer.pad_token_id
        taken = set(inspect.signature(self.model.forward).parameters)
        self.names = [name for name in tokenizer.model_input_names if name in taken]
        if not {"input_ids", "attention_mask"} <= set(self.names):
            raise Refused(f"its tokenizer gives {', '.join(self.names)}: expected input_ids and attention_mask")
        self.words = min(len(tokenizer), config.vocab_size)
        self.pad = int(tokenizer.pad_token_id or 0)
        self.longest = on_torch.longest_input(self.model, tokenizer) or 0

    def _of_images(self, folder: Path) -> None:
        config = self.model.config
        if (folder / "preprocessor_config.json").exists() or (folder / "processor_config.json").exists():
            from PIL import Image
            from transformers import AutoImageProcessor

            processor = AutoImageProcessor.from_pretrained(
                folder, backend="pil", local_files_only=True, trust_remote_code=False
            )
            picture = Image.new("RGB", (320, 240))
            self.image = list(np.asarray(processor(images=picture, return_tensors="np")["pixel_values"]).shape[1:])
            return
        size = getattr(config, "image_size", None)
        if size is None:
            raise Refused("neither its configuration nor a preprocessor_config.json tells the size of its images")
        height, width = size if isinstance(size, list | tuple) else (size, size)
        self.image = [getattr(config, "num_channels", 3), height, width]

    def samples(self) -> list[Arrays]:
        if self.shapes:
            return [self.shaped(shapes) for shapes in self.shapes]
        most = self.max_batch
        if self.task == "image-classification":
            return [{"pixel_values": self._pixels(batch)} for batch in sorted({1, min(2, most), min(4, most)})]
        long = min(self.longest or LONG, LONG)
        shapes = [(1, min(4, long)), (min(2, most), min(7, long)), (min(8, most), min(40, long)), (1, long)]
        return [self._tokens(batch, length) for batch, length in dict.fromkeys(shapes)]

    def shaped(self, shapes: dict[str, list[int]]) -> Arrays:
        """All inputs of texts have one shape."""
        shape = next(iter(shapes.values()))
        if self.task == "image-classification":
            return {"pixel_values": self._pixels(shape[0])}
        batch, length = shape
        return self._tokens(batch, length)

    def _pixels(self, batch: int) -> np.ndarray:
        return self.random.standard_normal((batch, *self.image)).astype(np.float32)

    def _tokens(self, batch: int, length: int) -> Arrays:
        """Texts of different lengths, padded on the right."""
        ids = self.random.integers(0, self.words, (batch, length))
        lengths = np.maximum(1, length - np.arange(batch) * length // max(batch, 1))
        mask = (np.arange(length) < lengths[:, None]).astype(np.int64)
        ids[mask == 0] = self.pad
        made = {"input_ids": ids, "attention_mask": mask}
        return {name: made.get(name, np.zeros_like(ids)) for name in self.names}

    def run(self, arrays: Arrays) -> Arrays:
        with self.torch.inference_mode():
            made = self.model(**{name: self.torch.from_numpy(array) for name, array in arrays.items()})
        return {self.output: getattr(made, self.output).float().numpy()}

    def told(self, arrays: Arrays, made: Arrays) -> Arrays:
        if self.task != "feature-extraction":
            return made
        return {self.output: made[self.output] * arrays["attention_mask"][..., None]}  # what was padded is not told

    def export(self, file: Path, precision: str) -> bool:
        torch, output = self.torch, self.output
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
        model = self.model.to(dtype)
        names = [tensor["name"] for tensor in self.inputs]
        images = self.task == "image-classification"

        class Network(torch.nn.Module):  # type: ignore[misc,name-defined]
            """What is around it is FP32 and INT64, whatever it computes in."""

            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, *tensors: Any) -> Any:
                given = dict(zip(names, tensors, strict=True))
                if images:
                    given = {name: tensor.to(dtype) for name, tensor in given.items()}
                return getattr(self.model(**given), output).float()

        example = self._pixels(2) if images else None
        arrays = (
            {"pixel_values": example} if example is not None else self._tokens(2, min(LENGTH, self.longest or LENGTH))
        )
        free = torch.export.Dim.DYNAMIC
        dims = {0: free} if images else {0: free, 1: free}
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        with torch.inference_mode():
            torch.onnx.export(
                Network().eval(),
                tuple(torch.from_numpy(arrays[name]) for name in names),
                str(file),
                dynamo=True,
                dynamic_shapes=(tuple(dims for _ in names),),
                input_names=names,
                output_names=[output],
                opset_version=OPSET,
                external_data=size > MAX_PROTOBUF_BYTES,
                verbose=False,
            )
        return precision in ("fp32", "fp16", "bf16")
