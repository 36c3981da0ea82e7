"""Texts of several requests, read one by one and computed as one batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from serving import Refused, text


@dataclass
class Texts:
    """What one request asks about."""

    tokens: dict[str, list[list[int]]]
    """What the tokenizer made of it, a list for each text."""
    wanted: set[str]
    """The outputs that the client asked for."""

    def __len__(self) -> int:
        return len(self.tokens["input_ids"])


class TextReader:
    """Reads requests and makes tensors of them."""

    def __init__(self, tokenizer: Any, device: Any, longest: int | None):
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.tokenizer = tokenizer
        self.device = device
        self.longest = longest

    def read(self, request: Any) -> Texts:
        given = {
            tensor.name(): [text(value, tensor.name()) for value in tensor.as_numpy().reshape(-1)]
            for tensor in request.inputs()
        }
        first, second = given["text_input"], given.get("text_pair")
        if second is not None and len(second) != len(first):
            raise Refused(f"text_pair has {len(second)} texts, and text_input {len(first)}: send as many")
        tokens = dict(self.tokenizer(first, second, verbose=False))
        length = max(len(ids) for ids in tokens["input_ids"])
        if self.longest is not None and length > self.longest:
            raise Refused(f"the text has {length} tokens, and the model takes {self.longest}: shorten it")
        return Texts(tokens, set(request.requested_output_names()))

    def tensors(self, jobs: list[Texts]) -> Any:
        """All texts of all jobs, padded to the longest."""
        together = {key: [one for job in jobs for one in job.tokens[key]] for key in jobs[0].tokens}
        return self.tokenizer.pad(together, return_tensors="pt", verbose=False).to(self.device)


def alike(job: Texts) -> tuple[str, ...]:
    """Any texts can be computed together."""
    return tuple(sorted(job.tokens))
