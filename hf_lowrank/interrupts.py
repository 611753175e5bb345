"""Ctrl-C and SIGTERM: work ends in order, and says how to go on."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Interrupted", "Raise", "explained", "handled", "held_back", "interruption_of", "postponed"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """Work was interrupted from outside.

    Attributes:
        number: Of the signal.
        how: How to go on.
    """

    def __init__(
        self, number: int = signal.SIGINT, how: str = "nothing is half-written; run the same command again."
    ) -> None:
        super().__init__(how)
        self.number = number
        self.how = how


class Raise:
    """A handler that ends the work at once, as Ctrl-C does, and remembers which signal came."""

    received: int | None = None

    def __call__(self, number: int, frame: FrameType | None = None) -> None:
        self.received = number
        raise Interrupted(number)


class Postpone(Raise):
    """A handler that notes the first signal and leaves the end to the work; a second one ends it at once.

    Processes that are forked off leave their end to this one.

    Args:
        tell: Called with the first signal.
    """

    def __init__(self, tell: Callable[[], None]) -> None:
        self.tell = tell
        self.process = os.getpid()

    def __call__(self, number: int, frame: FrameType | None = None) -> None:
        if os.getpid() != self.process:
            return
        if self.received is not None:
            super().__call__(number)
        self.received = number
        self.tell()


@contextmanager
def handled(handler: Raise) -> Iterator[None]:
    """SIGINT and SIGTERM go to this handler while the block runs, where they are not ignored.

    Outside the main thread, which alone may set handlers, nothing changes.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # as in a job in the background
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def postponed(tell: Callable[[], None]) -> Iterator[Postpone]:
    """Signals are noted while the block runs, which looks at `received` and ends in its own time; see `Postpone`."""
    handler = Postpone(tell)
    with handled(handler):
        yield handler


@contextmanager
def held_back() -> Iterator[Callable[[], None]]:
    """Signals wait, and never come to processes that are forked off, until what is yielded is called, or the block ends.

    torch gives the workers of a DataLoader a handler of their own, by which a SIGTERM to all processes of a job ends them before the
    one that waits for their batches.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield lambda: None
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def release() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    try:
        yield release
    finally:
        release()


@contextmanager
def explained(how: Callable[[], str | None]) -> Iterator[None]:
    """An interruption of the block says how to go on, where `how` knows more than that nothing is half-written."""
    try:
        yield
    except KeyboardInterrupt as error:
        text = how()
        if text is None:
            raise
        raise Interrupted(getattr(error, "number", signal.SIGINT), text) from error


def interruption_of(error: BaseException) -> Interrupted | None:
    """The interruption that an error is or comes from; None for any other.

    A library in C that is interrupted in its import may say ImportError.
    """
    if isinstance(error, Interrupted):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Interrupted()
    handler = signal.getsignal(signal.SIGTERM)
    received = handler.received if isinstance(handler, Raise) else None
    return None if received is None else Interrupted(received)
