"""Writing models: low-rank ones as they are, and those of one rank as plain T5 checkpoints."""

from __future__ import annotations

import os

from transformers import PreTrainedModel, T5Config

from ..files import new_folder
from ..models.configuration_lowrank_t5 import ATTENTION_KINDS, attention_form
from .dense import build_model
from .families import T5
from .summary import summarize

__all__ = ["export_stock_t5", "save_compressed"]


def save_compressed(model: PreTrainedModel, output: str | os.PathLike, *, overwrite: bool = False) -> None:
    """`model.save_pretrained(output)`, all or nothing: the folder appears when it is complete.

    Raises:
        FileExistsError: `output` exists and is not empty, and `overwrite` is false.
    """
    with new_folder(output, overwrite=overwrite) as folder:
        model.save_pretrained(folder)


def export_stock_t5(model: PreTrainedModel, output: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Save a low-rank T5 as a plain T5 checkpoint that needs no hf_lowrank, where its shape allows it.

    Raises:
        ValueError: The layers do not all have one head dimension qk = vo and one feed-forward width, or one of them has a
            latent or thin factors. Compress with `uniform=` for a model that can be exported.
        FileExistsError: `output` exists and is not empty, and `overwrite` is false.
    """
    config = model.config
    stock = {lowrank: dense for dense, lowrank in T5.classes.items()}.get(type(model))
    if stock is None:
        raise ValueError(f"model must be a low-rank T5, found {type(model).__name__}.")
    rows = summarize(config).rows
    attention = {tuple(sorted(row.ranks.items())) for row in rows if row.kind in ATTENTION_KINDS}
    feed_forward = {tuple(row.ranks.values()) for row in rows if row.kind not in ATTENTION_KINDS}
    ranks = dict(next(iter(attention)))
    if len(attention) > 1 or attention_form(ranks) == "latent" or ranks["qk"] != ranks["vo"]:
        raise ValueError(
            "model: a stock T5 has one head dimension in all layers, this one does not; compress with uniform=RANK."
        )
    if len(feed_forward) > 1 or rows[-1].ranks["wi"] is not None or rows[-1].ranks["wo"] is not None:
        raise ValueError("model: a stock T5 has one feed-forward width in all layers and no thin factors.")
    values = config.to_dict() | {"d_kv": ranks["qk"], "d_ff": rows[-1].ranks["width"]}
    own = ("attention_ranks", "feed_forward_ranks", "chronos_pipeline_class")
    for name in ("model_type", "architectures", "auto_map", *own):
        values.pop(name, None)
    exported = build_model(
        stock,
        T5Config(**values),
        model.state_dict(),
        tied_keys=model.all_tied_weights_keys,
        generation_config=getattr(model, "generation_config", None),
    )
    with new_folder(output, overwrite=overwrite) as folder:
        exported.save_pretrained(folder)
