"""Problems put to an engine, the answers judged, the figures told with their intervals.

One measurement for everyone: training evaluates itself with it, and so does `evaluate.py`.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from accelerate import Accelerator
from accelerate.utils import gather_object

from data import Problem
from figures import wilson_interval
from inference import Completion, Engine, SamplingParams
from prompts import answer_style, completion_prefix, encode_prompt, parse_completion, render_prompt
from rewards import judge_problem
from rewards.shaping import self_correction, verification
from runs.signals import StepStopped

CANARIES = 8  # problems whose answers are kept at every evaluation of a run


@dataclass(frozen=True)
class Answer:
    """One judged completion.

    Attributes:
        completion: the text, a prefilled `<think>` included.
        tokens: how many were sampled.
        truncated: it ran into the limit.
        well_formed: see `prompts.ParsedCompletion`.
        correct: the strict judgement; None is undecided.
        correct_lenient: the same with the last number taken as the answer where none was marked.
        extracted: what the strict judgement took as the answer.
        thought_tokens: of the thought without its tags; 0 where there is none.
        verifies: the thought says that it checks itself.
        corrects_itself: the thought takes back what it said.
    """

    completion: str
    tokens: int
    truncated: bool
    well_formed: bool
    correct: bool | None
    correct_lenient: bool | None
    extracted: str | None
    thought_tokens: int = 0
    verifies: bool = False
    corrects_itself: bool = False


def hold_exam(
    engine: Engine,
    tokenizer: Any,
    problems: Sequence[Problem],
    params: SamplingParams,
    n: int = 1,
    seed: Sequence[int] = (0,),
    first_problem: int = 0,
    on_answer: Callable[[], None] = lambda: None,
    on_group: Callable[[int, list[Answer]], None] = lambda number, answers: None,
) -> list[list[Answer]]:
    """Sample `n` completions of every problem, each judged as it ends.

    Args:
        engine: answers.
        tokenizer: of the engine's model.
        problems: each with a gold answer.
        params: how to sample; temperature 0 is greedy.
        n: completions per problem.
        seed: keys the random numbers, with the problem's number and the sample's.
        first_problem: the number of the first problem, where this is one process' share of a longer list.
        on_answer: called as each completion ends.
        on_group: called with a problem's number and answers as its last completion ends.

    Returns:
        `n` answers a problem, in order.
    """
    texts = [render_prompt(tokenizer, problem.question) for problem in problems]
    token_ids = [encode_prompt(tokenizer, problem.question) for problem in problems]
    answers: list[list[Answer | None]] = [[None] * n for _ in problems]

    def take(prompt: int, sample: int, completion: Completion) -> None:
        on_answer()
        group = answers[prompt]
        group[sample] = judge_completion(tokenizer, texts[prompt], completion, problems[prompt])
        if None not in group:
            on_group(first_problem + prompt, group)

    engine.generate(token_ids, n, params, seed, first_problem, take)
    return answers


def hold_shared_exam(
    accelerator: Accelerator,
    engine: Engine,
    tokenizer: Any,
    problems: Sequence[Problem],
    params: SamplingParams,
    seed: Sequence[int] = (0,),
) -> list[list[Answer]]:
    """Hold an exam with every process answering its share; all of them get all answers.

    Raises:
        StepStopped: a process was told to stop.
    """
    size = math.ceil(len(problems) / accelerator.num_processes)
    first = accelerator.process_index * size
    share = problems[first : first + size]
    groups = None
    try:
        with accelerator.autocast():
            groups = hold_exam(engine, tokenizer, share, params, 1, seed, first)
    except StepStopped:
        pass
    told = gather_object([groups])
    if None in told:
        raise StepStopped
    return [group for of_process in told for group in of_process]


def judge_completion(tokenizer: Any, prompt: str, completion: Completion, problem: Problem) -> Answer:
    """Decode a completion of `prompt` and judge it against the problem's gold."""
    text = completion_prefix(prompt) + tokenizer.decode(completion.token_ids, skip_special_tokens=True)
    strict = judge_problem(text, problem.gold, problem.columns)
    lenient = strict if strict.correct else judge_problem(text, problem.gold, problem.columns, strict=False)
    parsed = parse_completion(text, answer_style(prompt))
    thought = (parsed.thought or "").strip()
    return Answer(
        completion=text,
        tokens=len(completion.token_ids),
        truncated=completion.finish_reason == "length",
        well_formed=parsed.well_formed,
        correct=strict.correct,
        correct_lenient=lenient.correct,
        extracted=strict.extracted,
        thought_tokens=len(tokenizer.encode(thought, add_special_tokens=False)) if thought else 0,
        verifies=bool(verification([text])[0]),
        corrects_itself=bool(self_correction([text])[0]),
    )


# ------------------------------------------------------------------------------------------------------------
# Rejection sampling


def worth_imitating(
    answers: Sequence[Answer],
    most: int,
    prefer: Literal["shortest", "diverse"] = "shortest",
    keep: Literal["correct", "all"] = "correct",
) -> list[Answer]:
    """The completions of a problem to learn from: well formed, whole, each text once.

    Args:
        answers: to one problem.
        most: to return.
        prefer: "shortest" takes the fewest tokens; "diverse" begins with the shortest and goes on with
            whichever shares the fewest of its words' triples with those taken.
        keep: "all" also takes answers that are wrong or undecided.
    """
    good = {
        answer.completion: answer
        for answer in answers
        if answer.well_formed and not answer.truncated and (keep == "all" or answer.correct)
    }
    left = sorted(good.values(), key=lambda answer: (answer.tokens, answer.completion))
    if prefer == "shortest":
        return left[:most]
    taken: list[Answer] = []
    seen: set[tuple[str, ...]] = set()
    while left and len(taken) < most:
        best = min(left, key=lambda answer: _share_of(_triples(answer.completion), seen))
        left.remove(best)
        taken.append(best)
        seen |= _triples(best.completion)
    return taken


def _triples(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return set(zip(words, words[1:], words[2:], strict=False)) or {tuple(words)}


def _share_of(triples: set[tuple[str, ...]], seen: set[tuple[str, ...]]) -> float:
    return len(triples & seen) / len(triples)


# ------------------------------------------------------------------------------------------------------------
# Figures


def summarise(groups: Sequence[Sequence[Answer]]) -> dict[str, Any]:
    """The figures of an exam; shares are in [0, 1], `n` counts problems, undecided counts as wrong."""
    answers = [answer for group in groups for answer in group]

    def share(is_so: Callable[[Answer], object]) -> float:
        return sum(bool(is_so(answer)) for answer in answers) / len(answers)

    accuracy = share(lambda a: a.correct)
    corrected = [answer for answer in answers if answer.corrects_itself]
    return {
        "n": len(groups),
        "accuracy_strict": accuracy,
        "accuracy_lenient": share(lambda a: a.correct_lenient),
        # Several samples of a problem are not independent: the interval counts problems.
        "ci95": list(wilson_interval(accuracy * len(groups), len(groups))),
        "format_rate": share(lambda a: a.well_formed),
        "truncation_rate": share(lambda a: a.truncated),
        "undecided_rate": share(lambda a: a.correct is None),
        "mean_tokens": statistics.fmean(answer.tokens for answer in answers),
        "median_tokens": statistics.median(answer.tokens for answer in answers),
        "thinking_rate": share(lambda a: a.thought_tokens),
        "thought_tokens": statistics.fmean(answer.thought_tokens for answer in answers),
        "verification_rate": share(lambda a: a.verifies),
        "self_correction_rate": len(corrected) / len(answers),
        # Whether it helps: how many of them are right. None where there are none.
        "self_correction_accuracy": sum(bool(a.correct) for a in corrected) / len(corrected)
        if corrected
        else None,
    }


def canary_rows(problems: Sequence[Problem], groups: Sequence[Sequence[Answer]]) -> list[dict[str, Any]]:
    """The first problems with the answers given to them, to be read beside those of other steps."""
    return [
        {
            "question": problem.question,
            "gold": problem.gold,
            "completion": group[0].completion,
            "correct": group[0].correct,
            "tokens": group[0].tokens,
        }
        for problem, group in list(zip(problems, groups, strict=True))[:CANARIES]
    ]
