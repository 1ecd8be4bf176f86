"""Each fused kernel against torch's operations in float64, and what happens without a compiler."""

import copy
import platform
import warnings

import pytest
import torch
from conftest import needs_a_compiler

import fused_kernels
from inference import SamplingParams
from inference.decoders import LlamaDecoder, make_decoder
from inference.engine import TorchEngine
from inference.sampling import _choose_from_all
from llama import turn


def numbers(*shape, scale=1.0, seed=0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(got, expected, bound=2e-6):
    torch.testing.assert_close(got.double(), expected, rtol=bound, atol=bound)


@pytest.mark.parametrize(("rows", "width"), [(1, 8), (5, 33), (300, 128)])
@pytest.mark.parametrize("is_added", [False, True])
def test_the_norm_of_a_sum(kernels, rows, width, is_added):
    states, weight = numbers(rows, width, scale=3), numbers(width, seed=1)
    added = numbers(rows, width, seed=2) if is_added else None
    total = states.double() + (added.double() if is_added else 0)
    expected = total / (total.square().mean(-1, keepdim=True) + 1e-2).sqrt() * weight.double()
    close(kernels.add_norm(states, added, weight, 1e-2), expected)
    close(states, total)


def test_a_gate_over_all_that_a_number_can_be(kernels):
    gate = torch.cat([torch.linspace(-120, 120, 4999), torch.tensor([0.0, -1e-30, torch.nan])])
    up = numbers(len(gate))
    expected = torch.nn.functional.silu(gate.double()) * up.double()
    assert kernels.silu_multiply(gate, up, gate) is gate
    assert gate[-1].isnan()
    close(gate[:-1], expected[:-1])
    # To the left of -87 the power is 0 in place of a number below 1e-37.
    torch.testing.assert_close(gate[800:-1].double(), expected[800:-1], rtol=1e-6, atol=0)


SHAPES = [(2, 4, 32), (2, 2, 64), (1, 7, 128), (3, 6, 10)]


def a_step(heads, query_heads, size, lengths, positions=70, scale=2):
    rows = len(lengths)
    shapes = [(rows, query_heads * size), (rows, heads * size), (rows, heads * size)]
    query, key, value = (numbers(*shape, scale=scale, seed=seed) for seed, shape in enumerate(shapes))
    cos, sin = numbers(positions, 1, size, seed=3), numbers(positions, 1, size, seed=4)
    keys, values = (numbers(rows + 2, heads, positions, size, seed=seed) for seed in (5, 6))
    return [query, key, value, cos, sin, torch.tensor(lengths), keys, values, size**-0.5]


@pytest.mark.parametrize("scale", [2, 20])  # whose scores no power of e holds
@pytest.mark.parametrize(("heads", "query_heads", "size"), SHAPES)
def test_attention_of_rows_of_several_lengths(kernels, heads, query_heads, size, scale):
    step = a_step(heads, query_heads, size, [0, 5, 31, 32, 69, 40, 1], scale=scale)
    query, key, value, cos, sin, lengths, keys, values, scaling = step
    before = keys.clone(), values.clone()
    mixed = kernels.attend(*step)
    for row, length in enumerate(lengths.tolist()):
        at = slice(None), length
        close(keys[row][at], turn(key[row].view(heads, size).double(), cos[length], sin[length]))
        assert torch.equal(values[row][at], value[row].view(heads, size))
        turned = turn(query[row].view(heads, -1, size).double(), cos[length], sin[length])
        reads = slice(length + 1)
        scores = scaling * turned @ keys[row][:, reads].double().mT
        expected = (scores.softmax(-1) @ values[row][:, reads].double()).flatten()
        close(mixed[row], expected, bound=2.5e-6 * scale**2)
        for now, was in zip((keys, values), before, strict=True):
            was[row][at] = now[row][at]
    # Nothing but the new positions was written.
    assert torch.equal(keys, before[0])
    assert torch.equal(values, before[1])


def test_a_row_has_the_same_bits_whatever_stands_beside_it_and_whoever_computes_it(kernels):
    lengths = [60 - row for row in range(50)]
    whole = a_step(2, 4, 32, lengths)
    mixed = kernels.attend(*copy.deepcopy(whole))
    alone = [part[30:31].contiguous() for part in whole[:3]], [part[30:31].clone() for part in whole[5:8]]
    assert torch.equal(kernels.attend(*alone[0], *whole[3:5], *alone[1], whole[8])[0], mixed[30])
    states, weight, logits = numbers(500, 64), numbers(64, seed=1), numbers(500, 300)
    uniforms = torch.rand(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    told = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            told.append(kernels.attend(*copy.deepcopy(whole)))
            told.append(kernels.add_norm(states.clone(), None, weight, 1e-6))
            told.append(kernels.sample(logits, 0.7, uniforms)[1])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, three) for one, three in zip(told[:3], told[3:], strict=True))
    assert torch.equal(told[0], mixed)


def test_what_is_no_number_stays_none_and_stays_in_its_row(kernels):
    step = a_step(2, 4, 32, [40, 40, 40])
    clean = kernels.attend(*copy.deepcopy(step))
    step[6][1, :, 7] = torch.nan
    mixed = kernels.attend(*step)
    assert mixed[1].isnan().all()
    assert torch.equal(mixed[[0, 2]], clean[[0, 2]])
    logits = numbers(2, 300)
    logits[1, 8] = torch.nan
    tokens, logprobs = kernels.sample(logits, 1.0, torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert logprobs.isnan().tolist() == [False, True]
    assert 0 <= tokens.min() <= tokens.max() < 300


@pytest.mark.parametrize(("size", "temperature"), [(320, 1.0), (321, 0.5), (151_936, 1.3)])
def test_the_same_random_numbers_draw_the_tokens_that_torch_draws(kernels, size, temperature):
    logits = numbers(40, size, scale=3)
    logits[20:, 6] += 200  # the others have no weight beside it
    logits[:, 1::2] = -torch.inf
    uniforms = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = kernels.sample(logits, temperature, uniforms)
    expected, their_logprobs = _choose_from_all(logits, temperature, uniforms)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logprobs, their_logprobs, rtol=0, atol=1e-5)
    for uniform in (0.0, 1 - 2**-53):
        tokens, _ = kernels.sample(logits, temperature, torch.full_like(uniforms, uniform))
        assert not (tokens % 2).any()


def test_tensors_of_another_kind_are_refused(kernels):
    states, weight = numbers(4, 8), torch.ones(8)
    with pytest.raises(TypeError, match="contiguous float32 on the CPU, got contiguous torch.bfloat16"):
        kernels.add_norm(states.bfloat16(), None, weight, 1e-6)
    with pytest.raises(TypeError, match="got contiguous torch.float32 on meta"):
        kernels.add_norm(states, None, weight.to("meta"), 1e-6)
    with pytest.raises(TypeError, match="got strided torch.float32"):
        kernels.silu_multiply(states.T, states.T, states.T)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("vocabulary", [1, 255, 513, 3000])
def test_scores_of_targets_and_their_gradient(kernels, vocabulary, temperature):
    logits = numbers(9, vocabulary, scale=6)
    targets = torch.randint(vocabulary, (9,), generator=torch.Generator().manual_seed(1))
    wide = logits.double().requires_grad_()
    all_logprobs = (wide / temperature).log_softmax(1)
    logprobs = all_logprobs.gather(1, targets[:, None])[:, 0]
    entropy = -(all_logprobs.exp() * all_logprobs).sum(1)
    told = kernels.score(logits, targets, temperature)
    close(told[0], logprobs)
    close(told[1], entropy)
    close(told[2], (wide - wide.max(1, keepdim=True).values).div(temperature).logsumexp(1))
    pull, of_entropy = numbers(9, seed=2), numbers(9, seed=3)
    for spread in (None, of_entropy):
        value = (logprobs * pull).sum() + (0 if spread is None else (entropy * spread).sum())
        (expected,) = torch.autograd.grad(value * temperature, wide, retain_graph=True)
        given = (targets, temperature, *told[1:], pull, spread)
        close(kernels.score_backward(logits.clone(), *given), expected)


def test_no_number_among_logits_stays_none(kernels):
    logits = numbers(3, 40)
    logits[1, 7] = torch.nan
    targets = torch.zeros(3, dtype=torch.long)
    logprobs, entropy, log_sums = kernels.score(logits, targets, 1.0)
    assert logprobs.isnan().tolist() == entropy.isnan().tolist() == [False, True, False]
    grad = kernels.score_backward(logits, targets, 1.0, entropy, log_sums, torch.ones(3), torch.ones(3))
    assert grad.isnan().any(1).tolist() == [False, True, False]


def test_an_impossible_token_takes_nothing_from_the_others_gradient(kernels):
    """Where the entropy, then no number, is not asked for."""
    logits = numbers(2, 40)
    logits[:, 7] = -torch.inf
    targets = torch.tensor([3, 4])
    wide = logits.double().requires_grad_()
    wide.log_softmax(1)[[0, 1], targets].sum().backward()
    _, *kept = kernels.score(logits, targets, 1.0)
    close(kernels.score_backward(logits, targets, 1.0, *kept, torch.ones(2), None), wide.grad)


@pytest.mark.parametrize("targets", [torch.zeros(2, dtype=torch.int32), torch.zeros(3, dtype=torch.long)])
def test_targets_of_another_kind_are_refused(kernels, targets):
    with pytest.raises(TypeError, match="targets of 2 rows must be int64"):
        kernels.score(numbers(2, 40), targets, 1.0)


@pytest.mark.parametrize("target", [-1, 40])
def test_a_target_outside_the_vocabulary_is_refused(kernels, target):
    with pytest.raises(IndexError, match=rf"\[0, 40\), got 0 to {target}|got -1 to 0"):
        kernels.score(numbers(2, 40), torch.tensor([0, target]), 1.0)


# ------------------------------------------------------------------------------------------------------------
# Without them


@pytest.fixture
def reloaded():
    """The kernels are looked for anew, in the test and after it."""
    fused_kernels._load.cache_clear()
    yield
    fused_kernels._load.cache_clear()


def test_without_a_compiler_torch_computes_the_same(
    kernels, reloaded, random_model, chat_tokenizer, monkeypatch
):
    model = copy.deepcopy(random_model("qwen2")).float()

    def sample():
        engine = TorchEngine(model, chat_tokenizer)
        return engine.generate([[5, 6, 7], [8, 9]], 4, SamplingParams(12, 0.8), (3,))

    with_kernels = sample()
    monkeypatch.setenv("CC", "none")
    fused_kernels._load.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fused_kernels.kernels_for(torch.ones(1)) is None
    assert type(make_decoder(model, 5, 40)) is LlamaDecoder
    for group, others in zip(with_kernels, sample(), strict=True):
        for one, other in zip(group, others, strict=True):
            assert one.token_ids == other.token_ids
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@needs_a_compiler
@pytest.mark.parametrize(
    ("compiler", "told"),
    [
        ("false", "false, or .*exit status 1"),
        ("no-such-compiler", "there is no 'no-such-compiler'"),
        ("cc -fno-such-option", "no-such-option"),
        pytest.param(
            "cc -mno-fma",
            "without fused multiply-add",
            marks=pytest.mark.skipif(platform.machine() != "x86_64", reason="others always have it"),
        ),
        ('"cc', "No closing quotation"),
    ],
)
def test_a_compiler_that_fails_is_told_of_once(reloaded, monkeypatch, compiler, told):
    monkeypatch.setenv("CC", compiler)
    with pytest.warns(UserWarning, match=f"in place of fused_kernels.c.*{told}"):
        assert fused_kernels.kernels_for(torch.ones(1)) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fused_kernels.kernels_for(torch.ones(1)) is None


def test_other_numbers_are_torchs(kernels):
    assert fused_kernels.kernels_for(torch.ones(1, dtype=torch.float64)) is None
    assert fused_kernels.kernels_for(torch.ones(1, dtype=torch.bfloat16)) is None
    assert fused_kernels.kernels_for(torch.ones(1, device="meta")) is None


def test_nothing_else_of_the_process_computes_otherwise(kernels):
    # -ffast-math would make processors flush what is smaller than a normal number, everywhere.
    assert (torch.tensor(1e-40) * 1.0).item() > 0
