"""Chronos time-series foundation models, small and fast: low-rank transformers that load like any other.

After `import hf_lowrank` the Auto classes of transformers and the Chronos pipelines know its models. The import itself loads neither:
the classes are registered (in `hf_lowrank.models`) when transformers or chronos is there, at once or as soon as somebody imports it.
Everything that the package offers is imported when it is first asked for: `hf_lowrank.compress_pretrained`, or
`from hf_lowrank import compress_pretrained`.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

if TYPE_CHECKING:  # what `_LAZY` says, for type checkers and editors
    from .analysis.analyze import Analysis, analyze
    from .analysis.plots import plot_analysis
    from .analysis.rank_callback import RankCallback
    from .benchmarking.benchmark import Benchmark, benchmark, benchmark_shape
    from .checkpoints.export import export_stock_t5, save_compressed
    from .checkpoints.pipelines import load_pipeline
    from .checkpoints.published import build_checkpoint
    from .checkpoints.summary import CompressionSummary, summarize
    from .compression.calibration import Calibration, calibrate
    from .compression.compress import compress_pretrained, loss_curve, plan_compression
    from .compression.settings import CompressionSettings
    from .data.groups import GroupedSeries
    from .data.series import read_series
    from .data.tokens import WindowCollator
    from .data.windows import SeriesWindows, held_out_ends
    from .evaluation.evaluate import evaluate
    from .evaluation.known_tasks import find_tasks, list_tasks
    from .evaluation.result import EvaluationResult
    from .evaluation.tasks import EvaluationTask, file_task
    from .experiments.demo import packaged_series
    from .experiments.sweep import SweepResult, sweep
    from .exporting.export import export_model
    from .forecasting.forecast import forecast_file, forecast_frame
    from .forecasting.plots import plot_forecasts
    from .hub.model_card import render_card
    from .hub.publish import Publication, PublicationPlan, plan_publication, publish
    from .hub.push import push_to_hub
    from .models.configuration_lowrank_chronos import LowRankChronos2Config, LowRankChronosBoltConfig
    from .models.configuration_lowrank_t5 import LowRankT5Config
    from .models.modeling_lowrank_chronos import LowRankChronos2Model, LowRankChronosBoltModelForForecasting
    from .models.modeling_lowrank_t5 import LowRankT5EncoderModel, LowRankT5ForConditionalGeneration, LowRankT5Model
    from .models.pipeline_lowrank_chronos import LowRankChronos2Pipeline, LowRankChronosBoltPipeline
    from .models.pipeline_lowrank_t5 import LowRankChronosPipeline
    from .training.distillation import recover
    from .training.pretraining import pretrain
    from .training.settings import PretrainingSettings

    __version__: str

__all__ = [
    "Analysis",
    "Benchmark",
    "Calibration",
    "CompressionSettings",
    "CompressionSummary",
    "EvaluationResult",
    "EvaluationTask",
    "GroupedSeries",
    "LowRankChronos2Config",
    "LowRankChronos2Model",
    "LowRankChronos2Pipeline",
    "LowRankChronosBoltConfig",
    "LowRankChronosBoltModelForForecasting",
    "LowRankChronosBoltPipeline",
    "LowRankChronosPipeline",
    "LowRankT5Config",
    "LowRankT5EncoderModel",
    "LowRankT5ForConditionalGeneration",
    "LowRankT5Model",
    "PretrainingSettings",
    "Publication",
    "PublicationPlan",
    "RankCallback",
    "SeriesWindows",
    "SweepResult",
    "WindowCollator",
    "__version__",
    "analyze",
    "benchmark",
    "benchmark_shape",
    "build_checkpoint",
    "calibrate",
    "compress_pretrained",
    "evaluate",
    "export_model",
    "export_stock_t5",
    "file_task",
    "find_tasks",
    "forecast_file",
    "forecast_frame",
    "held_out_ends",
    "list_tasks",
    "load_pipeline",
    "loss_curve",
    "packaged_series",
    "plan_compression",
    "plan_publication",
    "plot_analysis",
    "plot_forecasts",
    "pretrain",
    "publish",
    "push_to_hub",
    "read_series",
    "recover",
    "render_card",
    "save_compressed",
    "summarize",
    "sweep",
]

_LAZY = {
    ".analysis.analyze": ("Analysis", "analyze"),
    ".analysis.plots": ("plot_analysis",),
    ".analysis.rank_callback": ("RankCallback",),
    ".benchmarking.benchmark": ("Benchmark", "benchmark", "benchmark_shape"),
    ".checkpoints.export": ("export_stock_t5", "save_compressed"),
    ".checkpoints.pipelines": ("load_pipeline",),
    ".checkpoints.published": ("build_checkpoint",),
    ".checkpoints.summary": ("CompressionSummary", "summarize"),
    ".compression.calibration": ("Calibration", "calibrate"),
    ".compression.compress": ("compress_pretrained", "loss_curve", "plan_compression"),
    ".compression.settings": ("CompressionSettings",),
    ".data.groups": ("GroupedSeries",),
    ".data.series": ("read_series",),
    ".data.tokens": ("WindowCollator",),
    ".data.windows": ("SeriesWindows", "held_out_ends"),
    ".evaluation.evaluate": ("evaluate",),
    ".evaluation.known_tasks": ("find_tasks", "list_tasks"),
    ".evaluation.result": ("EvaluationResult",),
    ".evaluation.tasks": ("EvaluationTask", "file_task"),
    ".experiments.demo": ("packaged_series",),
    ".experiments.sweep": ("SweepResult", "sweep"),
    ".exporting.export": ("export_model",),
    ".forecasting.forecast": ("forecast_file", "forecast_frame"),
    ".forecasting.plots": ("plot_forecasts",),
    ".hub.model_card": ("render_card",),
    ".hub.publish": ("Publication", "PublicationPlan", "plan_publication", "publish"),
    ".hub.push": ("push_to_hub",),
    ".models.configuration_lowrank_chronos": ("LowRankChronos2Config", "LowRankChronosBoltConfig"),
    ".models.configuration_lowrank_t5": ("LowRankT5Config",),
    ".models.modeling_lowrank_chronos": ("LowRankChronos2Model", "LowRankChronosBoltModelForForecasting"),
    ".models.modeling_lowrank_t5": (
        "LowRankT5EncoderModel",
        "LowRankT5ForConditionalGeneration",
        "LowRankT5Model",
    ),
    ".models.pipeline_lowrank_chronos": ("LowRankChronos2Pipeline", "LowRankChronosBoltPipeline"),
    ".models.pipeline_lowrank_t5": ("LowRankChronosPipeline",),
    ".training.distillation": ("recover",),
    ".training.pretraining": ("pretrain",),
    ".training.settings": ("PretrainingSettings",),
}
_MODULE_OF = {name: module for module, names in _LAZY.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import what is asked for the first time."""
    value: Any
    if name == "__version__":
        from importlib.metadata import version

        value = version("hf-lowrank")
    elif name in _MODULE_OF:
        value = getattr(import_module(_MODULE_OF[name], __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _register(module: ModuleType) -> None:
    """Import `hf_lowrank.models`, which registers the classes, after transformers or chronos has been imported."""
    # chronos imports transformers: where it is only half there, it comes here at its own end.
    if module.__name__ == "chronos" or "chronos" not in sys.modules:
        import_module(f"{__name__}.models")
        if "chronos" in sys.modules:
            import_module(f"{__name__}.runtime.pipelines")


for _name in ("transformers", "chronos"):
    register_post_import_hook(_register, _name)


def _show_as_tables(module: ModuleType) -> None:
    """Show low-rank models in a notebook as the tables of their layers, once they are there."""
    shell = module.get_ipython()
    if shell is not None:
        formatter = shell.display_formatter.formatters["text/html"]
        for where, names in _LAZY.items():
            for name in names if ".modeling_" in where else ():
                formatter.for_type_by_name(f"{__name__}{where}", name, _table_of)


def _table_of(model: Any) -> str:
    from .checkpoints.summary import summarize

    return summarize(model)._repr_html_()


register_post_import_hook(_show_as_tables, "IPython")
