"""One run a folder: a file that names the process that writes there, for as long as it lives."""

import atexit
import json
import os
import socket
from contextlib import suppress
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
    pid = holder(folder)
    if pid is None or pid == os.getpid():
        return
    raise ValueError(
        f"output {str(folder)!r} is in use by a run with process number {pid}; wait for it, stop it "
        f"(kill {pid}), or give another --output"
    )


def holder(folder: Path) -> int | None:
    """The number of the process that writes a folder, None where none does or none can be asked."""
    try:
        held = json.loads((folder / LOCK).read_text())
        pid, started, host = held["pid"], held["started"], held["host"]
    except (OSError, ValueError, KeyError, TypeError):  # none, or cut off by a crash
        return None
    return pid if host == socket.gethostname() and _is_alive(pid, started) else None


def take(folder: Path) -> None:
    """Name this process as the one that writes, until it ends.

    Raises:
        ValueError: another run was faster.
    """
    require_free(folder)  # once more: loading a model takes minutes
    path = folder / LOCK
    started = psutil.Process().create_time()
    path.write_text(json.dumps({"pid": os.getpid(), "started": started, "host": socket.gethostname()}))
    atexit.register(release, folder, os.getpid())


def release(folder: Path, pid: int) -> None:
    """Let the folder go, if the process `pid` holds it and this is no forked child of it."""
    path = folder / LOCK
    with suppress(OSError):  # where the disk became read-only it stays, and names a process that is no more
        if os.getpid() == pid and path.is_file() and f'"pid": {pid},' in path.read_text():
            path.unlink()


def _is_alive(pid: int, started: float) -> bool:
    try:  # numbers of processes are given again
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - started) < 1
    except psutil.Error:
        return False
