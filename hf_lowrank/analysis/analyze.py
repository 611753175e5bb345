r"""The rank structure of a checkpoint: what its spectra say of embedding, hidden states, heads, and of compressing it.

    analysis = analyze("amazon/chronos-t5-small")
    print("\n".join(analysis.verdict))

The measures are those of arXiv 2510.03358: singular values and epsilon-ranks of the embedding, of the hidden states entering every
layer (flow-of-ranks), of the projections. What decides how far a layer can be compressed are, for each head, two products on
the data: with G = E[q q^T], E[k k^T], E[z z^T] of its queries, keys (centred within a sequence) and mixed values, the logits q^T k
have the singular values of G_q^1/2 G_k^1/2 and its part of the output, W_o z, those of W_o G_z^1/2. Without data those of
W_q^T W_k and W_o W_v stand in.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from ..checkpoints.connection import from_hub_or_cache
from ..checkpoints.dense import as_full_rank
from ..checkpoints.families import CHRONOS2
from ..checkpoints.loading import checkpoint_path, load_config, load_model, named_class, public_name
from ..progress import progress
from .activations import ActivationSums
from .attention_layers import AttentionLayer, find_attention
from .measured_bounds import measured_bounds
from .model_inputs import family_title, input_batches
from .result import Analysis
from .spectra import Spectrum
from .structures import StateStructure, VariateStructure, attention_structure

__all__ = ["analyze", "load_transformer"]

# Of Chronos-2: how many variates a group has, but where the number of variates itself is measured, and how many series that is
# measured on.
GROUP_SIZE, VARIATE_SERIES = 8, 128


def analyze(
    model: str | os.PathLike | PreTrainedModel,
    data: Any = "synthetic",
    *,
    num_series: int | None = None,
    context_length: int | None = None,
    variates: Sequence[int] = (),
    epsilon: float = 1e-2,
    seed: int = 0,
    show_progress: bool = False,
) -> Analysis:
    """Measure the rank structure of a checkpoint; nothing is compressed.

    Args:
        model: A Hub id, a folder, `"reference"`, or a loaded model: Chronos-T5, Chronos-Bolt, Chronos-2, dense or low-rank, or any
            other of transformers with known names of projections (`attention_layers.PROJECTION_NAMES`).
        data: `"synthetic"`; series of the user's, as `data.series.read_series` takes them; for a text model a .txt file or batches
            of tokens; None for the weights alone.
        num_series: Windows of data; by default enough for 4 d_model tokens, and 4,096 at least.
        context_length: Time steps of the longest window; by default 512, or 1,024 for a model that reads patches.
        variates: For Chronos-2: measure its group attention with this many variates in a group, for each number. All else is measured
            with groups of 8. Synthetic series of a group have common causes; those of the user are put together as they come.
        epsilon: The share of the largest singular value from which on the verdict, the tables and the pictures count one as part of
            the rank, in (0, 1).
        seed: The seed of the random numbers that synthetic series are made of, or that windows are drawn from the user's series with.
        show_progress: Whether to show progress bars on the standard error stream.

    Raises:
        ValueError: A model without known projections, weights that are not finite, data that the model cannot read, or an epsilon or
            numbers of variates that make no sense.
        OSError: There is no such checkpoint.
    """
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon must be in (0, 1), found {epsilon}.")
    loaded, source = load_transformer(model)
    family = family_title(loaded)
    _check_variates(variates, family=family, data=data)
    loaded = as_full_rank(loaded)
    layers = find_attention(loaded)
    activations, batches = ActivationSums(loaded, layers), []
    size: dict[str, Any] = {"context_length": context_length, "seed": seed}
    if data is not None:
        # A group attention that sees one variate at a time has nothing to choose from.
        group = GROUP_SIZE if family == CHRONOS2.title else 1
        tokenizer = _tokenizer(loaded, source, data)
        batches = input_batches(
            loaded, data, num_series=num_series, tokenizer=tokenizer, variates=group, related=group, **size
        )
        activations.run(list(progress(batches, "Running", show_progress)))
    structures = [
        attention_structure(layer, activations) for layer in progress(layers, "Measuring the attention", show_progress)
    ]
    states = tuple(
        StateStructure(name, total.count, total.spectrum(), total.spectrum(is_centred=True))
        for name, total in progress(activations.states.items(), "Measuring the states", show_progress)
    )
    bounds = measured_bounds(loaded, layers, structures, states, activations, batches[0]) if batches else ()
    groups: list[VariateStructure] = []
    for number in progress(variates, "Measuring groups", show_progress and len(variates) > 0):
        groups += _variate_structures(loaded, layers, data, number, largest=max(variates), **size)
    return Analysis(
        source=source,
        family=family,
        d_model=structures[0].d_model,
        parameters=sum(weight.numel() for weight in loaded.parameters()),
        embedding=_embedding_spectra(loaded, states, activations),
        states=states,
        attention=tuple(structures),
        variates=tuple(groups),
        bounds=bounds,
        settings={
            "data": None if data is None else data if data == "synthetic" else "given",
            "tokens": max((state.tokens for state in states), default=0),
            "seed": seed,
            "epsilon": epsilon,
        },
    )


def _check_variates(variates: Sequence[int], *, family: str, data: Any) -> None:
    """Raises ValueError where there is no group attention or nothing to measure it on, and for numbers that are not positive."""
    if variates and (family != CHRONOS2.title or data is None):
        raise ValueError(f"variates needs a Chronos-2 model and data, found a {family} model.")
    if bad := [number for number in variates if not isinstance(number, int) or number < 1]:
        raise ValueError(f"variates must be positive integers, found {bad[0]!r}.")


@from_hub_or_cache
def load_transformer(model: str | os.PathLike | PreTrainedModel) -> tuple[PreTrainedModel, str]:
    """The model in float32, and what it is called; weights are mapped from the file where it is in float32.

    Raises:
        ValueError: It is no model of transformers.
        OSError: There is no such checkpoint, or its files cannot be read.
    """
    if isinstance(model, PreTrainedModel):
        is_float = all(weight.dtype == torch.float32 for weight in model.parameters())
        loaded = model if is_float else copy.deepcopy(model).float()
        return loaded, public_name(model)
    if not isinstance(model, (str, os.PathLike)):
        raise ValueError(f"model must be a Hub id, a folder or a loaded model, found a {type(model).__name__}.")
    path, config = checkpoint_path(model), load_config(model)
    model_class = named_class(config)
    if model_class is not None:  # of one of our families
        loaded = load_model(model, [model_class], model_class.__name__, dtype=torch.float32)
    else:
        try:
            loaded = _model_class(config).from_pretrained(path, dtype=torch.float32, trust_remote_code=False)
        except OSError as error:
            raise OSError(f"model: the weights of {path} cannot be read ({error}).") from error
    return loaded.requires_grad_(False).eval(), public_name(path)


def _model_class(config: PreTrainedConfig) -> Any:
    """The class that a configuration of none of our families names: of transformers, or whatever the Auto classes know."""
    architecture = (getattr(config, "architectures", None) or [""])[0]
    named = getattr(transformers, architecture, None)
    if isinstance(named, type) and issubclass(named, PreTrainedModel):
        return named
    for mapping in (transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, transformers.MODEL_MAPPING):
        registered = mapping.get(type(config), ())
        for model_class in registered if isinstance(registered, tuple) else (registered,):
            if model_class.__name__ == architecture:
                return model_class
    return AutoModel


def _tokenizer(model: PreTrainedModel, source: str, data: Any) -> Any:
    """What makes `input_ids` and `attention_mask` of a list of texts; None where the data are no text file.

    Raises:
        ValueError: The checkpoint has no tokenizer.
    """
    if not isinstance(data, (str, os.PathLike)) or not str(data).endswith(".txt"):
        return None
    message = f"data: {source} has no tokenizer to read {data} with"
    try:
        tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path or source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{message} ({error}).") from error
    # Without files transformers makes one that knows special tokens alone.
    if set(tokenizer.get_vocab()) <= {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens, "\u2581"}:
        raise ValueError(f"{message}.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return lambda lines: tokenizer(lines, return_tensors="pt", padding=True, truncation=True, max_length=512)


def _embedding_spectra(
    model: PreTrainedModel, states: Sequence[StateStructure], activations: ActivationSums
) -> dict[str, Spectrum]:
    """The spectra of "vocabulary", "embedded patches" and "embedded data", as far as the model has them."""
    spectra = {}
    if "input_ids" in inspect.signature(model.forward).parameters:
        table = model.get_input_embeddings()
        if isinstance(table, nn.Embedding):
            spectra["vocabulary"] = Spectrum.of_matrix(table.weight)
    if "output" in activations.patches:
        spectra["embedded patches"] = activations.patches["output"].spectrum()
    if states:
        spectra["embedded data"] = states[0].spectrum
    return spectra


def _variate_structures(
    model: PreTrainedModel,
    layers: Sequence[AttentionLayer],
    data: Any,
    number: int,
    *,
    largest: int,
    context_length: int | None,
    seed: int,
) -> list[VariateStructure]:
    """The group attention with `number` variates in a group: the same series for every number, grouped in another way."""
    grouped = [layer for layer in layers if layer.kind == "group"]
    count = -(-VARIATE_SERIES // largest) * largest
    batches = input_batches(
        model, data, num_series=count, context_length=context_length, seed=seed, variates=number, related=largest
    )
    activations = ActivationSums(model, grouped)
    activations.run(batches)
    rows = []
    for layer in grouped:
        structure = attention_structure(layer, activations)
        rows.append(
            VariateStructure(
                variates=number,
                layer=layer.name,
                inputs=structure.inputs["query"],
                logits=structure.heads["logits"],
                outputs=structure.heads["outputs"],
            )
        )
    return rows
