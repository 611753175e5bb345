"""Matrices that are kept as integers: of 8 bits with a scale a row, or of 4 bits with a scale for each 32 numbers of a row.

They are small on disk and on their way. A forward pass multiplies with the numbers that they stand for, made once and kept in the
model's dtype, so a forecast takes the time that it takes with floating-point weights.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

if TYPE_CHECKING:
    from transformers import PreTrainedModel as Model  # which `KeepsIntegers` is mixed into
else:
    Model = object

# The largest code of each width; that of four bits with a sign of its own is -8.
LARGEST_CODE = {8: 127, 4: 7}
GROUP = 32  # numbers of a row that share a scale, where codes have 4 bits
LARGEST_SHARE = 255  # of a group's scale, in that of its row
# The ends of the names of floating-point tensors in a matrix or in thin factors.
FLOAT_TENSORS = tuple(f"{part}.{name}" for part in ("", ".down", ".up") for name in ("weight", "scales"))


class QuantizedLinear(nn.Module):
    """x W^T + b with W in integers: w = scale code / 127 of 8 bits; of 4 bits w = scale (share / 255) code / 7, a share for each group.

    Attributes:
        codes: int8 (out, in) of 8 bits; of 4 bits uint8 (out, ceil(in / 2)), the number of even index in the lower half.
        scales: (out,), floating-point: about the largest size of a number in each row.
        shares: uint8 (out, ceil(in / 32)), of 4 bits alone.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    shares: torch.Tensor

    def __init__(self, in_features: int, out_features: int, *, bits: int, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        if bits == 8:
            codes = torch.zeros(out_features, in_features, dtype=torch.int8)
        else:
            codes = torch.zeros(out_features, -(-in_features // 2), dtype=torch.uint8)
            self.register_buffer("shares", torch.zeros(out_features, -(-in_features // GROUP), dtype=torch.uint8))
        self.register_buffer("codes", codes)
        self.register_buffer("scales", torch.zeros(out_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self._kept: torch.Tensor | None = None

    @property
    def weight(self) -> torch.Tensor:
        """The matrix that the integers stand for, (out, in)."""
        kept = self._kept
        if kept is not None and (kept.device, kept.dtype) == (self.codes.device, self.scales.dtype):
            return kept
        return dequantized({name: getattr(self, name) for name in self.stored_names}, self.in_features)

    @property
    def stored_names(self) -> tuple[str, ...]:
        """The names of the tensors that stand for the matrix."""
        return ("codes", "scales") if self.bits == 8 else ("codes", "scales", "shares")

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        # Not where accelerate moves weights about, which it would not know of, nor in a graph, which cannot keep anything.
        if self._kept is None and not hasattr(self, "_hf_hook") and not torch.compiler.is_compiling():
            self._kept = weight
        return F.linear(states, weight, self.bias)

    def _apply(self, *args: Any, **kwargs: Any) -> QuantizedLinear:
        self._kept = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._kept = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, bias={self.bias is not None}"


def unpacked(codes: torch.Tensor, size: int) -> torch.Tensor:
    """The codes of 4 bits, int8 in [-8, 7] (out, size), that are packed in pairs, uint8 (out, ceil(size / 2))."""
    pairs = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)[..., :size]
    return pairs.to(torch.int8) - 8


def packed(codes: torch.Tensor) -> torch.Tensor:
    """What `unpacked` unpacks."""
    halves = F.pad(codes + 8, (0, codes.shape[-1] % 2)).to(torch.uint8)
    return halves[..., ::2] | (halves[..., 1::2] << 4)


def dequantized(stored: dict[str, torch.Tensor], size: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The matrix (out, size) that `codes`, `scales` and, of 4 bits, `shares` stand for, made in float32; by default in the scales' dtype."""
    scales = stored["scales"][:, None].float()
    if "shares" not in stored:
        matrix = stored["codes"].float() * (scales / LARGEST_CODE[8])
    else:
        steps = stored["shares"].float() * (scales / (LARGEST_SHARE * LARGEST_CODE[4]))
        matrix = unpacked(stored["codes"], size).float() * steps.repeat_interleave(GROUP, dim=-1)[:, :size]
    return matrix.to(stored["scales"].dtype if dtype is None else dtype)


def quantized_modules(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The matrices of a model that are kept as integers, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def initialize_quantized(module: nn.Module) -> bool:
    """Give a fresh module of integers its zeros, and say whether it is one."""
    if not isinstance(module, QuantizedLinear):
        return False
    for name in module.stored_names:
        init.zeros_(getattr(module, name))
    if module.bias is not None:
        init.zeros_(module.bias)
    return True


class KeepsIntegers(Model):
    """A model of which some matrices are kept as integers, as `config.weight_bits` says: their names, and 8 or 4."""

    def quantize_modules(self) -> None:
        """Put a `QuantizedLinear` in the place of each matrix that the configuration names; called before any weight is there.

        Raises:
            ValueError: It names what is no matrix of this model.
        """
        elsewhere = self._keys_to_ignore_on_load_unexpected or ()  # of an encoder alone, the decoder's
        modules = dict(self.named_modules())
        for name, bits in (self.config.weight_bits or {}).items():
            if any(re.match(pattern, f"{name}.") for pattern in elsewhere):
                continue
            linear = modules.get(name)
            if linear is None or type(linear) is not nn.Linear:
                raise ValueError(f"weight_bits names {name!r}, which is no matrix of {type(self).__name__}.")
            sizes = linear.in_features, linear.out_features
            module = QuantizedLinear(*sizes, bits=bits, bias=linear.bias is not None)
            self.set_submodule(name, module.to(linear.weight.device))
        # What is kept in float32 where the rest is float16, transformers makes float32, integers too: so it is named by its tensors.
        for part in self.modules() if self.config.weight_bits else ():
            if kept := getattr(part, "_keep_in_fp32_modules", None):
                part._keep_in_fp32_modules = [f"{name}{end}" for name in kept for end in FLOAT_TENSORS]

    def dequantize(self, dtype: torch.dtype | None = None) -> Any:
        """Put ordinary matrices in the place of the integers, of the numbers that they stand for, to train the model or to change it.

        Args:
            dtype: Of these matrices; by default that of their scales.

        Returns:
            The model, changed in place.
        """
        for name, module in quantized_modules(self).items():
            weight = module.weight.detach().clone()
            with torch.device("meta"):
                linear = nn.Linear(module.in_features, module.out_features, bias=False)
            linear.weight = nn.Parameter(weight if dtype is None else weight.to(dtype))
            linear.bias = module.bias
            self.set_submodule(name, linear.train(module.training))
        self.config.weight_bits = None
        return self

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """As transformers', a number that is kept as an integer being one as well."""
        count = super().num_parameters(only_trainable=only_trainable, exclude_embeddings=exclude_embeddings)
        if only_trainable:
            return count
        return count + sum(one.in_features * one.out_features for one in quantized_modules(self).values())

    def train(self, mode: bool = True) -> Any:
        """As transformers'.

        Raises:
            ValueError: The model has matrices of integers, which no step can change.
        """
        if mode and self.config.weight_bits:
            raise ValueError(
                f"{len(self.config.weight_bits)} matrices of this {type(self).__name__} are integers, "
                "which are not trained; call model.dequantize() first."
            )
        return super().train(mode)
