"""What a person sees of a run: a progress bar with the
time left, aligned lines, warnings; plain text in a pipe.
"""

import os
import sys
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

from tqdm import tqdm

LogLevel = Literal["quiet", "info", "debug"]

UNDECIDED = "rewards/undecided_fraction"

# What a line shows, where the step has it: the metric, its short name, its format, wide enough for lines to
# stand under each other. An undecided share of nothing is not worth its place.
COLUMNS = (
    ("train/reward", "reward", "6.3f"),
    ("train/accuracy", "accuracy", "6.1%"),
    ("policy/loss", "loss", "7.4f"),
    ("policy/entropy", "entropy", "5.3f"),
    ("policy/grad_norm", "grad", "6.2f"),
    ("rollout/completion_tokens", "tokens", "6.1f"),
    ("rollout/zero_variance_groups", "no signal", "4.0%"),
    (UNDECIDED, "undecided", "4.0%"),
    ("rollout/tokens_per_s", "tokens/s", "7,.0f"),
    ("memory/peak_mib", "MiB", "6,.0f"),
)
PATIENCE_S = 10.0  # a step that comes so long after the last line has a line of its own
DIM, BOLD, YELLOW = 2, 1, 33  # of ANSI's terminals


class Console:
    """Talks to the person at the terminal, or to the file behind a pipe; only the main process does."""

    def __init__(
        self, name: str, total_steps: int, first_step: int, is_main: bool = True, level: LogLevel = "info"
    ) -> None:
        """Begin the progress bar.

        Args:
            name: of the run.
            total_steps: of the whole run.
            first_step: steps already done, after a resume.
            is_main: says anything at all.
            level: "quiet" leaves warnings and how it ended, "debug" has a line for every step.
        """
        self.total_steps, self.is_main, self.level = total_steps, is_main, level
        self.every = max(1, total_steps // 20)
        self.has_colours = (
            sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        )
        self.first_step, self.began_at, self.told_at = first_step, time.monotonic(), time.monotonic()
        self.seconds: Counter[str] = Counter()  # of each phase of the steps
        self.bar = tqdm(
            total=total_steps,
            initial=first_step,
            desc=name,
            unit="step",
            dynamic_ncols=True,
            # A pipe gets the aligned lines alone.
            disable=not (is_main and level != "quiet" and sys.stderr.isatty()),
        )

    def is_milestone(self, step: int) -> bool:
        """Is it the first, the last, or the end of a twentieth of the run?"""
        return step == 1 or step % self.every == 0 or step == self.total_steps

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Move the bar, and tell of the step if it is its turn."""
        self.bar.update()
        phases = {key[len("time/") : -len("_s")]: v for key, v in metrics.items() if key.startswith("time/")}
        self.seconds.update(phases)
        now = time.monotonic()
        if not (self.level == "debug" or self.is_milestone(step) or now - self.told_at >= PATIENCE_S):
            return
        self.told_at = now
        shown = _columns(metrics, phases)
        if self.bar.disable:  # which tells it better
            left = (now - self.began_at) / (step - self.first_step) * (self.total_steps - step)
            shown.append(("left", f"{tqdm.format_interval(left):>8}"))
        columns = "  ".join(f"{self._style(name, DIM)} {value}" for name, value in shown)
        self.say(f"{self._at(step)}  {columns}")

    def evaluation(self, step: int, name: str, figures: Mapping[str, Any]) -> None:
        """Tell of an evaluation after `step` steps."""
        low, high = figures["ci95"]
        told = f"{name} accuracy {figures['accuracy_strict']:.1%}"
        interval = f"(95 % interval {low:.1%} to {high:.1%}, n = {figures['n']})"
        self.say(f"{self._at(step)}  {self._style(told, BOLD)} {interval}")

    def warn(self, text: str) -> None:
        """Tell of something that went wrong, whatever the level."""
        self.say(self._style(text, YELLOW), always=True)

    def say(self, text: str, always: bool = False) -> None:
        """Print a line above the progress bar; not at the level "quiet", unless `always`."""
        if self.is_main and (always or self.level != "quiet"):
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        """Tell where the time went, and leave the bar as it stands."""
        shares = ", ".join(f"{name} {share:.0%}" for name, share in _shares(self.seconds).items())
        if shares:
            self.say(f"time in steps {tqdm.format_interval(sum(self.seconds.values()))}: {shares}")
        self.bar.close()

    def _at(self, step: int) -> str:
        return f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}"

    def _style(self, text: str, code: int) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.has_colours else text


def _columns(metrics: Mapping[str, float], phases: Mapping[str, float]) -> list[tuple[str, str]]:
    """What a line tells of a step, with its name; `phases` are its seconds."""
    shown = [
        (name, f"{metrics[key]:{form}}{_remark(key, metrics)}")
        for key, name, form in COLUMNS
        if key in metrics and (metrics[key] or key != UNDECIDED)
    ]
    shown += [("time", f"{sum(phases.values()):6.2f} s")] if phases else []
    return shown + [(name, f"{share:4.0%}") for name, share in _shares(phases).items()]


def _remark(key: str, metrics: Mapping[str, float]) -> str:
    """What a number needs so that nobody is alarmed: a loss of nothing is not a run that learns nothing."""
    on_policy = key == "policy/loss" and "train/reward" in metrics and abs(metrics[key]) < 5e-5
    return " (normal: on-policy)" if on_policy else ""


def _shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """What share of the time each phase took; nothing where there is but one."""
    total = sum(seconds.values())
    return {name: value / total for name, value in seconds.items()} if len(seconds) > 1 and total else {}
