"""What several processes do together, launched by test_sharding: one update, and the runs that are named.

The update is taken in float64, so that nothing but a mistake can tell it from one process'.
"""

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from quick import quick_grpo, quick_sft
from test_stops import stop_at

import models
import train_grpo
import updates
from batches import MicroBatches
from credit import credit
from data import Problem
from inference import SamplingParams
from inference.engine import Seats, TorchEngine
from models import Policy, make_accelerator
from rewards import Scores
from rollouts import Group, collate
from runs.checkpoint import load_state
from runs.folder import Run
from sharding import Weights, prepare
from tiny import build_tiny
from train_grpo import GRPOConfig
from train_sft import main as train_sft
from updates import update

SIZE, PROMPTS = 4, [[7, 40, 50, 60], [8, 9, 41], [100] * 9, [30, 31, 32, 33, 34]]
LORA = {"lora_rank": 4, "gradient_checkpointing": True, "learning_rate": 1e-2, "kl_coef": 0.1}


def one_update(accelerator):
    """Completions of four prompts by all processes, and the gradient of one update on them."""
    model, tokenizer = build_tiny(0)
    model.double().generation_config.eos_token_id = list(range(40))  # some end early, and so some processes
    policy = Policy(model)
    weights = Weights(accelerator, policy)
    # A step of plain descent at rate 1 is the gradient.
    policy, optimizer = prepare(accelerator, policy, torch.optim.SGD(policy.parameters(), lr=1.0))
    with weights.whole() as model:
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        engine = TorchEngine(model, tokenizer)
    config = GRPOConfig(kl_coef=0.0, max_grad_norm=1e9, group_size=SIZE, max_completion_tokens=24)

    share = len(PROMPTS) // accelerator.num_processes
    first = accelerator.process_index * share
    prompts = PROMPTS[first : first + share]
    with weights.whole():
        groups = engine.generate(prompts, SIZE, SamplingParams(24), (0, 0), first)
    nothing = [None] * SIZE
    batch = collate(
        [
            Group(first + i, Problem("", None), prompt, group, nothing, Scores(rewards, {}, *[nothing] * 3))
            for i, (prompt, group) in enumerate(zip(prompts, groups, strict=True))
            for rewards in [[float(sum(completion.token_ids) % 7) for completion in group]]
        ],
        pad_token_id=0,
        drop_truncated=False,
    )
    batch.tensors["old_logprobs"] = batch.tensors["sampling_logprobs"]
    credit(batch, config, accelerator, kl_coef=0.0)
    micro_batches = MicroBatches(accelerator, 100)
    scheduler = SimpleNamespace(step=lambda: None)
    told = update(
        policy, optimizer, scheduler, micro_batches, batch, list(range(len(batch.lengths))), config, 0.0
    )
    with weights.whole() as model:
        after = torch.cat([p.detach().flatten() for p in model.parameters()])
    return {
        "gradient": before - after,
        "norm": told["grad_norm"],
        "loss": sum(gather_object([told["loss"]])),
        "completions": gather_object([c.token_ids for group in groups for c in group]),
        "lengths": gather_object([sum(completion for _, completion in batch.lengths)]),
        "held": sum(own_part(p).numel() for p in policy.parameters()),
    }


def own_part(parameter):
    """What this process holds of it: under FSDP2, under ZeRO-3, or all."""
    return getattr(parameter, "_local_tensor", getattr(parameter, "ds_tensor", parameter))


def go_on(folder, to):
    """Take the GRPO run of a folder up from its middle, as if it had been killed there."""
    for part in ("config.yaml", "checkpoints/step-000002", "metrics.jsonl", "rollouts.jsonl", "eval.jsonl"):
        copy = shutil.copytree if (folder / part).is_dir() else shutil.copy
        (to / part).parent.mkdir(parents=True, exist_ok=True)
        copy(folder / part, to / part)


def cold_start(folder):
    # A single question to answer: the second process has none.
    return quick_sft(folder / "sft", optimizer="adamw", total_steps=3, eval_limit=1)


def grpo(output):
    return quick_grpo(output, kl_coef=0.1, ref_sync_steps=2, micro_batch_tokens=64)


def stop_and_go_on(config, accelerator):
    """A run in which the last process alone is told to stop: while it samples, and then within an update."""
    for place, name, call, is_in_hand in (
        (Seats, "write", 2 * 12 + 6, False),  # answers, completions, and some tokens of the next
        (updates, "micro_loss", 2, True),
    ):
        with pytest.MonkeyPatch.context() as patch:
            if accelerator.is_last_process:
                stop_at(patch, place, name, call)
            assert train_grpo.main(config) == 143
        saved = load_state(Path(config.output) / "checkpoints" / "step-000001")
        assert ("in_hand" in saved["memory"]) == is_in_hand
    assert train_grpo.main(config) == 0


def go_back(config):
    """A run that diverges in its third step, once."""
    check_updates = Run.check_updates

    def diverge(run, causes, rows):
        check_updates(run, causes, rows)
        if run.step == 3 and not run.rollbacks:
            run.diverged = "it was told so"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "check_updates", diverge)
        assert train_grpo.main(config) == 0


def poison_one(config, accelerator):
    """A run in which the loss of the last process alone is once not a number."""
    calls, micro_loss = [], updates.micro_loss

    def poisoned(*arguments):
        loss, stats = micro_loss(*arguments)
        calls.append(1)
        return (loss * float("nan") if len(calls) == 2 else loss), stats

    with pytest.MonkeyPatch.context() as patch:
        if accelerator.is_last_process:
            patch.setattr(updates, "micro_loss", poisoned)
        assert train_grpo.main(config) == 0


def main(folder, words):
    if "half" in words:  # as on a GPU
        for module in (models, train_grpo):
            module.compute_dtype = lambda: torch.bfloat16
    Accelerator.end_training = lambda self: None  # several runs follow one another
    accelerator = make_accelerator()
    told = one_update(accelerator)
    if accelerator.is_main_process:
        torch.save(told, folder / "update.pt")
    accelerator.free_memory()
    if "runs" in words:
        assert train_grpo.main(replace(grpo(folder / "grpo"), dry_run=True)) in (0, 1)  # learns by luck
        assert not (folder / "grpo").exists()
        assert train_sft(cold_start(folder), accelerator) == 0
        assert train_grpo.main(grpo(folder / "grpo")) == 0
    if "killed" in words:
        if accelerator.is_main_process:
            go_on(folder / "grpo", folder / "resumed")
        accelerator.wait_for_everyone()
        assert train_grpo.main(grpo(folder / "resumed")) == 0
    if "stopped" in words:
        stop_and_go_on(grpo(folder / "stopped"), accelerator)
    if "poisoned" in words:
        poison_one(grpo(folder / "poisoned"), accelerator)
    if "back" in words:
        go_back(grpo(folder / "back"))
    if "lora" in words:
        lora = quick_grpo(folder / "lora", model=str(folder / "grpo" / "final"), **LORA)
        assert train_grpo.main(lora) == 0
    if "half" in words:
        # Two updates: the first pass of the policy is without gradients.
        twice = quick_grpo(folder / "half", updates_per_rollout=2, kl_coef=0.1)
        assert train_grpo.main(twice) == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
