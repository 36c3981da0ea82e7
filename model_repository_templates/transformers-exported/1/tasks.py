"""What comes before and after the network, by task: texts or images in, labels or embeddings out."""

from __future__ import annotations

import base64
import io
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from labels import Labels
from pooling import how_to_pool
from serving import Refused
from texts import TextReader, Texts, alike

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""What Pillow may read: some of its other formats start programs."""

Arrays = dict[str, np.ndarray]


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


class OfTexts:
    """What the tasks on texts share."""

    def __init__(self, folder: Path, settings: dict[str, str]):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self.reader = TextReader(tokenizer, None, int(settings["longest"]) or None)

    def read(self, request: Any) -> Texts:
        return self.reader.read(request)

    def alike(self, job: Texts) -> Hashable:
        return alike(job)

    def inputs(self, jobs: list[Texts]) -> Arrays:
        """All texts of all jobs, padded to the longest."""
        together = {key: [one for job in jobs for one in job.tokens[key]] for key in jobs[0].tokens}
        padded = self.reader.tokenizer.pad(together, return_tensors="np", verbose=False)
        return {key: np.ascontiguousarray(array, dtype=np.int64) for key, array in padded.items()}


class TextClassification(OfTexts):
    def __init__(self, folder: Path, settings: dict[str, str]):
        super().__init__(folder, settings)
        self.labels = Labels(_config(folder), int(settings["top_k"]))

    def outputs(self, jobs: list[Texts], inputs: Arrays, arrays: Arrays) -> Iterator[list[Any]]:
        for part in _split(arrays["logits"], jobs):
            yield self.labels.tensors(part)


class FeatureExtraction(OfTexts):
    def __init__(self, folder: Path, settings: dict[str, str]):
        super().__init__(folder, settings)
        self.pooling, self.normalized = how_to_pool(folder)

    def outputs(self, jobs: list[Texts], inputs: Arrays, arrays: Arrays) -> Iterator[list[Any]]:
        """Only what was asked for, and as long as each request's own longest text."""
        tokens, mask = arrays["last_hidden_state"], inputs["attention_mask"]
        wholes = self.pool(tokens, mask)
        parts = zip(jobs, _split(tokens, jobs), _split(mask, jobs), _split(wholes, jobs), strict=True)
        for job, own, present, whole in parts:
            used = np.flatnonzero(present.any(axis=0))
            window = slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0)
            made = {
                "last_hidden_state": own[:, window],
                "attention_mask": present[:, window],
                "sentence_embedding": whole,
            }
            yield [
                pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in made.items() if name in job.wanted
            ]

    def pool(self, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """One vector for each text; `tokens` is [texts, length, width], `mask` [texts, length]."""
        present = mask[..., None].astype(tokens.dtype)
        if self.pooling == "cls":
            whole = tokens[np.arange(len(tokens)), mask.argmax(axis=1)]
        elif self.pooling == "lasttoken":
            whole = tokens[np.arange(len(tokens)), mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)]
        elif self.pooling == "max":
            whole = np.where(present == 0, -np.inf, tokens).max(axis=1).astype(tokens.dtype)
        else:
            whole = (tokens * present).sum(axis=1) / np.maximum(present.sum(axis=1), 1)
        if self.normalized:
            whole = whole / np.maximum(np.linalg.norm(whole, axis=1, keepdims=True), 1e-12)
        return whole


class ImageClassification:
    def __init__(self, folder: Path, settings: dict[str, str]):
        from PIL import Image
        from transformers import AutoImageProcessor

        self.image = Image
        config = _config(folder)
        self.labels = Labels(config, int(settings["top_k"]))
        self.processor = None
        if (folder / "preprocessor_config.json").exists() or (folder / "processor_config.json").exists():
            self.processor = AutoImageProcessor.from_pretrained(
                folder, backend="pil", local_files_only=True, trust_remote_code=False
            )

    def read(self, request: Any) -> np.ndarray:
        """The request's pixels, [images, channels, height, width]."""
        given = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        if len(given) != 1:
            raise Refused("send either image (an encoded image) or pixel_values (a tensor), one of the two")
        if "pixel_values" in given:
            return given["pixel_values"]
        if self.processor is None:
            raise Refused("the model came without preprocessor_config.json: send pixel_values instead of image")
        images = [self.decode(value) for value in given["image"].reshape(-1)]
        return np.asarray(self.processor(images=images, return_tensors="np")["pixel_values"], dtype=np.float32)

    def decode(self, value: bytes) -> Any:
        """An image from a file's bytes, or from their base64 text, which JSON can carry."""
        try:
            return self.opened(value)
        except Exception as error:
            try:
                return self.opened(base64.b64decode(value, validate=True))
            except Exception:
                raise Refused(f"image must be a JPEG, PNG or alike, as bytes or as base64: {error}") from None

    def opened(self, value: bytes) -> Any:
        return self.image.open(io.BytesIO(value), formats=FORMATS).convert("RGB")

    def alike(self, pixels: np.ndarray) -> Hashable:
        return tuple(pixels.shape[1:])

    def inputs(self, jobs: list[np.ndarray]) -> Arrays:
        return {"pixel_values": np.concatenate(jobs)}

    def outputs(self, jobs: list[np.ndarray], inputs: Arrays, arrays: Arrays) -> Iterator[list[Any]]:
        for part in _split(arrays["logits"], jobs):
            yield self.labels.tensors(part)


TASKS: dict[str, Any] = {
    "text-classification": TextClassification,
    "feature-extraction": FeatureExtraction,
    "image-classification": ImageClassification,
}


def _split(array: np.ndarray, jobs: list[Any]) -> list[np.ndarray]:
    """Each job's own rows."""
    return np.split(array, np.cumsum([len(job) for job in jobs])[:-1])
