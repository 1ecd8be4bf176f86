"""A run told to stop, wherever it is: it saves what is in hand, and goes on from there to the same bits."""

import signal

import pytest
from quick import lines, quick_grpo, quick_sft, same, weights

import train_sft as train_sft_module
import updates
from inference.engine import Seats
from runs.checkpoint import load_state
from train_grpo import main as train_grpo
from train_sft import main as train_sft


def stop_at(patch, place, name, call):
    """Have the process told to stop when something is called for the n-th time."""
    calls = []
    work = getattr(place, name)

    def told(*arguments, **named):
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return work(*arguments, **named)

    patch.setattr(place, name, told)
    return calls


def told(row):
    """What a run tells but for time and memory."""
    clocks = ("time/", "memory/", "rollout/tokens_per_s")
    return {key: value for key, value in row.items() if not key.startswith(clocks)}


# Eight micro-batches an update; in the second step of two updates: within its first, and within its second.
MINIBATCHES = {"updates_per_rollout": 2, "micro_batch_tokens": 32, "kl_coef": 0.1, "warmup_steps": 0}
REPLAY = {"replay_groups": 2, "epochs_per_rollout": 2}
PPO = {"algo": "ppo", "critic": "separate", "warmup_steps": 0, "micro_batch_tokens": 32}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "place", "name", "call", "steps", "in_hand"),
    [
        (MINIBATCHES, updates, "micro_loss", 19, 1, 0),
        (MINIBATCHES, updates, "micro_loss", 27, 1, 1),
        (MINIBATCHES | REPLAY, updates, "take_step", 7, 1, 3),
        (PPO, updates, "take_step", 7, 1, 3),
        (MINIBATCHES, Seats, "write", 12 + 6, 1, None),  # the sixth token of the second step
        ({"algo": "dapo", "max_refills": 1, "updates_per_rollout": 2}, Seats, "write", 3 * 12 + 6, 1, None),
    ],
)
def test_a_step_stopped_in_the_middle_goes_on_to_the_same_bits(
    changes, place, name, call, steps, in_hand, tmp_path, monkeypatch
):
    changes = {"eval_every": 0, "save_every": 9, **changes}
    assert train_grpo(quick_grpo(tmp_path / "whole", **changes)) == 0
    with monkeypatch.context() as patch:
        calls = stop_at(patch, place, name, call)
        assert train_grpo(quick_grpo(tmp_path / "run", **changes)) == 143
    assert len(calls) == call  # at once
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert saved.name == f"step-{steps:06d}"
    held = load_state(saved)["memory"].get("in_hand")
    assert (held and len(held[0]["updates"])) == in_hand
    assert train_grpo(quick_grpo(tmp_path / "run", **changes)) == 0
    assert same(weights(tmp_path / "whole" / "final"), weights(tmp_path / "run" / "final"))
    for file in ("metrics.jsonl", "rollouts.jsonl"):
        whole, resumed = (lines(tmp_path / run / file) for run in ("whole", "run"))
        assert [told(row) for row in whole] == [told(row) for row in resumed]


@pytest.mark.slow
def test_a_cold_start_stopped_within_an_update_does_it_again(tmp_path, monkeypatch):
    changes = {"micro_batch_tokens": 64, "eval_every": 0, "save_every": 9}
    assert train_sft(quick_sft(tmp_path / "whole", **changes)) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, train_sft_module, "loss_weights", 12)
        assert train_sft(quick_sft(tmp_path / "run", **changes)) == 143
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 1
    assert train_sft(quick_sft(tmp_path / "run", **changes)) == 0
    assert same(weights(tmp_path / "whole" / "final"), weights(tmp_path / "run" / "final"))


@pytest.mark.slow
def test_an_evaluation_stopped_in_the_middle_is_held_again(tmp_path, monkeypatch):
    changes = {"save_every": 9, "eval_every": 2, "total_steps": 3}
    assert train_grpo(quick_grpo(tmp_path / "whole", **changes)) == 0
    with monkeypatch.context() as patch:
        # Twelve tokens before the first step, as many in each of two, and half of the next answers'.
        stop_at(patch, Seats, "write", 3 * 12 + 6)
        assert train_grpo(quick_grpo(tmp_path / "run", **changes)) == 143
    assert [row["step"] for row in lines(tmp_path / "run" / "eval.jsonl")] == [0]
    assert train_grpo(quick_grpo(tmp_path / "run", **changes)) == 0
    assert lines(tmp_path / "run" / "eval.jsonl") == lines(tmp_path / "whole" / "eval.jsonl")
    assert same(weights(tmp_path / "whole" / "final"), weights(tmp_path / "run" / "final"))
