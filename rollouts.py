"""What a rollout is: groups of completions with their rewards, as tensors, in numbers and in lines."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from batches import pad_batch
from data import Problem
from inference import Completion, Engine, SamplingParams
from memory import is_out_of_memory
from prompts import AnswerStyle, answer_style, completion_prefix, parse_completion, render_prompt
from rewards import RewardError, Scores
from rewards.scorer import Scorer


@dataclass(frozen=True)
class Group:
    """The completions of one problem.

    Attributes:
        number: of the prompt among all that the step rolled out, on all processes.
        problem: what was asked.
        prompt_ids: its tokens.
        completions: as sampled.
        texts: the completions decoded, a prefilled `<think>` included.
        scores: what the rewards say, one entry a completion.
        answer_style: how the prompt asks for the answer.
    """

    number: int
    problem: Problem
    prompt_ids: list[int]
    completions: list[Completion]
    texts: list[str]
    scores: Scores
    answer_style: AnswerStyle = "tags"

    @property
    def is_judged(self) -> bool:
        """The problem has an answer to be right or wrong by."""
        verdicts = zip(self.scores.correct, self.scores.undecided, strict=True)
        return any(correct is not None or undecided for correct, undecided in verdicts)

    @property
    def is_informative(self) -> bool:
        """Some are right and some wrong; where nothing is judged, some earn more than others."""
        values = [bool(correct) for correct in self.scores.correct] if self.is_judged else self.scores.total
        return max(values) != min(values)

    @property
    def has_signal(self) -> bool:
        """Some earned more than others: the group moves the policy."""
        return max(self.scores.total) != min(self.scores.total)


def roll_out(
    engine: Engine,
    tokenizer: Any,
    problems: list[Problem],
    scorer: Scorer,
    config: Any,
    step: int,
    first_prompt: int,
) -> list[Group]:
    """Sample a group of completions for each problem; each
    is scored as it is complete, while others still generate.

    Args:
        engine: samples with the policy as it is now.
        tokenizer: of the policy.
        problems: this process' share of the step's problems.
        scorer: scores whole groups.
        config: a `train_grpo.GRPOConfig`.
        step: keys the random numbers, with the seed.
        first_prompt: the number of the first problem among all that the step asks.

    Raises:
        RewardError: a reward broke its promise.
    """
    size = config.group_size
    prompts = [render_prompt(tokenizer, problem.question) for problem in problems]
    prompt_ids = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    params = SamplingParams(config.max_completion_tokens, config.temperature)
    groups: list[list[Completion | None]] = [[None] * size for _ in problems]
    texts: dict[int, list[str]] = {}  # of the groups handed in, in that order

    def take(prompt: int, sample: int, completion: Completion) -> None:
        group = groups[prompt]
        group[sample] = completion
        if None in group:
            return
        token_ids = [completion.token_ids for completion in group]
        prefix = completion_prefix(prompts[prompt])
        texts[prompt] = [
            prefix + text for text in tokenizer.batch_decode(token_ids, skip_special_tokens=True)
        ]
        columns = reward_columns(problems[prompt], prompts[prompt], token_ids, config, step)
        scorer.submit(texts[prompt], columns)

    engine.generate(prompt_ids, size, params, (config.seed, step), first_prompt, take)
    scores = dict(zip(texts, scorer.results(), strict=True))
    styles = [answer_style(prompt) for prompt in prompts]
    return [
        Group(first_prompt + i, problem, prompt_ids[i], groups[i], texts[i], scores[i], styles[i])
        for i, problem in enumerate(problems)
    ]


def try_roll_out(*arguments: Any) -> tuple[list[Group], str | None]:
    """As `roll_out`, but a reward's broken promise and a lack of memory are told, not raised.

    Returns:
        The groups, and why there are none; None where there are.
    """
    try:
        return roll_out(*arguments), None
    except RewardError as error:
        return [], str(error)
    except (RuntimeError, MemoryError) as error:  # the engine has tried with ever fewer rows
        if not is_out_of_memory(error):
            raise
        return [], (
            "memory ran out while sampling, one completion at a time; begin another run from the last "
            "checkpoint (--model, and an --output of its own) with a smaller --max_completion_tokens"
        )


def reward_columns(
    problem: Problem, prompt: str, completion_ids: list[list[int]], config: Any, step: int
) -> dict[str, Any]:
    """What reward functions are told of a group, besides its completions: see `rewards`."""
    of_problem = {**problem.columns, "questions": problem.question, "gold": problem.gold, "prompts": prompt}
    columns = {name: [value] * len(completion_ids) for name, value in of_problem.items()}
    return columns | {
        "completion_ids": completion_ids,
        "group_size": config.group_size,
        "max_completion_tokens": config.max_completion_tokens,
        "trainer_state": SimpleNamespace(global_step=step, max_steps=config.total_steps),
    }


@dataclass
class RolloutBatch:
    """One process' share of what is learned from: B =
    groups x group_size rows, a group's rows side by side.
    """

    groups: list[Group]
    lengths: list[tuple[int, int]]  # (prompt tokens, completion tokens) of every row
    # input_ids and attention_mask [B, P+T]; completion_mask, *_logprobs, values and returns [B, T]
    tensors: dict[str, Tensor]
    advantages: Tensor  # [B, T], zero until they are known

    def select(self, rows: list[int], device: torch.device) -> dict[str, Tensor]:
        """The tensors of some rows on a device, with the padding trimmed that these rows do not need."""
        longest_prompt = max(prompt for prompt, _ in self.lengths)
        first = longest_prompt - max(self.lengths[row][0] for row in rows)
        length = max(self.lengths[row][1] for row in rows)
        cut = {"input_ids": slice(first, longest_prompt + length)}
        cut["attention_mask"] = cut["input_ids"]
        return {
            name: tensor[rows, cut.get(name, slice(length))].to(device)
            for name, tensor in self.tensors.items()
        }


def collate(groups: list[Group], pad_token_id: int, drop_truncated: bool = False) -> RolloutBatch:
    """Lay groups out as tensors.

    Args:
        groups: of this process, all of one size.
        pad_token_id: the filler; masks never look at it.
        drop_truncated: take completions that were cut off at the limit out of the loss and its divisors.
    """
    pairs = [(group.prompt_ids, completion) for group in groups for completion in group.completions]
    tensors = pad_batch([p for p, _ in pairs], [c.token_ids for _, c in pairs], pad_token_id)
    tensors["sampling_logprobs"] = torch.zeros(tensors["completion_mask"].shape)
    for row, (_, completion) in enumerate(pairs):
        tensors["sampling_logprobs"][row, : len(completion.logprobs)] = torch.tensor(completion.logprobs)
        if drop_truncated and completion.finish_reason == "length":
            tensors["completion_mask"][row] = False
    lengths = [(len(p), len(c.token_ids)) for p, c in pairs]
    return RolloutBatch(groups, lengths, tensors, torch.zeros(tensors["completion_mask"].shape))


# ------------------------------------------------------------------------------------------------------------
# Telling


def count(groups: Sequence[Group]) -> dict[str, Any]:
    """What one process counts of its groups, to be added up over all of them."""
    totals = [total for group in groups for total in group.scores.total]
    parts: dict[str, list[float]] = {}
    for group in groups:
        for name, values in group.scores.parts.items():
            parts.setdefault(name, []).extend(value for value in values if value is not None)
    return {
        "rows": len(totals),
        "totals": totals,
        "correct": sum(bool(correct) for group in groups for correct in group.scores.correct),
        "undecided": sum(undecided for group in groups for undecided in group.scores.undecided),
        "well_formed": sum(
            parse_completion(text, group.answer_style).well_formed for group in groups for text in group.texts
        ),
        "tokens": sum(len(c.token_ids) for group in groups for c in group.completions),
        "duplicates": sum(len(group.texts) - len(set(group.texts)) for group in groups),
        "truncated": sum(c.finish_reason == "length" for group in groups for c in group.completions),
        "groups": len(groups),
        "same": sum(not group.has_signal for group in groups),
        "parts": parts,
        "logged": [group.scores.metrics for group in groups],
    }


def rollout_metrics(counts: list[dict[str, Any]]) -> dict[str, float]:
    """The rollout's metrics from every process' count; shares are in [0, 1].

    `rewards/NAME` is the unweighted mean of a reward over the completions that it applies to; beside it and
    beside `train/reward` stand `/min`, `/max` and `/std`. `logged/...` are the means of what reward functions
    logged.
    """

    def total(name: str) -> float:
        return sum(count[name] for count in counts)

    metrics = {
        **spread("train/reward", [value for count in counts for value in count["totals"]]),
        "train/accuracy": total("correct") / total("rows"),
        "train/format_rate": total("well_formed") / total("rows"),
        "rewards/undecided_fraction": total("undecided") / total("rows"),
        "rollout/completions": total("rows"),
        "rollout/completion_tokens": total("tokens") / total("rows"),
        "rollout/truncated_fraction": total("truncated") / total("rows"),
        "rollout/duplicate_fraction": total("duplicates") / total("rows"),
        "rollout/zero_variance_groups": total("same") / total("groups"),
    }
    for name in counts[0]["parts"]:
        values = [value for count in counts for value in count["parts"][name]]
        metrics |= spread(f"rewards/{name}", values) if values else {f"rewards/{name}": 0.0}
    logged: dict[str, list[float]] = {}
    for of_group in (of_group for count in counts for of_group in count["logged"]):
        for name, values in of_group.items():
            logged.setdefault(name, []).extend(values)
    return metrics | {f"logged/{name}": fmean(values) for name, values in logged.items()}


def spread(key: str, values: Sequence[float]) -> dict[str, float]:
    """Metrics of a reward: its mean under `key`, and its least, greatest and (population's) deviation."""
    figures = {"min": min(values), "max": max(values), "std": pstdev(values)}
    return {key: fmean(values)} | {f"{key}/{name}": value for name, value in figures.items()}


def rollout_rows(groups: Sequence[Group], batch: RolloutBatch, step: int) -> list[dict[str, Any]]:
    """The lines of `rollouts.jsonl`: every completion, with what it earned and why.

    Args:
        groups: all that were sampled.
        batch: those that are learned from, with the mean advantage of their tokens; the others' is null.
        step: steps done.
    """
    counted = batch.tensors["completion_mask"].sum(1).clamp(min=1)
    means = iter((batch.advantages.sum(1) / counted).tolist())
    learned = {id(group): [next(means) for _ in group.texts] for group in batch.groups}
    return [
        {
            "step": step,
            "group": group.number,
            "question": group.problem.question,
            "gold": group.problem.gold,
            "completion": group.texts[i],
            "reward": group.scores.total[i],
            "rewards": {name: values[i] for name, values in group.scores.parts.items()},
            "correct": group.scores.correct[i],
            "extracted": group.scores.extracted[i],
            "advantage": learned[id(group)][i] if id(group) in learned else None,
            "tokens": len(group.completions[i].token_ids),
            "finish_reason": group.completions[i].finish_reason,
            "logged": {name: values[i] for name, values in group.scores.extra.items()},
        }
        for group in groups
        for i in range(len(group.texts))
    ]
