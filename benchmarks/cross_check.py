"""Our greedy strict accuracy beside that of EleutherAI's lm-evaluation-harness: same problems, same weights.

    pip install -r requirements-benchmarks.txt
    python benchmarks/cross_check.py --model outputs/demo-seed0/grpo/final
    python benchmarks/cross_check.py --model DIR DIR --data FILE.jsonl --limit 500 --json rows.jsonl

`evaluate.py` asks and judges as it does. lm-eval gets the problems as a task, a data file and a short YAML:
it renders the folder's chat template, generates with transformers in float32, takes the answer out with a
regular expression and compares strings. Its prompts are held to ours byte for byte. Exit code 1 where one
differs, or where the two are apart by more than one problem. Strings are a fair comparison where an answer
has one way of writing, as sums have.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import evaluate  # noqa: E402 - the path has to be set first
from answers import SAMPLES  # noqa: E402
from benchmarks.results import write_rows  # noqa: E402
from data import Problem  # noqa: E402
from prompts import completion_prefix, render_prompt  # noqa: E402
from tokenizer import load_tokenizer  # noqa: E402

TASK = "ponder"
# Not ours, on purpose: the last answer between tags, or in a box of at most one level of braces within, after
# the thought.
ANSWER = r"(?s)</think>.*(?:<answer>(.*?)</answer>|\\boxed\{((?:[^{}]|\{[^{}]*\})*)\})"
TOLERANCE = 1  # problems


class Judged(NamedTuple):
    """What a side made of a problem: the model's text, what was taken as its answer, the judgement."""

    text: str
    answer: str | None
    is_right: bool


def write_task(folder: Path, problems: Sequence[Problem], stop: str, max_completion_tokens: int) -> None:
    """Write the problems and the task that asks them as lm-eval reads it.

    Args:
        folder: gets `problems.jsonl` and `ponder.yaml`.
        problems: each with a gold.
        stop: the text of the EOS.
        max_completion_tokens: the EOS included.
    """
    rows = [{"question": problem.question, "gold": problem.gold} for problem in problems]
    file = folder / "problems.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "question",  # the columns as they are: the model's own template does the rest
        "doc_to_target": "gold",
        "generation_kwargs": {
            "do_sample": False,
            "repetition_penalty": 1.0,  # a model's generation_config.json may hold another
            "until": [stop],
            "max_gen_toks": max_completion_tokens,
        },
        "filter_list": [
            {
                "name": "marked",
                "filter": [{"function": "regex", "regex_pattern": ANSWER}, {"function": "take_first"}],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }
    (folder / f"{TASK}.yaml").write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")


def ask_lm_eval(folder: Path, model: str, batch_size: int) -> list[dict[str, Any]]:
    """lm-eval's record of every problem of the task in `folder`, in their order.

    Raises:
        SystemExit: it failed, with the end of what it said.
    """
    is_folder = Path(model).is_dir()
    source = str(Path(model).resolve()) if is_folder else model
    command = [
        *(sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", TASK, "--include_path", str(folder)),
        *("--model_args", f"pretrained={source},dtype=float32,add_bos_token=False"),
        *("--apply_chat_template", "--device", "cpu", "--batch_size", str(batch_size)),
        *("--output_path", str(folder / "told"), "--log_samples"),
    ]
    caches = {"HF_DATASETS_CACHE": str(folder / "cache")} | ({"HF_HUB_OFFLINE": "1"} if is_folder else {})
    # From a folder of its own: from ours, `import evaluate` would find evaluate.py.
    done = subprocess.run(command, cwd=folder, env=os.environ | caches, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"lm-eval failed on {model}:\n{(done.stdout + done.stderr)[-3000:]}")
    (file,) = folder.glob("told/**/samples_*.jsonl")
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return sorted(records, key=lambda record: record["doc_id"])


def measure(model: str, arguments: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """The row of a model, and whether both sides agree; prints where they do not."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = evaluate.EvaluateConfig(
            model=model,
            data=arguments.data,
            limit=arguments.limit,
            max_completion_tokens=arguments.max_completion_tokens,
            output=str(folder / "ours"),
        )
        if code := evaluate.main(config):
            raise SystemExit(code)
        problems, _ = evaluate.load_exam(config)
        tokenizer = load_tokenizer(model)
        write_task(folder, problems, tokenizer.eos_token, arguments.max_completion_tokens)
        records = ask_lm_eval(folder, model, arguments.batch_size)
        lines = (folder / "ours" / SAMPLES).read_text(encoding="utf-8").splitlines()
    prompts = [render_prompt(tokenizer, problem.question) for problem in problems]
    asked = [record["arguments"]["gen_args_0"]["arg_0"] for record in records]
    if asked != prompts:
        number = next(i for i, pair in enumerate(zip(asked, prompts, strict=True)) if len(set(pair)) > 1)
        print(f"problem {number} is asked differently:\n  {asked[number]!r}\n  {prompts[number]!r}")
        return {}, False
    rows = sorted((json.loads(line) for line in lines), key=lambda row: row["number"])
    ours = [
        Judged(
            row["answers"][0]["completion"].removeprefix(completion_prefix(prompt)),
            row["answers"][0]["extracted"],
            row["answers"][0]["correct"] is True,
        )
        for row, prompt in zip(rows, prompts, strict=True)
    ]
    theirs = [
        Judged(record["resps"][0][0], record["filtered_resps"][0], record["exact_match"] == 1)
        for record in records
    ]
    return compare(model, arguments.data, problems, ours, theirs)


def compare(
    model: str, data: str, problems: Sequence[Problem], ours: Sequence[Judged], theirs: Sequence[Judged]
) -> tuple[dict[str, Any], bool]:
    """As `measure`, of what both sides said."""
    n = len(problems)
    right, peer_right = (sum(judged.is_right for judged in side) for side in (ours, theirs))
    same = sum(a.text == b.text for a, b in zip(ours, theirs, strict=True))
    print(f"\n{model}, {data}, {n} problems, all prompts the same bytes, {same} answers the same text")
    print(f"  evaluate.py {right} right, {right / n:.1%}; lm-eval {peer_right} right, {peer_right / n:.1%}")
    for problem, mine, other in zip(problems, ours, theirs, strict=True):
        if mine.is_right != other.is_right:
            print(f"\n  {problem.question}   (gold: {problem.gold})")
            for name, judged in (("evaluate.py", mine), ("lm-eval", other)):
                told = "right" if judged.is_right else "wrong"
                print(f"  {name}, {told}, took {judged.answer!r} from:\n{evaluate.indented(judged.text)}")
    row = {
        "case": f"{data}, {n} problems, {model}",
        "peer": "lm-eval",
        "peer_value": peer_right / n,
        "ours": right / n,
        "ratio": right / peer_right if peer_right else None,
        "unit": "greedy strict accuracy",
        "same_texts": same,
    }
    return row, abs(right - peer_right) <= TOLERANCE


def main() -> None:
    """Ask both, print, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", required=True, help="model folders or Hub names")
    parser.add_argument("--data", default="arithmetic")
    parser.add_argument("--limit", type=int, default=1_000, help="test problems")
    parser.add_argument("--max_completion_tokens", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=100, help="of lm-eval")
    parser.add_argument("--json", type=Path, help="write a row a line to this file")
    arguments = parser.parse_args()
    rows, agreed = zip(*(measure(model, arguments) for model in arguments.model), strict=True)
    write_rows(rows, arguments.json)
    if not all(agreed):
        raise SystemExit(f"they differ by more than {TOLERANCE} problem, or ask differently: see above")


if __name__ == "__main__":
    main()
