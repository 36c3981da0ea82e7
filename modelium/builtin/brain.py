"""The default brain: a table of rules, read from the top, that anybody can read and replace in the configuration.

    brain:
      name: rules
      rules:
        - name: small-models-stay-on-the-cpu
          when: {smaller_than_bytes: 50000000}
          prefer: {device_kind: [cpu]}
          because: "a small model gains little from a GPU"
        - name: long-documents
          when: {name: "llama-*"}
          settings: {max_model_len: 32768}

Rules in the configuration come before the built-in ones, so that a short list changes a little and a full one all. The
first rule that applies is the only one: it says what comes first among all that is on offer, and which settings are
put over those of the way of serving. `when: {name: ...}` does so for single models.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from modelium.api import Analysis, Brain, Offer, Plan, Situation, hookimpl
from modelium.api.types import Frozen
from modelium.api.units import human
from modelium.builtin.settings import check_settings
from modelium.errors import ModelError


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Words = Annotated[tuple[str, ...], BeforeValidator(_several)]
"""One word or a list of them."""


class When(Frozen):
    """What must hold for a rule to apply; what is left out always holds. Words may be patterns as in a shell."""

    name: Words = ()
    """The model's."""
    format: Words = ()
    task: Words = ()
    architecture: Words = ()
    dtype: Words = ()
    quantization: Words = ()
    """Methods by name; `*` is any."""
    larger_than_bytes: int | None = None
    """Of weights."""
    smaller_than_bytes: int | None = None
    device_kind: Words = ()
    """A device of one of these kinds is there."""
    fits: Words = ()
    """A way of serving on offer fits a device of one of these kinds, by its estimate."""


class Prefer(Frozen):
    """Which way of serving to take: what is named comes first, in that order; nothing is ruled out."""

    runtime: Words = ()
    """Names of runtimes, or of one with a way of serving: `triton/vllm`."""
    native: bool = True
    """The runtime's own backend before a template."""
    device_kind: Words = ()
    serving: Words = ()


class Rule(Frozen):
    name: str
    when: When = When()
    prefer: Prefer = Prefer()
    settings: dict[str, Any] = Field(default_factory=dict)
    """Put over those of the way of serving that is chosen."""
    because: str = ""
    confidence: float = Field(default=0.8, ge=0, le=1)


LANGUAGE_MODELS = ("triton/vllm", "vllm", "*/vllm-python", "triton")
"""vLLM before transformers, and of its forms first the one with the fewest processes of ours around it."""

SMALL_BYTES = 500_000_000
"""Of weights. On a CPU vLLM's processes take about 0.5 GB more memory than transformers' and 25 s more to start,
whatever the model: as much as such a model itself."""

DEFAULT_RULES: tuple[Rule, ...] = (
    Rule(
        name="as-it-is",
        when=When(format=("triton",)),
        prefer=Prefer(runtime=("triton",), serving=("as-is",), device_kind=("cuda", "cpu")),
        because="it comes with its own Triton configuration",
        confidence=1.0,
    ),
    Rule(
        name="quantized-on-a-gpu",
        when=When(quantization=("*",), fits=("cuda",)),
        prefer=Prefer(runtime=LANGUAGE_MODELS, device_kind=("cuda",)),
        because="its quantised weights are made for a GPU, and one has room for it",
        confidence=0.8,
    ),
    Rule(
        name="language-model-on-a-gpu",
        when=When(format=("huggingface",), task=("text-generation",), fits=("cuda",)),
        prefer=Prefer(runtime=LANGUAGE_MODELS, device_kind=("cuda", "cpu")),
        because="a GPU has room for it, and where there is vLLM, it answers many at a time",
        confidence=0.9,
    ),
    Rule(
        name="gpu-where-it-fits",
        when=When(fits=("cuda",)),
        prefer=Prefer(runtime=("triton",), device_kind=("cuda", "cpu")),
        because="a GPU has room for it",
        confidence=0.9,
    ),
    Rule(
        name="small-language-model-on-the-cpu",
        when=When(format=("huggingface",), task=("text-generation",), fits=("cpu",), smaller_than_bytes=SMALL_BYTES),
        prefer=Prefer(runtime=("triton/transformers-*", *LANGUAGE_MODELS), device_kind=("cpu",)),
        because="it is small: transformers, where it will do, takes less memory than vLLM and starts in seconds",
        confidence=0.8,
    ),
    Rule(
        name="language-model-on-the-cpu",
        when=When(format=("huggingface",), task=("text-generation",), fits=("cpu",)),
        prefer=Prefer(runtime=LANGUAGE_MODELS, device_kind=("cpu",)),
        because="the host's memory has room for it, and where there is vLLM, it answers many at a time",
        confidence=0.8,
    ),
    Rule(
        name="too-large-for-the-gpu",
        when=When(device_kind=("cuda",), fits=("cpu",)),
        prefer=Prefer(runtime=("triton",), device_kind=("cpu",)),
        because="no GPU has room for it, and the host's memory has",
        confidence=0.6,
    ),
    Rule(
        name="host-memory",
        when=When(fits=("cpu",)),
        prefer=Prefer(runtime=("triton",), device_kind=("cpu",)),
        because="the host's memory has room for it, and there is no GPU",
        confidence=0.8,
    ),
    Rule(
        name="whatever-there-is",
        prefer=Prefer(runtime=("triton",)),
        because="nothing on offer fits by its estimate, and a first load will tell",
        confidence=0.3,
    ),
)


class RulesSettings(Frozen):
    """The section `brain` of the configuration, when `brain.name` is `rules`."""

    rules: tuple[Rule, ...] = ()


@dataclass(frozen=True, slots=True)
class _Option:
    """One way of serving on one kind of device."""

    offer: Offer
    device_kind: str
    place: int
    """Among what was offered."""
    room: int
    """What models may have of as many devices of that kind as it spreads over."""

    @property
    def fits(self) -> bool:
        return self.offer.memory_bytes <= self.room

    @property
    def words(self) -> str:
        return f"{_way(self)} on {_where(self)}"


class RulesBrain:
    name = "rules"

    def __init__(self, rules: Sequence[Rule] = ()):
        self.rules = (*rules, *DEFAULT_RULES)

    def plan(self, name: str, analysis: Analysis, offers: Sequence[Offer], situation: Situation) -> Plan:
        """The best option under the first rule that applies. Raises `ModelError` when there is nothing to choose."""
        options = _options(offers, situation)
        if not options:
            raise ModelError(_nothing(name, analysis, offers, situation), code="no_runtime")
        rule = next(rule for rule in self.rules if _applies(rule.when, name, analysis, options, situation))
        ranked = sorted(options, key=lambda option: _rank(option, rule.prefer))
        best = ranked[0]
        certainty = rule.confidence if best.fits else min(rule.confidence, 0.3)
        return Plan(
            brain=self.name,
            runtime=best.offer.runtime,
            serving=best.offer.serving,
            device_kind=best.device_kind,
            settings={**best.offer.settings, **rule.settings},
            devices=best.offer.devices,
            memory_bytes=best.offer.memory_bytes,
            load_s=best.offer.load_s,
            standby=best.offer.standby,
            elastic=best.offer.elastic,
            reason=_reason(best, rule),
            confidence=certainty,
            alternatives=tuple(f"{other.words}: {_why_not(other, best, rule.prefer)}" for other in ranked[1:]),
        )


def _options(offers: Sequence[Offer], situation: Situation) -> list[_Option]:
    return [
        _Option(offer, kind, place, room)
        for place, offer in enumerate(offers)
        for kind in offer.device_kinds
        if (room := _room(offer, kind, situation)) is not None
    ]


def _room(offer: Offer, kind: str, situation: Situation) -> int | None:
    """What the devices with the largest budgets have for the offer, in equal parts; None where there are too few."""
    budgets = sorted(
        (
            situation.budgets.get(device.id, device.total_bytes)
            for device in situation.reachable(offer.runtime)
            if device.kind == kind
        ),
        reverse=True,
    )
    return budgets[offer.devices - 1] * offer.devices if len(budgets) >= offer.devices else None


def _nothing(name: str, analysis: Analysis, offers: Sequence[Offer], situation: Situation) -> str:
    if unsupported := analysis.facts.get("unsupported"):
        return str(unsupported)
    if not offers:
        return (
            f"no runtime here serves {name} ({analysis.format}: {analysis.summary}): install a plugin that does, or "
            "drop it as ONNX, TorchScript, a Hugging Face folder or a Triton model directory"
        )
    wanted = sorted(
        {kind if o.devices == 1 else f"{o.devices} devices of kind {kind}" for o in offers for kind in o.device_kinds}
    )
    there = sorted({device.kind for device in situation.devices})
    return (
        f"{name} could be served on {' or '.join(wanted) or 'no device'}, and this machine has "
        f"{' and '.join(there) or 'none'}: run it where there is such a device"
    )


def _applies(when: When, name: str, analysis: Analysis, options: Sequence[_Option], situation: Situation) -> bool:
    quantization = analysis.facts.get("quantization")
    asked = (
        (when.name, name),
        (when.format, analysis.format),
        (when.task, analysis.task),
        (when.architecture, analysis.architecture),
        (when.dtype, analysis.dtype),
        (when.quantization, quantization),
    )
    if not all(not patterns or (word and _matches(str(word), patterns)) for patterns, word in asked):
        return False
    if when.larger_than_bytes is not None and analysis.weights_bytes <= when.larger_than_bytes:
        return False
    if when.smaller_than_bytes is not None and analysis.weights_bytes >= when.smaller_than_bytes:
        return False
    if when.device_kind and not any(device.kind in when.device_kind for device in situation.devices):
        return False
    return not when.fits or any(option.fits and option.device_kind in when.fits for option in options)


def _matches(word: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(word, pattern) for pattern in patterns)


def _rank(option: _Option, prefer: Prefer) -> tuple[int | bool, ...]:
    """What fits, then by runtime, native or not, kind of device, way of serving, and the runtime's own order."""
    return (
        not option.fits,
        min(_place(word, prefer.runtime) for word in (option.offer.runtime, _way(option))),
        option.offer.native != prefer.native,
        _place(option.device_kind, prefer.device_kind),
        _place(option.offer.serving, prefer.serving),
        option.place,
        option.offer.device_kinds.index(option.device_kind),
    )


def _way(option: _Option) -> str:
    return f"{option.offer.runtime}/{option.offer.serving}"


def _place(word: str, order: Sequence[str]) -> int:
    return next((i for i, pattern in enumerate(order) if fnmatchcase(word, pattern)), len(order))


def _reason(best: _Option, rule: Rule) -> str:
    need, room = human(best.offer.memory_bytes), human(best.room)
    size = f"about {need} of {room}" if best.fits else f"about {need}, more than the {room} that models may have"
    how = "with its own backend" if best.offer.native else "from a template"
    because = f", because {rule.because}" if rule.because else ""
    return (
        f"{best.offer.runtime} serves it as {best.offer.serving} {how} on {_where(best)}, where it takes {size}"
        f"{because} (rule {rule.name}){_not_on_offer(best, rule)}"
    )


def _not_on_offer(best: _Option, rule: Rule) -> str:
    """What a person's rule prefers and nobody offers; the built-in ones name what is rarely there."""
    if rule in DEFAULT_RULES:
        return ""
    prefer, told = rule.prefer, []
    if prefer.runtime and all(
        _place(w, prefer.runtime) == len(prefer.runtime) for w in (best.offer.runtime, _way(best))
    ):
        told.append(f"the runtime {' or '.join(prefer.runtime)}")
    if prefer.serving and _place(best.offer.serving, prefer.serving) == len(prefer.serving):
        told.append(f"the way of serving {' or '.join(prefer.serving)}")
    if not told:
        return ""
    return f"; the rule prefers {' and '.join(told)}, which is not on offer or has no room: see `modelium runtimes`"


def _where(option: _Option) -> str:
    count = option.offer.devices
    return option.device_kind if count == 1 else f"{count} devices of kind {option.device_kind}"


def _why_not(option: _Option, best: _Option, prefer: Prefer) -> str:
    """The first thing in which the option comes after the one that was taken."""
    reasons = (
        f"needs about {human(option.offer.memory_bytes)}, and models may have {human(option.room)} there",
        f"the rule prefers the runtime {best.offer.runtime}"
        if option.offer.runtime != best.offer.runtime
        else f"the rule prefers {_way(best)}",
        "a template, and there is a backend of the runtime's own" if prefer.native else "the rule prefers a template",
        f"the rule prefers {best.device_kind}",
        f"the rule prefers {best.offer.serving}",
        f"{best.offer.runtime} offers {best.offer.serving} before it",
        f"{best.offer.serving} is better on {best.device_kind}",
    )
    pairs = zip(_rank(option, prefer), _rank(best, prefer), reasons, strict=True)
    return next((reason for mine, others, reason in pairs if mine != others), "the same")


@hookimpl
def modelium_brains(settings: dict[str, Any]) -> Iterable[Brain]:
    """The brain `rules`."""
    return [RulesBrain(check_settings(RulesSettings, settings, "brain").rules)]
