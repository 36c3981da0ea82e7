"""What vLLM's log says of a start. The words were cut out of logs of vLLM 0.32, those of GPUs out of its source."""

from __future__ import annotations

import pytest
from modelium_plugin_vllm import reasons

from modelium.errors import LoadRejected

API = "(APIServer pid=12842) "
CORE = "(EngineCore pid=24522) ERROR 11-28 18:05:24 [core.py:1510] "
PYDANTIC = "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig"
TAIL = " [type=value_error, input_value=ArgsKwargs((), {'model': ...nderer_num_workers': 1}), input_type=ArgsKwargs]"
CONSEQUENCE = (
    "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}"
)

START = [
    f"{API}INFO 11-28 17:08:09 [api_utils.py:286] non-default args: {{'host': '127.0.0.1', 'port': 8161}}",
    f"{API}INFO 11-28 17:08:10 [model.py:733] Resolved architecture: Qwen2ForCausalLM",
    "(Worker pid=3332) INFO 11-28 17:08:23 [cpu_model_runner.py:68] Starting to load model /repository/m/1/model...",
    "Loading safetensors checkpoint shards:   0% Completed | 0/2 [00:00<?, ?it/s]",
    "Loading safetensors checkpoint shards:  50% Completed | 1/2 [00:00<00:00,  2.80it/s]",
    "(Worker pid=3332) INFO 11-28 17:08:24 [default_loader.py:501] Loading weights took 0.01 seconds",
    "(EngineCore pid=3294) INFO 11-28 17:08:24 [kv_cache_utils.py:2327] CPU KV cache size: 12,160 tokens, Maximum "
    "concurrency for 4,096 tokens per request: 2.97x",
    "(EngineCore pid=3294) INFO 11-28 17:08:25 [core.py:402] init engine (profile, create kv cache, warmup model) took "
    "0.14 s",
]


def test_how_far_it_is() -> None:
    told = [reasons.progress(START[: n + 1]) for n in range(len(START))]
    assert [t.stage for t in told if t is not None] == [
        "reading the configuration",
        "starting the engine",
        *["loading weights"] * 3,
        "making room for the cache",
        "warming up",
        "opening its address",
    ]
    assert told[4] is not None and (told[4].done, told[4].total, told[4].unit) == (1, 2, "files")
    assert reasons.progress(["Triton is not installed"]) is None


def test_the_next_may_start_when_all_memory_is_taken() -> None:
    assert not reasons.settled(START[:-1])
    assert reasons.settled(START)


LONG = (
    "  Value error, User-specified max_model_len (4096) is greater than the derived max_model_len "
    "(max_position_embeddings=512.0 or model_max_length=None in model's config.json). To allow overriding this "
    "maximum, set the env var VLLM_ALLOW_LONG_MAX_MODEL_LEN=1."
)
SHORT = (
    "ValueError: To serve at least one request with the model's max seq len (512), (0.0 GiB KV cache is needed, which "
    "is larger than the available KV cache memory (0.0 GiB). Based on the available memory, the estimated maximum "
    "model length is 384. Try increasing `gpu_memory_utilization` or decreasing `max_model_len`"
)
FREE_ON_CPU = (
    "ValueError: Available memory on node 0 (12.66/17.46 GiB) on kv cache allocation is less than requested memory for "
    "kv (93.13 GiB). Decrease --kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE"
)
FREE_ON_GPU = (
    "ValueError: Free memory on device cuda:0 (10.5/139.8 GiB) on startup is less than desired GPU memory utilization "
    "(0.9, 125.82 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes."
)


@pytest.mark.parametrize(
    ("lines", "code", "fields", "said"),
    [
        ([PYDANTIC, LONG + TAIL], reasons.TOO_LONG, {"fits": 512}, "4096 tokens are wanted, and the model takes 512"),
        ([CORE + SHORT, CONSEQUENCE], reasons.SHORT_CACHE, {"fits": 384}, "`max_model_len` to at most 384"),
        ([CORE + FREE_ON_CPU, CONSEQUENCE], reasons.NO_MEMORY, {"free_bytes": 13593571491}, "12.66 GiB are free"),
        (
            [CORE + FREE_ON_GPU, CONSEQUENCE],
            reasons.NO_MEMORY,
            {"free_bytes": 11274289152},
            "125.82 GiB were to be had",
        ),
        (
            [f"{CORE}torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", CONSEQUENCE],
            reasons.NO_MEMORY,
            {},
            "too little memory",
        ),
        (
            [CONSEQUENCE.replace(": 1}", ": -9}")],
            reasons.NO_MEMORY,
            {},
            "killed, as the kernel does",
        ),
        (["OSError: [Errno 98] Address already in use"], reasons.NO_PORT, {}, "taken meanwhile"),
        ([f"{API}INFO 11-28 17:08:09 [x.py:1] hello"], "process_died", {}, "the last memory.*said last: .*hello"),
        ([CORE + "KeyError: 'lm_head.bias'", CONSEQUENCE], "process_died", {}, "did not start: 'lm_head.bias'"),
    ],
)
def test_what_another_try_or_time_may_mend(lines: list[str], code: str, fields: dict[str, int], said: str) -> None:
    error = reasons.failure("m", [*START[:2], *lines])
    assert not isinstance(error, LoadRejected)
    assert (error.code, error.fields) == (code, fields)
    with pytest.raises(type(error), match=said):
        raise error


@pytest.mark.parametrize(
    ("lines", "code", "said"),
    [
        (
            [
                PYDANTIC,
                "  Value error, Model architectures ['NoSuchForCausalLM'] are not supported for now. Supported "
                f"architectures: dict_keys(['AfmoeForCausalLM']){TAIL}",
            ],
            "unknown_architecture",
            r"use a newer one.*\['NoSuchForCausalLM'\] are not supported for now\.$",
        ),
        (
            [
                PYDANTIC,
                "  Value error, The checkpoint you are trying to load has model type `nosuch` but Transformers does "
                "not recognize this architecture.",
            ],
            "unknown_architecture",
            "`nosuch`",
        ),
        (
            [
                PYDANTIC,
                "  Value error, The repository /m contains custom code which must be executed to correctly load the "
                "model. You can inspect the repository content at /m .",
            ],
            "custom_code",
            "code of its own",
        ),
        (
            [PYDANTIC, f"  Value error, Unknown quantization method: mystery. Must be one of ['awq', 'fp8'].{TAIL}"],
            "quantization",
            r"Unknown quantization method: mystery\.$",
        ),
        (
            [
                f"{CORE}RuntimeError: _C::static_scaled_fp8_quant() expected at most 0 argument(s) but received 4 "
                "argument(s).",
                CONSEQUENCE,
            ],
            "quantization",
            "use a GPU",
        ),
        (
            [f"{CORE}AttributeError: '_OpNamespace' '_C' object has no attribute 'cpu_gemm_wna16'"],
            "unsupported",
            "no such computation for this processor",
        ),
        ([f"{CORE}RuntimeError: Cannot find any model weights with `/m`"], "files_missing", "drop the whole model"),
        (
            [
                f"{CORE}safetensors._safetensors_rust.SafetensorError: Error while deserializing header: incomplete "
                "metadata, file not fully covered"
            ],
            "files_damaged",
            "file not fully covered",
        ),
        (["serve.py: error: unrecognized arguments: --no-such-thing"], "bad_settings", "--no-such-thing"),
        (
            [
                "(Worker pid=3332) ERROR 11-28 16:34:29 [multiproc_executor.py:1063] RuntimeError: Unsupported CPU "
                "attention configuration: head_dim=16 isa=2 kv_cache_idx=0",
                f"{API}ERROR 11-28 16:34:29 [async_llm.py:906] vllm.v1.engine.exceptions.EngineDeadError: EngineCore "
                "encountered an issue. See stack trace (above) for the root cause.",
            ],
            "unsupported",
            "16 numbers",
        ),
    ],
)
def test_what_will_be_refused_again(lines: list[str], code: str, said: str) -> None:
    error = reasons.failure("m", [*START, *lines])
    assert isinstance(error, LoadRejected)
    assert error.code == code
    with pytest.raises(LoadRejected, match=said):
        raise error
