"""Where a transformer keeps its queries, keys, values and outputs: any model of transformers, dense or low-rank.

Projections are found by the names of modules, in a table; a model with other names needs a line in it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["AttentionLayer", "HeadWeights", "find_attention"]

# Names of the submodules for queries, keys, values and the output. A dotted output is looked up from the parent.
PROJECTION_NAMES = (
    ("q", "k", "v", "o"),  # T5, Chronos-T5, Chronos-Bolt, Chronos-2, and this package's per_head form
    ("q", "latent", "latent", "o"),  # the latent form
    ("q_proj", "k_proj", "v_proj", "out_proj"),  # BART, PatchTST, Informer, Autoformer
    ("q_proj", "k_proj", "v_proj", "o_proj"),  # Llama, TimesFM, ViT
    ("query", "key", "value", "..output.dense"),  # BERT
    ("q_attn", "c_attn", "c_attn", "c_proj"),  # GPT-2's cross-attention: one module for keys and values
    ("c_attn", "c_attn", "c_attn", "c_proj"),  # GPT-2: one module for all three
)
# Attributes of modules or configurations that say how many heads there are.
HEAD_COUNTS = ("n_heads", "num_heads", "num_attention_heads")


@dataclass(frozen=True)
class HeadWeights:
    """One attention layer by head, float64, as it acts on its inputs of size d and e (cross-attention may differ).

    query (n, a, d), key (m, a, e), value (m, b, e), output (n, d, b): n heads of queries, m of keys and values, which m < n
    groups of heads share.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor


@dataclass(frozen=True, eq=False)
class AttentionLayer:
    """An attention layer of a model.

    Attributes:
        name: Such as "cross.3": its kind and how many of that kind come before.
        kind: What it attends to: "encoder_self", "decoder_self" or "cross"; "time" or "group" in Chronos-2; "self" in a model of one stack.
        layer: How many attention layers of its kind come before.
        path: The dotted name of the module.
        sublayer: The dotted name of the module of a list that it is in, whose input is the residual stream.
        module: The attention module itself.
        query, key, value, output: The modules that project; one module may be several of them.
        num_heads: How many heads of queries it has.
        num_key_value_heads: How many heads of keys and values it has; fewer where heads share them in groups.
        is_rotary: Whether queries and keys are rotated by their positions.
    """

    name: str
    kind: str
    layer: int
    path: str
    sublayer: str
    module: nn.Module
    query: nn.Module
    key: nn.Module
    value: nn.Module
    output: nn.Module
    num_heads: int
    num_key_value_heads: int
    is_rotary: bool

    @property
    def is_cross(self) -> bool:
        return self.kind == "cross"

    @property
    def is_latent(self) -> bool:
        """Whether it is in this package's latent form: one latent for the keys and values of all heads."""
        return hasattr(self.module, "latent")

    @property
    def query_entry(self) -> nn.Module:
        """The module whose input the queries are made of."""
        sketch = getattr(self.module, "query_sketch", None)
        return sketch if hasattr(sketch, "weight") else self.query

    @property
    def has_bias(self) -> bool:
        return any(getattr(part, "bias", None) is not None for part in (self.query, self.key, self.value, self.output))

    @property
    def num_parameters(self) -> int:
        """Weights of the projections, without biases."""
        parts = {id(part): part for part in (self.query_entry, self.query, self.key, self.value, self.output)}
        sketch = getattr(self.module, "output_sketch", None)
        if hasattr(sketch, "weight"):  # not the identity
            parts[id(sketch)] = sketch
        return sum(part.weight.numel() for part in parts.values())

    def split(self, states: torch.Tensor, part: str, *, dim: int = -1) -> torch.Tensor:
        """What belongs to "query", "key" or "value" in the output of its module, or in the rows of its weight."""
        module = getattr(self, part)
        fused = [name for name in ("query", "key", "value") if getattr(self, name) is module]
        if len(fused) == 1 or self.is_latent:
            return states
        return states.chunk(len(fused), dim=dim)[fused.index(part)]

    def weights(self) -> HeadWeights:
        """The weights by head, with sketches merged into them.

        Raises:
            ValueError: A weight is not a finite number.
        """
        q, k, v = (
            self.split(projection_matrix(getattr(self, part)), part, dim=0) for part in ("query", "key", "value")
        )
        o = projection_matrix(self.output)
        for name, weight in zip(("query", "key", "value", "output"), (q, k, v, o)):
            if not torch.isfinite(weight).all():
                raise ValueError(f"model: the {name} weights of {self.path} hold NaN or infinite values.")
        if self.query_entry is not self.query:
            q = q @ projection_matrix(self.query_entry)
        sketch = getattr(self.module, "output_sketch", None)
        if hasattr(sketch, "weight"):  # not the identity
            o = projection_matrix(sketch) @ o
        n, m = self.num_heads, self.num_key_value_heads
        return HeadWeights(
            query=q.unflatten(0, (n, -1)),
            key=k.unflatten(0, (m, -1)),
            value=v.unflatten(0, (m, -1)),
            output=o.unflatten(1, (n, -1)).transpose(0, 1),
        )


def projection_matrix(module: nn.Module) -> torch.Tensor:
    """The weight (out, in) in float64, with what adapters of peft add to it; GPT-2's Conv1D keeps it the other way round."""
    weight = module.weight.detach().double().cpu()
    if hasattr(module, "get_delta_weight") and not module.merged:
        for adapter in module.active_adapters:
            weight = weight + module.get_delta_weight(adapter).detach().double().cpu()
    return weight.T if type(module).__name__ == "Conv1D" else weight


def find_attention(model: nn.Module) -> tuple[AttentionLayer, ...]:
    """Every attention layer of a model, in the order of its modules.

    Raises:
        ValueError: There is none with known names.
    """
    layers: list[AttentionLayer] = []
    counts: dict[str, int] = {}
    for path, module in model.named_modules():
        for names in PROJECTION_NAMES:
            parts = [_part(model, path, module, name) for name in names]
            if not all(isinstance(getattr(part, "weight", None), torch.Tensor) for part in parts):
                continue
            query, key, value, output = (part for part in parts if part is not None)
            heads = _num_heads(model, module)
            if hasattr(module, "latent"):
                groups = 1
            elif key is value:  # fused modules know no groups
                groups = heads
            else:
                groups = max(1, key.weight.shape[0] * heads // query.weight.shape[0])
            kind = _kind(model, path)
            counts[kind] = counts.get(kind, -1) + 1
            layers.append(
                AttentionLayer(
                    name=f"{kind}.{counts[kind]}",
                    kind=kind,
                    layer=counts[kind],
                    path=path,
                    sublayer=_sublayer(model, path),
                    module=module,
                    query=query,
                    key=key,
                    value=value,
                    output=output,
                    num_heads=heads,
                    num_key_value_heads=groups,
                    is_rotary=_is_rotary(module),
                )
            )
            break
    if not layers:
        known = "; ".join(", ".join(dict.fromkeys(row)) for row in PROJECTION_NAMES)
        raise ValueError(
            f"model: no attention layer of {type(model).__name__} has projections with known names ({known})."
        )
    return tuple(layers)


def _part(model: nn.Module, path: str, module: nn.Module, name: str) -> nn.Module | None:
    if not name.startswith(".."):
        return getattr(module, name, None)
    try:
        return model.get_submodule(f"{path.rpartition('.')[0]}.{name[2:]}")
    except AttributeError:
        return None


def _num_heads(model: nn.Module, module: nn.Module) -> int:
    configs = [
        config for config in (getattr(owner, "config", None) for owner in (module, model)) if config is not None
    ]
    for owner in (module, *configs):
        for name in HEAD_COUNTS:
            if isinstance(heads := getattr(owner, name, None), int):
                return heads
    raise ValueError(f"model: {type(module).__name__} does not say how many heads it has ({', '.join(HEAD_COUNTS)}).")


def _kind(model: nn.Module, path: str) -> str:
    """What it attends to, by its path and the classes on it."""
    owners = [type(model.get_submodule(".".join(path.split(".")[:i]))).__name__ for i in range(path.count(".") + 2)]
    if any("GroupSelfAttention" in owner for owner in owners):
        return "group"
    if any("TimeSelfAttention" in owner for owner in owners):
        return "time"
    if re.search(r"EncDec|encoder_attn|cross", path):
        return "cross"
    is_pair = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if is_pair and re.search(r"(^|\.)decoder\.", path):
        return "decoder_self"
    return "encoder_self" if re.search(r"(^|\.)encoder\.", path) else "self"


def _ancestors(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]


def _sublayer(model: nn.Module, path: str) -> str:
    for ancestor in _ancestors(path):
        if isinstance(model.get_submodule(ancestor.rpartition(".")[0]), nn.ModuleList):
            return ancestor
    return path


def _is_rotary(module: nn.Module) -> bool:
    if hasattr(module, "use_rope"):
        return bool(module.use_rope)
    return hasattr(module, "rope_embed") or "position_embeddings" in inspect.signature(module.forward).parameters
