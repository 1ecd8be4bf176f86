"""Choosing the next token: pure functions on logits, `[B, V]` in, `[B, V]` or `[B]` out."""

import math

import torch
from torch import Tensor

from fused_kernels import kernels_for
from inference import SamplingParams

BELOW_ONE = 1 - 2**-53
WITHOUT_FLOAT64 = {"mps"}  # types of device


def warp(logits: Tensor, params: SamplingParams) -> Tensor:
    """Log-probabilities `[B, V]` float32 (float64 stays) of the distribution that a token is drawn from.

    Temperature first, then top-k, top-p and min-p, each on what the one before kept; what is cut has -inf and
    the rest is
    renormalised. Temperature 0 (greedy) is scored under temperature 1.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if params.temperature not in (0.0, 1.0):
        logits = logits / params.temperature
    if params.top_k and params.top_k < logits.shape[-1]:
        kth = logits.topk(params.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if params.top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(dim=-1)
        # A token stays if those before it do not reach top_p yet; so the likeliest always stays.
        cut = probs.cumsum(dim=-1) - probs >= params.top_p
        logits = logits.masked_fill(cut.scatter(-1, order, cut), -torch.inf)
    if params.min_p > 0.0:
        logprobs = logits.log_softmax(dim=-1)
        floor = logprobs.max(dim=-1, keepdim=True).values + torch.log(logprobs.new_tensor(params.min_p))
        logits = logits.masked_fill(logprobs < floor, -torch.inf)
    return logits.log_softmax(dim=-1)


def self_certainty(logits: Tensor) -> Tensor:
    """KL divergence `[B]` from the uniform distribution to that of logits `[B, V]`, in nats.

    Source: arXiv 2502.18581.
    """
    logprobs = warp(logits, SamplingParams())
    return -logprobs.mean(-1) - math.log(logits.shape[-1])


def choose(logits: Tensor, params: SamplingParams, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Choose one token a row.

    Args:
        logits: `[B, V]` as the model gave them.
        params: temperature 0 takes the likeliest token.
        uniforms: `[B]` float64 in [0, 1), one a row: the token is where the cumulative probability passes it,
            so a row
            needs one random number a step, whatever rows stand beside it.

    Returns:
        Token ids `[B]` and their log-probabilities `[B]` under the distribution of `warp`.
    """
    device = logits.device
    if device.type in WITHOUT_FLOAT64:
        tokens, logprobs = _choose(logits.cpu(), params, uniforms.cpu())
        return tokens.to(device), logprobs.to(device)
    return _choose(logits, params, uniforms)


def _choose(logits: Tensor, params: SamplingParams, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    is_whole = not params.top_k and params.top_p == 1.0 and params.min_p == 0.0
    if is_whole and params.temperature > 0.0:
        kernels = kernels_for(logits)
        from_all = kernels.sample if kernels else _choose_from_all
        return from_all(logits.contiguous(), params.temperature, uniforms)
    logprobs = warp(logits, params)
    is_greedy = params.temperature == 0.0
    tokens = logits.argmax(dim=-1) if is_greedy else _search(logprobs.exp(), uniforms)
    return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)


def _search(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Where the cumulative weight `[B, V]` passes a share of the whole, `[B]`."""
    # Summed in float64: in float32 the tail of a large vocabulary would be lost to rounding.
    cumulative = weights.double().cumsum(dim=-1)
    target = uniforms.to(cumulative.device)[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    return tokens.clamp(max=weights.shape[-1] - 1)


def _choose_from_all(logits: Tensor, temperature: float, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """As `choose` where every token is kept: the vocabulary is read thrice and copied once.

    It is searched in two stages, first for the block whose cumulative weight passes the share, then in it:
    a cumulative sum over all of a large vocabulary, in float64, would take longer than the model's head.
    """
    scaled = logits if logits.dtype == torch.float64 else logits.float()
    scaled = scaled / temperature if temperature != 1.0 else scaled
    highest = scaled.amax(-1, keepdim=True)
    weights = (scaled - highest).exp_()
    rows, size = weights.shape
    block = next(b for b in (512, 256, 128, 64, 1) if size % b == 0)
    blocks = weights.view(rows, -1, block)
    sums = blocks.sum(-1).double()
    cumulative = sums.cumsum(-1)
    total = cumulative[:, -1:]
    target = uniforms.to(total.device)[:, None] * total
    chosen = torch.searchsorted(cumulative, target, right=True).clamp(max=sums.shape[-1] - 1)
    # As a share of the block, so that the rounding of its sum cannot lead past its end.
    share = ((target - (cumulative - sums).gather(-1, chosen)) / sums.gather(-1, chosen)).clamp(0, BELOW_ONE)
    inside = blocks[torch.arange(rows, device=weights.device), chosen[:, 0]].double().cumsum(-1)
    place = torch.searchsorted(inside, share * inside[:, -1:], right=True).clamp(max=block - 1)
    tokens = chosen * block + place
    logprobs = scaled.gather(-1, tokens) - highest - total.log().to(scaled.dtype)
    return tokens[:, 0], logprobs[:, 0]
