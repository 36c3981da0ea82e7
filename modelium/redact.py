"""Takes secrets out of text before it is shown or written anywhere."""

from __future__ import annotations

import re

HIDDEN = "***"

_WORDS = r"(?:api[-_]?key|access[-_]?key|auth[-_]?token|token|secret|password|passwd|credentials?|signature)"

SECRET_NAME = re.compile(rf"(?:^|[-_.])(?:{_WORDS}|authorization|cookie|set-cookie)$", re.IGNORECASE)
"""Names of fields, headers and settings whose values are secret."""

_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    # a header, as text or in a printed mapping: the scheme stays, what follows goes
    (
        re.compile(r"(?i)(\bauthorization['\"]?\s*[:=]\s*['\"]?)((?:bearer|basic|token|digest)\s+)?[^\s'\",;}]+"),
        r"\1\2***",
    ),
    (re.compile(r"(?i)\b(bearer\s+)[A-Za-z0-9._~+/=-]{8,}"), r"\1***"),
    (re.compile(r"(?i)(\b(?:set-)?cookie['\"]?\s*:\s*['\"]?)[^'\"\r\n}]+"), r"\1***"),
    # user:password@ in a URL
    (re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]*://)[^\s/@:]+(?::[^\s/@]*)?@"), r"\1***@"),
    # key=value, key: value, "key": "value"
    (re.compile(rf"(?i)((?:(?<![/\w])|[-_]){_WORDS}['\"]?\s*[=:]\s*['\"]?)[^\s&'\",;}}]+"), r"\1***"),
    # tokens known by their shape: Hugging Face, OpenAI-like, GitHub, JSON Web Tokens
    (re.compile(r"\b(?:hf_|sk-|gh[pousr]_)[A-Za-z0-9_-]{16,}"), HIDDEN),
    (re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"), HIDDEN),
)


def redact(text: str) -> str:
    """The text with the values of authorization headers, tokens, passwords and the like replaced by `***`."""
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def redact_value(name: str, value: object) -> object:
    """The value of a field called `name`, made fit to be shown; containers are gone through."""
    if SECRET_NAME.search(name):
        return HIDDEN
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: redact_value(str(key), item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [redact_value("", item) for item in value]
    return value
