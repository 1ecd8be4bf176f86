import weakref

import numpy as np
import oracles
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import losses


def head_case(batch=2, tokens=5, width=6, vocabulary=11, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(batch, tokens, width, generator=generator, dtype=torch.float64)
    head = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, (batch, tokens), generator=generator)
    return hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_(), targets


def plain_logprobs(hidden, head, targets, temperature=1.0):
    all_logprobs = (hidden @ head.T / temperature).log_softmax(-1)
    logprobs = all_logprobs.gather(-1, targets[..., None])[..., 0]
    return logprobs, -(all_logprobs.exp() * all_logprobs).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.9])
def test_token_logprobs_equal_oracle(temperature):
    hidden, head, targets = head_case()
    got = losses.token_logprobs(hidden, head, targets, temperature)
    expected = oracles.token_logprobs(
        hidden.detach().numpy(), head.detach().numpy(), targets.numpy(), temperature
    )
    for ours, reference in zip(got, expected, strict=True):
        assert ours.shape == targets.shape
        np.testing.assert_allclose(ours.detach(), reference, atol=1e-9)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 99, None])
def test_token_logprobs_pass_gradcheck(chunk_tokens):
    hidden, head, targets = head_case(tokens=3, width=2, vocabulary=4)

    def run(hidden, head):
        return losses.token_logprobs(hidden, head, targets, 0.7, chunk_tokens)

    # alone, the gradient of the other output arrives as None; together their terms share one pass
    assert torch.autograd.gradcheck(lambda *args: run(*args)[0], (hidden, head))
    assert torch.autograd.gradcheck(lambda *args: run(*args)[1], (hidden, head))
    assert torch.autograd.gradcheck(lambda *args: torch.mul(*run(*args)), (hidden, head))


@pytest.mark.parametrize("chunk_tokens", [3, None])
def test_fused_kernels_are_held_to_float64(kernels, chunk_tokens):
    exact, got = ([*head_case(4, 16, 32, 700, dtype)] for dtype in (torch.float64, torch.float32))
    for hidden, head, targets in (exact, got):
        # Where the products are in float64, torch computes all.
        logprobs, entropy = losses.token_logprobs(hidden, head, targets, 0.8, chunk_tokens, kernels)
        (logprobs.sin().sum() + 2 * entropy.sum()).backward()
        torch.testing.assert_close(logprobs, plain_logprobs(hidden, head, targets, 0.8)[0])
    for ours, reference in zip(got[:2], exact[:2], strict=True):
        assert (ours.grad - reference.grad).norm() <= 2e-6 * reference.grad.norm()


def record_products(monkeypatch):
    """Rows of all the logits [rows, V] that `token_logprobs` computes."""
    rows, original = [], losses._logits

    def spy(states, weight):
        rows.append(len(states))
        return original(states, weight)

    monkeypatch.setattr(losses, "_logits", spy)
    return rows


@pytest.mark.parametrize("is_fused", [False, True])
def test_no_more_than_a_chunk_of_logits_exists_at_once(monkeypatch, request, is_fused):
    rows = record_products(monkeypatch)
    hidden, head, targets = head_case(dtype=torch.float32)
    kernels = request.getfixturevalue("kernels") if is_fused else None
    sum(losses.token_logprobs(hidden, head, targets, chunk_tokens=4, kernels=kernels)).sum().backward()
    assert rows == [4, 4, 2, 4, 4, 2]
    rows.clear()
    monkeypatch.setattr(losses, "MAX_CHUNK_LOGITS", 70)  # 70 logits are six tokens of a vocabulary of 11
    losses.token_logprobs(hidden, head, targets)
    assert rows == [6, 4]


class LiveChunks(TorchDispatchMode):
    """How many tensors of a shape there were at most at once."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.live, self.most = shape, {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape == self.shape:
            self.live[result.untyped_storage().data_ptr()] = weakref.ref(result)
            self.most = max(self.most, sum(tensor() is not None for tensor in self.live.values()))
        return result


@pytest.mark.parametrize(("is_fused", "up", "down"), [(True, 1, 1), (False, 3, 2)])
def test_no_more_copies_of_a_chunk_are_held_than_planned(request, is_fused, up, down):
    """By plan.py."""
    hidden, head, targets = head_case(1, 12, dtype=torch.float32)
    kernels = request.getfixturevalue("kernels") if is_fused else None
    with LiveChunks((3, len(head))) as forward:
        figures = losses.token_logprobs(hidden, head, targets, 0.7, 3, kernels)
    with LiveChunks((3, len(head))) as backward:
        sum(figures).sum().backward()
    assert (forward.most, backward.most) == (up, down)


def test_only_numbers_per_token_are_kept_for_backward():
    hidden, head, targets = head_case()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        losses.token_logprobs(hidden, head, targets)
    assert torch.Size([10]) in kept
    assert all(shape.numel() <= max(hidden.numel(), head.numel()) for shape in kept)
    assert not any(shape.numel() == targets.numel() * len(head) for shape in kept)


class RecordCalls(TorchDispatchMode):
    """Every operation that runs, with the shape of its first argument."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        shape = args[0].shape if args and isinstance(args[0], torch.Tensor) else None
        self.calls.append((function, shape))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_frozen_input_gets_no_gradient_and_the_other_the_same(frozen):
    hidden, head, targets = head_case()
    sum(losses.token_logprobs(hidden, head, targets)).sum().backward()
    free = {"hidden": head, "head": hidden}[frozen]
    expected, free.grad = free.grad, None
    inputs = {"hidden": hidden, "head": head}
    inputs[frozen] = inputs[frozen].detach()
    with RecordCalls() as record:
        sum(losses.token_logprobs(inputs["hidden"], inputs["head"], targets)).sum().backward()
    torch.testing.assert_close(free.grad, expected)
    assert inputs[frozen].grad is None
    products = [function for function, _ in record.calls if function is torch.ops.aten.mm.default]
    assert len(products) == 3  # forward, logits again, one gradient


def test_unused_entropy_costs_nothing_in_backward():
    hidden, head, targets = head_case()
    passes = []
    for use_entropy in (False, True):
        logprobs, entropy = losses.token_logprobs(hidden, head, targets)
        loss = logprobs.sum() + (entropy.sum() if use_entropy else 0)
        with RecordCalls() as record:
            loss.backward()
        passes.append(sum(shape == (targets.numel(), len(head)) for _, shape in record.calls))
    assert passes[0] < passes[1]


def test_without_gradients_nothing_is_kept():
    hidden, head, targets = head_case()
    expected = [output.detach() for output in losses.token_logprobs(hidden, head, targets)]
    with torch.no_grad():
        got = losses.token_logprobs(hidden, head, targets)
    for ours, reference in zip(got, expected, strict=True):
        assert torch.equal(ours, reference)
        assert ours.grad_fn is None


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_products_with_a_float32_softmax(autocast, temperature):
    hidden, head, targets = head_case(4, 16, 32, 200, torch.float32)
    hidden, head = (hidden / 4).detach().requires_grad_(), (head / 2).detach().requires_grad_()
    if not autocast:
        hidden, head = (x.detach().bfloat16().requires_grad_() for x in (hidden, head))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = losses.token_logprobs(hidden, head, targets, temperature, chunk_tokens=7)
        assert torch.is_autocast_enabled("cpu") is autocast
    logits = (hidden.bfloat16() @ head.bfloat16().T).float() / temperature
    exact = logits.double().log_softmax(-1)
    expected = exact.gather(-1, targets[..., None])[..., 0], -(exact.exp() * exact).sum(-1)
    for ours, reference in zip(got, expected, strict=True):
        assert ours.dtype == torch.float32
        np.testing.assert_allclose(ours.detach(), reference.detach(), atol=1e-5)
    sum(got).sum().backward()
    wide_hidden, wide_head = (x.detach().double().requires_grad_() for x in (hidden, head))
    sum(plain_logprobs(wide_hidden, wide_head, targets, temperature)).sum().backward()
    for ours, wide in ((hidden, wide_hidden), (head, wide_head)):
        assert ours.grad.dtype == ours.dtype
        assert (ours.grad - wide.grad).norm() < 0.01 * wide.grad.norm()


def test_head_gradient_accumulates_in_float32():
    """Chunks that add 256, 1 and 1: a bfloat16 sum would stay at 256."""
    hidden = torch.tensor([[[512.0], [2.0], [2.0]]], dtype=torch.bfloat16)
    head = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    logprobs, _ = losses.token_logprobs(hidden, head, torch.zeros(1, 3, dtype=torch.int64), chunk_tokens=1)
    logprobs.sum().backward()
    assert head.grad.tolist() == [[258.0], [-258.0]]


@pytest.mark.parametrize("is_fused", [False, True])
def test_large_logits_stay_finite(request, is_fused):
    hidden, head = torch.tensor([[[1000.0]]]), torch.tensor([[1.0], [-1.0]], requires_grad=True)
    kernels = request.getfixturevalue("kernels") if is_fused else None
    logprobs, entropy = losses.token_logprobs(hidden, head, torch.tensor([[1]]), kernels=kernels)
    (logprobs + entropy).sum().backward()
    assert logprobs.item() == -2000
    assert entropy.item() == 0
    assert head.grad.isfinite().all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: losses.token_logprobs(x, x, x[:3, 0].long()), ["[3]", "shift by one"]),
        (lambda x: losses.token_logprobs(x, x, x[:, 0].long(), 0.0), ["temperature", "> 0", "0.0"]),
        (lambda x: losses.token_logprobs(x, x, x[:, 0].long(), 1.0, 0), ["chunk_tokens", ">= 1", "got 0"]),
    ],
)
def test_wrong_argument_is_named_with_what_was_got_and_what_is_allowed(call, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are checked below, in any order
        call(torch.ones(4, 4))
    for word in words:
        assert word in str(error.value)
