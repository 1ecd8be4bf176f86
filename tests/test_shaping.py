import math

import pytest

from prompts import SYSTEM_PROMPTS, format_completion
from rewards import shaping

GOOD = format_completion("Two and two.", "4")


@pytest.mark.parametrize(
    ("text", "binary", "graded"),
    [
        (GOOD, 1, 1),
        (f"  {GOOD}\n", 1, 1),
        ("<think>a</think>\n<answer>4</answer>", 1, 1),
        ("<think>a</think>so <answer>4</answer>", 0, 0.5),
        ("<think>a</think><answer>4</answer> bye", 0, 0.5),
        ("<think>a</think>4", 0, 0.25),
        ("<think>a</think><answer>4", 0, 0.25),
        ("<think>a</think><answer></answer>", 0, 0.25),
        ("<think>a</think><answer>4</answer><answer>4</answer>", 0, 0.25),
        ("4", 0, 0),
        ("", 0, 0),
        ("<think>a", 0, 0),
        ("<think></think><answer>4</answer>", 0, 0),
        ("<think>a</think><think>b</think><answer>4</answer>", 0, 0),
        ("<think><think>a</think></think><answer>4</answer>", 0, 0),
        ("<answer>4</answer><think>a</think>", 0, 0.25),
        ("<think>a<answer>4</answer></think>", 0, 0.25),
        ("a</think><answer>4</answer>", 0, 0),
    ],
)
def test_format_is_graded_by_what_stands(text, binary, graded):
    assert shaping.format_binary([text]) == [binary]
    assert shaping.format_graded([text]) == [graded]


def test_format_knows_of_a_think_tag_that_the_template_wrote():
    rest = GOOD.removeprefix("<think>")
    assert shaping.format_binary([rest], prompts=["… Assistant: <think>\n"]) == [1]
    assert shaping.format_binary([GOOD], prompts=["… Assistant: <think>\n"]) == [1]
    assert shaping.format_binary([rest], prompts=["… Assistant:"]) == [0]
    assert shaping.format_graded([rest], prompts=["<think>"]) == [1]
    assert shaping.format_binary([GOOD], prompts=[[{"role": "user", "content": "2+2?"}]]) == [1]


def test_the_form_is_the_one_that_the_prompt_asks_for():
    boxed = format_completion("Two and two.", "4", "boxed")
    asked = {style: f"{prompt}\n2+2?\nAssistant: " for style, prompt in SYSTEM_PROMPTS.items()}
    for reward in (shaping.format_binary, shaping.format_graded):
        rows = [(GOOD, "tags"), (boxed, "tags"), (GOOD, "boxed"), (boxed, "boxed")]
        earned = reward([text for text, _ in rows], prompts=[asked[style] for _, style in rows])
        assert [value == 1 for value in earned] == [True, False, False, True]
    for text, grade in ((boxed + " apples", 0.5), ("<think>t</think>4", 0.25), ("<think>t", 0.0)):
        assert shaping.format_graded([text], prompts=[asked["boxed"]]) == [grade]


def test_correct_is_zero_for_undecided_and_none_without_gold():
    assert shaping.correct([""] * 4, ["1", "1", "1", None], [True, False, None, None]) == [1, 0, 0, None]


def test_steps_and_verification_are_read_from_the_thought_alone():
    text = "1. add\n2) carry\nStep 3: done\n1.5 apples\n2:30 pm\nLet me check: yes."
    text = format_completion(text, "1. 2. 3.")
    assert shaping.steps([text], wanted=6) == [0.5]
    assert shaping.steps([text, GOOD]) == [1, 0]
    assert shaping.verification([text, GOOD, format_completion("x", "let me check")]) == [1, 0, 0]


@pytest.mark.parametrize(
    ("thought", "corrects"),
    [
        ("27 + 48 = 74. Wait, that is wrong: 75", 1),
        ("so 12. Hmm, let me redo this", 1),
        ("Actually, we made a mistake", 1),
        ("we waited for 3 hours, and let me count them", 0),
        ("the factual answer is 3", 0),
    ],
)
def test_a_thought_that_takes_something_back_corrects_itself(thought, corrects):
    assert shaping.self_correction([format_completion(thought, "wait, 1")]) == [corrects]


def test_repetition_is_the_share_of_ngrams_seen_before():
    assert shaping.repetition(["one two three four five", "", "a b"]) == [0, 0, 0]
    assert shaping.repetition(["a b c d a b c d"]) == [pytest.approx(1 / 5)]
    assert shaping.repetition(["la " * 100])[0] == pytest.approx(96 / 97)
    assert shaping.repetition(["x" * 1200])[0] > 0.9
    assert shaping.repetition(["a a"], n=1) == [0.5]


def test_unique_characters_counts_them():
    assert shaping.unique_characters(["aab", ""]) == [2, 0]


def test_length_target_peaks_at_the_target():
    ids = [[0] * n for n in (0, 50, 100, 150, 200, 500)]
    assert shaping.length_target([""] * 6, ids, target=100) == [0, 0.5, 1, 0.5, 0, 0]


def test_length_penalty_counts_only_above_the_budget_and_where_asked_only_on_correct_answers():
    ids = [[0] * n for n in (10, 100, 150, 900)]
    assert shaping.length_penalty([""] * 4, ids, budget=100) == [0, 0, 0.5, 1]
    right = [True, True, False, None]
    assert shaping.length_penalty([""] * 4, ids, right, budget=5, only_correct=True) == [1, 1, 0, 0]
    with pytest.raises(ValueError, match="gold"):
        shaping.length_penalty([""], [[0]], only_correct=True)


def test_soft_overlong_falls_from_zero_to_minus_one_over_the_cache():
    ids = [[0] * n for n in (0, 80, 90, 100, 130)]
    assert shaping.soft_overlong([""] * 5, ids, 100, cache=20) == [0, 0, -0.5, -1, -1]
    assert shaping.soft_overlong([""] * 5, ids, 100) == [0, 0, -0.5, -1, -1]


def test_lead_prefers_the_shorter_of_the_correct_and_punishes_the_wrong():
    ids = [[0] * n for n in (10, 20, 30, 99)]
    values = shaping.lead([""] * 4, ["1"] * 4, [True, True, True, False], ids, 4)
    # mean 20, standard deviation 10 with ddof=1: z = -1, 0, 1
    expected = [math.exp(0.05), 1, math.exp(-0.05), -1]
    assert values == pytest.approx(expected, rel=1e-6)


def test_lead_looks_at_each_group_alone_and_at_a_lone_correct_answer_without_spread():
    ids = [[0] * n for n in (10, 20, 1000, 2000)]
    assert shaping.lead([""] * 4, ["1"] * 4, [True, False, False, True], ids, 2) == [1, -1, -1, 1]
    assert shaping.lead([""] * 2, ["1"] * 2, [None, False], ids[:2], 2) == [-1, -1]
    assert shaping.lead([""] * 2, [None] * 2, [None] * 2, ids[:2], 2) == [None, None]
    both = shaping.lead([""] * 4, ["1"] * 4, [True] * 4, ids, 2, min_length=500)
    assert both[:2] == [1, 1]
    assert both[2] > 1 > both[3]


@pytest.mark.parametrize(
    ("answer", "numbers", "target", "earned"),
    [
        ("(8-2)*4", [8, 2, 4], 24, 1),
        ("(8-2)*4 = 24", [8, 2, 4], 24, 1),
        (r"(8-2)\times 4", [2, 4, 8], 24, 1),
        ("8 ÷ 2 + 4", [8, 2, 4], 8, 1),
        (r"\frac{8}{2}-4", [8, 2, 4], 0, 1),
        ("3/4*8", [3, 4, 8], 6, 1),
        (r"\(8-2-4\)", [8, 2, 4], 2, 1),
        ("**8-2-4**", [8, 2, 4], 2, 1),
        ("`8-2-4`", [8, 2, 4], 2, 1),
        ("8 x (4-2)", [8, 2, 4], 16, 1),
        ("8x4-2 = 30.0", [8, 2, 4], 30, 1),
        ("30 = 8*4-2", [8, 2, 4], 30, 1),
        ("8*4-2", ["8", "2", "4"], "30", 1),
        ("8", [8], 8, 1),
        ("8-2-4 = 8-2-4", [8, 2, 4], 2, 0),
        ("3 = 8-2-4 = 2", [8, 2, 4], 2, 0),
        ("8*(4-2)+0", [8, 2, 4], 16, 0),
        ("8+4", [8, 2, 4], 12, 0),
        ("8+8+2+4", [8, 2, 4], 22, 0),
        ("8+2+4", [8, 2, 4], 15, 0),
        ("15", [8, 2, 4], 15, 0),
        ("82+4", [8, 2, 4], 86, 0),
        ("8+2+4 = 15", [8, 2, 4], 14, 0),
        ("8/(2-2)", [8, 2, 2], 4, 0),
        ("2^4+8", [2, 4, 8], 24, 0),
        ("8!+2+4", [8, 2, 4], 40326, 0),
        ("__import__('os').getpid()", [8, 2, 4], 24, 0),
        ("9**9**9", [9, 9, 9], 1, 0),
        ("(" * 5000, [8], 8, 0),
        ("", [8], 8, 0),
    ],
)
def test_countdown_wants_every_number_once_and_the_target(answer, numbers, target, earned):
    assert shaping.countdown([format_completion("hm", answer)], [numbers], [target]) == [earned]


def test_countdown_does_not_pay_for_two_answers():
    text = r"\boxed{8-2+4} \boxed{(8-2)*4}"
    assert shaping.countdown([text], [[8, 2, 4]], [24]) == [0]


def test_countdown_data_that_are_no_numbers_are_a_mistake():
    with pytest.raises(ValueError, match="two"):
        shaping.countdown([format_completion("hm", "8-2")], [[8, "two"]], [6])
