"""Faults planted in whole runs: what is not finite, and what teaches nothing."""

import json

import pytest
import torch
from quick import lines, quick_grpo, quick_sft, same, weights

import optimizers as optimizers_module
from runs.config import RunStopped
from train_grpo import main as train_grpo
from train_sft import main as train_sft


def poison(patch, train, steps):
    """Make the gradient of one weight NaN in the updates of these steps, counted from 0."""
    done = []
    take_step = optimizers_module.take_step

    def poisoned(accelerator, policy, *rest):
        if len(done) in steps:
            next(p for p in policy.parameters() if p.grad is not None).grad.view(-1)[0] = float("nan")
        done.append(1)
        return take_step(accelerator, policy, *rest)

    patch.setattr("updates.take_step" if train is train_grpo else "train_sft.take_step", poisoned)


@pytest.mark.slow
@pytest.mark.parametrize(("train", "quick"), [(train_grpo, quick_grpo), (train_sft, quick_sft)])
def test_an_update_that_is_not_finite_is_left_out_and_kept_for_inspection(
    train, quick, tmp_path, monkeypatch, capsys
):
    poison(monkeypatch, train, {1})
    config = quick(tmp_path / "run")
    assert train(config) == 0
    assert all(torch.isfinite(weight).all() for weight in weights(tmp_path / "run" / "final").values())
    told = lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["train/bad_updates"] for line in told] == [0, 1] + [0] * (len(told) - 2)
    assert "policy/loss" not in told[1]
    incident = json.loads((tmp_path / "run" / "incidents" / "step-000002.json").read_text())
    assert incident["step"] == 2
    assert "nan" in incident["causes"][0]
    assert len(incident["rows"]) >= 4
    assert "step 2: 1 of 1 updates left out" in capsys.readouterr().out


@pytest.mark.slow
def test_too_many_bad_updates_stop_the_run_with_its_weights_unharmed(tmp_path, monkeypatch):
    poison(monkeypatch, train_grpo, {1, 2, 3})
    with pytest.raises(RunStopped, match=r"3 updates in a row.*nan.*--learning_rate 0.0002"):
        train_grpo(quick_grpo(tmp_path / "run", total_steps=6, max_bad_updates=3, save_every=3))
    after = weights(tmp_path / "run" / "checkpoints" / "step-000003")
    monkeypatch.undo()
    assert train_grpo(quick_grpo(tmp_path / "healthy", total_steps=1)) == 0
    assert same(after, weights(tmp_path / "healthy" / "final"))


@pytest.mark.slow
def test_a_run_that_learns_nothing_says_why_once(tmp_path, capsys):
    config = quick_grpo(tmp_path / "run", total_steps=14, rewards={"correct": 1.0}, eval_every=0)
    assert train_grpo(config) == 0  # random weights: no answer, no end
    found = [line["watchdog"] for line in lines(tmp_path / "run" / "metrics.jsonl") if "watchdog" in line]
    assert [[finding["cause"] for finding in step] for step in found] == [["no_signal", "truncated"]]
    printed = capsys.readouterr().out
    assert printed.count("watchdog: no_signal: in 100% of the groups") == 1
    assert "Begin with a cold start" in printed
    assert "no_signal: in 100%" in (tmp_path / "run" / "report.html").read_text()
