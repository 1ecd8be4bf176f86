"""The Colab notebook: it picks a recipe by the GPU's memory, and runs from top to bottom without a person."""

import json
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest
import torch
from quick import lines, weights

from models import load_model

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "train_colab.ipynb"
CELLS = {cell["id"]: cell for cell in json.loads(NOTEBOOK.read_text())["cells"]}

STEPS = 12
QUICK = (
    f"--model tiny --total_steps {STEPS} --prompts_per_step 4 --group_size 4 --max_completion_tokens 12 "
    "--eval_limit 8 --eval_every 6"
)
# Training goes beyond its third step when somebody has seen a curve of it, however fast the machine.
WAITING = """
import time
from pathlib import Path

run, seen = Path({run!r}), Path({run!r} + ".seen")

def watched(completions):
    while (run / "metrics.jsonl").is_file() and not seen.is_file():
        if (run / "metrics.jsonl").read_text().count(chr(10)) < 3:
            break
        time.sleep(0.05)
    return [float(len(set(completion))) for completion in completions]
"""


def source(cell):
    return "".join(cell["source"])


def test_the_notebook_is_kept_without_outputs():
    code = [cell for cell in CELLS.values() if cell["cell_type"] == "code"]
    assert not [cell["id"] for cell in code if cell["outputs"] or cell["execution_count"]]


@pytest.mark.parametrize(
    ("memory", "recipe"),
    [
        (None, "tiny"),  # no card, and no program to ask
        ("", "tiny"),  # the program, and no card
        ("NVIDIA GeForce GTX 1650, 4096", "tiny"),
        ("NVIDIA GeForce RTX 4060 Ti, 8188", "gsm8k_qwen2.5_0.5b_16gb"),
        ("Tesla T4, 15360", "gsm8k_qwen2.5_0.5b_16gb"),
        ("NVIDIA L4, 23034\nNVIDIA L4, 23034", "gsm8k_qwen2.5_0.5b"),
        ("NVIDIA A100-SXM4-40GB, 40960", "gsm8k_qwen2.5_1.5b_a100"),
        ("NVIDIA H100 80GB HBM3, 81559", "gsm8k_qwen2.5_1.5b_a100"),
    ],
)
def test_the_recipe_goes_by_the_memory_of_the_gpu(memory, recipe, tmp_path):
    if memory is not None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\necho '{memory}'\n" if memory else "#!/bin/sh\nexit 9\n")
        program.chmod(0o755)
    code = "from pathlib import Path\nrecipe = 'auto'\n" + source(CELLS["recipe"])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PATH": f"{tmp_path}:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.search(r"^recipe: (\S+)$", done.stdout, re.MULTILINE)[1] == recipe
    assert f"--config configs/{recipe}.yaml" in done.stdout


@pytest.mark.slow
def test_the_notebook_trains_draws_evaluates_and_answers(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="running the notebook needs nbclient")
    pytest.importorskip("ipykernel", reason="running the notebook needs ipykernel")
    import nbformat

    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # a card of this machine's is not the test's
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    ids = [cell["id"] for cell in notebook.cells]
    run, reward = tmp_path / "tiny", tmp_path / "reward.py"
    reward.write_text(WAITING.format(run=str(run)))
    flags = f"{QUICK} --rewards '{{{reward}:watched: 1.0}}'"
    chosen = f"runs_folder = {str(tmp_path)!r}\nflags = {flags!r}\nproblems = 4"
    notebook.cells.insert(ids.index("settings") + 1, nbformat.v4.new_code_cell(chosen))
    steps_drawn = set()

    class Watcher(nbclient.NotebookClient):
        def process_message(self, message, cell, cell_index):
            page = unescape(message["content"].get("data", {}).get("text/html", ""))
            if found := re.search(r"<p>steps</p><strong>(\d+)</strong>", page):
                steps_drawn.add(int(found[1]))
                if steps_drawn & set(range(1, STEPS)):
                    Path(f"{run}.seen").touch()
            return super().process_message(message, cell, cell_index)

    Watcher(notebook, timeout=600, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()

    assert len(lines(run / "metrics.jsonl")) == STEPS
    before = load_model("tiny", 0).state_dict()
    after = weights(run / "final")
    assert not all(torch.equal(before[name], tensor) for name, tensor in after.items())
    # Curves were there while training went on.
    assert steps_drawn & set(range(1, STEPS))
    told = {
        cell["id"]: "".join(
            output.get("text", "") or output.get("data", {}).get("text/html", "") for output in cell.outputs
        )
        for cell in notebook.cells
        if cell.cell_type == "code"
    }
    page = unescape(told["train"])
    assert "<p>finished</p>" in page
    assert page.count("<svg") >= 8
    assert json.loads((run / "evaluation.json").read_text())["n"] == 4
    assert "accuracy, strict" in told["evaluate"]
    assert "error" not in told["chat"]
    assert f"the model: {run / 'final'}" in told["chat"]
