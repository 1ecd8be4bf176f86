import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import batches
from batches import MicroBatches, pad_batch, plan_micro_batches
from runs.config import RunStopped
from runs.signals import StepStopped


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
    assert all(later < 1.2 * earlier for earlier, later in itertools.pairwise(totals))
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


# ------------------------------------------------------------------------------------------------------------
# Parts that memory holds

CPU = SimpleNamespace(device=torch.device("cpu"), num_processes=1, is_fsdp2=False)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr(batches, "gather_object", lambda values: values)


def test_every_process_works_through_equally_many_parts(monkeypatch):
    sent = []
    monkeypatch.setattr(
        batches, "gather_object", lambda v: sent.append(v) or ([4, *v, 1] if len(sent) == 1 else v)
    )
    got = []
    lengths = [(5, 5), (5, 4), (1, 2), (3, 3)]
    MicroBatches(CPU, 20).run(lengths, [0, 1, 3], lambda rows, scale: got.append((rows, scale)))
    assert sent[0] == [2]
    assert got == [([0, 1], 1.0), ([3], 1.0), ([2], 0.0), ([2], 0.0)]


def test_a_process_without_a_row_still_takes_part():
    got = []
    MicroBatches(CPU, 20).run([(2, 2), (1, 1)], [], lambda rows, scale: got.append((rows, scale)))
    assert got == [([1], 0.0)]


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    MemoryError(),
    RuntimeError("std::bad_alloc"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_where_memory_runs_out_everything_is_done_again_in_smaller_parts(error):
    done, restarts = [], []

    def work(rows, scale):
        if len(rows) > 2 or (3 in rows and len(rows) > 1):
            raise error
        done.append(rows)

    micro_batches = MicroBatches(CPU, None)
    lengths = [(4, 4)] * 4
    micro_batches.run(lengths, range(4), work, lambda: restarts.append(list(done)) or done.clear())
    assert done == [[0], [1], [2], [3]]
    assert restarts == [[], [[0, 1]]]  # four at once, then two at once of which the second failed
    assert micro_batches.memory == [None, 8]
    # A resume begins where this one ended, another configuration does not.
    assert MicroBatches(CPU, None, micro_batches.memory).tokens == 8
    assert MicroBatches(CPU, 64, micro_batches.memory).tokens == 64


def test_another_process_running_out_restarts_this_one(monkeypatch):
    monkeypatch.setattr(
        batches, "gather_object", lambda v: [*v, (None, True, 1)] if v == [(None, False, 4)] else v
    )
    done = []
    micro_batches = MicroBatches(CPU, 32)
    micro_batches.run([(4, 4)] * 4, range(4), lambda rows, scale: done.append(rows), done.clear)
    assert done == [[0, 1], [2, 3]]


def test_another_process_told_to_stop_stops_this_one(monkeypatch):
    monkeypatch.setattr(
        batches, "gather_object", lambda v: [*v, (15, False, 4)] if v == [(None, False, 4)] else v
    )
    done = []
    with pytest.raises(StepStopped):
        MicroBatches(CPU, 32).run([(4, 4)] * 4, range(4), lambda rows, scale: done.append(rows), done.clear)
    assert done == []


def test_a_single_sequence_that_does_not_fit_stops_the_run_with_the_remedy():
    def work(rows, scale):
        raise OUT_OF_MEMORY[0]

    with pytest.raises(
        RunStopped, match="single sequence of up to 9 tokens; give --gradient_checkpointing true"
    ):
        MicroBatches(CPU, 9).run([(4, 5), (1, 1)], range(2), work)


def test_any_other_error_is_a_bug():
    def work(rows, scale):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        MicroBatches(CPU, 20).run([(4, 5)], range(1), work)
