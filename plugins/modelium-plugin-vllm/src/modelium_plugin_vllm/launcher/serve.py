"""Runs vLLM's OpenAI server, in vLLM's own interpreter: `python serve.py [arguments of vllm serve]`.

Not `vllm serve`, which asks for a distribution of the name `vllm`, and its build for CPUs bears another. On a CPU its
processes are forked rather than spawned: each would import the same libraries again, which is most of a start, and
would have them in memory for itself. `MODELIUM_VLLM_FORK=1` asks for that. In a folder of its own, since Python looks
for modules beside a script first.
"""

from __future__ import annotations

import gc
import logging
import os
import socket
import sys
from typing import Any

from vllm_process import allow_amx, end_with_parent  # type: ignore[import-not-found] # beside this script


def main() -> None:
    holder = hold_port()
    os.register_at_fork(after_in_child=end_with_parent)
    allow_amx()
    # What is imported stays: to look through it for garbage again and again takes seconds.
    gc.disable()
    if os.environ.get("MODELIUM_VLLM_FORK") == "1":
        fork_on_cpu()
    from vllm.entrypoints.launchers.api_server.entry import main as serve

    # It lists forty routes, behind which what it said of the model is hard to find.
    routes = logging.getLogger("vllm.entrypoints.launchers.launcher")
    routes.addFilter(lambda record: not str(record.msg).startswith("Route: "))
    gc.enable()
    gc.freeze()
    serve()
    holder.close()


def hold_port() -> socket.socket:
    """Have the port from the first moment on: vLLM asks for it when it has imported all that it needs, and by then
    another may have it. Raises `OSError` when it is taken."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # vLLM may bind it too, as long as we don't listen
    holder.bind((sys.argv[sys.argv.index("--host") + 1], int(sys.argv[sys.argv.index("--port") + 1])))
    return holder


def fork_on_cpu() -> None:
    """vLLM sets `spawn` there as it checks its configuration, since threads of the worker are bound to cores by the
    environment in which it is started; Modelium leaves them to the kernel, and tells their number before."""
    from vllm.platforms import current_platform

    platform: Any = type(current_platform)
    checked = platform.check_and_update_config

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        checked(vllm_config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    platform.check_and_update_config = classmethod(check_and_update_config)

    # Elsewhere a process of its own finds out what a class of models is like, lest CUDA begin in this one.
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda find_out: find_out()


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":  # spawned by multiprocessing, which imports the script for its functions
    end_with_parent()
    allow_amx()
