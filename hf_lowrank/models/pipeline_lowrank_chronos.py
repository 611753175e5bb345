"""Chronos pipelines for low-rank models: the stock ones, with models found by the Auto classes."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

try:
    import chronos
    from chronos import BaseChronosPipeline, Chronos2Pipeline, ChronosBoltPipeline
except ImportError as error:
    raise ImportError("Chronos models need the package chronos: pip install chronos-forecasting") from error

from .decoding import NOT_FINITE


def load_model(name: Any, *args: Any, model_type: str, **kwargs: Any) -> PreTrainedModel:
    """The model of a folder or Hub id through AutoModel, after a look at its `model_type`; a dense Chronos-2 as one of ours at full rank."""
    # Whether the checkpoint's own code may run is for the caller to say, and not asked.
    kwargs.setdefault("trust_remote_code", False)
    config = AutoConfig.from_pretrained(name, **kwargs)
    if model_type == "lowrank_chronos2" and config.architectures == ["Chronos2Model"]:
        values, _ = PreTrainedConfig.get_config_dict(name, **kwargs)  # as they are: AutoConfig makes a T5's of them
        for key in ("model_type", "architectures", "transformers_version", "chronos_pipeline_class"):
            values.pop(key, None)
        kwargs["config"] = AutoConfig.for_model(model_type, **values)
    elif config.model_type != model_type:
        raise ValueError(
            f"{name} must hold a model of type {model_type!r}, found {config.model_type!r}; "
            "BaseChronosPipeline.from_pretrained chooses the pipeline by itself."
        )
    return AutoModel.from_pretrained(name, *args, **kwargs)


def holds_file(name: Any, file: str) -> bool:
    """Whether a folder or a Hub repository holds a file of this name. What cannot be reached, and is not in the cache, does not.

    A repository is asked once: the cache keeps the answer, also no, for the commit that was looked at last.
    """
    if os.path.isdir(name):
        return os.path.isfile(os.path.join(name, file))
    try:
        if (known := try_to_load_from_cache(str(name), file)) is not None:
            return isinstance(known, str)
        hf_hub_download(str(name), file)
    except (OSError, ValueError):
        return False  # if something is wrong with the name or the connection, the look for a model says what
    return True


def is_adapter(name: Any) -> bool:
    """Whether a folder or a Hub repository holds an adapter of peft; see `holds_file`."""
    return holds_file(name, "adapter_config.json")


COPYING = threading.Lock()  # held while a name of chronos' module is not what it was


@contextmanager
def chronos_copies_as(model_class: type[PreTrainedModel]) -> Iterator[None]:
    """Let the copy that `chronos.Chronos2Pipeline.fit` makes of its model, to train it, be one of `model_class`.

    It makes it as `Chronos2Model(config)`, whatever the class of its model, by a global name of its module. For the moment until that call
    the name stands for `model_class`. It is put back when the copy is made, so while that trains, chronos is as it was, and when `fit`
    raises before. Threads wait for each other's copy.

    Raises:
        RuntimeError: `fit` raised one without that call: it makes its copy in another way.
    """
    names = vars(sys.modules[Chronos2Pipeline.fit.__module__])
    copied = False
    with ExitStack() as changes:

        def copy(config: Any) -> PreTrainedModel:
            nonlocal copied
            copied = True
            changes.close()
            return model_class(config)

        changes.enter_context(COPYING)
        if "Chronos2Model" in names:
            changes.callback(names.__setitem__, "Chronos2Model", names["Chronos2Model"])
            names["Chronos2Model"] = copy
        try:
            yield
        except RuntimeError as error:  # such as the weights' that do not fit
            if copied:
                raise
            raise unknown_fit(model_class) from error


def unknown_fit(model_class: type[PreTrainedModel]) -> RuntimeError:
    return RuntimeError(
        f"Chronos2Pipeline.fit of chronos-forecasting {chronos.__version__} does not make its copy of the model as "
        f"Chronos2Model(config), so it cannot fine-tune a {model_class.__name__}; use chronos-forecasting 2.3 or a newer hf_lowrank."
    )


def finite(forecasts: Any) -> Any:
    """The forecasts, a tensor or a list of them; a ValueError where one is NaN or infinite, which chronos hands on."""
    for forecast in forecasts if isinstance(forecasts, list) else [forecasts]:
        if not torch.isfinite(forecast).all():
            raise ValueError(NOT_FINITE.format("forecasts"))
    return forecasts


class LowRankChronosBoltPipeline(ChronosBoltPipeline):
    """[`chronos.ChronosBoltPipeline`] of a low-rank Chronos-Bolt."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> BaseChronosPipeline:
        """Load from a folder, the Hub or S3, with the arguments of `AutoModel.from_pretrained`.

        Raises:
            ValueError: The model is not a low-rank Chronos-Bolt.
        """
        if str(pretrained_model_name_or_path).startswith("s3://"):
            return super().from_pretrained(
                pretrained_model_name_or_path, *args, **{"trust_remote_code": False} | kwargs
            )
        return cls(load_model(pretrained_model_name_or_path, *args, model_type="lowrank_chronos_bolt", **kwargs))

    def predict(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As [`chronos.ChronosBoltPipeline.predict`]; a forecast that is NaN or infinite is a ValueError."""
        return finite(super().predict(*args, **kwargs))


@contextmanager
def by_group(model: PreTrainedModel) -> Iterator[None]:
    """Let a low-rank Chronos-2 compute group attention inside each group alone, for as long as the block runs."""
    encoders = [module for module in model.modules() if hasattr(module, "by_group")]
    for encoder in encoders:
        encoder.by_group = True
    try:
        yield
    finally:
        for encoder in encoders:
            encoder.by_group = False


class LowRankChronos2Pipeline(Chronos2Pipeline):
    """[`chronos.Chronos2Pipeline`] of a low-rank Chronos-2: the same forecasts, group attention being computed inside each group alone.

    Chronos' own makes logits of every two series of a batch at every patch, and masks those of different groups; here the work grows with
    the number of groups, and a series that is a group of its own needs no queries, keys or logits. `BaseChronosPipeline.from_pretrained`
    chooses it for low-rank checkpoints; for a dense one call its own `from_pretrained`.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> BaseChronosPipeline:
        """Load from a folder, the Hub or S3, with the arguments of `AutoModel.from_pretrained`; a LoRA adapter is merged.

        Raises:
            ValueError: The model, or the one below the adapter, is no Chronos-2, dense or low-rank.
            ImportError: It is an adapter, and the package peft is missing.
        """
        name = pretrained_model_name_or_path
        if str(name).startswith("s3://"):
            return super().from_pretrained(name, *args, **{"trust_remote_code": False} | kwargs)
        if not is_adapter(name):
            return cls(load_model(name, *args, model_type="lowrank_chronos2", **kwargs))
        try:
            from peft import PeftConfig, PeftModel
        except ImportError as error:
            raise ImportError(f"{name} is a LoRA adapter and needs the package peft: pip install peft") from error
        below = PeftConfig.from_pretrained(name).base_model_name_or_path
        model = load_model(below, *args, model_type="lowrank_chronos2", **kwargs)
        return cls(PeftModel.from_pretrained(model, name).merge_and_unload())

    def predict(self, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
        """As [`chronos.Chronos2Pipeline.predict`]; a forecast that is NaN or infinite is a ValueError."""
        with by_group(self.model):
            return finite(super().predict(*args, **kwargs))

    def fit(self, *args: Any, **kwargs: Any) -> LowRankChronos2Pipeline:
        """Fine-tune a copy of the model; see [`chronos.Chronos2Pipeline.fit`] for the arguments.

        A `chronos.Chronos2Pipeline` that holds a low-rank model forecasts with it but cannot fine-tune it.

        Raises:
            RuntimeError: The installed chronos-forecasting makes its copy of the model in a way that is not known here.
        """
        model_class = type(self.model)
        with chronos_copies_as(model_class):
            tuned = super().fit(*args, **kwargs).model
        if not any(type(module) is model_class for module in tuned.modules()):  # the copy, or what adapters hold
            raise unknown_fit(model_class)
        tuned.eval()  # the trainer leaves dropout on, and `predict` does not turn it off
        return type(self)(tuned)


__all__ = ["LowRankChronos2Pipeline", "LowRankChronosBoltPipeline"]
