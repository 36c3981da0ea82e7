"""What it costs to reach an OpenAI server that answers at once, beside what others put in front of one.

Peers are measured where their commands are on PATH: `pip install sglang-router 'litellm[proxy]'` in an environment of
theirs. Needs `wrk` and `nginx`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

import psutil

from tests.bench import constant
from tests.bench.front import nginx, post_script, ratio, side_by_side, wrk
from tests.service import Served, free_port, served

PATH = "/v1/chat/completions"
BODY = {"model": "fixed", "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8}
ANSWER = {
    "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "fixed",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello."}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11},
}  # fmt: skip

SERVER = """\
keepalive_requests 1000000000;
server {{
    listen 127.0.0.1:{port};
    location / {{ default_type application/json; return 200 '{answer}'; }}
}}
"""

PEERS_ENV = {"LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true"}
"""LiteLLM does not start without a key otherwise; here it is reached from this machine alone."""


@contextmanager
def upstream(folder: Path) -> Iterator[str]:
    port = free_port()
    with nginx(folder / "nginx", SERVER.format(port=port, answer=json.dumps(ANSWER))):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def modelium(folder: Path, url: str, data_path: str) -> Iterator[Served]:
    env = {**constant.installed(folder / f"{data_path}-site"), "MODELIUM_BENCH_UPSTREAM": url}
    config = {"server": {"data_path": data_path}, "plugins": {"disable": ["triton"]}}
    with served(folder / data_path, config, env=env) as service:
        (folder / "fixed").write_bytes(constant.MARK)
        service.drop(folder / "fixed")
        service.until_state("fixed", "READY")
        yield service


@contextmanager
def peer(folder: Path, *command: str) -> Iterator[None]:
    """One that takes its time to start, and may have children."""
    with (folder / f"{command[0]}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=os.environ | PEERS_ENV)
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(20)


def answers(url: str, within_s: float = 120) -> None:
    """Return when it answers as the upstream does."""
    end = time.monotonic() + within_s
    request = urllib.request.Request(url + PATH, json.dumps(BODY).encode(), {"Content-Type": "application/json"})
    while True:
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                assert json.load(answer)["choices"][0]["message"]["content"] == "Hello."
                return
        except OSError:
            assert time.monotonic() < end, f"{url} does not answer"
            time.sleep(0.2)


def rows(folder: Path) -> Iterator[tuple[str, str, str]]:
    if not shutil.which("wrk") or not shutil.which("nginx"):
        yield ("a constant OpenAI server", "not measured: wrk and nginx are needed", "")
        return
    script = post_script(folder, BODY)
    with ExitStack() as stack:
        url = stack.enter_context(upstream(folder))
        fast = stack.enter_context(modelium(folder, url, "haproxy"))
        slow = stack.enter_context(modelium(folder, url, "service"))
        urls = {"straight": url, "Modelium over HAProxy": fast.url, "Modelium over aiohttp": slow.url}
        missing = []
        if shutil.which("sglang-router"):
            port = free_port()
            stack.enter_context(
                peer(folder, "sglang-router", "launch", "--worker-urls", url, "--policy", "round_robin", "--host",
                     "127.0.0.1", "--port", str(port), "--log-level", "error", "--prometheus-port", str(free_port()))
            )  # fmt: skip
            urls["sglang-router"] = f"http://127.0.0.1:{port}"
        else:
            missing.append("sglang-router")
        if shutil.which("litellm"):
            port = free_port()
            parameters = {"model": "openai/fixed", "api_base": f"{url}/v1", "api_key": "none"}
            models = [{"model_name": "fixed", "litellm_params": parameters}]
            (folder / "litellm.yaml").write_text(json.dumps({"model_list": models}))
            stack.enter_context(
                peer(folder, "litellm", "--config", str(folder / "litellm.yaml"), "--host", "127.0.0.1", "--port",
                     str(port), "--num_workers", "1")
            )  # fmt: skip
            urls["LiteLLM proxy"] = f"http://127.0.0.1:{port}"
        else:
            missing.append("litellm")
        for target in urls.values():
            answers(target)
        found = side_by_side(urls, lambda target: wrk(target + PATH, script))
        ours = [rate for rate, _, _ in found["Modelium over HAProxy"]]
        for name, runs in found.items():
            rates = [rate for rate, _, _ in runs]
            bar = "at least twice sglang-router" if name == "Modelium over HAProxy" else ""
            told = f"{median(rates):,.0f} requests/s; Modelium over HAProxy is {ratio(ours, rates):.2f} of it"
            yield (f"constant OpenAI server, {name}, wrk -t1 -c8", told, bar)
        for name in missing:
            yield (f"constant OpenAI server, {name}", "not measured: it is not on PATH", "")
        for name, service in (("HAProxy", fast), ("aiohttp", slow)):
            yield from _million(name, service, script)


def _million(name: str, service: Served, script: Path) -> Iterator[tuple[str, str, str]]:
    assert service.process is not None
    process = psutil.Process(service.process.pid)
    before = process.memory_full_info().uss / 1e6
    asked = service.model("fixed")["requests"]
    while service.model("fixed")["requests"] < 1_000_000:
        wrk(service.url + PATH, script)
    after = process.memory_full_info().uss / 1e6
    told = f"{after:.0f} MB; {before:.0f} MB after {asked:,}"
    yield (f"memory of the service after a million requests over {name}", told, "")
