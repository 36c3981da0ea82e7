"""What users may add to the command line of a server that is started for them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

_NUMBER = re.compile(r"-\.?\d")
_NOT_OF_A_NAME = re.compile(r"[^\w-]")


def check_options(args: Iterable[str], ours: Collection[str]) -> None:
    """Raises `ValueError` for one that says what is Modelium's to say: `ours`, as in `served-model-name`.

    Servers take abbreviations (`--hos`), `_` for `-`, and short forms, which each version has others of: so a name must
    not be the beginning of one of ours, and short forms are not taken at all.
    """
    for arg in args:
        if not arg.startswith("-") or _NUMBER.match(arg):
            continue  # a value
        if not arg.startswith("--"):
            raise ValueError(f"expected options by their full names, found the short form {arg!r}: write `--NAME`")
        name = _NOT_OF_A_NAME.split(arg[2:], maxsplit=1)[0].replace("_", "-")
        meant = min((own for own in ours if own.startswith(name)), default=None)
        if meant == name:
            raise ValueError(
                f"expected what Modelium does not set itself, found --{name}, which is Modelium's to say: leave it out"
            )
        if meant is not None:
            raise ValueError(
                f"expected options by their full names, found {arg!r}, which may mean --{meant}, which is Modelium's "
                "to say: leave it out, or write the whole name of what was meant"
            )
