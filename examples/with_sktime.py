"""Forecast with a compressed checkpoint in sktime.

    python examples/with_sktime.py chronos-lowrank --horizon 24

`ChronosForecaster` takes the folder or Hub id of a compressed Chronos-T5 as its `model_path`, `Chronos2Forecaster` that of a compressed
Chronos-2; importing hf_lowrank is all that they need. Prints the forecast of the last months of the airline passengers that come with
sktime, beside what happened. Needs `pip install sktime`.
"""

from __future__ import annotations

from typing import Annotated

import pandas as pd
import torch
import typer
from sktime.datasets import load_airline
from sktime.forecasting.chronos import ChronosForecaster
from sktime.forecasting.chronos2 import Chronos2Forecaster
from transformers import AutoConfig

import hf_lowrank


def main(
    model: Annotated[str, typer.Argument(help="A compressed Chronos-T5 or Chronos-2: a folder or a Hub id.")],
    horizon: Annotated[int, typer.Option(help="Months to forecast.")] = 12,
) -> None:
    is_chronos2 = isinstance(AutoConfig.from_pretrained(model), hf_lowrank.LowRankChronos2Config)
    # sktime's default is bfloat16, slow on most CPUs; and it looks for chronos-forecasting by another name.
    options = {"config": {"torch_dtype": torch.float32}, "seed": 0, "ignore_deps": True}
    if is_chronos2:
        forecaster = Chronos2Forecaster(model, **options)
    else:
        forecaster = ChronosForecaster(model, use_source_package=True, **options)

    passengers = load_airline()
    forecaster.fit(passengers[:-horizon])
    forecast = forecaster.predict(fh=range(1, horizon + 1))
    print(pd.DataFrame({"passengers": passengers[-horizon:], "forecast": forecast.round()}))


if __name__ == "__main__":
    typer.run(main)
