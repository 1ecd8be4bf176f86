"""Every recipe says what exists, and takes two steps on a shrunken model of its own architecture."""

import copy
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import hours
from models import save_model
from runs.config import parse_config
from train_grpo import GRPOConfig, main

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
SHRUNKEN = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "pad_token_id": 0,
    "eos_token_id": 2,
}


def read(recipe, **changes):
    words = [f"--{name}={value}" for name, value in changes.items()]
    return parse_config(GRPOConfig, ["--config", str(recipe), *words])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_explained_and_resolves(recipe):
    text = recipe.read_text()
    config = read(recipe, **({} if torch.cuda.is_available() else {"optimizer": "adamw"}))
    assert f"--config configs/{recipe.name}" in text  # how to run it
    assert "measured" in text or "mean nothing" in text  # what its figures are worth
    # What it takes: as the arithmetic has it for these very fields, or a minute here.
    assert (recipe.stem in hours.RECIPES) == recipe.stem.startswith("gsm8k")
    assert hours.told(recipe.stem) in text if recipe.stem in hours.RECIPES else "minute" in text
    assert config.output.startswith("outputs/")
    fields = yaml.safe_load(text)
    assert {name: getattr(config, name) for name in fields if name != "optimizer"} == {
        name: value for name, value in fields.items() if name != "optimizer"
    }


def test_hours_grow_with_what_a_recipe_asks_for(monkeypatch):
    def figures(**changes):
        read_yaml = yaml.safe_load
        with monkeypatch.context() as patch:
            patch.setattr(hours.yaml, "safe_load", lambda text: read_yaml(text) | changes)
            return hours.estimate("gsm8k_qwen2.5_1.5b_a100")

    usual = figures()
    assert figures(total_steps=1000)["hours"] == pytest.approx(2 * usual["hours"], rel=0.01)
    assert figures(gradient_checkpointing=False)["update_s"] == pytest.approx(usual["update_s"] * 6 / 8)
    assert figures(group_size=16)["update_s"] == pytest.approx(2 * usual["update_s"], rel=0.05)
    assert figures(max_completion_tokens=1024)["sample_s"] == pytest.approx(2 * usual["sample_s"])
    # 8 operations a weight and token, checkpointing's among them, at a third of the card's 312e12 a second.
    assert usual["update_s"] == pytest.approx(8 * 1.54e9 * (256 * 256 + 32 * 150) / (0.33 * 312e12))
    assert usual["dollars"] == pytest.approx(1.6 * usual["hours"])


def test_the_table_of_hours_is_what_the_script_prints(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["hours.py"])
    hours.main()
    table = capsys.readouterr().out
    assert len(table.splitlines()) == 2 + len(hours.RECIPES)
    assert table in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_takes_two_steps_on_a_shrunken_model(recipe, tmp_path, chat_tokenizer):
    fields = yaml.safe_load(recipe.read_text())
    family = "llama" if "llama" in fields.get("model", "") else "qwen2"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHRUNKEN))
    save_model(tmp_path / "model", model, copy.deepcopy(chat_tokenizer))
    changes = {
        "model": tmp_path / "model",
        "data": "arithmetic",
        "output": tmp_path / "run",
        "rewards": "{unique_characters: 1.0}",
        "total_steps": 2,
        "prompts_per_step": 2,
        "group_size": 2,
        "max_completion_tokens": 8,
        "eval_every": 0,
        "save_every": 2,
    }
    if fields.get("optimizer", "").startswith("paged") and not torch.cuda.is_available():
        changes["optimizer"] = "adamw_8bit"
    assert main(read(recipe, **changes)) == 0
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    is_adapter = (tmp_path / "run" / "final" / "adapter_config.json").is_file()
    assert is_adapter == bool(fields.get("lora_rank"))
