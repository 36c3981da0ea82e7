"""Web pages can't drive a service on loopback; programs notice nothing."""

from __future__ import annotations

import pytest

from modelium.http.settings import HttpSettings
from tests.http.conftest import Surface
from tests.http.upstreams import Recorder, exchange


async def status(surface: Surface, method: str, path: str, **headers: str) -> int:
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    request = "\r\n".join([f"{method} {path} HTTP/1.1", "Connection: close", "Content-Length: 0", *lines, "", ""])
    return int((await exchange(surface.url, request.encode())).split(b" ")[1])


ORDERS = [
    ("POST", "/models/m/load"), ("POST", "/models/m/pin"), ("DELETE", "/models/m"),
    ("POST", "/v2/repository/models/m/unload"), ("POST", "/v2/models/m/infer"), ("POST", "/predict/m"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), ORDERS)
async def test_pages_of_others_may_not_give_orders(
    surface: Surface, upstream: Recorder, method: str, path: str
) -> None:
    for origin in ("http://evil.example", "null", "http://localhost.evil.example", "http://localhost:1"):
        assert await status(surface, method, path, Host="localhost:8000", Origin=origin) == 403
    assert (surface.service.calls, upstream.seen, surface.service.pinned) == ([], [], set())
    assert surface.service.states == {"m": "READY"}


async def test_pages_of_its_own_may(surface: Surface, upstream: Recorder) -> None:
    for origin in ("http://localhost:8000", "https://LOCALHOST:8000"):
        assert await status(surface, "POST", "/models/m/pin", Host="localhost:8000", Origin=origin) == 200


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_names_that_are_not_loopback_are_refused_on_loopback(
    surface: Surface, upstream: Recorder, method: str
) -> None:
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example:80"):
        assert await status(surface, method, "/models", Host=host) == 403
        assert await status(surface, method, "/v2/models/m/infer", Host=host, Origin=f"http://{host}") == 403
    assert upstream.seen == []


async def test_loopback_names_are_taken(surface: Surface) -> None:
    for host in ("localhost", "LocalHost:1", "127.0.0.1:8000", "[::1]:8000", "[::1]"):
        assert await status(surface, "GET", "/models", Host=host) == 200


class TestOnAllAddresses:
    @pytest.fixture
    def settings(self) -> HttpSettings:
        return HttpSettings(host="0.0.0.0", allowed_origins=("https://app.example",))

    async def test_any_name_is_taken_and_origins_still_matter(self, surface: Surface, upstream: Recorder) -> None:
        assert await status(surface, "GET", "/models", Host="models.example:8000") == 200
        pin = ("POST", "/models/m/pin")
        assert await status(surface, *pin, Host="models.example") == 200
        assert await status(surface, *pin, Host="models.example", Origin="http://evil.example") == 403
        assert await status(surface, *pin, Host="models.example", Origin="http://models.example") == 200
        assert await status(surface, *pin, Host="models.example", Origin="https://app.example") == 200


class TestAllowedNames:
    @pytest.fixture
    def settings(self) -> HttpSettings:
        return HttpSettings(host="::1", allowed_hosts=("Models.example",))

    async def test_a_name_that_was_allowed(self, surface: Surface) -> None:
        assert await status(surface, "GET", "/models", Host="models.example:8000") == 200
        assert await status(surface, "GET", "/models", Host="localhost") == 200
        assert await status(surface, "GET", "/models", Host="other.example") == 403
