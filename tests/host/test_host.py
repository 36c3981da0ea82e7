"""What holds for the host whatever the hook."""

from __future__ import annotations

import logging
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest

from modelium.api import Analysis, Transition
from modelium.errors import ModelError
from modelium.host import PluginHost
from tests.host.toys import host_with, plugin, source

TRANSITION = Transition(decision=1, at=2.0, subject="m", before="COLD", after="QUEUED", reason="asked for")


def claim(confidence: float) -> Any:
    return plugin(modelium_analyze=lambda path: Analysis(analyzer="x", format="toy", summary="", confidence=confidence))


def test_what_modelium_ships_keeps_its_name() -> None:
    host = PluginHost.of([source("onnx", claim(0.1), builtin=True), source("onnx", claim(0.9), distribution="other")])
    ours, theirs = host.plugins()
    assert ours.error is None
    assert "claimed by onnx-dist 1.2 and other 1.2" in (theirs.error or "")
    assert host.analyze(Path("x")).confidence == 0.1


def test_the_reason_of_who_could_serve_it_outweighs_that_nobody_does() -> None:
    def broken(path: Path) -> Analysis | None:
        raise ModelError("it is damaged")

    def nobody(path: Path) -> Analysis | None:
        return Analysis(
            analyzer="x", format="toy", summary="", confidence=0.5, facts={"unsupported": "install something else"}
        )

    mine, theirs = plugin(modelium_analyze=broken), plugin(modelium_analyze=nobody)
    with pytest.raises(ModelError, match="it is damaged"):
        PluginHost.of([source("mine", mine), source("theirs", theirs)]).analyze(Path("x"))
    assert PluginHost.of([source("theirs", theirs)]).analyze(Path("x")).facts["unsupported"]
    served = PluginHost.of([source("mine", mine), source("theirs", theirs), source("other", claim(0.1))])
    assert served.analyze(Path("x")).confidence == 0.5


def test_built_ins_are_for_the_hooks_they_come_with() -> None:
    unversioned = claim(0.5)
    del unversioned.MODELIUM_HOOKSPEC_VERSION
    assert PluginHost.of([source("x", unversioned, builtin=True)]).plugins()[0].error is None
    assert "MODELIUM_HOOKSPEC_VERSION" in (PluginHost.of([source("x", unversioned)]).plugins()[0].error or "")


def test_all_built_in_plugins_are_in_use() -> None:
    host = PluginHost.load(entry_points=False)
    assert [(v.name, v.error) for v in host.plugins() if v.error] == []
    assert host.plugins()
    assert host.brain("rules", {}).name == "rules"
    assert host.eviction_policy("lru", {}).name == "lru"
    assert any(d.kind == "cpu" for d in host.devices())
    assert host.failures() == []


def test_one_module_under_two_names_is_used_once() -> None:
    twice = claim(0.5)
    first, second = PluginHost.of([source("a", twice), source("b", twice)]).plugins()
    assert first.error is None
    assert first.hooks == ("modelium_analyze",)
    assert "same module as the plugin 'a'" in (second.error or "")


def test_a_class_is_no_plugin() -> None:
    (view,) = host_with(a=type("Toys", (), {})).plugins()
    assert "names the class Toys: name a module or an object" in (view.error or "")


def test_a_name_that_nobody_has_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    PluginHost.of([source("onnx", claim(0.5))], disabled=["onx"])
    assert "'onx'" in caplog.text
    assert "did you mean 'onnx'" in caplog.text


def test_keyboard_interrupts_are_not_a_plugins_failure() -> None:
    def interrupted(transition: Transition) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        host_with(a=plugin(modelium_transition=interrupted)).transition(TRANSITION)


def test_a_plugin_that_exits_does_not_end_the_service() -> None:
    def exits(transition: Transition) -> None:
        raise SystemExit(1)

    host = host_with(a=plugin(modelium_transition=exits))
    host.transition(TRANSITION)
    assert host.failures()[0].error == "SystemExit: 1"


def test_failures_of_another_process_are_taken_over_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    there = host_with(a=plugin(modelium_transition=lambda transition: 1 / 0))
    there.transition(TRANSITION)
    there.transition(TRANSITION)
    here = host_with(a=plugin(modelium_transition=lambda transition: None))
    for _ in range(2):
        here.note(pickle.loads(pickle.dumps(there.failures())))
    assert here.plugins()[0].failures == ("modelium_transition: ZeroDivisionError: division by zero (4 times)",)
    assert "ZeroDivisionError" in here.failures()[0].traceback
    assert len(caplog.records) == 2


def test_failures_from_many_threads_are_all_counted() -> None:
    host = host_with(a=plugin(modelium_transition=lambda transition: 1 / 0))

    def many() -> None:
        for _ in range(200):
            host.transition(TRANSITION)

    threads = [threading.Thread(target=many) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert host.failures()[0].count == 1600


def test_different_failures_in_one_place_are_told_apart() -> None:
    errors = iter([KeyError("a"), ValueError("b"), KeyError("c")])

    def fails(transition: Transition) -> None:
        raise next(errors)

    host = host_with(a=plugin(modelium_transition=fails))
    for _ in range(3):
        host.transition(TRANSITION)
    assert [str(f) for f in host.failures()] == [
        "modelium_transition: KeyError: 'c' (2 times)",
        "modelium_transition: ValueError: b",
    ]
