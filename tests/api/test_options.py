"""What users may add to a server's command line."""

from __future__ import annotations

import pytest

from modelium.api.options import check_options

OURS = {"host", "port", "api-server-count", "model"}


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("--model-impl", "host"),
        ("--ports-of-call=1", "-1", "-0.5", "-.5"),
        ("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    ],
)
def test_other_options_and_values_are_theirs(args: tuple[str, ...]) -> None:
    check_options(args, OURS)


@pytest.mark.parametrize(
    "arg",
    ["--host", "--host=0.0.0.0", "--host 0.0.0.0", "--host.x", "--host+", "--api_server_count", "--api-server_count=2"],
)
def test_ours_are_refused_however_they_are_written(arg: str) -> None:
    with pytest.raises(ValueError, match=r"found --(host|api-server-count), which is Modelium's to say: leave it out"):
        check_options(["--other", arg], OURS)


@pytest.mark.parametrize(("arg", "meant"), [("--hos", "host"), ("--api_s=2", "api-server-count"), ("--", "api-server")])
def test_so_is_what_may_be_short_for_one_of_them(arg: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"found '{arg}', which may mean --{meant}.*write the whole name"):
        check_options([arg, "0.0.0.0"], OURS)


@pytest.mark.parametrize("arg", ["-asc", "-p", "-", "-hos"])
def test_and_what_is_written_in_a_short_form(arg: str) -> None:
    with pytest.raises(ValueError, match="expected options by their full names, found the short form"):
        check_options([arg], OURS)
