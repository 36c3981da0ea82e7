"""What models are like whose runtime does not tell, as it speaks OpenAI alone: inputs and outputs as the templates
`transformers-text-generation` and `transformers-feature-extraction` give them, in KServe's words and Triton's. What
clients of Triton's vLLM backend send besides is taken too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from modelium.api import Tensor
from modelium.http.answers import BadRequest
from modelium.http.messages import InferRequest
from modelium.http.openai_common import MAX_INPUTS, SWITCHES
from modelium.http.streams import InferenceFailed

VERSION = "1"
"""The one that such a model has."""


@dataclass(frozen=True, slots=True)
class Interface:
    inputs: tuple[Tensor, ...]
    """Their shapes with the batch's dimension, where there are batches."""
    outputs: tuple[Tensor, ...]
    optional: frozenset[str] = frozenset()
    max_batch_size: int = 0
    decoupled: bool = False

    def metadata(self, model: str, platform: str) -> dict[str, Any]:
        """As KServe tells it."""

        def listed(tensors: Iterable[Tensor]) -> list[dict[str, Any]]:
            return [{"name": t.name, "datatype": t.datatype, "shape": list(t.shape)} for t in tensors]

        return {
            "name": model, "versions": [VERSION], "platform": platform,
            "inputs": listed(self.inputs), "outputs": listed(self.outputs),
        }  # fmt: skip

    def config(self, model: str, backend: str) -> dict[str, Any]:
        """As Triton's model configuration extension tells it: a `ModelConfig` as JSON."""

        def listed(tensors: Iterable[Tensor]) -> list[dict[str, Any]]:
            return [
                {
                    "name": tensor.name,
                    "data_type": f"TYPE_{'STRING' if tensor.datatype == 'BYTES' else tensor.datatype}",
                    "dims": list(tensor.shape[1:] if self.max_batch_size else tensor.shape),
                }
                for tensor in tensors
            ]

        return {
            "name": model, "platform": "", "backend": backend, "version_policy": {"latest": {"num_versions": 1}},
            "max_batch_size": self.max_batch_size,
            "input": [{**value, "optional": value["name"] in self.optional} for value in listed(self.inputs)],
            "output": listed(self.outputs), "model_transaction_policy": {"decoupled": self.decoupled},
        }  # fmt: skip

    def check(self, model: str, request: InferRequest) -> None:
        """`BadRequest` where names, datatypes or shapes are others than the model's."""
        known = {tensor.name: tensor for tensor in self.inputs}
        for value in request.inputs:
            expected = known.get(value.name)
            if expected is None:
                raise BadRequest(f"{model} has no input {value.name!r}: it takes {', '.join(known)}")
            _reachable(model, value.name, value.parameters)
            fits = len(value.shape) == len(expected.shape) and all(
                e in (-1, size) for e, size in zip(expected.shape, value.shape, strict=True)
            )
            if value.datatype != expected.datatype or not fits:
                raise BadRequest(
                    f"input {value.name!r} of {model}: expected {expected.datatype} of shape {list(expected.shape)} "
                    f"(-1: any), found {value.datatype} of shape {list(value.shape)}"
                )
        given = {value.name for value in request.inputs}
        if missing := [name for name in known if name not in given and name not in self.optional]:
            raise BadRequest(f"{model}: the input {missing[0]!r} is missing")
        outputs = [tensor.name for tensor in self.outputs]
        for wanted in request.outputs:
            if wanted.name not in outputs:
                raise BadRequest(f"{model} has no output {wanted.name!r}: it has {', '.join(outputs)}")
            _reachable(model, wanted.name, wanted.parameters)


def _reachable(model: str, name: str, parameters: Mapping[str, Any]) -> None:
    for parameter in ("shared_memory_region", "classification"):
        if parameter in parameters:
            raise BadRequest(f"{name!r}: {parameter} is Triton's, and {model} is not served by Triton: leave it out")


def _tensors(**named: tuple[str, tuple[int, ...]]) -> tuple[Tensor, ...]:
    return tuple(Tensor(name=name, datatype=datatype, shape=shape) for name, (datatype, shape) in named.items())


_TEXT_INPUTS = _tensors(
    text_input=("BYTES", (1,)), messages=("BYTES", (1,)), input_ids=("INT64", (-1,)), stream=("BOOL", (1,)),
    sampling_parameters=("BYTES", (1,)), max_tokens=("INT32", (1,)), temperature=("FP32", (1,)), top_p=("FP32", (1,)),
    top_k=("INT32", (1,)), repetition_penalty=("FP32", (1,)), seed=("INT64", (1,)), stop=("BYTES", (-1,)),
    **dict.fromkeys(SWITCHES, ("BOOL", (1,))),
)  # fmt: skip
TEXT = Interface(
    _TEXT_INPUTS,
    _tensors(
        text_output=("BYTES", (1,)), finish_reason=("BYTES", (1,)), num_input_tokens=("INT32", (1,)),
        num_output_tokens=("INT32", (1,)), output_ids=("INT64", (-1,)),
    ),
    optional=frozenset(tensor.name for tensor in _TEXT_INPUTS),
    decoupled=True,
)  # fmt: skip
EMBEDDING = Interface(
    _tensors(text_input=("BYTES", (-1, 1))),
    _tensors(sentence_embedding=("FP32", (-1, -1))),
    max_batch_size=MAX_INPUTS,
)


def interface_of(task: str | None) -> Interface:
    return EMBEDDING if task == "feature-extraction" else TEXT


def check_version(model: str, version: str) -> None:
    if version not in ("", VERSION):
        raise InferenceFailed(f"{model} has no version {version}: it has version {VERSION}", 404)
