"""The folder of a run as its files tell it, written by hand: for the tests of whatever reads runs."""

import json


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def metrics_row(step, **changes):
    return {
        "step": step,
        "train/reward": step / 100,
        "train/accuracy": step / 100,
        "rewards/correct": step / 100,
        "rewards/format": 1.0,
        "rewards/undecided_fraction": 0.0,
        "rollout/zero_variance_groups": 0.5,
        "policy/loss": 1 / step,
        "policy/grad_norm": 0.5,
        "time/generate_s": 1.5,
        "time/update_s": 0.5,
        **changes,
    }


def evaluation(step, accuracy):
    return {
        "step": step,
        "set": "validation",
        "n": 200,
        "accuracy_strict": accuracy,
        "ci95": [accuracy - 0.05, accuracy + 0.05],
    }


def rollout(step, group, completion, **changes):
    return {
        "step": step,
        "group": group,
        "question": "1 + 2 = ?",
        "gold": "3",
        "completion": completion,
        "reward": 1.1,
        "rewards": {"correct": 1.0, "format": None},
        "correct": True,
        "extracted": "3",
        "advantage": 0.5,
        "tokens": 12,
        "finish_reason": "stop",
        **changes,
    }


def write_run(folder, **changes):
    """A GRPO run of 60 steps, three evaluations, twelve completions a step; `changes` are of its fields."""
    folder.mkdir(parents=True)
    config = {
        "model": "outputs/sft/final",
        "data": "arithmetic",
        "seed": 7,
        "algo": "dapo",
        "total_steps": 60,
    }
    config |= {"options": {"high": 9}, **changes}
    (folder / "config.yaml").write_text(json.dumps(config))
    environment = {"python": "3.11", "packages": {"torch": "2.13.0"}, "commit": None}
    environment["command"] = ["train_grpo.py", "--data", "a b"]
    (folder / "environment.json").write_text(json.dumps(environment))
    jsonl(folder / "metrics.jsonl", [metrics_row(step) for step in range(1, 61)])
    jsonl(folder / "eval.jsonl", [evaluation(0, 0.1), evaluation(30, 0.6), evaluation(60, 0.5)])
    rows = [
        rollout(step, group, f"step {step}, group {group}, sample {sample}")
        for step in range(1, 61)
        for group in range(6)
        for sample in range(2)
    ]
    jsonl(folder / "rollouts.jsonl", rows)
    return folder
