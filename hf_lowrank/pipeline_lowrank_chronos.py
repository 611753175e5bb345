"""Chronos pipelines for low-rank models: the stock ones, with models found by the Auto classes."""

from __future__ import annotations

from types import FunctionType
from typing import Any

from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

try:
    from chronos import BaseChronosPipeline, Chronos2Pipeline, ChronosBoltPipeline
except ImportError as error:
    raise ImportError("Chronos models need the package chronos: pip install chronos-forecasting") from error


def load_model(name: Any, *args: Any, model_type: str, **kwargs: Any) -> PreTrainedModel:
    """The model of a folder or Hub id through AutoModel, after a look at its `model_type`."""
    found = AutoConfig.from_pretrained(name, **kwargs).model_type
    if found != model_type:
        raise ValueError(
            f"{name} must hold a model of type {model_type!r}, found {found!r}; "
            "BaseChronosPipeline.from_pretrained chooses the pipeline by itself."
        )
    return AutoModel.from_pretrained(name, *args, **kwargs)


class LowRankChronosBoltPipeline(ChronosBoltPipeline):
    """[`chronos.ChronosBoltPipeline`] of a low-rank Chronos-Bolt."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> BaseChronosPipeline:
        """Load from a folder, the Hub or S3, with the arguments of `AutoModel.from_pretrained`.

        Raises:
            ValueError: The model is not a low-rank Chronos-Bolt.
        """
        if str(pretrained_model_name_or_path).startswith("s3://"):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        return cls(load_model(pretrained_model_name_or_path, *args, model_type="lowrank_chronos_bolt", **kwargs))


class LowRankChronos2Pipeline(Chronos2Pipeline):
    """[`chronos.Chronos2Pipeline`] of a low-rank Chronos-2."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> BaseChronosPipeline:
        """Load from a folder, the Hub or S3, with the arguments of `AutoModel.from_pretrained`; a LoRA adapter is merged.

        Raises:
            ValueError: The model, or the one below the adapter, is not a low-rank Chronos-2.
            ImportError: It is an adapter, and the package peft is missing.
        """
        name = pretrained_model_name_or_path
        if str(name).startswith("s3://"):
            return super().from_pretrained(name, *args, **kwargs)
        if find_adapter_config_file(name) is None:
            return cls(load_model(name, *args, model_type="lowrank_chronos2", **kwargs))
        try:
            from peft import PeftConfig, PeftModel
        except ImportError as error:
            raise ImportError(f"{name} is a LoRA adapter and needs the package peft: pip install peft") from error
        below = PeftConfig.from_pretrained(name).base_model_name_or_path
        model = load_model(below, *args, model_type="lowrank_chronos2", **kwargs)
        return cls(PeftModel.from_pretrained(model, name).merge_and_unload())

    def fit(self, *args: Any, **kwargs: Any) -> LowRankChronos2Pipeline:
        """Fine-tune a copy of the model; see [`chronos.Chronos2Pipeline.fit`] for the arguments.

        A `chronos.Chronos2Pipeline` that holds a low-rank model forecasts with it but cannot fine-tune it.
        """
        # The stock method makes its copy with the Chronos2Model, and its result with the Chronos2Pipeline, that it finds
        # among the globals of its module. This is the same code with globals of its own; the module stays as it is.
        stock = Chronos2Pipeline.fit
        names = {**stock.__globals__, "Chronos2Model": type(self.model), "Chronos2Pipeline": type(self)}
        fit = FunctionType(stock.__code__, names, stock.__name__, stock.__defaults__, stock.__closure__)
        fit.__kwdefaults__ = stock.__kwdefaults__
        tuned = fit(self, *args, **kwargs)
        tuned.model.eval()  # the trainer leaves dropout on, and `predict` does not turn it off
        return tuned


__all__ = ["LowRankChronos2Pipeline", "LowRankChronosBoltPipeline"]
