"""OpenAI's chat completions and completions as plain values: bodies made inference requests, responses made objects.

What a client sends by default passes. What would change the meaning of an answer and can't be done is refused by name.
Everything else that says how to generate goes to the model as it is: the model knows its own sampling parameters, and
refuses others in its own words.

Formats: https://github.com/openai/openai-openapi
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from modelium.api import Tensor
from modelium.http.messages import InferRequest, InferResponse
from modelium.http.openai_common import IGNORED, MAX_INPUTS, SWITCHES, are_ids, listed, routes_for, total, wrong
from modelium.http.predict import TEXT_INPUTS, fit
from modelium.http.tensors import TensorValue, split_bytes

CANNOT: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""What KServe inference has no way to ask for, with the values that ask for nothing (null is always one)."""

_READ = frozenset({"max_completion_tokens", "messages", "model", "prompt", "stream", "stream_options"})

_NEUTRAL: Mapping[str, Any] = {"frequency_penalty": 0, "logit_bias": {}, "presence_penalty": 0}
"""Values of sampling parameters that change nothing, and that clients send by default."""

FINISH_REASONS = ("stop", "length")


@dataclass(frozen=True, slots=True)
class TextAsked:
    prompts: list[tuple[str, Any]]
    """For each choice the input that takes the prompt (`messages`, `text_input`, `input_ids`), and its value."""
    sampling: dict[str, Any]
    stream: bool
    include_usage: bool
    chat: bool


def chat_asked(body: Mapping[str, Any]) -> TextAsked:
    return _text_asked(body, [("messages", _messages(body.get("messages")))], chat=True)


def completion_asked(body: Mapping[str, Any]) -> TextAsked:
    return _text_asked(body, _prompts(body.get("prompt")), chat=False)


def _text_asked(body: Mapping[str, Any], prompts: list[tuple[str, Any]], *, chat: bool) -> TextAsked:
    for name, neutral in CANNOT.items():
        value = body.get(name)
        # by type too: to Python 1 is True, and `logprobs: 0` asks for something
        if value is not None and not any(type(value) is type(n) and value == n for n in neutral):
            allowed = " or ".join(json.dumps(n) for n in neutral)
            raise wrong(
                name,
                f"{name!r} can't be served by this model's runtime: leave it out"
                + (f", or send {allowed}" if allowed else "")
                + f"; found {json.dumps(value):.80}",
            )
    sampling = {
        name: value
        for name, value in body.items()
        if value is not None and name not in CANNOT and name not in IGNORED and name not in _READ
        and value != _NEUTRAL.get(name)
    }  # fmt: skip
    if body.get("max_completion_tokens") is not None:
        sampling["max_tokens"] = body["max_completion_tokens"]
    stream = body.get("stream") or False
    if not isinstance(stream, bool):
        raise wrong("stream", f"expected 'stream' to be true or false, found {stream!r:.80}")
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise wrong("stream_options", f"expected 'stream_options' to be an object, found {options!r:.80}")
    return TextAsked(prompts, sampling, stream, options.get("include_usage") is True, chat)


def _messages(value: Any) -> str:
    """The conversation as JSON, contents of parts made one text."""
    if not isinstance(value, list) or not value:
        raise wrong("messages", f"expected 'messages' to be a list of at least one message, found {value!r:.80}")
    messages = []
    for number, message in enumerate(value):
        where = f"messages[{number}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise wrong(where, f"expected {where} to be an object with a 'role', found {message!r:.80}")
        content = message.get("content")
        if content is None and message.get("tool_calls"):
            content = ""
        messages.append({**message, "content": _content(where, content)})
    return json.dumps(messages, ensure_ascii=False)


def _content(where: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong(f"{where}.content", f"expected {where}.content to be a text or parts of it, found {content!r:.80}")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise wrong(
                f"{where}.content",
                f"expected the parts of {where}.content to be of type 'text', which is all that this model's runtime "
                f"takes, found {kind or part!r:.80}",
            )
        texts.append(part["text"])
    return "\n".join(texts)


def _prompts(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, str):
        return [("text_input", value)]
    if are_ids(value):
        return [("input_ids", value)]
    if isinstance(value, list) and 0 < len(value) <= MAX_INPUTS:
        if all(isinstance(one, str) for one in value):
            return [("text_input", one) for one in value]
        if all(map(are_ids, value)):
            return [("input_ids", one) for one in value]
    raise wrong(
        "prompt",
        f"expected 'prompt' to be a text, a list of token ids, or 1 to {MAX_INPUTS} of either, found {value!r:.80}",
    )


def text_request(
    model: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], prompt: tuple[str, Any], asked: TextAsked
) -> InferRequest:
    """One prompt's request for a model with these inputs and outputs."""
    known = {tensor.name: tensor for tensor in inputs}
    if "text_output" not in {tensor.name for tensor in outputs}:
        raise wrong(
            "model", f"{model} makes no text: its outputs are {listed(outputs)}; ask {routes_for(model, outputs)}"
        )
    name, value = prompt
    if name == "text_input":
        name = next((name for name in TEXT_INPUTS if name in known), name)
    if name not in known:
        what = {"messages": "chats", "input_ids": "token ids"}.get(name, "texts")
        other = "ask /v1/completions with a text" if "text_input" in known else f"ask /predict/{model}"
        raise wrong("messages" if asked.chat else "prompt", f"{model} takes no {what}: it has no input {name}; {other}")
    given = {name: value}
    if "stream" in known:
        given["stream"] = asked.stream
    given |= {switch: True for switch in SWITCHES if switch in known}
    if "sampling_parameters" in known:
        given |= {"sampling_parameters": json.dumps(asked.sampling)} if asked.sampling else {}
    else:
        for parameter, setting in asked.sampling.items():
            if parameter not in known or parameter in given:
                raise wrong(
                    parameter, f"{model} has no input for {parameter!r}: leave it out; it takes {listed(inputs)}"
                )
            given[parameter] = setting
    return InferRequest([fit(known[name], value)[0] for name, value in given.items()])


# --------------------------------------------------------------------------- text: the answer


@dataclass(slots=True)
class Choice:
    """One choice, as its responses come in."""

    index: int
    texts: list[str] = field(default_factory=list)
    finish_reason: str = "stop"
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    _decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")  # pieces may end inside a character
    )

    def add(self, response: InferResponse) -> str:
        """Take one more response; the text that it adds."""
        values = {tensor.name: tensor for tensor in response.outputs}
        if (reason := _bytes(values.get("finish_reason")).decode("utf-8", "replace")) in FINISH_REASONS:
            self.finish_reason = reason
        if (count := total(values.get("num_input_tokens"))) is not None:
            self.prompt_tokens = count
        if (count := total(values.get("num_output_tokens"))) is not None:
            self.completion_tokens = (self.completion_tokens or 0) + count  # each response counts its own
        text = self._decoder.decode(_bytes(values.get("text_output")))
        self.texts.append(text)
        return text


def _bytes(tensor: TensorValue | None) -> bytes:
    return b"" if tensor is None else b"".join(split_bytes(tensor.name, tensor.raw or b""))


def usage_of(choices: Sequence[Choice]) -> dict[str, int] | None:
    """None where the model does not tell."""
    prompt, completion = 0, 0
    for choice in choices:
        if choice.prompt_tokens is None or choice.completion_tokens is None:
            return None
        prompt += choice.prompt_tokens
        completion += choice.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


@dataclass(frozen=True, slots=True)
class TextAnswer:
    """Makes OpenAI's objects of choices."""

    id: str
    created: int
    model: str
    asked: TextAsked

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        made = []
        for choice in choices:
            text = "".join(choice.texts)
            said = (
                {"message": {"role": "assistant", "content": text, "refusal": None}}
                if self.asked.chat
                else {"text": text}
            )
            made.append({"index": choice.index, **said, "logprobs": None, "finish_reason": choice.finish_reason})
        kind = "chat.completion" if self.asked.chat else "text_completion"
        return {**self._head(kind), "choices": made, "usage": usage_of(choices)}

    def begin(self, choice: Choice) -> list[dict[str, Any]]:
        """The chunks before a choice's first text."""
        return [self._chunk(choice, {"role": "assistant", "content": ""}, "")] if self.asked.chat else []

    def text(self, choice: Choice, text: str) -> list[dict[str, Any]]:
        return [self._chunk(choice, {"content": text}, text)] if text else []

    def end(self, choices: Sequence[Choice]) -> list[dict[str, Any]]:
        """The chunks after the last text: why each choice ended, and the counts where they are wanted."""
        made = [self._chunk(choice, {}, "", choice.finish_reason) for choice in choices]
        if self.asked.include_usage:
            made.append({**self._head(self._chunks), "choices": [], "usage": usage_of(choices)})
        return made

    @property
    def _chunks(self) -> str:
        return "chat.completion.chunk" if self.asked.chat else "text_completion"

    def _chunk(self, choice: Choice, delta: dict[str, str], text: str, reason: str | None = None) -> dict[str, Any]:
        said = {"delta": delta} if self.asked.chat else {"text": text}
        one = {"index": choice.index, **said, "logprobs": None, "finish_reason": reason}
        return {**self._head(self._chunks), "choices": [one], **({"usage": None} if self.asked.include_usage else {})}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}
