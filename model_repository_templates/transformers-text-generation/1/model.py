"""Serves a causal language model of transformers: text, a chat or token ids in, text out, at once or as it is made.

Parameters: `model_folder` (relative to the version's folder), `max_tokens` (where a request doesn't say), `concurrent`
(generations at a time, each with its own cache; more wait), `tokenizer` (`false` without one), `dtype`, `threads`.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import on_torch
import triton_python_backend_utils as pb_utils
from decoding import Decoding, Text, decoding
from prompts import token_ids
from serving import Refused, cancelled, failure, parameters, strings, text, version_folder
from turns import Turns


@dataclass
class Job:
    """One request, read."""

    sender: Any
    prompt: list[int]
    decoding: Decoding
    stream: bool
    ids_wanted: bool


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        # Imported here, because Triton also starts this file only to ask for its configuration.
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        self.torch = torch
        settings = parameters(args)
        folder = version_folder(args) / settings["model_folder"]
        self.device = on_torch.device(args, settings)
        dtype = on_torch.number_type(self.device, settings)
        self.model = on_torch.pretrained(AutoModelForCausalLM, folder, self.device, dtype)
        self.tokenizer = on_torch.tokenizer(folder) if settings["tokenizer"] == "true" else None
        self.longest = on_torch.longest_input(self.model)
        self.vocabulary = self.model.get_input_embeddings().num_embeddings

        own = self.model.generation_config
        ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
        if self.tokenizer is not None:
            ends.append(self.tokenizer.eos_token_id)
        self.ends = sorted({end for end in ends if end is not None})
        self.defaults: dict[str, Any] = {"max_tokens": int(settings.get("max_tokens", "256"))}
        if own.do_sample:
            self.defaults["temperature"] = own.temperature if own.temperature is not None else 1.0
            self.defaults |= {name: getattr(own, name) for name in ("top_p", "top_k") if getattr(own, name) is not None}
        if own.repetition_penalty:
            self.defaults["repetition_penalty"] = own.repetition_penalty
        # The checkpoint's other wishes (a fixed length, several beams) are not for a server.
        self.model.generation_config = GenerationConfig()

        self.turns = Turns()
        self.ending = False
        self.pool = ThreadPoolExecutor(int(settings.get("concurrent", "8")), thread_name_prefix="generation")

    def finalize(self) -> None:
        self.ending = True
        self.pool.shutdown()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                job = self.read(request, sender)
            except Exception as error:
                sender.send(failure(error), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            else:
                self.pool.submit(self.serve, job)

    def read(self, request: Any, sender: Any) -> Job:
        given = {tensor.name(): tensor.as_numpy().reshape(-1) for tensor in request.inputs()}
        texts = {name: [text(value, name) for value in array] for name, array in given.items() if array.dtype == object}
        single = {name: values[0] for name, values in texts.items() if values}
        numbers = {name: array[0].item() for name, array in given.items() if array.dtype != object and array.size == 1}
        others = json.loads(request.parameters() or "{}") | numbers
        if "stop" in texts:
            others["stop"] = texts["stop"]
        wanted = decoding(self.defaults, single.get("sampling_parameters", ""), others)
        prompt = token_ids(self.tokenizer, single, given.get("input_ids"))
        if max(prompt) >= self.vocabulary or min(prompt) < 0:
            raise Refused(f"input_ids must be between 0 and {self.vocabulary - 1}")
        if self.longest is not None:
            room = self.longest - len(prompt)
            if room < 1:
                raise Refused(
                    f"the prompt has {len(prompt)} tokens, and the model takes {self.longest} with its answer: "
                    "shorten it"
                )
            wanted = Decoding(**{**wanted.__dict__, "max_tokens": min(wanted.max_tokens, room)})
        ids_wanted = self.tokenizer is None or "input_ids" in given
        return Job(sender, prompt, wanted, bool(others.get("stream", False)), ids_wanted)

    # ------------------------------------------------------------------ in a thread of the pool

    def serve(self, job: Job) -> None:
        generation = Generation(self, job)
        try:
            with self.turns:
                if not generation.given_up():
                    self.generate(job, generation)
            last = cancelled() if generation.given_up() else generation.conclusion()
        except Exception as error:
            last = failure(error)
        job.sender.send(last, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def generate(self, job: Job, generation: Generation) -> None:
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        wanted = job.decoding
        prompt = self.torch.tensor([job.prompt], device=self.device)
        self.model.generate(
            input_ids=prompt,
            attention_mask=self.torch.ones_like(prompt),
            generation_config=GenerationConfig(
                max_new_tokens=wanted.max_tokens,
                do_sample=False,
                repetition_penalty=wanted.repetition_penalty,
                eos_token_id=self.ends or None,
                pad_token_id=self.ends[0] if self.ends else 0,
            ),
            logits_processor=LogitsProcessorList(self.choosers(wanted)),
            stopping_criteria=StoppingCriteriaList([generation]),
        )

    def choosers(self, wanted: Decoding) -> list[Any]:
        """What makes the likeliest token a drawn one, with random numbers of the request's own.

        Adding Gumbel noise to the log-probabilities and taking the largest draws from exactly their distribution.
        """
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        if wanted.temperature == 0:
            return []
        random = self.torch.Generator(self.device)
        random.seed() if wanted.seed is None else random.manual_seed(wanted.seed)

        def draw(ids: Any, scores: Any) -> Any:
            noise = self.torch.empty_like(scores).exponential_(generator=random)
            return scores.log_softmax(dim=-1) - noise.log()

        return [
            TemperatureLogitsWarper(wanted.temperature),
            *([TopKLogitsWarper(wanted.top_k)] if wanted.top_k else []),
            *([TopPLogitsWarper(wanted.top_p)] if wanted.top_p < 1 else []),
            draw,
        ]


class Generation:
    """What transformers calls after each token (a stopping criterion): sends the text, and lets the others compute."""

    def __init__(self, owner: TritonPythonModel, job: Job):
        self.owner = owner
        self.job = job
        self.text = Text(self.decode, job.decoding.stop)
        self.cancelled = False

    def decode(self, tokens: list[int]) -> str:
        tokenizer = self.owner.tokenizer
        return "" if tokenizer is None else str(tokenizer.decode(tokens, skip_special_tokens=True))

    def given_up(self) -> bool:
        self.cancelled = self.cancelled or self.owner.ending or bool(self.job.sender.is_cancelled())
        return self.cancelled

    def __call__(self, ids: Any, scores: Any, **_: Any) -> Any:
        token = int(ids[0, -1])
        piece = self.text.add(token)
        shown = [token] if self.job.ids_wanted else []
        if not self.given_up() and self.job.stream and (piece or shown):
            self.job.sender.send(self.response(piece, shown))
        self.owner.turns.give_way()
        stop = self.text.stopped or self.cancelled
        return self.owner.torch.full((ids.shape[0],), stop, device=ids.device, dtype=self.owner.torch.bool)

    def conclusion(self) -> Any:
        """The last response: all of the text, or the rest of it where it was streamed, and why it ends."""
        rest = self.text.rest()
        tokens = self.text.tokens
        ended = self.text.stopped or (tokens and tokens[-1] in self.owner.ends)
        extra = [
            pb_utils.Tensor("finish_reason", strings(["stop" if ended else "length"])),
            pb_utils.Tensor("num_input_tokens", np.array([len(self.job.prompt)], np.int32)),
            pb_utils.Tensor("num_output_tokens", np.array([len(tokens)], np.int32)),
        ]
        streamed = self.job.stream
        ids = tokens if self.job.ids_wanted and not streamed else []
        return self.response(rest if streamed else self.text.text, ids, extra)

    def response(self, piece: str, ids: list[int], extra: list[Any] | None = None) -> Any:
        tensors = [pb_utils.Tensor("text_output", strings([piece])), *(extra or [])]
        if ids:
            tensors.append(pb_utils.Tensor("output_ids", np.array(ids, np.int64)))
        return pb_utils.InferenceResponse(tensors)
