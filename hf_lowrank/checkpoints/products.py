"""The whole matrices that the factors of a low-rank layer stand for: the layer as a dense one computes it, exactly.

Weights are those of a layer's linear modules, by the part of the name that says which (`"q"`, `"wo.down"`), in the factors' own dtype where
they are only moved and in float32 where they are multiplied.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .rank_table import FeedForwardRanks, LatentRanks

__all__ = ["whole_heads", "whole_latent", "whole_matrices"]

Weights = Mapping[str, torch.Tensor]


def whole_latent(weights: Weights, ranks: LatentRanks, *, num_heads: int) -> dict[str, torch.Tensor]:
    """The heads of attention on a latent (see `LatentAttention`), which are as large as the latent, or as a sketch where that is smaller:

        q_h = C_h P_q,  k_h = P    or    q_h = P_q,  k_h = C_h^T P
        v_h = P,  o_h = W_O D_h    or    v_h = D_h P,  o_h = W_O

    They may be larger than those of the dense model that the layer was made from. Queries, keys and values are (n h, d), outputs (d, n h).
    """
    latent = weights["latent"].double()
    cores = weights["q"].double().unflatten(0, (num_heads, -1))  # (n, r, s or d)
    mixing = weights["o"].double().unflatten(1, (num_heads, -1)).transpose(0, 1)  # (n, p or d, r)
    key = value = latent.expand(num_heads, -1, -1)
    query, output = cores, mixing
    if ranks.query is not None:
        sketch = weights["query_sketch"].double()
        is_smaller = ranks.query < ranks.latent
        query, key = (sketch.expand(num_heads, -1, -1), cores.mT @ key) if is_smaller else (cores @ sketch, key)
    if ranks.output is not None:
        sketch = weights["output_sketch"].double()
        is_smaller = ranks.output < ranks.latent
        value, output = (mixing @ value, sketch.expand(num_heads, -1, -1)) if is_smaller else (value, sketch @ mixing)
    heads = {"q": query, "k": key, "v": value}
    whole = {name: head.flatten(0, 1) for name, head in heads.items()} | {"o": output.transpose(0, 1).flatten(1)}
    return {name: weight.float().contiguous() for name, weight in whole.items()}


def whole_heads(weights: Weights, pairs: torch.Tensor, *, d_kv: int) -> dict[str, torch.Tensor]:
    """Attention whose heads keep some rotary frequencies, with all of them: what a head does not keep is zero.

    Args:
        weights: Those of `q`, `k`, `v` and `o`.
        pairs: The frequencies that each head keeps, int64 (n, qk / 2).
        d_kv: The dense head dimension.
    """
    if pairs.shape[1] == d_kv // 2 and (pairs.diff(dim=1) == 1).all():  # all of them, in order
        return {name: weights[name] for name in "qkvo"}
    kept = torch.cat([pairs, pairs + d_kv // 2], dim=1)  # (n, qk)
    whole = {name: weights[name] for name in "vo"}
    for name in "qk":
        heads = weights[name].unflatten(0, kept.shape)
        full = heads.new_zeros(len(heads), d_kv, heads.shape[2])
        whole[name] = full.scatter_(1, kept.unsqueeze(-1).expand_as(heads), heads).flatten(0, 1)
    return whole


def whole_matrices(weights: Weights, ranks: FeedForwardRanks, inner_names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The matrices of a feed-forward layer with their thin factors multiplied; its width stays what it is."""
    whole = {}
    for name, rank in [*((name, ranks.wi) for name in inner_names), ("wo", ranks.wo)]:
        if rank is None:
            whole[name] = weights[name]
        else:
            whole[name] = (weights[f"{name}.up"].double() @ weights[f"{name}.down"].double()).float()
    return whole
