"""A real vLLM server, started, killed and started again: for `make soak`, where VLLM_PYTHON names the python
of an environment with vLLM.
"""

import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from quick import lines, quick_grpo

from data import load_problems
from inference import SamplingParams
from inference.engine import TorchEngine
from inference.http import get_json
from inference.vllm_engine import VLLMEngine
from inference.vllm_server import Server
from models import save_model
from prompts import encode_prompt
from tokenizer import load_tokenizer
from train_grpo import main as train_grpo

ROOT = Path(__file__).parent.parent
PYTHON = os.environ.get("VLLM_PYTHON")
START_S = 900  # at most: the CPU build needs one to three minutes, more on a busy machine
GREEDY = SamplingParams(max_completion_tokens=24, temperature=0.0)

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not PYTHON, reason="VLLM_PYTHON names no python of an environment with vLLM"),
]


class RealServer:
    """`make vllm-server`, on a free port, in a process group of its own."""

    def __init__(self, model: Path, log: Path, lora_rank: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.model, self.log, self.lora_rank = model, log, lora_rank
        self.started_s: list[float] = []
        self.process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Begin to start it; nobody waits."""
        made = ["-o", ".venv-vllm/ready", f"VLLM_BIN={Path(PYTHON).parent}"]  # the environment is there
        told = [f"MODEL={self.model}", f"PORT={self.port}", f"LORA_RANK={self.lora_rank}"]
        settings = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                ["make", "vllm-server", *made, *told, "ARGS=--max-model-len 512"],
                cwd=ROOT,
                env=settings,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self) -> None:
        began = time.monotonic()
        while time.monotonic() - began < START_S:
            assert self.process.poll() is None, self.log.read_text()[-2000:]
            try:
                get_json(f"{self.url}/health", attempts=1)
            except ConnectionError:
                time.sleep(1)
            else:
                self.started_s.append(time.monotonic() - began)
                return
        raise AssertionError(f"no server after {START_S} s: {self.log.read_text()[-2000:]}")

    def kill(self) -> None:
        """As the kernel does when memory is short: nobody is told."""
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="module")
def served(tmp_path_factory, tiny):
    """The tiny model's folder, and a server of it."""
    folder = tmp_path_factory.mktemp("served")
    save_model(folder / "model", *tiny)
    server = RealServer(folder / "model", folder / "server.log", lora_rank=8)
    server.start()
    try:
        server.wait()
        yield server
    finally:
        server.kill()


@pytest.fixture
def pushes(served, monkeypatch):
    """What the server answers after each push, taking the likeliest token, beside what the trainer does."""
    tokenizer = load_tokenizer(str(served.model))
    questions = [problem.question for problem in load_problems("arithmetic", "validation", limit=20)]
    prompts = [encode_prompt(tokenizer, question) for question in questions]
    compared = []
    push = VLLMEngine.push_weights

    def push_and_compare(self, model):
        push(self, model)
        theirs = self.generate(prompts, 1, GREEDY, (0,))
        ours = TorchEngine(model, tokenizer).generate(prompts, 1, GREEDY, (0,))
        pairs = [(one, other) for (one,), (other,) in zip(theirs, ours, strict=True)]
        compared.append(pairs)

    monkeypatch.setattr(VLLMEngine, "push_weights", push_and_compare)
    return compared


def run(served, output, **changes):
    """Three steps of four groups of four; weights move far enough for every answer to change."""
    options = {"model": str(served.model), "engine": "vllm", "engine_url": served.url, "total_steps": 3}
    options |= {
        "max_completion_tokens": 24,
        "max_prompt_tokens": 64,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
    }
    options |= {"kl_coef": 0.0, "eval_every": 0, "temperature": 0.9}
    assert train_grpo(quick_grpo(output, **options | changes)) == 0
    rows = lines(Path(output) / "rollouts.jsonl")
    assert len(rows) == 3 * 16
    return [(row["step"], row["group"], row["completion"], row["tokens"]) for row in rows]


def require_followed(pushes):
    """Every answer is the trainer's after every push, and no push leaves the answers as they were."""
    assert len(pushes) == 3
    for pairs in pushes:
        for theirs, ours in pairs:
            assert theirs.token_ids == ours.token_ids
            assert theirs.finish_reason == ours.finish_reason
            assert torch.allclose(torch.tensor(theirs.logprobs), torch.tensor(ours.logprobs), atol=1e-4)
    answers = [[theirs.token_ids for theirs, _ in pairs] for pairs in pushes]
    assert answers[0] != answers[1] != answers[2]


def tell_costs(output, capsys):
    told = lines(Path(output) / "metrics.jsonl")
    pushed = [round(row["time/push_s"], 2) for row in told]
    mismatch = max(row["rollout/sampler_mismatch_kl"] for row in told)
    with capsys.disabled():
        print(f"\n{Path(output).name}: pushes {pushed} s, mismatch at most {mismatch:.1e} nats a token")
    assert mismatch < 1e-6


def test_the_server_follows_an_adapter(served, pushes, tmp_path, capsys):
    """First, as an adapter needs the weights that the server began with."""
    run(served, tmp_path / "adapter", lora_rank=8)
    require_followed(pushes)
    tell_costs(tmp_path / "adapter", capsys)


def test_the_server_follows_all_weights_and_may_die_on_the_way(served, pushes, tmp_path, monkeypatch, capsys):
    undisturbed = run(served, tmp_path / "undisturbed")
    require_followed(pushes)
    tell_costs(tmp_path / "undisturbed", capsys)

    pushes.clear()
    complete, count = Server.complete, [0]
    restarts = []

    def complete_or_die(self, request, handed):
        count[0] += 1
        if count[0] == 20 + 16 + 20 + 6:  # amid the second step: each has 20 greedy answers and 16 samples
            restarts.append(threading.Thread(target=served.wait))
            served.kill()
            served.start()
            restarts[0].start()
        return complete(self, request, handed)

    monkeypatch.setattr(Server, "complete", complete_or_die)
    disturbed = run(served, tmp_path / "disturbed")
    assert len(restarts) == 1
    assert len(served.started_s) == 2
    require_followed(pushes)
    tell_costs(tmp_path / "disturbed", capsys)
    # Nothing is lost, nothing comes twice, and nothing was sampled from the weights that it was started with.
    assert disturbed == undisturbed
    with capsys.disabled():
        print(f"server up after {[round(s) for s in served.started_s]} s")
