"""Problems to train and to evaluate on, wherever they come from.

`load_problems` takes the name of a built-in task (see tasks.py), a well-known set (`gsm8k`, `math`,
`openr1-math`), any data set of the Hugging Face Hub as `owner/name` or `owner/name:config`, or a JSONL, CSV
or Parquet file or folder. A name wins over a folder that is called the same; write `./gsm8k` for the folder.

Where the splits come from:

- Built-in tasks make four splits that are disjoint by construction.
- Elsewhere cold_start is train. Files and Hub splits are what their names say: train, test, or validation
  (also valid, val, dev). In a folder with files of just these names (`train.jsonl`), nothing else counts;
  otherwise a word of the name will do (`train-00000-of-00002.parquet`, `gsm8k_test.csv`).
- Where nothing is named validation, it is held out of train: 500 questions, or a tenth of fewer than 5,000,
  chosen by a hash of the question, so that neither the seed nor the order of the rows has a say.
- Data in one piece (a file or files with no such word in the name, a Hub set whose only split is train) is
  one set: train and validation part it as above, and test is all of it, which is what evaluating on a file
  means. That is fair to every model but one that was trained on the same data, so it comes with a warning;
  the honest split for such a model is validation. A file that is named train has no test split at all.

Torch-free, and `datasets` and `pyarrow` are imported only for the data that needs them.
"""

import csv
import difflib
import json
import random
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from prompts import TAGS, format_completion
from tasks import SPLITS, TASKS, Problem, make_problems

__all__ = ["SPLITS", "Problem", "load_problems", "problem_order", "read_problems", "take"]


class HubSet(NamedTuple):
    """A data set of the Hub: its name, its config (None for the only one), columns too heavy to keep."""

    name: str
    config: str | None = None
    dropped: tuple[str, ...] = ()


HUB_SETS = {
    "gsm8k": HubSet("openai/gsm8k", "main"),
    # The original 7,500 / 5,000 split in one config; for MATH-500, evaluate on HuggingFaceH4/MATH-500.
    "math": HubSet("DigitalLearningGmbH/MATH-lighteval", "default"),
    # Several long generations a problem: gigabytes that no reward reads.
    "openr1-math": HubSet("open-r1/OpenR1-Math-220k", "default", dropped=("generations", "messages")),
}
EXTENSIONS = (".jsonl", ".csv", ".parquet")

# Guessed in this order, whatever the case; the first that exists is taken.
QUESTION_COLUMNS = ("question", "problem", "prompt", "query", "instruction")
ANSWER_COLUMNS = ("gold", "answer", "final_answer", "target", "label", "ground_truth", "solution")
WORKED_COLUMN = "solution"
COMPLETION_COLUMN = "completion"

HELD_OUT = 500
HELD_OUT_SHARE = 0.1

_SPLIT_WORDS = {
    "train": "train",
    "test": "test",
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
}
_ONE_PIECE = "one piece"


class Row(NamedTuple):
    """A row and where it stands, for messages: `problems.jsonl:3`."""

    place: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Data that was found and not read yet.

    Attributes:
        name: for messages.
        pieces: how to read each split that exists, or the one piece under `_ONE_PIECE`.
        is_remote: a row without question or gold is left out with a warning, as nobody here can mend it; in a
            file of one's own it is an error.
    """

    name: str
    pieces: dict[str, Callable[[], list[Row]]]
    is_remote: bool = False


# ------------------------------------------------------------------------------------------------------------
# The door


def load_problems(
    data: str | Path,
    split: str,
    *,
    seed: int = 0,
    limit: int | None = None,
    question_column: str | None = None,
    answer_column: str | None = None,
    options: dict[str, Any] | None = None,
    require_gold: bool = True,
) -> list[Problem]:
    """The problems of one split, in a fixed order (training shuffles them: see `take`).

    Args:
        data: a built-in task, a well-known set, a Hub name, a file or a folder; see the top of this file,
            also for what the splits of each are.
        split: "cold_start", "train", "validation" or "test".
        seed: chooses which problems of a built-in task are made for cold_start and train; nothing else
            depends on it.
        limit: at most so many problems. A built-in task makes so many. Of other data it keeps the questions
            with the smallest hashes, in the order of the data: the first rows of a set that is sorted by
            topic are no sample.
        question_column: the column that asks; None guesses it among `QUESTION_COLUMNS`. It holds text, or a
            list of chat messages, whose last user message is the question.
        answer_column: the column with the gold; None guesses it among `ANSWER_COLUMNS`. A text that ends
            in a line such as "#### 72", or holds a `\\boxed{}`, is a worked answer: what is marked becomes
            the gold, and the text the thought of a worked completion (as does a `solution` column beside a
            bare answer). A `completion` column is taken as it is.
        options: options of a built-in task.
        require_gold: False allows data without golds, for rewards that need none.

    Raises:
        ValueError: an argument, a column, a row or a Hub name that does not work.
        FileNotFoundError: a file or folder that is not there, or a folder without data files.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}{_suggest(split, SPLITS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}; leave it out for all problems")
    if data in TASKS:
        if question_column or answer_column:
            raise ValueError(
                f"question_column and answer_column are for data with columns; {data} is made here"
            )
        return make_problems(data, split, seed=seed, limit=limit, options=options)
    if options:
        raise ValueError(
            f"options are for the built-in tasks ({', '.join(TASKS)}); got {options} for {data!r}"
        )
    source = _find_source(str(data))
    read = partial(
        _read_problems,
        source,
        question_column=question_column,
        answer_column=answer_column,
        require_gold=require_gold,
    )
    problems = _read_split(source, "train" if split == "cold_start" else split, read)
    if limit is not None and limit < len(problems):
        kept = set(sorted(range(len(problems)), key=lambda i: (_rank(problems[i].question), i))[:limit])
        problems = [problem for i, problem in enumerate(problems) if i in kept]
    return problems


def read_problems(file: str) -> list[Problem]:
    """Every problem of a JSONL, CSV or Parquet file, in its order; a gold need not be there.

    Raises:
        ValueError: another kind of file, or a row without a question, with its place.
        FileNotFoundError: no such file.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"no file {file!r}; give one of questions ({', '.join(EXTENSIONS)})")
    source = _find_source(str(Path(file).absolute()))
    (piece,) = source.pieces
    return _read_problems(source, piece, question_column=None, answer_column=None, require_gold=False)


def _suggest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _read_split(source: Source, split: str, read: Callable[[str], list[Problem]]) -> list[Problem]:
    """The problems of train, validation or test, by the rules at the top of this file."""
    pieces = source.pieces
    if split == "test" and _ONE_PIECE in pieces:
        warnings.warn(
            f"{source.name} comes in one piece, so split 'test' is all of it; a model that was trained on it "
            "should be evaluated with split 'validation', the part that training holds out",
            stacklevel=3,
        )
        return read(_ONE_PIECE)
    if split in pieces and not (split == "train" and "validation" not in pieces):
        return read(split)
    whole = next((piece for piece in ("train", _ONE_PIECE) if piece in pieces), None)
    if split == "test" or whole is None:
        there = [*pieces, "validation"] if "train" in pieces and "validation" not in pieces else list(pieces)
        raise ValueError(
            f"{source.name} has no split {split!r}; it has: {', '.join(there)}. Ask for one of these, or "
            f"give a folder with a file named {split}.jsonl (.csv, .parquet)"
        )
    train, validation = _hold_out(read(whole))
    if not validation and split == "validation":
        raise ValueError(f"{source.name} has a single question, too few to hold any out for validation")
    return train if split == "train" else validation


def _hold_out(problems: list[Problem]) -> tuple[list[Problem], list[Problem]]:
    """Part problems into train and validation by a hash of the question; equal questions stay together."""
    ranks = sorted({_rank(problem.question) for problem in problems})
    size = HELD_OUT if len(ranks) >= HELD_OUT / HELD_OUT_SHARE else int(len(ranks) * HELD_OUT_SHARE)
    held = set(ranks[: max(size, 1)]) if len(ranks) > 1 else set()
    train = [problem for problem in problems if _rank(problem.question) not in held]
    return train, [problem for problem in problems if _rank(problem.question) in held]


def _rank(question: str) -> bytes:
    """Where a question stands in an order of its own, which neither a seed nor the order of rows can move."""
    return blake2b(" ".join(question.split()).encode(), digest_size=8).digest()


# ------------------------------------------------------------------------------------------------------------
# Finding and reading


def _find_source(data: str) -> Source:
    if data in HUB_SETS:
        return _hub_source(HUB_SETS[data])
    path = Path(data).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in EXTENSIONS)
        if not files:
            raise FileNotFoundError(
                f"data: folder {data!r} holds no data file ({', '.join(EXTENSIONS)}); "
                "name the folder that holds them, as subfolders are not searched"
            )
        return _file_source(data, files)
    extension = path.suffix.lower()
    if path.exists():
        if extension not in EXTENSIONS:
            raise ValueError(
                f"data: cannot read {data!r}; a file must end in one of {', '.join(EXTENSIONS)}, got "
                f"{extension!r}"
            )
        return _file_source(data, [path])
    if extension in EXTENSIONS or data.startswith((".", "/", "~")):
        raise FileNotFoundError(f"data: no file or folder {data!r}; check the path")
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", data):
        name, _, config = data.partition(":")
        known = {hub_set.name: hub_set for hub_set in HUB_SETS.values()}
        return _hub_source(known[name] if name in known and not config else HubSet(name, config or None))
    names = (*TASKS, *HUB_SETS)
    raise ValueError(
        f"data: unknown {data!r}{_suggest(data, names)}; allowed: {', '.join(names)}, a Hub name (owner/name "
        f"or owner/name:config), or an existing folder or file ({', '.join(EXTENSIONS)})"
    )


def _file_source(name: str, files: list[Path]) -> Source:
    by_split: dict[str, list[Path]] = {}
    exact = [file for file in files if file.stem.lower() in _SPLIT_WORDS]
    for file in exact or files:
        words = re.split(r"[^a-z]+", file.stem.lower())
        split = next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), _ONE_PIECE)
        by_split.setdefault(split, []).append(file)
        if exact and len(by_split[split]) > 1:
            both = " and ".join(file.name for file in by_split[split])
            raise ValueError(f"data: {name} has several files for {split}: {both}; keep one of them")
    if _ONE_PIECE in by_split and len(by_split) > 1:
        strange = ", ".join(file.name for file in by_split[_ONE_PIECE])
        raise ValueError(
            f"data: {name} has files for the splits {', '.join(sorted(set(by_split) - {_ONE_PIECE}))} and "
            f"others that name none: {strange}; rename these, or move them away"
        )
    return Source(name, {split: partial(_read_files, paths) for split, paths in by_split.items()})


def _read_files(paths: list[Path]) -> list[Row]:
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    return [row for path in paths for row in readers[path.suffix.lower()](path)]


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                # utf-8-sig: a byte order mark at the start is no part of the data.
                values = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:
                raise ValueError(
                    f"{place}: not a line of JSON in UTF-8 ({error}); one object a line"
                ) from error
            if not isinstance(values, dict):
                raise ValueError(f"{place}: a line must be an object such as {{...}}, got {line[:60]!r}")
            yield Row(place, values)


def _read_csv(path: Path) -> Iterator[Row]:
    # Not through pandas: it reads a gold "007" as 7 and "None" as missing.
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, strict=True)
        try:
            for values in rows:
                place = f"{path}:{rows.line_num}"
                if None in values or None in values.values():
                    raise ValueError(
                        f"{place}: the row does not have the {len(rows.fieldnames or ())} cells of the header"
                    )
                yield Row(place, values)
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}:{rows.line_num + 1}: not CSV in UTF-8 ({error})") from error


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path).read()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a Parquet file ({error})") from error
    for number, values in enumerate(table.to_pylist(), start=1):
        yield Row(f"{path} row {number}", values)


def _hub_source(hub_set: HubSet) -> Source:
    import datasets

    name, config, dropped = hub_set
    shown = f"{name}:{config}" if config else name
    try:
        loaded = datasets.load_dataset(name, config)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"data: cannot load {shown!r} from the Hugging Face Hub ({type(error).__name__}: {error}). Check "
            "the name (owner/name, or owner/name:config where there are several; no file or folder here is "
            "called so). For a gated set, accept its terms on its page and run `hf auth login`. Without a "
            "network, download the set where there is one and give its folder or file"
        ) from error

    def read(split: str) -> list[Row]:
        rows = loaded[split]
        rows = rows.remove_columns([column for column in dropped if column in rows.column_names])
        return [Row(f"{shown} {split} row {i}", values) for i, values in enumerate(rows.to_list(), start=1)]

    splits = {_SPLIT_WORDS[split]: partial(read, split) for split in loaded if split in _SPLIT_WORDS}
    if len(loaded) == 1 and "test" not in splits and "validation" not in splits:
        splits = {_ONE_PIECE: partial(read, next(iter(loaded)))}
    if not splits:
        raise ValueError(
            f"data: {shown} has the splits {', '.join(loaded)}, and none is called train, validation or "
            "test; save the one you want as a file and give that"
        )
    return Source(shown, splits, is_remote=True)


# ------------------------------------------------------------------------------------------------------------
# From rows to problems


@dataclass(frozen=True)
class Columns:
    """Which column means what, None where there is none; and the names of all."""

    question: str
    answer: str | None
    worked: str | None
    completion: str | None
    every: list[str]


def _read_problems(
    source: Source, piece: str, *, question_column: str | None, answer_column: str | None, require_gold: bool
) -> list[Problem]:
    rows = source.pieces[piece]()
    if not rows:
        raise ValueError(f"data: {source.name} has no rows in {piece}; give at least one problem")
    columns = _find_columns(source.name, rows, question_column, answer_column, require_gold)
    problems, bad = [], []
    for row in rows:
        try:
            problems.append(_read_problem(row, columns, require_gold))
        except ValueError as error:
            if not source.is_remote:
                raise
            bad.append(error)
    if not problems:
        raise ValueError(f"data: no row of {source.name} can be used; the first: {bad[0]}")
    if bad:
        warnings.warn(
            f"left out {len(bad)} of {len(rows)} rows of {source.name}; the first: {bad[0]}", stacklevel=4
        )
    return problems


def _find_columns(
    name: str, rows: list[Row], question_column: str | None, answer_column: str | None, require_gold: bool
) -> Columns:
    there = list(dict.fromkeys(column for row in rows for column in row.values))
    question = _find_column("question_column", question_column, QUESTION_COLUMNS, there)
    if question is None:
        raise ValueError(_no_column(name, "question_column", QUESTION_COLUMNS, there))
    others = [column for column in there if column != question]
    answer = _find_column("answer_column", answer_column, ANSWER_COLUMNS, others)
    if answer is None and require_gold:
        remedy = ", or use rewards that need no gold"
        raise ValueError(_no_column(name, "answer_column", ANSWER_COLUMNS, others) + remedy)
    worked = _find_column("", None, (WORKED_COLUMN,), [column for column in others if column != answer])
    completion = _find_column("", None, (COMPLETION_COLUMN,), others)
    return Columns(question, answer, worked, completion, there)


def _find_column(option: str, given: str | None, guesses: tuple[str, ...], there: list[str]) -> str | None:
    if given is not None and given not in there:
        raise ValueError(f"{option}: there is no column {given!r}; choose one of: {', '.join(there)}")
    by_name = {column.lower(): column for column in reversed(there)}
    return given or next((by_name[guess] for guess in guesses if guess in by_name), None)


def _no_column(name: str, option: str, guesses: tuple[str, ...], there: list[str]) -> str:
    return (
        f"{option}: {name} has none of the columns {', '.join(guesses)}; it has: {', '.join(there)}. "
        f"Name the right one with {option}"
    )


def _read_problem(row: Row, columns: Columns, require_gold: bool) -> Problem:
    question = _text(row, columns.question, "user").strip()
    if not question:
        raise ValueError(
            f"{row.place}: the question (column {columns.question!r}) is empty; fill it in or remove the row"
        )
    gold, thought = _read_answer(_gold_text(row, columns.answer))
    if not gold and require_gold:
        raise ValueError(
            f"{row.place}: the gold (column {columns.answer!r}) is empty; fill it in or remove the row, or "
            "use rewards that need no gold"
        )
    completion = _text(row, columns.completion, "assistant") or None
    if thought is None and columns.worked is not None:
        worked = _text(row, columns.worked, "assistant").strip()
        thought = _read_answer(worked)[1] or worked
    # A thought that brings its own tags would not read back as one completion.
    if completion is None and gold and thought and not any(tag in thought for tag in TAGS):
        completion = format_completion(thought, gold)
    cells = {name: row.values.get(name) for name in columns.every}  # rows of JSON may leave some out
    return Problem(question, gold or None, completion, cells)


def _text(row: Row, column: str | None, role: str) -> str:
    """The text of a cell, or of the last message of `role` where it holds a chat; "" where there is none."""
    value = row.values.get(column) if column else None
    if isinstance(value, list):
        said = [m.get("content") for m in value if isinstance(m, dict) and m.get("role") == role]
        value = said[-1] if said else None
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(
            f"{row.place}: column {column!r} must hold text or chat messages with role and content, "
            f"got {repr(value)[:80]}"
        )
    return value


def _gold_text(row: Row, column: str | None) -> str:
    """The text of an answer cell, "" where there is none; 72.0 is 72, as gaps turn a column into floats."""
    value = row.values.get(column) if column else None
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, (str, int, float)):
        raise ValueError(
            f"{row.place}: column {column!r} must hold one text or number as gold, got {repr(value)[:80]}"
        )
    return str(value).strip()


_CALCULATOR = re.compile(r"<<[^<>]*>>")
_LAST_LINE_GOLD = re.compile(r"(?:^|\n)[ \t]*####[ \t]*([^\n]*)$")


def _read_answer(text: str) -> tuple[str, str | None]:
    """Gold and thought of an answer cell; the thought is None where the answer is bare.

    MATH's form: the gold is in the last `\\boxed{}`, and all of the text is the thought. GSM8K's form: the
    last line is "#### 1,234"; the gold loses its thousands separators (1234), the thought its calculator
    marks.
    """
    boxed = _last_boxed(text)
    if boxed is not None:
        whole, gold = boxed
        return gold, None if text.strip("$. \n") == whole else text
    marked = _LAST_LINE_GOLD.search(text)
    if marked is not None:
        thought = _CALCULATOR.sub("", text[: marked.start()]).strip()
        return re.sub(r"(?<=\d),(?=\d{3})", "", marked[1]).strip(), thought or None
    return text, None


def _last_boxed(text: str) -> tuple[str, str] | None:
    r"""The last `\boxed{...}` of a text, whole and inside; None where there is none, or it is left open."""
    start = max(text.rfind(r"\boxed"), text.rfind(r"\fbox"))
    if start < 0:
        return None
    opening = re.compile(r"\\(?:boxed|fbox)\s*").match(text, start).end()
    if not text.startswith("{", opening):  # as in `\boxed 5$`
        inside = re.split(r"[$\n]", text[opening:])[0].rstrip(" .")
        return text[start:opening] + inside, inside
    depth = 0
    for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, opening):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start : brace.end()], text[opening + 1 : brace.start()].strip()
    return None


# ------------------------------------------------------------------------------------------------------------
# The order of training


@lru_cache(maxsize=4)
def problem_order(n: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The order in which an epoch visits n problems: a permutation that (n, seed, epoch) alone decide."""
    rng = random.Random(f"order {seed} {epoch}")
    luck = [rng.random() for _ in range(n)]
    return tuple(sorted(range(n), key=luck.__getitem__))


def take(problems: list[Problem], seed: int, start: int, count: int) -> list[Problem]:
    """The problems at positions `start` to `start + count` of the endless training stream.

    The stream is one shuffled epoch after the other. The position, the number of problems drawn so far, is
    all that a resumed run has to know.

    Args:
        problems: what to train on, not empty.
        seed: of the run.
        start: at least 0.
        count: how many.
    """
    n = len(problems)
    if not n or start < 0:
        raise ValueError(f"take needs problems and start >= 0, got {n} problems and start={start}")
    return [problems[problem_order(n, seed, i // n)[i % n]] for i in range(start, start + count)]
