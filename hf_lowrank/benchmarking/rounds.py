"""Rounds of forecasts in turn: those that the machine disturbed are noticed, repeated, and counted.

A forecast on the CPU that is left alone keeps its thread running. One whose thread waits for its turn, and one that takes much longer than
the others of its side, tells of whatever else the machine was at.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["Rounds", "Timing", "measure_rounds", "timed"]

WAITED = 0.1  # the share of a forecast in which its thread may wait
FAR = 1.5  # how many times the median of its side a forecast may take


@dataclass(frozen=True)
class Timing:
    """One forecast: its seconds, and those of them in which its thread did not run; 0 where that means nothing, as on a GPU."""

    seconds: float
    waited: float = 0.0


def timed(action: Callable[[], None], *, on_cpu: bool) -> Timing:
    """The time of an action whose result is there when it ends."""
    running, start = time.thread_time(), time.perf_counter()
    action()
    seconds = time.perf_counter() - start
    return Timing(seconds, max(0.0, seconds - (time.thread_time() - running)) if on_cpu else 0.0)


@dataclass(frozen=True)
class Rounds:
    """The rounds that count.

    Attributes:
        seconds: Of each side the time of one forecast, one value a round.
        num_repeated: How many further rounds were disturbed, and repeated.
        num_disturbed: How many of those that count were disturbed too, for there was no end of it.
    """

    seconds: tuple[tuple[float, ...], ...]
    num_repeated: int
    num_disturbed: int


def measure_rounds(
    sides: Sequence[Callable[[], Timing]], repeats: int, *, after_each: Callable[[], None] = lambda: None
) -> Rounds:
    """`repeats` rounds in which every side has one turn, the order changing from round to round.

    Disturbed rounds are repeated, at most as many as were asked for.
    """
    rounds: list[list[Timing]] = []
    order = list(range(len(sides)))
    while len(rounds) < 2 * repeats:
        if len(rounds) >= repeats and len(_quiet(rounds)) >= repeats:
            break
        found: dict[int, Timing] = {}
        for i in order:
            found[i] = sides[i]()
            after_each()
        rounds.append([found[i] for i in range(len(sides))])
        order = order[1:] + order[:1]
    quiet = _quiet(rounds)
    # Where too few are quiet, those that were disturbed the least.
    others = sorted(set(range(len(rounds))) - set(quiet), key=lambda i: sum(timing.seconds for timing in rounds[i]))
    kept = sorted((quiet + others)[:repeats])
    return Rounds(
        seconds=tuple(tuple(rounds[i][side].seconds for i in kept) for side in range(len(sides))),
        num_repeated=len(rounds) - repeats,
        num_disturbed=len(set(kept) - set(quiet)),
    )


def _quiet(rounds: Sequence[Sequence[Timing]]) -> list[int]:
    """The rounds in which no side was disturbed."""
    medians = [statistics.median(timing.seconds for timing in side) for side in zip(*rounds)]
    return [
        i
        for i, timings in enumerate(rounds)
        if all(
            timing.waited <= WAITED * timing.seconds and timing.seconds <= FAR * median
            for timing, median in zip(timings, medians)
        )
    ]
