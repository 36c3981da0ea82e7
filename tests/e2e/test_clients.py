"""Clients written for Triton, unchanged, and what else speaks plain HTTP."""

from __future__ import annotations

import asyncio
import json
import queue
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openai
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
import tritonclient.utils.shared_memory as shm
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.utils import InferenceServerException

from tests import models
from tests.e2e.kit import Straight, Toy, eventually, infer, refused, talker, toy, triton_address, web, x_body
from tests.service import Answer, Served, served

Array = npt.NDArray[Any]


@pytest.fixture(scope="module", params=["haproxy", "service"])
def service(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("clients")
    config = {"server": {"data_path": request.param}, "orchestration": {"settle_s": 0.5}}
    with served(folder / "root", config) as service:
        service.drop(models.onnx_linear(folder / "linear.onnx"))
        service.drop(models.onnx_odd(folder / "odd.onnx"))
        service.drop(talker(folder / "talker"))
        service.drop(toy(folder / "versions", versions=(1, 3)).path)
        for name in ("linear", "odd", "talker", "versions"):
            service.until_state(name, "READY")
        yield service


@pytest.fixture(scope="module")
def client(service: Served) -> Iterator[tritonclient.http.InferenceServerClient]:
    with tritonclient.http.InferenceServerClient(service.address, concurrency=4) as client:
        yield client


X = np.array([[1, 2, 3, 4], [0, -1, 0.5, 2]], np.float32)
Y = X @ np.arange(1, 13, dtype=np.float32).reshape(4, 3) + np.array([0.5, 1, 1.5], np.float32)


def given(x: Array = X, *, binary: bool = True) -> list[Any]:
    one = tritonclient.http.InferInput("x", list(x.shape), "FP32")
    one.set_data_from_numpy(x, binary_data=binary)
    return [one]


def wanted(*, binary: bool) -> list[Any]:
    return [tritonclient.http.InferRequestedOutput("y", binary_data=binary)]


# --------------------------------------------------------------------------- the server, and what it holds


def test_server(client: tritonclient.http.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    metadata = client.get_server_metadata()
    assert metadata["name"] == "triton"
    assert {"model_repository", "statistics", "binary_tensor_data"} <= set(metadata["extensions"])


def test_model_metadata_config_ready(client: tritonclient.http.InferenceServerClient) -> None:
    assert client.is_model_ready("linear")
    assert client.is_model_ready("linear", "1")
    assert not client.is_model_ready("linear", "7")
    assert not client.is_model_ready("nobody")
    metadata = client.get_model_metadata("linear")
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    assert metadata["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [-1, 3]}]
    assert client.get_model_metadata("versions", "3")["versions"] == ["3"]
    config = client.get_model_config("linear")
    assert config["name"] == "linear" and config["max_batch_size"] > 0


def test_statistics(client: tritonclient.http.InferenceServerClient) -> None:
    client.infer("linear", given())
    (one,) = client.get_inference_statistics("linear")["model_stats"]
    assert one["name"] == "linear" and one["inference_stats"]["success"]["count"] >= 1
    every = client.get_inference_statistics()["model_stats"]
    assert {"linear", "odd", "talker", "versions"} <= {m["name"] for m in every}


def test_repository(client: tritonclient.http.InferenceServerClient, service: Served) -> None:
    def index() -> dict[str, list[dict[str, str]]]:
        found: dict[str, list[dict[str, str]]] = {}
        for entry in client.get_model_repository_index():
            found.setdefault(entry["name"], []).append(entry)
        return found

    assert [e["state"] for e in index()["linear"]] == ["READY"]
    assert {e["version"] for e in index()["versions"]} == {"1", "3"}
    client.unload_model("odd")
    assert service.state("odd") == "COLD"
    assert [(e["state"], "reason" in e) for e in index()["odd"]] == [("UNAVAILABLE", True)]
    client.unload_model("odd")  # what is not loaded is unloaded already
    assert client.is_model_ready("odd")  # a request would load it
    client.load_model("odd")
    assert service.state("odd") == "READY"
    assert [e["state"] for e in index()["odd"]] == ["READY"]


def test_a_config_override_holds_until_the_model_is_unloaded(client: tritonclient.http.InferenceServerClient) -> None:
    before = client.get_model_config("linear")
    changed = {key: value for key, value in before.items() if key != "dynamic_batching"}
    try:
        client.load_model("linear", config=json.dumps({**changed, "max_batch_size": 5}))
        assert client.get_model_config("linear")["max_batch_size"] == 5
    finally:
        client.unload_model("linear")
        client.load_model("linear")
    assert client.get_model_config("linear")["max_batch_size"] == before["max_batch_size"]


# --------------------------------------------------------------------------- inference


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_infer(
    client: tritonclient.http.InferenceServerClient, binary_in: bool, binary_out: bool, compression: str | None
) -> None:
    found = client.infer(
        "linear",
        given(binary=binary_in),
        outputs=wanted(binary=binary_out),
        request_id="the-client's-own",
        request_compression_algorithm=compression,
        response_compression_algorithm=compression,
    )
    np.testing.assert_allclose(found.as_numpy("y"), Y, rtol=1e-5)
    assert found.get_response()["id"] == "the-client's-own"


def test_odd_tensors(client: tritonclient.http.InferenceServerClient) -> None:
    words = tritonclient.http.InferInput("words", [2], "BYTES")
    words.set_data_from_numpy(np.array([b"one", "zw\u00f6lf".encode()], dtype=object))
    times = tritonclient.http.InferInput("times", [1], "INT64")
    times.set_data_from_numpy(np.array([21], np.int64))
    found = client.infer("odd", [words, times])
    assert [w.decode() for w in found.as_numpy("same").reshape(-1)] == ["one", "zw\u00f6lf"]
    assert found.as_numpy("twice").reshape(-1).tolist() == [42]
    assert found.as_numpy("half").tolist() == [0.5, 2.0]
    assert found.as_numpy("large").reshape(-1).tolist() == [True]


def test_a_large_body_passes_whole(client: tritonclient.http.InferenceServerClient) -> None:
    x = np.arange(200_000 * 4, dtype=np.float32).reshape(-1, 4) % 17
    pieces = [client.infer("linear", given(part)).as_numpy("y") for part in np.split(x[:64], 2)]
    assert sum(map(len, pieces)) == 64
    body = np.arange(2_000_000, dtype=np.float32)
    one = tritonclient.http.InferInput("x", [len(body)], "FP32")
    one.set_data_from_numpy(body)
    found = client.infer("versions", [one], model_version="3")
    np.testing.assert_array_equal(found.as_numpy("y"), body * 6)


def test_versions(client: tritonclient.http.InferenceServerClient) -> None:
    x = np.array([1, 2], np.float32)
    for version, factor in (("1", 2), ("3", 6), ("", 6)):
        found = client.infer("versions", given(x), model_version=version)
        assert found.as_numpy("y").tolist() == [factor, 2 * factor]
    with pytest.raises(InferenceServerException, match="2"):
        client.infer("versions", given(x), model_version="2")


def test_async_infer(client: tritonclient.http.InferenceServerClient) -> None:
    waiting = [client.async_infer("linear", given(X + n)) for n in range(8)]
    for n, one in enumerate(waiting):
        np.testing.assert_allclose(one.get_result().as_numpy("y")[0], Y[0] + n * np.array([22, 26, 30]), rtol=1e-5)


def test_shared_memory(client: tritonclient.http.InferenceServerClient) -> None:
    handle = shm.create_shared_memory_region("modelium-test-x", "/modelium-test-x", X.nbytes)
    try:
        shm.set_shared_memory_region(handle, [X])
        client.register_system_shared_memory("modelium-test-x", "/modelium-test-x", X.nbytes)
        assert [r["name"] for r in client.get_system_shared_memory_status()] == ["modelium-test-x"]
        one = tritonclient.http.InferInput("x", list(X.shape), "FP32")
        one.set_shared_memory("modelium-test-x", X.nbytes)
        np.testing.assert_allclose(client.infer("linear", [one]).as_numpy("y"), Y, rtol=1e-5)
        client.unregister_system_shared_memory("modelium-test-x")
        assert client.get_system_shared_memory_status() == []
    finally:
        shm.destroy_shared_memory_region(handle)


def test_settings_of_the_runtime(client: tritonclient.http.InferenceServerClient) -> None:
    assert "log_verbose_level" in client.get_log_settings()
    assert client.update_log_settings({"log_verbose_level": 1})["log_verbose_level"] == 1
    assert client.update_log_settings({"log_verbose_level": 0})["log_verbose_level"] == 0
    assert "trace_level" in client.get_trace_settings()


async def test_the_asyncio_client(service: Served) -> None:
    async with tritonclient.http.aio.InferenceServerClient(service.address) as client:
        assert await client.is_server_live() and await client.is_server_ready()
        assert (await client.get_server_metadata())["name"] == "triton"
        assert await client.is_model_ready("linear") and not await client.is_model_ready("nobody")
        assert (await client.get_model_metadata("linear"))["name"] == "linear"
        assert (await client.get_model_config("linear"))["name"] == "linear"
        for binary in (True, False):
            inputs = [given(X + n, binary=binary) for n in range(4)]
            asked = [client.infer("linear", one, outputs=wanted(binary=binary)) for one in inputs]
            for n, found in enumerate(await asyncio.gather(*asked)):
                np.testing.assert_allclose(found.as_numpy("y")[0], Y[0] + n * np.array([22, 26, 30]), rtol=1e-5)
        assert (await client.get_inference_statistics("linear"))["model_stats"][0]["name"] == "linear"
        await client.unload_model("odd")
        states = {e["name"]: e["state"] for e in await client.get_model_repository_index()}
        assert states["linear"] == "READY" and states["odd"] == "UNAVAILABLE"
        await client.load_model("odd")
        with pytest.raises(InferenceServerException):
            await client.infer("nobody", given())


# --------------------------------------------------------------------------- gRPC


def by_grpc(x: Array = X) -> list[Any]:
    one = tritonclient.grpc.InferInput("x", list(x.shape), "FP32")
    one.set_data_from_numpy(x)
    return [one]


def words(text: str) -> list[Any]:
    one = tritonclient.grpc.InferInput("text_input", [1], "BYTES")
    one.set_data_from_numpy(np.array([text.encode()], dtype=object))
    return [one]


def test_the_grpc_client(service: Served) -> None:
    with tritonclient.grpc.InferenceServerClient(service.grpc_address()) as client:
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("linear")
        assert client.get_server_metadata().name == "triton"
        assert client.get_model_metadata("linear").inputs[0].name == "x"
        assert client.get_model_config("linear", as_json=True)["config"]["name"] == "linear"
        client.unload_model("linear")
        assert {m.name: m.state for m in client.get_model_repository_index().models}["linear"] == "UNAVAILABLE"
        np.testing.assert_allclose(client.infer("linear", by_grpc()).as_numpy("y"), Y, rtol=1e-5)  # which loads it
        assert service.state("linear") == "READY"
        for packed in ("gzip", "deflate", None):
            found = client.infer("linear", by_grpc(), compression_algorithm=packed, request_id="mine")
            np.testing.assert_allclose(found.as_numpy("y"), Y, rtol=1e-5)
            assert found.get_response().id == "mine"
        with pytest.raises(InferenceServerException, match="nobody"):
            client.infer("nobody", by_grpc())
        assert client.get_inference_statistics("linear").model_stats[0].inference_stats.success.count >= 4


def test_a_stream_of_the_grpc_client(service: Served) -> None:
    service.post("/models/talker/unload")
    answers: queue.Queue[Any] = queue.Queue()
    with tritonclient.grpc.InferenceServerClient(service.grpc_address()) as client:
        client.start_stream(lambda result, error: answers.put(error or result))
        for text in ("one two", "three"):
            client.async_stream_infer("talker", words(text), enable_empty_final_response=True)
        said, ends = "", 0
        while ends < 2:
            answer = answers.get(timeout=60).get_response()
            ends += answer.parameters["triton_final_response"].bool_param
            said += b"".join(answer.raw_output_contents)[4:].decode()
        client.async_stream_infer("nobody", words("x"))
        assert "nobody" in str(answers.get(timeout=60))
        client.stop_stream()
    assert said == "one twothree"
    assert service.model("talker")["in_flight"] == 0


async def test_the_asyncio_grpc_client(service: Served) -> None:
    async with tritonclient.grpc.aio.InferenceServerClient(service.grpc_address()) as client:
        assert await client.is_server_live() and await client.is_model_ready("linear")
        found = await asyncio.gather(*(client.infer("linear", by_grpc(X + n)) for n in range(4)))
        for n, one in enumerate(found):
            np.testing.assert_allclose(one.as_numpy("y")[0], Y[0] + n * np.array([22, 26, 30]), rtol=1e-5)

        async def asked() -> AsyncIterator[dict[str, Any]]:
            yield {"model_name": "talker", "inputs": words("one two three")}

        said = [result async for result, error in client.stream_infer(asked()) if error is None]
        assert (
            b"".join(one.as_numpy("text_output")[0] for one in said if one.get_response().outputs) == b"one two three"
        )
        call = client.stream_infer(asked())
        await anext(call)
        call.cancel()
    await eventually(lambda: not service.model("talker")["in_flight"], "nothing under way")


# --------------------------------------------------------------------------- text, by plain HTTP


def test_generate(service: Served) -> None:
    assert service.post("/v2/models/talker/generate", {"text_input": "hello"})["text_output"] == "hello"
    body = {"text_input": "one two three"}
    raw = service.request("POST", "/v2/models/talker/generate_stream", body).decode()
    events = [json.loads(line.removeprefix("data:")) for line in raw.splitlines() if line.startswith("data:")]
    assert [event["text_output"] for event in events] == ["one", " two", " three"]


def test_a_model_of_many_answers_by_infer(service: Served, client: tritonclient.http.InferenceServerClient) -> None:
    text = tritonclient.http.InferInput("text_input", [1], "BYTES")
    text.set_data_from_numpy(np.array([b"one two three"], dtype=object))
    assert client.infer("talker", [text]).as_numpy("text_output")[0] == b"one two three"
    assert service.post("/predict/talker", {"text": "one two"})["text"] == "one two"


def test_predict(service: Served) -> None:
    answer = service.post("/predict/linear", {"inputs": X[0].tolist()})
    np.testing.assert_allclose(answer["outputs"]["y"], Y[0], rtol=1e-5)
    answer = service.post("/predict/linear", {"inputs": {"x": X.tolist()}})
    np.testing.assert_allclose(answer["outputs"]["y"], Y, rtol=1e-5)
    answer = service.post("/predict/odd", {"inputs": {"words": ["a", "b"], "times": 3}})
    assert answer["outputs"]["same"] == ["a", "b"]
    assert np.array(answer["outputs"]["twice"]).reshape(-1).tolist() == [6]
    wrong = refused(service, "POST", "/predict/linear", {"inputs": [1, 2]})
    assert wrong.status == 400 and "'x'" in wrong.json["error"]["message"]


# --------------------------------------------------------------------------- OpenAI's clients


def test_the_first_chat_loads_a_cold_model(service: Served, made: Callable[..., Path]) -> None:
    service.drop(made("text-generation", "chatty"))
    service.drop(made("feature-extraction", "vectors"))
    service.until_state("chatty", "READY", "COLD")
    service.until_state("vectors", "READY", "COLD")
    for name in ("chatty", "vectors"):
        service.post(f"/models/{name}/unload")
        assert service.state(name) == "COLD"
    messages: list[Any] = [{"role": "user", "content": "hi"}]
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        listed = {model.id: model.created for model in client.models.list()}
        assert {"chatty", "vectors", "linear"} <= set(listed)
        assert abs(listed["chatty"] - time.time()) < 3600
        said = client.chat.completions.create(model="chatty", messages=messages, max_tokens=6, temperature=0)
        assert service.state("chatty") == "READY"
        straight = {"text_input": "<user>hi</s><assistant>", "max_tokens": 6}
        text = service.post("/v2/models/chatty/generate", straight)["text_output"]
        assert text and said.choices[0].message.content == text
        assert said.usage is not None and said.usage.completion_tokens == 6
        stream = client.chat.completions.create(
            model="chatty", messages=messages, max_tokens=6, temperature=0, stream=True
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text
        with pytest.raises(openai.BadRequestError, match="/v1/embeddings"):
            client.chat.completions.create(model="vectors", messages=messages)
        assert service.state("vectors") == "COLD", "nothing is loaded for what is refused"
        texts = ["hello there", *("a" * number for number in range(1, 40))]
        found = client.embeddings.create(model="vectors", input=texts)
        assert service.state("vectors") == "READY"
    straight = service.post("/predict/vectors", {"text": texts[0]})["outputs"]
    np.testing.assert_allclose(found.data[0].embedding, straight["sentence_embedding"], rtol=1e-4, atol=1e-5)
    assert found.usage.prompt_tokens == sum(map(len, texts)), "a token a byte"
    assert service.model("chatty")["in_flight"] == 0


async def test_the_asyncio_openai_client(service: Served, made: Callable[..., Path]) -> None:
    if "chatty" not in service.ps():
        service.drop(made("text-generation", "chatty"))
        service.until_state("chatty", "READY", "COLD")
    messages: list[Any] = [{"role": "user", "content": "hi"}]
    async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        assert "chatty" in {model.id async for model in client.models.list()}
        said = await client.chat.completions.create(model="chatty", messages=messages, max_tokens=6, temperature=0)
        stream = await client.chat.completions.create(
            model="chatty", messages=messages, max_tokens=6, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        chunks = [chunk async for chunk in stream]
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == said.choices[0].message.content
        assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 6
        legacy = await client.completions.create(model="chatty", prompt="hi", max_tokens=3, temperature=0)
        assert legacy.choices[0].text and legacy.usage is not None
        with pytest.raises(openai.NotFoundError, match="nobody"):
            await client.chat.completions.create(model="nobody", messages=messages)


# --------------------------------------------------------------------------- errors


ONE = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}

REFUSED: dict[str, Any] = {
    "another name": {"inputs": [{**ONE, "name": "z"}]},
    "another shape": {"inputs": [{**ONE, "shape": [1, 5], "data": [1, 2, 3, 4, 5]}]},
    "another datatype": {"inputs": [{**ONE, "datatype": "INT32"}]},
    "no inputs": {"inputs": []},
    "an output that is not": {"inputs": [ONE], "outputs": [{"name": "z"}]},
}

UNPARSABLE: dict[str, Any] = {
    "no JSON": b"{",
    "too little data": {"inputs": [{**ONE, "data": [1, 2]}]},
    "data of another kind": {"inputs": [{**ONE, "data": "abc"}]},
    "no name": {"inputs": [{"shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]},
    "nothing": {},
    "a list": [1],
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_model_refuses_is_passed_on_as_triton_says_it(service: Served, what: str) -> None:
    here = refused(service, "POST", "/v2/models/linear/infer", REFUSED[what])
    there = refused(Straight(triton_address(service)), "POST", "/v2/models/linear/infer", REFUSED[what])
    assert (here.status, here.body) == (there.status, there.body)
    assert here.status == 400


@pytest.mark.parametrize("what", UNPARSABLE)
def test_what_triton_can_not_parse_is_the_clients_fault(service: Served, what: str) -> None:
    """Triton says the same under 500, as if it were its own."""
    before = service.model("linear")["failures"]
    for path in ("infer", "generate") if what in ("no JSON", "a list") else ("infer",):
        here = refused(service, "POST", f"/v2/models/linear/{path}", UNPARSABLE[what])
        there = refused(Straight(triton_address(service)), "POST", f"/v2/models/linear/{path}", UNPARSABLE[what])
        assert (here.status, there.status, here.body) == (400, 500, there.body)
    assert service.model("linear")["failures"] == before


def test_errors_have_tritons_shape(service: Served, client: tritonclient.http.InferenceServerClient) -> None:
    for path in ("/v2/models/nobody/infer", "/v2/models/nobody/generate"):
        unknown = refused(service, "POST", path, x_body())
        assert unknown.status == 404 and "nobody" in unknown.json["error"]
    with pytest.raises(InferenceServerException, match="nobody") as caught:
        client.infer("nobody", given())
    assert caught.value.status() == "404"
    with pytest.raises(InferenceServerException, match="nobody"):
        client.load_model("nobody")
    assert refused(service, "GET", "/v2/none-such").status == 404
    assert refused(service, "GET", "/v2/models/linear/infer").status == 405


def test_a_load_that_triton_refuses_is_told_with_its_reason(service: Served, tmp_path: Path) -> None:
    bad = toy(tmp_path / "bad")
    (bad.path / "1" / "model.py").write_text("raise RuntimeError('not today')\n")
    service.drop(bad.path)
    service.until(lambda: service.state("bad") == "FAILED", what="its load to fail")
    assert "not today" in service.model("bad")["reason"]
    answer = refused(service, "POST", "/v2/models/bad/infer", x_body())
    assert answer.status == 503 and "not today" in answer.json["error"]
    loading = refused(service, "POST", "/v2/repository/models/bad/load")
    assert loading.status == 400 and "not today" in loading.json["error"]
    assert "not today" in "\n".join(str(service.get("/models/bad/logs?lines=200")).splitlines())
    service.request("DELETE", "/models/bad")
    assert service.state("bad") == "-"


def test_who_asks_in_a_browser_on_another_page_is_refused(service: Served) -> None:
    answer = refused(service, "POST", "/models/linear/unload", {}, origin="https://elsewhere.example")
    assert answer.status == 403
    assert service.state("linear") == "READY"
    assert refused(service, "GET", "/models", host="elsewhere.example").status == 403


# --------------------------------------------------------------------------- metrics


def metrics(service: Served) -> dict[str, dict[frozenset[tuple[str, str]], float]]:
    """Value by sample name and labels; raises when the text is not what Prometheus reads."""
    found: dict[str, dict[frozenset[tuple[str, str]], float]] = {}
    for family in text_string_to_metric_families(service.request("GET", "/metrics").decode()):
        for sample in family.samples:
            found.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    return found


def value(found: Any, name: str, **labels: str) -> float | None:
    """The one sample of this name with at least these labels; None when there is none."""
    fitting = [v for k, v in found.get(name, {}).items() if set(labels.items()) <= k]
    assert len(fitting) <= 1, (name, labels, fitting)
    return fitting[0] if fitting else None


async def test_metrics_while_loading_in_use_and_after_removal(service: Served, tmp_path: Path) -> None:
    model: Toy = toy(tmp_path / "counted")
    async with web(service) as ask:
        with model.holding("hold-load") as go_on:
            await asyncio.to_thread(service.drop, model.path)
            await eventually(lambda: service.state("counted") == "LOADING", "the load")
            team = {"x-modelium-organisation": "team a"}
            waiting = [asyncio.ensure_future(ask("/v2/models/counted/infer", x_body(), team)) for _ in range(3)]
            await eventually(lambda: service.model("counted")["waiting"] == 3, "three to wait")
            found = metrics(service)
            assert value(found, "modelium_model_state", model="counted", state="LOADING") == 1
            assert value(found, "modelium_model_waiting", model="counted") == 3
            assert value(found, "modelium_waiting") == 3
            assert value(found, "modelium_model_idle_seconds", model="counted") is None
            go_on()
            assert [got.status for got in await asyncio.gather(*waiting)] == [200] * 3
        with model.holding("hold-infer"):
            held = asyncio.ensure_future(ask("/v2/models/counted/infer", x_body()))
            await eventually(lambda: model.count("requests") == 4, "the request to arrive")
            assert value(metrics(service), "modelium_model_in_flight", model="counted") == 1
        assert (await held).status == 200
        refusal = await ask("/v2/models/counted/infer", {"inputs": []})
        assert refusal.status == 400
    found = metrics(service)
    assert value(found, "modelium_requests_total", model="counted", organisation="team a", result="ok") == 3
    assert value(found, "modelium_requests_total", model="counted", organisation="", result="ok") == 2
    # a data path tells no latencies: only those that waited went by the service
    by_service = 5 if service.get("/status")["data_path"]["name"] == "service" else 3
    assert value(found, "modelium_request_seconds_count", model="counted") == by_service
    assert value(found, "modelium_request_seconds_bucket", model="counted", le="+Inf") == by_service
    assert (value(found, "modelium_model_qps", model="counted") or 0) > 0
    assert value(found, "modelium_model_idle_seconds", model="counted") is not None
    assert value(found, "modelium_model_loads_total", model="counted", reason="dropped") == 1
    assert value(found, "modelium_model_state", model="counted", state="READY") == 1
    assert (value(found, "modelium_model_memory_bytes", model="counted", source="measured") or 0) > 2**20
    assert value(found, "modelium_runtime_up", runtime="triton") == 1
    assert value(found, "modelium_queue_length") == 0
    for kind in ("total", "used", "budget", "booked"):
        assert (value(found, "modelium_device_memory_bytes", device="cpu:0", kind=kind) or 0) > 0
    states = {dict(k)["state"]: v for k, v in found["modelium_models"].items()}
    assert states["READY"] >= 4

    await asyncio.to_thread(service.post, "/models/counted/unload")
    assert value(metrics(service), "modelium_model_unloads_total", model="counted", reason="asked") == 1
    await asyncio.to_thread(service.request, "DELETE", "/models/counted")
    for name, samples in metrics(service).items():
        assert not any(("model", "counted") in labels for labels in samples), name


# --------------------------------------------------------------------------- the command line


def test_the_command_line(service: Served, tmp_path: Path) -> None:
    listed = json.loads(service.cli("ps", "--json").stdout)
    assert {"linear", "odd", "talker", "versions"} <= {m["name"] for m in listed}
    table = service.cli("ps", "--devices").stdout
    assert "cpu:0" in table and "triton" in table
    shown = json.loads(service.cli("show", "linear", "--json").stdout)
    assert shown["format"] == "onnx" and shown["plan"]["reason"]
    assert "because" in service.cli("plan", str(models.onnx_linear(tmp_path / "planned.onnx"))).stdout
    assert service.state("planned") == "-"
    assert json.loads(service.cli("unload", "odd", "--json").stdout)["state"] == "COLD"
    service.cli("pin", "odd")
    service.until_state("odd", "READY")
    stuck = service.cli("unload", "odd", check=False)
    assert stuck.returncode == 1 and "pinned" in stuck.stderr
    service.cli("unpin", "odd")
    assert not service.model("odd")["pinned"]
    assert "odd is READY" in service.cli("load", "odd").stdout
    told = json.loads(service.cli("explain", "odd", "--json").stdout)
    assert told["measured"]["loads"] >= 1 and told["transitions"] and told["next"]
    assert service.cli("logs", "triton", "-n", "5").stdout
    checked = json.loads(service.cli("check", "--json").stdout)
    assert checked["ok"], [c for c in checked["checks"] if not c["ok"]]
    nobody = service.cli("show", "nobody", check=False)
    assert nobody.returncode == 1 and "nobody" in nobody.stderr
    gone = service.cli("ps", "--url", "http://127.0.0.1:9", check=False)
    assert gone.returncode == 3 and "Traceback" not in gone.stderr


def test_an_answer_for_each_route_that_the_index_lists(service: Served) -> None:
    for path in ("/", "/livez", "/readyz", "/health", "/status", "/check", "/plugins", "/decisions", "/models"):
        assert service.request("GET", path)
    assert service.get("/health")["ready"] is True
    assert {m["name"] for m in service.get("/models?state=READY")} >= {"linear"}
    assert infer(service, "versions", [1]) == [6]
    try:
        service.get("/models/versions/none-such")
    except Answer as exc:
        assert exc.status == 404
