"""A file of questions, answered: a line each, in their order, going on where it stopped."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import prompts
from data import Problem
from inference import Completion, SamplingParams
from runs.config import UserError

if TYPE_CHECKING:
    from inference.chat import ChatModel


def answer_file(
    model: "ChatModel",
    problems: Sequence[Problem],
    params: SamplingParams,
    sampling: dict[str, Any],
    output: Path,
) -> None:
    """Add the answers that `output` does not have yet, a line each, in the order of `problems`.

    Args:
        model: answers.
        problems: their questions are asked.
        params: how to sample.
        sampling: all that the answers depend on, their `seed` among it; written beside each.
        output: a JSONL file.

    Raises:
        UserError: a question that does not fit into the context, or an output that holds other answers.
    """
    from tqdm import tqdm

    texts = [prompts.render_prompt(model.tokenizer, problem.question) for problem in problems]
    prompt_ids = [model.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    limits = []
    for number, token_ids in enumerate(prompt_ids, start=1):
        try:
            limits.append(answer_limit(model, params, len(token_ids)))
        except UserError as error:
            raise UserError(f"question {number} of the input does not fit: {error}") from error
    first = written = count_answers(output, problems, model.name, sampling)
    waiting: dict[int, Completion] = {}

    def take(begun: int, prompt: int, _: int, completion: Completion) -> None:
        nonlocal written
        waiting[begun + prompt] = completion
        while written in waiting:
            row = answer_row(model, problems[written], texts[written], waiting.pop(written), sampling)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            written += 1
        bar.update()

    with (
        output.open("a", encoding="utf-8") as file,
        tqdm(total=len(problems), initial=first, unit="answer", dynamic_ncols=True) as bar,
    ):
        for limit, alike in groupby(range(first, len(problems)), key=limits.__getitem__):
            numbers = list(alike)
            begun, several = numbers[0], [prompt_ids[number] for number in numbers]
            told = partial(take, begun)
            model.engine.generate(
                several, 1, replace(params, max_completion_tokens=limit), (sampling["seed"],), begun, told
            )


def answer_limit(model: "ChatModel", params: SamplingParams, prompt_tokens: int) -> int:
    """How long an answer may become: as `params` say, or what the context has room for.

    That is rounded down to eighths of the context, so that questions of about one length are answered
    together, and those that are much longer cost the others nothing.
    """
    limit = model.fitted(params, prompt_tokens).max_completion_tokens
    if limit == params.max_completion_tokens:
        return limit
    return limit - limit % max(1, model.context_tokens // 8) or limit


def answer_row(
    model: "ChatModel", problem: Problem, prompt: str, completion: Completion, sampling: dict[str, Any]
) -> dict[str, Any]:
    """A line of the output: `data.load_problems` reads it where the question came with its gold."""
    text = prompts.completion_prefix(prompt)
    text += model.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
    parsed = prompts.parse_completion(text)
    return {
        **asked_of(problem, model.name, sampling),
        "thought": parsed.thought,
        "answer": parsed.answer_text.strip() if parsed.answer is None else parsed.answer,
        "completion": text,
        "tokens": len(completion.token_ids),
        "finish_reason": completion.finish_reason,
    }


def asked_of(problem: Problem, model_name: str, sampling: dict[str, Any]) -> dict[str, Any]:
    """What a line begins with, known before there is an answer."""
    gold = {"gold": problem.gold} if problem.gold else {}
    return {"question": problem.question, **gold, "model": model_name, "sampling": sampling}


def count_answers(
    output: Path, problems: Sequence[Problem], model_name: str, sampling: dict[str, Any]
) -> int:
    """How many answers an output has from before; a last line that was not finished is taken off it.

    Raises:
        UserError: its lines are no answers of this model to these problems, or were sampled otherwise; or its
            last line, unfinished, does not begin as ours would.
    """
    if not output.exists():
        return 0

    def refuse(number: int) -> NoReturn:
        raise UserError(
            f"{output}:{number} is no answer of {model_name} to that question of the input; "
            "give another output"
        )

    whole = output.read_bytes().rpartition(b"\n")
    lines = whole[0].splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            is_ours = (row["question"], row["model"]) == (problems[number - 1].question, model_name)
            before = row.get("sampling", {})
            other = [name for name, value in sampling.items() if before.get(name) != value]
        except (ValueError, LookupError, TypeError, AttributeError):
            is_ours = False
        if not is_ours:
            refuse(number)
        if other:
            told = ", ".join(f"{name} {before.get(name)!r}, now {sampling[name]!r}" for name in other)
            raise UserError(
                f"{output}:{number} was answered with {told}; give the settings of then, or another output"
            )
    if torn := whole[2]:
        row = asked_of(problems[len(lines)], model_name, sampling) if len(lines) < len(problems) else {}
        begins = json.dumps(row, ensure_ascii=False)[:-1].encode()
        if os.path.commonprefix([torn, begins]) not in (torn, begins) or not row:
            refuse(len(lines) + 1)
        os.truncate(output, len(whole[0]) + len(whole[1]))
    return len(lines)
