"""The dry run: prompts through the whole path, two steps, and one of the longest sequences, before a run is
begun. All of it is thrown away, in a folder of its own that is gone afterwards.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from accelerate.utils import gather_object

from batches import token_budget
from data import take
from inference import Completion, SamplingParams
from models import compute_dtype
from preflight import check_template, longest, tell
from prompts import THINK_OPEN
from rewards import Scores
from rollouts import Group, count, rollout_metrics, try_roll_out
from runs.config import RunStopped
from runs.folder import Start
from runs.watchdog import Finding, Watchdog

PROMPTS = 16  # that are asked
HOPELESS = ("no_signal", "truncated", "not_finite")  # findings for which a run would learn nothing

TakeStep = Callable[[Any], dict[str, float]]  # a step of a script's training; returns its metrics
Rows = list[tuple[str, str]]  # names and texts to print; a heading has no text


@dataclass(frozen=True)
class Rehearsal:
    """What came of a rehearsal.

    Attributes:
        rows: to print.
        found: what is wrong.
        hopeless: causes for which the run would learn nothing.
    """

    rows: Rows
    found: list[Finding]
    hopeless: list[str]


def dry_run(
    config: Any, start: Start, set_up: Callable[..., Any], rehearse: Callable[[Any], Rehearsal]
) -> int:
    """Rehearse a run; its own folder is not touched.

    Args:
        config: of the script.
        start: where the run would begin.
        set_up: from configuration and start to the script's training.
        rehearse: takes steps of it.

    Returns:
        The exit code: 1 where the run would learn nothing.
    """
    with TemporaryDirectory() as folder:
        training = set_up(replace(config, output=folder, tracker="none"), replace(start, folder=Path(folder)))
        training.run.log.hush()
        told = rehearse(training)
    for name, text in told.rows:
        training.accelerator.print(f"  {name:<18}{text}" if text else name)
    tell(training.accelerator, told.found)
    verdict = f"the run would learn nothing ({', '.join(told.hopeless)})" if told.hopeless else "it can begin"
    training.accelerator.print(f"dry run: {verdict}")
    return 1 if told.hopeless else 0


# ------------------------------------------------------------------------------------------------------------
# What is rehearsed


def rehearse_grpo(training: Any, take_step: TakeStep) -> Rehearsal:
    """Ask some prompts, take two steps, and one of the longest sequences.

    Args:
        training: a `train_grpo.Training`.
        take_step: a step of it.
    """
    config, done = training.config, training.run.step
    with training.scorer:
        groups, asked_s = _timed(ask, training)
        (first, _), (second, step_s) = [_timed(take_step, training) for _ in range(2)]
        memory = _memory(training, take_step(at_the_limit(training)))
    groups = gather_object(groups)
    span = f"{len(groups)} prompts x {config.group_size} samples"
    seen = second | rollout_metrics([count(groups)])
    found = Watchdog(config, window=1, span=span).step(seen) + _not_finite(first, second)
    # From those that ended something can be learned.
    spared = () if seen["rollout/truncated_fraction"] == 1 else ("truncated",)
    hopeless = [f.cause for f in found if f.cause in HOPELESS and f.cause not in spared]
    exam_s = len(training.held_out) * asked_s / (len(groups) * config.group_size)
    rows = [(span, ""), *_answers(groups, seen), *_asking(training, seen), *memory]
    return Rehearsal(rows + _time(config, done, step_s, exam_s), found, hopeless)


def rehearse_sft(training: Any, take_step: TakeStep) -> Rehearsal:
    """Take two steps, and one of the longest examples.

    Args:
        training: a `train_sft.Training`.
        take_step: a step of it.
    """
    config, done = training.config, training.run.step
    (first, _), (second, step_s) = [_timed(take_step, training) for _ in range(2)]
    size = rows_of_two_parts(training) * training.accelerator.num_processes
    by_length = sorted(training.examples, key=lambda e: len(e.prompt_ids) + len(e.completion_ids))
    of_size = replace(config, examples_per_step=size)
    memory = _memory(training, take_step(replace(training, config=of_size, examples=by_length[-size:])))
    found = _not_finite(first, second)
    rows = memory + _time(config, done, step_s)
    return Rehearsal(rows, found, [finding.cause for finding in found])


def ask(training: Any) -> list[Group]:
    """This process' groups of the prompts that are asked.

    Raises:
        RunStopped: a reward broke its promise, or memory ran out.
    """
    run, accelerator = training.run, training.accelerator
    share = math.ceil(PROMPTS / accelerator.num_processes)
    first = accelerator.process_index * share
    drawn = take(training.problems, training.config.seed, run.drawn + first, share)
    actors = (training.engine, training.tokenizer, drawn, training.scorer)
    with run.weights.whole(compute_dtype()), accelerator.autocast():
        groups, broken = try_roll_out(*actors, training.config, run.step, first)
    if broken:
        raise RunStopped(broken)
    return groups


class ToTheLimit:
    """An engine whose completions all run to the limit; see `inference.Engine`."""

    memory = None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        params: SamplingParams,
        seed: Sequence[int],
        first_prompt: int,
        on_completion: Callable[[int, int, Completion], None],
    ) -> None:
        """Repeat the prompt."""
        limit = params.max_completion_tokens
        for number, prompt in enumerate(prompts):
            # Not cut, or --overlong mask would leave nothing to learn from.
            completion = Completion(list(islice(cycle(prompt), limit)), [-1.0] * limit, "stop")
            for sample in range(n):
                on_completion(number, sample, completion)


class OneInTwo:
    """A scorer that finds every other completion right, so that all are learned from."""

    waited_s = 0.0

    def __init__(self) -> None:
        """Nothing is handed in yet."""
        self.sizes: list[int] = []

    def submit(self, completions: list[str], columns: Mapping[str, Any]) -> None:
        """See `rewards.scorer.Scorer`."""
        self.sizes.append(len(completions))

    def results(self) -> list[Scores]:
        """See `rewards.scorer.Scorer`."""
        sizes, self.sizes = self.sizes, []
        verdicts = [[i % 2 == 0 for i in range(size)] for size in sizes]
        return [
            Scores([float(r) for r in right], {}, right, [None] * len(right), [False] * len(right))
            for right in verdicts
        ]


def at_the_limit(training: Any) -> Any:
    """The same training, whose next step learns from the longest sequences there can be."""
    config = training.config
    groups = math.ceil(rows_of_two_parts(training) / config.group_size)
    prompts = groups * training.accelerator.num_processes * config.updates_per_rollout
    texts = set(longest([problem.question for problem in training.problems], prompts))
    problems = [problem for problem in training.problems if problem.question in texts]
    config = replace(config, prompts_per_step=prompts)
    engine = ToTheLimit()
    return replace(
        training, config=config, problems=problems, engine=engine, sampler=engine, scorer=OneInTwo()
    )


def rows_of_two_parts(training: Any) -> int:
    """Rows that go through in two parts: while the second does, the first's gradients are held as well."""
    load = training.load
    return min(load.rows, 2 * max(1, training.micro_batches.tokens // (load.prompt + load.completion)))


def _not_finite(*steps: Mapping[str, float]) -> list[Finding]:
    bad = sum(int(metrics["train/bad_updates"]) for metrics in steps)
    text = f"{bad} updates had a loss or gradient that is not finite: are all weights of the model numbers?"
    return [Finding("not_finite", text)] if bad else []


def _timed(act: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    began = time.perf_counter()
    return act(*arguments), time.perf_counter() - began


# ------------------------------------------------------------------------------------------------------------
# What is told


def _answers(groups: list[Group], seen: Mapping[str, float]) -> Rows:
    """What came back."""
    signal = sum(group.has_signal for group in groups)
    judged = [group.scores for group in groups if group.is_judged]
    rows = []
    if judged:
        right = fmean(bool(correct) for scores in judged for correct in scores.correct)
        ever = fmean(any(scores.correct) for scores in judged)
        found = fmean(answer is not None for scores in judged for answer in scores.extracted)
        rows.append(("accuracy", f"pass@1 {right:.1%}, pass@{len(judged[0].total)} {ever:.1%}"))
        rows.append(("parseable", f"{found:.1%} have an answer where it is looked for"))
    return [
        *rows,
        ("well-formed", f"{seen['train/format_rate']:.1%}"),
        ("truncated", f"{seen['rollout/truncated_fraction']:.1%}"),
        ("signal", f"{signal} of {len(groups)} groups earn different rewards"),
    ]


def _asking(training: Any, seen: Mapping[str, float]) -> Rows:
    """How the tokenizer asks, and how a completion ends."""
    tokenizer = training.tokenizer
    stops = training.engine.stop_token_ids.tolist()
    causes = {finding.cause for finding in check_template(tokenizer, stops)}
    ended = 1 - seen["rollout/truncated_fraction"]
    names = " or ".join(tokenizer.convert_ids_to_tokens(stops))
    does = "does not end" if "eos_unreachable" in causes else "ends"
    return [
        (THINK_OPEN, "opened by the chat template" if "prefilled_think" in causes else "left to the model"),
        ("padding", "the EOS" if "pad_is_eos" in causes else "a token of its own"),
        ("EOS", f"{names} ended {ended:.1%}; the chat template {does} a turn with it"),
    ]


def _memory(training: Any, metrics: Mapping[str, float]) -> Rows:
    """The peak, after a step of the longest sequences."""
    load, parts = training.load, training.micro_batches
    what = f"an update of {rows_of_two_parts(training)} rows of {load.prompt:,} + {load.completion:,} tokens"
    ran_out = f"; memory ran out, and parts are of {parts.tokens:,} tokens now"
    is_whole = parts.tokens == token_budget(parts.configured, training.accelerator.device)
    peak = f"{metrics['memory/peak_mib']:,.0f} MiB at most, the program's own included, in {what}"
    return [
        ("two steps, and one of the longest sequences, thrown away", ""),
        ("memory", peak + (ran_out if not is_whole else "")),
    ]


def _time(config: Any, done: int, step_s: float, exam_s: float | None = None) -> Rows:
    """How long it will take after `done` steps, and what that costs; an evaluation takes about `exam_s`: None
    for supervised training, where nothing tells, and nothing is evaluated before the first step.
    """
    total = config.total_steps
    ends = {*range(config.eval_every, total, config.eval_every), total} if config.eval_every else set()
    exams = sum(step > done for step in ends) + bool(ends and done == 0 and exam_s is not None)
    hours = ((total - done) * step_s + exams * (exam_s or 0.0)) / 3600
    beside = ", whose time is not in it" if exam_s is None else ""
    cost = f"{hours * config.price_per_hour:,.2f} at {config.price_per_hour:g} an hour"
    return [
        ("a step", f"{step_s:.2f} s"),
        ("time to the end", f"{_duration(hours)} for {total - done} steps and {exams} evaluations{beside}"),
        ("cost", cost if config.price_per_hour else "not known: --price_per_hour"),
    ]


def _duration(hours: float) -> str:
    minutes = round(60 * hours)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{60 * hours:.1f} min"
