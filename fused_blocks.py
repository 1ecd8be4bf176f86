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


class PlainBlocks:
    """Blocks whose linear layers are plain, through which one position of every row goes in one call.

    Their weights are read where they are, as they then are; where a parameter is given other memory, what it
    had before.
    """

    def __init__(self, layers: nn.ModuleList, kernels: Kernels) -> None:
        """Take layers that `are_plain`."""
        attention, mlp = layers[0].self_attn, layers[0].mlp
        self.query_heads = attention.q_proj.out_features // attention.head_dim
        self.inner = mlp.gate_proj.out_features
        self.eps, self.scaling = layers[0].input_layernorm.variance_epsilon, attention.scaling
        self._kernels = kernels
        # Held, so that the memory stays.
        self._weights = [
            [weight if weight is None else weight.detach() for weight in _weights(layer)] for layer in layers
        ]
        self._table = torch.tensor([kernels.addresses(weights) for weights in self._weights])

    def add(self, states: Tensor, cos: Tensor, sin: Tensor, lengths: Tensor, cache: Tensor) -> Tensor:
        """What the last block adds to the states, as they then are; see `Kernels.decode`."""
        sizes = (self.query_heads, self.inner, self.eps, self.scaling)
        return self._kernels.decode(self._table, states, cos, sin, lengths, cache, *sizes)


def are_plain(layers: nn.ModuleList) -> bool:
    """Are the linear layers of blocks nothing but a product? Not under an adapter, in 4 bits, or hooked."""
    return all(
        type(module) is nn.Linear
        and not (module._forward_hooks or module._forward_pre_hooks)
        and type(module.weight) is nn.Parameter
        and module.weight.dtype == torch.float32
        and module.weight.is_contiguous()
        for layer in layers
        for module in _linears(layer)
    )


def _linears(layer: nn.Module) -> list[nn.Module]:
    attention, mlp = layer.self_attn, layer.mlp
    of_attention = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return [*of_attention, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def _weights(layer: nn.Module) -> list[Tensor | None]:
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
