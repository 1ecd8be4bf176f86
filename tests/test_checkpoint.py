"""Checkpoints: whole or not there, damage found, nothing run that was read."""

import json
import os
import pickle
import shutil

import pytest
import torch

import runs.checkpoint
from runs.checkpoint import (
    MANIFEST,
    STATE,
    clear_up,
    find_damage,
    latest_checkpoint,
    list_checkpoints,
    load_state,
    save_checkpoint,
    write_folder,
)


class Crash(BaseException):
    """What a kill looks like from inside: nothing that says `except Exception` catches it."""


def write_model(folder):
    (folder / "model.safetensors").write_bytes(bytes(1000))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text("{}")


def save(run, step, keep=5):
    folder = run / "checkpoints" / f"step-{step:06d}"
    save_checkpoint(folder, write_model, {"step": step, "weights": torch.arange(4.0)}, keep)
    return folder


def ignore(text):
    pass


# ------------------------------------------------------------------------------------------------------------
# Writing


def test_what_is_written_is_whole_and_is_read_back(tmp_path):
    folder = save(tmp_path, 1)
    assert find_damage(folder) is None
    assert json.loads((folder / MANIFEST).read_text()).keys() == {
        "model.safetensors",
        "tokenizer/vocab.json",
        STATE,
    }
    state = load_state(folder)
    assert state["step"] == 1
    assert torch.equal(state["weights"], torch.arange(4.0))
    assert os.listdir(folder.parent) == ["step-000001"]


def test_the_manifest_is_written_last_and_everything_is_flushed_before_the_rename(tmp_path, monkeypatch):
    events = []
    replace, flush = os.replace, runs.checkpoint._flush

    def note_replace(source, target):
        events.append("rename")
        replace(source, target)

    def note_flush(path):
        events.append(path.name)
        flush(path)

    monkeypatch.setattr(os, "replace", note_replace)
    monkeypatch.setattr(runs.checkpoint, "_flush", note_flush)
    write_folder(tmp_path / "best", write_model)
    assert events == [
        "model.safetensors",
        "vocab.json",
        MANIFEST,
        ".best.tmp",
        "rename",
        tmp_path.name,
    ]


def test_only_the_newest_checkpoints_stay(tmp_path):
    for step in (1, 2, 10):
        save(tmp_path, step, keep=2)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step-000002", "step-000010"]


def break_writer(monkeypatch):
    def write(folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise Crash

    monkeypatch.setitem(globals(), "write_model", write)


def break_state(monkeypatch):
    def half_save(state, path):
        path.write_bytes(b"half")
        raise Crash

    monkeypatch.setattr(torch, "save", half_save)


def break_at(owner, name, call=1):
    """Let the `call`-th call of a function crash before it does anything."""

    def breaker(monkeypatch):
        work, calls = getattr(owner, name), []

        def crash(*args, **kwargs):
            calls.append(args)
            if len(calls) == call:
                raise Crash
            return work(*args, **kwargs)

        monkeypatch.setattr(owner, name, crash)

    return breaker


STAGES = {
    "writer": break_writer,
    "state": break_state,
    "checksum": break_at(runs.checkpoint, "_checksum", 2),
    "manifest": break_at(json, "dumps"),
    "flush of the first file": break_at(os, "fsync"),
    "flush of the folder": break_at(os, "fsync", 5),
    "rename": break_at(os, "replace"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_crash_at_any_stage_leaves_the_checkpoint_before_it_and_no_new_one(tmp_path, monkeypatch, stage):
    before = save(tmp_path, 1)
    with monkeypatch.context() as patch:
        STAGES[stage](patch)
        with pytest.raises(Crash):
            save(tmp_path, 2, keep=1)
    assert list_checkpoints(tmp_path) == [before]
    assert latest_checkpoint(tmp_path, pytest.fail) == before
    # What the crash left behind is in nobody's way.
    after = save(tmp_path, 2, keep=1)
    assert latest_checkpoint(tmp_path, pytest.fail) == after
    assert os.listdir(after.parent) == [after.name]


def test_a_crash_after_the_rename_leaves_both(tmp_path, monkeypatch):
    before = save(tmp_path, 1)
    with monkeypatch.context() as patch:
        break_at(os, "fsync", 6)(patch)
        with pytest.raises(Crash):
            save(tmp_path, 2, keep=1)
    assert list_checkpoints(tmp_path) == [before, before.with_name("step-000002")]
    assert [find_damage(folder) for folder in list_checkpoints(tmp_path)] == [None, None]


@pytest.mark.parametrize("stage", STAGES)
def test_a_crash_while_a_folder_is_replaced_leaves_the_old_one_whole(tmp_path, monkeypatch, stage):
    before = save(tmp_path, 1)
    shutil.copytree(before, tmp_path / "copy")
    with monkeypatch.context() as patch:
        STAGES[stage](patch)
        with pytest.raises(Crash):
            save(tmp_path, 1)
    assert find_damage(before) is None
    assert (before / MANIFEST).read_text() == (tmp_path / "copy" / MANIFEST).read_text()


def test_a_crash_between_the_two_renames_loses_neither_the_old_folder_nor_the_new(tmp_path, monkeypatch):
    write_folder(tmp_path / "best", write_model)
    with monkeypatch.context() as patch:
        break_at(os, "replace", 2)(patch)
        with pytest.raises(Crash):
            write_folder(tmp_path / "best", write_model)
    assert sorted(os.listdir(tmp_path)) == [".best.old", ".best.tmp"]
    assert find_damage(tmp_path / ".best.old") is None
    assert find_damage(tmp_path / ".best.tmp") is None
    clear_up(tmp_path)
    assert os.listdir(tmp_path) == ["best"]
    assert find_damage(tmp_path / "best") is None


def test_what_a_kill_left_is_cleared_up(tmp_path):
    whole = save(tmp_path, 2)
    for left in (".best.tmp", "checkpoints/.step-000004.tmp", "checkpoints/.step-000002.old", ".weights-x1"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "model.safetensors").write_bytes(b"half")
    clear_up(tmp_path)
    assert os.listdir(tmp_path) == ["checkpoints"]
    assert os.listdir(tmp_path / "checkpoints") == [whole.name]
    assert find_damage(whole) is None


# ------------------------------------------------------------------------------------------------------------
# Damage


def flip_a_bit(folder):
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[500] ^= 1
    (folder / "model.safetensors").write_bytes(content)


DAMAGES = {
    "flipped bit": (flip_a_bit, "model.safetensors is not what was written"),
    "truncated file": (lambda f: os.truncate(f / STATE, 100), f"{STATE} is not what was written"),
    "missing file": (lambda f: (f / "tokenizer" / "vocab.json").unlink(), "tokenizer/vocab.json is missing"),
    "missing manifest": (lambda f: (f / MANIFEST).unlink(), f"no readable {MANIFEST}"),
    "cut manifest": (lambda f: os.truncate(f / MANIFEST, 30), f"no readable {MANIFEST}"),
    "empty manifest": (lambda f: os.truncate(f / MANIFEST, 0), f"no readable {MANIFEST}"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_told_and_passed_over(tmp_path, damage):
    whole, damaged = save(tmp_path, 1), save(tmp_path, 2)
    do, named = DAMAGES[damage]
    do(damaged)
    assert find_damage(damaged) == named
    told = []
    assert latest_checkpoint(tmp_path, told.append) == whole
    assert told == [f"checkpoint {damaged} is damaged ({named}); trying the one before it"]


def test_a_run_without_a_whole_checkpoint_has_no_latest_one(tmp_path):
    assert latest_checkpoint(tmp_path, pytest.fail) is None
    flip_a_bit(save(tmp_path, 1))
    assert latest_checkpoint(tmp_path, ignore) is None


class Bomb:
    def __reduce__(self):
        return os.system, ("echo boom > boom.txt",)


@pytest.mark.parametrize("write", [torch.save, lambda state, path: path.write_bytes(pickle.dumps(state, 2))])
def test_a_state_that_would_run_code_is_refused(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    folder = save(tmp_path, 1)
    write({"step": 1, "bomb": Bomb()}, folder / STATE)
    with pytest.raises(pickle.UnpicklingError):
        load_state(folder)
    assert not (tmp_path / "boom.txt").exists()
