"""What a run's folder tells, whole or not."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from runs import lock
from runs.figures import is_reading

SETTINGS = "config.yaml"
EVALUATION = "evaluation.json"  # of best/
ROLLOUT_BYTES = 1 << 20  # read of each end of rollouts.jsonl, which may hold gigabytes


@dataclass(frozen=True)
class Record:
    """A run as its folder tells it; what is missing there is empty here.

    Attributes:
        folder: the run's.
        config: as resolved.
        environment: versions, device, command.
        metrics: a row a step.
        evaluations: a row an evaluation.
        broken: lines of these two that could not be read.
        kept: the evaluation of the model in `best/`; None without one.
    """

    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    broken: int
    kept: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def method(self) -> str:
        """How it learned."""
        return str(self.config.get("algo", "supervised fine-tuning"))

    @property
    def state(self) -> str:
        """running, finished, or stopped."""
        if lock.holder(self.folder) is not None:
            return "running"
        return "finished" if (self.folder / "final").is_dir() else "stopped"

    @property
    def held_out(self) -> list[dict[str, Any]]:
        """The evaluations on the set that was first evaluated on."""
        return [row for row in self.evaluations if row["set"] == self.evaluations[0]["set"]]

    @property
    def best(self) -> tuple[dict[str, Any], str] | None:
        """The best evaluation and when it was; None without any. A run that went back may tell of it no more,
        but `best/` has its model.
        """
        rows, kept = self.held_out, [self.kept] if self.kept else []
        row = max([*rows, *kept], key=lambda row: row["accuracy_strict"], default=None)
        if row is None:
            return None
        when = f"after step {row['step']}" if row["step"] else "before training"
        is_told = any(all(row[key] == told[key] for key in ("step", "accuracy_strict")) for told in rows)
        return row, when if is_told else f"{when}, before it went back"

    @property
    def last_step(self) -> int:
        """The last step of which anything is told."""
        return max([row["step"] for row in [*self.metrics, *self.evaluations]], default=0)

    @property
    def seconds(self) -> float:
        """Spent in steps; evaluation and saving are not counted."""
        seconds = [value for row in self.metrics for key, value in row.items() if key.startswith("time/")]
        return math.fsum(value for value in seconds if is_reading(value))


def find_runs(folder: Path) -> list[Path]:
    """The runs in a folder and in its subfolders, the one that was written last at the end."""
    found = [path.parent for path in folder.rglob("environment.json") if (path.parent / SETTINGS).is_file()]
    return sorted(found, key=lambda run: max(path.stat().st_mtime for path in run.iterdir()))


def read_run(folder: Path) -> Record:
    """Read what a run's folder holds."""
    metrics, broken_metrics = read_rows(folder / "metrics.jsonl")
    evaluations, broken_evaluations = read_rows(folder / "eval.jsonl")
    config, environment = read_settings(folder), _read_json(folder / "environment.json")
    broken = broken_metrics + broken_evaluations
    return Record(folder, config, environment, metrics, evaluations, broken, read_best(folder))


def read_best(folder: Path) -> dict[str, Any] | None:
    """The step and the figures of the model in a run's `best/`; None where there is none."""
    return _read_json(folder / "best" / EVALUATION) or None


def read_settings(folder: Path) -> dict[str, Any]:
    """The configuration in the folder of a run or of a checkpoint; empty where none can be read."""
    try:
        settings = yaml.safe_load((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of a JSONL file, and how many of its lines could not be read (a kill cuts the last one)."""
    if not path.is_file():
        return [], 0
    return _parse_lines(path.read_bytes().splitlines())


def _parse_lines(lines: Iterable[bytes]) -> tuple[list[dict[str, Any]], int]:
    rows, broken = [], 0
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            broken += 1
    return rows, broken


def read_ends(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows from the beginning and from the end of a JSONL file, without reading what lies between."""
    if not path.is_file():
        return [], []
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(ROLLOUT_BYTES)
        file.seek(max(0, size - ROLLOUT_BYTES))
        tail = file.read()
    # The cut goes through a line at the end of the one and at the beginning of the other.
    head_lines = head.split(b"\n")[: -1 if size > ROLLOUT_BYTES else None]
    tail_lines = tail.split(b"\n")[1 if size > ROLLOUT_BYTES else 0 :]
    return _parse_lines(filter(None, head_lines))[0], _parse_lines(filter(None, tail_lines))[0]
