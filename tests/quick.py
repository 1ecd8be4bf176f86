"""Runs of a few steps, and what they leave on disk: for the tests of whole scripts."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from train_grpo import GRPOConfig
from train_sft import SFTConfig


def quick_sft(output, **changes):
    settings = {"total_steps": 4, "examples_per_step": 8, "eval_limit": 8, "eval_every": 2, "save_every": 2}
    return SFTConfig(output=str(output), limit=64, max_completion_tokens=64, **settings | changes)


def quick_grpo(output, **changes):
    settings = {"total_steps": 4, "prompts_per_step": 4, "group_size": 4, "max_completion_tokens": 12}
    settings |= {"eval_limit": 8, "eval_every": 2, "save_every": 2, "model": "tiny"}
    # Random weights earn no reward for being right; this one tells their completions apart.
    settings |= {"rewards": {"unique_characters": 1.0}}
    return GRPOConfig(output=str(output), **settings | changes)


def weights(folder):
    (file,) = Path(folder).glob("*model.safetensors")  # a model's, or an adapter's
    return load_file(file)


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
