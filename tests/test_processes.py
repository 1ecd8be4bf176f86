"""Child processes that answer within a deadline, or are replaced."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rewards.processes import Child, ChildDied, OutOfTime

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def sleepy(tmp_path, monkeypatch):
    """The name of a module whose child sleeps for as many seconds as it is asked."""
    (tmp_path / "sleepy.py").write_text(
        "import time\nfrom rewards.processes import serve\ndef main():\n    serve(time.sleep)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "sleepy"


@pytest.mark.slow
def test_a_call_does_not_wait_for_a_child_that_is_slow_to_start(tmp_path, monkeypatch):
    (tmp_path / "late.py").write_text(
        "import time\nfrom rewards.processes import serve\ndef main():\n    time.sleep(1.5)\n    serve(str)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    child = Child("late", start_s=0.3)
    began = time.monotonic()
    with pytest.raises(OutOfTime):
        child.request(18, 0.2)
    assert time.monotonic() - began < 1.2
    first = child.process.pid
    assert child.request(18, 30.0) == "18"
    assert child.process.pid == first, "it went on starting"
    child.close()


def test_the_memory_of_a_child_is_capped(tmp_path, monkeypatch):
    (tmp_path / "hungry.py").write_text(
        "from rewards.processes import serve\n"
        "def answer(size):\n    return len(bytearray(size))\n"
        "def main():\n    serve(answer)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    child = Child("hungry", memory_bytes=1024**3)
    assert child.request(1000, 30.0) == 1000
    with pytest.raises(ChildDied):
        child.request(2 * 1024**3, 30.0)
    assert child.request(1000, 30.0) == 1000
    child.close()


@pytest.mark.slow
def test_waiting_for_a_busy_child_counts_against_the_deadline(sleepy):
    child = Child(sleepy)
    child.request(0, 30.0)
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(child.request, 1.0, 30.0)
        time.sleep(0.2)
        start = time.monotonic()
        with pytest.raises(OutOfTime):
            child.request(0, 0.2)
        assert time.monotonic() - start < 0.7
        assert busy.result() is None
    child.close()


@pytest.mark.slow
def test_a_busy_child_ends_with_its_parent(sleepy):
    code = (
        "import os, signal, threading, time; from rewards.processes import Child\n"
        "child = Child('sleepy'); child.request(0, 60.0)\n"
        "threading.Thread(target=child.request, args=(60, 60.0)).start(); time.sleep(0.3)\n"
        "print(child.process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
    )
    pid = int(done.stdout)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        if "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]:
            break
        time.sleep(0.1)
    else:
        assert not Path(f"/proc/{pid}").exists()
