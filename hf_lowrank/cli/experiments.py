"""`hf-lowrank demo` and `hf-lowrank sweep`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from .options import CHECKPOINT, json_option, numbers
from .output import plain_messages, write_json

if TYPE_CHECKING:
    from ..experiments.demo import DemoRow
    from ..experiments.sweep import SweepResult


def demo(
    source: Annotated[str, typer.Option(help=f"A Chronos checkpoint: {CHECKPOINT}.")] = "reference-bolt",
    ratios: Annotated[str, typer.Option(help="Shares of the attention to keep.")] = "0.5,0.25,0.15",
    plot: Annotated[Path, typer.Option(help="Where to write the picture of the forecasts.")] = Path("demo.png"),
    seed: Annotated[int, typer.Option(help="Seed of the samples, the same for every model.")] = 0,
    json_file: Annotated[Path | None, json_option("the results")] = None,
) -> None:
    """Compress a checkpoint at a few ratios and forecast real series with all models, side by side."""
    with plain_messages(json_file) as console:
        from ..experiments.demo import demo as run

        shares = numbers("--ratios", ratios, "0.5,0.25")
        rows = run(source, ratios=shares, plot=plot, seed=seed, show_progress=True)
        write_json(json_file, {"source": source, "plot": str(plot), "results": [asdict(row) for row in rows]})
        console.print(demo_table(rows, source))
        console.print(f"The dense model took {rows[0].seconds[0]:.2g} s. Forecasts are drawn in {plot}.")


def demo_table(rows: Sequence[DemoRow], source: str) -> Table:
    """A row a model, the dense one first."""
    table = Table(
        title=f"{source} on four real series",
        caption="paper: the published post-training method, which keeps all dense shapes; its share is that of the ranks. "
        f"MiB and cache are in {rows[0].dtype}, as the checkpoint is saved. Time is for all forecasts, relative to dense in the same run: median, least and most of three rounds. "
        "WQL and MASE are geometric means relative to Seasonal Naive: below 1 is better.",
    )
    table.add_column("kept", no_wrap=True)
    for heading in ("MiB", "cache B/token", "time", "spread", "WQL", "MASE"):
        table.add_column(heading, justify="right", no_wrap=True)
    base = rows[0].seconds[0]
    for row in rows:
        median, least, most = (value / base for value in row.seconds)
        table.add_row(
            row.name,
            f"{row.bytes / 2**20:.1f}",
            f"{row.cache_bytes:,}",
            f"{median:.2f}",
            f"{least:.2f} to {most:.2f}",
            f"{row.wql:.3f}",
            f"{row.mase:.3f}",
            end_section=row.name == "dense" or row.name.startswith("paper"),
        )
    return table


def sweep(
    source: Annotated[
        str,
        typer.Argument(help=f"A dense Chronos checkpoint: {CHECKPOINT}."),
    ],
    ratios: Annotated[
        str | None, typer.Option(help="Shares to keep, 0.5,0.25 say. Default: the paper's four.")
    ] = None,
    epsilons: Annotated[
        str | None, typer.Option(help="In place of ratios: epsilons, or 'paper' for its four.")
    ] = None,
    methods: Annotated[
        str, typer.Option(help="Of default, per_head, latent, no_refit, weights and paper.")
    ] = "default,weights,paper",
    tasks: Annotated[str, typer.Option(help="Tasks or groups; see evaluate --list.")] = "m1_yearly,packaged",
    num_samples: Annotated[int | None, typer.Option(help="Sample paths of a forecast.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the samples, the same for every model.")] = 0,
    cache: Annotated[Path | None, typer.Option(help="Keep finished cells here and do not repeat them.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the Pareto curves to this file.")] = None,
    json_file: Annotated[Path | None, json_option("the points")] = None,
) -> None:
    """Accuracy against compression: several methods, several sizes, beside the paper's published points."""
    with plain_messages(json_file) as console:
        from ..experiments.sweep import sweep as run
        from ..plots import check_plot
        from ..published_figures import EPSILONS

        if plot is not None:
            check_plot("--plot", plot)
        sizes: dict[str, Sequence[float]] = {}
        if ratios is not None:
            sizes["ratios"] = numbers("--ratios", ratios, "0.5,0.25")
        if epsilons is not None:
            sizes["epsilons"] = EPSILONS if epsilons == "paper" else numbers("--epsilons", epsilons, "0.01,0.03")
        result = run(
            source,
            **sizes,
            methods=methods.split(","),
            tasks=tasks.split(","),
            num_samples=num_samples,
            seed=seed,
            cache=cache,
            show_progress=True,
        )
        write_json(json_file, result.to_dict())
        console.print(sweep_table(result, source))
        if plot is not None:
            plot_sweep(result, source, plot)
            console.print(f"Drawn in {plot}.")


def sweep_table(result: SweepResult, source: str) -> Table:
    """A row a compressed model."""
    table = Table(
        title=f"{source}: scores relative to dense (95 % interval over {len(result.settings['tasks'])} tasks)",
        caption="kept: share of the attention parameters; of the ranks for the paper's method, which keeps all parameters.",
    )
    table.add_column("method")
    for heading in ("kept", "cache", "parameters", "WQL", "MASE"):
        table.add_column(heading, justify="right")
    for point in result.points:
        scores = (f"{mean:.3f} ({low:.3f} to {high:.3f})" for mean, low, high in (point.wql, point.mase))
        table.add_row(point.method, f"{point.kept:.3f}", f"{point.cache_ratio:.3f}", f"{point.parameters:,}", *scores)
    return table


def plot_sweep(result: SweepResult, source: str, plot: Path) -> None:
    """Draw the Pareto curve of every method beside the published points."""
    from ..files import new_file
    from ..plots import Curve, plot_pareto
    from ..published_figures import TRUNCATED_RATIOS, TRUNCATED_WQL

    curves = []
    for method in dict.fromkeys(point.method for point in result.points):
        points = [point for point in result.points if point.method == method]
        low, high = ([point.wql[i] for point in points] for i in (1, 2))
        curves.append(Curve(method, [p.kept for p in points], [p.wql[0] for p in points], low, high))
    published = [Curve(label, TRUNCATED_RATIOS, scores) for label, scores in TRUNCATED_WQL.items()]
    with new_file(plot) as part:
        plot_pareto(curves, published, part, title=f"{source}, compressed without training")
