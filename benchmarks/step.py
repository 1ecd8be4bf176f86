"""A whole GRPO step beside TRL's: the same model, prompts, rewards, group size and lengths, in turn.

    pip install -r requirements-benchmarks.txt
    python benchmarks/step.py                              # every case, the table
    python benchmarks/step.py --cases tiny --repeats 5 --json rows.jsonl

Every measurement is a process of its own, TRL and Ponder in turn; the value is the median over the repeats of
a process' median step, the spread their least and most, the ratio the median of the repeats' own. Both
sample, score, compute advantages, the loss with its entropy and one AdamW step, and log. A step's time is
that from the end of the step before. Rewards differ within every group, so nothing is skipped. Peak memory is
the process' highest resident size, less what it was before the first step.

- tiny: the built-in model's shape with fresh weights, so that nearly every completion reaches the limit; 64
  completions a step.
- large batch: the same with 256 completions, so that less is spent between the matrix products.
- ragged: the same shape with weights written by hand: most completions stop within tens of tokens, one in
  sixteen runs to the limit of 512.
- vocabulary: 31 M parameters, 151,936 tokens, as Qwen2.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402 - the path has to be set first
from torch import nn  # noqa: E402
from transformers import PreTrainedTokenizerBase as Tokenizer  # noqa: E402
from transformers import Qwen2Config, Qwen2ForCausalLM  # noqa: E402

from benchmarks.results import in_turn, write_rows  # noqa: E402
from memory import peak_memory  # noqa: E402
from models import save_model  # noqa: E402
from prompts import prepare_tokenizer  # noqa: E402
from tiny import build_tiny, build_tiny_tokenizer  # noqa: E402

GROUP_SIZE = 8
CASES: dict[str, dict[str, int]] = {
    "tiny": {"prompts": 8, "limit": 64, "steps": 12},
    "large batch": {"prompts": 32, "limit": 64, "steps": 6},
    "ragged": {"prompts": 8, "limit": 512, "steps": 4},
    "vocabulary": {"prompts": 4, "limit": 48, "steps": 3},
}
WARMUP_STEPS = 2
REWARD = '''
def spread(completions, completion_ids, **columns):
    """Something that differs between any two completions."""
    return [sum((i + 1) * token for i, token in enumerate(ids)) % 1009 / 1009 for ids in completion_ids]
'''


# ------------------------------------------------------------------------------------------------------------
# What both work on


def build(case: str) -> tuple[nn.Module, Tokenizer]:
    """The model and tokenizer of a case."""
    if case in ("tiny", "large batch"):
        return build_tiny(0)
    if case == "ragged":
        return build_ragged()
    return build_large()


def build_ragged() -> tuple[nn.Module, Tokenizer]:
    """The tiny model's shape, whose next token depends on the last one alone.

    In the state that every prompt begins in, a token ends the completion, or with a sixteenth of that
    chance leads to the other state, in which nothing does. Attention and MLP compute what they always do, and
    add nothing.
    """
    model, tokenizer = build_tiny(0)
    config = model.config
    config.tie_word_embeddings = False
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        long = torch.arange(config.vocab_size) >= config.vocab_size - 8
        embeddings = model.model.embed_tokens.weight
        embeddings.zero_()
        embeddings[~long, 0], embeddings[long, 1] = 1.0, 1.0
        scale = config.hidden_size**0.5  # what the last norm makes of a single 1
        head = model.lm_head.weight
        head.zero_()
        head[long, 0], head[long, 1] = -30 / scale, 30 / scale
        # e^x / (number of other tokens + e^x) is the chance of a step; about 1 in 20 stops, 1 in 300 goes on.
        others = float((~long).sum() - 1)
        head[config.eos_token_id, 0] = torch.tensor(others / 20).log() / scale
        head[config.eos_token_id, 1] = -30 / scale
        head[config.vocab_size - 1, 0] = torch.tensor(others / 300).log() / scale
        head[~long, 1] = -30 / scale
    return model, tokenizer


def build_large() -> tuple[nn.Module, Tokenizer]:
    """Qwen2 with its vocabulary, 31 M parameters."""
    from tokenizers import Tokenizer as Rust
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    small = build_tiny_tokenizer()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|pad|>", "<|end|>", *alphabet]
    words += [f"word{i}" for i in range(151_936 - len(words))]
    rust = Rust(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=rust, pad_token="<|pad|>", eos_token="<|end|>", chat_template=small.chat_template
    )
    config = Qwen2Config(
        vocab_size=len(words),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen2ForCausalLM(config), tokenizer


def prepare(case: str, folder: Path) -> None:
    """Write the model, the prompts and the reward of a case."""
    model, tokenizer = build(case)
    prepare_tokenizer(tokenizer, "")
    save_model(folder / "model", model, tokenizer)
    rows = [{"question": f"{a} + {a * 7 % 90 + 10} = ?"} for a in range(10, 522)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "spread.py").write_text(REWARD)


# ------------------------------------------------------------------------------------------------------------
# One side, one process


def run_ours(case: str, folder: Path) -> dict[str, Any]:
    """Steps of train_grpo.py."""
    import train_grpo

    shape = CASES[case]
    ends: list[float] = []
    memory: list[float] = []
    step = train_grpo.train_step

    def timed(training: Any) -> None:
        if not memory:
            memory.append(peak_mib())
        step(training)
        ends.append(time.perf_counter())

    train_grpo.train_step = timed
    config = train_grpo.GRPOConfig(
        model=str(folder / "model"),
        data=str(folder / "train.jsonl"),
        rewards={f"{folder / 'spread.py'}:spread": 1.0},
        output=str(folder / f"run-{os.getpid()}"),
        total_steps=WARMUP_STEPS + shape["steps"],
        prompts_per_step=shape["prompts"],
        group_size=GROUP_SIZE,
        max_completion_tokens=shape["limit"],
        learning_rate=1e-9,
        kl_coef=0.0,
        eval_every=0,
        save_every=10_000,
    )
    train_grpo.main(config)
    lines = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    tokens = [json.loads(line)["rollout/completion_tokens"] for line in lines]
    return {"ends": ends, "memory_mb": peak_mib() - memory[0], "tokens": tokens}


def run_trl(case: str, folder: Path) -> dict[str, Any]:
    """Steps of TRL's GRPOTrainer."""
    import importlib.util

    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    spec = importlib.util.spec_from_file_location("spread", folder / "spread.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shape = CASES[case]
    ends: list[float] = []
    memory: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            if not memory:
                memory.append(peak_mib())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

    questions = [json.loads(line)["question"] for line in (folder / "train.jsonl").read_text().splitlines()]
    rows = [{"prompt": [{"role": "user", "content": question}]} for question in questions]
    # What of a step goes through the model at once: everything, or what Ponder's default budget holds.
    per_pass = shape["prompts"] * GROUP_SIZE
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        reward_funcs=module.spread,
        train_dataset=Dataset.from_list(rows),
        callbacks=[Clock()],
        args=GRPOConfig(
            output_dir=str(folder / f"trl-{os.getpid()}"),
            max_steps=WARMUP_STEPS + shape["steps"],
            per_device_train_batch_size=per_pass,
            num_generations=GROUP_SIZE,
            max_completion_length=shape["limit"],
            loss_type="grpo",
            beta=0.0,
            learning_rate=1e-9,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
    )
    trainer.train()
    tokens = [row["completions/mean_length"] for row in trainer.state.log_history if "loss" in row]
    return {"ends": ends, "memory_mb": peak_mib() - memory[0], "tokens": tokens}


def peak_mib() -> float:
    """The highest resident size of this process so far."""
    return peak_memory(torch.device("cpu")) / 2**20


# ------------------------------------------------------------------------------------------------------------
# Both, in turn


def measure(case: str, repeats: int) -> list[dict[str, Any]]:
    """The rows of a case."""
    seconds: dict[str, list[float]] = {"trl": [], "ours": []}
    memory: dict[str, list[float]] = {"trl": [], "ours": []}
    tokens: dict[str, list[float]] = {"trl": [], "ours": []}
    with tempfile.TemporaryDirectory() as folder:
        prepare(case, Path(folder))
        for _ in range(repeats):
            for side in seconds:
                command = [sys.executable, __file__, "--side", side, "--cases", case, "--folder", folder]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{side} failed on {case}:\n{done.stderr[-3000:]}")
                told = json.loads(done.stdout.splitlines()[-1])
                ends = told["ends"]
                steps = [b - a for a, b in zip(ends[WARMUP_STEPS - 1 :], ends[WARMUP_STEPS:], strict=False)]
                seconds[side].append(statistics.median(steps))
                memory[side].append(told["memory_mb"])
                tokens[side].append(statistics.fmean(told["tokens"]))

    def row(what: str, unit: str, values: dict[str, list[float]]) -> dict[str, Any]:
        theirs, ours = statistics.median(values["trl"]), statistics.median(values["ours"])
        spread = {side: [min(values[side]), max(values[side])] for side in values}
        of_case = {"case": f"{case}: {what}", "peer": "trl", "peer_value": theirs, "ours": ours}
        return of_case | in_turn(values["trl"], values["ours"]) | {"unit": unit, "spread": spread}

    return [
        row("step", "s", seconds),
        row("peak memory of the steps", "MiB", memory),
        row("mean completion", "tokens", tokens),
    ]


def main() -> None:
    """Measure, print a table, write the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write a row a line to this file")
    parser.add_argument("--side", choices=("ours", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        run = run_ours if arguments.side == "ours" else run_trl
        print(json.dumps(run(arguments.cases[0], arguments.folder)))
        return
    rows = []
    print(f"{'case':40}{'TRL':>10}{'Ponder':>10}{'ratio':>8}  unit    spread of TRL, of Ponder, of the ratio")
    for case in arguments.cases:
        for row in measure(case, arguments.repeats):
            rows.append(row)
            spreads = [*row["spread"].values(), row["ratios"]]
            spread = ", ".join(f"{low:.4g} to {high:.4g}" for low, high in spreads)
            print(
                f"{row['case']:40}{row['peer_value']:10.4g}{row['ours']:10.4g}{row['ratio']:8.2f}  "
                f"{row['unit']:7} {spread}",
                flush=True,
            )
    write_rows(rows, arguments.json)


if __name__ == "__main__":
    main()
