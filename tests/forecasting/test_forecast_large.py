"""Files larger than memory: what a forecast of a hundred thousand series, and of ten million rows, takes.

`pytest -m slow -n 0 -s tests/forecasting/test_forecast_large.py` prints the figures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("pyarrow")

SCRIPT = """
import json, resource, sys, time
sys.path.insert(0, sys.argv[1])
import torch
from chronos_models import bolt
from hf_lowrank import forecast_file
from hf_lowrank.checkpoints.pipelines import as_pipeline
from hf_lowrank.forecasting.forecast import import_pyarrow

def peak():  # MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

torch.manual_seed(0)
pipeline = as_pipeline(bolt())
small, path, output = sys.argv[2:]
forecast_file(pipeline, small, output + ".small.parquet", horizon=6)  # what libraries take once
before = peak()
start = time.perf_counter()
summary = forecast_file(pipeline, path, output, horizon=6, batch_size=256)
print(json.dumps({"seconds": time.perf_counter() - start, "before": before, "peak": peak(), **summary.to_dict()}))
"""


def write_series(path: Path, num_series: int, length: int) -> None:
    """Hourly series of so many steps, a few at a time."""
    times = pd.date_range("2024-01-01", periods=length, freq="h").strftime("%Y-%m-%d %H:%M:%S").to_numpy()
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        file.write("item_id,timestamp,target\n")
        for first in range(0, num_series, 1000):
            count = min(1000, num_series - first)
            values = rng.normal(10, 2, (count, length)).round(2)
            for number in range(count):
                rows = (f"series-{first + number:06},{time},{value}\n" for time, value in zip(times, values[number]))
                file.writelines(rows)


@pytest.mark.slow
@pytest.mark.parametrize(("num_series", "length"), [(100_000, 16), (59_524, 168)])
def test_a_forecast_of_many_series_takes_little_memory(tmp_path: Path, num_series: int, length: int) -> None:
    """No more than a few of its chunks beyond what a file of one chunk takes."""
    path, output = tmp_path / "in.csv", tmp_path / "out.parquet"
    write_series(tmp_path / "small.csv", 2000, length)
    write_series(path, num_series, length)
    tests = str(Path(__file__).parents[1])
    arguments = [tests, str(tmp_path / "small.csv"), str(path), str(output)]
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    print(
        f"\n{num_series:,} series, {figures['num_rows']:,} rows, {path.stat().st_size / 2**20:.0f} MiB: {figures['seconds']:.0f} s, "
        f"peak {figures['peak']:.0f} MiB of which {figures['before']:.0f} after a small file"
    )
    assert figures["num_rows"] == num_series * length
    assert figures["num_forecast_rows"] == 6 * num_series
    assert figures["peak"] - figures["before"] < 150
