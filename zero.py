"""DeepSpeed's ZeRO-2 and ZeRO-3, for who has DeepSpeed: it shards gradients and moments, ZeRO-3 weights too.

Accelerate's own way to DeepSpeed takes the optimizer's step inside `accelerator.backward`, before anyone
could look at the gradient, and keeps checkpoints that no other program reads. So Accelerate is told of
several processes and no more, and DeepSpeed is asked for what the scripts ask of any optimizer: gather
gradients over as many parts as it takes, tell their norm, step or let them go, and hand the moments over as
plain tensors.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

INSTALL = "pip install -r requirements-deepspeed.txt"
SWITCH = "ACCELERATE_USE_DEEPSPEED"
STAGE = "ACCELERATE_DEEPSPEED_ZERO_STAGE"
# Gradients that are reduced together: 200 MB of them, where DeepSpeed would keep 2 GB for it.
REDUCED_AT_ONCE = 50_000_000


def is_on(variable: str) -> bool:
    """Did `accelerate launch` switch something on?"""
    return os.environ.get(variable, "").lower() in ("1", "true")


def read_stage() -> int | None:
    """The stage that `accelerate launch` asked for, 2 or 3; None where it did not ask for DeepSpeed.

    Raises:
        ValueError: what cannot be done here.
    """
    if not is_on(SWITCH):
        return None
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError(
            f"DeepSpeed is not installed; {INSTALL}, or shard by configs/accelerate/fsdp2.yaml, which needs "
            "nothing else"
        )
    if os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none").lower() != "none":
        raise ValueError("deepspeed_config_file must be left out: all but zero_stage is the scripts' to say")
    stage = os.environ.get(STAGE, "2")
    if stage not in ("2", "3"):
        raise ValueError(f"zero_stage must be 2 or 3, got {stage}; see configs/accelerate/zero2.yaml")
    for name in ("offload_optimizer_device", "offload_param_device"):
        given = os.environ.get(f"ACCELERATE_DEEPSPEED_{name.upper()}", "none")
        if given != "none":
            raise ValueError(f"{name} must be none, got {given}: use more GPUs, or give --lora_rank 16")
    if is_on("ACCELERATE_DEEPSPEED_ZERO3_INIT"):
        raise ValueError("zero3_init_flag must be false: every process reads the weights")
    return int(stage)


@contextmanager
def kept_from_accelerate() -> Iterator[None]:
    """Let Accelerate see no more of it than several processes."""
    asked = os.environ.pop(SWITCH, None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ[SWITCH] = asked


def stage_of(accelerator: Accelerator) -> int | None:
    """The stage by which a run is sharded; None for one process, or without DeepSpeed."""
    return int(os.environ.get(STAGE, "2")) if is_on(SWITCH) and accelerator.use_distributed else None


def prepare(accelerator: Accelerator, policy: nn.Module, optimizer: Optimizer) -> tuple[Any, "ZeroOptimizer"]:
    """Hand a policy and its AdamW to DeepSpeed.

    Weights stay in float32 and products run under Accelerate's autocast, as where processes replicate: what
    is gathered, saved and gone on from is what was trained.
    """
    if accelerator.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it looks for GPUs, and says so
    import deepspeed  # seconds, for those who ask for it

    deepspeed.utils.logger.setLevel("ERROR")  # it tells of skipped steps and traces; the run's lines do so
    stage = stage_of(accelerator)
    groups = [list(group["params"]) for group in optimizer.param_groups]
    read = [p for p in policy.parameters() if p.ndim < 2] + [policy.model.get_output_embeddings().weight]
    engine, sharded, *_ = deepspeed.initialize(
        model=accelerator.prepare_model(policy, evaluation_mode=True),  # autocast, and no DDP around it
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": 1,  # nobody counts by it
            "zero_optimization": {"stage": stage, "reduce_bucket_size": REDUCED_AT_ONCE},
            "zero_allow_untested_optimizer": True,
            "managed_gradient_accumulation": False,  # parts are as many as memory wants
        },
        dist_init_required=False,
    )
    if stage == 3:
        # What the policy's forward reads without calling the module that has it: norms and the head.
        for parameter in read:
            deepspeed.zero.register_external_parameter(policy, parameter)
    return engine, ZeroOptimizer(accelerator, sharded, groups)


def gather(parameter: nn.Parameter) -> Tensor:
    """A copy of a weight in one piece. All processes ask for it together."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


class ZeroOptimizer:
    """DeepSpeed's optimizer, as the loop uses any other."""

    def __init__(self, accelerator: Accelerator, sharded: Any, groups: list[list[nn.Parameter]]) -> None:
        """Take it over.

        Args:
            accelerator: of the run.
            sharded: what `deepspeed.initialize` made of an AdamW.
            groups: this one's parameters, as they were.
        """
        self.accelerator = accelerator
        self.sharded = sharded
        self.groups = groups

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """AdamW's: rates are read and changed here. Its parameters are parts of ours, or none."""
        return self.sharded.optimizer.param_groups

    def clip(self, max_norm: float) -> float:
        """The norm of the gathered gradient, which the next `step` clips to `max_norm`."""
        self.sharded.finalize_gradient_accumulation_boundary()
        self.sharded.clip_grad = max_norm
        parts = [part for parts in self.sharded.averaged_gradients.values() for part in parts]
        # In float64: in float32, norms of so many numbers are off in the sixth digit.
        norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in parts]
        return float(self.accelerator.reduce(torch.stack(norms).square().sum(), "sum").sqrt())

    def step(self) -> None:
        """Move the weights; `clip` comes before it."""
        self.sharded.step()
        assert not self.sharded.overflow  # the gradient was found to be finite

    def zero_grad(self) -> None:
        """Let go of whatever gradients were gathered, those of half an update too."""
        self.sharded.zero_grad()
        for name in ("averaged_gradients", "all_grad_tensors"):
            held = getattr(self.sharded, name, {})
            held.update(dict.fromkeys(held))

    def state_dict(self, keep: bool = True) -> dict[str, Any]:
        """As AdamW's own in one process. All processes ask for it together; `keep` False gives no moments."""
        from deepspeed.utils import safe_get_full_optimizer_state

        state, flat = {}, self._flat_state()
        if flat:
            self._link()
        for number, parameter in enumerate(p for group in self.groups for p in group) if flat else ():
            # A number for each: one tensor for all would be counted up once for each of them by AdamW.
            state[number] = {"step": flat[0]["step"].cpu().clone()}
            for name in _moments(flat[0]):
                moment = safe_get_full_optimizer_state(parameter, name)
                state[number][name] = moment.cpu() if keep else None
        numbers = iter(range(sum(map(len, self.groups))))
        options = [
            group | {"params": [next(numbers) for _ in parameters]}
            for group, parameters in zip(self.param_groups, self.groups, strict=True)
        ]
        return {"state": state, "param_groups": options}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`, or an AdamW's; every process keeps its part."""
        from deepspeed.utils import safe_set_full_optimizer_state

        for group, saved in zip(self.param_groups, state["param_groups"], strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})
        if not state["state"]:
            return
        first = state["state"][0]
        for part in self._parts():
            self.sharded.optimizer.state[part] = {
                "step": first["step"].to(part.device, copy=True),
                **{name: torch.zeros_like(part) for name in _moments(first)},
            }
        self._link()
        for number, parameter in enumerate(p for group in self.groups for p in group):
            for name in _moments(first):
                moment = state["state"][number][name].to(parameter.device)
                safe_set_full_optimizer_state(parameter, moment, name)

    def _parts(self) -> list[Tensor]:
        """This process' part of the weights of every group, as DeepSpeed lays them out: flat."""
        name = "single_partition_of_fp32_groups"
        return getattr(self.sharded, name, None) or self.sharded.fp32_partitioned_groups_flat

    def _flat_state(self) -> list[dict[str, Any]]:
        """The moments of these; none before the first step."""
        states = self.sharded.optimizer.state
        return [states[part] for part in self._parts() if states.get(part)]

    def _link(self) -> None:
        """Let ZeRO-2 find every group's moments: it looks once, when only the first group has any."""
        if hasattr(self.sharded, "_hp_optimizer_states_linked"):
            self.sharded._hp_optimizer_states_linked = False
            self.sharded._lazy_init_hp_params_optimizer_state()


def _moments(state: dict[str, Any]) -> list[str]:
    return [name for name in state if name != "step"]
