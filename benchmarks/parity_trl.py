"""Our losses beside TRL's: the same tensors through `losses.py` and through `GRPOTrainer._compute_loss`.

    pip install -r requirements-benchmarks.txt
    python benchmarks/parity_trl.py                    # the table
    python benchmarks/parity_trl.py --json rows.jsonl  # its rows

TRL's method runs as it is, on a stand-in trainer that hands it the log-probabilities of a model.
`peer_value` and `ours` are losses, `ratio` their quotient; the last column is the relative distance of the
two gradients. Exit code 1 where one is above 1e-5.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import losses  # noqa: E402 - the path has to be set first

ROWS, TOKENS, GROUP_SIZE, LIMIT = 32, 48, 8, 64
TOLERANCE = 1e-5

# Name: our knobs, TRL's settings. Clips are wide enough that some ratios stop and some do not.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({"weighting": "sequence"}, {"loss_type": "grpo"}),
    "grpo with KL": ({"weighting": "sequence", "kl_coef": 0.04}, {"loss_type": "grpo", "beta": 0.04}),
    "grpo with plain k3": (
        {"weighting": "sequence", "kl_coef": 0.04, "kl_estimator": "k3"},
        {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False},
    ),
    "dr_grpo": ({"weighting": "constant", "scale": "none"}, {"loss_type": "dr_grpo"}),
    "dapo": ({"weighting": "token", "clip_high": 0.28}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "gspo": (
        {"weighting": "sequence", "ratio_level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon_low": 3e-4,
            "epsilon_high": 4e-4,
        },
    ),
    "cispo": (
        {"weighting": "token", "surrogate": "cispo", "clip_high": 5.0},
        {"loss_type": "cispo", "epsilon_high": 5.0},
    ),
}


def make_tensors(seed: int = 0) -> dict[str, Tensor]:
    """A ragged batch whose policy has drifted from the one that sampled, and both from the reference."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    lengths = torch.randint(1, TOKENS + 1, (ROWS, 1), generator=generator)
    old = -normal(ROWS, TOKENS).abs()
    return {
        "mask": torch.arange(TOKENS) < lengths,
        "rewards": normal(ROWS).round(decimals=1),
        "old": old,
        "new": old + 0.2 * normal(ROWS, TOKENS),
        "ref": old + 0.3 * normal(ROWS, TOKENS),
    }


def ours(tensors: dict[str, Tensor], knobs: dict[str, Any]) -> tuple[float, Tensor, Tensor]:
    """Loss, gradient by the log-probabilities, and the advantages."""
    new, mask = tensors["new"].clone().requires_grad_(), tensors["mask"]
    advantages = losses.group_advantages(tensors["rewards"], GROUP_SIZE, scale=knobs.get("scale", "group"))
    weights = losses.loss_weights(mask, knobs["weighting"], LIMIT)
    loss, _ = losses.policy_loss(
        *(new, tensors["old"], advantages[:, None].expand_as(new), weights, mask),
        knobs.get("clip_low", 0.2),
        knobs.get("clip_high", 0.2),
        knobs.get("ratio_level", "token"),
        knobs.get("surrogate", "clip"),
    )
    if "kl_coef" in knobs:
        estimator = knobs.get("kl_estimator", "k3_corrected")
        kl = losses.kl_penalty(new, tensors["ref"], tensors["old"], estimator)
        loss = loss + knobs["kl_coef"] * (weights * kl).sum()
    loss.backward()
    return loss.item(), new.grad, advantages


def theirs(tensors: dict[str, Tensor], settings: dict[str, Any], advantages: Tensor) -> tuple[float, Tensor]:
    """Loss and gradient of TRL's own method, with the advantages given."""
    from trl import GRPOTrainer

    new = tensors["new"].clone().requires_grad_()
    arguments = SimpleNamespace(
        use_bias_correction_kl=settings.get("use_bias_correction_kl", True),
        delta=None,
        steps_per_generation=1,
    )
    accelerator = SimpleNamespace(
        num_processes=1, sync_gradients=True, gather=lambda x: x, reduce=lambda x, reduction: x
    )
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (new, torch.zeros_like(new), None),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _entropy_bonus_enabled=False,
        accelerator=accelerator,
        args=arguments,
        aux_loss_enabled=False,
        beta=settings.get("beta", 0.0),
        current_gradient_accumulation_steps=1,
        epsilon_low=settings.get("epsilon_low", 0.2),
        epsilon_high=settings.get("epsilon_high", 0.2),
        importance_sampling_level=settings.get("importance_sampling_level", "token"),
        loss_type=settings["loss_type"],
        max_completion_length=LIMIT,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
    )
    prompt, mask = torch.zeros(ROWS, 1, dtype=torch.long), tensors["mask"].long()
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": prompt + 1,
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": tensors["old"],
        "ref_per_token_logps": tensors["ref"],
        "num_items_in_batch": mask.sum(),
    }
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    return loss.item(), new.grad


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    args = parser.parse_args()
    tensors, rows, worst = make_tensors(), [], 0.0
    print("| Case | TRL | Ponder | Gradients apart |\n|---|---|---|---|")
    for name, (knobs, settings) in CASES.items():
        value, gradient, advantages = ours(tensors, knobs)
        peer_value, peer_gradient = theirs(tensors, settings, advantages)
        apart = float((gradient - peer_gradient).norm() / peer_gradient.norm())
        worst = max(worst, apart, abs(value - peer_value))
        rows.append({"case": name, "peer": "TRL", "peer_value": peer_value, "ours": value})
        rows[-1] |= {"ratio": value / peer_value, "unit": "loss"}
        print(f"| {name} | {peer_value:.7f} | {value:.7f} | {apart:.1e} |")
    if args.json:
        Path(args.json).write_text("".join(json.dumps(row) + "\n" for row in rows))
    raise SystemExit(int(worst > TOLERANCE))


if __name__ == "__main__":
    main()
