"""Signs that a run learns nothing, or the wrong thing: each told once, with the evidence and what to change.

It reads the metrics that are written anyway, means over a window of steps. It only tells; where a run has run
away (`RUNAWAY`), the run itself goes back.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

FINDINGS = "watchdog"  # the key of findings in a line of metrics.jsonl
WINDOW = 10  # steps
# What a run does not come back from by itself: entropy, KL or length have run away.
RUNAWAY = ("noise", "kl_explosion", "runaway_length")
# Weights of a model this large were trained before: rates that suit fresh ones break them.
PRETRAINED_PARAMETERS = 50_000_000


@dataclass(frozen=True)
class Finding:
    """What is wrong.

    Attributes:
        cause: a short name.
        text: the evidence, and what to do.
    """

    cause: str
    text: str


class Watchdog:
    """Looks at every step and evaluation of a run."""

    def __init__(self, config: Any, window: int = WINDOW, span: str = f"{WINDOW} steps") -> None:
        """Begin with nothing seen.

        Args:
            config: of a training script; a field that it lacks is not looked at.
            window: steps whose means are looked at.
            span: the window in words.
        """
        self.config, self.window, self.span = config, window, span
        self.rows: deque[Mapping[str, float]] = deque(maxlen=window)
        self.first: dict[str, float] | None = None  # means of the first window
        self.best_format = 0.0
        # Of the best evaluation: accuracy, its lower bound, the reward then.
        self.best: tuple[float, float, float | None] | None = None
        self.told: set[str] = set()

    def start(self, trained_parameters: int) -> list[Finding]:
        """Look at the configuration beside the size of what is trained."""
        config, rate = self.config, self.config.learning_rate
        if config.lora_rank and rate < 2e-6:
            return self._tell("learning_rate", f"adapters hardly move at {rate:g}; --learning_rate 1e-5")
        if not config.lora_rank and trained_parameters > PRETRAINED_PARAMETERS and rate > 5e-5:
            text = f"{rate:g} for {trained_parameters / 1e6:.0f} M pretrained weights undoes their training"
            return self._tell("learning_rate", text + "; --learning_rate 1e-6, or --lora_rank 16")
        return []

    def replay(self, steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> None:
        """Take up what a run has told before it was stopped: nothing is told twice."""
        rows = sorted([*steps, *evaluations], key=lambda row: row["step"])  # an evaluation after its step
        for row in rows:
            if "accuracy_strict" in row:
                self.evaluation(row)
            else:
                self.step(row)
        self.told = {finding["cause"] for row in rows for finding in row.get(FINDINGS, ())}

    def step(self, metrics: Mapping[str, float]) -> list[Finding]:
        """Look at a step; what was not found before is returned."""
        self.rows.append(metrics)
        if len(self.rows) < self.window:
            return []
        if self.first is None:
            self.first = {name: self.mean(name) for name in metrics if self.mean(name) is not None}
        found = [finding for cause, look in CHECKS.items() for finding in self._tell(cause, look(self))]
        for cause, (name, ceiling, text) in CEILINGS.items():
            value = self.mean(name)
            if value is not None and value >= ceiling:
                found += self._tell(cause, text.format(value=value, span=self.span, config=self.config))
        self.best_format = max(self.best_format, self.mean("train/format_rate") or 0.0)
        return found

    def evaluation(self, figures: Mapping[str, Any]) -> list[Finding]:
        """Look at an evaluation on held-out problems."""
        accuracy, (low, high) = figures["accuracy_strict"], figures["ci95"]
        reward = self.mean("train/reward")
        if self.best is None or accuracy > self.best[0]:
            self.best = (accuracy, low, reward)
            return []
        best, best_low, best_reward = self.best
        if best_reward is None and self.first is not None:
            best_reward = self.first.get("train/reward")
        if reward is None or best_reward is None or high >= best_low or reward <= best_reward:
            return []
        return self._tell(
            "reward_hacking",
            f"rewards rose from {best_reward:.3f} to {reward:.3f} while held-out accuracy fell from "
            f"{best:.1%} to {accuracy:.1%}: the scorer is being fooled. Read the best-paid completions in "
            "rollouts.jsonl, and weigh down whatever of --rewards pays for them; best/ has the model of then",
        )

    def _tell(self, cause: str, text: str | None) -> list[Finding]:
        if text is None or cause in self.told:
            return []
        self.told.add(cause)
        return [Finding(cause, text)]

    def mean(self, name: str) -> float | None:
        """Over the window, None where a step of it has no such metric."""
        values = [row[name] for row in self.rows if name in row]
        return fmean(values) if len(values) == self.window else None


# ------------------------------------------------------------------------------------------------------------
# What is looked for


# A mean that should stay below a bound: the metric, the bound, the evidence and the remedy.
CEILINGS: dict[str, tuple[str, float, str]] = {
    "kl_explosion": (
        "policy/kl",
        1.0,
        "the KL to the model that the run began with is {value:.1f} nats a token: little of it is left. A "
        "larger --kl_coef, --kl_target 0.1, or a smaller --learning_rate",
    ),
    "large_updates": (
        "policy/approx_kl",
        0.1,
        "updates move the policy by {value:.2f} nats a token from what was sampled: a smaller "
        "--learning_rate, or fewer --updates_per_rollout and --epochs_per_rollout",
    ),
}


def _no_signal(dog: Watchdog) -> str | None:
    share = dog.mean("rollout/zero_variance_groups")
    if share is None or share < 0.95:
        return None
    seen = f"in {share:.0%} of the groups of {dog.span} all rewards were equal, and taught nothing"
    right = dog.mean("rewards/correct")
    if right is not None and right > 0.9:
        return f"{seen}: the problems are solved. Stop here, or give harder ones"
    if right is not None and right < 0.1:
        return (
            f"{seen}: hardly an answer is right. Begin with a cold start (train_sft.py), give easier "
            "problems or a larger --group_size, and read rollouts.jsonl: does the answer stand where it is "
            "looked for?"
        )
    return f"{seen}. Do the --rewards tell completions apart? --algo dapo replaces such groups"


def _grew_too_long(dog: Watchdog) -> bool:
    first = (dog.first or {}).get("rollout/truncated_fraction", 1.0)
    return first < 0.5


def _truncated(dog: Watchdog) -> str | None:
    share = dog.mean("rollout/truncated_fraction")
    if share is None or share < 0.9 or _grew_too_long(dog):
        return None
    return (
        f"{share:.0%} of the completions of {dog.span} ran into --max_completion_tokens "
        f"{dog.config.max_completion_tokens}: give more, or the model never ends its turn; --overlong soft, "
        "or a cold start that shows it the end"
    )


def _runaway_length(dog: Watchdog) -> str | None:
    share = dog.mean("rollout/truncated_fraction")
    if share is None or share < 0.9 or not _grew_too_long(dog):
        return None
    return (
        f"completions grew until {share:.0%} of them ran into --max_completion_tokens: a smaller "
        "--learning_rate, --overlong soft, or a reward that does not pay for length"
    )


def _format_lost(dog: Watchdog) -> str | None:
    share = dog.mean("train/format_rate")
    if share is None or dog.best_format < 0.5 or share > dog.best_format / 2:
        return None
    return (
        f"well-formed completions fell from {dog.best_format:.0%} to {share:.0%}: weigh format higher in "
        "--rewards, or give a smaller --learning_rate"
    )


def _duplicates(dog: Watchdog) -> str | None:
    share, right = dog.mean("rollout/duplicate_fraction"), dog.mean("rewards/correct")
    if share is None or right is None or share < 0.8 or right > 0.5:
        return None
    return (
        f"{share:.0%} of the completions repeat another of their group word by word, and few are right: "
        "nothing new is tried. --temperature 1, --entropy_coef 0.001, or an earlier checkpoint"
    )


def _entropy_collapse(dog: Watchdog) -> str | None:
    entropy, first = dog.mean("policy/entropy"), (dog.first or {}).get("policy/entropy")
    right = dog.mean("rewards/correct")
    if entropy is None or first is None or right is None:
        return None
    if entropy > 0.1 * first or right > 0.8:
        return None
    return (
        f"entropy fell from {first:.3f} to {entropy:.4f} nats a token at {right:.0%} right answers: nothing "
        "else is tried. From an earlier checkpoint --entropy_coef 0.001, or a smaller --learning_rate"
    )


def _noise(dog: Watchdog) -> str | None:
    entropy, first = dog.mean("policy/entropy"), (dog.first or {}).get("policy/entropy")
    reward, first_reward = dog.mean("train/reward"), (dog.first or {}).get("train/reward")
    if None in (entropy, first, reward, first_reward):
        return None
    if entropy < max(1.0, 2 * first) or reward > first_reward:
        return None
    return (
        f"entropy rose from {first:.2f} to {entropy:.2f} nats a token while the reward fell to {reward:.3f}: "
        "the policy is turning to noise. A smaller --learning_rate, from an earlier checkpoint"
    )


def _mismatch(dog: Watchdog) -> str | None:
    gap = dog.mean("rollout/sampler_mismatch_kl")
    if gap is None or gap < 0.01:
        return None
    config = dog.config
    has_moved = config.updates_per_rollout * config.epochs_per_rollout > 1 or config.replay_groups
    if has_moved or config.lora_dropout:  # then the difference is not the sampler's
        return None
    return (
        f"sampler and trainer differ by {gap:.3f} nats a token, as if two models were at work. Samples are "
        "weighed for it, but it should be a hundredth of that. With --engine vllm, is the server's model the "
        "one that is trained? Else please report it with environment.json"
    )


# Each returns the evidence and the remedy, None where all is well.
CHECKS: dict[str, Callable[[Watchdog], str | None]] = {
    "no_signal": _no_signal,
    "truncated": _truncated,
    "runaway_length": _runaway_length,
    "format_lost": _format_lost,
    "duplicates": _duplicates,
    "entropy_collapse": _entropy_collapse,
    "noise": _noise,
    "mismatch": _mismatch,
}
