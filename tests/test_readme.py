"""The README's lines are the program's own."""

from __future__ import annotations

import re
from pathlib import Path

from modelium.cli import COMMANDS
from modelium.commands.sample import curl

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_line_for_the_sample_is_what_serve_prints() -> None:
    assert curl("http://127.0.0.1:8000") in README


def test_every_command_that_is_named_exists() -> None:
    code = re.findall(r"`([^`\n]+)`|^(modelium .*)$", README, re.MULTILINE)
    named = {m for pair in code for text in pair for m in re.findall(r"^modelium ([a-z]+)", text)}
    assert {"serve", "ps", "add", "down"} <= named <= COMMANDS.keys()
