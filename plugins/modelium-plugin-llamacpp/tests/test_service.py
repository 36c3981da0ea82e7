"""As a person uses it: drop a GGUF file into a folder of a running service, and ask."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_gguf import bert, llama

from tests.service import Answer, Served, processes_of, served

pytestmark = pytest.mark.timeout(600)

CONFIG = {
    "plugins": {"disable": ["triton", "vllm", "rayserve", "tensorrt"]},
    "orchestration": {"settle_s": 0.5},
    "llamacpp": {"default_settings": {"parallel": 1, "threads": 1}},
}


def chat(service: Served, name: str) -> dict[str, object]:
    messages = [{"role": "user", "content": "Hello"}]
    body = {"model": name, "messages": messages, "max_tokens": 3, "temperature": 0}
    answer: dict[str, object] = service.post("/v1/chat/completions", body)
    return answer


def test_a_person_drops_models_and_asks(tmp_path: Path) -> None:
    with served(tmp_path / "root", CONFIG) as service:
        service.drop(llama(tmp_path / "Tiny-Q8_0.gguf", width=128, kind="Q8_0"))
        parts = llama(tmp_path / "in-parts" / "net.gguf", split_bytes=200_000).parent
        (parts / "config.json").write_text('{"model_type": "llama"}')
        service.drop(parts)
        service.drop(bert(tmp_path / "words.gguf"))
        cut = llama(tmp_path / "cut.gguf")
        cut.write_bytes(cut.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
        service.drop(cut)
        for name in ("Tiny-Q8_0", "in-parts", "words"):
            service.until_state(name, "READY", "COLD")
        first = chat(service, "Tiny-Q8_0")
        assert first["model"] == "Tiny-Q8_0"
        assert chat(service, "in-parts")["model"] == "in-parts"
        found = service.post("/v1/embeddings", {"model": "words", "input": "hello"})
        assert len(found["data"][0]["embedding"]) == 64
        stream = service.request(
            "POST", "/v1/completions", {"model": "Tiny-Q8_0", "prompt": "a", "max_tokens": 2, "stream": True}
        )
        events = [line for line in stream.decode().splitlines() if line.startswith("data: ")]
        assert events[-1] == "data: [DONE]" and "choices" in json.loads(events[0].removeprefix("data: "))

        shown = service.model("Tiny-Q8_0")
        assert shown["runtime"] == "llamacpp"
        with pytest.raises(Answer, match=r"llama\.cpp refuses the model"):
            chat(service, "cut")
        service.post("/models/Tiny-Q8_0/unload")
        service.until_state("Tiny-Q8_0", "COLD")
        again = chat(service, "Tiny-Q8_0")
        assert again["choices"] == first["choices"], "it was loaded for the request, and answers as before"
        assert "listening on" in service.cli("logs", "in-parts").stdout

        servers = servers_of(service)
        service.kill()
        service.start()
        assert service.state("in-parts") == "READY"
        assert chat(service, "in-parts")["model"] == "in-parts"
        assert servers_of(service) == servers


def servers_of(service: Served) -> set[int]:
    """The processes that serve models."""
    return {pid for pid, command in processes_of(service.root).items() if "--alias" in command}
