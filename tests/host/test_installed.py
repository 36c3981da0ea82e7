"""Third-party plugins as users meet them: packages installed by pip, good ones beside broken ones."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelium.api import Candidate
from modelium.errors import ModelError
from modelium.host import PluginHost, PluginView
from tests.host.toys import install

GOOD = """
from modelium.api import Analysis, hookimpl

MODELIUM_HOOKSPEC_VERSION = (1, 0)

@hookimpl
def modelium_analyze(path):
    if path.suffix == ".toy":
        return Analysis(analyzer="acme", format="toy", summary="a toy", confidence=0.9)

class Biggest:
    name = "biggest"

    def rank(self, candidates, now):
        return [c.name for c in sorted(candidates, key=lambda c: -c.memory_bytes)]

@hookimpl
def modelium_eviction_policies(settings):
    return [Biggest()]
"""

HEAD = "from modelium.api import hookimpl\nMODELIUM_HOOKSPEC_VERSION = (1, 0)\n"

PACKAGES = {
    "acme-toys": ("acme", GOOD),
    "bad-import": ("bad_import", "import a_library_that_is_not_there\n"),
    "bad-exit": ("bad_exit", "raise SystemExit(3)\n"),
    "old-major": ("old_major", "MODELIUM_HOOKSPEC_VERSION = (0, 4)\n" + GOOD.replace("(1, 0)", "(0, 4)")),
    "new-minor": ("new_minor", GOOD.replace("(1, 0)", "(1, 99)")),
    "no-version": ("no_version", GOOD.replace("MODELIUM_HOOKSPEC_VERSION", "VERSION")),
    "odd-version": ("odd_version", GOOD.replace("(1, 0)", "'1.0'")),
    "misspelt": ("misspelt", HEAD + "@hookimpl\ndef modelium_analyse(path): ...\n"),
    "bad-argument": ("bad_argument", HEAD + "@hookimpl\ndef modelium_analyze(file): ...\n"),
    "with-default": ("with_default", HEAD + "@hookimpl\ndef modelium_analyze(path=None): ...\n"),
    "is-async": ("is_async", HEAD + "@hookimpl\nasync def modelium_analyze(path): ...\n"),
    "is-wrapper": ("is_wrapper", HEAD + "@hookimpl(wrapper=True)\ndef modelium_analyze(path): return (yield)\n"),
    "unmarked": ("unmarked", HEAD + "def modelium_analyze(path): ...\n"),
    "no-hooks": ("no_hooks", HEAD),
    "raises": ("raises", HEAD + "@hookimpl\ndef modelium_analyze(path): raise RuntimeError('boom')\n"),
    "garbage": ("garbage", HEAD + "@hookimpl\ndef modelium_analyze(path): return {'format': 'toy'}\n"),
    "twin-one": ("twin", GOOD),
    "twin-two": ("twin", GOOD),
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    before = set(sys.modules)
    folder = install(PACKAGES, tmp_path_factory.mktemp("plugins"))
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(folder) in str(sys.modules[name].__file__):
            del sys.modules[name]


@pytest.fixture
def host(site: Path) -> PluginHost:
    return PluginHost.load(builtin=False)


def view(host: PluginHost, distribution: str) -> PluginView:
    return next(v for v in host.plugins() if v.distribution == distribution)


def test_a_good_plugin_is_used_beside_all_the_broken_ones(host: PluginHost) -> None:
    good = view(host, "acme-toys")
    assert good.error is None
    assert (good.name, good.version) == ("acme", "0.3")
    assert good.hooks == ("modelium_analyze", "modelium_eviction_policies")
    assert host.analyze(Path("x.toy")).analyzer == "acme"
    policy = host.eviction_policy("biggest", {})
    sizes = {"small": 1, "large": 3, "middle": 2}
    candidates = [
        Candidate(name=n, memory_bytes=b, loaded_at=0, last_used=0, requests=0, qps=0, load_s=1)
        for n, b in sizes.items()
    ]
    assert list(policy.rank(candidates, 0.0)) == ["large", "middle", "small"]


@pytest.mark.parametrize(
    ("distribution", "said"),
    [
        ("bad-import", "No module named 'a_library_that_is_not_there'"),
        ("bad-exit", "SystemExit: 3"),
        ("old-major", "written for hook specifications 0.4, and these are 1.2: install a version of old-major"),
        ("new-minor", "written for hook specifications 1.99, and these are 1.2: upgrade modelium"),
        ("no-version", "write `MODELIUM_HOOKSPEC_VERSION = (1, 2)` in no_version"),
        ("odd-version", "must be two integers like (1, 2), not '1.0'"),
        ("misspelt", "there is no hook 'modelium_analyse': did you mean 'modelium_analyze'?"),
        ("bad-argument", "modelium_analyze takes file, and the hook has (path)"),
        ("with-default", "gives path a default"),
        ("is-async", "is async: hooks are synchronous"),
        ("is-wrapper", "is a hook wrapper"),
        ("unmarked", "put @hookimpl above it"),
        ("no-hooks", "it implements no hook"),
        ("twin-one", "claimed by twin-one 0.3 and twin-two 0.3"),
        ("twin-two", "claimed by twin-one 0.3 and twin-two 0.3"),
    ],
)
def test_a_broken_plugin_is_left_out_with_its_reason(host: PluginHost, distribution: str, said: str) -> None:
    left_out = view(host, distribution)
    assert said in (left_out.error or "")
    assert left_out.version == "0.3"
    assert left_out.hooks == ()
    assert "Traceback" in left_out.traceback


def test_a_plugin_that_fails_when_called_stays_and_is_reported(
    host: PluginHost, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    for name in ("x.none", "x.toy"):
        (tmp_path / name).write_text("nothing")
    for _ in range(3):
        with pytest.raises(ModelError, match="not a model that any analyzer knows"):
            host.analyze(tmp_path / "x.none")
        assert host.analyze(tmp_path / "x.toy").analyzer == "acme"
    assert view(host, "raises").error is None
    assert view(host, "raises").failures == ("modelium_analyze: RuntimeError: boom (6 times)",)
    (garbage,) = view(host, "garbage").failures
    assert "returned {'format': 'toy'} where Analysis was expected" in garbage
    lines = [r.getMessage() for r in caplog.records if "plugin raises" in r.getMessage()]
    assert lines == ["plugin raises failed in modelium_analyze: RuntimeError: boom"]


def test_a_disabled_plugin_is_not_even_imported(site: Path) -> None:
    sys.modules.pop("acme_toys", None)
    host = PluginHost.load(["acme"], builtin=False)
    assert "acme_toys" not in sys.modules
    assert "disabled" in (view(host, "acme-toys").error or "")
    with pytest.raises(ModelError):
        host.analyze(Path("x.toy"))


def test_disabling_one_of_two_that_share_a_name_disables_both(site: Path) -> None:
    host = PluginHost.load(["twin"], builtin=False)
    assert "disabled" in (view(host, "twin-one").error or "")
    assert "disabled" in (view(host, "twin-two").error or "")


def test_one_of_them_can_be_disabled_by_its_distribution(site: Path) -> None:
    host = PluginHost.load(["twin-two", "acme"], builtin=False)
    assert view(host, "twin-one").error is None
    assert host.analyze(Path("x.toy")).analyzer == "acme"


def test_without_entry_points_nothing_installed_is_used(site: Path) -> None:
    assert PluginHost.load(builtin=False, entry_points=False).plugins() == []
