"""Forecast with compressed checkpoints in AutoGluon-TimeSeries.

    python examples/with_autogluon.py climate --horizon 12

`Chronos` takes the folder or Hub id of a compressed Chronos-T5 or Chronos-Bolt as its `model_path`, `Chronos2` that of a compressed
Chronos-2; importing hf_lowrank is all that they need, here and where the saved predictor is loaded again. Compresses the two checkpoints
that ship with the package, lets AutoGluon compare them on the monthly series that ship with it too, and prints its leaderboard and the
winner's forecast. Everything is kept in FOLDER. Offline. Needs `pip install autogluon.timeseries`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from autogluon.timeseries import TimeSeriesDataFrame, TimeSeriesPredictor

from hf_lowrank import compress_pretrained, packaged_series


def main(
    folder: Annotated[Path, typer.Argument(help="Where the compressed checkpoints and the predictor are written.")],
    horizon: Annotated[int, typer.Option(help="Months to forecast.")] = 12,
    ratio: Annotated[float, typer.Option(help="Share of the attention parameters to keep.")] = 0.5,
) -> None:
    checkpoints = [folder.absolute() / name for name in ("reference", "reference-bolt")]
    for checkpoint in checkpoints:
        compress_pretrained(checkpoint.name, ratio=ratio, calibration=None).save_pretrained(checkpoint)

    series = packaged_series()
    monthly = TimeSeriesDataFrame.from_data_frame(series[series["item_id"].str.endswith("monthly")])

    predictor = TimeSeriesPredictor(prediction_length=horizon, path=folder / "predictor", verbosity=1)
    # The predictor remembers the path and not the weights. Their dtype, bfloat16, is slow on most CPUs.
    models = [{"model_path": str(checkpoint), "torch_dtype": "float32"} for checkpoint in checkpoints]
    predictor.fit(monthly, hyperparameters={"Chronos": models}, enable_ensemble=False)
    print(predictor.leaderboard()[["model", "score_val", "pred_time_val"]].to_string(index=False))
    print(predictor.predict(monthly)[["0.1", "0.5", "0.9"]].to_string(float_format="%.2f"))


if __name__ == "__main__":
    typer.run(main)
