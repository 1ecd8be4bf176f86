"""What a rollout is: groups of completions with their
rewards, laid out as tensors, and told in numbers and lines.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from batches import pad_batch
from data import Problem
from inference import Completion, Engine, SamplingParams
from prompts import completion_prefix, encode_prompt, parse_completion, render_prompt
from rewards import RewardSet, Scores, score


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
    """

    number: int
    problem: Problem
    prompt_ids: list[int]
    completions: list[Completion]
    texts: list[str]
    scores: Scores

    @property
    def is_informative(self) -> bool:
        """Some are right and some wrong; where nothing is judged, some earn more than others."""
        right = [bool(correct) for correct in self.scores.correct]
        judged = any(correct is not None for correct in self.scores.correct)
        values = right if judged else self.scores.total
        return max(values) != min(values)

    @property
    def has_signal(self) -> bool:
        """Some earned more than others: the group moves the policy."""
        return max(self.scores.total) != min(self.scores.total)


def roll_out(
    engine: Engine,
    tokenizer: Any,
    problems: list[Problem],
    reward_set: RewardSet,
    config: Any,
    step: int,
    first_prompt: int,
) -> list[Group]:
    """Sample a group of completions for each problem and score them.

    Args:
        engine: samples with the policy as it is now.
        tokenizer: of the policy.
        problems: this process' share of the step's problems.
        reward_set: scores whole groups.
        config: a `train_grpo.GRPOConfig`.
        step: keys the random numbers, with the seed.
        first_prompt: the number of the first problem among all that the step asks.
    """
    size = config.group_size
    prompts = [render_prompt(tokenizer, problem.question) for problem in problems]
    prompt_ids = [encode_prompt(tokenizer, problem.question) for problem in problems]
    params = SamplingParams(config.max_completion_tokens, config.temperature)
    sampled = engine.generate(prompt_ids, size, params, (config.seed, step), first_prompt)

    def each(values: list[Any]) -> list[Any]:
        return [value for value in values for _ in range(size)]

    token_ids = [completion.token_ids for completions in sampled for completion in completions]
    decoded = tokenizer.batch_decode(token_ids, skip_special_tokens=True)
    texts = [completion_prefix(prompt) + text for prompt, text in zip(each(prompts), decoded, strict=True)]
    names = sorted({name for problem in problems for name in problem.columns})
    columns = {name: each([problem.columns.get(name) for problem in problems]) for name in names}
    columns |= {
        "prompts": each(prompts),
        "completion_ids": token_ids,
        "gold": each([p.gold for p in problems]),
    }
    columns |= {"group_size": size, "max_completion_tokens": config.max_completion_tokens}
    scores = score(reward_set, texts, columns)
    return [
        Group(
            number=first_prompt + i,
            problem=problem,
            prompt_ids=prompt_ids[i],
            completions=sampled[i],
            texts=texts[i * size : (i + 1) * size],
            scores=slice_scores(scores, i * size, (i + 1) * size),
        )
        for i, problem in enumerate(problems)
    ]


def group_state(group: Group) -> dict[str, Any]:
    """A group as plain values, as far as an update reads it: what a checkpoint can hold."""
    return {
        "number": group.number,
        "prompt_ids": list(group.prompt_ids),
        "completions": [asdict(completion) for completion in group.completions],
        "texts": group.texts,
        "scores": asdict(group.scores),
    }


def restore_group(state: dict[str, Any]) -> Group:
    """The group of a `group_state`, without its question."""
    completions = [Completion(**completion) for completion in state["completions"]]
    scores = Scores(**state["scores"])
    return Group(state["number"], Problem("", None), state["prompt_ids"], completions, state["texts"], scores)


def slice_scores(scores: Scores, start: int, stop: int) -> Scores:
    """The scores of some neighbours."""
    return Scores(
        total=scores.total[start:stop],
        parts={name: values[start:stop] for name, values in scores.parts.items()},
        correct=scores.correct[start:stop],
        extracted=scores.extracted[start:stop],
        undecided=scores.undecided[start:stop],
    )


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
        "reward": sum(totals),
        "correct": sum(bool(correct) for group in groups for correct in group.scores.correct),
        "undecided": sum(undecided for group in groups for undecided in group.scores.undecided),
        "well_formed": sum(parse_completion(text).well_formed for group in groups for text in group.texts),
        "tokens": sum(len(c.token_ids) for group in groups for c in group.completions),
        "truncated": sum(c.finish_reason == "length" for group in groups for c in group.completions),
        "groups": len(groups),
        "same": sum(not group.has_signal for group in groups),
        "parts": {name: (sum(values), len(values)) for name, values in parts.items()},
    }


def rollout_metrics(counts: list[dict[str, Any]]) -> dict[str, float]:
    """The rollout's metrics from every process' count;
    shares are in [0, 1], `rewards/...` are unweighted means.
    """

    def total(name: str) -> float:
        return sum(count[name] for count in counts)

    metrics = {
        "train/reward": total("reward") / total("rows"),
        "train/accuracy": total("correct") / total("rows"),
        "train/format_rate": total("well_formed") / total("rows"),
        "rewards/undecided_fraction": total("undecided") / total("rows"),
        "rollout/completions": total("rows"),
        "rollout/completion_tokens": total("tokens") / total("rows"),
        "rollout/truncated_fraction": total("truncated") / total("rows"),
        "rollout/zero_variance_groups": total("same") / total("groups"),
    }
    for name in counts[0]["parts"]:
        sums, sizes = zip(*(count["parts"][name] for count in counts), strict=True)
        metrics[f"rewards/{name}"] = sum(sums) / sum(sizes) if sum(sizes) else 0.0
    return metrics


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
        }
        for group in groups
        for i in range(len(group.texts))
    ]
