"""The built-in tasks: problems made from a seed, in plain Python, with nothing to download.

`arithmetic` (sums of a few terms), `word_problems` (short stories in the shape of GSM8K) and `countdown`
(reach a target with given numbers). Every problem has a canonical key, the same for two problems that ask the
same thing (a sum and its permutation). A hash of the key, and nothing else, decides which split owns the
problem: cold start, train, validation and test stay disjoint whatever the seed and the options, even when a
model is trained with one set of options and tested with another.

Torch-free. `data.load_problems` is the door that callers use.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from hashlib import blake2b
from typing import Any, NamedTuple

from prompts import format_completion

# How many of 100 buckets each split owns, and how many problems are made where no limit is given.
SPLIT_SHARES = {"cold_start": 45, "train": 45, "validation": 4, "test": 6}
DEFAULT_SIZES = {"cold_start": 30_000, "train": 20_000, "validation": 500, "test": 1_000}
SPLITS = tuple(SPLIT_SHARES)

# These are the same for every seed: two runs are compared on the same problems.
EVALUATION_SPLITS = ("validation", "test")

# The split has no more problems when so many draws of its own in a row are repeats, or when so many draws of
# the task in a row belong elsewhere.
MAX_REPEATS = 1_000
MAX_STRAYS = 20_000

# Of the slips of an unreliable teacher, the share that stops after the first step; the others write every
# step and then answer with the first value.
EARLY_STOP_SHARE = 0.5


@dataclass(frozen=True)
class Problem:
    """A question with its reference answer.

    Attributes:
        question: what the user asks, as plain text.
        gold: the reference answer; None in data without answers.
        completion: a worked completion to imitate (`prompts.format_completion`); None where there is none.
        columns: every column of the data set under its name, handed to the reward functions.
    """

    question: str
    gold: str | None
    completion: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)


class Written(NamedTuple):
    """A problem in words: question, gold, worked completion, and the columns besides `task`."""

    question: str
    gold: str
    completion: str
    columns: dict[str, Any]


class Task(NamedTuple):
    """A built-in task: its options (a dataclass), how to draw a problem, and how to write it down.

    `draw(rng, options)` returns (key, facts), or None where the draw came to nothing;
    `write(facts, rng, options)` makes the words. They are apart because most draws belong to another split
    and are never written.
    """

    options: type
    draw: Callable[[random.Random, Any], tuple[str, Any] | None]
    write: Callable[[Any, random.Random, Any], Written]


# ------------------------------------------------------------------------------------------------------------
# Making problems


_BUCKETS = [split for split, share in SPLIT_SHARES.items() for _ in range(share)]


def split_of(key: str) -> str:
    """The split that owns the problem with this key: a hash, so neither seed nor options can move it."""
    digest = blake2b(key.encode(), digest_size=8).digest()
    return _BUCKETS[int.from_bytes(digest) % len(_BUCKETS)]


def make_problems(
    task: str, split: str, *, seed: int = 0, limit: int | None = None, options: dict[str, Any] | None = None
) -> list[Problem]:
    """Make the problems of a built-in task; the same arguments give the same list.

    Args:
        task: a key of `TASKS`.
        split: one of `SPLITS`. Only cold_start has worked completions: RL sees questions and answers.
        seed: chooses the problems of cold_start and train; validation and test are the same for every seed.
        limit: how many; a longer list begins with the shorter one. None makes `DEFAULT_SIZES[split]`, or as
            many as the options allow where these are fewer.
        options: the task's options by name; those left out keep their defaults.

    Raises:
        ValueError: an unknown or impossible option, or options that allow fewer problems than `limit`.
    """
    chosen = _read_options(task, options or {})
    rng = random.Random(f"{task} {split}" if split in EVALUATION_SPLITS else f"{task} {split} {seed}")
    wanted = DEFAULT_SIZES[split] if limit is None else limit
    problems: list[Problem] = []
    seen: set[str] = set()
    repeats = 0
    while len(problems) < wanted and repeats < MAX_REPEATS:
        drawn = _draw_for(task, split, rng, chosen)
        if drawn is None:
            break
        key, facts = drawn
        if key in seen:
            repeats += 1
            continue
        repeats = 0
        seen.add(key)
        question, gold, completion, columns = TASKS[task].write(facts, rng, chosen)
        worked = completion if split == "cold_start" else None
        problems.append(Problem(question, gold, worked, {"task": task, **columns}))
    if limit is not None and len(problems) < limit:
        raise ValueError(
            f"limit asks for {limit} problems, but {task} with {chosen} gave only {len(problems)} for split "
            f"{split!r}; ask for fewer, or widen the options"
        )
    if not problems:
        raise ValueError(
            f"options: {task} with {chosen} has no problem for split {split!r}; widen the options"
        )
    return problems


def _draw_for(task: str, split: str, rng: random.Random, options: Any) -> tuple[str, Any] | None:
    """The next draw that belongs to the split: (key, facts); None where there seems to be none."""
    draw = TASKS[task].draw
    for _ in range(MAX_STRAYS):
        drawn = draw(rng, options)
        if drawn is not None and split_of(f"{task} {drawn[0]}") == split:
            return drawn
    return None


def _read_options(task: str, options: dict[str, Any]) -> Any:
    """The task's options dataclass, checked: names, types, and what its own `__post_init__` asks."""
    kind = TASKS[task].options
    defaults = {f.name: f.default for f in fields(kind)}
    for name, value in options.items():
        if name not in defaults:
            raise ValueError(f"options: {task} has no option {name!r}; allowed: {', '.join(defaults)}")
        expected = type(defaults[name])
        allowed = (int, float) if expected is float else expected
        if isinstance(value, bool) or not isinstance(value, allowed):
            raise ValueError(f"options: {name} must be of type {expected.__name__}, got {value!r}")
    return kind(**options)


def _check_option(name: str, value: Any, is_fine: bool, allowed: str) -> None:
    if not is_fine:
        raise ValueError(f"options: {name} must be {allowed}, got {value!r}")


def _between(rng: random.Random, low: int, high: int) -> int:
    # Python promises the same numbers in every version for random() alone, so all draws are made of it.
    return low + int(rng.random() * (high - low + 1))


def _one_of(rng: random.Random, choices):
    return choices[int(rng.random() * len(choices))]


def _apply(left: int, sign: str, right: int) -> int:
    """`left sign right`; a division has no remainder (callers see to that)."""
    if sign == "+":
        return left + right
    if sign == "-":
        return left - right
    return left * right if sign == "*" else left // right


# ------------------------------------------------------------------------------------------------------------
# arithmetic


@dataclass(frozen=True)
class ArithmeticOptions:
    """What sums to ask.

    Attributes:
        terms: numbers in a question, at least 2.
        low: the smallest number, at least 0.
        high: the largest number.
        operations: the signs to choose from, some of "+-*".
        slip_rate: the share of worked completions that end in a wrong answer. The cold start's teacher is
            unreliable on purpose: a model that only imitates stays wrong, and RL against the checker has to
            make it right. 0 gives clean demonstrations.
    """

    terms: int = 3
    low: int = 1
    high: int = 99
    operations: str = "+"
    slip_rate: float = 0.7

    def __post_init__(self):
        _check_option("terms", self.terms, 2 <= self.terms <= 20, "between 2 and 20")
        _check_option("low", self.low, self.low >= 0, "at least 0")
        _check_option("high", self.high, self.high >= self.low, f"at least low, which is {self.low}")
        known = bool(self.operations) and set(self.operations) <= set("+-*")
        _check_option("operations", self.operations, known, 'some of "+-*", such as "+-"')
        _check_option("slip_rate", self.slip_rate, 0 <= self.slip_rate <= 1, "between 0 and 1")
        can_slip = self.terms > 2 or self.slip_rate == 0
        _check_option("slip_rate", self.slip_rate, can_slip, "0 with terms=2, whose first step is the answer")


def _draw_arithmetic(rng: random.Random, options: ArithmeticOptions):
    numbers = [_between(rng, options.low, options.high) for _ in range(options.terms)]
    signs = [_one_of(rng, options.operations) for _ in range(options.terms - 1)]
    products = [("+", [numbers[0]])]
    for sign, number in zip(signs, numbers[1:], strict=True):
        if sign == "*":
            products[-1][1].append(number)
        else:
            products.append((sign, [number]))
    key = " ".join(sorted(sign + "*".join(map(str, sorted(factors))) for sign, factors in products))
    return key, (numbers, signs, products)


def _write_arithmetic(facts, rng: random.Random, options: ArithmeticOptions) -> Written:
    numbers, signs, products = facts
    rest = "".join(f" {sign} {number}" for sign, number in zip(signs, numbers[1:], strict=True))
    question = f"{numbers[0]}{rest} = ?"
    steps: list[tuple[str, int]] = []

    def step(left: int, sign: str, right: int) -> int:
        value = _apply(left, sign, right)
        steps.append((f"{left} {sign} {right} = {value}", value))
        return value

    terms = []
    for sign, (first, *others) in products:
        for factor in others:
            first = step(first, "*", factor)
        terms.append((sign, first))
    total = terms[0][1]
    for sign, value in terms[1:]:
        total = step(total, sign, value)

    # One draw whatever the slip rate, so that the same seed asks the same questions with and without slips.
    luck = rng.random()
    shown, answer = steps, total
    if luck < options.slip_rate:
        answer = steps[0][1]
        if luck < options.slip_rate * EARLY_STOP_SHARE:
            shown = steps[:1]
    thought = "\n".join(line for line, _ in shown)
    return Written(question, str(total), format_completion(thought, str(answer)), {"steps": len(steps)})


# ------------------------------------------------------------------------------------------------------------
# word_problems


@dataclass(frozen=True)
class WordProblemOptions:
    """What numbers the stories use.

    Attributes:
        low: the smallest number in a story, at least 2, so that every noun is a plural.
        high: the largest.
    """

    low: int = 2
    high: int = 20

    def __post_init__(self):
        _check_option("low", self.low, self.low >= 2, "at least 2, so that every noun is a plural")
        _check_option("high", self.high, self.high >= self.low, f"at least low, which is {self.low}")


class Step(NamedTuple):
    """One line of a worked solution; operands are places in the list of numbers and results, or constants."""

    left: int | str
    sign: str
    right: int | str
    words: str


class Story:
    """A template of a word problem.

    `text` may use the numbers {a} to {e}, {name}, the pronouns {he}, {He} and {his}, and {thing}, one of
    `things`. A step reads "a * r1: words", where r1 is the result of the first step; a plain number stands
    for itself.
    """

    def __init__(self, text: str, *steps: str, things: tuple[str, ...] = ()):
        self.text, self.things = text, things
        self.numbers = sum(f"{{{letter}}}" in text for letter in "abcde")
        self.steps = [self._read_step(step) for step in steps]

    def _read_step(self, step: str) -> Step:
        sum_, _, words = step.partition(": ")
        left, sign, right = sum_.split()
        return Step(self._place(left), sign, self._place(right), words)

    def _place(self, operand: str) -> int | str:
        if operand.startswith("r"):
            return self.numbers + int(operand[1:]) - 1
        return operand if operand.isdigit() else "abcde".index(operand)

    def solve(self, numbers: list[int]) -> list[tuple[int, int, int]] | None:
        """Left, right and result of each step; None unless every result is a whole number of at least 2."""
        values = list(numbers)
        solved = []
        for step in self.steps:
            left, right = (int(x) if isinstance(x, str) else values[x] for x in (step.left, step.right))
            if step.sign == "/" and left % right:
                return None
            result = _apply(left, step.sign, right)
            if result < 2:
                return None
            values.append(result)
            solved.append((left, right, result))
        return solved


_WOMEN = ("Ada", "Clara", "Elif", "Grace", "Ines", "Mei", "Nora", "Priya", "Rosa", "Zoe")
_MEN = ("Ben", "Diego", "Felix", "Hugo", "Ivan", "Kofi", "Omar", "Ravi", "Sam", "Tom")
_PEOPLE = (*((name, "she", "her") for name in _WOMEN), *((name, "he", "his") for name in _MEN))
_FRUIT = ("apples", "pears", "plums", "peaches", "oranges", "lemons")
_PASTRY = ("muffins", "bagels", "rolls", "pretzels", "pies")
_TOYS = ("marbles", "stickers", "shells", "stamps", "trading cards", "beads")

# The place of a story in this list is part of its problems' keys: add new ones at the end.
STORIES = (
    Story(
        "{name} picks {a} baskets of {thing}, with {b} {thing} in each basket. {He} gives {c} {thing} to a "
        "neighbour. How many {thing} does {he} have left?",
        "a * b: {thing} picked",
        "r1 - c: {thing} left",
        things=_FRUIT,
    ),
    Story(
        "A baker fills {a} trays with {b} {thing} each and then bakes {c} more {thing}. All of them are "
        "sold for {d} dollars apiece. How many dollars does the baker take in?",
        "a * b: {thing} on the trays",
        "r1 + c: {thing} in all",
        "r2 * d: dollars",
        things=_PASTRY,
    ),
    Story(
        "{name} earns {a} dollars an hour and works {b} hours a day. After {c} days {he} spends {d} dollars "
        "on a present. How many dollars of {his} pay are left?",
        "a * b: dollars a day",
        "r1 * c: dollars earned",
        "r2 - d: dollars left",
    ),
    Story(
        "{name} reads {a} pages of a book every morning and {b} pages every evening. After {c} days {he} "
        "still has {d} pages to go. How many pages does the book have?",
        "a + b: pages a day",
        "r1 * c: pages read",
        "r2 + d: pages in the book",
    ),
    Story(
        "{name} has {a} bags with {b} {thing} in each and finds {c} more {thing} in a drawer. {He} shares "
        "all of them equally among {d} friends. How many {thing} does each friend get?",
        "a * b: {thing} in the bags",
        "r1 + c: {thing} in all",
        "r2 / d: {thing} for each friend",
        things=_TOYS,
    ),
    Story(
        "A bus leaves the station with {a} passengers. At the first stop {b} passengers get off and {c} get "
        "on. At the second stop nobody gets off, and twice as many passengers get on as at the first stop. "
        "How many passengers are on the bus now?",
        "a - b: passengers stay on",
        "r1 + c: passengers after the first stop",
        "c * 2: passengers get on at the second stop",
        "r2 + r3: passengers now",
    ),
    Story(
        "A farm has {a} hens and {b} times as many ducks. Every bird eats {c} scoops of grain a day. How "
        "many scoops of grain do the birds eat in {d} days?",
        "a * b: ducks",
        "a + r1: birds",
        "r2 * c: scoops a day",
        "r3 * d: scoops in all",
    ),
    Story(
        "A group of {a} adults and {b} children visits the zoo. A ticket costs {c} dollars for an adult and "
        "{d} dollars for a child. How many dollars do the tickets cost in all?",
        "a * c: dollars for the adults",
        "b * d: dollars for the children",
        "r1 + r2: dollars in all",
    ),
    Story(
        "A garden is a rectangle, {a} metres long and {b} metres wide. {name} wants a fence all the way "
        "around it and already has {c} metres of fence. New fence costs {d} dollars a metre. How many "
        "dollars does {he} have to pay?",
        "a + b: metres for two sides",
        "r1 * 2: metres around the garden",
        "r2 - c: metres to buy",
        "r3 * d: dollars",
    ),
    Story(
        "A tank holds {a} litres of water. A pump adds {b} litres every minute, while a leak loses {c} "
        "litres every minute. How many litres are in the tank after {d} minutes?",
        "b - c: litres gained a minute",
        "r1 * d: litres gained",
        "a + r2: litres in the tank",
    ),
    Story(
        "A red ribbon is {a} centimetres long, and a blue ribbon is {b} times as long. {name} sews them "
        "together end to end and cuts off {c} centimetres. How many centimetres long is the result?",
        "a * b: centimetres of blue ribbon",
        "a + r1: centimetres together",
        "r2 - c: centimetres left",
    ),
    Story(
        "{name} collects {a} {thing} in spring and {b} {thing} in summer. {He} gives half of {his} {thing} "
        "to a cousin and then buys {c} more. How many {thing} does {he} have now?",
        "a + b: {thing} collected",
        "r1 / 2: {thing} kept",
        "r2 + c: {thing} now",
        things=_TOYS,
    ),
    Story(
        "A theatre has {a} rows of {b} seats. On Friday {c} seats are broken, and {d} of the other seats "
        "stay empty. How many people watch the play on Friday?",
        "a * b: seats",
        "r1 - c: seats to sit on",
        "r2 - d: people",
    ),
    Story(
        "A workshop makes {a} chairs on each of the 5 weekdays and {b} chairs on Saturday. It works like "
        "this for {c} weeks, and then {d} of the chairs turn out to be faulty. How many chairs are good?",
        "a * 5: chairs on weekdays",
        "r1 + b: chairs a week",
        "r2 * c: chairs made",
        "r3 - d: good chairs",
    ),
    Story(
        "{name} and a friend buy {a} notebooks at {b} dollars each and {c} pens at {d} dollars each. They "
        "split the bill equally. How many dollars does {name} pay?",
        "a * b: dollars for notebooks",
        "c * d: dollars for pens",
        "r1 + r2: dollars in all",
        "r3 / 2: dollars each",
    ),
    Story(
        "A school buys {a} boxes with {b} red pencils each and {c} boxes with {d} blue pencils each. After "
        "{e} pencils are lost, the rest are shared equally by two classes. How many pencils does each class "
        "get?",
        "a * b: red pencils",
        "c * d: blue pencils",
        "r1 + r2: pencils bought",
        "r3 - e: pencils left",
        "r4 / 2: pencils for each class",
    ),
)


def _draw_word_problem(rng: random.Random, options: WordProblemOptions):
    place = _between(rng, 0, len(STORIES) - 1)
    story = STORIES[place]
    # Some stories need a sum that can be shared out: many tries, so that these come up as often as others.
    for _ in range(50):
        numbers = [_between(rng, options.low, options.high) for _ in range(story.numbers)]
        solved = story.solve(numbers)
        if solved is not None:
            return f"{place}: {' '.join(map(str, numbers))}", (story, numbers, solved)
    return None


def _write_word_problem(facts, rng: random.Random, options: WordProblemOptions) -> Written:
    story, numbers, solved = facts
    name, he, his = _one_of(rng, _PEOPLE)
    thing = _one_of(rng, story.things) if story.things else ""
    words = {"name": name, "he": he, "He": he.capitalize(), "his": his, "thing": thing}
    words.update(zip("abcde", numbers, strict=False))
    lines = [
        f"{left} {step.sign} {right} = {result} {step.words}"
        for step, (left, right, result) in zip(story.steps, solved, strict=True)
    ]
    gold = str(solved[-1][2])
    completion = format_completion("\n".join(lines).format(**words), gold)
    return Written(story.text.format(**words), gold, completion, {"steps": len(lines)})


# ------------------------------------------------------------------------------------------------------------
# countdown


@dataclass(frozen=True)
class CountdownOptions:
    """What targets to ask for.

    Attributes:
        numbers: how many numbers are given, 3 to 6.
        low: the smallest number given, at least 1.
        high: the largest.
        max_target: the largest target.
    """

    numbers: int = 4
    low: int = 1
    high: int = 50
    max_target: int = 100

    def __post_init__(self):
        _check_option("numbers", self.numbers, 3 <= self.numbers <= 6, "between 3 and 6")
        _check_option("low", self.low, self.low >= 1, "at least 1")
        _check_option("high", self.high, self.high >= self.low, f"at least low, which is {self.low}")
        _check_option("max_target", self.max_target, self.max_target >= 10, "at least 10")


# How many expressions that miss the target a worked example tries before the one that reaches it, at most.
MAX_FAILED_TRIES = 2

# An expression is a number, or (left expression, sign, right expression).
Expression = int | tuple

_STRENGTH = {"+": 1, "-": 1, "*": 2, "/": 2}
_NUMBER_STRENGTH = 3


def _random_expression(rng: random.Random, numbers: list[int], target: int) -> tuple[int, Expression]:
    """Combine all the numbers at random, each once, through positive whole values: (value, expression).

    Products too large to lead back to a target of about this size are not tried.
    """
    largest_product = 10 * target
    pool: list[tuple[int, Expression]] = [(number, number) for number in numbers]
    while len(pool) > 1:
        right, right_tree = pool.pop(int(rng.random() * len(pool)))
        left, left_tree = pool.pop(int(rng.random() * len(pool)))
        signs = "+"
        if left > right:
            signs += "-"
        if left % right == 0:
            signs += "/"
        if left * right <= largest_product:
            signs += "*"
        sign = _one_of(rng, signs)
        pool.append((_apply(left, sign, right), (left_tree, sign, right_tree)))
    return pool[0]


def _write_expression(tree: Expression) -> tuple[str, int]:
    """The expression as text, with no more brackets than it needs, and how strongly it holds together."""
    if isinstance(tree, int):
        return str(tree), _NUMBER_STRENGTH
    left_tree, sign, right_tree = tree
    left, left_strength = _write_expression(left_tree)
    right, right_strength = _write_expression(right_tree)
    strength = _STRENGTH[sign]
    if left_strength < strength:
        left = f"({left})"
    if right_strength < strength or (right_strength == strength and sign in "-/"):
        right = f"({right})"
    return f"{left} {sign} {right}", strength


def _draw_countdown(rng: random.Random, options: CountdownOptions):
    numbers = [_between(rng, options.low, options.high) for _ in range(options.numbers)]
    target, expression = _random_expression(rng, numbers, options.max_target)
    if target > options.max_target:
        return None
    return f"{' '.join(map(str, sorted(numbers)))} = {target}", (numbers, target, expression)


def _write_countdown(facts, rng: random.Random, options: CountdownOptions) -> Written:
    numbers, target, solution = facts
    given = ", ".join(map(str, numbers[:-1])) + f" and {numbers[-1]}"
    question = (
        f"Use the numbers {given}, each exactly once, with + - * / and brackets, to write an expression "
        f"that equals {target}."
    )
    tries = [_random_expression(rng, numbers, target) for _ in range(_between(rng, 0, MAX_FAILED_TRIES))]
    lines = [
        f"{_write_expression(tree)[0]} = {value}, not {target}" for value, tree in tries if value != target
    ]
    answer = _write_expression(solution)[0]
    lines.append(f"{answer} = {target}")
    columns = {"numbers": numbers, "target": target, "steps": len(numbers) - 1}
    return Written(question, str(target), format_completion("\n".join(lines), answer), columns)


TASKS = {
    "arithmetic": Task(ArithmeticOptions, _draw_arithmetic, _write_arithmetic),
    "word_problems": Task(WordProblemOptions, _draw_word_problem, _write_word_problem),
    "countdown": Task(CountdownOptions, _draw_countdown, _write_countdown),
}
