"""Experiment on internals: what each part of the calibrated factorization is worth, against the alternatives that it won over.

    python examples/compare_alternatives.py reference --json alternatives.json

Every row is the same checkpoint with the same share of its attention (or feed-forward) parameters kept, without training; the
figure is the Kullback-Leibler divergence from the dense model on held-out synthetic series, in nats a token.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from chronos import ChronosConfig
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import PreTrainedModel

from hf_lowrank import Calibration, calibrate, compress_pretrained
from hf_lowrank.checkpoints.dense import DenseCheckpoint, build_model, load_chronos, load_dense
from hf_lowrank.checkpoints.families import T5
from hf_lowrank.checkpoints.objectives import Objective, objective_of
from hf_lowrank.checkpoints.rank_table import LayerName
from hf_lowrank.compression.calibration import Collector, GramSum, unpacked
from hf_lowrank.compression.factorization import AttentionGrams, AttentionWeights, balanced_basis
from hf_lowrank.compression.layers import attention_weights
from hf_lowrank.data.tokens import SyntheticBatches
from hf_lowrank.linear_algebra import square_root

HELD_OUT_SEED = 1_000_003  # that of no training and no calibration


class Unclipped(Collector):
    """The plain Fisher information: no series' gradient is clipped."""

    def _gradient(self, layer: LayerName, point: str, gradient: torch.Tensor) -> None:
        self.sums.setdefault(f"{layer}.{point}", GramSum()).add(gradient)


class Isotropic(Calibration):
    """No gradients: errors of logits and of outputs count alike in all directions, in each layer as a share of its own.

    Keys are centred within their series where `centred` has their covariance, for softmax ignores what all keys share.
    """

    centred: dict[LayerName, torch.Tensor]

    def attention(self, name: LayerName) -> AttentionGrams:
        grams, weights = super().attention(name), dense_weights(self, name)
        heads, key_input = len(weights.query), self.centred.get(name, grams.key_input)
        by_head = [weights.key[i] @ key_input @ weights.key[i].T for i in range(heads)]
        queries = torch.stack([weights.query[i] @ grams.query_input @ weights.query[i].T for i in range(heads)])
        root = square_root(grams.key_input)

        def share(rows: torch.Tensor) -> torch.Tensor:
            gram = rows.flatten(0, 1).T @ rows.flatten(0, 1)
            return gram / (root.mT @ gram @ root).trace()

        output = weights.output.transpose(1, 2).flatten(0, 1)
        return replace(
            grams,
            query_gradient=torch.block_diag(*by_head),
            key_gradient=share(square_root(queries).mT @ weights.key)
            + share(square_root(weights.output.mT @ weights.output).mT @ weights.value),
            output_gradient=torch.eye(len(root), dtype=root.dtype) / (output.T @ grams.mixed @ output).trace(),
        )


DENSE: dict[str, DenseCheckpoint] = {}


def dense_weights(calibration: Calibration, name: LayerName) -> AttentionWeights:
    dense = DENSE["model"]
    return attention_weights(dense, dict(dense.layers)[name])


def unclipped(dense: DenseCheckpoint, calibration: Calibration) -> Calibration:
    objective = objective_of(dense.config, dense.model_class)
    collector = Unclipped(dense, objective, calibration.record["seed"])
    for batch in calibration.batches:
        collector.add(batch)
    return Calibration(collector.result(), calibration.batches, calibration.record)


def isotropic(dense: DenseCheckpoint, calibration: Calibration, *, centre: bool) -> Calibration:
    found = Isotropic(calibration.grams, calibration.batches, calibration.record)
    object.__setattr__(found, "centred", centred_keys(dense, calibration) if centre else {})
    return found


@torch.no_grad()
def centred_keys(dense: DenseCheckpoint, calibration: Calibration) -> dict[LayerName, torch.Tensor]:
    """The covariance (d, d) of every attention layer's key input within a series, float64."""
    objective = objective_of(dense.config, dense.model_class)
    sums: dict[LayerName, GramSum] = {}
    for name, values, mask in captured(dense, calibration, [(n, f"{m}.k") for n, m in dense.layers]):
        weights = mask.unsqueeze(-1).to(values.dtype)
        mean = (values * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp_min(1)
        sums.setdefault(name, GramSum()).add((values - mean)[mask])
    scale = {"encoder": 1.0 / calibration.record["num_tokens"]}
    labels = sum(int(objective.masks(batch)["decoder"].sum()) for batch in calibration.batches)
    scale["decoder"] = 1.0 / labels
    return {
        name: unpacked(total.packed) * scale["decoder" if name.kind.startswith("decoder") else "encoder"]
        for name, total in sums.items()
        if total.packed is not None
    }


@torch.no_grad()
def captured(
    dense: DenseCheckpoint, calibration: Calibration, places: list[tuple[LayerName, str]]
) -> Iterator[tuple[LayerName, torch.Tensor, torch.Tensor]]:
    """(name, input of the module (batch, length, size), bool mask (batch, length)) for every batch and place."""
    model, objective = dense.float_model(), objective_of(dense.config, dense.model_class)
    seen: dict[LayerName, torch.Tensor] = {}
    for name, module in places:
        model.get_submodule(module).register_forward_pre_hook(
            lambda _, inputs, name=name: seen.__setitem__(name, inputs[0])
        )
    for batch in calibration.batches:
        objective.predict(model, batch)
        masks = objective.masks(batch)
        for name, values in seen.items():
            of_decoder = name.kind.startswith("decoder")  # the keys of cross-attention are the encoder's
            yield name, values, masks["decoder" if of_decoder else "encoder"]


def whitened(dense: DenseCheckpoint, calibration: Calibration, ratio: float) -> PreTrainedModel:
    """Each of q, k, v and o alone, truncated in the metric of its own input (arXiv 2403.07378), as thin factors of that ratio."""
    weights = {name: tensor.clone() for name, tensor in dense.weights.items()}
    for name, module in dense.layers:
        grams = calibration.attention(name)
        inputs = {"q": grams.query_input, "k": grams.key_input, "v": grams.key_input, "o": grams.mixed}
        for part, gram in inputs.items():
            weight = weights[f"{module}.{part}.weight"].double()
            rank = max(1, int(ratio * weight.numel() / sum(weight.shape)))
            left, right = balanced_basis((weight.T @ weight)[None], gram[None]).truncate(rank)
            weights[f"{module}.{part}.weight"] = (weight @ left[0] @ right[0].T).to(
                dense.weights[f"{module}.q.weight"]
            )
    return rebuilt(dense, weights)


def rebuilt(dense: DenseCheckpoint, weights: dict[str, torch.Tensor], width: int | None = None) -> PreTrainedModel:
    config = T5.lowrank_config(dense.config)
    if width is not None:
        for entry in (entry for entries in config.feed_forward_ranks.values() for entry in entries):
            entry["width"] = width
    return build_model(
        dense.lowrank_class,
        config,
        weights,
        tied_keys=dense.tied_keys,
        generation_config=dense.generation_config,
    )


def fewer_neurons(dense: DenseCheckpoint, calibration: Calibration, ratio: float) -> PreTrainedModel:
    """The neurons that explain most of each feed-forward layer's output, chosen greedily, and `wo` refitted by least squares."""
    places = [(name, f"{module}.wo") for name, module in dense.feed_forward_layers]
    sums: dict[LayerName, GramSum] = {}
    for name, values, mask in captured(dense, calibration, places):
        sums.setdefault(name, GramSum()).add(values[mask])
    weights = {name: tensor.clone() for name, tensor in dense.weights.items()}
    width = max(1, round(ratio * dense.config.d_ff))
    for name, module in dense.feed_forward_layers:
        packed = sums[name].packed
        assert packed is not None
        gram, outer = unpacked(packed), weights[f"{module}.wo.weight"].double()
        kept = pivots(gram * outer.norm(dim=0) * outer.norm(dim=0)[:, None], width)
        refitted = torch.linalg.lstsq(gram[kept][:, kept], gram[kept] @ outer.T).solution.T
        weights[f"{module}.wo.weight"] = refitted.to(dense.weights[f"{module}.wo.weight"])
        for inner in dense.inner_names:
            weights[f"{module}.{inner}.weight"] = weights[f"{module}.{inner}.weight"][kept]
    return rebuilt(dense, weights, width)


def pivots(gram: torch.Tensor, count: int) -> torch.Tensor:
    """The first pivots of a pivoted Cholesky factorization of a positive semidefinite matrix."""
    rest = gram.clone()
    kept: list[int] = []
    for _ in range(count):
        diagonal = rest.diagonal().clone()
        diagonal[kept] = -1.0
        best = int(diagonal.argmax())
        column = rest[:, best] / diagonal[best].clamp_min(1e-300).sqrt()
        rest -= column[:, None] * column
        kept.append(best)
    return torch.tensor(sorted(kept))


@torch.no_grad()
def held_out(model: PreTrainedModel, objective: Objective, num_batches: int) -> Callable[[PreTrainedModel], float]:
    """A function from a compressed model to its divergence from the dense one, in nats a token."""
    supply = SyntheticBatches(ChronosConfig(**model.config.chronos_config), num_batches, seed=HELD_OUT_SEED)
    batches = [supply[i] for i in range(num_batches)]
    wanted = [objective.predict(model, batch) for batch in batches]

    @torch.no_grad()
    def measure(found: PreTrainedModel) -> float:
        found = found.float()
        pairs = zip(wanted, batches)
        total = sum(objective.divergence(states, objective.predict(found, batch)) for states, batch in pairs)
        return total / sum(len(states) for states in wanted)

    return measure


def main(
    source: Annotated[str, typer.Argument(help="A dense Chronos-T5: Hub id, folder, or 'reference'.")] = "reference",
    ratios: Annotated[str, typer.Option(help="Shares of the attention parameters.")] = "0.25,0.15,0.075,0.05",
    feed_forward_ratios: Annotated[str, typer.Option(help="Shares of the feed-forward parameters.")] = "0.5,0.25",
    num_batches: Annotated[int, typer.Option(help="Calibration batches, and held-out ones.")] = 32,
    seed: int = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Print one table for the attention and one for the feed-forward layers."""
    warnings.simplefilter("ignore", UserWarning)
    model = load_chronos(source)
    dense = DENSE["model"] = load_dense(model)
    calibration = calibrate(dense, num_batches=num_batches, seed=seed)
    measure = held_out(model, objective_of(dense.config, dense.model_class), num_batches)
    gradients = {
        "gradients not clipped": unclipped(dense, calibration),
        "no gradients, centred keys": isotropic(dense, calibration, centre=True),
        "no gradients, uncentred keys": isotropic(dense, calibration, centre=False),
    }

    def compress(**arguments: object) -> PreTrainedModel:
        return compress_pretrained(model, **{"calibration": calibration, **arguments})  # type: ignore[arg-type]

    def uniform(ratio: float) -> PreTrainedModel:
        return compress(uniform=max(1, int(ratio * model.config.d_kv)))

    def schedule(ratio: float) -> PreTrainedModel:
        """The paper's growth at the largest first rank that keeps the ratio."""
        for base in range(100 * model.config.d_kv, 0, -1):
            found = T5.lowrank_config(dense.config).__class__(
                **{**dense.config.to_dict(), "base_rank": base / 100, "rank_growth": 0.35}
            )
            kept = [entry["qk"] for entries in found.attention_ranks.values() for entry in entries]
            if sum(kept) <= ratio * model.config.d_kv * len(kept) or base == 1:
                return compress(schedule=(base / 100, 0.35))
        raise AssertionError

    attention: dict[str, Callable[[float], PreTrainedModel]] = {
        "the default": lambda ratio: compress(ratio=ratio),
        "smaller heads alone": lambda ratio: compress(ratio=ratio, form="per_head"),
        "latents alone": lambda ratio: compress(ratio=ratio, form="latent"),
        "without the refit": lambda ratio: compress(ratio=ratio, refit=False),
        **{
            name: lambda ratio, found=found: compress(ratio=ratio, calibration=found)
            for name, found in gradients.items()
        },
        "smaller heads, the same rank everywhere": uniform,
        "smaller heads, ranks by the paper's schedule": schedule,
        "weights alone": lambda ratio: compress(ratio=ratio, calibration=None),
        "single matrices, whitened": lambda ratio: whitened(dense, calibration, ratio),
        "the paper's, the same parameters as thin factors": lambda ratio: compress_pretrained(
            model, ratio=ratio / 2, method="paper"
        ),
        "the paper's, the same share of ranks": lambda ratio: compress_pretrained(model, ratio=ratio, method="paper"),
    }
    feed_forward: dict[str, Callable[[float], PreTrainedModel]] = {
        "the default": lambda ratio: compress(ratio=1.0, feed_forward_ratio=ratio),
        "without the refit": lambda ratio: compress(ratio=1.0, feed_forward_ratio=ratio, refit=False),
        "weights alone": lambda ratio: compress(ratio=1.0, feed_forward_ratio=ratio, calibration=None),
        "fewer neurons, refitted": lambda ratio: fewer_neurons(dense, calibration, ratio),
    }
    results = {}
    for title, alternatives, text in (
        ("attention", attention, ratios),
        ("feed_forward", feed_forward, feed_forward_ratios),
    ):
        shares = [float(share) for share in text.split(",")]
        results[title] = {
            name: {share: _figure(build, share, measure) for share in shares}
            for name, build in track(alternatives.items(), description=title, console=Console(stderr=True))
        }
        table = Table(title=f"{source}: added nats a token, by the share of {title} parameters kept")
        table.add_column("alternative")
        for share in shares:
            table.add_column(str(share), justify="right")
        for name, figures in results[title].items():
            table.add_row(name, *("-" if figure is None else f"{figure:.4f}" for figure in figures.values()))
        Console(markup=False).print(table)  # a path is no markup
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=2) + "\n")


def _figure(
    build: Callable[[float], PreTrainedModel], share: float, measure: Callable[[PreTrainedModel], float]
) -> float | None:
    try:
        return measure(build(share))
    except ValueError:  # this alternative cannot be so small
        return None


if __name__ == "__main__":
    typer.run(main)
