"""How long every recipe takes and what it costs, by arithmetic: the table of docs/scaling.md.

    python benchmarks/hours.py
    python benchmarks/hours.py --json rows.jsonl

Nothing was measured on a GPU. A step samples, then learns (docs/scaling.md, "What a step costs"): a token
of the longest completion takes as long as its kernels need to be launched, or its weights to be read, or its
products to be computed, whichever is longest; an update takes its operations at a third of what the card
could do. Completions are taken to be half as long as they may be, but for the longest.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
LAUNCH_S = 8e-6  # of a kernel, from eager PyTorch
KERNELS = 25  # a layer and token
REACHED = 0.33  # of the operations that a card could do
PROMPT_TOKENS = 150


@dataclass(frozen=True)
class Card:
    """A machine, and what an hour of it costs to rent.

    Attributes:
        name: as people call it.
        tera_ops: products and sums a second in half precision (on a Mac's processor in float32), in 10^12.
        bandwidth: of its memory, in 10^9 bytes a second.
        dollars: an hour, roughly; `price_per_hour` of a dry run takes yours.
        count: of cards.
    """

    name: str
    tera_ops: float
    bandwidth: float
    dollars: float
    count: int = 1


@dataclass(frozen=True)
class Shape:
    """Of a model: its blocks, and the weights that a token is multiplied with, the head's among them."""

    layers: int
    weights: float


T4 = Card("a T4", 65, 320, 0.35)
RTX_4090 = Card("an RTX 4090", 165, 1_008, 0.5)
A100 = Card("an A100", 312, 2_039, 1.6)
H100S = Card("eight H100", 990, 3_350, 2.5, count=8)
MAC = Card("a Mac's processor", 1, 100, 0.0)

QWEN_05B, QWEN_15B, QWEN_3B = Shape(24, 0.49e9), Shape(28, 1.54e9), Shape(36, 3.09e9)
QWEN_7B, LLAMA_8B = Shape(28, 7.07e9), Shape(32, 7.5e9)

RECIPES = {
    "gsm8k_qwen2.5_0.5b": (QWEN_05B, RTX_4090),
    "gsm8k_qwen2.5_0.5b_16gb": (QWEN_05B, T4),
    "gsm8k_qwen2.5_0.5b_mac": (QWEN_05B, MAC),
    "gsm8k_qwen2.5_1.5b_lora": (QWEN_15B, RTX_4090),
    "gsm8k_qwen2.5_math_1.5b": (QWEN_15B, RTX_4090),
    "gsm8k_qwen2.5_1.5b_a100": (QWEN_15B, A100),
    "gsm8k_qwen2.5_3b_r1_zero": (QWEN_3B, A100),
    "gsm8k_llama3_8b_qlora": (LLAMA_8B, RTX_4090),
    "gsm8k_qwen2.5_7b_8gpu": (QWEN_7B, H100S),
}


def bytes_a_weight(config: dict[str, Any], card: Card) -> float:
    """What moves for each weight and token.

    Autocast keeps a copy of weights that learn, and casts others anew; those in 4 bits are written out first.
    """
    if card is MAC:
        return 4.0
    if config.get("quantize"):
        return 5.0
    return 8.0 if config.get("lora_rank") else 2.0


def estimate(recipe: str) -> dict[str, float]:
    """Seconds of a step's two halves, hours and dollars of a run."""
    shape, card = RECIPES[recipe]
    config = yaml.safe_load((ROOT / "configs" / f"{recipe}.yaml").read_text())
    prompts = config["prompts_per_step"] / card.count
    rows = prompts * config["group_size"]
    ops = REACHED * card.tera_ops * 1e12

    def rollout_s(rows: float) -> float:
        launch = KERNELS * shape.layers * LAUNCH_S
        read = bytes_a_weight(config, card) * shape.weights / (card.bandwidth * 1e9)
        return config["max_completion_tokens"] * max(launch, read, 2 * shape.weights * rows / ops)

    # Adapters want no gradient of the weights; checkpointing runs forward once more.
    passes = (4 if config.get("lora_rank") else 6) + 2 * bool(config.get("gradient_checkpointing"))
    tokens = rows * config["max_completion_tokens"] / 2 + prompts * PROMPT_TOKENS
    # Dynamic sampling fills a batch up in a second rollout, as a rule.
    sample_s = rollout_s(rows) * (2 if config.get("algo") == "dapo" else 1)
    update_s = passes * shape.weights * tokens / ops
    examinations = 1 + config["total_steps"] // config["eval_every"]
    seconds = config["total_steps"] * (sample_s + update_s)
    seconds += examinations * rollout_s(config["eval_limit"] / card.count)
    hours = seconds / 3600
    return {
        "sample_s": sample_s,
        "update_s": update_s,
        "hours": hours,
        "dollars": hours * card.dollars * card.count,
    }


def told(recipe: str) -> str:
    """The line of a recipe's file."""
    of = estimate(recipe)
    _, card = RECIPES[recipe]
    cost = f", about {of['dollars']:.2g} dollars" if card.dollars else ""
    return f"Time, by arithmetic (benchmarks/hours.py): {of['hours']:.2g} h on {card.name}{cost}."


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write rows as JSON lines")
    arguments = parser.parse_args()
    print("| Recipe | On | Sampling, s a step | Update, s a step | Hours | Dollars |")
    print("|---|---|---|---|---|---|")
    rows = []
    for recipe, (_, card) in RECIPES.items():
        of = estimate(recipe)
        figures = [f"{of[name]:.2g}" for name in ("sample_s", "update_s", "hours")]
        cost = f"{of['dollars']:.2g}" if card.dollars else "–"
        print(f"| `{recipe}` | {card.name} | {' | '.join(figures)} | {cost} |")
        rows.append({"recipe": recipe, "card": card.name} | of)
    if arguments.json:
        arguments.json.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
