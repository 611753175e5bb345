"""The application `hf-lowrank` and the list of its commands.

A new command is a function in the module named like the sub-package that does its work, and a line in `COMMANDS`.
"""

from __future__ import annotations

import typer

from .analysis import analyze
from .benchmarking import bench
from .compression import compress
from .evaluation import evaluate
from .experiments import demo, sweep
from .forecasting import forecast
from .hub import push
from .training import pretrain, recover

__all__ = ["COMMANDS", "app"]

COMMANDS = (compress, recover, demo, evaluate, pretrain, forecast, bench, push, sweep, analyze)

app = typer.Typer(
    name="hf-lowrank",
    help="Make Chronos time-series foundation models small and fast.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in COMMANDS:
    app.command()(command)
