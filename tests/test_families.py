"""Every family as its maker ships it: cold start, reinforcement learning, adapters, resume, export."""

import importlib.util
import json
import shutil

import pytest
import torch
from families import FAMILIES, build_tokenizer, write_folder
from quick import lines, quick_grpo, quick_sft, same, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

import export
from fused_kernels import kernels_for
from models import load_model
from prompts import SYSTEM_PROMPT, encode_prompt, render_prompt
from tokenizer import load_tokenizer
from train_grpo import main as train_grpo
from train_sft import main as train_sft

QUESTION = "3 + 4 = ?"
SHORT = {"total_steps": 2, "eval_every": 0, "save_every": 1, "warmup_steps": 0}
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture(scope="session", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="session")
def folder(family, tmp_path_factory):
    return write_folder(family, tmp_path_factory.mktemp(family))


def test_a_family_is_asked_in_its_own_template_and_reads_what_it_wrote(family, folder):
    tokenizer, own = load_tokenizer(folder), build_tokenizer(FAMILIES[family])
    prompt = render_prompt(tokenizer, QUESTION)
    messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": QUESTION}]
    if family == "gemma2":
        messages = [{"role": "user", "content": f"{SYSTEM_PROMPT}\n\n{QUESTION}"}]
    where = {"date_string": "26 Jul 2024"}
    assert prompt == own.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **where)
    ids = encode_prompt(tokenizer, QUESTION)
    assert ids == own.encode(prompt, add_special_tokens=False)
    assert tokenizer.decode(ids) == prompt
    if tokenizer.bos_token_id is not None:
        assert ids.count(tokenizer.bos_token_id) == 1  # the template's, and no second one


def check_run(output, folder):
    """What holds of every run of two steps."""
    steps = lines(output / "metrics.jsonl")
    assert [step["step"] for step in steps] == [1, 2]
    assert all(0 < step["policy/grad_norm"] < 1e3 for step in steps)
    assert all(step.get("rollout/sampler_mismatch_kl", 0) < 1e-6 for step in steps)
    final = output / "final"
    assert encode_prompt(load_tokenizer(str(final)), QUESTION) == encode_prompt(
        load_tokenizer(folder), QUESTION
    )
    environment = json.loads((output / "environment.json").read_text())
    assert environment["attention"] in ("sdpa", "eager")
    assert environment["fused_kernels"] is (kernels_for(torch.ones(1)) is not None)
    return final


@pytest.mark.slow
def test_a_family_takes_the_cold_start_and_reinforcement_learning(family, folder, tmp_path):
    assert train_sft(quick_sft(tmp_path / "sft", model=folder, examples_per_step=2, **SHORT)) == 0
    warm = check_run(tmp_path / "sft", folder)
    changes = {"model": str(warm), "prompts_per_step": 2, "group_size": 2, "learning_rate": 1e-4}
    assert train_grpo(quick_grpo(tmp_path / "grpo", **SHORT, **changes)) == 0
    final = check_run(tmp_path / "grpo", folder)
    assert not same(weights(warm), weights(final))
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    stops = (FAMILIES[family].eos, *FAMILIES[family].stops)
    stop = plain.generation_config.eos_token_id
    assert set(stop if isinstance(stop, list) else [stop]) == {*tokenizer.convert_tokens_to_ids(stops)}
    assert render_prompt(tokenizer, QUESTION) == render_prompt(load_tokenizer(folder), QUESTION)


@pytest.fixture(scope="session", params=["none", pytest.param("nf4", marks=needs_bitsandbytes)])
def adapter_run(request, folder, tmp_path_factory):
    """A run that trained an adapter, over whole weights or over 4 bits; and how to repeat it."""
    changes = {"model": folder, "lora_rank": 4, "quantize": request.param, "gradient_checkpointing": True}
    changes |= {"prompts_per_step": 2, "group_size": 2, "learning_rate": 1e-2, "kl_coef": 0.1}
    run = tmp_path_factory.mktemp("run")
    assert train_grpo(quick_grpo(run, **SHORT, **changes)) == 0
    return run, changes


@pytest.mark.slow
def test_an_adapter_of_a_family_is_merged(folder, adapter_run, tmp_path):
    run, _ = adapter_run
    final = check_run(run, folder)
    to = tmp_path / "merged"
    assert export.main(export.ExportConfig(run=str(run), to=str(to), merge=True)) == 0
    ids = torch.tensor([encode_prompt(load_tokenizer(str(to)), QUESTION)])
    trained, plain = load_model(str(final)).eval(), AutoModelForCausalLM.from_pretrained(to)
    with torch.no_grad():
        assert (trained(ids).logits - load_model(folder)(ids).logits).abs().max() > 1e-3
        torch.testing.assert_close(plain(ids).logits, trained(ids).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("adapter_run", ["none"], indirect=True)
def test_an_adapter_of_a_family_resumes_to_the_same_bits(adapter_run, tmp_path):
    run, changes = adapter_run
    first = run / "checkpoints" / "step-000001"
    shutil.copytree(first, tmp_path / "checkpoints" / first.name)
    shutil.copy(run / "metrics.jsonl", tmp_path)
    changes = changes | {"resume": str(tmp_path / "checkpoints" / first.name)}
    assert train_grpo(quick_grpo(tmp_path, **SHORT, **changes)) == 0
    assert same(weights(run / "final"), weights(tmp_path / "final"))
    assert not same(weights(run / "final"), weights(first))
