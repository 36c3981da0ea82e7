"""The command line. Each command's module is imported only when it is called, so that help comes at once."""

from __future__ import annotations

import asyncio
import difflib
import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from modelium import __version__
from modelium.errors import ConfigError, ModeliumError

COMMANDS: dict[str, tuple[str, str]] = {
    "serve": ("serving", "Run the service."),
    "down": ("serving", "End the runtimes of a root folder."),
    "add": ("add", "Bring in a model, and wait until it serves."),
    "ps": ("listing", "List models, or devices and runtimes."),
    "show": ("listing", "Show one model."),
    "load": ("orders", "Load a model, and wait until it serves."),
    "unload": ("orders", "Unload a model."),
    "pin": ("orders", "Keep a model loaded."),
    "unpin": ("orders", "Let a model be unloaded again."),
    "rm": ("orders", "Unload a model and move it to the trash folder."),
    "plan": ("why", "Tell what would happen to a drop, and do nothing."),
    "explain": ("why", "Tell why a model is where it is."),
    "logs": ("why", "Show what a runtime wrote, or wrote about a model."),
    "check": ("setup", "Check folders, ports, plugins, devices and runtimes."),
    "init": ("setup", "Write a commented modelium.yaml."),
    "plugins": ("setup", "List plugins, those that are left out too."),
    "runtimes": ("runtimes", "List runtimes, or install what one needs."),
    "hookspecs": ("setup", "Show the hooks that plugins can implement."),
}
"""The module in `modelium.commands` that holds each, and one line about it."""

EPILOG = """\b
Exit codes:
  0  done
  1  failed or refused; the reason is on stderr
  2  the command, a flag or the configuration is wrong
  3  no service answers

\b
The service is found by --url, MODELIUM_URL, or the configuration, else at http://127.0.0.1:8000.
Plugins may add commands; `modelium plugins` lists plugins.
"""


class Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in COMMANDS:
            module = importlib.import_module(f"modelium.commands.{COMMANDS[cmd_name][0]}")
            command: click.Command = getattr(module, cmd_name)
            return command
        return _from_plugins(cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"did you mean `modelium {near[0]}`?" if near else "`modelium --help` lists what there is."
            raise click.UsageError(f"there is no command {args[0]!r}: {hint}")
        return super().resolve_command(ctx, args)


def _from_plugins(name: str) -> click.Command | None:
    from modelium.config import load_config
    from modelium.host import PluginHost

    try:
        disabled: Sequence[str] = load_config().plugins.disable
    except ModeliumError:
        disabled = ()
    host = PluginHost.load(disabled, builtin=False)
    return next((command for command in host.commands() if command.name == name), None)


@click.group(cls=Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="modelium")
def cli() -> None:
    """Make a machine full of models run itself, beside NVIDIA Triton Inference Server.

    \b
      modelium serve                 run the service
      modelium add model.onnx        bring a model in
      modelium ps                    see what is there
      modelium explain model         see why it is where it is
    """


def main(args: Sequence[str] | None = None) -> None:
    """Run a command and exit with the code that `modelium --help` documents."""
    sys.exit(run(list(sys.argv[1:] if args is None else args)))


def run(args: list[str]) -> int:
    """Run a command; returns the exit code, and writes errors to stderr, or with `--json` to stdout as JSON."""
    try:
        result: Any = cli.main(args=args, prog_name="modelium", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as exc:
        return exc.exit_code
    except click.ClickException as exc:
        if "--json" in args:
            _print_json_error({"code": "usage", "message": exc.format_message()})
        else:
            exc.show()
        return exc.exit_code
    except ModeliumError as exc:
        if "--json" in args:
            _print_json_error(exc.as_dict())
        else:
            click.secho("error: ", fg="red", bold=True, nl=False, err=True)
            click.echo(exc.message, err=True)
        wrong = isinstance(exc, ConfigError) and exc.code == ConfigError.code
        return int(exc.fields.get("exit_code", 2 if wrong else 1))
    except (click.Abort, KeyboardInterrupt, asyncio.CancelledError):
        click.echo(err=True)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read has gone, `| head` for one
        return 0


def _print_json_error(error: dict[str, Any]) -> None:
    error.pop("exit_code", None)
    click.echo(json.dumps({"error": error}, default=str))


if __name__ == "__main__":
    main()
