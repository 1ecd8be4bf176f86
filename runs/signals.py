"""Being told to stop: the step in hand is finished and
saved, then the process ends with the code a shell expects.
"""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils import gather_object


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

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that a signal ended."""
        return 128 + (self.agreed or self.signal or 0)


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Let a run finish its step and save when it is told to stop."""
    request = StopRequest()
    before = {}

    def on_signal(number: int, frame: Any) -> None:
        request.signal = number
        print(
            "\nstopping after this step, then saving; once more to quit at once", file=sys.stderr, flush=True
        )
        for which, handler in before.items():
            signal.signal(which, handler)

    # Python lets only the main thread set handlers; a run started from another one is stopped by its owner's
    # means.
    if threading.current_thread() is threading.main_thread():
        for which in (signal.SIGINT, signal.SIGTERM):
            before[which] = signal.signal(which, on_signal)
    try:
        yield request
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
