from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import batches
from batches import micro_batches, pad_batch, plan_micro_batches


def test_prompts_end_and_completions_start_in_one_column():
    batch = pad_batch([[1, 2, 3], [4]], [[5], [6, 7]], pad_token_id=0)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 5, 0], [0, 0, 4, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert batch["completion_mask"].tolist() == [[True, False], [True, True]]
    assert [batch[name].dtype for name in batch] == [torch.int64, torch.int64, torch.bool]


def test_an_eos_counts_even_where_it_is_the_padding():
    eos = 9
    batch = pad_batch([[eos, 1], [2]], [[3, eos], [4, eos, eos, eos]], pad_token_id=eos)
    assert batch["input_ids"].tolist() == [[9, 1, 3, 9, 9, 9], [9, 2, 4, 9, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]]
    assert batch["completion_mask"].sum(1).tolist() == [2, 4]


def test_as_many_completions_as_prompts_are_asked_for():
    with pytest.raises(ValueError, match="shorter"):
        pad_batch([[1], [2]], [[3]], pad_token_id=0)


LENGTHS = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40)), min_size=1, max_size=12)


@given(LENGTHS, st.integers(1, 300), st.data())
def test_a_plan_holds_each_row_once_in_its_budget_longest_first(lengths, budget, data):
    rows = data.draw(st.lists(st.sampled_from(range(len(lengths))), unique=True))
    plan = plan_micro_batches(lengths, rows, budget)
    in_order = [row for chosen in plan for row in chosen]
    assert sorted(in_order) == sorted(rows)
    totals = [sum(lengths[row]) for row in in_order]
    assert totals == sorted(totals, reverse=True)
    for chosen in plan:
        batch = pad_batch([[1] * lengths[i][0] for i in chosen], [[1] * lengths[i][1] for i in chosen], 0)
        assert batch["input_ids"].numel() <= budget or len(chosen) == 1


def test_a_plan_fills_its_budget():
    assert plan_micro_batches([(2, 2), (9, 9), (2, 2), (2, 2)], range(4), 12) == [[1], [0, 2, 3]]
    assert plan_micro_batches([(4, 4)] * 5, range(5), 24) == [[0, 1, 2], [3, 4]]
    assert plan_micro_batches([(4, 4)] * 5, range(5), 23) == [[0, 1], [2, 3], [4]]
    # 8 tokens each, but side by side they are laid out as 6 + 6.
    assert plan_micro_batches([(6, 2), (2, 6)], range(2), 23) == [[0], [1]]
    assert plan_micro_batches([(6, 2), (2, 6)], range(2), 24) == [[0, 1]]


class FakeAccelerator:
    """Its contexts tell for which module gradients stay unsynchronised."""

    def no_sync(self, module):
        return nullcontext(module)


def unsynchronised(got):
    """The module of each micro-batch whose gradients stay where they are; None where they are shared."""
    return [context.enter_result for _, _, context in got]


def test_every_process_runs_equally_many_and_synchronises_on_the_last(monkeypatch):
    accelerator, policy = FakeAccelerator(), torch.nn.Linear(1, 1)
    sent = []
    monkeypatch.setattr(batches, "gather_object", lambda counts: sent.append(counts) or [4, *counts, 1])
    lengths = [(5, 5), (5, 4), (1, 2), (3, 3)]
    got = list(micro_batches(accelerator, policy, lengths, [0, 1, 3], token_budget=20))
    assert sent == [[2]]
    assert [(rows, scale) for rows, scale, _ in got] == [([0, 1], 1.0), ([3], 1.0), ([2], 0.0), ([2], 0.0)]
    assert unsynchronised(got) == [policy, policy, policy, None]


def test_a_process_without_a_row_still_takes_part(monkeypatch):
    accelerator, policy = FakeAccelerator(), torch.nn.Linear(1, 1)
    monkeypatch.setattr(batches, "gather_object", lambda counts: counts)
    got = list(micro_batches(accelerator, policy, [(2, 2), (1, 1)], [], token_budget=20))
    assert [(rows, scale) for rows, scale, _ in got] == [([1], 0.0)]
    assert unsynchronised(got) == [None]
