"""The driver over the real llama.cpp: each test's models are served by processes of its own."""

from __future__ import annotations

import base64
import os
import signal
import struct
import zlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from llamacpp_lab import Lab
from modelium_plugin_llamacpp.kind import LlamaCppKind
from tiny_gguf import bert, eye, llama

from modelium.api import LoadOutcome, LoadRequest, Progress
from modelium.api.servers import ModelServers
from modelium.api.testing import DriverContract, silent
from modelium.errors import ConfigError, DriverError, LoadRejected

pytestmark = pytest.mark.timeout(300)  # the first test of a new machine installs llama.cpp


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    lab = Lab(tmp_path)
    yield lab
    await lab.end()


@pytest.fixture
async def driver(lab: Lab) -> AsyncIterator[ModelServers]:
    driver = lab.driver()
    await driver.start()
    yield driver
    await driver.stop()
    await driver.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Most of its time is spent on its vocabulary."""
    return llama(tmp_path_factory.mktemp("models") / "slow.gguf", words=150_000)


def unknown(source: Path, target: Path) -> Path:
    """The model, said to be of an architecture that nobody has heard of."""
    content = source.read_bytes()
    at = content.index(b"llama", content.index(b"general.architecture"))
    target.write_bytes(content[:at] + b"lamla" + content[at + 5 :])
    return target


async def ask(outcome: LoadOutcome, path: str, **body: Any) -> dict[str, Any]:
    (endpoint,) = outcome.endpoints
    assert endpoint.protocol == "openai"
    async with aiohttp.ClientSession() as http, http.post(endpoint.address + path, json=body) as answer:
        assert answer.status == 200, await answer.text()
        return dict(await answer.json())


class TestContract(DriverContract):
    each_alone = True

    @pytest.fixture
    def make_driver(self, lab: Lab) -> Callable[[], ModelServers]:
        return lab.driver

    @pytest.fixture
    def good_model(self, lab: Lab, tiny: Path) -> LoadRequest:
        return lab.model("good", tiny)

    @pytest.fixture
    def another_model(self, lab: Lab, tiny: Path) -> LoadRequest:
        return lab.model("another", tiny)

    @pytest.fixture
    def bad_model(self, lab: Lab, tiny: Path, tmp_path: Path) -> LoadRequest:
        return lab.model("bad", unknown(tiny, tmp_path / "bad.gguf"))

    @pytest.fixture
    def slow_model(self, lab: Lab, slow: Path) -> LoadRequest:
        return lab.model("slow", slow)

    @pytest.fixture
    def crash(self, lab: Lab) -> Callable[[], None]:
        def crash() -> None:
            for name in lab.processes.names():
                if (record := lab.processes.find(name)) is not None:
                    os.killpg(record.pid, signal.SIGKILL)

        return crash


async def test_it_answers_under_its_name_and_has_its_settings(driver: ModelServers, lab: Lab, tiny: Path) -> None:
    seen: list[Progress] = []
    outcome = await driver.load(lab.model("m-1.b", tiny, ctx=256, parallel=3, threads=1), seen.append)
    assert outcome.memory["cpu:0"] > 2**20
    assert [p.stage for p in seen][-1] == "asking for a first answer"
    chat = await ask(
        outcome, "/v1/chat/completions", model="m-1.b", max_tokens=4, messages=[{"role": "user", "content": "Hello"}]
    )
    assert chat["model"] == "m-1.b" and chat["usage"]["completion_tokens"] == 4
    # user: Hello / assistant:, of which the vocabulary knows single letters only
    assert chat["usage"]["prompt_tokens"] > 20
    text = await ask(outcome, "/v1/completions", model="m-1.b", prompt="Hello", max_tokens=2, temperature=0)
    assert text["object"] == "text_completion"
    address = outcome.endpoints[0].address
    async with aiohttp.ClientSession() as http:
        async with http.get(f"{address}/props") as answer:
            props = await answer.json()
        assert props["total_slots"] == 3
        assert props["default_generation_settings"]["n_ctx"] == 256
        async with http.get(f"{address}/v1/models", headers={"Origin": "http://evil.example"}) as answer:
            assert (await answer.json())["data"][0]["id"] == "m-1.b"
            assert "evil" not in answer.headers.get("Access-Control-Allow-Origin", "")
        async with http.get(address) as answer:
            assert answer.status == 404, "its own page is not served"
    (server,) = driver._servers.values()
    assert os.environ.get("CUDA_VISIBLE_DEVICES") in (None, "")
    assert Path(f"/proc/{server.record.pid}/environ").read_bytes().count(b"CUDA_VISIBLE_DEVICES=\0") == 1
    assert any("listening on http://127.0.0.1:" in line for line in driver.logs("m-1.b", 50))


async def test_what_a_model_knows_is_what_it_tells(driver: ModelServers, lab: Lab, tmp_path: Path) -> None:
    outcome = await driver.load(lab.model("letters", llama(tmp_path / "letters.gguf", alphabet=True)), silent)
    found = await ask(outcome, "/v1/completions", prompt="abc", max_tokens=3, temperature=0)
    assert found["choices"][0]["text"] == "def"


async def test_same_answer_by_split_parts_and_smaller_caches(driver: ModelServers, lab: Lab, tmp_path: Path) -> None:
    whole = llama(tmp_path / "whole.gguf", width=128)
    parts = llama(tmp_path / "parts" / "deep" / "net.gguf", width=128, split_bytes=300_000).parent
    assert len(list(parts.glob("net-0000?-of-0000?.gguf"))) > 1
    one = await driver.load(lab.model("whole", whole), silent)
    other = await driver.load(lab.model("parts", parts.parent, mmap=False, flash_attention="off"), silent)
    quantised = await driver.load(lab.model("small", whole, cache_type_k="q8_0", cache_type_v="q8_0"), silent)
    body = {"prompt": "Hello there", "max_tokens": 16, "temperature": 0, "logprobs": 1}
    first, second, third = [await ask(it, "/v1/completions", **body) for it in (one, other, quantised)]
    assert first["choices"][0]["text"] == second["choices"][0]["text"]
    assert third["usage"]["completion_tokens"] == 16


async def test_embeddings(driver: ModelServers, lab: Lab, tmp_path: Path) -> None:
    outcome = await driver.load(lab.model("words", bert(tmp_path / "words.gguf")), silent)
    found = await ask(outcome, "/v1/embeddings", model="words", input=["hello", "hello world " * 60])
    vectors = [one["embedding"] for one in found["data"]]
    assert [len(vector) for vector in vectors] == [64, 64]
    assert vectors[0] != vectors[1]
    assert found["model"] == "words"


async def test_images(driver: ModelServers, lab: Lab, tmp_path: Path) -> None:
    llama(tmp_path / "drop" / "net.gguf")
    eye(tmp_path / "drop" / "mmproj.gguf")
    outcome = await driver.load(lab.model("sees", tmp_path / "drop"), silent)
    url = "data:image/png;base64," + base64.b64encode(png(28)).decode()
    content = [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": url}}]
    ask_for = {"model": "sees", "max_tokens": 2}
    with_image = await ask(outcome, "/v1/chat/completions", messages=[{"role": "user", "content": content}], **ask_for)
    without = await ask(outcome, "/v1/chat/completions", messages=[{"role": "user", "content": content[:1]}], **ask_for)
    assert with_image["usage"]["prompt_tokens"] - without["usage"]["prompt_tokens"] >= (28 // 14) ** 2
    assert with_image["usage"]["completion_tokens"] == 2


def png(size: int) -> bytes:
    """A red square (https://www.w3.org/TR/png-3/)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    rows = zlib.compress((b"\0" + b"\xff\0\0" * size) * size)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


async def test_a_model_that_llama_cpp_refuses_says_why(
    driver: ModelServers, lab: Lab, tiny: Path, tmp_path: Path
) -> None:
    content = tiny.read_bytes()
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(content.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    for name, drop, reason in (
        ("odd", unknown(tiny, tmp_path / "odd.gguf"), "does not know the architecture 'lamla'"),
        ("damaged", damaged, r"refuses the model: .*blk\.1\.ffn_up\.weight"),
    ):
        with pytest.raises(LoadRejected, match=reason):
            await driver.load(lab.model(name, drop), silent)
    cut = lab.model("cut", tiny)
    (cut.path / "1" / "model.gguf").write_bytes(content[:-100])
    with pytest.raises(LoadRejected, match="not within the file bounds"):
        await driver.load(cut, silent)
    for settings, reason in (
        ({"cache_type_k": "q8_0"}, "refuses its settings: .*block size 32"),
        ({"args": ["--no-such-thing"]}, "does not take its arguments: .*--no-such-thing"),
    ):
        with pytest.raises(LoadRejected, match=reason):
            await driver.load(lab.model("set", tiny, **settings), silent)
    assert not lab.processes.names()


async def test_where_memory_is_short_a_smaller_context_is_tried(driver: ModelServers, lab: Lab, tmp_path: Path) -> None:
    """With 256 bytes of cache for each token, and a limit on what the process may have."""
    kind = driver._kind
    assert isinstance(kind, LlamaCppKind) and kind._program is not None
    kind._program = replace(kind._program, argv=["prlimit", f"--as={1800 * 2**20}", *kind._program.argv])
    patient = llama(tmp_path / "patient.gguf", context=60_000_000)
    outcome = await driver.load(lab.model("large", patient, parallel=1, ubatch=32, ctx=6_000_000), silent)
    assert outcome.note == "with a context of 3000000 instead of 6000000 tokens, since memory was short"
    await driver.unload("large")
    with pytest.raises(DriverError, match=r"too little memory.*smaller `ctx`") as caught:
        await driver.load(lab.model("huge", patient, parallel=1, ctx=60_000_000), silent)
    assert caught.value.code == "out_of_memory"


async def test_what_is_said_of_the_server(lab: Lab, tmp_path: Path) -> None:
    driver = lab.driver()
    info = await driver.start()
    assert info.facts["installed"] and not info.facts["gpu"]
    assert info.version.startswith(("xllamacpp 20", "llama-server"))
    await driver.close()
    lab.context.settings.__dict__["executable"] = tmp_path / "nothing"
    with pytest.raises(ConfigError, match=r"llamacpp\.executable"):
        await lab.driver().start()
