"""Sharded training (FSDP2, or DeepSpeed's ZeRO by `zero.py`): every process holds its part of the weights,
the gradients and the moments.

What samples and what is saved needs the weights in one piece: a plain copy on every process, for as long as
that takes. Where processes replicate the model, or where there is one, nothing here does anything.
"""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

import zero
from llama import run_block
from memory import is_out_of_memory
from runs.config import RunStopped

REPLICATE = "or replicate the model (configs/accelerate/ddp.yaml)"


def is_sharded(accelerator: Accelerator) -> bool:
    """Does every process hold no more than its part of the policy, or of its gradients and moments?

    Processes then meet in every part of an update.
    """
    return accelerator.is_fsdp2 or zero.stage_of(accelerator) is not None


def division_of(accelerator: Accelerator) -> str | None:
    """How a run shares out what it holds, by the name of the launcher's file that asks for it
    (`configs/accelerate/`): fsdp2, fsdp2_zero2, zero2 or zero3; None where every process holds everything.
    """
    if stage := zero.stage_of(accelerator):
        return f"zero{stage}"
    if not accelerator.is_fsdp2:
        return None
    return "fsdp2" if accelerator.state.fsdp_plugin.reshard_after_forward else "fsdp2_zero2"


# ------------------------------------------------------------------------------------------------------------
# What was asked for


def read_plan(compute_dtype: torch.dtype) -> FullyShardedDataParallelPlugin | None:
    """How to shard by FSDP2, from what `accelerate launch` left in the environment; None where it does not.

    Args:
        compute_dtype: the weights are gathered in; gradients are summed in float32.

    Raises:
        ValueError: what cannot be done here.
    """
    is_zero = zero.read_stage() is not None
    if compute_dtype == torch.float16 and (is_zero or zero.is_on("ACCELERATE_USE_FSDP")):
        raise ValueError(
            "sharding needs GPUs with bfloat16; replicate (configs/accelerate/ddp.yaml) with --lora_rank 16"
        )
    if is_zero or not zero.is_on("ACCELERATE_USE_FSDP"):
        return None
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ValueError(f"fsdp_version must be 2, got {version}; see configs/accelerate/fsdp2.yaml")
    for name, instead in (
        ("FSDP_OFFLOAD_PARAMS", "use more GPUs, or give --lora_rank 16"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "every process reads the weights"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "give --gradient_checkpointing"),
    ):
        if zero.is_on(name):
            raise ValueError(f"{name.lower()} must be false: {instead}")
    # Accelerate's own choice rounds log-probabilities and sums of gradients to half precision.
    halved = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = halved if compute_dtype == torch.bfloat16 else MixedPrecisionPolicy()
    return FullyShardedDataParallelPlugin(mixed_precision_policy=policy)


def shard_on_cpu(accelerator: Accelerator, plan: FullyShardedDataParallelPlugin | None) -> None:
    """Shard on processors too, where Accelerate would replicate without a word."""
    if plan and accelerator.distributed_type == DistributedType.MULTI_CPU:
        accelerator.state.fsdp_plugin = plan
        for state in (PartialState(), accelerator.state):
            state.distributed_type = DistributedType.FSDP


def refuse_unshardable(accelerator: Accelerator, config: Any) -> None:
    """Refuse what needs whole matrices, or a second module that trains.

    Args:
        accelerator: decides whether anything is sharded.
        config: a `runs.training.TrainingConfig`.

    Raises:
        ValueError: it names the field.
    """
    if not is_sharded(accelerator):
        return
    if config.optimizer != "adamw":
        raise ValueError(f"optimizer {config.optimizer} cannot be sharded; give adamw, {REPLICATE}")
    if config.quantize != "none":
        raise ValueError(f"quantize {config.quantize} cannot be sharded; leave it out, {REPLICATE}")
    if getattr(config, "baseline", None) == "critic":
        raise ValueError(f"a critic cannot be sharded; give --algo grpo, {REPLICATE}")
    if config.torch_compile:
        raise ValueError(f"torch_compile was never run on parts of weights; leave it out, {REPLICATE}")


# ------------------------------------------------------------------------------------------------------------
# The weights


class Weights:
    """The model of a policy as one process can sample from it and save it.

    Attributes:
        trained: how many weights the policy learns.
    """

    def __init__(self, accelerator: Accelerator, policy: nn.Module) -> None:
        """Take the `models.Policy` before it is prepared: it is sharded in place."""
        self.policy = policy
        self.trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
        self.copy: nn.Module | None = None
        if is_sharded(accelerator) and zero.stage_of(accelerator) != 2:
            # Of the modules a copy; of their weights, for the time being, the shapes.
            shapes = {id(p): _empty(p) for p in policy.model.parameters()}
            buffers = {id(b): b.to(accelerator.device) for b in policy.model.buffers()}
            self.copy = copy.deepcopy(policy.model, shapes | buffers)

    @contextmanager
    def whole(self, dtype: torch.dtype | None = None) -> Iterator[nn.Module]:
        """The model with all its weights. All processes enter and leave together.

        Where it is sharded this is a plain copy, which asks nothing of other processes: each may sample for
        as long as it needs.

        Args:
            dtype: of the copy; None for the model's own.

        Raises:
            RunStopped: a process has no room for the copy. The others wait for it, so it has to end.
        """
        if self.copy is None:
            yield self.policy.model
            return
        try:
            self._fill(lambda shard: nn.Parameter(_gather(shard).to(dtype or shard.dtype), False))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise RunStopped(
                "memory ran out while the weights were gathered: a whole copy must fit beside a process' "
                "part; use more processes, or begin another run with --lora_rank 16"
            ) from error
        try:
            yield self.copy
        finally:
            self._fill(_empty)

    @torch.no_grad()
    def _fill(self, make: Callable[[nn.Parameter], nn.Parameter]) -> None:
        for module in self.policy.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # a pass without gradients leaves what it gathered
        made: dict[int, nn.Parameter] = {}  # a weight under two names stays one
        for name, shard in self.policy.model.named_parameters(remove_duplicate=False):
            if id(shard) not in made:
                made[id(shard)] = make(shard)
            owner, _, leaf = name.rpartition(".")
            setattr(self.copy.get_submodule(owner), leaf, made[id(shard)])


def prepare(accelerator: Accelerator, policy: nn.Module, optimizer: Optimizer) -> tuple[Any, Any]:
    """As `accelerator.prepare`; the blocks of a sharded policy gather their weights also for `llama`."""
    if zero.stage_of(accelerator):
        return zero.prepare(accelerator, policy, optimizer)
    policy, optimizer = accelerator.prepare(policy, optimizer)
    for module in policy.modules() if is_sharded(accelerator) else ():
        if isinstance(module, FSDPModule) and module is not policy:
            module.run_packed = partial(run_block, module)
            register_fsdp_forward_method(module, "run_packed")
    return policy, optimizer


def _empty(parameter: Tensor) -> nn.Parameter:
    shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves the parameter itself with nothing
    return nn.Parameter(torch.empty(shape, dtype=parameter.dtype, device="meta"), False)


def _gather(tensor: Tensor) -> Tensor:
    if hasattr(tensor, "ds_id"):
        return zero.gather(tensor)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def clip_gradients(accelerator: Accelerator, policy: nn.Module, optimizer: Any, max_norm: float) -> float:
    """Clip the gradients of all processes together; returns their norm before."""
    if isinstance(optimizer, zero.ZeroOptimizer):
        return optimizer.clip(max_norm)
    return float(accelerator.clip_grad_norm_(policy.parameters(), max_norm))


# ------------------------------------------------------------------------------------------------------------
# The moments


def whole_state(optimizer: Optimizer, keep: bool) -> dict[str, Any]:
    """The optimizer's state as it would be without sharding. All processes ask for it together.

    Args:
        optimizer: as prepared.
        keep: False leaves out what was gathered: one process writes.
    """

    if isinstance(optimizer, zero.ZeroOptimizer):
        return optimizer.state_dict(keep)

    def gather(shard: DTensor) -> Tensor | None:
        whole = shard.full_tensor()
        return whole.cpu() if keep else None

    return tree_map_only(DTensor, gather, optimizer.state_dict())


def load_whole_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Restore a `whole_state`, of which every process keeps its part, however many there are."""
    if isinstance(optimizer, zero.ZeroOptimizer):
        optimizer.load_state_dict(state)
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if isinstance(parameters[0], DTensor):
        of_parameters = {
            number: {name: _part(value, parameters[number]) for name, value in values.items()}
            for number, values in state["state"].items()
        }
        state = state | {"state": of_parameters}
    optimizer.load_state_dict(state)


def _part(value: Any, like: DTensor) -> Any:
    if not isinstance(value, Tensor) or value.shape != like.shape:
        return value  # the number of steps
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
