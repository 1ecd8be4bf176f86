"""What a person sees of a run: lines in a pipe, a bar and colours at a terminal, and how much of it."""

import io
import re

import pytest

import runs.console
from runs.console import Console

STEP = {
    "train/reward": 0.5,
    "train/accuracy": 0.25,
    "policy/loss": -0.0123,
    "policy/entropy": 1.5,
    "policy/grad_norm": 0.75,
    "rollout/completion_tokens": 31.4,
    "rollout/zero_variance_groups": 0.5,
    "time/generate_s": 1.5,
    "time/score_s": 0.5,
    "time/update_s": 6.0,
    "rollout/tokens_per_s": 12345.6,
    "memory/peak_mib": 2048.0,
}
FIGURES = {"accuracy_strict": 0.015, "ci95": [0.005, 0.0432], "n": 200}


class Clock:
    """Seconds that pass when told to."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(runs.console, "time", clock)
    return clock


def console(level="info", first_step=0, total_steps=40):
    return Console("grpo", total_steps, first_step, level=level)


def told_steps(text):
    return [int(step) for step in re.findall(r"^step +(\d+)/", text, re.MULTILINE)]


# ------------------------------------------------------------------------------------------------------------
# In a pipe


def test_a_pipe_gets_aligned_lines_and_no_progress_bar(capfd, clock):
    log = console()
    for step in range(1, 41):
        clock.now += 1
        log.step(step, {**STEP, "train/accuracy": step / 40, "policy/loss": (-1) ** step * step / 4})
    told = capfd.readouterr()
    assert told.err == ""
    lines = told.out.splitlines()
    # The first step, every twentieth part of the run, and the last.
    assert told_steps(told.out) == [1, *range(2, 41, 2)]
    assert "\r" not in told.out
    assert "\x1b" not in told.out
    assert len({len(line) for line in lines}) == 1
    names = "reward accuracy loss entropy grad tokens no_signal tokens/s MiB time generate score update left"
    for name in names.replace("_", " ").split():
        assert len({line.index(f" {name} ") for line in lines}) == 1, name
    assert lines[0].startswith("step  1/40  reward  0.500  accuracy   2.5%  loss -0.2500")
    assert lines[-1].startswith("step 40/40  reward  0.500  accuracy 100.0%  loss 10.0000")


def test_a_line_tells_what_share_of_the_step_each_phase_took(capsys):
    console().step(1, STEP)
    assert "  time   8.00 s  generate  19%  score   6%  update  75%  left" in capsys.readouterr().out
    console().step(1, {"policy/loss": 2.0, "time/update_s": 0.125})  # a cold start has but one
    assert "loss  2.0000  time   0.12 s  left" in capsys.readouterr().out


def test_a_line_tells_the_time_left_from_the_steps_done_here(capsys, clock):
    log = console(first_step=10)
    clock.now += 300
    log.step(15, STEP)  # 25 steps more at a minute each
    assert capsys.readouterr().out.endswith("  left    25:00\n")
    clock.now += 700_000
    log.step(16, STEP)
    assert re.search(r"left \d{3}:\d\d:\d\d\n$", capsys.readouterr().out)


def test_a_step_without_a_metric_leaves_its_column_out(capsys):
    console().step(1, {"policy/loss": 5.9361, "policy/learning_rate": 0.1})
    assert capsys.readouterr().out == "step  1/40  loss  5.9361  left    00:00\n"


def test_a_loss_of_nothing_is_explained(capsys):
    log = console()
    log.step(2, STEP | {"policy/loss": 0.5})
    log.step(4, {"policy/loss": 0.0})  # of a cold start it would be news
    assert "normal" not in capsys.readouterr().out
    log.step(6, STEP | {"policy/loss": -0.0})
    assert "loss -0.0000 (normal: on-policy)  entropy" in capsys.readouterr().out


def test_undecided_answers_are_told_where_there_are_any(capsys):
    log = console()
    log.step(2, STEP | {"rewards/undecided_fraction": 0.0})
    assert "undecided" not in capsys.readouterr().out
    log.step(4, STEP | {"rewards/undecided_fraction": 0.12})
    assert "undecided  12%" in capsys.readouterr().out


def test_an_evaluation_is_told_with_its_interval(capsys):
    console().evaluation(7, "validation", FIGURES)
    assert (
        capsys.readouterr().out
        == "step  7/40  validation accuracy 1.5% (95 % interval 0.5% to 4.3%, n = 200)\n"
    )


def test_the_end_tells_where_the_time_went(capsys):
    log = console()
    for step in (1, 2, 3):
        log.step(step, STEP)
    log.close()
    assert capsys.readouterr().out.endswith("time in steps 00:24: generate 19%, score 6%, update 75%\n")
    log = console()
    log.step(1, {"time/update_s": 1.0})
    capsys.readouterr()
    log.close()
    assert capsys.readouterr().out == ""


# ------------------------------------------------------------------------------------------------------------
# How much


def tell_all(log, clock, seconds=1.0):
    for step in range(1, 41):
        clock.now += seconds
        log.step(step, STEP)
    log.evaluation(40, "validation", FIGURES)
    log.warn("watchdog: no_signal: all rewards were equal")
    log.say("final model: here", always=True)
    log.close()


def test_quiet_leaves_warnings_and_how_it_ended(capsys, clock):
    tell_all(console("quiet"), clock)
    told = capsys.readouterr()
    assert told.out == "watchdog: no_signal: all rewards were equal\nfinal model: here\n"
    assert told.err == ""


def test_debug_has_a_line_for_every_step(capsys, clock):
    tell_all(console("debug"), clock)
    assert told_steps(capsys.readouterr().out) == [*range(1, 41), 40]


def test_slow_steps_have_a_line_each_whatever_the_level(capsys, clock):
    tell_all(console(), clock, seconds=10.0)
    assert told_steps(capsys.readouterr().out) == [*range(1, 41), 40]
    tell_all(console(total_steps=400), clock, seconds=4.0)  # every third, and the milestones
    assert told_steps(capsys.readouterr().out)[:6] == [1, 4, 7, 10, 13, 16]


def test_other_processes_say_nothing(capsys, clock):
    tell_all(Console("grpo", 40, 0, is_main=False), clock)
    assert capsys.readouterr().out == ""


# ------------------------------------------------------------------------------------------------------------
# At a terminal


class Terminal(io.StringIO):
    def isatty(self):
        return True


def at_terminal(monkeypatch):
    """Put terminals in place of both streams; not in a fixture, after which pytest puts its own back."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    out, err = Terminal(), Terminal()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    return out, err


def test_a_terminal_gets_a_progress_bar_that_goes_on_where_the_run_does(monkeypatch):
    _, err = at_terminal(monkeypatch)
    console(first_step=10).close()
    assert "grpo:  25%" in err.getvalue()
    assert "10/40" in err.getvalue()
    console("quiet", first_step=20).close()
    assert "50%" not in err.getvalue()


def test_colours_take_nothing_from_the_lines(clock, monkeypatch):
    out, _ = at_terminal(monkeypatch)
    tell_all(console(), clock)
    assert "\x1b[33mwatchdog: no_signal: all rewards were equal\x1b[0m" in out.getvalue()
    assert "\x1b[1mvalidation accuracy 1.5%\x1b[0m" in out.getvalue()
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        plain, _ = at_terminal(monkeypatch)
        monkeypatch.setenv(name, value)
        tell_all(console(), clock)
        assert "\x1b" not in plain.getvalue()
        assert re.sub(r"\x1b\[\d+m", "", out.getvalue()) == plain.getvalue()
