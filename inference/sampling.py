"""Choosing the next token: pure functions on logits, `[B, V]` in, `[B, V]` or `[B]` out."""

import torch
from torch import Tensor

from inference import SamplingParams


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
    logprobs = warp(logits, params)
    if params.temperature == 0.0:
        tokens = logits.argmax(dim=-1)
    else:
        # Summed in float64: in float32 the tail of a large vocabulary would be lost to rounding.
        cumulative = logprobs.double().exp().cumsum(dim=-1)
        target = uniforms.to(cumulative.device)[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
        tokens = tokens.clamp(max=logits.shape[-1] - 1)
    return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)
