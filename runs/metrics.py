"""What a run tells: JSON lines on disk, trackers, and the console."""

import json
import secrets
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from runs.console import Console, LogLevel
from runs.lines import append_whole
from runs.watchdog import FINDINGS, Finding

# What trackers that have tables are shown of the completions: a few, of milestones.
TABLE = ("step", "question", "completion", "gold", "extracted", "correct", "reward", "advantage")
TABLE_ROWS = 16
# What trackers are told of an evaluation besides its accuracy.
EMERGING = ("thinking_rate", "thought_tokens", "verification_rate", "self_correction_rate")
TRACKED = "tracked.id"  # of the run as W&B knows it; a run that goes on is the same there, too


def start_trackers(
    accelerator: Accelerator, folder: Path, config: Any, first_step: int = 0, rollbacks: int = 0
) -> None:
    """Begin a tracker's run, named after the folder, with the configuration as numbers and strings; or go on
    with the one that the folder's run began.

    Args:
        accelerator: holds it.
        folder: the run's.
        config: of the run.
        first_step: steps already done; what TensorBoard was told of later ones is forgotten.
        rollbacks: how often the run went back: W&B takes no step twice, and so every time is a run there.
    """
    if config.tracker == "none":
        return
    settings = {
        key: value if isinstance(value, int | float | str) else str(value)
        for key, value in asdict(config).items()
    }
    known: dict[str, dict[str, Any]] = {}
    if accelerator.is_main_process:  # the others' trackers never begin
        name = folder.resolve().name + (f"-back-{rollbacks}" if rollbacks else "")
        file = folder / TRACKED
        goes_on = file.is_file()
        if not goes_on:
            file.write_text(secrets.token_hex(8))
        # W&B knows a run by its id, Trackio by its name.
        again = {"resume": "allow"} if goes_on else {}
        known = {"wandb": {"name": name, "id": file.read_text(), **again}, "trackio": {"name": name, **again}}
        known["tensorboard"] = {"purge_step": first_step + 1 if first_step else 0}
    accelerator.init_trackers("ponder", config=settings, init_kwargs=known)


class RunLog:
    """Keeps the story of a run; only the main process writes."""

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        total_steps: int,
        first_step: int,
        log_level: LogLevel = "info",
    ) -> None:
        """Open the run's log.

        Args:
            folder: the run's folder.
            accelerator: passes metrics on to its trackers.
            total_steps: of the whole run.
            first_step: steps already done, after a resume.
            log_level: of the console.
        """
        self.folder = folder
        self.accelerator = accelerator
        self.is_main = accelerator.is_main_process
        self.unwritten: dict[str, list[str]] = {}  # lines that the disk would not take, by file
        self.console = Console(folder.name, total_steps, first_step, self.is_main, log_level)

    def hush(self) -> None:
        """Tell and keep nothing from here on: of steps that are thrown away."""
        self.is_main = self.console.is_main = self.console.bar.leave = False
        self.console.bar.close()

    def step(self, step: int, metrics: dict[str, float], findings: Sequence[Finding] = ()) -> None:
        """Record the metrics of a finished step (counted from 1), and what the watchdog found in them."""
        self._append("metrics.jsonl", [{"step": step, **metrics, **_told(findings)}])
        self.accelerator.log(metrics, step=step)
        self.console.step(step, metrics)

    def found(self, findings: Sequence[Finding]) -> None:
        """Print what the watchdog found."""
        for finding in findings:
            self.console.warn(f"watchdog: {finding.cause}: {finding.text}")

    def rollouts(self, rows: list[dict[str, Any]]) -> None:
        """Keep every completion of a step, and show some to trackers that have tables."""
        self._append("rollouts.jsonl", rows)
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_table") and rows and self.console.is_milestone(rows[0]["step"]):
                data = [[row[name] for name in TABLE] for row in rows[:TABLE_ROWS]]
                tracker.log_table("rollouts", columns=list(TABLE), data=data, step=rows[0]["step"])

    def evaluation(
        self, step: int, name: str, figures: dict[str, Any], findings: Sequence[Finding] = ()
    ) -> None:
        """Record an evaluation made after `step` steps, and what the watchdog found in it."""
        self._append("eval.jsonl", [{"step": step, "set": name, **figures, **_told(findings)}])
        told = {f"eval/{name}_{key}": figures[key] for key in EMERGING if key in figures}
        self.accelerator.log({f"eval/{name}_accuracy": figures["accuracy_strict"], **told}, step=step)
        self.console.evaluation(step, name, figures)

    def canaries(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Keep how the same problems are answered after `step` steps."""
        self._append("canaries.jsonl", [{"step": step, **row} for row in rows])

    def close(self) -> None:
        """End the console and the trackers."""
        self.console.close()
        self.end_trackers()

    def end_trackers(self) -> None:
        """End the trackers' runs."""
        for tracker in self.accelerator.trackers:  # the processes stay together: another run may follow
            tracker.finish()
        self.accelerator.trackers = []

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        if not self.is_main:
            return
        waiting = self.unwritten.setdefault(name, [])
        waiting += [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        try:
            self.flush()
        except OSError as error:
            if len(waiting) == len(rows):  # at first
                self.console.warn(
                    f"{name} could not be written ({error}); its lines are kept and tried again"
                )

    def flush(self) -> None:
        """Write the lines that the disk would not take before.

        Raises:
            OSError: it still takes none.
        """
        for name, waiting in self.unwritten.items():
            append_whole(self.folder / name, "".join(waiting).encode())
            waiting.clear()


def _told(findings: Sequence[Finding]) -> dict[str, Any]:
    return {FINDINGS: [asdict(finding) for finding in findings]} if findings else {}
