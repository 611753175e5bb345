"""Rounds that the machine disturbed are noticed, repeated and counted."""

from __future__ import annotations

import time

import pytest

from hf_lowrank.benchmarking.rounds import Rounds, Timing, measure_rounds, timed


def rounds(*sides: list[Timing | float], repeats: int) -> tuple[Rounds, int]:
    """The rounds of sides with these timings, and how many of them were run."""
    turns = [iter([turn if isinstance(turn, Timing) else Timing(turn) for turn in side]) for side in sides]
    run: list[int] = []
    found = measure_rounds([lambda turn=turn: next(turn) for turn in turns], repeats, after_each=lambda: run.append(1))
    return found, len(run) // len(sides)


def test_quiet_rounds_are_taken_as_they_come() -> None:
    found, run = rounds([1.0, 1.2, 1.1], [2.0, 2.1, 2.2], repeats=3)
    assert found == Rounds(((1.0, 1.2, 1.1), (2.0, 2.1, 2.2)), 0, 0)
    assert run == 3


@pytest.mark.parametrize("stalled", [Timing(9.0), Timing(1.1, waited=0.3)], ids=["far from its side", "waited"])
@pytest.mark.parametrize("side", [0, 1])
def test_a_disturbed_round_is_repeated_on_all_sides(stalled: Timing, side: int) -> None:
    timings: list[list[Timing | float]] = [[1.0, 1.1, 1.2, 1.3], [1.0, 1.1, 1.2, 1.3]]
    timings[side][1] = stalled
    found, run = rounds(*timings, repeats=3)
    assert found == Rounds(((1.0, 1.2, 1.3), (1.0, 1.2, 1.3)), 1, 0)
    assert run == 4


def test_a_machine_that_is_never_quiet_is_said_to_be_so() -> None:
    busy = [Timing(seconds, waited=seconds / 2) for seconds in (3.0, 1.0, 2.0, 1.5)]
    found, run = rounds(busy, repeats=2)
    assert found == Rounds(((1.0, 1.5),), 2, 2)  # the least disturbed ones
    assert run == 4


def test_the_order_changes_from_round_to_round() -> None:
    order: list[int] = []

    def turn(side: int) -> Timing:
        order.append(side)
        return Timing(1.0)

    measure_rounds([lambda: turn(0), lambda: turn(1), lambda: turn(2)], 3)
    assert order == [0, 1, 2, 1, 2, 0, 2, 0, 1]


def test_a_thread_that_sleeps_has_waited() -> None:
    slept, on_gpu = (timed(lambda: time.sleep(0.05), on_cpu=on_cpu) for on_cpu in (True, False))
    assert slept.seconds >= slept.waited >= 0.04
    assert on_gpu.waited == 0
