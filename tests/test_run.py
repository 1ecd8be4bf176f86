"""A run while it trains: what goes on after a stop, what is kept, how it ends, what is told."""

import dataclasses
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import Accelerator
from test_folder import Settings, write_weights

import runs.folder
from runs import lock
from runs.checkpoint import MANIFEST
from runs.comparison import summary
from runs.config import RunStopped, UserError
from runs.folder import Run, open_run
from runs.loop import Work, train_on
from runs.records import read_run
from sharding import Weights


@pytest.fixture
def config(tmp_path):
    return Settings(str(tmp_path / "run"))


@pytest.fixture
def make_run(monkeypatch):
    """A run of a one-weight model whose steps are real optimizer steps."""
    monkeypatch.setattr(runs.folder, "save_model", lambda folder, model, tokenizer: write_weights(folder))
    monkeypatch.setattr(runs.folder, "write_report", lambda folder: folder / "report.html")

    def make(config, start=None):
        torch.manual_seed(0)
        model = torch.nn.Linear(1, 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        accelerator = Accelerator()
        weights = Weights(accelerator, torch.nn.ModuleDict({"model": model}))
        return Run(start or open_run(config), config, accelerator, weights, None, optimizer, scheduler)

    return make


def train(run, steps):
    for _ in range(steps):
        run.weights.policy.model(torch.rand(1, 1)).sum().backward()
        run.optimizer.step()
        run.scheduler.step()
        run.step += 1
        run.log.step(run.step, {"policy/loss": float(run.step)})


def best_of(config):
    return json.loads((Path(config.output) / "best" / "evaluation.json").read_text())


def figures(accuracy):
    return {"accuracy_strict": accuracy, "ci95": [0.0, 1.0], "n": 8}


def test_a_run_goes_on_with_optimizer_schedule_random_numbers_and_lines(config, make_run):
    first = make_run(config)
    train(first, 2)
    first.evaluated("validation", figures(0.5))
    first.checkpoint()
    first.seed_dropout()
    expected = torch.rand(3)
    train(first, 1)  # told, but lost in a kill: the checkpoint is older

    second = make_run(config)
    second.seed_dropout()
    assert torch.equal(torch.rand(3), expected)
    second.step = 3
    second.seed_dropout()
    assert not torch.equal(torch.rand(3), expected)
    second.step = 2
    assert (second.step, second.best_accuracy) == (2, 0.5)
    assert second.scheduler.get_last_lr() == [0.025]
    moments = second.optimizer.state_dict()["state"][0]
    assert moments["step"] == 2
    assert moments["exp_avg"] != 0
    train(second, 2)
    metrics = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == [1, 2, 3, 4]


def test_a_run_goes_on_at_the_rate_that_it_is_asked_for(config, make_run, capsys):
    first = make_run(config)
    train(first, 2)
    first.checkpoint()
    asked = dataclasses.replace(
        config, learning_rate=config.learning_rate / 2, resume=f"{config.output}/checkpoints/step-000002"
    )
    second = make_run(asked)
    assert "step-000002 with learning_rate: 0.1 -> 0.05" in capsys.readouterr().out
    assert second.scheduler.get_last_lr() == [first.scheduler.get_last_lr()[0] / 2]
    assert second.optimizer.param_groups[0]["lr"] == first.optimizer.param_groups[0]["lr"] / 2
    train(first, 1)
    train(second, 1)
    assert second.optimizer.param_groups[0]["lr"] == first.optimizer.param_groups[0]["lr"] / 2


def test_bad_updates_in_a_row_are_counted_on_after_a_stop_and_anew_after_a_way_back(config, make_run):
    run = make_run(dataclasses.replace(config, max_rollbacks=1))
    train(run, 1)
    run.check_updates([None, "loss nan"], [])
    run.checkpoint()
    assert not run.diverged
    again = make_run(dataclasses.replace(config, max_rollbacks=1))
    train(again, 1)
    again.check_updates(["loss nan"], [])
    assert "2 updates in a row were not finite" in again.diverged
    start = again.roll_back()
    assert start.checkpoint == Path(config.output) / "checkpoints" / "step-000001"
    assert make_run(config, start).bad_in_a_row == 0


def test_best_is_the_best_and_not_the_last(config, make_run):
    run = make_run(config)
    for accuracy, kept in ((0.0, 0), (0.5, 1), (0.5, 1), (0.4, 1), (0.6, 4)):
        run.evaluated("validation", figures(accuracy))
        assert best_of(config)["step"] == kept
        train(run, 1)
    assert best_of(config) == {"step": 4, "set": "validation", **figures(0.6)}
    assert (Path(config.output) / "best" / "model.safetensors").is_file()
    assert run.best_accuracy == 0.6


def test_best_stays_where_the_run_goes_back_and_says_what_it_is(config, make_run, capsys):
    config, ended = dataclasses.replace(config, max_rollbacks=1), []
    first = make_run(config)
    train(first, 1)
    first.evaluated("validation", figures(0.5))
    train(first, 1)
    first.checkpoint()
    train(first, 1)
    first.evaluated("validation", figures(0.8))
    first.diverged = "it was told so"
    first.accelerator.trackers = [SimpleNamespace(finish=lambda: ended.append(1))]
    start = first.roll_back()
    assert (ended, first.accelerator.trackers) == ([1], [])  # no tracker takes a step twice
    assert "best/ keeps its model (80.0% after step 3) until there is a better one" in capsys.readouterr().out

    second = make_run(config, start)
    assert (second.best_accuracy, second.kept["step"]) == (0.5, 3)
    told = read_run(Path(config.output))
    assert [row["step"] for row in told.evaluations] == [1]
    assert summary(told)["best accuracy"].endswith("n = 8), after step 3, before it went back")
    train(second, 1)
    second.evaluated("validation", figures(0.7))  # the best since, and so no cause for impatience
    assert (second.best_accuracy, second.not_better) == (0.7, 0)
    assert best_of(config)["accuracy_strict"] == 0.8
    train(second, 1)
    second.evaluated("validation", figures(0.9))
    assert best_of(config)["step"] == 4
    assert summary(read_run(Path(config.output)))["best accuracy"].endswith("n = 8), after step 4")


def test_a_run_that_was_killed_after_its_best_evaluation_finds_it_again(config, make_run):
    first = make_run(config)
    train(first, 2)
    first.checkpoint()
    train(first, 1)
    first.evaluated("validation", figures(0.8))
    second = make_run(config)
    train(second, 1)
    second.evaluated("validation", figures(0.8))
    assert (second.best_accuracy, second.not_better) == (first.best_accuracy, first.not_better) == (0.8, 0)
    assert best_of(config)["step"] == 3


def test_a_best_model_that_the_disk_did_not_take_is_tried_again(config, make_run, monkeypatch):
    run = make_run(config)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(runs.folder, "write_folder", full)
        run.evaluated("validation", figures(0.5))
    assert run.kept is None
    train(run, 1)
    run.evaluated("validation", figures(0.4))
    assert best_of(config)["accuracy_strict"] == 0.4
    assert run.not_better == 1


@pytest.mark.parametrize(
    ("changes", "accuracies", "after", "why"),
    [
        ({"target_accuracy": 0.5}, (0.1, 0.4, 0.5), 3, "50.0% reaches --target_accuracy 0.5"),
        ({"target_accuracy": 0.0}, (0.0,), 1, "0.0% reaches"),
        ({"patience": 2}, (0.1, 0.3, 0.3, 0.2), 4, "2 evaluations in a row were no better than 30.0%"),
        ({"patience": 2}, (0.1, 0.1, 0.2, 0.2, 0.3), None, None),
    ],
)
def test_a_run_ends_where_it_is_good_enough_or_gets_no_better(
    config, make_run, changes, accuracies, after, why
):
    run = make_run(dataclasses.replace(config, **changes))
    for number, accuracy in enumerate(accuracies, 1):
        assert run.enough is None
        run.evaluated("validation", figures(accuracy))
        assert (run.enough is not None) == (number == after)
    if why:
        assert why in run.enough


def test_whether_it_is_enough_is_decided_by_what_is_asked_now(config, make_run):
    run = make_run(dataclasses.replace(config, patience=1))
    train(run, 2)
    for _ in range(2):
        run.evaluated("validation", figures(0.3))
    assert run.enough
    run.checkpoint()
    assert make_run(dataclasses.replace(config, patience=3)).enough is None
    assert make_run(dataclasses.replace(config, target_accuracy=0.3)).enough


def test_a_run_that_ends_leaves_final_and_says_where(config, make_run, capsys):
    run = make_run(config)
    train(run, 4)
    assert run.finish() == 0
    assert (Path(config.output) / "final" / MANIFEST).is_file()
    assert f"final model: {Path(config.output) / 'final'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("resume", "saved", "done", "told"),
    [
        ("auto", 2, 2, "2 steps are saved, and the same command goes on. A model to use: {saved}"),
        # As after a full disk, or in a run that diverged: the last steps are on no disk.
        (
            "auto",
            2,
            4,
            "2 of 4 steps are saved, and the same command goes on from there. A model to use: {saved}",
        ),
        ("auto", None, 3, "none of 3 steps is saved, and the same command begins again"),
        ("never", 2, 2, "2 steps are saved, and the same command with --resume auto goes on. A model to use"),
    ],
)
def test_a_stopped_run_leaves_no_final_and_tells_what_is_saved(
    config, make_run, capsys, monkeypatch, resume, saved, done, told
):
    monkeypatch.setattr("sys.argv", ["train_grpo.py", "--rewards", "{correct: 1.0}"])
    run = make_run(dataclasses.replace(config, resume=resume))
    if saved:
        train(run, saved)
        run.checkpoint()
    train(run, done - run.step)
    run.stop.agreed = 15
    assert run.finish() == 143
    assert not (Path(config.output) / "final").exists()
    printed = capsys.readouterr().out
    assert "stopped: " + told.format(saved=Path(config.output) / "checkpoints" / "step-000002") in printed
    assert ("A model to use" in printed) == bool(saved)
    command = "to go on: python train_grpo.py --rewards '{correct: 1.0}'"
    again = command + (" --resume auto" if resume == "never" else "")
    assert (again in printed.splitlines()) == bool(saved)


def test_a_checkpoint_of_another_version_is_refused(config, make_run, monkeypatch):
    run = make_run(config)
    train(run, 1)
    run.checkpoint()
    monkeypatch.setattr(runs.folder, "FORMAT", -1)
    with pytest.raises(UserError, match="step-000001' was written by another version of Ponder"):
        make_run(config)


@pytest.mark.parametrize("resume", ["auto", "PATH"])
def test_a_checkpoint_of_before_is_not_taken_for_one_of_another_configuration(resume, config, make_run):
    run = make_run(config)
    train(run, 1)
    run.checkpoint()
    folder = Path(config.output) / "checkpoints" / "step-000001"
    # As they were: less in the configuration, and no copy of it in the checkpoint.
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    settings.pop("patience")
    settings.pop("learning_rate")
    (Path(config.output) / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "config.yaml").unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop("config.yaml")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    lock.release(run.folder, os.getpid())
    asked = dataclasses.replace(config, resume=str(folder) if resume == "PATH" else "auto")
    with pytest.raises(ValueError, match="step-000001' was written by another version of Ponder.*--model"):
        open_run(asked)


@pytest.mark.parametrize("left", ["", "a: b\n c: ", "[1]"])
def test_a_configuration_that_cannot_be_read_does_not_bar_the_way_to_the_checkpoints(left, config, make_run):
    run = make_run(config)
    train(run, 2)
    lock.release(run.folder, os.getpid())
    settings = Path(config.output) / "config.yaml"
    settings.write_text(left)
    with pytest.raises(ValueError, match="config.yaml cannot be read; give --resume never to start over"):
        open_run(config)
    run.checkpoint()
    with pytest.raises(ValueError, match=r"cannot be read; give --resume .*/step-000002 to go on"):
        open_run(config)
    again = make_run(dataclasses.replace(config, resume=f"{config.output}/checkpoints/step-000002"))
    assert again.step == 2
    assert yaml.safe_load(settings.read_text())["learning_rate"] == config.learning_rate


def test_a_start_on_a_full_disk_is_a_message_and_leaves_the_configuration_readable(
    config, make_run, monkeypatch
):
    run = make_run(config)
    train(run, 2)
    run.checkpoint()
    lock.release(run.folder, os.getpid())
    before = (run.folder / "config.yaml").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("runs.lines.os.fsync", full)
        with pytest.raises(UserError, match="could not be written: .*No space left.*; make room"):
            make_run(config)
    assert (run.folder / "config.yaml").read_bytes() == before
    assert not list(run.folder.glob(".*"))
    lock.release(run.folder, os.getpid())
    assert make_run(config).step == 2


def test_a_step_that_the_disk_did_not_take_is_not_said_to_be_saved(config, make_run, monkeypatch):
    run = make_run(config)
    train(run, 2)
    run.checkpoint()
    train(run, 1)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(runs.folder, "save_checkpoint", full)
        run.checkpoint()
    assert run.tell_saved() == "2 of 3 steps are saved, and the same command goes on from there"
    run.checkpoint()
    assert run.tell_saved() == "3 steps are saved, and the same command goes on"
    lock.release(run.folder, os.getpid())
    # What was saved in another folder is not saved in this one.
    other = dataclasses.replace(
        config, output=f"{config.output}-2", resume=f"{config.output}/checkpoints/step-000002"
    )
    assert make_run(other).tell_saved() == "none of 2 steps is saved, and the same command begins again"


def test_whoever_cannot_go_on_is_told_what_is_saved(config, make_run):
    run = make_run(dataclasses.replace(config, eval_every=0))

    def step():
        if run.step == 3:
            raise RunStopped("memory ran out")
        train(run, 1)

    with pytest.raises(RunStopped, match="^memory ran out; 2 of 3 steps are saved, and the same command"):
        train_on(Work(run, step, evaluate=None, evaluates_first=False))
