"""Renders `hookspecs.md` from the hook specifications, the types that they use, and their docstrings.

`python -m modelium.hookdocs` writes the file at the top of the checkout; `--check` fails when it is stale. The text
has one source, so that what authors of plugins read can't differ from what the host checks.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import enum
import functools
import inspect
import itertools
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from modelium.api import datapath, driver, optimizing, types
from modelium.api.hookspecs import HOOKSPEC_VERSION, ModeliumSpec

FILE = Path(__file__).parents[1] / "hookspecs.md"

HEAD = """\
# The hooks of Modelium

<!-- Generated from modelium/api by `python -m modelium.hookdocs`: change the docstrings there. -->

Version {major}.{minor} of the hook specifications.

A plugin is a Python module in a pip package. The package names it in the entry-point group `modelium`, and the module
says which version of these specifications it was written for and marks its functions with `@hookimpl`:

```toml
[project]
name = "modelium-plugin-toys"
dependencies = ["modelium"]

[project.entry-points.modelium]
toys = "modelium_plugin_toys"
```

```python
from modelium.api import Analysis, hookimpl

MODELIUM_HOOKSPEC_VERSION = ({major}, {minor})
```

- The major version must be equal to this one, the minor not newer.
- An implementation takes some or all of a hook's arguments, by name, without defaults.
- Hooks are synchronous; what waits belongs in the objects that they return.
- Plugins import `modelium.api` and `modelium.errors`, and nothing else of Modelium.
- A plugin that can't be loaded is reported by name and version, and left out; one that raises, or returns what it
  should not, loses only that answer. `modelium plugins` shows both.
- `modelium.api.testing` has fakes, and the contract suite that every runtime driver must pass.
"""


def render() -> str:
    """The whole of `hookspecs.md`."""
    major, minor = HOOKSPEC_VERSION
    parts = [HEAD.format(major=major, minor=minor), "\n## Hooks\n"]
    parts += [_hook(name, parts) for name, parts in described().items()]
    parts.append("\n## Objects that plugins provide, or are given\n")
    beside = (*_classes(datapath), *_classes(optimizing))
    parts += [_object(cls) for cls in (*_classes(driver), *beside) if not issubclass(cls, types.Frozen)]
    parts.append(
        "\n## Values\n\nFrozen pydantic models; sizes are bytes, durations seconds, times seconds since 1970.\n"
    )
    values = (*_classes(types), *(cls for cls in beside if issubclass(cls, types.Frozen)))
    parts += [_value(cls) for cls in values if cls is not types.Frozen]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).rstrip() + "\n"


def hooks() -> dict[str, Callable[..., Any]]:
    """All hooks by name, in the order in which they are written."""
    return {name: function for name, function in vars(ModeliumSpec).items() if name.startswith("modelium_")}


def example(function: Callable[..., Any]) -> str:
    """The code under `Example:` in a hook's docstring; empty when there is none."""
    return textwrap.dedent((inspect.getdoc(function) or "").partition("\nExample:\n")[2]).strip()


def described() -> dict[str, dict[str, str]]:
    """Each hook's `signature`, `text` and `example`."""
    return {
        name: {
            "signature": f"def {name}{_signature(function)}: ...",
            "text": (inspect.getdoc(function) or "").partition("\nExample:\n")[0].strip(),
            "example": example(function),
        }
        for name, function in hooks().items()
    }


# --------------------------------------------------------------------------- parts


def _hook(name: str, parts: dict[str, str]) -> str:
    code = "```python\n{}\n```"
    signature, shown = code.format(parts["signature"]), code.format(parts["example"])
    return f"### {name}\n\n{signature}\n\n{parts['text']}\n\n{shown}\n"


def _object(cls: type[Any]) -> str:
    parts = [f"### {cls.__name__}\n\n{inspect.getdoc(cls) or ''}\n"]
    texts = _described(cls)
    if dataclasses.is_dataclass(cls):
        rows = [
            (f.name, _annotation(cls, f.name), _default(f.default, f.default_factory)) for f in dataclasses.fields(cls)
        ]
        parts.append(_table(rows, texts))
    else:
        rows = [(name, _annotation(cls, name), "") for name in inspect.get_annotations(cls)]
        if rows:
            parts.append(_table(rows, texts))
        for name, method in vars(cls).items():
            if inspect.isfunction(method) and not name.startswith("_"):
                head = "async def" if inspect.iscoroutinefunction(method) else "def"
                parts.append(f"```python\n{head} {name}{_signature(method)}: ...\n```\n")
                if method.__doc__:
                    parts.append(f"{inspect.getdoc(method)}\n")
    return "\n".join(parts)


def _value(cls: type[Any]) -> str:
    parts = [f"### {cls.__name__}\n"]
    own = cls.__dict__.get("__doc__")
    if own:
        parts.append(f"{inspect.cleandoc(own)}\n")
    texts = _described(cls)
    if issubclass(cls, enum.Enum):
        parts += ["| value | |", "|---|---|"]
        parts += [f"| `{member.value}` | {_cell(texts.get(member.name, ''))} |" for member in cls]
        parts.append("")
    elif issubclass(cls, BaseModel):
        rows = [
            (name, _annotation(cls, name), _default(field.default, field.default_factory))
            for name, field in cls.model_fields.items()
        ]
        parts.append(_table(rows, texts))
    return "\n".join(parts)


def _table(rows: list[tuple[str, str, str]], described: dict[str, str]) -> str:
    lines = ["| field | type | default | |", "|---|---|---|---|"]
    for name, annotation, default in rows:
        shown = f"`{default}`" if default else ""
        lines.append(f"| `{name}` | `{_cell(annotation)}` | {shown} | {_cell(described.get(name, ''))} |")
    return "\n".join([*lines, ""])


# --------------------------------------------------------------------------- reading the modules


def _classes(module: Any) -> Iterator[type[Any]]:
    """The public classes that a module defines, in the order in which they are written."""
    for name, value in vars(module).items():
        if inspect.isclass(value) and value.__module__ == module.__name__ and not name.startswith("_"):
            yield value


def _tree(cls: type[Any]) -> ast.ClassDef:
    return _trees(cls.__module__)[cls.__name__]


@functools.cache
def _trees(module: str) -> dict[str, ast.ClassDef]:
    nodes = ast.parse(inspect.getsource(sys.modules[module])).body
    return {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}


def _described(cls: type[Any]) -> dict[str, str]:
    """The string under each field, by the field's name."""
    found = {}
    body = _tree(cls).body
    for field, text in itertools.pairwise(body):
        target = field.target if isinstance(field, ast.AnnAssign) else None
        if isinstance(field, ast.Assign):
            target = field.targets[0] if isinstance(field.targets[0], ast.Name) else None
        if isinstance(target, ast.Name) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found[target.id] = inspect.cleandoc(str(text.value.value))
    return found


def _annotation(cls: type[Any], field: str) -> str:
    """As it is written; one that a parent class wrote, by the parent's source."""
    for base in cls.__mro__:
        if field in inspect.get_annotations(base):
            for node in _tree(base).body:
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == field:
                    return ast.unparse(node.annotation)
    return ""


def _default(value: Any, factory: Any) -> str:
    if factory not in (None, dataclasses.MISSING):
        return repr(factory())
    if value in (PydanticUndefined, dataclasses.MISSING, ...):
        return ""
    return repr(str(value)) if isinstance(value, enum.Enum) else repr(value)


class _Written:
    """An annotation that `str(Signature)` shows without quotes."""

    def __init__(self, text: str):
        self._text = text

    def __repr__(self) -> str:
        return self._text


def _signature(function: Callable[..., Any]) -> str:
    """Types as they are written, without `self`."""
    signature = inspect.signature(function)
    parameters = [
        parameter.replace(annotation=_Written(parameter.annotation))
        for name, parameter in signature.parameters.items()
        if name != "self"
    ]
    return str(signature.replace(parameters=parameters, return_annotation=_Written(signature.return_annotation)))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main(arguments: list[str] | None = None) -> int:
    """Write the file, or with `--check` compare it; 1 when it is stale."""
    parser = argparse.ArgumentParser(prog="python -m modelium.hookdocs", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare instead of writing; exit 1 when they differ")
    parser.add_argument("--file", type=Path, default=FILE, help="the file (default: %(default)s)")
    options = parser.parse_args(arguments)
    text = render()
    if not options.check:
        options.file.write_text(text, encoding="utf-8")
    elif not options.file.exists() or options.file.read_text(encoding="utf-8") != text:
        print(f"{options.file} is stale: run `python -m modelium.hookdocs`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
