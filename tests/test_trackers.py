"""Trackers, read back: what they keep are the numbers of metrics.jsonl."""

import json
import os
import sqlite3
import struct
import time
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from models import make_accelerator
from runs.metrics import TABLE, TRACKED, RunLog, start_trackers

STEPS = [
    {"policy/loss": -0.1234567890123, "train/reward": 0.5, "rewards/my.py:f/std": 1e-30},
    {"policy/loss": 3.0e7, "train/reward": 1 / 3, "rewards/my.py:f/std": 0.0},
]
FIGURES = {"accuracy_strict": 0.7, "ci95": [0.2, 0.8], "n": 10, "thought_tokens": 8.5}
ROW = dict.fromkeys(TABLE, "x") | {"step": 1, "correct": None, "reward": 0.25}


@dataclass
class Config:
    tracker: str
    learning_rate: float = 0.1
    rewards: dict | None = None


def track(name, folder):
    """Two steps, an evaluation and a completion, through the tracker; the numbers of the files, by step."""
    folder.mkdir(exist_ok=True)
    accelerator = make_accelerator(name, str(folder))
    start_trackers(accelerator, folder, Config(name, rewards={"correct": 1.0}))
    log = RunLog(folder, accelerator, total_steps=2, first_step=0)
    for step, metrics in enumerate(STEPS, 1):
        log.step(step, metrics)
        log.rollouts([ROW | {"step": step}])
    log.evaluation(2, "validation", FIGURES)
    log.close()
    told = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    told[1]["eval/validation_accuracy"] = FIGURES["accuracy_strict"]
    told[1]["eval/validation_thought_tokens"] = FIGURES["thought_tokens"]
    return {row.pop("step"): row for row in told}


def test_without_a_tracker_nothing_is_asked_for_nor_written(tmp_path):
    assert list(track("none", tmp_path)) == [1, 2]
    assert sorted(os.listdir(tmp_path)) == ["eval.jsonl", "metrics.jsonl", "rollouts.jsonl"]


def test_tensorboard_keeps_the_numbers_in_float32(tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="reading TensorBoard's events back needs tensorboard",
    )
    told = track("tensorboard", tmp_path)
    (events,) = (tmp_path / "ponder").glob("events.*")
    kept = event_accumulator.EventAccumulator(str(events)).Reload()
    seen = {step: {} for step in told}
    for name in kept.Tags()["scalars"]:
        for event in kept.Scalars(name):
            seen[event.step][name] = event.value
    as_float32 = {step: {name: float(np.float32(v)) for name, v in row.items()} for step, row in told.items()}
    assert seen == as_float32


def test_tensorboard_forgets_the_steps_after_the_one_that_a_run_goes_back_to(tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="reading TensorBoard's events back needs tensorboard",
    )
    accelerator = make_accelerator("tensorboard", str(tmp_path))
    for rollbacks, first_step in enumerate((0, 1)):
        start_trackers(accelerator, tmp_path, Config("tensorboard"), first_step, rollbacks)
        log = RunLog(tmp_path, accelerator, total_steps=4, first_step=first_step)
        for step in range(first_step + 1, 4 - rollbacks):
            log.step(step, {"policy/loss": float(10 * rollbacks + step)})
        log.end_trackers()
    kept = event_accumulator.EventAccumulator(str(tmp_path / "ponder")).Reload()
    assert [(event.step, event.value) for event in kept.Scalars("policy/loss")] == [(1, 1.0), (2, 12.0)]


def test_a_run_that_goes_back_is_another_one_for_trackers_that_take_no_step_twice(tmp_path):
    asked = []
    accelerator = SimpleNamespace(
        init_trackers=lambda *project, **how: asked.append(how["init_kwargs"]), is_main_process=True
    )
    (tmp_path / "run").mkdir()
    for rollbacks in (0, 1):
        start_trackers(accelerator, tmp_path / "run", Config("wandb"), 0, rollbacks)
    assert [options["wandb"]["name"] for options in asked] == ["run", "run-back-1"]
    assert [options["trackio"]["name"] for options in asked] == ["run", "run-back-1"]


@pytest.mark.slow
def test_trackio_keeps_the_numbers(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))  # read once, as it is imported
    pytest.importorskip("trackio", reason="reading a Trackio run back needs trackio")
    told = track("trackio", tmp_path / "my-run")
    (file,) = (tmp_path / "store").glob("*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert {name for name, _, _ in rows} == {"my-run"}
    seen = {}
    for _, step, metrics in rows:
        seen.setdefault(step, {}).update(json.loads(metrics))
    assert seen == told
    track("trackio", tmp_path / "my-run")  # goes on
    with sqlite3.connect(file) as database:
        assert len(database.execute("select distinct run_id from metrics").fetchall()) == 1


def wandb_records(data):
    """The whole records of a W&B file: LevelDB's log format, blocks of 32 KiB, behind a head of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    place, record = 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if place > len(data):  # still being written
            return
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(record)
            record = b""


def whole_wandb_file(file):
    """Its records, the last one included: a process of its own writes the file, and may be behind."""
    deadline = time.monotonic() + 60
    while True:
        records = list(wandb_records(file.read_bytes()))
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def offline_wandb(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="reading a W&B run back needs wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    wandb.teardown()  # which would remember the folder


@pytest.mark.slow
def test_wandb_keeps_the_numbers_and_the_samples_offline(tmp_path, offline_wandb):
    folder = tmp_path / "my-run"
    told = track("wandb", folder)
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    seen, tables, settings, names = {}, {}, {}, set()
    records = whole_wandb_file(file)
    for record in records:
        kind = record.WhichOneof("record_type")
        if kind == "run":
            names.add(record.run.display_name)
        elif kind == "config":
            settings |= {item.key: json.loads(item.value_json) for item in record.config.update}
        elif kind == "history":
            items = {tuple(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            step = items["_step",]
            seen[step] = {key[0]: v for key, v in items.items() if len(key) == 1 and key[0][0] != "_"}
            tables[step] = {key[1]: v for key, v in items.items() if key[0] == "rollouts"}
    assert seen == told
    assert names == {"my-run"}
    assert settings == {"tracker": "wandb", "learning_rate": 0.1, "rewards": "{'correct': 1.0}"}
    table = json.loads((file.parent / "files" / tables[1]["path"]).read_text())
    assert table["columns"] == list(TABLE)
    assert table["data"] == [list(ROW.values())]


@pytest.mark.slow
def test_a_run_that_goes_on_is_the_same_run_at_wandb(tmp_path, offline_wandb):
    ids = []
    for begins_afresh in (False, False, True):
        if begins_afresh:
            (tmp_path / "my-run" / TRACKED).unlink()
        known = set((tmp_path / "wandb").glob("offline-run-*"))
        track("wandb", tmp_path / "my-run")
        (new,) = set((tmp_path / "wandb").glob("offline-run-*")) - known
        records = whole_wandb_file(next(new.glob("run-*.wandb")))
        ids += {r.run.run_id for r in records if r.WhichOneof("record_type") == "run"}
        assert (tmp_path / "my-run" / TRACKED).read_text() == ids[-1]
    assert ids[0] == ids[1] != ids[2]
