import io
import json
import os
import random
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from scripted import ByteTokenizer, scripted_model

import inference.chat
import prompts
from inference import Completion, SamplingParams, StreamedToken
from inference.chat import (
    EXAMPLES,
    SUMS,
    ChatConfig,
    ChatModel,
    TooLongError,
    Transcript,
    Turn,
    answer_turn,
    converse,
    main,
)
from inference.reading import CompletionReader, ThoughtSplitter, TokenDecoder
from runs.config import UserError

ROOT = Path(__file__).parent.parent

TEXTS = [
    "<think>12 + 34 = 46</think><answer>46</answer>",
    "<think>still going",
    "lost its tag</think><answer>1</answer>",
    "<answer>2</answer> too early</think> then 3",
    "<think>a</think>b<think>c</think>d",
    "<think>a</think>b<think>c",
    "<think>a<think>b</think>c</think>d",
    "<think>an <answer>0</answer> inside</think><answer>1</answer>",
    "no tags at all, 1 < 2 and <b>",
    "cut in a tag <thi",
    "<think>x</think><answ",
    "<think></think>",
    "",
    "<think>héllo 🧮 世界</think>\n\n**√2** ≈ 1,41 €",
    "<<think>>x<</think>>y</answer</answer>",
]


def one_shot(text):
    """What the reader should end with, from the parser that scores completions."""
    parsed = prompts.parse_completion(text)
    answer = parsed.answer_text.replace(prompts.ANSWER_OPEN, "").replace(prompts.ANSWER_CLOSE, "")
    return parsed.thought, answer, parsed.thought_open


def split_reading(pieces):
    splitter = ThoughtSplitter()
    for piece in pieces:
        splitter.feed(piece)
    splitter.finish()
    return splitter.thought, splitter.answer, splitter.thinking


def read(tokenizer, token_ids, prefix="", clock=None):
    reader = CompletionReader(tokenizer, prefix, **({"clock": clock} if clock else {}))
    readings = []
    for token_id in token_ids:
        reader.push(token_id)
        readings.append(reader.reading())
    reader.finish("stop")
    return [*readings, reader.reading()]


# ------------------------------------------------------------------------------------------------------------
# From text to thought and answer


@pytest.mark.parametrize("text", TEXTS)
def test_every_split_gives_what_the_one_shot_parse_gives(text):
    expected = one_shot(text)
    assert split_reading([text]) == expected
    assert split_reading(text) == expected
    for cut in range(len(text) + 1):
        for second in range(cut, min(cut + 12, len(text)) + 1):
            assert split_reading([text[:cut], text[cut:second], text[second:]]) == expected


def test_random_tag_soup_is_read_as_the_one_shot_parse_reads_it():
    random_ = random.Random(0)
    # No "answer>" by itself: the oracle would see a tag where a thought was taken out between "<" and it.
    parts = [*prompts.TAGS, "a", " ", "\n", "<", "</", ">", "think>", "<ans", "é"]
    for _ in range(2000):
        text = "".join(random_.choices(parts, k=random_.randrange(12)))
        pieces, rest = [], text
        while rest:
            size = random_.randrange(1, 9)
            pieces.append(rest[:size])
            rest = rest[size:]
        assert split_reading(pieces) == one_shot(text), (text, pieces)


@pytest.mark.parametrize("text", TEXTS)
def test_while_it_streams_everything_shows_but_what_may_become_a_tag(text):
    splitter = ThoughtSplitter()
    for end, character in enumerate(text, start=1):
        splitter.feed(character)
        starts = {tag[:size] for tag in prompts.TAGS for size in range(1, len(tag))}
        held = max((len(start) for start in starts if text[:end].endswith(start)), default=0)
        assert (splitter.thought, splitter.answer, splitter.thinking) == one_shot(text[: end - held])


def test_tags_in_a_code_fence_of_the_answer_are_text():
    code = "```xml\n<think>not a thought</think>\n<answer>1</answer>\n```\n"
    text = f"<think>hm</think>Write:\n{code}<answer>2</answer>"
    for pieces in ([text], text):
        assert split_reading(pieces) == ("hm", f"Write:\n{code}2", False)


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        ("~~~\n<think>\n~~~\n<answer>1</answer>", "~~~\n<think>\n~~~\n1"),
        ("````\n```\n<answer>\n````\n<answer>1</answer>", "````\n```\n<answer>\n````\n1"),
        ("```\nx\n```<answer>1</answer>", "```\nx\n```1"),
        ("a ``` b <answer>1</answer>", "a ``` b 1"),
        ("```inline``` <answer>1</answer>", "```inline``` 1"),
        ("```\n<answer>never closed", "```\n<answer>never closed"),
    ],
)
def test_code_fences_open_and_close_as_markdown_has_it(answer, shown):
    for pieces in ([f"<think></think>{answer}"], f"<think></think>{answer}"):
        assert split_reading(pieces) == ("", shown, False)


def test_a_code_fence_in_the_thought_does_not_keep_the_thought_open():
    assert split_reading("<think>```python\nx = 1</think>done") == ("```python\nx = 1", "done", False)


# ------------------------------------------------------------------------------------------------------------
# From token ids to text


@pytest.mark.parametrize("text", [*TEXTS, "🧮" * 20, "e\u0301", "👩‍👩‍👧‍👦 family"])
def test_characters_of_several_tokens_appear_whole(text):
    decoder = TokenDecoder(ByteTokenizer())
    pieces = [decoder.push(token_id) for token_id in text.encode()]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert "".join(pieces) + decoder.flush() == text


def test_bytes_that_are_no_text_neither_wait_for_ever_nor_break_what_follows():
    random_ = random.Random(0)
    for _ in range(300):
        token_ids = [random_.choice([0xFF, 0x80, 0xE2, 0xF0, *"é€🧮a".encode()]) for _ in range(60)]
        token_ids += [*"end €".encode()]
        decoder = TokenDecoder(ByteTokenizer())
        pieces = [decoder.push(token_id) for token_id in token_ids]
        assert "".join(pieces) + decoder.flush() == ByteTokenizer().decode(token_ids)
    decoder = TokenDecoder(ByteTokenizer())
    assert "".join(decoder.push(0xFF) for _ in range(40)), "garbage has to show at some point"


def test_a_long_stream_decodes_a_bounded_window_for_each_token():
    class Counting(ByteTokenizer):
        longest = 0

        def decode(self, token_ids, **options):
            Counting.longest = max(Counting.longest, len(token_ids))
            return super().decode(token_ids, **options)

    for token_ids in ("naïve ∑ ".encode() * 500, [0xFF] * 3000):
        decoder = TokenDecoder(Counting())
        for token_id in token_ids:
            decoder.push(token_id)
    assert Counting.longest <= 24


def test_the_built_in_tokenizer_streams_what_it_decodes_at_once():
    tiny = pytest.importorskip("tiny", reason="needs torch")
    tokenizer = tiny.build_tiny_tokenizer()
    for text in [*TEXTS, "12 + 34 = 46\n√2 🧮"]:
        token_ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        last = read(tokenizer, token_ids)[-1]
        assert last.text == text
        assert (last.thought, last.answer, last.thinking) == one_shot(text)


# ------------------------------------------------------------------------------------------------------------
# A completion as it streams


def test_a_prefilled_thought_is_open_before_the_first_token():
    text = "46, I think</think><answer>46</answer>"
    readings = read(ByteTokenizer(), text.encode(), prefix="<think>")
    assert readings[0].thinking
    assert readings[0].thought == "4"
    assert readings[-1].text == "<think>" + text
    assert (readings[-1].thought, readings[-1].answer) == ("46, I think", "46")


def test_time_and_tokens_of_the_thought_end_with_it():
    ticks = iter(range(1000))
    text = "<think>ab</think>cd"
    last = read(ByteTokenizer(), text.encode(), clock=lambda: float(next(ticks)))[-1]
    thought_tokens = len("<think>ab</think>")
    assert last.tokens == len(text)
    assert last.thought_tokens == thought_tokens
    assert last.thought_seconds == thought_tokens  # one tick a token, the first of them after the question
    assert last.tokens_per_second == 1.0


def test_a_thought_whose_opening_tag_got_lost_began_with_the_question():
    ticks = iter(range(1000))
    readings = read(ByteTokenizer(), b"ab</think>cd", clock=lambda: float(next(ticks)))
    assert readings[1].answer == "ab"
    assert (readings[-1].thought, readings[-1].answer) == ("ab", "cd")
    assert readings[-1].thought_tokens == readings[-1].thought_seconds == len("ab</think>")


def test_closing_the_chat_stream_stops_the_engine_at_once():
    model = scripted_model("<think>" + "on and on " * 100, seconds_per_token=0.001)
    stream = model.stream([Turn("q")], SamplingParams(max_completion_tokens=5000), (0,))
    for _ in range(3):
        next(stream)
    stream.close()
    (computed,) = model.engine.computed.values()
    assert model.engine.closed
    assert computed < 1000


def test_readings_come_at_a_pace_for_people_and_end_with_the_whole_text():
    model = scripted_model("<think>x</think>" + "y" * 3000)
    readings = list(model.stream([Turn("q")], SamplingParams(max_completion_tokens=5000), (0,)))
    assert len(readings) < 200
    assert readings[-1].answer == "y" * 3000
    assert readings[-1].finish_reason == "stop"


def test_the_conversation_carries_answers_but_no_thoughts():
    model = scripted_model("<think>secret</think><answer>4</answer>")
    params = SamplingParams(max_completion_tokens=100)
    first = Turn("2 + 2 = ?", list(model.stream([Turn("2 + 2 = ?")], params, (0,)))[-1])
    stopped = Turn("never answered", None)
    list(model.stream([first, stopped, Turn("and 1 more?")], params, (0,)))
    assert model.engine.prompts[-1] == (
        "[user] 2 + 2 = ?\n[assistant] <answer>4</answer>\n[user] and 1 more?\n[assistant] "
    )
    single = scripted_model("x", single_question=True)
    list(single.stream([first, Turn("alone?")], params, (0,)))
    assert single.engine.prompts[-1] == "[user] alone?\n[assistant] "


def test_a_completion_never_outgrows_the_context():
    model = scripted_model("y" * 100, context_tokens=40)
    prompt_tokens = len("[user] q\n[assistant] ")
    last = list(model.stream([Turn("q")], SamplingParams(max_completion_tokens=100), (0,)))[-1]
    assert (last.tokens, last.finish_reason) == (40 - prompt_tokens, "length")
    with pytest.raises(TooLongError, match="at most 40"):
        list(model.stream([Turn("q" * 50)], SamplingParams(), (0,)))


# ------------------------------------------------------------------------------------------------------------
# The terminal


class Terminal(io.StringIO):
    def isatty(self):
        return True


def transcript(text, out):
    writer = Transcript(out)
    for reading in read(ByteTokenizer(), text.encode()):
        writer.show(reading)
    writer.end("note")
    return out.getvalue()


def test_a_pipe_gets_plain_text_and_a_terminal_a_dimmed_thought():
    text = "<think>because</think>\n<answer>46</answer>"
    assert transcript(text, io.StringIO()) == "because\n\n46\n"
    shown = transcript(text, Terminal())
    assert "\x1b[2mb\x1b[0m" in shown
    assert shown.index("46") > shown.rindex("\x1b[2me\x1b[0m")
    assert "note" in shown


def test_a_late_closing_tag_writes_nothing_twice():
    assert transcript("because</think>46", io.StringIO()) == "because\n\n46\n"


def test_what_a_model_writes_cannot_steer_the_terminal():
    shown = transcript("<answer>\x1b]0;title\x07\x1b[2J\x9b1m\rhello\x08</answer>", Terminal())
    assert not set("\x07\r\x08\x9b") & set(shown)
    assert "\x1b]" not in shown
    assert "\x1b[2J" not in shown


def chat(model, lines, monkeypatch, **settings):
    out = io.StringIO()
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    config = ChatConfig(model="scripted", **settings)
    converse(model, config, SamplingParams(max_completion_tokens=200), out)
    return out.getvalue()


def test_commands_of_the_terminal_chat(monkeypatch):
    model = scripted_model(lambda prompt: f"<answer>{len(prompt)}</answer>")
    lines = ["/retry", "first", "/retry", "second", "/clear", "/what", "third", "/quit", "never"]
    shown = chat(model, lines, monkeypatch, temperature=1.0, seed=7)
    assert shown.count("/retry answers again") == 2  # nothing to retry yet, and an unknown command
    one = "[user] first\n[assistant] "
    two = "[user] first\n[assistant] <answer>25</answer>\n[user] second\n[assistant] "
    assert model.engine.prompts == [one, one, two, "[user] third\n[assistant] "]
    assert model.engine.seeds == [(7, 0), (7, 1), (7, 0), (7, 0)]


def test_the_system_prompt_changes_with_the_next_question(monkeypatch):
    tiny = pytest.importorskip("tiny", reason="needs torch")
    tokenizer = tiny.build_tiny_tokenizer()
    asked = []

    class Echo:
        def stream(self, prompt, params, seed):
            asked.append(tokenizer.decode(prompt))
            yield StreamedToken(tokenizer.eos_token_id, 0.0, "stop")

    model = ChatModel("tiny", Echo(), tokenizer)
    lines = ["/system Be brief.", "1", "/system   ", "2", "/systemic", "3"]
    shown = chat(model, lines, monkeypatch)
    asks = "<|user|>{}<|end|><|assistant|>".format
    assert asked == ["<|system|>Be brief.<|end|>" + asks(1), asks(2), asks(3)]
    assert "follows it" in shown
    assert "No system prompt" in shown
    assert shown.count("/system TEXT") == 1  # no such command as /systemic


def test_a_template_that_refuses_a_system_prompt_keeps_the_chat_as_it_was(monkeypatch):
    tiny = pytest.importorskip("tiny", reason="needs torch")
    tokenizer = tiny.build_tiny_tokenizer()
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no roles') }}{% endif %}Q"
    tokenizer.chat_template = before = prompts.PREPARED_MARK + refuses
    shown = chat(ChatModel("gemma", None, tokenizer), ["/system Be brief."], monkeypatch)
    assert "'gemma' cannot be asked: the chat template cannot be used with a system prompt: no roles" in shown
    assert tokenizer.chat_template == before


def test_a_question_that_does_not_fit_is_told_and_the_chat_goes_on(monkeypatch):
    model = scripted_model("<answer>1</answer>", context_tokens=60)
    shown = chat(model, ["x" * 100, "short"], monkeypatch)
    assert "at most 60" in shown
    assert model.engine.prompts == ["[user] short\n[assistant] "]


def test_a_server_that_is_gone_is_told_and_the_chat_goes_on(monkeypatch):
    def gone(prompt):
        if "first" in prompt:
            raise ConnectionError("the server is gone")
        return "<answer>1</answer>"

    shown = chat(scripted_model(gone), ["first", "second"], monkeypatch)
    assert shown == "\nthe server is gone\n1\n"


def test_control_c_stops_the_answer_and_not_the_chat():
    def interrupt(prompt):
        os.kill(os.getpid(), signal.SIGINT)
        return "x" * 1000

    model = scripted_model(interrupt, seconds_per_token=0.001)
    out = Terminal()
    # A shell starts what runs in the background with Ctrl-C ignored.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        turn = answer_turn(model, [Turn("q")], SamplingParams(max_completion_tokens=2000), (0,), out)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert turn.question == "q"
    assert "stopped" in out.getvalue()
    assert model.engine.computed.get("[user] q\n[assistant] ", 0) < 1000


def run(monkeypatch, model, **settings):
    """The chat's main, with `model` in the place of the one that it would load."""
    monkeypatch.setattr(inference.chat, "load_chat_model", lambda *_: model)
    main(ChatConfig(model="scripted", **settings))


def test_the_demo_asks_what_fits_the_model(monkeypatch, capsys):
    for questions, settings in ((EXAMPLES, {}), (SUMS, {"single_question": True})):
        model = scripted_model("<answer>7</answer>", **settings)
        run(monkeypatch, model, demo=True)
        assert capsys.readouterr().out == "".join(f"> {question}\n7\n" for question in questions)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"question": "1", "demo": True}, "question and demo cannot be done at once"),
        ({"input": "a.jsonl"}, "input and output belong together"),
        ({"output": "a.jsonl"}, "input and output belong together"),
        ({"input": "a.jsonl", "output": "nowhere/b.jsonl"}, "output 'nowhere/b.jsonl' cannot be written"),
        ({"input": "a.jsonl", "output": "."}, "output '.' cannot be written"),
        ({"temperature": -1.0}, "temperature must be >= 0"),
        ({"seed": -1}, "seed must be >= 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ChatConfig(model="tiny", **wrong)


# ------------------------------------------------------------------------------------------------------------
# A file of questions


class Answering:
    """Answers every prompt by its length, of two the second one first, up to `dies_after`."""

    def __init__(self, dies_after=None, output=None):
        self.dies_after, self.output, self.asked, self.written = dies_after, output, [], []

    def generate(self, prompt_ids, n, params, seed, first_prompt, on_completion):
        assert n == 1
        self.asked.append((len(prompt_ids), params.max_completion_tokens, seed, first_prompt))
        order = sorted(range(len(prompt_ids)), key=lambda number: (number // 2, -number))  # 1, 0, 3, 2, ...
        for count, number in enumerate(order):
            if count == self.dies_after:
                raise KeyboardInterrupt
            text = f"<think>{len(prompt_ids[number])}</think><answer>{first_prompt + number}</answer>"
            on_completion(number, 0, Completion(list(text.encode()), [], "stop"))
            self.written.append(len(self.output.read_text().splitlines()) if self.output else None)


@pytest.fixture
def problems_file(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i} + ü = ?"}) + "\n" for i in range(7)))
    return path


def answer(monkeypatch, path, engine, settings={}, **about):  # noqa: B006 - never changed
    output = path.with_name("answers.jsonl")
    about = {"name": "scripted", **about}
    model = ChatModel(engine=engine, tokenizer=ByteTokenizer(), **about)
    run(monkeypatch, model, input=str(path), output=str(output), **{"seed": 3, **settings})
    return output


def test_a_file_of_questions_is_answered_in_its_order(monkeypatch, problems_file, capsys):
    engine = Answering(output=problems_file.with_name("answers.jsonl"))
    output = answer(monkeypatch, problems_file, engine, context_tokens=100)
    assert engine.written == [0, 2, 2, 4, 4, 6, 7]  # on disk as soon as those before them are
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["question"] for row in rows] == [f"{i} + ü = ?" for i in range(7)]
    assert [row["answer"] for row in rows] == [str(i) for i in range(7)]
    prompt = "[user] 0 + ü = ?\n[assistant] "
    assert rows[0] | {"tokens": 0} == {
        "question": "0 + ü = ?",
        "model": "scripted",
        "sampling": {
            **{"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "self_certainty": False},
            **{"max_completion_tokens": 512, "seed": 3, "system_prompt": None},
        },
        "thought": str(len(prompt.encode())),
        "answer": "0",
        "completion": f"<think>{len(prompt.encode())}</think><answer>0</answer>",
        "tokens": 0,
        "finish_reason": "stop",
    }
    assert engine.asked == [(7, 60, (3,), 0)]  # what the prompt leaves of 100, in eighths of the context
    told = capsys.readouterr()
    assert told.out == ""
    assert "7/7" in told.err


@pytest.mark.parametrize("torn", ["", '{"question": "2 + ü'])
def test_what_was_answered_before_is_not_asked_again(monkeypatch, problems_file, torn):
    output = answer(monkeypatch, problems_file, Answering())
    whole = output.read_text()
    output.unlink()
    with pytest.raises(KeyboardInterrupt):
        answer(monkeypatch, problems_file, Answering(dies_after=3))
    assert output.read_text() == "".join(
        whole.splitlines(keepends=True)[:2]
    )  # the fourth waits for the third
    with output.open("a") as file:
        file.write(torn)
    engine = Answering()
    answer(monkeypatch, problems_file, engine)
    assert output.read_text() == whole
    assert [asked[0::3] for asked in engine.asked] == [(5, 2)]
    answer(monkeypatch, problems_file, engine)
    assert output.read_text() == whole
    assert len(engine.asked) == 1


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("no JSON", "scripted"),
        ("[1]", "scripted"),
        ('{"question": "0 + ü = ?"}', "scripted"),
        ('{"question": "another", "model": "scripted"}', "scripted"),
        ('{"question": "0 + ü = ?", "model": "scripted"}', "another"),
    ],
)
def test_an_output_of_other_answers_is_left_alone(monkeypatch, problems_file, line, name):
    output = problems_file.with_name("answers.jsonl")
    output.write_text(line + "\n")
    with pytest.raises(UserError, match=f"{output}:1 is no answer of {name} .*give another output"):
        answer(monkeypatch, problems_file, Answering(), name=name)
    assert output.read_text() == line + "\n"
    output.unlink()
    whole = answer(monkeypatch, problems_file, Answering()).read_text()
    output.write_text(whole + whole.splitlines()[-1] + "\n")  # one more than asked
    with pytest.raises(UserError, match=f"{output}:8 is no answer|{output}:1 is no answer of another"):
        answer(monkeypatch, problems_file, Answering(), name=name)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"seed": 4}, "seed 3, now 4"),
        ({"temperature": 0.5}, "temperature 0.0, now 0.5"),
        ({"max_completion_tokens": 9, "top_p": 0.9}, "max_completion_tokens 512, now 9, top_p 1.0, now 0.9"),
        ({"system_prompt": "Think."}, "system_prompt None, now 'Think.'"),
    ],
)
def test_answers_that_were_sampled_otherwise_are_not_mixed_with_new_ones(
    monkeypatch, problems_file, changed, told
):
    with pytest.raises(KeyboardInterrupt):
        answer(monkeypatch, problems_file, Answering(dies_after=3))
    output = problems_file.with_name("answers.jsonl")
    before = output.read_text()
    with pytest.raises(UserError, match=f"{output}:1 was answered with {re.escape(told)}; give the settings"):
        answer(monkeypatch, problems_file, Answering(), settings=changed)
    assert output.read_text() == before


def test_a_long_question_of_a_file_costs_the_others_nothing(monkeypatch, problems_file):
    rows = problems_file.read_text().splitlines(keepends=True)
    rows[3] = json.dumps({"question": "9" * 300}) + "\n"
    problems_file.write_text("".join(rows))
    engine = Answering()
    output = answer(
        monkeypatch, problems_file, engine, context_tokens=400, settings={"max_completion_tokens": 200}
    )
    assert engine.asked == [(3, 200, (3,), 0), (1, 50, (3,), 3), (3, 200, (3,), 4)]
    assert [json.loads(line)["answer"] for line in output.read_text().splitlines()] == [
        str(i) for i in range(7)
    ]


def test_a_bad_file_of_questions_is_refused_before_a_model_is_loaded(monkeypatch, problems_file):
    problems_file.write_text('{"question": "1 + 1 = ?"}\n{"question": ""}\n')
    monkeypatch.setattr(inference.chat, "load_chat_model", lambda *_: pytest.fail("loaded"))
    output = problems_file.with_name("answers.jsonl")
    with pytest.raises(UserError, match=f"{problems_file}:2: .*empty"):
        main(ChatConfig(model="scripted", input=str(problems_file), output=str(output)))
    assert not output.exists()


def test_a_question_of_a_file_that_does_not_fit_is_named(monkeypatch, problems_file):
    with problems_file.open("a") as file:
        file.write(json.dumps({"question": "9" * 100}) + "\n")
    with pytest.raises(UserError, match="question 8 of the input does not fit: .*at most 60"):
        answer(monkeypatch, problems_file, Answering(), context_tokens=60)
    assert not problems_file.with_name("answers.jsonl").exists()


def test_a_missing_model_is_one_message_and_exit_code_2(monkeypatch, capsys):
    pytest.importorskip("torch")
    monkeypatch.setattr("sys.argv", ["chat.py", "--model", "outputs/nowhere", "--question", "1 + 1 = ?"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(ROOT / "inference" / "chat.py"), run_name="__main__")
    out, err = capsys.readouterr()
    assert exit_.value.code == 2
    assert err.count("\n") == 1
    assert "outputs/nowhere" in err
    assert not out


def test_the_chat_imports_without_torch():
    code = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; import inference.chat"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_budget_closes_thoughts_until_it_is_taken_back(monkeypatch):
    def reply(prompt):
        return (
            "<answer>7</answer>"
            if prompt.endswith("</think>")
            else "<think>" + "on and on " * 9 + "</think>8"
        )

    lines = ["/budget 12", "first", "/budget many", "second", "/budget", "third"]
    shown = chat(scripted_model(reply), lines, monkeypatch)
    assert "Thoughts are closed after 12 tokens." in shown
    assert "/budget takes a number of tokens, got 'many'." in shown
    assert shown.count("on and on on\n\n7") == 2  # twelve bytes of thought
    assert "on and on " * 8 in shown
    assert "Thoughts take as long as they do." in shown
