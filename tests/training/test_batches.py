"""What a run is trained on: of groups whole ones, or their targets where the model reads no groups."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from chronos_models import dense_bolt, dense_chronos2
from torch.testing import assert_close

from hf_lowrank import GroupedSeries
from hf_lowrank.training.batches import run_data


@pytest.fixture
def series() -> GroupedSeries:
    """Seven items, each of two targets and a known covariate."""
    rng = np.random.default_rng(0)
    parts = [
        pd.DataFrame({"item_id": i, "timestamp": pd.date_range("2024-01-01", periods=60)}).assign(
            **{name: rng.normal(size=60) for name in ("a", "b", "known")}
        )
        for i in range(7)
    ]
    return GroupedSeries(pd.concat(parts), ["a", "b"], known_covariates=["known"])


SIZES = {"evaluation_batches": 2, "seed": 0, "batch_tokens": 100}


def test_a_chronos_2_is_trained_on_whole_groups_and_scored_on_their_ends(series):
    model = dense_chronos2()
    data = run_data(model.config, series, 4, **SIZES)
    assert len(data.batches) == 4
    assert len(data.series) == 21
    assert data.num_held_out_windows == sum(len(batch["context"]) // 3 for batch in data.held_out)
    assert len(data.held_out) == 2
    batches = [data.batches[i] for i in range(4)]
    for batch in (*batches, *data.held_out):
        rows = torch.arange(len(batch["context"]))
        assert torch.equal(batch["group_ids"], rows // 3)
        assert torch.equal(~batch["future_target"].isnan().all(dim=1), rows % 3 < 2)
        assert torch.equal(~batch["future_covariates"].isnan().all(dim=1), rows % 3 == 2)
        assert torch.isfinite(model(**batch).loss)
    ends = torch.cat([batch["future_target"].flatten() for batch in data.held_out])
    seen = torch.cat([batch[name].flatten() for batch in batches for name in ("context", "future_target")])
    assert not torch.isin(seen, ends[~ends.isnan()]).any()


def test_to_others_the_targets_are_plain_series(series):
    config = dense_bolt().config
    with pytest.warns(UserWarning, match="a Chronos-Bolt reads every series alone, so each of 14 targets"):
        data = run_data(config, series, 2, **SIZES)
    plain = run_data(config, series.targets, 2, **SIZES)
    assert_close([data.batches[i] for i in range(2)], [plain.batches[i] for i in range(2)], equal_nan=True)
    assert_close(list(data.held_out), list(plain.held_out), equal_nan=True)
