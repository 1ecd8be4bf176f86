"""What a rollout is: groups of completions with their rewards, laid out as tensors, and told in numbers and
lines.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batches import pad_batch
from data import Problem
from inference import Completion
from prompts import parse_completion
from rewards import Scores


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
    """One process' share of what is learned from: B = groups x group_size rows, a group's rows side by
    side.
    """

    groups: list[Group]
    lengths: list[tuple[int, int]]  # (prompt tokens, completion tokens) of every row
    tensors: dict[str, Tensor]  # input_ids and attention_mask [B, P+T]; completion_mask, *_logprobs [B, T]
    advantages: Tensor  # [B]

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


def collate(groups: list[Group], advantages: Tensor, counted: Tensor, pad_token_id: int) -> RolloutBatch:
    """Lay groups out as tensors.

    Args:
        groups: of this process, all of one size.
        advantages: `[B]`.
        counted: `[B]` bool; a completion that does not count leaves the loss and its divisors.
        pad_token_id: the filler; masks never look at it.
    """
    pairs = [(group.prompt_ids, completion) for group in groups for completion in group.completions]
    tensors = pad_batch([p for p, _ in pairs], [c.token_ids for _, c in pairs], pad_token_id)
    tensors["sampling_logprobs"] = torch.zeros(tensors["completion_mask"].shape)
    for row, (_, completion) in enumerate(pairs):
        tensors["sampling_logprobs"][row, : len(completion.logprobs)] = torch.tensor(completion.logprobs)
    tensors["completion_mask"] &= counted[:, None]
    return RolloutBatch(groups, [(len(p), len(c.token_ids)) for p, c in pairs], tensors, advantages)


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
        "same": sum(max(group.scores.total) == min(group.scores.total) for group in groups),
        "parts": {name: (sum(values), len(values)) for name, values in parts.items()},
    }


def rollout_metrics(counts: list[dict[str, Any]]) -> dict[str, float]:
    """The rollout's metrics from every process' count; shares are in [0, 1], `rewards/...` are unweighted
    means.
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
        batch: those that are learned from; the others' advantage is null.
        step: steps done.
    """
    advantages = iter(batch.advantages.tolist())
    learned = {group.number: [next(advantages) for _ in group.texts] for group in batch.groups}
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
            "advantage": learned[group.number][i] if group.number in learned else None,
            "tokens": len(group.completions[i].token_ids),
            "finish_reason": group.completions[i].finish_reason,
        }
        for group in groups
        for i in range(len(group.texts))
    ]
