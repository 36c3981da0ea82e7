"""The shapes that an engine is made for: TensorRT wants a smallest, a usual and a largest for each free dimension."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modelium.errors import ModelError
from modelium_plugin_tensorrt.settings import Profile

USUAL_BATCH = 8
USUAL_LENGTH = 128
"""Tokens; most texts that are classified or embedded are no longer."""
LONGEST = 2048
"""Tokens, where the model itself has no limit."""
SAMPLE_ROWS = 8
"""Of the largest batch that a model and its engine are both run on."""


def profiles(
    inputs: Sequence[Mapping[str, Any]],
    *,
    max_batch_size: int,
    longest: int | None,
    given: Mapping[str, Profile],
) -> dict[str, Profile]:
    """For each input with free dimensions (-1 in its `shape`): the given profile, else one by what is known.

    With a `max_batch_size` the first dimension is the batch; with `longest` (0: no limit), the others are lengths of
    texts. Raises `ModelError` for a given profile that does not fit, and for a dimension that nothing bounds.
    """
    made: dict[str, Profile] = {}
    unknown = sorted(given.keys() - {str(tensor["name"]) for tensor in inputs})
    if unknown:
        raise ModelError(f"there is no input {unknown[0]} to have a profile: there is {_listed(inputs)}")
    for tensor in inputs:
        name, shape = str(tensor["name"]), list(tensor["shape"])
        own = given.get(name)
        if own is not None:
            _check(name, shape, own)
        if -1 not in shape:
            continue
        made[name] = own if own is not None else _by_what_is_known(name, shape, max_batch_size, longest)
    return made


def largest_batch(max_batch_size: int, given: Mapping[str, Profile]) -> int:
    """What a plan's `max_batch_size` comes to with these profiles; 0 stays: there the first dimension is no batch."""
    return min([max_batch_size, *(profile.max[0] for profile in given.values() if profile.max)])


def sample_shapes(given: Mapping[str, Profile], *, batched: bool) -> list[dict[str, list[int]]]:
    """The smallest, the usual and the largest shapes of the inputs that have a profile: an engine takes no others.

    With `batched` the first dimension is the batch, the same for all inputs and no larger than need be.
    """
    made: list[dict[str, list[int]]] = []
    for which in ("min", "opt", "max") if given else ():
        shapes = {name: list(getattr(profile, which)) for name, profile in given.items()}
        if batched:
            rows = min([SAMPLE_ROWS, *(shape[0] for shape in shapes.values() if shape)])
            rows = max([rows, *(profile.min[0] for profile in given.values() if profile.min)])
            shapes = {name: [rows, *shape[1:]] for name, shape in shapes.items()}
        if shapes not in made:
            made.append(shapes)
    return made


def _check(name: str, shape: Sequence[int], profile: Profile) -> None:
    for which in (profile.min, profile.opt, profile.max):
        if len(which) != len(shape) or any(a not in (-1, b) for a, b in zip(shape, which, strict=True)):
            raise ModelError(f"the profile of {name} has the shape {list(which)}, and the model's is {list(shape)}")


def _by_what_is_known(name: str, shape: Sequence[int], max_batch_size: int, longest: int | None) -> Profile:
    limit = longest or LONGEST
    low: list[int] = []
    usual: list[int] = []
    high: list[int] = []
    for place, dim in enumerate(shape):
        if dim != -1:
            bounds = (dim, dim, dim)
        elif place == 0 and max_batch_size > 0:
            bounds = (1, min(USUAL_BATCH, max_batch_size), max_batch_size)
        elif longest is not None:
            bounds = (1, min(USUAL_LENGTH, limit), limit)
        else:
            raise ModelError(
                f"its input {name} has the shape {list(shape)}, and nothing tells how large its free dimensions get: "
                f"set `tensorrt: {{profiles: {{{name}: {{min: [..], opt: [..], max: [..]}}}}}}` in its plan's settings"
            )
        for part, bound in zip((low, usual, high), bounds, strict=True):
            part.append(bound)
    return Profile(min=tuple(low), opt=tuple(usual), max=tuple(high))


def _listed(inputs: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(str(tensor["name"]) for tensor in inputs) or "none"
