"""A model written for Triton's Python backend, hosted without Triton and without Ray."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
from modelium_plugin_rayserve.onray import pb_utils
from modelium_plugin_rayserve.onray.hosting import HostedModel
from modelium_plugin_rayserve.onray.kserve import Asked, Problem

CONFIG: dict[str, Any] = {
    "name": "m",
    "max_batch_size": 4,
    "dynamic_batching": {},
    "input": [{"name": "x", "data_type": "TYPE_INT64", "dims": [1]}],
    "output": [{"name": "y", "data_type": "TYPE_INT64", "dims": [1]}],
    "parameters": {},
}

HEAD = """\
import numpy as np, threading, triton_python_backend_utils as pb_utils

def answer(request, factor=1):
    x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
    return pb_utils.InferenceResponse([pb_utils.Tensor("y", x * factor)])

def refuse(message, code):
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
"""

Host = Callable[..., HostedModel]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made: list[HostedModel] = []
    path, modules = list(sys.path), set(sys.modules)

    def make(text: str, **changes: Any) -> HostedModel:
        (tmp_path / "1").mkdir()
        (tmp_path / "1/model.py").write_text(HEAD + dedent(text))
        config = {key: value for key, value in (CONFIG | changes).items() if value is not None}
        made.append(HostedModel(tmp_path, "1", config, gpu=False))
        return made[-1]

    yield make
    for model in made:
        model.close()
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]
    assert not (tmp_path / "1/__pycache__").exists()


def ask(value: int) -> Asked:
    return Asked([pb_utils.Tensor("x", np.array([[value]]))])


async def all_of(model: HostedModel, value: int) -> list[int]:
    async with aclosing(model.responses(ask(value))) as answers:
        return [int(answer.output_tensors()[0].as_numpy().item()) async for answer in answers]


async def test_what_waits_is_one_batch_and_no_larger_than_allowed(host: Host) -> None:
    model = host(
        """
        class TritonPythonModel:
            def initialize(self, args):
                self.go, self.begun, self.sizes = threading.Event(), threading.Event(), []
            def execute(self, requests):
                self.sizes.append(len(requests))
                self.begun.set()
                self.go.wait(60)
                return [answer(r, 10) for r in requests]
        """
    )
    users = model._model
    first = asyncio.create_task(all_of(model, 0))
    await asyncio.to_thread(users.begun.wait, 60)
    others = [asyncio.create_task(all_of(model, value)) for value in range(1, 7)]
    await asyncio.sleep(0)  # they are in the queue now
    users.go.set()
    assert await first == [0]
    assert [await other for other in others] == [[value * 10] for value in range(1, 7)]
    assert users.sizes == [1, 4, 2]
    assert model.executions == 3


async def test_a_delay_waits_for_a_batch_of_the_preferred_size(host: Host) -> None:
    model = host(
        """
        class TritonPythonModel:
            def execute(self, requests):
                return [answer(r, len(requests)) for r in requests]
        """,
        dynamic_batching={"preferred_batch_size": [3], "max_queue_delay_microseconds": "60000000"},
    )
    assert await asyncio.gather(*(all_of(model, 1) for _ in range(3))) == [[3], [3], [3]]


async def test_without_dynamic_batching_each_is_alone(host: Host) -> None:
    model = host(
        """
        class TritonPythonModel:
            def execute(self, requests):
                assert len(requests) == 1
                return [answer(requests[0])]
        """,
        dynamic_batching=None,
    )
    assert sorted(await asyncio.gather(*(all_of(model, value) for value in range(5)))) == [[v] for v in range(5)]


async def test_a_decoupled_model_answers_piece_by_piece(host: Host) -> None:
    model = host(
        """
        class TritonPythonModel:
            def execute(self, requests):
                for request in requests:
                    threading.Thread(target=self.count, args=(request.get_response_sender(), request)).start()
            def count(self, sender, request):
                top = pb_utils.get_input_tensor_by_name(request, "x").as_numpy().item()
                for value in range(top):
                    sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("y", np.array([value]))]))
                sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        """,
        model_transaction_policy={"decoupled": True},
    )
    assert model.decoupled
    assert await asyncio.gather(*(all_of(model, top) for top in (3, 0))) == [[0, 1, 2], []]


async def test_who_leaves_is_told_to_the_model(host: Host) -> None:
    model = host(
        """
        class TritonPythonModel:
            def initialize(self, args):
                self.seen = threading.Event()
            def execute(self, requests):
                threading.Thread(target=self.run, args=(requests[0],)).start()
            def run(self, request):
                sender = request.get_response_sender()
                while not sender.is_cancelled():
                    sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("y", np.array([1]))]))
                sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
                self.seen.set()
        """,
        model_transaction_policy={"decoupled": True},
    )
    async with aclosing(model.responses(ask(1))) as answers:
        async for _ in answers:
            break
    assert await asyncio.to_thread(model._model.seen.wait, 60)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ("raise KeyError('no such thing')", 500, "KeyError: 'no such thing'"),
        ("return []", 500, "expected execute.. to return 1 responses, found 0"),
        ("return None", 500, "found NoneType"),
        ("raise pb_utils.TritonModelException('ouch')", 500, "ouch"),
        ("return [refuse('bad', pb_utils.TritonError.INVALID_ARG)]", 400, "^bad$"),
        ("return [refuse('full', pb_utils.TritonError.UNAVAILABLE)]", 503, "^full$"),
        ("return [pb_utils.InferenceRequest(model_name='other').exec()]", 500, "can't ask other models"),
    ],
)
async def test_errors_are_the_models_own(host: Host, body: str, status: int, words: str) -> None:
    model = host(
        f"""
        class TritonPythonModel:
            def execute(self, requests):
                {body}
        """
    )
    with pytest.raises(Problem, match=words) as caught:
        await all_of(model, 1)
    assert caught.value.status == status


def test_a_model_that_does_not_load_says_why(host: Host, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="torn"):
        host(
            """
            class TritonPythonModel:
                def initialize(self, args):
                    raise RuntimeError("torn")
            """
        )
    with pytest.raises(FileNotFoundError, match="same path on its own node"):
        HostedModel(tmp_path, "2", CONFIG, gpu=False)


def test_what_a_model_is_told_of_itself(host: Host, tmp_path: Path) -> None:
    model = host(
        """
        class TritonPythonModel:
            def initialize(self, args):
                self.args = args
        """
    )
    args = model._model.args
    assert json.loads(args["model_config"]) == CONFIG
    assert args["model_repository"] == str(tmp_path) and args["model_version"] == "1"
    assert args["model_instance_kind"] == "CPU" and args["model_name"] == "m"


def test_a_model_completes_its_configuration_and_is_ended_in_the_end(host: Host, tmp_path: Path) -> None:
    model = host(
        f"""
        class TritonPythonModel:
            @staticmethod
            def auto_complete_config(config):
                config.add_input({{"name": "x", "data_type": "TYPE_FP32", "dims": [7]}})
                config.add_output({{"name": "z", "data_type": "TYPE_STRING", "dims": [-1]}})
                config.set_max_batch_size(0)
                return config
            def finalize(self):
                open({str(tmp_path / "ended")!r}, "w").close()
        """,
        output=[],
    )
    assert model.signature.metadata()["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [7]}]
    assert model.signature.metadata()["outputs"] == [{"name": "z", "datatype": "BYTES", "shape": [-1]}]
    model.close()
    assert (tmp_path / "ended").exists() and not model._thread.is_alive()


def test_names_of_types_are_tritons() -> None:
    assert pb_utils.triton_string_to_numpy("TYPE_FP32") is np.float32
    assert pb_utils.triton_string_to_numpy("TYPE_STRING") is np.object_
    assert pb_utils.triton_string_to_numpy("TYPE_BF16") is None
    assert pb_utils.numpy_to_triton_type(np.uint8) == "TYPE_UINT8"
    assert pb_utils.Tensor("x", np.array(["a"])).triton_dtype() == "TYPE_STRING"
    with pytest.raises(pb_utils.TritonModelException, match="complex"):
        pb_utils.Tensor("x", np.array([1j]))
    with pytest.raises(pb_utils.TritonModelException, match="dlpack"):
        pb_utils.Tensor.of("x", "BF16", np.zeros(1, np.uint16)).as_numpy()
