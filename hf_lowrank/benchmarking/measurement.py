"""One forecast of one checkpoint: its time in this process, its memory in a process of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from chronos import BaseChronosPipeline
from chronos.base import ForecastType
from huggingface_hub import snapshot_download
from transformers import T5Config, T5ForConditionalGeneration

from ..checkpoints.loading import checkpoint_path
from ..checkpoints.pipelines import in_lean_pipeline, in_stock_pipeline, load_pipeline
from ..runtime.folder import ExportRecord
from ..runtime.pipelines import ExportedModel
from ..timing import Case
from .rounds import Timing, timed

__all__ = ["LoadedCheckpoint", "Memory", "cases"]


def cases(
    batch_size: Iterable[int],
    context_length: Iterable[int],
    prediction_length: Iterable[int],
    num_samples: Iterable[int] | None = None,
) -> list[Case]:
    """Every combination of sizes, each a positive integer, the last argument changing fastest.

    Raises:
        ValueError: One of the lists is empty, or a size is not positive.
    """
    sizes: dict[str, list] = {
        "batch_size": list(batch_size),
        "context_length": list(context_length),
        "prediction_length": list(prediction_length),
        "num_samples": [None] if num_samples is None else list(num_samples),
    }
    for name, values in sizes.items():
        if not values or any(value is not None and value < 1 for value in values):
            raise ValueError(f"{name} must be positive integers, found {values}.")
    return [Case(*point) for point in product(*sizes.values())]


@dataclass(frozen=True)
class Memory:
    """One forecast in a process of its own: bytes above that process before it loads the model.

    On CPU the resident set (None on systems other than Linux), on CUDA what the allocator hands out.

    Attributes:
        peak: The highest level while loading and forecasting.
        working: The part of the peak that is above the loaded model.
        load_seconds: The time that loading takes.
    """

    peak: int | None
    working: int | None
    load_seconds: float


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint of any Chronos family in the pipeline that its configuration names.

    If `lean`, it is a dense Chronos-T5 or Chronos-2 in the pipeline of our models.

    Attributes:
        name: What messages and results call it.
        path: The folder or Hub id that a fresh process loads it from.
        pipeline: Its pipeline in this process.
        dtype: `"float32"` or `"bfloat16"`, of weights and computation.
        device: `"cpu"` or `"cuda"`.
        lean: Whether it is in that pipeline whatever its configuration names.
    """

    name: str
    path: str
    pipeline: BaseChronosPipeline
    dtype: str
    device: str
    lean: bool = False

    @classmethod
    def load(cls, path: str, name: str, *, dtype: str, device: str, lean: bool = False) -> LoadedCheckpoint:
        """Load a folder or a Hub id; `name` is what messages and results call it."""
        path = checkpoint_path(path)
        pipeline = BaseChronosPipeline.from_pretrained(path, dtype=dtype, device_map=device, trust_remote_code=False)
        return cls(name, path, in_lean_pipeline(pipeline) if lean else pipeline, dtype, device, lean)

    @classmethod
    def checked(cls, path: str, name: str, *, argument: str, dtype: str, device: str) -> LoadedCheckpoint:
        """The same of a checkpoint that may be damaged; `argument` is what messages call it.

        Raises:
            OSError, ValueError: As `load_pipeline`.
        """
        pipeline = in_stock_pipeline(load_pipeline(path, argument=argument, dtype=dtype, device=device))
        return cls(name, checkpoint_path(path), pipeline, dtype, device)

    @property
    def samples(self) -> bool:
        """Whether it draws sample paths (Chronos-T5) rather than forecasting quantiles."""
        return self.pipeline.forecast_type is ForecastType.SAMPLES

    def forecast(self, case: Case, *, seed: int) -> None:
        """`predict_quantiles` of random walks that depend on the case and the seed alone."""
        generator = torch.Generator().manual_seed(seed)
        series = torch.randn(case.batch_size, case.context_length, generator=generator).cumsum(dim=-1)
        torch.manual_seed(seed)
        options = {"num_samples": case.num_samples} if self.samples else {}
        self.pipeline.predict_quantiles(list(series), prediction_length=case.prediction_length, **options)

    def timing(self, case: Case, *, seed: int) -> Timing:
        """The time of one forecast. Its result is on the CPU, so a GPU has finished too."""
        return timed(lambda: self.forecast(case, seed=seed), on_cpu=self.device == "cpu")

    def memory(self, case: Case, *, seed: int) -> Memory:
        """Load and forecast once in a fresh process with the same number of threads."""
        task: dict[str, Any] = {"path": self.path, "dtype": self.dtype, "device": self.device, "lean": self.lean}
        task["threads"] = torch.get_num_threads()
        command = [
            sys.executable,
            "-m",
            "hf_lowrank.benchmarking.measurement",
            json.dumps(task | asdict(case) | {"seed": seed}),
        ]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode:
            raise RuntimeError(
                f"The process that measures the memory of {self.name} failed:\n{process.stderr[-2000:]}"
            )
        return Memory(**json.loads(process.stdout.splitlines()[-1]))

    @property
    def exported(self) -> ExportRecord | None:
        """What an exported model says of itself; None of a checkpoint."""
        model = self.pipeline.inner_model
        return model.forecaster.record if isinstance(model, ExportedModel) else None

    def parameters(self) -> int:
        """How many numbers all weights have; of an exported model those that it was made of."""
        if self.exported is not None:
            return self.exported.made["parameters"]
        return sum(parameter.numel() for parameter in self.pipeline.inner_model.parameters())

    def bytes_on_disk(self) -> int:
        """The size of the weight files, of an exported model of all that is read in a forecast."""
        if self.exported is not None:
            return sum(one["bytes"] for one in self.exported.files.values())
        folder = Path(self.path)
        if not folder.is_dir():
            folder = Path(snapshot_download(self.path, local_files_only=True))
        sizes = [[file.stat().st_size for file in folder.glob(kind)] for kind in ("*.safetensors", "*.bin")]
        return sum(sizes[0] or sizes[1])


# ---- In the fresh process --------------------------------------------------------------------------------------------


def measure_memory(*, path: str, dtype: str, device: str, lean: bool, threads: int, seed: int, **case: int) -> Memory:
    """What one forecast takes in this process, which must not have forecast before."""
    torch.set_num_threads(threads)
    # What PyTorch and transformers import and allocate at first use belongs to the process, not to the model.
    sizes = dict.fromkeys(("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"), 8)
    toy = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).to(device)
    toy.generate(torch.ones(1, 2, dtype=torch.long, device=device), max_new_tokens=2, do_sample=True)
    del toy

    before, _ = memory_level(device)
    start = time.perf_counter()
    checkpoint = LoadedCheckpoint.load(path, path, dtype=dtype, device=device, lean=lean)
    load_seconds = time.perf_counter() - start
    for parameter in checkpoint.pipeline.inner_model.parameters():
        parameter.sum()  # weights are mapped from the file, and come into memory only when they are read
    loaded, _ = memory_level(device)
    checkpoint.forecast(Case(**case), seed=seed)
    _, peak = memory_level(device)
    if before is None or loaded is None or peak is None:
        return Memory(None, None, load_seconds)
    return Memory(peak - before, peak - loaded, load_seconds)


def memory_level(device: str) -> tuple[int, int] | tuple[None, None]:
    """Bytes in use now and at the highest so far; None where the system does not tell."""
    if torch.device(device).type == "cuda":
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    # Not getrusage: its maximum includes the parent process, from which this one was started.
    if not status.exists():
        return None, None
    kibibytes = dict(re.findall(r"(VmRSS|VmHWM):\s+(\d+) kB", status.read_text()))
    return int(kibibytes["VmRSS"]) * 1024, int(kibibytes["VmHWM"]) * 1024


if __name__ == "__main__":
    print(json.dumps(asdict(measure_memory(**json.loads(sys.argv[1])))))
