"""Weights in 4 bits under an adapter, and moments in 8, by the real bitsandbytes."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import export
from batches import pad_batch
from inference import SamplingParams
from inference.decoders import LlamaDecoder, make_decoder
from inference.engine import TorchEngine
from models import Policy, add_adapter, checkpoint_activations, load_model, save_model
from optimizers import make_optimizer

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
PROMPTS = [[5, 6, 7, 8], [9], [5, 6, 7, 8]]
COMPLETIONS = [[20, 21, 22], [23], [24, 25]]


@pytest.fixture(params=["qwen2", "llama", "gemma3_text"])
def base(request, tmp_path, random_model, chat_tokenizer):
    """A folder of a random model in float32."""
    folder = tmp_path / "base"
    save_model(folder, copy.deepcopy(random_model(request.param)).float(), chat_tokenizer)
    return str(folder)


def learn(policy):
    """One step of AdamW on something."""
    optimizer = make_optimizer(policy, "adamw", 1e-1, 0.0)
    batch = pad_batch(PROMPTS, COMPLETIONS, 0)
    logprobs, _, _ = policy.train()(**batch)
    (-logprobs[batch["completion_mask"]].sum()).backward()
    optimizer.step()
    policy.eval()


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([[5, 6, 7, 8, 20]])).logits


@pytest.mark.slow
def test_four_bits_are_learned_over_saved_and_merged(base, tmp_path, chat_tokenizer):
    model = load_model(base, quantize="nf4")
    linear = model.get_decoder().layers[0].mlp.up_proj
    assert linear.weight.dtype == torch.uint8
    assert linear.weight.numel() * 2 == linear.in_features * linear.out_features
    whole = load_model(base)
    assert (logits(model) - logits(whole)).abs().max() > 0

    tuned = add_adapter(model, rank=4, seed=0)
    frozen = {name: p.clone() for name, p in tuned.named_parameters() if not p.requires_grad}
    policy = Policy(tuned)
    before = logits(tuned)
    learn(policy)
    after = logits(tuned)
    assert (after - before).abs().max() > 0.1
    assert all(torch.equal(p, frozen[name]) for name, p in tuned.named_parameters() if name in frozen)

    save_model(tmp_path / "adapter", tuned, chat_tokenizer)
    again = load_model(str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(again), after, rtol=0, atol=1e-4)

    to = tmp_path / "merged"
    export.main(export.ExportConfig(run=str(tmp_path / "adapter"), to=str(to), merge=True))
    plain = AutoModelForCausalLM.from_pretrained(to)
    torch.testing.assert_close(logits(plain), after, rtol=1e-3, atol=1e-3)
    assert "quantization_config" not in json.loads((to / "config.json").read_text())


def test_four_bits_sample_what_they_score(base):
    tuned = add_adapter(load_model(base, quantize="nf4"), rank=4, seed=0)
    policy = Policy(tuned)
    learn(policy)
    engine = TorchEngine(tuned, type("Tokenizer", (), {"eos_token_id": 2}))
    groups = engine.generate(PROMPTS, 2, SamplingParams(6), (0,))
    rows = [(prompt, c) for prompt, group in zip(PROMPTS, groups, strict=True) for c in group]
    batch = pad_batch([prompt for prompt, _ in rows], [c.token_ids for _, c in rows], 0)
    with torch.no_grad():
        logprobs, _, _ = policy(**batch)
    sampled = torch.tensor([value for _, c in rows for value in c.logprobs])
    torch.testing.assert_close(
        logprobs[batch["completion_mask"]].double(), sampled.double(), rtol=0, atol=1e-4
    )


def test_the_lean_decoder_takes_four_bits(tmp_path, random_model, chat_tokenizer):
    save_model(tmp_path, copy.deepcopy(random_model("qwen2")).float(), chat_tokenizer)
    assert isinstance(make_decoder(load_model(str(tmp_path), quantize="nf4"), 2, 20), LlamaDecoder)


def test_the_built_in_model_is_not_quantized():
    with pytest.raises(ValueError, match="quantize"):
        load_model("tiny", quantize="nf4")


def test_checkpointed_blocks_have_the_same_gradient(tiny):
    batch = pad_batch(PROMPTS, COMPLETIONS, 0)
    gradients, passes = [], []
    for is_checkpointed in (False, True):
        model = copy.deepcopy(tiny[0])
        if is_checkpointed:
            checkpoint_activations(model)
        policy = Policy(model).train()
        model.model.layers[0].mlp.up_proj.register_forward_pre_hook(lambda *args: passes.append(1))
        logprobs, _, _ = policy(**batch)
        logprobs[batch["completion_mask"]].sum().backward()
        gradients.append([p.grad for p in policy.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)
    assert len(passes) == 1 + 2  # computed again for the gradient


def test_moments_in_eight_bits_move_the_weights_as_adamw_does(tiny):
    weights = {}
    for name in ("adamw", "adamw_8bit"):
        policy = Policy(copy.deepcopy(tiny[0]))
        optimizer = make_optimizer(policy, name, 1e-3, 0.1)
        for _ in range(3):
            batch = pad_batch(PROMPTS, COMPLETIONS, 0)
            logprobs, _, _ = policy(**batch)
            (-logprobs[batch["completion_mask"]].sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
        weights[name] = torch.cat([p.detach().flatten() for p in policy.parameters()])
        if name == "adamw_8bit":
            states = [state["state1"] for state in optimizer.state.values()]
            assert sum(state.numel() for state in states if state.dtype == torch.uint8) > 400_000
    start = torch.cat([p.detach().flatten() for p in tiny[0].parameters()])
    moved, expected = weights["adamw_8bit"] - start, weights["adamw"] - start
    assert torch.cosine_similarity(moved, expected, 0) > 0.95
    with pytest.raises(ValueError, match="paged_adamw_8bit needs a GPU"):
        make_optimizer(policy, "paged_adamw_8bit", 1e-3, 0.1)
