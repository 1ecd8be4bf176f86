"""Training and answering on an Apple GPU (MPS), as far as can be told without one: see apple.py."""

import re
from pathlib import Path

import pytest
import torch
import torchgen
from accelerate.state import AcceleratorState
from apple import OnMPS, apple_gpu
from quick import lines, quick_grpo, quick_sft, weights

from inference import SamplingParams
from inference.chat import Turn, load_chat_model
from memory import free_memory, is_out_of_memory, peak_memory
from models import make_accelerator
from optimizers import make_optimizer
from runs.folder import environment
from train_grpo import main as train_grpo
from train_sft import main as train_sft

MPS = torch.device("mps")
# Of attention MPS has another kernel, which torch chooses itself.
OTHERS_THERE = {
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
}


@pytest.fixture
def apple():
    """A machine with an Apple GPU, of which Accelerate has not heard yet."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with apple_gpu() as operations:
        yield operations
    AcceleratorState._reset_state(reset_partial_state=True)


def without_kernel(operations):
    """The operations that torch has not for MPS, by its own table."""
    table = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    rows = {
        re.match(r"- func: ([\w.]+)", row)[1]: row for row in re.split(r"\n(?=- func)", table.read_text())[1:]
    }

    def is_there(name):
        row = rows[name]
        if delegate := re.search(r"structured_delegate: ([\w.]+)", row):
            row = rows[delegate[1]]
        kernels = re.search(r"dispatch:\n((?:    .*\n?)+)", row)
        return kernels is None or bool(re.search(r"MPS\b|Composite", kernels[1]))

    names = {
        f"{op._schema.name.removeprefix('aten::')}.{op._schema.overload_name}".rstrip(".")
        for op in operations
    }
    return {name for name in names if not is_there(name)}


def test_the_gpu_of_the_tests_is_as_strict_as_apples(apple):
    there = torch.ones(2, 3, device="mps", requires_grad=True)
    assert there.device.type == "mps"
    for refused in (
        lambda: there.double(),
        lambda: torch.zeros(2, dtype=torch.float64, device="mps"),
        lambda: torch.tensor([0.5], dtype=torch.float64, device="mps"),
        lambda: torch.ones(2, dtype=torch.float64).to("mps"),
        lambda: there.detach().numpy(),
    ):
        with pytest.raises(TypeError):
            refused()
    with pytest.raises(AssertionError, match="same device"):
        there + torch.ones(2, 3)
    ((there * 2).cpu().double().square().sum() * 3).backward()
    assert isinstance(there.grad, OnMPS)
    assert there.grad.tolist() == [[24.0] * 3] * 2
    assert "mul.Tensor" in {str(op).removeprefix("aten.") for op in apple}


def test_a_run_takes_the_gpu_unless_it_is_told_not_to(apple, monkeypatch):
    accelerator = make_accelerator()
    assert (accelerator.device.type, accelerator.mixed_precision) == ("mps", "no")
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    assert make_accelerator().device.type == "cpu"


def test_8_bit_optimizers_are_refused_there(apple):
    make_accelerator()
    with pytest.raises(ValueError, match="adamw_8bit does not run on an Apple GPU; give --optimizer adamw"):
        make_optimizer(torch.nn.Linear(2, 2), "adamw_8bit", 1e-3, 0.0)


def test_memory_is_what_metal_leaves_of_the_machines(apple, monkeypatch):
    assert peak_memory(MPS) == 2**28
    assert free_memory(MPS) == min(2**34 - 2**28, free_memory(torch.device("cpu")))
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 2**20)
    assert free_memory(MPS) == 0
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"))


def test_the_chat_answers_there_as_on_the_processor(apple, monkeypatch):
    monkeypatch.setattr(
        torch.accelerator,
        "current_accelerator",
        lambda check_available=False: MPS if check_available else None,
    )
    model = load_chat_model("tiny")
    assert isinstance(model.engine.model.lm_head.weight, OnMPS)
    params = SamplingParams(6, temperature=1.0, self_certainty=True)
    *_, reading = model.stream([Turn("1 + 2 = ?")], params, (0,))
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    *_, expected = load_chat_model("tiny").stream([Turn("1 + 2 = ?")], params, (0,))
    assert reading.text == expected.text
    assert environment(model.engine.model)["device"].endswith("mps")


RUNS = {
    "sft": lambda folder, model: (train_sft, quick_sft(folder, total_steps=2, save_every=1, eval_limit=2)),
    "grpo": lambda folder, model: (
        train_grpo,
        quick_grpo(
            folder, total_steps=2, prompts_per_step=2, eval_limit=2, max_completion_tokens=6, kl_coef=0.04
        ),
    ),
    # As configs/gsm8k_qwen2.5_0.5b_mac.yaml has it.
    "lora": lambda folder, model: (
        train_grpo,
        quick_grpo(
            folder,
            model=str(model),
            lora_rank=4,
            optimizer="adamw",
            **{"total_steps": 2, "prompts_per_step": 2, "eval_limit": 2, "max_completion_tokens": 6},
        ),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("which", RUNS)
def test_a_run_learns_there_what_it_learns_on_the_processor(tmp_path, random_folder, which):
    """Without a number in float64, a tensor elsewhere, or an operation that MPS lacks."""
    model = random_folder("qwen2")
    AcceleratorState._reset_state(reset_partial_state=True)
    with apple_gpu() as operations:
        main, config = RUNS[which](tmp_path / "mps", model)
        assert main(config) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    main, config = RUNS[which](tmp_path / "cpu", model)
    assert main(config) == 0
    assert without_kernel(operations) <= OTHERS_THERE
    assert len(operations) > 50
    learned, expected = (weights(tmp_path / device / "final") for device in ("mps", "cpu"))
    assert learned.keys() == expected.keys()
    for name, tensor in learned.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5, msg=name)
    rows = [lines(tmp_path / device / "metrics.jsonl") for device in ("mps", "cpu")]
    told = [[row["policy/grad_norm"] for row in run] for run in rows]
    assert told[0] == pytest.approx(told[1], rel=1e-3)
    assert len(told[0]) == 2


def test_the_guide_names_the_targets_that_keep_to_the_processor():
    root = Path(__file__).parent.parent
    targets = re.search(r"^(.+): export ACCELERATE_USE_CPU", (root / "Makefile").read_text(), re.MULTILINE)
    told = (root / "docs" / "mac.md").read_text().partition(" set it by themselves")[0]
    assert re.findall(r"`make ([\w-]+)`", told) == targets[1].split()
