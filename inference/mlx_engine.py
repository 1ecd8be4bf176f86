"""The engine of Apple's machines: the same protocol as `TorchEngine` over mlx-lm, without torch.

mlx-lm computes: its models, its batches with whoever ends leaving at once, its caches. Ours is what the
protocol promises: who draws which random number, and when the computation stops.
"""

import atexit
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from functools import cache
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx import nn
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p
from mlx_lm.utils import maybe_set_recommended_wired_limit

from inference import Completion, FinishReason, NextToken, SamplingParams, StreamedToken, row_keys
from inference.formats import require_whole

Result = TypeVar("Result")


def load_engine(name: str, tokenizer: Any) -> tuple["MLXEngine", dict[str, Any]]:
    """A model of a folder or a Hub name, in mlx-lm's format or Hugging Face's, and its configuration.

    Args:
        name: what mlx-lm reads.
        tokenizer: of the model (`tokenizer.load_tokenizer`); tells what ends a completion.

    Raises:
        FileNotFoundError: no weights there.
        ValueError: an adapter alone, or an architecture that mlx-lm has not.
    """
    require_whole(name)
    model, _, config = on_mlx_thread(lambda: mlx_lm.load(name, return_config=True)).result()
    stop = config.get("eos_token_id")  # the generation configuration's, where it has one
    stop = {tokenizer.eos_token_id, *(stop if isinstance(stop, list) else [stop])} - {None}
    return MLXEngine(model, stop), config


class MLXEngine:
    """Samples from a model of mlx-lm; see `inference.Engine`.

    Where a chain outgrows a window, its first tokens, on which attention rests, and its newest stay in the
    cache (StreamingLLM, arXiv 2309.17453). They keep the numbers of their places in the text, as mlx-lm has
    it, not in the cache.
    """

    def __init__(
        self, model: nn.Module, stop_token_ids: set[int], window: int | None = None, sinks: int = 4
    ) -> None:
        """Wrap a model.

        Args:
            model: of mlx-lm.
            stop_token_ids: each ends a completion.
            window: keep this many of the newest tokens in the cache and the `sinks`, for chains far beyond
                it; None keeps all.
            sinks: first tokens that stay beside the window.
        """
        self.model = model
        self.stop_token_ids = stop_token_ids
        self.sinks = sinks
        self.cache_tokens = None if window is None else sinks + window
        maybe_set_recommended_wired_limit()  # weights that nearly fill the memory stay in it

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        params: SamplingParams,
        seed: Sequence[int],
        first_prompt: int = 0,
        on_completion: Callable[[int, int, Completion], None] | None = None,
    ) -> list[list[Completion]]:
        """Sample `n` completions of each prompt; see `inference.Engine.generate`.

        Raises:
            ValueError: a prompt does not fit into the window.
        """
        keys = row_keys(seed, len(prompts), n, first_prompt)
        results: list[list[Any]] = [[None] * n for _ in prompts]
        with closing(_in_turn(self._completions(prompts, n, params, keys))) as steps:
            for ended in steps:
                for row, completion in ended:
                    results[row // n][row % n] = completion
                    if on_completion:
                        on_completion(row // n, row % n, completion)
        return results

    def stream(
        self, prompt: Sequence[int], params: SamplingParams, seed: Sequence[int]
    ) -> Iterator[StreamedToken]:
        """Sample one completion token by token; nothing is asked for after the iterator is closed."""
        return _in_turn(self._tokens(prompt, params, (*seed, 0, 0)))

    def stream_group(
        self, prompt: Sequence[int], n: int, params: SamplingParams, seed: Sequence[int]
    ) -> Iterator[list[tuple[int, StreamedToken]]]:
        """Sample completions of a prompt side by side; see `inference.Engine.stream_group`. Beyond a window
        they come one after another.
        """
        return _in_turn(self._group_tokens(prompt, n, params, row_keys(seed, 1, n)))

    def branch(
        self, prompt: Sequence[int], rows: int, limit: int
    ) -> Generator[list[list[NextToken]], Sequence[tuple[int, int]], None]:
        """Grow rows of one prompt as the caller says; see `inference.BranchingEngine.branch`."""
        steps = self._branch(prompt, rows)
        try:
            likeliest = on_mlx_thread(next, steps).result()
            while True:
                chosen = yield likeliest
                likeliest = on_mlx_thread(steps.send, chosen).result()
        finally:
            on_mlx_thread(steps.close)

    def _branch(
        self, prompt: Sequence[int], rows: int
    ) -> Generator[list[list[NextToken]], Sequence[tuple[int, int]], None]:
        cache = make_prompt_cache(self.model)
        tokens = mx.array([prompt])
        while True:
            chosen = yield self._likeliest(self.model(tokens, cache=cache)[:, -1], rows)
            parents, tokens = (mx.array(column) for column in zip(*chosen, strict=True))
            tokens = tokens[:, None]
            for layer in cache:
                layer.keys, layer.values = layer.keys[parents], layer.values[parents]

    def _likeliest(self, logits: mx.array, rows: int) -> list[list[NextToken]]:
        logits = logits.astype(mx.float32)
        count = min(rows + len(self.stop_token_ids), logits.shape[-1])
        tokens = mx.argpartition(-logits, kth=count - 1, axis=-1)[:, :count]
        # By logits: their log-probabilities may round to the same number.
        order = mx.argsort(-mx.take_along_axis(logits, tokens, axis=-1), axis=-1)
        tokens = mx.take_along_axis(tokens, order, axis=-1)
        logprobs = mx.take_along_axis(log_softmax(logits), tokens, axis=-1)
        stop = self.stop_token_ids
        pairs = zip(tokens.tolist(), logprobs.tolist(), strict=True)
        return [[NextToken(t, p, t in stop) for t, p in zip(*pair, strict=True)] for pair in pairs]

    def _tokens(
        self, prompt: Sequence[int], params: SamplingParams, key: tuple[int, ...]
    ) -> Iterator[StreamedToken]:
        for row in self._grow_alone(Row(0, params, key), prompt, params):
            yield row.newest()

    def _group_tokens(
        self, prompt: Sequence[int], n: int, params: SamplingParams, keys: list[tuple[int, ...]]
    ) -> Iterator[list[tuple[int, StreamedToken]]]:
        for grown in self._decode([prompt], n, params, keys):
            yield [(row.number, row.newest()) for row in grown]

    def _completions(
        self, prompts: Sequence[Sequence[int]], n: int, params: SamplingParams, keys: list[tuple[int, ...]]
    ) -> Iterator[list[tuple[int, Completion]]]:
        for grown in self._decode(prompts, n, params, keys):
            yield [(row.number, row.completion()) for row in grown if row.finish_reason]

    def _grow_alone(self, row: "Row", prompt: Sequence[int], params: SamplingParams) -> Iterator["Row"]:
        """Yield a row with every token that it gets."""
        limit = params.max_completion_tokens
        cache = self._make_cache(len(prompt), limit)
        steps = generate_step(
            mx.array(prompt), self.model, max_tokens=limit, sampler=row.sampler, prompt_cache=cache
        )
        with closing(steps):
            for count, (token, _) in enumerate(steps, start=1):
                mx.eval(row.take(token, self._finish_reason(token, count, limit)))
                yield row
                if row.finish_reason:
                    return

    def _finish_reason(self, token: int, count: int, limit: int) -> FinishReason | None:
        return "stop" if token in self.stop_token_ids else "length" if count == limit else None

    def _make_cache(self, prompt_tokens: int, limit: int) -> list[Any]:
        cache = make_prompt_cache(self.model)
        if not self._outgrows(prompt_tokens, limit):
            return cache
        size = self.cache_tokens
        if prompt_tokens >= size:
            # mlx-lm hides the first tokens from a prompt that rolls through the window.
            raise ValueError(
                f"a prompt of {prompt_tokens} tokens does not fit into {self.sinks} sinks and a window of "
                f"{size - self.sinks}; give a larger window"
            )
        # Layers that have a window of their own keep it.
        return [RotatingKVCache(size, self.sinks) if type(layer) is KVCache else layer for layer in cache]

    def _outgrows(self, prompt_tokens: int, limit: int) -> bool:
        return self.cache_tokens is not None and prompt_tokens + limit > self.cache_tokens

    def _decode(
        self, prompts: Sequence[Sequence[int]], n: int, params: SamplingParams, keys: list[tuple[int, ...]]
    ) -> Iterator[list["Row"]]:
        """Yield, a step at a time, the rows that have grown; a row's number is prompt x n + sample."""
        limit = params.max_completion_tokens
        rows = [Row(number, params, key) for number, key in enumerate(keys)]
        together, alone = [], []
        for row in rows:
            (alone if self._outgrows(len(prompts[row.number // n]), limit) else together).append(row)
        if together:
            yield from self._grow_together(together, [prompts[row.number // n] for row in together], limit)
        for row in alone:  # mlx-lm's batches know no sinks
            yield from ([row] for row in self._grow_alone(row, prompts[row.number // n], params))

    def _grow_together(
        self, rows: list["Row"], prompts: list[Sequence[int]], limit: int
    ) -> Iterator[list["Row"]]:
        generator = BatchGenerator(self.model, stop_tokens=[[token] for token in self.stop_token_ids])
        with closing(generator):
            samplers = [row.sampler for row in rows]
            uids = generator.insert(
                [list(prompt) for prompt in prompts], [limit] * len(rows), samplers=samplers
            )
            row_of = dict(zip(uids, rows, strict=True))
            waiting = len(rows)
            while waiting:
                responses = generator.next_generated()
                # What is computed lets go of the logits that it came from.
                mx.eval([row_of[r.uid].take(r.token, r.finish_reason) for r in responses])
                waiting -= sum(response.finish_reason is not None for response in responses)
                yield [row_of[response.uid] for response in responses]


class Row:
    """A completion as it grows.

    Attributes:
        number: of the completion.
        sampler: chooses its tokens.
        finish_reason: None until its last.
    """

    def __init__(self, number: int, params: SamplingParams, key: tuple[int, ...]) -> None:
        """Begin it; see `RowSampler`."""
        self.number, self.sampler = number, RowSampler(params, key)
        self.finish_reason: FinishReason | None = None
        self._ids: list[int] = []

    def take(self, token: int, finish_reason: FinishReason | None) -> list[mx.array]:
        """Take its next token in; returns what is kept of it, to be computed."""
        self._ids.append(token)
        self.finish_reason = finish_reason
        return self.sampler.noted(len(self._ids) - 1)

    def newest(self) -> StreamedToken:
        """Its newest token."""
        place = len(self._ids) - 1
        return StreamedToken(self._ids[place], self.sampler.logprobs[place].item(), self.finish_reason)

    def completion(self) -> Completion:
        """All of it."""
        count = len(self._ids)
        logprobs = [logprob.item() for logprob in self.sampler.logprobs[:count]]
        return Completion(self._ids, logprobs, self.finish_reason, self.sampler.certainty(count))


# ------------------------------------------------------------------------------------------------------------
# One thread for all of MLX
#
# MLX ties what it has not computed yet to the thread that asked for it, and a page asks from many. And where
# a thread ends, or the process, before its streams are cleared, the process may abort (ml-explore/mlx, pull
# requests 3395 and 4110). So there is one thread, which never ends.


@cache
def _tasks() -> SimpleQueue:
    tasks: SimpleQueue = SimpleQueue()

    def work() -> None:
        while True:
            future, function, arguments = tasks.get()
            try:
                future.set_result(function(*arguments))
            except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
                future.set_exception(error)
            del future, function, arguments

    Thread(target=work, name="mlx", daemon=True).start()
    atexit.register(lambda: on_mlx_thread(mx.clear_streams).result())
    return tasks


def on_mlx_thread(function: Callable[..., Result], *arguments: Any) -> "Future[Result]":
    """Call a function on the thread that all engines share; calls keep their order."""
    future: Future[Result] = Future()
    _tasks().put((future, function, arguments))
    return future


def _in_turn(steps: Iterator[Result]) -> Iterator[Result]:
    """What an iterator yields; between two steps others may take theirs."""
    try:
        while (step := on_mlx_thread(next, steps, None).result()) is not None:
            yield step
    finally:
        on_mlx_thread(steps.close)


# ------------------------------------------------------------------------------------------------------------
# Choosing a token


class RowSampler:
    """Chooses the tokens of one completion by random numbers of its own, whatever rows stand beside it.

    Attributes:
        logprobs: `[1, 1]` of each token, under the distribution it was drawn from; not yet computed.
        certainties: `[1]` of each token, where they are asked for.
    """

    def __init__(self, params: SamplingParams, key: Sequence[int]) -> None:
        """Begin a completion.

        Args:
            params: temperature 0 takes the likeliest token.
            key: of its random numbers, (*seed, prompt, sample).
        """
        self.logprobs: list[mx.array] = []
        self.certainties: list[mx.array] = []
        self._params = params
        seed = np.random.SeedSequence(tuple(key)).generate_state(1, np.uint64)[0]
        # One more than a completion has: mlx-lm computes a token ahead.
        self._keys = mx.random.split(mx.random.key(int(seed)), params.max_completion_tokens + 1)

    def __call__(self, logits: mx.array) -> mx.array:
        """The next token `[1]`, from logits `[1, V]`."""
        if self._params.self_certainty:
            uniform = -math.log(logits.shape[-1])
            self.certainties.append(uniform - log_softmax(logits.astype(mx.float32)).mean(-1))
        logprobs = warp(logits, self._params)
        if self._params.temperature == 0:
            token = logprobs.argmax(-1)
        else:
            token = mx.random.categorical(logprobs, key=self._keys[len(self.logprobs)])
        self.logprobs.append(mx.take_along_axis(logprobs, token[:, None], axis=-1))
        return token

    def noted(self, place: int) -> list[mx.array]:
        """What is kept of a token."""
        return [values[place] for values in (self.logprobs, self.certainties) if values]

    def certainty(self, count: int) -> float | None:
        """The self-certainty of the first tokens, None where it was not asked for."""
        return sum(value.item() for value in self.certainties[:count]) / count if self.certainties else None


def warp(logits: mx.array, params: SamplingParams) -> mx.array:
    """Log-probabilities `[B, V]` float32 of the distribution that a token is drawn from.

    Temperature first, then top-k, top-p and min-p, each on what the one before kept, as in
    `inference.sampling`. Temperature 0 (greedy) is scored under temperature 1.
    """
    logits = logits.astype(mx.float32)
    if params.temperature not in (0.0, 1.0):
        logits = logits / params.temperature
    if params.top_k and params.top_k < logits.shape[-1]:
        logits = apply_top_k(logits, params.top_k)
    if params.top_p < 1.0:
        logits = apply_top_p(log_softmax(logits), params.top_p)
    if params.min_p > 0.0:
        logits = apply_min_p(logits, params.min_p)
    return log_softmax(logits)


def log_softmax(logits: mx.array) -> mx.array:
    """Log-probabilities `[..., V]`."""
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
