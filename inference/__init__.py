"""Inference: the types that every engine and every caller
share, free of torch so that a Mac without it imports them.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen, and what is noted of it.

    Attributes:
        max_completion_tokens: tokens per completion at most, the EOS included.
        temperature: divides the logits; 0 is greedy.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches this; 1 keeps all.
        min_p: keep tokens at least this share as likely as the likeliest; 0 keeps all.
        self_certainty: measure it; see `Completion`.
    """

    max_completion_tokens: int = 512
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    self_certainty: bool = False

    def __post_init__(self) -> None:
        """Refuse what no sampler can do, naming the field."""
        checks = {
            "max_completion_tokens": (self.max_completion_tokens >= 1, ">= 1"),
            "temperature": (self.temperature >= 0, ">= 0 (0 is greedy)"),
            "top_k": (self.top_k >= 0, ">= 0 (0 keeps every token)"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1] (1 keeps every token)"),
            "min_p": (0 <= self.min_p < 1, "in [0, 1) (0 keeps every token)"),
        }
        for name, (holds, allowed) in checks.items():
            if not holds:
                raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Completion:
    """One sampled completion.

    Attributes:
        token_ids: the sampled tokens; the EOS is among them where the model gave one.
        logprobs: of each token, under the distribution it was drawn from (temperature and kept set included);
            for greedy
            decoding, under temperature 1.
        finish_reason: "stop" (EOS), "length" (the limit) or "cancelled".
        self_certainty: KL divergence from the uniform distribution to the model's own (temperature 1, nothing
            cut), the mean over the tokens, in nats; None where it was not asked for, or cannot be measured.
            Source: arXiv 2502.18581.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    self_certainty: float | None = None


@dataclass(frozen=True)
class StreamedToken:
    """One token of a stream.

    Attributes:
        token_id: the token.
        logprob: see `Completion`; 0 where it was not drawn.
        finish_reason: set on the last.
        forced: it was put in the model's mouth; see `inference.search.budget_stream`.
    """

    token_id: int
    logprob: float
    finish_reason: FinishReason | None
    forced: bool = False


class NextToken(NamedTuple):
    """A token that may come next, its log-probability under the model itself, and whether it is an EOS."""

    token_id: int
    logprob: float
    stops: bool


def row_keys(seed: Sequence[int], prompts: int, n: int = 1, first_prompt: int = 0) -> list[tuple[int, ...]]:
    """What the random numbers of each completion are keyed by, (*seed, prompt, sample), in prompt order; see
    `Engine.generate`.
    """
    return [(*seed, first_prompt + prompt, sample) for prompt in range(prompts) for sample in range(n)]


class Engine(Protocol):
    """Tokens in, tokens out. An engine knows nothing of rewards, data or losses."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        params: SamplingParams,
        seed: Sequence[int],
        first_prompt: int = 0,
        on_completion: Callable[[int, int, Completion], None] | None = None,
    ) -> list[list[Completion]]:
        """Sample `n` completions of each prompt.

        Args:
            prompts: token ids, one list a prompt.
            n: completions per prompt, the group size.
            params: see `SamplingParams`.
            seed: integers; the random numbers of a completion are keyed by (*seed, prompt, sample), so that
                they depend
                neither on the batch around it nor on the number of processes.
            first_prompt: the number of the first prompt in the whole batch, of which this call may be one
                process' share.
            on_completion: called with (prompt, sample, completion) as each one finishes, in any order.

        Returns:
            One list of `n` completions a prompt, in prompt order.
        """
        ...

    def stream(
        self, prompt: Sequence[int], params: SamplingParams, seed: Sequence[int]
    ) -> Iterator[StreamedToken]:
        """Sample one completion token by token; closing the iterator stops the computation."""
        ...

    def stream_group(
        self, prompt: Sequence[int], n: int, params: SamplingParams, seed: Sequence[int]
    ) -> Iterator[list[tuple[int, StreamedToken]]]:
        """Sample the `n` completions that `generate` gives of a prompt, a step at a time: (sample, token) of
        those that have grown by it. Closing the iterator stops the computation of all.
        """
        ...


class BranchingEngine(Engine, Protocol):
    """An engine whose rows may go on in several ways, which beam search needs."""

    def branch(
        self, prompt: Sequence[int], rows: int, limit: int
    ) -> Generator[list[list[NextToken]], Sequence[tuple[int, int]], None]:
        """Grow rows of one prompt, a token at a time, as the caller says; there is one row at first.

        Yields for each row its likeliest next tokens, likeliest first: all EOS that are among them and, where
        the vocabulary has so many, `rows` others. Is sent (row, token) pairs, at most `rows`: the rows to go
        on with. Closing it stops the computation.

        Args:
            prompt: token ids.
            rows: that grow side by side at most.
            limit: tokens of a row at most.
        """
        ...
