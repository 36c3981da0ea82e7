"""What a server is started with, and what its last words mean; nothing is started here."""

from __future__ import annotations

from pathlib import Path

import pytest
from llamacpp_lab import Lab
from modelium_plugin_llamacpp.install import Program
from modelium_plugin_llamacpp.kind import LlamaCppKind
from modelium_plugin_llamacpp.settings import model_settings
from tiny_gguf import llama

from modelium.api import LoadRequest
from modelium.errors import DriverError, LoadRejected, ModelError


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


@pytest.fixture
def kind(lab: Lab) -> LlamaCppKind:
    settings = lab.context.settings
    kind = LlamaCppKind(lab.context, settings)  # type: ignore[arg-type]
    kind._program = Program(["llama-server"], "llama-server 1", gpu=True)
    return kind


@pytest.fixture
def request_(lab: Lab, tmp_path: Path) -> LoadRequest:
    return lab.model("m", llama(tmp_path / "m.gguf", context=4096), ctx=2048)


def on(request: LoadRequest, kind: str, *devices: str) -> LoadRequest:
    plan = request.plan.model_copy(update={"device_kind": kind})
    return request.model_copy(update={"plan": plan, "devices": devices})


def option(argv: list[str], name: str) -> str:
    return argv[argv.index(name) + 1]


async def test_on_a_cpu(kind: LlamaCppKind, request_: LoadRequest) -> None:
    command = await kind.command(request_, 1234, None)
    assert command is not None
    argv = list(command.argv)
    assert option(argv, "--host") == "127.0.0.1" and option(argv, "--port") == "1234"
    assert option(argv, "--alias") == "m"
    assert option(argv, "--ctx-size") == "4096", "of both requests together"
    assert option(argv, "--n-gpu-layers") == "0"
    assert command.exclusive == ()
    assert command.env["CUDA_VISIBLE_DEVICES"] == ""
    assert "--no-mmap" not in argv
    quantised = request_.analysis.model_copy(update={"facts": {**request_.analysis.facts, "quantization": "Q4_K_M"}})
    command = await kind.command(request_.model_copy(update={"analysis": quantised}), 1234, None)
    assert command is not None and "--no-mmap" in command.argv


async def test_on_gpus(kind: LlamaCppKind, request_: LoadRequest) -> None:
    with pytest.raises(DriverError, match="NVML shows no GPU"):
        await kind.command(on(request_, "cuda", "cuda:0"), 1, None)

    class Gpus:
        def uuid(self, device: str) -> str:
            return f"GPU-{device[-1]}"

    kind._gpus = Gpus()  # type: ignore[assignment]
    command = await kind.command(on(request_, "cuda", "cuda:2", "cuda:0"), 1, None)
    assert command is not None
    argv = list(command.argv)
    assert command.env["CUDA_VISIBLE_DEVICES"] == "GPU-2,GPU-0"
    assert option(argv, "--tensor-split") == "1,1"
    assert command.exclusive == ("cuda:2", "cuda:0")
    assert option(argv, "--n-gpu-layers") == "999"


def test_others_start_on_its_gpus_when_it_has_taken_its_memory(kind: LlamaCppKind) -> None:
    lines = [
        "0.00.014.215 I srv    load_model: loading model '/r/m/1/model.gguf'",
        "0.00.022.836 I cmn          init: llama threadpool init, n_threads = 2",
        "0.00.566.153 I srv    load_model: initializing, n_slots = 2, n_ctx_slot = 512, kv_unified = 'false'",
        "0.00.574.905 I srv          init: model loaded",
    ]
    assert not kind.settled(lines[:-1])
    assert kind.settled(lines)


async def test_what_can_be_mended_is_tried_once(kind: LlamaCppKind, request_: LoadRequest) -> None:
    memory, port = DriverError("", code="out_of_memory"), DriverError("", code="no_port")
    assert await kind.command(request_, 1, None) is not None
    command = await kind.command(request_, 1, memory)
    assert command is not None and option(list(command.argv), "--ctx-size") == "2048"
    command = await kind.command(request_, 1, port)
    assert command is not None and option(list(command.argv), "--ctx-size") == "2048"
    assert await kind.command(request_, 1, memory) is None
    assert await kind.command(request_, 1, port) is None
    command = await kind.command(request_, 1, None)
    assert command is not None and not command.note
    assert await kind.command(request_, 1, DriverError("")) is None


@pytest.mark.parametrize("ctx", [0, 99999])
async def test_a_context_is_what_the_model_has(kind: LlamaCppKind, request_: LoadRequest, ctx: int) -> None:
    plan = request_.plan.model_copy(update={"settings": {"ctx": ctx, "parallel": 1}})
    command = await kind.command(request_.model_copy(update={"plan": plan}), 1, None)
    assert command is not None and option(list(command.argv), "--ctx-size") == "4096"


async def test_wrong_settings_are_told(kind: LlamaCppKind, request_: LoadRequest) -> None:
    plan = request_.plan.model_copy(update={"settings": {"ctx": -1}})
    with pytest.raises(ModelError, match="ctx"):
        await kind.command(request_.model_copy(update={"plan": plan}), 1, None)


@pytest.mark.parametrize("arg", ["--host", "--port", "--gpu-layers", "--ctx_size", "-c", "-m", "-hf", "--model-url=x"])
def test_what_is_ours_to_say_is_nobody_else_s(arg: str) -> None:
    with pytest.raises(ModelError, match=r"args: .*(Modelium's to say|short form)"):
        model_settings({"args": [arg, "0.0.0.0"]})
    assert model_settings({"args": ["--chat-template-file", "/t", "--reasoning-budget", "-1"]}).args


@pytest.mark.parametrize(
    ("line", "code", "told"),
    [
        ("0.1 E llama_model_load: error loading model: unknown model architecture: 'x'", "unknown_architecture", "'x'"),
        (
            "0.1 E x: error loading model: unknown pre-tokenizer type: 'y'",
            "unknown_architecture",
            "pre-tokenizer type 'y'",
        ),
        ("0.1 E ggml_gallocr: failed to allocate CUDA0 buffer of size 99", "out_of_memory", "CUDA0 buffer of size 99"),
        ("0.1 E srv  start: couldn't bind HTTP server socket, port: 1", "no_port", "taken meanwhile"),
        ("error: invalid argument: --what", "bad_settings", "--what"),
        ("launcher.py: error: unrecognized arguments: --what", "bad_settings", "--what"),
        ("0.1 I srv load_model: loading model 'x'", "process_died", "dmesg"),
        ("0.1 E srv something else", "process_died", "something else"),
    ],
)
def test_last_words(kind: LlamaCppKind, request_: LoadRequest, line: str, code: str, told: str) -> None:
    found = kind.failure(request_, ["0.0 I srv init: initializing", line])
    assert (found.code, isinstance(found, LoadRejected)) == (code, code in ("unknown_architecture", "bad_settings"))
    assert told in found.message and found.message.startswith("m: ")


async def test_a_projector_and_more_arguments(kind: LlamaCppKind, request_: LoadRequest) -> None:
    settings = {**request_.plan.settings, "projector": "p.gguf", "args": ["--lora", "l.gguf"], "threads": 3}
    changed = request_.model_copy(update={"plan": request_.plan.model_copy(update={"settings": settings})})
    command = await kind.command(changed, 1, None)
    assert command is not None
    argv = list(command.argv)
    assert option(argv, "--mmproj") == str(request_.path / "1" / "p.gguf")
    assert argv[-6:] == ["--lora", "l.gguf", "--host", "127.0.0.1", "--port", "1"], "the last of a name counts"
    assert option(argv, "--threads") == "3"
