"""The tags as tokens of their own: rows that begin as the mean of their pieces', learn, and come back."""

import copy
import importlib.util
import shutil

import pytest
import torch
from families import write_folder
from quick import lines, quick_grpo, same, weights
from transformers import AutoModelForCausalLM

import export
from inference.engine import TorchEngine, _merged
from models import Policy, add_adapter, add_tag_rows, load_model, save_model
from optimizers import Muon, make_optimizer
from prompts import TAGS, encode_prompt
from tokenizer import add_tags, load_any_tokenizer, load_tokenizer
from train_grpo import main as train_grpo

TEXT = "<think>3 + 4 = 7</think><answer>7</answer>"


@pytest.fixture(scope="module", params=["qwen2", "llama", "gemma3"])
def folder(request, tmp_path_factory):
    """With rows to spare; with an embedding and a head of its own; with one that is scaled."""
    return write_folder(request.param, tmp_path_factory.mktemp(request.param))


def test_tags_become_tokens_once_and_read_as_before(folder, tmp_path):
    before, tokenizer = load_any_tokenizer(folder), load_any_tokenizer(folder)
    pieces = add_tags(tokenizer)
    assert [len(before.decode(ids)) for ids in pieces.values()] == [len(tag) for tag in TAGS]
    assert [tokenizer.encode(tag, add_special_tokens=False) for tag in TAGS] == [[token] for token in pieces]
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert len(ids) < len(before.encode(TEXT, add_special_tokens=False))
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXT
    assert add_tags(tokenizer) == {}
    tokenizer.save_pretrained(tmp_path)
    again = load_any_tokenizer(str(tmp_path))
    assert again.encode(TEXT, add_special_tokens=False) == ids
    assert add_tags(again) == {}


def test_new_rows_are_the_mean_of_the_pieces_and_the_old_ones_stay(folder):
    model, tokenizer = load_model(folder), load_any_tokenizer(folder)
    before = copy.deepcopy(model)
    pieces = add_tags(copy.deepcopy(tokenizer))
    assert add_tag_rows(model, tokenizer) == sorted(pieces)
    for get in ("get_input_embeddings", "get_output_embeddings"):
        old, new = getattr(before, get)().weight, getattr(model, get)().weight
        assert len(new) == model.config.vocab_size > max(pieces)
        for token, of in pieces.items():
            torch.testing.assert_close(new[token], old[of].mean(0))
        kept = [i for i in range(len(old)) if i not in pieces]
        assert torch.equal(new[kept], old[kept])
    ids = torch.tensor([[5, 6, 7]])
    of_old = [i for i in range(before.config.vocab_size) if i not in pieces]
    torch.testing.assert_close(model(ids).logits[..., of_old], before(ids).logits[..., of_old])
    assert add_tag_rows(model, tokenizer) == []


def test_a_bias_of_the_head_is_widened_too(random_model, chat_tokenizer):
    model, tokenizer = copy.deepcopy(random_model("phi")), copy.deepcopy(chat_tokenizer)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    bias, pieces = model.lm_head.bias.clone(), add_tags(copy.deepcopy(tokenizer))
    add_tag_rows(model, tokenizer)
    for token, of in pieces.items():
        torch.testing.assert_close(model.lm_head.bias[token], bias[of].mean())


@pytest.fixture
def adapted(folder):
    """A model with an adapter, its tokenizer and the ids of the new tokens."""
    model, tokenizer = load_model(folder), load_any_tokenizer(folder)
    tokens = add_tag_rows(model, tokenizer)
    return add_adapter(model, rank=4, seed=0, tokens=tokens), tokenizer, tokens


def test_an_adapter_trains_the_new_rows_and_no_others(folder, adapted):
    model, _, tokens = adapted
    policy = Policy(model)
    assert policy.has_plain_head == Policy(load_model(folder)).has_plain_head
    trained = {name for name, p in policy.named_parameters() if p.requires_grad and "lora" not in name}
    assert trained
    assert all("trainable_tokens_delta" in name for name in trained)
    tables = (model.get_input_embeddings, model.get_output_embeddings)
    before = [table().weight.detach().clone() for table in tables]
    optimizer = make_optimizer(policy, "muon", 1e-2, 0.0)
    (muon,) = (part for part in optimizer.parts if isinstance(part, Muon))
    of_muon = {id(p) for group in muon.param_groups for p in group["params"]}
    assert not of_muon & {id(p) for name, p in policy.named_parameters() if name in trained}
    ids = torch.tensor([[5, 6, tokens[0], 7, tokens[1]]])
    mask = torch.tensor([[False, True, True]])
    logprobs, _, _ = policy(ids, torch.ones_like(ids), mask)
    logprobs[mask].sum().backward()
    optimizer.step()
    for table, old in zip(tables, before, strict=True):
        moved = (table().weight != old).any(1).nonzero().squeeze(1).tolist()
        assert set(moved) <= set(tokens)
        assert tokens[0] in moved


def test_rows_of_tokens_are_merged_while_sampling_and_come_back(adapted):
    model, _, tokens = adapted
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name or "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[5, tokens[0], 7, tokens[3]]])
    frozen = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = model(ids).logits
    engine = TorchEngine(model, type("Tokenizer", (), {"eos_token_id": 2}))
    layers = engine._layers_to_merge()
    with _merged(layers), torch.no_grad():
        assert all(layer.merged for layer in layers)
        rows = model.get_base_model().get_input_embeddings().original_module.weight[tokens]
        (name,) = (name for name in frozen if name.endswith("embed_tokens.token_adapter.base_layer.weight"))
        assert not torch.equal(rows, frozen[name][tokens])
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(model(ids).logits, expected)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters())


def test_an_adapter_without_rows_for_the_tags_does_not_get_them(folder, tmp_path):
    tokenizer = load_any_tokenizer(folder)
    save_model(tmp_path, add_adapter(load_model(folder), rank=4, seed=0), tokenizer)
    with pytest.raises(ValueError, match="tags_as_tokens needs a new adapter"):
        quick_grpo(tmp_path / "run", model=str(tmp_path), lora_rank=4, tags_as_tokens=True).load_model(
            str(tmp_path)
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "adapter", "nf4"])
def test_tags_as_tokens_are_trained_resumed_and_exported(kind, tmp_path):
    if kind == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    base = write_folder({"whole": "qwen2", "adapter": "gemma3", "nf4": "llama"}[kind], tmp_path / "base")
    changes = {"model": base, "tags_as_tokens": True, "kl_coef": 0.1}
    changes |= {"lora_rank": 0 if kind == "whole" else 4, "quantize": "nf4" if kind == "nf4" else "none"}
    changes |= {"learning_rate": 1e-2, "warmup_steps": 0}
    changes |= {"total_steps": 2, "prompts_per_step": 2, "group_size": 2, "eval_every": 0, "save_every": 1}
    run = tmp_path / "run"
    assert train_grpo(quick_grpo(run, **changes)) == 0
    steps = lines(run / "metrics.jsonl")
    assert all(step["rollout/sampler_mismatch_kl"] < 1e-6 for step in steps)
    assert abs(steps[0]["policy/kl"]) < 1e-9  # the reference has the same rows
    tokenizer = load_tokenizer(str(run / "final"))
    tags = [tokenizer.convert_tokens_to_ids(tag) for tag in TAGS]
    assert set(tags) < set(encode_prompt(tokenizer, "3 + 4 = ?"))  # our system prompt names them all
    final = weights(run / "final")
    assert sum(value.numel() for value in final.values()) < 20_000 or kind == "whole"  # no whole embedding

    first = run / "checkpoints" / "step-000001"
    shutil.copytree(first, tmp_path / "again" / "checkpoints" / first.name)
    shutil.copy(run / "metrics.jsonl", tmp_path / "again")
    resumed = changes | {"resume": str(tmp_path / "again" / "checkpoints" / first.name)}
    assert train_grpo(quick_grpo(tmp_path / "again", **resumed)) == 0
    assert same(final, weights(tmp_path / "again" / "final"))

    to = tmp_path / "exported"
    assert export.main(export.ExportConfig(run=str(run), to=str(to), merge=kind != "whole")) == 0
    ids = torch.tensor([tags])
    trained, plain = load_model(str(run / "final")).eval(), AutoModelForCausalLM.from_pretrained(to)
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, trained(ids).logits, rtol=1e-3, atol=1e-3)
    assert load_tokenizer(str(to)).encode(TEXT) == tokenizer.encode(TEXT)
