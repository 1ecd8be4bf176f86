"""The page in a real browser, and its server: what people do there, and what programs do."""

import json
import re
import socket
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest

gr = pytest.importorskip("gradio", reason="the page needs gradio")

from quick import quick_grpo, quick_sft  # noqa: E402
from scripted import scripted_model  # noqa: E402
from test_app import shelf_of  # noqa: E402
from visitor import Visitor, free_port, wait_until  # noqa: E402
from written import jsonl, rollout, write_run  # noqa: E402

import app  # noqa: E402 - after the check for gradio
from inference import SamplingParams  # noqa: E402
from inference.chat import Turn, load_chat_model  # noqa: E402
from page.shelf import Shelf  # noqa: E402
from runs.config import UserError  # noqa: E402
from train_grpo import main as train_grpo  # noqa: E402
from train_sft import main as train_sft  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:::gradio")]

HOSTILE = """<script>window.hacked = 1</script>
<img src=x onerror="window.hacked = 2">
<img src=http://198.51.100.7/a.png>
<iframe srcdoc="<script>parent.hacked = 3</script>"></iframe>
<svg onload="window.hacked = 4"></svg>
![picture](http://198.51.100.7/b.png)
![by reference][r]
[a link](javascript:window.hacked=5) [another](data:text/html,<script>window.hacked=6</script>)
<a href="javascript:window.hacked=7">raw</a> <div style="background:url(http://198.51.100.7/c.png)">styled</div>
$<img src=x onerror=window.hacked=8>$ \\(\\href{javascript:window.hacked=9}{x}\\)
\\(\\includegraphics{http://198.51.100.7/d.png}\\)

`\\(` <img src=http://198.51.100.7/e.png> `\\)`

```mermaid
graph TD
A["<img src=http://198.51.100.7/f.png onerror=window.hacked=10>"]
```

[r]: http://198.51.100.7/g.png
last line"""

MATHS = r"""Inline $x^2$ and \(y^2\), displayed

$$z^2$$

\[w^2\]

for $5 or $6.
"""


def reply(prompt):
    question = re.findall(r"\[user\] (.*)", prompt)[-1]
    if question.startswith(("long", "fairly long", "some words")):
        repeats = {"long": 1000, "fairly": 250, "some": 30}[question.split()[0].rstrip(",")]
        return "<think>" + "and on " * repeats + f"</think>{question} done"
    if question == "hostile":
        return f"<think>{HOSTILE}</think>{HOSTILE}"
    if question == "maths":
        return MATHS
    return f"<think>Let me see: é 🧮, hm.</think><answer>heard: {question}</answer>"


@pytest.fixture(scope="module")
def outside():
    """Addresses outside this machine that the server's process tried to reach."""
    reached = []
    connect = socket.socket.connect

    def recording_connect(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            reached.append(address)
        return connect(self, address)

    socket.socket.connect = recording_connect
    yield reached
    socket.socket.connect = connect


@pytest.fixture(scope="module")
def model():
    return scripted_model(reply, seconds_per_token=0.002)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of runs, with one in it."""
    folder = tmp_path_factory.mktemp("outputs")
    write_run(folder / "first")
    hostile = "<script>window.hacked = 11</script><img src=x onerror=window.hacked=12>"
    jsonl(folder / "first" / "rollouts.jsonl", [rollout(2, 0, hostile, correct=False)])
    jsonl(
        folder / "first" / "canaries.jsonl",
        [{"step": 0, "question": "7?", "correct": True, "completion": hostile}],
    )
    return folder


@pytest.fixture(scope="module")
def server(outside, model, folder):
    places = {"runs": str(folder), "feedback": str(folder / "feedback")}
    config = app.AppConfig(model="scripted", port=free_port(), max_completion_tokens=9000, **places)
    before = scripted_model("<think>no idea</think><answer>0</answer>", seconds_per_token=0.002)
    base = scripted_model("I am no chat model.", seconds_per_token=0.002)
    page = app.build_page(shelf_of(model, before, base), config)
    yield app.launch(page, config, auth=None).rstrip("/")
    page.close(verbose=False)


@pytest.fixture
def visit(browser, server):
    visitors = []

    def arrive():
        visitors.append(Visitor(browser, server))
        return visitors[-1]

    yield arrive
    for visitor in visitors:
        elsewhere = [u for u in visitor.requests if not u.startswith((server, "data:", "blob:"))]
        visitor.close()
        assert not elsewhere
        assert not visitor.dialogs


@pytest.fixture
def visitor(visit):
    return visit()


def prompt_of(model, question):
    """The one prompt in which `question` was asked last."""
    (prompt,) = {p for p in model.engine.prompts if p.endswith(f"[user] {question}\n[assistant] ")}
    return prompt


def assert_stops_computing(model, prompt, seconds):
    time.sleep(seconds)
    computed = model.engine.computed[prompt]
    time.sleep(0.5)
    assert model.engine.computed[prompt] == computed
    assert computed < 7000
    assert prompt in model.engine.closed


def test_the_thought_streams_and_closes_with_its_title_and_the_answer_appears(visitor, model):
    visitor.ask("fairly long")
    visitor.see("Thinking…")
    thought = visitor.page.locator("#chat .thought-group")
    wait_until(lambda: "and on and on" in thought.inner_text())
    length = len(thought.inner_text())
    wait_until(lambda: len(thought.inner_text()) > length)
    visitor.settled()
    visitor.see(re.compile(r"Thought for \d+\.\d s · \d+ tokens"))
    wait_until(lambda: "and on" not in thought.inner_text())
    assert visitor.answer() == "fairly long done"
    assert re.fullmatch(r"\d+ tokens · \d+ tokens/s", visitor.page.locator("#status").inner_text().strip())
    visitor.page.locator("#chat .thought-group .title").click()
    visitor.see("and on and on")


def test_stop_stops_the_computation_within_a_second_and_the_chat_goes_on(visitor, model):
    visitor.ask("long, to be stopped")
    visitor.see("Thinking…")
    prompt = prompt_of(model, "long, to be stopped")
    visitor.page.locator("#question .stop-button").click()
    assert_stops_computing(model, prompt, 1.0)
    visitor.see("unfinished")
    visitor.see("Stopped.")
    visitor.ask("after the stop")
    visitor.see("heard: after the stop")
    # What was never answered is not sent again.
    assert prompt_of(model, "after the stop") == "[user] after the stop\n[assistant] "


def test_a_closed_window_stops_its_computation(visit, model):
    visitor = visit()
    visitor.ask("long, then gone")
    visitor.see("Thinking…")
    prompt = prompt_of(model, "long, then gone")
    visitor.close()
    wait_until(lambda: prompt in model.engine.closed)
    assert_stops_computing(model, prompt, 0.1)


def test_retry_asks_again_with_other_random_numbers(visitor, model):
    visitor.ask("again?")
    visitor.see("heard: again?")
    visitor.settled()
    before = len(model.engine.prompts)
    visitor.press("Retry")
    visitor.page.get_by_text("At temperature 0 the answer is always the same").wait_for()
    wait_until(lambda: len(model.engine.prompts) > before)
    visitor.see("heard: again?")
    visitor.settled()
    assert model.engine.prompts[-1] == "[user] again?\n[assistant] "
    assert model.engine.seeds[-2:] == [(0, 0), (0, 1)]
    assert visitor.questions() == ["again?"]


def test_an_edited_question_is_asked_anew_and_what_followed_goes(visitor, model):
    visitor.ask("one")
    visitor.see("heard: one")
    visitor.settled()
    visitor.ask("two")
    visitor.see("heard: two")
    visitor.settled()
    assert prompt_of(model, "two") == (
        "[user] one\n[assistant] <answer>heard: one</answer>\n[user] two\n[assistant] "
    )
    visitor.press("Edit")
    visitor.page.locator("#chat textarea").first.fill("one, changed")
    visitor.press("Submit")
    visitor.see("heard: one, changed")
    visitor.settled()
    assert visitor.questions() == ["one, changed"]
    assert prompt_of(model, "one, changed") == "[user] one, changed\n[assistant] "
    # A later question can be edited too, and what stands before it stays.
    visitor.ask("three")
    visitor.see("heard: three")
    visitor.settled()
    visitor.press("Edit", 1)
    visitor.page.locator("#chat textarea").first.fill("four")
    visitor.press("Submit")
    visitor.see("heard: four")
    assert visitor.questions() == ["one, changed", "four"]


def test_undo_gives_the_question_back_and_copy_takes_the_words(visitor):
    visitor.ask("to be undone")
    visitor.see("heard: to be undone")
    visitor.settled()
    visitor.press("Copy message", 1)
    wait_until(lambda: "heard: to be undone" in visitor.page.evaluate("navigator.clipboard.readText()"))
    visitor.press("Undo")
    wait_until(lambda: visitor.box.input_value() == "to be undone")
    assert visitor.questions() == []


def test_clear_starts_over_even_in_the_middle_of_an_answer(visitor, model):
    visitor.ask("remember me")
    visitor.see("heard: remember me")
    visitor.settled()
    visitor.ask("long, cleared away")
    visitor.see("Thinking…")
    prompt = prompt_of(model, "long, cleared away")
    visitor.press("Clear")
    visitor.page.get_by_text("What shall we work out?").wait_for()
    assert_stops_computing(model, prompt, 1.0)
    visitor.settled()
    assert visitor.questions() == []
    visitor.ask("who was that?")
    visitor.see("heard: who was that?")
    assert prompt_of(model, "who was that?") == "[user] who was that?\n[assistant] "


def test_an_example_is_asked_with_a_click(visitor):
    visitor.page.locator("#chat .example").first.click()
    visitor.see("heard: 12 + 34 + 56 = ?")


def test_a_question_that_is_too_long_is_refused_and_kept(visitor, model):
    before = len(model.engine.prompts)
    visitor.ask("x" * 8001)
    visitor.page.get_by_text("The question has 8,001 characters; at most 8,000 are taken.").wait_for()
    assert visitor.box.input_value() == "x" * 8001
    visitor.ask("  ")
    visitor.page.get_by_text("Type a question first.").wait_for()
    assert len(model.engine.prompts) == before
    assert visitor.questions() == []


def test_enter_while_an_answer_is_written_neither_loses_nor_doubles_anything(visitor, model):
    visitor.ask("long, undisturbed")
    visitor.see("Thinking…")
    visitor.ask("impatient")
    visitor.page.get_by_text("An answer is being written.").wait_for()
    assert visitor.box.input_value() == "impatient"
    assert model.engine.prompts.count(prompt_of(model, "long, undisturbed")) == 1
    visitor.page.locator("#question .stop-button").click()
    visitor.see("Stopped.")


def test_what_a_model_or_a_person_writes_is_never_script_nor_image(visitor):
    visitor.ask("hostile")
    visitor.settled()
    wait_until(lambda: "last line" in visitor.answer())
    visitor.page.locator("#chat .thought-group .title").click()
    visitor.see("last line", count=2)
    typed = "<img src=x onerror=window.hacked=11> " + HOSTILE.replace("\n", " ")
    visitor.ask(typed)
    visitor.see("heard:")
    visitor.settled()
    links = visitor.page.locator("#chat .md a").all()
    assert links
    for link in links:
        if not (link.get_attribute("href") or "").startswith("http"):
            link.click(modifiers=["Control"], no_wait_after=True)
    visitor.page.wait_for_timeout(500)
    assert visitor.page.evaluate("window.hacked") is None
    for element in ("script", "iframe", "img", "object", "embed", "svg[onload]", "[style*=url]", ".mermaid"):
        assert visitor.page.locator(f"#chat .md {element}").count() == 0, element
    assert "<script>window.hacked = 1</script>" in visitor.answer(1)
    assert "<img src=http://198.51.100.7/a.png>" in visitor.answer(1)
    visitor.press("Edit", 1)
    assert visitor.page.locator("#chat textarea").first.input_value().replace("\u200b", "") == typed


def test_maths_is_set_and_prices_are_not(visitor):
    visitor.ask("maths")
    visitor.see("for $5 or $6.")
    visitor.settled()
    assert visitor.page.locator("#chat .bot .katex").count() == 4
    assert visitor.page.locator("#chat .bot .katex-display").count() == 2


def test_two_visitors_share_the_engine_and_one_cannot_stop_the_other(visit, model):
    ann, bob = visit(), visit()
    ann.ask("long for ann")
    bob.ask("fairly long for bob")
    ann.see("Thinking…")
    bob.see("Thinking…")
    anns, bobs = prompt_of(model, "long for ann"), prompt_of(model, "fairly long for bob")
    counted = model.engine.computed[anns], model.engine.computed[bobs]
    time.sleep(0.5)
    assert model.engine.computed[anns] > counted[0]
    assert model.engine.computed[bobs] > counted[1]
    ann.page.locator("#question .stop-button").click()
    ann.see("Stopped.")
    assert_stops_computing(model, anns, 0.1)
    bob.settled()
    assert bob.answer() == "fairly long for bob done"
    assert "bob" not in ann.page.locator("#chat").inner_text()
    assert "ann" not in bob.page.locator("#chat").inner_text()
    assert bobs not in model.engine.closed
    assert model.engine.most_at_once == 1


def test_settings_reach_the_engine(visitor, model):
    visitor.page.get_by_label("Toggle Sidebar").click()
    for label, value in (("number input for Longest answer", "20"), ("Seed", "7")):
        visitor.page.get_by_label(label, exact=True).fill(value)
        visitor.page.keyboard.press("Tab")
    visitor.ask("settings?")
    visitor.see("No answer within 20 tokens.")
    visitor.settled()
    assert model.engine.computed[prompt_of(model, "settings?")] == 20
    assert model.engine.seeds[-1] == (7, 0)


def test_programs_call_the_named_endpoint(server, model):
    from gradio_client import Client

    client = Client(server, verbose=False, analytics_enabled=False)
    public = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert list(public) == ["/ask"]
    answer = client.predict("from a program", seed=3, api_name="/ask")
    assert answer["answer"] == "heard: from a program"
    assert answer["thought"] == "Let me see: é 🧮, hm."
    assert answer["finish_reason"] == "stop"
    assert model.engine.seeds[-1] == (3, 0)
    job = client.submit("long program", max_completion_tokens=9000, api_name="/ask")
    wait_until(lambda: len(job.outputs()) > 3)
    prompt = prompt_of(model, "long program")
    job.cancel()
    assert_stops_computing(model, prompt, 1.0)
    with pytest.raises(Exception, match="top_p"):
        client.predict("wrong", top_p=7.0, api_name="/ask")
    client.close()


def test_the_server_takes_no_uploads_and_allows_nothing_from_elsewhere(server):
    with urllib.request.urlopen(server) as page:
        policy = page.headers["content-security-policy"]
        html = page.read().decode()
    assert "default-src 'self'" in policy
    assert "http" not in policy
    assert "fonts.googleapis" not in html
    upload = urllib.request.Request(f"{server}/gradio_api/upload", data=b"x", method="POST")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(upload)


def test_a_page_with_a_password_tells_nothing_without_it(model):
    config = app.AppConfig(model="scripted", port=free_port())
    page = app.build_page(shelf_of(model), config)
    address = app.launch(page, config, auth=("ann", "secret")).rstrip("/")
    try:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{address}/config")
    finally:
        page.close(verbose=False)


def test_a_port_in_use_is_the_users_mistake(model, server):
    config = app.AppConfig(model="scripted", port=int(server.rpartition(":")[2]))
    with pytest.raises(UserError, match=f"port {config.port}"):
        app.launch(app.build_page(shelf_of(model), config), config, auth=None)


def test_the_server_reaches_nothing_outside_this_machine(server, outside):
    assert outside == []


def test_a_small_model_is_offered_sums_only(model):
    page = app.build_page(shelf_of(replace(model, single_question=True)), app.AppConfig(model="scripted"))
    (chatbot,) = [block for block in page.blocks.values() if isinstance(block, gr.Chatbot)]
    assert all(re.fullmatch(r"\d+ \+ \d+ \+ \d+ = \?", example["text"]) for example in chatbot.examples)


def test_another_model_is_chosen_and_answers(visitor):
    visitor.ask("1 + 1 = ?")
    visitor.see("heard: 1 + 1 = ?")
    visitor.settled()
    visitor.page.locator("#model input").click()
    visitor.page.get_by_role("option", name="another").click()
    visitor.ask("2 + 2 = ?")
    visitor.page.locator("#chat [data-testid=bot]").get_by_text("0", exact=True).wait_for()
    visitor.settled()
    assert "checked: wrong" in visitor.page.locator("#status").inner_text()


def test_models_stand_side_by_side(visitor, model):
    visitor.page.get_by_role("tab", name="Side by side").click()
    box = visitor.page.locator("#compare-question textarea")
    box.fill("3 + 4 = ?")
    box.press("Enter")
    # Another, the base, and what the page was started with.
    for place, answer in enumerate(["0", "I am no chat model.", "heard: 3 + 4 = ?"], start=1):
        column = visitor.page.locator(f"#compare-{place}")
        column.locator("[data-testid=bot]").last.get_by_text(answer, exact=True).wait_for()
    box.fill("long, asked of all")

    def is_asked():
        # Until the answers are over, which shows nowhere, Enter asks nothing and the question stays.
        box.press("Enter")
        return any("long, asked of all" in prompt for prompt in model.engine.prompts)

    wait_until(is_asked)
    visitor.page.locator("#compare-3").get_by_text("Thinking…").wait_for()
    visitor.page.locator("#compare-question .stop-button").click()
    prompt = prompt_of(model, "long, asked of all")
    wait_until(lambda: prompt in model.engine.closed)
    assert_stops_computing(model, prompt, 0.1)


def test_votes_are_counted_and_stop_stops_them_all(visitor, model):
    visitor.page.get_by_label("Toggle Sidebar").click()
    for label, value in (("number input for Temperature", "1"), ("number input for Votes", "3")):
        visitor.page.get_by_label(label, exact=True).fill(value)
        visitor.page.keyboard.press("Tab")
    visitor.ask("vote?")
    visitor.see("Votes: heard: vote? × 3")
    visitor.settled()
    assert visitor.questions() == ["vote?"]
    visitor.ask("long vote")
    visitor.page.locator("#status").get_by_text(re.compile(r"0 of 3 votes are in · \d+ tokens")).wait_for()
    prompt = prompt_of(model, "long vote")
    visitor.page.locator("#question .stop-button").click()
    wait_until(lambda: model.engine.closed.count(prompt) == 3)
    assert_stops_computing(model, prompt, 0.1)
    visitor.see("Stopped.")


def test_eight_sessions_at_once_all_finish_with_their_own_answers(visit, model):
    names = ["ann", "bob", "cid", "dee", "eve", "fay", "gus", "hal"]
    visitors = {name: visit() for name in names}
    for name, visitor in visitors.items():
        visitor.ask(f"some words for {name}")
    for name, visitor in visitors.items():
        visitor.see(f"some words for {name} done")
        visitor.settled()
        assert visitor.questions() == [f"some words for {name}"]
        assert visitor.answer() == f"some words for {name} done"
        seen = visitor.page.locator("#chat").inner_text()
        assert not [other for other in names if other != name and other in seen]
    assert model.engine.most_at_once == 1


def test_an_answer_is_liked_and_the_conversation_exported(visitor, folder):
    visitor.ask("5 + 6 = ?")
    visitor.see("heard: 5 + 6 = ?")
    visitor.settled()
    visitor.page.get_by_label("Like", exact=True).last.click()
    visitor.page.get_by_text("Kept in").wait_for()
    (kept,) = [json.loads(line) for line in (folder / "feedback" / "liked.jsonl").read_text().splitlines()]
    assert kept["question"] == "5 + 6 = ?"
    assert kept["completion"].startswith("<think>Let me see")
    with visitor.page.expect_download() as download:
        visitor.page.get_by_text("Export as JSONL").click()
    assert download.value.suggested_filename == "conversation.jsonl"
    assert json.loads(Path(download.value.path()).read_text(encoding="utf-8")) == kept


def test_runs_are_looked_into_and_their_text_does_nothing(visitor):
    visitor.page.get_by_role("tab", name="Runs").click()
    report = visitor.page.frame_locator("#report iframe")
    report.get_by_text("Accuracy", exact=True).first.wait_for()
    text = visitor.page.locator("#rollouts").get_by_text("<script>window.hacked")
    cell = text.filter(visible=True).first
    cell.wait_for()
    cell.click()
    expect = pytest.importorskip("playwright.sync_api").expect
    shown = visitor.page.locator("#rollout textarea")
    expect(shown).to_have_value(re.compile("onerror=window.hacked=12"), timeout=10_000)
    visitor.page.locator("#canaries").get_by_text("7?").filter(visible=True).first.wait_for()
    assert visitor.page.evaluate("window.hacked") is None


# ------------------------------------------------------------------------------------------------------------
# A trained model and the run that made it


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a cold start that has learned the form, and a GRPO run of three steps from it."""
    outputs = tmp_path_factory.mktemp("trained")
    steps = {"total_steps": 120, "examples_per_step": 32, "eval_every": 0, "save_every": 200}
    assert train_sft(replace(quick_sft(outputs / "sft", **steps), limit=2000)) == 0
    config = quick_grpo(outputs / "grpo", model=str(outputs / "sft" / "final"), max_completion_tokens=64)
    assert train_grpo(replace(config, rewards={"correct": 1.0, "format": 0.1}, total_steps=3)) == 0
    return outputs


@pytest.fixture
def trained_visitor(trained, browser):
    names = [str(trained / "grpo" / "final"), str(trained / "sft" / "final"), "tiny"]
    config = app.AppConfig(
        model=names[0], compare=names[1:], runs=str(trained), port=free_port(), max_completion_tokens=64
    )
    page = app.build_page(Shelf(names, load_chat_model), config)
    visitor = Visitor(browser, app.launch(page, config, auth=None))
    yield visitor
    visitor.close()
    page.close(verbose=False)


def said(folder, question):
    """What a model answers without a page, thought and answer."""
    *_, reading = load_chat_model(folder).stream([Turn(question)], SamplingParams(64, 0.0), (0, 0))
    return reading.thought.strip(), reading.answer.strip()


def test_a_trained_model_is_asked_changed_compared_and_its_run_looked_into(trained, trained_visitor):
    question, visitor, page = "12 + 34 + 56 = ?", trained_visitor, trained_visitor.page
    after, before = (said(str(trained / name / "final"), question) for name in ("grpo", "sft"))
    assert all(after)
    visitor.ask(question)
    visitor.see(re.compile(r"Thought for \d+\.\d s · \d+ tokens"))
    visitor.settled()
    assert visitor.answer() == after[1]
    assert re.search(r"checked: (right|wrong)", page.locator("#status").inner_text())
    page.locator("#chat .thought-group .title").click()
    visitor.see(after[0].splitlines()[0])

    page.locator("#model input").click()
    page.get_by_role("option", name=str(trained / "sft" / "final")).click()
    visitor.ask(question)
    visitor.see(question, count=2)
    visitor.settled()
    assert visitor.answer() == before[1]

    page.get_by_role("tab", name="Side by side").click()
    box = page.locator("#compare-question textarea")
    box.fill(question)
    box.press("Enter")
    for place, answer in ((1, before[1]), (3, after[1])):  # the second has learned nothing
        column = page.locator(f"#compare-{place} [data-testid=bot]").last
        column.get_by_text(answer, exact=True).wait_for()
    page.locator("#compare-2 [data-testid=bot]").last.wait_for()

    page.get_by_role("tab", name="Runs").click()
    page.locator("#run input").click()
    page.get_by_role("option", name="grpo").click()
    page.frame_locator("#report iframe").get_by_text("Accuracy", exact=True).first.wait_for()
    rows = [json.loads(line) for line in (trained / "grpo" / "rollouts.jsonl").read_text().splitlines()]
    page.locator("#step input").fill("2")
    page.locator("#group input").fill("1")
    of_group = [row for row in rows if (row["step"], row["group"]) == (2, 1)]
    table = page.locator("#rollouts [role=row][data-index]")
    expect = pytest.importorskip("playwright.sync_api").expect
    expect(table).to_have_count(len(of_group))
    page.locator("#rollouts [data-testid=cell-1-2]").click()
    expect(page.locator("#rollout textarea")).to_have_value(re.compile(re.escape(of_group[1]["completion"])))
