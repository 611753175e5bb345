"""The application `hf-lowrank` and the list of its commands.

A new command is a function in the module named like the sub-package that does its work, and a line in `COMMANDS`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .analysis import analyze
from .benchmarking import bench
from .compression import compress
from .evaluation import evaluate
from .experiments import demo, sweep
from .exporting import export
from .forecasting import forecast
from .hub import publish, push
from .output import DEBUG, interruptions
from .training import pretrain, recover

__all__ = ["COMMANDS", "app"]

COMMANDS = (compress, recover, demo, evaluate, pretrain, forecast, export, bench, push, publish, sweep, analyze)

CONTEXT = {"help_option_names": ["-h", "--help"]}


class Commands(TyperGroup):
    """The commands, any of which takes `--debug`."""

    def main(self, args: Sequence[str] | None = None, *more: Any, **keywords: Any) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        if "--debug" not in given:
            return super().main(given, *more, **keywords)
        os.environ[DEBUG] = "1"
        try:
            return super().main([arg for arg in given if arg != "--debug"], *more, **keywords)
        finally:
            del os.environ[DEBUG]

    def invoke(self, ctx: Any) -> Any:
        with interruptions():
            return super().invoke(ctx)


app = typer.Typer(
    name="hf-lowrank",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=CONTEXT,
)
for command in COMMANDS:
    app.command(context_settings=CONTEXT)(command)


def _version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"hf-lowrank {version('hf-lowrank')}")
        raise typer.Exit


@app.callback()
def options(
    is_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and stop.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; in any place.")] = False,
) -> None:
    """Make Chronos time-series foundation models small and fast."""
