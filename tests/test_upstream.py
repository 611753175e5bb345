"""The test suites of transformers and chronos-forecasting, downloaded with pip, on our classes: `pytest -m upstream`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from chronos import BaseChronosPipeline
from upstream_sources import source, transformers_tests

from hf_lowrank import compress_pretrained

HERE = Path(__file__).parent
pytestmark = pytest.mark.upstream

# They load checkpoints or data from the Hub or from S3.
ONLINE = "loads_from_huggingface or loads_from_hf or loads_from_s3 or dummy_fev_task"
# An adapter for a stock Chronos-2, by its name in a folder beside.
STOCK_ONLY = "test_chronos2_lora_pipeline_loads_from_disk"


def run(folder: Path, report: Path, *arguments: str) -> dict[str, int]:
    """Run pytest in a process of its own: how many tests passed, failed and were skipped."""
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-q", "--tb=short", "-rs"]
    command += [f"--junitxml={report}", *arguments]
    paths = os.pathsep.join(map(str, (folder, HERE.parent, transformers_tests())))
    result = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    print(result.stdout[-20000:])
    counts = dict.fromkeys(("passed", "failure", "error", "skipped"), 0)
    for case in {
        (case.get("classname"), case.get("name")): case for case in ElementTree.parse(report).iter("testcase")
    }.values():
        outcomes = {child.tag for child in case} & set(counts)
        counts[min(outcomes, default="passed", key=["error", "failure", "skipped"].index)] += 1
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr
    return counts


def test_transformers(tmp_path):
    counts = run(HERE, tmp_path / "report.xml", "transformers_suite.py")
    assert counts["passed"] > 300
    assert counts["failure"] == counts["error"] == 0


def test_chronos(tmp_path):
    """chronos' own suite, with each of its three checkpoints compressed in its place."""
    folder = tmp_path / "chronos"
    shutil.copytree(source("chronos-forecasting"), folder)
    shutil.rmtree(folder / "src")  # the installed one is tested
    for checkpoint in ("dummy-chronos-model", "dummy-chronos-bolt-model", "dummy-chronos2-model"):
        place = folder / "test" / checkpoint
        model = compress_pretrained(place, ratio=0.6, feed_forward_ratio=0.8, calibration=None)
        shutil.rmtree(place)
        model.save_pretrained(place)
        assert type(BaseChronosPipeline.from_pretrained(place)).__name__.startswith("LowRank")
    counts = run(folder, tmp_path / "report.xml", "-p", "hf_lowrank", "test", "-k", f"not ({ONLINE} or {STOCK_ONLY})")
    assert counts["passed"] > 300
    assert counts["failure"] == counts["error"] == 0
