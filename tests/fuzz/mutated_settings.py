"""Seeded changes of what is written beside the weights: config.json, the tables of ranks in it, generation_config.json.

Each says what it did and, where no loader can see it, why not.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

from checkpoints import Draft

__all__ = ["SETTINGS"]

Change = tuple[str, str | None]
LEGAL = "the value is as good as any"
DEFAULT = "a setting that is left out has its default"
# Settings that the shapes or the names of the weights, or other settings, say once more: no other value is right.
FIXED = {"d_model", "num_heads", "num_layers", "num_decoder_layers", "vocab_size", "relative_attention_num_buckets"}
FIXED |= {"attention_ranks", "feed_forward_ranks", "model_type", "architectures", "is_encoder_decoder"}
FIXED |= {"chronos_config", "chronos_pipeline_class"}
OF_DENSE = {"d_kv", "d_ff"}  # of a low-rank model they are the most that a layer may have
# Those of `chronos_config`, by family.
CHRONOS_FIXED = {
    "t5": {"n_tokens", "tokenizer_class", "model_type"},
    "bolt": {"prediction_length", "input_patch_size", "quantiles", "use_reg_token"},
    "chronos2": {"input_patch_size", "output_patch_size", "quantiles", "use_reg_token"},
}
JUNK: list[Any] = [None, "text", "", [], {}, [1, 2], {"a": 1}, 1.5, -1, 0, 10**12, 10**400, True]
JUNK += [float("nan"), float("inf"), "16", -1.5, 1e300, [[]], "\x00", "../x"]
# No one reads these.
UNREAD = {"classifier_dropout", "n_positions", "transformers_version", "_name_or_path", "id2label", "label2id"}


def is_fixed(draft: Draft, key: str) -> bool:
    return key in FIXED or (draft.kind.is_dense and key in OF_DENSE)


def one_removed(draft: Draft, rng: random.Random) -> Change:
    key = rng.choice(sorted(draft.config))
    value = draft.config.pop(key)
    # A fixed one is named by nothing else, unless its default is the same.
    return f"config.json without {key} ({value!r:.60})", None if is_fixed(draft, key) else DEFAULT


def one_wrongly_typed(draft: Draft, rng: random.Random) -> Change:
    key = rng.choice(sorted(draft.config))
    value = rng.choice(JUNK)
    was = draft.config[key]
    draft.config[key] = value
    return f"{key} {value!r:.30} in place of {was!r:.30}", legal(was, value, fixed=is_fixed(draft, key))


def legal(was: Any, value: Any, *, fixed: bool) -> str | None:
    """Why a value in the place of another one cannot be seen."""
    if fixed:
        return None
    if value is None:
        return DEFAULT
    is_number = isinstance(was, float) or (isinstance(was, int) and not isinstance(was, bool))
    if isinstance(was, bool) != isinstance(value, bool):
        return None
    if is_number and isinstance(value, (int, float)) and 0 <= value <= 2:
        return LEGAL
    return LEGAL if was is None or (type(was) is type(value) and not is_number) else None


OUT_OF_RANGE: dict[str, list[Any]] = {
    "d_model": [0, -16, 10**12, 17, 16.0, "16"],
    "d_kv": [0, -8, 10**12, 8.0],
    "d_ff": [0, -24, 10**12],
    "num_heads": [0, -2, 3, 10**12],
    "num_layers": [0, -1, 1, 9, 10**12, 2.0],
    "num_decoder_layers": [0, -1, 1, 9, 10**12],
    "vocab_size": [0, -1, 63, 10**12],
    "relative_attention_num_buckets": [0, 1, -8, 10**12, 9],
    "relative_attention_max_distance": [0, -20, 1, 4],
    "layer_norm_epsilon": [-1e-6, -1.0, float("nan"), float("inf"), 1e300],
    "dropout_rate": [-0.1, 1.5, float("nan"), "0"],
    "initializer_factor": [-1.0, float("nan"), "1"],
    "rope_theta": [0.0, -1.0, float("nan"), float("inf"), "10000"],
    "feed_forward_proj": ["gated", "gated-relu", "nonsense", "a-b-c", "gated-nonsense", 1],
    "dense_act_fn": ["nonsense", 1],
    "is_gated_act": [True, "yes"],
    "decoder_start_token_id": [-1, 64, 10**12, "0", 0.5],
    "eos_token_id": ["1", 1.5, {}],
    "pad_token_id": ["0", -3, 1.5, 10**12],
    "model_type": ["t5", "bert", "lowrank_t5", "lowrank_chronos2", "nonsense", "", 5],
    "architectures": [["T5Model"], ["Nonsense"], "T5Model", [], [1], {}, [["a"]], ["LowRankT5EncoderModel"]],
    "chronos_pipeline_class": ["Nonsense", "ChronosBoltPipeline", "BaseChronosPipeline", 1, [], ""],
    "dtype": ["nonsense", "int8", "float8_e4m3fn", 32, "torch.float32"],
    "auto_map": ["text", [], {"AutoConfig": 1}, {"AutoModel": "x.y.z"}, {"AutoConfig": "../evil.Evil"}],
    "is_encoder_decoder": [False, "yes"],
    "tie_word_embeddings": ["yes", 3],
    "quantization_config": [{}, {"quant_method": "nonsense"}, "int8", 7],
    "compression": [5, "text", [1], {"method": 5}, {"arguments": None}, {"method": "joint"}, {"source": 3}],
    "attn_implementation": ["nonsense", 3],
    "_attn_implementation": ["nonsense", 3],
}
CHRONOS_OUT_OF_RANGE: dict[str, list[Any]] = {
    "context_length": [0, -5, 1.5, "40", 10**12],
    "prediction_length": [0, -5, 1.5, "6", 10**12],
    "input_patch_size": [0, -5, 4, 1.5, 10**12],
    "input_patch_stride": [0, -5, 1.5, "5", 10**12],
    "output_patch_size": [0, -5, 4, 1.5, 10**12],
    "max_output_patches": [0, -1, 1.5, "3", 10**12],
    "quantiles": [[], [0.5], 0.5, [0.9, 0.1], [0.1] * 9, [0.1, 0.2, 0.3, 0.4, "0.5", 0.6, 0.7, 0.8, 0.9], [0, 1, 2]],
    "use_reg_token": [False, "yes", 1],
    "use_arcsinh": ["yes", 2],
    "time_encoding_scale": [0, -1, "x", float("nan")],
    "tokenizer_class": ["Nonsense", "ChronosPipeline", 1, "", "ChronosTokenizer", "torch"],
    "tokenizer_kwargs": [{}, [], {"low_limit": 1}, {"low_limit": 15.0, "high_limit": -15.0}, {"a": 1}, None],
    "n_tokens": [0, -1, 1, 63, 65, 10**12, 4096],
    "n_special_tokens": [0, -1, 1, 64, 10**12, "2"],
    "pad_token_id": [-1, 2, 64, "0"],
    "eos_token_id": [-1, 2, 64, "1"],
    "use_eos_token": ["yes", 3],
    "model_type": ["causal", "nonsense", 1],
    "num_samples": [0, -1, 1.5, "4", 10**12],
    "temperature": [0.0, -1.0, float("nan"), "1"],
    "top_k": [0, -1, 1.5, "50"],
    "top_p": [0.0, -0.5, 1.5, float("nan"), "1"],
}


def out_of_range(draft: Draft, rng: random.Random) -> Change:
    known = set(OUT_OF_RANGE) & (set(draft.config) | {"quantization_config", "attn_implementation", "dtype"})
    key = rng.choice(sorted(known))
    value = rng.choice(OUT_OF_RANGE[key])
    was = draft.config.get(key)
    draft.config[key] = copy.deepcopy(value)
    if key == "compression":
        return f"compression is {value!r}", "how a model was made is for the file to say" if value != 5 else None
    derived = "it follows from feed_forward_proj" if key in ("dense_act_fn", "is_gated_act") else None
    return f"{key} {value!r:.40} in place of {was!r:.40}", derived


LEGAL_VALUES: dict[str, list[Any]] = {
    "layer_norm_epsilon": [1e-5, 1e-3],
    "dropout_rate": [0.1, 0.5],
    "initializer_factor": [0.05],
    "relative_attention_max_distance": [128, 50],
    "rope_theta": [500.0, 1e6],
    "feed_forward_proj": ["gelu", "silu"],
    "decoder_start_token_id": [5],
    "use_cache": [False],
    "output_attentions": [True],
    "output_hidden_states": [True],
    "return_dict": [False],
    "tie_word_embeddings": [False, True],
    "dtype": ["float16", "bfloat16", "float64"],
    "unknown": [1, {"a": [1]}, "text"],
    "task_specific_params": [{"a": 1}],
    "num_beams": [4],
    "max_length": [3],
    "is_decoder": [True],
}


def other_value(draft: Draft, rng: random.Random) -> Change:
    key = rng.choice(sorted(LEGAL_VALUES))
    draft.config[key] = rng.choice(LEGAL_VALUES[key])
    return f"{key} is {draft.config[key]!r}", LEGAL


def chronos_settings(draft: Draft, rng: random.Random) -> Change:
    settings = draft.config["chronos_config"]
    fixed = CHRONOS_FIXED[draft.kind.family]
    key = rng.choice(sorted(settings))
    change = rng.choice(["removed", "junk", "out of range", "out of range", "out of range", "all"])
    if change == "removed":
        del settings[key]
        return f"chronos_config without {key}", None if key in fixed else DEFAULT
    if change == "all":
        draft.config["chronos_config"] = value = rng.choice([{}, [], "text", 5, None, {"a": 1}, [1]])
        return f"chronos_config is {value!r}", None
    value = rng.choice(JUNK if change == "junk" or key not in CHRONOS_OUT_OF_RANGE else CHRONOS_OUT_OF_RANGE[key])
    was, settings[key] = settings[key], value
    # 0 and 1 special tokens, or others that pad or end, are legal beside others.
    free = legal(was, value, fixed=key in fixed) or (LEGAL if key in ("pad_token_id", "n_special_tokens") else None)
    return f"chronos_config.{key} {value!r:.40} in place of {was!r:.40}", free


# ---- Files of settings -----------------------------------------------------------------------------------------------

TEXTS: dict[str, bytes] = {
    "empty": b"",
    "no JSON": b"{'a': 1}",
    "a list": b"[]",
    "a number": b"5",
    "a string": b'"text"',
    "null": b"null",
    "no object": b"{}",
    "deeply nested": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deeply nested in a setting": b'{"model_type": "t5", "a": ' + b"[" * 5_000 + b"]" * 5_000 + b"}",
    "not UTF-8": b"\xff\xfe\x00{",
    "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n",
    "a number of many digits": b'{"model_type": "t5", "d_model": ' + b"9" * 5_000 + b"}",
}


def file_of_settings(draft: Draft, rng: random.Random) -> Change:
    path = draft.folder / "config.json"
    content = path.read_bytes()
    change = rng.choice([*sorted(TEXTS), "truncated", "gone", "a folder", "with a byte-order mark"])
    if change in ("gone", "a folder"):
        path.unlink()
        if change == "a folder":
            path.mkdir()
    elif change == "truncated":
        path.write_bytes(content[: rng.randrange(len(content) - 2)])
    else:
        path.write_bytes(TEXTS.get(change) or (b"" if change == "empty" else b"\xef\xbb\xbf" + content))
    return f"config.json: {change}", None


def generation_file(draft: Draft, rng: random.Random) -> Change:
    path = draft.folder / "generation_config.json"
    change = rng.choice([*sorted(TEXTS), "gone", "a folder"])
    if change in ("gone", "a folder"):
        path.unlink()
        if change == "a folder":
            path.mkdir()
    else:
        path.write_bytes(TEXTS[change])
    return f"generation_config.json: {change}", "config.json says the same" if change in (
        "gone",
        "no object",
    ) else None


GENERATION: dict[str, list[Any]] = {
    "decoder_start_token_id": [None, -1, 64, 10**12, "0", 1.5, [], {}, True],
    "eos_token_id": ["1", {}, -1, 1.5, 10**12],
    "pad_token_id": ["0", [], -1, 10**12],
    "num_beams": [0, 4, "4"],
    "temperature": [0.0, -1.0, "1", float("nan")],
    "top_k": [-1, "x"],
    "max_length": [0, -1, "x", 3],
    "repetition_penalty": [2.0, -1.0, "x"],
    "forced_bos_token_id": [3],
    "unknown": [3, {"a": 1}],
    "transformers_version": [5, None],
    "_from_model_config": ["x"],
}


def generation(draft: Draft, rng: random.Random) -> Change:
    if rng.random() < 0.2:
        key = rng.choice(sorted(draft.generation))
        del draft.generation[key]
        return f"generation_config.json without {key}", DEFAULT
    key = rng.choice(sorted(GENERATION))
    draft.generation[key] = value = rng.choice(GENERATION[key])
    is_read = key == "decoder_start_token_id" and value is not None
    return f"{key} {value!r} in generation_config.json", None if is_read else "Chronos' own settings stand above it"


# ---- Tables of ranks -------------------------------------------------------------------------------------------------


def ranks(draft: Draft, rng: random.Random) -> Change:
    name = rng.choice(["attention_ranks", "feed_forward_ranks"])
    table = draft.config[name]
    kind = rng.choice(sorted(table))
    layer = rng.randrange(len(table[kind]))
    entry = table[kind][layer]
    key = rng.choice(sorted(entry))
    value = rng.choice([*JUNK, 1, 2, 3, 7, 9, 25])
    changes: dict[str, Callable[[], Any]] = {
        f"{key} {value!r:.30}": lambda: entry.update({key: value}),
        f"without {key}": lambda: entry.pop(key),
        "with a rank more": lambda: entry.update(rank=3),
        "in another form": lambda: table[kind].__setitem__(layer, other_form(entry)),
        f"is {value!r:.30}": lambda: table[kind].__setitem__(layer, value),
        "is left out": lambda: table[kind].pop(layer),
        "comes twice": lambda: table[kind].append(entry),
    }
    of_kinds: dict[str, Callable[[], Any]] = {
        f"without {kind}": lambda: table.pop(kind),
        f"{kind} is {value!r:.30}": lambda: table.update({kind: value}),
        f"{kind} under another name": lambda: table.update({"other": table.pop(kind)}),
        f"the layers of {kind} reversed": lambda: table[kind].reverse(),
        f"is {value!r:.30}": lambda: draft.config.update({name: value}),
    }
    before = json.dumps(draft.config)
    if rng.random() < 0.6:
        change = rng.choice(sorted(changes))
        changes[change]()
        what = f"{name}: {kind} {layer} {change}"
    else:
        what = rng.choice(sorted(of_kinds))
        of_kinds[what]()
        what = f"{name}: {what}"
    return what, "nothing has changed" if json.dumps(draft.config) == before else None


def other_form(entry: dict[str, Any]) -> dict[str, Any]:
    if "latent" in entry:
        return {"qk": 4, "vo": 4}
    return {"latent": 4, "query": None, "output": None} if "qk" in entry else {"width": 20, "wi": 2, "wo": 2}


def everything(draft: Draft) -> bool:
    return True


def of_t5(draft: Draft) -> bool:
    return draft.kind.family == "t5"


def of_lowrank(draft: Draft) -> bool:
    return not draft.kind.is_dense


# Some come more than once in a round: there is much that they can draw.
SETTINGS: list[tuple[Callable[[Draft, random.Random], Change], Callable[[Draft], bool]]] = [
    *((change, everything) for change in (one_removed, one_removed, one_wrongly_typed, one_wrongly_typed)),
    *((change, everything) for change in (out_of_range, out_of_range, out_of_range, out_of_range, other_value)),
    *((change, everything) for change in (chronos_settings, chronos_settings, chronos_settings, file_of_settings)),
    (generation, of_t5),
    (generation, of_t5),
    (generation_file, of_t5),
    *((ranks, of_lowrank) for _ in range(3)),
]
