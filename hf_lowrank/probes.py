"""Running a model on series or texts, and watching it: hidden states, queries, keys, mixed values, attention weights.

Windows of one batch have one length and missing values are filled linearly, so that every token of a time series counts. Texts are
padded, and padding is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from chronos import ChronosConfig
from numpy.typing import NDArray
from torch import nn

from .projections import Attention
from .rank_bounds import attention_norms
from .rank_structure import StateSum
from .synthesis import synthetic_series
from .training import read_series, tokenize_windows

__all__ = ["Feed", "Probe", "family_of", "feeds"]

TIME_STEPS, PATCHED_TIME_STEPS = 512, 1024  # of context, by default
BATCH_SERIES = 8
SMALLEST_SAMPLE = 4096  # tokens
Windows = list[NDArray[np.float32]]


def family_of(model: nn.Module) -> str:
    """"chronos-t5", "chronos-bolt", "chronos-2", or the model_type of the configuration."""
    if getattr(model.config, "chronos_config", None) is None:
        return str(getattr(model.config, "model_type", type(model).__name__))
    if not hasattr(model, "input_patch_embedding"):
        return "chronos-t5"
    is_grouped = any("GroupSelfAttention" in type(module).__name__ for module in model.modules())
    return "chronos-2" if is_grouped else "chronos-bolt"


# --- what a model reads ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Feed:
    """One batch: the arguments of the model, and which tokens of encoder and decoder count (None: all).

    `group_size`: how many variates that follow each other attend to one another, in Chronos-2.
    """

    arguments: dict[str, Any]
    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    group_size: int = 1


def windows(data: Any, count: int, length: int, *, seed: int) -> Windows:
    """`count` windows of at most `length` steps, float32: `"synthetic"`, or drawn from series of the user's."""
    if isinstance(data, str) and data == "synthetic":
        return list(synthetic_series(count, length, seed=seed))
    series = [_filled(values) for values in read_series(data)]
    rng = np.random.default_rng(seed)
    chosen = np.concatenate([rng.permutation(len(series)) for _ in range(-(-count // len(series)))])[:count]
    found = []
    for i in chosen:
        end = rng.integers(min(length, len(series[i])), len(series[i]) + 1)
        found.append(series[i][max(0, end - length) : end].astype(np.float32))
    return found


def _filled(values: NDArray[np.float64]) -> NDArray[np.float64]:
    observed = np.flatnonzero(~np.isnan(values))
    return np.interp(np.arange(len(values)), observed, values[observed])


def _batches(found: Windows, size: int) -> Iterator[torch.Tensor]:
    """Batches of windows of one length, that of the shortest: the last values of each."""
    found = sorted(found, key=len)
    for start in range(0, len(found), size):
        batch = found[start : start + size]
        yield torch.from_numpy(np.stack([values[-len(batch[0]) :] for values in batch]))


def _chronos_t5(model: Any, batch: torch.Tensor) -> dict[str, Any]:
    settings = ChronosConfig(**model.config.chronos_config)
    horizon = min(settings.prediction_length, batch.shape[1] // 2)
    context, target = batch.split([batch.shape[1] - horizon, horizon], dim=1)
    tokens = tokenize_windows(replace(settings, prediction_length=horizon), context, target)
    if not model.config.is_encoder_decoder:
        del tokens["labels"]
    return tokens


def _chronos_bolt(model: Any, batch: torch.Tensor) -> dict[str, Any]:
    return {"context": batch}


def _chronos_2(model: Any, batch: torch.Tensor) -> dict[str, Any]:
    return {"context": batch, "num_output_patches": min(4, model.chronos_config.max_output_patches)}


def _patchtst(model: Any, batch: torch.Tensor) -> dict[str, Any]:
    channels = model.config.num_input_channels
    batch = batch.repeat_interleave(-(-channels // len(batch)), 0) if len(batch) < channels else batch
    return {"past_values": batch[: len(batch) // channels * channels].unflatten(0, (-1, channels)).mT}


def _timesfm(model: Any, batch: torch.Tensor) -> dict[str, Any]:
    return {"past_values": list(batch)} | ({"freq": [0] * len(batch)} if model.config.model_type == "timesfm" else {})


def _lagged(model: Any, batch: torch.Tensor) -> dict[str, Any]:
    """Informer and Autoformer: values with time features, here the position in the window, and an observed mask."""
    config = model.config
    channels = getattr(config, "input_size", 1)
    values = batch[:, :, None].expand(-1, -1, channels) if channels > 1 else batch
    time = torch.linspace(-0.5, 0.5, batch.shape[1])[None, :, None].expand(len(batch), -1, config.num_time_features)
    past = batch.shape[1] - config.prediction_length
    found: dict[str, Any] = {
        "past_values": values[:, :past],
        "past_time_features": time[:, :past],
        "past_observed_mask": torch.ones_like(values[:, :past]),
        "future_values": values[:, past:],
        "future_time_features": time[:, past:],
    }
    for name, dtype in (("categorical", torch.long), ("real", torch.float32)):
        if count := getattr(config, f"num_static_{name}_features", 0):
            found[f"static_{name}_features"] = torch.zeros(len(batch), count, dtype=dtype)
    return found


@dataclass(frozen=True)
class _Reader:
    """How a family reads windows: `steps` says how many it wants, None where any number will do."""

    arguments: Callable[[Any, torch.Tensor], dict[str, Any]]
    steps: Callable[[Any], int] | None = None
    is_exact: bool = False


def _chronos_t5_steps(model: Any) -> int:
    settings = model.config.chronos_config
    return min(settings["context_length"], TIME_STEPS) + settings["prediction_length"]


def _patched_steps(model: Any) -> int:
    return min(model.config.chronos_config["context_length"], PATCHED_TIME_STEPS)


def _lagged_steps(model: Any) -> int:
    return model.config.context_length + max(model.config.lags_sequence) + model.config.prediction_length


READERS = {
    "chronos-t5": _Reader(_chronos_t5, _chronos_t5_steps),
    "chronos-bolt": _Reader(_chronos_bolt, _patched_steps),
    "chronos-2": _Reader(_chronos_2, _patched_steps),
    "patchtst": _Reader(_patchtst, lambda model: model.config.context_length, is_exact=True),
    "timesfm": _Reader(_timesfm, lambda model: min(model.config.context_length, TIME_STEPS)),
    "timesfm2_5": _Reader(_timesfm, lambda model: min(model.config.context_length, TIME_STEPS)),
    "informer": _Reader(_lagged, _lagged_steps, is_exact=True),
    "autoformer": _Reader(_lagged, _lagged_steps, is_exact=True),
}


def feeds(
    model: nn.Module,
    data: Any,
    *,
    num_series: int | None,
    context_length: int | None,
    seed: int,
    variates: int = 1,
    tokenizer: Callable[[list[str]], Mapping[str, torch.Tensor]] | None = None,
) -> list[Feed]:
    """Batches for a model: series for a time-series model, texts or batches of tokens for another.

    Args:
        data: `"synthetic"`; series, as `training.read_series` takes them; for a text model a .txt file of one text a line, or a list
            of dictionaries with `input_ids` and, where the model has them, `attention_mask` and `labels`.
        num_series: Windows or texts; by default as many as hold 4 d_model tokens, and 4,096 at least.
        context_length: Time steps of the longest window.
        variates: How many series that follow each other are one group of Chronos-2.
        tokenizer: Reads texts.

    Raises:
        ValueError: The model is of no family that reads this kind of data.
    """
    if isinstance(data, (list, tuple)) and data and isinstance(data[0], Mapping) and "input_ids" in data[0]:
        return [_token_feed(model, batch) for batch in data]
    family = family_of(model)
    if family not in READERS:
        if tokenizer is not None and isinstance(data, (str, Path)) and Path(data).suffix == ".txt":
            lines = [line for line in Path(data).read_text(encoding="utf-8").splitlines() if line.strip()]
            lines = lines[: num_series or 256]
            return [
                _token_feed(model, tokenizer(lines[i : i + BATCH_SERIES])) for i in range(0, len(lines), BATCH_SERIES)
            ]
        raise ValueError(
            f"data: a {family} model reads no time series here; give batches of tokens (a list of dictionaries with input_ids), "
            f"for a folder with a tokenizer a .txt file of one text a line, or 'none' for the weights alone."
        )
    reader = READERS[family]
    steps = reader.steps(model) if reader.steps is not None else TIME_STEPS
    if context_length is not None and not reader.is_exact:
        steps = context_length + (steps - min(steps, TIME_STEPS) if family == "chronos-t5" else 0)
    if num_series is None:
        tokens = steps // getattr(model, "chronos_config", model.config).input_patch_size if "bolt" in family or family == "chronos-2" else steps
        num_series = -(-max(SMALLEST_SAMPLE, 4 * model.config.hidden_size) // max(1, tokens))
    found = windows(data, -(-num_series // variates) * variates, steps, seed=seed)
    if reader.is_exact and (shortest := min(map(len, found))) < steps:
        raise ValueError(f"data: this {family} model needs series of {steps} steps or more, found one of {shortest}.")
    size = max(BATCH_SERIES, getattr(model.config, "num_input_channels", 1), variates)
    size = size // variates * variates
    result = []
    for batch in _batches(found, size):
        arguments = reader.arguments(model, batch)
        if family == "chronos-2":
            arguments["group_ids"] = torch.arange(len(batch)) // variates
        result.append(Feed(arguments, group_size=variates))
    return result


def _token_feed(model: nn.Module, batch: Mapping[str, Any]) -> Feed:
    arguments = {name: torch.as_tensor(values) for name, values in batch.items() if name != "token_type_ids"}
    ids = arguments["input_ids"]
    mask = arguments.get("attention_mask", torch.ones_like(ids)).bool()
    masks = {"encoder": mask}
    if model.config.is_encoder_decoder:
        labels = arguments.setdefault("labels", ids.masked_fill(~mask, -100))
        masks["decoder"] = labels != -100
        if not hasattr(model, "lm_head"):  # a bare model has no labels to shift
            arguments["decoder_input_ids"] = arguments.pop("labels").clamp_min(0)
    else:
        arguments.pop("labels", None)
    return Feed(arguments, masks)


# --- watching ----------------------------------------------------------------------------------------------------


class Probe:
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
    """

    def __init__(self, model: nn.Module, layers: Sequence[Attention]) -> None:
        self.model = model
        self.layers = layers
        self.states: dict[str, StateSum] = {}
        self.inputs: dict[str, StateSum] = {}
        self.heads: dict[str, torch.Tensor] = {}
        self.norms: dict[str, NDArray[np.float64]] = {}
        self.patches: dict[str, StateSum] = {}
        self._feed = Feed({})

    def run(self, batches: Sequence[Feed], *, after: Callable[[], None] | None = None) -> None:
        """Run the model on every batch, in evaluation mode; the model is left as it was."""
        with self._watching():
            for feed in batches:
                self._feed = feed
                forward(self.model, feed)
                if after is not None:
                    after()

    # The hooks. A token is a row wherever it is: the group attention of Chronos-2 has time first.

    def _rows(self, states: torch.Tensor, stack: str) -> torch.Tensor:
        mask = self._feed.masks.get(stack)
        if mask is not None and mask.shape == states.shape[:2]:
            return states[mask.to(states.device)]
        return states.flatten(0, -2)

    def _add(self, sums: dict[str, StateSum], name: str, states: torch.Tensor, stack: str) -> None:
        sums.setdefault(name, StateSum()).add(self._rows(states, stack))

    def _add_heads(self, name: str, states: torch.Tensor, num_heads: int, stack: str) -> None:
        heads = self._rows(states, stack).double().unflatten(-1, (num_heads, -1)).transpose(0, 1)  # (n, tokens, a)
        self.heads[name] = self.heads.get(name, 0) + heads.mT @ heads

    def _centred(self, keys: torch.Tensor, layer: Attention, stack: str) -> torch.Tensor:
        if layer.kind == "group":  # (time, series, size): centred among the variates of a group
            grouped = keys.unflatten(1, (-1, self._feed.group_size))
            return (grouped - grouped.mean(2, keepdim=True)).flatten(1, 2)
        mask = self._feed.masks.get(stack)
        if mask is None or mask.shape != keys.shape[:2]:
            return keys - keys.mean(1, keepdim=True)
        weights = mask.to(keys).unsqueeze(-1)
        return keys - (keys * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp_min(1)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        handles = [*self._watch_states(), *self._watch_patches()]
        for layer in self.layers:
            handles += self._watch_attention(layer)
        configs = {id(layer.module.config): layer.module.config for layer in self.layers if returns_weights(layer)}
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
        lists: dict[str, dict[str, str]] = {}  # path of a list -> path of a child -> name
        for layer in self.layers:
            lists.setdefault(layer.sublayer.rpartition(".")[0], {}).setdefault(layer.sublayer, layer.name)
        last: dict[str, tuple[str, str]] = {}
        for path, names in lists.items():
            first = next(layer for layer in self.layers if layer.sublayer in names)
            stack = "decoder" if first.kind in ("decoder_self", "cross") else "encoder"
            part = "encoder" if first.kind in ("time", "group") else first.kind.removesuffix("_self")
            for child in self.model.get_submodule(path).children():
                child_path = next(name for name, module in self.model.named_modules() if module is child)
                name = names.get(child_path, f"{part}_feed_forward.{first.layer}")
                yield child.register_forward_pre_hook(self._state_hook(name, stack), with_kwargs=True)
                last[part] = (child_path, stack)
        for part, (path, stack) in last.items():

            def output_hook(_: nn.Module, __: Any, output: Any, part: str = part, stack: str = stack) -> None:
                self._add(self.states, f"{part}_output", first_tensor(output), stack)

            yield self.model.get_submodule(path).register_forward_hook(output_hook)

    def _state_hook(self, name: str, stack: str) -> Callable:
        def hook(_: nn.Module, arguments: tuple, options: dict[str, Any]) -> None:
            states = arguments[0] if arguments else next(
                options[key] for key in ("hidden_states", "hidden_state") if key in options
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

    def _watch_attention(self, layer: Attention) -> Iterator[Any]:
        stack = "decoder" if layer.kind in ("decoder_self", "cross") else "encoder"
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
        if returns_weights(layer):

            def norms_hook(_: nn.Module, __: Any, output: Any) -> None:
                found = attention_norms(last_tensor(output))
                known = self.norms.get(layer.name)
                self.norms[layer.name] = found if known is None else np.maximum(known, found)

            yield layer.module.register_forward_pre_hook(_ask_for_weights, with_kwargs=True)
            yield layer.module.register_forward_hook(norms_hook)


def forward(model: nn.Module, feed: Feed) -> Any:
    """The model on one batch, in evaluation mode and without gradients."""
    was_training = model.training
    device = next(model.parameters()).device
    arguments = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in feed.arguments.items()
    }
    if getattr(model.config, "use_cache", False) and "input_ids" in arguments:
        arguments["use_cache"] = False
    model.eval()
    try:
        with torch.inference_mode():
            return model(**arguments)
    finally:
        model.train(was_training)


def returns_weights(layer: Attention) -> bool:
    """Whether it is an attention of T5's or Chronos-2's house, without biases, that adds to a residual stream it normalises."""
    return type(layer.module).__name__ in (
        "T5Attention",
        "MHA",
        "PerHeadAttention",
        "LatentAttention",
    )


def _ask_for_weights(module: nn.Module, arguments: tuple, options: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return arguments, options | ({"output_attentions": True} if type(module).__name__ == "MHA" else {})


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
