"""Data sets of the Hub, without a network: `datasets` loads a folder by the same call."""

import pytest
from test_data import rows_of, write_jsonl

import data
from data import HubSet, load_problems
from prompts import format_completion


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that stands for a Hub repository, and an empty cache for what is loaded from it."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "repository"
    folder.mkdir()
    return folder


def test_a_known_name_and_a_folder_of_the_same_files_are_the_same(hub, monkeypatch):
    rows = [{"question": f"q{i}", "answer": f"<<1+{i}={i + 1}>>so\n#### {i + 1}"} for i in range(40)]
    write_jsonl(hub / "train.jsonl", rows)
    write_jsonl(hub / "test.jsonl", rows[:7])
    monkeypatch.setitem(data.HUB_SETS, "gsm8k", HubSet(str(hub)))
    for split in data.SPLITS:
        assert load_problems("gsm8k", split) == load_problems(hub, split)
    assert len(load_problems("gsm8k", "train")) == 36


def test_heavy_columns_of_a_known_set_are_dropped(hub, monkeypatch):
    row = {"problem": "p", "solution": "s", "answer": "1", "generations": ["long"], "uuid": "u"}
    write_jsonl(hub / "data.jsonl", [row, {**row, "problem": "p2"}])
    monkeypatch.setitem(data.HUB_SETS, "openr1-math", data.HUB_SETS["openr1-math"]._replace(name=str(hub)))
    (problem,) = load_problems("openr1-math", "train")
    assert problem.completion == format_completion("s", "1")
    assert problem.columns.keys() == {"problem", "solution", "answer", "uuid"}


def test_a_hub_set_with_one_split_is_one_piece(hub, monkeypatch):
    write_jsonl(hub / "data.jsonl", rows_of(20))
    monkeypatch.setitem(data.HUB_SETS, "math", HubSet(str(hub)))
    assert len(load_problems("math", "train")) == 18
    with pytest.warns(UserWarning, match="comes in one piece"):
        assert len(load_problems("math", "test")) == 20


def test_hub_rows_without_a_gold_are_left_out_and_counted(hub, monkeypatch):
    write_jsonl(hub / "test.jsonl", [*rows_of(3), {"question": "open", "answer": None, "level": "hard"}])
    monkeypatch.setitem(data.HUB_SETS, "math", HubSet(str(hub)))
    with pytest.warns(UserWarning, match="left out 1 of 4 rows.*row 4: the gold"):
        assert len(load_problems("math", "test")) == 3


def test_a_config_that_is_not_there_is_an_error_with_its_cause(hub, monkeypatch):
    write_jsonl(hub / "test.jsonl", rows_of(3))
    monkeypatch.setitem(data.HUB_SETS, "math", HubSet(str(hub), "algebra"))
    with pytest.raises(
        ValueError, match=r"cannot load .*:algebra.* BuilderConfig 'algebra' not found"
    ) as caught:
        load_problems("math", "test")
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_hub_that_cannot_be_reached_is_an_error_with_a_remedy(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def unreachable(name, config):
        asked.append((name, config))
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    for name in ("gsm8k", "openai/gsm8k", "openai/gsm8k:socratic", "someone/something"):
        with pytest.raises(ValueError, match="Check the name.*gated.*Without a network") as caught:
            load_problems(name, "train")
        assert isinstance(caught.value.__cause__, ConnectionError)
    assert asked == [
        ("openai/gsm8k", "main"),
        ("openai/gsm8k", "main"),
        ("openai/gsm8k", "socratic"),
        ("someone/something", None),
    ]
