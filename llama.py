"""The Llama family's blocks, run part by part: what decodes, and what scores completions without padding.

The library's forward works on padded rows. Here every linear layer reads the tokens that count and no
others, side by side in one matrix, a prompt once for all its completions; only attention sees rows.
"""

from collections.abc import Callable
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import fused_blocks
from fused_kernels import Kernels, kernels_for

# A block of their own code in the library each, with the same parts under the same names.
LLAMA_FAMILY = ("llama", "mistral", "qwen2", "qwen3")
# Rotary embeddings whose angles do not depend on how long the text is.
STATIC_ROTARY = ("default", "linear", "llama3", "yarn")


def without_adapter(model: nn.Module) -> nn.Module:
    """The library's model; under an adapter, whose layers stand in the place of the model's own."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_llama(model: nn.Module, positions: int) -> bool:
    """Does a causal language model compute what this file does, for texts of up to so many positions?"""
    config = model.config
    rotary = getattr(config, "rope_parameters", None) or {}
    window = getattr(config, "sliding_window", None)
    is_windowed = "sliding_attention" in (getattr(config, "layer_types", None) or []) or (
        config.model_type == "mistral" and window
    )
    return (
        config.model_type in LLAMA_FAMILY
        and rotary.get("rope_type", "default") in STATIC_ROTARY
        and not (is_windowed and positions > window)
    )


def fused_kernels(model: nn.Module, like: Tensor | None = None) -> Kernels | None:
    """What computes a model that `is_llama` between its linear layers; None where torch does.

    Args:
        model: a causal language model.
        like: a tensor as its weights will be, where they are elsewhere yet.
    """
    kernels = kernels_for(model.model.norm.weight if like is None else like)
    if kernels is None or model.config.hidden_act != "silu" or torch.is_autocast_enabled("cpu"):
        return None
    # Norms and biases may be of another dtype than the last norm.
    vectors = (parameter for parameter in model.model.parameters() if parameter.ndim == 1)
    return kernels if all(vector.dtype == torch.float32 for vector in vectors) else None


def project(attention: nn.Module, read: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `[N, heads, D]` of N tokens, turned to their positions.

    Args:
        attention: of a block.
        read: `[N, H]`, normed.
        cos: `[N, 1, D]`.
        sin: `[N, 1, D]`, its first half negative: of what rotates the other way.
    """
    size = attention.head_dim
    query = attention.q_proj(read).view(len(read), -1, size)
    key = attention.k_proj(read).view(len(read), -1, size)
    value = attention.v_proj(read).view(key.shape)
    if hasattr(attention, "q_norm"):  # Qwen3
        query, key = attention.q_norm(query), attention.k_norm(key)
    turned = turn(torch.cat([query, key], 1), cos, sin)
    return *turned.split([query.shape[1], key.shape[1]], 1), value


def turn(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads `[..., D]` rotated by angles as those of `angles`; `-sin` turns back."""
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, -1), sin)


def norm(module: nn.Module, states: Tensor) -> Tensor:
    """What an RMS norm of the library computes, bit by bit; its gradient in a third of the time."""
    if torch.compiler.is_compiling():  # which fuses the library's own
        return module(states)
    return _Norm.apply(states, module.weight, module.variance_epsilon)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, weight, eps):
        wide = states.float()
        inverse = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()  # to the library's last bit
        unit = wide * inverse
        ctx.save_for_backward(unit, inverse, weight)
        return weight * unit.to(states.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        unit, inverse, weight = ctx.saved_tensors
        of_weight = (grad * unit).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        of_unit = (grad * weight).float()
        along = torch.linalg.vecdot(of_unit, unit)[..., None] / unit.shape[-1]
        of_states = torch.addcmul(of_unit, unit, along, value=-1).mul_(inverse)
        return of_states.to(grad.dtype), of_weight, None


def angles(decoder: nn.Module, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """`cos` and `sin` `[N, 1, D]` for `project`, of positions `[N]`, in the dtype of `like`."""
    cos, sin = decoder.rotary_emb(like, positions[None])
    half = sin.shape[-1] // 2
    return cos[0, :, None], torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)[:, None]


# ------------------------------------------------------------------------------------------------------------
# Completions without padding


class Rows:
    """From packed tokens to the padded rows of attention, and back."""

    def __init__(self, mask: Tensor) -> None:
        """`mask` `[B, L]` is True where a token stands."""
        self.shape = mask.shape
        self.places = mask.flatten().nonzero().squeeze(1)
        self.is_full = len(self.places) == mask.numel()

    def pad(self, packed: Tensor) -> Tensor:
        """`[n, heads, D]` as `[B, heads, L, D]`, 0 where there is no token."""
        rows = packed if self.is_full else _Spread.apply(packed, self.places, self.shape.numel())
        return rows.view(*self.shape, *packed.shape[1:]).transpose(1, 2)

    def unpad(self, rows: Tensor) -> Tensor:
        """`[B, heads, L, D]` as `[n, heads, D]`."""
        rows = rows.transpose(1, 2).flatten(0, 1)
        return rows if self.is_full else _Pick.apply(rows, self.places)


class _Spread(torch.autograd.Function):
    """Rows to places of their own; its gradient is a look-up, where the library would add."""

    @staticmethod
    def forward(ctx, packed, places, size):
        ctx.save_for_backward(places)
        return packed.new_zeros(size, *packed.shape[1:]).index_copy_(0, places, packed)

    @staticmethod
    def backward(ctx, grad):
        return _Pick.apply(grad, *ctx.saved_tensors), None, None


class _Pick(torch.autograd.Function):
    """Rows from places of their own, the way back."""

    @staticmethod
    def forward(ctx, rows, places):
        ctx.save_for_backward(places)
        ctx.size = len(rows)
        return rows.index_select(0, places)

    @staticmethod
    def backward(ctx, grad):
        return _Spread.apply(grad, *ctx.saved_tensors, ctx.size), None


class Packing:
    """Where the tokens of a padded batch stand among those that count.

    First all prompts, each once, then the completions, all row by row. The last token of a completion
    predicts nothing and is left out.
    """

    def __init__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        completion_mask: Tensor,
        kernels: Kernels | None = None,
    ) -> None:
        """See `predicting_states`; `kernels` that run the blocks."""
        self.kernels = kernels
        length = completion_mask.shape[1]
        device = input_ids.device
        split = input_ids.shape[1] - length
        # Of completions, what stands before a token.
        follows = attention_mask[:, split + 1 :].bool()
        padded = input_ids[:, :split].masked_fill(attention_mask[:, :split] == 0, -1)
        prompts, self.prompt_of = padded.unique(dim=0, return_inverse=True)
        counts = prompts >= 0
        self.lengths = counts.sum(1)
        # To the right of every prompt there is padding, and so the plain causal mask suffices.
        prompt_mask = torch.arange(split, device=device) < self.lengths[:, None]
        self.prompts, self.completions = Rows(prompt_mask), Rows(follows)
        self.ids = torch.cat([prompts[counts], input_ids[:, split:-1][follows]])
        of_prompts = torch.arange(split, device=device).expand_as(counts)[prompt_mask]
        after = self.lengths[self.prompt_of][:, None] + torch.arange(length - 1, device=device)
        self.positions = torch.cat([of_prompts, after[follows]])
        # What predicts a completion's first token is its prompt's last state, for the others the one before.
        self.split = len(of_prompts)
        self.last = (self.lengths.cumsum(0) - 1)[self.prompt_of]
        places = torch.empty(completion_mask.shape, dtype=torch.long, device=device)
        places[:, 0] = torch.arange(len(places), device=device)
        places[:, 1:][follows] = len(places) + torch.arange(len(self.ids) - self.split, device=device)
        self.order = places[completion_mask]
        self.follows, self.prompt_mask = follows, prompt_mask
        self.mask: Tensor | None = None

    @cached_property
    def segments(self) -> Tensor:
        """Where every prompt and completion begins and ends; see `Kernels.attend_packed`."""
        ends = torch.cat([self.lengths, self.follows.sum(1)]).cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        texts = torch.stack([starts, ends], 1)
        before = torch.stack([starts, starts], 1)
        before[len(self.lengths) :] = texts[self.prompt_of]
        return torch.cat([texts, before], 1)

    @cached_property
    def sees(self) -> Tensor:
        """`[B, 1, T-1, P+T-1]`, True where a completion's query may look."""
        length = self.follows.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.follows.device).tril()
        seen = self.prompt_mask[self.prompt_of][:, None].expand(-1, length, -1)
        return torch.cat([seen, causal.expand(len(seen), -1, -1)], -1)[:, None]

    def predicting(self, states: Tensor) -> Tensor:
        """Of the states `[N, H]` of all tokens those that predict the completions' tokens, row by row."""
        # Not by indexing: where a state is read twice, the gradients of several threads would be added in
        # any order, and a run would not be the same twice.
        first = states.index_select(0, self.last)
        return _Pick.apply(torch.cat([first, states[self.split :]]), self.order)

    def mask_for(self, query: Tensor) -> Tensor:
        """`sees` as what is added to a query's scores: 0, or minus infinity. Made once for all blocks: given
        truths, each would make one of its own and keep it for the backward pass.
        """
        if self.mask is None:
            device, length = query.device.type, self.sees.shape[-1]
            is_cast = torch.is_autocast_enabled(device) and query.dtype != torch.float64  # which it leaves
            dtype = torch.get_autocast_dtype(device) if is_cast else query.dtype
            # Rows that begin at multiples of 8 are what fast kernels of GPUs take without a copy.
            wide = query.new_zeros(*self.sees.shape[:-1], length + -length % 8, dtype=dtype)
            self.mask = wide[..., :length].masked_fill_(~self.sees, -torch.inf)
            del self.sees
        return self.mask

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Causal attention of every token to its own text: `[N, heads, D]` each, `[N, heads x D]` out."""
        parts = [tensor.split([self.split, len(tensor) - self.split]) for tensor in (query, key, value)]
        of_prompts = [self.prompts.pad(prompt) for prompt, _ in parts]
        mixed = scaled_dot_product_attention(*of_prompts, is_causal=True, scale=scaling, enable_gqa=True)
        mixed = [self.prompts.unpad(mixed)]
        if len(self.completions.places):
            queries, keys, values = (self.completions.pad(completion) for _, completion in parts)
            keys = torch.cat([of_prompts[1].index_select(0, self.prompt_of), keys], 2)
            values = torch.cat([of_prompts[2].index_select(0, self.prompt_of), values], 2)
            if query.is_cuda:  # whose fast kernels take a mask or fewer key heads, and not both
                times = queries.shape[1] // keys.shape[1]
                keys, values = keys.repeat_interleave(times, 1), values.repeat_interleave(times, 1)
            answers = scaled_dot_product_attention(
                queries,
                keys,
                values,
                attn_mask=self.mask_for(queries),
                scale=scaling,
                enable_gqa=not query.is_cuda,
            )
            mixed.append(self.completions.unpad(answers))
        return torch.cat(mixed).flatten(1)


def before_attention(
    layer: nn.Module, states: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What the attention of a block reads: see `project`."""
    return project(layer.self_attn, norm(layer.input_layernorm, states), cos, sin)


def after_attention(layer: nn.Module, states: Tensor, mixed: Tensor) -> Tensor:
    """What a block makes of the states `[N, H]` and what its attention has mixed of them."""
    states = states + layer.self_attn.o_proj(mixed)
    return states + layer.mlp(norm(layer.post_attention_layernorm, states))


TORCH_PARTS = (before_attention, after_attention)


def run_block(
    layer: nn.Module,
    states: Tensor,
    packing: Packing,
    cos: Tensor,
    sin: Tensor,
    parts: tuple[Callable, Callable] = TORCH_PARTS,
) -> Tensor:
    """What a block makes of the states `[N, H]` of packed tokens; `parts` may be compiled."""
    if packing.kernels and parts == TORCH_PARTS:
        return run_fused_block(layer, states, packing, cos, sin)
    before, after = parts
    return after(layer, states, packing.attend(*before(layer, states, cos, sin), layer.self_attn.scaling))


def run_fused_block(layer: nn.Module, states: Tensor, packing: Packing, cos: Tensor, sin: Tensor) -> Tensor:
    """As `run_block`, all between the linear layers by the packing's kernels."""
    attention, mlp, kernels = layer.self_attn, layer.mlp, packing.kernels
    read = fused_blocks.norm(layer.input_layernorm, states, kernels)
    asked = fused_blocks.project(attention, read, kernels)
    mixed = fused_blocks.Attention.apply(*asked, cos, sin, attention.scaling, packing.segments, kernels)
    states = states + attention.o_proj(mixed)
    read = fused_blocks.norm(layer.post_attention_layernorm, states, kernels)
    return states + mlp.down_proj(fused_blocks.Gate.apply(mlp.gate_proj(read), mlp.up_proj(read), kernels))


def compile_blocks(model: nn.Module) -> None:
    """Let `predicting_states` run the blocks through `torch.compile`, all but their attention.

    What is left counts tokens and nothing else, so that all blocks and all batches share one compilation (one
    more where no gradient is taken); attention has kernels of its own. The modules stay what they are: what
    samples and what is saved sees nothing of it.

    Args:
        model: a causal language model that `is_llama`, under an adapter or not.
    """
    parts = tuple(torch.compile(part, dynamic=True) for part in (before_attention, after_attention))
    for layer in without_adapter(model).model.layers:
        layer.run_packed = partial(run_block, layer, parts=parts)


def predicting_states(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor
) -> Tensor:
    """The last hidden states that predict the completions' tokens.

    Args:
        model: a causal language model that `is_llama`.
        input_ids: `[B, P+T]` as `batches.pad_batch` lays it out; equal prompts are computed once.
        attention_mask: `[B, P+T]`.
        completion_mask: `[B, T]`, True counts.

    Returns:
        `[n, H]`, one for each True, row by row.
    """
    decoder = model.model
    packing = Packing(input_ids, attention_mask, completion_mask, fused_kernels(model))
    states = decoder.embed_tokens(packing.ids)
    cos, sin = angles(decoder, states, packing.positions)
    is_checkpointed = decoder.gradient_checkpointing and decoder.training
    for layer in decoder.layers:
        # Another where a layer gathers its weights first, or is compiled.
        run = getattr(layer, "run_packed", partial(run_block, layer))
        if is_checkpointed:
            states = checkpoint(run, states, packing, cos, sin, use_reentrant=False)
        else:
            states = run(states, packing, cos, sin)
    last = packing.predicting(states)
    if packing.kernels:
        return fused_blocks.norm(decoder.norm, last, packing.kernels)
    return norm(decoder.norm, last)
