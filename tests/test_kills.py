"""Runs killed without warning, at any moment: the same command goes on to the same bits.

Three moments by default; `make soak` has many, at random, and two processes.
"""

import multiprocessing
import os
import pkgutil
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from quick import lines, quick_grpo, quick_sft, same, weights

ROOT = Path(__file__).parent.parent

# The children begin with everything imported.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train_grpo", "train_sft", "quick"])

# What is called at a moment: many times a step, a few times a step, many times a checkpoint.
MOMENTS = {
    "generation": ("inference.engine", "choose"),
    "minibatch": ("torch.optim.lr_scheduler.LambdaLR", "step"),
    "checkpoint": ("runs.checkpoint", "_checksum"),
    "rename": ("os", "replace"),
    "lines": ("runs.metrics", "append_whole"),
}
CASES = {
    "sft": (quick_sft, {"total_steps": 6}),
    "grpo": (quick_grpo, {"total_steps": 6}),
    "grpo in 3 minibatches": (quick_grpo, {"prompts_per_step": 3, "updates_per_rollout": 3}),
    "dapo": (quick_grpo, {"algo": "dapo", "max_refills": 1, "updates_per_rollout": 2}),
    "lora": (quick_grpo, {"lora_rank": 4, "kl_coef": 0.1}),
}


def train(case, output, changes):
    """The run of a case, to its end."""
    import train_grpo
    import train_sft

    quick, settings = CASES[case]
    script = train_sft if quick is quick_sft else train_grpo
    config = {"save_every": 1, "eval_every": 2, "warmup_steps": 0, **settings, **changes}
    raise SystemExit(script.main(quick(output, **config)))


def train_until(case, output, changes, moment, call):
    """The same, killed when what belongs to the moment is called for the n-th time."""
    path, name = MOMENTS[moment]
    place = pkgutil.resolve_name(path)
    calls, work = [], getattr(place, name)

    def killed(*arguments, **named):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return work(*arguments, **named)

    setattr(place, name, killed)
    train(case, output, changes)


def run(target, *arguments):
    child = FORKS.Process(target=target, args=arguments)
    child.start()
    child.join(300)
    assert child.exitcode is not None, "the run hangs"
    return child.exitcode


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folders of runs that nobody disturbed, made when first asked for."""
    folder, made = tmp_path_factory.mktemp("whole"), set()

    def get(case, changes):
        if case not in made:
            assert run(train, case, folder / case, changes) == 0
            made.add(case)
        return folder / case

    return get


@pytest.fixture(scope="module")
def changes_of(tmp_path_factory):
    """What a case needs besides its settings: an adapter wants a model from a folder."""
    from models import build_tiny, save_model

    base = tmp_path_factory.mktemp("base")
    save_model(base, *build_tiny(0))
    return lambda case: {"model": str(base)} if case == "lora" else {}


def compare(folder, whole):
    """Does a run that was killed end as the whole one?"""
    assert same(weights(folder / "final"), weights(whole / "final"))
    if (whole / "best").exists():
        assert same(weights(folder / "best"), weights(whole / "best"))
        told = [(place / "best" / "evaluation.json").read_text() for place in (folder, whole)]
        assert told[0] == told[1]
    first = weights(whole / "checkpoints" / sorted(os.listdir(whole / "checkpoints"))[0])
    assert not same(first, weights(whole / "final"))
    for file in ("metrics.jsonl", "eval.jsonl", "rollouts.jsonl"):
        if (whole / file).exists():
            steps, expected = ([row["step"] for row in lines(place / file)] for place in (folder, whole))
            assert steps == expected
    assert len(lines(folder / "metrics.jsonl")) == len(
        {row["step"] for row in lines(folder / "metrics.jsonl")}
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "moment", "call"),
    [("grpo", "generation", 41), ("grpo in 3 minibatches", "minibatch", 11), ("sft", "checkpoint", 17)],
)
def test_a_run_killed_at_any_moment_goes_on_to_the_same_bits(case, moment, call, tmp_path, whole, changes_of):
    changes = changes_of(case)
    assert run(train_until, case, tmp_path / "run", changes, moment, call) == -signal.SIGKILL
    assert run(train, case, tmp_path / "run", changes) == 0
    compare(tmp_path / "run", whole(case, changes))


@pytest.mark.soak
@pytest.mark.parametrize("case", CASES)
def test_a_run_killed_again_and_again_goes_on_to_the_same_bits(case, tmp_path, whole, changes_of):
    changes, dice = changes_of(case), random.Random(case)
    kills, moments = 0, [moment for moment in MOMENTS if case != "sft" or moment != "generation"]
    for attempt in range(20):
        folder = tmp_path / f"run-{attempt}"
        for _ in range(dice.randint(1, 3)):
            moment = dice.choice(moments)
            call = dice.randint(1, {"generation": 60, "checkpoint": 60, "rename": 12}.get(moment, 8))
            code = run(train_until, case, folder, changes, moment, call)
            assert code in (0, -signal.SIGKILL)
            kills += code != 0
        assert run(train, case, folder, changes) == 0
        compare(folder, whole(case, changes))
    assert kills >= 20


@pytest.mark.soak
def test_two_processes_killed_at_random_go_on_to_the_same_bits(tmp_path):
    dice = random.Random(0)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    flags = "--model tiny --total_steps 6 --prompts_per_step 6 --group_size 4 --max_completion_tokens 12"
    flags += " --save_every 1 --eval_every 0 --updates_per_rollout 3"
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}

    def start(folder):
        rewards = ["--rewards", "{unique_characters: 1.0}"]
        words = [*command, "train_grpo.py", *flags.split(), *rewards, "--output", str(folder)]
        return subprocess.Popen(words, cwd=ROOT, env=environment)

    assert start(tmp_path / "whole").wait(300) == 0
    for attempt in range(4):
        folder = tmp_path / f"run-{attempt}"
        process = start(folder)
        while not (folder / "metrics.jsonl").exists() and process.poll() is None:
            time.sleep(0.05)
        time.sleep(dice.uniform(0, 1))
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            one.kill()
        process.wait(60)
        assert start(folder).wait(300) == 0
        compare(folder, tmp_path / "whole")
