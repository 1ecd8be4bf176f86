"""Reading problems from files and folders, holding out validation, and the order of training."""

import csv
import json
import os
import random
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import data
from data import Problem, load_problems, problem_order, read_problems, take
from prompts import format_completion, parse_completion
from tasks import TASKS, make_problems


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def write_parquet(path, rows):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


WRITERS = {".jsonl": write_jsonl, ".csv": write_csv, ".parquet": write_parquet}


def rows_of(n, start=0):
    return [
        {"question": f"What is {i} + 1?", "answer": str(i + 1), "level": "easy"}
        for i in range(start, start + n)
    ]


def read_one(tmp_path, row, **kwargs):
    """The problem that a file with this one row makes."""
    return load_problems(write_jsonl(tmp_path / "test.jsonl", [row]), "test", **kwargs)[0]


# ------------------------------------------------------------------------------------------------------------
# Built-in tasks


@pytest.mark.parametrize("task", TASKS)
def test_a_built_in_task_comes_through_the_same_door(task):
    assert load_problems(task, "train", seed=2, limit=5) == make_problems(task, "train", seed=2, limit=5)


def test_options_reach_the_task():
    (problem,) = load_problems("arithmetic", "train", limit=1, options={"terms": 5})
    assert len(re.findall(r"\d+", problem.question)) == 5


def test_built_in_tasks_import_neither_torch_nor_datasets():
    code = (
        "import sys, data; data.load_problems('arithmetic', 'train', limit=3);"
        "print(sorted({'torch', 'transformers', 'datasets', 'pyarrow', 'pandas'} & set(sys.modules)))"
    )
    root = Path(data.__file__).parent
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------------------
# Files and folders


@pytest.mark.parametrize("extension", WRITERS)
@pytest.mark.parametrize("stem", ["problems", "train", "validation"])
@pytest.mark.filterwarnings("error")
def test_a_file_of_questions_is_read_whole_and_in_order_whatever_its_name(tmp_path, extension, stem):
    rows = [{"problem": f"What is {i} + 1?"} for i in range(30)]
    path = WRITERS[extension](tmp_path / f"{stem}{extension}", rows)
    problems = read_problems(path)
    assert [problem.question for problem in problems] == [row["problem"] for row in rows]
    assert {problem.gold for problem in problems} == {None}


def test_a_file_of_questions_that_cannot_be_read_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file 'arithmetic'; give one of questions \(\.jsonl"):
        read_problems("arithmetic")
    path = tmp_path / "problems.jsonl"
    path.write_text('{"question": "1 + 1"}\n{"question": " "}\n')
    with pytest.raises(ValueError, match=rf"{path}:2: the question .*is empty"):
        read_problems(str(path))
    path.write_text('{"question": "1 + 1"}\n{"question"\n')
    with pytest.raises(ValueError, match=rf"{path}:2: not a line of JSON"):
        read_problems(str(path))


@pytest.mark.parametrize("extension", WRITERS)
def test_a_file_of_each_kind_reads_back(tmp_path, extension):
    rows = [
        {"question": 'How many "ü"\nare there?', "answer": "007", "level": "None"},
        {"question": "And now, with a comma\u2028and a line separator?", "answer": "1/2", "level": "hard"},
    ]
    path = WRITERS[extension](tmp_path / f"test{extension}", rows)
    assert load_problems(path, "test") == [Problem(row["question"], row["answer"], None, row) for row in rows]


@pytest.mark.parametrize("extension", WRITERS)
def test_a_folder_of_named_files_has_their_splits(tmp_path, extension):
    write = WRITERS[extension]
    write(tmp_path / f"train{extension}", rows_of(30))
    write(tmp_path / f"val{extension}", rows_of(4, 100))
    write(tmp_path / f"test{extension}", rows_of(5, 200))
    (tmp_path / "README.md").write_text("not data")
    loaded = {split: load_problems(str(tmp_path), split) for split in data.SPLITS}
    assert [len(loaded[split]) for split in data.SPLITS] == [30, 30, 4, 5]
    assert loaded["cold_start"] == loaded["train"]
    assert loaded["test"][0] == Problem("What is 200 + 1?", "201", None, rows_of(1, 200)[0])


def test_shards_are_joined_and_exact_names_win_over_longer_ones(tmp_path):
    write_jsonl(tmp_path / "train-00000-of-00002.jsonl", rows_of(3))
    write_jsonl(tmp_path / "train-00001-of-00002.jsonl", rows_of(3, 3))
    write_jsonl(tmp_path / "my_test.jsonl", rows_of(2, 50))
    assert len(load_problems(tmp_path, "train")) + len(load_problems(tmp_path, "validation")) == 6
    assert len(load_problems(tmp_path, "test")) == 2
    write_jsonl(tmp_path / "test.jsonl", rows_of(4, 70))
    assert len(load_problems(tmp_path, "test")) == 4


def test_without_a_validation_file_a_tenth_of_train_is_held_out(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", rows_of(300))
    write_jsonl(tmp_path / "test.jsonl", rows_of(7, 1000))
    train, validation, test = (load_problems(tmp_path, split) for split in ("train", "validation", "test"))
    assert (len(train), len(validation), len(test)) == (270, 30, 7)
    assert {p.question for p in train + validation} == {row["question"] for row in rows_of(300)}


def test_five_hundred_are_held_out_of_a_large_set(tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", rows_of(5200))
    assert len(load_problems(path, "validation")) == 500
    assert len(load_problems(path, "train")) == 4700


def test_what_is_held_out_depends_on_the_questions_alone(tmp_path):
    rows = rows_of(100)
    before = load_problems(write_jsonl(tmp_path / "train.jsonl", rows), "validation", seed=0)
    random.Random(0).shuffle(rows)
    after = load_problems(write_jsonl(tmp_path / "train.jsonl", rows), "validation", seed=1)
    assert {p.question for p in before} == {p.question for p in after}
    # A sample, not the head of the file.
    assert {p.question for p in before} != {row["question"] for row in rows_of(10)}


def test_the_same_question_twice_stays_on_one_side(tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", rows_of(40) + rows_of(40))
    train, validation = (load_problems(path, split) for split in ("train", "validation"))
    assert len(validation) == 8
    assert not {p.question for p in train} & {p.question for p in validation}


def test_a_file_in_one_piece_trains_on_what_it_does_not_validate_on(tmp_path):
    path = write_jsonl(tmp_path / "problems.jsonl", rows_of(60))
    train, validation = (load_problems(path, split) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (54, 6)
    assert not {p.question for p in train} & {p.question for p in validation}


def test_a_file_in_one_piece_is_evaluated_whole_with_a_warning(tmp_path):
    path = write_jsonl(tmp_path / "latest.jsonl", rows_of(60))
    with pytest.warns(UserWarning, match="comes in one piece.*split 'validation'"):
        assert len(load_problems(path, "test")) == 60
    named = write_jsonl(tmp_path / "amc_test.jsonl", rows_of(60))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_problems(named, "test")) == 60


def test_a_file_has_no_split_that_its_name_denies(tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", rows_of(20))
    with pytest.raises(ValueError, match="has no split 'test'; it has: train, validation"):
        load_problems(train, "test")
    test = write_jsonl(tmp_path / "test.jsonl", rows_of(20))
    for split in ("cold_start", "train", "validation"):
        with pytest.raises(ValueError, match="it has: test. Ask for one of these"):
            load_problems(test, split)


def test_limit_takes_a_nested_sample_in_the_order_of_the_file(tmp_path):
    path = write_jsonl(tmp_path / "test.jsonl", rows_of(200))
    everything, ten, thirty = (load_problems(path, "test", limit=limit) for limit in (999, 10, 30))
    assert len(everything) == 200
    assert (len(ten), len(thirty)) == (10, 30)
    assert [p for p in everything if p in thirty] == thirty
    assert [p for p in thirty if p in ten] == ten
    assert ten != everything[:10]


# ------------------------------------------------------------------------------------------------------------
# From rows to problems


def test_gsm8k_rows_become_thought_and_gold(tmp_path):
    answer = "He sold 48/2 = <<48/2=24>>24 clips.\nIn all 1,000+<<1000+24=1024>>24.\n#### 1,024"
    problem = read_one(tmp_path, {"question": "How many clips?", "answer": answer})
    assert problem.gold == "1024"
    assert problem.completion == format_completion("He sold 48/2 = 24 clips.\nIn all 1,000+24.", "1024")


@pytest.mark.parametrize(
    ("solution", "gold"),
    [
        (r"So $x = \boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"First \boxed{3}, no: \boxed{4}", "4"),
        (r"The set is $\boxed{\left\{1, 2\right\}}$.", r"\left\{1, 2\right\}"),
        (r"An interval \boxed{\left[0, \sqrt{2}\right\}} indeed", r"\left[0, \sqrt{2}\right\}"),
        (r"Short form $\boxed 5$.", "5"),
        (r"Old form \fbox{x^{2^{3}}}.", "x^{2^{3}}"),
    ],
)
def test_math_rows_take_the_gold_from_the_last_box(tmp_path, solution, gold):
    problem = read_one(tmp_path, {"problem": "?", "level": "Level 5", "solution": solution})
    assert (problem.question, problem.gold) == ("?", gold)
    assert problem.completion == format_completion(solution, gold)
    assert problem.columns == {"problem": "?", "level": "Level 5", "solution": solution}


def test_a_bare_box_is_no_thought(tmp_path):
    problem = read_one(tmp_path, {"problem": "?", "answer": r"$\boxed{7}$."})
    assert (problem.gold, problem.completion) == ("7", None)


def test_a_solution_beside_the_answer_becomes_the_thought(tmp_path):
    row = {"problem": "?", "solution": "Half of four. #### is no mark here", "answer": "2", "uuid": "u"}
    problem = read_one(tmp_path, row)
    assert problem.gold == "2"
    assert problem.completion == format_completion(row["solution"], "2")
    assert problem.columns == row


def test_a_solution_with_tags_of_its_own_makes_no_completion(tmp_path):
    problem = read_one(tmp_path, {"problem": "?", "solution": "<think>x</think>", "answer": "2"})
    assert problem.completion is None


def test_a_completion_column_is_taken_as_it_is(tmp_path):
    text = " <think>\nas sampled\n</think>\n<answer>2</answer>\n"
    for gold in ("gold", "answer"):
        row = {"question": "?", gold: "2", "completion": text, "solution": "other"}
        assert read_one(tmp_path, row).completion == text
    row = {
        "prompt": [{"role": "user", "content": "?"}],
        "completion": [{"role": "assistant", "content": text}],
        "answer": "2",
    }
    assert read_one(tmp_path, row).completion == text


def test_a_prompt_of_messages_asks_its_last_user_message(tmp_path):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "What is 1 + 1?"},
    ]
    row = {"prompt": messages, "ground_truth": "2", "id": 7}
    assert read_one(tmp_path, row) == Problem("What is 1 + 1?", "2", None, row)


@pytest.mark.parametrize(
    ("value", "gold"), [(72, "72"), (72.0, "72"), (0.5, "0.5"), (["x"], "x"), (" 3 ", "3")]
)
def test_golds_become_plain_text(tmp_path, value, gold):
    assert read_one(tmp_path, {"question": "?", "answer": value}).gold == gold


@pytest.mark.parametrize(
    "row",
    [
        {"Problem": "q", "Answer": "g"},
        {"query": "q", "target": "g"},
        {"instruction": "q", "label": "g"},
        {"problem": "q", "final_answer": "g", "solution": "s"},
        {"question": "q", "gold": "g", "answer": "s"},
    ],
)
def test_columns_are_guessed(tmp_path, row):
    problem = read_one(tmp_path, row)
    assert (problem.question, problem.gold) == ("q", "g")


def test_named_columns_beat_the_guess(tmp_path):
    row = {"question": "no", "answer": "no", "task": "q", "reply": "g"}
    problem = read_one(tmp_path, row, question_column="task", answer_column="reply")
    assert problem == Problem("q", "g", None, row)


def test_data_without_golds_loads_when_none_is_needed(tmp_path):
    assert read_one(tmp_path, {"prompt": "q", "style": 1}, require_gold=False) == Problem(
        "q", None, None, {"prompt": "q", "style": 1}
    )
    assert read_one(tmp_path, {"prompt": "q", "answer": None}, require_gold=False).gold is None
    with pytest.raises(ValueError, match="answer_column: .* it has: style. Name the right .* need no gold"):
        read_one(tmp_path, {"prompt": "q", "style": 1})


# ------------------------------------------------------------------------------------------------------------
# Errors at the door


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("arithmetik", "train"),
            "unknown 'arithmetik' (did you mean 'arithmetic'?); allowed: arithmetic, word_",
        ),
        (("gsm-8k", "train"), "did you mean 'gsm8k'?"),
        (
            ("arithmetic", "vaildation"),
            "split must be one of cold_start, train, validation, test; got 'vaildation' (did",
        ),
    ],
)
def test_an_unknown_name_is_met_with_the_nearest(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_problems(*arguments)


def test_arguments_that_do_not_go_together_are_refused(tmp_path):
    path = write_jsonl(tmp_path / "test.jsonl", rows_of(3))
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        load_problems(path, "test", limit=0)
    with pytest.raises(ValueError, match="options are for the built-in tasks"):
        load_problems(path, "test", options={"terms": 3})
    with pytest.raises(ValueError, match="arithmetic is made here"):
        load_problems("arithmetic", "test", answer_column="gold")


def test_missing_files_and_folders_are_named(tmp_path):
    for missing in ("none.jsonl", "no/where.csv", "./nothing", str(tmp_path / "none")):
        with pytest.raises(FileNotFoundError, match=re.escape(f"no file or folder {missing!r}")):
            load_problems(missing, "train")
    with pytest.raises(FileNotFoundError, match=r"holds no data file \(\.jsonl, \.csv, \.parquet\)"):
        load_problems(str(tmp_path), "train")


def test_folders_whose_files_leave_a_doubt_are_refused(tmp_path):
    write_jsonl(tmp_path / "train_a.jsonl", rows_of(3))
    write_jsonl(tmp_path / "extra.jsonl", rows_of(3))
    with pytest.raises(ValueError, match="for the splits train and others that name none: extra.jsonl"):
        load_problems(tmp_path, "train")
    write_jsonl(tmp_path / "train.jsonl", rows_of(3))
    write_csv(tmp_path / "train.csv", rows_of(3))
    with pytest.raises(ValueError, match="several files for train: train.csv and train.jsonl"):
        load_problems(tmp_path, "train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "x", "must end in one of .jsonl, .csv, .parquet, got '.txt'"),
        ("a.jsonl", "", "has no rows"),
        ("a.jsonl", '{"question": "q", "answer": "1"}\n\n{"question"\n', "a.jsonl:3: not a line of JSON"),
        ("a.jsonl", '["q", "1"]\n', "a.jsonl:1: a line must be an object"),
        ("a.jsonl", b'{"question": "\xff", "answer": "1"}\n', "a.jsonl:1: not a line of JSON in UTF-8"),
        ("a.jsonl", '{"q": "q", "answer": "1"}\n', "question_column: "),
        (
            "a.jsonl",
            '{"q": "q", "answer": "1"}\n',
            "it has: q, answer. Name the right one with question_column",
        ),
        (
            "a.jsonl",
            '{"question": "q", "reply": "1"}\n',
            "it has: reply. Name the right one with answer_column",
        ),
        (
            "a.jsonl",
            '{"question": "q", "answer": "1"}\n{"question": " ", "answer": "1"}\n',
            "a.jsonl:2: the question",
        ),
        (
            "a.jsonl",
            '{"question": "q", "answer": "1"}\n{"question": "q"}\n',
            "a.jsonl:2: the gold (column 'answer')",
        ),
        (
            "a.jsonl",
            '{"question": "q", "answer": "so\\n#### "}\n',
            "a.jsonl:1: the gold (column 'answer') is empty",
        ),
        ("a.jsonl", '{"question": 5, "answer": "1"}\n', "a.jsonl:1: column 'question' must hold text"),
        (
            "a.jsonl",
            '{"question": "q", "answer": {"x": 1}}\n',
            "a.jsonl:1: column 'answer' must hold one text",
        ),
        ("a.csv", "question,answer\n", "has no rows"),
        ("a.csv", "question,answer\nq,1\nq\n", "a.csv:3: the row does not have the 2 cells of the header"),
        ("a.csv", "question,answer\nq,1,2\n", "a.csv:2: the row does not have the 2 cells"),
        ("a.csv", 'question,answer\nq,"1"2\n', "a.csv:2: not CSV"),
        ("a.csv", b"question,answer\nq,\xff\n", "not CSV in UTF-8"),
        ("a.csv", "question,answer\nq,\n", "a.csv:2: the gold (column 'answer') is empty"),
        ("a.parquet", "not parquet", "a.parquet: not a Parquet file"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*comes in one piece")
def test_a_bad_file_is_told_where_it_is_bad(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(message)):
        load_problems(str(path), "test")


def test_a_named_column_must_exist(tmp_path):
    path = write_jsonl(tmp_path / "test.jsonl", rows_of(3))
    for option in ("question_column", "answer_column"):
        with pytest.raises(
            ValueError, match=f"{option}: there is no column 'reply'; choose one of: .*answer, level|level"
        ):
            load_problems(path, "test", **{option: "reply"})


def test_one_question_is_too_few_to_hold_out(tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", rows_of(1))
    assert len(load_problems(path, "train")) == 1
    with pytest.raises(ValueError, match="a single question"):
        load_problems(path, "validation")


# ------------------------------------------------------------------------------------------------------------
# The order of training


def test_every_epoch_is_a_permutation_of_its_own():
    epochs = [problem_order(50, seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert all(sorted(order) == list(range(50)) for order in epochs)
    assert len(set(epochs)) == 6


def test_the_stream_restarts_anywhere_from_one_number():
    problems = [Problem(str(i), str(i)) for i in range(7)]
    whole = take(problems, 5, 0, 40)
    for start in range(33):
        assert take(problems, 5, start, 7) == whole[start : start + 7]
    for epoch in range(5):
        assert sorted(p.question for p in whole[7 * epoch : 7 * epoch + 7]) == list("0123456")
    assert take(problems, 6, 0, 40) != whole


def test_the_stream_leaves_the_global_random_state_alone():
    problems = [Problem(str(i), str(i)) for i in range(9)]
    random.seed(0)
    before = random.getstate()
    problem_order.cache_clear()
    first = take(problems, 0, 0, 9)
    assert random.getstate() == before
    random.seed(1)
    problem_order.cache_clear()
    assert take(problems, 0, 0, 9) == first


def test_an_epoch_is_shuffled_once():
    problems = [Problem(str(i), str(i)) for i in range(1000)]
    problem_order.cache_clear()
    for start in range(0, 2000, 8):
        take(problems, 0, start, 8)
    assert problem_order.cache_info().misses == 2


def test_an_empty_stream_is_refused():
    with pytest.raises(ValueError, match="got 0 problems"):
        take([], 0, 0, 1)
    with pytest.raises(ValueError, match="start=-1"):
        take([Problem("q", "g")], 0, -1, 1)


# ------------------------------------------------------------------------------------------------------------
# GSM8K itself


@pytest.fixture(scope="module")
def gsm8k():
    folder = os.environ.get("GSM8K_DIR")
    if not folder:
        pytest.skip("GSM8K_DIR is not set: no copy of GSM8K's train.jsonl and test.jsonl to read")
    return {split: load_problems(folder, split) for split in data.SPLITS}


def test_gsm8k_has_its_sizes_and_splits_share_no_question(gsm8k):
    assert {split: len(problems) for split, problems in gsm8k.items()} == {
        "cold_start": 6973,
        "train": 6973,
        "validation": 500,
        "test": 1319,
    }
    train, validation, test = (
        {p.question for p in gsm8k[split]} for split in ("train", "validation", "test")
    )
    assert not train & validation
    assert not (train | validation) & test


def test_every_gsm8k_gold_is_a_number_and_every_completion_reads_back(gsm8k):
    for problems in gsm8k.values():
        for problem in problems:
            assert re.fullmatch(r"-?\d+(\.\d+)?", problem.gold), problem.gold
            parsed = parse_completion(problem.completion)
            assert parsed.well_formed
            assert parsed.answer == problem.gold
            assert "<<" not in problem.completion
            assert "####" not in problem.completion
