"""`/metrics`: what Prometheus reads.

The text is written here rather than by the client library, whose general way takes about 10 µs a sample: seconds for
ten thousand models in use. It is made model by model, giving way to requests in between, and holds series of models
that exist, no others. Format: https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from aiohttp import web
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from modelium.core.states import RuntimeState
from modelium.engine.usage import RESULTS, Histogram, ModelUsage, TransitionCounter
from modelium.engine.views import DeviceView, ModelView, StatusView
from modelium.http.admin import views

if TYPE_CHECKING:
    from modelium.engine.service import Service

PIECE = 200
"""Models whose lines are kept as texts before they are packed, so that packing never takes long at once."""

FAMILIES = {
    "modelium_build_info": ("gauge", "The version, as a label; always 1."),
    "modelium_started_at_seconds": ("gauge", "When the service started, in seconds since the epoch."),
    "modelium_models": ("gauge", "Models by state."),
    "modelium_queue_length": ("gauge", "Models that wait for room or for their turn."),
    "modelium_waiting": ("gauge", "Requests that wait for a model."),
    "modelium_runtime_up": ("gauge", "1 while the runtime answers."),
    "modelium_device_memory_bytes": (
        "gauge",
        "Memory of a device by kind: total, used by anyone, budget for models, booked by models, promised to models "
        "that wait, measured of models, overhead of runtimes, foreign: of processes that are not ours, unexplained.",
    ),
    "modelium_device_utilization_ratio": ("gauge", "How busy the device is, 0 to 1, where it tells."),
    "modelium_load_seconds": ("histogram", "What loads took."),
    "modelium_model_state": ("gauge", "1 for the state that the model is in."),
    "modelium_model_memory_bytes": ("gauge", "Memory that the model holds, or would hold if it were loaded."),
    "modelium_model_pinned": ("gauge", "1 for a model that stays loaded, by a person's or the configuration's wish."),
    "modelium_model_idle_seconds": ("gauge", "Seconds since a loaded model was last used."),
    "modelium_model_waiting": ("gauge", "Requests that wait for the model."),
    "modelium_model_in_flight": ("gauge", "Requests that the model works on."),
    "modelium_model_qps": ("gauge", "Requests per second over the last minute."),
    "modelium_requests_total": (
        "counter",
        "Requests by result: ok or failed, as the runtime answered; refused when it was never asked.",
    ),
    "modelium_request_seconds": ("histogram", "From a request's admission to the end of its answer."),
    "modelium_model_loads_total": ("counter", "Completed loads by whom they were for."),
    "modelium_model_failed_loads_total": ("counter", "Loads that failed."),
    "modelium_model_last_load_seconds": ("gauge", "What the last load took."),
    "modelium_model_unloads_total": ("counter", "Completed unloads by reason; lost: its runtime was."),
    "modelium_model_parks_total": ("counter", "How often the model was put to sleep instead of unloaded, by reason."),
    "modelium_model_wakes_total": ("counter", "How often it was woken."),
    "modelium_model_last_wake_seconds": ("gauge", "What the last wake took."),
}
"""Name, kind and help of all that is told, in the order of the text."""


class Metrics:
    """The route `/metrics`."""

    def __init__(self, service: Service):
        self._service = service
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/metrics", self.metrics)]

    async def metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=await self.render(), headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})

    async def render(self) -> bytes:
        await self._service.fresh()
        text = _Text()
        _service(text, self._service.status())
        usage = self._service.usage
        _histogram(text, "modelium_load_seconds", "", usage.transitions.load_seconds)
        number = 0
        async for view in views(self._service):
            if "/" in view.name:
                continue  # a drop that is no model yet
            model = f'model="{_escaped(view.name)}"'
            _model(text, model, view)
            if (used := usage.get(view.name)) is not None:
                _use(text, model, used, view.qps)
            _loads(text, model, view.name, usage.transitions)
            number += 1
            if number % PIECE == 0:
                text.pack()
        return b"".join([*text.pieces(), generate_latest(self._process)])


class _Text:
    """Lines by family: the format wants those of a family together."""

    def __init__(self) -> None:
        self.lines: dict[str, list[str]] = {name: [] for name in FAMILIES}
        self._packed: dict[str, list[bytes]] = {name: [] for name in FAMILIES}

    def add(self, family: str, labels: str, value: float) -> None:
        self.lines[family].append(f"{family}{{{labels}}} {value}\n" if labels else f"{family} {value}\n")

    def pack(self) -> None:
        for name, lines in self.lines.items():
            if lines:
                self._packed[name].append("".join(lines).encode())
                lines.clear()

    def pieces(self) -> list[bytes]:
        self.pack()
        parts: list[bytes] = []
        for name, (kind, help_text) in FAMILIES.items():
            if self._packed[name]:
                parts.append(f"# HELP {name} {help_text}\n# TYPE {name} {kind}\n".encode())
                parts += self._packed[name]
        return parts


def _service(text: _Text, status: StatusView) -> None:
    text.add("modelium_build_info", f'version="{_escaped(status.version)}"', 1)
    text.add("modelium_started_at_seconds", "", status.started_at)
    for state, count in status.models.items():
        text.add("modelium_models", f'state="{state}"', count)
    text.add("modelium_queue_length", "", len(status.queue))
    text.add("modelium_waiting", "", status.waiting)
    for runtime in status.runtimes:
        text.add("modelium_runtime_up", f'runtime="{_escaped(runtime.name)}"', int(runtime.state == RuntimeState.UP))
    for device in status.devices:
        _device(text, f'device="{_escaped(device.id)}"', device)


_MEMORY = ("total", "used", "budget", "booked", "promised", "measured", "overhead", "foreign", "unexplained")


def _device(text: _Text, label: str, device: DeviceView) -> None:
    for kind in _MEMORY:
        text.add("modelium_device_memory_bytes", f'{label},kind="{kind}"', getattr(device, f"{kind}_bytes"))
    if device.utilization is not None:
        text.add("modelium_device_utilization_ratio", label, device.utilization)


def _model(text: _Text, model: str, view: ModelView) -> None:
    text.add("modelium_model_state", f'{model},state="{view.state}"', 1)
    text.add("modelium_model_memory_bytes", f'{model},source="{view.memory_source}"', view.memory_bytes)
    if view.pinned or view.always_loaded:
        text.add("modelium_model_pinned", model, 1)
    if view.idle_s is not None:
        text.add("modelium_model_idle_seconds", model, view.idle_s)
    if view.waiting:
        text.add("modelium_model_waiting", model, view.waiting)


def _use(text: _Text, model: str, used: ModelUsage, qps: float) -> None:
    text.add("modelium_model_in_flight", model, used.in_flight)
    text.add("modelium_model_qps", model, qps)
    for organisation, counts in used.results():
        labels = f'{model},organisation="{_escaped(organisation)}"'
        for result, count in zip(RESULTS, counts, strict=True):
            if count:
                text.add("modelium_requests_total", f'{labels},result="{result}"', count)
    _histogram(text, "modelium_request_seconds", model, used.latency)


def _loads(text: _Text, model: str, name: str, counter: TransitionCounter) -> None:
    for reason, count in counter.loads.get(name, {}).items():
        text.add("modelium_model_loads_total", f'{model},reason="{reason}"', count)
    for reason, count in counter.unloads.get(name, {}).items():
        text.add("modelium_model_unloads_total", f'{model},reason="{reason}"', count)
    if name in counter.failed_loads:
        text.add("modelium_model_failed_loads_total", model, counter.failed_loads[name])
    for reason, count in counter.parks.get(name, {}).items():
        text.add("modelium_model_parks_total", f'{model},reason="{reason}"', count)
    if name in counter.wakes:
        text.add("modelium_model_wakes_total", model, counter.wakes[name])
        text.add("modelium_model_last_wake_seconds", model, counter.last_wake_s[name])
    if name in counter.last_load_s:
        text.add("modelium_model_last_load_seconds", model, counter.last_load_s[name])


def _histogram(text: _Text, family: str, labels: str, histogram: Histogram) -> None:
    """Nothing while it is empty."""
    if not any(histogram.counts):
        return
    lines, sofar = text.lines[family], 0
    start = f"{family}_bucket{{{labels}," if labels else f"{family}_bucket{{"
    for bound, count in zip(_bounds(histogram.bounds), histogram.counts, strict=True):
        sofar += count
        lines.append(f'{start}le="{bound}"}} {sofar}\n')
    label_set = f"{{{labels}}}" if labels else ""
    lines.append(f"{family}_sum{label_set} {histogram.sum}\n{family}_count{label_set} {sofar}\n")


@cache
def _bounds(bounds: tuple[float, ...]) -> tuple[str, ...]:
    return (*map(str, bounds), "+Inf")


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
