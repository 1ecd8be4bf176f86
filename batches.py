"""From sequences to tensors: one layout for every batch, and
micro-batches that change the memory but not the gradient.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn


def pad_batch(
    prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], pad_token_id: int
) -> dict[str, Tensor]:
    """Lay out sequences: prompts padded on the left, completions
    on the right, so that column P starts every completion.

    Returns:
        `input_ids [B, P+T]` and `attention_mask [B, P+T]` (int64), `completion_mask [B, T]` (bool, True
        counts). The masks
        come from the lengths, never from token ids: an EOS counts even where it is also the padding.
    """
    size = len(prompt_ids)
    longest_prompt = max(len(ids) for ids in prompt_ids)
    longest_completion = max(len(ids) for ids in completion_ids)
    input_ids = torch.full((size, longest_prompt + longest_completion), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    completion_mask = torch.zeros((size, longest_completion), dtype=torch.bool)
    for row, (prompt, completion) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
        start, end = longest_prompt - len(prompt), longest_prompt + len(completion)
        input_ids[row, start:end] = torch.tensor([*prompt, *completion])
        attention_mask[row, start:end] = 1
        completion_mask[row, : len(completion)] = True
    return {"input_ids": input_ids, "attention_mask": attention_mask, "completion_mask": completion_mask}


def plan_micro_batches(
    lengths: Sequence[tuple[int, int]], rows: Sequence[int], token_budget: int
) -> list[list[int]]:
    """Share rows out to micro-batches: longest first, so that
    what does not fit shows at once; neighbours in length.

    Args:
        lengths: (prompt tokens, completion tokens) of every row.
        rows: the rows to use.
        token_budget: rows x (longest prompt + longest completion) at most; a single row may exceed it.
    """
    plan: list[list[int]] = []
    longest_prompt = longest_completion = 0
    for row in sorted(rows, key=lambda i: (-sum(lengths[i]), i)):
        prompt, completion = max(longest_prompt, lengths[row][0]), max(longest_completion, lengths[row][1])
        if plan and (len(plan[-1]) + 1) * (prompt + completion) <= token_budget:
            plan[-1].append(row)
        else:
            plan.append([row])
            prompt, completion = lengths[row]
        longest_prompt, longest_completion = prompt, completion
    return plan


def micro_batches(
    accelerator: Accelerator,
    policy: nn.Module,
    lengths: Sequence[tuple[int, int]],
    rows: Sequence[int],
    token_budget: int,
) -> Iterator[tuple[list[int], float, AbstractContextManager]]:
    """The micro-batches of one update; every process gets
    equally many and synchronises gradients on the last.

    Yields:
        Row numbers; a scale for their weights (0 for the filler of a process that has less to do); the
        context for the
        forward and backward pass.
    """
    plan = plan_micro_batches(lengths, rows, token_budget)
    count = max(1, *gather_object([len(plan)]))
    shortest = min(range(len(lengths)), key=lambda i: sum(lengths[i]))
    for index in range(count):
        is_filler = index >= len(plan)
        context = nullcontext() if index == count - 1 else accelerator.no_sync(policy)
        yield ([shortest], 0.0, context) if is_filler else (plan[index], 1.0, context)
