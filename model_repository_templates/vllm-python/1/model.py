"""Serves a causal language model with vLLM where Triton has no backend for it, with that backend's interface.

Inputs and outputs: https://github.com/triton-inference-server/vllm_backend. Beyond them a prompt may be `messages` (a
chat as JSON, written by the model's own template) or `input_ids`; of these two nothing is repeated in the answer.

`model.json` holds vLLM's engine arguments, as for that backend. Parameters: `model_folder` (relative to the version's
folder), `engine_args` (JSON, over those of `model.json`), `max_tokens` (where neither the request nor the model's
generation_config.json says), `threads` (on a CPU; 0 is one for each core but one, which is for this process and
Triton's), `devices` (of KIND_MODEL: numbers of GPUs as `0,1`).
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils
from serving import failure, parameters, version_folder


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        settings = parameters(args)
        folder = version_folder(args)
        model = folder / settings["model_folder"]
        set_environment(args, settings)
        # Imported here: what they read of the environment is known now. Triton also starts this file only to ask for
        # its configuration. What is imported stays: to look through it for garbage again and again takes seconds.
        gc.disable()
        from asked import Reader
        from engine import Engine
        from transformers import AutoTokenizer

        gc.enable()
        gc.freeze()
        arguments = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        arguments |= json.loads(settings.get("engine_args") or "{}") | {"model": str(model)}
        # One of its own: a tokenizer can't be used in two threads, and vLLM uses the other.
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
        self.engine = Engine(arguments)
        defaults = {"max_tokens": int(settings["max_tokens"]), **self.engine.model_config.get_diff_sampling_param()}
        self.reader = Reader(tokenizer, defaults)

    def execute(self, requests: list[Any]) -> None:
        with self.engine.gate:
            for request in requests:
                sender = request.get_response_sender()
                try:
                    self.engine.answer(sender, self.reader.read(request))
                except Exception as error:
                    sender.send(failure(error), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def finalize(self) -> None:
        self.engine.close()


def set_environment(args: Mapping[str, str], settings: Mapping[str, str]) -> None:
    """What vLLM reads when it is imported, here and in the processes that it starts."""
    wanted = {
        # Nothing is fetched, and nobody is told.
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        # Its processes talk to each other on loopback alone.
        "VLLM_HOST_IP": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        # A fork would take the threads' locks and Triton's shared memory along.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    kind = args["model_instance_kind"]
    if kind == "CPU":
        wanted |= {
            # One process for engine and worker: two thirds of the memory.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            # Threads are not bound to cores, for which every model would choose the same ones.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": settings["threads"] if settings["threads"] != "0" else str(max(1, cores() - 1)),
            # Some sampling would be compiled at its first use, for which there may be no compiler, and a client waits.
            "TORCH_COMPILE_DISABLE": "1",
            # Without it glibc keeps what was read to be laid out anew, as much again as the weights.
            "MALLOC_MMAP_THRESHOLD_": str(2**20),
        }
    elif numbers := settings.get("devices") if kind == "MODEL" else args["model_instance_device_id"]:
        wanted["CUDA_VISIBLE_DEVICES"] = visible(numbers.split(","), os.environ.get("CUDA_VISIBLE_DEVICES"))
    os.environ.update(wanted)


def cores() -> int:
    """Those that this process may use, two threads of one core counted once."""
    return len({_siblings(number) for number in os.sched_getaffinity(0)})


def _siblings(number: int) -> str:
    try:
        return Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list").read_text(encoding="utf-8")
    except OSError:
        return str(number)


def visible(numbers: list[str], among: str | None) -> str:
    """The GPUs with these numbers, of those that this process sees."""
    names = among.split(",") if among else None
    return ",".join(names[int(number)] if names else number for number in numbers)
