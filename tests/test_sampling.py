import math

import pytest
import torch

from inference import SamplingParams
from inference.sampling import choose, warp

PROBABILITIES = [0.1, 0.4, 0.05, 0.25, 0.2]


def logits_of(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


def warped(row, **params):
    """The distribution of one row, as a list."""
    return warp(logits_of(row), SamplingParams(**params)).exp()[0].tolist()


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 3, 4]),
        ({"top_k": 5}, [0, 1, 2, 3, 4]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.01}, [1]),
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.41}, [1, 3]),
        ({"top_p": 0.84}, [1, 3, 4]),
        ({"top_p": 0.86}, [0, 1, 3, 4]),
        ({"min_p": 0.12}, [0, 1, 2, 3, 4]),
        ({"min_p": 0.13}, [0, 1, 3, 4]),
        ({"min_p": 0.51}, [1, 3]),
        ({"min_p": 0.99}, [1]),
        # each on what the one before kept: of 0.4 / 0.65 and 0.25 / 0.65, the first reaches 0.6
        ({"top_k": 2, "top_p": 0.6}, [1]),
        ({"top_k": 2, "top_p": 0.62}, [1, 3]),
        ({"top_p": 0.84, "min_p": 0.55}, [1, 3]),
    ],
)
def test_what_is_kept_is_renormalised_and_the_rest_is_gone(params, kept):
    total = sum(PROBABILITIES[i] for i in kept)
    expected = [p / total if i in kept else 0.0 for i, p in enumerate(PROBABILITIES)]
    assert warped(PROBABILITIES, **params) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("temperature", "kept"), [(0.3, 1), (0.7, 2), (1.0, 2), (2.5, 3)])
def test_temperature_sharpens_before_anything_is_cut(temperature, kept):
    powers = [p ** (1 / temperature) for p in PROBABILITIES]
    expected = [power / sum(powers) for power in powers]
    assert warped(PROBABILITIES, temperature=temperature) == pytest.approx(expected, abs=1e-12)
    # Without a temperature, 0.6 is reached by 0.4 + 0.25.
    assert sum(p > 0 for p in warped(PROBABILITIES, temperature=temperature, top_p=0.6)) == kept


def test_tokens_as_likely_as_the_last_of_top_k_stay_together():
    assert warped([0.3, 0.2, 0.3, 0.2], top_k=1) == pytest.approx([0.5, 0, 0.5, 0])
    assert warped([0.3, 0.2, 0.3, 0.2], top_k=3) == pytest.approx([0.3, 0.2, 0.3, 0.2])
    # top_p takes no more of equals than it needs
    assert sorted(warped([0.25] * 4, top_p=0.5)) == pytest.approx([0, 0, 0.5, 0.5])
    assert warped([0.25] * 4, min_p=0.9) == pytest.approx([0.25] * 4)


def test_rows_are_cut_by_themselves():
    rows = [PROBABILITIES, PROBABILITIES[::-1], [0.96, 0.01, 0.01, 0.01, 0.01]]
    params = SamplingParams(temperature=0.8, top_k=4, top_p=0.9, min_p=0.2)
    together = warp(logits_of(*rows), params)
    for row, got in zip(rows, together, strict=True):
        torch.testing.assert_close(got, warp(logits_of(row), params)[0])


def test_warp_is_in_float32_at_least():
    for dtype, expected in [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ]:
        assert warp(torch.zeros(2, 3, dtype=dtype), SamplingParams(top_p=0.9, min_p=0.1)).dtype == expected


def draw(row, uniforms, **params):
    logits = logits_of(row).expand(len(uniforms), -1)
    return choose(logits, SamplingParams(**params), torch.as_tensor(uniforms, dtype=torch.float64))


@pytest.mark.parametrize("params", [{}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.3}])
def test_a_grid_of_uniforms_draws_the_exact_distribution(params):
    size = 10_000
    tokens, logprobs = draw(PROBABILITIES, (torch.arange(size) + 0.5) / size, **params)
    distribution = warped(PROBABILITIES, **params)
    counts = torch.bincount(tokens, minlength=5) / size
    assert counts.tolist() == pytest.approx(distribution, abs=1 / size)
    expected = torch.tensor([math.log(distribution[token]) for token in tokens], dtype=torch.float64)
    torch.testing.assert_close(logprobs, expected)


@pytest.mark.parametrize("size", [640, 1000, 641, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_vocabulary_searched_in_blocks_draws_as_one_searched_whole(size, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(500, size, generator=generator, dtype=dtype)
    logits[:, ::7] = -torch.inf
    uniforms = torch.rand(500, generator=generator, dtype=torch.float64)
    tokens, logprobs = choose(logits, SamplingParams(temperature=0.8), uniforms)
    expected = (logits.double() / 0.8).log_softmax(-1)
    cumulative = expected.exp().cumsum(-1)
    before = torch.where(tokens > 0, cumulative.gather(-1, (tokens - 1).clamp(min=0)[:, None])[:, 0], 0)
    after = cumulative.gather(-1, tokens[:, None])[:, 0]
    assert (before - 1e-6 <= uniforms).all()
    assert (uniforms <= after + 1e-6).all()
    torch.testing.assert_close(
        logprobs.double(), expected.gather(-1, tokens[:, None])[:, 0], rtol=0, atol=1e-5
    )
    assert len(tokens.unique()) > 100
    for uniform in (0.0, math.nextafter(1.0, 0.0)):
        _, logprobs = choose(logits, SamplingParams(), torch.full((500,), uniform, dtype=torch.float64))
        assert logprobs.isfinite().all()


def test_the_ends_of_the_unit_interval_draw_tokens_that_were_kept():
    largest = math.nextafter(1.0, 0.0)
    for row in ([0.0, 0.5, 0.0, 0.5, 0.0], [0.0, 0.3, 0.3, 0.4, 0.0]):
        tokens, logprobs = draw(row, [0.0, largest])
        assert tokens.tolist() == [1, 3]
        assert logprobs.isfinite().all()
    # Cut tails in float32, whose cumulative sums end above or below 1.
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(200, 1000, generator=generator)
    for uniform in (0.0, largest):
        _, logprobs = choose(
            logits, SamplingParams(top_p=0.7), torch.full((200,), uniform, dtype=torch.float64)
        )
        assert logprobs.isfinite().all()


def test_temperature_zero_takes_the_likeliest_scored_under_temperature_one():
    tokens, logprobs = draw(PROBABILITIES, [0.0, 0.5, 0.999], temperature=0.0)
    assert tokens.tolist() == [1, 1, 1]
    assert logprobs.exp().tolist() == pytest.approx([0.4] * 3)
    # Compared before any rounding could make the two equal.
    close = torch.tensor([[1.0, math.nextafter(1.0, 2.0), 1.0]], dtype=torch.float64)
    assert choose(close, SamplingParams(temperature=0.0), torch.zeros(1, dtype=torch.float64))[0].item() == 1


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("max_completion_tokens", 0, ">= 1"),
        ("temperature", -0.1, ">= 0"),
        ("temperature", math.nan, ">= 0"),
        ("top_k", -1, ">= 0"),
        ("top_p", 0.0, r"in \(0, 1\]"),
        ("top_p", 1.1, r"in \(0, 1\]"),
        ("min_p", 1.0, r"in \[0, 1\)"),
        ("min_p", -0.1, r"in \[0, 1\)"),
    ],
)
def test_what_no_sampler_can_do_is_refused(field, value, allowed):
    with pytest.raises(ValueError, match=rf"^{field} must be {allowed}.*, got {value}$"):
        SamplingParams(**{field: value})
