"""Existing Triton model directories, adopted as they are: read as Triton reads them, and never changed.

`Analysis.facts` of format `triton` holds: `backend` (empty for an ensemble), `ensemble`, `versions` (all that are
there), `served` (those that the version policy loads), `max_batch_size`, `decoupled`, `sequence`, `dynamic_batching`,
`instances` (a list of `{"kind", "count", "gpus"}`, empty where Triton decides), `imports` (top-level modules that a
Python model names), and `takes`, the fields of `engines.Gpus`, for language models' own backends.
"""

from __future__ import annotations

import ast
import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelium.api import Analysis, Completeness, Finding, Severity, hookimpl
from modelium.api.units import human
from modelium.errors import ModelError
from modelium_plugin_triton import engines, modelconfig
from modelium_plugin_triton.modelconfig import CONFIG, DEFAULT_FILES, Unfinished

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

CONFIGURED = 1.0
"""A config.pbtxt is nobody else's."""
NUMBERED = 0.95
"""Numbered folders with a file that Triton knows by its name: more than the analyzers of those files are sure of."""

MAX_CODE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Folder:
    """A Triton model directory: its configuration, if it has one, and the files of its versions."""

    path: Path
    config: ModelConfig | None
    versions: dict[int, Path]

    @property
    def served(self) -> list[int]:
        return modelconfig.served_versions(self.config, list(self.versions))

    @property
    def ensemble(self) -> bool:
        return self.config is not None and modelconfig.is_ensemble(self.config)

    def backend(self) -> str:
        names = {name for version in self.served for name in os.listdir(self.versions[version])}
        return modelconfig.backend_of(self.config, names)


def find(path: Path) -> Folder | None:
    """The directory at `path`, if it is one. Raises `ModelError` when its configuration is broken."""
    try:
        entries = {entry.name: entry for entry in os.scandir(path)}
    except (NotADirectoryError, FileNotFoundError):
        return None
    except OSError as exc:
        raise ModelError(f"{path.name} can't be read: {exc.strerror}", code="unreadable") from exc
    versions = {
        number: Path(entry.path)
        for name, entry in entries.items()
        if (number := modelconfig.version_of(name)) is not None and entry.is_dir()
    }
    if CONFIG in entries:
        return Folder(path, modelconfig.read_config(path / CONFIG), versions)
    known = any(name in DEFAULT_FILES for version in versions.values() for name in os.listdir(version))
    return Folder(path, None, versions) if known else None


# --------------------------------------------------------------------------- the hooks


@hookimpl
def modelium_completeness(path: Path) -> Completeness | None:
    """Say what is still missing; when nothing is, leave it to others to judge the files themselves."""
    try:
        folder = find(path)
        missing = "" if folder is None else _missing(folder)
    except Unfinished as exc:
        missing = exc.message
    except ModelError:  # waiting will not mend it: the analysis says what is wrong
        return None
    return Completeness(complete=False, reason=missing) if missing else None


@hookimpl
def modelium_scan(path: Path) -> Iterable[Finding]:
    """Say that a model brings code of its own, which Triton runs: whoever drops such a directory asks for that."""
    try:
        folder = find(path)
    except ModelError:
        return []
    return [] if folder is None else [*_code(folder), *_unseen(folder)]


@hookimpl
def modelium_analyze(path: Path) -> Analysis | None:
    """What the configuration and the version folders say."""
    folder = find(path)
    return None if folder is None else _analyze(folder)


# --------------------------------------------------------------------------- what they find


def _missing(folder: Folder) -> str:
    """What the versions that Triton would load lack, for a person; empty when nothing."""
    if folder.ensemble:
        return ""
    if not folder.versions:
        return f"{folder.path.name} has no version yet: a folder named by a number, such as 1, holds the model"
    if folder.config is not None and folder.config.version_policy.HasField("specific"):
        wanted = set(folder.config.version_policy.specific.versions)
        if absent := sorted(wanted - set(folder.versions)):
            return f"version {absent[0]}, which config.pbtxt asks for, is not there"
    file = modelconfig.main_file(folder.config, folder.backend())
    for version in folder.served:
        place = folder.versions[version]
        if file is not None and not _may_hold(folder.config, place, file):
            return f"{place.name}/{file} is not there"
    return ""


def _may_hold(config: ModelConfig | None, version: Path, file: str) -> bool:
    """Whether the file is there; a GPU's own file by `cc_model_filenames` counts as well."""
    others = config.cc_model_filenames.values() if config is not None else ()
    return any((version / name).exists() for name in (file, *others))


def _code(folder: Folder) -> Iterator[Finding]:
    files = [file for version in folder.versions.values() for file in sorted(version.iterdir()) if file.is_file()]
    files += [file for file in sorted(folder.path.iterdir()) if file.is_file()]
    for file in files:
        name = file.relative_to(folder.path).as_posix()
        if file.suffix == ".py":
            what, code = "Python", "python_code"
        elif file.suffix == ".so" or ".so." in file.name:
            what, code = "machine", "native_code"
        else:
            continue
        yield Finding(
            severity=Severity.WARN,
            code=code,
            path=name,
            message=f"{name} is {what} code of the model's own, which Triton runs with its rights: "
            "serve the model only if you trust where it comes from",
        )


def _unseen(folder: Folder) -> Iterator[Finding]:
    if folder.config is not None and (path := engines.unseen(folder.config, _served(folder))):
        yield Finding(
            severity=Severity.WARN,
            code="engine_unseen",
            path=CONFIG,
            message=f"config.pbtxt says that the engine lies in {path}, which can't be seen from here: what the model "
            "takes is known after its first load. If that folder is not there for Triton either, correct "
            f"`{engines.ENGINE_PATH}`",
        )


def _served(folder: Folder) -> list[Path]:
    return [folder.versions[version] for version in folder.served if version in folder.versions]


def _analyze(folder: Folder) -> Analysis:
    config = folder.config
    if config is not None:
        _check(folder, config)
    if missing := _missing(folder):
        raise ModelError(f"{folder.path.name} is not whole: {missing}")
    backend = folder.backend()
    if not backend and not folder.ensemble:
        raise ModelError(
            f"{folder.path.name}: expected `backend` in config.pbtxt, or a file that tells it "
            f'({", ".join(DEFAULT_FILES)}) in its version folders, and found neither: add `backend: "..."`'
        )
    served = folder.served
    weights = sum(_bytes_in(folder.versions[version]) for version in served)
    takes = engines.gpus_of(config, backend, _served(folder)) if config is not None else None
    if takes is not None:
        weights = max(weights, takes.weights_bytes)
    known = config is not None
    return Analysis(
        analyzer="triton",
        format="triton",
        summary=_summary(folder, backend, weights),
        confidence=CONFIGURED if known else NUMBERED,
        entry=CONFIG if known else "",
        weights_bytes=weights,
        inputs=modelconfig.tensors(config, "input") if config is not None else (),
        outputs=modelconfig.tensors(config, "output") if config is not None else (),
        depends_on=_parts(folder, config) if config is not None else (),
        facts={
            "backend": backend,
            "ensemble": folder.ensemble,
            "versions": sorted(folder.versions),
            "served": served,
            "max_batch_size": config.max_batch_size if config is not None else 0,
            "decoupled": config is not None and config.model_transaction_policy.decoupled,
            "sequence": config is not None and config.HasField("sequence_batching"),
            "dynamic_batching": config is not None and config.HasField("dynamic_batching"),
            "instances": _instances(config) if config is not None else [],
            "imports": _imports(folder, served) if backend == "python" else [],
            **({"takes": dataclasses.asdict(takes)} if takes is not None else {}),
        },
    )


def _check(folder: Folder, config: ModelConfig) -> None:
    """What Triton refuses whatever the backend."""
    name = folder.path.name
    if config.name and config.name != name:
        raise ModelError(
            f"config.pbtxt says name: {config.name!r}, and the folder is {name!r}, where Triton wants both alike: "
            f"rename the folder to {config.name!r}, or remove the `name` line",
            expected=config.name,
            found=name,
        )
    if reason := engines.unfilled(config):
        raise ModelError(f"{name} is not finished: {reason}", code="unfilled")
    if config.max_batch_size < 0:
        raise ModelError(f"{name}: max_batch_size is {config.max_batch_size}, and must be 0 (no batching) or more")
    for direction, tensors in (("input", config.input), ("output", config.output)):
        seen: set[str] = set()
        for tensor in tensors:
            if not tensor.name or tensor.name in seen:
                raise ModelError(f"{name}: each {direction} needs a name of its own, and {tensor.name!r} is not one")
            seen.add(tensor.name)
    if folder.ensemble:
        steps = config.ensemble_scheduling.step
        if not steps or not all(step.model_name for step in steps):
            raise ModelError(f"{name} is an ensemble: expected `ensemble_scheduling` with steps that each name a model")
        if any(step.model_name == name for step in steps):
            raise ModelError(f"{name} is an ensemble that has itself as a part: remove that step")


def _parts(folder: Folder, config: ModelConfig) -> tuple[str, ...]:
    """The models that an ensemble is made of, each once, or that TensorRT-LLM's business logic calls."""
    steps = dict.fromkeys(step.model_name for step in config.ensemble_scheduling.step)
    return tuple(steps) or engines.parts(config, _served(folder))


def _instances(config: ModelConfig) -> list[dict[str, Any]]:
    return [
        {"kind": type(group).Kind.Name(group.kind), "count": group.count or 1, "gpus": list(group.gpus)}
        for group in config.instance_group
    ]


def _summary(folder: Folder, backend: str, weights: int) -> str:
    config = folder.config
    if config is not None and folder.ensemble:
        return f"Triton ensemble of {', '.join(_parts(folder, config))}"
    served = ", ".join(map(str, folder.served))
    of_all = f" of {len(folder.versions)}" if len(folder.versions) > len(folder.served) else ""
    word = "versions" if len(folder.served) > 1 else "version"
    return f"Triton model, {backend} backend, {word} {served}{of_all}, {human(weights)}"


def _bytes_in(folder: Path) -> int:
    """Bytes of all files in a version's folder, without what Python leaves there."""
    total = 0
    waiting: list[str] = [str(folder)]
    while waiting:
        with os.scandir(waiting.pop()) as listing:
            for entry in listing:
                if not entry.is_dir():
                    total += entry.stat().st_size
                elif entry.name != "__pycache__" and not entry.is_symlink():
                    waiting.append(entry.path)
    return total


def _imports(folder: Folder, served: Sequence[int]) -> list[str]:
    """Top-level modules that the code names, read from its text: what its environment must have."""
    found: set[str] = set()
    for version in served:
        for file in folder.versions[version].glob("*.py"):
            if file.stat().st_size > MAX_CODE_BYTES:
                continue
            try:
                tree = ast.parse(file.read_bytes())
            except (SyntaxError, ValueError, RecursionError):
                continue  # Triton says what is wrong with it
            for node in ast.walk(tree):
                if isinstance(node, ast.Import):
                    found |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    found.add(node.module.partition(".")[0])
    return sorted(found)
