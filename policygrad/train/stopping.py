"""Signals that end a run: the first one asks it to stop after its iteration, a second one stops it at once."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(KeyboardInterrupt):
    """A signal that ends the process: it stops training as Ctrl-C does."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


@contextmanager
def asked() -> Iterator[list[int]]:
    """Collect the first signal in the list that is yielded; what handles signals outside the block handles the next.

    A signal that is ignored, or that has the system's default, stays so, and processes forked here behave as outside.
    """
    came: list[int] = []
    main, owner = threading.current_thread() is threading.main_thread(), os.getpid()
    outside: dict[int, Any] = {x: y for x in SIGNALS if main and callable(y := signal.getsignal(x))}

    def ask(number: int, frame: Any) -> None:
        if came or os.getpid() != owner:
            outside[number](number, frame)
            return
        came.append(number)
        if sys.stderr is not None and sys.stderr.isatty():
            print("\nstopping after this iteration; again stops at once", file=sys.stderr, flush=True)

    for number in outside:
        signal.signal(number, ask)
    try:
        yield came
    finally:
        for number, handler in outside.items():
            if signal.getsignal(number) is ask:  # a second signal may have changed it
                signal.signal(number, handler)


@contextmanager
def unasked() -> Iterator[list[int]]:
    """Signals stay as they are outside: in Python, Ctrl-C stops at once."""
    yield []
