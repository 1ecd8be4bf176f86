"""Being told to stop: what is in hand is finished (a micro-batch, a completion) and the run saved, then the
process ends with the code a shell expects.
"""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils import gather_object


class StepStopped(Exception):
    """A step was left in the middle because some process was told to stop; every process raises it."""


class StopRequest:
    """Set by the first Ctrl-C or SIGTERM; the second ends the process at once.

    Attributes:
        signal: what this process was told, at any moment.
        agreed: what any process had been told when all were last asked: what a loop goes by.
    """

    signal: int | None = None
    agreed: int | None = None

    def agree(self) -> bool:
        """Ask all processes, once a step: a loop that each left on its own would leave the others waiting."""
        self.agreed = next(filter(None, gather_object([self.signal])), None)
        return self.agreed is not None

    def check(self) -> None:
        """Leave the work in hand if this process was told to stop."""
        if self.signal:
            raise StepStopped

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that a signal ended."""
        return 128 + (self.agreed or self.signal or 0)


@contextmanager
def stop_on_signal(request: StopRequest) -> Iterator[None]:
    """Let a run save when it is told to stop: `request` says so."""
    before = {}

    def on_signal(number: int, frame: Any) -> None:
        request.signal = number
        print("\nstopping, then saving; once more to quit at once", file=sys.stderr, flush=True)
        for which, handler in before.items():
            signal.signal(which, handler)

    # Python lets only the main thread set handlers; a run started from another one is stopped by its owner's
    # means.
    if threading.current_thread() is threading.main_thread():
        for which in (signal.SIGINT, signal.SIGTERM):
            before[which] = signal.signal(which, on_signal)
    try:
        yield
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
