"""The pipeline of compressed Chronos-T5 checkpoints: chronos' own, on the decode loop of `decoding`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

try:
    from chronos import BaseChronosPipeline, ChronosConfig, ChronosPipeline
    from chronos.chronos import ChronosModel
except ImportError as error:
    raise ImportError("Chronos models need the package chronos: pip install chronos-forecasting") from error

from .checked_loading import load_checked
from .checked_settings import check_chronos_settings, check_settings
from .decoding import Sampling, check_names, sample_paths

# What a generation config may hold and the loop still do the same as `generate`.
UNDERSTOOD = {"decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id"}
UNDERSTOOD |= {"do_sample", "temperature", "top_k", "top_p", "num_return_sequences"}
UNDERSTOOD |= {"max_length", "max_new_tokens", "min_length", "min_new_tokens"}
UNDERSTOOD |= {"use_cache", "cache_implementation", "transformers_version", "_from_model_config"}


class LowRankChronosModel(ChronosModel):
    """chronos' model, drawing its sample paths with `sample_paths` in place of `generate`."""

    def __init__(self, config: Any, model: Any) -> None:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        if not isinstance(model, T5ForConditionalGeneration) and model_type != "lowrank_t5":
            raise TypeError(f"model must be a Chronos-T5, dense or low-rank, found {type(model).__name__}.")
        check_names(model)
        super().__init__(config=config, model=model)
        self.generators: list[torch.Generator] | None = None  # of the series of the forecast under way

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        prediction_length: int | None = None,
        num_samples: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> torch.Tensor:
        """Tokens (B, T) and where they are none of padding -> sample paths (B, num_samples, prediction_length).

        What is None is as the checkpoint has it. A model that is not `is_whole` forecasts with `generate`: as ever, only later.
        """
        if not is_whole(self.model):
            if self.generators is not None:
                raise ValueError(
                    "seeds: a model that is spread over devices, offloaded or hooked cannot draw with them."
                )
            return super().forward(
                input_ids, attention_mask, prediction_length, num_samples, temperature, top_k, top_p
            )
        config = self.config
        return sample_paths(
            self.model,
            input_ids,
            attention_mask,
            num_samples=config.num_samples if num_samples is None else num_samples,
            steps=config.prediction_length if prediction_length is None else prediction_length,
            start=start_token(self.model),
            sampling=Sampling(
                temperature=config.temperature if temperature is None else temperature,
                top_k=config.top_k if top_k is None else top_k,
                top_p=config.top_p if top_p is None else top_p,
                # As many tokens are drawn as there are time steps, so a sequence does not end before.
                forbidden=(config.eos_token_id,),
            ),
            generators=self.generators,
        )


def is_whole(model: PreTrainedModel) -> bool:
    """Whether all weights are on one device, and no hook stands before or after a module that could change what it does.

    The loop reads weights past `forward`, where accelerate would fetch what it offloaded and a user's hook would look on.
    """
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or torch.device("meta") in devices:
        return False
    for module in model.modules():
        # `generate` leaves accelerate's AlignDevicesHook on an encoder. Without meta tensors it only moves inputs.
        hook = getattr(module, "_hf_hook", None)
        if any(type(part).__name__ not in ("AlignDevicesHook", "NoneType") for part in getattr(hook, "hooks", [hook])):
            return False
        # transformers leaves its own behind when states or attentions of a dense model are asked for; they do nothing else.
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if any(hook.__module__ != "transformers.utils.output_capturing" for hook in hooks):
            return False
    return True


def start_token(model: PreTrainedModel) -> int:
    """The token that paths start from; a ValueError where `generate` would do more than draw with temperature, top-k, top-p."""
    generation: GenerationConfig = model.generation_config
    given = {name for name, value in generation.to_diff_dict().items() if value is not None and value is not False}
    if unknown := sorted(given - UNDERSTOOD):
        raise ValueError(
            f"generation_config: {', '.join(unknown)} is not what LowRankChronosPipeline draws samples with; "
            "leave it out, or forecast with chronos.ChronosPipeline."
        )
    for config in (generation, model.config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            if (token := getattr(config, name, None)) is not None:
                return token
    raise ValueError("generation_config: decoder_start_token_id must be an integer, found None.")


class LowRankChronosPipeline(ChronosPipeline):
    """Forecasts of a Chronos-T5, dense or low-rank, with the same distribution as [`~chronos.ChronosPipeline`]'s, sooner.

    The sample paths of a series are a Latin hypercube of it: quantiles over 20 of them are as good as over 50 of ChronosPipeline's.

    `BaseChronosPipeline.from_pretrained` chooses it for low-rank checkpoints; for a dense one call its own
    `from_pretrained`. Everything that ChronosPipeline can do, it can.
    """

    def __init__(self, tokenizer: Any, model: ChronosModel) -> None:
        super().__init__(tokenizer, LowRankChronosModel(model.config, model.model))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> BaseChronosPipeline:
        """Load from a folder, the Hub or S3, with the arguments of `AutoModelForSeq2SeqLM.from_pretrained`.

        Raises:
            ValueError: The model is no Chronos-T5, dense or low-rank, or an incomplete or damaged one.
            OSError: There is no such checkpoint, or its files cannot be read.
        """
        name = pretrained_model_name_or_path
        if str(name).startswith("s3://"):
            return super().from_pretrained(name, *args, **kwargs)
        # Whether the checkpoint's own code may run is for the caller to say, and not asked.
        kwargs.setdefault("trust_remote_code", False)
        config = AutoConfig.from_pretrained(name, **kwargs)
        try:
            if config.model_type not in ("t5", "lowrank_t5"):
                raise ValueError(f"it must hold a Chronos-T5, found a model of type {config.model_type!r}.")
            settings: Any = getattr(config, "chronos_config", None)
            check_chronos_settings(settings, "t5")
            check_settings(config, "t5")
        except ValueError as error:
            raise ValueError(f"{name}: config.json: {error}") from error
        load = AutoModelForSeq2SeqLM.from_pretrained
        # A dense model does not look at its weights by itself.
        model = load_checked(load, name, *args, **kwargs) if type(config) is T5Config else load(name, *args, **kwargs)
        chronos_config = ChronosConfig(**settings)
        return cls(chronos_config.create_tokenizer(), ChronosModel(chronos_config, model))

    def predict(self, inputs: Any, *args: Any, seeds: Sequence[int] | None = None, **kwargs: Any) -> torch.Tensor:
        """[`chronos.ChronosPipeline.predict`], with `seeds`, one integer in [0, 2**64) a series.

        Its samples then depend neither on the other series of the batch nor on PyTorch's random state.
        """
        if seeds is None:
            return super().predict(inputs, *args, **kwargs)
        count = len(inputs) if isinstance(inputs, list) or inputs.ndim > 1 else 1
        if len(seeds) != count:
            raise ValueError(f"seeds must hold one integer for each of the {count} series, found {len(seeds)}.")
        self.model.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        try:
            return super().predict(inputs, *args, **kwargs)
        finally:
            self.model.generators = None


__all__ = ["LowRankChronosPipeline"]
