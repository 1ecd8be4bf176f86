"""Sampling beside the library's `generate`: the same model, prompts and limits, in turn, in one process.

    python benchmarks/engine.py                              # every case, the table
    python benchmarks/engine.py --cases ragged --repeats 5 --json rows.jsonl

32 prompts of about 20 tokens, 8 completions each. `generate` gets all 256 rows at once, left-padded, as a
trainer would call it; the value is the median over the repeats of sampled tokens a second, ends included and
padding not.

- equal: the tiny model, which never stops before 64 tokens.
- ragged: most completions stop within tens of tokens, one in sixteen runs to the limit of 512.
- vocabulary: 31 M parameters and 151,936 tokens, 64 rows.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402 - the path has to be set first

from benchmarks.step import build  # noqa: E402
from inference import SamplingParams  # noqa: E402
from inference.decoders import pad_prompts  # noqa: E402
from inference.engine import TorchEngine  # noqa: E402

GROUP_SIZE = 8
# The model of benchmarks/step.py, prompts, limit, whether completions may stop.
CASES = {
    "equal": ("tiny", 32, 64, False),
    "ragged": ("ragged", 32, 512, True),
    "vocabulary": ("vocabulary", 8, 64, False),
}


def make_sides(case: str) -> dict[str, Any]:
    """Two functions of a seed that sample and return the number of tokens."""
    name, count, limit, may_stop = CASES[case]
    model, tokenizer = build(name)
    model.eval()
    prompts = [[40 + (7 * i + j) % 60 for j in range(18 + i % 5)] for i in range(count)]
    engine = TorchEngine(model, tokenizer)
    stop = tokenizer.eos_token_id if may_stop else model.config.vocab_size - 1
    if not may_stop:  # a token that is hardly ever drawn, and does no harm where it is
        engine.stop_token_ids = torch.tensor([-1])
    ids, mask = pad_prompts(prompts, left=True, device=model.device)
    ids, mask = ids.repeat_interleave(GROUP_SIZE, 0), mask.repeat_interleave(GROUP_SIZE, 0)

    def ours(seed: int) -> int:
        groups = engine.generate(prompts, GROUP_SIZE, SamplingParams(limit), (seed,))
        return sum(len(completion.token_ids) for group in groups for completion in group)

    @torch.inference_mode()
    def generate(seed: int) -> int:
        torch.manual_seed(seed)
        output = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=limit,
            min_new_tokens=None if may_stop else limit,
            do_sample=True,
            top_k=0,
            eos_token_id=stop,
            pad_token_id=tokenizer.pad_token_id,
        )[:, ids.shape[1] :]
        ends = (output == stop).int()
        lengths = torch.where(ends.any(1), ends.argmax(1) + 1, output.shape[1])
        return int(lengths.sum()) if may_stop else output.numel()

    return {"generate": generate, "ours": ours}


def measure(case: str, repeats: int) -> dict[str, Any]:
    """The row of a case."""
    sides = make_sides(case)
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for sample in sides.values():
        sample(0)
    for repeat in range(repeats):
        for side, sample in sides.items():
            began = time.perf_counter()
            tokens = sample(1 + repeat)
            rates[side].append(tokens / (time.perf_counter() - began))
    theirs, mine = statistics.median(rates["generate"]), statistics.median(rates["ours"])
    spread = {side: [min(values), max(values)] for side, values in rates.items()}
    of_case = {"case": case, "peer": "generate", "peer_value": theirs, "ours": mine}
    return of_case | {"ratio": mine / theirs, "unit": "tokens/s", "spread": spread}


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
    print(f"{'case':14}{'generate':>10}{'Ponder':>10}{'ratio':>8}  tokens/s; spread of generate, of Ponder")
    for case in arguments.cases:
        row = measure(case, arguments.repeats)
        rows.append(row)
        spread = ", ".join(f"{low:,.0f} to {high:,.0f}" for low, high in row["spread"].values())
        shown = f"{row['peer_value']:10,.0f}{row['ours']:10,.0f}{row['ratio']:8.2f}"
        print(f"{case:14}{shown}  {spread}", flush=True)
    if arguments.json:
        arguments.json.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
