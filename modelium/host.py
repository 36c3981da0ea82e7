"""The plugin host: the one place that calls hooks.

Each implementation is called by itself, so that a plugin which raises, or returns what it should not, loses only its
own answer. What must be chosen among several answers is chosen by what they say, never by the order of registration.
"""

from __future__ import annotations

import inspect
import logging
import threading
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

import pluggy
from pydantic import BaseModel

from modelium.api.datapath import DataPath
from modelium.api.driver import Brain, Converter, EvictionPolicy, RuntimeBackend, UsageSource
from modelium.api.hookspecs import PROJECT, ModeliumSpec
from modelium.api.optimizing import Optimizer
from modelium.api.types import Analysis, Completeness, Device, Finding, Severity, Transition
from modelium.discovery import HOOKS, PluginView, Source, builtin_sources, entry_point_sources, register, suggestion
from modelium.errors import ConfigError, ModelError, ModeliumError, PluginError
from modelium.guards import GuardedBrain, GuardedPolicy

if TYPE_CHECKING:
    import click

__all__ = ["Failure", "PluginHost", "PluginView"]

log = logging.getLogger(__name__)

T = TypeVar("T")
S = TypeVar("S", RuntimeBackend, DataPath, Optimizer)

NAMED = (Brain, Converter, DataPath, EvictionPolicy, Optimizer, RuntimeBackend, UsageSource)
"""What is chosen, or told apart, by name."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Something that a plugin in use did wrong; equal ones are counted."""

    plugin: str
    where: str
    """The hook, or the method of an object that a hook returned."""
    error: str
    traceback: str
    count: int = 1

    def __str__(self) -> str:
        times = f" ({self.count} times)" if self.count > 1 else ""
        return f"{self.where}: {self.error}{times}"


@dataclass(frozen=True, slots=True)
class Implementation:
    """One plugin's implementation of one hook."""

    plugin: PluginView
    function: Callable[..., Any]
    arguments: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"{self.plugin.name} ({self.plugin.distribution} {self.plugin.version})"


@dataclass(frozen=True, slots=True)
class Answer(Generic[T]):
    """What one implementation returned: all that was of the right type, and what went wrong."""

    by: Implementation
    values: tuple[T, ...] = ()
    error: BaseException | None = None


class PluginHost:
    """The plugins in use, as typed calls. Safe to call from several threads."""

    def __init__(self, manager: pluggy.PluginManager, plugins: Iterable[PluginView]):
        self._plugins = tuple(plugins)
        self._lock = threading.Lock()
        self._failures: dict[tuple[str, str, str], Failure] = {}
        self._backends: tuple[RuntimeBackend, ...] | None = None
        self._data_paths: tuple[DataPath, ...] | None = None
        self._optimizers: tuple[Optimizer, ...] | None = None
        by_name = {view.name: view for view in self._plugins if view.error is None}
        self._hooks = {
            hook: tuple(
                Implementation(by_name[impl.plugin_name], impl.function, tuple(impl.argnames))
                for impl in sorted(getattr(manager.hook, hook).get_hookimpls(), key=lambda i: i.plugin_name)
            )
            for hook in HOOKS
        }

    @classmethod
    def load(cls, disabled: Collection[str] = (), *, builtin: bool = True, entry_points: bool = True) -> PluginHost:
        """Find and register plugins; what can't be used is left out and shown by `plugins()`."""
        sources = [*(builtin_sources() if builtin else ()), *(entry_point_sources() if entry_points else ())]
        return cls.of(sources, disabled)

    @classmethod
    def of(cls, sources: Sequence[Source], disabled: Collection[str] = ()) -> PluginHost:
        """As `load`, for plugins that were found already."""
        manager = pluggy.PluginManager(PROJECT)
        manager.add_hookspecs(ModeliumSpec)
        return cls(manager, register(manager, sources, disabled))

    # ------------------------------------------------------------------ about the plugins themselves

    def plugins(self) -> list[PluginView]:
        """All plugins that were found, those left out included."""
        failures = self.failures()
        return [
            view.model_copy(update={"failures": tuple(str(f) for f in failures if f.plugin == view.name)})
            for view in self._plugins
        ]

    def failures(self) -> list[Failure]:
        """What plugins in use did wrong since the host was loaded."""
        with self._lock:
            return list(self._failures.values())

    def note(self, failures: Iterable[Failure]) -> None:
        """Take over what went wrong in another process (the inspector), where the same plugins run."""
        for failure in failures:
            self._record(failure)

    # ------------------------------------------------------------------ analyzers

    def completeness(self, path: Path) -> Completeness | None:
        """What formats say of how much has arrived: None when nobody can tell; one that waits outweighs the others.

        A plugin's `ModelError` counts as not being able to tell: the analysis, which comes next, will say it.
        """
        answers = self._ask("modelium_completeness", Completeness, path=path, expected=ModelError)
        told = [value for answer in answers for value in answer.values]
        return next((value for value in told if not value.complete), told[0] if told else None)

    def scan(self, path: Path) -> tuple[Finding, ...]:
        """All findings. A scanner that fails refuses the drop: what was not scanned is not loaded."""
        findings: list[Finding] = []
        for answer in self._ask("modelium_scan", Finding, many=True, path=path, expected=ModelError):
            findings += answer.values
            if isinstance(answer.error, ModelError):
                findings.append(Finding(severity=Severity.REFUSE, code=answer.error.code, message=answer.error.message))
            elif answer.error is not None:
                findings.append(
                    Finding(
                        severity=Severity.REFUSE,
                        code="scan_failed",
                        message=f"the scanner {answer.by.title} failed on it ({_short(answer.error)}), and nothing is "
                        f"loaded unscanned: mend that plugin, or set plugins: {{disable: [{answer.by.plugin.name}]}}",
                    )
                )
        return tuple(findings)

    def analyze(self, path: Path) -> Analysis:
        """The claim with the highest confidence.

        Raises `PluginError` when the best claims tie; `ModelError` with the claimant's reason when it is broken (also
        where others only claim that nobody serves it), or when nobody knows it.
        """
        answers = self._ask("modelium_analyze", Analysis, path=path, expected=ModelError)
        claims = [(value, answer.by) for answer in answers for value in answer.values]
        refusals = [answer.error for answer in answers if isinstance(answer.error, ModelError)]
        if refusals and all(value.facts.get("unsupported") for value, _ in claims):
            claims = []  # whoever could serve it knows best why it can't
        if claims:
            best = max(value.confidence for value, _ in claims)
            winners = [(value, by) for value, by in claims if value.confidence == best]
            if len(winners) > 1:
                both = " and ".join(f"{by.title} as {value.format}" for value, by in winners)
                raise PluginError(
                    f"{path.name} is claimed with equal confidence ({best:g}) by {both}: disable one of these plugins"
                )
            return winners[0][0]
        if len(refusals) == 1:
            raise refusals[0]
        if refusals:
            raise ModelError("; ".join(error.message for error in refusals))
        known = ", ".join(impl.plugin.name for impl in self._hooks["modelium_analyze"]) or "none"
        failed = "".join(f"; {a.by.title} failed on it: {_short(a.error)}" for a in answers if a.error is not None)
        raise ModelError(
            f"{path.name} is not a model that any analyzer knows (there are: {known}){failed}", code="unknown_format"
        )

    def converters(self) -> tuple[Converter, ...]:
        """All converters; where two have one name, neither."""
        return self._unique("converter", self._ask("modelium_converters", Converter, many=True))

    # ------------------------------------------------------------------ choosing by name

    def brain(self, name: str, settings: Mapping[str, Any]) -> Brain:
        """The brain of that name, guarded. `settings` is its section of the configuration without `name`.

        Raises `ConfigError` when there is none, `PluginError` when there are two.
        """
        by, brain = self._choose(
            "brain", name, self._ask("modelium_brains", Brain, many=True, settings=dict(settings), expected=ConfigError)
        )
        return GuardedBrain(brain, by.title, lambda exc: self._failed(by, f"brain {name}", exc))

    def eviction_policy(self, name: str, settings: Mapping[str, Any]) -> EvictionPolicy:
        """The eviction policy of that name, guarded; as `brain`."""
        answers = self._ask(
            "modelium_eviction_policies", EvictionPolicy, many=True, settings=dict(settings), expected=ConfigError
        )
        by, policy = self._choose("eviction", name, answers)
        return GuardedPolicy(policy, lambda exc: self._failed(by, f"eviction policy {name}", exc))

    # ------------------------------------------------------------------ runtimes and what is around them

    def runtime_backends(self) -> tuple[RuntimeBackend, ...]:
        """All runtime backends, the same objects each time; where two have one name, neither."""
        if self._backends is None:
            self._backends = self._with_settings("runtime backend", "modelium_runtime_backends", RuntimeBackend)
        return self._backends

    def data_paths(self) -> tuple[DataPath, ...]:
        """All data paths, the same objects each time; where two have one name, neither."""
        if self._data_paths is None:
            self._data_paths = self._with_settings("data path", "modelium_data_paths", DataPath)
        return self._data_paths

    def optimizers(self) -> tuple[Optimizer, ...]:
        """All optimizers, the same objects each time; where two have one name, neither."""
        if self._optimizers is None:
            self._optimizers = self._with_settings("optimizer", "modelium_optimizers", Optimizer)
        return self._optimizers

    def _with_settings(self, what: str, hook: str, kind: type[S]) -> tuple[S, ...]:
        """What a hook offers that has a name, and a section of the configuration by that name."""
        good: list[Answer[S]] = []
        for answer in self._ask(hook, kind, many=True):
            for value in answer.values:
                if inspect.isclass(value.settings_model) and issubclass(value.settings_model, BaseModel):
                    good.append(Answer(answer.by, (value,)))
                else:
                    error = TypeError(f"settings_model of {value.name!r} is not a class of pydantic's BaseModel")
                    self._failed(answer.by, hook, error)
        return self._unique(what, good)

    def sections(self) -> dict[str, type[BaseModel]]:
        """The sections of the configuration that plugins own, and the models that validate them."""
        sections = {backend.name: backend.settings_model for backend in self.runtime_backends()}
        sections |= {path.name: path.settings_model for path in self.data_paths()}
        return sections | {optimizer.name: optimizer.settings_model for optimizer in self.optimizers()}

    def devices(self) -> tuple[Device, ...]:
        """All devices as they are now, by id; of two reports of one device, the first plugin's by name is kept."""
        found: dict[str, tuple[Device, Implementation]] = {}
        for answer in self._ask("modelium_devices", Device, many=True):
            for device in answer.values:
                if device.id in found:
                    error = PluginError(f"{device.id} is reported by {found[device.id][1].title} already: disable one")
                    self._failed(answer.by, "modelium_devices", error)
                else:
                    found[device.id] = (device, answer.by)
        return tuple(found[key][0] for key in sorted(found))

    def usage_sources(self) -> tuple[UsageSource, ...]:
        """All counters of use from outside; where two have one name, neither."""
        return self._unique("usage source", self._ask("modelium_usage_sources", UsageSource, many=True))

    def transition(self, transition: Transition) -> None:
        """Tell all observers."""
        self._ask("modelium_transition", type(None), transition=transition)

    def commands(self) -> tuple[click.Command, ...]:
        """Commands that plugins add to the command line; where two have one name, neither."""
        import click

        return self._unique("command", self._ask("modelium_commands", click.Command, many=True))

    # ------------------------------------------------------------------ calling

    def _ask(
        self,
        hook: str,
        kind: type[T],
        *,
        many: bool = False,
        expected: type[ModeliumError] | tuple[()] = (),
        **arguments: Any,
    ) -> list[Answer[T]]:
        """Call each implementation by itself; record what fails, except errors that are an `expected` answer."""
        answers = []
        for impl in self._hooks[hook]:
            values: list[T] = []
            error: BaseException | None = None
            try:
                returned = impl.function(*(arguments[name] for name in impl.arguments))
                if returned is not None:
                    for value in returned if many else (returned,):
                        wrong = _wrong(value, kind)
                        if wrong:
                            error = TypeError(wrong)
                            self._failed(impl, hook, error)
                        else:
                            values.append(value)
            except (Exception, SystemExit) as exc:
                error = exc
                if not (expected and isinstance(exc, expected)):
                    self._failed(impl, hook, exc)
            answers.append(Answer(impl, tuple(values), error))
        return answers

    def _unique(self, what: str, answers: Iterable[Answer[T]]) -> tuple[T, ...]:
        claims: dict[str, list[tuple[T, Implementation]]] = {}
        for answer in answers:
            for value in answer.values:
                claims.setdefault(_name(value), []).append((value, answer.by))
        for name, claimants in claims.items():
            if len(claimants) > 1:
                both = " and ".join(by.title for _, by in claimants)
                for by in dict.fromkeys(by.plugin.name for _, by in claimants):
                    impl = next(i for _, i in claimants if i.plugin.name == by)
                    self._failed(impl, f"{what} {name}", PluginError(f"offered by {both}: disable one of them"))
        return tuple(claims[name][0][0] for name in sorted(claims) if len(claims[name]) == 1)

    def _choose(self, section: str, name: str, answers: Sequence[Answer[T]]) -> tuple[Implementation, T]:
        claims = [(answer.by, value) for answer in answers for value in answer.values if _name(value) == name]
        if len(claims) == 1:
            return claims[0]
        if claims:
            both = " and ".join(by.title for by, _ in claims)
            raise PluginError(f"{section}.name is {name!r}, which is offered by {both}: disable one of these plugins")
        _refuse_choice(section, name, answers)

    # ------------------------------------------------------------------ what went wrong

    def _failed(self, impl: Implementation, where: str, error: BaseException) -> None:
        lines = traceback.format_exception(error) if error.__traceback__ else []
        self._record(Failure(impl.plugin.name, where, _short(error), "".join(lines)))

    def _record(self, failure: Failure) -> None:
        """Logged when it is new; afterwards only counted. Messages differ by path, so the type is what is compared."""
        key = (failure.plugin, failure.where, failure.error.partition(":")[0])
        with self._lock:
            known = self._failures.get(key)
            count = known.count if known else 0
            self._failures[key] = replace(failure, count=count + failure.count)
        if known is None:
            log.error("plugin %s failed in %s: %s", failure.plugin, failure.where, failure.error)
            if failure.traceback:
                log.debug("%s", failure.traceback)


def _name(value: Any) -> str:
    return str(value.name)


def _short(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}"


def _wrong(value: object, kind: type[object]) -> str | None:
    """What is wrong with a returned value, None when it is of the declared kind."""
    if inspect.isclass(value) or not isinstance(value, kind):
        what = f"the class {value.__qualname__}" if inspect.isclass(value) else f"{value!r:.80}"
        return f"returned {what} where {kind.__name__} was expected"
    if kind in NAMED and not (isinstance(name := getattr(value, "name", None), str) and name):
        return f"returned {value!r:.80} as {kind.__name__}, whose name is {name!r} and not a text"
    return None


def _refuse_choice(section: str, name: str, answers: Sequence[Answer[Any]]) -> NoReturn:
    """Who refused its settings is the likely owner of the name, unless the name is nearly that of another."""
    known = sorted({_name(value) for answer in answers for value in answer.values})
    near = suggestion(name, known)
    for answer in answers:
        if isinstance(answer.error, ConfigError) and not near:
            raise answer.error
    broken = [a for a in answers if a.error is not None and not isinstance(a.error, ConfigError)]
    failed = "".join(f"; {a.by.title} failed: {_short(a.error)}" for a in broken)
    raise ConfigError(
        f"{section}.name is {name!r}, which no plugin offers{near} (there are: {', '.join(known) or 'none'}){failed}"
    )
