"""The folder of a run: where a run begins, what is refused, what is dropped, what goes on."""

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator

import runs.folder
from runs import lock
from runs.checkpoint import MANIFEST, list_checkpoints, save_checkpoint, write_folder
from runs.comparison import summary
from runs.config import RunStopped, UserError, to_yaml
from runs.folder import Run, Start, environment, open_run, write_run
from runs.lines import LINES
from runs.loop import Work, train_on
from runs.metrics import TRACKED
from runs.records import read_run
from sharding import Weights


@dataclass(frozen=True)
class Settings:
    output: str
    seed: int = 0
    total_steps: int = 4
    learning_rate: float = 0.1
    lora_rank: int = 0
    max_bad_updates: int = 2
    max_rollbacks: int = 0
    target_accuracy: float | None = None
    patience: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    resume: str = "auto"
    tracker: str = "none"
    log_level: str = "info"
    eval_every: int = 0
    save_every: int = 2
    keep_checkpoints: int = 5


def write_weights(folder):
    (folder / "model.safetensors").write_bytes(b"weights")


def save(run, step, **settings):
    folder = Path(run) / "checkpoints" / f"step-{step:06d}"

    def write(folder):
        write_weights(folder)
        (folder / "config.yaml").write_text(to_yaml(Settings(str(run), **settings)))

    save_checkpoint(folder, write, {"step": step}, keep=9)
    return folder


@pytest.fixture
def config(tmp_path):
    return Settings(str(tmp_path / "run"))


def begin(config, **changes):
    """Open a run with some settings changed, and write its first files."""
    config = dataclasses.replace(config, **changes)
    start = open_run(config)
    write_run(start, config)
    return start


# ------------------------------------------------------------------------------------------------------------
# Where a run begins


def test_a_run_begins_afresh_where_there_is_none(config):
    assert open_run(config) == Start(Path(config.output), None, is_finished=False)
    assert not Path(config.output).exists()


def test_a_stopped_run_goes_on_from_its_newest_checkpoint(config):
    begin(config)
    assert open_run(config).checkpoint is None
    save(config.output, 1)
    newest = save(config.output, 2)
    assert open_run(config) == Start(Path(config.output), newest, is_finished=False)


def test_a_run_whose_checkpoints_are_all_damaged_is_not_thrown_away(config, capsys):
    begin(config)
    for step in (1, 2):
        (save(config.output, step) / "model.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match="none of its checkpoints is whole; give --resume never"):
        open_run(config)
    assert capsys.readouterr().out.count("is damaged (model.safetensors is not what was written)") == 2
    assert begin(config, resume="never").checkpoint is None


def test_what_a_killed_run_left_half_done_is_cleared_up_when_it_goes_on(config):
    begin(config)
    save(config.output, 1)
    left = Path(config.output) / ".weights-1"
    left.mkdir()
    open_run(config)
    assert left.is_dir()  # who only looks changes nothing
    begin(config)
    assert not left.exists()


def test_a_finished_run_is_finished_until_more_steps_are_asked_for(config):
    begin(config)
    last = save(config.output, 4)
    assert not open_run(config).is_finished
    write_folder(Path(config.output) / "final", write_weights)
    assert open_run(config).is_finished
    assert open_run(dataclasses.replace(config, total_steps=3)).is_finished
    longer = dataclasses.replace(config, total_steps=6)
    assert open_run(longer) == Start(Path(config.output), last, is_finished=False)


def test_a_prolonged_run_that_was_killed_is_not_finished(config):
    begin(config)
    save(config.output, 4)
    write_folder(Path(config.output) / "final", write_weights)
    begin(config, total_steps=6)
    # Killed here: config.yaml says 6 steps, and the final model of 4 must not pass for theirs.
    assert not open_run(dataclasses.replace(config, total_steps=6)).is_finished


def test_another_configuration_is_refused_with_the_difference(config):
    begin(config)
    changed = dataclasses.replace(config, learning_rate=0.2, options={"high": 9})
    with pytest.raises(ValueError, match="another configuration") as caught:
        open_run(changed)
    told = str(caught.value)
    assert "(learning_rate: 0.1 -> 0.2; options: {} -> {'high': 9})" in told
    assert "--output" in told
    assert "--resume never" in told


def test_a_field_that_the_older_run_did_not_have_is_a_difference(config):
    begin(config)
    path = Path(config.output) / "config.yaml"
    path.write_text(
        yaml.safe_dump({k: v for k, v in yaml.safe_load(path.read_text()).items() if k != "options"})
    )
    with pytest.raises(ValueError, match=r"options: None -> \{\}"):
        open_run(config)


def test_what_does_not_change_the_learning_may_differ(config):
    begin(config)
    open_run(dataclasses.replace(config, total_steps=9, save_every=1, keep_checkpoints=1, tracker="wandb"))


def test_resume_never_starts_over_and_drops_the_older_run(config):
    begin(config)
    save(config.output, 2)
    folder = Path(config.output)
    for name in (*LINES, TRACKED):
        (folder / name).write_text("{}\n")
    for name in ("best", "final"):
        write_folder(folder / name, write_weights)
    start = begin(config, resume="never", learning_rate=0.5)
    assert start == Start(folder, None, is_finished=False)
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["config.yaml", "environment.json", "run.lock"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["learning_rate"] == 0.5


def test_resume_from_an_older_checkpoint_drops_the_later_ones(config):
    begin(config)
    first, second, third = (save(config.output, step) for step in (1, 2, 3))
    for name in ("metrics.jsonl", TRACKED):
        (Path(config.output) / name).write_text("{}\n")
    start = begin(config, resume=str(second))
    assert not (Path(config.output) / TRACKED).exists()
    assert start.checkpoint == second
    # The third belongs to a future that now will not be; a kill before the next save must not bring it back.
    assert list_checkpoints(Path(config.output)) == [first, second]
    assert open_run(config).checkpoint == second
    assert (Path(config.output) / "metrics.jsonl").read_text() == "{}\n"


def test_a_run_that_goes_on_keeps_its_name_at_trackers_and_one_that_goes_back_does_not(config):
    begin(config)
    checkpoint, tracked = save(config.output, 1), Path(config.output) / TRACKED
    tracked.write_text("1f")
    write_run(open_run(config), config)
    assert tracked.read_text() == "1f"
    write_run(Start(Path(config.output), checkpoint, is_rollback=True), config)
    assert not tracked.exists()
    tracked.write_text("2f")
    write_run(Start(Path(config.output), None), config)  # it was stopped before its first checkpoint
    assert not tracked.exists()


def test_resume_from_another_folder_drops_what_stood_in_this_one(config, tmp_path):
    elsewhere = save(tmp_path / "other", 1)
    begin(config)
    save(config.output, 3)
    (Path(config.output) / "metrics.jsonl").write_text("{}\n")
    start = begin(config, resume=str(elsewhere))
    assert start == Start(Path(config.output), elsewhere, is_finished=False)
    assert list_checkpoints(Path(config.output)) == []
    assert not (Path(config.output) / "metrics.jsonl").exists()
    assert elsewhere.is_dir()


@pytest.mark.parametrize("of", ["run", "other"])
def test_resume_from_a_checkpoint_of_another_configuration_is_refused_with_the_difference(
    config, tmp_path, of
):
    checkpoint = save(tmp_path / of, 2, seed=7)
    asked = dataclasses.replace(config, resume=str(checkpoint), options={"high": 9}, learning_rate=0.2)
    with pytest.raises(ValueError, match="was trained with another configuration") as caught:
        open_run(asked)
    told = str(caught.value)
    assert "(options: {} -> {'high': 9}; seed: 7 -> 0)" in told
    assert f"--model {checkpoint}" in told
    assert "--output" in told


def test_a_long_difference_is_cut(config, tmp_path, monkeypatch):
    monkeypatch.setattr(runs.folder, "MOST_CHANGES", 1)
    checkpoint = save(tmp_path / "run", 2, seed=7, lora_rank=4, options={"a": 1})
    with pytest.raises(ValueError, match=r"\(lora_rank: 4 -> 0; and 2 more\)"):
        open_run(dataclasses.replace(config, resume=str(checkpoint)))


def test_resume_from_a_checkpoint_takes_the_changes_that_a_run_is_told_to_make_and_tells_them(config):
    checkpoint = save(config.output, 2, save_every=1, tracker="wandb")
    start = open_run(dataclasses.replace(config, resume=str(checkpoint), learning_rate=0.05, total_steps=9))
    assert start.changes == ("learning_rate: 0.1 -> 0.05",)
    assert start.checkpoint == checkpoint


def test_resume_from_what_is_no_checkpoint_is_refused(config, tmp_path):
    checkpoint = save(config.output, 1)
    (checkpoint / "model.safetensors").write_bytes(b"other")
    write_folder(tmp_path / "best", write_weights)
    for path, why in (
        (checkpoint, "model.safetensors is not what was written"),
        (tmp_path / "nowhere", "no readable manifest"),
        (tmp_path / "best", "holds a model but no trainer_state"),
    ):
        with pytest.raises(FileNotFoundError, match=f"resume: .* is no whole checkpoint .*{why}"):
            open_run(dataclasses.replace(config, resume=str(path)))


# ------------------------------------------------------------------------------------------------------------
# The environment


def test_the_environment_is_json_with_versions_and_device(config):
    begin(config)
    found = json.loads((Path(config.output) / "environment.json").read_text())
    assert found["packages"]["torch"] == torch.__version__
    assert {"python", "platform", "device", "threads", "commit", "command"} <= found.keys()


def test_a_machine_without_git_or_a_commit_has_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(runs.folder, "__file__", str(tmp_path / "folder.py"))
    assert environment()["commit"] is None
    runs.folder.subprocess.run(["git", "init", "-q", tmp_path], check=True)
    assert environment()["commit"] is None
    monkeypatch.setenv("PATH", "")
    assert environment()["commit"] is None


# ------------------------------------------------------------------------------------------------------------
# A run while it trains


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
