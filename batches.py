"""From sequences to tensors: one layout for every batch, and
micro-batches that change the memory but not the gradient.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from memory import is_out_of_memory, release_memory
from runs.config import RunStopped
from runs.signals import StepStopped, StopRequest
from sharding import is_sharded

# Numbers whose mean is taken in one exchange between processes: a copy of so many, and no more.
REDUCED_AT_ONCE = 25_000_000


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
    """Share rows out to micro-batches: the longest first, so that what does not fit shows at once.

    Rows of about the same length keep their order, so that those of one prompt stay together.

    Args:
        lengths: (prompt tokens, completion tokens) of every row.
        rows: the rows to use.
        token_budget: rows x (longest prompt + longest completion) at most; a single row may exceed it.
    """
    plan: list[list[int]] = []
    longest_prompt = longest_completion = 0
    for row in sorted(rows, key=lambda i: (-_size_class(sum(lengths[i])), i)):
        prompt, completion = max(longest_prompt, lengths[row][0]), max(longest_completion, lengths[row][1])
        if plan and (len(plan[-1]) + 1) * (prompt + completion) <= token_budget:
            plan[-1].append(row)
        else:
            plan.append([row])
            prompt, completion = lengths[row]
        longest_prompt, longest_completion = prompt, completion
    return plan


def _size_class(length: int) -> int:
    """Equal for lengths that differ by less than a fifth."""
    return round(4 * math.log2(max(length, 1)))


def token_budget(configured: int | None, device: torch.device) -> int:
    """Tokens of a part to begin with: as configured, or what suits the device."""
    return configured or (4096 if device.type == "cpu" else 16_384)


class MicroBatches:
    """Takes rows through the model a part at a time, in parts that memory holds.

    Attributes:
        accelerator: every process gets equally many parts.
        tokens: rows x longest row of a part at most; halved on all processes where memory runs out on one.
        stop: looked at between parts.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        tokens: int | None,
        memory: Sequence[int | None] | None = None,
        stop: StopRequest | None = None,
    ) -> None:
        """Begin with a budget.

        Args:
            accelerator: prepared or not.
            tokens: None for what suits the device: caches of a processor like small parts.
            memory: of another time; what was learned then counts if the budget was the same.
            stop: of the run; none never stops.
        """
        self.accelerator = accelerator
        self.stop = stop or StopRequest()
        self.configured = tokens
        self.tokens = token_budget(tokens, accelerator.device)
        if memory and memory[0] == tokens:
            self.tokens = memory[1]

    @property
    def memory(self) -> list[int | None]:
        """What a resume needs to split as before: sums of floats depend on it in their last bits."""
        return [self.configured, self.tokens]

    def run(
        self,
        lengths: Sequence[tuple[int, int]],
        rows: Sequence[int],
        work: Callable[[list[int], float], None],
        restart: Callable[[], None] = lambda: None,
    ) -> None:
        """Work through rows, the longest first.

        Args:
            lengths: (prompt tokens, completion tokens) of every row.
            rows: the rows to use.
            work: takes row numbers and a scale for their weights, 0 for the filler of a process that has less
                to do than others. It holds no collective but for every part.
            restart: drops what `work` has done; called before everything is done again in smaller parts.

        Raises:
            RunStopped: memory runs out on a single row, on whatever process, or anywhere in a sharded policy.
            StepStopped: some process was told to stop; what `work` has done is dropped.
        """
        while True:
            plan = plan_micro_batches(lengths, rows, self.tokens)
            count = max(1, *gather_object([len(plan)]))
            shortest = min(range(len(lengths)), key=lambda i: sum(lengths[i]))
            most = max((len(part) for part in plan), default=1)
            ran_out = False
            try:
                for index in range(count):
                    if self._is_told_to_stop():
                        break
                    part, scale = (plan[index], 1.0) if index < len(plan) else ([shortest], 0.0)
                    work(part, scale)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if is_sharded(self.accelerator):
                    raise RunStopped(
                        "memory ran out in a sharded update, which no process can do again alone; give "
                        f"--micro_batch_tokens {max(1, self.tokens // 2)}"
                    ) from error
                ran_out = True
            everyone = gather_object([(self.stop.signal, ran_out, most)])
            if any(signal for signal, _, _ in everyone):
                restart()
                raise StepStopped
            if not any(out for _, out, _ in everyone):
                return
            restart()
            release_memory()
            if max(rows_at_once for _, _, rows_at_once in everyone) == 1:
                raise RunStopped(
                    f"memory ran out on a single sequence of up to {max(map(sum, lengths))} tokens; give "
                    "--gradient_checkpointing true; or begin another run from the last checkpoint (--model, "
                    "and an --output of its own) with a smaller --max_completion_tokens or --lora_rank 16"
                )
            # Half of what was tried: a budget above the longest part would be tried again as it is.
            longest = max(sum(lengths[row]) for row in rows) if rows else 1
            self.tokens = max(1, min(self.tokens, most * longest) // 2)
            self.tokens = min(gather_object([self.tokens]))

    def _is_told_to_stop(self) -> bool:
        """Where processes meet in every part, none leaves before another does."""
        return self.stop.agree() if is_sharded(self.accelerator) else self.stop.signal is not None


@contextmanager
def averaged_gradients(accelerator: Accelerator, policy: nn.Module) -> Iterator[None]:
    """Let gradients gather, and average them over all processes.

    Processes meet once, when all have come through: one that runs out of memory would leave the others
    waiting for it. Where they hold parts of the policy, they meet in every block of every part anyway.
    """
    if is_sharded(accelerator):
        yield
        return
    with accelerator.no_sync(policy):
        yield
    _reduce_gradients(accelerator, policy)


def _reduce_gradients(accelerator: Accelerator, policy: nn.Module) -> None:
    """Average gradients that were taken without synchronising, over all processes, some at a time."""
    if accelerator.num_processes == 1:
        return
    gradients = [p.grad for p in policy.parameters() if p.grad is not None]
    while gradients:
        some = [gradients.pop()]
        while gradients and sum(g.numel() for g in some) + gradients[-1].numel() <= REDUCED_AT_ONCE:
            some.append(gradients.pop())
        whole = accelerator.reduce(torch.cat([g.flatten() for g in some]), "mean")
        for gradient, mean in zip(some, whole.split([g.numel() for g in some]), strict=True):
            gradient.copy_(mean.view_as(gradient))
