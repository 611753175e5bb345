"""T5 models whose attention and feed-forward layers have ranks of their own.

The whole forward pass is here and in `modeling_lowrank_stack`, `_blocks` and `_layers`, over the public surface of transformers alone, so that a saved
checkpoint runs with whatever version the loading machine has. Names of parameters are T5's. Shapes: B batch, S queries,
T keys, d d_model, n heads, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutput,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)

from .configuration_lowrank_t5 import LowRankT5Config
from .modeling_lowrank_layers import (
    matrix,
)
from .modeling_lowrank_stack import (
    CACHE_FIELD,
    LowRankT5PreTrainedModel,
    LowRankT5Stack,
    build_stacks,
    either_cache,
    embedding,
)


class LowRankT5Model(LowRankT5PreTrainedModel):
    """The bare encoder-decoder, with the arguments and outputs of [`~transformers.T5Model`]."""

    _tied_weights_keys = {  # noqa: RUF012
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    }
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]  # noqa: RUF012

    def __init__(self, config: LowRankT5Config) -> None:
        super().__init__(config)
        self.shared = embedding(config)
        build_stacks(self, config)
        self.quantize_modules()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.shared

    def set_input_embeddings(self, new_embeddings: nn.Module) -> None:
        self.shared = new_embeddings
        self.encoder.set_input_embeddings(new_embeddings)
        self.decoder.set_input_embeddings(new_embeddings)

    def forward(  # noqa: PLR0913 the arguments are transformers'
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """Tokens (B, T) and decoder tokens (B, S) -> `last_hidden_state` (B, S, d); see [`LowRankT5Stack`] for the arguments."""
        return_dict = self.config.return_dict if return_dict is None else return_dict
        recorded = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids, attention_mask, inputs_embeds=inputs_embeds, return_dict=True, **recorded
            )
        elif isinstance(encoder_outputs, (tuple, list)):
            encoder_outputs = BaseModelOutput(*encoder_outputs)
        decoder_outputs = self.decoder(
            decoder_input_ids,
            decoder_attention_mask,
            inputs_embeds=decoder_inputs_embeds,
            encoder_hidden_states=encoder_outputs[0],
            encoder_attention_mask=attention_mask,
            cache=either_cache(cache, past_key_values),
            use_cache=use_cache,
            return_dict=True,
            **recorded,
        )
        output = Seq2SeqModelOutput(
            last_hidden_state=decoder_outputs.last_hidden_state,
            decoder_hidden_states=decoder_outputs.hidden_states,
            decoder_attentions=decoder_outputs.attentions,
            cross_attentions=decoder_outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
            **{CACHE_FIELD: decoder_outputs.get(CACHE_FIELD)},
        )
        return output if return_dict else output.to_tuple()

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """What the decoder reads while it is taught the labels (B, S): the start token, and every label but the last."""
        if self.config.decoder_start_token_id is None:
            raise ValueError("config.decoder_start_token_id must be set where labels are given, found None.")
        shifted = labels.roll(1, dims=-1)
        shifted[..., 0] = self.config.decoder_start_token_id
        return shifted.masked_fill(shifted == -100, self.config.pad_token_id)


class LowRankT5ForConditionalGeneration(LowRankT5Model, GenerationMixin):
    """The encoder-decoder with a language-model head, as [`~transformers.T5ForConditionalGeneration`]."""

    _tied_weights_keys = LowRankT5Model._tied_weights_keys | {"lm_head.weight": "shared.weight"}
    _keys_to_ignore_on_load_unexpected = []  # noqa: RUF012
    # T5's loss is a mean over the labels of its own batch; `Trainer` is not to take it for one over all processes' batches.
    accepts_loss_kwargs = False

    def __init__(self, config: LowRankT5Config) -> None:
        PreTrainedModel.__init__(self, config)
        self.model_dim = config.d_model
        self.shared = embedding(config)
        build_stacks(self, config)
        self.lm_head = matrix(config.d_model, config.vocab_size, std=1.0)
        self.quantize_modules()
        self.post_init()

    def forward(  # type: ignore[override]  # noqa: PLR0913 the arguments are transformers'
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """Tokens (B, T) and decoder tokens (B, S), or labels in their place, -> `logits` (B, S, vocabulary) and the `loss`.

        The loss is the mean cross-entropy of the labels (B, S) other than -100. See [`LowRankT5Stack`] for the other arguments.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        outputs = super().forward(
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            encoder_outputs,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            cache=either_cache(cache, past_key_values),
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        hidden_states = outputs.last_hidden_state
        if self.config.scale_decoder_outputs:
            hidden_states = hidden_states * self.model_dim**-0.5
        logits = self.lm_head(hidden_states)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.to(logits.device).flatten())
        rest = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        output = Seq2SeqLMOutput(loss=loss, logits=logits, **rest)
        return output if return_dict else output.to_tuple()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', with keys and values of cross-attention once a series; see [`~transformers.GenerationMixin.generate`]."""
        # Up to transformers 5.14 a static cache is kept for the next call, whatever its number of series.
        self.__dict__.pop("_cache", None)
        return super().generate(*args, **kwargs)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **model_kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        # Stock `generate` repeats the encoder's output and its mask for every sample or beam. Cross-attention does without.
        once = {name: model_kwargs.pop(name) for name in ("encoder_outputs", "attention_mask") if name in model_kwargs}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=False, input_ids=input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | once

    def _reorder_cache(self, cache: Cache, beam_idx: torch.Tensor) -> Cache:
        # Beams of one series share its keys and values, and no beam moves to another series.
        cache.self_attention_cache.reorder_cache(beam_idx)
        return cache


class LowRankT5EncoderModel(LowRankT5PreTrainedModel):
    """The encoder alone, with the arguments and outputs of [`~transformers.T5EncoderModel`]."""

    _tied_weights_keys = {"encoder.embed_tokens.weight": "shared.weight"}  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^lm_head\."]  # noqa: RUF012

    def __init__(self, config: LowRankT5Config) -> None:
        config.use_cache = False
        config.is_encoder_decoder = False
        super().__init__(config)
        self.shared = embedding(config)
        self.encoder = LowRankT5Stack(config)
        self.quantize_modules()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.shared

    def set_input_embeddings(self, new_embeddings: nn.Module) -> None:
        self.shared = new_embeddings
        self.encoder.set_input_embeddings(new_embeddings)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Tokens (B, S) or embeddings (B, S, d) -> `last_hidden_state` (B, S, d); see [`LowRankT5Stack`] for the arguments."""
        return self.encoder(
            input_ids,
            attention_mask,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )


__all__ = ["LowRankT5EncoderModel", "LowRankT5ForConditionalGeneration", "LowRankT5Model"]
