"""Honest evaluation: strict and lenient accuracy with intervals, greedy and sampled, beside a baseline.

Both models answer the same problems through the same engine, prompts and judge.

    python evaluate.py --model outputs/grpo/final --baseline outputs/sft/final
    python evaluate.py --model Qwen/Qwen2.5-0.5B-Instruct --data gsm8k --limit 200 --samples 8 --json it.json
    python evaluate.py --model outputs/grpo/final --engine_url http://127.0.0.1:8000/v1

Rejection sampling: right and well-formed answers of a model become examples for `train_sft.py --data FILE`.

    python evaluate.py --model outputs/grpo/final --split train --samples 16 --keep correct --write_sft FILE
"""

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from data import Problem, load_problems
from exam import Answer, hold_exam, summarise, worth_imitating
from figures import pass_at_k
from inference import Engine, SamplingParams
from inference.engine import TorchEngine
from inference.formats import reads_with_mlx
from inference.server_engine import ServerEngine
from models import load_model, make_accelerator
from prompts import AnswerStyle
from runs.config import at_the_door, parse_config, require, run_script
from tokenizer import asking, load_tokenizer


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
    """Besides the greedy answer, this many sampled ones: their mean accuracy, and pass@k with k = samples."""
    temperature: float = 1.0
    """Of the sampled answers."""
    seed: int = 0
    """Of the sampled answers."""
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
        if self.engine_url and self.baseline:
            raise ValueError("engine_url answers for one model; measure the baseline in a run of its own")
        if self.served_model and not self.engine_url:
            raise ValueError("served_model is a name on a server; give engine_url, too")
        for name in ("json", "write_sft"):
            file = getattr(self, name)
            if file and (Path(file).is_dir() or not Path(file).parent.is_dir()):
                raise ValueError(f"{name} {file!r} cannot be written; give a file in a folder that is there")
        if self.write_sft and not self.samples:
            raise ValueError("write_sft needs sampled answers, got samples 0; give --samples 16")
        if self.write_sft and self.split != "train":
            raise ValueError(
                f"write_sft needs --split train, got {self.split!r}: examples from held-out problems would "
                "make every later score on them worthless"
            )


@dataclass(frozen=True)
class Result:
    """What one model did."""

    figures: dict[str, Any]
    greedy: list[Answer]
    sampled: list[list[Answer]]


def load_engine(config: EvaluateConfig, name: str, tokenizer: Any, device: Any) -> Engine:
    """What answers: the server that has the model, mlx-lm where it was converted for it, else torch."""
    if config.engine_url:
        return ServerEngine(config.engine_url, tokenizer, name, config.served_model)
    if reads_with_mlx(name):
        from inference import mlx_engine

        return mlx_engine.load_engine(name, tokenizer)[0]
    model = load_model(name, device=device, trust_remote_code=config.trust_remote_code)
    return TorchEngine(model, tokenizer)


def examine(
    config: EvaluateConfig, engine: Engine, tokenizer: Any, problems: list[Problem], bar: tqdm
) -> Result:
    """Let a model answer greedily, and in samples if asked for."""

    def ask(temperature: float, n: int) -> list[list[Answer]]:
        params = SamplingParams(config.max_completion_tokens, temperature)
        return hold_exam(engine, tokenizer, problems, params, n, (config.seed,), on_answer=bar.update)

    greedy = ask(0.0, 1)
    figures = summarise(greedy)
    sampled = ask(config.temperature, config.samples) if config.samples else []
    if sampled:
        right = [sum(bool(answer.correct) for answer in group) for group in sampled]
        figures["samples"] = config.samples
        figures["accuracy_sampled"] = summarise(sampled)["accuracy_strict"]
        figures["pass_at_k"] = statistics.fmean(pass_at_k(config.samples, c, config.samples) for c in right)
    return Result(figures, [group[0] for group in greedy], sampled)


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

ROWS: tuple[tuple[str, str, Callable[[dict[str, Any]], str]], ...] = (
    ("accuracy_strict", "accuracy, strict", lambda f: f"{f['accuracy_strict']:.1%}"),
    ("ci95", "  95 % interval", lambda f: "{:.1%} to {:.1%}".format(*f["ci95"])),
    ("accuracy_lenient", "accuracy, lenient", lambda f: f"{f['accuracy_lenient']:.1%}"),
    ("accuracy_sampled", "accuracy, sampled", lambda f: f"{f['accuracy_sampled']:.1%}"),
    ("pass_at_k", "pass@k", lambda f: f"{f['pass_at_k']:.1%} (k = {f['samples']})"),
    ("format_rate", "well formed", lambda f: f"{f['format_rate']:.1%}"),
    ("truncation_rate", "truncated", lambda f: f"{f['truncation_rate']:.1%}"),
    ("undecided_rate", "undecided", lambda f: f"{f['undecided_rate']:.1%}"),
    ("mean_tokens", "tokens a completion", lambda f: f"{f['mean_tokens']:.1f}"),
)


def table(results: dict[str, Result]) -> str:
    """The figures of the models, one column each."""
    rows = [["", *results]]
    for key, label, show in ROWS:
        if all(key in result.figures for result in results.values()):
            rows.append([label, *(show(result.figures) for result in results.values())])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * sum(widths, 2 * (len(widths) - 1)), *lines[1:]])


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


def main(config: EvaluateConfig) -> int:
    """Measure, print, and write the figures if asked for; returns the exit code."""
    names = [name for name in (config.baseline, config.model) if name]
    with at_the_door():
        accelerator = make_accelerator()
        tokenizers = {name: load_tokenizer(name, **asking(config)) for name in names}
        problems = load_problems(
            config.data,
            config.split,
            limit=config.limit,
            question_column=config.question_column,
            answer_column=config.answer_column,
            options=config.data_options,
        )
    results: dict[str, Result] = {}
    answers = len(problems) * (1 + config.samples)
    for name in names:
        with at_the_door():
            engine = load_engine(config, name, tokenizers[name], accelerator.device)
        with tqdm(total=answers, desc=name, unit="answer", dynamic_ncols=True) as bar, accelerator.autocast():
            results[name] = examine(config, engine, tokenizers[name], problems, bar)
        del engine

    print(f"\n{config.data}, {config.split} split, {len(problems)} problems, greedy unless said\n")
    print(table(results))
    index = telling_problem(list(results.values()))
    print(f"\n{problems[index].question}   (gold: {problems[index].gold})")
    for name, result in results.items():
        answer = result.greedy[index]
        print(f"\n  {name}: {'right' if answer.correct else 'wrong'}\n{indented(answer.completion)}")
    if config.write_sft:
        write_examples(config, problems, results[config.model].sampled)
    if config.json:
        rows = {
            name: {"model": name, "data": config.data, "split": config.split, **r.figures}
            for name, r in results.items()
        }
        report = rows[config.model] | ({"baseline": rows[config.baseline]} if config.baseline else {})
        Path(config.json).write_text(json.dumps(report, indent=1) + "\n")
        print(f"\nfigures in {config.json}")
    return 0


if __name__ == "__main__":
    run_script(main, lambda: parse_config(EvaluateConfig))
