"""Memory that really runs out, in a process whose address space is limited for a while."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import memory
from memory import free_memory, is_out_of_memory, peak_memory

ROOT = Path(__file__).parent.parent

LIMITED = """
import resource
import psutil
import torch
from accelerate import Accelerator
from types import SimpleNamespace
from batches import MicroBatches
from data import Problem
from inference import Completion
from models import Policy
from tiny import build_tiny
from rewards import Scores
from rollouts import Group, collate
from train_grpo import GRPOConfig
from updates import update

torch.set_num_threads(1)
accelerator = Accelerator(cpu=True)
policy = Policy(build_tiny(0)[0])
settings = GRPOConfig(kl_coef=0.0, max_grad_norm=1e9, group_size=8)
groups = []
for number in range(8):
    completions = [
        Completion(torch.randint(9, 200, (150 - number,)).tolist(), [-5.0] * (150 - number), "stop")
        for _ in range(8)
    ]
    scores = Scores([0.0] * 8, {}, [None] * 8, [None] * 8, [False] * 8)
    groups.append(Group(number, Problem("q", None), [5] * 30, completions, [""] * 8, scores))
batch = collate(groups, 0)
batch.advantages = torch.randn(64, 1) * batch.tensors["completion_mask"]
taken = []
optimizer = SimpleNamespace(
    step=lambda: taken.append(torch.cat([p.grad.flatten().clone() for p in policy.parameters()])),
    zero_grad=policy.zero_grad,
)

def learn():
    micro_batches = MicroBatches(accelerator, 100_000)
    movers = (policy, optimizer, SimpleNamespace(step=lambda: None), micro_batches)
    update(*movers, batch, list(range(64)), settings, 0.0)
    return micro_batches.tokens

held = psutil.Process().memory_info().vms
unlimited = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (held + 150 * 2**20, unlimited[1]))
print(learn())
resource.setrlimit(resource.RLIMIT_AS, unlimited)
assert learn() == 100_000
print(float((taken[1] - taken[0]).norm() / taken[0].norm()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not keep RLIMIT_AS")
def test_an_update_in_too_little_memory_gives_the_same_gradient():
    done = subprocess.run(
        [sys.executable, "-c", LIMITED],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    tokens, distance = done.stdout.split()[-2:]
    assert int(tokens) < 6_000
    assert float(distance) <= 1e-6


@pytest.mark.parametrize("status", [None, "VmSize: 12 kB\nVmRSS: 9 kB\n"], ids=["whole", "of a sandbox"])
def test_memory_is_counted_in_bytes(status, monkeypatch):
    if status:
        monkeypatch.setattr(memory, "_status", lambda: status)
    device = torch.device("cpu")
    before = peak_memory(device)
    held = torch.ones(2**25)  # 128 MiB
    assert peak_memory(device) >= before
    assert 2**28 < peak_memory(device) < 2**40
    assert 2**28 < free_memory(device) < 2**45
    del held


@pytest.mark.slow
def test_the_peak_is_a_processs_own():
    """A program that a large one starts is no larger for it: Linux hands the parent's `ru_maxrss` on."""
    held = torch.ones(2**28)  # 1 GiB
    told = subprocess.run(
        [sys.executable, "-c", "import torch, memory; print(memory.peak_memory(torch.device('cpu')))"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert 0 < int(told.stdout) < held.nbytes


def test_what_is_no_lack_of_memory_is_told_apart():
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))
    assert not is_out_of_memory(ValueError("out of memory lane"))
