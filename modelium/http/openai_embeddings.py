"""OpenAI's embeddings as plain values: a body made inference requests, responses made one answer.

Format: https://github.com/openai/openai-openapi
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from modelium.api import Tensor
from modelium.http.answers import UpstreamFailed
from modelium.http.messages import InferRequest, InferResponse, WantedOutput
from modelium.http.openai_common import EMBEDDINGS, IGNORED, MAX_INPUTS, are_ids, listed, routes_for, total, wrong
from modelium.http.predict import TEXT_INPUTS
from modelium.http.tensors import TensorValue, join_bytes, to_array

MASK = "attention_mask"
"""The output that is 1 for each token."""


@dataclass(frozen=True, slots=True)
class EmbeddingsAsked:
    texts: list[str]
    base64: bool
    dimensions: int | None


def embeddings_asked(body: Mapping[str, Any]) -> EmbeddingsAsked:
    unknown = [name for name, value in body.items() if value is not None and name not in _EMBEDDINGS_FIELDS]
    if unknown:
        raise wrong(unknown[0], f"{unknown[0]!r} can't be served by this model's runtime: leave it out")
    value = body.get("input")
    texts = [value] if isinstance(value, str) else value
    if isinstance(texts, list) and texts and (are_ids(texts) or all(map(are_ids, texts))):
        raise wrong("input", "this model's runtime takes texts, found token ids: send 'input' as text")
    if not isinstance(texts, list) or not 0 < len(texts) <= MAX_INPUTS or not all(isinstance(t, str) for t in texts):
        raise wrong("input", f"expected 'input' to be a text, or 1 to {MAX_INPUTS} of them, found {value!r:.80}")
    form = body.get("encoding_format") or "float"
    if form not in ("float", "base64"):
        raise wrong("encoding_format", f"expected 'encoding_format' to be float or base64, found {form!r:.80}")
    dimensions = body.get("dimensions")
    if dimensions is not None and type(dimensions) is not int:
        raise wrong("dimensions", f"expected 'dimensions' to be a whole number, found {dimensions!r:.80}")
    return EmbeddingsAsked(texts, form == "base64", dimensions)


_EMBEDDINGS_FIELDS = IGNORED | {"dimensions", "encoding_format", "input", "model"}


@dataclass(frozen=True, slots=True)
class Embedder:
    """How a model is asked for embeddings."""

    model: str
    text: Tensor
    vector: str
    outputs: tuple[str, ...]

    @property
    def takes_many(self) -> bool:
        return self.text.shape[0] == -1

    def request(self, texts: Sequence[str]) -> InferRequest:
        shape = (len(texts), *(1 for _ in self.text.shape[1:]))
        raw = join_bytes(text.encode("utf-8", "replace") for text in texts)
        wanted = [WantedOutput(name, binary=True) for name in self.outputs]
        return InferRequest([TensorValue(self.text.name, "BYTES", shape, raw)], outputs=wanted)

    def read(self, response: InferResponse, count: int) -> tuple[npt.NDArray[np.float32], int | None]:
        """A vector for each of `count` texts, and how many tokens they had."""
        values = {tensor.name: tensor for tensor in response.outputs}
        found = values.get(self.vector)
        if found is None or found.datatype == "BYTES" or not found.shape or (count > 1 and found.shape[0] != count):
            what = "no such output" if found is None else f"{found.datatype} {list(found.shape)}"
            raise UpstreamFailed(f"{self.model}: expected {self.vector} with {count} vectors, found {what}")
        vectors = to_array(found).astype("<f4").reshape(count, -1)
        return vectors, total(values.get(MASK))


def embedder(model: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Embedder:
    texts = {tensor.name: tensor for tensor in inputs if tensor.datatype == "BYTES" and tensor.shape}
    names = {tensor.name for tensor in outputs}
    text = next((texts[name] for name in TEXT_INPUTS if name in texts), None)
    vector = next((name for name in EMBEDDINGS if name in names), None)
    if text is None or vector is None:
        route = f"/predict/{model}" if vector else routes_for(model, outputs)
        raise wrong(
            "model",
            f"{model} makes no embeddings of texts: it takes {listed(inputs)}, and its outputs are {listed(outputs)}; "
            f"ask {route}",
        )
    return Embedder(model, text, vector, (vector, *({MASK} & names)))


def embeddings_answer(
    asked: EmbeddingsAsked, model: str, vectors: npt.NDArray[np.float32], tokens: int | None
) -> bytes:
    """The whole answer as JSON; may take long for many vectors."""
    width = vectors.shape[1]
    if asked.dimensions not in (None, width):
        raise wrong("dimensions", f"{model} makes vectors of {width} dimensions and no others: leave 'dimensions' out")
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(row.tobytes()).decode() if asked.base64 else row,
        }
        for index, row in enumerate(vectors)
    ]
    usage = None if tokens is None else {"prompt_tokens": tokens, "total_tokens": tokens}
    answer = {"object": "list", "data": data, "model": model, "usage": usage}
    return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
