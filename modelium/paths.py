"""Where Modelium's folders are, for a root of its own and for somebody else's repository."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from modelium.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Paths:
    """Where everything lies; absolute, and not necessarily there yet."""

    root: Path
    repository: Path
    incoming: Path | None
    """None for a repository that is managed as it is and has no place to drop models."""
    quarantine: Path
    trash: Path
    state: Path
    cache: Path
    """Shared between all roots of this user: downloads and environments."""


def place(root: Path | None, repository: Path | None, incoming: Path | None, environ: Mapping[str, str]) -> Paths:
    """All folders, from the few that are given.

    Without a root, state goes to the user's state folder (`$XDG_STATE_HOME/modelium/<name>-<hash of its path>`, by
    the XDG base directory specification), so that nothing is written into the repository. Raises `ConfigError` when
    one folder would lie where another's contents are taken for models.
    """
    if root is None:
        if repository is None:
            raise ConfigError("neither a root nor a model repository is configured: name one")
        base = _home(environ, "XDG_STATE_HOME", ".local/state") / "modelium" / _slug(repository)
    else:
        base = _absolute(root)
        incoming = incoming or base / "incoming"
    paths = Paths(
        root=base,
        repository=_absolute(repository or base / "repository"),
        incoming=_absolute(incoming) if incoming else None,
        quarantine=base / "quarantine",
        trash=base / "trash",
        state=base / ".modelium",
        cache=cache_dir(environ),
    )
    _refuse_overlap(paths)
    return paths


def cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """`$MODELIUM_CACHE_DIR`, else `modelium` in the user's cache folder (`$XDG_CACHE_HOME` or `~/.cache`)."""
    if environ.get("MODELIUM_CACHE_DIR"):
        return _absolute(Path(environ["MODELIUM_CACHE_DIR"]))
    return _home(environ, "XDG_CACHE_HOME", ".cache") / "modelium"


def _home(environ: Mapping[str, str], variable: str, default: str) -> Path:
    """Relative values are ignored, as the XDG base directory specification asks."""
    value = environ.get(variable, "")
    return Path(value) if os.path.isabs(value) else Path(environ.get("HOME") or Path.home()) / default


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path.expanduser()))


def _slug(path: Path) -> str:
    resolved = path.expanduser().resolve()
    return f"{resolved.name or 'root'}-{hashlib.sha256(os.fsencode(resolved)).hexdigest()[:12]}"


def _refuse_overlap(paths: Paths) -> None:
    """What lies in the repository or in incoming is taken for a model, so nothing else may lie there."""
    named = {
        "the model repository": paths.repository,
        "the incoming folder": paths.incoming,
        "the quarantine": paths.quarantine,
        "the trash": paths.trash,
        "the state folder": paths.state,
        "the cache": paths.cache,
    }
    folders = {what: folder.resolve() for what, folder in named.items() if folder is not None}
    for watched in ("the model repository", "the incoming folder"):
        for what, folder in folders.items():
            top = folders.get(watched)
            if top is None or what == watched:
                continue
            if folder == top or top in folder.parents:
                raise ConfigError(
                    f"{what} {folder} lies in {watched} {top}, where everything is taken for a model: "
                    "choose another orchestration.root, model_repository or incoming_directory"
                )


LONGEST_SOCKET_PATH = 97
"""Bytes. unix(7) has 107, and HAProxy first binds a socket under a name that is up to 10 bytes longer."""


def socket_folder(state: Path) -> Path:
    """A folder of this user's own for sockets: the state folder, or another one where its path is too long for them."""
    if len(os.fsencode(state)) + len("/longest-name.sock") <= LONGEST_SOCKET_PATH:
        return state
    base = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
    folder = base / f"modelium-{os.getuid()}-{hashlib.sha256(os.fsencode(state)).hexdigest()[:16]}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or not folder.is_dir() or folder.is_symlink():
        raise ConfigError(f"{folder} belongs to somebody else: remove it, or choose a --root with a shorter path")
    return folder
