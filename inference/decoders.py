"""What feeds one token a row to a model: any architecture by the
library's forward, the Llama family by a leaner one.

A decoder holds the rows that decode together. `admit` begins rows, `advance` feeds each its next token,
`leave` lets rows go; logits are `[rows, V]`, of the newest position. Both decoders compute what the library
computes; tests hold them to it.
"""

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import DynamicCache

import fused_blocks
from fused_kernels import Kernels
from inference.kv_cache import SlotCache, WindowCache
from llama import LLAMA_FAMILY, Rows, angles, fused_kernels, is_llama, project, turn, without_adapter

# Prompt positions that go through the model at once.
PREFILL_TOKENS = 16_384


def make_decoder(
    model: nn.Module, slots: int, positions: int, sinks: int | None = None
) -> "LlamaDecoder | LibraryDecoder":
    """The fastest decoder that computes what the model does.

    Args:
        model: a causal language model.
        slots: rows that decode together at most.
        positions: prompt and completion tokens of a row at most.
        sinks: where given, texts may be longer, and `positions` is what stays of them: so many from the
            beginning, and the newest. The model has passed `check_window`.
    """
    inner = without_adapter(model)
    if sinks is not None:
        return WindowDecoder(inner, slots, positions, sinks)
    if not is_llama(inner, positions):
        return LibraryDecoder(model, slots)
    kernels = fused_kernels(inner)
    return (
        FusedDecoder(inner, slots, positions, kernels) if kernels else LlamaDecoder(inner, slots, positions)
    )


def check_window(model: nn.Module, window: int, sinks: int) -> None:
    """Refuse a window that holds nothing, and one for a model that cannot decode within it.

    Raises:
        ValueError: says which.
    """
    if window < 1 or sinks < 0:
        raise ValueError(f"window must be >= 1 and sinks >= 0, got {window} and {sinks}")
    inner = without_adapter(model)
    if not is_llama(inner, sys.maxsize):
        raise ValueError(
            f"window must be None for this model ({inner.config.model_type}), got {window}: it is for "
            f"{', '.join(LLAMA_FAMILY)}, without a sliding window of their own"
        )


def pad_prompts(prompts: Sequence[Sequence[int]], left: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask `[P, L]` of prompts."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        start = longest - len(prompt) if left else 0
        ids[row, start : start + len(prompt)] = torch.tensor(prompt)
        mask[row, start : start + len(prompt)] = 1
    return ids.to(device), mask.to(device)


class LlamaDecoder:
    """Decodes the Llama family over a `SlotCache`, calling the layers' parts one by one.

    The library's forward spends more time between them than in them: building masks, growing the cache by
    copying it, repeating keys for every query head.
    """

    def __init__(self, model: nn.Module, slots: int, positions: int) -> None:
        """See `make_decoder`; the memory is reserved with the first rows."""
        self.model = model
        self.slots, self.positions = slots, positions
        self.cache: SlotCache | None = None

    @property
    def live(self) -> int:
        """Rows that decode."""
        return self.cache.live if self.cache else 0

    def room(self) -> int:
        """Rows that may begin now: few at a time would cost a prefill each."""
        free = self.slots - self.live
        return free if free >= self.slots / 8 else 0

    @torch.inference_mode()
    def admit(self, prompts: Sequence[Sequence[int]], copies: Sequence[int]) -> Tensor:
        """Begin rows behind the live ones: `copies` of each prompt, computed once. Returns their logits."""
        logits = []
        at_once = max(1, PREFILL_TOKENS // max(len(prompt) for prompt in prompts))
        for start in range(0, len(prompts), at_once):
            part = slice(start, start + at_once)
            logits.append(self._prefill(prompts[part], copies[part]))
        return torch.cat(logits)

    def _prefill(self, prompts: Sequence[Sequence[int]], copies: Sequence[int]) -> Tensor:
        model, device = self.model, self.model.device
        ids, mask = pad_prompts(prompts, left=False, device=device)
        cache = DynamicCache(config=model.config)
        output = model.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        lengths, times = mask.sum(-1), torch.tensor(copies, device=device)
        keys = [layer.keys for layer in cache.layers]
        if self.cache is None:
            self._reserve(keys, output.last_hidden_state)
        self.cache.admit(keys, [layer.values for layer in cache.layers], lengths, times)
        last = output.last_hidden_state[torch.arange(len(prompts), device=device), lengths - 1]
        return model.lm_head(last).repeat_interleave(times, 0)

    def _reserve(self, keys: Sequence[Tensor], states: Tensor) -> None:
        self.cache = SlotCache(len(keys), self.slots, keys[0].shape[1], self.positions, keys[0])
        places = torch.arange(self.positions, device=states.device)
        self.cos, self.sin = angles(self.model.model, states, places)

    def _angles(self, at: Tensor) -> tuple[Tensor, Tensor]:
        return self.cos[at], self.sin[at]

    def _scores(self, query: Tensor, keys: Tensor) -> Tensor:
        """`[rows, key heads, queries of each, positions]`."""
        return query @ keys.mT

    @torch.inference_mode()
    def advance(self, tokens: Tensor) -> Tensor:
        """Feed one token `[rows]` to every row. Returns the logits of the next."""
        decoder, cache, rows = self.model.model, self.cache, len(tokens)
        cos, sin = self._angles(cache.lengths[:rows])
        places, longest, hidden = cache.extend()
        states = decoder.embed_tokens(tokens)
        for number, layer in enumerate(decoder.layers):
            attention = layer.self_attn
            query, key, value = project(attention, layer.input_layernorm(states), cos, sin)
            keys, values = cache.append(number, key, value, places, longest)
            # The query heads that share a key head stand side by side: [rows, key heads, queries of each, D].
            query = (query * attention.scaling).reshape(rows, keys.shape[1], -1, attention.head_dim)
            scores = self._scores(query, keys)
            if hidden is not None:
                scores += hidden
            mixed = scores.softmax(-1) @ values
            states = states + attention.o_proj(mixed.reshape(rows, -1))
            states = states + layer.mlp(layer.post_attention_layernorm(states))
        return self.model.lm_head(decoder.norm(states))

    @torch.inference_mode()
    def leave(self, done: Tensor) -> Tensor:
        """Let rows `[rows]` go; see `SlotCache.leave`."""
        return self.cache.leave(done)

    @torch.inference_mode()
    def select(self, order: Tensor) -> None:
        """Let row `i` go on from what was row `order[i]`, for as many rows as there are slots."""
        self.cache.select(order)


class FusedDecoder(LlamaDecoder):
    """A `LlamaDecoder` on a processor: all between the linear layers is fused, and where these are plain, a
    position goes through all blocks in one call.
    """

    def __init__(self, model: nn.Module, slots: int, positions: int, kernels: Kernels) -> None:
        """See `make_decoder`."""
        super().__init__(model, slots, positions)
        self.kernels = kernels
        layers = model.model.layers
        is_plain = kernels.can_decode and fused_blocks.are_plain(layers)
        self.blocks = fused_blocks.PlainBlocks(layers, kernels) if is_plain else None

    def _reserve(self, keys: Sequence[Tensor], states: Tensor) -> None:
        super()._reserve(keys, states)
        # Nothing is read before it is written; and nothing that was written may be taken for new.
        self.cache.reached = self.positions

    @torch.inference_mode()
    def advance(self, tokens: Tensor) -> Tensor:
        """As `LlamaDecoder.advance`."""
        decoder, add_norm = self.model.model, self._add_norm
        places = self.cache.lengthen()
        if int(places.max()) >= self.positions:
            raise IndexError(f"a row has its {self.positions} positions, and no room for another token")
        states = decoder.embed_tokens(tokens)
        if self.blocks:
            added = self.blocks.add(states, self.cos, self.sin, places, self.cache.block)
        else:

            def attend(number: int, scaling: float, *asked: Tensor) -> Tensor:
                where = (self.cos, self.sin, places, *self.cache.block[number].unbind())
                return self.kernels.attend(*asked, *where, scaling)

            added = self._add_blocks(states, attend)
        return self.model.lm_head(add_norm(decoder.norm, states, added))

    def _prefill(self, prompts: Sequence[Sequence[int]], copies: Sequence[int]) -> Tensor:
        decoder, kernels = self.model.model, self.kernels
        # Packed attention shares out texts and key heads, and few of them do not keep many threads busy.
        if len(prompts) * self.model.config.num_key_value_heads < torch.get_num_threads():
            return super()._prefill(prompts, copies)
        lengths, times = torch.tensor([len(prompt) for prompt in prompts]), torch.tensor(copies)
        ends = lengths.cumsum(0)
        starts = ends - lengths
        texts = torch.stack([starts, ends, starts, starts], 1)
        rows = Rows(torch.arange(int(lengths.max())) < lengths[:, None])
        states = decoder.embed_tokens(torch.tensor([token for prompt in prompts for token in prompt]))
        positions = torch.cat([torch.arange(len(prompt)) for prompt in prompts])
        cos, sin = angles(decoder, states, positions)
        size = cos.shape[-1]
        keys, values = [], []

        def attend(number: int, scaling: float, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query, key = kernels.turn(query, cos, sin, scaling), kernels.turn(key, cos, sin)
            keys.append(rows.pad(key.view(len(key), -1, size)))
            values.append(rows.pad(value.view(len(key), -1, size)))
            return kernels.attend_packed(query, key, value, size, texts)[0]

        added = self._add_blocks(states, attend)
        if self.cache is None:
            self._reserve(keys, states)
        self.cache.admit(keys, values, lengths, times)
        last = self._add_norm(decoder.norm, states[ends - 1], added[ends - 1])
        return self.model.lm_head(last).repeat_interleave(times, 0)

    def _add_blocks(self, states: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        """What the last block adds to the states `[N, H]`, as they then are.

        Args:
            states: of the tokens.
            attend: what attention mixes, of a block's number, its scaling and its `fused_blocks.project`.
        """
        add_norm, added = self._add_norm, None
        for number, layer in enumerate(self.model.model.layers):
            attention, mlp = layer.self_attn, layer.mlp
            read = add_norm(layer.input_layernorm, states, added)
            mixed = attend(number, attention.scaling, *fused_blocks.project(attention, read, self.kernels))
            read = add_norm(layer.post_attention_layernorm, states, attention.o_proj(mixed))
            gate = mlp.gate_proj(read)
            added = mlp.down_proj(self.kernels.silu_multiply(gate, mlp.up_proj(read), gate))
        return added

    def _add_norm(self, norm: nn.Module, states: Tensor, added: Tensor | None) -> Tensor:
        return self.kernels.add_norm(states, added, norm.weight, norm.variance_epsilon)


class WindowDecoder(LlamaDecoder):
    """Decodes within a window over a `WindowCache`: memory is bounded, the text is not.

    Positions are those inside the cache, as in StreamingLLM. Rotary attention knows differences alone, and
    between the newest position and the window's these are the same wherever counting begins. So nothing that
    is cached is turned again: the query is turned back for the sinks, to where it stands behind them.

    Prompts are read whole. Source: arXiv 2309.17453, section 3.2.
    """

    def __init__(self, model: nn.Module, slots: int, positions: int, sinks: int) -> None:
        """See `make_decoder`."""
        super().__init__(model, slots, positions)
        self.sinks = sinks

    def _reserve(self, keys: Sequence[Tensor], states: Tensor) -> None:
        sizes = (len(keys), self.slots, keys[0].shape[1], self.positions)
        self.cache = WindowCache(self.sinks, *sizes, keys[0])
        self.like = states.new_empty(0)

    def advance(self, tokens: Tensor) -> Tensor:
        """As `LlamaDecoder.advance`."""
        self.back = self._way_back(self.cache.lengths[: len(tokens)])
        return super().advance(tokens)

    def _angles(self, at: Tensor) -> tuple[Tensor, Tensor]:
        return angles(self.model.model, self.like, at)

    def _way_back(self, at: Tensor) -> tuple[Tensor, Tensor] | None:
        """What turns queries to the end of the cache; None where all still stand before it."""
        beyond = (at - self.positions + 1).clamp(min=0)
        if not beyond.any():
            return None
        cos, sin = self._angles(beyond)
        scale = self.model.model.rotary_emb.attention_scaling  # YaRN's, which is in the query already
        return cos[:, None] / scale, -sin[:, None] / scale

    def _scores(self, query: Tensor, keys: Tensor) -> Tensor:
        scores = super()._scores(query, keys)
        if self.back is not None:
            scores[..., : self.sinks] = turn(query, *self.back) @ keys[:, :, : self.sinks].mT
        return scores


class LibraryDecoder:
    """Decodes any architecture by the library's own forward and cache. Rows begin when none is live."""

    def __init__(self, model: nn.Module, slots: int) -> None:
        """See `make_decoder`."""
        self.model = model
        self.slots = slots
        self.live = 0

    def room(self) -> int:
        """Rows that may begin now."""
        return 0 if self.live else self.slots

    @torch.inference_mode()
    def admit(self, prompts: Sequence[Sequence[int]], copies: Sequence[int]) -> Tensor:
        """As `LlamaDecoder.admit`."""
        # Left padding: the last position of every row is its prompt's last token.
        ids, mask = pad_prompts(prompts, left=True, device=self.model.device)
        self.cache = DynamicCache(config=self.model.config)
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        source = torch.arange(len(prompts), device=ids.device)
        source = source.repeat_interleave(torch.tensor(copies, device=ids.device))
        if len(source) > len(prompts):
            self.cache.batch_select_indices(source)
        self.mask = mask[source]
        self.live = len(source)
        return output.logits[source, -1]

    @torch.inference_mode()
    def advance(self, tokens: Tensor) -> Tensor:
        """As `LlamaDecoder.advance`."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=-1)
        output = self.model(
            input_ids=tokens[:, None],
            attention_mask=self.mask,
            position_ids=self.mask.sum(-1, keepdim=True) - 1,
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.logits[:, -1]

    @torch.inference_mode()
    def leave(self, done: Tensor) -> Tensor:
        """As `LlamaDecoder.leave`; the others close up in their order."""
        order = (~done).nonzero().squeeze(-1)
        self.cache.batch_select_indices(order)
        self.mask = self.mask[order]
        self.live = len(order)
        return order

    @torch.inference_mode()
    def select(self, order: Tensor) -> None:
        """As `LlamaDecoder.select`."""
        self.cache.batch_select_indices(order)
        self.mask = self.mask[order]
        self.live = len(order)
