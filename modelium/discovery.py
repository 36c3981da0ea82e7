"""Finds plugins and registers them one by one, so that a bad one is known by name, reported, and left out."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import inspect
import logging
import traceback
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import pluggy

from modelium import __version__
from modelium.api.hookspecs import HOOKSPEC_VERSION, ModeliumSpec
from modelium.api.types import Frozen
from modelium.errors import PluginError

GROUP = "modelium"
"""The entry-point group; an entry point's name is its plugin's name."""

VERSION_ATTRIBUTE = "MODELIUM_HOOKSPEC_VERSION"

HOOKS = tuple(sorted(name for name in vars(ModeliumSpec) if name.startswith("modelium_")))

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a plugin comes from, before anything of it is imported."""

    name: str
    distribution: str
    version: str
    load: Callable[[], object]
    builtin: bool = False

    @property
    def title(self) -> str:
        return f"{self.name} ({self.distribution} {self.version})"


class PluginView(Frozen):
    """A plugin that was found: in use, or left out for the reason in `error`."""

    name: str
    version: str
    distribution: str
    hooks: tuple[str, ...] = ()
    error: str | None = None
    """Why it is left out; None when it is in use."""
    traceback: str = ""
    failures: tuple[str, ...] = ()
    """What its hooks did wrong so far, one line each, while it stays in use."""


def builtin_sources() -> list[Source]:
    """The plugins that Modelium ships; each is called by the last part of its module's name."""
    from modelium.builtin import BUILTIN_PLUGINS

    def source(module: str) -> Source:
        return Source(
            name=module.rpartition(".")[2],
            distribution="modelium",
            version=__version__,
            load=lambda: importlib.import_module(module),
            builtin=True,
        )

    return [source(module) for module in BUILTIN_PLUGINS]


def entry_point_sources() -> list[Source]:
    """The plugins of all installed distributions, by name."""

    def source(point: importlib.metadata.EntryPoint) -> Source:
        dist = point.dist
        return Source(
            name=point.name,
            distribution=dist.name if dist else "unknown distribution",
            version=dist.version if dist else "?",
            load=point.load,
        )

    points = importlib.metadata.entry_points(group=GROUP)
    return sorted((source(point) for point in points), key=lambda s: (s.name, s.distribution))


def register(manager: pluggy.PluginManager, sources: Sequence[Source], disabled: Collection[str]) -> list[PluginView]:
    """Load and register each source, whatever happens to the others.

    `disabled` holds names of plugins or of distributions; those are not even imported.
    """
    known = {s.name for s in sources} | {s.distribution for s in sources if not s.builtin}
    for name in sorted(set(disabled) - known):
        log.warning("plugins.disable names %r, and no such plugin is installed%s", name, suggestion(name, known))
    claims = defaultdict(list)
    for source in sources:
        if not _is_disabled(source, disabled):
            claims[source.name].append(source)

    views = []
    for source in sources:
        view = PluginView(name=source.name, version=source.version, distribution=source.distribution)
        if _is_disabled(source, disabled):
            view = view.model_copy(update={"error": "disabled in the configuration (plugins.disable)"})
        else:
            try:
                _check_claim(source, claims[source.name])
                view = view.model_copy(update={"hooks": _register_one(manager, source)})
            except (Exception, SystemExit) as exc:  # importing a plugin runs any code: it must not end the service
                error = exc.message if isinstance(exc, PluginError) else f"{type(exc).__name__}: {exc}"
                log.error("plugin %s is left out: %s", source.title, error)
                view = view.model_copy(update={"error": error, "traceback": traceback.format_exc()})
        views.append(view)
    return views


def suggestion(wrong: str, known: Collection[str]) -> str:
    """`: did you mean 'x'?`, or nothing when nothing is near."""
    near = difflib.get_close_matches(wrong, list(known), n=1)
    return f": did you mean {near[0]!r}?" if near else ""


def _is_disabled(source: Source, disabled: Collection[str]) -> bool:
    return source.name in disabled or (source.distribution in disabled and not source.builtin)


def _check_claim(source: Source, claimants: Sequence[Source]) -> None:
    """What Modelium ships keeps its name; of others that claim one name, none is preferred."""
    if len(claimants) == 1 or source.builtin:
        return
    both = " and ".join(f"{s.distribution} {s.version}" for s in claimants)
    raise PluginError(
        f"the name {source.name!r} is claimed by {both}: uninstall all but one, "
        "or disable them by their distributions' names (plugins.disable)"
    )


def _register_one(manager: pluggy.PluginManager, source: Source) -> tuple[str, ...]:
    plugin = source.load()
    if inspect.isclass(plugin):
        raise PluginError(f"its entry point names the class {plugin.__qualname__}: name a module or an object")
    _check_version(plugin, source)
    _check_hooks(manager, plugin)
    if manager.is_registered(plugin):
        raise PluginError(f"it is the same module as the plugin {manager.get_name(plugin)!r}: remove one entry point")
    try:
        manager.register(plugin, name=source.name)
        manager.check_pending()
    except Exception:
        if manager.is_registered(plugin):
            manager.unregister(plugin)
        raise
    return tuple(sorted(caller.name for caller in manager.get_hookcallers(plugin) or ()))


def _check_version(plugin: object, source: Source) -> None:
    major, minor = HOOKSPEC_VERSION
    declared: Any = getattr(plugin, VERSION_ATTRIBUTE, HOOKSPEC_VERSION if source.builtin else None)
    if declared is None:
        raise PluginError(
            "it does not say which hook specifications it was written for: "
            f"write `{VERSION_ATTRIBUTE} = ({major}, {minor})` in {getattr(plugin, '__name__', source.name)}"
        )
    match declared:
        case (int(wanted_major), int(wanted_minor)):
            pass
        case _:
            raise PluginError(f"{VERSION_ATTRIBUTE} must be two integers like ({major}, {minor}), not {declared!r}")
    found = f"it was written for hook specifications {wanted_major}.{wanted_minor}, and these are {major}.{minor}"
    if wanted_major != major:
        raise PluginError(f"{found}: install a version of {source.distribution} made for {major}.x")
    if wanted_minor > minor:
        raise PluginError(f"{found}: upgrade modelium, or install an older {source.distribution}")


def _check_hooks(manager: pluggy.PluginManager, plugin: object) -> None:
    """Refuse what pluggy would accept, or complain about without naming the remedy."""
    found = False
    for name in dir(plugin):
        options = manager.parse_hookimpl_opts(plugin, name)
        if options is None:
            if name in HOOKS and inspect.isroutine(getattr(plugin, name)):
                raise PluginError(f"{name} is not marked as a hook: put @hookimpl above it")
            continue
        found = True
        hook = options.get("specname") or name
        function = getattr(plugin, name)
        if hook not in HOOKS and not options.get("optionalhook"):
            raise PluginError(f"there is no hook {hook!r}{suggestion(hook, HOOKS)}")
        if options.get("wrapper") or options.get("hookwrapper"):
            raise PluginError(
                f"{name} is a hook wrapper: each implementation is called by itself, so make it a plain one"
            )
        if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            raise PluginError(f"{name} is async: hooks are synchronous, what waits belongs in the objects they return")
        _check_arguments(name, hook, function)
    if not found:
        raise PluginError("it implements no hook: mark its functions with @hookimpl from modelium.api")


def _check_arguments(name: str, hook: str, function: Any) -> None:
    if hook not in HOOKS:
        return
    known = list(inspect.signature(getattr(ModeliumSpec, hook)).parameters)[1:]
    for argument in inspect.signature(function).parameters.values():
        if argument.name not in known:
            raise PluginError(
                f"{name} takes {argument.name}, and the hook has ({', '.join(known)}): take some of these"
            )
        if argument.default is not argument.empty:
            raise PluginError(
                f"{name} gives {argument.name} a default, and so would never be passed it: remove the default"
            )
