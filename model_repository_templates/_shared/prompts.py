"""A language model's prompt: token ids made of a text, of a chat by the model's own template, or given as they are."""

from __future__ import annotations

import json
from typing import Any

from serving import Refused

INPUTS = {"text_input", "messages", "input_ids"}


def token_ids(tokenizer: Any, texts: dict[str, str], ids: Any = None) -> list[int]:
    """The prompt of a request with these texts by input, and these token ids; it must have one of `INPUTS`.

    `tokenizer` is None for a model that came without one.
    """
    sources = sorted({*texts, *(() if ids is None else ("input_ids",))} & INPUTS)
    if len(sources) != 1:
        raise Refused(f"send one of text_input, messages and input_ids; the request has {sources or 'none'}")
    if ids is None and tokenizer is None:
        raise Refused("the model came without a tokenizer: send input_ids")
    if ids is not None:
        found = [int(token) for token in ids]
    elif "text_input" in texts:
        found = list(tokenizer(texts["text_input"], verbose=False)["input_ids"])
    else:
        found = _chat(tokenizer, texts["messages"])
    if not found:
        raise Refused("the prompt is empty: send at least one token")
    return found


def _chat(tokenizer: Any, messages: str) -> list[int]:
    """A list of messages, `[{"role": "user", "content": "..."}]`, as the model's own template writes it."""
    if not tokenizer.chat_template:
        raise Refused("the model came without a chat template: send text_input instead of messages")
    try:
        written = tokenizer.apply_chat_template(json.loads(messages), add_generation_prompt=True, tokenize=False)
    except Exception as error:
        raise Refused(f"messages don't suit the model's chat template: {type(error).__name__}: {error}") from None
    return list(tokenizer(written, add_special_tokens=False, verbose=False)["input_ids"])
