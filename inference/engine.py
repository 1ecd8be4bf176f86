"""The rollout and serving engine: groups of completions from any Hugging Face causal language model.

A prompt is computed once for its group; a completion that ends leaves at once, and where more are asked for
than fit, the next takes its place. The weights are the trainer's own module, so the policy that samples is
always the policy that learns.
"""

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from inference import Completion, NextToken, SamplingParams, StreamedToken, row_keys
from inference.decoders import check_window, make_decoder
from inference.sampling import WITHOUT_FLOAT64, choose, self_certainty, warp
from memory import free_memory, is_out_of_memory, release_memory

# More rows than this at once gain nothing: each costs its own.
MAX_ROWS = 512


def row_uniforms(key: Sequence[int], length: int) -> np.ndarray:
    """The random numbers of one completion, `[length]` float64
    in [0, 1), keyed by (*seed, prompt, sample) alone.
    """
    return np.random.default_rng(tuple(key)).random(length)


def stop_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a completion: the tokenizer's, and those of the model's generation config."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    configured = configured if isinstance(configured, list) else [configured]
    return sorted({tokenizer.eos_token_id, *configured} - {None})


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off while sampling, whatever mode the trainer left the model in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _adapted_layers(model: nn.Module) -> list[nn.Module]:
    """Linear layers under a plain LoRA adapter that is in use, whose own weights are plain numbers; and what
    has rows of single tokens in it.
    """

    def is_plain(layer: nn.Module) -> bool:
        if hasattr(layer, "trainable_tokens_delta"):
            return True
        return (
            hasattr(layer, "get_delta_weight")
            and hasattr(layer, "lora_A")
            and not layer.lora_variant  # DoRA and others, which compute more than a sum
            and not any(layer.lora_bias.values())
            and type(layer.get_base_layer()) is nn.Linear
        )

    return [
        layer
        for layer in model.modules()
        if is_plain(layer) and not layer.merged and not layer.disable_adapters
    ]


def _merged_weight(layer: nn.Module) -> Tensor:
    with torch.no_grad():
        if hasattr(layer, "trainable_tokens_delta"):
            return layer.get_merged_weights(layer.active_adapters)
        weight = layer.get_base_layer().weight
        added = sum(layer.get_delta_weight(name) for name in layer.active_adapters)
        return (weight + added).to(weight.dtype)


@contextmanager
def _merged(layers: list[nn.Module]) -> Iterator[None]:
    """Adapters added to their weights while sampling: one product a layer in place of three. Afterwards the
    weights are the very tensors that they were; taking the product off again would round them.
    """
    kept = []
    try:
        for layer in layers:
            weight = layer.get_base_layer().weight
            merged = _merged_weight(layer)
            kept.append((layer, weight.data))
            weight.data = merged
            layer.merged_adapters.extend(layer.active_adapters)
        yield
    finally:
        for layer, original in reversed(kept):  # an embedding and its head may be one
            layer.get_base_layer().weight.data = original
            layer.merged_adapters.clear()


class TorchEngine:
    """Samples from a causal language model; see `inference.Engine`.

    Attributes:
        check: called before every token of a rollout; raises where nobody wants the rest any more.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        max_cache_tokens: int | None = None,
        window: int | None = None,
        sinks: int = 4,
    ) -> None:
        """Wrap a model.

        Args:
            model: a Hugging Face causal language model, on its device; never copied.
            tokenizer: tells, with the model's generation config, the tokens that end a completion.
            max_cache_tokens: cache positions, rows x (longest prompt + completion limit), at most; None takes
                half of the memory that is free when sampling first begins.
            window: keep this many of the newest positions in the cache and the `sinks`, for chains far beyond
                it: memory does not grow with the text. None keeps all. For the Llama family.
            sinks: first positions that stay beside the window.

        Raises:
            ValueError: see `check_window`.
        """
        if window is not None:
            check_window(model, window, sinks)
        self.window, self.sinks = window, sinks
        self.model = model
        self.max_cache_tokens = max_cache_tokens
        self.max_rows = MAX_ROWS  # halved where memory runs out
        # Are adapters merged for a rollout? Where a second copy of their weights fits; decided at the first.
        self.merges: bool | None = None
        self.check: Callable[[], None] = lambda: None
        self.stop_token_ids = torch.tensor(stop_token_ids(model, tokenizer), device=model.device)

    @property
    def memory(self) -> list[int | None]:
        """What a resume needs to compute as before, to the last bit; set, it takes that up."""
        return [self.max_cache_tokens, self.max_rows, self.merges]

    @memory.setter
    def memory(self, value: list[int | None]) -> None:
        self.max_cache_tokens, self.max_rows, self.merges = value

    def _layers_to_merge(self) -> list[nn.Module]:
        # Autocast would round the sum to half precision, and most of what was learned away.
        if torch.is_autocast_enabled(self.model.device.type):
            return []
        layers = _adapted_layers(self.model)
        if layers and self.merges is None:
            weights = [layer.get_base_layer().weight for layer in layers]
            copied = sum(weight.numel() * weight.element_size() for weight in weights)
            self.merges = 4 * copied < free_memory(self.model.device)
        return layers if self.merges else []

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
            ValueError: a prompt has no tokens, or not even one completion fits in the cache.
        """
        results: list[list[Completion | None]] = [[None] * n for _ in prompts]
        keys = row_keys(seed, len(prompts), n, first_prompt)
        rows = list(range(len(keys)))
        while rows:
            ran_out = False
            try:
                with _evaluating(self.model), _merged(self._layers_to_merge()):
                    steps = self._decode(prompts, n, params, keys, rows)
                    for step in steps:
                        self.check()
                        for row, completion in step.ended():
                            results[row // n][row % n] = completion
                            if on_completion:
                                on_completion(row // n, row % n, completion)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or (self.max_rows == 1 and not self.merges):
                    raise
                ran_out = True
            rows = [row for row in rows if results[row // n][row % n] is None]
            if ran_out:
                # Whoever has ended has ended; a completion does not depend on how many decode beside it.
                if self.merges:
                    self.merges = False
                else:
                    self.max_rows = max(1, min(self.max_rows, len(rows)) // 2)
                release_memory()
        return results

    def stream(
        self, prompt: Sequence[int], params: SamplingParams, seed: Sequence[int]
    ) -> Iterator[StreamedToken]:
        """Sample one completion token by token; nothing is computed after the iterator is closed."""
        for [(_, token)] in self.stream_group(prompt, 1, params, seed):
            yield token

    def stream_group(
        self, prompt: Sequence[int], n: int, params: SamplingParams, seed: Sequence[int]
    ) -> Iterator[list[tuple[int, StreamedToken]]]:
        """Sample completions of a prompt side by side; see `inference.Engine.stream_group`."""
        with _evaluating(self.model):
            for step in self._decode([prompt], n, params, row_keys(seed, 1, n), list(range(n))):
                yield step.tokens()

    def branch(
        self, prompt: Sequence[int], rows: int, limit: int
    ) -> Generator[list[list[NextToken]], Sequence[tuple[int, int]], None]:
        """Grow rows of one prompt as the caller says; see `inference.BranchingEngine.branch`.

        Raises:
            ValueError: the prompt has no tokens, or so many rows do not fit in the cache.
        """
        with _evaluating(self.model):
            decoder, slots = self._make_decoder([prompt], rows, limit)
            if slots < rows:
                raise ValueError(f"rows must be <= {slots}, which fit in memory, got {rows}")
            logits = decoder.admit([prompt], [1])
            while True:
                chosen = yield self._likeliest(logits, rows)
                parents, tokens = torch.tensor(chosen, device=logits.device).T
                decoder.select(parents)
                logits = decoder.advance(tokens)

    def _likeliest(self, logits: Tensor, rows: int) -> list[list[NextToken]]:
        stop = set(self.stop_token_ids.tolist())
        # By logits: their log-probabilities may round to the same number.
        tokens = logits.topk(min(rows + len(stop), logits.shape[-1])).indices
        logprobs = warp(logits, SamplingParams()).gather(-1, tokens)
        pairs = zip(tokens.tolist(), logprobs.tolist(), strict=True)
        return [[NextToken(t, p, t in stop) for t, p in zip(*pair, strict=True)] for pair in pairs]

    def _make_decoder(self, prompts: Sequence[Sequence[int]], n: int, limit: int) -> tuple[Any, int]:
        """A decoder with as many slots as fit, and how many these are."""
        if not all(prompts):
            raise ValueError(
                "a prompt has no tokens, and nothing follows nothing; give it a template or a text"
            )
        longest = max(len(prompt) for prompt in prompts)
        positions, sinks, remedy = longest + limit, None, "max_completion_tokens or shorter prompts"
        if self.window is not None and positions > self.sinks + self.window:
            positions, sinks, remedy = self.sinks + self.window, self.sinks, "window"
        if self.max_cache_tokens is None:
            self.max_cache_tokens = free_memory(self.model.device) // 2 // cache_bytes(self.model)
        most = self.max_cache_tokens
        if positions > most:
            raise ValueError(
                f"a prompt of {longest} tokens and a completion of {limit} need {positions} cache "
                f"positions, and memory has {most}; give a smaller {remedy}"
            )
        slots = min(len(prompts) * n, self.max_rows, most // positions)
        return make_decoder(self.model, slots, positions, sinks), slots

    def _decode(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        params: SamplingParams,
        keys: list[tuple[int, ...]],
        todo: list[int],
    ) -> Iterator["Step"]:
        """Sample the rows `todo`, which begin in that order, a token each a step.

        A row is prompt x n + sample. Nothing is computed after the iterator is closed.
        """
        limit, device = params.max_completion_tokens, self.model.device
        decoder, slots = self._make_decoder(prompts, n, limit)
        # A row keeps its seat while the decoder moves it from slot to slot.
        seats = Seats(slots, params, device)
        begun = 0
        logits: Tensor | None = None
        while begun < len(todo) or decoder.live:
            rows = todo[begun : begun + decoder.room()]
            if rows:
                copies = Counter(row // n for row in rows)
                fresh = decoder.admit([prompts[prompt] for prompt in copies], list(copies.values()))
                logits = fresh if logits is None else torch.cat([logits, fresh])
                seats.take(rows, [keys[row] for row in rows])
                begun += len(rows)
            token, logprob = choose(logits, params, seats.uniforms())
            seats.write(token, logprob, logits)
            stopped = torch.isin(token, self.stop_token_ids)
            done = stopped | (seats.counts == limit)
            some_end = bool(done.any())
            yield Step(seats, token, logprob, done, stopped, some_end)
            if some_end:
                order = decoder.leave(done)
                seats.keep(order, done)
                token = token[order]
            logits = decoder.advance(token) if decoder.live else None


class Step(NamedTuple):
    """One more token for every live row; to be read before the next.

    Attributes:
        seats: of the rows.
        token: `[live]` that each was given.
        logprob: `[live]` of these.
        done: `[live]`, True where it was the last.
        stopped: `[live]`, True where it was an EOS.
        some_end: whether any is done.
    """

    seats: "Seats"
    token: Tensor
    logprob: Tensor
    done: Tensor
    stopped: Tensor
    some_end: bool

    def ended(self) -> Iterator[tuple[int, Completion]]:
        """(row, completion) of the rows that are done."""
        return self.seats.completions(self.done, self.stopped) if self.some_end else iter(())

    def tokens(self) -> list[tuple[int, StreamedToken]]:
        """(row, token) of all."""
        columns = (self.token, self.logprob, self.done, self.stopped)
        rows = zip(self.seats.numbers, *(column.tolist() for column in columns), strict=True)
        return [
            (row, StreamedToken(token, logprob, "stop" if stopped else "length" if done else None))
            for row, token, logprob, done, stopped in rows
        ]


class Seats:
    """What is written down of the live rows: their tokens, log-probabilities and random numbers.

    Attributes:
        numbers: of the live rows, in the decoder's order.
        counts: `[live]` tokens that each has.
    """

    def __init__(self, size: int, params: SamplingParams, device: torch.device) -> None:
        """Reserve `size` seats for what `params` ask for."""
        limit = params.max_completion_tokens
        dtype = torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64
        self.measures = params.self_certainty
        self.certainties = torch.zeros(size, dtype=dtype, device=device)
        self.randoms = torch.empty(size, limit, dtype=dtype, device=device)
        self.tokens = torch.empty(size, limit, dtype=torch.long, device=device)
        self.logprobs = torch.empty(size, limit, dtype=dtype, device=device)
        self.free = list(range(size))
        self.numbers: list[int] = []
        self.seats = torch.empty(0, dtype=torch.long, device=device)
        self.counts = torch.empty(0, dtype=torch.long, device=device)

    def take(self, numbers: Sequence[int], keys: Sequence[tuple[int, ...]]) -> None:
        """Seat rows behind the live ones."""
        taken = torch.tensor([self.free.pop() for _ in numbers])
        limit = self.randoms.shape[1]
        drawn = torch.from_numpy(np.stack([row_uniforms(key, limit) for key in keys]))
        below_one = 1 - torch.finfo(self.randoms.dtype).eps / 2  # to which no draw may be rounded up
        drawn = drawn.clamp(max=below_one).to(self.randoms.dtype)
        self.randoms[taken.to(self.randoms.device)] = drawn.to(self.randoms.device)
        self.certainties[taken.to(self.certainties.device)] = 0
        self.numbers.extend(numbers)
        self.seats = torch.cat([self.seats, taken.to(self.seats.device)])
        self.counts = torch.cat([self.counts, self.counts.new_zeros(len(numbers))])

    def uniforms(self) -> Tensor:
        """The next random number of each live row."""
        return self.randoms[self.seats, self.counts]

    def write(self, token: Tensor, logprob: Tensor, logits: Tensor) -> None:
        """Add a token to each live row, chosen by `logits`."""
        if self.measures:
            self.certainties[self.seats] += self_certainty(logits).to(self.certainties.dtype)
        self.tokens[self.seats, self.counts] = token
        self.logprobs[self.seats, self.counts] = logprob.to(self.logprobs.dtype)
        self.counts = self.counts + 1

    def completions(self, done: Tensor, stopped: Tensor) -> Iterator[tuple[int, Completion]]:
        """The rows that are done, as (number, completion)."""
        for place in done.nonzero().squeeze(-1).tolist():
            seat, count = int(self.seats[place]), int(self.counts[place])
            ids, logprobs = self.tokens[seat, :count].tolist(), self.logprobs[seat, :count].tolist()
            reason = "stop" if stopped[place] else "length"
            certainty = float(self.certainties[seat]) / count if self.measures else None
            yield self.numbers[place], Completion(ids, logprobs, reason, certainty)

    def keep(self, order: Tensor, done: Tensor) -> None:
        """Follow the decoder, whose row `i` was `order[i]`; the seats of those that are done are free."""
        self.free.extend(self.seats[done].tolist())
        self.numbers = [self.numbers[place] for place in order.tolist()]
        self.seats, self.counts = self.seats[order], self.counts[order]


# ------------------------------------------------------------------------------------------------------------
# Memory


def cache_bytes(model: nn.Module) -> int:
    """What a position costs in the cache: keys and values of every layer."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * torch.finfo(model.dtype).bits // 8
