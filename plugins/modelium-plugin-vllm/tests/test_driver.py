"""The driver over the real vLLM on a CPU."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from tiny_hf import adapter, alphabet, bert
from vllm_lab import Lab

from modelium.api import LoadOutcome, LoadRequest, Progress, RuntimeInfo
from modelium.api.servers import ModelServers
from modelium.api.testing import DriverContract, silent
from modelium.errors import LoadRejected

pytestmark = pytest.mark.timeout(1800)  # the first test of a new machine installs vLLM, which is large


@pytest.fixture
async def lab(installed: str, tmp_path: Path) -> AsyncIterator[Lab]:
    lab = Lab(tmp_path)
    yield lab
    await lab.end()


@pytest.fixture
async def driver(lab: Lab) -> AsyncIterator[ModelServers]:
    driver = lab.driver()
    lab.info = await driver.start()
    yield driver
    await driver.stop()
    await driver.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return alphabet(tmp_path_factory.mktemp("models") / "tiny")


async def ask(outcome: LoadOutcome, path: str, **body: Any) -> Any:
    (endpoint,) = outcome.endpoints
    assert endpoint.protocol == "openai"
    async with aiohttp.ClientSession() as http, http.post(endpoint.address + path, json=body) as answer:
        text = await answer.text()
        assert answer.status == 200, text
        return text if body.get("stream") else json.loads(text)


class TestContract(DriverContract):
    each_alone = True

    @pytest.fixture
    async def info(self, lab: Lab) -> RuntimeInfo:
        driver = lab.driver()
        info = await driver.start()
        await driver.close()
        return info

    @pytest.fixture
    def make_driver(self, lab: Lab) -> Callable[[], ModelServers]:
        return lab.driver

    @pytest.fixture
    def good_model(self, lab: Lab, info: RuntimeInfo, tiny: Path) -> LoadRequest:
        return lab.model("good", tiny, info)

    @pytest.fixture
    def another_model(self, lab: Lab, info: RuntimeInfo, tiny: Path) -> LoadRequest:
        return lab.model("another", tiny, info)

    @pytest.fixture
    def bad_model(self, lab: Lab, info: RuntimeInfo, tiny: Path) -> LoadRequest:
        request = lab.model("bad", tiny, info)
        config = request.path / "1/model/config.json"
        config.write_text(config.read_text().replace("Qwen2ForCausalLM", "NobodyKnowsForCausalLM"))
        return request

    @pytest.fixture
    def slow_model(self, lab: Lab, info: RuntimeInfo, tiny: Path) -> LoadRequest:
        return lab.model("slow", tiny, info)

    @pytest.fixture
    def crash(self, lab: Lab) -> Callable[[], None]:
        return lab.crash


async def test_it_answers_under_its_name_and_those_of_its_adapters(
    driver: ModelServers, lab: Lab, tmp_path: Path
) -> None:
    drop = alphabet(tmp_path / "drop", shards=2)
    adapter(drop / "adapters/loud")
    assert lab.info is not None
    seen: list[Progress] = []
    settings = {"lora_adapters": {"loud": "adapters/loud"}, "max_lora_rank": 8, "dtype": "bfloat16"}
    request = lab.model("m-1.b", drop, lab.info, **settings)
    outcome = await driver.load(request, seen.append)
    # What libraries take is shared with whoever else runs them.
    assert outcome.memory["cpu:0"] == pytest.approx(request.memory_bytes, rel=0.2)
    stages = [progress.stage for progress in seen]
    for stage in ("starting", "starting the engine", "opening its address", "asking for a first answer"):
        assert stage in stages
    text = await ask(outcome, "/v1/completions", model="m-1.b", prompt="hello", max_tokens=5, temperature=0)
    assert text["choices"][0]["text"] == "pqrst", "the model says the alphabet"
    other = await ask(outcome, "/v1/completions", model="loud", prompt="hello", max_tokens=5, temperature=0)
    assert other["model"] == "loud" and other["choices"][0]["text"] != "pqrst"
    messages = [{"role": "user", "content": "Hello"}]
    chat = await ask(outcome, "/v1/chat/completions", model="m-1.b", max_tokens=3, temperature=0, messages=messages)
    # user: Hello, assistant:, of which every byte is a token, and after `:` there is no letter to go on with
    assert chat["usage"] == {**chat["usage"], "prompt_tokens": 22, "completion_tokens": 3}
    stream = await ask(outcome, "/v1/completions", model="m-1.b", prompt="a", max_tokens=3, temperature=0, stream=True)
    events = [line.removeprefix("data: ") for line in stream.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1]) == "bcd"

    (server,) = driver._servers.values()
    process = psutil.Process(server.record.pid)
    tree = [process, *process.children(recursive=True)]
    assert len(tree) == 2, "a server and its engine"
    listening = {c.laddr.ip for p in tree for c in p.net_connections() if c.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}
    assert process.environ()["HF_HUB_OFFLINE"] == "1"
    async with aiohttp.ClientSession() as http, http.post(f"{server.base}/sleep") as answer:
        assert answer.status == 404
    os.kill(server.record.pid, signal.SIGKILL)
    _, left = psutil.wait_procs(tree, timeout=30)
    assert not left, "the engine ends with its server"


async def test_shorter_requests_where_the_cache_is_too_small(driver: ModelServers, lab: Lab, tiny: Path) -> None:
    assert lab.info is not None
    # 1 KiB of cache for each token of this model: room for three blocks of 128
    request = lab.model("short", tiny, lab.info, dtype="float32", kv_cache_memory_bytes=4 * 128 * 1024)
    outcome = await driver.load(request, silent)
    assert outcome.note == "with requests of 384 instead of 512 tokens, since its cache has room for no more"
    (endpoint,) = outcome.endpoints
    async with aiohttp.ClientSession() as http, http.get(f"{endpoint.address}/v1/models") as answer:
        (model,) = (await answer.json())["data"]
    assert (model["id"], model["max_model_len"]) == ("short", 384)


async def test_embeddings(driver: ModelServers, lab: Lab, tmp_path: Path) -> None:
    assert lab.info is not None
    outcome = await driver.load(lab.model("words", bert(tmp_path / "words"), lab.info), silent)
    found = await ask(outcome, "/v1/embeddings", model="words", input=["hello", "hello world", "hello"])
    first, second, third = [one["embedding"] for one in found["data"]]
    assert len(first) == 64 and first != second and first == third
    assert sum(number**2 for number in first) == pytest.approx(1, abs=1e-3)


async def test_a_model_that_fails_at_the_first_question_says_why(
    driver: ModelServers, lab: Lab, tmp_path: Path
) -> None:
    """Its heads are of a size that vLLM does not compute on CPUs, for which it is not offered."""
    drop = alphabet(tmp_path / "drop", hidden=64)
    assert lab.info is not None
    fitting = lab.model("fitting", alphabet(tmp_path / "fitting"), lab.info)
    shutil.rmtree(fitting.path / "1/model")
    shutil.copytree(drop, fitting.path / "1/model")
    with pytest.raises(LoadRejected, match="its heads have 16 numbers"):
        await driver.load(fitting, silent)
    assert not lab.processes.names()
