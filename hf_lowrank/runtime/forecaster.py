"""Forecasts of an exported model with numpy alone: no torch, transformers or chronos is imported.

On a server that runs an ONNX export, three packages are enough:

    pip install --no-deps hf-lowrank && pip install numpy onnxruntime wrapt
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .engines import engine_of
from .folder import ExportRecord, read_export

__all__ = ["Forecaster"]

Array = NDArray[np.float32]


class Forecaster:
    """An exported model that forecasts arrays.

    Args:
        folder: As `hf-lowrank export` wrote it.
        threads: Of the computation; by default as many as the engine chooses.
        record: What the folder says of itself; by default it is read and checked.

    Raises:
        OSError, ValueError: It is none, or it is damaged: see `read_export`.
        ImportError: What runs it is not installed.
    """

    def __init__(
        self, folder: str | os.PathLike, *, threads: int | None = None, record: ExportRecord | None = None
    ) -> None:
        self.record = record or read_export(folder)
        self.engine = engine_of(folder, self.record, threads=threads)

    def predict_quantiles(
        self,
        series: Sequence[ArrayLike],
        prediction_length: int | None = None,
        quantile_levels: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        *,
        batch_size: int = 256,
    ) -> Array:
        """Quantile forecasts of single series, each by itself.

        Args:
            series: 1-D, of any lengths, NaN where a value is missing. Of longer ones the last values are read.
            prediction_length: Steps to forecast; by default as many as one pass makes.
            quantile_levels: In (0, 1). Between those of the model they are interpolated.
            batch_size: Series in a pass.

        Returns:
            float32, (number of series, prediction_length, number of levels).

        Raises:
            ValueError: A series is empty or not 1-D; a level is outside those of the model; the horizon is longer than the model's own: for
                those use a Chronos pipeline (`hf_lowrank.load_pipeline`), which unrolls them.
        """
        record = self.record
        horizon = record.longest_horizon if prediction_length is None else prediction_length
        if not 1 <= horizon <= record.longest_horizon:
            raise ValueError(
                f"prediction_length must be in [1, {record.longest_horizon}], found {prediction_length}; "
                "hf_lowrank.load_pipeline unrolls longer horizons."
            )
        known = record.quantiles
        if not all(known[0] <= level <= known[-1] for level in quantile_levels):
            raise ValueError(f"quantile_levels must be in [{known[0]}, {known[-1]}], found {list(quantile_levels)}.")
        rows = [np.asarray(one, dtype=np.float32)[-record.context_length :] for one in series]
        for index, row in enumerate(rows):
            if row.ndim != 1 or not len(row):
                raise ValueError(f"series[{index}] must be 1-D and hold a value, found shape {row.shape}.")
        forecasts = [np.empty((0, horizon, len(known)), np.float32)]
        for first in range(0, len(rows), batch_size):
            batch = rows[first : first + batch_size]
            context = np.full((len(batch), max(map(len, batch))), np.nan, np.float32)
            for line, row in zip(context, batch):
                line[len(line) - len(row) :] = row
            forecasts.append(self.forecast(context, horizon)[..., :horizon].transpose(0, 2, 1))
        found = np.concatenate(forecasts)
        if self.record.family == "bolt" and not set(quantile_levels) <= set(known):
            # As chronos does it: the levels are taken to be evenly spaced, and the outer ones to stand for all beyond.
            padded = np.concatenate([found[..., :1], found, found[..., -1:]], axis=-1)
            return np.quantile(padded, quantile_levels, axis=-1).transpose(1, 2, 0).astype(np.float32)
        place = np.interp(quantile_levels, known, np.arange(len(known)))
        below, share = place.astype(int), (place % 1).astype(np.float32)
        return found[..., below] * (1 - share) + found[..., np.ceil(place).astype(int)] * share

    def forecast(
        self,
        context: Array,
        horizon: int,
        group_ids: NDArray[np.integer] | None = None,
        future: Array | None = None,
    ) -> Array:
        """One pass of the model.

        Args:
            context: (B, L), NaN where a value is missing.
            horizon: Steps to forecast, at most `record.longest_horizon`; rounded up to whole patches.
            group_ids: Of Chronos-2: which series are forecast together, (B,); by default each by itself.
            future: Of Chronos-2: what is known of the future, (B, any number of steps), NaN where nothing is.

        Returns:
            The model's own quantiles, float32 (B, Q, horizon in whole patches).
        """
        record = self.record
        context = _whole_patches(context[:, -record.context_length :], record.patch_size)
        if record.family == "bolt":
            return self.engine.run("forecast", {"context": context})
        steps = -(-horizon // record.output_patch_size) * record.output_patch_size
        known = np.full((len(context), steps), np.nan, np.float32)
        if future is not None:
            known[:, : future.shape[1]] = future[:, :steps]
        ids = np.arange(len(context)) if group_ids is None else group_ids
        _, group, sizes = np.unique(ids, return_inverse=True, return_counts=True)
        together = np.argsort(group, kind="stable")
        size_of = sizes[group[together]]
        quantiles = np.empty((len(context), len(record.quantiles), steps), np.float32)
        for size in np.unique(sizes):
            rows = together[size_of == size]
            inputs = {"context": context[rows], "future": known[rows]}
            if size == 1:
                quantiles[rows] = self.engine.run("alone", inputs)
            else:
                by_group = {name: values.reshape(-1, size, values.shape[1]) for name, values in inputs.items()}
                quantiles[rows] = self.engine.run("grouped", by_group).reshape(len(rows), -1, steps)
        return quantiles


def _whole_patches(context: Array, size: int) -> Array:
    """The context, float32, with missing values in front of it where it does not fill its patches."""
    return np.pad(
        context.astype(np.float32, copy=False), ((0, 0), (-context.shape[1] % size, 0)), constant_values=np.nan
    )
