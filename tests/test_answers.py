"""Answers on disk: kept as they come, found again, never taken for those of another question or model."""

import pytest

from answers import AnswerBook, gaps, key_of
from data import Problem
from exam import Answer
from inference.formats import weights_stamp

PROBLEMS = [Problem(f"{n} + 1 = ?", str(n + 1)) for n in range(4)]


def answer(text):
    return Answer(text, 3, False, True, True, True, "1")


@pytest.mark.parametrize(
    ("known", "missing"),
    [
        (set(), [(2, 7)]),
        ({2, 3, 4, 5, 6}, []),
        ({3, 6}, [(2, 3), (4, 6)]),
        ({0, 2, 9}, [(3, 7)]),
    ],
)
def test_gaps_are_what_is_not_known(known, missing):
    assert list(gaps(known, 2, 7)) == missing


def test_answers_are_found_again_by_their_key_and_problem(tmp_path):
    book = AnswerBook(tmp_path)
    book.keep("a", 0, PROBLEMS[0], [answer("größer"), answer("2")], model="m", kind="sampled")
    book.keep("a", 2, PROBLEMS[2], [answer("3"), answer("4")])
    book.keep("b", 1, PROBLEMS[1], [answer("other")])
    AnswerBook(tmp_path, process=1).keep("a", 3, PROBLEMS[3], [answer("5"), answer("6")])
    again = AnswerBook(tmp_path)
    assert again.known("a", PROBLEMS) == {
        0: [answer("größer"), answer("2")],
        2: [answer("3"), answer("4")],
        3: [answer("5"), answer("6")],
    }
    assert again.known("a", PROBLEMS[:1]).keys() == {0}
    changed = [PROBLEMS[0], PROBLEMS[1], Problem(PROBLEMS[2].question, "another gold"), PROBLEMS[3]]
    assert again.known("a", changed).keys() == {0, 3}
    assert again.known("c", PROBLEMS) == {}


def test_a_line_that_was_cut_off_costs_its_problem_alone(tmp_path):
    book = AnswerBook(tmp_path)
    for number in (0, 1):
        book.keep("a", number, PROBLEMS[number], [answer("x")])
    whole = book.file.read_bytes()
    book.file.write_bytes(whole[:-9])
    again = AnswerBook(tmp_path)
    assert again.known("a", PROBLEMS).keys() == {0}
    again.keep("a", 1, PROBLEMS[1], [answer("y")])
    assert AnswerBook(tmp_path).known("a", PROBLEMS) == {0: [answer("x")], 1: [answer("y")]}


def test_without_a_folder_nothing_is_kept():
    book = AnswerBook(None)
    book.keep("a", 0, PROBLEMS[0], [answer("x")])
    assert book.known("a", PROBLEMS) == {}


def test_new_weights_have_another_key(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"1")
    first = key_of(model="m", stamp=weights_stamp(str(tmp_path)))
    assert first == key_of(stamp=weights_stamp(str(tmp_path)), model="m")
    (tmp_path / "model.safetensors").write_bytes(b"12")
    assert key_of(model="m", stamp=weights_stamp(str(tmp_path))) != first
