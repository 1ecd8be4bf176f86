"""A rollout: groups go to the scorer as soon as they are complete, and come back as they were asked for."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scripted import ByteTokenizer

from data import load_problems
from handover import group_state, restore_group
from inference import Completion
from rewards import Scores, parse_rewards
from rewards.scorer import Scorer
from rollouts import Group, count, roll_out, rollout_metrics, rollout_rows
from tasks import Problem

CONFIG = SimpleNamespace(group_size=2, max_completion_tokens=9, temperature=1.0, seed=0, total_steps=10)


class Tokenizer(ByteTokenizer):
    def batch_decode(self, rows, skip_special_tokens):
        return [self.decode(row) for row in rows]


class Engine:
    """Completions end in a given order; sample s of prompt p says `p.s`."""

    def __init__(self, order, watch=lambda done: None):
        self.order, self.watch = order, watch

    def generate(self, prompts, n, params, seed, first_prompt, on_completion):
        for done, (prompt, sample) in enumerate(self.order):
            self.watch(done)
            text = f"{prompt}.{sample}"
            on_completion(prompt, sample, Completion([*text.encode(), 256], [-1.0] * 4, "stop"))


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "mine.py"
    path.write_text(
        "def value(completions, questions, **columns):\n"
        "    return [10 * float(c.removeprefix('<think>')) + len(q)\n"
        "            for c, q in zip(completions, questions)]\n"
        "def answers(completions, answer):\n"
        "    return [float(text.partition('#### ')[2]) for text in answer]\n"
        "def sometimes(completions, questions, **columns):\n"
        "    return [7.0 if len(q) == 2 else None for q in questions]\n"
        "def logs(completions, questions, log_extra, log_metric):\n"
        "    log_metric('questions', len(questions[0]))\n"
        "    log_extra('odd', [0, 1])\n"
        "    return [0.0, 0.0]\n"
        "def told(completions, **columns):\n"
        "    import json\n"
        "    columns['trainer_state'] = vars(columns['trainer_state'])\n"
        "    assert callable(columns.pop('log_extra')) and callable(columns.pop('log_metric'))\n"
        "    raise ValueError(json.dumps(columns))\n"
    )
    return str(path)


@pytest.mark.parametrize("opens_thought", [False, True])
def test_scores_come_back_to_their_groups_whatever_ends_first(functions, opens_thought):
    order = [(2, 1), (0, 0), (2, 0), (1, 1), (1, 0), (0, 1)]
    problems = [Problem("?" * (i + 1), "1") for i in range(3)]
    with Scorer(parse_rewards({f"{functions}:value": 1.0}), workers=2) as scorer:
        tokenizer = Tokenizer(opens_thought)
        groups = roll_out(Engine(order), tokenizer, problems, scorer, CONFIG, step=4, first_prompt=8)
    assert [group.number for group in groups] == [8, 9, 10]
    assert [group.problem for group in groups] == problems
    start = "<think>" if opens_thought else ""
    assert [group.texts for group in groups] == [[f"{start}{p}.0", f"{start}{p}.1"] for p in range(3)]
    assert [group.scores.total for group in groups] == [[11 * p + 1, 11 * p + 2] for p in range(3)]


def test_a_rollout_counts_the_form_that_its_prompts_ask_for():
    questions = [r"Answer in \boxed{}.", "?"]
    texts = [r"<think>t</think>\boxed{7}", "<think>t</think><answer>7</answer>"]
    engine = SimpleNamespace(
        generate=lambda prompts, n, params, seed, first, take: [
            take(p, s, Completion([*texts[s].encode(), 256], [], "stop")) for p in range(2) for s in range(2)
        ]
    )
    with Scorer(parse_rewards({"format": 1.0})) as scorer:
        problems = [Problem(question, "7") for question in questions]
        groups = roll_out(engine, Tokenizer(), problems, scorer, CONFIG, step=4, first_prompt=0)
    assert [group.scores.total for group in groups] == [[1, 0], [0, 1]]
    assert count(groups)["well_formed"] == 2


def test_a_group_is_handed_in_while_others_still_generate():
    handed_in, seen = [], []
    scorer = SimpleNamespace(
        submit=lambda texts, columns: handed_in.append(texts),
        results=lambda: [None] * len(handed_in),
    )
    engine = Engine([(1, 0), (1, 1), (0, 1), (0, 0)], lambda done: seen.append(len(handed_in)))
    roll_out(engine, Tokenizer(), [Problem("?", "1")] * 2, scorer, CONFIG, step=0, first_prompt=0)
    assert seen == [0, 0, 1, 1]
    assert handed_in == [["1.0", "1.1"], ["0.0", "0.1"]]


def test_functions_see_every_column_of_the_data_under_its_name(tmp_path, functions):
    rows = [
        {"question": "Two and two?", "answer": "Add.\n#### 4", "level": 3},
        {"question": "Two and three?", "answer": "Add.\n#### 5"},
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = load_problems(tmp_path, "test")
    order = [(0, 0), (0, 1), (1, 0), (1, 1)]
    with Scorer(parse_rewards({f"{functions}:answers": 1.0})) as scorer:
        groups = roll_out(Engine(order), Tokenizer(), problems, scorer, CONFIG, step=4, first_prompt=0)
    assert [group.scores.total for group in groups] == [[4.0, 4.0], [5.0, 5.0]]
    with (
        Scorer(parse_rewards({f"{functions}:told": 1.0})) as scorer,
        pytest.raises(Exception, match="ValueError") as stopped,
    ):
        roll_out(Engine(order[:2]), Tokenizer(), problems[1:], scorer, CONFIG, step=4, first_prompt=0)
    columns = json.loads(str(stopped.value).partition("ValueError: ")[2].rpartition(" (")[0])
    assert columns == {
        "question": ["Two and three?"] * 2,
        "questions": ["Two and three?"] * 2,
        "answer": ["Add.\n#### 5"] * 2,
        "level": [None, None],
        "gold": ["5", "5"],
        "prompts": ["[user] Two and three?\n[assistant] "] * 2,
        "completion_ids": [[*b"0.0", 256], [*b"0.1", 256]],
        "correct": [False, False],
        "group_size": 2,
        "max_completion_tokens": 9,
        "trainer_state": {"global_step": 4, "max_steps": 10},
    }


def test_a_reward_is_told_with_its_mean_and_spread_over_what_it_applies_to(functions):
    problems = [Problem("?" * (i + 1), "1") for i in range(3)]
    order = [(prompt, sample) for prompt in range(3) for sample in range(2)]
    with Scorer(parse_rewards({f"{functions}:value": 0.5, f"{functions}:sometimes": 1.0})) as scorer:
        groups = roll_out(Engine(order), Tokenizer(), problems, scorer, CONFIG, step=4, first_prompt=0)
    told = rollout_metrics([count(groups[:1]), count(groups[1:])])  # of two processes
    values = np.array([1.0, 2.0, 12.0, 13.0, 23.0, 24.0])  # unweighted
    applies_to = {
        f"rewards/{functions}:value": values,
        f"rewards/{functions}:sometimes": np.array([7.0, 7.0]),
    }
    applies_to["train/reward"] = values / 2 + [0, 0, 7, 7, 0, 0]
    for key, applies in applies_to.items():
        figures = (told[key], *(told[f"{key}/{figure}"] for figure in ("min", "max", "std")))
        assert figures == pytest.approx((applies.mean(), applies.min(), applies.max(), applies.std()))


def test_a_reward_that_applies_to_nothing_has_no_spread(functions):
    with Scorer(parse_rewards({f"{functions}:sometimes": 1.0})) as scorer:
        order = [(0, 0), (0, 1)]
        groups = roll_out(Engine(order), Tokenizer(), [Problem("?", "1")], scorer, CONFIG, 4, 0)
    told = rollout_metrics([count(groups)])
    assert {key: value for key, value in told.items() if "sometimes" in key} == {
        f"rewards/{functions}:sometimes": 0.0
    }


def test_what_functions_logged_is_told_with_the_step(functions):
    problems = [Problem("?", "1"), Problem("??", "1")]
    order = [(0, 0), (0, 1), (1, 0), (1, 1)]
    with Scorer(parse_rewards({f"{functions}:logs": 1.0})) as scorer:
        groups = roll_out(Engine(order), Tokenizer(), problems, scorer, CONFIG, step=4, first_prompt=0)
    assert rollout_metrics([count(groups[:1]), count(groups[1:])])["logged/questions"] == 1.5
    batch = SimpleNamespace(
        groups=[], tensors={"completion_mask": torch.ones(0, 1)}, advantages=torch.ones(0, 1)
    )
    assert [row["logged"]["odd"] for row in rollout_rows(groups, batch, 4)] == [0, 1, 0, 1]


def test_a_group_comes_back_from_a_checkpoint_as_it_was(tmp_path):
    scores = Scores([1.0], {}, [True], ["3"], [False])
    completion = Completion([1, 2], [-0.5, -1.0], "stop")
    group = Group(7, Problem("1 + 2", "3"), [4, 5], [completion], [r"\boxed{3}"], scores, "boxed")
    torch.save(group_state(group), tmp_path / "state.pt")
    assert restore_group(torch.load(tmp_path / "state.pt", weights_only=True)) == group
