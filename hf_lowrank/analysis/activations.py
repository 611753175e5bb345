"""Watching a model while it runs: hidden states, queries, keys, mixed values, attention weights, as sums over tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..models.modeling_lowrank_layers import LowRankAttention
from .attention_layers import AttentionLayer
from .model_inputs import InputBatch
from .rank_bounds import attention_norms
from .spectra import StateSum

__all__ = [
    "ActivationSums",
    "embedding_parts",
    "evaluating",
    "first_tensor",
    "is_bounded",
    "patch_embedding",
    "stack_of",
]

# What the stack of an attention layer is called.
STACKS = {
    "encoder_self": "encoder",
    "time": "encoder",
    "group": "encoder",
    "decoder_self": "decoder",
    "cross": "decoder",
    "self": "model",
}


class ActivationSums:
    """Sums over the tokens of a model while it runs on batches.

    Attributes:
        states: The residual stream entering every layer, in order ("cross.3", "decoder_feed_forward.3"), and leaving each
            stack ("decoder_output").
        inputs: What the queries of an attention layer are made of, by its name; in cross-attention, what its keys are made of, by
            the name and ".key".
        heads: By "cross.3.query" and so on, the sums (n, a, a) of q q^T, of k k^T with k centred within its sequence (the softmax does not
            see a constant), and of the mixed values in front of the output.
        norms: An upper bound on the norm of every head's attention weights, where the module returns them.
        patches: Input and output of a residual MLP patch embedding.
        calls: The arguments, on the first batch, of the first self-attention of every kind that the bounds hold of.
    """

    def __init__(self, model: nn.Module, layers: Sequence[AttentionLayer]) -> None:
        self.model = model
        self.layers = layers
        self.states: dict[str, StateSum] = {}
        self.inputs: dict[str, StateSum] = {}
        self.heads: dict[str, torch.Tensor] = {}
        self.norms: dict[str, NDArray[np.float64]] = {}
        self.patches: dict[str, StateSum] = {}
        self.calls: dict[str, tuple[tuple, dict[str, Any]]] = {}
        self._batch = InputBatch({})

    def run(self, batches: Sequence[InputBatch]) -> None:
        """Run the model on every batch, in evaluation mode; the model is left as it was."""
        with evaluating(self.model), self._watching():
            for batch in batches:
                self._batch = batch
                run_model(self.model, batch)

    def key_inputs(self, layer: AttentionLayer) -> StateSum:
        """What the keys of an attention layer are made of."""
        if not layer.is_cross:
            return self.inputs[layer.name]
        return next(total for name, total in self.inputs.items() if name.endswith(".key"))

    # The hooks. A token is a row wherever it is: the group attention of Chronos-2 has time first.

    def _rows(self, states: torch.Tensor, stack: str) -> torch.Tensor:
        mask = self._batch.masks.get(stack)
        if mask is not None and mask.shape == states.shape[:2]:
            return states[mask.to(states.device)]
        return states.flatten(0, -2)

    def _add(self, sums: dict[str, StateSum], name: str, states: torch.Tensor, stack: str) -> None:
        sums.setdefault(name, StateSum()).add(self._rows(states, stack))

    def _add_heads(self, name: str, states: torch.Tensor, num_heads: int, stack: str) -> None:
        heads = self._rows(states, stack).double().unflatten(-1, (num_heads, -1)).transpose(0, 1)  # (n, tokens, a)
        self.heads[name] = self.heads.get(name, 0) + (heads.mT @ heads).cpu()

    def _centred(self, keys: torch.Tensor, layer: AttentionLayer, stack: str) -> torch.Tensor:
        if layer.kind == "group":  # (time, series, size): centred among the variates of a group
            grouped = keys.unflatten(1, (-1, self._batch.group_size))
            return (grouped - grouped.mean(2, keepdim=True)).flatten(1, 2)
        mask = self._batch.masks.get(stack)
        if mask is None or mask.shape != keys.shape[:2]:
            return keys - keys.mean(1, keepdim=True)
        weights = mask.to(keys).unsqueeze(-1)
        return keys - (keys * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp_min(1)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        handles = [*self._watch_states(), *self._watch_patches()]
        for layer in self.layers:
            handles += self._watch_attention(layer)
        configs = {id(layer.module.config): layer.module.config for layer in self.layers if is_bounded(layer)}
        before = {key: config._attn_implementation for key, config in configs.items()}
        for config in configs.values():
            config._attn_implementation = "eager"  # the others do not return their weights
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for key, config in configs.items():
                config._attn_implementation = before[key]

    def _watch_states(self) -> Iterator[Any]:
        lists: dict[str, list[AttentionLayer]] = {}
        for layer in self.layers:
            lists.setdefault(layer.sublayer.rpartition(".")[0], []).append(layer)
        last: dict[str, nn.Module] = {}
        seen: dict[str, int] = {}
        for path, members in lists.items():
            stack = stack_of(members[0])
            for index, child in self.model.get_submodule(path).named_children():
                inside = [layer for layer in members if layer.sublayer == f"{path}.{index}"]
                # A block with self-attention and cross-attention goes by the former, which comes first.
                name = min(inside, key=lambda layer: layer.is_cross).name if inside else None
                if name is None:
                    name = f"{STACKS[members[0].kind]}_feed_forward.{seen.setdefault(stack, 0)}"
                    seen[stack] += 1
                yield child.register_forward_pre_hook(self._state_hook(name, stack), with_kwargs=True)
                last[STACKS[members[0].kind]] = child
        for part, child in last.items():

            def output_hook(_: nn.Module, __: Any, output: Any, part: str = part) -> None:
                stack = "decoder" if part == "decoder" else "encoder"
                self._add(self.states, f"{part}_output", first_tensor(output), stack)

            yield child.register_forward_hook(output_hook)

    def _state_hook(self, name: str, stack: str) -> Callable:
        def hook(_: nn.Module, arguments: tuple, options: dict[str, Any]) -> None:
            states = (
                arguments[0]
                if arguments
                else next(options[key] for key in ("hidden_states", "hidden_state") if key in options)
            )
            self._add(self.states, name, states, stack)

        return hook

    def _watch_patches(self) -> Iterator[Any]:
        module = patch_embedding(self.model)
        if module is None:
            return

        def hook(block: nn.Module, arguments: tuple, output: torch.Tensor) -> None:
            patches = arguments[0].flatten(0, -2)
            if any(part.bias is not None for part in embedding_parts(block)):
                patches = torch.cat([patches, torch.ones_like(patches[:, :1])], 1)
            self.patches.setdefault("input", StateSum()).add(patches)
            self.patches.setdefault("output", StateSum()).add(output.flatten(0, -2))

        yield module.register_forward_hook(hook)

    def _watch_attention(self, layer: AttentionLayer) -> Iterator[Any]:
        stack = stack_of(layer)
        key_stack = "encoder" if layer.is_cross else stack
        first_cross = next((other for other in self.layers if other.is_cross), None)

        def query_hook(_: nn.Module, arguments: tuple, __: Any = None) -> None:
            self._add(self.inputs, layer.name, arguments[0], stack)

        def key_hook(_: nn.Module, arguments: tuple, output: torch.Tensor) -> None:
            if layer is first_cross:  # one encoder for all
                self._add(self.inputs, f"{layer.name}.key", arguments[0], key_stack)
            keys = self._centred(layer.split(output, "key"), layer, key_stack)
            self._add_heads(f"{layer.name}.key", keys, layer.num_key_value_heads, key_stack)

        def query_output_hook(_: nn.Module, __: Any, output: torch.Tensor) -> None:
            self._add_heads(f"{layer.name}.query", layer.split(output, "query"), layer.num_heads, stack)

        def mixed_hook(_: nn.Module, arguments: tuple, __: Any) -> None:
            self._add_heads(f"{layer.name}.mixed", arguments[0], layer.num_heads, stack)

        yield layer.query_entry.register_forward_pre_hook(query_hook)
        yield layer.query.register_forward_hook(query_output_hook)
        yield layer.key.register_forward_hook(key_hook)
        yield layer.output.register_forward_hook(mixed_hook)
        if is_bounded(layer):

            def norms_hook(_: nn.Module, __: Any, output: Any) -> None:
                norms = attention_norms(last_tensor(output))
                so_far = self.norms.get(layer.name)
                self.norms[layer.name] = norms if so_far is None else np.maximum(so_far, norms)

            def call_hook(_: nn.Module, arguments: tuple, options: dict[str, Any]) -> None:
                # A second call must not find what the first has put into the cache, by whichever name.
                options = options | {name: None for name in ("cache", "past_key_values") if name in options}
                self.calls.setdefault(layer.name, (arguments, options))

            yield layer.module.register_forward_pre_hook(_ask_for_weights, with_kwargs=True)
            if layer.layer == 0 and not layer.is_cross:
                yield layer.module.register_forward_pre_hook(call_hook, with_kwargs=True)
            yield layer.module.register_forward_hook(norms_hook)


def stack_of(layer: AttentionLayer) -> str:
    """Whose tokens its queries are: "encoder" (or the only stack) or "decoder"."""
    return "decoder" if STACKS[layer.kind] == "decoder" else "encoder"


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and without gradients; then as it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def run_model(model: nn.Module, batch: InputBatch) -> Any:
    """The model on one batch."""
    device = next(model.parameters()).device
    arguments = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.arguments.items()
    }
    if getattr(model.config, "use_cache", False) and "input_ids" in arguments:
        arguments["use_cache"] = False
    return model(**arguments)


def is_bounded(layer: AttentionLayer) -> bool:
    """Whether the bounds hold of it: an attention of this package's models, as which dense T5 and Chronos models are looked at too.

    It has no biases, returns its weights, and adds to the stream whose normalised states it reads.
    """
    return isinstance(layer.module, LowRankAttention)


def _ask_for_weights(module: nn.Module, arguments: tuple, options: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    wanted = "output_attentions" in inspect.signature(module.forward).parameters
    return arguments, options | ({"output_attentions": True} if wanted else {})


def first_tensor(output: Any) -> torch.Tensor:
    """The hidden states in what a module returns."""
    return output if isinstance(output, torch.Tensor) else output[0]


def last_tensor(output: Any) -> torch.Tensor:
    """The attention weights (batch, heads, queries, keys) in what an attention module returns: after all else."""
    return output[-1] if isinstance(output, tuple) else output.attn_weights


def patch_embedding(model: nn.Module) -> nn.Module | None:
    """The residual MLP that embeds patches: the first of the model's; None where it has none, or one that normalises."""
    for module in model.modules():
        if hasattr(module, "residual_layer") and hasattr(module, "output_layer"):
            return None if getattr(module, "use_layer_norm", False) else module
    return None


def embedding_parts(block: Any) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """W_1, W_2 and W_3 of a residual MLP, by the names of Chronos or of TimesFM."""
    return getattr(block, "hidden_layer", None) or block.input_layer, block.output_layer, block.residual_layer
