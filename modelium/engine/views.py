"""What the service shows of itself, one frozen model for each question; the same values feed tables and `--json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modelium.api.datapath import DataPathInfo
from modelium.api.types import Analysis, Finding, Frozen, Layout, Plan, Progress, RuntimeInfo, Transition
from modelium.discovery import PluginView as PluginView


class ModelView(Frozen):
    """A model, or a drop on its way to be one, in one line."""

    name: str
    """A drop that is not accepted is called by its place: `incoming/x.onnx`, `quarantine/x.pt`."""
    state: str
    reason: str
    since: float
    runtime: str | None = None
    serving: str | None = None
    format: str | None = None
    task: str | None = None
    summary: str = ""
    created_at: float | None = None
    """When it was first found out what it is; None for what is no model yet."""
    devices: tuple[str, ...] = ()
    memory_bytes: int = 0
    """Booked while it holds memory, else what loading it would take."""
    memory_source: str = "estimated"
    """`estimated` or `measured`."""
    pinned: bool = False
    always_loaded: bool = False
    in_flight: int = 0
    waiting: int = 0
    requests: int = 0
    failures: int = 0
    """Requests that the runtime answered with an error of its own (5xx)."""
    qps: float = 0.0
    idle_s: float | None = None
    """Seconds since it was last used; None when it is not loaded."""
    retry_after_s: float | None = None
    progress: Progress | None = None


class ModelDetail(ModelView):
    path: str
    revision: str
    loaded_revision: str | None = None
    load_s: float = 0.0
    """Expected seconds of a load."""
    plan: Plan | None = None
    analysis: Analysis | None = None
    findings: tuple[Finding, ...] = ()
    depends_on: tuple[str, ...] = ()
    dependents: tuple[str, ...] = ()


class Measurement(Frozen):
    """What loads of this content, with this runtime, these settings and this kind of device, really took."""

    loads: int
    memory_bytes: int
    """The largest seen."""
    load_s: float
    """The median of the last loads."""
    memory_spread_bytes: int = 0
    """Between the least and the most of the last loads."""
    slowest_s: float = 0.0
    """Of the last loads."""
    wake_s: Mapping[int, float] = {}
    """The median of the last wakes, by the level at which it slept."""


class Explanation(Frozen):
    """Why a model is where it is."""

    model: ModelDetail
    estimate_bytes: int
    measured: Measurement | None
    room: str
    """The arithmetic of its device, now."""
    next: str
    """What would change its state, in one sentence."""
    transitions: tuple[Transition, ...]


class PlanPreview(Frozen):
    """What would happen to a drop; nothing was done."""

    name: str
    analysis: Analysis | None
    findings: tuple[Finding, ...]
    plan: Plan | None
    layout: Layout | None
    device: str | None = None
    would_load: bool = False
    would_evict: tuple[str, ...] = ()
    refused: str | None = None
    """Why it would be refused; None when it would not."""
    room: str = ""
    installs: tuple[str, ...] = ()
    """What its runtime installs before the first load of this kind, which may take minutes."""


class HolderView(Frozen):
    """A process that is not ours, and what it holds of a device."""

    pid: int
    name: str
    """As the kernel calls it, 15 characters at most."""
    bytes: int


class DeviceView(Frozen):
    id: str
    kind: str
    name: str
    total_bytes: int
    used_bytes: int
    """In use by anyone, as the device itself reports."""
    budget_bytes: int
    booked_bytes: int
    promised_bytes: int
    measured_bytes: int = 0
    """What models really hold, by their processes."""
    overhead_bytes: int = 0
    """What runtimes, and the service, hold besides."""
    foreign_bytes: int = 0
    """What processes hold that are not ours."""
    unexplained_bytes: int = 0
    """In use, and in none of those hands."""
    foreign: tuple[HolderView, ...] = ()
    """The largest of the processes that are not ours."""
    utilization: float | None = None
    models: tuple[str, ...] = ()


class RuntimeView(Frozen):
    name: str
    state: str
    reason: str
    since: float
    info: RuntimeInfo | None = None
    foreign_models: tuple[str, ...] = ()
    """Loaded in it by somebody else: counted, never evicted."""
    progress: Progress | None = None
    residue_bytes: Mapping[str, int] = {}
    """What did not come back after unloads so far, by way of serving."""


class DataPathView(Frozen):
    """What carries requests for loaded models."""

    name: str
    """`service` where the service itself does."""
    state: str = "UP"
    reason: str = ""
    info: DataPathInfo | None = None


class StatusView(Frozen):
    version: str
    root: str
    repository: str
    incoming: str | None
    started_at: float
    models: Mapping[str, int]
    """How many in each state."""
    queue: tuple[str, ...]
    waiting: int
    devices: tuple[DeviceView, ...]
    runtimes: tuple[RuntimeView, ...]
    data_path: DataPathView = DataPathView(name="service")
    listening: Mapping[str, str] = {}
    """The addresses that clients know: a URL under `http`, an address under `grpc`."""
    plugins: tuple[PluginView, ...]


class CheckView(Frozen):
    """One thing that was checked: a folder, a runtime, a plugin, a device."""

    name: str
    ok: bool
    found: str
    advice: str = ""


class ChecksView(Frozen):
    ok: bool
    checks: tuple[CheckView, ...]


class HealthView(Frozen):
    status: str
    """`ok` or `degraded`."""
    ready: bool
    wrong: tuple[str, ...]
    """One sentence for each thing."""
    models: Mapping[str, int]
    """How many in each state."""
    waiting: int


class PinView(Frozen):
    name: str
    pinned: bool


class RemovedView(Frozen):
    name: str
    moved_to: str


class EventView(Frozen):
    """One line of `/events`."""

    id: int
    kind: str
    """`transition` or `progress`."""
    at: float
    subject: str
    data: Mapping[str, Any]
