"""The configuration: what can be set, with defaults, and where its folders are.

Every key has a default, so an empty file is a good one. The docstring under each key is what `modelium init` writes
above it and what editors show.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    StringConstraints,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from modelium.configsource import Values, config_error, from_environment, from_file, from_flags, unknown_key
from modelium.errors import ConfigError
from modelium.paths import Paths, cache_dir, place

__all__ = ["Config", "Paths", "cache_dir", "load_config", "parse_size", "validate_sections"]

DEFAULT_FILE = "modelium.yaml"

UNITS = {"": 1, "B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGT", start=1)
    for suffix, base in (("", 1000), ("B", 1000), ("IB", 1024))
}
"""SI for `GB`, IEC 80000-13 for `GiB`; letters in any case."""


def parse_size(value: object) -> int:
    """Bytes from `2000000000`, `"2GB"` or `"1.5 GiB"`; raises ValueError otherwise."""
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value) if isinstance(value, str) else None
        if match is None or match[2].upper() not in UNITS:
            raise ValueError(f"a size is a number of bytes or a text like 2GB or 1.5GiB, not {value!r}")
        size = int(float(match[1]) * UNITS[match[2].upper()])
    if size < 0:
        raise ValueError(f"a size can't be negative, as {value!r} is")
    return size


Size = Annotated[
    int,
    BeforeValidator(parse_size),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": "^\\s*[0-9]"}]}),
]
"""Bytes; written as a number, `2GB` or `1.5GiB`."""

Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Priority = Annotated[int, Field(ge=-10, le=10)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _nothing_written(cls, value: Any) -> Any:
        """`server:` with nothing under it is YAML's null."""
        return {} if value is None else value


class Tls(Section):
    """Encryption of HTTP and gRPC; both files are read at start."""

    certificate: Path | None = None
    """PEM: the server's certificate, and those between it and its root."""
    key: Path | None = None
    """PEM: the certificate's private key, without a password."""

    @model_validator(mode="after")
    def _both(self) -> Self:
        if (self.certificate is None) is not (self.key is None):
            raise ValueError("certificate and key go together: give both, or neither")
        return self


class Server(Section):
    """The one address that clients talk to."""

    host: str = "127.0.0.1"
    """Address to bind; 0.0.0.0 lets other machines in, and there is no authentication of its own."""
    port: Port = 8000
    """HTTP: KServe v2, OpenAI, administration, metrics. 0 takes a free one."""
    grpc_port: Port = 8001
    """gRPC: KServe v2. 0 takes a free one."""
    socket_directory: Path | None = None
    """Also answer on Unix sockets in this folder, `http.sock` and `grpc.sock`, for clients beside the service."""
    tls: Tls = Tls()
    data_path: str = "auto"
    """What carries requests for loaded models: `auto` is a plugin that can run here, if there is one; `service` is the
    service itself; else a plugin by name (`haproxy`)."""
    allowed_hosts: tuple[str, ...] = ()
    """Further names, without a port, that clients may call this service by while it is bound to a loopback address."""
    allowed_origins: tuple[str, ...] = ()
    """Origins (`https://app.example`) of web pages that may send more than GET requests."""

    max_body_bytes: Size | None = None
    """Of one request; a longer one is answered 413. Without it there is no limit but the runtime's."""
    max_json_bytes: Size = 16 * 2**20
    """Of a request that the service has to read itself: OpenAI's routes, `/predict`, orders."""
    client_stall_s: Annotated[float, Field(gt=0, le=86_400)] = 60
    """The longest that a client may pause in the middle of a request, which is answered 408 then, or in taking the
    answer, which is broken off."""

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if self.port and self.port == self.grpc_port:
            raise ValueError(f"port and grpc_port are both {self.port}: HTTP and gRPC need a port each")
        return self

    @property
    def url(self) -> str:
        """Where a client on this machine finds the service."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self.host, self.host)
        scheme = "http" if self.tls.certificate is None else "https"
        return f"{scheme}://[{host}]:{self.port}" if ":" in host else f"{scheme}://{host}:{self.port}"


class Policies(Section):
    """What is kept in memory, what makes room, and who waits how long."""

    always_loaded: tuple[str, ...] = ()
    """Models that are loaded at start and never evicted: names, or patterns as in a shell (`bert-*`)."""
    evict_after_idle_seconds: Seconds = 300
    """Past this without a request a model goes when room is needed, and at twice this in any case."""
    keep_above_qps: Annotated[float, Field(ge=0)] = 0.5
    """A model used more often than this, in requests per second, is evicted only when nothing else makes room."""
    min_qps_threshold: Annotated[float, Field(ge=0)] = 0.01
    """A model used more often than this is not unloaded for being idle."""
    min_resident_seconds: Seconds = 30
    """A loaded model that was used stays at least this long."""
    max_gpu_memory_utilization: Share = 0.9
    """The share of a device's memory that models may occupy, where no budget is set for it."""
    device_budget_bytes: dict[str, Size] = {}
    """Memory that models may occupy, by device: `{"cpu:0": 2GB, "cuda:0": 20GiB}`."""
    standby_budget_bytes: Size | None = None
    """Host memory in which models of other devices may sleep rather than be unloaded; 0: none does. Without it half of
    what is free: nobody else uses that, and the half that is left keeps files in the page cache."""
    readahead_budget_bytes: Size | None = None
    """How much of the files of unloaded models is kept in the page cache, for their next load; 0: no more than what is
    there by itself. Without it a quarter of the free host memory."""
    high_priority_teams: tuple[str, ...] = ()
    """Organisations whose requests go first when models wait for room."""
    model_priorities: dict[str, Priority] = {}
    """What is added to the priority of requests for a model, by its name or a pattern as in a shell; the first fits."""
    organisation_priorities: dict[str, Priority] = {}
    """What is added to the priority of an organisation's requests."""
    request_deadline_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 300
    """How long a request waits for its model, unless it says otherwise (`x-modelium-deadline-s`)."""
    max_queue_per_model: Count = 1000
    """Requests that may wait for one model; more are answered 429."""
    max_queue: Count = 10000
    """Requests that may wait for any model; more are answered 429."""
    max_concurrent_loads: Count = 2
    """Loads at one time."""
    load_timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 900
    """A load that takes longer has failed."""
    drain_timeout_s: Seconds = 30
    """How long a model that is to be unloaded may finish what it is doing."""
    fairness_after_s: Seconds = 15
    """A model that waited this long may take room from ones that are in use."""
    retry_s: Seconds = 5
    """A failed load is tried again after this, then after twice as long each time, when someone wants the model."""
    retry_max_s: Seconds = 300
    """The longest such pause."""
    max_residue_bytes: Size = 2**30
    """A runtime that keeps more than this of what it has unloaded is started anew while nothing of it is in use."""
    crash_budget: Count = 5
    """A runtime that crashes this often within `crash_window_s` is left down for as long, or until someone loads one of
    its models."""
    crash_window_s: Seconds = 600
    """The time in which crashes are counted."""


class Orchestration(Section):
    """Folders and policies."""

    root: Path = Path("models")
    """Holds `incoming/`, `repository/`, `quarantine/`, `trash/` and `.modelium/`."""
    model_repository: Path | None = None
    """A Triton model repository elsewhere, perhaps somebody else's: managed as it is, without rewriting a file."""
    incoming_directory: Path | None = None
    """Where models are dropped, when that is not `incoming/` in the root."""
    settle_s: Seconds = 2
    """A drop of a format that does not tell its own size is complete when it has been still for this long."""
    rescan_interval_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 30
    """Folders are read again this often, since network and bind mounts don't notify of changes."""
    policies: Policies = Policies()


class Named(Section):
    """Chooses a plugin's object by name; its other keys are that object's own settings."""

    model_config = ConfigDict(extra="allow")

    @property
    def settings(self) -> dict[str, Any]:
        """The section without `name`."""
        return dict(self.model_extra or {})


class BrainSection(Named):
    """What decides how a model is served. Keys besides `name` are the brain's own."""

    name: str = "rules"
    """`rules`, or one that a plugin brings."""


class EvictionSection(Named):
    """What decides which model makes room. Keys besides `name` are the policy's own."""

    name: str = "lru"
    """`lru`, or one that a plugin brings."""


class NamedRuntime(Section):
    """One more runtime of a backend; its other keys are those of the backend's own section."""

    model_config = ConfigDict(extra="allow")

    backend: str
    """Whose kind it is: `triton`, `vllm`, or one that a plugin brings."""

    @property
    def settings(self) -> dict[str, Any]:
        """The section without `backend`."""
        return dict(self.model_extra or {})


RuntimeName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,30}$")]
"""Part of the names of processes, folders and devices."""


class Metrics(Section):
    """Prometheus metrics at `/metrics`."""

    enabled: bool = True
    """Whether `/metrics` answers."""
    collection_interval_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10
    """How often devices are asked what they hold."""


class Logging(Section):
    """What the service writes to its terminal."""

    format: Literal["console", "json"] = "console"
    """`console` for people, `json` for programs: one object in each line."""
    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least that is written."""
    access: bool = False
    """One line for each HTTP request too: in this log for what the service answers, in the data path's own
    (`modelium logs haproxy`) for all."""


class Plugins(Section):
    """Which of the installed plugins are used."""

    disable: tuple[str, ...] = ()
    """Names of plugins that are not even imported; `modelium plugins` lists them."""


class Config(Section):
    """The whole configuration. Sections that it does not know belong to plugins: see `validate_sections`."""

    model_config = ConfigDict(extra="allow")

    server: Server = Server()
    orchestration: Orchestration = Orchestration()
    brain: BrainSection = BrainSection()
    eviction: EvictionSection = EvictionSection()
    runtimes: dict[RuntimeName, NamedRuntime] = {}
    """Further runtimes by names of your own: `{gpu-box: {backend: triton, endpoint: "http://10.0.0.5:8000"}}`. Rules
    prefer them by these names."""
    metrics: Metrics = Metrics()
    logging: Logging = Logging()
    plugins: Plugins = Plugins()

    _values: Values = PrivateAttr(default_factory=Values)
    _file: Path | None = PrivateAttr(default=None)

    @property
    def file(self) -> Path | None:
        """The file that was read, if any."""
        return self._file

    @property
    def policies(self) -> Policies:
        return self.orchestration.policies

    def paths(self, environ: Mapping[str, str] = os.environ) -> Paths:
        """All folders. Raises `ConfigError` when one would lie where another's contents are taken for models.

        A repository without a root is somebody else's: its state goes to the user's state folder, and there is no
        incoming folder unless one is named.
        """
        section = self.orchestration
        root = section.root if section.model_repository is None or "root" in section.model_fields_set else None
        return place(root, section.model_repository, section.incoming_directory, environ)


def load_config(
    file: Path | None = None,
    *,
    environ: Mapping[str, str] = os.environ,
    flags: Mapping[str, tuple[str, Any]] | None = None,
) -> Config:
    """Read the file, then environment variables over it, then flags over both.

    `file` None means `$MODELIUM_CONFIG`, else `modelium.yaml` in the working directory if it is there. `flags` holds
    the flag and its value by dotted key. Relative folders are relative to the file that names them, else to the
    working directory. Raises `ConfigError` with one line for each mistake.
    """
    if file is None and environ.get("MODELIUM_CONFIG"):
        file = Path(environ["MODELIUM_CONFIG"])
    if file is None and Path(DEFAULT_FILE).exists():
        file = Path(DEFAULT_FILE)
    values = from_file(file) if file else Values()
    values = from_flags(flags or {}).over(from_environment(environ).over(values))
    try:
        config = Config.model_validate(_resolved(values))
    except ValidationError as exc:
        raise config_error(exc, Config, values) from exc
    config._values = values
    config._file = file.absolute() if file else None
    return config


def validate_sections(config: Config, models: Mapping[str, type[BaseModel]]) -> dict[str, BaseModel]:
    """The plugins' sections, each validated by its own model; defaults where a section is not written. Those of
    further runtimes are there by their names.

    Raises `ConfigError` for sections that nobody owns and for what a model refuses, one line each.
    """
    written = dict(config.model_extra or {})
    lines = []
    for name in sorted(written.keys() - models.keys()):
        origin = config._values.origin((name,)) or next(
            (origin for path, origin in config._values.origins.items() if path[0] == name), None
        )
        where = f"{origin.text}: " if origin else ""
        advice = f"; if it belongs to a plugin, install that (modelium-plugin-{name.replace('_', '-')}) or enable it"
        lines.append(where + unknown_key(name, name, {*Config.model_fields, *models}) + advice)
    sections = {}
    for name, model in models.items():
        try:
            value = written.get(name)
            sections[name] = model.model_validate({} if value is None else value)
        except ValidationError as exc:
            lines.append(config_error(exc, model, config._values, (name,)).message)
    for name, named in config.runtimes.items():
        key, named_model = f"runtimes.{name}", models.get(named.backend)
        if name in models:
            lines.append(f"{key}: {name} is a section of its own already: choose another name")
        elif named_model is None:
            near = difflib.get_close_matches(named.backend, models, 1)
            meant = f"did you mean {near[0]!r}?" if near else f"there is {', '.join(sorted(models))}"
            lines.append(f"{key}.backend: there is no runtime backend {named.backend!r}: {meant}")
        else:
            try:
                sections[name] = named_model.model_validate(named.settings)
            except ValidationError as exc:
                lines.append(config_error(exc, named_model, config._values, ("runtimes", name)).message)
    if lines:
        raise ConfigError("\n".join(lines))
    return sections


def _resolved(values: Values) -> dict[str, Any]:
    """The data with relative folders made absolute, by where each was written."""
    data = dict(values.data)
    for path in _PATHS:
        section: Any = data
        for part in path[:-1]:
            if not isinstance(section.get(part), dict):
                break
            section[part] = section = dict(section[part])
        else:
            origin, key = values.origin(path), path[-1]
            if isinstance(section.get(key), str | Path) and origin:
                section[key] = origin.folder / Path(section[key]).expanduser()
    return data


_PATHS = (
    ("orchestration", "root"),
    ("orchestration", "model_repository"),
    ("orchestration", "incoming_directory"),
    ("server", "socket_directory"),
    ("server", "tls", "certificate"),
    ("server", "tls", "key"),
)
