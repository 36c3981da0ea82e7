"""vLLM's engine on an event loop in a thread, and the requests that it works on, each a task of that loop."""

from __future__ import annotations

import asyncio
import os
import threading
import uuid
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import triton_python_backend_utils as pb_utils
from asked import Asked, response
from serving import cancelled, failure, refusal
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMClientError
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

T = TypeVar("T")

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL

LOOK_EVERY_S = 0.25
"""How often requests are asked whether their clients have left, and the engine whether it lives."""


class Engine:
    """Raises what vLLM raises where it can't start with these arguments."""

    def __init__(self, arguments: dict[str, Any]):
        self.gate = threading.Lock()
        """Held while requests are being taken in: then the process does not end."""
        self._died = False
        self._running: dict[asyncio.Task[None], Answer] = {}
        # Sending waits for Triton, for which the loop has no time; one thread keeps the responses in their order.
        self._triton = ThreadPoolExecutor(1, thread_name_prefix="responses")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine", daemon=True)
        self._thread.start()
        try:
            self._llm = self._on_loop(self._begin(arguments))
        except BaseException:
            self._end_loop()
            raise
        self.model_config = self._llm.model_config

    def answer(self, sender: Any, asked: Asked) -> None:
        """Answer a request in time; returns at once. Raises `EngineDeadError`."""
        if self._died:
            raise EngineDeadError
        self._loop.call_soon_threadsafe(self._start, Answer(sender, asked))

    def close(self) -> None:
        """Ends it with all of its processes."""
        self._on_loop(self._end())
        self._end_loop()

    # ------------------------------------------------------------------ on the loop

    async def _begin(self, arguments: dict[str, Any]) -> AsyncLLM:
        llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        self._watching = asyncio.create_task(self._watch(llm))
        return llm

    async def _end(self) -> None:
        self._watching.cancel()
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(list(self._running))
        self._llm.shutdown()

    def _start(self, answer: Answer) -> None:
        task = self._loop.create_task(self._serve(answer))
        self._running[task] = answer
        task.add_done_callback(self._running.pop)

    async def _serve(self, answer: Answer) -> None:
        asked = answer.asked
        try:
            outputs = self._llm.generate({"prompt_token_ids": asked.prompt}, asked.sampling, uuid.uuid4().hex)
            async for output in outputs:
                await self._in_turn(answer.send, response(asked, output), output.finished)
        except asyncio.CancelledError:
            await self._in_turn(answer.send, cancelled(), True)
        except VLLMClientError as error:
            await self._in_turn(answer.send, refusal(str(error)), True)
        except Exception as error:
            await self._in_turn(answer.send, failure(error), True)

    async def _watch(self, llm: AsyncLLM) -> None:
        while not llm.errored:
            await asyncio.sleep(LOOK_EVERY_S)
            for task, answer in list(self._running.items()):
                try:
                    left = await self._in_turn(answer.is_cancelled)
                except Exception as error:  # one that can't be asked is no reason to watch no longer
                    pb_utils.Logger.log_error(f"{type(error).__name__}: {error}")
                    continue
                if left:
                    task.cancel()
        # Without its engine the process is of no use, and a process that has ended is seen from outside. But Triton
        # waits without end for a response to what a process had taken in: it ends between requests.
        with self.gate:
            self._died = True
        await asyncio.sleep(0)  # what was taken in last becomes a task
        if self._running:
            await asyncio.wait(list(self._running))
        self.gate.acquire()
        os._exit(1)

    # ------------------------------------------------------------------ between the threads

    def _on_loop(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _in_turn(self, call: Any, *args: Any) -> Any:
        return await self._loop.run_in_executor(self._triton, call, *args)

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._triton.shutdown()


class Answer:
    """A request that is being answered. Its methods block, and are called in one thread."""

    def __init__(self, sender: Any, asked: Asked):
        self.asked = asked
        self._sender = sender
        self._done = False

    def send(self, message: Any, last: bool) -> None:
        if not self._done:
            self._done = last
            self._sender.send(message, flags=FINAL if last else 0)

    def is_cancelled(self) -> bool:
        # Triton forgets a request with its last response: it must not be asked of it after that.
        return not self._done and bool(self._sender.is_cancelled())
