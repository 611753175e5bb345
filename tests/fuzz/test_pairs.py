"""Two processes that write to one output at the same time: one of them wins, and the other one says so."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
import torch
from writers import BUSY, Work, Writer, content, fork, writers

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork"),
    pytest.mark.filterwarnings("ignore"),
]
NAMES = ["forecast csv", "forecast parquet", "compress", "pretrain", "recover"]
LONGEST = 0.05  # seconds between the starts of a pair


def lone(writer: Writer, work: Work, folder: Path) -> dict[str, str]:
    """What the work writes when it is alone."""
    writer.prepare(folder)
    assert os.waitpid(fork(lambda: work(folder)), 0)[1] == 0
    return content(folder)


def tries_of_pairs(writer: Writer, place: Path, count: int, seed: int) -> list[str]:
    """Start so many pairs, every other one with different arguments: what did not end with one winner."""
    drawn = random.Random(seed)
    assert writer.other is not None
    results = {work: lone(writer, work, place / f"alone-{i}") for i, work in enumerate((writer.work, writer.other))}
    wrong = []
    for number in range(count):
        pair = (writer.work, writer.other if number % 2 else writer.work)
        folder, apart = place / f"pair-{number}", drawn.uniform(0, LONGEST)
        writer.prepare(folder)
        reports = [place / f"{number}-{i}" for i in range(2)]
        processes = []
        for work, report in zip(pair, reports):
            processes.append(fork(lambda work=work, folder=folder: work(folder), report=report))
            time.sleep(apart)
        has_won = [os.waitpid(process, 0)[1] == 0 for process in processes]
        said = [report.read_text() for report in reports]
        name = f"pair {number}, {1000 * apart:.0f} ms apart"
        if sum(has_won) != 1:
            wrong.append(f"{name}: {sum(has_won)} of 2 end with status 0: {said}")
        elif not any(text in said[has_won.index(False)] for text in BUSY):
            wrong.append(f"{name}: the other one says {said[has_won.index(False)]!r}")
        elif content(folder) != results[pair[has_won.index(True)]]:
            wrong.append(f"{name}: the output is not that of the winner")
    return wrong


@pytest.mark.fuzz
@pytest.mark.parametrize("name", NAMES)
def test_all_pairs(tmp_path, chronos_t5, name):
    """Eight of each command, 40 in all."""
    torch.set_num_threads(1)
    assert tries_of_pairs(writers(tmp_path, chronos_t5)[name], tmp_path, 8, seed=0) == []


def test_two_forecasts_to_one_output(tmp_path, chronos_t5):
    torch.set_num_threads(1)
    assert tries_of_pairs(writers(tmp_path, chronos_t5)["forecast csv"], tmp_path, 2, seed=1) == []
