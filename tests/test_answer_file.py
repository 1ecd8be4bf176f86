"""A file of questions, answered by the terminal chat."""

import json
import re

import pytest
from scripted import ByteTokenizer
from test_chat import run

import inference.chat
from inference import Completion
from inference.chat import ChatConfig, ChatModel, main
from runs.config import UserError


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
            **{"max_completion_tokens": 512, "temperature": 0.0, "top_p": 1.0, "seed": 3},
            **{"system_prompt": None, "engine_url": None, "served_model": None, "weights": []},
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


@pytest.mark.parametrize("torn", [0, 1, len('{"question": "2 + ü') + 1, 60, 400, -1])
def test_what_was_answered_before_is_not_asked_again(monkeypatch, problems_file, torn):
    output = answer(monkeypatch, problems_file, Answering())
    whole = output.read_text()
    output.unlink()
    with pytest.raises(KeyboardInterrupt):
        answer(monkeypatch, problems_file, Answering(dies_after=3))
    assert output.read_text() == "".join(
        whole.splitlines(keepends=True)[:2]
    )  # the fourth waits for the third
    with output.open("ab") as file:
        file.write(whole.encode().splitlines()[2][:torn])  # bytes: a character may be cut, too
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
    ("whole_lines", "tail"),
    [
        (0, '{"precious": 1}'),
        (0, "notes without an end"),
        (0, '{"question": "0 + ü = ?"}'),  # the input, or a copy of it
        (0, '{"question": "1 + ü = ?", "model": "scripted"'),
        (2, "precious"),
        (7, '{"question": "7 + ü = ?"'),
        (7, "{"),
    ],
)
def test_an_unfinished_line_that_is_not_ours_is_left_alone(monkeypatch, problems_file, whole_lines, tail):
    output = answer(monkeypatch, problems_file, Answering())
    before = "".join(output.read_text().splitlines(keepends=True)[:whole_lines]) + tail
    output.write_text(before)
    with pytest.raises(UserError, match=f"{output}:{whole_lines + 1} is no answer .*give another output"):
        answer(monkeypatch, problems_file, Answering())
    assert output.read_text() == before


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"seed": 4}, "seed 3, now 4"),
        ({"temperature": 0.5}, "temperature 0.0, now 0.5"),
        ({"max_completion_tokens": 9, "top_p": 0.9}, "max_completion_tokens 512, now 9, top_p 1.0, now 0.9"),
        ({"system_prompt": "Think."}, "system_prompt None, now 'Think.'"),
        ({"engine_url": "http://h/v1"}, "engine_url None, now 'http://h/v1'"),
        ({"engine_url": "http://h/v1", "served_model": "b"}, "now 'http://h/v1', served_model None, now 'b'"),
    ],
)
def test_answers_that_were_sampled_otherwise_are_not_mixed_with_new_ones(
    monkeypatch, problems_file, changed, told
):
    with pytest.raises(KeyboardInterrupt):
        answer(monkeypatch, problems_file, Answering(dies_after=3))
    output = problems_file.with_name("answers.jsonl")
    before = output.read_text()
    message = f"{output}:1 was answered with .*{re.escape(told)}; give the settings"
    with pytest.raises(UserError, match=message):
        answer(monkeypatch, problems_file, Answering(), settings=changed)
    assert output.read_text() == before


def test_answers_of_other_weights_are_not_mixed_with_new_ones(monkeypatch, problems_file, tmp_path):
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "scripted" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"1")
    with pytest.raises(KeyboardInterrupt):
        answer(monkeypatch, problems_file, Answering(dies_after=3))
    before = problems_file.with_name("answers.jsonl").read_text()
    weights.write_bytes(b"12")
    with pytest.raises(UserError, match=r"answers.jsonl:1 was answered with weights \[.* 1, .*now \[.* 2, "):
        answer(monkeypatch, problems_file, Answering())
    assert problems_file.with_name("answers.jsonl").read_text() == before


def test_answers_that_do_not_tell_how_they_were_sampled_are_the_models_all_the_same(
    monkeypatch, problems_file
):
    output = answer(monkeypatch, problems_file, Answering())
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    del rows[0]["sampling"]["weights"], rows[1]["sampling"]
    for first, told in ((0, "weights None, now [];"), (1, "max_completion_tokens None, now 512, ")):
        output.write_text(json.dumps(rows[first] | {"question": "0 + ü = ?"}) + "\n")
        with pytest.raises(UserError, match=f"{output}:1 was answered with {re.escape(told)}"):
            answer(monkeypatch, problems_file, Answering())


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
