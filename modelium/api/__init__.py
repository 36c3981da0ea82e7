"""All that a plugin may import, together with `modelium.errors`."""

from modelium.api.driver import (
    Brain,
    Converter,
    EvictionPolicy,
    Processes,
    ProcessRecord,
    RuntimeBackend,
    RuntimeContext,
    RuntimeDriver,
    UsageSource,
)
from modelium.api.hookspecs import HOOKSPEC_VERSION, ModeliumSpec, hookimpl
from modelium.api.types import (
    Analysis,
    Candidate,
    Completeness,
    Device,
    Endpoint,
    Finding,
    Frozen,
    Inspection,
    Layout,
    LoadOutcome,
    LoadRequest,
    Manifest,
    Observation,
    ObservedModel,
    Offer,
    Plan,
    Progress,
    Report,
    RuntimeInfo,
    Severity,
    Situation,
    Tensor,
    Transition,
    UnloadOutcome,
)

__all__ = [
    "HOOKSPEC_VERSION", "Analysis", "Brain", "Candidate", "Completeness", "Converter", "Device", "Endpoint",
    "EvictionPolicy", "Finding", "Frozen", "Inspection", "Layout", "LoadOutcome", "LoadRequest", "Manifest",
    "ModeliumSpec", "Observation", "ObservedModel", "Offer", "Plan", "ProcessRecord", "Processes", "Progress",
    "Report", "RuntimeBackend", "RuntimeContext", "RuntimeDriver", "RuntimeInfo", "Severity", "Situation", "Tensor",
    "Transition", "UnloadOutcome", "UsageSource", "hookimpl",
]
