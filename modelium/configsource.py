"""Where configuration comes from: files, environment variables and flags, each value with its origin.

Later ones win key by key. Origins are kept so that a mistake is reported at the place where it was made.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from modelium.errors import ConfigError
from modelium.redact import HIDDEN, redact_value

ENVIRONMENT_PREFIX = "MODELIUM_"

KeyPath = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Origin:
    text: str
    """`modelium.yaml line 3`, `MODELIUM_SERVER__PORT`, `--port`."""
    folder: Path
    """What a relative path found there is relative to."""


@dataclass(frozen=True, slots=True)
class Values:
    """Configuration as it was written, not yet validated."""

    data: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, Origin] = field(default_factory=dict)

    def origin(self, path: KeyPath) -> Origin | None:
        """Where the value at `path`, or the nearest one above it, was set."""
        return next((self.origins[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self.origins), None)

    def over(self, other: Values) -> Values:
        """These values where they are set, else the other's."""
        return Values(_merge(other.data, self.data), {**other.origins, **self.origins})


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


# --------------------------------------------------------------------------- reading


def from_file(path: Path) -> Values:
    """The YAML mapping in a file. Raises `ConfigError` with the line where it can't be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"can't read the configuration file {path}: {exc}") from exc
    values = Values()
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return values
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path} line 1: expected sections like `server:`, found {text.strip()[:40]!r}")
        _note_lines(node, (), path, values.origins)
        values.data.update(loader.construct_document(node))
    except yaml.MarkedYAMLError as exc:
        line = f" line {exc.problem_mark.line + 1}" if exc.problem_mark else ""
        raise ConfigError(f"{path}{line}: this is not YAML: {exc.problem or exc}") from exc
    except yaml.YAMLError as exc:
        raise ConfigError(f"{path}: this is not YAML: {exc}") from exc
    finally:
        loader.dispose()
    return values


def _note_lines(node: yaml.MappingNode, at: KeyPath, file: Path, origins: dict[KeyPath, Origin]) -> None:
    for key_node, value_node in node.value:
        path = (*at, str(key_node.value))
        origin = Origin(f"{file} line {key_node.start_mark.line + 1}", file.absolute().parent)
        if path in origins:
            raise ConfigError(f"{origin.text}: {'.'.join(path)} is written twice: remove one")
        origins[path] = origin
        if isinstance(value_node, yaml.MappingNode):
            _note_lines(value_node, path, file, origins)


def from_environment(environ: Mapping[str, str]) -> Values:
    """`MODELIUM_<SECTION>__<KEY>=value` for each key, the value in YAML; other variables are not configuration."""
    values = Values()
    for variable in sorted(environ):
        path = tuple(variable.removeprefix(ENVIRONMENT_PREFIX).lower().split("__"))
        if not variable.startswith(ENVIRONMENT_PREFIX) or len(path) == 1:
            continue
        if not all(path):
            raise ConfigError(f"{variable} names no key: expected {ENVIRONMENT_PREFIX}SECTION__KEY")
        try:
            value = yaml.safe_load(environ[variable])
        except yaml.YAMLError as exc:
            raise ConfigError(f"{variable} is not YAML: {str(exc).splitlines()[0]}") from exc
        _set(values, path, value, Origin(variable, Path.cwd()))
    return values


def from_flags(flags: Mapping[str, tuple[str, Any]]) -> Values:
    """Flags that were given: the flag and its value by dotted key, `{"server.port": ("--port", 9000)}`."""
    values = Values()
    for key, (flag, value) in flags.items():
        _set(values, tuple(key.split(".")), value, Origin(flag, Path.cwd()))
    return values


def _set(values: Values, path: KeyPath, value: Any, origin: Origin) -> None:
    at = values.data
    for part in path[:-1]:
        inner = at.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{origin.text}: {part} was given a value of its own before, by a shorter variable")
        at = inner
    at[path[-1]] = value
    values.origins[path] = origin


# --------------------------------------------------------------------------- explaining


def config_error(error: ValidationError, model: type[BaseModel], values: Values, at: KeyPath = ()) -> ConfigError:
    """All that pydantic found, one line each, in terms of what was written. `model` was validated from the key `at`."""
    lines = [_explain(detail, model, values, at) for detail in error.errors(include_url=False)]
    return ConfigError("\n".join(lines), code="config")


def _explain(detail: Any, model: type[BaseModel], values: Values, at: KeyPath) -> str:
    inner = tuple(str(part) for part in detail["loc"])
    path = (*at, *inner)
    origin = values.origin(path)
    where = f"{origin.text}: " if origin else ""
    dotted = ".".join(path) or "the configuration"
    if detail["type"] == "extra_forbidden":
        owner = _model_at(model, inner[:-1])
        return where + unknown_key(dotted, inner[-1], owner.model_fields if owner else (), ".".join(path[:-1]))
    if detail["type"] in {"model_type", "model_attributes_type"}:
        return f"{where}{dotted} should be a section with keys of its own, not {detail['input']!r:.80}"
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if detail["type"] == "value_error":
        return f"{where}{dotted}: {message}"
    shown = redact_value(path[-1] if path else "", detail["input"])
    return f"{where}{dotted} should be {message}, not {shown if shown == HIDDEN else repr(shown)[:80]}"


def unknown_key(dotted: str, key: str, known: Iterable[str], section: str = "") -> str:
    """One line about a key that nobody knows, with the nearest that there is."""
    known = sorted(known)
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    place = f" in {section}" if section else ""
    return f"unknown key {dotted}{hint} (known{place}: {', '.join(known) or 'none'})"


def _model_at(model: type[BaseModel], path: KeyPath) -> type[BaseModel] | None:
    found: type[BaseModel] | None = model
    for part in path:
        info = found.model_fields.get(part) if found else None
        options = (info.annotation, *get_args(info.annotation)) if info else ()
        found = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
    return found
