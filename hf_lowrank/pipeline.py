"""The pipeline of compressed Chronos-T5 checkpoints: chronos' own, on the decode loop of `decoding`."""

from __future__ import annotations

from typing import Any

import torch
from chronos import ChronosPipeline
from chronos.chronos import ChronosModel
from transformers import T5ForConditionalGeneration

from .decoding import Sampling, sample_paths

__all__ = ["LowRankChronosPipeline"]

# What a generation config may say and still mean what the loop does: draw a fixed number of tokens, one path at a time.
UNDERSTOOD = {
    "transformers_version", "_from_model_config", "decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id",
    "do_sample", "temperature", "top_k", "top_p", "num_return_sequences", "num_beams", "use_cache", "cache_implementation",
    "max_length", "max_new_tokens", "min_length", "min_new_tokens",
}  # fmt: skip


class LowRankChronosModel(ChronosModel):
    """chronos' model, drawing its sample paths with `sample_paths` in place of `generate`."""

    model: T5ForConditionalGeneration

    def __init__(self, config: Any, model: Any) -> None:
        if not isinstance(model, T5ForConditionalGeneration) or config.model_type != "seq2seq":
            raise TypeError(
                f"model must be a Chronos-T5, dense or low-rank (a T5ForConditionalGeneration), found {type(model).__name__}."
            )
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

        What is None is the checkpoint's own.
        """
        config, generation = self.config, self.model.generation_config
        self.check_generation_config()
        start = generation.decoder_start_token_id
        return sample_paths(
            self.model,
            input_ids,
            attention_mask,
            num_samples=config.num_samples if num_samples is None else num_samples,
            steps=config.prediction_length if prediction_length is None else prediction_length,
            start=self.model.config.decoder_start_token_id if start is None else start,
            sampling=Sampling(
                temperature=config.temperature if temperature is None else temperature,
                top_k=config.top_k if top_k is None else top_k,
                top_p=config.top_p if top_p is None else top_p,
                forbidden=(config.eos_token_id,),
            ),
        )
