import copy
import itertools
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from batches import pad_batch
from inference import SamplingParams, decoders, sampling
from inference import engine as engine_module
from inference.engine import Seats, TorchEngine, cache_bytes, row_uniforms
from inference.sampling import warp
from models import Policy

# Ragged, not in order of length, two of them equal; longer and shorter than the window of 4.
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14], [15, 16, 17, 18], [12, 13], [19, 20, 21, 22, 23]]
ARCHITECTURES = ["qwen2", "llama", "qwen3", "mistral", "gemma3_text", "phi", "gpt2"]
WARM = SamplingParams(max_completion_tokens=8, temperature=0.7)


def tokenizer(eos_token_id=2):
    return SimpleNamespace(pad_token_id=0, eos_token_id=eos_token_id)


@pytest.fixture
def model(random_model):
    return random_model("qwen2")


@pytest.fixture
def forwards(model):
    """The shape of the token ids of every pass through `model`."""
    shapes = []
    hook = model.model.embed_tokens.register_forward_pre_hook(
        lambda module, args: shapes.append(tuple(args[0].shape))
    )
    yield shapes
    hook.remove()


def assert_same(got, expected):
    """Equal tokens and reasons; log-probabilities up to the rounding that the rows around bring."""
    for ours, theirs in zip(got, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.token_ids == other.token_ids
            assert one.finish_reason == other.finish_reason
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-9)


# ------------------------------------------------------------------------------------------------------------
# What is computed


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_equals_the_librarys_own_generation(random_model, architecture):
    model = random_model(architecture)
    greedy = SamplingParams(max_completion_tokens=8, temperature=0.0)
    completions = [
        group[0].token_ids for group in TorchEngine(model, tokenizer()).generate(PROMPTS, 1, greedy, (0,))
    ]
    assert len({tuple(ids) for ids in completions}) >= 3  # the prompt matters
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        alone = torch.tensor([prompt])
        output = model.generate(
            alone, attention_mask=torch.ones_like(alone), max_new_tokens=8, do_sample=False
        )
        assert completion == output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logprobs_equal_a_forward_pass_over_the_whole_text(random_model, architecture):
    model = random_model(architecture)
    groups = TorchEngine(model, tokenizer()).generate(PROMPTS, 3, WARM, (1,))
    prompts = [prompt for prompt in PROMPTS for _ in range(3)]
    completions = [completion for group in groups for completion in group]
    batch = pad_batch(prompts, [completion.token_ids for completion in completions], pad_token_id=0)
    with torch.no_grad():
        logprobs, _, _ = Policy(model)(**batch, temperature=WARM.temperature)
    returned = torch.tensor([logprob for completion in completions for logprob in completion.logprobs])
    assert returned.std() > 0.1
    torch.testing.assert_close(logprobs[batch["completion_mask"]].float(), returned, rtol=0, atol=1e-6)
    for row, completion in enumerate(completions):
        assert logprobs[row, : len(completion.logprobs)].tolist() == pytest.approx(
            completion.logprobs, abs=1e-9
        )


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(6, temperature=0.9, top_k=20, top_p=0.9, min_p=0.02),
        SamplingParams(6, temperature=0.0),
    ],
)
def test_logprobs_are_those_of_the_distribution_drawn_from(model, params):
    groups = TorchEngine(model, tokenizer()).generate(PROMPTS, 1, params, (1,))
    for prompt, [completion] in zip(PROMPTS, groups, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1]
        expected = warp(logits, params)[range(len(completion.token_ids)), completion.token_ids]
        assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-9)


def test_sampled_tokens_follow_their_random_numbers(model):
    """The first token of many samples has the model's distribution: the inverse of its cumulative one."""
    with torch.no_grad():
        probabilities = model(torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1)
    samples = TorchEngine(model, tokenizer()).generate(PROMPTS[:1], 200, SamplingParams(1), (5,))[0]
    cumulative = probabilities.cumsum(0)
    for sample, completion in enumerate(samples):
        uniform = row_uniforms((5, 0, sample), 1)[0]
        assert completion.token_ids == [int((cumulative <= uniform).sum())]
    assert len({tuple(completion.token_ids) for completion in samples}) > 10


# ------------------------------------------------------------------------------------------------------------
# What a completion depends on


@pytest.mark.parametrize("architecture", ["qwen2", "mistral", "gpt2"])
def test_a_completion_depends_on_nothing_around_it(random_model, architecture):
    model = random_model(architecture)
    engine = TorchEngine(model, tokenizer())
    groups = engine.generate(PROMPTS, 3, WARM, (1, 2))
    # Equal prompts, other numbers: other samples. And so within a group.
    assert groups[1][0] != groups[4][0]
    assert len({tuple(completion.token_ids) for completion in groups[0]}) == 3

    for number, prompt in enumerate(PROMPTS):  # alone
        assert_same(engine.generate([prompt], 3, WARM, (1, 2), first_prompt=number), [groups[number]])
    for start, end in ((0, 2), (2, 6)):  # as a process' share
        assert_same(engine.generate(PROMPTS[start:end], 3, WARM, (1, 2), start), groups[start:end])
    for size in (15, 47, 100, 200):  # in batches of any size; where the decoder can, rows join in the middle
        assert_same(TorchEngine(model, tokenizer(), size).generate(PROMPTS, 3, WARM, (1, 2)), groups)
    fewer = engine.generate(PROMPTS, 2, WARM, (1, 2))  # in groups of another size
    assert_same(fewer, [group[:2] for group in groups])
    shorter = engine.generate(PROMPTS, 1, SamplingParams(3, temperature=0.7), (1, 2))  # under another limit
    assert [group[0].token_ids for group in shorter] == [group[0].token_ids[:3] for group in groups]


def test_a_completion_depends_on_the_number_of_its_prompt_and_not_on_its_neighbours(model):
    engine = TorchEngine(model, tokenizer())
    groups = engine.generate(PROMPTS, 2, WARM, (1,))
    others = [[30 + i] * (9 - i) for i in range(6)]
    for number in range(6):
        mixed = [prompt if i == number else others[i] for i, prompt in enumerate(PROMPTS)]
        assert_same([engine.generate(mixed, 2, WARM, (1,))[number]], [groups[number]])


def test_a_seed_changes_everything_and_touches_no_global_state(model):
    engine, before = TorchEngine(model, tokenizer()), torch.get_rng_state()
    first = engine.generate(PROMPTS, 1, WARM, (1, 7))
    assert engine.generate(PROMPTS, 1, WARM, (1, 7)) == first
    assert torch.equal(torch.get_rng_state(), before)
    for seed in ((1, 8), (2, 7), (7, 1)):
        other = engine.generate(PROMPTS, 1, WARM, seed)
        assert all(a[0].token_ids != b[0].token_ids for a, b in zip(first, other, strict=True))


# ------------------------------------------------------------------------------------------------------------
# How a completion ends


def test_a_completion_ends_with_its_eos_and_leaves_the_others_alone(model, forwards):
    long = TorchEngine(model, tokenizer(eos_token_id=319)).generate(PROMPTS, 2, WARM, (3,))
    assert {(len(c.token_ids), c.finish_reason) for group in long for c in group} == {(8, "length")}
    eos = long[3][1].token_ids[2]
    forwards.clear()
    stopped = TorchEngine(model, tokenizer(eos)).generate(PROMPTS, 2, WARM, (3,))
    lengths = []
    for group, whole in zip(stopped, long, strict=True):
        for completion, full in zip(group, whole, strict=True):
            has_eos = eos in full.token_ids
            length = full.token_ids.index(eos) + 1 if has_eos else 8
            assert completion.token_ids == full.token_ids[:length]
            assert completion.logprobs == pytest.approx(full.logprobs[:length], abs=1e-9)
            assert completion.finish_reason == ("stop" if has_eos else "length")
            lengths.append(length)
    assert 3 in lengths
    # Prompts once and not once a sample; then whoever has ended is computed no more.
    rows = [sum(length > step for length in lengths) for step in range(1, 8)]
    assert forwards == [(6, 7)] + [(count,) for count in rows]


def test_an_eos_at_the_limit_is_a_stop(model):
    whole = TorchEngine(model, tokenizer()).generate(PROMPTS[:1], 1, WARM, (3,))[0][0].token_ids
    at = next(i for i in range(1, 8) if whole[i] not in whole[:i])
    params = SamplingParams(at + 1, temperature=0.7)
    [[completion]] = TorchEngine(model, tokenizer(whole[at])).generate(PROMPTS[:1], 1, params, (3,))
    assert (completion.token_ids, completion.finish_reason) == (whole[: at + 1], "stop")


def test_every_token_that_the_generation_config_stops_at_stops(model, monkeypatch):
    whole = TorchEngine(model, tokenizer()).generate(PROMPTS[:1], 1, WARM, (3,))[0][0].token_ids
    for configured, stops in ((whole[1], {whole[1], 2}), ([whole[2], whole[4]], {whole[2], whole[4], 2})):
        monkeypatch.setattr(model.generation_config, "eos_token_id", configured)
        engine = TorchEngine(model, tokenizer())
        [[completion]] = engine.generate(PROMPTS[:1], 1, WARM, (3,))
        end = min(i for i, token in enumerate(whole) if token in stops)
        assert (completion.token_ids, completion.finish_reason) == (whole[: end + 1], "stop")


def test_waiting_rows_take_the_places_of_those_that_end_within_the_budget(model, forwards):
    long = TorchEngine(model, tokenizer(eos_token_id=319)).generate(PROMPTS, 2, WARM, (3,))
    eos = long[3][1].token_ids[2]
    whole = TorchEngine(model, tokenizer(eos)).generate(PROMPTS, 2, WARM, (3,))
    forwards.clear()
    budget = 4 * (7 + WARM.max_completion_tokens)
    assert_same(TorchEngine(model, tokenizer(eos), budget).generate(PROMPTS, 2, WARM, (3,)), whole)
    prefills = [shape for shape in forwards if len(shape) == 2]
    steps = [rows for (rows,) in (shape for shape in forwards if len(shape) == 1)]
    assert max(steps) == 4
    # Nobody waits for a whole batch: until nothing waits any more, a step with a free place is the last one
    # before somebody takes it.
    last_prefill = max(i for i, shape in enumerate(forwards) if len(shape) == 2)
    for shape, following in itertools.pairwise(forwards[: last_prefill + 1]):
        assert shape == (4,) or len(shape) == 2 or len(following) == 2
    assert len(prefills) > 3
    assert sum(steps) == sum(len(c.token_ids) - 1 for group in whole for c in group)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_out_of_memory_costs_rows_at_once_and_no_completion(random_model, architecture, monkeypatch):
    model = random_model(architecture)
    whole = TorchEngine(model, tokenizer()).generate(PROMPTS, 2, WARM, (3,))
    kind = decoders.LlamaDecoder if architecture == "qwen2" else decoders.LibraryDecoder
    advance, told = kind.advance, []

    def failing(self, tokens):
        if len(tokens) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return advance(self, tokens)

    monkeypatch.setattr(kind, "advance", failing)
    engine = TorchEngine(model, tokenizer())
    assert_same(engine.generate(PROMPTS, 2, WARM, (3,), on_completion=lambda *a: told.append(a[:2])), whole)
    assert engine.max_rows == 3
    assert sorted(told) == [(p, s) for p in range(6) for s in range(2)]
    monkeypatch.setattr(kind, "advance", lambda self, tokens: failing(self, [0] * 4))
    with pytest.raises(torch.OutOfMemoryError):
        engine.generate(PROMPTS, 2, WARM, (3,))


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_a_prompt_without_tokens_is_refused(random_model, architecture):
    engine = TorchEngine(random_model(architecture), tokenizer())
    with pytest.raises(ValueError, match="a prompt has no tokens"):
        engine.generate([[5], []], 2, WARM, (3,))
    with pytest.raises(ValueError, match="a prompt has no tokens"):
        next(engine.stream([], WARM, (3,)))


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_what_cannot_fit_is_refused_by_name(random_model, architecture):
    engine = TorchEngine(random_model(architecture), tokenizer(), max_cache_tokens=14)
    message = "prompt of 7 tokens and a completion of 8 need 15 cache positions, and memory has 14"
    with pytest.raises(ValueError, match=message):
        engine.generate(PROMPTS, 2, WARM, (3,))
    with pytest.raises(ValueError, match="max_completion_tokens"):
        next(engine.stream(PROMPTS[0], WARM, (3,)))


def test_the_cache_takes_half_of_what_is_free(model, monkeypatch):
    # keys and values of 2 layers, 2 heads of 8, float64
    assert cache_bytes(model) == 2 * 2 * 2 * 8 * 8
    monkeypatch.setattr("inference.engine.free_memory", lambda device: 2 * 15 * cache_bytes(model))
    engine = TorchEngine(model, tokenizer())
    assert len(engine.generate(PROMPTS, 1, WARM, (3,))) == 6
    resumed = TorchEngine(model, tokenizer())
    resumed.memory = engine.memory
    assert resumed.memory == [15, 512, None]
    monkeypatch.setattr("inference.engine.free_memory", lambda device: 2 * 15 * cache_bytes(model) - 1)
    with pytest.raises(ValueError, match="memory has 14"):
        TorchEngine(model, tokenizer()).generate(PROMPTS, 1, WARM, (3,))


# ------------------------------------------------------------------------------------------------------------
# Adapters


@pytest.fixture
def tuned(random_model):
    """A model under an adapter that changes what it says."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoraConfig(r=2, lora_alpha=8, target_modules="all-linear")
        tuned = get_peft_model(copy.deepcopy(random_model("qwen2")), config)
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return tuned.double().eval()


def counting_passes(tuned):
    """How often an adapter's own product is taken."""
    passes = []
    tuned.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].register_forward_hook(
        lambda *args: passes.append(1)
    )
    return passes


def test_an_adapter_is_merged_for_a_rollout_and_its_weights_are_the_same_afterwards(tuned):
    plain = TorchEngine(tuned, tokenizer())
    plain.merges = False
    passes = counting_passes(tuned)
    expected = plain.generate(PROMPTS, 2, WARM, (3,))
    assert passes
    before = {name: (p.data_ptr(), p.clone()) for name, p in tuned.named_parameters()}
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        logits = tuned(ids).logits
    passes.clear()
    engine = TorchEngine(tuned, tokenizer())
    assert_same(engine.generate(PROMPTS, 2, WARM, (3,)), expected)
    assert engine.merges
    assert not passes
    for name, parameter in tuned.named_parameters():
        pointer, value = before[name]
        assert parameter.data_ptr() == pointer
        assert torch.equal(parameter, value)
    with torch.no_grad():
        assert torch.equal(tuned(ids).logits, logits)
    with tuned.disable_adapter():
        assert TorchEngine(tuned, tokenizer()).generate(PROMPTS, 2, WARM, (3,)) != expected


def test_half_precision_and_what_is_no_plain_sum_are_never_merged(tuned, random_model):
    engine = TorchEngine(tuned, tokenizer())
    assert engine._layers_to_merge()
    with torch.autocast("cpu", torch.bfloat16):
        assert engine._layers_to_merge() == []
    for options in ({"use_dora": True}, {"lora_bias": True}):
        config = LoraConfig(r=2, target_modules="all-linear", **options)
        other = get_peft_model(copy.deepcopy(random_model("llama")), config)
        assert TorchEngine(other, tokenizer())._layers_to_merge() == []


def test_an_adapter_comes_apart_again_where_a_rollout_fails(tuned):
    before = {name: p.clone() for name, p in tuned.named_parameters()}

    def fail(*args):
        raise KeyError("a scorer of the user's")

    with pytest.raises(KeyError):
        TorchEngine(tuned, tokenizer()).generate(PROMPTS, 2, WARM, (3,), on_completion=fail)
    assert all(torch.equal(p, before[name]) for name, p in tuned.named_parameters())
    assert not any(getattr(module, "merged", False) for module in tuned.modules())


def test_an_adapter_stays_apart_where_memory_is_short(tuned, monkeypatch):
    copied = sum(
        module.get_base_layer().weight.numel() * 8
        for module in tuned.modules()
        if hasattr(module, "get_delta_weight")
    )
    for free, merges in ((4 * copied, False), (4 * copied + 1, True)):
        monkeypatch.setattr("inference.engine.free_memory", lambda device, free=free: free)
        engine = TorchEngine(tuned, tokenizer(), max_cache_tokens=100)
        engine.generate(PROMPTS, 1, WARM, (3,))
        assert engine.merges is merges


def test_merged_weights_are_the_first_to_go_where_memory_runs_out(tuned, monkeypatch):
    expected = TorchEngine(tuned, tokenizer()).generate(PROMPTS, 2, WARM, (3,))
    advance, passes = decoders.LlamaDecoder.advance, counting_passes(tuned)

    def failing(self, tokens):
        if not passes:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return advance(self, tokens)

    monkeypatch.setattr(decoders.LlamaDecoder, "advance", failing)
    engine = TorchEngine(tuned, tokenizer())
    assert_same(engine.generate(PROMPTS, 2, WARM, (3,)), expected)
    assert engine.memory[1:] == [512, False]


# ------------------------------------------------------------------------------------------------------------
# Telling


def test_every_completion_is_told_once_as_it_ends(model):
    told = []
    eos = TorchEngine(model, tokenizer()).generate(PROMPTS, 2, WARM, (3,))[3][1].token_ids[2]
    groups = TorchEngine(model, tokenizer(eos), max_cache_tokens=100).generate(
        PROMPTS, 2, WARM, (3,), on_completion=lambda *args: told.append(args)
    )
    assert Counter((prompt, sample) for prompt, sample, _ in told) == Counter(
        (p, s) for p in range(6) for s in range(2)
    )
    assert all(groups[prompt][sample] is completion for prompt, sample, completion in told)


# ------------------------------------------------------------------------------------------------------------
# What search needs


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
@pytest.mark.parametrize(
    "params", [SamplingParams(8, 0.7), SamplingParams(8, 0.0), SamplingParams(8, 1.5, top_k=3)]
)
def test_self_certainty_is_the_mean_divergence_from_uniform(random_model, architecture, params):
    model = random_model(architecture)
    plain = TorchEngine(model, tokenizer(150), 47).generate(PROMPTS, 2, params, (3,))
    assert all(completion.self_certainty is None for group in plain for completion in group)
    params = replace(params, self_certainty=True)
    groups = TorchEngine(model, tokenizer(150), 47).generate(PROMPTS, 2, params, (3,))
    assert_same(groups, plain)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            with torch.no_grad():
                ids = torch.tensor([prompt + completion.token_ids])
                logprobs = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            uniform = torch.full_like(logprobs, 1 / logprobs.shape[-1])
            divergence = (uniform * (uniform.log() - logprobs)).sum(-1)
            assert completion.self_certainty == pytest.approx(float(divergence.mean()), abs=1e-9)


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_the_likeliest_tokens_of_branching_rows(random_model, architecture):
    model = random_model(architecture)
    with torch.no_grad():  # an EOS that is likely in one place, and the one of the generation config
        eos = int(model(torch.tensor([[*PROMPTS[0], 6]])).logits[0, -1].argmax())
    steps = TorchEngine(model, tokenizer(eos)).branch(PROMPTS[0], 3, 8)
    texts, likeliest, ends = [PROMPTS[0]], next(steps), 0
    for chosen in ([(0, 5), (0, 6)], [(1, 7), (1, 8), (0, 9)], [(2, 11)]):
        texts = [[*texts[row], token] for row, token in chosen]
        likeliest = steps.send(chosen)
        for text, tokens in zip(texts, likeliest, strict=True):
            with torch.no_grad():
                top = model(torch.tensor([text])).logits[0, -1].log_softmax(-1).topk(5)
            assert [token.token_id for token in tokens] == top.indices.tolist()
            assert [token.logprob for token in tokens] == pytest.approx(top.values.tolist(), abs=1e-9)
            assert [token.stops for token in tokens] == [i in (2, eos) for i in top.indices.tolist()]
            ends += sum(token.stops for token in tokens)
    assert ends


# ------------------------------------------------------------------------------------------------------------
# Streaming


@pytest.mark.parametrize("architecture", ["qwen2", "mistral", "gpt2"])
def test_a_stream_equals_the_batch(random_model, architecture):
    model = random_model(architecture)
    whole = TorchEngine(model, tokenizer()).generate(PROMPTS, 1, WARM, (3,))[0][0].token_ids
    for eos in (2, whole[4]):
        engine = TorchEngine(model, tokenizer(eos))
        for params in (WARM, SamplingParams(8, temperature=0.0), SamplingParams(1)):
            expected = engine.generate(PROMPTS, 2, params, (3,))[0][0]
            streamed = list(engine.stream(PROMPTS[0], params, (3,)))
            assert [token.token_id for token in streamed] == expected.token_ids
            assert [token.logprob for token in streamed] == pytest.approx(expected.logprobs, abs=1e-9)
            assert [token.finish_reason for token in streamed[:-1]] == [None] * (len(streamed) - 1)
            assert streamed[-1].finish_reason == expected.finish_reason


@pytest.mark.parametrize("rows", [5, 2])
def test_a_group_that_streams_side_by_side_equals_the_batch(model, forwards, rows):
    [[text]] = TorchEngine(model, tokenizer()).generate(PROMPTS[:1], 1, WARM, (3,))
    engine = TorchEngine(model, tokenizer(eos_token_id=text.token_ids[2]))
    [expected] = engine.generate(PROMPTS[:1], 5, WARM, (3,))
    assert len({len(completion.token_ids) for completion in expected}) > 1
    engine.max_rows, streamed = rows, [[] for _ in expected]
    forwards.clear()
    for step in engine.stream_group(PROMPTS[0], 5, WARM, (3,)):
        for sample, token in step:
            streamed[sample].append(token)
    assert max(shape[0] for shape in forwards[1:]) == rows  # together, not one after another
    for tokens, completion in zip(streamed, expected, strict=True):
        assert [token.token_id for token in tokens] == completion.token_ids
        assert [token.logprob for token in tokens] == pytest.approx(completion.logprobs, abs=1e-9)
        assert [token.finish_reason for token in tokens[:-1]] == [None] * (len(tokens) - 1)
        assert tokens[-1].finish_reason == completion.finish_reason
    stream = engine.stream_group(PROMPTS[0], 5, WARM, (3,))
    assert len(next(stream)) == len(next(stream)) == rows
    computed = len(forwards)
    stream.close()
    assert len(forwards) == computed


def test_a_closed_stream_computes_nothing_more(model, forwards):
    stream = TorchEngine(model, tokenizer()).stream(PROMPTS[0], WARM, (3,))
    assert forwards == []
    next(stream)
    next(stream)
    assert forwards == [(1, 7), (1,)]
    stream.close()
    assert forwards == [(1, 7), (1,)]
    assert next(stream, None) is None


def test_the_last_token_of_a_stream_is_not_fed_back(model, forwards):
    assert len(list(TorchEngine(model, tokenizer()).stream(PROMPTS[0], WARM, (3,)))) == len(forwards)


# ------------------------------------------------------------------------------------------------------------
# The trainer's module


@pytest.fixture
def dropout_model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=320, n_embd=32, n_layer=1, n_head=2, n_positions=64, initializer_range=0.3
        )
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.5
        return GPT2LMHeadModel(config).double()


def test_dropout_is_off_while_sampling_and_back_on_after(dropout_model):
    engine = TorchEngine(dropout_model, tokenizer())
    expected = engine.generate(PROMPTS, 2, WARM, (3,))
    assert not dropout_model.eval().training
    engine.generate(PROMPTS, 2, WARM, (3,))
    assert not any(module.training for module in dropout_model.modules())
    dropout_model.train()
    assert engine.generate(PROMPTS, 2, WARM, (3,)) == expected
    assert all(module.training for module in dropout_model.modules())
    stream = engine.stream(PROMPTS[0], WARM, (3,))
    assert next(stream).token_id == expected[0][0].token_ids[0]
    assert not dropout_model.training
    stream.close()
    assert all(module.training for module in dropout_model.modules())


def test_the_mode_comes_back_when_a_listener_fails(dropout_model):
    dropout_model.train()

    def fail(*_):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        TorchEngine(dropout_model, tokenizer()).generate(PROMPTS, 2, WARM, (3,), on_completion=fail)
    assert all(module.training for module in dropout_model.modules())


def test_what_the_trainer_changes_is_sampled_from_at_once_and_sampling_leaves_no_gradient(model):
    model = copy.deepcopy(model)
    engine = TorchEngine(model, tokenizer())
    before = engine.generate(PROMPTS, 1, WARM, (3,))
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    # The same weights still train.
    model(torch.tensor([PROMPTS[0]])).logits.logsumexp(-1).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.grad.sign())
    assert engine.generate(PROMPTS, 1, WARM, (3,)) != before


# ------------------------------------------------------------------------------------------------------------
# A device without float64 (MPS)


def test_a_device_without_float64_draws_the_same_tokens_and_keeps_none_in_float64(model, monkeypatch):
    model = copy.deepcopy(model).float()
    expected = TorchEngine(model, tokenizer()).generate(PROMPTS, 2, WARM, (3,))
    # Only forced onto the processor: no such device is at hand.
    monkeypatch.setattr(sampling, "WITHOUT_FLOAT64", {"cpu"})
    monkeypatch.setattr(engine_module, "WITHOUT_FLOAT64", {"cpu"})
    engine = TorchEngine(model, tokenizer())
    for ours, theirs in zip(engine.generate(PROMPTS, 2, WARM, (3,)), expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.token_ids == other.token_ids
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-6)
    seats = Seats(1, SamplingParams(2), torch.device("cpu"))
    monkeypatch.setattr(engine_module, "row_uniforms", lambda key, length: np.array([1 - 2**-53, 0.5]))
    seats.take([0], [(0,)])
    assert not [name for name, held in vars(seats).items() if getattr(held, "dtype", None) == torch.float64]
    assert seats.uniforms().item() < 1
