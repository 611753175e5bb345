"""The example for Ray Data forecasts what `forecast_file` does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hf_lowrank import forecast_file

pytest.importorskip("ray", reason="the example needs ray, which is an extra of its own: 79 MB, and seconds to start")

SCRIPT = Path(__file__).parents[2] / "examples" / "forecast_on_ray.py"


def test_ray_forecasts_what_forecast_file_does(tmp_path: Path, chronos_t5) -> None:
    """With samples, on one processor, and rows in any order."""
    chronos_t5.save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    frame = pd.concat(
        [
            pd.DataFrame(
                {
                    "item_id": f"{i:03}",
                    "timestamp": pd.date_range("2024-01-01", periods=12 + 5 * i, freq="D"),
                    "target": 10 + rng.normal(size=12 + 5 * i).cumsum(),
                }
            )
            for i in range(7)
        ]
    )
    frame.to_csv(tmp_path / "in.csv", index=False)
    frame.sample(frac=1, random_state=0).to_csv(tmp_path / "mixed.csv", index=False)
    forecast_file(tmp_path / "model", tmp_path / "in.csv", tmp_path / "out.parquet", horizon=4, seed=5, device="cpu")

    options = (
        "--horizon 4 --seed 5 --groups 3 --local-cpus 1 --num-cpus 0"  # all of one processor for what Ray does itself
    )
    environment = os.environ | {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [sys.executable, str(SCRIPT), *(str(tmp_path / name) for name in ("model", "mixed.csv", "ray"))]
    process = subprocess.run([*command, *options.split()], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    order = ["item_id", "timestamp"]
    found, wanted = (
        pd.read_parquet(tmp_path / name).sort_values(order, ignore_index=True) for name in ("ray", "out.parquet")
    )
    found["timestamp"] = found["timestamp"].astype(wanted["timestamp"].dtype)
    pd.testing.assert_frame_equal(found, wanted, check_dtype=False, rtol=1e-4, atol=1e-4)
    assert found["item_id"].nunique() == 7
