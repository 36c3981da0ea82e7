"""As a person uses it: drop a Hugging Face model into a folder of a running service, and ask."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny_hf import adapter, alphabet
from vllm_lab import Lab

from modelium.api import Endpoint
from modelium.api.external import ExternalServer
from tests.service import Answer, Served, processes_of, served

pytestmark = pytest.mark.timeout(1800)  # the first test of a new machine installs vLLM, which is large

CONFIG: dict[str, Any] = {
    "plugins": {"disable": ["llamacpp", "rayserve", "tensorrt"]},
    "triton": {"enabled": False},
    "orchestration": {"settle_s": 0.5},
    "vllm": {"default_settings": {"threads": 1, "concurrent": 2}},
    "brain": {
        "name": "rules",
        "rules": [{"name": "adapted", "settings": {"lora_adapters": {"loud": "loud"}, "max_lora_rank": 8}}],
    },
}


def says(service: Served, model: str, prompt: str) -> str:
    body = {"model": model, "prompt": prompt, "max_tokens": 4, "temperature": 0}
    return str(service.post("/v1/completions", body)["choices"][0]["text"])


def tree(service: Served) -> set[int]:
    """The processes of vLLM."""
    return {pid for pid, command in processes_of(service.root).items() if "serve.py" in command or "VLLM" in command}


def test_a_person_drops_a_model_and_asks(installed: str, tmp_path: Path) -> None:
    drop = alphabet(tmp_path / "abc")
    adapter(drop / "loud")
    with served(tmp_path / "root", CONFIG) as service:
        planned = service.cli("plan", str(drop)).stdout
        assert "vllm/generate on cpu" in planned and "with its own backend" in planned
        service.drop(drop)
        service.until_state("abc", "READY")
        messages = [{"role": "user", "content": "Hello"}]
        chat = service.post("/v1/chat/completions", {"model": "abc", "messages": messages, "max_tokens": 3})
        assert chat["model"] == "abc" and chat["usage"]["completion_tokens"] == 3
        body = {"model": "abc", "prompt": "xy", "max_tokens": 3, "temperature": 0, "stream": True}
        lines = service.request("POST", "/v1/completions", body).decode().splitlines()
        events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        assert "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1]) == "zab"
        assert says(service, "abc", "hello") == "pqrs" != says(service, "abc:loud", "hello")
        with pytest.raises(Answer) as refused:
            service.post("/v1/embeddings", {"model": "abc", "input": "hello"})
        assert refused.value.status in (400, 404)

        shown = service.model("abc")
        assert (shown["runtime"], shown["serving"], shown["memory_source"]) == ("vllm", "generate", "measured")
        assert "served_model_name" in service.cli("logs", "abc").stdout

        before = tree(service)
        assert len(before) == 2
        service.kill()
        service.start()
        assert service.state("abc") == "READY"
        assert tree(service) == before, "what ran is adopted"
        assert says(service, "abc", "hello") == "pqrs"

        server = min(before)
        psutil.Process(server).kill()
        service.until(lambda: tree(service) and not tree(service) & before, what="another one in its place")
        service.until_state("abc", "READY")
        assert says(service, "abc", "hello") == "pqrs"
        last = tree(service)
        service.post("/models/abc/unload")
        service.until_state("abc", "COLD")
        assert not tree(service)
        shared = [Path(f"/dev/shm/__KMP_REGISTERED_LIB_{pid}_{os.getuid()}") for pid in last]
        assert not [path for path in shared if path.exists()]


async def test_one_that_somebody_else_runs(installed: str, tmp_path: Path) -> None:
    """By its URL its models are there as they are, and none is loaded or ended."""
    lab = Lab(tmp_path)
    own = lab.driver()
    outcome = await own.load(lab.model("abc", alphabet(tmp_path / "abc"), await own.start()), lambda _: None)
    address = outcome.endpoints[0].address
    other = Lab(tmp_path / "other", endpoint=address).external()
    assert isinstance(other, ExternalServer)
    info = await other.start()
    assert info.external and info.version == "0.32.0"
    (model,) = (await other.observe()).models
    assert (model.name, model.ready) == ("abc", True)
    assert model.endpoints == (Endpoint(protocol="openai", address=address),)
    await other.stop()
    assert (await own.observe()).models[0].ready
    await own.stop()
    await own.close()
