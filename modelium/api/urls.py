"""Addresses of servers in settings, and why nobody answers there."""

from __future__ import annotations

import os
import ssl
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator


def _base_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"expected a URL such as http://127.0.0.1:8000, found {value!r}")
    if "@" in parts.netloc:
        raise ValueError("expected a URL without a user or a password: it is shown to whoever asks for the status")
    return value.rstrip("/")


BaseUrl = Annotated[str, AfterValidator(_base_url)]
"""A server's URL, without a slash at its end."""


def unanswered(error: Exception) -> str:
    """Why a request got no answer, in the system's words where it has some: aiohttp adds its own ways to them."""
    cause = getattr(error, "os_error", None)
    if not isinstance(cause, OSError):
        return str(error) or type(error).__name__
    # Names that are not found have numbers below 0, and OpenSSL's numbers are not the system's.
    if cause.errno is not None and cause.errno > 0 and not isinstance(cause, ssl.SSLError):
        return os.strerror(cause.errno)
    return cause.strerror or str(cause)
