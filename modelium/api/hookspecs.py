"""The hooks. `hookspecs.md` is generated from this module: signatures, types and docstrings.

Every hook is synchronous. What has to wait lives in the objects that hooks return: an `async` implementation of a
first-result hook would always win (a coroutine is never None), and one exception among collected results would lose
the others, so the host calls each implementation by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import click

    from modelium.api.datapath import DataPath
    from modelium.api.driver import Brain, Converter, EvictionPolicy, RuntimeBackend, UsageSource
    from modelium.api.optimizing import Optimizer
    from modelium.api.types import Analysis, Completeness, Device, Finding, Transition

PROJECT = "modelium"
HOOKSPEC_VERSION = (1, 2)
"""(major, minor). A plugin names the one it was written for as `MODELIUM_HOOKSPEC_VERSION`: the major must be equal,
the minor not newer."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class ModeliumSpec:
    """All hooks of Modelium."""

    # ------------------------------------------------------------------ analyzers

    @hookspec
    def modelium_completeness(self, path: Path) -> Completeness | None:
        """Say whether a drop has arrived whole, as far as its own format can tell.

        Runs in the inspector process, often, while files are still being written. Return None when the format is
        not yours; a drop that nobody can judge is complete once it has been still for the settle time.

        Example:

            @hookimpl
            def modelium_completeness(path):
                if path.suffix != ".toy":
                    return None
                want = int.from_bytes(path.read_bytes()[:8], "little") + 8
                have = path.stat().st_size
                return Completeness(complete=have >= want, have_bytes=have, want_bytes=want)
        """

    @hookspec
    def modelium_analyze(self, path: Path) -> Analysis | None:
        """Say what a complete drop (a file or a folder) is, without running any of it.

        Runs in the inspector process, which has a time limit. Return None when the drop is not yours; raise
        `ModelError` when it is yours and broken. The claim with the highest confidence wins; two that tie are an
        error that names both.

        Example:

            @hookimpl
            def modelium_analyze(path):
                if path.suffix != ".toy":
                    return None
                return Analysis(analyzer="toy", format="toy", summary="a toy model", confidence=0.9,
                                weights_bytes=path.stat().st_size)
        """

    @hookspec
    def modelium_scan(self, path: Path) -> Iterable[Finding] | None:
        """Look for what must not be loaded, in a complete drop, without running any of it.

        Runs in the inspector process before the analyzers. One finding of severity `refuse` keeps the drop out of
        the repository, whatever else is found.

        Example:

            @hookimpl
            def modelium_scan(path):
                for file in path.rglob("*.exe"):
                    yield Finding(severity="refuse", code="executable", path=str(file.relative_to(path)),
                                  message="an executable has no place in a model: remove it")
        """

    @hookspec
    def modelium_converters(self) -> Iterable[Converter] | None:
        """Offer converters, which make a usable drop out of one that scanners found to need it.

        Example:

            @hookimpl
            def modelium_converters():
                return [ToyToOnnx()]
        """

    # ------------------------------------------------------------------ brains

    @hookspec
    def modelium_brains(self, settings: dict[str, Any]) -> Iterable[Brain] | None:
        """Offer brains; the configuration's `brain: {name: ...}` chooses one, and `settings` is that section
        without `name`.

        Example:

            @hookimpl
            def modelium_brains(settings):
                return [SmallestFirst()]
        """

    # ------------------------------------------------------------------ runtime backends

    @hookspec
    def modelium_runtime_backends(self) -> Iterable[RuntimeBackend] | None:
        """Offer runtime backends: what models are loaded into.

        Example:

            @hookimpl
            def modelium_runtime_backends():
                return [ToyBackend()]
        """

    # ------------------------------------------------------------------ eviction policies

    @hookspec
    def modelium_eviction_policies(self, settings: dict[str, Any]) -> Iterable[EvictionPolicy] | None:
        """Offer eviction policies; the configuration's `eviction: {name: ...}` chooses one, and
        `settings` is that section without `name`.

        Example:

            class Biggest:
                name = "biggest"

                def rank(self, candidates, now):
                    return [c.name for c in sorted(candidates, key=lambda c: -c.memory_bytes)]

            @hookimpl
            def modelium_eviction_policies(settings):
                return [Biggest()]
        """

    # ------------------------------------------------------------------ around them

    @hookspec
    def modelium_devices(self) -> Sequence[Device] | None:
        """Report the devices of this machine as they are now. Called every few seconds in a thread.

        Example:

            @hookimpl
            def modelium_devices():
                return [Device(id="npu:0", kind="npu", name="Toy NPU", total_bytes=2**30, used_bytes=0)]
        """

    @hookspec
    def modelium_usage_sources(self) -> Iterable[UsageSource] | None:
        """Offer counters of use that does not pass through the service itself.

        Example:

            @hookimpl
            def modelium_usage_sources():
                return [ProxyCounters("/run/proxy.sock")]
        """

    @hookspec
    def modelium_data_paths(self) -> Iterable[DataPath] | None:
        """Offer data paths, which carry requests for loaded models straight to their runtimes; the configuration's
        `server: {data_path: ...}` chooses one. New in version 1.1.

        Example:

            @hookimpl
            def modelium_data_paths():
                return [EnvoyDataPath()]
        """

    @hookspec
    def modelium_optimizers(self) -> Iterable[Optimizer] | None:
        """Offer optimizers, which make faster forms of models that are served already. New in version 1.2.

        Example:

            @hookimpl
            def modelium_optimizers():
                return [ToyCompiler()]
        """

    @hookspec
    def modelium_transition(self, transition: Transition) -> None:
        """Be told of every transition of every model and runtime, after it happened. Must return at once.

        Example:

            @hookimpl
            def modelium_transition(transition):
                print(transition.subject, transition.before, "->", transition.after, transition.reason)
        """

    @hookspec
    def modelium_commands(self) -> Iterable[click.Command] | None:
        """Add commands to the `modelium` command line.

        Example:

            @hookimpl
            def modelium_commands():
                return [click.Command("hello", callback=lambda: print("hello"))]
        """
