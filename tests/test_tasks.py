"""The built-in tasks: disjoint splits, the same list for the same seed, and right answers."""

import random
import re
from collections import Counter
from fractions import Fraction
from math import sqrt

import pytest

import tasks
from prompts import parse_completion
from tasks import DEFAULT_SIZES, SPLIT_SHARES, SPLITS, TASKS, make_problems, split_of

# Small enough that different seeds keep meeting the same problems.
NARROW = {
    "arithmetic": [
        {"high": 20},
        {"high": 12, "operations": "+-"},
        {"terms": 4, "high": 6, "operations": "+-*"},
    ],
    "word_problems": [{"high": 5}, {"low": 3, "high": 7}],
    "countdown": [{"numbers": 3, "high": 12}, {"numbers": 3, "high": 9, "max_target": 30}],
}

# What each story asks for, written down a second time, from the story alone.
STORY_GOLDS = [
    lambda a, b, c: a * b - c,
    lambda a, b, c, d: (a * b + c) * d,
    lambda a, b, c, d: a * b * c - d,
    lambda a, b, c, d: (a + b) * c + d,
    lambda a, b, c, d: (a * b + c) / d,
    lambda a, b, c: a - b + 3 * c,
    lambda a, b, c, d: (a + a * b) * c * d,
    lambda a, b, c, d: a * c + b * d,
    lambda a, b, c, d: (2 * a + 2 * b - c) * d,
    lambda a, b, c, d: a + (b - c) * d,
    lambda a, b, c: a + a * b - c,
    lambda a, b, c: (a + b) / 2 + c,
    lambda a, b, c, d: a * b - c - d,
    lambda a, b, c, d: (5 * a + b) * c - d,
    lambda a, b, c, d: (a * b + c * d) / 2,
    lambda a, b, c, d, e: (a * b + c * d - e) / 2,
]


# ------------------------------------------------------------------------------------------------------------
# Reading problems back, without any code of tasks.py


class Reader:
    """A tiny reader of expressions with + - * / and brackets."""

    def __init__(self, text):
        self.tokens = re.findall(r"\d+|[-+*/()]", text)
        assert "".join(self.tokens) == text.replace(" ", ""), text

    def value(self):
        total = self.sum()
        assert not self.tokens, self.tokens
        return total

    def sum(self):
        total = self.product()
        while self.tokens and self.tokens[0] in "+-":
            total += self.product() if self.tokens.pop(0) == "+" else -self.product()
        return total

    def product(self):
        total = self.atom()
        while self.tokens and self.tokens[0] in "*/":
            total = total * self.atom() if self.tokens.pop(0) == "*" else total / self.atom()
        return total

    def atom(self):
        token = self.tokens.pop(0)
        if token == "(":
            total = self.sum()
            assert self.tokens.pop(0) == ")"
            return total
        return Fraction(token)


def value_of(text):
    return Reader(text).value()


STEP = re.compile(r"(-?\d+) ([-+*/]) (\d+) = (-?\d+)(?: [a-z ]+)?")


def read_steps(thought):
    """The results of the lines of a thought, each checked."""
    results = []
    for line in thought.split("\n"):
        match = STEP.fullmatch(line)
        assert match, line
        left, right, result = Fraction(match[1]), Fraction(match[3]), Fraction(match[4])
        values = {"+": left + right, "-": left - right, "*": left * right}
        expected = left / right if match[2] == "/" else values[match[2]]
        assert expected == result, line
        results.append(int(result))
    return results


def read_story(question):
    """Which story a question tells, and its numbers in the order of their letters."""
    for place, story in enumerate(tasks.STORIES):
        pattern = re.escape(story.text)
        for word in ("name", "he", "He", "his", "thing"):
            pattern = pattern.replace(rf"\{{{word}\}}", r"[A-Za-z ]+")
        for letter in "abcde":
            pattern = pattern.replace(rf"\{{{letter}\}}", rf"(?P<{letter}>\d+)", 1)
        match = re.fullmatch(pattern, question)
        if match:
            return place, tuple(int(match[letter]) for letter in sorted(match.groupdict()))
    raise AssertionError(question)


def identity(problem):
    """What makes two problems the same: for a sum, its signed products in any order."""
    task = problem.columns["task"]
    if task == "arithmetic":
        terms = re.findall(r"(?:^|([+-]) )(\d+(?: \* \d+)*)", problem.question)
        return frozenset(Counter((sign or "+", tuple(sorted(t.split(" * ")))) for sign, t in terms).items())
    if task == "word_problems":
        return read_story(problem.question)
    return tuple(sorted(problem.columns["numbers"])), problem.columns["target"]


# ------------------------------------------------------------------------------------------------------------
# Splits and seeds


@pytest.mark.parametrize("task", TASKS)
def test_splits_share_no_problem_whatever_seed_and_options(task, monkeypatch):
    # As many as there are, up to these: some options allow fewer.
    sizes = {"cold_start": 300, "train": 300, "validation": 40, "test": 40}
    monkeypatch.setattr(tasks, "DEFAULT_SIZES", sizes)
    by_split = {
        split: {
            identity(problem)
            for seed in (0, 1)
            for options in NARROW[task]
            for problem in make_problems(task, split, seed=seed, options=options)
        }
        for split in SPLITS
    }
    for i, one in enumerate(SPLITS):
        for other in SPLITS[i + 1 :]:
            assert by_split[one], one
            assert not by_split[one] & by_split[other], (one, other)


def test_each_split_owns_its_share_of_the_buckets():
    owners = Counter(split_of(f"problem {i}") for i in range(20_000))
    for split, share in SPLIT_SHARES.items():
        p = share / 100
        assert abs(owners[split] / 20_000 - p) < 5 * sqrt(p * (1 - p) / 20_000)


@pytest.mark.parametrize("task", TASKS)
def test_a_longer_list_begins_with_the_shorter_one(task):
    for split in SPLITS:
        longer = make_problems(task, split, seed=3, limit=60)
        assert len(longer) == 60
        assert make_problems(task, split, seed=3, limit=25) == longer[:25]


@pytest.mark.parametrize("task", TASKS)
def test_the_seed_moves_training_problems_and_never_evaluation_problems(task):
    for split in SPLITS:
        one, other = (make_problems(task, split, seed=seed, limit=50) for seed in (0, 1))
        assert (one == other) == (split in ("validation", "test")), split


def test_the_global_random_state_neither_matters_nor_moves():
    random.seed(1)
    before = random.getstate()
    one = make_problems("countdown", "cold_start", limit=20)
    assert random.getstate() == before
    random.seed(2)
    assert make_problems("countdown", "cold_start", limit=20) == one


@pytest.mark.parametrize("task", TASKS)
def test_no_problem_comes_twice(task):
    for options in NARROW[task]:
        problems = make_problems(task, "train", limit=100, options=options)
        assert len({identity(problem) for problem in problems}) == len(problems)


def test_default_sizes():
    for split, size in DEFAULT_SIZES.items():
        if size <= 1000:
            assert len(make_problems("arithmetic", split)) == size
    assert DEFAULT_SIZES["cold_start"] == 30_000


@pytest.mark.slow
def test_options_too_narrow_for_the_limit_are_an_error_and_without_a_limit_all_there_are():
    # Two terms of 1 to 20 make 210 different sums.
    options = {"terms": 2, "high": 20, "slip_rate": 0}
    found = [problem for split in SPLITS for problem in make_problems("arithmetic", split, options=options)]
    assert len(found) == 210
    with pytest.raises(ValueError, match=r"limit asks for 100 .* arithmetic with .*high=20.* gave only"):
        make_problems("arithmetic", "train", limit=100, options=options)
    with pytest.raises(ValueError, match="has no problem for split 'test'; widen"):
        make_problems("arithmetic", "test", options={"terms": 2, "low": 7, "high": 7, "slip_rate": 0})


@pytest.mark.parametrize("task", TASKS)
def test_only_the_cold_start_shows_worked_completions(task):
    for split in SPLITS:
        for problem in make_problems(task, split, limit=40):
            assert problem.columns["task"] == task
            assert problem.columns["steps"] >= 2
            if split == "cold_start":
                assert parse_completion(problem.completion).well_formed
            else:
                assert problem.completion is None


# ------------------------------------------------------------------------------------------------------------
# arithmetic


@pytest.mark.parametrize("operations", ["+", "-", "+-", "*", "+-*"])
@pytest.mark.parametrize("terms", [2, 3, 5])
def test_clean_arithmetic_is_right_line_by_line(operations, terms):
    options = {"operations": operations, "terms": terms, "slip_rate": 0, "low": 0, "high": 30}
    for problem in make_problems("arithmetic", "cold_start", limit=60, options=options):
        question = re.fullmatch(r"(\d+(?: [-+*] \d+)+) = \?", problem.question)[1]
        assert len(re.findall(r"\d+", question)) == terms
        assert set(re.findall(r"[-+*]", question)) <= set(operations)
        parsed = parse_completion(problem.completion)
        results = read_steps(parsed.thought)
        assert len(results) == problem.columns["steps"] == terms - 1
        assert value_of(question) == int(problem.gold) == results[-1] == int(parsed.answer)


def test_numbers_stay_in_their_range_and_reach_its_ends():
    problems = make_problems("arithmetic", "train", limit=60, options={"low": 10, "high": 14, "terms": 6})
    seen = {int(number) for problem in problems for number in re.findall(r"\d+", problem.question)}
    assert seen == {10, 11, 12, 13, 14}


def test_the_teacher_slips_at_its_rate_and_in_both_ways():
    problems = make_problems("arithmetic", "cold_start", limit=4000)
    early = late = 0
    for problem in problems:
        parsed = parse_completion(problem.completion)
        results = read_steps(parsed.thought)
        if parsed.answer == problem.gold:
            assert len(results) == 2
            continue
        # Low is 1 and the sign is +, so the first value is never the gold.
        assert int(parsed.answer) == results[0]
        early += len(results) == 1
        late += len(results) == 2
    # Five standard deviations: one false alarm in some two million changes of the seed.
    assert abs((early + late) / 4000 - 0.7) < 5 * sqrt(0.7 * 0.3 / 4000)
    assert abs(early / (early + late) - 0.5) < 5 * sqrt(0.25 / (early + late))


def test_the_slip_rate_changes_completions_and_not_questions():
    clean, slipped = (
        make_problems("arithmetic", "cold_start", limit=200, options={"slip_rate": rate}) for rate in (0, 1)
    )
    assert [p.question for p in clean] == [p.question for p in slipped]
    assert all(parse_completion(p.completion).answer == p.gold for p in clean)
    assert all(parse_completion(p.completion).answer != p.gold for p in slipped)


# ------------------------------------------------------------------------------------------------------------
# word_problems


def test_every_story_is_told_and_its_gold_is_right():
    assert len(tasks.STORIES) == len(STORY_GOLDS) >= 12
    told = Counter()
    for problem in make_problems("word_problems", "cold_start", limit=1600):
        place, numbers = read_story(problem.question)
        told[place] += 1
        assert all(2 <= number <= 20 for number in numbers)
        assert STORY_GOLDS[place](*numbers) == int(problem.gold)
        parsed = parse_completion(problem.completion)
        results = read_steps(parsed.thought)
        assert min(results) >= 2, "a result of one would need a singular"
        assert results[-1] == int(problem.gold) == int(parsed.answer)
        assert 2 <= len(results) == problem.columns["steps"] <= 5
    # All stories come up equally often, those that need an even sum or a share too.
    assert set(told) == set(range(len(STORY_GOLDS)))
    assert min(told.values()) > 60


def test_stories_use_the_pronouns_of_their_people_and_leave_no_gap():
    women, men = set(tasks._WOMEN), set(tasks._MEN)
    for problem in make_problems("word_problems", "cold_start", limit=400):
        words = set(re.findall(r"[A-Za-z]+", problem.question))
        assert not words & {"he", "He", "his"} or words & men
        assert not words & {"she", "She", "her"} or words & women
        assert not re.search(r"[{}]|  |\b1\b", problem.question + problem.completion)


# ------------------------------------------------------------------------------------------------------------
# countdown


@pytest.mark.parametrize(
    "options", [{}, {"numbers": 3, "high": 20}, {"numbers": 6, "low": 2, "max_target": 300}]
)
def test_countdown_is_solved_with_each_number_once(options):
    failed_tries = 0
    for problem in make_problems("countdown", "cold_start", limit=150, options=options):
        numbers, target = problem.columns["numbers"], problem.columns["target"]
        assert len(numbers) == options.get("numbers", 4)
        assert problem.gold == str(target)
        assert 1 <= target <= options.get("max_target", 100)
        asked = [int(n) for n in re.findall(r"\d+", problem.question)]
        assert asked == [*numbers, target]
        parsed = parse_completion(problem.completion)
        *misses, solution = parsed.thought.split("\n")
        assert solution == f"{parsed.answer} = {target}"
        assert value_of(parsed.answer) == target
        for line in (*misses, solution):
            expression, _, said = line.partition(" = ")
            assert sorted(map(int, re.findall(r"\d+", expression))) == sorted(numbers)
            if line is not solution:
                value = said.removesuffix(f", not {target}")
                assert value_of(expression) == int(value) != target
                failed_tries += 1
    assert failed_tries > 50


def test_brackets_stand_where_they_are_needed_and_nowhere_else():
    def text(*tree):
        return tasks._write_expression(tree)[0]

    assert text((1, "+", 2), "*", 3) == "(1 + 2) * 3"
    assert text((1, "*", 2), "+", 3) == "1 * 2 + 3"
    assert text(9, "-", (3, "-", 2)) == "9 - (3 - 2)"
    assert text(9, "+", (3, "-", 2)) == "9 + 3 - 2"
    assert text(8, "/", (4, "*", 2)) == "8 / (4 * 2)"
    assert text((8, "-", 4), "-", 2) == "8 - 4 - 2"


# ------------------------------------------------------------------------------------------------------------
# Options


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("arithmetic", {"term": 3}, "has no option 'term'; allowed: terms, low, high, operations, slip_rate"),
        ("arithmetic", {"terms": 1}, "terms must be between 2 and 20, got 1"),
        ("arithmetic", {"terms": "3"}, "terms must be of type int, got '3'"),
        ("arithmetic", {"terms": True}, "terms must be of type int, got True"),
        ("arithmetic", {"low": -1}, "low must be at least 0"),
        ("arithmetic", {"low": 9, "high": 8}, "high must be at least low, which is 9, got 8"),
        ("arithmetic", {"operations": "+/"}, "operations must be some of"),
        ("arithmetic", {"operations": ""}, "operations must be some of"),
        ("arithmetic", {"slip_rate": 1.5}, "slip_rate must be between 0 and 1, got 1.5"),
        ("arithmetic", {"terms": 2}, "slip_rate must be 0 with terms=2"),
        ("word_problems", {"low": 1}, "low must be at least 2"),
        ("word_problems", {"low": 5, "high": 4}, "high must be at least low"),
        ("countdown", {"numbers": 7}, "numbers must be between 3 and 6, got 7"),
        ("countdown", {"low": 0}, "low must be at least 1"),
        ("countdown", {"low": 5, "high": 4}, "high must be at least low"),
        ("countdown", {"max_target": 9}, "max_target must be at least 10"),
    ],
)
def test_a_bad_option_is_named(task, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_problems(task, "train", limit=1, options=options)
