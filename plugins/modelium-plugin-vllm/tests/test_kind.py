"""Command lines, environments and further tries, without a vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from modelium_plugin_vllm import arguments, cpu, reasons
from modelium_plugin_vllm.environment import Vllm
from modelium_plugin_vllm.kind import LAUNCHER, VllmKind
from modelium_plugin_vllm.settings import ModelSettings, VllmSettings, engine_settings, model_settings
from pydantic import ValidationError
from tiny_hf import adapter, alphabet
from vllm_lab import analyse, request

from modelium.api import Device, LoadRequest, Plan, RuntimeContext
from modelium.api.fakes import FakeProcesses, silent
from modelium.api.servers import GRACE_S
from modelium.errors import DriverError, LoadRejected, ModelError

GIB = 2**30


class Names:
    """For `Gpus`: what a device is called whatever others there are."""

    def uuid(self, device: str) -> str:
        return f"GPU-{device}"


@pytest.fixture
def kind(tmp_path: Path) -> VllmKind:
    settings = VllmSettings(env={"AWS_SECRET_ACCESS_KEY": "s3cr3t"})
    context = RuntimeContext(
        name="vllm",
        repository=tmp_path / "repository",
        state_dir=tmp_path / "state",
        cache_dir=tmp_path / "cache",
        settings=settings,
        processes=FakeProcesses(),
        report=silent,
    )
    made = VllmKind(context, settings)
    (tmp_path / "env/lib").mkdir(parents=True)
    (tmp_path / "env/lib/libiomp5.so").touch()
    made._vllm = Vllm(
        python=tmp_path / "env/bin/python",
        version="0.32.0",
        kind="cuda",
        package=tmp_path,
        modules=frozenset({"fastsafetensors"}),
        prefix=tmp_path / "env",
    )
    made._gpus = Names()  # type: ignore[assignment]
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    alphabet(tmp_path / "repository/m/1/model")
    return tmp_path / "repository/m"


def asked(folder: Path, *gpus: int, task: str = "text-generation", **settings: Any) -> LoadRequest:
    """A load on these GPUs of 40 GiB, else on the CPU; 8 GiB are booked."""
    analysis = analyse(folder / "1/model").model_copy(update={"task": task})
    devices = [Device(id=f"cuda:{n}", kind="cuda", name="GPU", total_bytes=40 * GIB, used_bytes=0) for n in gpus] or [
        Device(id="cpu:0", kind="cpu", name="host", total_bytes=16 * GIB, used_bytes=0)
    ]
    plan = Plan(
        brain="test",
        runtime="vllm",
        serving="generate",
        device_kind=devices[0].kind,
        devices=len(devices),
        settings={"max_model_len": 512, "kv_cache_memory_bytes": 2**20, **settings},
        memory_bytes=8 * GIB,
        load_s=1,
        reason="a test wants it",
        confidence=1,
    )
    return request("m", folder, plan, analysis, *devices)


async def started(
    kind: VllmKind, request: LoadRequest, former: DriverError | None = None
) -> tuple[dict[str, str | list[str]], dict[str, str], str]:
    """Options with their values, the environment, and what a person is told."""
    command = await kind.command(request, 8100, former)
    assert command is not None
    assert list(command.argv[:2]) == [str(kind._vllm.python), str(LAUNCHER)]  # type: ignore[union-attr]
    options: dict[str, Any] = {}
    for word in command.argv[2:]:
        if word.startswith("--"):
            options[word] = name = []
        else:
            name.append(word)
    return {k: v[0] if len(v) == 1 else v for k, v in options.items()}, _set(command.env), command.note


def _set(environment: Mapping[str, str | None]) -> dict[str, str]:
    return {variable: value for variable, value in environment.items() if value is not None}


async def test_on_a_cpu(kind: VllmKind, folder: Path) -> None:
    options, env, note = await started(kind, asked(folder, threads=3))
    assert options == {
        "--model": str(folder / "1/model"),
        "--served-model-name": "m",
        "--host": "127.0.0.1",
        "--port": "8100",
        "--disable-access-log-for-endpoints": arguments.QUIET,
        "--shutdown-timeout": str(arguments.FINISH_S),
        "--dtype": "auto",
        "--max-model-len": "512",
        "--kv-cache-memory-bytes": str(2**20),
        "--enforce-eager": [],
        "--distributed-executor-backend": "uni",
    }
    assert env["OMP_NUM_THREADS"] == "3" and env["CUDA_VISIBLE_DEVICES"] == ""
    assert env["HF_HUB_OFFLINE"] == env["VLLM_NO_USAGE_STATS"] == env["DO_NOT_TRACK"] == "1"
    assert env["LD_PRELOAD"].endswith("env/lib/libiomp5.so")
    assert env["VLLM_HOST_IP"] == "127.0.0.1"
    assert "VLLM_SERVER_DEV_MODE" not in env
    assert note == ""
    assert arguments.FINISH_S < GRACE_S
    command = await kind.command(asked(folder), 8100, None)
    assert command is not None and command.exclusive == ()
    assert int(_set(command.env)["OMP_NUM_THREADS"]) == max(1, cpu.cores() - 1)


async def test_on_gpus(kind: VllmKind, folder: Path) -> None:
    request = asked(folder, 1, 3, pipeline_parallel_size=2, sleep=True, max_num_seqs=16)
    options, env, _ = await started(kind, request)
    assert (options["--tensor-parallel-size"], options["--pipeline-parallel-size"]) == ("1", "2")
    assert options["--gpu-memory-utilization"] == "0.1", "8 GiB of two devices with 40 each"
    assert options["--kv-cache-memory-bytes"] == str(2**19), "of each device"
    assert options["--max-num-seqs"] == "16"
    assert options["--enable-sleep-mode"] == []
    assert "--enforce-eager" not in options and "--distributed-executor-backend" not in options
    assert env["CUDA_VISIBLE_DEVICES"] == "GPU-cuda:1,GPU-cuda:3"
    assert env["VLLM_SERVER_DEV_MODE"] == "1"
    assert "MODELIUM_VLLM_FORK" not in env and "OMP_NUM_THREADS" not in env
    command = await kind.command(request, 8100, None)
    assert command is not None and set(command.exclusive) == {"cuda:1", "cuda:3"}
    whole = request.model_copy(update={"memory_bytes": 90 * GIB})
    assert (await started(kind, whole))[0]["--gpu-memory-utilization"] == "0.98"


async def test_embeddings_and_quantisation(kind: VllmKind, folder: Path) -> None:
    request = asked(folder, 0, task="feature-extraction", quantization="fp8", kv_cache_dtype="fp8", dtype="float16")
    options, _, _ = await started(kind, request)
    assert options["--runner"] == "pooling"
    assert (options["--quantization"], options["--kv-cache-dtype"], options["--dtype"]) == ("fp8", "fp8", "float16")


async def test_adapters(kind: VllmKind, folder: Path, tmp_path: Path) -> None:
    adapter(folder / "1/model/in it")
    outside = adapter(tmp_path / "outside")
    request = asked(folder, lora_adapters={"a": "in it", "b": str(outside)}, max_lora_rank=8)
    options, _, _ = await started(kind, request)
    assert options["--enable-lora"] == [] and options["--max-lora-rank"] == "8"
    assert options["--lora-modules"] == [f"a={folder / '1/model/in it'}", f"b={outside}"]
    with pytest.raises(LoadRejected, match=r"adapter c of m was expected at .*/1/model/elsewhere"):
        await kind.command(asked(folder, lora_adapters={"c": "elsewhere"}), 8100, None)


async def test_load_formats_take_their_packages(kind: VllmKind, folder: Path) -> None:
    options, _, _ = await started(kind, asked(folder, load_format="fastsafetensors"))
    assert options["--load-format"] == "fastsafetensors"
    for streamed in ("runai_streamer", "runai_streamer_sharded", "RunAI_Streamer"):
        with pytest.raises(LoadRejected, match=r"pip install runai-model-streamer"):
            await kind.command(asked(folder, load_format=streamed), 8100, None)
    for plain in ("dummy", "sharded_state", "of-a-plugin"):
        options, _, _ = await started(kind, asked(folder, load_format=plain))
        assert options["--load-format"] == plain


async def test_a_second_try_with_less(kind: VllmKind, folder: Path) -> None:
    """The model keeps 512 bytes of each token: with 512 tokens and a block 320 KiB, with 256 and one 192 KiB."""
    request = asked(folder)
    no_memory = DriverError("short", code=reasons.NO_MEMORY)
    await started(kind, request)
    options, _, note = await started(kind, request, no_memory)
    assert options["--kv-cache-memory-bytes"] == str(2**19) and "smaller cache" in note
    assert await kind.command(request, 8100, no_memory) is None, "once for each reason"
    little = DriverError("short", code=reasons.NO_MEMORY, free_bytes=250 * 2**10)
    await started(kind, request)
    options, _, note = await started(kind, request, little)
    assert (options["--max-model-len"], options["--kv-cache-memory-bytes"]) == ("256", str(192 * 2**10))
    assert note == "with requests of 256 instead of 512 tokens, since memory was short"
    options, _, _ = await started(kind, request, DriverError("taken", code=reasons.NO_PORT))
    assert options["--max-model-len"] == "256", "what was changed before stays"
    await started(kind, request)
    options, _, note = await started(kind, request, DriverError("", code=reasons.SHORT_CACHE, fits=300))
    assert options["--max-model-len"] == "300" and "its cache has room for no more" in note
    await started(kind, request)
    options, _, note = await started(kind, request, DriverError("", code=reasons.TOO_LONG, fits=128))
    assert options["--max-model-len"] == "128" and "the model takes no more" in note


async def test_a_second_try_lays_claim_to_what_is_free(kind: VllmKind, folder: Path) -> None:
    request = asked(folder, 0)
    assert (await started(kind, request))[0]["--gpu-memory-utilization"] == "0.2"
    little = DriverError("short", code=reasons.NO_MEMORY, free_bytes=4 * GIB)
    options, _, _ = await started(kind, request, little)
    assert options["--gpu-memory-utilization"] == "0.09"
    assert (await started(kind, request))[0]["--gpu-memory-utilization"] == "0.2"


async def test_no_further_try_where_none_would_help(kind: VllmKind, folder: Path) -> None:
    request = asked(folder)
    for error in (
        DriverError("", code="process_died"),
        LoadRejected("damaged", code="files_damaged"),
        DriverError("", code=reasons.SHORT_CACHE, fits=64),
        DriverError("", code=reasons.NO_MEMORY, free_bytes=1000),
    ):
        await started(kind, request)
        assert await kind.command(request, 8100, error) is None


async def test_without_vllm(kind: VllmKind, folder: Path) -> None:
    kind._vllm = None
    with pytest.raises(DriverError, match="modelium runtimes install vllm"):
        await kind.command(asked(folder), 8100, None)


# --------------------------------------------------------------------------- settings


def test_wrong_settings_are_named_with_those_that_there_are() -> None:
    assert model_settings({"dtype": "float16", "repository": "/r", "device_bytes": 1}).dtype == "float16"
    with pytest.raises(ModelError, match=r"dtype: .*'bfloat16'.*max_model_len: .*there are: dtype, quantization"):
        model_settings({"dtype": "int3", "max_model_len": 0})
    with pytest.raises(ModelError, match=r"dtype: .*load_format: "):
        model_settings({"dtype": 16, "load_format": ""})


@pytest.mark.parametrize(("said", "meant"), [("half", "float16"), ("float", "float32")])
def test_dtypes_by_vllm_s_other_names(said: str, meant: str) -> None:
    assert model_settings({"dtype": said}).dtype == engine_settings({"dtype": said}).dtype == meant


@pytest.mark.parametrize(
    ("arg", "told"),
    [
        ("--port", "is Modelium's to say"),
        ("--host=0.0.0.0", "found --host, which is Modelium's to say: leave it out"),
        ("--served-model-name", "is Modelium's to say"),
        ("--gpu_memory_utilization=0.9", "is Modelium's to say"),
        ("--hos", "may mean --host"),
        ("-asc", "found the short form '-asc': write"),
    ],
)
def test_what_is_ours_to_say_is_nobody_else_s(arg: str, told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        ModelSettings(args=(arg, "1"))
    assert ModelSettings(args=("--enable-auto-tool-choice", "--tool-call-parser", "hermes"))


@pytest.mark.parametrize("adapters", [{"a b": "x"}, {"a=b": "x"}, {"a": ""}, {"a": "../x"}])
def test_adapters_have_plain_names_and_stay_in_the_model(adapters: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        ModelSettings(lora_adapters=adapters)


def test_the_section() -> None:
    assert VllmSettings(endpoint="http://box:8000/").endpoint == "http://box:8000"
    with pytest.raises(ValidationError, match="expected a URL"):
        VllmSettings(endpoint="box:8000")
    with pytest.raises(ValidationError, match="Extra inputs"):
        VllmSettings.model_validate({"pyhton": "x"})
    for field in (*VllmSettings.model_fields.values(), *ModelSettings.model_fields.values()):
        assert field.description


# --------------------------------------------------------------------------- the processor


def test_what_a_processor_computes(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_bf16\n\nprocessor\t: 1\nflags\t\t: fpu\n")
    newer = cpu.features(file)
    assert "avx2" in newer and cpu.computes_bf16(newer) and cpu.computes_int4(newer, "x86_64")
    older = frozenset({"avx2"})
    assert not cpu.computes_bf16(older) and not cpu.computes_int4(older, "x86_64")
    file.write_text("processor\t: 0\nFeatures\t: fp asimd bf16\n")
    assert cpu.computes_bf16(cpu.features(file)) and cpu.computes_int4(cpu.features(file), "aarch64")
    assert cpu.features(tmp_path / "none") == frozenset()


async def test_the_environment_that_is_configured_is_in_no_plan(kind: VllmKind, folder: Path) -> None:
    _, env, _ = await started(kind, asked(folder))
    assert env["AWS_SECRET_ACCESS_KEY"] == "s3cr3t" and env["VLLM_API_KEY"] == ""
    with pytest.raises(ModelError, match="env"):
        await started(kind, asked(folder, env={"A": "b"}))
