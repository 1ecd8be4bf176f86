"""Rewards beside correctness: small pure functions with TRL's signature, `f(completions, **columns) -> list`.

Each takes what it names: `completion_ids`, `correct` (the judge's verdicts), `max_completion_tokens`, any
dataset column. `None` means "does not apply" and leaves the sum. What follows a bare `*` are options, set as
`name(option=value)` in `--rewards`. Signs are natural: what counts as bad (repetition, length above a
budget) is positive, its weight negative.
"""

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from statistics import fmean, stdev

from prompts import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    TAGS,
    THINK_CLOSE,
    THINK_OPEN,
    AnswerStyle,
    answer_style,
    completion_prefix,
    parse_completion,
)
from rewards.extraction import candidates
from rewards.latex import Node, parse
from rewards.verify import clean

_STEP = re.compile(
    r"^[ \t]*+(?:[-*#]+ *)?(?:\*\*)?(?:step[ \t]*+)?\d{1,3}[.):](?!\d)", re.IGNORECASE | re.MULTILINE
)
_VERIFICATION = re.compile(
    r"\b(?:let(?:'s| me| us) (?:verify|check|double[- ]check|confirm|re-?check)|(?:to|i(?:'ll| will| should))"
    r" (?:verify|double[- ]check|check (?:this|that|the|my))|wait,|substitut\w+ back|plugging \w+ back)",
    re.IGNORECASE,
)
_CORRECTION = re.compile(
    r"\b(?:wait\b|hmm\b|actually,|oops\b|scratch that|on second thought"
    r"|(?:that|this)(?:'s| is| was) (?:wrong|not right|a mistake)|(?:i|we) made (?:a mistake|an error)"
    r"|let(?:'s| me| us) (?:re-?(?:do|think|consider|calculate)\b|try again|correct (?:that|this|it|my)))",
    re.IGNORECASE,
)
_TIMES = re.compile(r"(?<=[\d)]) ?[xX] ?(?=[\d(])")
_WORD = re.compile(r"\w{1,12}|[^\w\s]")


def correct(completions: list[str], gold: list[str | None], correct: list[bool | None]) -> list[float | None]:
    """1 for a correct final answer, else 0, undecided ones included; None where a problem has no gold."""
    return [None if g is None else float(c is True) for g, c in zip(gold, correct, strict=True)]


def countdown(completions: list[str], numbers: list[list[int]], target: list[int]) -> list[float]:
    """1 where the answer is an expression with the target's value that uses every number exactly once.

    Read by our own parser: plus, minus, times, divided by and brackets, nothing else. `(8-2)*4 = 24` and
    `24 = (8-2)*4` may name its value.

    Raises:
        ValueError: numbers or target of the data are no whole numbers.
    """
    rows = zip(completions, numbers, target, strict=True)
    return [
        float(_solves_countdown(text, sorted(int(n) for n in given), int(goal))) for text, given, goal in rows
    ]


def _solves_countdown(text: str, given: list[int], goal: int) -> bool:
    answers = {clean(answer.replace("`", "")) for answer in candidates(text)}
    if len(answers) != 1:
        return False
    try:
        tree = parse(_TIMES.sub("*", answers.pop()))
        sides = tree[2] if tree[0] == "rel" and set(tree[1]) == {"="} else (tree,)
        expression = max(sides, key=lambda side: side[0] != "num")
        named = [side for side in sides if side is not expression]
        return (
            sorted(_numbers_used(expression)) == given
            and _arithmetic(expression) == goal
            and all(side[0] == "num" and side[1] == goal for side in named)
        )
    except (ValueError, ZeroDivisionError):
        return False


def _numbers_used(node: Node) -> list[int]:
    """The whole numbers of an expression.

    Raises:
        ValueError: something else than arithmetic on whole numbers stands in it.
    """
    if node[0] == "num" and node[2] is None:
        return [node[1]]
    if node[0] not in ("+", "*", "/", "neg"):
        raise ValueError(f"{node[0]} is not allowed")
    return [number for child in node[1:] for number in _numbers_used(child)]


def _arithmetic(node: Node) -> Fraction:
    """The value of a tree that `_numbers_used` has passed;
    small, because its numbers were given by the problem.
    """
    if node[0] == "num":
        return Fraction(node[1])
    values = [_arithmetic(child) for child in node[1:]]
    if node[0] == "neg":
        return -values[0]
    if node[0] == "+":
        return sum(values, Fraction(0))
    return math.prod(values) if node[0] == "*" else values[0] / values[1]


# -------------------------------------------------------------------------------------------------------
# Form


def _as_asked(completions: list[str], prompts: Sequence | None) -> list[tuple[str, AnswerStyle]]:
    """Completions with the `<think>` that the template wrote, where a caller left it in the prompt; and how
    the prompt asks for the answer.
    """
    told = [prompt if isinstance(prompt, str) else "" for prompt in prompts or [""] * len(completions)]
    read = []
    for text, prompt in zip(completions, told, strict=True):
        prefix = completion_prefix(prompt)
        read.append((text if text.lstrip().startswith(prefix) else prefix + text, answer_style(prompt)))
    return read


def format_binary(completions: list[str], prompts: Sequence | None = None) -> list[float]:
    """1 for one thought and then one answer and nothing else; repeated, nested or misplaced tags earn 0."""
    return [float(parse_completion(*read).well_formed) for read in _as_asked(completions, prompts)]


def format_graded(completions: list[str], prompts: Sequence | None = None) -> list[float]:
    """0, 0.25 (a closed thought), 0.5 (an answer after it, with stray text) or 1 (well formed): a slope to
    climb.
    """
    return [_format_grade(*read) for read in _as_asked(completions, prompts)]


def _format_grade(text: str, style: AnswerStyle) -> float:
    parsed = parse_completion(text, style)
    if parsed.well_formed:
        return 1.0
    counts = [text.count(tag) for tag in TAGS]
    opened, closed = text.find(THINK_OPEN), text.find(THINK_CLOSE)
    if counts[:2] != [1, 1] or opened > closed or not (parsed.thought or "").strip():
        return 0.0
    in_order = counts[2:] == [1, 1] and closed < text.find(ANSWER_OPEN) < text.find(ANSWER_CLOSE)
    return 0.5 if parsed.answer and (in_order or style == "boxed") else 0.25


def steps(completions: list[str], *, wanted: int = 3) -> list[float]:
    """Numbered steps in the thought, as a share of `wanted`, at most 1."""
    thoughts = [parse_completion(text).thought or "" for text in completions]
    return [min(1.0, len(_STEP.findall(thought)) / wanted) for thought in thoughts]


def verification(completions: list[str]) -> list[float]:
    """1 where the thought says that it checks itself. Words,
    not deeds: give it a small weight, or it becomes a ritual.
    """
    thoughts = [parse_completion(text).thought or "" for text in completions]
    return [float(_VERIFICATION.search(thought) is not None) for thought in thoughts]


def self_correction(completions: list[str]) -> list[float]:
    """1 where the thought takes back what it said: it waits, finds a mistake, tries again. Words, as
    `verification`.
    """
    thoughts = [parse_completion(text).thought or "" for text in completions]
    return [float(_CORRECTION.search(thought) is not None) for thought in thoughts]


def repetition(completions: list[str], *, n: int = 4) -> list[float]:
    """The share of word n-grams that stood in the text before,
    0 to 1; long runs without spaces are cut into words.
    """
    return [_repeated_share(_WORD.findall(text), n) for text in completions]


def _repeated_share(words: list[str], n: int) -> float:
    total = len(words) - n + 1
    if total < 1:
        return 0.0
    return 1.0 - len({tuple(words[i : i + n]) for i in range(total)}) / total


def unique_characters(completions: list[str]) -> list[float]:
    """How many different characters a completion has: a toy
    that shows in a minute whether learning works at all.
    """
    return [float(len(set(text))) for text in completions]


# -------------------------------------------------------------------------------------------------------
# Length, in tokens


def length_target(
    completions: list[str], completion_ids: list[list[int]], *, target: int = 256
) -> list[float]:
    """1 at the target length, falling to 0 at nothing and at twice the target."""
    return [max(0.0, 1.0 - abs(len(ids) - target) / target) for ids in completion_ids]


def length_penalty(
    completions: list[str],
    completion_ids: list[list[int]],
    correct: list[bool | None] | None = None,
    *,
    budget: int = 256,
    only_correct: bool = False,
) -> list[float]:
    """The excess over a budget as a share of the budget,
    at most 1; nothing below it. Give it a negative weight.

    A penalty on every token of every answer would outweigh the format reward at a hundred tokens, and
    thinking with it. With `only_correct`, wrong answers are not told to be wrong sooner.
    """
    excess = [min(1.0, max(0.0, len(ids) / budget - 1.0)) for ids in completion_ids]
    if not only_correct:
        return excess
    if correct is None:
        raise ValueError("length_penalty(only_correct=true) needs data with a gold answer")
    return [value if is_right else 0.0 for value, is_right in zip(excess, correct, strict=True)]


def soft_overlong(
    completions: list[str],
    completion_ids: list[list[int]],
    max_completion_tokens: int,
    *,
    cache: int | None = None,
) -> list[float]:
    """0 up to `max_completion_tokens - cache`, then falling linearly to -1 at the limit.

    Args:
        completions: unused; the signature is the same for all.
        completion_ids: counts the tokens, the EOS included.
        max_completion_tokens: the limit of generation.
        cache: tokens before the limit where the punishment begins; None is a fifth of the limit.

    Source: DAPO, arXiv 2503.14476, eq. 13.
    """
    cache = max(1, max_completion_tokens // 5) if cache is None else cache
    free = max_completion_tokens - cache
    return [max(-1.0, min(0.0, (free - len(ids)) / cache)) for ids in completion_ids]


def lead(
    completions: list[str],
    gold: list[str | None],
    correct: list[bool | None],
    completion_ids: list[list[int]],
    group_size: int,
    *,
    alpha: float = 0.05,
    min_length: int = 0,
) -> list[float | None]:
    """exp(-alpha z) for a correct answer, z scoring its length among its group's correct; -1 for a wrong.

    Args:
        completions: whole groups, in prompt order.
        gold: None where a problem has none; its reward is None.
        correct: the judge's verdicts.
        completion_ids: counts the tokens.
        group_size: completions a prompt.
        alpha: how much shorter answers are preferred.
        min_length: groups whose three shortest completions average fewer tokens get a plain 1 or -1.

    Source: GRPO-LEAD, arXiv 2504.09696, eq. 2-4 and its official code for `min_length`.
    """
    factors = length_factors(completion_ids, correct, group_size, alpha, min_length)
    values = [-1.0 if factor is None else factor for factor in factors]
    return [None if answer is None else value for answer, value in zip(gold, values, strict=True)]


def length_factors(
    completion_ids: list[list[int]],
    correct: list[bool | None],
    group_size: int,
    alpha: float,
    min_length: int = 0,
) -> list[float | None]:
    """exp(-alpha z) of each correct answer, None of each other; arguments and source as for `lead`."""
    factors: list[float | None] = []
    for start in range(0, len(completion_ids), group_size):
        group = range(start, min(start + group_size, len(completion_ids)))
        lengths = [len(completion_ids[i]) for i in group]
        right = [len(completion_ids[i]) for i in group if correct[i]]
        shaped = right and fmean(sorted(lengths)[:3]) >= min_length
        mean = fmean(right) if shaped else 0.0
        spread = stdev(right) if shaped and len(right) > 1 else 1.0
        for i in group:
            z = (len(completion_ids[i]) - mean) / (spread + 1e-6) if shaped else 0.0
            factors.append(math.exp(-alpha * z) if correct[i] else None)
    return factors
