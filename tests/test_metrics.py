"""What a run tells: JSON lines, trackers, and cutting back after a resume."""

import json
import math
import os

import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from runs.lines import LINES, cut_lines, line_offsets
from runs.metrics import RunLog
from runs.watchdog import Finding

STEP = {
    "train/reward": 0.5,
    "train/accuracy": 0.25,
    "policy/loss": -0.0123,
    "policy/entropy": 1.5,
    "policy/grad_norm": 0.75,
    "rollout/completion_tokens": 31.4,
    "rollout/zero_variance_groups": 0.5,
    "time/generate_s": 1.5,
    "time/score_s": 0.25,
    "time/update_s": 12.25,
    "rollout/tokens_per_s": 12345.6,
    "memory/peak_mib": 2048.0,
}


FIGURES = {"accuracy_strict": 0.5, "ci95": [0.2, 0.8], "n": 10}


@pytest.fixture
def log(tmp_path):
    log = RunLog(tmp_path, Accelerator(), total_steps=40, first_step=0)
    yield log
    log.close()


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ------------------------------------------------------------------------------------------------------------
# On disk


def test_every_step_evaluation_and_completion_is_a_line(log, tmp_path):
    log.step(1, STEP)
    log.step(2, {"policy/loss": math.nan})
    log.evaluation(2, "validation", {"accuracy_strict": 0.5, "ci95": [0.2, 0.8], "n": 10})
    log.rollouts([{"completion": "two\nlines, ünïcode \u2028"}, {"completion": ""}])
    first, second = rows(tmp_path / "metrics.jsonl")
    assert first == {"step": 1, **STEP}
    assert math.isnan(second["policy/loss"])
    assert rows(tmp_path / "eval.jsonl") == [
        {"step": 2, "set": "validation", "accuracy_strict": 0.5, "ci95": [0.2, 0.8], "n": 10}
    ]
    written = (tmp_path / "rollouts.jsonl").read_bytes()
    assert written.count(b"\n") == 2
    assert json.loads(written.split(b"\n")[0]) == {"completion": "two\nlines, ünïcode \u2028"}


def test_what_the_watchdog_found_stands_in_its_step_and_on_the_console(log, tmp_path, capsys):
    log.step(1, STEP, [Finding("no_signal", "all rewards were equal")])
    (row,) = rows(tmp_path / "metrics.jsonl")
    assert row["watchdog"] == [{"cause": "no_signal", "text": "all rewards were equal"}]
    log.found([Finding("no_signal", "all rewards were equal")])
    assert "watchdog: no_signal: all rewards were equal" in capsys.readouterr().out
    log.evaluation(2, "validation", FIGURES, [Finding("reward_hacking", "up and down")])
    assert rows(tmp_path / "eval.jsonl")[0]["watchdog"][0]["cause"] == "reward_hacking"


def test_lines_are_cut_back_to_what_a_checkpoint_knew(log, tmp_path):
    log.step(1, {"policy/loss": 1.0})
    log.rollouts([{"completion": "größer"}])  # offsets are bytes, not characters
    kept = {name: (tmp_path / name).read_bytes() for name in ("metrics.jsonl", "rollouts.jsonl")}
    offsets = line_offsets(tmp_path)
    assert offsets == {name: len(kept.get(name, b"")) for name in LINES}
    log.step(2, {"policy/loss": 2.0})
    log.rollouts([{"completion": "later"}])
    log.evaluation(2, "validation", {"accuracy_strict": 0.5, "ci95": [0.2, 0.8], "n": 10})
    log.canaries(2, [{"question": "1 + 1 = ?"}])
    cut_lines(tmp_path, offsets)
    assert {name: (tmp_path / name).read_bytes() for name in LINES} == {
        "eval.jsonl": b"",
        "canaries.jsonl": b"",
        **kept,
    }
    log.step(2, {"policy/loss": 3.0})
    assert [row["policy/loss"] for row in rows(tmp_path / "metrics.jsonl")] == [1.0, 3.0]


def test_a_file_shorter_than_the_checkpoint_knew_is_not_filled_up(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n')
    cut_lines(tmp_path, {"metrics.jsonl": 1000})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n'


def test_other_processes_write_and_say_nothing(tmp_path, capsys, monkeypatch):
    accelerator = Accelerator()
    monkeypatch.setattr(type(accelerator), "is_main_process", False)
    log = RunLog(tmp_path, accelerator, total_steps=2, first_step=0)
    log.step(1, STEP)
    log.rollouts([{"completion": ""}])
    log.evaluation(1, "validation", {"accuracy_strict": 0.5, "ci95": [0.2, 0.8], "n": 10})
    log.close()
    assert os.listdir(tmp_path) == []
    assert capsys.readouterr().out == ""


# ------------------------------------------------------------------------------------------------------------
# Trackers


class Notebook(GeneralTracker):
    """A tracker that keeps what it is given."""

    name = "notebook"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.logged, self.ended = [], False

    @property
    def tracker(self):
        return self.logged

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None, **kwargs):
        self.logged.append((step, values))

    def finish(self):
        self.ended = True


class NotebookWithTables(Notebook):
    def log_table(self, name, columns, data, step):
        self.logged.append((step, name, [dict(zip(columns, row, strict=True)) for row in data]))


def test_trackers_that_have_tables_get_completions_at_the_steps_that_have_a_line(tmp_path):
    plain, tables = Notebook(), NotebookWithTables()
    accelerator = Accelerator(log_with=[plain, tables])
    accelerator.init_trackers("ponder")
    log = RunLog(tmp_path, accelerator, total_steps=60, first_step=0)
    shown = {"question": "?", "completion": "<b>", "gold": "1", "extracted": None, "correct": False}
    shown |= {"reward": 0.5, "advantage": None}
    for step in range(1, 7):
        log.rollouts([{"step": step, **shown, "reward": sample, "tokens": 3} for sample in range(40)])
    log.rollouts([])
    assert [step for step, _, _ in tables.logged] == [1, 3, 6]
    assert tables.logged[1][1] == "rollouts"
    assert tables.logged[1][2] == [{"step": 3, **shown, "reward": sample} for sample in range(16)]
    assert plain.logged == []


def test_trackers_get_every_number_with_its_step_and_are_ended(tmp_path):
    notebook = Notebook()
    accelerator = Accelerator(log_with=[notebook])
    accelerator.init_trackers("ponder")
    log = RunLog(tmp_path, accelerator, total_steps=40, first_step=2)
    log.step(3, STEP)
    log.evaluation(3, "validation", {"accuracy_strict": 0.5, "ci95": [0.2, 0.8], "n": 10})
    assert notebook.logged == [(3, STEP), (3, {"eval/validation_accuracy": 0.5})]
    # Which would also part the processes: after a cold start the next run follows.
    accelerator.end_training = lambda: pytest.fail("this is the script's to say")
    log.close()
    assert notebook.ended
