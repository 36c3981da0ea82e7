"""What OpenAI's routes share: which model a request names, which routes suit a model, and what may be ignored."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from modelium.api import Tensor
from modelium.http.answers import BadRequest
from modelium.http.tensors import TensorValue, to_array

MAX_INPUTS = 2048
"""Prompts or texts in one request: OpenAI's own limit for embeddings."""

IGNORED = frozenset({
    "metadata", "parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_retention", "safety_identifier",
    "service_tier", "store", "user",
})  # fmt: skip
"""What changes nothing of the answer itself."""

EMBEDDINGS = ("sentence_embedding", "embedding", "embeddings")
"""What models call the output that holds one vector for each text, the templates' name first."""

SWITCHES = (
    "exclude_input_in_output", "return_finish_reason", "return_num_input_tokens", "return_num_output_tokens",
)  # fmt: skip
"""Inputs of Triton's vLLM backend without which it repeats the prompt and tells no counts
(https://github.com/triton-inference-server/vllm_backend/blob/main/docs/additional_outputs.md)."""

TEXT_ROUTES = "/v1/chat/completions or /v1/completions"
EMBEDDINGS_ROUTE = "/v1/embeddings"

SUITED: Mapping[str, str] = {
    "text-generation": TEXT_ROUTES,
    "feature-extraction": EMBEDDINGS_ROUTE,
    "text-classification": "/predict/{model}",
    "image-classification": "/predict/{model}",
}
"""The routes that suit a task."""


def wrong(param: str, message: str) -> BadRequest:
    return BadRequest(message, param=param)


def check_task(model: str, task: str | None, suited: str) -> None:
    """`BadRequest` when `task` is known and suits other routes than `suited`."""
    other = SUITED.get(task or "", suited)
    if other != suited:
        raise wrong("model", f"{model} does {task}, which is asked for at {other.format(model=model)}")


def model_of(body: Mapping[str, Any]) -> str:
    name = body.get("model")
    if not isinstance(name, str) or not name or not name.isprintable():
        raise wrong("model", f"expected 'model' to name a model, as GET /v1/models lists them, found {name!r:.80}")
    return name


_NAME = re.compile(rb'content-disposition:[^\r\n]*;\s*name="?model"?\s*(?:;|\r\n|$)', re.IGNORECASE)


def model_of_form(content_type: str, body: bytes) -> str:
    """The field `model` of a `multipart/form-data` body: RFC 7578."""
    found = re.search(r'boundary=(?:"([^"]+)"|([^;\s]+))', content_type)
    if found is None:
        raise BadRequest(f"expected a multipart body with its boundary in Content-Type, found {content_type!r:.80}")
    for part in body.split(b"--" + (found[1] or found[2]).encode()):
        head, _, value = part.partition(b"\r\n\r\n")
        if _NAME.search(head):
            return model_of({"model": value.removesuffix(b"\r\n").decode("utf-8", "replace")})
    return model_of({})


def listed(tensors: Sequence[Tensor]) -> str:
    return ", ".join(tensor.name for tensor in tensors)


def routes_for(model: str, outputs: Sequence[Tensor]) -> str:
    """The routes that suit a model with these outputs."""
    names = {tensor.name for tensor in outputs}
    if "text_output" in names:
        return TEXT_ROUTES
    return EMBEDDINGS_ROUTE if names & set(EMBEDDINGS) else f"/predict/{model}"


def are_ids(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(type(one) is int for one in value)


def total(tensor: TensorValue | None) -> int | None:
    """The sum of its elements; None where there is no such tensor."""
    return None if tensor is None else int(to_array(tensor).sum())
