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

from hf_lowrank import LowRankChronos2Config


def main(
    model: Annotated[str, typer.Argument(help="A compressed Chronos-T5 or Chronos-2: a folder or a Hub id.")],
    horizon: Annotated[int, typer.Option(help="Months to forecast.")] = 12,
) -> None:
    is_chronos2 = isinstance(AutoConfig.from_pretrained(model, trust_remote_code=False), LowRankChronos2Config)
    family = Chronos2Forecaster if is_chronos2 else ChronosForecaster
    # sktime's default, bfloat16, is slow on most CPUs.
    forecaster = family(model, config={"torch_dtype": torch.float32}, seed=0)

    passengers = load_airline()
    forecaster.fit(passengers[:-horizon])
    forecast = forecaster.predict(fh=range(1, horizon + 1))
    print(pd.DataFrame({"passengers": passengers[-horizon:], "forecast": forecast.round()}))


if __name__ == "__main__":
    typer.run(main)
