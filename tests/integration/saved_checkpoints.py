"""Checkpoints of all three families with what their models answered when they were saved, for other versions to load.

    python tests/saved_checkpoints.py save FOLDER
    python tests/saved_checkpoints.py check FOLDER
    python tests/saved_checkpoints.py check FOLDER --remote

`check --remote` loads them with the code that lies beside the weights, as where the package is missing. `tests/checkpoints` was saved by
the first models of this package, which were subclasses of transformers' T5, under transformers 5.23.0.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

SEED = 1
NAMES = ("t5", "encoder", "bolt", "chronos2")
GENERATION = {"max_new_tokens": 7, "eos_token_id": None}
# Products of other versions of PyTorch may be rounded otherwise; greedy tokens must be the same, and what is drawn at random where
# the version of PyTorch is, for another one draws other numbers.
RTOL, ATOL = 1e-4, 1e-4
TORCH = torch.__version__.partition("+")[0]


@torch.no_grad()
def answers(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a model says to the inputs that are saved beside it."""
    if "context" in inputs:
        horizon = {"num_output_patches": 2} if "group_ids" in inputs else {}
        return {"quantile_preds": model(**inputs, **horizon).quantile_preds}
    output = model(**inputs)
    if "labels" not in inputs:
        return {"last_hidden_state": output.last_hidden_state}
    tokens = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    greedy = model.generate(**tokens, do_sample=False, **GENERATION)
    torch.manual_seed(SEED)
    sampled = model.generate(**tokens, do_sample=True, num_return_sequences=4, **GENERATION)
    return {"logits": output.logits, "loss": output.loss[None], "greedy": greedy, "sampled": sampled}


def read(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The inputs and the answers of the model that was saved."""
    kept = load_file(folder / "expected.safetensors")
    names = {"input_ids", "attention_mask", "labels", "context", "group_ids"}
    return {name: kept[name] for name in kept if name in names}, {
        name: kept[name] for name in kept if name not in names
    }


def check(folder: Path, model: Any) -> None:
    """Every weight bit for bit, and the answers."""
    for name, saved in load_file(folder / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name], saved), f"{folder.name}: {name} differs"
    inputs, wanted = read(folder)
    found = answers(model.eval(), inputs)
    assert found.keys() == wanted.keys()
    with safe_open(folder / "expected.safetensors", "pt") as file:
        if file.metadata()["torch"] != TORCH:
            wanted.pop("sampled", None)
    for name, tensor in wanted.items():
        rtol, atol = (RTOL, ATOL) if tensor.is_floating_point() else (0.0, 0.0)
        torch.testing.assert_close(found[name], tensor, rtol=rtol, atol=atol, msg=lambda text: f"{folder}: {text}")


def load(folder: Path, **arguments: Any) -> Any:
    from transformers import AutoModel, AutoModelForSeq2SeqLM

    auto_class = AutoModelForSeq2SeqLM if folder.name == "t5" else AutoModel
    return auto_class.from_pretrained(folder, **arguments)


def save(root: Path) -> None:
    """Models with every form of every layer, and what they answer."""
    import chronos_models
    import conftest
    from transformers import GenerationConfig

    import hf_lowrank

    torch.manual_seed(0)
    ranks = conftest.MIXED_RANKS
    config = hf_lowrank.LowRankT5Config(**conftest.SHAPE, **ranks, chronos_config=dict(conftest.TINY_CHRONOS))
    t5 = chronos_models.alive(hf_lowrank.LowRankT5ForConditionalGeneration(config))
    t5.generation_config = GenerationConfig(decoder_start_token_id=0, eos_token_id=1, pad_token_id=0)
    models = {
        "t5": t5,
        "encoder": chronos_models.alive(
            hf_lowrank.LowRankT5EncoderModel(hf_lowrank.LowRankT5Config(**conftest.SHAPE, **ranks))
        ),
        "bolt": chronos_models.bolt(**chronos_models.BOLT_RANKS),
        "chronos2": chronos_models.chronos2(**chronos_models.CHRONOS2_RANKS),
    }
    tokens = torch.randint(2, 64, (3, 11))
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    context = torch.randn(4, 43).cumsum(dim=-1)
    context[0, :20] = torch.nan
    context[1, 13:28] = torch.nan
    inputs = {
        "t5": {"input_ids": tokens, "attention_mask": mask, "labels": torch.randint(2, 64, (3, 6))},
        "encoder": {"input_ids": tokens, "attention_mask": mask},
        "bolt": {"context": context},
        "chronos2": {"context": context, "group_ids": torch.tensor([0, 0, 1, 1])},
    }
    for name in NAMES:
        models[name].save_pretrained(root / name)
        kept = inputs[name] | answers(models[name], inputs[name])
        tensors = {key: tensor.contiguous() for key, tensor in kept.items()}
        save_file(tensors, root / name / "expected.safetensors", metadata={"torch": TORCH})


def save_again(source: Path, target: Path) -> None:
    """A saved checkpoint as the installed package loads and saves it, so with the code of its models beside it."""
    load(source).save_pretrained(target)
    shutil.copy(source / "expected.safetensors", target)


class Missing:
    """The package cannot be imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "hf_lowrank":
            raise ModuleNotFoundError("hf_lowrank is blocked")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("save", "check"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--remote", action="store_true", help="With the code beside the weights alone.")
    given = parser.parse_args()
    if given.action == "save":
        save(given.folder)
        return
    if given.remote:
        sys.meta_path.insert(0, Missing())
    else:
        import hf_lowrank  # noqa: F401 registers the classes
    for name in NAMES:
        check(given.folder / name, load(given.folder / name, trust_remote_code=given.remote))
    assert not given.remote or not any(name.partition(".")[0] == "hf_lowrank" for name in sys.modules)


if __name__ == "__main__":
    main()
