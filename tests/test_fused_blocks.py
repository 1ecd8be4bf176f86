"""The fused parts of a block against autograd on torch's operations in float64."""

from types import SimpleNamespace

import pytest
import torch
from test_fused_kernels import close, numbers

import fused_blocks
from llama import turn


def held_to(ours, theirs, *tensors):
    """Values and gradients of a function of float32 tensors against those of one of float64 tensors."""
    alike = [tensor.clone().requires_grad_() for tensor in tensors]
    exact = [tensor.double().requires_grad_() for tensor in tensors]
    got, expected = ours(*alike), theirs(*exact)
    close(got, expected, bound=1e-5)
    weights = numbers(*got.shape, seed=99)
    got.mul(weights).sum().backward()
    expected.mul(weights.double()).sum().backward()
    for one, other in zip(alike, exact, strict=True):
        assert (one.grad - other.grad).norm() <= 2e-6 * other.grad.norm()


@pytest.mark.parametrize(("rows", "width"), [(1, 8), (63, 33), (64, 16), (200, 128)])
def test_a_norm(kernels, rows, width):
    def ours(states, weight):
        return fused_blocks.norm(SimpleNamespace(weight=weight, variance_epsilon=1e-2), states, kernels)

    def theirs(states, weight):
        return states / (states.square().mean(-1, keepdim=True) + 1e-2).sqrt() * weight

    held_to(ours, theirs, numbers(rows, width, scale=3), numbers(width, seed=1))


def test_a_gate(kernels):
    def theirs(opened, up):
        return torch.nn.functional.silu(opened) * up

    both = numbers(50, 33, scale=8), numbers(50, 33, seed=1)
    held_to(lambda *given: fused_blocks.Gate.apply(*given, kernels), theirs, *both)


# Prompts first, then completions with the number of their prompt: lengths of each.
TEXTS = {
    "groups": ([5, 1, 40], [(0, 7), (0, 1), (1, 33), (2, 12), (2, 3), (0, 2)]),
    "one token": ([1], [(0, 1)]),
    "nothing behind a prompt": ([3, 4], [(1, 0), (0, 2)]),
    "prompts alone": ([17, 64], []),
}


def lay_out(prompts, completions):
    """Segments, and for each token the tokens that it may look at."""
    segments, start = [], 0
    for length, prompt in [(length, None) for length in prompts] + [(n, p) for p, n in completions]:
        before = (start, start) if prompt is None else segments[prompt][:2]
        segments.append((start, start + length, *before))
        start += length
    sees = torch.zeros(start, start, dtype=torch.bool)
    for first, end, prompt_first, prompt_end in segments:
        sees[first:end, prompt_first:prompt_end] = True
        sees[first:end, first:end] = torch.ones(end - first, end - first).tril().bool()
    return torch.tensor(segments), sees


@pytest.mark.parametrize(("heads", "query_heads", "size"), [(2, 4, 32), (1, 7, 10), (3, 3, 64), (2, 10, 128)])
@pytest.mark.parametrize("name", TEXTS)
def test_attention(kernels, name, heads, query_heads, size):
    segments, sees = lay_out(*TEXTS[name])
    count, scaling = len(sees), size**-0.5
    cos, sin = numbers(count, 1, size, seed=7), numbers(count, 1, size, seed=8)
    # A rotation and its way back: one half's sine is the other's with another sign.
    cos[..., size // 2 :], sin[..., size // 2 :] = cos[..., : size // 2], -sin[..., : size // 2]

    def ours(query, key, value):
        return fused_blocks.Attention.apply(query, key, value, cos, sin, scaling, segments, kernels)

    def theirs(query, key, value):
        query, key = (turn(x.view(count, -1, size), cos.double(), sin.double()) for x in (query, key))
        key, value = (
            x.view(count, heads, size).repeat_interleave(query_heads // heads, 1) for x in (key, value)
        )
        scores = torch.einsum("nhd,mhd->hnm", query, key) * scaling
        weights = scores.masked_fill(~sees, -torch.inf).softmax(-1)
        return torch.einsum("hnm,mhd->nhd", weights, value).flatten(1)

    shapes = [(count, query_heads * size), (count, heads * size), (count, heads * size)]
    held_to(ours, theirs, *(numbers(*shape, seed=seed) for seed, shape in enumerate(shapes)))


def test_gradients_have_the_same_bits_whoever_computes_them(kernels):
    segments, sees = lay_out([40, 30], [(i % 2, 5 + 7 * i % 30) for i in range(40)])
    cos, sin = numbers(len(sees), 1, 32, seed=7), numbers(len(sees), 1, 32, seed=8)
    weight = numbers(64).requires_grad_()
    module = SimpleNamespace(weight=weight, variance_epsilon=1e-6)
    told = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 3, 3):
            torch.set_num_threads(count)
            read = [numbers(len(sees), width, seed=width).requires_grad_() for width in (128, 64, 65)]
            key = fused_blocks.norm(module, read[1], kernels)
            value = fused_blocks.Gate.apply(read[1], read[1] * 2, kernels)
            mixed = fused_blocks.Attention.apply(read[0], key, value, cos, sin, 0.2, segments, kernels)
            told.append((mixed, *torch.autograd.grad(mixed.square().sum(), [*read[:2], weight])))
    finally:
        torch.set_num_threads(threads)
    for one, *others in zip(*told, strict=True):
        assert all(torch.equal(one, other) for other in others)


def test_what_is_no_number_stays_in_its_text(kernels):
    segments, sees = lay_out([5, 6], [(0, 7), (1, 8), (0, 9)])
    cos, sin = numbers(len(sees), 1, 32, seed=7), numbers(len(sees), 1, 32, seed=8)
    query, key, value = (numbers(len(sees), 64, seed=seed).requires_grad_() for seed in range(3))
    with torch.no_grad():
        key[5] = torch.nan  # of the second prompt
    mixed = fused_blocks.Attention.apply(query, key, value, cos, sin, 0.2, segments, kernels)
    grad = torch.autograd.grad(mixed.sum(), query)[0]
    others = torch.cat([torch.arange(0, 5), torch.arange(11, 18), torch.arange(26, 35)])
    for numbers_of in (mixed, grad):
        is_none = numbers_of.isnan().any(1)
        assert not is_none[others].any()
        assert is_none.sum() == 6 + 8
