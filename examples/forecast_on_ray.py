"""Forecast a table of many series on one machine or many, with Ray Data.

    python forecast_on_ray.py my-lowrank sales.parquet forecasts --horizon 28 --workers 8

INPUT is a CSV file, or a parquet file or folder, local or on s3:// or gs://, in long format (item_id, timestamp, target);
rows may come in any order. OUTPUT becomes a folder of parquet files with the columns of `predict_df`. On a cluster, run it on the head
node (`ray job submit`) with paths that every node can read. The forecasts are those of `hf_lowrank.forecast_file`: that of a series
does not depend on the machine it is made on, nor on the series beside it. Needs `pip install "hf_lowrank[ray]"`.
"""

from __future__ import annotations

import argparse
from typing import Any

import pandas as pd
import pyarrow.csv
import ray


class Forecaster:
    """Loads the model once and forecasts one group of whole series after the other."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        from hf_lowrank import load_pipeline

        self.pipeline = load_pipeline(model, device=None, dtype="float32")
        self.options = options

    def __call__(self, group: pd.DataFrame) -> pd.DataFrame:
        from hf_lowrank import forecast_frame

        return forecast_frame(self.pipeline, group, **self.options)


def with_group(frame: pd.DataFrame, groups: int) -> pd.DataFrame:
    """A column `group` that is the same for all rows of a series."""
    return frame.assign(group=pd.util.hash_array(frame["item_id"].astype(str).to_numpy(dtype=object)) % groups)


def forecast(
    model: str,
    input: str,
    output: str,
    *,
    workers: int,
    groups: int,
    num_cpus: float,
    num_gpus: float,
    options: dict[str, Any],
) -> None:
    columns = ["item_id", "timestamp", "target"]
    if input.endswith(".csv"):
        text = pyarrow.csv.ConvertOptions(column_types={"item_id": pyarrow.string()}, include_columns=columns)
        table = ray.data.read_csv(input, convert_options=text)  # 007 stays 007
    else:
        table = ray.data.read_parquet(input, columns=columns)
    table = table.map_batches(with_group, batch_format="pandas", fn_kwargs={"groups": groups})
    forecasts = table.groupby("group", num_partitions=groups).map_groups(
        Forecaster,
        fn_constructor_args=(model, options),
        batch_format="pandas",
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=num_cpus,
        num_gpus=num_gpus,
    )
    forecasts.write_parquet(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder that every node can read, or a Hub id")
    parser.add_argument("input")
    parser.add_argument("output")
    parser.add_argument("--horizon", type=int)
    parser.add_argument("--freq", help="of the time stamps, such as h; by default each group's first series tells")
    parser.add_argument("--num-samples", type=int, help="of a Chronos-T5")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="copies of the model")
    parser.add_argument("--groups", type=int, default=64, help="each is in the memory of one worker at once")
    parser.add_argument("--num-cpus", type=float, default=1, help="of one worker; leave some for reading and sorting")
    parser.add_argument("--num-gpus", type=float, default=0, help="of one worker, such as 1 or 0.5")
    parser.add_argument("--local-cpus", type=int, help="of a Ray that is started here; default: all")
    arguments = vars(parser.parse_args())
    ray.init(num_cpus=arguments.pop("local_cpus"))
    own = {
        name: arguments.pop(name) for name in ("model", "input", "output", "workers", "groups", "num_cpus", "num_gpus")
    }
    forecast(**own, options=arguments)


if __name__ == "__main__":
    main()
