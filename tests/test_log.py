"""Logs: both formats, secrets, and what happens when the terminal does not keep up."""

from __future__ import annotations

import io
import json
import logging
import re
import threading
from collections.abc import Iterator

import pytest

from modelium import log
from modelium.api import Transition
from modelium.engine.journal import Journal
from modelium.redact import redact, redact_value


@pytest.fixture(autouse=True)
def _root_logger_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    before = (root.level, root.handlers[:])
    yield
    assert (root.level, root.handlers) == before


def written(format: str, level: str = "info") -> tuple[io.StringIO, log.Logging]:
    out = io.StringIO()
    return out, log.setup(format=format, level=level, stream=out)


def test_console_lines_are_for_people() -> None:
    out, running = written("console")
    with running:
        logging.getLogger("x").info("hello %s", "you")
        logging.getLogger("x").debug("not this")
    assert re.fullmatch(r"\d\d:\d\d:\d\d info     hello you\n", out.getvalue())


def test_json_lines_are_for_programs() -> None:
    out, running = written("json", "debug")
    with running:
        logging.getLogger("x.y").debug("hello %s\nagain", "you", extra={"model": "m", "seconds": 1.5})
    (line,) = out.getvalue().splitlines()
    fields = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", fields.pop("at"))
    assert fields == {"level": "debug", "logger": "x.y", "message": "hello you\nagain", "model": "m", "seconds": 1.5}


@pytest.mark.parametrize("format", ["console", "json"])
def test_exceptions_are_written_with_their_traceback(format: str) -> None:
    out, running = written(format)
    with running:
        try:
            raise ValueError("bad token=abcdef123")
        except ValueError:
            logging.getLogger("x").exception("failed")
    text = out.getvalue() if format == "console" else json.loads(out.getvalue())["error"]
    assert "Traceback" in text
    assert "ValueError: bad token=***" in text


def test_fields_may_be_given_together_and_never_replace_the_lines_own() -> None:
    out, running = written("json")
    with running:
        logging.getLogger("x").warning("m: A -> B", extra={"fields": {"subject": "m", "at": 3.0, "token": "t"}})
    fields = json.loads(out.getvalue())
    assert fields["level"] == "warning"
    assert (fields["subject"], fields["token"]) == ("m", "***")
    assert fields["at"] != 3.0


def test_what_is_logged_is_what_it_was_then() -> None:
    out, running = written("console")
    with running:
        value = ["before"]
        logging.getLogger("x").info("%s", value)
        value[0] = "after"
    assert "before" in out.getvalue()


class Stuck(io.StringIO):
    """A terminal that takes nothing until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.writing = threading.Event()
        self.free = threading.Event()

    def write(self, text: str) -> int:
        self.writing.set()
        assert self.free.wait(30)
        return super().write(text)


def test_a_stuck_terminal_never_holds_up_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "CAPACITY", 10)
    out = Stuck()
    with log.setup(stream=out):
        logging.getLogger("x").info("first")
        assert out.writing.wait(30)
        for number in range(25):
            logging.getLogger("x").info("line %s", number)
        out.free.set()
    lines = out.getvalue().splitlines()
    assert sum("line" in line for line in lines if "dropped" not in line) == 10
    assert any("15 log lines were dropped" in line for line in lines)


def test_colour_is_for_terminals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for no_color, expected in (("", True), ("1", False)):
        monkeypatch.setenv("NO_COLOR", no_color)
        out = Terminal()
        with log.setup(stream=out):
            logging.getLogger("x").warning("hello")
        assert ("\x1b[33m" in out.getvalue()) is expected


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Authorization: Bearer abc.def-123", "Authorization: Bearer ***"),
        ("{'authorization': 'Basic dXNlcjpwdw=='}", "{'authorization': 'Basic ***'}"),
        ("got header authorization=abc, next", "got header authorization=***, next"),
        ("sent Bearer abcdefghijk to it", "sent Bearer *** to it"),
        ("http://h/p?token=abc&x=1", "http://h/p?token=***&x=1"),
        ("http://h/p?x=1&api_key=abc", "http://h/p?x=1&api_key=***"),
        ("http://h/p?access_token=abc#top", "http://h/p?access_token=***"),
        ("https://ann:pw@h/p", "https://***@h/p"),
        ("https://pw@h/p", "https://***@h/p"),
        ('{"password": "hunter2", "x": 1}', '{"password": "***", "x": 1}'),
        ("HF_TOKEN=hf_abcdefghijklmnopqrst", "HF_TOKEN=***"),
        ("using hf_abcdefghijklmnopqrst now", "using *** now"),
        ("Cookie: a=b; c=d", "Cookie: ***"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc", "***"),
        ("a model with 494M tokens per second: 12 tokens", "a model with 494M tokens per second: 12 tokens"),
        ("http://127.0.0.1:8000/v2/models/m:1@2", "http://127.0.0.1:8000/v2/models/m:1@2"),
        ("tokenizer: gpt2, max_tokens=5", "tokenizer: gpt2, max_tokens=5"),
    ],
)
def test_secrets_are_taken_out(text: str, shown: str) -> None:
    assert redact(text) == shown


def test_fields_with_secret_names_are_hidden() -> None:
    assert redact_value("api_key", "x") == "***"
    assert redact_value("HF_TOKEN", "x") == "***"
    assert redact_value("headers", {"Authorization": "x", "accept": "y"}) == {"Authorization": "***", "accept": "y"}
    assert redact_value("argv", ["a", "--token=x"]) == ["a", "--token=***"]
    assert redact_value("max_tokens", 3) == 3
    out, running = written("json")
    with running:
        Journal(None).add(
            Transition(decision=1, at=1.0, subject="token", before="COLD", after="QUEUED", reason="asked")
        )
        logging.getLogger("x").info("m", extra={"password": "p"})
    of_a_model, secret = map(json.loads, out.getvalue().splitlines())
    assert of_a_model["message"] == "token COLD -> QUEUED: asked"  # a model's name makes no secret of its state
    assert secret["password"] == "***"
