"""Requests in the words of Triton's vLLM backend, read and answered; nothing here knows of engines or threads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import triton_python_backend_utils as pb_utils
from prompts import token_ids
from serving import Refused, strings, text
from vllm import SamplingParams
from vllm.exceptions import VLLMClientError
from vllm.sampling_params import RequestOutputKind

INNER = {"detokenize", "extra_args", "flat_logprobs", "output_kind", "skip_clone", "output_text_buffer_length"}
"""Of vLLM's sampling parameters those that are between it and us."""
SAMPLING = {name for name in SamplingParams.__struct_fields__ if not name.startswith("_")} - INNER

EXTRAS = ("finish_reason", "cumulative_logprob", "logprobs", "num_input_tokens", "num_output_tokens")
"""Outputs that a request gets for `return_<name>`."""


@dataclass(frozen=True)
class Asked:
    """One request, read."""

    prompt: list[int]
    before: str
    """What is repeated of the prompt before the answer."""
    sampling: SamplingParams
    stream: bool
    extras: frozenset[str]


class Reader:
    """`defaults` are sampling parameters for requests that don't name them."""

    def __init__(self, tokenizer: Any, defaults: Mapping[str, Any]):
        self.tokenizer = tokenizer
        self.defaults = defaults

    def read(self, request: Any) -> Asked:
        given = {tensor.name(): tensor.as_numpy().reshape(-1) for tensor in request.inputs()}
        texts = {name: text(array[0], name) for name, array in given.items() if array.dtype == object and array.size}
        switches = {name: bool(array[0]) for name, array in given.items() if array.dtype == bool and array.size}
        stream = switches.get("stream", False)
        # Triton's backend repeats the prompt unless it is told otherwise or streams; of a text alone, here.
        repeat = not switches.get("exclude_input_in_output", stream) and "text_input" in texts
        if repeat and stream:
            raise Refused("a stream can't repeat the prompt: leave exclude_input_in_output out, or send true")
        extras = frozenset(name for name in EXTRAS if switches.get(f"return_{name}"))
        return Asked(
            prompt=token_ids(self.tokenizer, texts, given.get("input_ids")),
            before=texts["text_input"] if repeat else "",
            sampling=self.sampling(request.parameters(), texts.get("sampling_parameters"), stream, extras),
            stream=stream,
            extras=extras,
        )

    def sampling(self, parameters: str, given: str | None, stream: bool, extras: frozenset[str]) -> SamplingParams:
        """From the input `sampling_parameters`, over the request's own parameters, over the model's defaults."""
        asked = {name: value for name, value in json.loads(parameters or "{}").items() if name in SAMPLING}
        try:
            told = json.loads(given or "{}")
        except ValueError as error:
            raise Refused(f"sampling_parameters must be a JSON object: {error}") from None
        if not isinstance(told, dict):
            raise Refused(f"sampling_parameters must be a JSON object, and is {given!r:.80}")
        if unknown := sorted(set(told) - SAMPLING):
            raise Refused(f"sampling_parameters has {unknown}, which vLLM doesn't know; it knows {sorted(SAMPLING)}")
        asked = {**self.defaults, **asked, **told}
        if extras & {"cumulative_logprob", "logprobs"} and asked.get("logprobs") is None:
            asked["logprobs"] = 0  # those of the chosen tokens alone
        try:
            made = msgspec.convert(asked, SamplingParams, strict=False)
        except (msgspec.ValidationError, VLLMClientError, ValueError) as error:
            raise Refused(f"the sampling parameters are wrong: {error}") from None
        if stream and made.n > 1:
            raise Refused("a stream holds one answer: leave n out, or don't stream")
        made.output_kind = RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY
        return made


def response(asked: Asked, output: Any) -> Any:
    """vLLM's output as Triton's backend would send it."""
    answers = output.outputs
    tensors = {"text_output": strings([asked.before + one.text for one in answers])}
    if "finish_reason" in asked.extras:
        tensors["finish_reason"] = strings([str(one.finish_reason) for one in answers])
    if "cumulative_logprob" in asked.extras:
        tensors["cumulative_logprob"] = np.array([one.cumulative_logprob for one in answers], np.float32)
    if "logprobs" in asked.extras:
        tensors["logprobs"] = strings([json.dumps(_logprobs(one.logprobs)) for one in answers])
    if "num_input_tokens" in asked.extras:
        tensors["num_input_tokens"] = np.array([len(asked.prompt)], np.uint32)
    if "num_output_tokens" in asked.extras:
        tensors["num_output_tokens"] = np.array([len(one.token_ids) for one in answers], np.uint32)
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, value) for name, value in tensors.items()])


def _logprobs(positions: Any) -> list[dict[int, dict[str, Any]]] | None:
    if positions is None:
        return None
    return [
        {
            token: {"logprob": one.logprob, "rank": one.rank, "decoded_token": one.decoded_token}
            for token, one in position.items()
        }
        for position in positions
    ]
