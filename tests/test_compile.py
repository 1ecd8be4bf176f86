"""Blocks through torch.compile: the same gradient, compiled a few times and not once a step."""

import os
import shutil
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from quick import quick_grpo, weights
from test_decoders import LEAN, build
from test_llama import COMPLETIONS, PROMPTS, figures
from torch._dynamo.utils import counters

import models
from batches import pad_batch
from models import Policy, checkpoint_activations, compile_updates
from train_grpo import main

needs_a_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler"
)


@pytest.fixture(autouse=True)
def compiled_afresh():
    """No test finds what another has compiled."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def adapted(model):
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return tuned


@pytest.mark.slow
@needs_a_compiler
@pytest.mark.parametrize(
    ("name", "is_checkpointed", "has_adapter"), [("qwen2", True, False), ("llama", False, True)]
)
def test_compiled_blocks_have_the_same_gradient_and_are_compiled_once(name, is_checkpointed, has_adapter):
    model = build(name, LEAN[name])  # float64: in float32 the roundings alone add up to 1e-5 and more
    if is_checkpointed:
        checkpoint_activations(model)
    model = adapted(model) if has_adapter else model
    policy = Policy(model).train()
    # Other numbers of rows, of tokens and of distinct prompts, with padding and without.
    batches = [pad_batch(PROMPTS[:rows], COMPLETIONS[:rows], 0) for rows in (7, 5, 4, 2)]
    batches.append(pad_batch([[5, 6]] * 3, [[20, 21, 22]] * 3, 0))
    expected, names = [figures(policy, batch) for batch in batches], list(model.state_dict())

    compile_updates(model)
    got = [figures(policy, batches[0])]
    compilations = counters["stats"]["unique_graphs"]
    # Two parts of a block; under adapters the first block reads states without a gradient.
    assert 2 <= compilations <= 4
    got += [figures(policy, batch) for batch in batches[1:]]
    assert counters["stats"]["unique_graphs"] == compilations
    assert not counters["graph_break"]
    for ours, theirs in zip(got, expected, strict=True):
        for ours_of, theirs_of in zip(ours, theirs, strict=True):
            assert (ours_of - theirs_of).norm() <= 1e-5 * theirs_of.norm()

    policy.eval()  # as what a rollout is compared with is scored
    with torch.no_grad():
        for batch in batches[:3]:
            policy(**batch)
    # Without a gradient once more: the first block, whose input a checkpointed model marks, and the rest.
    assert counters["stats"]["unique_graphs"] <= compilations + 4
    assert list(model.state_dict()) == names


@pytest.mark.slow
@needs_a_compiler
def test_a_compiled_run_moves_weights_as_another_and_goes_on(tmp_path):
    """What was stopped compiled goes on uncompiled, and the other way round."""
    runs = {"plain": (False, False), "compiled": (True, True), "changed": (False, True)}
    changes = {"lr_schedule": "constant", "kl_coef": 0.1}
    for name, parts in runs.items():
        for steps, is_compiled in zip((2, 4), parts, strict=True):
            changes |= {"total_steps": steps, "torch_compile": is_compiled}
            assert main(quick_grpo(tmp_path / name, **changes)) == 0
    assert counters["stats"]["unique_graphs"] <= 8
    plain = weights(tmp_path / "plain" / "final")
    for name in ("compiled", "changed"):
        moved = weights(tmp_path / name / "final")
        assert moved.keys() == plain.keys()
        assert max((moved[key] - plain[key]).abs().max() for key in plain) <= 1e-5


def test_what_cannot_be_compiled_is_refused_with_the_remedy(monkeypatch):
    with pytest.raises(ValueError, match="torch_compile is for .*qwen3, got gpt2; leave it out"):
        compile_updates(build("gpt2", {}))
    monkeypatch.setenv("CXX", f"{sys.executable} -such --words")
    compile_updates(build("qwen2", {}))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler, and no-such-compiler is not there"):
        compile_updates(build("qwen2", {}))
    assert models.os.environ["CXX"] == "no-such-compiler"
