"""The engine behind a server, against a real one in a thread that computes with an engine of ours."""

import copy
import itertools
import json
import math
import os
import subprocess
import sys
import threading
import time
from contextlib import closing, nullcontext
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from openai_server import serving
from scripted import ByteTokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import evaluate
from inference import SamplingParams, StreamedToken, http
from inference.chat import Turn, load_chat_model
from inference.engine import TorchEngine
from inference.server_engine import PARALLEL, Piece, ServerEngine, request_seed, with_tags
from prompts import encode_prompt

ROOT = Path(__file__).parent.parent
GREEDY = SamplingParams(12, 0.0)
WARM = SamplingParams(8, 1.0, top_k=50, top_p=0.95, min_p=0.001)


class ScriptedTokens:
    """Streams the tokens of a text, and may wait before each."""

    def __init__(self, tokenizer, text, seconds_per_token=0.0):
        self.tokenizer, self.seconds_per_token = tokenizer, seconds_per_token
        self.token_ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]

    def stream(self, prompt, params, seed):
        for count, token_id in enumerate(self.token_ids[: params.max_completion_tokens], start=1):
            time.sleep(self.seconds_per_token)
            is_cut = count == params.max_completion_tokens
            is_end = token_id == self.tokenizer.eos_token_id
            yield StreamedToken(token_id, 0.0, "stop" if is_end else "length" if is_cut else None)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(http, "LONGEST_PAUSE_S", 0.01)
    monkeypatch.delenv(http.KEY_VARIABLE, raising=False)


@pytest.fixture(scope="module")
def prompts(tiny):
    return [encode_prompt(tiny[1], question) for question in ("1 + 2 + 3 = ?", "Wie geht's?", "98 + 7 = ?")]


@pytest.fixture(scope="module")
def tiny_folder(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    for part in tiny:
        part.save_pretrained(folder)
    return str(folder)


def connect(server, model="served", served_model=None):
    return ServerEngine(server.url, server.tokenizer, model, served_model)


def texts(tokenizer, groups):
    return [[tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in group] for group in groups]


def reasons(groups):
    return [[completion.finish_reason for completion in group] for group in groups]


# ------------------------------------------------------------------------------------------------------------
# The same completions


@pytest.mark.parametrize("manner", ["vllm", "llama.cpp", "mlx"])
def test_greedy_answers_over_a_server_are_the_engines_own(tiny, prompts, manner):
    model, tokenizer = tiny
    direct = TorchEngine(model, tokenizer)
    own = direct.generate(prompts, 2, GREEDY, (0,))
    with serving(direct, tokenizer, manner) as server:
        engine = connect(server)
        groups = engine.generate(prompts, 2, GREEDY, (0,))
        streamed = [list(engine.stream(prompt, GREEDY, (0,))) for prompt in prompts]
    assert reasons(groups) == reasons(own)
    assert [tokens[-1].finish_reason for tokens in streamed] == [group[0].finish_reason for group in own]
    assert {token.finish_reason for tokens in streamed for token in tokens[:-1]} == {None}
    joined = [tokenizer.decode([t.token_id for t in tokens], skip_special_tokens=True) for tokens in streamed]
    if manner == "vllm":
        assert [[c.token_ids for c in group] for group in groups] == [[c.token_ids for c in g] for g in own]
        assert [[t.token_id for t in tokens] for tokens in streamed] == [g[0].token_ids for g in own]
    assert texts(tokenizer, groups) == texts(tokenizer, own)
    assert joined == [group[0] for group in texts(tokenizer, own)]


@pytest.mark.parametrize("manner", ["vllm", "llama.cpp", "mlx"])
def test_the_eos_is_told_and_a_cut_completion_has_none(tiny, prompts, manner):
    tokenizer = tiny[1]
    text = "<think>3 + 4 = 7\nüñ</think><answer>7</answer>"
    whole = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    with serving(ScriptedTokens(tokenizer, text), tokenizer, manner) as server:
        engine = connect(server)
        [[stopped]] = engine.generate(prompts[:1], 1, SamplingParams(99, 0.0), (0,))
        [[cut]] = engine.generate(prompts[:1], 1, SamplingParams(5, 0.0), (0,))
        streamed = list(engine.stream(prompts[0], SamplingParams(99, 0.0), (0,)))
    assert (stopped.token_ids, stopped.finish_reason) == (whole, "stop")
    assert (cut.token_ids, cut.finish_reason) == (whole[:5], "length")
    assert [token.token_id for token in streamed] == whole
    assert streamed[-1].finish_reason == "stop"
    assert all(math.isnan(logprob) for logprob in stopped.logprobs)
    assert len(stopped.logprobs) == len(whole)


def test_sampled_answers_depend_on_seed_prompt_and_sample_alone(tiny, prompts):
    model, tokenizer = tiny
    with serving(TorchEngine(model, tokenizer), tokenizer) as server:
        engine = connect(server)
        groups = engine.generate(prompts, 3, WARM, (7, 1))
        later = engine.generate(prompts[1:], 3, WARM, (7, 1), first_prompt=1)
        other = engine.generate(prompts[:1], 3, WARM, (7, 2))
    assert [[c.token_ids for c in g] for g in later] == [[c.token_ids for c in g] for g in groups[1:]]
    everything = [tuple(c.token_ids) for group in [*groups, *other] for c in group]
    assert len(set(everything)) == len(everything)


def test_a_seed_of_a_request_fits_every_server():
    keys = [(0, p, s) for p in range(50) for s in range(50)] + [(p, s) for p in range(50) for s in range(50)]
    seeds = [request_seed(key) for key in keys]
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert len(set(seeds)) > 0.999 * len(seeds)


def test_what_a_user_asks_for_is_asked_and_nothing_of_the_servers_own(tiny, prompts):
    model, tokenizer = tiny
    done = []
    with serving(TorchEngine(model, tokenizer), tokenizer) as server:
        engine = connect(server)
        server.asked.clear()
        engine.generate(prompts[:1], 2, WARM, (7,), on_completion=lambda *what: done.append(what[:2]))
    assert sorted(done) == [(0, 0), (0, 1)]
    assert {path for path, _ in server.asked} == {"/v1/completions"}
    for _, body in server.asked:
        assert body["prompt"] == prompts[0]
        assert body["model"] == "served"
        wanted = {"max_tokens": 8, "temperature": 1.0, "top_k": 50, "top_p": 0.95, "min_p": 0.001}
        # vLLM takes what is not given from the model's generation config: Qwen2.5's has a penalty of 1.1.
        wanted |= {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
        assert wanted.items() <= body.items()
    assert {body["seed"] for _, body in server.asked} == {request_seed((7, 0, s)) for s in range(2)}


def test_several_requests_are_in_flight_and_not_too_many(tiny, prompts):
    tokenizer = tiny[1]

    class Counting(ScriptedTokens):
        now = most = 0
        together = threading.Barrier(4)

        def stream(self, prompt, params, seed):
            if params.max_completion_tokens > 1:  # no probe
                Counting.now += 1
                Counting.most = max(Counting.most, Counting.now)
                self.together.wait(5)
                Counting.now -= 1
            return super().stream(prompt, params, seed)

    with serving(Counting(tokenizer, "x"), tokenizer) as server:
        connect(server).generate(prompts[:1], 4, GREEDY, (0,))
    assert 4 <= Counting.most <= PARALLEL


def test_pieces_of_text_bring_no_spaces_of_their_own(prompts):
    """SentencePiece's tokenizers put a space before what begins a text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    bpe.decoder = decoders.Metaspace(prepend_scheme="first")
    text = "Tom eats an apple a day"
    bpe.train_from_iterator([text], trainers.BpeTrainer(special_tokens=["</s>"], show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", chat_template="Tom")
    pieces = [Piece(piece, None, None) for piece in ("T", "om", " e", "ats", " an", " app", "le a", " day")]
    with serving(ScriptedTokens(tokenizer, text), tokenizer) as server:
        engine = connect(server)
        token_ids = [token_id for piece in pieces for token_id in engine._tokens_of(piece)]
    assert tokenizer.decode([*tokenizer.encode("Tom"), *token_ids]) == "Tom" + text


# ------------------------------------------------------------------------------------------------------------
# Thoughts, where the server takes them out


THOUGHTFUL = "<think>3 + 4 = 7</think><answer>7</answer>"


def test_thoughts_that_mlx_leaves_out_are_there_all_the_same(tiny, prompts):
    tokenizer = tiny[1]
    with serving(ScriptedTokens(tokenizer, THOUGHTFUL), tokenizer, "mlx") as server:
        engine = connect(server)
        [[completion]] = engine.generate(prompts[:1], 1, SamplingParams(99, 0.0), (0,))
        server.asked.clear()
        streamed = list(engine.stream(prompts[0], SamplingParams(99, 0.0), (0,)))
        ((path, body),) = server.asked
    assert tokenizer.decode(completion.token_ids, skip_special_tokens=True) == THOUGHTFUL
    assert tokenizer.decode([t.token_id for t in streamed], skip_special_tokens=True) == THOUGHTFUL
    assert path == "/v1/chat/completions"
    assert tokenizer.encode(body["messages"][0]["content"], add_special_tokens=False) == prompts[0]


def test_a_chat_that_asks_in_words_of_its_own_is_not_used(tiny, prompts, monkeypatch):
    tokenizer = tiny[1]
    monkeypatch.setattr("inference.server_engine.AS_IT_IS", {})
    with serving(ScriptedTokens(tokenizer, "7"), tokenizer, "mlx") as server:
        engine = connect(server)
        server.asked.clear()
        list(engine.stream(prompts[0], GREEDY, (0,)))
        assert [path for path, _ in server.asked] == ["/v1/completions"]


@pytest.mark.parametrize(
    ("deltas", "opened", "text"),
    [
        ([{"reasoning": "a"}, {"reasoning": "b"}, {}, {"content": "c"}], False, "<think>ab</think>c"),
        ([{"reasoning": "a", "content": "c"}, {"content": "d"}], False, "<think>a</think>cd"),
        ([{"reasoning": "a"}, {"content": "c"}], True, "a</think>c"),
        ([{"content": "c"}, {"reasoning": "a"}], False, "c<think>a"),
        ([{"content": None}, {"content": "c"}], False, "c"),
    ],
)
def test_tags_are_put_back_where_a_thought_begins_and_ends(deltas, opened, text):
    said, is_thinking = "", opened
    for delta in deltas:
        piece, is_thinking = with_tags(delta, is_thinking)
        said += piece
    assert said == text


# ------------------------------------------------------------------------------------------------------------
# Stopping


def test_closing_a_stream_stops_the_computation(tiny, prompts):
    tokenizer = tiny[1]
    with serving(ScriptedTokens(tokenizer, "on " * 2000, 0.002), tokenizer) as server:
        stream = connect(server).stream(prompts[0], SamplingParams(6000, 0.0), (0,))
        with closing(stream):
            for _ in range(3):
                next(stream)
        deadline = time.monotonic() + 1
        while not server.closed and time.monotonic() < deadline:
            time.sleep(0.005)
        assert server.closed == 1
        steps = server.steps
        time.sleep(0.05)
        assert server.steps == steps < 500


def test_a_group_that_streams_side_by_side_is_the_batch_and_stops_when_closed(tiny, prompts):
    model, tokenizer = tiny
    with serving(TorchEngine(model, tokenizer), tokenizer) as server:
        engine = connect(server)
        [expected] = engine.generate(prompts[:1], 4, WARM, (7,))
        streamed = [[] for _ in expected]
        for [(sample, token)] in engine.stream_group(prompts[0], 4, WARM, (7,)):
            streamed[sample].append(token)
    assert [[t.token_id for t in tokens] for tokens in streamed] == [c.token_ids for c in expected]
    assert [tokens[-1].finish_reason for tokens in streamed] == [c.finish_reason for c in expected]
    with serving(ScriptedTokens(tokenizer, "on " * 2000, 0.002), tokenizer) as server:
        engine = connect(server)
        stream = engine.stream_group(prompts[0], 3, SamplingParams(6000, 0.0), (0,))
        with closing(stream):
            seen = {sample for step in itertools.islice(stream, 30) for sample, _ in step}
        assert len(seen) > 1
        deadline = time.monotonic() + 10
        while server.closed < 3 and time.monotonic() < deadline:
            time.sleep(0.005)
        assert server.closed == 3
    with serving(ScriptedTokens(tokenizer, "on and on"), tokenizer, break_off_after=3) as server:
        stream = connect(server).stream_group(prompts[0], 2, GREEDY, (0,))
        with pytest.raises(ConnectionError, match="broke off in the middle"):
            list(stream)


def test_an_abandoned_batch_stops_the_computation(tiny, prompts):
    tokenizer = tiny[1]
    begun = threading.Semaphore(0)

    def leave(*_):
        assert all(begun.acquire(timeout=30) for _ in prompts[1:])
        raise KeyboardInterrupt

    class Uneven(ScriptedTokens):
        def stream(self, prompt, params, seed):
            if prompt == prompts[0]:
                yield StreamedToken(5, 0.0, "stop")
                return
            if prompt in prompts:  # not what the engine asks to get to know the server
                begun.release()
            yield from super().stream(prompt, params, seed)

    with serving(Uneven(tokenizer, "on " * 2000, 0.002), tokenizer) as server:
        engine = connect(server)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(prompts, 1, SamplingParams(6000, 0.0), (0,), on_completion=leave)
        deadline = time.monotonic() + 30
        while server.closed < 2 and time.monotonic() < deadline:
            time.sleep(0.005)
        assert server.closed == 2


LEAVES = """
import sys
from scripted import ByteTokenizer
from inference import SamplingParams
from inference.server_engine import ServerEngine

def leave(*_):
    raise KeyboardInterrupt

engine = ServerEngine(sys.argv[1], ByteTokenizer(), "served")
stream = engine.stream_group([2], 2, SamplingParams(9), (0,))
next(stream)
stream.close()
try:
    engine.generate([[1], [2]], 1, SamplingParams(9), (0,), on_completion=leave)
except KeyboardInterrupt:
    print("left")
"""


def test_a_silent_server_keeps_no_process_from_ending():
    """A server may be silent for ten minutes; whoever stopped an answer is gone at once."""
    speak = threading.Event()

    class Silent:
        def stream(self, prompt, params, seed):
            yield StreamedToken(65, 0.0, "length" if params.max_completion_tokens == 1 else None)
            if prompt == [2]:
                yield StreamedToken(65, 0.0, None)  # the first is told when there is a second
                speak.wait()
            yield StreamedToken(256, 0.0, "stop")

    with serving(Silent(), ByteTokenizer()) as server:
        server.turn = nullcontext()  # who is silent keeps nobody else waiting
        command = [sys.executable, "-c", LEAVES, server.url]
        path = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        try:
            left = subprocess.run(command, env=os.environ | path, capture_output=True, text=True, timeout=60)
        finally:
            speak.set()
    assert (left.returncode, left.stdout) == (0, "left\n"), left.stderr


# ------------------------------------------------------------------------------------------------------------
# What goes wrong


def test_a_server_that_dies_midway_is_told(tiny, prompts):
    tokenizer = tiny[1]
    with serving(ScriptedTokens(tokenizer, "on and on"), tokenizer, break_off_after=3) as server:
        engine = connect(server)
        with pytest.raises(ConnectionError, match=rf"{server.url}/completions broke off in the middle"):
            engine.generate(prompts, 2, GREEDY, (0,))
        stream = engine.stream(prompts[0], GREEDY, (0,))
        assert [next(stream).token_id for _ in range(2)] == tokenizer.encode("on")
        with pytest.raises(ConnectionError, match="broke off in the middle"):
            next(stream)
    with pytest.raises(ConnectionError, match="no answer in 5 attempts"):
        engine.generate(prompts, 2, GREEDY, (0,))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"error": {"message": "out of slots"}}, "something else than a completion.*out of slots"),
        ([1], "something else than a completion"),
        ({"choices": [{"text": "x", "finish_reason": "abort"}]}, "gave a completion up.*'abort'"),
        ({"choices": [{"text": "x", "finish_reason": None}]}, "without a reason"),
    ],
)
def test_an_answer_that_is_no_completion_is_told(tiny, prompts, monkeypatch, answer, message):
    tokenizer = tiny[1]
    with serving(ScriptedTokens(tokenizer, "x"), tokenizer) as server:
        engine = connect(server)
        monkeypatch.setattr("inference.server_engine.stream_json", lambda *_: iter([answer]))
        with pytest.raises(ConnectionError, match=message):
            engine.generate(prompts[:1], 1, GREEDY, (0,))


def test_a_request_that_is_refused_later_is_no_mistake_at_the_door(tiny, prompts):
    tokenizer = tiny[1]
    with serving(ScriptedTokens(tokenizer, "x"), tokenizer) as server:
        engine = connect(server)
        engine.served_model = "gone"
        with pytest.raises(ConnectionError, match="404 Not Found.*text input"):
            engine.generate(prompts[:1], 1, GREEDY, (0,))


def test_a_key_is_sent_and_a_wrong_one_told_unseen(tiny, prompts, monkeypatch):
    tokenizer = tiny[1]
    with serving(ScriptedTokens(tokenizer, "x"), tokenizer, key="right") as server:
        for key in ("wrong-one", None):
            monkeypatch.setenv(http.KEY_VARIABLE, key) if key else monkeypatch.delenv(http.KEY_VARIABLE)
            with pytest.raises(
                ValueError, match=r"401 Unauthorized: Unauthorized; .*PONDER_API_KEY"
            ) as refusal:
                connect(server)
            assert "wrong-one" not in str(refusal.value)
        monkeypatch.setenv(http.KEY_VARIABLE, "right\n")
        [[completion]] = connect(server).generate(prompts[:1], 1, GREEDY, (0,))
    assert completion.finish_reason == "stop"


@pytest.mark.parametrize(
    ("models", "model", "served_model", "expected"),
    [
        (["only"], "outputs/x", None, "only"),
        (["a", "org/b"], "org/b", None, "org/b"),
        (["a", "{here}"], "outputs/x", None, "{here}"),
        (["b", "a"], "outputs/x", "b", "b"),
        (["a", "b"], "outputs/x", None, ValueError),
        (["a"], "a", "c", ValueError),
    ],
)
def test_the_model_is_found_among_those_that_are_served(
    tiny, tmp_path, monkeypatch, models, model, served_model, expected
):
    monkeypatch.chdir(tmp_path)
    here = str(tmp_path / "outputs" / "x")
    models = [name.format(here=here) for name in models]
    tokenizer = tiny[1]
    with serving(ScriptedTokens(tokenizer, "x"), tokenizer, models=models) as server:
        if expected is ValueError:
            named = ".*".join(map(repr, models))
            with pytest.raises(ValueError, match=f"served_model: {server.url} .*{named}.*--served_model"):
                connect(server, model, served_model)
            return
        server.models = [expected.format(here=here), *models]  # it serves the one that is meant
        assert connect(server, model, served_model).served_model == server.models[0]


def test_a_server_that_lists_nothing_is_asked_for_what_is_wanted(tiny):
    """As mlx_lm.server does where nothing was ever downloaded."""
    with serving(ScriptedTokens(tiny[1], "x"), tiny[1], models=[]) as server:
        assert connect(server, "unlisted").served_model == "unlisted"
        assert connect(server, "outputs/x", "unlisted").served_model == "unlisted"
        with pytest.raises(http.RefusedError):
            connect(server, "outputs/x")


def test_a_server_with_another_tokenizer_is_refused(tiny, chat_tokenizer):
    told = pytest.raises(ValueError, match=r"reads a prompt as \d+ tokens that has \d+ .*'served'")
    with serving(ScriptedTokens(chat_tokenizer, "x"), chat_tokenizer) as server, told:
        ServerEngine(server.url, tiny[1], "served")


def test_a_token_that_servers_put_before_a_text_is_not_there_twice(chat_tokenizer):
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    prompt = encode_prompt(tokenizer, "1 + 1 = ?")
    assert prompt.count(tokenizer.bos_token_id) == 1
    letters = [*prompt, *(tokenizer.encode(c, add_special_tokens=False)[0] for c in "apples")]
    with serving(ScriptedTokens(tokenizer, "2"), tokenizer, "mlx") as server:
        engine = connect(server)
        server.asked.clear()
        engine.generate([prompt], 1, GREEDY, (0,))
        list(engine.stream(prompt, GREEDY, (0,)))
        assert [server.prompt_ids(body) for _, body in server.asked] == [prompt, prompt]
        with pytest.raises(ValueError, match=r"as text alone.*ask a server that takes token ids"):
            engine.generate([letters], 1, GREEDY, (0,))


# ------------------------------------------------------------------------------------------------------------
# Whoever asks through it


def test_an_evaluation_over_a_server_has_the_figures_of_a_direct_one(tiny, tiny_folder, tmp_path, capsys):
    report = tmp_path / "figures.json"
    config = {"model": tiny_folder, "limit": 6, "max_completion_tokens": 12, "json": str(report)}
    evaluate.main(evaluate.EvaluateConfig(**config))
    direct = json.loads(report.read_text())
    with serving(TorchEngine(*tiny), tiny[1]) as server:
        evaluate.main(evaluate.EvaluateConfig(**config, engine_url=server.url))
        assert len(server.asked) > 6
    assert json.loads(report.read_text()) == direct
    assert direct["mean_tokens"] > 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"engine_url": "http://127.0.0.1:9/v1", "baseline": "tiny"},
            "measure the baseline in a run of its own",
        ),
        ({"served_model": "x"}, "give engine_url"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        evaluate.EvaluateConfig(model="tiny", **wrong)
    if "served_model" in wrong:
        with pytest.raises(ValueError, match=message):
            load_chat_model("tiny", **wrong)


@pytest.mark.parametrize("manner", ["vllm", "llama.cpp", "mlx"])
def test_a_chat_over_a_server_shows_the_thought(tiny, tiny_folder, manner):
    tokenizer = tiny[1]
    with serving(ScriptedTokens(tokenizer, THOUGHTFUL), tokenizer, manner) as server:
        model = load_chat_model(tiny_folder, engine_url=server.url)
        *_, last = model.stream([Turn("3 + 4 = ?")], SamplingParams(99, 0.0), (0,))
    assert model.single_question
    assert model.context_tokens == (4096 if manner == "vllm" else None)
    assert (last.thought, last.answer) == ("3 + 4 = 7", "7")
    assert last.finish_reason == "stop"


def test_streams_from_a_server_do_not_wait_for_one_another(tiny, tiny_folder):
    tokenizer = tiny[1]
    with serving(ScriptedTokens(tokenizer, THOUGHTFUL), tokenizer) as server:
        model = load_chat_model(tiny_folder, engine_url=server.url)
        somebody_elses = MagicMock(__enter__=MagicMock(side_effect=AssertionError("waits for its turn")))
        *_, last = model.stream([Turn("3 + 4 = ?")], SamplingParams(99, 0.0), (0,), somebody_elses)
    assert last.finish_reason == "stop"


@pytest.mark.slow
def test_a_machine_without_torch_talks_to_a_server(tiny, tiny_folder):
    tokenizer = tiny[1]
    chat = "runpy.run_module('inference.chat', run_name='__main__')"
    code = f"import runpy, sys; sys.modules['torch'] = None; {chat}"
    with serving(ScriptedTokens(tokenizer, THOUGHTFUL), tokenizer) as server:
        flags = ["--model", tiny_folder, "--engine_url", server.url, "--question", "3 + 4 = ?"]
        told = subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True)
    assert (told.returncode, told.stdout) == (0, "3 + 4 = 7\n\n7\n"), told.stderr
