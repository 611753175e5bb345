"""The pipeline of compressed Chronos-T5 checkpoints: chronos' own, on the decode loop of `decoding`."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, T5ForConditionalGeneration

try:
    from chronos import ChronosPipeline
    from chronos.chronos import ChronosModel
except ImportError as error:
    raise ImportError("Chronos models need the package chronos: pip install chronos-forecasting") from error

from .decoding import Sampling, sample_paths

# What a generation config may hold and the loop still do the same as `generate`.
UNDERSTOOD = {"decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id"}
UNDERSTOOD |= {"do_sample", "temperature", "top_k", "top_p", "num_return_sequences"}
UNDERSTOOD |= {"max_length", "max_new_tokens", "min_length", "min_new_tokens"}
UNDERSTOOD |= {"use_cache", "cache_implementation", "transformers_version", "_from_model_config"}


class LowRankChronosModel(ChronosModel):
    """chronos' model, drawing its sample paths with `sample_paths` in place of `generate`."""

    def __init__(self, config: Any, model: Any) -> None:
        if not isinstance(model, T5ForConditionalGeneration):
            raise TypeError(f"model must be a Chronos-T5, dense or low-rank, found {type(model).__name__}.")
        super().__init__(config=config, model=model)

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

        What is None is as the checkpoint has it. A model that is spread over devices or offloaded forecasts with `generate`.
        """
        devices = {parameter.device for parameter in self.model.parameters()}
        if len(devices) > 1 or torch.device("meta") in devices:
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
        )


def start_token(model: T5ForConditionalGeneration) -> int:
    """The token that paths start from; a ValueError where `generate` would do more than draw with temperature, top-k, top-p."""
    generation: GenerationConfig = model.generation_config
    given = {name for name, value in generation.to_diff_dict().items() if value is not None and value is not False}
    if unknown := sorted(given - UNDERSTOOD):
        raise ValueError(
            f"generation_config: {', '.join(unknown)} is not what LowRankChronosPipeline draws samples with; "
            "leave it out, or forecast with chronos.ChronosPipeline."
        )
    for config in (generation, model.config):
        for token in (config.decoder_start_token_id, config.bos_token_id):
            if token is not None:
                return token
    raise ValueError("generation_config: decoder_start_token_id must be an integer, found None.")


class LowRankChronosPipeline(ChronosPipeline):
    """Forecasts of a Chronos-T5, dense or low-rank, with the same distribution as [`~chronos.ChronosPipeline`]'s, sooner.

    `BaseChronosPipeline.from_pretrained` chooses it for low-rank checkpoints; for a dense one call its own
    `from_pretrained`. Everything that ChronosPipeline can do, it can.
    """

    def __init__(self, tokenizer: Any, model: ChronosModel) -> None:
        super().__init__(tokenizer, LowRankChronosModel(model.config, model.model))


__all__ = ["LowRankChronosPipeline"]
