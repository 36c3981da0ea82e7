"""Text generation in a real tritonserver, against transformers itself; each stream is read as it comes."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from real_triton import Triton

from tests import models

pytestmark = pytest.mark.timeout(600)  # the first test of a new machine installs libraries

PROMPT = "hello"
ROOM = 20_000
"""Tokens for which the slow model has room: minutes of work, of which a test waits for none."""


@pytest.fixture(scope="module")
def writer(triton: Triton, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    drop = models.make(triton.python, "text-generation", tmp_path_factory.mktemp("writer") / "drop")
    with triton.serving("writer", drop, max_tokens=12):
        yield drop


def generate(triton: Triton, name: str = "writer", **body: Any) -> dict[str, Any]:
    status, answer = triton.post(f"{name}/generate", {"text_input": PROMPT, **body})
    assert status == 200, answer
    return answer


def refused(triton: Triton, name: str = "writer", **body: Any) -> str:
    status, answer = triton.post(f"{name}/generate", body)
    assert status == 400
    return str(answer["error"])


class Stream:
    """Server-sent events of `generate_stream`, one by one."""

    def __init__(self, triton: Triton, name: str = "writer", **body: Any):
        self.connection = http.client.HTTPConnection(triton.address, timeout=120)
        self.connection.request("POST", f"/v2/models/{name}/generate_stream", json.dumps({"stream": True, **body}))
        self.response = self.connection.getresponse()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for line in self.response:
            if line.startswith(b"data: "):
                yield json.loads(line[6:])

    def close(self) -> None:
        self.response.close()
        self.connection.close()


def test_the_likeliest_tokens_are_transformers_own(triton: Triton, writer: Path) -> None:
    prompts = [PROMPT, "once upon", "ß"]
    expected = models.original(triton.python, "text-generation", writer, texts=prompts, max_tokens=8)
    for prompt, original in zip(prompts, expected, strict=True):
        answer = generate(triton, text_input=prompt, max_tokens=8, stream=False)
        assert answer["text_output"] == original["text"]
        assert answer["num_input_tokens"] == original["prompt"]
        assert answer["num_output_tokens"] == len(original["ids"])


def test_a_stream_comes_token_by_token(triton: Triton, writer: Path) -> None:
    whole = generate(triton, max_tokens=24)
    *pieces, last = Stream(triton, text_input=PROMPT, max_tokens=24)
    assert len(pieces) > 6
    assert "".join(event["text_output"] for event in [*pieces, last]) == whole["text_output"]
    assert all(event["text_output"] and "finish_reason" not in event for event in pieces)
    assert last["finish_reason"] == whole["finish_reason"]
    assert last["num_output_tokens"] == whole["num_output_tokens"]


def test_without_the_wish_to_stream_one_event_has_it_all(triton: Triton, writer: Path) -> None:
    (event,) = Stream(triton, text_input=PROMPT, max_tokens=6, stream=False)
    assert event["text_output"] == generate(triton, max_tokens=6)["text_output"]


def test_how_long(triton: Triton, writer: Path) -> None:
    assert generate(triton)["num_output_tokens"] == 12, "the model's own default"
    short = generate(triton, max_tokens=3)
    assert (short["num_output_tokens"], short["finish_reason"]) == (3, "length")
    full = generate(triton, text_input="x" * 120, max_tokens=1000)
    assert full["num_output_tokens"] <= 8, "the model has room for 128"


def test_decoding_can_be_told_in_three_ways(triton: Triton, writer: Path) -> None:
    plain = generate(triton, max_tokens=5)
    assert generate(triton, sampling_parameters=json.dumps({"max_tokens": 5}))["text_output"] == plain["text_output"]
    assert generate(triton, parameters={"max_tokens": 5})["text_output"] == plain["text_output"]
    both = generate(triton, max_tokens=5, sampling_parameters=json.dumps({"max_tokens": 9}))
    assert both["num_output_tokens"] == 5, "what the request itself says counts more"


def test_a_stop_string_ends_it_before_itself(triton: Triton, writer: Path) -> None:
    whole = generate(triton, max_tokens=24)["text_output"]
    stop = whole[5:8]
    for body in ({"stop": [stop, "never"]}, {"parameters": {"stop": stop}}):
        answer = generate(triton, max_tokens=24, **body)
        assert answer["text_output"] == whole[: whole.index(stop)]
        assert answer["finish_reason"] == "stop"
    pieces = [event["text_output"] for event in Stream(triton, text_input=PROMPT, max_tokens=24, stop=[stop])]
    assert "".join(pieces) == whole[: whole.index(stop)]


def test_drawing_follows_its_seed(triton: Triton, writer: Path) -> None:
    def drawn(seed: int, **more: Any) -> str:
        return str(generate(triton, max_tokens=20, temperature=1.5, seed=seed, **more)["text_output"])

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(5)}) > 1
    greedy = generate(triton, max_tokens=20)["text_output"]
    assert generate(triton, max_tokens=20, temperature=0.0)["text_output"] == greedy
    assert drawn(3, top_k=1) == greedy
    assert drawn(4, top_p=1e-6) == greedy


def test_repetition_is_penalized(triton: Triton, writer: Path) -> None:
    expected = models.original(
        triton.python, "text-generation", writer, texts=[PROMPT], max_tokens=20, repetition_penalty=1.8
    )
    answer = generate(triton, max_tokens=20, repetition_penalty=1.8)
    assert answer["text_output"] == expected[0]["text"]


def test_a_chat_is_written_by_the_models_template(triton: Triton, writer: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    status, answer = triton.post("writer/generate", {"messages": json.dumps(messages), "max_tokens": 6})
    assert status == 200
    assert answer["text_output"] == generate(triton, text_input="<user>hi</s><assistant>", max_tokens=6)["text_output"]
    assert "messages don't suit" in refused(triton, messages="no json")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({}, "send one of text_input, messages and input_ids"),
        ({"text_input": "a", "messages": "[]"}, "send one of"),
        ({"text_input": ""}, "the prompt is empty"),
        ({"text_input": "x" * 128}, "the prompt has 128 tokens, and the model takes 128"),
        ({"text_input": "a", "temperature": -1.0}, "temperature must be 0 or more"),
        ({"text_input": "a", "top_p": 0.0}, "top_p must be more than 0"),
        ({"text_input": "a", "max_tokens": 0}, "max_tokens must be 1 or more"),
        ({"text_input": "a", "sampling_parameters": '{"beams": 3}'}, "'beams'"),
        ({"text_input": "a", "sampling_parameters": "3"}, "must be a JSON object"),
        ({"text_input": "a", "sampling_parameters": '{"top_k": "many"}'}, "top_k can't be 'many'"),
        ({"input_ids": [5, 261]}, "between 0 and 260"),
    ],
)
def test_bad_requests_are_refused_and_say_why(triton: Triton, writer: Path, body: dict[str, Any], reason: str) -> None:
    assert reason in refused(triton, **body)


def test_token_ids_where_there_is_no_tokenizer(
    triton: Triton, writer: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    ids = [10, 20, 30, 40]
    status, with_tokenizer = triton.post("writer/generate", {"input_ids": ids, "max_tokens": 6})
    assert status == 200 and with_tokenizer["output_ids"]
    triton.install("wordless", writer)
    config = triton.repository / "wordless" / "config.pbtxt"
    parameter = 'key: "tokenizer" value { string_value: "%s"'
    config.write_text(config.read_text().replace(parameter % "true", parameter % "false"))
    for file in (triton.repository / "wordless" / "1" / "model").glob("tokenizer*"):
        file.unlink()
    triton.load("wordless")
    try:
        status, answer = triton.post("wordless/generate", {"input_ids": ids, "max_tokens": 6})
        assert status == 200 and answer["output_ids"] == with_tokenizer["output_ids"]
        assert "without a tokenizer" in refused(triton, "wordless", text_input="a")
        streamed = list(Stream(triton, "wordless", input_ids=ids, max_tokens=6))
        assert [event["output_ids"] for event in streamed[:-1]] == with_tokenizer["output_ids"], "one at a time"
    finally:
        triton.unload("wordless")


@pytest.fixture(scope="module")
def slow(triton: Triton, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    drop = models.make(
        triton.python,
        "text-generation",
        tmp_path_factory.mktemp("slow") / "drop",
        seed=3,
        sizes={"max_position_embeddings": ROOM},
    )
    with triton.serving("slow", drop, concurrent=2) as name:
        yield name


def test_a_long_one_lets_others_go_ahead(triton: Triton, slow: str) -> None:
    long = Stream(triton, slow, text_input=PROMPT, max_tokens=ROOM)
    events = iter(long)
    next(events)
    done = threading.Event()
    answers: list[dict[str, Any]] = []

    def short() -> None:
        answers.append(generate(triton, slow, max_tokens=8))
        done.set()

    thread = threading.Thread(target=short)
    thread.start()
    for event in events:
        assert "finish_reason" not in event, "the long one came to its end before the short one"
        if done.is_set():
            break
    thread.join()
    long.close()
    assert answers[0]["num_output_tokens"] == 8


def test_a_client_that_left_stops_its_generation(triton: Triton, slow: str) -> None:
    # Both places are taken by generations that would take minutes; only when one is given up does another get its turn.
    leaving = [Stream(triton, slow, text_input=PROMPT, max_tokens=ROOM) for _ in range(2)]
    for stream in leaving:
        next(iter(stream))
        stream.close()
    assert generate(triton, slow, max_tokens=4)["num_output_tokens"] == 4
