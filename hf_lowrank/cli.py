"""The command line `hf-lowrank`: a thin layer, one function a command."""

from __future__ import annotations

import typer
from rich.console import Console

app = typer.Typer(
    name="hf-lowrank",
    help="Make Chronos time-series foundation models small and fast.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
