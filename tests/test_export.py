"""An export answers as what was trained, from disk, or there is none."""

import copy
import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import export
from export import ExportConfig
from models import add_adapter, load_model, save_model
from runs.config import RunStopped, UserError
from tokenizer import load_tokenizer


@pytest.fixture
def base(tmp_path, random_model, chat_tokenizer):
    """A folder of a random model in float32."""
    folder = tmp_path / "base"
    save_model(folder, load_random(random_model), chat_tokenizer)
    return folder


def load_random(random_model):
    return copy.deepcopy(random_model("qwen2")).float()


@pytest.fixture
def adapter_run(tmp_path, base, chat_tokenizer):
    """A run whose final model is an adapter that changes every answer."""
    run = tmp_path / "run"
    model = add_adapter(load_model(str(base)), rank=4, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    save_model(run / "final", model, chat_tokenizer)
    questions = [{"question": f"{i} apples?"} for i in range(30)]
    (run / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    (run / "config.yaml").write_text("model: base\nalgo: dapo\ndata: gsm8k\n")
    figures = {"step": 7, "set": "validation", "n": 50, "accuracy_strict": 0.5, "ci95": [0.37, 0.63]}
    (run / "eval.jsonl").write_text(json.dumps(figures) + "\n" + '{"step": 4')  # and a line that a kill cut
    return run


def logits(model, ids=((5, 6, 7, 8),)):
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.float()


def test_an_adapter_is_merged_and_loads_in_plain_transformers(adapter_run, tmp_path):
    to = tmp_path / "merged"
    assert export.main(ExportConfig(run=str(adapter_run), to=str(to), merge=True)) == 0
    trained = load_model(str(adapter_run / "final")).eval()
    plain = AutoModelForCausalLM.from_pretrained(to)
    torch.testing.assert_close(logits(plain), logits(trained), rtol=0, atol=1e-4)
    with trained.disable_adapter():
        assert (logits(plain) - logits(trained)).abs().max() > 0.1
    tokenizer = AutoTokenizer.from_pretrained(to)
    assert plain.generation_config.eos_token_id == tokenizer.eos_token_id
    assert "<think>" in tokenizer.chat_template
    parity = json.loads((to / "parity.json").read_text())
    assert parity["same_answers"] == parity["answers"] == len(parity["rows"]) == 20
    assert parity["mean_kl"] < 1e-5
    card = (to / "README.md").read_text()
    assert "dapo" in card
    assert "50.0% | 37.0% to 63.0%" in card
    assert "asks for `<think>…</think><answer>…</answer>`" in card


def test_the_card_says_how_the_model_answers(base, tmp_path):
    prepared = load_tokenizer(str(base), answer_style="boxed")
    save_model(tmp_path / "boxed", load_model(str(base)), prepared)
    export.main(ExportConfig(run=str(tmp_path / "boxed"), to=str(tmp_path / "to")))
    assert "asks for `<think>…</think>\\boxed{…}`" in (tmp_path / "to" / "README.md").read_text()


def test_an_adapter_alone_loads_on_its_base(adapter_run, base, tmp_path):
    to = tmp_path / "adapter"
    export.main(ExportConfig(run=str(adapter_run), to=str(to)))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), to)
    trained = load_model(str(adapter_run / "final"))
    torch.testing.assert_close(logits(loaded.eval()), logits(trained.eval()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_stored_and_told(base, tmp_path, dtype):
    to = tmp_path / "half"
    export.main(ExportConfig(run=str(base), to=str(to), dtype=dtype))
    loaded = AutoModelForCausalLM.from_pretrained(to, dtype="auto")
    assert loaded.dtype == getattr(torch, dtype)
    assert 0 < json.loads((to / "parity.json").read_text())["mean_kl"] < export.LIMITS[dtype][0]


def test_an_export_that_lost_the_training_is_refused(adapter_run, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "load_merged", lambda folder, **how: load_model(folder).unload())
    to = tmp_path / "merged"
    with pytest.raises(RunStopped, match="not what was trained"):
        export.main(ExportConfig(run=str(adapter_run), to=str(to), merge=True))
    assert {path.name for path in tmp_path.iterdir()} == {"base", "run"}


def test_a_model_that_says_nan_is_refused():
    parity = {"mean_kl": float("nan"), "same_tokens": 1.0}
    with pytest.raises(RunStopped, match="nan"):
        export.check_parity(parity, "bfloat16")


def test_mistakes_are_told_before_anything_is_written(base, adapter_run, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("mine")
    mistakes = [
        ({"run": str(base), "to": str(full)}, "there already"),
        ({"run": str(base), "to": str(tmp_path / "new"), "merge": True}, "whole model"),
        ({"run": str(full), "to": str(tmp_path / "new")}, "no model in it"),
        ({"run": str(tmp_path / "nothing"), "to": str(tmp_path / "new")}, "no model in it"),
    ]
    for fields, told in mistakes:
        with pytest.raises(UserError, match=told):
            export.main(ExportConfig(**fields))
    assert (full / "file").read_text() == "mine"
    assert not (tmp_path / "new").exists()


def test_a_place_that_fails_is_told(base, tmp_path, monkeypatch):
    monkeypatch.setattr(
        export, "save_model", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    with pytest.raises(RunStopped, match="No space left.*--to"):
        export.main(ExportConfig(run=str(base), to=str(tmp_path / "to")))
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


def test_a_hub_that_is_out_of_reach_leaves_the_folder(base, tmp_path):
    to = tmp_path / "pushed"
    with pytest.raises(RunStopped, match="not uploaded"):
        export.main(ExportConfig(run=str(base), to=str(to), push_to_hub="me/model"))
    assert (to / "config.json").is_file()


def test_a_network_that_fails_leaves_the_folder(base, tmp_path, monkeypatch):
    import huggingface_hub

    class ConnectError(Exception):
        """Of whatever library the Hub's client sends with."""

    def fail(self, name, **options):
        raise ConnectError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", fail)
    with pytest.raises(RunStopped, match="not uploaded.*Name or service not known"):
        export.main(ExportConfig(run=str(base), to=str(tmp_path / "to"), push_to_hub="me/model"))
    assert (tmp_path / "to" / "config.json").is_file()


def test_a_folder_is_uploaded_whole(base, tmp_path, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda self, name, **options: asked.append((name, options))
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda self, **options: asked.append(options))
    to = tmp_path / "pushed"
    export.main(ExportConfig(run=str(base), to=str(to), push_to_hub="me/model"))
    assert asked == [
        ("me/model", {"private": True, "exist_ok": True}),
        {"repo_id": "me/model", "folder_path": to},
    ]
