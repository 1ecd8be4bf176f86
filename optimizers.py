"""How weights move: AdamW, in 8 bits where memory is short, or Muon for the matrices of a model that starts
from nothing; and the learning rate over time.
"""

import importlib.util
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from sharding import clip_gradients

BETAS = (0.9, 0.95)
# Muon's rate over AdamW's, measured on the tiny model's cold start: torch's own matching of the two moves the
# matrices at about half this rate (`match_rms_adamw`), and the loss after 100 steps is 0.84, not 0.65.
MUON_FACTOR = 4.0

OptimizerName = Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "muon"]


def make_optimizer(
    policy: nn.Module,
    name: OptimizerName,
    learning_rate: float,
    weight_decay: float,
    critic_learning_rate: float | None = None,
) -> Optimizer:
    """The optimizer of the trained parameters.

    Args:
        policy: its parameters that require gradients are trained.
        name: "adamw"; the same with its moments in 8 bits (bitsandbytes, arXiv 2110.02861), "paged" to main
            memory where the GPU's runs out; or "muon", which takes the matrices inside the layers and leaves
            the rest to AdamW.
        learning_rate: AdamW's highest; Muon's is `MUON_FACTOR` times that.
        weight_decay: of matrices; norms and biases have no business at zero.
        critic_learning_rate: of everything in `policy.critic`, by AdamW; needed where there is one.

    Raises:
        ValueError: 8 bits without bitsandbytes or on an Apple GPU, or "paged" without a GPU.
    """
    named = [(name, p) for name, p in policy.named_parameters() if p.requires_grad]
    critic = [(name, p) for name, p in named if name.startswith("critic.")]
    trained = [(name, p) for name, p in named if not name.startswith("critic.")]
    matrices = [p for _, p in trained if p.ndim >= 2]
    apart = [{"params": [p for _, p in trained if p.ndim < 2], "weight_decay": 0.0}]
    if critic:
        trunk = [p for name, p in critic if p.ndim >= 2 and name.startswith("critic.trunk.")]
        rest = [p for name, p in critic if p.ndim < 2 or not name.startswith("critic.trunk.")]
        apart.append({"params": trunk, "lr": critic_learning_rate})
        apart.append({"params": rest, "weight_decay": 0.0, "lr": critic_learning_rate})
    settings = {"lr": learning_rate, "betas": BETAS, "weight_decay": weight_decay, "fused": True}
    if name == "adamw":
        # Adapters have no vectors, and DeepSpeed drops a group of nothing, which a schedule would miss.
        return AdamW([group for group in ({"params": matrices}, *apart) if group["params"]], **settings)
    if name != "muon":
        del settings["fused"]
        return _eight_bit(name)([{"params": matrices}, *apart], **settings)
    # Rows of an embedding or head are separate directions, one a token: nothing to orthogonalise.
    # By type, not by name: GPT-2 calls its embeddings wte and wpe, and a tied head is one of them.
    tables = {id(module.weight) for module in policy.modules() if isinstance(module, nn.Embedding)}
    tables |= {id(p) for n, p in trained if "lm_head" in n or "trainable_tokens" in n}
    inside = {id(p) for _, p in trained if p.ndim == 2 and id(p) not in tables}
    hidden = [p for p in matrices if id(p) in inside]
    others = [p for p in matrices if id(p) not in inside]
    muon = Muon(hidden, MUON_FACTOR * learning_rate, weight_decay)
    return Together([muon, AdamW([{"params": others}, *apart], **settings)])


def _eight_bit(name: str) -> type[Optimizer]:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"optimizer {name} needs bitsandbytes, which is not installed; give --optimizer adamw"
        )
    if PartialState().device.type == "mps":
        raise ValueError(f"optimizer {name} does not run on an Apple GPU; give --optimizer adamw")
    if name.startswith("paged") and not torch.cuda.is_available():
        raise ValueError(f"optimizer {name} needs a GPU to page from; give --optimizer adamw_8bit")
    import bitsandbytes  # seconds, for those who need it

    return {
        "adamw_8bit": bitsandbytes.optim.AdamW8bit,
        "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
    }[name]


class Muon(Optimizer):
    """Momentum whose matrices are orthogonalised before they move the weights (Jordan et al., 2024).

    The update of `torch.optim.Muon(adjust_lr_fn="original")`, which computes in bfloat16, one matrix after
    another: processors without bfloat16 emulate it. Here matrices of one shape go through together, in
    float32, in a third of the time on such a machine.
    """

    MOMENTUM = 0.95
    # Of the quintic whose iteration drives every singular value to about 1.
    COEFFICIENTS = (3.4445, -4.7750, 2.0315)
    ITERATIONS = 5

    def __init__(self, matrices: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        """Take the matrices to move; weight decay is decoupled, as in AdamW."""
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Move every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape.setdefault(tuple(sorted(matrix.shape)), []).append(matrix)
            for matrices in by_shape.values():
                moves = orthogonalize(torch.stack([_lying(self._momentum(matrix)) for matrix in matrices]))
                for matrix, move in zip(matrices, moves, strict=True):
                    rows, columns = matrix.shape
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    move = move.T if rows > columns else move
                    matrix.add_(move, alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))

    def _momentum(self, matrix: nn.Parameter) -> Tensor:
        """Nesterov's: the gradient on its way to the running mean, which moves on."""
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix.grad)
        state["momentum_buffer"].lerp_(matrix.grad, 1 - self.MOMENTUM)
        return matrix.grad.lerp(state["momentum_buffer"], self.MOMENTUM)


def _lying(matrix: Tensor) -> Tensor:
    """A matrix with no more rows than columns: the smaller side is the one that is multiplied by itself."""
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix


def orthogonalize(matrices: Tensor) -> Tensor:
    """Each matrix `[N, R, C]` with its singular values driven to about 1, between 0.7 and 1.2."""
    a, b, c = Muon.COEFFICIENTS
    moved = matrices.float()
    moved = moved / moved.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(Muon.ITERATIONS):
        square = moved @ moved.mT
        moved = torch.baddbmm(moved, torch.baddbmm(square, square, square, beta=b, alpha=c), moved, beta=a)
    return moved


class Together(Optimizer):
    """Several optimizers that step as one; their parameter groups, side by side, are its own."""

    def __init__(self, parts: list[Optimizer]) -> None:
        """Take the parts as they are: a scheduler that sets a group's learning rate here sets it there."""
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share_groups()

    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Let every part step."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The parts' states, in order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the parts."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()

    def _share_groups(self) -> None:
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def take_step(
    accelerator: Accelerator,
    policy: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    loss: float,
    max_grad_norm: float,
    logprobs: float = 0.0,
) -> tuple[float, str | None]:
    """Clip the gradients and step; but leave the weights alone where loss, gradient or log-probabilities are
    not finite, on all processes if on one. The learning rate moves on in any case.

    Args:
        accelerator: of the run.
        policy: whose gradients are there.
        optimizer: as prepared.
        scheduler: of the learning rate.
        loss: of this process.
        max_grad_norm: gradients are clipped to this norm.
        logprobs: the sum of all that the loss was made of, where it may hide that one is not finite.

    Returns:
        The gradients' norm before clipping, and why there was no step; None where there was.
    """
    grad_norm = clip_gradients(accelerator, policy, optimizer, max_grad_norm)
    # Gradients in float16 overflow now and then, as they should: the scaler leaves such a step out itself,
    # and scales less from there on, until less is nothing.
    scaler = accelerator.scaler
    may_overflow = scaler is not None and scaler.get_scale() >= 1
    is_fine = math.isfinite(loss) and (math.isfinite(grad_norm) or may_overflow) and math.isfinite(logprobs)
    figures = f"loss {loss:g}, gradient norm {grad_norm:g}"
    figures += "" if math.isfinite(logprobs) else f", log-probabilities {logprobs:g}"
    told = gather_object([None if is_fine else figures])
    cause = next((cause for cause in told if cause), None)
    if cause is None:
        optimizer.step()
    elif scaler is not None:
        scaler.update()  # it has seen these gradients, and expects an end to their step
    scheduler.step()
    optimizer.zero_grad()
    return grad_norm, cause


def make_scheduler(
    optimizer: Optimizer,
    name: Literal["constant", "linear", "cosine"],
    warmup_steps: int,
    total_steps: int,
) -> LambdaLR:
    """The learning rate over optimizer steps: a linear rise, then constant, or a fall to 0.

    Not `transformers.get_scheduler`: importing it imports peft and bitsandbytes, seconds in every process.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        falls = {
            "constant": 1.0,
            "linear": 1.0 - progress,
            "cosine": (1.0 + math.cos(math.pi * progress)) / 2,
        }
        return falls[name]

    return LambdaLR(optimizer, factor)
