"""Damaged checkpoints by every way in: what can be seen is an error in words, and nothing else than damage makes one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, Draft, Kind, save_all
from mutations import mutate
from outcomes import BEFORE, CLEAR, PROPERTY, UNCHANGED, WRONG
from ways_in import WAYS_IN, Workshop, clean, memory_limit, outcome_of

KINDS = [Kind(family, is_dense) for family in FAMILIES for is_dense in (True, False)]
NUMBER = 1000
SAMPLE = range(0, NUMBER, 83)  # prime to the number of kinds


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    root = tmp_path_factory.mktemp("fuzz")
    torch.set_num_threads(1)
    with Workshop.opened(save_all(root), root) as workshop:
        yield workshop


@pytest.fixture(scope="session")
def wanted(workshop: Workshop):
    """What comes of the whole checkpoints; each is made when it is first asked for."""
    outputs: dict[tuple[str, Kind], np.ndarray] = {}

    def of(way: str, kind: Kind) -> np.ndarray:
        if (way, kind) not in outputs:
            run, _ = WAYS_IN[way]
            outputs[way, kind] = run(workshop.folders[kind], kind, workshop)
            assert outputs[way, kind].dtype != object, outputs[way, kind]
        return outputs[way, kind]

    return of


def check(number: int, workshop: Workshop, wanted, record_property) -> None:
    kind = KINDS[number % len(KINDS)]
    folder = workshop.output()
    shutil.copytree(workshop.folders[kind], folder)
    done = mutate(Draft(folder, kind), number // len(KINDS))
    outcomes, wrong = [], []
    for way, (_, fits) in WAYS_IN.items():
        if fits(kind):
            reference = wanted(way, kind)
            with memory_limit():
                outcome = outcome_of(way, folder, kind, workshop, reference)
            said = outcome.said.replace(str(folder), "FOLDER")[:1000]
            is_detectable, what = done.undetectable is None, f"{kind}: {done.what}"
            outcomes.append([way, outcome.kind, is_detectable, what, said, done.undetectable])
            allowed = {UNCHANGED, CLEAR, BEFORE} | ({WRONG} if done.undetectable else set())
            if outcome.kind not in allowed:
                wrong.append(f"{way}: {outcome.kind} {said}")
    record_property(PROPERTY, outcomes)
    assert not (folder / "ran").exists(), "code of a checkpoint ran"
    clean(workshop)
    assert not wrong, f"{kind} with {done.what} ({done.undetectable or 'detectable'}):\n" + "\n".join(wrong)


@pytest.mark.parametrize("number", SAMPLE)
def test_a_sample_of_damaged_checkpoints(number, workshop, wanted, record_property):
    check(number, workshop, wanted, record_property)


@pytest.mark.fuzz
@pytest.mark.parametrize("number", range(NUMBER))
def test_damaged_checkpoints(number, workshop, wanted, record_property):
    check(number, workshop, wanted, record_property)
