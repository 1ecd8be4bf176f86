"""Best of N: rewards that know no answer choose among a problem's samples, and the judge says how they did.

What chooses must be something that can be asked where no answer is known. So a reward here gets neither gold
nor verdicts nor any column of the data, which may have the answer under another name.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from data import Problem
from exam import Answer
from prompts import render_prompt
from rewards import RewardSet, parse_rewards, required_columns
from rewards.scorer import Scorer

# All that they are told, besides what they may log.
TOLD = ("prompts", "questions", "completion_ids", "group_size", "max_completion_tokens")
LOGGING = ("log_metric", "log_extra")


def parse_choosers(spec: Mapping[str, float]) -> RewardSet:
    """The rewards that a configuration names, as `rewards.parse_rewards` reads them.

    Raises:
        ValueError: as there; or one needs the answer, or a column of the data.
    """
    reward_set = parse_rewards(spec)
    for reward in reward_set.rewards:
        missing = [name for name in required_columns(reward) if name not in TOLD + LOGGING]
        missing += ["correct"] if reward.options.get("only_correct") is True else []
        if missing:
            raise ValueError(
                f"rewards: {reward.name!r} needs {' and '.join(missing)}, and what chooses among samples "
                f"must not know the answer; allowed: rewards that need nothing but {', '.join(TOLD)}"
            )
    return reward_set


def hand_in(
    scorer: Scorer, tokenizer: Any, problem: Problem, answers: Sequence[Answer], max_completion_tokens: int
) -> None:
    """Hand a problem's answers to the scorer; its results' totals are what each earns.

    Args:
        scorer: of `parse_choosers`' rewards.
        tokenizer: of the model; a completion's tokens are those of its text, read again.
        problem: that was asked.
        answers: to it.
        max_completion_tokens: the limit under which they were given.

    Raises:
        RewardError: a reward broke its promise, for answers that were handed in before.
    """
    texts = [answer.completion for answer in answers]
    columns = {
        "prompts": [render_prompt(tokenizer, problem.question)] * len(texts),
        "questions": [problem.question] * len(texts),
        "completion_ids": [tokenizer.encode(text, add_special_tokens=False) for text in texts],
        "group_size": len(texts),
        "max_completion_tokens": max_completion_tokens,
    }
    scorer.submit(texts, columns)


def choose(answers: Sequence[Answer], earned: Sequence[float]) -> int:
    """The place of the answer that earned most among those that give an answer, the first of equals.

    Whether one does, the strict judge's extraction says: it reads the completion alone, and not the gold.
    """
    says = [answer.extracted is not None for answer in answers]
    return max(range(len(answers)), key=lambda place: (says[place], earned[place], -place))
