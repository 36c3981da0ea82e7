"""A model written for Triton's Python backend, run in this process: loaded, given requests in batches, and ended."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import queue
import sys
import threading
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import pb_utils
from .kserve import Asked, Problem, Signature
from .pb_utils import InferenceRequest, InferenceResponse, TritonError

STATUS: Mapping[int, int] = {
    TritonError.UNKNOWN: 400, TritonError.INTERNAL: 500, TritonError.NOT_FOUND: 404, TritonError.INVALID_ARG: 400,
    TritonError.UNAVAILABLE: 503, TritonError.UNSUPPORTED: 501, TritonError.ALREADY_EXISTS: 400,
    TritonError.CANCELLED: 499,
}  # fmt: skip
"""HTTP's for the codes of a model's errors, as Triton's HTTP server has them."""


class HostedModel:
    """One instance of a model. All of its Python but its own threads' runs in one thread, as in Triton."""

    def __init__(self, folder: Path, version: str, config: Mapping[str, Any], *, gpu: bool):
        """Load it; takes as long as that takes, and raises whatever the model raises."""
        name = str(config["name"])
        pb_utils.install()
        sys.dont_write_bytecode = True  # the repository is not ours to write to
        sys.path.insert(0, str(folder / version))
        kind = _import(folder / version / "model.py")
        complete = getattr(kind, "auto_complete_config", None)
        if complete is not None:
            config = complete(pb_utils.ModelConfig(config)).as_dict()
        self.config = config
        self.decoupled = pb_utils.using_decoupled_model_transaction_policy(config)
        self.signature = Signature.of(name, version, config)
        batching = config.get("dynamic_batching")
        self._most_rows = self.signature.max_batch_size if batching is not None else 0
        self._delay_s = int((batching or {}).get("max_queue_delay_microseconds") or 0) / 1e6
        self._preferred = set(map(int, (batching or {}).get("preferred_batch_size") or ()))
        self._model = kind()
        if hasattr(self._model, "initialize"):
            self._model.initialize(
                {
                    "model_config": json.dumps(config),
                    "model_instance_kind": "GPU" if gpu else "CPU",
                    "model_instance_name": f"{name}_0_0",
                    "model_instance_device_id": "0",  # of those that this process sees
                    "model_repository": str(folder),
                    "model_version": version,
                    "model_name": name,
                }
            )
        self.executions = 0
        """How often the model was asked; once for each batch."""
        self._waiting: queue.SimpleQueue[InferenceRequest | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    async def responses(self, asked: Asked) -> AsyncGenerator[InferenceResponse, None]:
        """The answers as they come; of a model that is not decoupled there is one. To be closed (`aclosing`): that
        cancels what is not finished. Raises `Problem` with the model's own words."""
        loop = asyncio.get_running_loop()
        answers: asyncio.Queue[tuple[InferenceResponse | None, bool]] = asyncio.Queue()

        def deliver(response: InferenceResponse | None, final: bool) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody waits any more
                loop.call_soon_threadsafe(answers.put_nowait, (response, final))

        request = InferenceRequest(
            asked.inputs,
            asked.id,
            asked.parameters.get("sequence_id", 0),
            list(asked.wanted or self.signature.outputs),
            json.dumps(asked.parameters) if asked.parameters else "",
            deliver,
            asked.rows,
        )
        self._waiting.put(request)
        final = False
        try:
            while not final:
                response, final = await answers.get()
                if response is None:
                    continue
                error = response.error()
                if error is not None:
                    raise Problem(error.message(), STATUS.get(error.code(), 500))
                yield response
        finally:
            request.cancel()

    def close(self) -> None:
        """Let it finish what it has, and end."""
        self._waiting.put(None)
        self._thread.join()

    # ------------------------------------------------------------------ in the model's thread

    def _work(self) -> None:
        held: InferenceRequest | None = None
        while True:
            first = held or self._waiting.get()
            if first is None:
                break
            batch, held, ended = self._batch(first)
            self._execute(batch)
            if ended:
                break
        if hasattr(self._model, "finalize"):
            self._model.finalize()

    def _batch(self, first: InferenceRequest) -> tuple[list[InferenceRequest], InferenceRequest | None, bool]:
        """What waits and fits behind it, one that did not fit any more, and whether the end was asked for."""
        batch, rows, until = [first], first.rows, time.monotonic() + self._delay_s
        while rows < self._most_rows:
            left = 0.0 if rows in self._preferred else until - time.monotonic()
            try:
                following = self._waiting.get(left > 0, max(left, 0))
            except queue.Empty:
                break
            if following is None:
                return batch, None, True
            if rows + following.rows > self._most_rows:
                return batch, following, False
            batch.append(following)
            rows += following.rows
        return batch, None, False

    def _execute(self, batch: Sequence[InferenceRequest]) -> None:
        self.executions += 1
        try:
            answers = self._model.execute(list(batch))
            if self.decoupled:
                return  # its answers come by the requests' senders
            if not isinstance(answers, list) or len(answers) != len(batch):
                found = f"{len(answers)} responses" if isinstance(answers, list) else type(answers).__name__
                raise ValueError(f"expected execute() to return {len(batch)} responses, found {found}")
        except BaseException as error:
            words = f"Failed to process the request(s) for model {self.signature.model!r}, message: "
            words += f"{type(error).__name__}: {error}"
            pb_utils.Logger.log_error(words)
            for request in batch:
                request.deliver(InferenceResponse(error=TritonError(words)), True)
            return
        for request, answer in zip(batch, answers, strict=True):
            request.deliver(answer, True)


def _import(file: Path) -> Any:
    """The class that the model's file defines."""
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is not there: a Ray replica needs the model's folder under the same path on its own node"
        )
    spec = importlib.util.spec_from_file_location("model", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["model"] = module
    spec.loader.exec_module(module)
    return module.TritonPythonModel
