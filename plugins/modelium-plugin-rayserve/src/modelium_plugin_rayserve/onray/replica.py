"""A model as a Ray Serve deployment: its requests over HTTP, in KServe v2's words and with Triton's extensions."""

from __future__ import annotations

import gzip
import json
import logging
import os
import sys
import time
import traceback
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from .hosting import HostedModel
from .kserve import HEADER_LENGTH, Asked, Problem, joined, read_generate, read_infer, write_generate, write_infer
from .pb_utils import InferenceResponse


@dataclass
class Counts:
    """Requests of this replica, and what they took."""

    succeeded: int = 0
    failed: int = 0
    succeeded_ns: int = 0
    failed_ns: int = 0
    rows: int = 0
    last_ms: int = 0

    def add(self, began_ns: int, rows: int, *, ok: bool) -> None:
        taken = time.monotonic_ns() - began_ns
        if ok:
            self.succeeded += 1
            self.succeeded_ns += taken
            self.rows += rows
            self.last_ms = time.time_ns() // 1_000_000
        else:
            self.failed += 1
            self.failed_ns += taken


class ModeliumModel:
    """What Serve makes one of in each replica."""

    def __init__(self, order: Mapping[str, Any]):
        """`order` as the driver gives it, see `controller`. Raises what keeps the model from loading."""
        name, folder = order["name"], Path(order["folder"])
        _write_log(order)
        _stay_on_loopback()
        if order["threads"]:
            os.environ["OMP_NUM_THREADS"] = str(order["threads"])
        if order["sees_gpus"] is not None:  # before anything of CUDA is there
            os.environ["CUDA_VISIBLE_DEVICES"] = order["sees_gpus"]
        print(f"{name}: loading {folder}", flush=True)
        began = time.monotonic()
        self._counts = Counts()
        try:
            self._model = HostedModel(folder, order["version"], order["config"], gpu=order["gpu"])
        except BaseException:
            traceback.print_exc()
            raise
        print(f"{name}: loaded in {time.monotonic() - began:.1f} s", flush=True)

    def __del__(self) -> None:
        """Serve calls it when nothing is under way any more."""
        if hasattr(self, "_model"):
            self._model.close()

    async def __call__(self, request: Request) -> Response:
        signature = self._model.signature
        path = request.url.path.removeprefix(f"/v2/models/{signature.model}").strip("/")
        version, what = "", path
        if path.startswith("versions/"):
            _, version, *rest = path.split("/", 2)
            what = "".join(rest)
        if version not in ("", signature.version):
            words = f"Request for unknown model: '{signature.model}' version {version} is not found"
            return JSONResponse({"error": words}, 404)
        answers: dict[tuple[str, str], Any] = {
            ("GET", ""): lambda: JSONResponse(signature.metadata()),
            ("GET", "ready"): Response,
            ("GET", "config"): lambda: JSONResponse(self._model.config),
            ("GET", "stats"): lambda: JSONResponse({"model_stats": [self._statistics()]}),
        }
        if (answer := answers.get((request.method, what))) is not None:
            found: Response = answer()
            return found
        asked = {"infer": self._infer, "generate": self._generate, "generate_stream": self._stream}.get(what)
        if asked is None:
            return JSONResponse({"error": f"there is no {request.url.path}"}, 404)
        if request.method != "POST":
            return JSONResponse({"error": f"{what} is asked for by POST"}, 405, {"Allow": "POST"})
        began = time.monotonic_ns()
        try:
            body = _unpacked(await request.body(), request.headers.get("content-encoding", ""))
            return await asked(body, request.headers, began)
        except Problem as problem:
            self._counts.add(began, 0, ok=False)
            return JSONResponse({"error": str(problem)}, problem.status)

    # ------------------------------------------------------------------ inference

    async def _infer(self, body: bytes, headers: Mapping[str, str], began: int) -> Response:
        length = headers.get(HEADER_LENGTH.lower())
        if length is not None and not length.isdecimal():
            raise Problem(f"{HEADER_LENGTH} must be a number, and is {length!r:.40}")
        asked = read_infer(body, None if length is None else int(length), self._model.signature)
        answer = joined(await self._all(asked))
        made, json_length = write_infer(answer, asked, self._model.signature)
        self._counts.add(began, asked.rows, ok=True)
        if json_length is None:
            return Response(made, media_type="application/json")
        return Response(made, headers={HEADER_LENGTH: str(json_length)}, media_type="application/octet-stream")

    async def _generate(self, body: bytes, headers: Mapping[str, str], began: int) -> Response:
        asked = read_generate(body, self._model.signature)
        answers = await self._all(asked)
        if len(answers) != 1:
            raise Problem(
                f"generate expects model to produce exactly 1 response, and it gave {len(answers)}: use generate_stream"
            )
        made = write_generate(answers[0], asked, self._model.signature)
        self._counts.add(began, asked.rows, ok=True)
        return Response(made, media_type="application/json")

    async def _stream(self, body: bytes, headers: Mapping[str, str], began: int) -> Response:
        """Server-sent events. What fails before the first is an ordinary error; after it, the last event tells."""
        asked = read_generate(body, self._model.signature)
        answers = self._model.responses(asked)
        first = await anext(answers, None)
        return StreamingResponse(self._events(first, answers, asked, began), media_type="text/event-stream")

    async def _all(self, asked: Asked) -> list[InferenceResponse]:
        async with aclosing(self._model.responses(asked)) as answers:
            found = [answer async for answer in answers]
        return found or [InferenceResponse()]

    async def _events(
        self,
        first: InferenceResponse | None,
        answers: AsyncGenerator[InferenceResponse, None],
        asked: Asked,
        began: int,
    ) -> AsyncIterator[bytes]:
        signature, ok = self._model.signature, False
        try:
            if first is not None:
                yield b"data: " + write_generate(first, asked, signature) + b"\n\n"
            async for answer in answers:
                yield b"data: " + write_generate(answer, asked, signature) + b"\n\n"
            ok = True
        except Problem as problem:
            yield b"data: " + json.dumps({"error": str(problem)}).encode() + b"\n\n"
        finally:
            self._counts.add(began, asked.rows, ok=ok)
            await answers.aclose()

    def _statistics(self) -> dict[str, Any]:
        """As Triton tells them, of this replica."""
        counts, signature = self._counts, self._model.signature
        return {
            "name": signature.model,
            "version": signature.version,
            "last_inference": counts.last_ms,
            "inference_count": counts.rows,
            "execution_count": self._model.executions,
            "inference_stats": {
                "success": {"count": counts.succeeded, "ns": counts.succeeded_ns},
                "fail": {"count": counts.failed, "ns": counts.failed_ns},
            },
            "batch_stats": [],
        }


def _unpacked(body: bytes, encoding: str) -> bytes:
    try:
        if encoding in ("", "identity"):
            return body
        if encoding == "gzip":
            return gzip.decompress(body)
        if encoding == "deflate":
            return zlib.decompress(body)
    except (OSError, EOFError, zlib.error) as error:
        raise Problem(f"the body is no {encoding}: {error}") from None
    raise Problem(f"expected Content-Encoding to be gzip or deflate, found {encoding!r:.40}", 415)


# --------------------------------------------------------------------------- the process that it runs in


def _write_log(order: Mapping[str, Any]) -> None:
    """All that this process writes goes to the model's log: in Modelium's folder of logs on Modelium's node, else
    among Ray's own logs, where `Probe` finds it."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    place = Path(order["log"] if node == order["log_node"] else log_of(order["name"]))
    target = os.open(place, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    sys.stdout.flush()
    sys.stderr.flush()
    for number in (1, 2):
        os.dup2(target, number)
    os.close(target)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)
    root = logging.getLogger()
    root.addHandler(logging.StreamHandler(sys.stderr))
    root.setLevel(logging.INFO)


def log_of(name: str) -> str:
    """A model's log on a node that is not Modelium's."""
    import ray

    return os.path.join(ray._private.worker.global_worker.node.get_logs_dir_path(), f"modelium-{name}.log")


def _stay_on_loopback() -> None:
    """Serve lets each replica listen for the others on all interfaces, even where the whole cluster is on loopback."""
    import ray
    from ray.serve._private import replica

    add = getattr(replica, "add_port_to_grpc_server", None)
    if ray.util.get_node_ip_address() == "127.0.0.1" and add is not None:
        replica.add_port_to_grpc_server = lambda server, address: add(server, address.replace("[::]", "127.0.0.1"))
