"""What a user asks of a compression, checked before any work starts."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np

from ..checkpoints.families import Family
from ..checkpoints.rank_table import FORMS
from ..files import write_json
from .allocation import check_argument
from .baseline import MATRIX_POLICIES

__all__ = ["BACKENDS", "BUDGETS", "POLICIES", "CompressionSettings", "SettingsArguments"]

Form = Literal["auto", "per_head", "latent"]
Method = Literal["joint", "paper"]
Quantize = Literal["int8", "int4"]
Backend = Literal["torch", "onnx", "onnx-int8", "openvino", "openvino-int8", "openvino-bfloat16"]

# The arguments that are budgets, and what they bound.
BUDGETS = {
    "ratio": "parameters",
    "total_ratio": "parameters",
    "max_cache_ratio": "cache",
    "target_speedup": "seconds",
}
# The arguments that say how ranks are chosen, of which one is given, or several budgets; and what the first is where none is given.
POLICIES = ("max_loss", *BUDGETS, "epsilon", "energy", "uniform", "schedule", "ranks")
DEFAULT_MAX_LOSS = 0.01
# Where forecasts are timed: the model itself in PyTorch, or an export of this format and in these numbers.
BACKENDS: dict[str, tuple[str, str | None] | None] = {
    "torch": None,
    "onnx": ("onnx", None),
    "onnx-int8": ("onnx", "int8"),
    "openvino": ("openvino", None),
    "openvino-int8": ("openvino", "int8"),
    "openvino-bfloat16": ("openvino", "bfloat16"),
}


class SettingsArguments(TypedDict, total=False):
    """The fields of `CompressionSettings`, for those who give them as keywords."""

    max_loss: float | None
    ratio: float | None
    total_ratio: float | None
    max_cache_ratio: float | None
    target_speedup: float | Literal["max"] | None
    feed_forward_ratio: float | None
    epsilon: float | None
    energy: float | None
    uniform: int | None
    schedule: tuple | None
    ranks: dict[str, list[dict[str, Any]]] | None
    form: Form | Mapping[str, Form]
    method: Method
    multiple_of: int
    quantize: Quantize | None
    backend: Backend
    calibration: Any
    refit: bool
    seed: int


@dataclass(frozen=True, kw_only=True)
class CompressionSettings:
    """What `compress_pretrained` is asked for.

        settings = CompressionSettings(total_ratio=0.25, multiple_of=8)
        settings.save("settings.json")
        model = compress_pretrained("amazon/chronos-bolt-small", settings)

    One of the arguments down to `ranks` says how ranks are chosen, `max_loss` of 0.01 where none is given; `ratio` to `target_speedup`
    are budgets and may be combined, and `target_speedup` goes with `max_loss` too.

    Args:
        max_loss: The smallest model whose forecasts are expected to lose at most this share more than the dense one's: the mean quantile
            loss on series that are held out of the calibration, if values follow the dense model's forecasts, with 95 % confidence. A
            search over `total_ratio` of half a dozen compressions, of Chronos models. With `target_speedup="max"` the fastest such model,
            by a search over speed-ups; with a number the model that is as fast as that, or an error that says what it loses.
        ratio: Keep at most this share of the attention parameters, spent where it saves the most.
        total_ratio: The same of attention and feed-forward parameters together; the two share the budget.
        max_cache_ratio: Keep at most this share of the key/value cache of a token; alone or beside a ratio.
        target_speedup: Forecast this many times as fast as the dense model in the same pipeline, that of low-rank models in PyTorch or, with
            `backend`, that of exported ones. What ranks cost on this machine in attention and feed-forward layers is timed for half a minute
            or so (of an export for a minute or two); then whole forecasts with the ranks that follow are, which are chosen again, at most twice, where they are not fast enough (and a warning says if that did not
            help). `config.compression["speed"]` has the workload and what was predicted and measured. Alone or beside the other budgets;
            `"max"` beside `max_loss` alone.
        epsilon: Keep the singular values with sigma_j / sigma_1 >= epsilon (the paper's rule).
        energy: The smallest ranks that drop at most this share of each component's loss.
        uniform: The same rank everywhere.
        schedule: (base_rank, rank_growth[, rounding]): d~_i = ceil(d~_0 (1 + i)^alpha); a rounding of `"pow2"` in place of `"ceil"` takes the
            nearest power of two, as the paper's code does.
        ranks: An explicit table, as `LowRankT5Config.attention_ranks`; kinds left out stay dense.
        feed_forward_ratio: Keep at most this share of the feed-forward parameters, beside any rule for the attention.
        form: `"per_head"` (smaller heads), `"latent"` (one latent a token for all heads), or `"auto"`: for each layer the one
            that loses less under the budget, and smaller heads where there is no budget. For all attention or, as a dictionary, for each
            of `"encoder_self"`, `"decoder_self"` and `"cross"` (in Chronos-2 `"time"` and `"group"`; time attention has rotary
            embeddings and is always `"per_head"`).
        method: `"joint"`, or `"paper"`: each of q, k, v and o alone, its dense product written back, as the scripts of arXiv
            2510.03358 do, a baseline that looks at no data and saves nothing at run time.
        multiple_of: Round ranks up to a multiple (8 is kind to hardware).
        quantize: `"int8"` or `"int4"`, for matrices that are kept as integers, a quarter or less of the size; those that would cost too much
            stay as they are (of `"int4"` some have 8 bits). Which, is measured on the calibration data, and the refit corrects the
            rounding. A forecast takes the time that it takes without.
        backend: Where the forecasts of `target_speedup` are timed: `"torch"`, the model itself, or what `export_model` makes of a Chronos-Bolt
            or Chronos-2, on the CPU: `"onnx"` and `"onnx-int8"` in ONNX Runtime, `"openvino"`, `"openvino-int8"` and `"openvino-bfloat16"` in
            OpenVINO. In int8 the patch embedding and the quantile head are timed in float, and all other products in integers. Needs
            `pip install 'hf-lowrank[export]'`.
        calibration: The data that the loss is measured on: `"synthetic"` (the default of Chronos checkpoints), series, groups of series or
            token batches as `calibrate` takes them, a `Calibration` or the .safetensors file it was saved in, or None: weights alone, inputs taken as white noise.
            A text T5 needs token batches; without them it is compressed by its weights alone, with a warning.
        refit: Refit the last matrix of every truncated layer by least squares on the calibration data.
        seed: Of the calibration.

    Raises:
        ValueError: An argument is out of range, or two of them contradict each other.
    """

    max_loss: float | None = None
    ratio: float | None = None
    total_ratio: float | None = None
    max_cache_ratio: float | None = None
    target_speedup: float | Literal["max"] | None = None
    epsilon: float | None = None
    energy: float | None = None
    uniform: int | None = None
    schedule: tuple | None = None
    ranks: dict[str, list[dict[str, Any]]] | None = None
    feed_forward_ratio: float | None = None
    form: Form | Mapping[str, Form] = "auto"
    method: Method = "joint"
    multiple_of: int = 1
    quantize: Quantize | None = None
    backend: Backend = "torch"
    calibration: Any = "synthetic"
    refit: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (*POLICIES, "feed_forward_ratio", "form", "multiple_of", "seed"):
            # Plain numbers and copies of tables, for they are recorded in the config and saved as JSON.
            object.__setattr__(self, name, _plain(getattr(self, name)))
        if not self.policy_arguments and self.method == "joint" and self.calibration is not None:
            object.__setattr__(self, "max_loss", DEFAULT_MAX_LOSS)
        self._check_policy()
        check_argument("multiple_of", self.multiple_of)
        self._check_feed_forward()
        self._check_method()
        if self.policy == "ranks" and self.form != "auto":
            raise ValueError("ranks has the form of every layer: leave out form.")
        if self.policy in ("schedule", "ranks") and self.multiple_of != 1:
            raise ValueError(f"multiple_of rounds what a policy finds; {self.policy} says the ranks themselves.")
        self._check_form()
        if not isinstance(self.refit, bool):
            raise ValueError(f"refit must be True or False, found {self.refit!r}.")
        self._check_quantize()
        if self.backend not in tuple(BACKENDS):
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, found {self.backend!r}.")
        if self.backend != "torch" and self.target_speedup is None:
            raise ValueError(
                f"backend={self.backend!r} is where target_speedup is timed: give it too, as in target_speedup=2."
            )
        if self.max_loss is not None and self.calibration is None:
            raise ValueError("max_loss is measured on the calibration data: leave out calibration=None.")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0:
            raise ValueError(f"seed must be an integer of at least 0, found {self.seed!r}.")

    def _check_quantize(self) -> None:
        if self.quantize not in (None, "int8", "int4"):
            raise ValueError(f"quantize must be None, 'int8' or 'int4', found {self.quantize!r}.")
        if self.quantize is None:
            return
        if self.method == "paper":
            raise ValueError("quantize is for method='joint'; the paper's method rounds nothing.")
        if self.calibration is None or not self.refit:
            raise ValueError(
                "quantize needs a calibration and the refit: they say which matrices bear it, and correct what it costs."
            )

    def _check_form(self) -> None:
        if not isinstance(self.form, (str, Mapping)):
            raise ValueError(
                f"form must be 'auto', 'per_head', 'latent' or a dictionary of them, found {self.form!r}."
            )
        for form in [self.form] if isinstance(self.form, str) else self.form.values():
            if form not in ("auto", *FORMS):
                raise ValueError(f"form must be 'auto', 'per_head' or 'latent', found {form!r}.")

    def _check_policy(self) -> None:
        given, budgets = self.policy_arguments, [name for name in self.policy_arguments if name in BUDGETS]
        if not given:
            raise ValueError(
                "Say how much to keep, as in total_ratio=0.5 (half of the attention and feed-forward parameters) or ratio=0.15 (of the "
                "attention alone)."
            )
        if "max_loss" in given and (others := given.keys() - {"max_loss", "target_speedup"}):
            raise ValueError(f"max_loss finds how small a model can be: leave out {', '.join(sorted(others))}.")
        if self.target_speedup == "max" and self.max_loss is None:
            raise ValueError("target_speedup='max' is as fast as max_loss allows: give it too, as in max_loss=0.01.")
        if len(given) > 1 and len(budgets) < len(given) and "max_loss" not in given:
            raise ValueError(
                f"Give one rule for the ranks, found {' and '.join(sorted(given))}; only {', '.join(BUDGETS)} hold together."
            )
        if "ratio" in given and "total_ratio" in given:
            raise ValueError(
                "Give either ratio (of the attention) or total_ratio (of attention and feed-forward), not both."
            )
        for name, value in given.items():
            if name == "schedule":
                if not isinstance(value, (tuple, list)) or len(value) not in (2, 3):
                    raise ValueError(
                        f"schedule must be (base_rank, rank_growth) or (base_rank, rank_growth, rounding), found {value!r}."
                    )
                if len(value) == 3 and value[2] not in ("ceil", "pow2"):
                    raise ValueError(f"schedule: the rounding must be 'ceil' or 'pow2', found {value[2]!r}.")
            elif name != "ranks":
                check_argument(name, value)

    def _check_feed_forward(self) -> None:
        if self.feed_forward_ratio is None:
            return
        check_argument("feed_forward_ratio", self.feed_forward_ratio)
        if self.total_ratio is not None or self.max_loss is not None:
            budget = "total_ratio" if self.total_ratio is not None else "what max_loss finds"
            raise ValueError(f"feed_forward_ratio is part of {budget}: give one of them.")
        if self.target_speedup is not None:
            raise ValueError("target_speedup chooses the feed-forward ranks: leave out feed_forward_ratio.")

    def _check_method(self) -> None:
        if self.method not in ("joint", "paper"):
            raise ValueError(f"method must be 'joint' or 'paper', found {self.method!r}.")
        if self.method == "paper" and (
            self.policy not in MATRIX_POLICIES
            or self.multiple_of != 1
            or self.form not in ("auto", "per_head")
            or self.feed_forward_ratio is not None
        ):
            raise ValueError(
                "method='paper' takes epsilon, ratio, uniform or energy, and neither form, multiple_of nor feed_forward_ratio: "
                "it keeps the dense shapes."
            )

    @property
    def policy_arguments(self) -> dict[str, Any]:
        """The arguments that say how ranks are chosen, of those that were given."""
        return {name: value for name in POLICIES if (value := getattr(self, name)) is not None}

    @property
    def policy(self) -> str:
        """The name of the rule: that of its argument, or `"budgets"` for several of them."""
        names = list(self.policy_arguments)
        return names[0] if len(names) == 1 else "budgets"

    @property
    def policy_value(self) -> Any:
        """The argument of a rule that has one."""
        return next(iter(self.policy_arguments.values()))

    @property
    def has_budgets(self) -> bool:
        """Whether ranks are chosen under budgets, and not by one rule for each component or a table."""
        return set(self.policy_arguments) <= {"max_loss", *BUDGETS}

    @property
    def covers_feed_forward(self) -> bool:
        """Whether the feed-forward layers are under the same budgets as the attention."""
        return not {"max_loss", "total_ratio", "target_speedup"}.isdisjoint(self.policy_arguments)

    @property
    def has_feed_forward(self) -> bool:
        """Whether feed-forward layers are compressed at all."""
        return self.feed_forward_ratio is not None or self.covers_feed_forward

    def forms_for(self, family: Family) -> dict[str, str]:
        """The form of each kind of attention of a family. Without a budget "auto" is smaller heads.

        Raises:
            ValueError: `form` names another kind of attention, or has a form that this kind cannot have.
        """
        kinds = list(family.attention)
        forms: dict[str, str] = dict.fromkeys(kinds, self.form) if isinstance(self.form, str) else {**self.form}
        if unknown := set(forms) - set(kinds):
            raise ValueError(f"form has unknown kinds of attention {sorted(unknown)}; known are {kinds}.")
        forms = {kind: forms.get(kind, "auto") for kind in kinds}
        for kind, value in forms.items():
            if kind in family.rotary:
                if value == "latent" and not isinstance(self.form, str):
                    raise ValueError(f"form: {kind} attention has rotary embeddings and can only be 'per_head'.")
                forms[kind] = "per_head"
        if not self.has_budgets:
            forms = {kind: "per_head" if value == "auto" else value for kind, value in forms.items()}
        return forms

    def to_dict(self) -> dict[str, Any]:
        """For programs: the settings that are not at their default.

        Raises:
            ValueError: The calibration is an object in memory, which has no name to write down.
        """
        if not (self.calibration is None or isinstance(self.calibration, (str, os.PathLike))):
            raise ValueError(
                "calibration must be a name or a file to be written down, found a "
                f"{type(self.calibration).__name__}; save it with Calibration.save and give the file."
            )
        settings = {
            one.name: getattr(self, one.name) for one in fields(self) if getattr(self, one.name) != one.default
        }
        return settings | ({"calibration": str(self.calibration)} if isinstance(self.calibration, os.PathLike) else {})

    def save(self, path: str | os.PathLike) -> None:
        """Write the settings as JSON, to a file that appears whole or not at all."""
        write_json(path, self.to_dict())

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> CompressionSettings:
        """Read what `save` wrote.

        Raises:
            OSError: The file cannot be read.
            ValueError: It is no JSON of settings, or one of them is out of range.
        """
        try:
            settings = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"settings: {path} must be JSON ({error}).") from error
        known = [one.name for one in fields(cls)]
        if not isinstance(settings, dict) or not set(settings) <= set(known):
            found = ", ".join(sorted(set(settings) - set(known))) if isinstance(settings, dict) else "no table"
            raise ValueError(f"settings: {path} must be a table of {', '.join(known)}; found {found}.")
        if "schedule" in settings:
            settings["schedule"] = tuple(settings["schedule"])
        return cls(**settings)


def _plain(value: Any) -> Any:
    """A deep copy with Python's own numbers in the place of numpy's."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value))
    return copy.deepcopy(value)
