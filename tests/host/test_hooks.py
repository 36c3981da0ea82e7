"""Each hook, called through the host as the service calls it; each has a test of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import pytest
from pydantic import BaseModel

from modelium.api import (
    Analysis,
    Candidate,
    Completeness,
    Device,
    Finding,
    Job,
    Layout,
    ModeliumSpec,
    Offer,
    Optimization,
    Optimized,
    OptimizerContext,
    Plan,
    RuntimeContext,
    RuntimeDriver,
    RuntimeInfo,
    Served,
    Severity,
    Situation,
    Transition,
)
from modelium.api.datapath import DataPathContext, DataPathDriver
from modelium.errors import ConfigError, ModelError, PluginError
from modelium.host import PluginHost
from tests.host.toys import host_with, plugin

DROP = Path("drop.toy")


def analysis(analyzer: str, confidence: float = 0.9) -> Analysis:
    return Analysis(analyzer=analyzer, format="toy", summary="a toy", confidence=confidence)


class Named:
    def __init__(self, name: str):
        self.name = name


class ToyBrain(Named):
    def plan(self, name: str, analysis: Analysis, offers: Sequence[Offer], situation: Situation) -> Plan:
        return Plan(
            brain=self.name,
            runtime=offers[0].runtime,
            serving=offers[0].serving,
            device_kind="cpu",
            memory_bytes=1,
            load_s=1,
            reason="the only one",
            confidence=1,
        )


class ToyPolicy(Named):
    def rank(self, candidates: Sequence[Candidate], now: float) -> Sequence[str]:
        return [c.name for c in reversed(candidates)]


class ToyConverter(Named):
    def accepts(self, path: Path, codes: Sequence[str]) -> bool:
        return True

    def convert(self, path: Path, target: Path) -> str:
        return "done"


class ToyUsage(Named):
    async def read(self) -> Mapping[str, tuple[int, int]]:
        return {}


class ToySettings(BaseModel):
    speed: int = 1


class ToyBackend(Named):
    settings_model: type[BaseModel] = ToySettings

    def create(self, context: RuntimeContext) -> RuntimeDriver:
        raise NotImplementedError

    def offers(self, analysis: Analysis, runtime: RuntimeInfo | None, devices: Sequence[Device]) -> Sequence[Offer]:
        return [Offer(runtime=self.name, serving="toy")]

    def layout(self, name: str, analysis: Analysis, plan: Plan) -> Layout:
        return Layout()


def failures(host: PluginHost) -> list[str]:
    return [f"{f.plugin}: {f}" for f in host.failures()]


def test_modelium_completeness() -> None:
    whole, half = Completeness(complete=True), Completeness(complete=False, have_bytes=1, want_bytes=2)

    def broken(path: Path) -> None:
        raise ModelError("its header is broken")

    def answering(answer: Completeness | None) -> Any:
        return plugin(modelium_completeness=lambda path: answer)

    assert host_with(a=answering(None)).completeness(DROP) is None
    assert host_with(a=answering(None), b=answering(whole)).completeness(DROP) == whole
    assert host_with(a=answering(whole), b=answering(half)).completeness(DROP) == half
    host = host_with(a=plugin(modelium_completeness=broken), b=answering(whole))
    assert host.completeness(DROP) == whole
    assert failures(host) == []


class TestAnalyze:
    def test_modelium_analyze(self) -> None:
        host = host_with(
            a=plugin(modelium_analyze=lambda path: analysis("a", 0.5)),
            b=plugin(modelium_analyze=lambda path: analysis("b", 0.9)),
            c=plugin(modelium_analyze=lambda path: None),
        )
        assert host.analyze(DROP).analyzer == "b"

    def test_a_tie_names_both(self) -> None:
        host = host_with(
            a=plugin(modelium_analyze=lambda path: analysis("a")), b=plugin(modelium_analyze=lambda path: analysis("b"))
        )
        with pytest.raises(PluginError, match=r"equal confidence \(0.9\) by a \(a-dist 1.2\).* and b \(b-dist 1.2\)"):
            host.analyze(DROP)

    def test_a_tie_below_the_best_is_none(self) -> None:
        host = host_with(
            a=plugin(modelium_analyze=lambda path: analysis("a", 0.1)),
            b=plugin(modelium_analyze=lambda path: analysis("b", 0.1)),
            c=plugin(modelium_analyze=lambda path: analysis("c", 0.2)),
        )
        assert host.analyze(DROP).analyzer == "c"

    def test_the_claimants_refusal_is_passed_on(self) -> None:
        def refuse(path: Path) -> None:
            raise ModelError("the toy is truncated", code="truncated")

        host = host_with(a=plugin(modelium_analyze=refuse), b=plugin(modelium_analyze=lambda path: None))
        with pytest.raises(ModelError, match="the toy is truncated") as caught:
            host.analyze(DROP)
        assert caught.value.code == "truncated"
        assert failures(host) == []

    def test_a_claim_outweighs_anothers_refusal(self) -> None:
        def refuse(path: Path) -> None:
            raise ModelError("no")

        host = host_with(a=plugin(modelium_analyze=refuse), b=plugin(modelium_analyze=lambda path: analysis("b", 0.1)))
        assert host.analyze(DROP).analyzer == "b"

    def test_nobodys_drop_says_who_was_asked_and_who_failed(self) -> None:
        def fail(path: Path) -> None:
            raise KeyError("x")

        host = host_with(onnx=plugin(modelium_analyze=lambda path: None), bad=plugin(modelium_analyze=fail))
        with pytest.raises(ModelError, match=r"drop.toy is not a model .*there are: bad, onnx.*bad .* failed on it"):
            host.analyze(DROP)


class TestScan:
    def test_modelium_scan(self) -> None:
        def findings(path: Path) -> Any:
            yield Finding(severity=Severity.WARN, code="w", message="careful")
            yield Finding(severity=Severity.REFUSE, code="r", message="never")

        host = host_with(a=plugin(modelium_scan=findings), b=plugin(modelium_scan=lambda path: None))
        assert [f.code for f in host.scan(DROP)] == ["w", "r"]

    def test_a_scanner_that_fails_lets_nothing_pass_and_loses_no_findings(self) -> None:
        def findings(path: Path) -> Any:
            yield Finding(severity=Severity.WARN, code="w", message="careful")
            raise OSError("read error")

        found = host_with(a=plugin(modelium_scan=findings)).scan(DROP)
        assert [(f.severity, f.code) for f in found] == [(Severity.WARN, "w"), (Severity.REFUSE, "scan_failed")]
        assert "a (a-dist 1.2) failed on it (OSError: read error)" in found[1].message

    def test_a_scanner_may_refuse_by_raising(self) -> None:
        def refuse(path: Path) -> Any:
            raise ModelError("a bomb", code="bomb")

        host = host_with(a=plugin(modelium_scan=refuse))
        assert [(f.severity, f.code) for f in host.scan(DROP)] == [(Severity.REFUSE, "bomb")]
        assert failures(host) == []


def test_modelium_converters() -> None:
    host = host_with(
        a=plugin(modelium_converters=lambda: [ToyConverter("b"), ToyConverter("a")]),
        b=plugin(modelium_converters=lambda: [type("Instead", (ToyConverter,), {"name": "of an object"})]),
        c=plugin(modelium_converters=lambda: [Named("no-methods")]),
    )
    assert [c.name for c in host.converters()] == ["a", "b"]
    assert host.failures()[0].error == "TypeError: returned the class Instead where Converter was expected"
    assert len(host.failures()) == 2


class TestBrains:
    situation = Situation(devices=(), budgets={})

    def test_modelium_brains(self) -> None:
        seen: list[dict[str, Any]] = []

        def brains(settings: dict[str, Any]) -> Any:
            seen.append(settings)
            return [ToyBrain("first"), ToyBrain("second")]

        brain = host_with(a=plugin(modelium_brains=brains)).brain("second", {"speed": 3})
        assert seen == [{"speed": 3}]
        plan = brain.plan("m", analysis("a"), [Offer(runtime="toy", serving="x")], self.situation)
        assert (plan.brain, plan.serving) == ("second", "x")

    def test_an_unknown_one_is_refused_with_the_nearest(self) -> None:
        host = host_with(a=plugin(modelium_brains=lambda settings: [ToyBrain("rules"), ToyBrain("greedy")]))
        with pytest.raises(ConfigError, match=r"brain.name is 'ruels'.*did you mean 'rules'.*greedy, rules"):
            host.brain("ruels", {})

    def test_two_of_one_name_are_refused(self) -> None:
        host = host_with(
            a=plugin(modelium_brains=lambda settings: [ToyBrain("x")]),
            b=plugin(modelium_brains=lambda settings: [ToyBrain("x")]),
        )
        with pytest.raises(PluginError, match=r"a \(a-dist 1.2\) and b \(b-dist 1.2\)"):
            host.brain("x", {})

    def test_bad_settings_of_the_chosen_one_are_passed_on(self) -> None:
        def brains(settings: dict[str, Any]) -> Any:
            raise ConfigError("brain.speed must be a number")

        with pytest.raises(ConfigError, match=r"brain\.speed must be a number"):
            host_with(a=plugin(modelium_brains=brains)).brain("x", {"speed": "?"})

    @pytest.mark.parametrize("answer", [None, KeyError("x"), "elsewhere"])
    def test_its_mistakes_are_its_plugins(self, answer: Any) -> None:
        class Bad(ToyBrain):
            def plan(self, *args: Any, **kwargs: Any) -> Plan:
                if isinstance(answer, Exception):
                    raise answer
                if answer is None:
                    return None  # type: ignore[return-value]
                return super().plan("m", analysis("a"), [Offer(runtime="toy", serving=answer)], TestBrains.situation)

        host = host_with(a=plugin(modelium_brains=lambda settings: [Bad("bad")]))
        with pytest.raises(PluginError, match=r"brain 'bad' of plugin a \(a-dist 1.2\)"):
            host.brain("bad", {}).plan("m", analysis("a"), [Offer(runtime="toy", serving="x")], self.situation)
        assert len(host.failures()) == 1

    def test_its_refusals_are_passed_on(self) -> None:
        class Picky(ToyBrain):
            def plan(self, *args: Any, **kwargs: Any) -> Plan:
                raise ModelError("nothing will do")

        host = host_with(a=plugin(modelium_brains=lambda settings: [Picky("picky")]))
        with pytest.raises(ModelError, match="nothing will do"):
            host.brain("picky", {}).plan("m", analysis("a"), [], self.situation)
        assert host.failures() == []


class TestRuntimeBackends:
    def test_modelium_runtime_backends(self) -> None:
        host = host_with(
            a=plugin(modelium_runtime_backends=lambda: [ToyBackend("toy")]),
            b=plugin(modelium_runtime_backends=lambda: None),
        )
        (backend,) = host.runtime_backends()
        assert backend.name == "toy"
        assert host.runtime_backends()[0] is backend
        assert host.sections() == {"toy": ToySettings}

    def test_two_of_one_name_are_both_left_out_and_reported(self) -> None:
        host = host_with(
            a=plugin(modelium_runtime_backends=lambda: [ToyBackend("toy"), ToyBackend("other")]),
            b=plugin(modelium_runtime_backends=lambda: [ToyBackend("toy")]),
        )
        assert [b.name for b in host.runtime_backends()] == ["other"]
        assert [f.plugin for f in host.failures()] == ["a", "b"]
        assert all("offered by a (a-dist 1.2) and b (b-dist 1.2)" in f.error for f in host.failures())

    def test_one_without_a_settings_model_is_left_out(self) -> None:
        class Bad(ToyBackend):
            settings_model = dict  # type: ignore[assignment]

        host = host_with(a=plugin(modelium_runtime_backends=lambda: [Bad("bad")]))
        assert host.runtime_backends() == ()
        assert "settings_model of 'bad'" in host.failures()[0].error


class TestEvictionPolicies:
    candidates = tuple(
        Candidate(name=name, memory_bytes=1, loaded_at=0, last_used=used, requests=0, qps=0, load_s=1)
        for name, used in (("b", 2.0), ("a", 2.0), ("c", 1.0))
    )

    def test_modelium_eviction_policies(self) -> None:
        host = host_with(a=plugin(modelium_eviction_policies=lambda settings: [ToyPolicy("backwards")]))
        assert list(host.eviction_policy("backwards", {}).rank(self.candidates, 9.0)) == ["c", "a", "b"]

    def test_an_unknown_one_is_refused(self) -> None:
        host = host_with(a=plugin(modelium_eviction_policies=lambda settings: [ToyPolicy("lru")]))
        with pytest.raises(ConfigError, match=r"eviction.name is 'lur'.*did you mean 'lru'"):
            host.eviction_policy("lur", {})

    @pytest.mark.parametrize("answer", [RuntimeError("x"), None, ["a", "a"], ["stranger"], [3], 7, [["a"]]], ids=repr)
    def test_an_exception_or_nonsense_falls_back_to_least_recently_used(
        self, answer: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Bad(ToyPolicy):
            def rank(self, candidates: Sequence[Candidate], now: float) -> Sequence[str]:
                if isinstance(answer, Exception):
                    raise answer
                return answer  # type: ignore[no-any-return]

        host = host_with(a=plugin(modelium_eviction_policies=lambda settings: [Bad("bad")]))
        policy = host.eviction_policy("bad", {})
        for _ in range(100):
            assert list(policy.rank(self.candidates, 9.0)) == ["c", "a", "b"]
        (failure,) = host.failures()
        assert (failure.where, failure.count) == ("eviction policy bad", 100)
        assert len([r for r in caplog.records if r.levelname == "ERROR"]) == 1

    def test_names_may_be_left_out_so_as_not_to_be_evicted(self) -> None:
        class Shy(ToyPolicy):
            def rank(self, candidates: Sequence[Candidate], now: float) -> Sequence[str]:
                return ["a"]

        host = host_with(a=plugin(modelium_eviction_policies=lambda settings: [Shy("shy")]))
        assert list(host.eviction_policy("shy", {}).rank(self.candidates, 9.0)) == ["a"]


def test_modelium_devices() -> None:
    def device(identity: str, name: str) -> Device:
        return Device(id=identity, kind="cpu", name=name, total_bytes=8, used_bytes=1)

    host = host_with(
        b=plugin(modelium_devices=lambda: [device("cpu:0", "b's")]),
        a=plugin(modelium_devices=lambda: [device("npu:0", "a's"), device("cpu:0", "a's")]),
        c=plugin(modelium_devices=lambda: 1 / 0),
    )
    assert [(d.id, d.name) for d in host.devices()] == [("cpu:0", "a's"), ("npu:0", "a's")]
    errors = {f.plugin: f.error for f in host.failures()}
    assert errors.keys() == {"b", "c"}
    assert "cpu:0 is reported by a (a-dist 1.2) already" in errors["b"]


def test_modelium_usage_sources() -> None:
    host = host_with(a=plugin(modelium_usage_sources=lambda: [ToyUsage("proxy"), "not one"]))
    assert [s.name for s in host.usage_sources()] == ["proxy"]
    assert "returned 'not one' where UsageSource was expected" in host.failures()[0].error


class ToyPath(Named):
    settings_model: Any = BaseModel

    def usable(self, settings: BaseModel) -> str | None:
        return None

    def create(self, context: DataPathContext) -> DataPathDriver:
        raise NotImplementedError


def test_modelium_data_paths() -> None:
    odd = ToyPath("odd")
    odd.settings_model = dict
    host = host_with(a=plugin(modelium_data_paths=lambda: [ToyPath("toy"), odd]))
    assert [p.name for p in host.data_paths()] == ["toy"]
    assert host.sections()["toy"] is BaseModel
    assert "settings_model of 'odd' is not a class" in host.failures()[0].error


class ToyOptimizer(Named):
    settings_model: Any = BaseModel

    async def start(self, context: OptimizerContext) -> None:
        raise NotImplementedError

    def proposes(self, served: Served) -> Optimization | None:
        return None

    async def optimize(self, served: Served, optimization: Optimization, target: Path, job: Job) -> dict[str, Any]:
        raise NotImplementedError

    def layout(self, served: Served, optimization: Optimization, facts: Mapping[str, Any]) -> Optimized:
        raise NotImplementedError


def test_modelium_optimizers() -> None:
    odd = ToyOptimizer("odd")
    odd.settings_model = dict
    host = host_with(a=plugin(modelium_optimizers=lambda: [ToyOptimizer("toy"), odd, "not one"]))
    assert [o.name for o in host.optimizers()] == ["toy"]
    assert host.optimizers()[0] is host.optimizers()[0]
    assert host.sections()["toy"] is BaseModel
    assert {f.error.partition(" ")[0] for f in host.failures()} == {"TypeError:"}


def test_modelium_transition() -> None:
    seen: list[Transition] = []

    def observe(transition: Transition) -> None:
        seen.append(transition)

    host = host_with(
        a=plugin(modelium_transition=lambda transition: 1 / 0),
        b=plugin(modelium_transition=observe),
    )
    transition = Transition(decision=1, at=2.0, subject="m", before="COLD", after="QUEUED", reason="asked for")
    host.transition(transition)
    assert seen == [transition]
    assert failures(host) == ["a: modelium_transition: ZeroDivisionError: division by zero"]


def test_modelium_commands() -> None:
    host = host_with(
        a=plugin(modelium_commands=lambda: [click.Command("hello"), click.Command("twice")]),
        b=plugin(modelium_commands=lambda: [click.Command("twice")]),
    )
    assert [c.name for c in host.commands()] == ["hello"]
    assert {f.where for f in host.failures()} == {"command twice"}


def test_every_hook_has_a_test_here() -> None:
    hooks = {name for name in vars(ModeliumSpec) if name.startswith("modelium_")}
    tests = {name for name in globals() if name.startswith("test_")}
    for value in list(globals().values()):
        if isinstance(value, type) and value.__name__.startswith("Test"):
            tests |= set(vars(value))
    assert hooks <= {name.removeprefix("test_") for name in tests}
