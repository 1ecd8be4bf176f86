import json
import os
import signal
import threading
import time
from concurrent.futures import wait
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from rewards import BUILT_IN, RewardError, needs_gold, parse_rewards, score
from rewards.scorer import Scorer

RIGHT = "<think>Two and two.</think><answer>4</answer>"
WRONG = "<think>Two and two.</think><answer>5</answer>"

FUNCTIONS = """
import time

def reward_len(completions, **kwargs):
    return [-abs(20 - len(completion)) for completion in completions]

def columns(completions, prompts, topic, group_size=0, **kwargs):
    assert kwargs["completion_ids"] == [[1], [2]]
    return [len(p) + len(t) + group_size for p, t in zip(prompts, topic)]

def strict_signature(completions, topic):
    return [len(t) for t in topic]

def scaled(completions, *, by=2):
    return [by for _ in completions]

def sometimes(completions, **kwargs):
    return [None, 3]

def boom(completions, **kwargs):
    raise KeyError("no such thing")

def short(completions, **kwargs):
    return [1.0]

def words(completions, **kwargs):
    return ["good", 1.0]

def nan(completions, **kwargs):
    return [1.0, float("nan")]

def infinite(completions, **kwargs):
    return [float("inf"), 1.0]

def number(completions, **kwargs):
    return 1.0

def huge(completions, **kwargs):
    return [1.0, 10**400]

def vectors(completions, **kwargs):
    import numpy
    return [1.0, numpy.array([1.0, 2.0])]

def longer(completions, **kwargs):
    completions.append("mine")
    return [1.0] * len(completions)

def needs_more(completions, topic, difficulty):
    return [0.0] * len(completions)

async def later(completions, **kwargs):
    import asyncio
    await asyncio.sleep(0.01)
    return [len(completion) for completion in completions]

def logs(completions, log_extra, log_metric, **kwargs):
    log_extra("length", [len(completion) for completion in completions])
    log_metric("longest", max(len(completion) for completion in completions))
    return [0.0] * len(completions)

def logs_badly(completions, log_extra, **kwargs):
    log_extra("length", [1])
    return [0.0] * len(completions)

def hang(completions, **kwargs):
    if "hang" in completions[0]:
        time.sleep(60)
    return [1.0] * len(completions)

def slow_then_fast(completions, **kwargs):
    time.sleep(0.3 if completions[0] == "slow" else 0.0)
    return [float(len(completions[0]))] * len(completions)

def die(completions, **kwargs):
    import os
    os._exit(3)
"""


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "my_rewards.py"
    path.write_text(FUNCTIONS)
    path.with_name("broken.py").write_text("import no_such_thing")
    return str(path)


def test_the_default_rewards_add_up():
    scores = score(parse_rewards(), [RIGHT, WRONG, "4"], {"gold": ["4", "4", "4"]})
    assert scores.total == pytest.approx([1.1, 0.1, 0.0])
    assert scores.parts == {"correct": [1, 0, 0], "format": [1, 1, 0], "repetition": [0, 0, 0]}
    assert scores.correct == [True, False, False]
    assert scores.extracted == ["4", "5", None]
    assert scores.undecided == [False] * 3


def test_undecided_earns_what_wrong_earns_and_is_told_apart():
    scores = score(parse_rewards({"correct": 1}), [r"\boxed{9^{9^9}}", r"\boxed{5}"], {"gold": ["4", "4"]})
    assert scores.total == [0, 0]
    assert scores.correct == [None, False]
    assert scores.undecided == [True, False]


def test_none_leaves_the_sum(functions):
    rewards = parse_rewards({"correct": 1.0, f"{functions}:sometimes": 0.5})
    scores = score(rewards, [RIGHT, RIGHT], {"gold": [None, "4"]})
    assert scores.total == [0, 2.5]
    assert scores.parts["correct"] == [None, 1]
    assert scores.undecided == [False, False]


def test_a_function_written_for_trl_gets_the_columns_it_names(functions):
    spec = {
        f"{functions}:reward_len": 1.0,
        f"{functions}:columns": 1.0,
        f"{functions}:strict_signature": 10.0,
    }
    columns = {"prompts": ["ab", "c"], "topic": ["x", "yz"], "completion_ids": [[1], [2]], "group_size": 2}
    scores = score(parse_rewards(spec), ["a" * 20, "a" * 18], columns)
    assert scores.total == [0 + 5 + 10, -2 + 5 + 20]


def test_a_function_may_be_asynchronous(functions):
    rewards = parse_rewards({f"{functions}:later": 1.0})
    assert score(rewards, ["a", "abc"], {}).total == [1.0, 3.0]


def test_options_in_brackets_are_fixed_arguments(functions):
    spec = {f"{functions}:scaled(by=7)": 1.0, "length_penalty(budget=2)": -1.0}
    assert score(parse_rewards(spec), ["", ""], {"completion_ids": [[1] * 3, [1]]}).total == [6.5, 7]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("corect", "unknown reward 'corect'; allowed: one of correct"),
        ("no_file.py:f", "no file at"),
        ("{file}:nothing", "has no function 'nothing'; it has: .*reward_len"),
        ("length_penalty(bugdet=3)", "no option 'bugdet'; allowed: .*budget"),
        ("length_penalty(budget)", r"written \(key=value"),
        ("judge:nowhere", "address"),
        ("model:", "unknown reward|no file"),
        ("{file}:reward_len(gold=3)", "'gold' is given to .* is no option"),
        ("repetition(n=0)", "n of 'repetition.*whole number >= 1, got 0"),
        ("length_penalty(budget=-5)", "budget of .*whole number >= 1, got -5"),
        ("length_penalty(only_correct=yes)", "only_correct of .*true or false, got 'yes'"),
        ("steps(wanted=1.5)", "wanted of .*whole number >= 1, got 1.5"),
        ("lead(alpha=none)", "alpha of .*number >= 0, got None"),
        ("{folder}/broken.py:f", "broken.py could not be run: ModuleNotFoundError: .*no_such_thing"),
    ],
)
def test_an_unknown_reward_names_what_is_allowed(functions, name, message):
    with pytest.raises(ValueError, match=message):
        parse_rewards({name.format(file=functions, folder=Path(functions).parent): 1.0})


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 10**400, "1", True, None])
def test_a_weight_is_a_finite_number(weight):
    with pytest.raises(ValueError, match="finite number"):
        parse_rewards({"correct": weight})


def test_no_reward_at_all_is_refused():
    with pytest.raises(ValueError, match="empty"):
        parse_rewards({})


BROKEN = [
    ("boom", r"raised KeyError: 'no such thing' \(my_rewards.py, line \d+\) on 2 completions, .*Two and two"),
    ("short", "list of 2 numbers or None, got 1 values for 2 completions, the first: .*Two and two"),
    ("huge", "returned 10000.* for sample 1"),
    ("vectors", r"returned array\(\[1., 2.\]\) for sample 1"),
    ("logs_badly", r"log_extra\('length'\) takes 2 values, got 1"),
    ("longer", "list of 2 numbers or None, got 3 values"),
    ("words", "returned 'good' for sample 0"),
    ("nan", "returned nan for sample 1"),
    ("infinite", "returned inf for sample 0"),
    ("number", "got 1.0"),
    ("needs_more", "needs the column 'difficulty'; the data has: .*topic"),
]


@pytest.mark.parametrize(("name", "message"), BROKEN)
def test_a_broken_reward_stops_with_its_name_the_sample_and_the_value(functions, name, message):
    rewards = parse_rewards({f"{functions}:{name}": 1.0})
    with pytest.raises(RewardError, match=rf"my_rewards.py:{name}.*{message}"):
        score(rewards, [RIGHT, WRONG], {"topic": ["a", "b"]})


def test_gold_is_needed_by_the_rewards_that_look_at_it(functions):
    assert needs_gold(parse_rewards())
    assert needs_gold(parse_rewards({"lead": 1.0}))
    assert needs_gold(parse_rewards({"length_penalty(only_correct=true)": -1.0}))
    assert not needs_gold(
        parse_rewards({"format": 1.0, "length_penalty": -1.0, f"{functions}:reward_len": 1.0})
    )
    assert not needs_gold(parse_rewards({"countdown": 1.0}))
    scores = score(parse_rewards({"format": 1.0}), [RIGHT], {})
    assert (scores.total, scores.correct, scores.extracted) == ([1.0], [None], [None])


def test_every_built_in_reward_takes_what_a_trainer_has():
    columns = {
        "prompts": ["a", "b"], "gold": ["4", "4"], "completion_ids": [[1], [2]], "group_size": 2,
        "max_completion_tokens": 10, "numbers": [[4], [4]], "target": [4, 4],
    }  # fmt: skip
    for name in BUILT_IN:
        assert len(score(parse_rewards({name: 1.0}), [RIGHT, WRONG], columns).total) == 2, name


def test_a_column_of_the_data_is_never_taken_for_an_option_of_a_built_in():
    columns = {"completion_ids": [[1] * 10], "target": [7], "budget": [1]}
    assert score(
        parse_rewards({"length_target(target=20)": 1.0, "length_penalty": 1.0}), ["x"], columns
    ).total == [0.5]


def test_a_model_reward_waits_for_its_function():
    rewards = parse_rewards({"model:org/judge(batch_size=4)": 2.0, "format": 1.0})
    (slot,) = rewards.slots
    assert (slot.model_name, slot.options) == ("org/judge", {"batch_size": 4})
    with pytest.raises(RewardError, match="never given its function"):
        score(rewards, [RIGHT], {})
    slot.function = lambda completions, **columns: [0.25] * len(completions)
    assert score(rewards, [RIGHT], {}).total == [1.5]


# -------------------------------------------------------------------------------------------------------
# Workers


@pytest.mark.slow
def test_workers_score_as_the_process_itself_and_keep_the_order(functions):
    rewards = parse_rewards({"correct": 1.0, "format": 0.1, f"{functions}:slow_then_fast": 1.0})
    groups = [["slow", RIGHT], [RIGHT, WRONG], ["slow", "x"], [r"\boxed{4}", WRONG]]
    columns = {"gold": ["4", "4"]}
    with Scorer(rewards, workers=2) as scorer:
        for group in groups:
            scorer.submit(group, columns)
        assert scorer.results() == [score(rewards, group, columns) for group in groups]
        assert scorer.results() == []


@pytest.mark.slow
@pytest.mark.parametrize("names", [["logs"], ["logs", "hang"]])
def test_what_a_function_logs_comes_back_with_the_scores(functions, names):
    rewards = parse_rewards({f"{functions}:{name}": 1.0 for name in names})
    with Scorer(rewards, deadline_s=1.0) as scorer:
        scorer.submit(["hang", "x"], {})
        (scores,) = scorer.results()
    assert scores.metrics == {"longest": [4.0]}
    assert scores.extra == {"length": [4, 1]}
    assert scores.undecided == [len(names) == 2] * 2


def test_handing_in_a_group_does_not_wait_for_its_scores(functions):
    with Scorer(parse_rewards({f"{functions}:slow_then_fast": 1.0})) as scorer:
        scorer.submit(["warm"], {})
        scorer.results()
        start = time.monotonic()
        scorer.submit(["slow"], {})
        assert time.monotonic() - start < 0.2
        assert scorer.results()[0].total == [4.0]


@pytest.mark.slow
def test_a_function_that_hangs_leaves_its_group_undecided_and_the_rest_alone(functions, capsys):
    rewards = parse_rewards({"format": 1.0, f"{functions}:hang": 1.0})
    with Scorer(rewards, deadline_s=1.0) as scorer:
        for text in (RIGHT, "hang", RIGHT):
            scorer.submit([text, text], {})
        first, hung, last = scorer.results()
    assert first.total == last.total == [2.0, 2.0]
    assert hung.parts[f"{functions}:hang"] == [None, None]
    assert hung.undecided == [True, True]
    assert first.undecided == [False, False]
    assert "hang' took longer than 1 s" in capsys.readouterr().err


def test_closing_does_not_wait_for_a_function_that_hangs(functions):
    with Scorer(parse_rewards({f"{functions}:hang": 1.0})) as scorer:
        scorer.submit([RIGHT], {})
        scorer.results()
        scorer.submit(["hang"], {})
        time.sleep(0.3)
        start = time.monotonic()
    # Nor does the end of the program, which waits for the threads: nobody asks again.
    for thread in scorer._pool._threads:
        thread.join(5.0)
        assert not thread.is_alive()
    assert time.monotonic() - start < 5.0
    assert all(child.process is None for child in scorer._children)


@pytest.mark.parametrize(("name", "message"), [*BROKEN[:4], ("die", "ended its worker process")])
def test_a_broken_function_in_a_worker_stops_the_run_with_its_name(functions, name, message):
    with Scorer(parse_rewards({f"{functions}:{name}": 1.0})) as scorer:
        scorer.submit([RIGHT, WRONG], {})
        wait(scorer._pending)
        with pytest.raises(RewardError, match=rf"{name}.*{message}.*Mend the function"):
            scorer.submit([RIGHT, WRONG], {})  # none are sampled in vain
        with pytest.raises(RewardError, match=rf"{name}.*{message}"):
            scorer.results()


def test_a_model_reward_is_called_in_the_thread_that_collects():
    rewards = parse_rewards({"format": 1.0, "model:m": 1.0})
    seen = []
    rewards.slots[0].function = lambda completions: [
        seen.append(threading.current_thread()) or 2.0 for _ in completions
    ]
    with Scorer(rewards) as scorer:
        scorer.submit([RIGHT, WRONG], {})
        assert scorer.results()[0].total == [3.0, 3.0]
    assert set(seen) == {threading.current_thread()}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_of_processes_spares_the_workers(functions, number):
    with Scorer(parse_rewards({f"{functions}:slow_then_fast": 1.0})) as scorer:
        scorer.submit(["warm"], {})
        scorer.results()
        (child,) = scorer._children
        pid = child.process.pid
        scorer.submit(["slow"], {})
        time.sleep(0.1)
        os.kill(pid, number)
        assert scorer.results()[0].total == [4.0]
        assert child.process.pid == pid


# -------------------------------------------------------------------------------------------------------
# A judge behind a server


@pytest.fixture
def server():
    """A judge that gives 7 for texts with `good`, no number for `strange`, and keeps what it was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = body["messages"][0]["content"]
            time.sleep(0.5 if "sleepy" in text else 0.0)
            asked.append((self.path, self.headers.get("Authorization"), body["model"], text))
            grade = (
                "7" if "good" in text else "no idea" if "strange" in text else "99" if "huge" in text else "0"
            )
            reply = json.dumps({"choices": [{"message": {"content": grade}}]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_):
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}/v1", asked
    http.shutdown()
    http.server_close()
    thread.join()


def test_a_judge_grades_on_its_scale(server, monkeypatch):
    url, asked = server
    monkeypatch.setenv("JUDGE_API_KEY", "secret")
    rewards = parse_rewards({f"judge:{url}(model=j, parallel=1)": 1.0})
    texts = ["good", "strange", "huge", "bad {gold} {prompt}"]
    scores = score(rewards, texts, {"prompts": ["2+2?"] * 4, "gold": ["4"] * 4})
    assert scores.parts[rewards.rewards[0].name] == [0.7, None, None, 0.0]
    path, key, model, text = asked[3]
    assert (path, key, model) == ("/v1/chat/completions", "Bearer secret", "j")
    assert "2+2?" in text
    assert "bad {gold} {prompt}" in text, "what a completion says in braces is no field"


def test_the_prompt_and_the_scale_of_a_judge_are_configurable(server, tmp_path):
    url, asked = server
    (tmp_path / "ask.txt").write_text("Rate to {scale}: {completion}")
    rewards = parse_rewards({f"judge:{url}(scale=14, prompt_file={tmp_path / 'ask.txt'})": 1.0})
    assert score(rewards, ["good"], {}).total == [0.5]
    assert asked[0][3] == "Rate to 14: good"
    (tmp_path / "ask.txt").write_text("Rate it.")
    with pytest.raises(ValueError, match="never mentions"):
        parse_rewards({f"judge:{url}(prompt_file={tmp_path / 'ask.txt'})": 1.0})


@pytest.mark.slow
def test_a_slow_judge_keeps_its_own_time_limits(server):
    url, _ = server
    with Scorer(parse_rewards({f"judge:{url}(timeout_s=5)": 1.0}), deadline_s=0.1) as scorer:
        scorer.submit(["good", "sleepy"], {})
        (scores,) = scorer.results()
    assert scores.total == [0.7, 0.0]
    assert scores.undecided == [False, False]


def test_an_option_that_a_judge_has_not_is_refused():
    with pytest.raises(ValueError, match=r"no option 'sclae'; allowed: model, scale"):
        parse_rewards({"judge:http://localhost:1/v1(sclae=5)": 1.0})


def test_a_judge_that_is_down_stops_the_run_with_its_name():
    rewards = parse_rewards({"judge:http://127.0.0.1:9/v1(attempts=2, timeout_s=1)": 1.0})
    with pytest.raises(RewardError, match=r"judge:http://127\.0\.0\.1:9.* 2 attempts .*Start its server"):
        score(rewards, ["x"], {})
