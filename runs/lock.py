"""One run a folder: a file that names the process that writes there, for as long as it lives."""

import atexit
import json
import os
import socket
from pathlib import Path

import psutil

LOCK = "run.lock"


def require_free(folder: Path) -> None:
    """Refuse a folder that another process writes.

    A process of another machine cannot be asked whether it lives, and is taken for dead: a run that was
    killed there has to go on here.

    Raises:
        ValueError: a run is at work in it.
    """
    path = folder / LOCK
    try:
        held = json.loads(path.read_text())
        pid, started, host = held["pid"], held["started"], held["host"]
    except (OSError, ValueError, KeyError, TypeError):  # none, or cut off by a crash
        return
    if host != socket.gethostname() or pid == os.getpid() or not _is_alive(pid, started):
        return
    raise ValueError(
        f"output {str(folder)!r} is in use by a run with process number {pid}; wait for it, stop it "
        f"(kill {pid}), or give another --output"
    )


def take(folder: Path) -> None:
    """Name this process as the one that writes, until it ends."""
    path = folder / LOCK
    started = psutil.Process().create_time()
    path.write_text(json.dumps({"pid": os.getpid(), "started": started, "host": socket.gethostname()}))
    atexit.register(release, folder, os.getpid())


def release(folder: Path, pid: int) -> None:
    """Let the folder go, unless this is a forked child of the process `pid` that holds it."""
    if os.getpid() == pid:
        (folder / LOCK).unlink(missing_ok=True)


def _is_alive(pid: int, started: float) -> bool:
    try:  # numbers of processes are given again
        return abs(psutil.Process(pid).create_time() - started) < 1
    except psutil.Error:
        return False
