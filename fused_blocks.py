"""The Llama family's blocks by fused kernels: what they compute between their linear layers, with gradients,
on packed tokens; and blocks of plain layers as a whole, without.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fused_kernels import Kernels


def norm(module: nn.Module, states: Tensor, kernels: Kernels) -> Tensor:
    """What an RMS norm of the library makes of states `[N, H]`."""
    return _Norm.apply(states, module.weight, module.variance_epsilon, kernels)


def _norm_heads(module: nn.Module, heads: Tensor, kernels: Kernels) -> Tensor:
    return norm(module, heads.view(-1, len(module.weight)), kernels).view(heads.shape)


def project(attention: nn.Module, read: Tensor, kernels: Kernels) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `[N, heads x D]` of normed states `[N, H]`, not turned to their positions."""
    query, key, value = attention.q_proj(read), attention.k_proj(read), attention.v_proj(read)
    if hasattr(attention, "q_norm"):  # Qwen3
        query = _norm_heads(attention.q_norm, query, kernels)
        key = _norm_heads(attention.k_norm, key, kernels)
    return query, key, value


class PlainBlocks:
    """Blocks whose linear layers are plain, through which one position of every row goes in one call.

    The weights are read from where they are now: what an update does to them counts, and memory that they are
    given later does not.
    """

    def __init__(self, layers: nn.ModuleList, kernels: Kernels) -> None:
        """Take layers that `are_plain`."""
        self._sizes = _sizes(layers[0])
        self._kernels = kernels
        # Held, so that nobody else is given the memory.
        self._weights = [[w if w is None else w.detach() for w in _weights(layer)] for layer in layers]
        self._table = torch.tensor([kernels.addresses(*weights) for weights in self._weights])

    def add(self, states: Tensor, cos: Tensor, sin: Tensor, lengths: Tensor, cache: Tensor) -> Tensor:
        """What the last block adds to the states, as they then are; see `Kernels.decode`."""
        return self._kernels.decode(self._table, states, cos, sin, lengths, cache, *self._sizes)


def are_plain(layers: nn.ModuleList) -> bool:
    """Are the linear layers of all blocks nothing but products, of the same sizes?

    Not in 4 bits, under a hook, or under an adapter that is not merged.
    """
    if not all(_is_plain(linear) for layer in layers for linear in _linears(layer)):
        return False
    shapes = [[w if w is None else w.shape for w in _weights(layer)] for layer in layers]
    sizes = [_sizes(layer) for layer in layers]
    return all(shape == shapes[0] for shape in shapes) and all(size == sizes[0] for size in sizes)


def _is_plain(linear: nn.Module) -> bool:
    return (
        type(linear) is nn.Linear
        and not (linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear))
        and type(linear.weight) is nn.Parameter
        and linear.weight.dtype == torch.float32
        and linear.weight.is_contiguous()
        and linear.weight.shape == (linear.out_features, linear.in_features)
    )


def _sizes(layer: nn.Module) -> tuple[int, int, float, float]:
    """What `Kernels.decode` has to know of a block: query heads, numbers of the MLP, eps and scaling."""
    attention = layer.self_attn
    heads, inner = attention.q_proj.out_features // attention.head_dim, layer.mlp.gate_proj.out_features
    return heads, inner, layer.input_layernorm.variance_epsilon, attention.scaling


def _linears(layer: nn.Module) -> list[nn.Module]:
    """The linear layers of a block, in the order of fused_kernels.c; of merged adapters what they are in."""
    attention, mlp = layer.self_attn, layer.mlp
    named = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    named += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    return [linear.get_base_layer() if getattr(linear, "merged", False) else linear for linear in named]


def _weights(layer: nn.Module) -> list[Tensor | None]:
    """The weights of a block, in the order of fused_kernels.c."""
    attention = layer.self_attn
    norms = [layer.input_layernorm, getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)]
    scales = [norm and norm.weight for norm in [*norms, layer.post_attention_layernorm]]
    return [*scales, *(weight for linear in _linears(layer) for weight in (linear.weight, linear.bias))]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, eps: float, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(states, weight)
        ctx.eps, ctx.kernels = eps, kernels
        return kernels.add_norm(states, None, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_states, of_weight = ctx.kernels.norm_backward(grad.contiguous(), *ctx.saved_tensors, ctx.eps)
        return of_states, of_weight, None, None


class Gate(torch.autograd.Function):
    """`silu(opened) * up`."""

    @staticmethod
    def forward(ctx: Any, opened: Tensor, up: Tensor, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(opened, up)
        ctx.kernels = kernels
        return kernels.silu_multiply(opened, up, torch.empty_like(up))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.kernels.silu_multiply_backward(grad.contiguous(), *ctx.saved_tensors), None


class Attention(torch.autograd.Function):
    """Causal attention of every token to its own text: `[N, query heads x D]`.

    Query, key and value are those of `project`, cos and sin those of `llama.angles`, `scaling` that of the
    scores, and `segments` what `Kernels.attend_packed` says.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cos: Tensor,
        sin: Tensor,
        scaling: float,
        segments: Tensor,
        kernels: Kernels,
    ) -> Tensor:
        query, key = kernels.turn(query, cos, sin, scaling), kernels.turn(key, cos, sin)
        out, logsumexp = kernels.attend_packed(query, key, value, cos.shape[-1], segments)
        ctx.save_for_backward(query, key, value, out, logsumexp, cos, sin, segments)
        ctx.scaling, ctx.kernels = scaling, kernels
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *attended, cos, sin, segments = ctx.saved_tensors
        kernels, size, back = ctx.kernels, cos.shape[-1], -sin
        grads = kernels.attend_packed_backward(grad.contiguous(), *attended, size, segments)
        query, key = kernels.turn(grads[0], cos, back, ctx.scaling), kernels.turn(grads[1], cos, back)
        return query, key, grads[2], None, None, None, None, None
