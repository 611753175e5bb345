"""Collect published scores by task into hf_lowrank/assets/published_scores.json, which `hf-lowrank evaluate --beside published` shows.

    git clone --bare https://github.com/autogluon/fev fev.git
    git clone --bare https://github.com/SalesforceAIResearch/gift-eval gift-eval.git
    python tests/collect_published_scores.py fev.git gift-eval.git

The result files of both repositories are under Apache-2.0. Scores are rounded to six significant digits, times to three.
"""

from __future__ import annotations

import io
import json
import math
import subprocess
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer

from hf_lowrank.files import write_text

ASSET = Path(__file__).parents[1] / "hf_lowrank" / "assets" / "published_scores.json"
# Millions of parameters, as the models' own cards and papers say; None where they do not.
PARAMETERS = {
    "chronos-t5-tiny": 8,
    "chronos-t5-mini": 20,
    "chronos-t5-small": 46,
    "chronos-t5-base": 200,
    "chronos-t5-large": 710,
    "chronos-bolt-tiny": 9,
    "chronos-bolt-mini": 21,
    "chronos-bolt-small": 48,
    "chronos-bolt-base": 205,
    "chronos-2": 120,
    "chronos-2-synth": 120,
    "tirex": 35,
    "tirex-1.1-gifteval": 35,
    "toto-open-base-1.0": 151,
    "toto-2.0-4m": 4,
    "toto-2.0-22m": 22,
    "toto-2.0-313m": 313,
    "toto-2.0-1b": 1000,
    "toto-2.0-2.5b": 2500,
    "timesfm-1.0": 200,
    "timesfm-2.0": 500,
    "timesfm-2.5": 200,
    "moirai-1.0-small": 14,
    "moirai-1.0-base": 91,
    "moirai-1.0-large": 311,
    "moirai-2.0-small": 11.4,
}
# Our names of the models, and those of the files and inside of them.
ZEROSHOT = {
    "seasonal_naive": "seasonal_naive",
    "tirex": "tirex",
    "timesfm-1.0": "timesfm",
    "timesfm-2.0": "timesfm-2.0",
}
ZEROSHOT |= {f"chronos-t5-{size}": f"chronos_{size}" for size in ("tiny", "mini", "small", "base", "large")}
ZEROSHOT |= {f"chronos-bolt-{size}": f"chronos_bolt_{size}" for size in ("tiny", "mini", "small", "base")}
ZEROSHOT |= {f"moirai-1.0-{size}": f"moirai_{size}" for size in ("small", "base", "large")}
FEV_BENCH = {
    "seasonal_naive": "seasonal_naive",
    "chronos-2": "chronos-2",
    "chronos-bolt-base": "chronos-bolt",
    "tirex": "tirex",
    "tirex-2": "tirex-2",
    "timesfm-2.5": "timesfm-2_5",
    "moirai-2.0-small": "moirai-2_0",
    "toto-open-base-1.0": "toto-1_0",
}
FEV_BENCH |= {f"toto-2.0-{size}": "toto-2_0" for size in ("4m", "22m", "313m", "1b", "2.5b")}
GIFT_EVAL = {
    "chronos-2": "chronos-2",
    "chronos-2-synth": "chronos-2-synth",
    "chronos-bolt-small": "chronos_bolt_small",
    "chronos-bolt-base": "chronos_bolt_base",
    "chronos-t5-small": "Chronos_small",
    "chronos-t5-base": "chronos_base",
    "chronos-t5-large": "chronos_large",
    "tirex-1.1-gifteval": "TiRex",
    "tirex-2": "TiRex-2-Pretrained",
    "tirex-2-zeroshot": "TiRex-2-Zeroshot",
    "toto-open-base-1.0": "Toto_Open_Base_1.0",
    "timesfm-1.0": "timesfm",
    "timesfm-2.0": "timesfm_2_0_500m",
    "timesfm-2.5": "TimesFM-2.5",
    "moirai-1.0-small": "moirai_small",
    "moirai-1.0-base": "Moirai_base",
    "moirai-1.0-large": "Moirai_large",
    "moirai-2.0-small": "Moirai2",
}
GIFT_EVAL |= {f"toto-2.0-{name.lower()}": f"Toto-2.0-{name}" for name in ("4m", "22m", "313m", "1B", "2.5B")}


def git(repository: Path, *arguments: str) -> str:
    command = ["git", "-C", str(repository), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def table(repository: Path, path: str) -> pd.DataFrame:
    return pd.read_csv(io.StringIO(git(repository, "show", f"HEAD:{path}")))


def rounded(value: float, digits: int) -> float | None:
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def source(repository: Path, address: str, folder: str) -> dict[str, str]:
    commit, date = git(repository, "log", "-1", "--format=%H %cs").split()
    return {"source": f"{address}/tree/{commit}/{folder}", "date": date, "licence": "Apache-2.0"}


def by_task(fev: Path, folder: str, models: dict[str, str], name: str, metrics: list[str]) -> dict[str, Any]:
    """The scores of one benchmark of fev, each in the order of its `tasks`."""
    scores, tasks = {}, []
    fingerprints: dict[
        str, set[str]
    ] = {}  # of one data set there are several: they depend on versions of libraries too
    for model, file in models.items():
        frame = table(fev, f"{folder}/{file}.csv")
        if file == "toto-2_0":
            frame = frame[frame["model_name"].str.lower() == model]
        frame = frame.set_index(name)
        tasks = tasks or list(frame.index)
        assert frame.index.is_unique
        assert set(frame.index) == set(tasks)
        frame = frame.loc[tasks]
        for task in tasks:
            fingerprints.setdefault(task, set()).add(frame.at[task, "dataset_fingerprint"])
        scores[model] = {metric: [rounded(value, 6) for value in frame[metric]] for metric in metrics}
        scores[model]["seconds"] = [rounded(value, 3) for value in frame["inference_time_s"]]
        scores[model]["trained_on"] = [i for i, seen in enumerate(frame["trained_on_this_dataset"]) if seen]
    known = [sorted(fingerprints[task]) for task in tasks]
    origin = source(fev, "https://github.com/autogluon/fev", folder)
    return origin | {"tasks": tasks, "fingerprints": known, "scores": scores}


def gift_eval(repository: Path) -> dict[str, Any]:
    """Geometric means over the 97 tasks of scores relative to Seasonal Naive's."""
    columns = {"CRPS": "eval_metrics/mean_weighted_sum_quantile_loss", "MASE": "eval_metrics/MASE[0.5]"}
    naive = table(repository, "results/seasonal_naive/all_results.csv").set_index("dataset")
    means = {}
    for model, file in GIFT_EVAL.items():
        frame = table(repository, f"results/{file}/all_results.csv").set_index("dataset")
        assert set(frame.index) == set(naive.index)
        means[model] = {
            metric: rounded(float(np.exp(np.log(frame[column] / naive[column]).mean())), 6)
            for metric, column in columns.items()
        }
    address = "https://github.com/SalesforceAIResearch/gift-eval"
    return source(repository, address, "results") | {"num_tasks": len(naive), "relative_to_seasonal_naive": means}


def as_text(content: dict[str, Any]) -> str:
    """JSON with a line for each list."""
    lists: list[str] = []

    def hide(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: hide(entry) for key, entry in value.items()}
        if isinstance(value, list):
            lists.append(json.dumps(value))
            return f"@{len(lists) - 1}@"
        return value

    text = json.dumps(hide(content), indent=1)
    for i, line in enumerate(lists):
        text = text.replace(f'"@{i}@"', line)
    return text + "\n"


def main(
    fev: Annotated[Path, typer.Argument(help="A clone of autogluon/fev.")],
    gift: Annotated[Path, typer.Argument(help="A clone of SalesforceAIResearch/gift-eval.")],
    output: Path = ASSET,
) -> None:
    content = {
        "million_parameters": PARAMETERS,
        "chronos_zeroshot": by_task(
            fev, "benchmarks/chronos_zeroshot/results", ZEROSHOT, "dataset_config", ["WQL", "MASE"]
        ),
        "fev_bench": by_task(fev, "benchmarks/fev_bench/results", FEV_BENCH, "task_name", ["SQL"]),
        "gift_eval": gift_eval(gift),
    }
    write_text(output, as_text(content))


if __name__ == "__main__":
    typer.run(main)
