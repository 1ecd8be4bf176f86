"""What a run tells: JSON lines on disk, trackers, one
aligned line a step, a progress bar with the time left.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from runs.watchdog import FINDINGS, Finding

UNDECIDED = "rewards/undecided_fraction"
LINES = ("metrics.jsonl", "rollouts.jsonl", "eval.jsonl", "canaries.jsonl")

# What a console line shows, where the step has it: the metric, its short name, its format, wide enough for
# lines to stand under each other. An undecided share of nothing is not worth its place.
COLUMNS = (
    ("train/reward", "reward", "6.3f"),
    ("train/accuracy", "accuracy", "6.1%"),
    ("policy/loss", "loss", "7.4f"),
    ("policy/entropy", "entropy", "5.3f"),
    ("policy/grad_norm", "grad", "6.2f"),
    ("rollout/completion_tokens", "tokens", "6.1f"),
    ("rollout/zero_variance_groups", "no signal", "4.0%"),
    (UNDECIDED, "undecided", "4.0%"),
    ("time/generate_s", "generate", "6.2f"),
    ("time/score_s", "score", "6.2f"),
    ("time/update_s", "update", "6.2f"),
    ("rollout/tokens_per_s", "tokens/s", "7,.0f"),
    ("memory/peak_mib", "MiB", "6,.0f"),
)

# What trackers that have tables are shown of the completions: a few, of the steps that have a line.
TABLE = ("step", "question", "completion", "gold", "extracted", "correct", "reward", "advantage")
TABLE_ROWS = 16


def start_trackers(accelerator: Accelerator, folder: Path, config: Any) -> None:
    """Begin a tracker's run, named after the folder, with the configuration as numbers and strings."""
    if config.tracker == "none":
        return
    settings = {
        key: value if isinstance(value, int | float | str) else str(value)
        for key, value in asdict(config).items()
    }
    takes_name = {name: {"name": folder.resolve().name} for name in ("wandb", "trackio")}
    accelerator.init_trackers("ponder", config=settings, init_kwargs=takes_name)


class RunLog:
    """Keeps the story of a run; only the main process writes."""

    def __init__(self, folder: Path, accelerator: Accelerator, total_steps: int, first_step: int) -> None:
        """Open the run's log.

        Args:
            folder: the run's folder.
            accelerator: passes metrics on to its trackers.
            total_steps: of the whole run.
            first_step: steps already done, after a resume.
        """
        self.folder = folder
        self.accelerator = accelerator
        self.is_main = accelerator.is_main_process
        self.unwritten: dict[str, list[str]] = {}  # lines that the disk would not take, by file
        self.line_every = max(1, total_steps // 20)
        self.total_steps = total_steps
        self.bar = tqdm(
            total=total_steps,
            initial=first_step,
            desc=folder.name,
            unit="step",
            dynamic_ncols=True,
            # A pipe gets the aligned lines alone.
            disable=not (self.is_main and sys.stderr.isatty()),
        )

    def step(self, step: int, metrics: dict[str, float], findings: Sequence[Finding] = ()) -> None:
        """Record the metrics of a finished step (counted from 1), and what the watchdog found in them."""
        self._append("metrics.jsonl", [{"step": step, **metrics, **_told(findings)}])
        self.accelerator.log(metrics, step=step)
        self.bar.update()
        if self._has_line(step):
            shown = [
                f"{name} {metrics[key]:{form}}{_remark(key, metrics)}"
                for key, name, form in COLUMNS
                if key in metrics and (metrics[key] or key != UNDECIDED)
            ]
            self.say(f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}  " + "  ".join(shown))

    def found(self, findings: Sequence[Finding]) -> None:
        """Print what the watchdog found."""
        for finding in findings:
            self.say(f"watchdog: {finding.cause}: {finding.text}")

    def rollouts(self, rows: list[dict[str, Any]]) -> None:
        """Keep every completion of a step, and show some to trackers that have tables."""
        self._append("rollouts.jsonl", rows)
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_table") and rows and self._has_line(rows[0]["step"]):
                data = [[row[name] for name in TABLE] for row in rows[:TABLE_ROWS]]
                tracker.log_table("rollouts", columns=list(TABLE), data=data, step=rows[0]["step"])

    def evaluation(
        self, step: int, name: str, figures: dict[str, Any], findings: Sequence[Finding] = ()
    ) -> None:
        """Record an evaluation made after `step` steps, and what the watchdog found in it."""
        self._append("eval.jsonl", [{"step": step, "set": name, **figures, **_told(findings)}])
        self.accelerator.log({f"eval/{name}_accuracy": figures["accuracy_strict"]}, step=step)
        low, high = figures["ci95"]
        self.say(
            f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}  {name} accuracy "
            f"{figures['accuracy_strict']:.1%} (95 % interval {low:.1%} to {high:.1%}, n = {figures['n']})"
        )

    def canaries(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Keep how the same problems are answered after `step` steps."""
        self._append("canaries.jsonl", [{"step": step, **row} for row in rows])

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self.is_main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        """Leave the progress bar as it stands and finish the trackers."""
        self.bar.close()
        self.accelerator.end_training()

    def _has_line(self, step: int) -> bool:
        return step == 1 or step % self.line_every == 0 or step == self.total_steps

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        if not self.is_main:
            return
        waiting = self.unwritten.setdefault(name, [])
        waiting += [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        try:
            self.flush()
        except OSError as error:
            if len(waiting) == len(rows):  # at first
                self.say(f"{name} could not be written ({error}); its lines are kept and tried again")

    def flush(self) -> None:
        """Write the lines that the disk would not take before.

        Raises:
            OSError: it still takes none.
        """
        for name, waiting in self.unwritten.items():
            append_whole(self.folder / name, "".join(waiting).encode())
            waiting.clear()


def _remark(key: str, metrics: dict[str, float]) -> str:
    """What a number needs so that nobody is alarmed: a loss of nothing is not a run that learns nothing."""
    on_policy = key == "policy/loss" and "train/reward" in metrics and abs(metrics[key]) < 5e-5
    return " (normal: on-policy)" if on_policy else ""


def _told(findings: Sequence[Finding]) -> dict[str, Any]:
    return {FINDINGS: [asdict(finding) for finding in findings]} if findings else {}


def append_whole(path: Path, data: bytes) -> None:
    """Append all of the data, or nothing where the disk cannot take it.

    Raises:
        OSError: nothing was written.
    """
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "ab") as file:
            file.write(data)
    except OSError:
        if path.exists():
            os.truncate(path, size)
        raise


def line_offsets(folder: Path) -> dict[str, int]:
    """How many bytes each of the run's JSONL files holds, to be kept in a checkpoint."""
    return {name: (folder / name).stat().st_size if (folder / name).exists() else 0 for name in LINES}


def cut_lines(folder: Path, offsets: dict[str, int]) -> None:
    """Cut the run's JSONL files back to the checkpoint's offsets: no step is told twice after a resume."""
    for name in LINES:
        path = folder / name
        if path.exists():
            with open(path, "r+b") as file:
                # Never longer: a file that a power cut left short would be filled up with zero bytes.
                file.truncate(min(offsets.get(name, 0), path.stat().st_size))
