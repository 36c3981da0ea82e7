"""vLLM itself in a real tritonserver, against transformers: loaded once, asked over HTTP and gRPC."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc as grpcclient
from modelium_plugin_triton import vllm_environment
from modelium_plugin_triton.vllm import TEMPLATE
from real_triton import Triton
from tritonclient.utils import InferenceServerException

from tests import models

pytestmark = pytest.mark.timeout(900)  # the first test of a new machine installs vLLM, which is large

ROOM = 100_000
"""Tokens for which the model has room: many minutes of work, of which a test waits for none."""
PROMPT = "once upon"
NAME = "in-vllm"


@pytest.fixture(scope="module")
def vllm_python(triton: Triton) -> Path:
    """The interpreter of an environment with vLLM: the one that `modelium runtimes install vllm` makes."""
    found = vllm_environment.of(triton.info)
    if found is None:
        subprocess.run([sys.executable, "-m", "modelium.cli", "runtimes", "install", "vllm"], check=True)
        found = vllm_environment.of(triton.info)
    assert found is not None
    return found.site.parents[2] / "bin/python"


@pytest.fixture(scope="module")
def drop(vllm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # vLLM's attention for CPUs wants heads of 32 or more.
    sizes = {"hidden_size": 128, "max_position_embeddings": ROOM}
    return models.make(vllm_python, "text-generation", tmp_path_factory.mktemp("drop") / "drop", sizes=sizes)


@pytest.fixture(scope="module")
def llm(triton: Triton, drop: Path) -> Iterator[None]:
    """The model, loaded. Of two generations at a time a third one waits for the end."""
    triton.install(
        NAME, drop, dtype="float32", max_model_len=ROOM, kv_cache_memory_bytes=2**28, engine_args={"max_num_seqs": 2}
    )
    config = (triton.repository / NAME / "config.pbtxt").read_text()
    assert 'backend: "python"' in config and "EXECUTION_ENV_PATH" not in config, "of this machine nothing is written"
    triton.load(NAME)
    yield
    triton.unload(NAME)


def family(triton: Triton) -> list[psutil.Process]:
    """The model's process in Triton, the engine's, and what else they started."""
    assert triton.info.pid is not None
    living = (p for p in psutil.Process(triton.info.pid).children() if p.status() != psutil.STATUS_ZOMBIE)
    (stub,) = (p for p in living if f"/{NAME}/" in " ".join(p.cmdline()))
    return [stub, *stub.children(recursive=True)]


def engine_of(processes: list[psutil.Process]) -> psutil.Process:
    return next(process for process in processes if "EngineCore" in process.name())


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


class Stream:
    """One connection on which the model streams, the responses as they come."""

    def __init__(self, triton: Triton, prompt: str = PROMPT, **sampling: Any):
        self.client = grpcclient.InferenceServerClient(triton.info.endpoint("kserve-grpc"))
        self._came: queue.Queue[Any] = queue.Queue()
        self.client.start_stream(lambda result, error: self._came.put(error or result))
        given = {"text_input": prompt, "sampling_parameters": json.dumps(sampling), "stream": True}
        inputs = []
        for name, value in given.items():
            kind = "BOOL" if isinstance(value, bool) else "BYTES"
            inputs.append(grpcclient.InferInput(name, [1], kind))
            inputs[-1].set_data_from_numpy(np.array([value], bool if kind == "BOOL" else np.object_))
        self.client.async_stream_infer(NAME, inputs, enable_empty_final_response=True)
        self.ended = False

    def next(self) -> str:
        """The text of one more response, which may be that of several tokens or of none."""
        came = self._came.get(timeout=120)
        if isinstance(came, InferenceServerException):
            raise came
        self.ended = came.get_response().parameters["triton_final_response"].bool_param
        return str(came.as_numpy("text_output")[0].decode())

    def all(self) -> str:
        pieces = []
        while not self.ended:
            pieces.append(self.next())
        return "".join(pieces)

    def leave(self) -> None:
        self.client.stop_stream(cancel_requests=True)
        self.client.close()


def generate(triton: Triton, **body: Any) -> dict[str, Any]:
    status, answer = triton.post(f"{NAME}/generate", {"text_input": PROMPT, **body})
    assert status == 200, answer
    return answer


def test_it_is_offered_before_transformers(triton: Triton, llm: None) -> None:
    assert triton.serving_of(NAME) == TEMPLATE


def test_the_likeliest_tokens_are_transformers_own(triton: Triton, llm: None, drop: Path, vllm_python: Path) -> None:
    prompts = [PROMPT, "ß"]
    expected = models.original(vllm_python, "text-generation", drop, texts=prompts, max_tokens=8)
    for prompt, original in zip(prompts, expected, strict=True):
        greedy = '{"max_tokens": 8, "temperature": 0}'
        answer = generate(triton, text_input=prompt, sampling_parameters=greedy, return_logprobs=True)
        assert [int(token) for position in json.loads(answer["logprobs"]) for token in position] == original["ids"]
        # A character that is not whole at the end is left out; as Triton's backend does, the prompt is repeated.
        assert answer["text_output"] == prompt + original["text"].rstrip("\ufffd")


def test_what_can_be_asked_for_besides_the_text(triton: Triton, llm: None) -> None:
    answer = generate(
        triton,
        exclude_input_in_output=True,
        return_finish_reason=True,
        return_num_input_tokens=True,
        return_num_output_tokens=True,
        return_cumulative_logprob=True,
        return_logprobs=True,
        parameters={"max_tokens": 3, "temperature": 0},
    )
    assert not answer["text_output"].startswith(PROMPT)
    assert (answer["num_input_tokens"], answer["num_output_tokens"]) == (len(PROMPT), 3)
    assert answer["finish_reason"] == "length"
    logprobs = [next(iter(token.values()))["logprob"] for token in json.loads(answer["logprobs"])]
    assert len(logprobs) == 3
    assert answer["cumulative_logprob"] == pytest.approx(sum(logprobs), abs=1e-3)


def test_a_chat_and_token_ids(triton: Triton, llm: None) -> None:
    greedy = {"sampling_parameters": '{"max_tokens": 5, "temperature": 0}'}
    chat = json.dumps([{"role": "user", "content": "hi"}])
    status, answer = triton.post(f"{NAME}/generate", {"messages": chat, **greedy})
    assert status == 200
    written = "<user>hi</s><assistant>"
    plain = generate(triton, text_input=written, exclude_input_in_output=True, **greedy)
    assert answer["text_output"] == plain["text_output"]
    status, answer = triton.post(f"{NAME}/generate", {"input_ids": [10, 20, 30], **greedy})
    assert status == 200 and answer["text_output"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({}, "send one of text_input, messages and input_ids"),
        ({"text_input": ""}, "the prompt is empty"),
        ({"text_input": "a", "sampling_parameters": "3"}, "must be a JSON object"),
        ({"text_input": "a", "sampling_parameters": '{"beams": 3}'}, "'beams'"),
        ({"text_input": "a", "sampling_parameters": '{"temperature": "hot"}'}, "Expected `float`"),
        ({"text_input": "a", "sampling_parameters": '{"top_p": 2}'}, "top_p must be in"),
        ({"text_input": "a", "stream": True, "exclude_input_in_output": False}, "a stream can't repeat the prompt"),
        ({"text_input": "x" * (ROOM + 1)}, "maximum context length"),
        ({"input_ids": [5, 5000]}, "out of vocabulary"),
    ],
)
def test_bad_requests_are_refused_and_say_why(triton: Triton, llm: None, body: dict[str, Any], reason: str) -> None:
    status, answer = triton.post(f"{NAME}/generate", body)
    assert status == 400 and reason in answer["error"]


def test_a_stream_comes_piece_by_piece_while_another_is_answered(triton: Triton, llm: None) -> None:
    whole = generate(triton, exclude_input_in_output=True, parameters={"max_tokens": 12, "temperature": 0})
    long = Stream(triton, temperature=0, max_tokens=ROOM - 100, ignore_eos=True)
    begun = "".join(long.next() for _ in range(3))
    short = Stream(triton, temperature=0, max_tokens=12)
    assert short.all() == whole["text_output"]
    begun += long.next()
    assert not long.ended, "the long one came to its end before the short one"
    common = min(len(begun), len(whole["text_output"]))
    assert begun[:common] == whole["text_output"][:common]
    for stream in (long, short):
        stream.leave()


def test_clients_that_left_stop_their_generations(triton: Triton, llm: None) -> None:
    # Both places are taken by generations that would take many minutes; only when they end does another get its turn.
    leaving = [Stream(triton, max_tokens=ROOM - 100, ignore_eos=True) for _ in range(2)]
    for stream in leaving:
        stream.next()
        stream.leave()
    assert generate(triton, return_num_output_tokens=True, parameters={"max_tokens": 2})["num_output_tokens"] == 2


def test_a_stream_says_what_is_wrong_with_its_request(triton: Triton, llm: None) -> None:
    stream = Stream(triton, min_p=-1)
    with pytest.raises(InferenceServerException, match="min_p must be in"):
        stream.next()
    stream.leave()


def test_an_engine_that_dies_is_seen_and_nobody_waits_for_it(triton: Triton, llm: None) -> None:
    waiting = Stream(triton, max_tokens=ROOM - 100, ignore_eos=True)
    waiting.next()
    before = family(triton)
    engine_of(before).kill()
    with pytest.raises(InferenceServerException, match="EngineDeadError"):
        waiting.all()
    waiting.leave()
    status, _ = triton.post(f"{NAME}/generate", {"text_input": PROMPT})
    assert status == 400, "and what comes later is answered too"
    psutil.wait_procs(before, timeout=60)
    assert not alive(before)
    assert triton.is_broken(NAME)
    triton.load(NAME)
    assert generate(triton, parameters={"max_tokens": 2})["text_output"]


def test_a_first_prompt_may_be_short(triton: Triton, llm: None, drop: Path) -> None:
    """In bfloat16 vLLM computes attention with AMX, where the processor has it."""
    triton.install("short", drop, dtype="bfloat16", max_model_len=256, kv_cache_memory_bytes=2**24)
    triton.load("short")
    status, answer = triton.post("short/generate", {"text_input": "a", "parameters": {"max_tokens": 1}})
    assert status == 200, answer
    triton.unload("short")


def test_it_is_measured_and_leaves_no_process(triton: Triton, llm: None) -> None:
    processes = family(triton)
    assert triton.memory(NAME) > 0.9 * sum(process.memory_full_info().uss for process in processes)
    assert engine_of(processes).memory_full_info().uss > 0.4 * triton.memory(NAME), "the engine's counts too"
    triton.unload(NAME)
    assert not alive(processes)
    with urllib.request.urlopen(f"http://{triton.address}/v2/health/live") as answer:
        assert answer.status == 200
