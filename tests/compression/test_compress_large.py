"""The size that matters: chronos-t5-large's shape is compressed in less than a minute, in little more than its own memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS = 60
MEMORY = 1.3  # of the bytes of the weights in float32

LARGE = {
    "vocab_size": 4096,
    "d_model": 1024,
    "d_ff": 4096,
    "d_kv": 64,
    "num_heads": 16,
    "num_layers": 24,
    "num_decoder_layers": 24,
}

# Each in a process of its own: the peak is that of a whole process, and starts at what the parent has at the time.
SAVE = """
import json, sys
import torch
from transformers import T5Config, T5ForConditionalGeneration

torch.manual_seed(0)
model = T5ForConditionalGeneration(T5Config(**json.loads(sys.argv[2])))
model.save_pretrained(sys.argv[1], max_shard_size="1GB")
print(json.dumps({"bytes": 4 * model.num_parameters()}))
"""
COMPRESS = """
import json, resource, sys, time, warnings
import torch
from hf_lowrank import compress_pretrained

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

torch.set_num_threads(2)
warnings.simplefilter("ignore")
imports = peak()
start = time.perf_counter()
model = compress_pretrained(sys.argv[1], **json.loads(sys.argv[2]))
seconds = time.perf_counter() - start
print(json.dumps({
    "seconds": seconds, "peak": peak(), "imports": imports, "parameters": model.num_parameters(),
}))
"""


def run(script: str, folder: Path, **arguments: object) -> dict[str, float]:
    """What the script prints last, given the folder and the arguments."""
    process = subprocess.run(
        [sys.executable, "-c", script, str(folder), json.dumps(arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    # The latent form takes eigenvectors of d_model x d_model matrices and is not held to the minute.
    [{"ratio": 0.25, "form": "per_head"}, {"ratio": 0.25, "form": "latent"}],
    ids=["per_head", "latent"],
)
def test_large_is_compressed_in_a_minute_and_in_its_own_memory(tmp_path, capsys, arguments):
    weights = run(SAVE, tmp_path, **LARGE)["bytes"]
    found = run(COMPRESS, tmp_path, **arguments)
    with capsys.disabled():
        print(
            f"\nchronos-t5-large's shape, {arguments}: {found['seconds']:.1f} s; peak {found['peak'] / 1e9:.2f} GB, "
            f"{found['peak'] / weights:.2f} times the float32 weights of {weights / 1e9:.2f} GB "
            f"({found['imports'] / 1e9:.2f} GB of it before the start)"
        )
    assert found["parameters"] < weights / 4
    assert found["seconds"] < SECONDS or arguments.get("form") == "latent"
    assert found["peak"] < MEMORY * weights
