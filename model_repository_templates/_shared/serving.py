"""What the Python models share: their parameters, and answers that blame the request which is at fault and no other."""

from __future__ import annotations

import contextlib
import json
import locale
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import triton_python_backend_utils as pb_utils

Job = TypeVar("Job")

# Triton starts a model's Python in the C locale, where files are read as ASCII.
with contextlib.suppress(locale.Error):
    locale.setlocale(locale.LC_CTYPE, "C.UTF-8")


class Refused(ValueError):
    """A request that can't be answered as it is; the message tells its sender why."""


def parameters(args: dict[str, str]) -> dict[str, str]:
    """The `parameters` of the model's config.pbtxt."""
    config = json.loads(args["model_config"])
    return {key: value["string_value"] for key, value in config["parameters"].items()}


def version_folder(args: dict[str, str]) -> Path:
    return Path(args["model_repository"]) / args["model_version"]


def refusal(message: str) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG))


def failure(error: Exception) -> Any:
    """The answer to a request that was in order, and failed all the same."""
    if isinstance(error, Refused):
        return refusal(str(error))
    pb_utils.Logger.log_error(f"{type(error).__name__}: {error}")
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"{type(error).__name__}: {error}"))


def cancelled() -> Any:
    return pb_utils.InferenceResponse(
        error=pb_utils.TritonError("the client cancelled the request", pb_utils.TritonError.CANCELLED)
    )


def text(value: Any, name: str) -> str:
    """One element of a BYTES tensor as text."""
    try:
        return value.decode("utf-8") if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise Refused(f"{name} must be UTF-8 text: {error}") from None


def strings(values: Sequence[Any]) -> Any:
    """A BYTES array of the values' shape."""
    return np.array(values, dtype=object)


def answer(
    requests: Sequence[Any],
    read: Callable[[Any], Job],
    alike: Callable[[Job], Hashable],
    run: Callable[[list[Job]], Sequence[list[Any]]],
) -> list[Any]:
    """Answer requests that Triton gave in one batch, in their order.

    `read` turns a request into a job or raises `Refused`; jobs that are `alike` are `run` together, which gives the
    output tensors of each. When several fail together, each is run alone, so that one can't fail the others.
    """
    responses: list[Any] = [None] * len(requests)
    groups: dict[Hashable, list[tuple[int, Job]]] = {}
    for index, request in enumerate(requests):
        if request.is_cancelled():
            responses[index] = cancelled()
            continue
        try:
            job = read(request)
        except Exception as error:
            responses[index] = failure(error)
        else:
            groups.setdefault(alike(job), []).append((index, job))
    waiting = list(groups.values())
    while waiting:
        group = waiting.pop()
        try:
            outputs = run([job for _, job in group])
        except Exception as error:
            if len(group) == 1:
                responses[group[0][0]] = failure(error)
            else:
                waiting.extend([member] for member in group)
            continue
        for (index, _), tensors in zip(group, outputs, strict=True):
            responses[index] = pb_utils.InferenceResponse(tensors)
    return responses
