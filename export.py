"""Export a trained model: a folder that transformers, vLLM, mlx-lm or PEFT load, held to what was trained.

    python export.py --run outputs/grpo --to exported
    python export.py --run outputs/lora --to merged --merge --dtype bfloat16 --push_to_hub me/my-model

The folder is read again from disk, and its answers and logits are compared with those of the trained model;
where they differ by more than rounding to `--dtype`, nothing is left behind and the exit code is 1.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from inference import SamplingParams
from inference.engine import TorchEngine
from models import (
    compute_dtype,
    is_quantized,
    load_merged,
    load_model,
    make_accelerator,
    save_model,
)
from prompts import AnswerStyle, answer_style, encode_prompt, format_completion, render_prompt
from runs.checkpoint import latest_checkpoint, write_folder
from runs.config import RunStopped, at_the_door, parse_config, run_script
from runs.folder import require_writable
from runs.records import read_rows, read_settings
from tokenizer import ADAPTER, load_tokenizer

PARITY_QUESTIONS = 20
ANSWER_TOKENS = 64
ROLLOUT_BYTES = 2**20  # read of the end of rollouts.jsonl
TOP_LOGITS = 20  # of each reference prompt, in parity.json
# At most: mean KL divergence of the exported from the trained model over the answers' tokens, in nats. At
# least: the share of these tokens that have to be its first choice too: rounding moves near-ties.
LIMITS = {"float32": (1e-5, 1.0), "float16": (1e-3, 0.98), "bfloat16": (1e-2, 0.95)}


@dataclass(frozen=True)
class ExportConfig:
    """Every field is a flag of the same name."""

    run: str
    """A run's folder, whose final model is taken or else its newest checkpoint; or a model's folder."""
    to: str
    """The folder to write; not there yet, or empty."""
    merge: bool = False
    """Add a LoRA adapter to the weights that it was trained on, in float32; else it is exported alone."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the weights are stored in; float32 is what was trained, the others take half the room."""
    trust_remote_code: bool = False
    """Run Python code that the model brings. Read it first."""
    push_to_hub: str | None = None
    """Also upload to this repository of the Hugging Face Hub (`hf auth login` first); private if new."""


def find_model(run: str) -> Path:
    """The model's folder of a run, or the model's folder that it is.

    Raises:
        FileNotFoundError: there is none.
    """
    folder = Path(run)
    for candidate in (folder, folder / "final"):
        if (candidate / "config.json").is_file() or (candidate / ADAPTER).is_file():
            return candidate
    checkpoint = latest_checkpoint(folder) if folder.is_dir() else None
    if checkpoint is None:
        raise FileNotFoundError(f"run {run!r} has no model in it: no final/, and no whole checkpoint")
    return checkpoint


def check_target(folder: Path) -> None:
    """Refuse to overwrite anything, and a place that is not ours to write."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"to {str(folder)!r} is there already; give another folder, or delete it")
    require_writable(folder, "to")


# ------------------------------------------------------------------------------------------------------------
# Parity


@torch.no_grad()
def logprobs_of_answers(model: nn.Module, texts: list[tuple[list[int], list[int]]]) -> list[torch.Tensor]:
    """Log-probabilities `[answer, V]` at each answer's tokens, float32 on the CPU."""
    found = []
    for prompt, answer in texts:
        ids = torch.tensor([[*prompt, *answer]], device=model.device)
        logits = model(input_ids=ids, logits_to_keep=len(answer) + 1).logits[0, :-1]
        found.append(logits.float().log_softmax(-1).cpu())
    return found


def greedy_answers(model: nn.Module, tokenizer: Any, prompts: list[list[int]]) -> list[list[int]]:
    """What a model answers where it always takes the likeliest token."""
    params = SamplingParams(ANSWER_TOKENS, temperature=0.0)
    groups = TorchEngine(model, tokenizer).generate(prompts, 1, params, (0,))
    return [group[0].token_ids for group in groups]


def reference_questions(run: Path) -> list[str]:
    """Questions of the run's own rollouts, the last ones; sums where it kept none."""
    asked: dict[str, None] = {}
    lines = run / "rollouts.jsonl"
    if lines.is_file():
        with open(lines, "rb") as file:
            file.seek(max(0, lines.stat().st_size - ROLLOUT_BYTES))
            tail = file.read().split(b"\n")[1:-1]  # the first may be cut
        for line in reversed(tail):
            asked[json.loads(line)["question"]] = None
            if len(asked) == PARITY_QUESTIONS:
                break
    sums = (f"{7 * i + 11} + {3 * i + 5} = ?" for i in range(PARITY_QUESTIONS))
    return [*asked, *sums][:PARITY_QUESTIONS]


def measure_parity(
    trained: list[torch.Tensor],
    exported: list[torch.Tensor],
    answers: list[list[int]],
    again: list[list[int]],
) -> dict[str, Any]:
    """How far an exported model is from the trained one."""
    divergences = [(p.exp() * (p - q)).sum(-1) for p, q in zip(trained, exported, strict=True)]
    kl = torch.cat(divergences)
    same = [p.argmax(-1) == q.argmax(-1) for p, q in zip(trained, exported, strict=True)]
    return {
        "same_tokens": float(torch.cat(same).double().mean()),
        "mean_kl": float(kl.mean()),
        "max_kl": float(kl.max()),
        "answers": len(answers),
        "same_answers": sum(one == other for one, other in zip(answers, again, strict=True)),
    }


def check_parity(parity: dict[str, Any], *dtypes: str) -> None:
    """Refuse an export that does not answer as what was trained.

    Raises:
        RunStopped: it differs by more than rounding to the coarsest of `dtypes` can.
    """
    most, least = max(LIMITS[dtype] for dtype in dtypes)
    # Not "larger than": a NaN is larger than nothing.
    if not parity["mean_kl"] <= most or parity["same_tokens"] < least:
        raise RunStopped(
            f"the exported model is not what was trained: {parity['same_tokens']:.1%} of the tokens are "
            f"as there (at least {least:.0%} have to be), and the mean KL divergence is "
            f"{parity['mean_kl']:.2g} nats a token (at most {most:g} with {' over '.join(dtypes)}); nothing "
            "was written. In float32 only a fault can differ: please report it"
        )


def agreement(parity: dict[str, Any]) -> str:
    """What was measured, in words."""
    return (
        f"{parity['same_answers']} of {parity['answers']} greedy answers and {parity['same_tokens']:.1%} of "
        f"their tokens are the same, mean KL divergence {parity['mean_kl']:.2g} nats a token"
    )


# ------------------------------------------------------------------------------------------------------------
# The folder


def model_card(config: ExportConfig, run: Path, parity: dict[str, Any], style: AnswerStyle) -> str:
    """What a reader of the folder should know: data, preset, scores with their intervals, how to load it and
    how it answers.
    """
    told, (rows, _) = read_settings(run), read_rows(run / "eval.jsonl")
    lines = ["---", "tags: [ponder, reasoning]", "---", "", f"# {Path(config.to).name}", ""]
    lines.append(f"Trained with Ponder (`{told.get('algo', 'sft')}`) on `{told['data']}`." if told else "")
    names = (
        "model",
        "algo",
        "data",
        "total_steps",
        "learning_rate",
        "lora_rank",
        "group_size",
        "rewards",
        "seed",
    )
    lines += ["", "| Setting | Value |", "|---|---|"] if told else []
    lines += [f"| {name} | `{told[name]}` |" for name in names if name in told]
    if rows:
        lines += ["", "| Step | Set | n | Strict accuracy | 95 % interval |", "|---|---|---|---|---|"]
        shown = rows if rows[0] is rows[-1] else [rows[0], rows[-1]]
        for row in shown:
            low, high = row["ci95"]
            accuracy = f"{row['accuracy_strict']:.1%} | {low:.1%} to {high:.1%}"
            lines.append(f"| {row['step']} | {row['set']} | {row['n']} | {accuracy} |")
        lines += [
            "",
            "Measured during training on held-out problems; the settings may have been chosen on them.",
        ]
    kind = "an adapter: `peft.AutoPeftModelForCausalLM`" if parity["is_adapter"] else "`AutoModelForCausalLM`"
    lines += [
        "",
        f"Load it with {kind}. The chat template asks for `{format_completion('…', '…', style)}`.",
        "",
        f"Compared with the trained model: {agreement(parity)} ({config.dtype}).",
        "",
    ]
    return "\n".join(lines)


def main(config: ExportConfig) -> int:
    """Export; returns the exit code."""
    target = Path(config.to)
    with at_the_door():
        check_target(target)
        source = find_model(config.run)
        is_adapter = (source / ADAPTER).is_file()
        if config.merge and not is_adapter:
            raise ValueError(f"merge needs an adapter, and {source} is a whole model; leave --merge out")
        trusts = {"trust_remote_code": config.trust_remote_code}
        tokenizer = load_tokenizer(str(source), **trusts)
        device = make_accelerator().device
        model = load_model(str(source), device=device, **trusts).eval()
    run = Path(config.run)
    prompts = [encode_prompt(tokenizer, question) for question in reference_questions(run)]
    answers = greedy_answers(model, tokenizer, prompts)
    texts = list(zip(prompts, answers, strict=True))
    trained = logprobs_of_answers(model, texts)
    dtype = getattr(torch, config.dtype)
    parity: dict[str, Any] = {"is_adapter": is_adapter and not config.merge, "dtype": config.dtype}

    def write(folder: Path) -> None:
        written = load_merged(str(source), **trusts) if config.merge else model
        save_model(folder, written.to(dtype), tokenizer)
        again = load_model(str(folder), device=device, **trusts).eval()
        exported = logprobs_of_answers(again, texts)
        parity.update(measure_parity(trained, exported, answers, greedy_answers(again, tokenizer, prompts)))
        # Weights in 4 bits are computed with in what the device is fast in.
        computed = str(compute_dtype()).removeprefix("torch.") if is_quantized(model) else "float32"
        check_parity(parity, config.dtype, computed)
        rows = []
        for (prompt, answer), logprobs in zip(texts, trained, strict=True):
            top = logprobs[0].topk(min(TOP_LOGITS, logprobs.shape[1]))
            first = {"token_ids": top.indices.tolist(), "logprobs": top.values.tolist()}
            rows.append({"prompt_ids": prompt, "answer_ids": answer, "first_token": first})
        (folder / "parity.json").write_text(json.dumps(parity | {"rows": rows}) + "\n")
        style = answer_style(render_prompt(tokenizer, "?"))
        (folder / "README.md").write_text(model_card(config, run, parity, style), encoding="utf-8")

    try:
        write_folder(target, write)
    except OSError as error:
        raise RunStopped(
            f"{target} could not be written: {error}; make room, or give another --to"
        ) from error
    finally:
        shutil.rmtree(target.with_name(f".{target.name}.tmp"), ignore_errors=True)
    print(f"exported to {target}: {agreement(parity)}")
    if config.push_to_hub:
        push(target, config.push_to_hub)
    return 0


def push(folder: Path, name: str) -> None:
    """Upload a folder to the Hub.

    Raises:
        RunStopped: the Hub refused, or was not reached; the folder stays.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder)
    except Exception as error:  # noqa: BLE001 - what the Hub's client raises depends on what it sends with
        raise RunStopped(
            f"{folder} was not uploaded to {name!r}: {error}; the folder stays as it is"
        ) from error
    print(f"uploaded to {url}")


if __name__ == "__main__":
    run_script(main, lambda: parse_config(ExportConfig))
