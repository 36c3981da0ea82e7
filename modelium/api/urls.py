"""Addresses of servers in settings."""

from __future__ import annotations

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
