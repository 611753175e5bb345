"""chronos-t5-base's shape, calibrated on 64 series of 512 points and compressed: in minutes and in bounded memory."""

from __future__ import annotations

import pytest
from test_compress_large import SAVE, run

SECONDS = 300
MEMORY = 2.0  # of the bytes of the weights in float32, beside the activations of one batch

BASE = {
    "vocab_size": 4096,
    "d_model": 768,
    "d_ff": 3072,
    "d_kv": 64,
    "num_heads": 12,
    "num_layers": 12,
    "num_decoder_layers": 12,
    "decoder_start_token_id": 0,
    "chronos_config": {
        "tokenizer_class": "MeanScaleUniformBins",
        "tokenizer_kwargs": {"low_limit": -15.0, "high_limit": 15.0},
        "context_length": 512,
        "prediction_length": 64,
        "n_tokens": 4096,
        "n_special_tokens": 2,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "use_eos_token": True,
        "model_type": "seq2seq",
        "num_samples": 20,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
    },
}

START = """
import json, resource, sys, time, warnings
import torch
from hf_lowrank import calibrate, compress_pretrained
from hf_lowrank.checkpoints.dense import load_dense
from hf_lowrank.checkpoints.objectives import objective_of
from hf_lowrank.data.mixture import synthetic_series
from hf_lowrank.data.tokens import tokenize_windows
from chronos import ChronosConfig

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

torch.set_num_threads(2)
warnings.simplefilter("ignore")
dense = load_dense(sys.argv[1])
config = ChronosConfig(**dense.config.chronos_config)
windows = torch.from_numpy(synthetic_series(64, 512 + 64, seed=0))
batches = [tokenize_windows(config, *part.split([512, 64], dim=1)) for part in windows.split(4)]
"""
# What a forward and backward pass of one batch takes beside the weights, all of which are in memory before.
ACTIVATIONS = (
    START
    + """
model = dense.float_model()
sum(float(weight.sum()) for weight in model.state_dict().values())
before = peak()
for stack in (model.encoder, model.decoder):
    stack.embed_tokens.register_forward_hook(lambda _, __, output: output.requires_grad_(True))
objective_of(dense.config, dense.model_class).predict(model, batches[0]).square().sum().backward()
print(json.dumps({"bytes": peak() - before}))
"""
)
COMPRESS = (
    START
    + """
start = time.perf_counter()
calibration = calibrate(dense, batches)
calibrated = time.perf_counter()
model = compress_pretrained(sys.argv[1], calibration=calibration, **json.loads(sys.argv[2]))
print(json.dumps({
    "calibration": calibrated - start, "compression": time.perf_counter() - calibrated, "peak": peak(),
    "parameters": model.num_parameters(),
}))
"""
)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [{"ratio": 0.15}, {"total_ratio": 0.5}], ids=["attention", "both"])
def test_base_is_calibrated_and_compressed_in_minutes(tmp_path, capsys, arguments):
    weights = run(SAVE, tmp_path, **BASE)["bytes"]
    activations = run(ACTIVATIONS, tmp_path)["bytes"]
    found = run(COMPRESS, tmp_path, **arguments)
    seconds = found["calibration"] + found["compression"]
    beside = (found["peak"] - activations) / weights
    with capsys.disabled():
        print(
            f"\nchronos-t5-base's shape, {arguments}: calibration {found['calibration']:.0f} s, compression "
            f"{found['compression']:.0f} s; peak {found['peak'] / 1e9:.2f} GB: {beside:.2f} times the float32 weights of "
            f"{weights / 1e9:.2f} GB, and {activations / 1e9:.2f} GB of activations"
        )
    assert found["parameters"] < weights / 4
    assert seconds < SECONDS
    assert beside < MEMORY
