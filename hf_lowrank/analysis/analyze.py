"""The rank structure of a checkpoint: what its spectra say of embedding, hidden states, heads, and of compressing it.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import chronos.chronos2
import chronos.chronos_bolt
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from ..checkpoints.dense import as_full_rank, checkpoint_path
from ..progress import progress
from ..published_figures import EPSILONS
from .activations import ActivationSums, evaluating
from .attention_layers import AttentionLayer, find_attention
from .measured_bounds import Bound, attention_bounds, embedding_bounds, flow_bounds
from .model_inputs import family_title, input_batches
from .report import verdict
from .spectra import Spectrum
from .structures import AttentionStructure, StateStructure, VariateStructure, attention_structure

__all__ = ["Analysis", "analyze", "load_model"]

# Chronos-2: how many variates a group has, but for `variates`, and how many series that one is measured on.
GROUP, VARIATE_SERIES = 8, 128


@dataclass(frozen=True)
class Analysis:
    """What `analyze` finds.

    Attributes:
        embedding: "vocabulary", "embedded data" and "embedded patches", as far as the model has them.
        states: Hidden states entering every layer and leaving each stack, in order.
        attention: Every attention layer, in order.
        settings: What data, how much of it, the seed, the epsilon of the verdict.
    """

    source: str
    family: str
    d_model: int
    parameters: int
    embedding: Mapping[str, Spectrum]
    states: tuple[StateStructure, ...]
    attention: tuple[AttentionStructure, ...]
    variates: tuple[VariateStructure, ...]
    bounds: tuple[Bound, ...]
    settings: Mapping[str, Any]

    @property
    def verdict(self) -> tuple[str, ...]:
        """How far the checkpoint can be compressed, which layers first, what it costs: five lines."""
        return verdict(self, self.settings["epsilon"])

    @property
    def attention_parameters(self) -> int:
        return sum(layer.parameters for layer in self.attention)

    def kept(self, epsilon: float) -> float:
        """The share of the attention parameters at the epsilon-ranks of the heads."""
        return sum(layer.kept(epsilon) for layer in self.attention) / self.attention_parameters

    def latent_kept(self, epsilon: float) -> float | None:
        """The same in the latent form, per_head where a layer has none; None where no layer has one."""
        sizes = [layer.latent_kept(epsilon) for layer in self.attention]
        if all(size is None for size in sizes):
            return None
        return (
            sum(layer.kept(epsilon) if size is None else size for layer, size in zip(self.attention, sizes))
            / self.attention_parameters
        )

    def to_dict(self) -> dict[str, Any]:
        """For programs: everything, singular values to six digits."""
        return {
            "source": self.source,
            "family": self.family,
            "d_model": self.d_model,
            "parameters": self.parameters,
            "attention_parameters": self.attention_parameters,
            "settings": dict(self.settings),
            "verdict": list(self.verdict),
            "kept": {
                f"{epsilon:.3g}": {"per_head": self.kept(epsilon), "latent": self.latent_kept(epsilon)}
                for epsilon in EPSILONS
            },
            "embedding": {name: spectrum.to_dict() for name, spectrum in self.embedding.items()},
            "states": [state.to_dict() for state in self.states],
            "attention": [layer.to_dict() for layer in self.attention],
            "variates": [row.to_dict() for row in self.variates],
            "bounds": [{**vars(bound), "details": dict(bound.details)} for bound in self.bounds],
        }


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
        data: `"synthetic"`; series of the user's, as `training.read_series` takes them; for a text model a .txt file or batches of tokens;
            None for the weights alone.
        num_series: Windows of data; by default enough for 4 d_model tokens, and 4,096 at least.
        context_length: Time steps of the longest window; by default 512, or 1,024 for a model that reads patches.
        variates: For Chronos-2: measure its group attention with this many variates in a group, for each number. All else is measured
            with groups of 8. Synthetic series of a group have common causes; those of the user are put together as they come.
        epsilon: That of the verdict.
        seed: Of the series and the windows.
        show_progress: Show progress bars.

    Raises:
        ValueError: A model without known projections, weights that are not finite, data that the model cannot read.
        OSError: There is no such checkpoint.
    """
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon must be in (0, 1), found {epsilon}.")
    loaded, source = load_model(model)
    family = family_title(loaded)
    if variates and (family != "chronos-2" or data is None):
        raise ValueError(f"variates needs a Chronos-2 model and data, found a {family} model.")
    if bad := [number for number in variates if not isinstance(number, int) or number < 1]:
        raise ValueError(f"variates must be positive integers, found {bad[0]!r}.")
    loaded = as_full_rank(loaded)
    layers = find_attention(loaded)
    activations, batches, bounds = ActivationSums(loaded, layers), [], []
    if data is not None:
        size: dict[str, Any] = {"context_length": context_length, "seed": seed}
        # A group attention that sees one variate at a time has nothing to choose from.
        group = GROUP if family == "chronos-2" else 1
        reader = _tokenizer(loaded, source, data)
        batches = input_batches(
            loaded, data, num_series=num_series, tokenizer=reader, variates=group, related=group, **size
        )
        activations.run(list(progress(batches, "Running", show_progress)))
    structures = [
        attention_structure(layer, activations) for layer in progress(layers, "Measuring the attention", show_progress)
    ]
    states = tuple(
        StateStructure(name, total.count, total.spectrum(), total.spectrum(is_centred=True))
        for name, total in progress(activations.states.items(), "Measuring the states", show_progress)
    )
    if data is not None:
        with evaluating(loaded):
            bounds = [
                *embedding_bounds(loaded, activations),
                *attention_bounds(layers, structures, activations, batches[0]),
                *flow_bounds(layers, structures, states, activations),
            ]
    groups: list[VariateStructure] = []
    for number in progress(variates, "Measuring groups", show_progress and len(variates) > 0):
        groups += _variates(loaded, layers, data, number, largest=max(variates), **size)
    tokens = max((state.tokens for state in states), default=0)
    return Analysis(
        source=source,
        family=family,
        d_model=structures[0].d_model,
        parameters=sum(weight.numel() for weight in loaded.parameters()),
        embedding=_embedding(loaded, states, activations),
        states=states,
        attention=tuple(structures),
        variates=tuple(groups),
        bounds=tuple(bounds),
        settings={
            "data": None if data is None else data if data == "synthetic" else "given",
            "tokens": tokens,
            "seed": seed,
            "epsilon": epsilon,
        },
    )


def load_model(model: str | os.PathLike | PreTrainedModel) -> tuple[PreTrainedModel, str]:
    """The model in float32, and what it is called; weights are mapped from the file where it is in float32.

    Raises:
        ValueError: It is no model of transformers.
        OSError: There is no such checkpoint, or its files cannot be read.
    """
    if isinstance(model, PreTrainedModel):
        is_float = all(weight.dtype == torch.float32 for weight in model.parameters())
        loaded = model if is_float else copy.deepcopy(model).float()
        return loaded, model.config.name_or_path or type(model).__name__
    if not isinstance(model, (str, os.PathLike)):
        raise ValueError(f"model must be a Hub id, a folder or a loaded model, found a {type(model).__name__}.")
    path = checkpoint_path(model)
    try:
        config = AutoConfig.from_pretrained(path)
        architecture = (getattr(config, "architectures", None) or [""])[0]
        loaded = _class(architecture).from_pretrained(path, dtype=torch.float32)
    except OSError as error:
        raise OSError(f"model: {path} is no folder and no Hub id that can be read ({error}).") from error
    source = os.path.basename(os.path.normpath(path)) if os.path.isdir(path) else path
    return loaded.requires_grad_(False).eval(), source


def _class(architecture: str) -> Any:
    """The class that a configuration names: of transformers, of Chronos, or whatever the Auto classes know."""
    for home in (transformers, chronos.chronos_bolt, chronos.chronos2):
        if hasattr(home, architecture):
            return getattr(home, architecture)
    for mapping in (transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, transformers.MODEL_MAPPING):
        for classes in mapping.values():
            for cls in classes if isinstance(classes, tuple) else (classes,):
                if cls.__name__ == architecture:
                    return cls
    return AutoModel


def _tokenizer(model: PreTrainedModel, source: str, data: Any) -> Any:
    if not isinstance(data, (str, os.PathLike)) or not str(data).endswith(".txt"):
        return None
    from transformers import AutoTokenizer

    message = f"data: {source} has no tokenizer to read {data} with"
    try:
        tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path or source)
    except (OSError, ValueError) as error:
        raise ValueError(f"{message} ({error}).") from error
    # Without files transformers makes one that knows special tokens alone.
    if set(tokenizer.get_vocab()) <= {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens, "\u2581"}:
        raise ValueError(f"{message}.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return lambda lines: tokenizer(lines, return_tensors="pt", padding=True, truncation=True, max_length=512)


def _embedding(
    model: PreTrainedModel, states: Sequence[StateStructure], activations: ActivationSums
) -> dict[str, Spectrum]:
    found = {}
    if "input_ids" in inspect.signature(model.forward).parameters:
        table = model.get_input_embeddings()
        if isinstance(table, nn.Embedding):
            found["vocabulary"] = Spectrum.of_matrix(table.weight)
    if "output" in activations.patches:
        found["embedded patches"] = activations.patches["output"].spectrum()
    if states:
        found["embedded data"] = states[0].spectrum
    return found


def _variates(
    model: PreTrainedModel,
    layers: Sequence[AttentionLayer],
    data: Any,
    number: int,
    *,
    largest: int,
    context_length: int | None,
    seed: int,
) -> list[VariateStructure]:
    """The same series for every number of variates; only how they are grouped differs."""
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
