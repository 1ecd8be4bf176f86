import io
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scripted import ByteTokenizer, scripted_model
from test_reading import read

import inference.chat
import prompts
from inference import SamplingParams, StreamedToken
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

ROOT = Path(__file__).parent.parent

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
        ({"input": "a.jsonl", "output": "tests/../a.jsonl"}, "output 'tests/../a.jsonl' is the input"),
        ({"temperature": -1.0}, "temperature must be >= 0"),
        ({"seed": -1}, "seed must be >= 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ChatConfig(model="tiny", **wrong)


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


def test_no_two_parts_of_votes_whose_thoughts_are_closed_share_random_numbers():
    def reply(prompt):
        return "<answer>7</answer>" if prompt.endswith("</think>") else "<think>and so on and on"

    model = scripted_model(reply)
    *_, votes = model.stream_votes([Turn("q")], 3, SamplingParams(200), (7, 0), thinking_tokens=5)
    assert [vote.thought for vote in votes] == ["and s"] * 3
    keys = [(*seed, 0, 0) for seed in model.engine.seeds]  # as engines number prompt and sample
    draws = {tuple(np.random.default_rng(key).integers(2**62, size=2)) for key in keys}
    assert len(draws) == len(keys) == 6
    assert model.engine.seeds[0] == (7, 0)  # the first vote begins as an answer without votes


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
