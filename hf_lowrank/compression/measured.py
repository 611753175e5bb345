"""The layers of a model, what the data says of them, and the models that are built of it, at any ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from ..checkpoints.rank_table import FORMS, ComponentName, RankTable
from ..progress import progress
from .allocation import Component
from .assembly import factorize
from .calibration import Calibration
from .latency import Speed
from .layers import AttentionLayer, FeedForwardLayer, Layer, attention_layer, feed_forward_layer
from .policies import choose_ranks, component_ranks, largest_speedup
from .record import kept_share, record_of, warn_of_loss
from .sensitivity import PROBE_ARITHMETIC, measured_losses, reweighted
from .work import Work, with_arguments

__all__ = ["Measured", "attention_layers", "built", "measure_layers", "weighed"]


@dataclass(frozen=True)
class Measured:
    """What the data says of a dense model's layers, once for any budgets."""

    calibration: Calibration | None
    speed: Speed | None
    attention: list[AttentionLayer]
    feed_forward: list[FeedForwardLayer]
    components: dict[ComponentName, Component]

    @property
    def layers(self) -> list[Layer]:
        return [*self.attention, *self.feed_forward]

    def table(self, work: Work) -> RankTable:
        """The ranks that the settings choose."""
        return choose_ranks(
            work.settings, work.forms, self.attention, self.feed_forward, self.components, work.config, self.speed
        )

    def largest_speedup(self, work: Work) -> float:
        """What is predicted of the smallest ranks."""
        assert self.speed is not None
        return largest_speedup(self.layers, self.components, work.settings.multiple_of, self.speed)


def measure_layers(work: Work, calibration: Calibration | None, speed: Speed | None) -> Measured:
    """The layers, the losses of their components being those of their spectra."""
    settings = work.settings
    if calibration is None and settings.quantize is not None:
        raise ValueError(f"quantize needs a calibration, and there are no data for {work.dense.source}.")
    attention, feed_forward = attention_layers(work, calibration), _feed_forward_layers(work, calibration)
    components = {
        name: component
        for layer in (*attention, *feed_forward)
        for name, component in layer.components(weight=1.0 if calibration is None else None).items()
    }
    return Measured(calibration, speed, attention, feed_forward, components)


def weighed(work: Work, measured: Measured, *, arithmetic: float = PROBE_ARITHMETIC) -> Measured:
    """With losses as they are measured: the spectra of components say how a loss falls with the rank, not how much it is.

    Each form is measured at the ranks that it would get alone, or at the fewest where those are not fast enough: a guess for one beside a
    measurement of the other would often win by being wrong.
    """
    calibration, feed_forward, components = measured.calibration, measured.feed_forward, measured.components
    if calibration is None or not (work.settings.has_budgets or feed_forward):
        return measured
    has_choice = "auto" in work.forms.values()
    forms = (
        [[layer.only(form) for layer in measured.attention] for form in FORMS] if has_choice else [measured.attention]
    )
    losses: dict[ComponentName, float] = {}
    ranks: dict[ComponentName, int] = {}
    float_model = work.dense.float_model()
    for attention in forms:
        alone, within_reach = replace(measured, attention=attention), work
        if measured.speed is not None:
            target: Any = work.settings.target_speedup
            within_reach = with_arguments(work, target_speedup=min(target, alone.largest_speedup(work)))
        trial = alone.table(within_reach)
        new: list[Layer] = [*attention, *(feed_forward if not losses else [])]
        ranks |= component_ranks(new, trial)
        losses |= measured_losses(
            work.dense,
            float_model,
            new,
            trial,
            calibration.batches,
            components,
            arithmetic=arithmetic,
            show_progress=work.show_progress,
        )
    return replace(measured, components=reweighted(components, ranks, losses))


def built(work: Work, measured: Measured, table: RankTable) -> PreTrainedModel:
    """The model of these ranks."""
    settings, layers, components = work.settings, measured.layers, measured.components
    table.write(work.config)
    losses = {name: float(components[name].loss[rank]) for name, rank in component_ranks(layers, table).items()}
    work.config.compression = _record(work, layers, table, losses, measured.calibration, measured.speed)
    if measured.calibration is None:
        kept = kept_share(work.config, [layer.name for layer in measured.attention])
        warn_of_loss(settings, losses, kept, stacklevel=4)
    data = measured.calibration if settings.refit else None
    return factorize(
        work.dense, work.config, layers, table, data, quantize=settings.quantize, show_progress=work.show_progress
    )


def attention_layers(work: Work, calibration: Calibration | None) -> list[AttentionLayer]:
    """All attention layers, with the bases of the forms that each may get."""
    dense, settings = work.dense, work.settings
    given = RankTable.of(work.config)
    layers = []
    for name, _ in progress(dense.layers, "Measuring attention", work.show_progress):
        form = given[name].form if settings.policy == "ranks" else work.forms[name.kind]
        layers.append(
            attention_layer(
                dense,
                name,
                None if calibration is None else calibration.attention(name),
                tuple(FORMS) if form == "auto" else (form,),
                # A latent of more than half of d_model rarely saves anything; the other policies may ask for one.
                max_rank=dense.config.d_model // 2 if settings.has_budgets else None,
            )
        )
    return layers


def _feed_forward_layers(work: Work, calibration: Calibration | None) -> list[FeedForwardLayer]:
    """All feed-forward layers where they are compressed, otherwise none."""
    if not work.settings.has_feed_forward:
        return []
    names = progress(work.dense.feed_forward_layers, "Measuring feed-forward", work.show_progress)
    return [
        feed_forward_layer(work.dense, name, None if calibration is None else calibration.feed_forward(name))
        for name, _ in names
    ]


def _record(
    work: Work,
    layers: list[Layer],
    table: RankTable,
    losses: Mapping[ComponentName, float],
    calibration: Calibration | None,
    speed: Speed | None,
) -> dict[str, Any]:
    dense, settings = work.dense, work.settings
    more: dict[str, Any] = {
        "calibration": None if calibration is None else {**calibration.record, "refit": settings.refit}
    }
    if settings.policy != "ranks":
        more |= {"form": work.forms, "multiple_of": settings.multiple_of}
        if settings.feed_forward_ratio is not None:
            more["feed_forward_ratio"] = settings.feed_forward_ratio
    if speed is not None:
        more["speed"] = speed.record(RankTable({layer.name: layer.dense_ranks for layer in layers}), table)
    return record_of(dense, settings, losses, seed=None if calibration is None else settings.seed, **more)
