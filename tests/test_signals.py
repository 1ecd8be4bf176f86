"""Being told to stop: once to finish the step, twice to quit at once."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from runs.signals import StepStopped, StopRequest, stop_on_signal

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def handlers():
    """The handlers of a plain Python process, whatever the test runner set."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_is_noted_and_gives_the_exit_code_of_a_shell(number, code, capsys):
    stop = StopRequest()
    with stop_on_signal(stop):
        stop.check()
        assert stop.signal is None
        signal.raise_signal(number)
        assert stop.signal == number
        assert stop.exit_code == code
        with pytest.raises(StepStopped):
            stop.check()
    assert "stopping, then saving" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_quits_at_once(number):
    with stop_on_signal(StopRequest()):
        signal.raise_signal(number)
        # Either signal may come second.
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.slow
def test_a_process_that_is_told_twice_ends_by_the_second():
    program = """
import signal
from runs.signals import StopRequest, stop_on_signal
with stop_on_signal(StopRequest()):
    signal.raise_signal(signal.SIGTERM)
    print("it goes on", flush=True)
    signal.raise_signal(signal.SIGTERM)
    print("and on")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "it goes on\n")
    assert "stopping, then saving; once more to quit at once" in done.stderr


def test_handlers_are_put_back_after_the_run():
    with stop_on_signal(StopRequest()):
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_run_in_another_thread_leaves_the_handlers_alone():
    seen = []

    def work():
        stop = StopRequest()
        with stop_on_signal(stop):
            seen.append((stop.signal, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert seen == [(None, signal.default_int_handler)]
