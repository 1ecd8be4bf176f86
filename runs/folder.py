"""The folder of a run, and where it goes on from: `config.yaml`,
`environment.json`, JSON lines, checkpoints, `final/`.
"""

import dataclasses
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object

from fused_kernels import kernels_for
from models import save_model
from runs import lock
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
from runs.config import RunStopped, at_the_door, to_yaml
from runs.lines import LINES, cut_lines, line_offsets, write_whole
from runs.metrics import TRACKED, RunLog, start_trackers
from runs.records import EVALUATION, SETTINGS, read_best, read_rows, read_settings
from runs.report import write_report
from runs.signals import StopRequest
from runs.watchdog import RUNAWAY, WINDOW, Watchdog
from sharding import Weights, load_whole_state, whole_state

# Of what a checkpoint holds; another number wherever an older one cannot be gone on from.
FORMAT = 1
# Fields that may differ between a run and its continuation: they change how long or how loudly, not what is
# learned.
HARMLESS = {
    "total_steps",
    "output",
    "resume",
    "tracker",
    "log_level",
    "save_every",
    "keep_checkpoints",
    "eval_every",
    "eval_limit",
    "target_accuracy",
    "patience",
    "micro_batch_tokens",
    "gradient_checkpointing",
    "torch_compile",
    "max_bad_updates",
    "max_rollbacks",
    "trust_remote_code",
    "engine_url",
    "engine_timeout_s",
    "dry_run",
    "price_per_hour",
}
# May differ besides where a checkpoint is named: what a run that went wrong is told to change.
STEERING = {"learning_rate", "critic_learning_rate", "entropy_coef"}
MOST_CHANGES = 8  # in a message


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run begins: afresh (`checkpoint` None), from
    a checkpoint, or not at all because it is finished.
    """

    folder: Path
    checkpoint: Path | None
    is_finished: bool = False
    is_rollback: bool = False  # the run is the one that went wrong, and its incidents are its own
    changes: tuple[str, ...] = ()  # of the configuration, since the checkpoint that was asked for


def open_run(config: Any) -> Start:
    """Decide where a run begins; changes nothing on disk.

    Args:
        config: has `output`, `resume` ("auto", "never", or a checkpoint's folder) and `total_steps`.

    Raises:
        ValueError: the folder cannot be written, is in use, or holds a run of another configuration or
            damaged checkpoints alone; or the checkpoint that `resume` names is of another configuration.
        FileNotFoundError: `resume` names a folder that is no whole checkpoint.
    """
    folder = Path(config.output)
    require_writable(folder, "output")
    # Processes of one run start together: the first asks for all.
    if int(os.environ.get("RANK", "0")) == 0:
        lock.require_free(folder)
    if config.resume == "never":
        return Start(folder, None)
    if config.resume != "auto":
        return _start_from(Path(config.resume), config)
    if not (folder / SETTINGS).is_file():
        return Start(folder, None)
    checkpoint = latest_checkpoint(folder)
    if checkpoint is not None and not (checkpoint / SETTINGS).is_file():
        raise _another_version(checkpoint)
    if not (before := read_settings(folder)):
        otherwise = f"{checkpoint} to go on" if checkpoint else "never to start over there"
        raise ValueError(f"output {str(folder)!r}: its {SETTINGS} cannot be read; give --resume {otherwise}")
    if changes := _changes(before, config, HARMLESS):
        raise ValueError(
            f"output {str(folder)!r} holds a run with another configuration ({_list(changes)}); "
            "give another --output, or --resume never to start over in the same folder"
        )
    is_finished = (folder / "final" / MANIFEST).is_file() and before["total_steps"] >= config.total_steps
    ends = ("target_accuracy", "patience")
    is_finished = is_finished and all(before.get(end) == getattr(config, end) for end in ends)
    if checkpoint is None and list_checkpoints(folder):
        raise ValueError(
            f"output {str(folder)!r}: none of its checkpoints is whole; give --resume never to start over "
            "there, which removes them, or another --output and what is left as --model, such as "
            f"{folder / 'best'}"
        )
    return Start(folder, checkpoint, is_finished)


def _start_from(checkpoint: Path, config: Any) -> Start:
    """Begin at the checkpoint that was asked for, of this run or of another with the same configuration."""
    damage = find_damage(checkpoint)
    if damage is None and not (checkpoint / STATE).is_file():
        damage = f"it holds a model but no {STATE}"
    if damage:
        raise FileNotFoundError(f"resume: {str(checkpoint)!r} is no whole checkpoint ({damage})")
    if not (before := read_settings(checkpoint)):
        raise _another_version(checkpoint)
    if changes := _changes(before, config, HARMLESS | STEERING):
        raise ValueError(
            f"resume: {str(checkpoint)!r} was trained with another configuration ({_list(changes)}); give "
            f"what it was trained with, or begin another run from its weights: --model {checkpoint} with an "
            "--output of its own"
        )
    return Start(Path(config.output), checkpoint, changes=tuple(_changes(before, config, HARMLESS)))


def _another_version(checkpoint: Path) -> ValueError:
    return ValueError(
        f"resume: {str(checkpoint)!r} was written by another version of Ponder; begin another run from its "
        f"weights: --model {checkpoint} and another --output"
    )


def write_run(start: Start, config: Any, model: Any = None) -> None:
    """Make the folder, with the configuration and the environment, and drop what is not of this run: all that
    an older one left if it begins afresh, or from another folder's checkpoint; else what came after the
    checkpoint, which would be taken for this run's when it is next resumed.

    Raises:
        ValueError: the disk is full, or not ours to write; what the checkpoints hold stays.
    """
    try:
        _write_run(start, config, model)
    except OSError as error:
        raise ValueError(
            f"output {str(start.folder)!r} could not be written: {error}; make room, or give another --output"
        ) from error


def _write_run(start: Start, config: Any, model: Any) -> None:
    checkpoints = start.folder / "checkpoints"
    start.folder.mkdir(parents=True, exist_ok=True)
    lock.take(start.folder)
    clear_up(start.folder)
    shutil.rmtree(start.folder / "final", ignore_errors=True)
    if config.resume != "auto" and not start.is_rollback:  # a rate that was asked for is not halved again
        for file in start.folder.glob("incidents/rollback-*.json"):
            file.unlink()
    if config.resume != "auto" or start.is_rollback or start.checkpoint is None:
        # Another run to a tracker, which keeps what it was told.
        (start.folder / TRACKED).unlink(missing_ok=True)
    if start.checkpoint is not None and start.checkpoint.resolve().parent == checkpoints.resolve():
        for later in list_checkpoints(start.folder):
            if later.name > start.checkpoint.name:
                shutil.rmtree(later)
    else:
        shutil.rmtree(checkpoints, ignore_errors=True)
        if not start.is_rollback:
            for name in ("best", "incidents"):
                shutil.rmtree(start.folder / name, ignore_errors=True)
        for name in LINES:
            (start.folder / name).unlink(missing_ok=True)
    write_whole(start.folder / SETTINGS, to_yaml(config))
    write_whole(start.folder / "environment.json", json.dumps(environment(model), indent=1))


def environment(model: Any = None) -> dict[str, Any]:
    """Versions, device, what computes and the commit: what one needs to know to run it again."""
    packages = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "datasets")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in packages},
        "device": _device_name(model),
        "attention": model.config._attn_implementation if hasattr(model, "config") else None,
        "fused_kernels": _has_kernels(model),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "command": sys.argv,
    }


def _has_kernels(model: Any) -> bool | None:
    """Whether fused_kernels.c was compiled and computes for such weights; torch's sums round differently."""
    return kernels_for(next(model.parameters())) is not None if hasattr(model, "parameters") else None


def _device_name(model: Any) -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    processor = platform.processor() or "cpu"
    return f"{processor}, mps" if getattr(model, "device", None) == torch.device("mps", 0) else processor


def _commit() -> str | None:
    """The commit of this code; None outside a repository, before its first commit, or without git."""
    if shutil.which("git") is None:
        return None
    command = ["git", "rev-parse", "--verify", "--quiet", "HEAD"]
    told = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return told.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def require_writable(folder: Path, field: str) -> None:
    """Refuse a folder that could not be made: it would be noticed only after the model is loaded."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(
            f"{field} {str(folder)!r} cannot be written: {there} is no folder, or not yours to write; "
            f"give another --{field}"
        )


def _changes(before: dict[str, Any], config: Any, but: set[str]) -> list[str]:
    """The fields that differ from those of an earlier run, with what they were and are."""
    now = yaml.safe_load(to_yaml(config))
    keys = sorted((before.keys() | now.keys()) - but)
    return [
        f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in keys if before.get(key) != now.get(key)
    ]


def _list(changes: Sequence[str]) -> str:
    more = len(changes) - MOST_CHANGES
    return "; ".join(changes[:MOST_CHANGES]) + (f"; and {more} more" if more > 0 else "")


class Run:
    """A run while it trains: log, checkpoints, best and final
    model. Every process holds one; the main one writes.

    Attributes:
        step: steps done.
        drawn: problems or examples drawn from the data so far, by all processes.
        best_accuracy: of all evaluations up to here.
        kept: the evaluation of `best/`, which does not go back where the run does; None without one.
        evaluated_step: steps done when it was last evaluated.
        not_better: evaluations since the best one.
        saved_step: steps done at the newest whole checkpoint in its folder; None without one.
        enough: why it ends before its last step; None where it goes on.
        stop: whether it was told to.
        rollbacks: how often it went back to a checkpoint; each halved the learning rate.
        diverged: why it has to go back, None where all is well.
        memory: whatever else the script carries from step to step, in tensors and plain values.
    """

    def __init__(
        self,
        start: Start,
        config: Any,
        accelerator: Accelerator,
        weights: Weights,
        tokenizer: Any,
        optimizer: Any,
        scheduler: Any,
    ) -> None:
        """Write the folder's first files, open the log, and go on where `start` says.

        Args:
            start: from `open_run`; the model was loaded from its checkpoint, everything else is restored
                here.
            config: the resolved configuration.
            accelerator: its trackers are started here.
            weights: of the policy.
            tokenizer: saved beside the weights.
            optimizer: as prepared.
            scheduler: of the learning rate.
        """
        self.folder, self.config, self.accelerator = start.folder, config, accelerator
        self.weights, self.tokenizer = weights, tokenizer
        self.optimizer, self.scheduler = optimizer, scheduler
        self.step, self.drawn, self.best_accuracy, self.evaluated_step = 0, 0, -1.0, None
        self.not_better, self.last_accuracy, self.enough = 0, None, None
        self.origin, self.saved_step = start.checkpoint, None
        self.memory: dict[str, Any] = {}
        self.stop = StopRequest()
        self.bad_in_a_row = 0
        self.diverged: str | None = None
        state = load_state(start.checkpoint) if start.checkpoint is not None else None
        with at_the_door():
            if state is not None and state.get("format") != FORMAT:
                raise _another_version(start.checkpoint)
            if accelerator.is_main_process:
                write_run(start, config, weights.policy.model)
        accelerator.wait_for_everyone()
        self.rollbacks = len(list(self.folder.glob("incidents/rollback-*.json")))
        rates = [rate / 2**self.rollbacks for rate in scheduler.base_lrs]
        if state is not None:
            self._restore(state)
            if start.checkpoint.resolve().parent == (self.folder / "checkpoints").resolve():
                self.saved_step = self.step
            if start.is_rollback:
                self.bad_in_a_row = 0  # at half the rate all is open
        self._set_rates(rates)
        accelerator.wait_for_everyone()
        start_trackers(accelerator, self.folder, config, self.step, self.rollbacks)
        self.log = RunLog(self.folder, accelerator, config.total_steps, self.step, config.log_level)
        self.watchdog = Watchdog(config)
        self.kept = gather_object([read_best(self.folder)])[0]
        told = (read_rows(self.folder / name)[0] for name in ("metrics.jsonl", "eval.jsonl"))
        self.watchdog.replay(*told)
        self.found = self.watchdog.start(weights.trained)
        self.log.found(self.found)  # and kept with the next step
        if start.checkpoint is not None:
            changed = f" with {_list(start.changes)}" if start.changes else ""
            self.log.console.say(f"going on from {start.checkpoint}{changed}")

    def seed_dropout(self, update: int = 0) -> None:
        """Begin the random numbers of a step's update: they belong to (seed, step, update, process), so that
        a resumed run draws what the whole one does. Everything else has keys of its own.
        """
        key = (self.config.seed, self.step, update, self.accelerator.process_index)
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))

    def check_updates(self, causes: list[str | None], rows: list[dict[str, Any]]) -> None:
        """Keep what a step learned from where an update of it was not finite and left out; after
        `max_bad_updates` in a row the run has diverged.

        Args:
            causes: of each update of the step just done, None for a good one; the same on every process.
            rows: prompts and completions of the step.
        """
        for cause in causes:
            self.bad_in_a_row = self.bad_in_a_row + 1 if cause else 0
        bad = [cause for cause in causes if cause]
        if not bad:
            return
        file = self._keep_incident(f"step-{self.step:06d}", {"causes": causes, "rows": rows})
        self.log.console.warn(
            f"step {self.step}: {len(bad)} of {len(causes)} updates left out ({bad[0]}); see {file}"
        )
        if self.bad_in_a_row >= self.config.max_bad_updates:
            self.diverged = f"{self.bad_in_a_row} updates in a row were not finite ({bad[-1]})"

    def roll_back(self) -> Start:
        """Where a run that diverged begins again, at half the learning rate.

        Raises:
            RunStopped: it has gone back `max_rollbacks` times already.
        """
        incidents, most = self.folder / "incidents", self.config.max_rollbacks
        # What runs away has done so for a window of steps; bad updates have changed nothing.
        since = self.step - (0 if self.bad_in_a_row >= self.config.max_bad_updates else WINDOW)
        checkpoint = latest_checkpoint(self.folder, self.log.console.warn, until=since) or self.origin
        if self.rollbacks >= most:
            self.log.close()
            again = f" again, after going back to a checkpoint {most} times" if most else ""
            raise RunStopped(
                f"step {self.step}: {self.diverged}{again}; see {incidents}. Give a smaller --learning_rate "
                f"(now {self.config.learning_rate / 2**self.rollbacks:g}) with "
                f"--resume {checkpoint or 'never'}"
            )
        told = {"cause": self.diverged, "to": str(checkpoint)}
        self._keep_incident(f"rollback-{self.rollbacks + 1}", told)
        best = ""
        if self.kept:
            figures = f"{self.kept['accuracy_strict']:.1%} after step {self.kept['step']}"
            best = f"; best/ keeps its model ({figures}) until there is a better one"
        self.log.console.warn(
            f"step {self.step}: {self.diverged}; going back to {checkpoint or 'the beginning'} at half the "
            f"learning rate{best}"
        )
        self.log.console.bar.close()
        self.log.end_trackers()
        self.accelerator.wait_for_everyone()
        return Start(self.folder, checkpoint, is_rollback=True)

    def _keep_incident(self, name: str, told: dict[str, Any]) -> Path:
        file = self.folder / "incidents" / f"{name}.json"
        if self.accelerator.is_main_process:
            try:
                file.parent.mkdir(exist_ok=True)
                file.write_text(json.dumps({"step": self.step, **told}, ensure_ascii=False))
            except OSError as error:
                self.log.console.warn(f"{file} could not be written ({error})")
        return file

    def checkpoint(self) -> None:
        """Save what a resume after `self.step` steps needs. Where the disk will not take it, the run goes on,
        its last checkpoint stays, and the next time it is tried again.
        """
        state = {
            "format": FORMAT,
            "step": self.step,
            "drawn": self.drawn,
            "best_accuracy": self.best_accuracy,
            "evaluated_step": self.evaluated_step,
            "not_better": self.not_better,
            "last_accuracy": self.last_accuracy,
            "bad_in_a_row": self.bad_in_a_row,
            "memory": self.memory,
            "threads": torch.get_num_threads(),
            "optimizer": whole_state(self.optimizer, self.accelerator.is_main_process),
            "scheduler": self.scheduler.state_dict(),
        }
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        folder = self.folder / "checkpoints" / f"step-{self.step:06d}"

        def write(save: Callable[[Path], None]) -> None:
            self.log.flush()
            state["lines"] = line_offsets(self.folder)

            def save_all(temporary: Path) -> None:
                save(temporary)
                (temporary / SETTINGS).write_text(to_yaml(self.config))

            save_checkpoint(folder, save_all, state, self.config.keep_checkpoints)

        if error := self._write(write):
            last = latest_checkpoint(self.folder) or "none"
            self.log.console.warn(
                f"step {self.step}: the checkpoint could not be written ({error}); the last good one is "
                f"{last}. Free some space; the next one is tried as usual"
            )
        else:
            self.saved_step = self.step

    def tell_saved(self) -> str:
        """How much of the run is on disk, and how to go on from there."""
        if self.saved_step is None:
            return f"none of {self.step} steps is saved, and the same command begins again"
        # What was asked for would start over, or go back.
        how = "" if self.config.resume == "auto" else " with --resume auto"
        if self.saved_step == self.step:
            return f"{self.step} steps are saved, and the same command{how} goes on"
        return (
            f"{self.saved_step} of {self.step} steps are saved, and the same command{how} goes on from there"
        )

    def _command(self) -> str:
        """What goes on with the run, as it was typed; a launcher's own flags are not known here."""
        launcher = "python" if self.accelerator.num_processes == 1 else "accelerate launch …"
        how = [] if self.config.resume == "auto" else ["--resume", "auto"]
        return f"{launcher} {shlex.join([*sys.argv, *how])}"

    def tell(self, metrics: dict[str, float]) -> None:
        """Record the metrics of the step just done, and what the watchdog finds in them."""
        found = self.watchdog.step(metrics)
        self.log.step(self.step, metrics, self.found + found)
        self.log.found(found)
        self.found = []
        self.diverged = next((finding.text for finding in found if finding.cause in RUNAWAY), None)

    def evaluated(self, name: str, figures: dict[str, Any], canaries: Sequence[dict[str, Any]] = ()) -> None:
        """Record an evaluation, and keep the model as `best/` if that has none as good.

        Args:
            name: of what was evaluated on.
            figures: of `exam.summarise`.
            canaries: answers to problems that stay the same all through the run.
        """
        self.evaluated_step = self.step
        self.log.canaries(self.step, list(canaries))
        found = self.watchdog.evaluation(figures)
        self.log.evaluation(self.step, name, figures, found)
        self.log.found(found)
        accuracy = figures["accuracy_strict"]
        self.not_better = 0 if accuracy > self.best_accuracy else self.not_better + 1
        self.best_accuracy = max(self.best_accuracy, accuracy)
        self.last_accuracy, self.enough = accuracy, self._why_enough(accuracy)
        if self.kept is None or accuracy > self.kept["accuracy_strict"]:
            self._keep_best({"step": self.step, "set": name, **figures})

    def _keep_best(self, evaluation: dict[str, Any]) -> None:
        def write(save: Callable[[Path], None]) -> None:
            def save_all(temporary: Path) -> None:
                save(temporary)
                (temporary / EVALUATION).write_text(json.dumps(evaluation))

            write_folder(self.folder / "best", save_all)

        # Where the disk is full, the next evaluation as good may try again.
        if error := self._write(write):
            self.log.console.warn(
                f"step {self.step}: best/ could not be written ({error}), and stays as it was"
            )
        else:
            self.kept = evaluation

    def _why_enough(self, accuracy: float) -> str | None:
        target, patience = self.config.target_accuracy, self.config.patience
        if target is not None and accuracy >= target:
            return f"an accuracy of {accuracy:.1%} reaches --target_accuracy {target:g}"
        if patience and self.not_better >= patience:
            return f"{self.not_better} evaluations in a row were no better than {self.best_accuracy:.1%}"
        return None

    def finish(self) -> int:
        """Leave something usable: the final model, or where
        a stopped run goes on from. Returns the exit code.
        """
        stop = self.stop
        if stop.agreed:
            told = f"stopped: {self.tell_saved()}"
            if self.saved_step is not None:
                told += f". A model to use: {self.folder / 'checkpoints' / f'step-{self.saved_step:06d}'}"
                told += f"\nto go on: {self._command()}"
        else:
            if error := self._write(lambda save: write_folder(self.folder / "final", save)):
                raise RunStopped(
                    f"the final model could not be written ({error}); free some space: {self.tell_saved()}"
                )
            if self.enough:
                self.log.console.say(f"enough after {self.step} steps: {self.enough}")
            told = f"final model: {self.folder / 'final'}"
        self.log.console.say(told, always=True)
        if self.accelerator.is_main_process:
            try:
                self.log.flush()
                write_report(self.folder)
                self.log.console.say(f"learning curve: {self.folder / 'report.html'}")
            except OSError as error:
                self.log.console.warn(f"{self.folder / 'report.html'} could not be written ({error})")
            lock.release(self.folder, os.getpid())
        self.log.close()
        return stop.exit_code if stop.agreed else 0

    def _write(self, write: Callable[[Callable[[Path], None]], None]) -> str | None:
        """Let the main process write; it is given what saves the whole model into a folder. Returns, on every
        process, what the disk said against it.
        """
        error = None
        with self.weights.whole() as model:
            if self.accelerator.is_main_process:
                try:
                    write(lambda folder: save_model(folder, model, self.tokenizer))
                except OSError as problem:
                    error = str(problem)
        return gather_object([error])[0]

    def _restore(self, state: dict[str, Any]) -> None:
        self.step, self.drawn, self.best_accuracy = state["step"], state["drawn"], state["best_accuracy"]
        self.evaluated_step, self.not_better = state["evaluated_step"], state["not_better"]
        self.last_accuracy, self.bad_in_a_row = state["last_accuracy"], state["bad_in_a_row"]
        if self.last_accuracy is not None:
            self.enough = self._why_enough(self.last_accuracy)  # by what is asked for now
        self.memory = state["memory"]
        torch.set_num_threads(state["threads"])  # sums of floats depend on it in their last bits
        load_whole_state(self.optimizer, state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.accelerator.is_main_process:
            cut_lines(self.folder, state["lines"])

    def _set_rates(self, asked: list[float]) -> None:
        """Go on at the configuration's learning rates, where they are not the checkpoint's."""
        scheduler, groups = self.scheduler, self.optimizer.param_groups
        factors = [rate / before for rate, before in zip(asked, scheduler.base_lrs, strict=True)]
        for group, factor in zip(groups, factors, strict=True):
            group["lr"] *= factor
            group["initial_lr"] *= factor
        scheduler.base_lrs = asked
        scheduler._last_lr = [group["lr"] for group in groups]
