"""The rollout and serving engine: groups of completions from any Hugging Face causal language model.

A prompt is computed once, its cache rows are then repeated for the group; a completion that ends leaves the
batch at once. The weights are the trainer's own module, so the policy that samples is always the policy that
learns.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase

from inference import Completion, SamplingParams, StreamedToken
from inference.sampling import choose


def row_uniforms(seed: Sequence[int], prompt: int, sample: int, length: int) -> np.ndarray:
    """The random numbers of one completion, `[length]`
    float64 in [0, 1), keyed by (*seed, prompt, sample) alone.
    """
    return np.random.default_rng((*seed, prompt, sample)).random(length)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off while sampling, whatever mode the trainer left the model in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class TorchEngine:
    """Samples from a causal language model; see `inference.Engine`."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        max_batch_tokens: int = 131_072,
    ) -> None:
        """Wrap a model.

        Args:
            model: a Hugging Face causal language model, on its device; never copied.
            tokenizer: tells the padding token and, with the model's generation config, the tokens that end a
                completion.
            max_batch_tokens: cache positions (rows x (prompt + completion limit)) that decode together at
                most.
        """
        self.model = model
        self.max_batch_tokens = max_batch_tokens
        self.pad_token_id = tokenizer.pad_token_id
        configured = getattr(model.generation_config, "eos_token_id", None)
        configured = configured if isinstance(configured, list) else [configured]
        stop = {tokenizer.eos_token_id, *configured} - {None}
        self.stop_token_ids = torch.tensor(sorted(stop), device=model.device)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        params: SamplingParams,
        seed: Sequence[int],
        first_prompt: int = 0,
        on_completion: Callable[[int, int, Completion], None] | None = None,
    ) -> list[list[Completion]]:
        """Sample `n` completions of each prompt; see `inference.Engine.generate`."""
        results: list[list[Completion | None]] = [[None] * n for _ in prompts]
        for batch in self._batches([len(prompt) for prompt in prompts], n, params.max_completion_tokens):
            uniforms = np.stack(
                [
                    row_uniforms(seed, first_prompt + prompt, sample, params.max_completion_tokens)
                    for prompt in batch
                    for sample in range(n)
                ]
            )
            with _evaluating(self.model):
                for row, completion in self._decode([prompts[i] for i in batch], n, params, uniforms):
                    prompt, sample = batch[row // n], row % n
                    results[prompt][sample] = completion
                    if on_completion:
                        on_completion(prompt, sample, completion)
        return results

    def stream(
        self, prompt: Sequence[int], params: SamplingParams, seed: Sequence[int]
    ) -> Iterator[StreamedToken]:
        """Sample one completion token by token; nothing is computed after the iterator is closed."""
        uniforms = torch.from_numpy(row_uniforms(seed, 0, 0, params.max_completion_tokens))
        with _evaluating(self.model):
            state = self._prefill([prompt], 1)
            for step in range(params.max_completion_tokens):
                token, logprob = choose(state.logits, params, uniforms[step : step + 1])
                stopped = bool(torch.isin(token, self.stop_token_ids))
                is_last = step + 1 == params.max_completion_tokens
                reason = "stop" if stopped else "length" if is_last else None
                yield StreamedToken(int(token), float(logprob), reason)
                if reason:
                    return
                self._advance(state, token)

    def _batches(self, lengths: list[int], n: int, limit: int) -> Iterator[list[int]]:
        """Prompt numbers that decode together: neighbours in
        length, so that little is padded, under the token budget.
        """
        batch: list[int] = []
        for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
            if batch and (len(batch) + 1) * n * (lengths[index] + limit) > self.max_batch_tokens:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def _decode(
        self, prompts: list[Sequence[int]], n: int, params: SamplingParams, uniforms: np.ndarray
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (row, completion) as rows finish; row = prompt x n + sample."""
        state = self._prefill(prompts, n)
        device = state.logits.device
        randoms = torch.from_numpy(uniforms).to(device)
        rows = torch.arange(len(uniforms), device=device)
        tokens = torch.zeros(len(uniforms), params.max_completion_tokens, dtype=torch.long, device=device)
        logprobs = torch.zeros(tokens.shape, dtype=torch.float64, device=device)
        for step in range(params.max_completion_tokens):
            token, logprob = choose(state.logits, params, randoms[rows, step])
            tokens[rows, step], logprobs[rows, step] = token, logprob.double()
            stopped = torch.isin(token, self.stop_token_ids)
            done = stopped if step + 1 < params.max_completion_tokens else torch.ones_like(stopped)
            if done.any():
                length = step + 1
                for row, is_stop in zip(rows[done].tolist(), stopped[done].tolist(), strict=True):
                    reason = "stop" if is_stop else "length"
                    yield (
                        row,
                        Completion(tokens[row, :length].tolist(), logprobs[row, :length].tolist(), reason),
                    )
                if done.all():
                    return
                keep = (~done).nonzero().squeeze(-1)
                rows, token = rows[keep], token[keep]
                state.keep(keep)
            self._advance(state, token)

    @torch.inference_mode()
    def _prefill(self, prompts: list[Sequence[int]], n: int) -> "_DecodeState":
        """Compute each prompt once, then repeat its cache row n times."""
        longest = max(len(prompt) for prompt in prompts)
        device = self.model.device
        # Left padding: the last position of every row is its prompt's last token.
        ids = torch.full((len(prompts), longest), self.pad_token_id, dtype=torch.long)
        mask = torch.zeros((len(prompts), longest), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        ids, mask = ids.to(device), mask.to(device)
        cache = DynamicCache(config=self.model.config)
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        if n > 1:
            cache.batch_repeat_interleave(n)
        return _DecodeState(
            cache=cache,
            mask=mask.repeat_interleave(n, dim=0),
            logits=output.logits[:, -1].repeat_interleave(n, dim=0),
        )

    @torch.inference_mode()
    def _advance(self, state: "_DecodeState", token: Tensor) -> None:
        """Feed one token `[rows]` to every row and keep the logits of the next."""
        state.mask = torch.cat([state.mask, state.mask.new_ones(len(token), 1)], dim=-1)
        output = self.model(
            input_ids=token[:, None],
            attention_mask=state.mask,
            position_ids=state.mask.sum(-1, keepdim=True) - 1,
            past_key_values=state.cache,
            use_cache=True,
        )
        state.logits = output.logits[:, -1]


class _DecodeState:
    """What decoding carries from token to token: one row a completion still running."""

    def __init__(self, cache: DynamicCache, mask: Tensor, logits: Tensor) -> None:
        self.cache = cache  # keys and values, [rows, heads, positions, head size] a layer
        self.mask = mask  # [rows, positions], 0 where a prompt is padded
        self.logits = logits  # [rows, V] of the next token

    def keep(self, rows: Tensor) -> None:
        """Let all other rows leave."""
        self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]
