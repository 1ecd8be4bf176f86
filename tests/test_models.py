import copy
import json
import sys
from contextlib import nullcontext

import pytest
import torch
from conftest import SHAPE
from tokenizers import AddedToken
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

import models
import prompts
from batches import pad_batch
from tokenizer import load_tokenizer

# ------------------------------------------------------------------------------------------------------------
# Loading and saving


def check_plain_transformers_agree(folder, model, tokenizer):
    plain_model, plain_tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    question = [{"role": "user", "content": "3 + 4 = ?"}]
    text = plain_tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert text == prompts.render_prompt(tokenizer, "3 + 4 = ?")
    ids = plain_tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    assert ids[0].tolist() == prompts.encode_prompt(tokenizer, "3 + 4 = ?")
    with torch.no_grad():
        assert torch.equal(plain_model(ids).logits, model(ids).logits)
    return plain_model


def test_a_saved_tiny_model_is_the_same_in_plain_transformers(tiny, tmp_path):
    model, tokenizer = tiny
    models.save_model(tmp_path, model, tokenizer)
    plain = check_plain_transformers_agree(tmp_path, model, tokenizer)
    assert plain.generation_config.eos_token_id == tokenizer.eos_token_id
    assert plain.generation_config.pad_token_id == tokenizer.pad_token_id
    check_plain_transformers_agree(tmp_path, models.load_model(str(tmp_path)), load_tokenizer(str(tmp_path)))


@pytest.fixture(scope="module")
def llama_folder(chat_tokenizer, tmp_path_factory):
    """A model as someone else would bring it: no system prompt, stops at what its config says."""
    folder = tmp_path_factory.mktemp("llama")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(chat_tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            eos_token_id=0,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    chat_tokenizer.save_pretrained(folder)
    return folder


def test_a_foreign_model_is_prepared_and_comes_back_as_it_was_trained(llama_folder, tmp_path):
    model, tokenizer = models.load_model(str(llama_folder)), load_tokenizer(str(llama_folder))
    assert model.dtype == torch.float32
    assert prompts.SYSTEM_PROMPT in prompts.render_prompt(tokenizer, "3 + 4 = ?")
    models.save_model(tmp_path, model, tokenizer)
    plain = check_plain_transformers_agree(tmp_path, model, tokenizer)
    # Both what the tokenizer's turn ends with and what the model stopped at before.
    assert plain.generation_config.eos_token_id == [0, tokenizer.eos_token_id]
    other = load_tokenizer(str(llama_folder), system_prompt="be brief")
    assert "system\nbe brief" in prompts.render_prompt(other, "3 + 4 = ?")


def test_a_tokenizer_without_padding_pads_with_its_eos(llama_folder, chat_tokenizer, tmp_path):
    copy_with(llama_folder, tmp_path, pad_token=None)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == chat_tokenizer.eos_token_id


def copy_with(source, target, **settings):
    """Copy a model folder with other settings of the tokenizer; None takes one out."""
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    path = target / "tokenizer_config.json"
    config = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def test_a_missing_model_is_told_with_a_remedy(tmp_path):
    for load in (models.load_model, load_tokenizer):
        for name in (str(tmp_path / "nothing"), "outputs/nothing", "qwen", "./a", "a/b/c"):
            with pytest.raises(FileNotFoundError) as error:
                load(name)
            assert f"model '{name}' is not there" in str(error.value)
            assert "Qwen/Qwen2.5-0.5B-Instruct" in str(error.value)
            assert "'tiny'" in str(error.value)


def test_a_hub_name_that_cannot_be_had_is_told():
    for load, what in ((models.load_model, "model"), (load_tokenizer, "the tokenizer of model")):
        with pytest.raises(FileNotFoundError, match=f"^{what} 'nobody/nothing' could not be loaded: "):
            load("nobody/nothing")


def test_a_folder_that_is_no_model_is_told(tmp_path):
    for load in (models.load_model, load_tokenizer):
        with pytest.raises(FileNotFoundError, match="is a folder without a config.json; give a"):
            load(str(tmp_path))


def test_a_folder_without_a_tokenizer_or_weights_is_told(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(FileNotFoundError, match="has no tokenizer .*; copy the tokenizer files"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"^model '.*' could not be loaded: .*model\.safetensors"):
        models.load_model(str(tmp_path))


def test_a_tokenizer_that_never_stops_is_refused(llama_folder, tmp_path):
    copy_with(llama_folder, tmp_path, eos_token=None)
    with pytest.raises(ValueError, match=r"has no eos_token: set one in tokenizer_config\.json"):
        load_tokenizer(str(tmp_path))


def test_a_template_that_refuses_a_system_message_asks_before_the_question(llama_folder, tmp_path):
    copy_with(llama_folder, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{{ messages[0].content }}"
    )
    tokenizer = load_tokenizer(str(tmp_path))
    assert prompts.render_prompt(tokenizer, "3 + 4 = ?") == f"{prompts.SYSTEM_PROMPT}\n\n3 + 4 = ?"
    tokenizer = load_tokenizer(str(tmp_path), system_prompt="")
    assert prompts.render_prompt(tokenizer, "3 + 4 = ?") == "3 + 4 = ?"
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('Not like this') }}")
    with pytest.raises(ValueError, match=r"^model '.*' cannot be asked: .*Not like this"):
        load_tokenizer(str(tmp_path))


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM
print("this ran")
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def remote_folder(llama_folder, tmp_path, monkeypatch):
    """The same model, but for code of its own."""
    folder = tmp_path / "remote"
    folder.mkdir()
    copy_with(llama_folder, folder)
    (folder / "own.py").write_text(REMOTE)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])
    return folder


def test_code_of_a_model_runs_only_where_it_is_trusted(remote_folder, llama_folder, tmp_path, capsys):
    for load in (models.load_model, load_tokenizer, models.load_reward_model):
        arguments = ("cpu",) if load is models.load_reward_model else ()
        with pytest.raises(ValueError, match="brings Python code of its own.*give --trust_remote_code"):
            load(str(remote_folder), *arguments)
    assert "this ran" not in capsys.readouterr().out
    model = models.load_model(str(remote_folder), trust_remote_code=True)
    tokenizer = load_tokenizer(str(remote_folder), trust_remote_code=True)
    assert "this ran" in capsys.readouterr().out
    assert type(model).__name__ == "OwnModel"
    ids = torch.tensor([[5, 6, 7]])
    expected = models.load_model(str(llama_folder))(ids).logits
    assert torch.equal(model(ids).logits, expected)
    # What a run saves of it can be gone on from, under the same condition.
    saved = tmp_path / "saved"
    models.save_model(saved, model, tokenizer)
    with pytest.raises(ValueError, match="--trust_remote_code"):
        models.load_model(str(saved))
    again = models.load_model(str(saved), trust_remote_code=True)
    assert torch.equal(again(ids).logits, expected)


def with_token(source, target, tokenizer, **how):
    """Copy a model folder, its tokenizer one token longer."""
    copy_with(source, target)
    longer = copy.deepcopy(tokenizer)
    longer.add_tokens([AddedToken("<think>", normalized=False, **how)])
    longer.save_pretrained(target)


def test_a_tokenizer_larger_than_the_embedding_is_refused(llama_folder, chat_tokenizer, tmp_path):
    with_token(llama_folder, tmp_path, chat_tokenizer)
    rows = len(chat_tokenizer)
    with pytest.raises(ValueError, match=rf"1 tokens, such as '<think>', past the {rows} rows .* copy the"):
        load_tokenizer(str(tmp_path))
    model = models.load_model(str(llama_folder))
    model.resize_token_embeddings(rows + 1)
    model.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).encode("<think>") == [rows]


def test_a_placeholder_that_no_text_becomes_may_stand_past_the_embedding(
    llama_folder, chat_tokenizer, tmp_path
):
    copy_with(llama_folder, tmp_path)
    longer = copy.deepcopy(chat_tokenizer)
    longer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    longer.save_pretrained(tmp_path)
    load_tokenizer(str(tmp_path))
    longer.eos_token = "<image>"  # but not where every completion ends with it
    longer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="such as '<image>', past the"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_that_loses_the_tags_is_refused(llama_folder, chat_tokenizer, tmp_path):
    with_token(llama_folder, tmp_path, chat_tokenizer, special=True)
    with pytest.raises(ValueError, match="loses <think>: .*set its `special` to false"):
        load_tokenizer(str(tmp_path))


def test_an_adapter_of_another_model_is_told(random_model, chat_tokenizer, tmp_path):
    for name in ("qwen2", "llama"):
        models.save_model(tmp_path / name, copy.deepcopy(random_model(name)).float(), chat_tokenizer)
    adapter = models.add_adapter(models.load_model(str(tmp_path / "qwen2")), rank=4, seed=0)
    models.save_model(tmp_path / "adapter", adapter, chat_tokenizer)
    config = tmp_path / "qwen2" / "config.json"
    other = models.load_model(str(tmp_path / "qwen2")).config
    other.intermediate_size *= 2
    AutoModelForCausalLM.from_config(other).save_pretrained(config.parent)
    with pytest.raises(ValueError, match=r"adapter '.*adapter' does not fit '.*qwen2'"):
        models.load_model(str(tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("environment", "there", "told"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0"}, 0, "'0' asks for 1 GPUs, and torch finds 0"),
        ({"CUDA_VISIBLE_DEVICES": "0,7"}, 1, "'0,7' asks for 2 GPUs, and torch finds 1"),
        ({"LOCAL_RANK": "2"}, 2, "process 3 on this machine has no GPU, .* --num_processes 2"),
        ({"LOCAL_RANK": "2", "ACCELERATE_USE_CPU": "true"}, 2, None),
        ({"LOCAL_RANK": "1"}, 0, None),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0, None),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, 0, None),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, 0, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "LOCAL_RANK": "1"}, 2, None),
    ],
)
def test_gpus_that_are_asked_for_have_to_be_there(monkeypatch, environment, there, told):
    for name in ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    with pytest.raises(ValueError, match=told) if told else nullcontext():
        models.require_gpus()


@pytest.mark.parametrize(
    ("has_gpu", "has_bfloat16", "has_mps", "precision"),
    [
        (True, True, False, "bf16"),
        (True, False, False, "fp16"),  # a T4
        (False, False, False, "no"),
        (False, False, True, "no"),  # an Apple GPU
    ],
)
def test_precision_is_what_the_machine_is_fast_in(monkeypatch, has_gpu, has_bfloat16, has_mps, precision):
    monkeypatch.setattr(models, "require_gpus", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    # A T4 computes in bfloat16 too, by detours.
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: has_bfloat16 or (has_gpu and including_emulation),
    )
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: has_mps)
    asked = {}
    monkeypatch.setattr(models, "Accelerator", lambda **options: asked.update(options))
    monkeypatch.setattr(models, "shard_on_cpu", lambda accelerator, plan: None)
    models.make_accelerator()
    assert asked["mixed_precision"] == precision


# ------------------------------------------------------------------------------------------------------------
# Policy

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15]]
COMPLETIONS = [[20, 21], [30, 31, 32, 33, 34, 35, 36], [40]]


def plain_logprobs(model, temperature):
    """Of every completion, from the library's own logits, a sequence at a time without padding."""
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        logprobs = torch.log_softmax(logits / temperature, -1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        yield logprobs[range(len(completion)), completion], entropy


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    ("name", "has_plain_head"),
    [
        ("qwen2", True),
        ("llama", True),
        ("qwen3", True),
        ("mistral", True),
        ("gemma3_text", False),
        ("gemma2", False),
        ("granite", False),
        ("phi", False),
        ("gpt2", True),
    ],
)
def test_policy_equals_the_librarys_logits_and_gradient(random_model, name, has_plain_head, temperature):
    model = random_model(name)
    policy = models.Policy(model)
    assert policy.has_plain_head == has_plain_head
    batch = pad_batch(PROMPTS, COMPLETIONS, pad_token_id=0)
    *got, values = policy(**batch, temperature=temperature)
    assert values is None
    assert got[0].shape == got[1].shape == batch["completion_mask"].shape
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = list(plain_logprobs(model, temperature))
    # The library takes some norms in float32 whatever the model is in; it shows in the gradient.
    tolerance, of_gradient = (1e-9, 1e-6) if model.dtype == torch.float64 else (1e-4, 1e-3)
    for output, rows in zip(got, zip(*expected, strict=True), strict=True):
        counted = output[batch["completion_mask"]]
        torch.testing.assert_close(counted, torch.cat(rows), rtol=0, atol=tolerance)
        gradient = torch.autograd.grad(counted.square().sum(), parameters, retain_graph=True)
        plain = torch.autograd.grad(torch.cat(rows).square().sum(), parameters, retain_graph=True)
        for ours, theirs in zip(gradient, plain, strict=True):
            assert (ours - theirs).norm() <= of_gradient * theirs.norm()


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gpt2"])
@pytest.mark.parametrize("kind", ["shared", "separate"])
def test_a_critic_values_the_state_before_each_token(random_model, name, kind):
    model = random_model(name)
    policy = models.Policy(model, kind)
    batch = pad_batch(PROMPTS, COMPLETIONS, pad_token_id=0)
    logprobs, _, values = policy(**batch)
    mask = batch["completion_mask"]
    assert values.shape == logprobs.shape
    assert not values[mask].any()  # zero at first
    with torch.no_grad():
        policy.critic.head.weight.copy_(torch.linspace(-1, 1, policy.critic.head.in_features))
    _, _, values = policy(**batch)
    expected = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        states = model.get_decoder()(input_ids=torch.tensor([prompt + completion])).last_hidden_state[0]
        states = states[len(prompt) - 1 : -1].to(policy.critic.head.weight.dtype)
        expected.append(policy.critic.head(states).squeeze(-1).float())
    torch.testing.assert_close(values[mask], torch.cat(expected), rtol=1e-4, atol=1e-4)
    of_policy = torch.autograd.grad(values.sum(), list(model.parameters()), allow_unused=True)
    assert any(gradient is not None for gradient in of_policy) == (kind == "shared")


LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("rotary", [{"rope_type": "default", "rope_theta": 123.0}, LLAMA3])
def test_the_rotary_base_is_said_where_every_reader_looks(tiny, tmp_path, rotary):
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    model.config.rope_parameters = rotary
    model = type(model)(model.config)
    models.save_model(tmp_path, model, tokenizer)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["rope_theta"] == saved["rope_parameters"]["rope_theta"] == rotary["rope_theta"]
    assert ("rope_scaling" in saved) == (rotary["rope_type"] != "default")
    loaded = models.load_model(str(tmp_path))
    ids = torch.arange(40)[None]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    # And once more: what is loaded and saved again says the same.
    models.save_model(tmp_path / "again", loaded, tokenizer)
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == saved


def hooks_of(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_a_head_is_judged_by_what_it_does_and_not_by_its_weights(random_model):
    model = random_model("gemma2")
    hooks = hooks_of(model)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    try:
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1e-3)  # logits so small that a cap of 5 moves none of them
        before = torch.get_rng_state()
        assert not models.Policy(model).has_plain_head
        assert torch.equal(torch.get_rng_state(), before)
    finally:
        model.load_state_dict(weights)
    assert hooks_of(model) == hooks  # the library keeps some of its own


def test_the_policy_trains_the_model_it_was_given(tiny):
    model, _ = tiny
    policy = models.Policy(model)
    assert policy.model is model
    assert policy.has_plain_head
    assert {id(parameter) for parameter in policy.parameters()} == {id(p) for p in model.parameters()}


# ------------------------------------------------------------------------------------------------------------
# A model that rewards


def test_a_reward_model_reads_question_and_completion_in_its_own_template(reward_folder, chat_tokenizer):
    questions = ["How many apples?", "1 + 1", "1 + 1"]
    completions = [
        "<think>Tom</think><answer>4</answer>",
        "2",
        "a much longer answer that goes on for a while",
    ]
    model = AutoModelForSequenceClassification.from_pretrained(reward_folder).eval()
    expected = []
    for question, completion in zip(questions, completions, strict=True):
        text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{completion}<|im_end|>\n"
        with torch.no_grad():
            expected.append(float(model(chat_tokenizer(text, return_tensors="pt").input_ids).logits))
    for batch_size in (1, 2, 8):
        reward = models.load_reward_model(str(reward_folder), "cpu", batch_size=batch_size)
        assert reward(completions, questions) == pytest.approx(expected, abs=1e-5)
    # Too long: what is left is the end.
    short = models.load_reward_model(str(reward_folder), "cpu", max_tokens=5)
    ids = chat_tokenizer(text, return_tensors="pt").input_ids[:, -5:]
    with torch.no_grad():
        assert short(completions[2:], questions[2:]) == pytest.approx([float(model(ids).logits)], abs=1e-5)


def test_what_is_no_reward_model_is_refused(tmp_path, random_model, chat_tokenizer):
    random_model("qwen2").save_pretrained(tmp_path / "causal")
    chat_tokenizer.save_pretrained(tmp_path / "causal")
    with pytest.raises(ValueError, match=r"causal' has no trained weights for score.weight"):
        models.load_reward_model(str(tmp_path / "causal"), "cpu")
    two = Qwen2ForSequenceClassification(Qwen2Config(**SHAPE, num_labels=2))
    two.save_pretrained(tmp_path / "two")
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        models.load_reward_model(str(tmp_path / "two"), "cpu")
    chat_tokenizer.save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match="must have one output, got 2"):
        models.load_reward_model(str(tmp_path / "two"), "cpu")
    with pytest.raises(FileNotFoundError, match="is not there"):
        models.load_reward_model("outputs/none", "cpu")
    with pytest.raises(ValueError, match="batch_size"):
        models.load_reward_model(str(tmp_path / "two"), "cpu", batch_size=0)
