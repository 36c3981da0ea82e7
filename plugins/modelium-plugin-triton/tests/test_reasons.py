"""What Triton says of failed loads, as people get to read it. The texts are Triton 2.51's own."""

from __future__ import annotations

import pytest
from modelium_plugin_triton.reasons import about, complaints, failure, since_load

from modelium.errors import LoadRejected

AT = "\n\nAt:\n  /models/m/1/model.py(9): deep\n  /models/m/1/model.py(7): initialize\n"
REFUSED = "load failed for model 'm': version 1 is at UNAVAILABLE state: Internal: "


def test_a_traceback() -> None:
    error = failure("m", f"{REFUSED}ValueError: weights are\nbroken here{AT};\n")
    assert isinstance(error, LoadRejected)
    assert error.message.splitlines() == [
        "m: ValueError: weights are broken here",
        "  at /models/m/1/model.py, line 7, in initialize",
        "  at /models/m/1/model.py, line 9, in deep",
    ]
    assert error.fields["reason"] == "ValueError: weights are broken here"


def test_the_import_machinery_is_left_out() -> None:
    frozen = "  <frozen importlib._bootstrap>(1176): _find_and_load\n"
    error = failure("m", f"{REFUSED}ModuleNotFoundError: No module named 'x'{AT}{frozen};\n")
    assert "frozen" not in error.message and "in deep" in error.message


def test_several_versions_tell_the_last_one() -> None:
    said = f"{REFUSED}first;\nversion 2 is at UNAVAILABLE state: Internal: second;\n"
    assert failure("m", said).message == "m: second"


def test_no_version() -> None:
    said = "load failed for model 'm': at least one version must be available under the version policy of model 'm'\n"
    assert failure("m", said).message.startswith("m: at least one version")


@pytest.mark.parametrize(
    "said, code, rejected",
    [
        (f"{REFUSED}Stub process 'm_0_0' is not healthy.;\n", "process_died", False),
        (f"{REFUSED}torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB;\n", "out_of_memory", False),
        (f"{REFUSED}MemoryError: ;\n", "out_of_memory", False),
        (f"{REFUSED}std::bad_alloc;\n", "out_of_memory", False),
        (f"{REFUSED}SyntaxError: invalid syntax (model.py, line 1);\n", "load_rejected", True),
        ("failed to load 'm', failed to poll from model repository", "load_rejected", True),
    ],
)
def test_what_may_be_tried_again(said: str, code: str, rejected: bool) -> None:
    error = failure("m", said)
    assert error.code == code and isinstance(error, LoadRejected) == rejected


ENGINE = f"{REFUSED}RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): "
ENGINE_LOG = """\
I1128 17:48:12.959680 8987 model_lifecycle.cc:472] "loading: m:1"
(EngineCore pid=10088) INFO 11-28 17:48:35 [core.py:402] init engine
(EngineCore pid=10088) ERROR 11-28 17:48:36 [core.py:1510] EngineCore failed to start.
(EngineCore pid=10088) ERROR 11-28 17:48:36 [core.py:1510] Traceback (most recent call last):
(EngineCore pid=10088) ERROR 11-28 17:48:36 [core.py:1510]     raise ValueError(
(EngineCore pid=10088) ERROR 11-28 17:48:36 [core.py:1510] {}
(EngineCore pid=10088) ERROR 11-28 17:48:36 [core.py:1510] RuntimeError: what came of it
Process EngineCore:
"""


@pytest.mark.parametrize(
    ("wrote", "code", "message", "rejected"),
    [
        (
            "ValueError: To serve at least one request with the model's max seq len (512), (8.0 GiB KV cache is "
            "needed, which is larger than the available KV cache memory (4.0 GiB). Based on the available memory, the "
            "estimated maximum model length is 256.",
            "cache_too_small",
            "set `max_model_len` to at most 256",
            True,
        ),
        (
            "ValueError: Free memory on device cuda:0 (3.2/80.0 GiB) on startup is less than desired GPU memory "
            "utilization (0.9, 72.0 GiB). Decrease GPU memory utilization",
            "out_of_memory",
            "72.0 GiB were to be had, and 3.2 GiB are free",
            False,
        ),
        ("torch.OutOfMemoryError: CUDA out of memory.", "out_of_memory", "too little memory (torch.OutOf", False),
        ("ValueError: something else", "process_died", "vLLM did not start: something else", False),
    ],
)
def test_the_cause_is_found_where_vllms_engine_has_written_it(
    wrote: str, code: str, message: str, rejected: bool
) -> None:
    others = "E1128 17:48:36.100000 8987 x.cc:1] the neighbour: MemoryError"
    error = failure("m", f"{ENGINE}{{}};\n", log=[others, *ENGINE_LOG.format(wrote).splitlines()])
    assert error.code == code and message in error.message
    assert isinstance(error, LoadRejected) == rejected


def test_an_engine_that_was_killed() -> None:
    error = failure("m", f"{ENGINE}{{'EngineCore_DP0': -9}};\n")
    assert error.code == "out_of_memory" and "killed" in error.message
    assert "without a word of why" in failure("m", f"{ENGINE}{{}};\n").message


def test_a_missing_backend() -> None:
    said = (
        "load failed for model 'm': version 1 is at UNAVAILABLE state: Invalid argument: unable to find backend "
        "library for backend 'onnxruntime', try specifying runtime on the model configuration.;\n"
    )
    error = failure("m", said, backends=("python",))
    assert error.code == "backend_missing" and error.fields["backend"] == "onnxruntime" and "python" in error.message


LOG = """\
I1121 06:53:53.963602 13540 model_lifecycle.cc:472] "loading: m:1"
E1121 06:53:54.000000 13540 x.cc:1] "Poll failed for model directory 'm': unexpected directory name"
I1121 06:53:55.000000 13540 model_lifecycle.cc:472] "loading: m-large:1"
hello from m-large
I1121 06:53:55.217734 13540 python_be.cc:2249] "TRITONBACKEND_ModelInstanceInitialize: m_0_0 (CPU device 0)"
Traceback (most recent call last):
  File "x", line 1
E1121 06:53:55.300000 13540 pb_stub.cc:366] "Failed to initialize m: ValueError: a\\nb\\n\\nAt:\\n  f(9): g\\n"
I1121 06:53:56.472655 13540 model_lifecycle.cc:624] "successfully unloaded 'other' version 1"
a line of somebody's
""".splitlines()


def test_why_a_folder_could_not_be_used() -> None:
    error = failure("m", "failed to load 'm', failed to poll from model repository", log=LOG)
    assert error.message.endswith("unexpected directory name")


def test_the_lines_about_a_model() -> None:
    lines = about("m", LOG)
    assert len(lines) == 9 and not any("m-large" in line or "somebody" in line for line in lines)
    assert '  File "x", line 1' in lines  # belongs to the entry before
    assert "  f(9): g" in lines  # unfolded
    assert about("m-large", LOG) == [LOG[2], LOG[3]]


def test_what_was_said_since_the_load_began() -> None:
    assert since_load("m-large", LOG) == LOG[3:]
    assert since_load("m", LOG) == LOG[1:]
    assert since_load("unheard-of", LOG) == LOG


def test_complaints_leave_the_usage_out() -> None:
    lines = ["x: unrecognized option '--oops'", "Usage: x [options]", "\t--exit-on-error <boolean>", "| error | none |"]
    assert complaints([*lines, LOG[1], LOG[0]]) == [lines[0], LOG[1]]
