"""A child process that answers requests over pipes and can be killed at any moment.

The child is a fresh interpreter running one of our modules: it inherits no lock, no thread and no CUDA
context, does not import the trainer's `__main__`, and works the same from a script, a thread, a notebook or
a forked or spawned process.
"""

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
START_TIMEOUT_S = 120.0


class OutOfTime(Exception):
    """The child did not answer before the deadline; it was killed."""


class StillStarting(OutOfTime):
    """The child was not ready in time; it goes on starting, for a later request."""


class ChildDied(Exception):
    """The child ended before it answered (out of memory, killed from outside, or a crash of a library)."""


class Child:
    """One child process, started at the first request and again whenever it has gone.

    Requests from several threads queue up; the wait counts against the deadline.
    """

    def __init__(
        self,
        module: str,
        memory_bytes: int | None = None,
        arguments: tuple[str, ...] = (),
        start_s: float = START_TIMEOUT_S,
    ) -> None:
        """A child that runs `module.main()`, which calls `serve`.

        Args:
            module: full name of one of our modules.
            memory_bytes: cap of its address space where the system has one; None for no cap.
            arguments: handed to the module.
            start_s: the most that a request waits for the start of a fresh child, on top of its own time.
        """
        self.module = module
        self.memory_bytes = memory_bytes
        self.arguments = arguments
        self.start_s = start_s
        self._forget()
        _children.add(self)

    def _forget(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen | None = None
        self.to_child: Connection | None = None
        self.from_child: Connection | None = None
        self.is_ready = False
        self.launched = 0.0  # of time.monotonic()

    def request(self, message: Any, timeout_s: float) -> Any:
        """Send a message and wait for the answer.

        Args:
            message: anything that can be pickled.
            timeout_s: wall-clock seconds for the answer; the start of a fresh child comes on top, up to
                `start_s`.

        Raises:
            OutOfTime: no answer in time; the child was killed, or is still starting. ChildDied: the child
                ended by itself.
        """
        deadline = time.monotonic() + timeout_s
        if not self.lock.acquire(timeout=timeout_s):
            raise OutOfTime("the child was busy")
        return self.request_locked(message, deadline)

    def request_locked(self, message: Any, deadline: float) -> Any:
        """`request` for whoever holds the lock, which is let go; `deadline` is of `time.monotonic()`."""
        try:
            if not self.is_ready:
                waited_since = time.monotonic()
                self._start(deadline + self.start_s)
                deadline += min(self.start_s, time.monotonic() - waited_since)
            return self._exchange(message, deadline)
        except StillStarting:
            raise
        except (OSError, EOFError) as error:
            self._kill()
            raise ChildDied(f"{self.module} ended: {type(error).__name__}") from error
        except BaseException:  # an interrupt in the middle would leave an answer in the pipe
            self._kill()
            raise
        finally:
            self.lock.release()

    def _start(self, deadline: float) -> None:
        if self.process is None:
            self._launch()
        hung = self.launched + START_TIMEOUT_S
        if not self.from_child.poll(max(0.0, min(deadline, hung) - time.monotonic())):
            if time.monotonic() < hung:
                raise StillStarting(f"{self.module} is still starting")
            raise ChildDied(f"{self.module} did not start within {START_TIMEOUT_S:.0f} s")
        self.from_child.recv()
        self.is_ready = True

    def _launch(self) -> None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        memory = str(self.memory_bytes or 0)
        self.launched = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"import {self.module} as m; m.main()", memory, *self.arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        self.to_child = Connection(os.dup(self.process.stdin.fileno()), readable=False)
        self.from_child = Connection(os.dup(self.process.stdout.fileno()), writable=False)
        self.process.stdin.close()
        self.process.stdout.close()

    def _exchange(self, message: Any, deadline: float) -> Any:
        self.to_child.send(message)
        if not self.from_child.poll(max(0.0, deadline - time.monotonic())):
            self._kill()
            self._launch()  # the next request finds it warm, or at least under way
            raise OutOfTime("no answer before the deadline")
        return self.from_child.recv()

    def _kill(self) -> None:
        process, self.process, self.is_ready = self.process, None, False
        if process is not None:
            self.to_child.close()
            self.from_child.close()
            process.kill()
            process.wait()

    def close(self) -> None:
        """End the child; a later request starts a new one."""
        process = self.process
        if process is not None:
            process.kill()  # wakes whoever waits for it, and they let go of the lock
        with self.lock:
            self._kill()

    def _abandon(self) -> None:
        """In a forked process: the child belongs to the parent; let go of it without a word."""
        for connection in (self.to_child, self.from_child):
            if connection is not None:
                with contextlib.suppress(OSError):
                    connection.close()
        if self.process is not None:
            self.process.returncode = 0  # so that nothing here waits for it or warns
        self._forget()


class Pool:
    """Children that do the same, for several threads: one that hangs does not hold up the others.

    A request goes to a child that is free and warm. Another one is started only where all are at work and
    none is starting, so that a single thread has a single child.
    """

    def __init__(self, size: int, *arguments: Any, **named: Any) -> None:
        """So many children at the most; the other arguments are those of `Child`."""
        self.children = [Child(*arguments, **named) for _ in range(size)]

    def request(self, message: Any, timeout_s: float) -> Any:
        """As `Child.request`; a wait for a free child counts against the time."""
        deadline = time.monotonic() + timeout_s
        while True:
            started = [child for child in self.children if child.process]
            fresh = [child for child in self.children if not child.process]
            may_grow = all(child.is_ready for child in started)
            for child in sorted(started, key=lambda child: not child.is_ready) + fresh[:may_grow]:
                if child.lock.acquire(blocking=False):
                    return child.request_locked(message, deadline)
            if time.monotonic() > deadline:
                raise OutOfTime("all children were busy")
            time.sleep(0.002)


_children: "weakref.WeakSet[Child]" = weakref.WeakSet()


@atexit.register
def close_all() -> None:
    """End every child of this process; runs at exit."""
    for child in list(_children):
        child._kill()


def _abandon_all() -> None:
    for child in list(_children):
        child._abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_all)


# -------------------------------------------------------------------------------------------------------
# The child's side


def serve(answer: Callable[[Any], Any]) -> None:
    """Answer requests until the parent has gone. What libraries print goes to stderr."""
    from_parent = Connection(os.dup(0), writable=False)
    to_parent = Connection(os.dup(1), readable=False)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    # Ctrl-C and a batch system's SIGTERM reach the whole group of processes; the trainer finishes its step
    # first, and needs us for that. A handler, not SIG_IGN: programs that we start would inherit that one.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    _limit_memory(int(sys.argv[1]))
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    to_parent.send("ready")
    while True:
        try:
            message = from_parent.recv()
        except EOFError:
            return
        to_parent.send(answer(message))


def _limit_memory(memory_bytes: int) -> None:
    if not memory_bytes:
        return
    try:
        import resource
    except ImportError:  # not on Windows
        return
    with contextlib.suppress(ValueError, OSError):  # macOS refuses some limits
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _end_with_parent(parent: int) -> None:
    """A parent that was killed cannot close us; nobody wants the answer any more."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(0)
