"""Honest evaluation: strict and lenient accuracy with intervals, greedy and sampled, beside a baseline.

Both models answer the same problems through the same engine, prompts and judge.

    python evaluate.py --model outputs/grpo/final --baseline outputs/sft/final
    python evaluate.py --model Qwen/Qwen2.5-0.5B-Instruct --data gsm8k --limit 200 --samples 8 --json it.json
    python evaluate.py --model outputs/grpo/final --engine_url http://127.0.0.1:8000/v1

Rejection sampling: right and well-formed answers of a model become examples for `train_sft.py --data FILE`.

    python evaluate.py --model outputs/grpo/final --split train --samples 16 --keep correct --write_sft FILE
"""

import json
import math
import random
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from answers import AnswerBook, gaps, key_of
from choice import choose, hand_in, parse_choosers
from data import Problem, load_problems
from exam import Answer, hold_exam, summarise, worth_imitating
from figures import bootstrap_interval, difference_interval, mcnemar, pass_at_k, wilson_interval
from inference import Engine, SamplingParams
from inference.engine import TorchEngine
from inference.formats import reads_with_mlx, weights_stamp
from inference.search import group_answers
from inference.server_engine import ServerEngine
from models import load_model, load_reward_model, make_accelerator
from prompts import AnswerStyle, parse_completion, render_prompt
from rewards import RewardError, fill_slots
from rewards.scorer import Scorer
from rewards.verify import same_answers
from runs.comparison import aligned
from runs.config import RunStopped, at_the_door, parse_config, require, run_script
from runs.exam_report import GREEDY, exam_page, figure_rows, points
from runs.folder import SETTINGS, environment, require_writable
from runs.page import write_page
from tokenizer import asking, load_tokenizer

REWARDS = {"format": 1.0, "repetition": -0.1}


@dataclass(frozen=True)
class EvaluateConfig:
    """Every field is a flag of the same name."""

    model: str
    """A model folder or a Hub name."""
    baseline: str | None = None
    """A second model, measured beside the first on the same problems."""
    engine_url: str | None = None
    """An OpenAI-compatible server (vLLM, mlx_lm.server, llama.cpp) that has `model` and answers in its place,
    up to its /v1; the key in PONDER_API_KEY."""
    served_model: str | None = None
    """The model's name on that server, where it has several."""
    data: str = "arithmetic"
    """A task (arithmetic, word_problems, countdown), gsm8k, math, openr1-math, a Hub name or a path."""
    split: str = "test"
    """train, validation or test."""
    limit: int | None = None
    """At most this many problems."""
    data_options: dict[str, Any] = field(default_factory=dict)
    """Options of a built-in task, such as '{high: 999}'."""
    question_column: str | None = None
    """The data's column with the question; guessed from the usual names if not given."""
    answer_column: str | None = None
    """The data's column with the answer; guessed from the usual names if not given."""
    system_prompt: str | None = None
    """Replaces the system prompt that the model's chat template gets from us; the empty text for none."""
    answer_style: AnswerStyle | None = None
    """How our system prompt asks for answers: between tags, or in a box."""
    plain_template: bool = False
    """Ask in R1-Zero's plain `User: … Assistant: `."""
    prefill_think: bool | None = None
    """Begin every completion with `<think>`."""
    trust_remote_code: bool = False
    """Run Python code that a model brings. Read it first."""
    max_completion_tokens: int = 512
    """Tokens a completion at most."""
    samples: int = 0
    """Besides the greedy answer, this many sampled ones: their mean accuracy, the majority's, the best by
    `rewards`, and pass@k up to k = samples."""
    temperature: float = 1.0
    """Of the sampled answers."""
    seed: int = 0
    """Of the sampled answers."""
    rewards: dict[str, float] = field(default_factory=REWARDS.copy)
    """What chooses the best of a problem's samples: weight by name, as in training. Only rewards that need
    no answer; none of them is shown one."""
    shuffle_seed: int | None = None
    """Take the problems in another order, before `limit`; if not given, in the data's."""
    train_data: str | None = None
    """Count the problems that are also among the training problems of this task, set or file."""
    contaminated: Literal["count", "drop"] = "count"
    """Whether those are only counted, or left out as well."""
    output: str | None = None
    """A folder for report.json, report.html and samples.jsonl, every answer as it comes: the same command
    goes on where it was stopped."""
    json: str | None = None
    """Write the figures to this file."""
    write_sft: str | None = None
    """Write sampled answers as examples to this JSONL file: well formed, whole, each text once."""
    keep: Literal["correct", "all"] = "correct"
    """Which answers `write_sft` takes."""
    keep_per_problem: int = 1
    """How many of a problem `write_sft` takes at most."""
    prefer: Literal["shortest", "diverse"] = "shortest"
    """Which of them: the fewest tokens, or those that share the fewest words in a row."""

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        require(self, "max_completion_tokens", "keep_per_problem", at_least=1)
        require(self, "samples", "seed", at_least=0)
        require(self, "temperature", above=0)
        if self.limit is not None:
            require(self, "limit", at_least=1)
        if self.contaminated == "drop" and not self.train_data:
            raise ValueError("contaminated drop needs the training problems; give --train_data")
        if self.engine_url and self.baseline:
            raise ValueError("engine_url answers for one model; measure the baseline in a run of its own")
        if self.baseline and Path(self.baseline).absolute() == Path(self.model).absolute():
            raise ValueError(f"baseline {self.baseline!r} is the model itself; give another --baseline")
        if self.served_model and not self.engine_url:
            raise ValueError("served_model is a name on a server; give engine_url, too")
        if self.rewards != REWARDS and not self.samples:
            raise ValueError("rewards choose among sampled answers, got samples 0; give --samples 8")
        if self.write_sft and not self.samples:
            raise ValueError("write_sft needs sampled answers, got samples 0; give --samples 16")
        if self.write_sft and self.split != "train":
            raise ValueError(
                f"write_sft needs --split train, got {self.split!r}: examples from held-out problems would "
                "make every later score on them worthless"
            )
        self._require_places()

    def _require_places(self) -> None:
        """Refuse where nothing could be written, or what is there would be lost."""
        if self.output:
            require_writable(Path(self.output), "output")
            if (Path(self.output) / SETTINGS).exists():
                raise ValueError(
                    f"output {self.output!r} holds a run, whose report.html would be lost; "
                    "give another --output"
                )
        for name in ("json", "write_sft"):
            file = getattr(self, name)
            if file and (Path(file).is_dir() or not Path(file).parent.is_dir()):
                raise ValueError(f"{name} {file!r} cannot be written; give a file in a folder that is there")
            if file:
                require_writable(Path(file).parent, name)


@dataclass(frozen=True)
class Result:
    """What one model did.

    Attributes:
        figures: as docs/evaluation.md tells them.
        greedy: an answer a problem.
        sampled: `samples` answers a problem, or nothing.
        earned: what the rewards give each of those.
    """

    figures: dict[str, Any]
    greedy: list[Answer]
    sampled: list[list[Answer]]
    earned: list[list[float]]


def load_engine(config: EvaluateConfig, name: str, tokenizer: Any, device: Any) -> Engine:
    """What answers: the server that has the model, mlx-lm where it was converted for it, else torch."""
    if config.engine_url:
        return ServerEngine(config.engine_url, tokenizer, name, config.served_model)
    if reads_with_mlx(name):
        from inference import mlx_engine

        return mlx_engine.load_engine(name, tokenizer)[0]
    model = load_model(name, device=device, trust_remote_code=config.trust_remote_code)
    return TorchEngine(model, tokenizer)


def load_exam(config: EvaluateConfig) -> tuple[list[Problem], int | None]:
    """The problems, and how many are also training problems; None where nobody asked.

    Raises:
        ValueError: nothing is left to ask.
    """
    columns = {"question_column": config.question_column, "answer_column": config.answer_column}
    load = {"options": config.data_options, **columns}
    whole = config.limit if config.shuffle_seed is None and config.contaminated == "count" else None
    problems = load_problems(config.data, config.split, limit=whole, **load)
    if config.shuffle_seed is not None:
        random.Random(config.shuffle_seed).shuffle(problems)
    seen = None
    if config.train_data:
        same = load if config.train_data == config.data else {}
        trained = {
            _plain(p.question) for p in load_problems(config.train_data, "train", require_gold=False, **same)
        }
        if config.contaminated == "drop":
            kept = [problem for problem in problems if _plain(problem.question) not in trained]
            seen, problems = len(problems) - len(kept), kept[: config.limit]
        else:
            problems = problems[: config.limit]
            seen = sum(_plain(problem.question) in trained for problem in problems)
    problems = problems[: config.limit]
    if not problems:
        raise ValueError(f"data {config.data!r}: all {seen} problems are training problems; nothing is left")
    return problems, seen


def _plain(question: str) -> str:
    """A question without what does not make it another one: case, spaces, punctuation between words."""
    return " ".join(re.findall(r"\w+|[^\w\s.,;:!?]", question.casefold()))


def examine(
    config: EvaluateConfig,
    name: str,
    engine: Engine,
    tokenizer: Any,
    problems: list[Problem],
    accelerator: Accelerator,
    book: AnswerBook,
    scorer: Scorer,
) -> Result:
    """Let a model answer greedily, and in samples if asked for; every process its share."""
    size = math.ceil(len(problems) / accelerator.num_processes)
    first = min(len(problems), accelerator.process_index * size)
    stop = min(len(problems), first + size)
    total = (stop - first) * (1 + config.samples)
    pause_s = 0.1 if sys.stderr.isatty() else 30.0  # a file is not drawn over
    shown = {"mininterval": pause_s, "maxinterval": pause_s, "disable": not accelerator.is_main_process}
    bar = tqdm(total=total, desc=name, unit="answer", dynamic_ncols=True, **shown)
    handed: list[int] = []  # problems, in the order in which their samples went to the scorer

    def rate(number: int, answers: list[Answer]) -> None:
        handed.append(number)
        hand_in(scorer, tokenizer, problems[number], answers, config.max_completion_tokens)

    def ask(
        kind: str, temperature: float, n: int, take: Callable[[int, list[Answer]], None] = lambda *group: None
    ) -> list[list[Answer]]:
        params = SamplingParams(config.max_completion_tokens, temperature)
        form = {"prompt": render_prompt(tokenizer, ""), "params": asdict(params), "n": n, "seed": config.seed}
        served = {"url": config.engine_url, "served": config.served_model}
        key = key_of(model=name, stamp=weights_stamp(name), **served, **form)
        known = book.known(key, problems)

        def keep(number: int, answers: list[Answer]) -> None:
            known[number] = answers
            try:
                book.keep(key, number, problems[number], answers, model=name, kind=kind)
            except OSError as error:
                raise RunStopped(
                    f"{book.file} could not be written ({error}); free some space, the same command goes on"
                ) from error
            take(number, answers)

        there = [number for number in range(first, stop) if number in known]
        for number in there:
            take(number, known[number])
        done = n * len(there)
        if not bar.disable:
            bar.initial += done  # it took no time, and tells nothing of how much is left
        bar.update(done)
        for begin, end in list(gaps(known, first, stop)):
            asked = (problems[begin:end], params, n, (config.seed,), begin)
            hold_exam(engine, tokenizer, *asked, on_answer=bar.update, on_group=keep)
        return [known[number] for number in range(first, stop)]

    try:
        with bar, accelerator.autocast():
            greedy = ask("greedy", 0.0, 1)
            sampled = ask("sampled", config.temperature, config.samples, rate) if config.samples else []
            paid = dict(zip(handed, (scores.total for scores in scorer.results()), strict=True))
    except RewardError as error:
        hint = "the same command goes on" if config.output else "with --output the same command would go on"
        raise RunStopped(f"{error}; {hint}") from error
    earned = [paid[number] for number in sorted(paid)]
    greedy, sampled, earned = map(gather_object, (greedy, sampled, earned))
    return Result(figures_of(greedy, sampled, earned), [group[0] for group in greedy], sampled, earned)


# ------------------------------------------------------------------------------------------------------------
# Figures


def figures_of(
    greedy: list[list[Answer]], sampled: list[list[Answer]], earned: list[list[float]]
) -> dict[str, Any]:
    """What `exam.summarise` says of the greedy answers, and of k samples their mean accuracy, the majority's,
    that of the one that earned most, and the chance that one of up to k is right.
    """
    figures = summarise(greedy)
    if sampled:
        k = len(sampled[0])
        right = [sum(bool(answer.correct) for answer in group) for group in sampled]
        best = [
            group[choose(group, rewards)].correct is True
            for group, rewards in zip(sampled, earned, strict=True)
        ]
        figures["samples"] = k
        for name, values in {
            "accuracy_sampled": [count / k for count in right],
            "maj_at_k": [float(majority_is_right(group)) for group in sampled],
            "best_of_n": [float(is_right) for is_right in best],
            "pass_at_k": [pass_at_k(k, count, k) for count in right],
        }.items():
            interval = f"ci95_{name.removeprefix('accuracy_')}"
            figures |= {name: statistics.fmean(values), interval: list(bootstrap_interval(values))}
        some = [2**power for power in range(k.bit_length()) if 2**power < k] + [k]
        figures["pass_at"] = {
            str(n): statistics.fmean(pass_at_k(k, count, n) for count in right) for n in some
        }
    return figures


def majority_is_right(answers: Sequence[Answer]) -> bool:
    """Is the answer that most completions give the right one? Answers that say the same are one; between
    equally many the first wins.
    """
    groups = group_answers([answer.extracted for answer in answers], same_answers)
    return bool(groups) and answers[max(groups, key=len)[0]].correct is True


def compare(before: Result, after: Result) -> dict[str, Any]:
    """Two models on the same problems: the difference of their greedy accuracy with its interval, and how
    likely so large a one is where there is none.
    """
    verdicts = [[answer.correct is True for answer in result.greedy] for result in (before, after)]
    difference = after.figures["accuracy_strict"] - before.figures["accuracy_strict"]
    interval = list(difference_interval(*verdicts))
    return {
        "difference": {"accuracy_strict": difference, "ci95": interval},
        "p_value": mcnemar(*verdicts),
    }


def by_kind(problems: list[Problem], greedy: list[Answer]) -> dict[str, dict[str, Any]]:
    """Greedy accuracy by how hard the data says that a problem is, and by how many steps its solution has."""
    told: dict[str, dict[str, Any]] = {}
    for name in ("level", "difficulty", "steps"):
        kinds: dict[str, list[Answer]] = {}
        for problem, answer in zip(problems, greedy, strict=True):
            if (kind := _kind(problem, name)) is not None:
                kinds.setdefault(str(kind), []).append(answer)
        if 1 < len(kinds) <= MOST_KINDS:
            told[name] = {kind: _share_right(kinds[kind]) for kind in sorted(kinds, key=_as_number)}
    return told


MOST_KINDS = 20


def _kind(problem: Problem, name: str) -> Any:
    if name in problem.columns or name != "steps" or not problem.completion:
        return problem.columns.get(name)
    thought = parse_completion(problem.completion).thought or ""
    return sum(bool(line.strip()) for line in thought.splitlines()) or None


def _share_right(answers: Sequence[Answer]) -> dict[str, Any]:
    right = sum(answer.correct is True for answer in answers)
    return {
        "n": len(answers),
        "accuracy_strict": right / len(answers),
        "ci95": list(wilson_interval(right, len(answers))),
    }


def _as_number(text: str) -> tuple[float, str]:
    digits = re.search(r"\d+", text)
    return (float(digits[0]) if digits else math.inf, text)


def write_examples(config: EvaluateConfig, problems: list[Problem], sampled: list[list[Answer]]) -> None:
    """Write what is worth imitating, a line an example, as `data.load_problems` reads it."""
    lines = []
    for problem, answers in zip(problems, sampled, strict=True):
        for answer in worth_imitating(answers, config.keep_per_problem, config.prefer, config.keep):
            row = {"question": problem.question, "answer": problem.gold, "completion": answer.completion}
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    Path(config.write_sft).write_text("".join(lines), encoding="utf-8")
    print(f"\n{len(lines)} examples of {len(problems)} problems in {config.write_sft}")


# ------------------------------------------------------------------------------------------------------------
# Telling


def table(results: dict[str, Result]) -> str:
    """The figures of the models, one column each."""
    return aligned(figure_rows({name: result.figures for name, result in results.items()}))


def telling_problem(results: list[Result]) -> int:
    """A problem that shows the difference: wrong with the
    baseline and right with the model, else the first.
    """
    if len(results) == 2:
        pairs = zip(results[0].greedy, results[1].greedy, strict=True)
        for index, (before, after) in enumerate(pairs):
            if not before.correct and after.correct:
                return index
    return 0


def indented(text: str) -> str:
    """Text of a model, set off from ours; control characters are shown, not obeyed."""
    lines = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text).split("\n")
    return "\n".join(f"    {line}" for line in lines)


def report_of(
    config: EvaluateConfig, results: dict[str, Result], problems: list[Problem], seen: int | None
) -> dict:
    """Everything that was measured; docs/evaluation.md has the meaning of each key."""
    rows = {
        name: {"model": name, "data": config.data, "split": config.split, **result.figures}
        | {"by": by_kind(problems, result.greedy)}
        for name, result in results.items()
    }
    report = rows[config.model]
    if seen is not None:
        report["contaminated"] = seen
    if config.baseline:
        report["baseline"] = rows[config.baseline]
        report |= compare(results[config.baseline], results[config.model])
    return report


def tell(config: EvaluateConfig, results: dict[str, Result], problems: list[Problem], report: dict) -> None:
    """Print what was measured, and one problem with its answers."""
    order = "" if config.shuffle_seed is None else f", shuffled with seed {config.shuffle_seed}"
    print(f"\n{config.data}, {config.split} split, {len(problems)} problems{order}, greedy unless said\n")
    print(table(results))
    if "difference" in report:
        low, high = report["difference"]["ci95"]
        gain = report["difference"]["accuracy_strict"]
        print(
            f"\ndifference {points(gain)} points (95 % interval {points(low)} to {points(high)}), "
            f"McNemar's p = {report['p_value']:.2g}"
        )
    for name, kinds in report["by"].items():
        shares = (f"{kind}: {f['accuracy_strict']:.1%} (n = {f['n']})" for kind, f in kinds.items())
        print(f"\nby {name}, {config.model}: " + ", ".join(shares))
    if config.train_data:
        done = "left out" if config.contaminated == "drop" else "among them"
        print(f"\n{report['contaminated']} problems that are also in {config.train_data}, {done}")
    index = telling_problem(list(results.values()))
    print(f"\n{problems[index].question}   (gold: {problems[index].gold})")
    for name, result in results.items():
        answer = result.greedy[index]
        print(f"\n  {name}: {'right' if answer.correct else 'wrong'}\n{indented(answer.completion)}")


def answers_of(problems: list[Problem], result: Result) -> list[dict[str, Any]]:
    """Every answer for the page: a problem's greedy one, then its samples."""
    rows = []
    for number, problem in enumerate(problems):
        told = {"number": number, "question": problem.question, "gold": problem.gold}
        rows.append(asdict(result.greedy[number]) | told | {"how": GREEDY, "reward": None, "chosen": False})
        if result.sampled:
            group, earned = result.sampled[number], result.earned[number]
            best = choose(group, earned)
            for place, (answer, reward) in enumerate(zip(group, earned, strict=True)):
                how = {"how": f"sample {place + 1}", "reward": reward, "chosen": place == best}
                rows.append(asdict(answer) | told | how)
    return rows


def write_report(
    config: EvaluateConfig, results: dict[str, Result], problems: list[Problem], report: dict
) -> None:
    """Write the figures, and for a person who wants to look, the page."""
    files = [Path(config.json)] if config.json else []
    files += [Path(config.output) / "report.json"] if config.output else []
    for file in files:
        file.write_text(json.dumps(report, indent=1) + "\n")
        print(f"\nfigures in {file}")
    if config.output:
        answers = {name: answers_of(problems, result) for name, result in results.items()}
        page = exam_page(report, answers, asdict(config), environment())
        write_page(Path(config.output) / "report.html", page)
        print(f"report in {Path(config.output) / 'report.html'}")


def main(config: EvaluateConfig) -> int:
    """Measure, print, and write the figures if asked for; returns the exit code."""
    names = [name for name in (config.baseline, config.model) if name]
    with at_the_door():
        accelerator = make_accelerator()
        tokenizers = {name: load_tokenizer(name, **asking(config)) for name in names}
        problems, seen = load_exam(config)
        choosers = fill_slots(parse_choosers(config.rewards), load_reward_model, accelerator.device)
    book = AnswerBook(Path(config.output) if config.output else None, accelerator.process_index)
    results: dict[str, Result] = {}
    for name in names:
        with at_the_door():
            engine = load_engine(config, name, tokenizers[name], accelerator.device)
        with Scorer(choosers) as scorer:
            asked = (engine, tokenizers[name], problems, accelerator, book, scorer)
            results[name] = examine(config, name, *asked)
        del asked
        del engine
    if not accelerator.is_main_process:
        return 0
    report = report_of(config, results, problems, seen)
    tell(config, results, problems, report)
    if config.write_sft:
        write_examples(config, problems, results[config.model].sampled)
    write_report(config, results, problems, report)
    return 0


if __name__ == "__main__":
    run_script(main, lambda: parse_config(EvaluateConfig))
