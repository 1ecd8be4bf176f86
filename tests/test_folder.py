"""The folder of a run: where a run begins, what is refused, what is dropped, what goes on."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import runs.folder
from runs.checkpoint import list_checkpoints, save_checkpoint, write_folder
from runs.config import to_yaml
from runs.folder import Start, environment, open_run, write_run
from runs.lines import LINES
from runs.metrics import TRACKED


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
