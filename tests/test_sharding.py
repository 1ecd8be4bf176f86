"""Several processes compute what one does, whether each holds the model or a part of it."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from quick import lines, quick_grpo, same, weights
from several import cold_start, go_back, go_on, grpo, one_update
from torch import nn
from transformers import AutoModelForCausalLM

import batches
import export
import zero
from batches import MicroBatches
from export import ExportConfig
from models import load_model, make_accelerator
from runs.checkpoint import find_damage
from runs.config import RunStopped
from sharding import Weights, read_plan, refuse_unshardable
from train_grpo import main as train_grpo
from train_sft import main as train_sft

ROOT = Path(__file__).parent.parent
LAUNCHERS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}


@pytest.fixture
def has_deepspeed(monkeypatch):
    """As if it were installed, for those who only look."""
    monkeypatch.setattr("zero.importlib.util.find_spec", lambda name: name)


# ------------------------------------------------------------------------------------------------------------
# Files for `accelerate launch`


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_a_launcher_is_explained_and_says_what_accelerate_understands(path, monkeypatch, has_deepspeed):
    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda port: False)
    words = ["--config_file", str(path), "train_grpo.py"]
    arguments = launch_command_parser().parse_args(words)
    known = set(vars(arguments))
    arguments, _, _ = _validate_launch_command(arguments)  # it refuses unknown fields of the file
    fields = yaml.safe_load(path.read_text())
    # and passes over unknown fields in here
    assert set(fields.get("fsdp_config", {})) | set(fields.get("deepspeed_config", {})) <= known
    assert f"--config_file configs/accelerate/{path.name}" in path.read_text()
    is_zero = fields["distributed_type"] == "DEEPSPEED"
    arguments.deepspeed_fields_from_accelerate_config = ",".join(fields.get("deepspeed_config", {}))
    left = prepare_deepspeed_cmd_env(arguments)[1] if is_zero else prepare_multi_gpu_env(arguments)
    for name, value in left.items():
        if name.startswith(("ACCELERATE_USE", "ACCELERATE_DEEPSPEED", "FSDP_")):
            monkeypatch.setenv(name, value)
    plan = read_plan(torch.bfloat16)
    assert zero.read_stage() == {"zero2": 2, "zero3": 3}.get(path.stem)
    assert (plan is not None) == path.stem.startswith("fsdp2")
    if plan:
        assert plan.reshard_after_forward == (path.stem == "fsdp2")
        # Log-probabilities leave the policy as they are, and gradients are summed in float32.
        precision = plan.mixed_precision_policy
        assert (precision.param_dtype, precision.reduce_dtype) == (torch.bfloat16, torch.float32)
        assert precision.output_dtype is None


# ------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("variables", "dtype", "words"),
    [
        ({"FSDP_VERSION": "1"}, torch.bfloat16, ["fsdp_version must be 2, got 1", "fsdp2.yaml"]),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, torch.bfloat16, ["fsdp_offload_params must be false"]),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, torch.bfloat16, ["fsdp_cpu_ram_efficient_loading"]),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "1"}, torch.bfloat16, ["--gradient_checkpointing"]),
        ({}, torch.float16, ["bfloat16", "ddp.yaml"]),
        (ZERO, torch.float16, ["bfloat16", "ddp.yaml"]),
        (ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, torch.bfloat16, ["2 or 3, got 1", "zero2.yaml"]),
        (ZERO | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, torch.bfloat16, ["deepspeed_config_file"]),
        (
            ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
            torch.bfloat16,
            ["offload_optimizer_device must be none, got cpu", "--lora_rank"],
        ),
        (
            ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"},
            torch.bfloat16,
            ["offload_param_device must be none, got nvme"],
        ),
        (
            ZERO | {"ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"},
            torch.bfloat16,
            ["zero3_init_flag must be false"],
        ),
    ],
)
def test_what_cannot_be_sharded_so_is_refused_with_the_remedy(
    variables, dtype, words, monkeypatch, has_deepspeed
):
    for name, value in (FSDP2 | variables).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words[0]) as caught:
        read_plan(dtype)
    for word in words:
        assert word in str(caught.value)


def test_without_deepspeed_the_refusal_says_how_to_get_it_or_do_without(monkeypatch):
    for name, value in ZERO.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("zero.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"not installed; pip install -r (\S+), or .*fsdp2.yaml") as caught:
        make_accelerator()
    named = str(caught.value).split("-r ")[1].split(",")[0]
    assert "deepspeed==" in (ROOT / named).read_text()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"optimizer": "muon"}, "optimizer muon"),
        ({"optimizer": "adamw_8bit"}, "optimizer adamw_8bit"),
        ({"lora_rank": 4, "quantize": "nf4"}, "quantize nf4"),
        ({"algo": "ppo"}, "critic"),
        ({"torch_compile": True}, "torch_compile"),
    ],
)
def test_what_needs_whole_matrices_is_refused_under_sharding_alone(changes, word):
    config = quick_grpo("anywhere", **changes)
    refuse_unshardable(SimpleNamespace(is_fsdp2=False), config)
    with pytest.raises(ValueError, match=f"{word}.*(cannot be sharded|leave it out).*ddp.yaml"):
        refuse_unshardable(SimpleNamespace(is_fsdp2=True), config)


@pytest.fixture
def sharded(monkeypatch):
    """One process that takes itself for one of several, each with its part."""
    monkeypatch.setattr(batches, "is_sharded", lambda accelerator: True)
    monkeypatch.setattr("sharding.is_sharded", lambda accelerator: True)


def test_out_of_memory_in_a_sharded_update_stops_with_the_flag_to_change(sharded):
    calls = []

    def work(rows, scale):
        calls.append(rows)
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(RunStopped, match="sharded update.*--micro_batch_tokens 32$"):
        MicroBatches(make_accelerator(), 64).run([(4, 4)] * 8, range(8), work)
    assert len(calls) == 1


def test_out_of_memory_in_gathering_ends_the_process_and_no_other_error_is_taken_for_it(sharded, tiny):
    weights = Weights(make_accelerator(), nn.ModuleDict({"model": tiny[0]}))
    for error, raised in (
        (torch.OutOfMemoryError("CUDA out of memory"), RunStopped),
        (RuntimeError("a bug"), RuntimeError),
    ):

        def fail(make, error=error):
            raise error

        weights._fill = fail
        with pytest.raises(raised), weights.whole():
            pass


def test_the_copy_is_the_model_while_it_is_whole_and_takes_no_room_after(sharded, tiny):
    model = tiny[0]
    weights = Weights(make_accelerator(), nn.ModuleDict({"model": model}))
    ids = torch.tensor([[7, 8, 9]])
    with weights.whole() as copy, torch.no_grad():
        assert copy is not model
        assert torch.equal(copy(ids).logits, model(ids).logits)
        assert copy.lm_head.weight is copy.model.embed_tokens.weight  # tied, as in the model
    assert all(parameter.is_meta for parameter in copy.parameters())
    with weights.whole(torch.bfloat16) as copy:
        assert {parameter.dtype for parameter in copy.parameters()} == {torch.bfloat16}


# ------------------------------------------------------------------------------------------------------------
# Two real processes


def launch(folder, file, *words, nodes=1):
    """Two processes by `accelerate launch`, on the CPU, as a person would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    command += ["--config_file", f"configs/accelerate/{file}", "--main_process_port", port]
    command += ["--main_process_ip", "127.0.0.1"] if nodes > 1 else []
    processes = [
        subprocess.Popen(
            [*command, "--machine_rank", str(rank), "tests/several.py", str(folder), *words],
            cwd=ROOT,
            env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
        )
        for rank in range(nodes)
    ]
    try:
        assert [process.wait(timeout=240) for process in processes] == [0] * nodes
    finally:
        for process in processes:
            process.terminate()
    return torch.load(folder / "update.pt")


@pytest.fixture(scope="module")
def alone():
    """The update as one process takes it."""
    return one_update(make_accelerator())


def need(file):
    """Skip where what a launcher launches is not there."""
    if file.startswith("zero"):
        pytest.importorskip("deepspeed", reason="pip install -r requirements-deepspeed.txt")


@pytest.fixture(scope="module", params=["fsdp2.yaml", "zero2.yaml", "zero3.yaml"])
def sharded_runs(request, tmp_path_factory):
    """What two processes left that hold a part of the model each, or of its gradients and moments."""
    need(request.param)
    folder = tmp_path_factory.mktemp(Path(request.param).stem)
    launch(folder, request.param, "runs", "killed", "stopped", "back", "poisoned", "lora")
    return folder


@pytest.fixture(scope="module")
def single_runs(tmp_path_factory):
    """The same by one process."""
    folder = tmp_path_factory.mktemp("single")
    assert train_sft(cold_start(folder)) == 0
    assert train_grpo(grpo(folder / "grpo")) == 0
    go_back(grpo(folder / "back"))
    return folder


def is_the_same_update(together, alone):
    assert together["completions"] == alone["completions"]
    assert len(set(map(len, alone["completions"]))) > 3  # some end early
    assert together["lengths"][0] != together["lengths"][1]  # and a process with them
    difference = (together["gradient"] - alone["gradient"]).norm() / alone["gradient"].norm()
    assert difference <= 1e-6
    assert alone["gradient"].norm() > 1e-3
    assert together["norm"] == pytest.approx(alone["norm"], rel=1e-6)
    assert together["loss"] == pytest.approx(alone["loss"], abs=1e-9)


def is_left_out_by_all(run):
    """The update that was not a number on one process alone moved no weight of any."""
    bad = [line["train/bad_updates"] for line in lines(run / "metrics.jsonl")]
    assert sum(bad) == 1
    assert all(torch.isfinite(weight).all() for weight in weights(run / "final").values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "words", "nodes"),
    [
        ("ddp.yaml", ["runs", "poisoned"], 1),  # a cold start and what follows, in the same processes
        ("ddp_two_nodes.yaml", [], 2),
        ("fsdp2_zero2.yaml", [], 1),
    ],
)
def test_two_processes_sample_the_same_and_take_the_same_gradient_as_one(alone, tmp_path, file, words, nodes):
    together = launch(tmp_path, file, *words, nodes=nodes)
    is_the_same_update(together, alone)
    assert together["held"] == alone["held"] / (2 if file.startswith("fsdp2") else 1)
    if "poisoned" in words:
        is_left_out_by_all(tmp_path / "poisoned")


@pytest.mark.slow
def test_two_processes_with_half_the_model_each_take_the_same_gradient_as_one(alone, sharded_runs):
    together = torch.load(sharded_runs / "update.pt")
    is_the_same_update(together, alone)
    keeps_weights = sharded_runs.name.startswith("zero2")
    assert together["held"] == alone["held"] / (1 if keeps_weights else 2)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["fsdp2.yaml", "zero2.yaml", "zero3.yaml"])
def test_in_half_precision_the_gradient_is_as_good_and_the_weights_stay_whole(alone, tmp_path, file):
    need(file)
    together = launch(tmp_path, file, "half")
    assert together["completions"] == alone["completions"]
    difference = (together["gradient"] - alone["gradient"]).norm() / alone["gradient"].norm()
    # Weights in float64 are gathered in half precision, but autocast lets them be.
    assert (difference > 1e-6) == (file == "fsdp2.yaml")
    assert difference <= 0.02
    saved = weights(tmp_path / "half" / "final")
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    matrix = saved["model.layers.0.mlp.up_proj.weight"]
    assert (matrix != matrix.bfloat16()).float().mean() > 0.9  # saved as trained, not as gathered
    for step in lines(tmp_path / "half" / "metrics.jsonl"):
        assert 0 < step["rollout/sampler_mismatch_kl"] < 0.05
        assert step["train/bad_updates"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("run", ["sft", "grpo", "back"])
def test_sharded_weights_move_as_whole_ones(sharded_runs, single_runs, run):
    ours, theirs = (weights(folder / run / "final") for folder in (sharded_runs, single_runs))
    start = load_model("tiny").state_dict()
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max() for name in ours) <= 1e-5
    assert max((ours[name] - start[name]).abs().max() for name in ours) > 1e-4
    if run != "sft":
        said = [
            [row["completion"] for row in lines(f / run / "rollouts.jsonl")]
            for f in (sharded_runs, single_runs)
        ]
        assert said[0] == said[1]


@pytest.mark.slow
def test_a_sharded_run_goes_on_to_the_same_bits_and_so_does_one_process(sharded_runs, single_runs, tmp_path):
    whole = weights(sharded_runs / "grpo" / "final")
    assert same(whole, weights(sharded_runs / "resumed" / "final"))
    go_on(sharded_runs / "grpo", tmp_path)
    assert train_grpo(grpo(tmp_path)) == 0
    alone = weights(tmp_path / "final")
    assert max((alone[name] - whole[name]).abs().max() for name in whole) <= 1e-5
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_when_one_process_is_told_to_stop_all_do_and_go_on_to_the_same_bits(sharded_runs):
    whole, stopped = (sharded_runs / run for run in ("grpo", "stopped"))
    assert same(weights(whole / "final"), weights(stopped / "final"))
    for file in ("rollouts.jsonl", "eval.jsonl"):
        assert lines(whole / file) == lines(stopped / file)


@pytest.mark.slow
def test_a_sharded_run_that_diverged_goes_back_at_half_the_rate(sharded_runs):
    rates = [
        [row["policy/learning_rate"] for row in lines(sharded_runs / run / "metrics.jsonl")]
        for run in ("grpo", "back")
    ]
    assert rates[1] == [*rates[0][:2], *(rate / 2 for rate in rates[0][2:])]


@pytest.mark.slow
def test_what_a_sharded_run_leaves_is_whole_and_can_be_exported(sharded_runs, tmp_path):
    for run in ("sft", "grpo", "lora"):
        for folder in (sharded_runs / run / "final", *(sharded_runs / run / "checkpoints").iterdir()):
            assert find_damage(folder) is None
            assert all(p.isfinite().all() for p in load_model(str(folder)).parameters())
    plain = AutoModelForCausalLM.from_pretrained(sharded_runs / "grpo" / "final")
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    to = tmp_path / "merged"
    assert export.main(ExportConfig(run=str(sharded_runs / "lora"), to=str(to), merge=True)) == 0
    base, tuned = weights(sharded_runs / "grpo" / "final"), weights(to)
    assert (base["model.layers.0.mlp.up_proj.weight"] - tuned["model.layers.0.mlp.up_proj.weight"]).any()


@pytest.mark.slow
def test_a_loss_that_is_no_number_in_one_sharded_process_is_left_out_by_both(sharded_runs):
    is_left_out_by_all(sharded_runs / "poisoned")
