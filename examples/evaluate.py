"""How accurate a compressed checkpoint is, beside the dense one that it was made from.

    python examples/evaluate.py chronos-lowrank amazon/chronos-t5-base --tasks m1_yearly,tourism
    python examples/evaluate.py chronos-lowrank amazon/chronos-t5-base --file sales.csv --horizon 28

Prints WQL and MASE of both and of Seasonal Naive on every task, then the compressed model's relative to the dense model's (1 is as good,
below 1 is better) with a 95 % interval of two or more tasks, and writes evaluation.json, which `examples/push.py` puts on the model card.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_lowrank import evaluate, file_task


def main(
    compressed: str,
    dense: str,
    tasks: Annotated[str, typer.Option(help="Names of `hf-lowrank evaluate --list`, with commas.")] = "m1_yearly",
    file: Annotated[Path | None, typer.Option(help="Your series instead: a CSV or parquet file.")] = None,
    horizon: Annotated[int, typer.Option(help="Steps to forecast of your series.")] = 24,
    output: Path = Path("evaluation.json"),
) -> None:
    chosen = tasks.split(",") if file is None else file_task(file, horizon=horizon)
    result = evaluate(compressed, chosen, against=dense)
    result.save(output)

    print(result.to_frame()[["task", "model", "WQL", "MASE", "seconds"]].to_string(index=False))
    for metric in ("WQL", "MASE"):
        score = result.aggregate[compressed]["relative_to_dense"][metric]
        interval = f" ({score['low']:.3f} to {score['high']:.3f})" if score["num_tasks"] > 1 else ""
        print(f"{metric}: {score['geometric_mean']:.3f} of the dense model's{interval}")


if __name__ == "__main__":
    typer.run(main)
