import threading
import time

import pytest

gr = pytest.importorskip("gradio", reason="the page needs gradio")

from scripted import ByteTokenizer, scripted_model  # noqa: E402

import app  # noqa: E402 - after the check for gradio
from inference import SamplingParams  # noqa: E402
from inference.chat import InTurn, Turn, load_chat_model  # noqa: E402
from inference.markdown import as_markdown  # noqa: E402
from page.chat import ChatPage, Conversation, cancelled, chat_messages  # noqa: E402
from page.shelf import Shelf  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:::gradio")


def shelf_of(*models):
    names = ["scripted", "another", "base"][: len(models)]
    return Shelf(names, dict(zip(names, models, strict=True)).get)


def chat_page(model, **changes):
    return ChatPage(shelf_of(model), app.AppConfig(model="scripted", **changes), InTurn())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1 < 2 and x<y", "1 < 2 and x&lt;y"),
        ("<img src=x onerror=y>", "&lt;img src=x onerror=y>"),
        ("</p><!-- c --><?x", "&lt;/p>&lt;!-- c -->&lt;?x"),
        ("![a](http://b/c.png)", "&#33;[a](http://b/c.png)"),
        (r"\<b> \![a](b)", r"\&lt;b> \&#33;[a](b)"),
        ("`<b>` and ``a ` <i>``", "`<b>` and ``a ` <i>``"),
        ("```html\n<b>![x](y)\n```\n<i>", "```html\n<b>![x](y)\n```\n&lt;i>"),
        ("```html\n<b> never closed", "```html\n<b> never closed"),
        ("```mermaid\ngraph\n```", "```text\ngraph\n```"),
        ("- ```mermaid\n  a mermaid\n  ```", "- ```text\n  a mermaid\n  ```"),
        ("unpaired ` and <b>", "unpaired ` and &lt;b>"),
        ("$a<b$ and $$a<b$$", r"\(a< b\) and $$a< b$$"),
        (r"\(a<b\) \[a<b\]", r"\(a< b\) \[a< b\]"),
        ("from $5 to $6, or US$7", "from $5 to $6, or US$7"),
        ("$x$-axis, $ 5 $, $5$6", r"\(x\)-axis, $ 5 $, $5$6"),
    ],
)
def test_model_text_becomes_markdown_without_html(text, expected):
    assert as_markdown(text) == expected


def test_a_lock_in_turn_lets_threads_in_as_they_came():
    lock, order = InTurn(), []

    def worker(name):
        for _ in range(20):
            with lock:
                order.append(name)
                time.sleep(0.001)

    threads = [threading.Thread(target=worker, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    both = order[order.index("b") :][:20]
    assert both.count("a") >= 8, order


def test_a_password_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("PONDER_AUTH", "ann:s:cret")
    assert app.read_auth("PONDER_AUTH") == ("ann", "s:cret")
    assert app.read_auth(None) is None
    monkeypatch.setenv("PONDER_AUTH", "nocolon")
    with pytest.raises(ValueError, match=r"auth_env.*user:password"):
        app.read_auth("PONDER_AUTH")


@pytest.mark.parametrize(
    ("wrong", "field"), [({"max_completion_tokens": 0}, "max_completion_tokens"), ({"port": -1}, "port")]
)
def test_a_configuration_that_cannot_work_is_refused(wrong, field):
    with pytest.raises(ValueError, match=field):
        app.AppConfig(model="tiny", **wrong)


def test_the_page_defaults_to_this_machine():
    assert app.AppConfig(model="tiny").host == "127.0.0.1"


def test_a_stopped_question_says_so_and_is_no_longer_being_answered():
    conversation = Conversation([Turn("q")])
    assert conversation.is_answering
    conversation.turns[-1] = cancelled(conversation.turns[-1], ByteTokenizer())
    assert not conversation.is_answering
    messages = [message for _, message in chat_messages(conversation.turns)]
    assert messages[-1].content[0]["text"] == "*Stopped.*"


@pytest.mark.parametrize(
    ("reply", "limit", "texts"),
    [
        ("<think>a</think>", 100, ["a", "*The model ended without an answer.*"]),
        ("<think>abc", 9, ["ab", "*No answer within 9 tokens. The settings may allow more.*"]),
        ("plain", 100, ["plain"]),
        ("<think> </think>  code:\n    x", 100, ["code:\n    x"]),
    ],
)
def test_what_a_finished_completion_shows(reply, limit, texts):
    readings = list(scripted_model(reply).stream([Turn("q")], SamplingParams(limit), (0,)))
    messages = chat_messages([Turn("q", readings[-1])])
    assert [message.content[0]["text"] for _, message in messages] == ["q", *texts]


def test_a_conversation_that_outgrows_the_model_is_told_and_left_as_it_was():
    page = chat_page(scripted_model("x", context_tokens=60))
    conversation = Conversation()
    conversation.ask("y" * 100)
    with pytest.raises(gr.Error, match="at most 60"):
        list(page.answer(conversation, "scripted", 0.0, 1.0, 10, 0))
    assert conversation.turns == []


def test_a_server_that_is_gone_is_told_and_the_question_given_back():
    def gone(prompt):
        raise ConnectionError("the server is gone")

    page = chat_page(scripted_model(gone))
    conversation = Conversation()
    conversation.ask("q")
    with pytest.raises(gr.Error, match="the server is gone"):
        list(page.answer(conversation, "scripted", 0.0, 1.0, 10, 0))
    assert conversation.turns == []


def test_programs_get_no_more_tokens_than_the_page_allows():
    page = chat_page(scripted_model("y" * 100), max_completion_tokens=20)
    *_, last = page.answer_once("q", max_completion_tokens=10_000)
    assert (last["tokens"], last["finish_reason"]) == (20, "length")
    for wrong in ({"top_p": 7.0}, {"seed": -1}, {"max_completion_tokens": 0}):
        with pytest.raises(gr.Error, match=next(iter(wrong))):
            next(page.answer_once("q", **wrong))


def test_hostile_text_is_made_safe_in_bounded_time():
    for text in (r"\(" * 5000, "$$" * 5001, "$a " * 5000, "` `` " * 3000, "<" * 20_000, "```\n" * 4001):
        started = time.monotonic()
        as_markdown(text)
        assert time.monotonic() - started < 1.0, text[:9]


def test_the_built_in_model_answers_through_the_page():
    pytest.importorskip("torch")
    model = load_chat_model("tiny")
    assert model.single_question
    page = chat_page(model)
    *_, last = page.answer_once("1 + 2 = ?", temperature=1.0, max_completion_tokens=20)
    assert last["finish_reason"] in ("stop", "length")
    assert 1 <= last["tokens"] <= 20
