"""What can be wrong with a saved checkpoint: seeded changes of its tensors and files; those of its settings are in `mutated_settings`.

A mutation changes a folder and says what it did, and, where no loader can know that something is wrong, why not. Whatever it does not
give a reason for is detectable: the output must be an error, or what it was.
"""

from __future__ import annotations

import json
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass

import torch
from checkpoints import Draft
from mutated_settings import SETTINGS
from safetensors.torch import save_file

__all__ = ["MUTATIONS", "Done", "mutate"]

INDEX = "model.safetensors.index.json"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 12345678\n"


@dataclass(frozen=True)
class Done:
    """A mutation that was done.

    Attributes:
        what: In words.
        undetectable: Why no loader can see it; None where one can.
    """

    what: str
    undetectable: str | None = None


Mutation = Callable[[Draft, random.Random], Done]


def mutate(draft: Draft, number: int) -> Done:
    """Change the checkpoint as the mutation of this number does: every mutation comes once in a round, each time drawn anew."""
    mutations = [mutation for mutation, fits in MUTATIONS if fits(draft)]
    rng = random.Random(f"{draft.kind} {number}")
    done = mutations[number % len(mutations)](draft, rng)
    draft.write()
    return done


# ---- Tensors ---------------------------------------------------------------------------------------------------------


def a_name(draft: Draft, rng: random.Random, *, floats: bool = True) -> str:
    names = [name for name, tensor in sorted(draft.tensors.items()) if not floats or tensor.is_floating_point()]
    return rng.choice(names)


def dropped(draft: Draft, rng: random.Random) -> Done:
    names = rng.sample(sorted(draft.tensors), rng.choice([1, 1, 1, 3]))
    for name in names:
        del draft.tensors[name]
    return Done(f"without {names}")


def renamed(draft: Draft, rng: random.Random) -> Done:
    name = a_name(draft, rng, floats=False)
    new = rng.choice([f"module.{name}", f"{name}_", name.removesuffix(".weight"), name.replace("block.0", "block.7")])
    if new == name:
        new = f"model.{name}"
    draft.tensors[new] = draft.tensors.pop(name)
    return Done(f"{name} as {new}")


def all_renamed(draft: Draft, rng: random.Random) -> Done:
    prefix = rng.choice(["module.", "model.", "base_model.model.", "_orig_mod."])
    for name in sorted(draft.tensors):
        draft.tensors[prefix + name] = draft.tensors.pop(name)
    return Done(f"every name with {prefix}", "transformers looks below some prefixes" if prefix == "model." else None)


def added(draft: Draft, rng: random.Random) -> Done:
    names = ["extra", "encoder.block.9.layer.0.layer_norm.weight", "classifier.weight", "shared.bias"]
    name = rng.choice([*names, a_name(draft, rng) + ".absmax"])
    draft.tensors[name] = torch.ones(3, 4)
    return Done(f"with {name}")


def misshapen(draft: Draft, rng: random.Random) -> Done:
    name = a_name(draft, rng, floats=False)
    tensor = draft.tensors[name]
    dim = rng.randrange(tensor.ndim)
    changes = {
        "longer": lambda: torch.cat([tensor, tensor.narrow(dim, 0, 1)], dim),
        "shorter": lambda: tensor.narrow(dim, 0, max(0, tensor.shape[dim] - 1)),
        "empty": lambda: tensor.narrow(dim, 0, 0),
        "with a dimension more": lambda: tensor.unsqueeze(dim),
        "flat": lambda: tensor.flatten() if tensor.ndim > 1 else tensor[None],
        "a number": lambda: tensor.flatten()[0],
    }
    change = rng.choice(sorted(changes))
    draft.tensors[name] = changes[change]()
    return Done(f"{name} {change}")


def transposed(draft: Draft, rng: random.Random) -> Done:
    name = rng.choice(sorted(name for name, tensor in draft.tensors.items() if tensor.ndim == 2))
    rows, columns = draft.tensors[name].shape
    draft.tensors[name] = draft.tensors[name].T
    square = "the transpose of a square matrix is another matrix of its shape"
    return Done(f"{name} transposed", square if rows == columns else None)


DTYPES = {torch.int8, torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64}
DTYPES |= {torch.float8_e4m3fn, torch.float8_e5m2}


def of_another_kind(draft: Draft, rng: random.Random) -> Done:
    name = a_name(draft, rng, floats=False)
    dtypes = DTYPES if draft.tensors[name].is_floating_point() else {torch.float32, torch.bool, torch.int8}
    dtype = rng.choice(sorted(dtypes, key=str))
    draft.tensors[name] = draft.tensors[name].to(dtype)
    integers = "the integers of a narrower type are the same numbers" if dtype == torch.int8 else None
    return Done(f"{name} as {dtype}", integers if "pairs" in name else None)


def all_of_another_kind(draft: Draft, rng: random.Random) -> Done:
    dtype = rng.choice(sorted(DTYPES, key=str))
    for name, tensor in draft.tensors.items():
        if tensor.is_floating_point():
            draft.tensors[name] = tensor.to(dtype)
    return Done(f"all as {dtype}")


def in_another_precision(draft: Draft, rng: random.Random) -> Done:
    dtype = rng.choice([torch.float16, torch.bfloat16, torch.float64])
    names = sorted(draft.tensors) if rng.random() < 0.5 else [a_name(draft, rng)]
    for name in names:
        if draft.tensors[name].is_floating_point():
            draft.tensors[name] = draft.tensors[name].to(dtype)
    return Done(f"{len(names)} tensors as {dtype}", "weights may have this precision")


def no_number(draft: Draft, rng: random.Random) -> Done:
    name = a_name(draft, rng)
    value = rng.choice([float("nan"), float("inf"), float("-inf")])
    flat = draft.tensors[name].view(-1)
    flat[rng.randrange(len(flat)) if rng.random() < 0.7 else slice(None)] = value
    return Done(f"{value} in {name}")


def swapped(draft: Draft, rng: random.Random) -> Done:
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name, tensor in sorted(draft.tensors.items()):
        if tensor.is_floating_point():
            by_shape.setdefault(tuple(tensor.shape), []).append(name)
    one, other = rng.sample(rng.choice([names for names in by_shape.values() if len(names) > 1]), 2)
    draft.tensors[one], draft.tensors[other] = draft.tensors[other], draft.tensors[one]
    return Done(f"{one} and {other} swapped", "both have one shape")


def other_values(draft: Draft, rng: random.Random) -> Done:
    name = a_name(draft, rng)
    factor = rng.choice([0.0, -1.0, 3.0, 1e6, 1e20, 1e38])
    draft.tensors[name] = draft.tensors[name] * factor
    is_finite = bool(draft.tensors[name].isfinite().all())
    return Done(f"{name} times {factor}", "all of them are finite numbers" if is_finite else None)


def flipped_bits(draft: Draft, rng: random.Random) -> Done:
    name = a_name(draft, rng)
    draft.tensors[name] = draft.tensors[name].clone()
    bits = draft.tensors[name].view(torch.int32).view(-1)
    for _ in range(rng.choice([1, 20])):
        bits[rng.randrange(len(bits))] ^= torch.tensor(1 << rng.randrange(31), dtype=torch.int32)
    is_finite = bool(draft.tensors[name].isfinite().all())
    return Done(f"bits of {name} flipped", "what came out are finite numbers" if is_finite else None)


def layers_dropped(draft: Draft, rng: random.Random) -> Done:
    stack = rng.choice(sorted({name.split(".")[0] for name in draft.tensors if ".block." in name}))
    blocks = sorted({name.split(".")[2] for name in draft.tensors if name.startswith(f"{stack}.block.")})
    block = rng.choice(blocks)
    for name in sorted(draft.tensors):
        if name.startswith(f"{stack}.block.{block}."):
            del draft.tensors[name]
    return Done(f"without block {block} of the {stack}")


def layer_added(draft: Draft, rng: random.Random) -> Done:
    for name in sorted(draft.tensors):
        if name.startswith("encoder.block.1."):
            draft.tensors[name.replace("block.1.", "block.9.")] = draft.tensors[name]
    return Done("with a layer more")


# ---- Chronos-2's frequencies -----------------------------------------------------------------------------------------


def pairs(draft: Draft, rng: random.Random) -> Done:
    name = rng.choice(sorted(name for name in draft.tensors if name.endswith(".pairs")))
    tensor = draft.tensors[name].clone()
    head, place = (rng.randrange(size) for size in tensor.shape)
    values = {
        "out of range": 4,
        "negative": -1,
        "huge": 2**40,
        "twice": int(tensor[head, place - 1]),
        "moved": None,
    }
    change = rng.choice(sorted(values))
    if change == "moved":
        draft.tensors[name] = tensor.flip(1)
        return Done(f"{name} in another order", "which head keeps which frequency is for the file to say")
    tensor[head, place] = values[change]
    draft.tensors[name] = tensor
    return Done(f"{name} with a frequency {change}")


# ---- Files -----------------------------------------------------------------------------------------------------------


def truncated(draft: Draft, rng: random.Random) -> Done:
    content = draft.weights.read_bytes()
    size = rng.choice([0, 4, 8, 100, rng.randrange(len(content)), len(content) - 1])
    draft.weights.write_bytes(content[:size])
    return Done(f"the weights end after {size} of {len(content)} bytes")


def replaced(draft: Draft, rng: random.Random) -> Done:
    contents = {
        "a pointer": POINTER.format("0" * 64).encode(),
        "text": b"<html>404: Not Found</html>",
        "random bytes": rng.randbytes(3000),
        "zeros": bytes(3000),
        "a huge header": struct.pack("<Q", 2**60) + b"{}",
        "a header that is a list": struct.pack("<Q", 2) + b"[]",
        "no tensors": struct.pack("<Q", 2) + b"{}",
    }
    content = rng.choice(sorted(contents))
    draft.weights.write_bytes(contents[content])
    return Done(f"in the place of the weights {content}")


def garbage_in_header(draft: Draft, rng: random.Random) -> Done:
    content = bytearray(draft.weights.read_bytes())
    (size,) = struct.unpack("<Q", content[:8])
    if rng.random() < 0.5:
        start = 8 + rng.randrange(size - 20)
        content[start : start + 20] = rng.randbytes(20)
        draft.weights.write_bytes(content)
        return Done(f"random bytes in the header at {start}")
    header = json.loads(content[8 : 8 + size])
    name = rng.choice(sorted(set(header) - {"__metadata__"}))
    key, value = rng.choice([("data_offsets", [0, 4]), ("shape", [-1, 2]), ("shape", [2**40, 2**40]), ("dtype", "F7")])
    header[name][key] = value
    text = json.dumps(header).encode()
    draft.weights.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    return Done(f"{key} of {name} is {value} in the header")


def gone(draft: Draft, rng: random.Random) -> Done:
    draft.weights.unlink()
    if rng.random() < 0.5:
        draft.weights.mkdir()
        return Done("a folder in the place of the weights")
    return Done("no weights")


class Payload:
    """What runs code where a pickle is trusted."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return open, (self.path, "w")


def pickled(draft: Draft, rng: random.Random) -> Done:
    tensors, path = dict(draft.tensors), draft.folder / "pytorch_model.bin"
    draft.weights.unlink()
    del draft.tensors
    contents = {
        "with code": {"shared.weight": Payload(str(draft.folder / "ran"))},
        "of numbers": dict.fromkeys(tensors, 1.0),
        "a list": list(tensors.values()),
        "as they are": tensors,
    }
    content = rng.choice([*sorted(contents), "text", "truncated"])
    if content == "text":
        path.write_text(rng.choice([POINTER, "", "404: Not Found"]))
    elif content == "with code":
        path.write_bytes(pickle.dumps(contents[content]))
    else:
        torch.save(contents.get(content, tensors), path)
    if content == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    return Done(f"weights as a pickle {content}")


def index(draft: Draft, rng: random.Random) -> Done:
    """Weights in two files, and something wrong with the index or the files."""
    names = sorted(draft.tensors)
    half = len(names) // 2
    parts = {"model-00001-of-00002.safetensors": names[:half], "model-00002-of-00002.safetensors": names[half:]}
    for file, kept in parts.items():
        save_file({name: draft.tensors[name].clone() for name in kept}, draft.folder / file, {"format": "pt"})
    draft.weights.unlink()
    del draft.tensors
    first, second = parts
    of_file = {name: file for file, kept in parts.items() for name in kept}
    content: object = {"metadata": {"total_size": 1}, "weight_map": of_file}
    some = rng.choice(names)
    damage = {
        "as it is": lambda: None,
        "to a missing file": lambda: of_file.update({some: "model-00003-of-00002.safetensors"}),
        "to a file outside": lambda: of_file.update({some: "../outside.safetensors"}),
        "to an absolute path": lambda: of_file.update({some: "/etc/hostname"}),
        "to the wrong file": lambda: of_file.update({some: second if of_file[some] == first else first}),
        "without a weight": lambda: of_file.pop(some),
        "with a weight more": lambda: of_file.update(extra=first),
        "to a number": lambda: of_file.update({some: 7}),
        "to nothing": lambda: of_file.update({some: None}),
        "to itself": lambda: of_file.update({some: INDEX}),
        "without a part": lambda: (draft.folder / rng.choice(list(parts))).unlink(),
        "a part truncated": lambda: (draft.folder / second).write_bytes((draft.folder / second).read_bytes()[:-50]),
        "a part twice": lambda: shutil.copy(draft.folder / first, draft.folder / second),
    }
    texts = {"no JSON": "{", "a list": "[]", "an empty map": '{"weight_map": {}}', "no map": "{}", "empty": ""}
    texts["a map of lists"] = json.dumps({"metadata": {}, "weight_map": [first, second]})
    change = rng.choice(sorted({*damage, *texts}))
    damage.get(change, lambda: None)()
    (draft.folder / INDEX).write_text(texts.get(change) or ("" if change == "empty" else json.dumps(content)))
    map_alone = "all weights are there, and who reads them looks into both files"
    known = {"to the wrong file", "without a weight", "with a weight more"}
    return Done(f"weights in two files, the index {change}", map_alone if change in known else None)


def beside(draft: Draft, rng: random.Random) -> Done:
    name = rng.choice(["pytorch_model.bin", INDEX, "adapter_model.safetensors", "model.safetensors.tmp"])
    (draft.folder / name).write_bytes(rng.randbytes(50))
    return Done(f"another file beside the weights, {name}")


def everything(draft: Draft) -> bool:
    return True


TENSORS = (
    dropped,
    renamed,
    all_renamed,
    added,
    misshapen,
    transposed,
    of_another_kind,
    all_of_another_kind,
    no_number,
)
TENSORS += (in_another_precision, swapped, other_values, flipped_bits, layers_dropped, layer_added)
FILES = (truncated, replaced, garbage_in_header, gone, pickled, index, beside)
MUTATIONS: list[tuple[Mutation, Callable[[Draft], bool]]] = [
    *((mutation, everything) for mutation in (*TENSORS, *FILES)),
    (pairs, lambda draft: draft.kind.family == "chronos2" and not draft.kind.is_dense),
    *((lambda draft, rng, change=change: Done(*change(draft, rng)), fits) for change, fits in SETTINGS),
]
