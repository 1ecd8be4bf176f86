import json
import os
import socket
import subprocess
import sys

import psutil
import pytest

from runs import lock


@pytest.fixture
def other():
    """A living process that is not this one."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def write(folder, process, **changes):
    held = {"pid": process.pid, "started": psutil.Process(process.pid).create_time()}
    (folder / lock.LOCK).write_text(json.dumps(held | {"host": socket.gethostname()} | changes))


def test_a_folder_that_a_living_run_writes_is_refused(tmp_path, other):
    write(tmp_path, other)
    with pytest.raises(ValueError, match=rf"process number {other.pid}.*--output"):
        lock.require_free(tmp_path)
    other.kill()
    other.communicate()
    lock.require_free(tmp_path)


def test_a_number_that_was_given_again_is_another_process(tmp_path, other):
    write(tmp_path, other, started=psutil.Process(other.pid).create_time() - 100)
    lock.require_free(tmp_path)


def test_what_cannot_be_asked_or_read_does_not_block(tmp_path, other):
    lock.require_free(tmp_path)
    write(tmp_path, other, host="elsewhere")
    lock.require_free(tmp_path)
    for text in ("", "{", "[]", "{}"):
        (tmp_path / lock.LOCK).write_text(text)
        lock.require_free(tmp_path)


def test_a_process_holds_its_lock_until_it_ends(tmp_path):
    program = f"""
import sys
sys.path.insert(0, {os.getcwd()!r})
from pathlib import Path
from runs import lock
lock.take(Path({str(tmp_path)!r}))
lock.require_free(Path({str(tmp_path)!r}))  # its own
print("taken", flush=True)
input()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "taken\n"
    with pytest.raises(ValueError, match=str(process.pid)):
        lock.require_free(tmp_path)
    process.communicate("\n")
    assert process.returncode == 0
    assert not (tmp_path / lock.LOCK).exists()
