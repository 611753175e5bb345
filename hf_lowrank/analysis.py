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
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import chronos.chronos2
import chronos.chronos_bolt
import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from .analysis_report import verdict
from .checkpoint import checkpoint_path, progress
from .configuration_lowrank_t5 import attention_parameters
from .probes import Feed, Probe, embedding_parts, family_of, feeds, forward, patch_embedding, returns_weights
from .projections import Attention, find_attention
from .rank_bounds import (
    embedding_rank_bound,
    residual_rank_bound,
    residual_spectrum_bound,
    truncated_attention_bound,
)
from .rank_structure import (
    EPSILONS,
    Alignment,
    Spectrum,
    StateSum,
    head_alignment,
    head_grams,
    joint_tail,
    largest_rank,
    product_spectra,
)

__all__ = ["Analysis", "AttentionStructure", "Bound", "StateStructure", "VariateStructure", "analyze", "load_model"]

EMBEDDING_EPSILONS = (1.0, 0.5, 0.25, 0.1)  # where the bound of the embedding is below d_model
VARIATE_SERIES = 128


@dataclass(frozen=True)
class StateStructure:
    """Hidden states at one point: their singular values over `tokens` tokens."""

    name: str
    tokens: int
    spectrum: Spectrum


@dataclass(frozen=True)
class AttentionStructure:
    """One attention layer.

    Attributes:
        name: Such as "cross.3".
        head_dims: "qk" and "vo", as the layer has them.
        weights: Spectra of the whole matrices "query", "key", "value" and "output".
        heads: The same of every head, the products "qk" (W_q^T W_k) and "vo" (W_o W_v), and on data "logits" and "outputs".
        alignment: Of the heads' row spaces (columns for "output"); None where a projection has one head.
        inputs: Of the states that queries and keys are made of, "query" and "key"; empty without data.
    """

    name: str
    kind: str
    layer: int
    d_model: int
    num_heads: int
    num_key_value_heads: int
    head_dims: Mapping[str, int]
    parameters: int
    is_rotary: bool
    is_latent: bool
    weights: Mapping[str, Spectrum]
    heads: Mapping[str, tuple[Spectrum, ...]]
    alignment: Mapping[str, Alignment | None]
    inputs: Mapping[str, Spectrum]

    def deciding(self, part: str) -> tuple[Spectrum, ...]:
        """The spectra that decide the rank "qk" or "vo": on the data, where there are data."""
        return self.heads.get({"qk": "logits", "vo": "outputs"}[part], self.heads[part])

    def ranks(self, epsilon: float) -> dict[str, int]:
        """The ranks of the per-head form at this epsilon: the largest of the heads, which share one."""
        return {part: largest_rank(self.deciding(part), epsilon) for part in ("qk", "vo")}

    def kept(self, epsilon: float) -> int:
        """The parameters of the layer in the per-head form at these ranks."""
        entries = self.num_heads + self.num_key_value_heads
        return min(self.parameters, sum(self.ranks(epsilon).values()) * entries * self.d_model)

    def latent_kept(self, epsilon: float) -> int | None:
        """Those of the latent form with latent and query sketch at the epsilon-ranks of the inputs; None: no latent is possible.

        The states themselves are kept to epsilon then, whatever the heads read of them.
        """
        if not self.inputs or self.is_rotary or self.is_latent:
            return None
        entry = {
            "latent": self.inputs["key"].epsilon_rank(epsilon),
            "query": self.inputs["query"].epsilon_rank(epsilon),
            "output": None,
        }
        size = attention_parameters(entry, d_model=self.d_model, num_heads=self.num_heads)
        return min(self.parameters, size)

    def error(self, epsilon: float) -> dict[str, float]:
        """The relative error of the logits "qk" and of the heads' outputs "vo" at these ranks, by the spectra."""
        return {part: joint_tail(self.deciding(part), rank) for part, rank in self.ranks(epsilon).items()}


@dataclass(frozen=True)
class VariateStructure:
    """The group attention of Chronos-2 in one layer, when groups have this many variates."""

    variates: int
    layer: str
    inputs: Spectrum
    logits: tuple[Spectrum, ...]
    outputs: tuple[Spectrum, ...]


@dataclass(frozen=True)
class Bound:
    """A proved bound beside the measured value: measured <= limit.

    Attributes:
        kind: "embedding": singular values of embedded patches above epsilon ||W_2|| ||W_1 X||, at most (1 + epsilon^-2) k.
            "attention": the largest error of a token when the inputs are projected to their epsilon-rank. "flow": the epsilon-rank of
            the stream after an attention layer.
        where: The layer.
        details: What else belongs to it.
    """

    kind: str
    where: str
    epsilon: float
    measured: float
    limit: float
    details: Mapping[str, float]


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
        return sum(
            layer.kept(epsilon) if size is None else size for layer, size in zip(self.attention, sizes)
        ) / self.attention_parameters

    def to_dict(self) -> dict[str, Any]:
        """For programs: everything, singular values of whole matrices to six digits, of heads only their ranks."""

        def heads(spectra: tuple[Spectrum, ...]) -> list[dict[str, Any]]:
            return [spectrum.to_dict(with_values=False) for spectrum in spectra]

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
            "states": [
                {"name": state.name, "tokens": state.tokens, **state.spectrum.to_dict()} for state in self.states
            ],
            "attention": [
                {
                    "name": layer.name,
                    "parameters": layer.parameters,
                    "num_heads": layer.num_heads,
                    "num_key_value_heads": layer.num_key_value_heads,
                    "head_dims": dict(layer.head_dims),
                    "is_rotary": layer.is_rotary,
                    "ranks": {f"{epsilon:.3g}": layer.ranks(epsilon) for epsilon in EPSILONS},
                    "errors": {f"{epsilon:.3g}": layer.error(epsilon) for epsilon in EPSILONS},
                    "kept": {f"{epsilon:.3g}": layer.kept(epsilon) for epsilon in EPSILONS},
                    "weights": {name: spectrum.to_dict() for name, spectrum in layer.weights.items()},
                    "inputs": {name: spectrum.to_dict(with_values=False) for name, spectrum in layer.inputs.items()},
                    "heads": {name: heads(spectra) for name, spectra in layer.heads.items()},
                    "alignment": {
                        name: None if found is None else {**vars(found), "shared": found.shared}
                        for name, found in layer.alignment.items()
                    },
                }
                for layer in self.attention
            ],
            "variates": [
                {
                    "variates": row.variates,
                    "layer": row.layer,
                    "inputs": row.inputs.to_dict(with_values=False),
                    "logits": heads(row.logits),
                    "outputs": heads(row.outputs),
                }
                for row in self.variates
            ],
            "bounds": [vars(bound) | {"details": dict(bound.details)} for bound in self.bounds],
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
            other of transformers with known names of projections (`projections.NAMES`).
        data: `"synthetic"`; series of the user's, as `training.read_series` takes them; for a text model a .txt file or batches of tokens;
            None for the weights alone.
        num_series: Windows of data; by default enough for 4 d_model tokens, and 4,096 at least.
        context_length: Time steps of the longest window; by default 512, or 1,024 for a model that reads patches.
        variates: For Chronos-2: measure its group attention with this many variates in a group, for each number.
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
    family = family_of(loaded)
    if variates and (family != "chronos-2" or data is None):
        raise ValueError(f"variates needs a Chronos-2 model and data, found a {family} model.")
    if bad := [number for number in variates if not isinstance(number, int) or number < 1]:
        raise ValueError(f"variates must be positive integers, found {bad[0]!r}.")
    layers = find_attention(loaded)
    probe, batches, bounds = Probe(loaded, layers), [], []
    if data is not None:
        size: dict[str, Any] = {"context_length": context_length, "seed": seed}
        batches = feeds(loaded, data, num_series=num_series, tokenizer=_tokenizer(loaded, source, data), **size)
        probe.run(list(progress(batches, "Running", show_progress)))
    structures = [
        _attention(layer, probe) for layer in progress(layers, "Measuring the attention", show_progress)
    ]
    states = tuple(
        StateStructure(name, total.count, total.spectrum())
        for name, total in progress(probe.states.items(), "Measuring the states", show_progress)
    )
    if data is not None:
        bounds = [
            *_embedding_bounds(loaded, probe),
            *_attention_bounds(loaded, layers, structures, probe, batches[0]),
            *_flow_bounds(layers, structures, states, probe),
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
        embedding=_embedding(loaded, states, probe),
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

    try:
        tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path or source)
    except (OSError, ValueError) as error:
        raise ValueError(f"data: {source} has no tokenizer to read {data} with ({error}).") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return lambda lines: tokenizer(lines, return_tensors="pt", padding=True, truncation=True, max_length=512)


# --- layers ------------------------------------------------------------------------------------------------------


def _attention(layer: Attention, probe: Probe) -> AttentionStructure:
    weights = layer.weights()
    n, m = layer.num_heads, layer.num_key_value_heads
    stacked = {"query": weights.query, "key": weights.key, "value": weights.value, "output": weights.output.mT}
    grams, whole, heads, alignment = {}, {}, {}, {}
    for part, matrices in stacked.items():
        rows = matrices.flatten(0, 1)  # (heads size, d)
        gram = rows @ rows.T
        whole[part] = _trimmed(Spectrum.of_gram(gram), min(rows.shape))
        grams[part] = head_grams(gram, len(matrices))
        limit = min(matrices.shape[1:])
        heads[part] = tuple(_trimmed(Spectrum.of_gram(block), limit) for block in grams[part])
        alignment[part] = head_alignment(
            gram, len(matrices), dimension=rows.shape[1], rank=max(1, matrices.shape[1] // 4)
        )
    shared = torch.arange(n) * m // n  # which head of keys and values a head of queries reads
    heads["qk"] = product_spectra(grams["query"], grams["key"][shared])
    heads["vo"] = product_spectra(grams["output"], grams["value"][shared])
    inputs = {}
    if f"{layer.name}.query" in probe.heads:
        keys = probe.heads[f"{layer.name}.key"]
        heads["logits"] = product_spectra(probe.heads[f"{layer.name}.query"], keys[shared])
        heads["outputs"] = product_spectra(grams["output"], probe.heads[f"{layer.name}.mixed"])
        inputs["query"] = probe.inputs[layer.name].spectrum()
        inputs["key"] = inputs["query"] if not layer.is_cross else _key_inputs(layer, probe).spectrum()
    return AttentionStructure(
        name=layer.name,
        kind=layer.kind,
        layer=layer.layer,
        d_model=weights.query.shape[2],
        num_heads=n,
        num_key_value_heads=m,
        head_dims={"qk": weights.query.shape[1], "vo": weights.value.shape[1]},
        parameters=layer.num_parameters,
        is_rotary=layer.is_rotary,
        is_latent=layer.is_latent,
        weights=whole,
        heads=heads,
        alignment=alignment,
        inputs=inputs,
    )


def _trimmed(spectrum: Spectrum, size: int) -> Spectrum:
    """Without the zeros of a Gram matrix that is larger than the rank can be."""
    return replace(spectrum, values=spectrum.values[:size])


def _key_inputs(layer: Attention, probe: Probe) -> StateSum:
    if not layer.is_cross:
        return probe.inputs[layer.name]
    return next(total for name, total in probe.inputs.items() if name.endswith(".key"))


def _embedding(model: PreTrainedModel, states: Sequence[StateStructure], probe: Probe) -> dict[str, Spectrum]:
    found = {}
    table = model.get_input_embeddings() if family_of(model) not in ("chronos-bolt", "chronos-2") else None
    if isinstance(table, nn.Embedding):
        found["vocabulary"] = Spectrum.of_matrix(table.weight)
    if "output" in probe.patches:
        found["embedded patches"] = probe.patches["output"].spectrum()
    if states:
        found["embedded data"] = states[0].spectrum
    return found


# --- bounds ------------------------------------------------------------------------------------------------------


def _embedding_bounds(model: PreTrainedModel, probe: Probe) -> list[Bound]:
    block = patch_embedding(model)
    if block is None or "input" not in probe.patches:
        return []
    inner, outer, _ = embedding_parts(block)
    weight = inner.weight.double()
    if probe.patches["input"].gram().shape[0] > weight.shape[1]:
        bias = torch.zeros(len(weight), dtype=weight.dtype) if inner.bias is None else inner.bias.double()
        weight = torch.cat([weight, bias[:, None]], 1)
    patches, embedded = probe.patches["input"], probe.patches["output"].spectrum()
    # ||W_1 X|| from the small Gram matrices of both.
    (hidden,) = product_spectra((weight.T @ weight)[None], patches.gram()[None])
    rank = patches.spectrum().epsilon_rank(1e-7)
    unit = Spectrum.of_matrix(outer.weight).norm * hidden.norm
    return [
        Bound(
            kind="embedding",
            where="patches",
            epsilon=epsilon,
            measured=int((embedded.values > epsilon * unit).sum()),
            limit=embedding_rank_bound(rank, outer.weight.shape[0], epsilon),
            details={"input_rank": rank, "epsilon_rank": embedded.epsilon_rank(epsilon)},
        )
        for epsilon in EMBEDDING_EPSILONS
    ]


def _attention_bounds(
    model: PreTrainedModel,
    layers: Sequence[Attention],
    structures: Sequence[AttentionStructure],
    probe: Probe,
    feed: Feed,
) -> list[Bound]:
    """The first self-attention of every kind, run again on the first batch with its inputs projected."""
    found: list[Bound] = []
    for layer, structure in zip(layers, structures):
        if layer.layer > 0 or layer.is_cross or not returns_weights(layer):
            continue
        spectrum = structure.inputs["query"]
        basis = probe.inputs[layer.name].leading(len(spectrum.values))
        scale = float(getattr(layer.module, "scaling", 1.0))
        heads = structure.heads
        if layer.is_rotary:  # a rotation stands between the two
            shared = [i * layer.num_key_value_heads // layer.num_heads for i in range(layer.num_heads)]
            norms = [query.norm * heads["key"][i].norm for query, i in zip(heads["query"], shared)]
        else:
            norms = [head.norm for head in heads["qk"]]
        mask = feed.masks.get("decoder" if layer.kind == "decoder_self" else "encoder")
        calls = _calls(model, layer, feed)
        for epsilon in EPSILONS:
            rank = spectrum.epsilon_rank(epsilon)
            if rank == len(spectrum.values):
                continue
            # Singular values are known to 1e-7 of the largest.
            sigma = float(max(spectrum.values[rank], 1e-7 * spectrum.norm))
            limit = truncated_attention_bound(
                residual=sigma,
                radius=probe.inputs[layer.name].largest,
                query_key_norms=[scale * norm for norm in norms],
                value_output_norms=[head.norm for head in heads["vo"]],
            )
            kept = basis[:, :rank].float()
            states = calls["states"]
            with torch.inference_mode():
                output = calls["run"](states)
                moved = calls["run"]((states @ kept) @ kept.T) - output
            if mask is not None and mask.shape == output.shape[:2]:
                output, moved = output[mask], moved[mask]
            found.append(
                Bound(
                    kind="attention",
                    where=layer.name,
                    epsilon=epsilon,
                    measured=float(moved.norm(dim=-1).max()),
                    limit=limit,
                    details={
                        "rank": rank,
                        "sigma": float(spectrum.values[rank]),
                        "largest_output": float(output.norm(dim=-1).max()),
                        "relative_error": float(moved.norm() / output.norm()),
                    },
                )
            )
    return found


def _calls(model: PreTrainedModel, layer: Attention, feed: Feed) -> dict[str, Any]:
    """The inputs of an attention module on a batch, and a function that calls it again with others."""
    seen: dict[str, Any] = {}

    def hook(module: nn.Module, arguments: tuple, options: dict[str, Any], _: Any) -> None:
        seen["states"] = arguments[0].clone()

        def run(states: torch.Tensor) -> torch.Tensor:
            output = module(states, *arguments[1:], **options)
            return output if isinstance(output, torch.Tensor) else output[0]

        seen["run"] = run

    handle = layer.module.register_forward_hook(hook, with_kwargs=True)
    try:
        forward(model, feed)
    finally:
        handle.remove()
    return seen


def _flow_bounds(
    layers: Sequence[Attention],
    structures: Sequence[AttentionStructure],
    states: Sequence[StateStructure],
    probe: Probe,
) -> list[Bound]:
    positions = {state.name: i for i, state in enumerate(states)}
    found = []
    for layer, structure in zip(layers, structures):
        if layer.name not in probe.norms or layer.name not in positions:
            continue
        before, after = states[positions[layer.name]].spectrum, states[positions[layer.name] + 1].spectrum
        norms: NDArray[np.float64] = probe.norms[layer.name] * [head.norm for head in structure.heads["vo"]]
        limits = residual_spectrum_bound(before, structure.inputs["key"], norms)
        for epsilon in EPSILONS:
            found.append(
                Bound(
                    kind="flow",
                    where=layer.name,
                    epsilon=epsilon,
                    measured=after.epsilon_rank(epsilon),
                    limit=residual_rank_bound(limits, after.norm, epsilon),
                    details={
                        "entering": before.epsilon_rank(epsilon),
                        "violation": float((after.values / limits[: len(after.values)].clip(1e-300)).max()),
                    },
                )
            )
    return found


def _variates(
    model: PreTrainedModel,
    layers: Sequence[Attention],
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
    batches = feeds(
        model, data, num_series=count, context_length=context_length, seed=seed, variates=number, related=largest
    )
    probe = Probe(model, grouped)
    probe.run(batches)
    rows = []
    for layer in grouped:
        structure = _attention(layer, probe)
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
