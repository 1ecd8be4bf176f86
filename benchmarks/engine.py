"""Sampling beside the library's: the same model, prompts and limits, in turn, in one process.

    pip install -r requirements-benchmarks.txt
    python benchmarks/engine.py                              # every case, the table
    python benchmarks/engine.py --cases ragged --repeats 5 --json rows.jsonl

32 prompts of about 20 tokens, 8 completions each. The peers are `generate`, which gets all rows at once,
left-padded, as a trainer would call it, and `generate_batch`, transformers' continuous batching, made for
GPUs. A value is the median over the repeats of sampled tokens a second, ends included and padding not,
the ratio the median of the repeats' own.

The floor is what no program in float32 can pass on this machine: the operations of all matrix products over
the rate of a large one, or the bytes of weights and cache that have to be read over the rate of a large sum,
whichever takes longer; both rates are measured in the same process.

- equal: the tiny model, which never stops before 64 tokens.
- ragged: most completions stop within tens of tokens, one in sixteen runs to the limit of 512.
- vocabulary: 31 M parameters and 151,936 tokens, 64 rows.
- adapter: as equal, under LoRA of rank 16 on every linear layer; the peer is the same engine that leaves the
  adapter as it is, where ours merges it into the weights for the rollout.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402 - the path has to be set first
from torch import nn  # noqa: E402

from benchmarks.results import in_turn, write_rows  # noqa: E402
from benchmarks.step import build  # noqa: E402
from inference import SamplingParams  # noqa: E402
from inference.decoders import pad_prompts  # noqa: E402
from inference.engine import TorchEngine, cache_bytes  # noqa: E402

GROUP_SIZE = 8
# The model of benchmarks/step.py, prompts, limit, whether completions may stop.
CASES = {
    "equal": ("tiny", 32, 64, False),
    "ragged": ("ragged", 32, 512, True),
    "vocabulary": ("vocabulary", 8, 64, False),
    "adapter": ("tiny", 32, 64, False),
}
# What the paged cache of `generate_batch` may take, in place of most of what is free.
PAGED_SHARE = 0.1


def make_sides(case: str) -> dict[str, Callable[[int], list[tuple[int, int]]]]:
    """Functions of a seed that sample and return (prompt tokens, sampled tokens) of every row."""
    name, count, limit, may_stop = CASES[case]
    model, tokenizer = build(name)
    model.eval()
    prompts = [[40 + (7 * i + j) % 60 for j in range(18 + i % 5)] for i in range(count)]
    if case == "adapter":
        return make_adapter_sides(model, tokenizer, prompts, limit)
    stop = tokenizer.eos_token_id if may_stop else model.config.vocab_size - 1
    asked = {
        "max_new_tokens": limit,
        "min_new_tokens": None if may_stop else limit,
        "do_sample": True,
        "top_k": 0,
        "eos_token_id": stop,
        "pad_token_id": tokenizer.pad_token_id,
    }
    ids, mask = pad_prompts(prompts, left=True, device=model.device)
    ids, mask = ids.repeat_interleave(GROUP_SIZE, 0), mask.repeat_interleave(GROUP_SIZE, 0)
    rows = [prompt for prompt in prompts for _ in range(GROUP_SIZE)]

    @torch.inference_mode()
    def generate(seed: int) -> list[tuple[int, int]]:
        torch.manual_seed(seed)
        output = model.generate(ids, attention_mask=mask, **asked)[:, ids.shape[1] :]
        ends = (output == stop).int()
        lengths = torch.where(ends.any(1), ends.argmax(1) + 1, output.shape[1])
        sampled = lengths.tolist() if may_stop else [output.shape[1]] * len(rows)
        return [(len(prompt), tokens) for prompt, tokens in zip(rows, sampled, strict=True)]

    def generate_batch(seed: int) -> list[tuple[int, int]]:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        told = model.generate_batch(
            rows,
            generation_config=GenerationConfig(**asked),
            continuous_batching_config=ContinuousBatchingConfig(max_memory_percent=PAGED_SHARE, seed=seed),
        )
        lengths = [len(output.generated_tokens) for output in told.values()]
        if len(lengths) < len(rows):
            raise SystemExit(f"generate_batch answered {len(lengths)} of {len(rows)} requests")
        # Sums are all that is read of them, and the order of the answers is not that of the requests.
        return [(len(prompt), tokens) for prompt, tokens in zip(rows, lengths, strict=True)]

    ours = make_ours(model, tokenizer, prompts, limit, may_stop)
    return {"generate": generate, "generate_batch": generate_batch, "ours": ours}


def make_ours(
    model: nn.Module,
    tokenizer: Any,
    prompts: list[list[int]],
    limit: int,
    may_stop: bool,
    merges: bool | None = None,
) -> Callable[[int], list[tuple[int, int]]]:
    """Our side of a case."""
    engine = TorchEngine(model, tokenizer)
    engine.merges = merges
    if not may_stop:
        engine.stop_token_ids = torch.tensor([-1])

    def sample(seed: int) -> list[tuple[int, int]]:
        groups = engine.generate(prompts, GROUP_SIZE, SamplingParams(limit), (seed,))
        return [
            (len(prompt), len(completion.token_ids))
            for prompt, group in zip(prompts, groups, strict=True)
            for completion in group
        ]

    return sample


def make_adapter_sides(
    model: nn.Module, tokenizer: Any, prompts: list[list[int]], limit: int
) -> dict[str, Callable[[int], list[tuple[int, int]]]]:
    """An adapter as it is, and merged for the rollout, as the engine does where memory holds it."""
    from peft import LoraConfig, get_peft_model

    tuned = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear")).eval()
    sides = {"as it is": False, "ours": True}
    return {
        side: make_ours(tuned, tokenizer, prompts, limit, False, merges) for side, merges in sides.items()
    }


# ------------------------------------------------------------------------------------------------------------
# The floor


def machine_rates() -> tuple[float, float]:
    """Operations a second of a large matrix product in float32, and bytes a second of a large sum."""
    side, numbers = 2048, 2**26
    left, right, long = torch.randn(side, side), torch.randn(side, side), torch.ones(numbers)

    def best(work: Callable[[], Any]) -> float:
        times = []
        for _ in range(8):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
        return min(times)

    return 2 * side**3 / best(lambda: left @ right), 4 * numbers / best(long.sum)


def floor_seconds(case: str, rows: list[tuple[int, int]], rates: tuple[float, float]) -> float:
    """The least time that these rows can take."""
    model, _ = build(CASES[case][0])
    config = model.config
    linear = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    if config.tie_word_embeddings:
        linear += config.vocab_size * config.hidden_size
    size = config.hidden_size // config.num_attention_heads
    heads = config.num_attention_heads * size * config.num_hidden_layers
    tokens = sum(sampled for _, sampled in rows)
    # Positions that attention reads for all tokens of a row: prompt, prompt + 1, …
    positions = sum(sampled * prompt + sampled * (sampled - 1) // 2 for prompt, sampled in rows)
    operations = 2 * linear * tokens + 4 * heads * positions
    steps = max(sampled for _, sampled in rows)
    read = 4 * linear * steps + cache_bytes(model) * positions
    return max(operations / rates[0], read / rates[1])


# ------------------------------------------------------------------------------------------------------------
# Both, in turn


def measure(case: str, repeats: int) -> list[dict[str, Any]]:
    """The rows of a case, one for each peer."""
    sides = make_sides(case)
    rates: dict[str, list[float]] = {side: [] for side in sides}
    floors = []
    machine = machine_rates()
    for sample in sides.values():
        sample(0)
    for repeat in range(repeats):
        for side, sample in sides.items():
            began = time.perf_counter()
            rows = sample(1 + repeat)
            seconds = time.perf_counter() - began
            rates[side].append(sum(tokens for _, tokens in rows) / seconds)
            if side == "ours":
                floors.append(floor_seconds(case, rows, machine) / seconds)
    mine = statistics.median(rates["ours"])
    told = []
    for peer in sides:
        if peer != "ours":
            theirs = statistics.median(rates[peer])
            spread = {side: [min(rates[side]), max(rates[side])] for side in (peer, "ours")}
            row = {"case": case, "peer": peer, "peer_value": theirs, "ours": mine}
            row |= in_turn(rates["ours"], rates[peer])
            told.append(row | {"unit": "tokens/s", "of_floor": statistics.median(floors), "spread": spread})
    return told


def main() -> None:
    """Measure, print a table, write the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write a row a line to this file")
    arguments = parser.parse_args()
    rows = []
    print(
        f"{'case':12}{'peer':16}{'peer':>8}{'Ponder':>9}{'ratio':>7}{'of floor':>10}  "
        "tokens/s; spreads of both and of the ratio"
    )
    for case in arguments.cases:
        for row in measure(case, arguments.repeats):
            rows.append(row)
            spread = ", ".join(f"{low:,.0f} to {high:,.0f}" for low, high in row["spread"].values())
            spread += ", {:.2f} to {:.2f}".format(*row["ratios"])
            shown = f"{row['peer_value']:8,.0f}{row['ours']:9,.0f}{row['ratio']:7.2f}{row['of_floor']:10.0%}"
            print(f"{row['case']:12}{row['peer']:16}{shown}  {spread}", flush=True)
    write_rows(rows, arguments.json)


if __name__ == "__main__":
    main()
