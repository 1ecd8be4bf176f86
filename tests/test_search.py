import copy
import itertools
import re
import runpy
import sys
import textwrap
from dataclasses import fields, replace
from operator import eq
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quick import lines
from scripted import ByteTokenizer, ScriptedEngine
from transformers import Qwen2Config, Qwen2ForCausalLM

from inference import Completion, NextToken, SamplingParams, StreamedToken, search
from inference.engine import TorchEngine
from inference.search import (
    Candidate,
    Query,
    beam_search,
    best_of_n,
    budget,
    budget_stream,
    group_answers,
    majority_vote,
    mean_logprob,
    self_certainty,
    self_correct,
)
from rewards import RewardError, parse_rewards, score
from rewards.verify import final_answer, same_answers

DOCUMENT = Path(__file__).parent.parent / "docs/search.md"
WARM = SamplingParams(max_completion_tokens=12, temperature=0.9)


class IdTokenizer:
    """Token ids as text: a prompt is its numbers, and so is a completion."""

    eos_token_id = 2

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return " ".join(message["content"] for message in messages)

    def encode(self, text, add_special_tokens=False):
        return [int(word) for word in text.split()]

    def decode(self, token_ids, skip_special_tokens=True):
        return " ".join(str(i) for i in token_ids if i != self.eos_token_id)


class Sayer:
    """An engine that gives the texts it was given, in order, and notes what it was asked."""

    def __init__(self, *texts, logprobs=None):
        self.texts, self.logprobs = list(texts), logprobs or [-1.0] * len(texts)
        self.asked = []

    def generate(self, prompts, n, params, seed):
        self.asked.append((bytes(prompts[0]).decode(), n, params, tuple(seed)))
        said = [(self.texts.pop(0), self.logprobs.pop(0)) for _ in range(n)]
        return [[Completion(list(t.encode()), [p] * len(t), "stop") for t, p in said]]


def answers(*given):
    return [f"<think>so</think><answer>{text}</answer>" if text else "<think>so" for text in given]


def ask(*given, logprobs=None):
    return Query(Sayer(*answers(*given), logprobs=logprobs), ByteTokenizer(), "?")


# ------------------------------------------------------------------------------------------------------------
# What all searches share


def test_the_documented_lines_run(tiny, reward_folder, tmp_path, capsys):
    for part in tiny:
        part.save_pretrained(tmp_path)
    blocks = re.findall(r"^( *)```python\n(.*?)^ *```", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
    script = tmp_path / "script.py"
    code = "".join(textwrap.dedent(block) for _, block in blocks)
    code = code.replace("outputs/grpo/final", str(tmp_path))
    script.write_text(code.replace("outputs/reward_model", str(reward_folder)))
    names = runpy.run_path(str(script))
    assert capsys.readouterr().out.split()[-1] == str(names["found"].tokens)
    model = names["model"]
    query = Query(model.engine, model.tokenizer, "1 + 2 = ?", WARM)
    for scorer in (names["by_rewards"], names["by_reward_model"]):
        found = best_of_n(query, 3, scorer)
        assert [c.score for c in found.candidates] == scorer("1 + 2 = ?", found.candidates)
    # The module's own example is the same.
    lines = [line.strip() for line in search.__doc__.splitlines() if line.startswith("    ")]
    assert "\n".join(lines) in blocks[0][1]


class Metered:
    """An engine that counts what it samples."""

    def __init__(self, engine):
        self.engine, self.branch, self.tokens = engine, engine.branch, 0

    def generate(self, *asked):
        groups = self.engine.generate(*asked)
        self.tokens += sum(len(completion.token_ids) for group in groups for completion in group)
        return groups

    def stream(self, *asked):
        for token in self.engine.stream(*asked):
            self.tokens += 1
            yield token


def every_search(query):
    yield best_of_n(query, 3)
    yield best_of_n(query, 3, self_certainty)
    yield majority_vote(query, 3)
    yield beam_search(query, 3)
    yield self_correct(query)
    yield budget(query, thinking_tokens=4, waits=1)


def test_every_search_gives_the_same_kind_of_result(tiny):
    model, tokenizer = tiny
    engine = Metered(TorchEngine(model, tokenizer))
    query = Query(engine, tokenizer, "1 + 2 = ?", WARM)
    first, again = list(every_search(query)), list(every_search(query))
    assert first == again
    beam = first[3]
    assert 2 * sum(found.tokens for found in first if found is not beam) == engine.tokens
    for found in first:
        assert found.best in found.candidates
        assert (found.answer, found.reasoning) == (found.best.answer, found.best.reasoning)
        assert (found.score, found.stop_reason) == (found.best.score, found.best.stop_reason)
        assert found.stop_reason in ("stop", "length")
    others = list(every_search(replace(query, seed=(1,))))
    assert [a != b for a, b in zip(first, others, strict=True)] == [True, True, True, False, True, True]


def test_no_scorer_can_see_a_gold_answer():
    names = {field.name for kind in (Query, Candidate) for field in fields(kind)}
    assert not names & {"gold", "correct", "columns", "problem"}
    seen = []

    def note(question, candidates):
        seen.append((question, [candidate.answer for candidate in candidates]))
        return [0.0] * len(candidates)

    best_of_n(ask("1", "2"), 2, note)
    assert seen == [("?", ["1", "2"])]


@pytest.mark.parametrize("values", [[1.0], [1.0, 2.0, 3.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_a_broken_scorer_stops_the_search(values):
    with pytest.raises(ValueError, match="must give 2 finite numbers"):
        best_of_n(ask("1", "2"), 2, lambda question, candidates: values)


@pytest.mark.parametrize(
    ("n", "temperature", "message"),
    [(0, 1.0, "n must be >= 1, got 0"), (2, 0.0, "temperature must be above 0 for 2 samples")],
)
def test_samples_that_would_be_none_or_all_the_same_are_refused(n, temperature, message):
    query = replace(ask("1", "2"), params=SamplingParams(temperature=temperature))
    with pytest.raises(ValueError, match=message):
        best_of_n(query, n)


# ------------------------------------------------------------------------------------------------------------
# Several samples


def test_best_of_n_takes_the_highest_score_and_the_first_of_equals():
    found = best_of_n(ask("1", "2", "3", logprobs=[-3.0, -1.0, -1.0]), 3)
    assert (found.answer, found.score, found.reasoning) == ("2", -1.0, "so")
    assert [candidate.score for candidate in found.candidates] == [-3.0, -1.0, -1.0]
    assert found.tokens == sum(len(text) for text in answers("1", "2", "3"))


def test_whoever_gives_no_answer_stands_behind_all_who_do():
    assert best_of_n(ask("", "2", logprobs=[-0.1, -5.0]), 2).answer == "2"
    found = best_of_n(ask("", "", logprobs=[-5.0, -0.1]), 2)
    assert (found.answer, found.score) == (None, -0.1)


def test_self_certainty_is_never_guessed():
    with pytest.raises(ValueError, match="use mean_logprob"):
        best_of_n(ask("1", "2"), 2, self_certainty)


def test_the_projects_rewards_are_a_scorer_and_need_no_gold():
    def by(rewards):
        chosen = parse_rewards(rewards)
        return lambda question, candidates: score(chosen, [c.text for c in candidates], {}).total

    query = Query(Sayer("<answer>1</answer>", *answers("2")), ByteTokenizer(), "?")
    assert best_of_n(query, 2, by({"format": 1.0})).answer == "2"
    with pytest.raises(RewardError, match="needs the column 'gold'"):
        best_of_n(ask("1", "2"), 2, by({"correct": 1.0}))


def test_a_vote_counts_answers_that_say_the_same_and_not_texts():
    texts = ("7", "1/2", "7", "0.5", r"\frac{1}{2}")
    assert majority_vote(ask(*texts), 5, eq).answer == "7"
    found = majority_vote(ask(*texts), 5)
    assert (found.answer, found.score) == ("1/2", 3 / 5)
    assert [candidate.score for candidate in found.candidates] == [2 / 5, 3 / 5, 2 / 5, 3 / 5, 3 / 5]
    assert group_answers([c.answer for c in found.candidates], same_answers) == [[0, 2], [1, 3, 4]]


def test_a_tie_goes_to_the_answer_that_came_first():
    for texts in itertools.permutations(["5", "5", "8", "8"]):
        assert majority_vote(ask(*texts), 4).answer == texts[0]


def test_votes_have_weights_and_whoever_gives_no_answer_votes_for_none():
    found = majority_vote(ask("1", "1", "2", ""), 4, weight=lambda question, candidates: [1, 2, 4, 3])
    assert (found.answer, found.score) == ("2", 0.4)
    assert [candidate.score for candidate in found.candidates] == [0.3, 0.3, 0.4, 0.0]
    assert majority_vote(ask("", ""), 2).answer is None
    assert majority_vote(ask("", "3"), 2, weight=lambda question, candidates: [0, 0]).answer == "3"
    with pytest.raises(ValueError, match="weights must be >= 0"):
        majority_vote(ask("1", "2"), 2, weight=mean_logprob)


def test_the_reader_of_answers_is_the_callers():
    engine = Sayer(r"<think>so</think>It is \boxed{4}.")
    assert best_of_n(Query(engine, ByteTokenizer(), "?"), 1).answer == r"It is \boxed{4}."
    engine = Sayer(r"<think>so</think>It is \boxed{4}.")
    assert best_of_n(Query(engine, ByteTokenizer(), "?", read=final_answer), 1).answer == "4"


@pytest.mark.parametrize(("logprobs", "kept"), [([-1.0, -2.0], "1"), ([-2.0, -1.0], "2")])
def test_a_second_look_sees_the_first_and_the_better_is_kept(logprobs, kept):
    query, asked = ask("1", "2", logprobs=logprobs), []

    def note(question, candidates):
        asked.append(question)
        return mean_logprob(question, candidates)

    found = self_correct(query, note, check="Sure?")
    [first], [second] = answers("1"), answers("2")
    assert found.answer == kept
    assert [candidate.text for candidate in found.candidates] == [first, second]
    assert [asked[0] for asked in query.engine.asked] == [
        "[user] ?\n[assistant] ",
        f"[user] ?\n[assistant] {first}\n[user] Sure?\n[assistant] ",
    ]
    assert asked == ["?"]
    assert found.tokens == len(first) + len(second)
    assert query.engine.asked[0][3] != query.engine.asked[1][3]


# ------------------------------------------------------------------------------------------------------------
# Beams


@pytest.mark.parametrize("architecture", ["qwen2", "mistral", "gpt2"])
def test_a_beam_of_width_1_is_greedy(random_model, architecture):
    model = random_model(architecture)
    prompts = ["5 6 7 8", "12 13", "40"]
    for eos in (2, 160, 300):
        engine = TorchEngine(model, SimpleNamespace(eos_token_id=eos))
        if eos == 300:  # some completion ends in the middle
            [[whole]] = engine.generate([[5, 6, 7, 8]], 1, SamplingParams(12, 0.0), (0,))
            engine = TorchEngine(model, SimpleNamespace(eos_token_id=whole.token_ids[4]))
        for prompt in prompts:
            query = Query(engine, IdTokenizer(), prompt, SamplingParams(12, 0.0))
            greedy, beam = best_of_n(query, 1), beam_search(query, 1)
            assert beam.best.token_ids == greedy.best.token_ids
            assert beam.stop_reason == greedy.stop_reason
            assert beam.tokens == greedy.tokens
            assert beam.score == pytest.approx(greedy.score, abs=1e-9)


@pytest.fixture(scope="module")
def toy():
    """Five tokens, the EOS among them."""
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen2Config(vocab_size=5, num_key_value_heads=1, eos_token_id=2, initializer_range=0.5, **shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Qwen2ForCausalLM(config).double().eval()


def all_completions(model, prompt, limit):
    """Every completion of up to `limit` tokens with its log-probability, by the library's forward."""
    found = {}
    for length in range(1, limit + 1):
        texts = torch.cartesian_prod(*[torch.arange(5)] * length).view(-1, length)
        with torch.no_grad():
            prompts = torch.tensor([prompt] * len(texts))
            logits = model(torch.cat([prompts, texts], 1)).logits[:, len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(2, texts[..., None]).sum((1, 2))
        for text, logprob in zip(texts.tolist(), logprobs.tolist(), strict=True):
            if 2 not in text[:-1] and (length == limit or text[-1] == 2):
                found[tuple(text)] = logprob
    return found


@pytest.mark.parametrize(("limit", "width"), [(2, 5), (3, 64), (4, 256)])
@pytest.mark.parametrize("length_power", [0.0, 0.5, 1.0])
def test_beams_that_hold_everything_find_the_best_of_all(toy, limit, width, length_power):
    engine = TorchEngine(toy, IdTokenizer())
    for prompt in ([0, 1], [4], [3, 3, 1]):
        query = Query(engine, IdTokenizer(), " ".join(map(str, prompt)), SamplingParams(limit), read=str)
        found = beam_search(query, width, length_power)
        every = {t: p / len(t) ** length_power for t, p in all_completions(toy, prompt, limit).items()}
        best = max(every, key=every.get)
        assert tuple(found.best.token_ids) == best
        assert found.score == pytest.approx(every[best], abs=1e-9)
        for candidate in found.candidates:
            assert candidate.score == pytest.approx(every[tuple(candidate.token_ids)], abs=1e-9)
            assert candidate.stop_reason == ("stop" if candidate.token_ids[-1] == 2 else "length")
        if width > len(every):
            assert len(found.candidates) == len(every)


def test_beams_of_the_librarys_decoder_are_those_of_ours(toy, monkeypatch):
    query = Query(TorchEngine(toy, IdTokenizer()), IdTokenizer(), "0 1", SamplingParams(9))
    expected = beam_search(query, 4)
    monkeypatch.setattr("inference.decoders.is_llama", lambda *args: False)
    found = beam_search(query, 4)
    assert [c.token_ids for c in found.candidates] == [c.token_ids for c in expected.candidates]
    assert found.tokens == expected.tokens


class Table:
    """An engine whose next token depends on the last alone; 0 ends."""

    def __init__(self, rows):
        self.rows, self.fed, self.closed = rows, [], False

    def branch(self, prompt, rows, limit):
        texts, chosen = [[]], [(0, None)]
        try:
            while True:
                likely = [self.rows[last] for _, last in chosen]
                chosen = yield [[NextToken(t, p, t == 0) for t, p in row.items()] for row in likely]
                assert 1 <= len(chosen) <= rows
                texts = [[*texts[row], token] for row, token in chosen]
                self.fed.append(texts)
        finally:
            self.closed = True


def test_tokens_of_beams_that_were_given_up_are_spent_too():
    engine = Table({None: {1: -0.1, 2: -2.4}, 1: {2: -0.5, 0: -1.0, 1: -3.0}, 2: {0: -0.2, 1: -1.9}})
    found = beam_search(Query(engine, IdTokenizer(), "7", SamplingParams(9)), 2)
    # By hand: 1 and 2; then 1 2 (-0.6) and the end 1 0 (-1.1) are the likeliest, and 1 1 (-3.1) the next that
    # does not end; then 1 2 0 (-0.8) ends above all that grow.
    assert found.best.token_ids == [1, 2, 0]
    assert found.score == pytest.approx(-0.8 / 3)
    assert [c.token_ids for c in found.candidates] == [[1, 2, 0], [1, 0]]
    assert engine.fed == [[[1], [2]], [[1, 2], [1, 1]]]
    assert found.tokens == 4 + 2  # fed, and the two ends
    assert engine.closed


def test_beams_that_end_early_do_not_end_the_search_while_a_better_one_grows():
    table = {None: {1: -0.1, 0: -3.2}, 1: {3: -0.1, 0: -3.2}, 3: {0: -0.1}}
    found = beam_search(Query(Table(table), IdTokenizer(), "7", SamplingParams(9)), 2)
    assert [c.token_ids for c in found.candidates] == [[1, 3, 0], [1, 0]]


def test_a_beam_that_gives_an_answer_comes_before_likelier_ones_that_were_cut():
    table = {None: {1: -0.1, 0: -3.2, 5: -9.0}, 1: {3: -0.1, 4: -3.1}, 5: {4: -0.1}}

    def read(text):
        return text if text.endswith("0") else None

    found = beam_search(Query(Table(table), IdTokenizer(), "7", SamplingParams(2), read=read), 2)
    assert [c.token_ids for c in found.candidates] == [[0], [1, 3], [1, 4]]


def test_an_engine_that_cannot_branch_says_so():
    with pytest.raises(ValueError, match="and Sayer cannot; use best_of_n"):
        beam_search(ask("1"))
    with pytest.raises(ValueError, match="width must be >= 1, got 0"):
        beam_search(ask("1"), 0)


def test_a_beam_wider_than_memory_is_refused(toy):
    query = Query(
        TorchEngine(toy, IdTokenizer(), max_cache_tokens=20), IdTokenizer(), "0 1", SamplingParams(8)
    )
    with pytest.raises(ValueError, match="rows must be <= 2, which fit in memory, got 3"):
        beam_search(query, 3)


# ------------------------------------------------------------------------------------------------------------
# The length of a thought


class Thinker:
    """Thinks the given words and answers 7; told to think on, 8; its thought cut short, 9."""

    def __init__(self, thought, opens_thought=False):
        self.thought, self.tokenizer = thought, ByteTokenizer(opens_thought)
        self.engine = ScriptedEngine(self.reply)

    def reply(self, prompt):
        said = prompt.partition("[assistant] ")[2]
        whole = f"<think>{self.thought}</think>"
        if whole.startswith(said):
            return (whole + "<answer>7</answer>")[len(said) :]
        if "</think>" not in said:
            return " so</think><answer>8</answer>"
        return "<answer>9</answer>"

    def query(self, limit=200):
        return Query(self.engine, self.tokenizer, "?", SamplingParams(limit), (5,))

    def stream(self, **options):
        return budget_stream(self.query(), **options)


def text_of(tokens):
    return ByteTokenizer().decode([token.token_id for token in tokens])


@pytest.mark.parametrize("opens_thought", [False, True])
@pytest.mark.parametrize("most", [0, 1, 5, 13])
def test_a_thought_is_closed_after_so_many_tokens_and_an_ordinary_answer_follows(opens_thought, most):
    thinker = Thinker("one two three", opens_thought)
    found = budget(thinker.query(), most)
    assert (
        found.best.text == f"<think>{'one two three'[:most]}</think><answer>{9 if most < 13 else 7}</answer>"
    )
    assert found.reasoning == "one two three"[:most]
    assert (found.answer, found.stop_reason) == ("9" if most < 13 else "7", "stop")
    assert found.tokens == sum(thinker.engine.computed.values())
    forced = [token.forced for token in thinker.stream(thinking_tokens=most)]
    assert sum(forced) == len("</think>")


def test_a_thought_that_closes_in_time_is_left_alone():
    thinker = Thinker("one two")
    plain = list(thinker.engine.stream(thinker.query().prompt_ids, SamplingParams(200), (5,)))
    assert list(thinker.stream(thinking_tokens=100)) == plain
    assert list(thinker.stream()) == plain
    assert {tuple(seed) for seed in thinker.engine.seeds} == {(5,)}


def test_a_tag_that_the_model_has_begun_is_finished_and_not_doubled():
    for begun in range(1, len("</think>")):
        found = budget(Thinker("one").query(), 3 + begun)
        assert found.best.text == "<think>one</think><answer>7</answer>"


def test_a_thought_goes_on_after_wait_so_many_times():
    thinker = Thinker("one < two </b")
    tokens = list(thinker.stream(waits=2))
    assert text_of(tokens) == "<think>one < two </b\nWait so\nWait so</think><answer>8</answer>"
    assert text_of([token for token in tokens if token.forced]) == "\nWait\nWait"
    found = budget(thinker.query(), waits=2)
    assert found.best.text == text_of(tokens)
    # The two tags that were taken away were sampled all the same.
    assert found.tokens == len(tokens) - 2 * len("\nWait") + 2 * len("</think>")
    assert len(set(thinker.engine.seeds)) == 3


def test_words_that_come_in_one_token_with_the_tag_are_not_lost():
    class Glued(ByteTokenizer):
        def decode(self, token_ids, **options):
            return super().decode([b for i in token_ids for b in (b"end</think>" if i == 300 else [i])])

    class Engine:
        def stream(self, prompt, params, seed):
            ids = [*b"<think>the ", 300, 256] if prompt[-1] == 32 else [*b"</think>", 256]
            for token_id in ids:
                yield StreamedToken(token_id, -1.0, "stop" if token_id == 256 else None)

    tokens = list(budget_stream(Query(Engine(), Glued(), "?", SamplingParams(100)), waits=1))
    assert Glued().decode([token.token_id for token in tokens]) == "<think>the end\nWait</think>"


def test_what_is_forced_counts_towards_the_limit():
    thinker = Thinker("one two three")
    for limit in range(1, 30):
        found = budget(thinker.query(limit), 5)
        assert found.best.text == "<think>one t</think><answer>9</answer>"[:limit]
        assert found.stop_reason == "length"
        assert len(found.best.token_ids) == limit


def test_a_closed_stream_stops_the_computation():
    for most in (3, 100):
        thinker = Thinker("one two three four")
        stream = thinker.stream(thinking_tokens=most)
        for _ in range(20):
            next(stream)
        before = dict(thinker.engine.computed)
        stream.close()
        assert thinker.engine.closed == thinker.engine.prompts
        assert thinker.engine.computed == before
        assert next(stream, None) is None


@settings(max_examples=40)
@given(
    st.text("ab<>/think é", max_size=30),
    st.one_of(st.none(), st.integers(0, 30)),
    st.integers(0, 3),
    st.booleans(),
)
def test_whatever_is_thought_the_budget_holds(thought, most, waits, opens_thought):
    thinker = Thinker(thought.replace("<think>", "").replace("</think>", ""), opens_thought)
    tokens = list(thinker.stream(thinking_tokens=most, waits=waits))
    assert tokens[-1].finish_reason == "stop"
    text = ("<think>" if opens_thought else "") + text_of(tokens)
    inside = text.removeprefix("<think>").partition("</think>")[0]
    assert text.startswith("<think>")
    assert text.count("</think>") == 1
    assert inside.count("\nWait") <= waits
    if most is not None:
        assert len(inside.encode()) <= most + len("\nWait")
    elif waits:
        assert inside.count("\nWait") == waits


@pytest.mark.parametrize("options", [{"thinking_tokens": -1}, {"waits": -1}])
def test_a_negative_budget_is_refused(options):
    with pytest.raises(ValueError, match="thinking_tokens and waits must be >= 0"):
        budget(Thinker("one").query(), **options)


def test_the_built_in_model_is_cut_at_the_token(tiny):
    model, tokenizer = tiny
    engine = TorchEngine(model, tokenizer)
    opening = copy.deepcopy(tokenizer)
    opening.chat_template += "{{ '<think>' }}"
    query = Query(engine, opening, "1 + 2 = ?", SamplingParams(40))
    tokens = list(budget_stream(query, thinking_tokens=6))
    assert [token.forced for token in tokens[:8]] == [False] * 6 + [True, False]
    assert [tokens[6].token_id] == tokenizer.encode("</think>")
    # What follows is what the model says after such a beginning.
    beginning = [*query.prompt_ids, *(token.token_id for token in tokens[:7])]
    assert list(engine.stream(beginning, SamplingParams(33), (0, 1))) == tokens[7:]


@pytest.mark.slow
def test_the_benchmark_measures_every_method_at_every_size(tiny, tmp_path, monkeypatch, capsys):
    from benchmarks.search import METHODS, main

    for part in tiny:
        part.save_pretrained(tmp_path)
    options = {
        "--model": tmp_path,
        "--limit": 3,
        "--max_completion_tokens": 8,
        "--json": tmp_path / "rows.jsonl",
    }
    monkeypatch.setattr(sys, "argv", ["search.py", *(str(part) for pair in options.items() for part in pair)])
    main()
    rows = lines(tmp_path / "rows.jsonl")
    assert [(row["method"], row["size"]) for row in rows] == [(m, n) for m in METHODS for n in METHODS[m][0]]
    assert all((row["n"], row["accuracy"]) == (3, 0.0) and row["tokens"] > 0 for row in rows)
    assert capsys.readouterr().out.count("\n") == 2 + len(rows)
