"""Completions scored without padding, each prompt once, against the library's forward over padded rows."""

import copy

import pytest
import torch
from conftest import needs_a_compiler
from peft import LoraConfig, get_peft_model
from test_decoders import LEAN, build

import llama
import losses
from batches import pad_batch
from fused_kernels import kernels_for
from models import Policy

PROMPTS = [[5, 6, 7, 8], [9], [5, 6, 7, 8], [9], [9], [11, 12], [5, 6, 7, 8]]
COMPLETIONS = [[20, 21], [22], [23, 24, 25], [], [26, 27, 28, 29, 30], [31], [32, 33, 34]]


def assert_fused_equals_the_library(policy, batch, monkeypatch):
    """In float32, which the kernels compute in, held to the library in float64."""
    fused = copy.deepcopy(policy).float()
    monkeypatch.setattr(Policy, "_skips_padding", lambda self, positions: True)
    with monkeypatch.context() as patch:
        patch.delattr(llama.Packing, "attend")  # so nobody else computes it
        patch.delattr(losses, "_log_softmax")
        got = figures(fused, batch)
    monkeypatch.setattr(Policy, "_skips_padding", lambda self, positions: False)
    for ours, theirs in zip(got, figures(policy, batch), strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def figures(policy, batch):
    """Log-probabilities and entropies of the tokens that count, and the gradient of their squares."""
    mask = batch["completion_mask"]
    logprobs, entropy, _ = policy(**batch, temperature=0.8)
    counted = torch.cat([logprobs[mask], entropy[mask]])
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    return counted, *torch.autograd.grad(counted.square().sum(), parameters)


def assert_equals_the_library(policy, batch, monkeypatch):
    monkeypatch.setattr(Policy, "_skips_padding", lambda self, positions: True)
    got = figures(policy, batch)
    monkeypatch.setattr(Policy, "_skips_padding", lambda self, positions: False)
    for ours, theirs in zip(got, figures(policy, batch), strict=True):
        # The library takes norms in float32 even in a model in float64.
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


@pytest.mark.parametrize("name", LEAN)
def test_completions_without_padding_have_the_librarys_figures_and_gradient(name, monkeypatch):
    policy = Policy(build(name, LEAN[name]))
    assert policy._skips_padding(9)
    assert_equals_the_library(policy, pad_batch(PROMPTS, COMPLETIONS, 0), monkeypatch)


@needs_a_compiler
@pytest.mark.parametrize("name", LEAN)
def test_fused_blocks_have_the_librarys_figures_and_gradient(name, monkeypatch):
    policy = Policy(build(name, LEAN[name]))
    assert_fused_equals_the_library(policy, pad_batch(PROMPTS, COMPLETIONS, 0), monkeypatch)


def adapted():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tuned = get_peft_model(build("qwen2", {}), LoraConfig(r=2, target_modules="all-linear"))
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return Policy(tuned.double())


@needs_a_compiler
def test_an_adapter_learns_from_fused_blocks(monkeypatch):
    assert_fused_equals_the_library(adapted(), pad_batch(PROMPTS, COMPLETIONS, 0), monkeypatch)


def test_an_adapter_learns_without_padding(monkeypatch):
    policy = adapted()
    assert policy._skips_padding(9)
    assert_equals_the_library(policy, pad_batch(PROMPTS, COMPLETIONS, 0), monkeypatch)


@pytest.mark.parametrize(
    ("prompts", "completions"),
    [
        ([[5, 6]] * 3, [[20, 21, 22], [23, 24, 25], [26, 27, 28]]),  # nothing is padded
        ([[5, 6]] * 2, [[20], [21]]),  # nothing but prompts goes through
        ([[0, 5], [5]], [[20, 0], [0, 21]]),  # the token that pads, where it counts
        ([[5]], [[20, 21]]),
    ],
)
def test_every_shape_of_a_batch_goes_through(prompts, completions, monkeypatch):
    batch = pad_batch(prompts, completions, 0)
    assert_equals_the_library(Policy(build("qwen2", {})), batch, monkeypatch)
    if kernels_for(torch.ones(1)):
        assert_fused_equals_the_library(Policy(build("qwen2", {})), batch, monkeypatch)


def test_tokens_that_do_not_count_are_still_read(monkeypatch):
    batch = pad_batch(PROMPTS, COMPLETIONS, 0)
    batch["completion_mask"][[2, 4], 1] = False
    batch["completion_mask"][0] = False
    assert_equals_the_library(Policy(build("qwen2", {})), batch, monkeypatch)


def test_each_prompt_and_no_padding_goes_through_the_blocks():
    model = build("qwen2", {})
    read = []
    model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: read.append(len(output)))
    Policy(model)(**pad_batch(PROMPTS, COMPLETIONS, 0))
    read = read[1:]  # the first is the question whether the head is plain
    distinct = {tuple(prompt) for prompt in PROMPTS}
    assert read == [sum(map(len, distinct)) + sum(max(len(c) - 1, 0) for c in COMPLETIONS)]


@pytest.mark.parametrize(
    ("weights", "half", "made_in"),
    [
        (torch.float32, False, torch.float32),
        (torch.float32, True, torch.bfloat16),
        (torch.float64, True, torch.float64),  # which autocast leaves alone
    ],
)
def test_who_may_look_where_is_made_once_and_makes_no_bit_of_difference(weights, half, made_in, monkeypatch):
    monkeypatch.setattr(llama, "fused_kernels", lambda model: None)
    policy = Policy(build("llama", {}).to(weights)).train()
    batch = pad_batch(PROMPTS, COMPLETIONS, 0)
    made = []

    def told(of_truths):
        policy.zero_grad()
        with monkeypatch.context() as patch, torch.autocast("cpu", torch.bfloat16, enabled=half):
            whole = llama.Packing.mask_for
            patch.setattr(
                llama.Packing,
                "mask_for",
                lambda self, query: self.sees if of_truths else made.append(whole(self, query)) or made[-1],
            )
            logprobs, *_ = policy(**batch)
        logprobs.sum().backward()
        return [logprobs, *(p.grad for p in policy.parameters() if p.grad is not None)]

    ours, theirs = told(False), told(True)
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))
    assert len(made) == policy.model.config.num_hidden_layers > 1
    assert len({id(mask) for mask in made}) == 1
    assert made[0].dtype == made_in


def test_blocks_are_left_to_the_library_where_it_does_more():
    model = build("qwen2", {})
    assert Policy(model)._skips_padding(9)
    assert not Policy(model, "shared")._skips_padding(9)
    assert not Policy(build("qwen2", {"attention_dropout": 0.1}))._skips_padding(9)
    assert not Policy(build("gemma3_text", {"head_dim": 8}))._skips_padding(9)


def test_a_window_is_left_to_the_library_where_a_text_is_longer():
    model = build("mistral", {"head_dim": 8, "sliding_window": 39})
    assert llama.is_llama(model, 39)
    assert not llama.is_llama(model, 40)
