"""Faults planted in whole runs: what is not finite, what runs away, full disks, what teaches nothing."""

import contextlib
import json
import re
import resource
import shutil
import signal
import subprocess

import pytest
import torch
from accelerate import Accelerator
from quick import lines, quick_grpo, quick_sft, same, weights
from test_watchdog import HEALTHY

import optimizers as optimizers_module
import runs.folder
from runs.checkpoint import find_damage, list_checkpoints
from runs.config import RunStopped, UserError
from runs.metrics import RunLog
from train_grpo import main as train_grpo
from train_sft import main as train_sft


def poison(patch, train, steps):
    """Make the gradient of one weight NaN in the updates of these steps, counted from 0."""
    done = []
    take_step = optimizers_module.take_step

    def poisoned(accelerator, policy, *rest):
        if len(done) in steps:
            next(p for p in policy.parameters() if p.grad is not None).grad.view(-1)[0] = float("nan")
        done.append(1)
        return take_step(accelerator, policy, *rest)

    patch.setattr("updates.take_step" if train is train_grpo else "train_sft.take_step", poisoned)


@pytest.mark.slow
@pytest.mark.parametrize(("train", "quick"), [(train_grpo, quick_grpo), (train_sft, quick_sft)])
def test_an_update_that_is_not_finite_is_left_out_and_kept_for_inspection(
    train, quick, tmp_path, monkeypatch, capsys
):
    poison(monkeypatch, train, {1})
    config = quick(tmp_path / "run")
    assert train(config) == 0
    assert all(torch.isfinite(weight).all() for weight in weights(tmp_path / "run" / "final").values())
    told = lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["train/bad_updates"] for line in told] == [0, 1] + [0] * (len(told) - 2)
    assert "policy/loss" not in told[1]
    incident = json.loads((tmp_path / "run" / "incidents" / "step-000002.json").read_text())
    assert incident["step"] == 2
    assert "nan" in incident["causes"][0]
    assert len(incident["rows"]) >= 4
    assert "step 2: 1 of 1 updates left out" in capsys.readouterr().out


@pytest.mark.slow
def test_too_many_bad_updates_stop_the_run_with_its_weights_unharmed(tmp_path, monkeypatch):
    poison(monkeypatch, train_grpo, {1, 2, 3})
    config = quick_grpo(tmp_path / "run", total_steps=6, max_bad_updates=3, save_every=1, max_rollbacks=0)
    with pytest.raises(RunStopped, match=r"step 4: 3 updates in a row.*nan.*smaller --learning_rate \(now"):
        train_grpo(config)
    after = weights(tmp_path / "run" / "checkpoints" / "step-000003")
    monkeypatch.undo()
    assert train_grpo(quick_grpo(tmp_path / "healthy", total_steps=1)) == 0
    assert same(after, weights(tmp_path / "healthy" / "final"))


@pytest.mark.slow
@pytest.mark.parametrize(("train", "quick"), [(train_grpo, quick_grpo), (train_sft, quick_sft)])
def test_a_run_that_diverged_goes_back_at_half_the_rate_and_in_the_end_stops(
    train, quick, tmp_path, monkeypatch, capsys
):
    changes = {"total_steps": 6, "max_bad_updates": 2, "eval_every": 0, "warmup_steps": 0, "save_every": 3}
    changes |= {"lr_schedule": "constant", "max_rollbacks": 2}
    # Updates 5 and 6 are of steps 5 and 6, then of 4 and 5 after the first way back.
    with monkeypatch.context() as patch:
        poison(patch, train, {4, 5, 7, 8})
        assert train(quick(tmp_path / "run", **changes)) == 0
    told = lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in told] == [1, 2, 3, 4, 5, 6]
    rate = told[0]["policy/learning_rate"]
    assert [line["policy/learning_rate"] / rate for line in told] == [1, 1, 1, 0.25, 0.25, 0.25]
    assert all(torch.isfinite(weight).all() for weight in weights(tmp_path / "run" / "final").values())
    kept = json.loads((tmp_path / "run" / "incidents" / "rollback-1.json").read_text())
    assert kept["step"] == 6
    assert kept["to"].endswith("step-000003")
    assert "going back to" in capsys.readouterr().out
    # Bad from the first step on, there is no checkpoint to go back to, and no end but one.
    poison(monkeypatch, train, range(100))
    with pytest.raises(
        RunStopped, match="2 updates in a row.*again, after going back to a checkpoint 2 times"
    ):
        train(quick(tmp_path / "bad", **changes))
    kept = json.loads((tmp_path / "bad" / "incidents" / "rollback-2.json").read_text())
    assert kept["to"] == "None"


@pytest.mark.slow
def test_a_run_that_runs_away_goes_back_to_before_it_did(tmp_path, monkeypatch, capsys):
    noise = [False] * 11 + [True] * 10 + [False] * 40
    tell = runs.folder.Run.tell

    def told(run, metrics):
        if noise.pop(0):
            metrics = metrics | {"policy/entropy": 99.0, "train/reward": -99.0}
        tell(run, metrics)

    monkeypatch.setattr(runs.folder.Run, "tell", told)
    changes = {"total_steps": 22, "eval_every": 0, "save_every": 2, "keep_checkpoints": 9}
    assert train_grpo(quick_grpo(tmp_path, **changes)) == 0
    kept = json.loads((tmp_path / "incidents" / "rollback-1.json").read_text())
    assert "the policy is turning to noise" in kept["cause"]
    assert kept["step"] - 10 - 2 <= int(kept["to"][-6:]) <= kept["step"] - 10
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == list(range(1, 23))


# ------------------------------------------------------------------------------------------------------------
# Disks

DISK = "40m"  # enough for three checkpoints, best/ and final/ of the built-in model


@pytest.fixture
def small_files():
    """No file may grow past a limit, as on a disk that is full; called with None it may again."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, before if size is None else (size, before[1]))

    yield limit
    limit(None)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.slow
@pytest.mark.parametrize(("train", "quick"), [(train_grpo, quick_grpo), (train_sft, quick_sft)])
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    train, quick, tmp_path, monkeypatch, capsys, small_files
):
    assert train(quick(tmp_path / "whole", eval_every=0, save_every=1)) == 0
    checkpoint = runs.folder.Run.checkpoint

    def full_at_2_and_3(run):
        # Enough for the lines of a step, and not for a model.
        small_files(100_000 if run.step in (2, 3) else None)
        checkpoint(run)
        saved = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
        assert saved == {2: ["step-000001"], 3: ["step-000001"]}.get(run.step, saved)
        small_files(None)

    monkeypatch.setattr(runs.folder.Run, "checkpoint", full_at_2_and_3)
    assert train(quick(tmp_path / "run", eval_every=0, save_every=1)) == 0
    told = capsys.readouterr().out
    assert told.count("the checkpoint could not be written") == 2
    assert "step 2: the checkpoint" in told
    assert str(tmp_path / "run" / "checkpoints" / "step-000001") in told
    assert same(weights(tmp_path / "run" / "final"), weights(tmp_path / "whole" / "final"))
    assert find_damage(tmp_path / "run" / "checkpoints" / "step-000004") is None


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own: where it is, and what mounts it again with other options."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(*words):
        return subprocess.run(["mount", *words, place], capture_output=True, text=True, check=False)

    if shutil.which("mount") is None:
        pytest.skip("a disk of its own needs mount")
    told = mount("-t", "tmpfs", "-o", f"size={DISK}", "tmpfs")
    if told.returncode:
        pytest.skip(f"a disk of its own needs the right to mount one ({told.stderr.strip()})")
    yield place, lambda options: mount("-o", f"remount,{options}").check_returncode()
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.slow
def test_a_disk_that_is_full_and_then_read_only_costs_checkpoints_and_not_the_run(
    disk, tmp_path, monkeypatch, capsys
):
    place, remount = disk
    changes = {"eval_every": 0, "save_every": 1, "total_steps": 5}
    assert train_grpo(quick_grpo(tmp_path / "whole", **changes)) == 0
    tell, checkpoint = runs.folder.Run.tell, runs.folder.Run.checkpoint

    def worsen(run, metrics):
        if run.step == 2:  # room for the lines of a step, and not for a model
            with open(place / "filler", "wb") as filler, contextlib.suppress(OSError):
                while shutil.disk_usage(place).free > 300_000:
                    filler.write(bytes(100_000))
                    filler.flush()
        if run.step == 3:
            remount("ro")
        tell(run, metrics)

    def then_mend(run):
        checkpoint(run)
        if run.step in (2, 3):
            saved.append([path.name for path in list_checkpoints(run.folder)])
            told.append(run.tell_saved())
        if run.step == 3:
            remount("rw")
            (place / "filler").unlink()

    saved, told = [], []
    monkeypatch.setattr(runs.folder.Run, "tell", worsen)
    monkeypatch.setattr(runs.folder.Run, "checkpoint", then_mend)
    assert train_grpo(quick_grpo(place / "run", **changes)) == 0
    assert saved == [["step-000001"]] * 2
    assert [words.partition(" are saved")[0] for words in told] == ["1 of 2 steps", "1 of 3 steps"]
    printed = capsys.readouterr().out
    for step, why in ((2, "No space left on device"), (3, "Read-only file system")):
        last = rf"step {step}: the checkpoint could not be written \(.*{why}.*step-000001"
        assert re.search(last, printed)
    assert re.search(r"jsonl could not be written \(.*Read-only file system.*its lines are kept", printed)
    assert [find_damage(folder) for folder in list_checkpoints(place / "run")] == [None, None]
    assert [row["step"] for row in lines(place / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert len(lines(place / "run" / "rollouts.jsonl")) == 5 * 16
    assert same(weights(place / "run" / "final"), weights(tmp_path / "whole" / "final"))


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(disk, monkeypatch):
    place, remount = disk
    remount("ro")
    monkeypatch.setattr("runs.training.load_model", lambda *how, **named: pytest.fail("it was loaded"))
    with pytest.raises(UserError, match=r"output '.*disk/run' cannot be written: .*not yours to write; give"):
        train_grpo(quick_grpo(place / "run"))


@pytest.mark.slow
def test_a_run_that_is_told_to_stop_on_a_read_only_disk_ends_and_says_what_is_not_saved(
    disk, monkeypatch, capsys
):
    place, remount = disk
    tell = runs.folder.Run.tell

    def then_stop(run, metrics):
        tell(run, metrics)
        if run.step == 3:
            remount("ro")
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(runs.folder.Run, "tell", then_stop)
        assert train_sft(quick_sft(place / "run", eval_every=0, save_every=2)) == 143
    printed = capsys.readouterr().out
    assert "stopped: 2 of 3 steps are saved, and the same command goes on from there" in printed
    assert re.search(r"report.html could not be written \(.*Read-only file system", printed)
    remount("rw")
    assert train_sft(quick_sft(place / "run", eval_every=0, save_every=2)) == 0
    assert [row["step"] for row in lines(place / "run" / "metrics.jsonl")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_place_that_cannot_be_written_for_a_while_costs_a_checkpoint_and_not_the_run(
    tmp_path, monkeypatch, capsys
):
    checkpoint = runs.folder.Run.checkpoint

    def blocked_at_2(run):
        place, aside = run.folder / "checkpoints", run.folder / "aside"
        if run.step == 2:
            place.rename(aside)
            place.touch()
        checkpoint(run)
        if run.step == 2:
            place.unlink()
            aside.rename(place)

    monkeypatch.setattr(runs.folder.Run, "checkpoint", blocked_at_2)
    assert train_grpo(quick_grpo(tmp_path, eval_every=0, save_every=1, keep_checkpoints=9)) == 0
    saved = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert saved == ["step-000001", "step-000003", "step-000004"]
    assert "step 2: the checkpoint could not be written" in capsys.readouterr().out


@pytest.mark.slow
def test_a_full_disk_at_the_end_says_so_and_the_same_command_finishes(tmp_path, monkeypatch, small_files):
    finish = runs.folder.Run.finish

    def full(run):
        small_files(100_000)
        return finish(run)

    with monkeypatch.context() as patch:
        patch.setattr(runs.folder.Run, "finish", full)
        with pytest.raises(
            RunStopped,
            match="the final model could not be written.*: 4 steps are saved, and the same command",
        ):
            train_grpo(quick_grpo(tmp_path / "run"))
    small_files(None)
    assert not (tmp_path / "run" / "final").exists()
    assert train_grpo(quick_grpo(tmp_path / "run")) == 0
    assert find_damage(tmp_path / "run" / "final") is None


def test_lines_that_the_disk_would_not_take_are_written_later(tmp_path, small_files, capsys):
    log = RunLog(tmp_path, Accelerator(cpu=True), total_steps=3, first_step=0)
    log.step(1, {"a": 1.0})
    small_files((tmp_path / "metrics.jsonl").stat().st_size + 5)
    log.step(2, {"a": 2.0})
    log.step(3, {"a": 3.0})
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "a": 1.0}]  # whole lines alone
    with pytest.raises(OSError, match="too large"):
        log.flush()
    small_files(None)
    log.flush()
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert capsys.readouterr().out.count("metrics.jsonl could not be written") == 1


@pytest.mark.slow
def test_a_run_tells_all_that_the_watchdog_reads(tmp_path):
    changes = {"total_steps": 1, "eval_every": 0, "kl_coef": 0.1}
    changes |= {"rewards": {"correct": 1.0, "unique_characters": 1.0}}
    assert train_grpo(quick_grpo(tmp_path, **changes)) == 0
    (told,) = lines(tmp_path / "metrics.jsonl")
    assert HEALTHY.keys() <= told.keys()


@pytest.mark.slow
def test_a_run_that_learns_nothing_says_why_once(tmp_path, capsys):
    config = quick_grpo(tmp_path / "run", total_steps=14, rewards={"correct": 1.0}, eval_every=0)
    assert train_grpo(config) == 0  # random weights: no answer, no end
    found = [line["watchdog"] for line in lines(tmp_path / "run" / "metrics.jsonl") if "watchdog" in line]
    assert [[finding["cause"] for finding in step] for step in found] == [["no_signal", "truncated"]]
    printed = capsys.readouterr().out
    assert printed.count("watchdog: no_signal: in 100% of the groups") == 1
    assert "Begin with a cold start" in printed
    assert "no_signal: in 100%" in (tmp_path / "run" / "report.html").read_text()
