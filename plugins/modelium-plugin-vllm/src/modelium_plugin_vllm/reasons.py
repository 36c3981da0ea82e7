"""What vLLM's log says of a start: how far it is, and what went wrong. Words as in vLLM 0.32."""

from __future__ import annotations

import re
from collections.abc import Sequence

from modelium.api import Progress
from modelium.errors import DriverError, LoadRejected

NO_MEMORY, SHORT_CACHE, TOO_LONG, NO_PORT = "out_of_memory", "cache_too_small", "too_long", "no_port"
"""Codes of failures after which another try may do."""

GIB = 2**30

# --------------------------------------------------------------------------- how far it is

SETTLED = "init engine ("
"""It has taken what it measured, and computed what it computes ahead of the first request."""

_STAGES = (
    ("non-default args:", "reading the configuration"),
    ("Resolved architecture:", "starting the engine"),
    ("Starting to load model", "loading weights"),
    ("Loading weights took", "making room for the cache"),
    ("KV cache size:", "warming up"),
    (SETTLED, "opening its address"),
)
"""Words of its log in the order in which they come, and what is going on then."""
_SHARDS = re.compile(r"Loading \S+ checkpoint shards:\s*\d+% Completed \| (\d+)/(\d+)")


def progress(lines: Sequence[str]) -> Progress | None:
    for line in reversed(lines):
        if shards := _SHARDS.search(line):
            return Progress(stage="loading weights", done=int(shards[1]), total=int(shards[2]), unit="files")
        for words, stage in _STAGES:
            if words in line:
                return Progress(stage=stage)
    return None


def settled(lines: Sequence[str]) -> bool:
    return any(SETTLED in line for line in lines)


# --------------------------------------------------------------------------- what went wrong

_PREFIX = re.compile(r"^\([\w. -]+ pid=\d+\) (?:[A-Z]+ [\d-]+ [\d:]+ \[[^\]]*\] ?)?")
"""Before what is said: the process, and, but for what others print, level, time and place."""
_RAISED = re.compile(r"^(?:[A-Za-z_][\w.]*\.)?([A-Za-z_]\w*(?:Error|Exception|Interrupt|Exit)): (.+)")
_CONSEQUENCE = re.compile(r"Engine core initialization failed|EngineDeadError|EngineCore encountered an issue")
_NOISE = re.compile(r"^(?:nanobind: | - leaked | - \.\.\. skipped|See https://|\s*For further information|\s*\^*$)")

_LISTS = re.compile(r" \[type=\w+, input_value=.*| Supported architectures: .*| Must be one of \[.*")
"""Behind what is said."""

_FREE = re.compile(
    r"(?:Available|Free) memory on (?:node|device) \S+ \((?P<free>[\d.]+)/[\d.]+ GiB\).*?"
    r"(?:memory for kv|utilization) \((?:[\d.]+, )?(?P<wanted>[\d.]+)",
)
_SHORT = re.compile(
    r"max seq len \((?P<length>\d+)\), \(?(?P<wanted>[\d.]+) GiB KV cache is needed.*?"
    r"memory \((?P<has>[\d.]+) GiB\)(?:.*?maximum model length is (?P<fits>\d+))?"
)
_LONG = re.compile(r"max_model_len \((?P<length>\d+)\) is greater than the derived max_model_len \(\w+=(?P<fits>\d+)")
_MEMORY = re.compile(
    r"out of memory|OutOfMemory|MemoryError|Cannot allocate memory|can't allocate memory|not enough memory|bad_alloc"
    r"|No available memory for the cache blocks",
    re.IGNORECASE,
)
_KILLED = re.compile(r"Failed core proc\(s\): \{[^}]*: -9\b")
_PORT = re.compile(r"address already in use|\[Errno 98\]", re.IGNORECASE)
_ARGUMENT = re.compile(r"error: ((?:unrecognized arguments|argument |the following arguments|ambiguous option).*)")
_HEAD = re.compile(r"Unsupported CPU attention configuration: head_dim=(\d+)")

_REFUSED: Sequence[tuple[str, re.Pattern[str], str]] = (
    (
        "custom_code",
        re.compile(r"trust_remote_code|custom code which must be executed"),
        "it has code of its own, which Modelium does not have run: use a model of which vLLM has the code itself, or, "
        "if you trust it, give `args: [--trust-remote-code]`",
    ),
    (
        "unknown_architecture",
        re.compile(
            r"[Aa]rchitectures? .* (?:are|is) not supported|does not recognize this architecture|has no vLLM impl"
        ),
        "this vLLM does not know the architecture: use a newer one (`vllm: {python: ...}`), or another model",
    ),
    (
        "quantization",
        re.compile(
            r"[Uu]nknown quantization|quantization.*(?:not|un)\s?supported|[Qq]uantization method specified|fp8_quant\("
            r"|Cannot find the config file for"
        ),
        "this vLLM can't compute its quantised weights on this kind of device: use a GPU, or a model that is quantised "
        "otherwise or not at all",
    ),
    (
        "unsupported",
        re.compile(r"'_OpNamespace' '\w+' object has no attribute"),
        "this vLLM has no such computation for this processor: use a GPU, or a model that is quantised otherwise",
    ),
    (
        "dtype",
        re.compile(
            r"dtype.*not supported|not supported for dtype|[Bb]float16 is only supported|does not support b?float16"
        ),
        "it is not computed in this `dtype` here: give it another",
    ),
    (
        "files_missing",
        re.compile(
            r"Cannot find any model weights|does not appear to have a file|No such file or directory"
            r"|Can't load (?:tokenizer|the configuration)|instantiate the backend tokenizer|Unrecognized model in"
        ),
        "files of it are missing: drop the whole model again",
    ),
    (
        "files_damaged",
        re.compile(r"SafetensorError|deserializing header|incomplete metadata|There is no module or parameter named"),
        "its weights are damaged, or not this model's: drop it again",
    ),
    (
        "bad_settings",
        re.compile(r"LoRA rank \d+ is greater|does not support LoRA|max_lora_rank"),
        "see `max_lora_rank`",
    ),
)
"""Code, words, and what to do; the same files will be refused again."""


def failure(name: str, lines: Sequence[str]) -> DriverError:
    """What the log of a start that failed amounts to."""
    said = [_PREFIX.sub("", line).rstrip() for line in lines]
    text = " ".join(said)
    reason = cause(said)
    if (match := _LONG.search(text)) is not None:
        return DriverError(
            f"{name}: requests of {match['length']} tokens are wanted, and the model takes {match['fits']}: set "
            "`max_model_len` to that",
            code=TOO_LONG,
            fits=int(match["fits"]),
        )
    if (match := _SHORT.search(text)) is not None:
        fits = int(match["fits"] or 0)
        return DriverError(
            f"{name}: a request of {match['length']} tokens takes {match['wanted']} GiB of cache, and there are "
            f"{match['has']}: set `max_model_len` to at most {fits}, or a larger `kv_cache_memory_bytes`",
            code=SHORT_CACHE,
            fits=fits,
        )
    if (match := _FREE.search(text)) is not None:
        return DriverError(
            f"{name}: {match['wanted']} GiB were to be had, and {match['free']} GiB are free: others use what was "
            "reckoned with; see `modelium ps --devices`",
            code=NO_MEMORY,
            free_bytes=int(float(match["free"]) * GIB),
        )
    if _KILLED.search(text):
        return DriverError(
            f"{name}: vLLM's engine was killed, as the kernel does when memory runs out (see `dmesg`): give it a "
            "smaller `max_model_len` or `concurrent`",
            code=NO_MEMORY,
        )
    if _MEMORY.search(text):
        line = next((line for line in said if _MEMORY.search(line)), reason)
        return DriverError(
            f"{name}: vLLM had too little memory ({line.strip():.300}): give it a smaller `max_model_len` or "
            "`concurrent`, or a model that is quantised more",
            code=NO_MEMORY,
        )
    if _PORT.search(text):
        return DriverError(f"{name}: the port that was chosen for it was taken meanwhile", code=NO_PORT)
    if (match := next(filter(None, map(_ARGUMENT.search, said)), None)) is not None:
        return LoadRejected(
            f"{name}: vLLM's server does not take its arguments: {match[1]}: see `args` in its settings, and the "
            "version of vLLM",
            code="bad_settings",
        )
    if (match := _HEAD.search(text)) is not None:
        return LoadRejected(
            f"{name}: its heads have {match[1]} numbers, which vLLM does not compute on CPUs", code="unsupported"
        )
    for code, words, advice in _REFUSED:
        if words.search(reason):
            return LoadRejected(f"{name}: {advice}. vLLM says: {reason:.600}", code=code)
    if reason:
        return DriverError(f"{name}: vLLM did not start: {reason:.600}", code="process_died")
    last = " | ".join([line.strip() for line in said if line.strip() and not _NOISE.match(line)][-3:])
    return DriverError(
        f"{name}: vLLM has ended without a word of why, as when the kernel ends what takes the last memory "
        f"(see `dmesg`); it said last: {last:.600}",
        code="process_died",
    )


def cause(said: Sequence[str]) -> str:
    """The first error that is not another one's consequence, in one line; empty where there is none."""
    found = ""
    for at, line in enumerate(said):
        match = _RAISED.match(line.strip())
        if match is None or _CONSEQUENCE.search(line):
            continue
        found = match[2]
        if match[1] == "ValidationError":  # pydantic's: what is wrong stands in the next line
            found = next(iter(said[at + 1 :]), "").strip().removeprefix("Value error, ")
        break
    return _LISTS.sub("", found).strip()
