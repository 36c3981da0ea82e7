"""Directories of TensorRT-LLM and vLLM, laid out as their backends want them: read as they are, booked on GPUs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from modelium_plugin_triton.analyzer import modelium_analyze, modelium_completeness, modelium_scan
from modelium_plugin_triton.backend import TritonBackend
from modelium_plugin_triton.engines import OVERHEAD_BYTES
from test_servings import CPU, triton

from modelium.api import Analysis, Device, Offer
from modelium.errors import ModelError

GB = 10**9
GPUS = tuple(Device(id=f"cuda:{n}", kind="cuda", name="GPU", total_bytes=80 * GB, used_bytes=0) for n in range(2))
ENGINE_BYTES = 5000

ENSEMBLE = """
name: "ensemble"
platform: "ensemble"
max_batch_size: 8
input { name: "text_input" data_type: TYPE_STRING dims: [ 1 ] }
output { name: "text_output" data_type: TYPE_STRING dims: [ -1 ] }
ensemble_scheduling {
  step { model_name: "preprocessing" model_version: -1 }
  step { model_name: "tensorrt_llm" model_version: -1 }
  step { model_name: "postprocessing" model_version: -1 }
}
"""


def parameters(**values: Any) -> str:
    return "".join(f'parameters {{ key: "{k}" value {{ string_value: "{v}" }} }}\n' for k, v in values.items())


def config(name: str, backend: str, batch: str = "8", **values: Any) -> str:
    return (
        f'name: "{name}"\nbackend: "{backend}"\nmax_batch_size: {batch}\n'
        f"instance_group [ {{ count: 1 kind: KIND_CPU }} ]\n{parameters(**values)}"
    )


def folder(root: Path, name: str, text: str, files: dict[str, str] | None = None) -> Path:
    for file, content in {"config.pbtxt": text, "1/.gitkeep": "", **(files or {})}.items():
        (root / name / file).parent.mkdir(parents=True, exist_ok=True)
        (root / name / file).write_text(content)
    return root / name


def engines(where: Path, ranks: int = 1, **pretrained: Any) -> Path:
    """Engines as `trtllm-build` leaves them: `ENGINE_BYTES` on each rank."""
    where.mkdir(parents=True, exist_ok=True)
    for rank in range(ranks):
        (where / f"rank{rank}.engine").write_bytes(b"1" * ENGINE_BYTES)
    known = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 512}
    (where / "config.json").write_text(json.dumps({"pretrained_config": known | {"dtype": "float16"} | pretrained}))
    return where


def analyse(path: Path) -> Analysis:
    assert modelium_completeness(path) is None
    found = modelium_analyze(path)
    assert found is not None
    return found


def offer(analysis: Analysis, *backends: str) -> Offer:
    (found,) = TritonBackend().offers(analysis, triton(*backends or ("tensorrtllm", "python")), (CPU, *GPUS))
    return found


class TestTensorRtLlm:
    def test_the_whole_is_made_of_its_parts(self, tmp_path: Path) -> None:
        whole = analyse(folder(tmp_path, "ensemble", ENSEMBLE))
        assert whole.depends_on == ("preprocessing", "tensorrt_llm", "postprocessing")
        text = config("preprocessing", "python", tokenizer_dir="/t")
        tokenizer = folder(tmp_path, "preprocessing", text, {"1/model.py": "import json"})
        assert offer(analyse(tokenizer)).device_kinds == ("cpu",), "a part that computes nothing"

    def test_a_gpu_is_booked_whatever_the_kind_says(self, tmp_path: Path) -> None:
        place = engines(tmp_path / "elsewhere")
        found = analyse(folder(tmp_path, "tensorrt_llm", config("tensorrt_llm", "tensorrtllm", gpt_model_path=place)))
        assert found.weights_bytes == ENGINE_BYTES
        made = offer(found)
        assert (made.serving, made.device_kinds, made.devices) == ("as-is", ("cuda",), 1)
        known = ENGINE_BYTES + OVERHEAD_BYTES
        assert made.memory_bytes == known + int(0.9 * (80 * GB - known)), "unless told otherwise it takes nearly all"
        with pytest.raises(ModelError, match="on GPUs alone"):
            TritonBackend().offers(found, triton("tensorrtllm"), (CPU,))

    def test_a_cache_that_is_bounded(self, tmp_path: Path) -> None:
        place = engines(tmp_path / "elsewhere")
        some: dict[str, Any] = {"gpt_model_path": place, "max_tokens_in_paged_kv_cache": 1000}
        token = 4 * 2 * 2 * 64 * 2  # layers, keys and values, heads, head size, bytes
        known = ENGINE_BYTES + OVERHEAD_BYTES
        made = offer(analyse(folder(tmp_path, "a", config("a", "tensorrtllm", **some))))
        assert made.memory_bytes == known + 1000 * token
        engines(place, head_size=32, quantization={"kv_cache_quant_algo": "FP8"})
        made = offer(analyse(folder(tmp_path, "b", config("b", "tensorrtllm", **some))))
        assert made.memory_bytes == known + 1000 * token // 4
        half: dict[str, Any] = {"gpt_model_path": place, "kv_cache_free_gpu_mem_fraction": "0.5"}
        made = offer(analyse(folder(tmp_path, "c", config("c", "tensorrtllm", **half))))
        assert made.memory_bytes == known + int(0.5 * (80 * GB - known))

    def test_each_rank_has_a_gpu(self, tmp_path: Path) -> None:
        place = engines(tmp_path / "elsewhere", ranks=2)
        text = config("m", "tensorrtllm", gpt_model_path=place, kv_cache_free_gpu_mem_fraction="0.0")
        made = offer(analyse(folder(tmp_path, "m", text)))
        assert made.devices == 2
        assert made.memory_bytes == 2 * (ENGINE_BYTES + OVERHEAD_BYTES)

    def test_engines_in_the_folder_itself(self, tmp_path: Path) -> None:
        """The path names the place in the repository, where it does not lie yet."""
        text = config("m", "tensorrtllm", gpt_model_path="/repository/m/1")
        path = folder(tmp_path, "m", text)
        engines(path / "1")
        found = analyse(path)
        assert found.facts["takes"]["weights_bytes"] == ENGINE_BYTES
        assert found.weights_bytes > ENGINE_BYTES
        assert not list(modelium_scan(path))

    def test_engines_that_only_triton_can_see(self, tmp_path: Path) -> None:
        path = folder(tmp_path, "m", config("m", "tensorrtllm", gpt_model_path="/only/in/its/container"))
        (finding,) = modelium_scan(path)
        assert (finding.severity, finding.code) == ("warn", "engine_unseen")
        assert "/only/in/its/container" in finding.message
        assert offer(analyse(path)).device_kinds == ("cuda",)

    def test_its_own_runtime_in_the_python_backend(self, tmp_path: Path) -> None:
        place = engines(tmp_path / "elsewhere")
        text = config("m", "python", gpt_model_path=place)
        made = offer(analyse(folder(tmp_path, "m", text, {"1/model.py": "import tensorrt_llm"})))
        assert made.device_kinds == ("cuda",)

    def test_business_logic_needs_the_models_that_it_calls(self, tmp_path: Path) -> None:
        code = {
            "1/model.py": 'decoder = TritonDecoder(preproc_model_name="pre_a", postproc_model_name="post_a")',
            "1/lib/triton_decoder.py": 'def f(preproc_model_name="preprocessing"): ...',
        }
        text = config("bls", "python", tensorrt_llm_model_name="llm_a", tensorrt_llm_draft_model_name="${draft}")
        assert analyse(folder(tmp_path, "bls", text, code)).depends_on == ("llm_a", "pre_a", "post_a")
        text = config("other", "python", tensorrt_llm_model_name="${tensorrt_llm_model_name}")
        del code["1/model.py"]
        found = analyse(folder(tmp_path, "other", text, {"1/model.py": "import json", **code}))
        assert found.depends_on == ("tensorrt_llm", "preprocessing")

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            (
                config("m", "tensorrtllm", "${triton_max_batch_size}"),
                "line 3 .*triton_max_batch_size.*fill_template.py",
            ),
            (
                config("m", "tensorrtllm", gpt_model_path="${engine_dir}"),
                r"\$\{engine_dir\} for gpt_model_path",
            ),
            (config("m", "${triton_backend}"), r"placeholder \$\{triton_backend\} for backend"),
            (config("m", "python", tokenizer_dir="${tokenizer_dir}"), r"\$\{tokenizer_dir\} for tokenizer_dir"),
            (config("m", "tensorrtllm", kv_cache_free_gpu_mem_fraction="much"), "should be a number, and is 'much'"),
        ],
    )
    def test_what_is_not_filled_in(self, tmp_path: Path, text: str, reason: str) -> None:
        with pytest.raises(ModelError, match=reason):
            modelium_analyze(folder(tmp_path, "m", text, {"1/model.py": "import json"}))

    def test_all_that_is_left_is_named_at_once(self, tmp_path: Path) -> None:
        text = config("m", "tensorrtllm", "${batch}") + "model_transaction_policy { decoupled: ${decoupled} }\n"
        with pytest.raises(ModelError, match=r"all of: \$\{batch\}, \$\{decoupled\}") as caught:
            modelium_analyze(folder(tmp_path, "m", text))
        assert caught.value.code == "unfilled" and caught.value.fields["line"] == 3

    def test_what_need_not_be_filled_in(self, tmp_path: Path) -> None:
        left: dict[str, Any] = {"max_beam_width": "${max_beam_width}", "max_tokens_in_paged_kv_cache": "${max_tokens}"}
        text = config("m", "tensorrtllm", gpt_model_path=engines(tmp_path / "e"), **left)
        assert analyse(folder(tmp_path, "m", text)).facts["takes"]["cache_bytes"] is None

    def test_engines_that_say_nothing_of_their_cache(self, tmp_path: Path) -> None:
        place = engines(tmp_path / "e")
        (place / "config.json").write_text("{}")
        text = config("m", "tensorrtllm", gpt_model_path=place, max_tokens_in_paged_kv_cache=10)
        with pytest.raises(ModelError, match="lacks 'num_attention_heads'"):
            modelium_analyze(folder(tmp_path, "m", text))


class TestVllm:
    CONFIG = 'backend: "vllm"\ninstance_group [ { count: 1 kind: KIND_MODEL } ]\n'

    @pytest.mark.parametrize(
        ("engine", "devices", "share"),
        [({}, 1, 0.9), ({"gpu_memory_utilization": 0.25}, 1, 0.25), ({"tensor_parallel_size": 2}, 2, 0.9)],
    )
    def test_its_share_of_its_gpus_is_booked(
        self, tmp_path: Path, engine: dict[str, Any], devices: int, share: float
    ) -> None:
        path = folder(
            tmp_path, "m", self.CONFIG, {"1/model.json": json.dumps({"model": "facebook/opt-125m", **engine})}
        )
        made = offer(analyse(path), "vllm")
        assert (made.device_kinds, made.devices) == (("cuda",), devices)
        assert made.memory_bytes == devices * (int(share * 80 * GB) + OVERHEAD_BYTES)

    @pytest.mark.parametrize("text", ["[1]", "{", '{"tensor_parallel_size": "two"}'])
    def test_engine_arguments_that_are_none(self, tmp_path: Path, text: str) -> None:
        with pytest.raises(ModelError, match=r"model\.json should"):
            modelium_analyze(folder(tmp_path, "m", self.CONFIG, {"1/model.json": text}))
