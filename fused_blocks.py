"""What the Llama family's blocks compute between their linear
layers, by fused kernels and with gradients, on packed tokens.
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
