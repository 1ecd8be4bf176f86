"""MLX answers as torch does, and keeps what the protocol promises."""

import copy
import itertools
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from inference import SamplingParams, sampling
from inference.engine import TorchEngine
from inference.search import (
    Query,
    beam_search,
    best_of_n,
    budget,
    majority_vote,
    self_certainty,
    self_correct,
)

mx = pytest.importorskip("mlx.core", reason="MLX is not installed (requirements-dev.txt)")
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402 - after the skip above
from mlx_lm.utils import load_model  # noqa: E402 - after the skip above

from inference.mlx_engine import MLXEngine, RowSampler, on_mlx_thread, warp  # noqa: E402 - after the skip above

# Ragged, not in order of length.
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14], [15, 16, 17, 18]]
GREEDY = SamplingParams(max_completion_tokens=12, temperature=0.0)
WARM = SamplingParams(max_completion_tokens=12, temperature=0.7)
CUT = SamplingParams(max_completion_tokens=12, temperature=0.9, top_k=20, top_p=0.9, min_p=0.02)


@pytest.fixture(scope="module")
def model(random_folder):
    """A random model of mlx-lm; shared, so leave it as it is."""
    return load_model(random_folder("qwen2"))[0]


@pytest.fixture(scope="module")
def engine(model):
    return MLXEngine(model, {2})


class Counting:
    """A model that counts what is asked of it."""

    def __init__(self, model):
        self.model, self.layers, self.calls = model, getattr(model, "layers", []), 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.model(*args, **kwargs)


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "qwen3"])
def test_mlx_answers_as_torch_does(random_model, random_folder, architecture):
    torch_model = copy.deepcopy(random_model(architecture)).float()
    torch_engine = TorchEngine(torch_model, SimpleNamespace(pad_token_id=0, eos_token_id=2))
    mlx_model, _ = load_model(random_folder(architecture))
    expected = torch_engine.generate(PROMPTS, 1, GREEDY, (0,))
    got = MLXEngine(mlx_model, {2}).generate(PROMPTS, 1, GREEDY, (0,))
    assert len({tuple(group[0].token_ids) for group in expected}) >= 3  # the prompt matters
    for [one], [other] in zip(got, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert one.finish_reason == other.finish_reason
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)


@pytest.mark.parametrize("params", [GREEDY, WARM, CUT])
def test_a_completion_depends_on_nothing_but_its_key(engine, params):
    together = engine.generate(PROMPTS, 3, params, (7, 1))
    if params.temperature:
        assert len({tuple(completion.token_ids) for completion in together[0]}) == 3
    for number, prompt in enumerate(PROMPTS):
        [alone] = engine.generate([prompt], 3, params, (7, 1), first_prompt=number)
        for one, other in zip(alone, together[number], strict=True):
            assert one.token_ids == other.token_ids
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    streamed = list(engine.stream(PROMPTS[0], params, (7, 1)))
    assert [token.token_id for token in streamed] == together[0][0].token_ids
    assert [token.logprob for token in streamed] == pytest.approx(together[0][0].logprobs, abs=1e-4)
    assert [token.finish_reason for token in streamed[:-1]] == [None] * (len(streamed) - 1)
    assert streamed[-1].finish_reason == together[0][0].finish_reason


def test_other_seeds_draw_other_texts(engine):
    texts = [engine.generate(PROMPTS[:1], 1, WARM, (seed,))[0][0].token_ids for seed in range(3)]
    assert len({tuple(text) for text in texts}) == 3


@pytest.mark.parametrize("params", [GREEDY, WARM, CUT, SamplingParams(top_p=0.4), SamplingParams(min_p=0.3)])
def test_a_token_is_drawn_from_the_distribution_that_torch_draws_from(params):
    logits = np.random.default_rng(0).normal(0, 2, (5, 50)).astype(np.float32)
    expected = sampling.warp(torch.from_numpy(logits), params).numpy()
    got = np.array(warp(mx.array(logits), params))
    assert np.array_equal(np.isinf(got), np.isinf(expected))
    kept = ~np.isinf(expected)
    assert got[kept] == pytest.approx(expected[kept], abs=1e-5)


def test_tokens_come_as_often_as_they_are_likely():
    logits = mx.array([[2.0, 1.0, 0.0, -1.0]])
    likely = np.exp(np.array(logits[0])) / np.exp(np.array(logits[0])).sum()
    draws = 2000
    sampler = RowSampler(SamplingParams(draws), (0, 0))
    tokens = [sampler(logits) for _ in range(draws)]
    counts = np.bincount(np.array(mx.concatenate(tokens)), minlength=4)
    # 5 standard deviations: a false alarm in a million
    assert np.all(np.abs(counts - draws * likely) < 5 * np.sqrt(draws * likely * (1 - likely)))


@pytest.mark.parametrize("window", [None, 12])
def test_self_certainty_is_that_of_torch(random_model, model, window):
    torch_model = copy.deepcopy(random_model("qwen2")).float()
    params = SamplingParams(20, temperature=0.0, self_certainty=True)
    expected = TorchEngine(torch_model, SimpleNamespace(pad_token_id=0, eos_token_id=2))
    # Within a window mlx-lm counts places otherwise; the first tokens are the same.
    params = params if window is None else replace(params, max_completion_tokens=8)
    for [one], [other] in zip(
        MLXEngine(model, {2}, window).generate(PROMPTS, 1, params, (0,)),
        expected.generate(PROMPTS, 1, params, (0,)),
        strict=True,
    ):
        assert one.token_ids == other.token_ids
        assert one.self_certainty == pytest.approx(other.self_certainty, abs=1e-4)
    [[unasked]] = MLXEngine(model, {2}).generate(PROMPTS[:1], 1, GREEDY, (0,))
    assert unasked.self_certainty is None


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_rows_branch_as_those_of_torch(random_model, random_folder, architecture):
    torch_model = copy.deepcopy(random_model(architecture)).float()
    mlx_model, _ = load_model(random_folder(architecture))
    engines = (
        TorchEngine(torch_model, SimpleNamespace(pad_token_id=0, eos_token_id=2)),
        MLXEngine(mlx_model, {2}),
    )
    branches = [engine.branch(PROMPTS[0], 3, 8) for engine in engines]
    one, other = (next(branch) for branch in branches)
    for step in range(6):
        assert [[(t.token_id, t.stops) for t in row] for row in one] == [
            [(t.token_id, t.stops) for t in row] for row in other
        ]
        for ours, theirs in zip(other, one, strict=True):
            assert [t.logprob for t in ours] == pytest.approx([t.logprob for t in theirs], abs=1e-4)
        last = len(one) - 1
        chosen = [(last, one[last][step % 3].token_id), (0, one[0][1].token_id), (0, one[0][0].token_id)]
        one, other = (branch.send(chosen) for branch in branches)
    for branch in branches:
        branch.close()


def test_every_stop_token_ends_a_completion_and_stays_in_it(model):
    text = MLXEngine(model, set()).generate(PROMPTS[:1], 1, GREEDY, (0,))[0][0]
    assert (len(text.token_ids), text.finish_reason) == (12, "length")
    for stop in set(text.token_ids[:6]):
        place = text.token_ids.index(stop)
        engine = MLXEngine(model, {300, stop})
        [[completion]] = engine.generate(PROMPTS[:1], 1, GREEDY, (0,))
        assert completion.token_ids == text.token_ids[: place + 1]
        assert completion.finish_reason == "stop"
        assert len(completion.logprobs) == place + 1
        assert [t.token_id for t in engine.stream(PROMPTS[0], GREEDY, (0,))] == completion.token_ids


def test_closing_a_stream_stops_the_computation(model):
    counting = Counting(model)
    engine = MLXEngine(counting, set())
    stream = engine.stream(PROMPTS[0], SamplingParams(1000), (0,))
    next(stream)
    next(stream)
    stream.close()
    on_mlx_thread(lambda: None).result()  # whatever was asked for is done
    calls = counting.calls
    assert calls <= 5
    assert list(itertools.islice(engine.stream(PROMPTS[1], GREEDY, (0,)), 1))
    assert counting.calls <= calls + 4


@pytest.mark.parametrize("window", [None, 12])
def test_a_group_that_streams_side_by_side_equals_the_batch(model, window):
    counting = Counting(model)
    engine = MLXEngine(counting, {2}, window)
    [expected] = engine.generate(PROMPTS[:1], 4, WARM, (7,))
    streamed, steps = [[] for _ in expected], 0
    for step in engine.stream_group(PROMPTS[0], 4, WARM, (7,)):
        steps += 1
        for sample, token in step:
            streamed[sample].append(token)
    for tokens, completion in zip(streamed, expected, strict=True):
        assert [token.token_id for token in tokens] == completion.token_ids
        assert [token.logprob for token in tokens] == pytest.approx(completion.logprobs, abs=1e-4)
        assert [token.finish_reason for token in tokens[:-1]] == [None] * (len(tokens) - 1)
        assert tokens[-1].finish_reason == completion.finish_reason
    if window is None:
        assert steps < sum(map(len, streamed))  # together, not one after another
    stream = engine.stream_group(PROMPTS[0], 4, WARM, (7,))
    next(stream)
    next(stream)
    stream.close()
    on_mlx_thread(lambda: None).result()
    calls = counting.calls
    assert list(itertools.islice(engine.stream(PROMPTS[1], GREEDY, (0,)), 1))
    assert counting.calls <= calls + 4


def test_streams_interleave_and_may_be_read_from_any_thread(engine):
    expected = [[t.token_id for t in engine.stream(prompt, WARM, (0,))] for prompt in PROMPTS]
    got = [[] for _ in PROMPTS]
    streams = [engine.stream(prompt, WARM, (0,)) for prompt in PROMPTS]
    for _ in range(WARM.max_completion_tokens):
        for tokens, stream in zip(got, streams, strict=True):
            reader = threading.Thread(target=lambda t=tokens, s=stream: t.extend(itertools.islice(s, 1)))
            reader.start()
            reader.join()
    assert [[token.token_id for token in tokens] for tokens in got] == expected


def test_an_error_on_the_thread_is_raised_where_the_result_is_asked_for(model):
    def fail(*args, **kwargs):
        raise ZeroDivisionError("of the model")

    with pytest.raises(ZeroDivisionError, match="of the model"):
        list(MLXEngine(Counting(fail), {2}).stream(PROMPTS[0], GREEDY, (0,)))
    assert MLXEngine(model, {2}).generate(PROMPTS[:1], 1, GREEDY, (0,))


def test_completions_are_told_as_they_end_and_a_listener_may_break_off(engine):
    told = []
    groups = engine.generate(PROMPTS, 2, WARM, (0,), on_completion=lambda *all_of_it: told.append(all_of_it))
    assert sorted((prompt, sample) for prompt, sample, _ in told) == list(
        itertools.product(range(4), range(2))
    )
    assert all(groups[prompt][sample] is completion for prompt, sample, completion in told)

    def refuse(*_):
        raise KeyError("enough")

    with pytest.raises(KeyError):
        engine.generate(PROMPTS, 2, WARM, (0,), on_completion=refuse)
    assert engine.generate(PROMPTS, 2, WARM, (0,)) == groups


def test_every_search_runs_over_mlx(engine, chat_tokenizer):
    query = Query(engine, chat_tokenizer, "2 + 2 = ?", SamplingParams(8))
    [sampled] = engine.generate([query.prompt_ids], 3, query.params, query.seed)
    for found in (best_of_n(query, 3, self_certainty), majority_vote(query, 3)):
        assert [candidate.token_ids for candidate in found.candidates] == [c.token_ids for c in sampled]
    assert best_of_n(query, 3, self_certainty).score == max(
        candidate.self_certainty for candidate in query.sample(3)
    )
    greedy = replace(query, params=SamplingParams(8, temperature=0.0))
    [[likeliest]] = engine.generate([query.prompt_ids], 1, greedy.params, (0,))
    assert beam_search(query, 1).best.token_ids == likeliest.token_ids
    assert len(beam_search(query, 3).candidates) >= 3
    assert self_correct(greedy).candidates[0].token_ids == likeliest.token_ids
    closed = budget(replace(greedy, question="<think>"), thinking_tokens=0)
    assert closed.tokens > 0


def test_a_window_that_holds_the_whole_text_changes_nothing(engine, model):
    windowed = MLXEngine(model, {2}, window=64)
    assert windowed.generate(PROMPTS, 2, WARM, (0,)) == engine.generate(PROMPTS, 2, WARM, (0,))


def test_a_window_keeps_the_first_tokens_and_the_newest(model, monkeypatch):
    caches = []
    make = MLXEngine._make_cache
    monkeypatch.setattr(
        MLXEngine, "_make_cache", lambda self, *sizes: caches.append(make(self, *sizes)) or caches[-1]
    )
    params = SamplingParams(60, temperature=1.0)
    windowed = MLXEngine(model, set(), window=12)
    streamed = list(windowed.stream(PROMPTS[0], params, (0,)))
    text = PROMPTS[0] + [token.token_id for token in streamed]
    whole = make_prompt_cache(model)
    model(mx.array([text]), cache=whole)
    # Of the first layer, whose keys depend on their token and its place alone.
    kept = caches[0][0]
    expected, got = np.array(whole[0].keys[0, 0]), np.array(kept.keys[0, 0])
    assert len(text) - 1 <= kept.offset <= len(text)
    assert got.shape[0] == 4 + 12
    assert got[:4] == pytest.approx(expected[:4], abs=1e-5)
    newest = expected[kept.offset - 12 : kept.offset]
    assert got[4:][got[4:, 0].argsort()] == pytest.approx(newest[newest[:, 0].argsort()], abs=1e-5)
    [[completion]] = windowed.generate(PROMPTS[:1], 1, params, (0,))
    assert completion.token_ids == [token.token_id for token in streamed]
    assert completion.logprobs == [token.logprob for token in streamed]


def test_a_prompt_that_outgrows_the_window_is_refused(model):
    with pytest.raises(ValueError, match="40 tokens.*4 sinks and a window of 32.*larger window"):
        MLXEngine(model, {2}, window=32).generate([[5] * 40], 1, GREEDY, (0,))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="MLX calls g++ on a processor")
def test_a_process_that_used_the_engine_ends_well(random_folder):
    """MLX aborts where a thread ends and its streams are not cleared."""
    program = (
        "import sys; from pathlib import Path; from mlx_lm.utils import load_model; "
        "from inference import SamplingParams; from inference.mlx_engine import MLXEngine; "
        "engine = MLXEngine(load_model(Path(sys.argv[1]))[0], {2}); "
        "stream = engine.stream([5, 6], SamplingParams(99), (0,)); print(next(stream)); stream.close(); "
        "print(engine.generate([[7]], 2, SamplingParams(3), (0,)))"
    )
    fused = {name: value for name, value in os.environ.items() if name != "MLX_DISABLE_COMPILE"}
    for _ in range(3):
        command = [sys.executable, "-c", program, str(random_folder("qwen2"))]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=fused)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.count("logprob") == 3
