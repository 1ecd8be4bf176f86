"""What is converted for mlx-lm answers as what was trained, or there is nothing."""

import importlib
import json
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from urllib.error import URLError
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
from quick import quick_sft
from safetensors.torch import load_file, save_file
from test_rooms import TORCH_BOUND

import export
from data import load_problems
from evaluate import EvaluateConfig
from evaluate import main as evaluate
from export import ExportConfig
from inference import SamplingParams
from inference.chat import Turn, load_chat_model
from inference.convert_mlx import (
    LIMITS,
    TIE,
    ConvertConfig,
    Parity,
    answer_logprobs,
    check_parity,
    greedy_answers,
    is_same_answer,
)
from inference.convert_mlx import main as convert
from inference.engine import TorchEngine
from inference.formats import is_mlx, reads_with_mlx
from models import load_model, save_model
from prompts import encode_prompt, parse_completion, render_prompt
from runs.config import RunStopped, UserError
from tiny import build_tiny
from tokenizer import load_tokenizer
from train_sft import main as train

mx = pytest.importorskip("mlx.core", reason="MLX is not installed (requirements-dev.txt)")
from inference.mlx_engine import MLXEngine, load_engine  # noqa: E402 - after the skip above


@pytest.fixture(scope="module", autouse=True)
def short_answers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("export.ANSWER_TOKENS", 16)
        patch.setattr("inference.convert_mlx.ANSWER_TOKENS", 16)
        yield


@pytest.fixture(scope="module")
def exported(tmp_path_factory, random_folder):
    """Exports a random model with its parity.json, by the precision of its weights, once."""
    folders = {}

    def make(dtype="float32"):
        if dtype not in folders:
            folders[dtype] = tmp_path_factory.mktemp("exports") / dtype
            config = ExportConfig(run=str(random_folder("qwen2")), to=str(folders[dtype]), dtype=dtype)
            assert export.main(config) == 0
        return folders[dtype]

    return make


@pytest.fixture(scope="module")
def converted(tmp_path_factory, exported):
    """The folder of a random model, converted."""
    folder = tmp_path_factory.mktemp("conversions") / "new" / "converted"
    assert convert(ConvertConfig(model=str(exported()), to=str(folder))) == 0
    return folder


def test_a_converted_folder_asks_answers_and_stops_as_before(exported, converted):
    source, to = exported(), converted
    assert (is_mlx(str(source)), is_mlx(str(to))) == (False, True)
    before, after = (load_tokenizer(str(folder)) for folder in (source, to))
    for question in ("2 + 2 = ?", [{"role": "user", "content": "<|im_end|> ½\n"}]):
        assert render_prompt(after, question) == render_prompt(before, question)
        text = render_prompt(before, question)
        assert after.encode(text) == before.encode(text)
    engines = [load_engine(str(folder), before)[0] for folder in (source, to)]
    assert engines[0].stop_token_ids == engines[1].stop_token_ids == {2}
    assert [path.name for path in to.parent.iterdir()] == ["converted"]


@pytest.mark.slow
def test_several_stop_tokens_are_kept(exported, tmp_path):
    source = shutil.copytree(exported(), tmp_path / "source")
    told = json.loads((source / "generation_config.json").read_text())
    (source / "generation_config.json").write_text(json.dumps(told | {"eos_token_id": [2, 319]}))
    (source / "parity.json").unlink()
    convert(ConvertConfig(model=str(source)))
    to = str(tmp_path / "source-mlx")
    assert load_engine(to, load_tokenizer(to))[0].stop_token_ids == {2, 319}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_passes_by_its_own_limits(exported, tmp_path, dtype, capsys):
    convert(ConvertConfig(model=str(exported(dtype)), to=str(tmp_path / "half")))
    weights = mx.load(str(tmp_path / "half" / "model.safetensors"))
    assert {weight.dtype for weight in weights.values()} == {getattr(mx, dtype)}
    difference = float(capsys.readouterr().out.split("differ by ")[1].split()[0])
    assert LIMITS["float32"].difference < difference < LIMITS[dtype].difference


def flip_a_weight(folder):
    """Change the sign of the largest weight of the first layer's values."""
    tensors = load_file(folder / "model.safetensors")
    weight = tensors["model.layers.0.self_attn.v_proj.weight"].view(-1)
    weight[weight.abs().argmax()] *= -1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_one_flipped_weight_fails_the_gate_and_leaves_nothing(exported, tmp_path):
    source = shutil.copytree(exported(), tmp_path / "source")
    flip_a_weight(source)
    with pytest.raises(RunStopped, match="not what was trained.*Nothing was written"):
        convert(ConvertConfig(model=str(source)))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_folder_without_parity_is_held_to_itself_and_that_is_told(random_folder, tmp_path, capsys):
    convert(ConvertConfig(model=str(random_folder("qwen2")), to=str(tmp_path / "to")))
    told = capsys.readouterr().out
    assert "has no parity.json" in told
    assert "export.py" in told
    assert "20 of 20 greedy answers" in told


@pytest.mark.slow
def test_a_quantisation_that_costs_the_answers_is_refused(tmp_path):
    """Weights that nothing was learned into lose their answers when rounded to 4 bits, not to 8."""
    model, tokenizer = build_tiny(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim == 2 else 1)
    save_model(tmp_path / "tiny", model, tokenizer)
    with pytest.raises(RunStopped, match="In 4 bits, 90% of the tokens have to be the same. .*more bits"):
        convert(ConvertConfig(model=str(tmp_path / "tiny"), quantize=4))
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_mistakes_are_told_before_anything_is_computed(exported, converted, tmp_path):
    full, adapter, whole = tmp_path / "full", tmp_path / "adapter", str(exported())
    full.mkdir()
    (full / "file").write_text("mine")
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    mistakes = [
        ({"model": whole, "to": str(full)}, "there already"),
        ({"model": whole, "to": str(full / "file")}, "there already"),
        ({"model": str(adapter)}, "adapter.*export.py --run .*adapter --to .* --merge"),
        ({"model": str(converted), "to": str(tmp_path / "new")}, "for mlx-lm already"),
        ({"model": str(full), "to": str(tmp_path / "new")}, "without a config.json"),
        ({"model": "Qwen/Qwen2.5-0.5B-Instruct"}, "is no folder"),
    ]
    for fields, told in mistakes:
        with pytest.raises(UserError, match=told):
            convert(ConvertConfig(**fields))
    assert (full / "file").read_text() == "mine"
    assert not (tmp_path / "new").exists()


def test_an_architecture_that_mlx_has_not_is_told(tmp_path, exported):
    source = shutil.copytree(exported(), tmp_path / "odd")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    with pytest.raises(UserError, match="unheard_of"):
        convert(ConvertConfig(model=str(source)))
    assert [path.name for path in tmp_path.iterdir()] == ["odd"]


def test_a_full_disk_leaves_nothing(exported, tmp_path, monkeypatch):
    def fail(source, to, **how):
        (tmp_path / ".to.tmp").mkdir()
        raise OSError(28, "No space left")

    monkeypatch.setattr(importlib.import_module("mlx_lm.convert"), "convert", fail)
    with pytest.raises(RunStopped, match="No space left.*--to"):
        convert(ConvertConfig(model=str(exported()), to=str(tmp_path / "to")))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("difference", "tokens", "answers", "precision", "passes"),
    [
        (1e-4, 1.0, 20, "float32", True),
        (1e-2, 1.0, 20, "float32", False),
        (1e-4, 0.99, 20, "float32", False),
        (1e-4, 1.0, 19, "float32", False),
        (float("nan"), 1.0, 20, "float32", False),
        (float("nan"), 1.0, 20, "4 bits", False),
        (3.0, 0.95, 4, "4 bits", True),
        (3.0, 0.89, 4, "4 bits", False),
        (0.2, 0.97, 12, "8 bits", False),
    ],
)
def test_each_precision_has_its_limits(difference, tokens, answers, precision, passes):
    parity = Parity(difference, tokens, answers, answers=20)
    if passes:
        check_parity(parity, precision)
    else:
        with pytest.raises(RunStopped, match="not what was trained"):
            check_parity(parity, precision)


def test_answers_may_part_at_a_tie_and_nowhere_else():
    logprobs = np.log(np.array([[0.7, 0.2, 0.1], [0.4, 0.4, 0.2], [0.4, 0.2, 0.4]]))
    assert is_same_answer([0, 1, 2], [0, 1, 2], logprobs)
    assert is_same_answer([0, 1, 2], [0, 0, 1], logprobs)
    assert not is_same_answer([0, 1, 2], [1, 1, 2], logprobs)
    assert not is_same_answer([0, 1, 2], [0, 1], logprobs)
    logprobs[1, 0] += 2 * TIE
    assert not is_same_answer([0, 1, 2], [0, 0, 1], logprobs)


# ------------------------------------------------------------------------------------------------------------
# Whoever reads the folder


def test_the_chat_reads_each_folder_with_its_own_engine(exported, converted):
    models = {name: load_chat_model(str(name), "") for name in (exported(), converted)}
    assert [type(model.engine) for model in models.values()] == [TorchEngine, MLXEngine]
    one, other = models.values()
    assert (one.context_tokens, one.single_question) == (other.context_tokens, other.single_question)
    params = SamplingParams(16, temperature=0.0)
    texts = [list(model.stream([Turn("2 + 2?")], params, (0,)))[-1].text for model in (one, other)]
    assert texts[0] == texts[1]


def test_without_torch_every_folder_is_read_with_mlx(exported, monkeypatch):
    monkeypatch.setattr(
        "inference.formats.importlib.util.find_spec", lambda name: None if name == "torch" else object()
    )
    assert reads_with_mlx(str(exported()))
    assert isinstance(load_chat_model(str(exported())).engine, MLXEngine)


def test_without_mlx_its_folders_are_refused_and_others_are_not(exported, converted, monkeypatch):
    monkeypatch.setattr(
        "inference.formats.importlib.util.find_spec", lambda name: None if name == "mlx_lm" else object()
    )
    assert not reads_with_mlx(str(exported()))
    with pytest.raises(ValueError, match="needs mlx-lm.*pip install"):
        load_chat_model(str(converted))
    with pytest.raises(UserError, match="needs mlx-lm"):
        convert(ConvertConfig(model=str(exported())))


# ------------------------------------------------------------------------------------------------------------
# A trained model, from its run to whoever reads what became of it

QUESTION = "12 + 34 + 56 = ?"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folders of a model that has begun to learn: exported, converted, and in 4 bits."""
    root = tmp_path_factory.mktemp("trained")
    assert train(quick_sft(root / "run", total_steps=40, examples_per_step=16, eval_every=0)) == 0
    assert export.main(ExportConfig(run=str(root / "run"), to=str(root / "whole"))) == 0
    convert(ConvertConfig(model=str(root / "whole")))
    with pytest.MonkeyPatch.context() as patch:
        # What has only begun to learn is sure of little.
        patch.setitem(LIMITS, "4 bits", replace(LIMITS["4 bits"], tokens=0.5))
        convert(ConvertConfig(model=str(root / "whole"), to=str(root / "4-bit"), quantize=4))
    return root / "whole", root / "whole-mlx", root / "4-bit"


def run_python(*words):
    """What a program printed, in a process that has no torch."""
    absent = sorted(TORCH_BOUND - {"transformers", "tokenizers"})
    program = f"import runpy, sys; sys.modules.update(dict.fromkeys({absent})); sys.argv = sys.argv[1:]; "
    program += "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, words)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_trained_model_answers_100_problems_in_mlx_as_in_torch(trained, capsys):
    source, whole, four_bits = trained
    tokenizer = load_tokenizer(str(source))
    prompts = [encode_prompt(tokenizer, p.question) for p in load_problems("arithmetic", "test", limit=100)]
    expected = greedy_answers(TorchEngine(load_model(str(source)), tokenizer), prompts, 32)
    engine, _ = load_engine(str(whole), tokenizer)
    assert len({tuple(answer) for answer in expected}) > 50
    for prompt, one, other in zip(prompts, expected, greedy_answers(engine, prompts, 32), strict=True):
        assert is_same_answer(one, other, answer_logprobs(engine, prompt, one))
    evaluate(EvaluateConfig(model=str(four_bits), baseline=str(whole), limit=100, max_completion_tokens=32))
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("accuracy, strict"))
    assert row.count("%") == 2


@pytest.mark.slow
def test_everything_that_reads_the_folder_says_the_same_without_torch(trained):
    _, _, folder = trained
    model = load_chat_model(str(folder))
    params = SamplingParams(64, temperature=0.0)
    said = list(model.stream([Turn(QUESTION)], params, (0,)))[-1]
    assert said.text.strip()
    asked = ["--max_completion_tokens", 64, "--question", QUESTION]
    told = run_python("inference.chat", "--model", folder, *asked)
    assert told.split() == f"{said.thought or ''} {said.answer}".split()
    asked = ["--max-tokens", 64, "--verbose", False, "--prompt", QUESTION]
    told = run_python("mlx_lm", "generate", "--model", folder, *asked)
    assert told.strip() == said.text.strip()


@pytest.fixture(scope="module")
def mlx_server(trained):
    """The address of an `mlx_lm.server` that has the folder in 4 bits, up to its `/v1`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(trained[2]), "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=60).close()
                break
            except URLError:
                assert server.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="module")
def said(trained):
    """What the folder in 4 bits answers without a server."""
    tokenizer = load_tokenizer(str(trained[2]))
    engine, _ = load_engine(str(trained[2]), tokenizer)
    prompt, params = encode_prompt(tokenizer, QUESTION), SamplingParams(64, temperature=0.0)
    ids = [token.token_id for token in engine.stream(prompt, params, (0,))]
    return parse_completion(tokenizer.decode(ids, skip_special_tokens=True))


@pytest.mark.slow
def test_the_server_of_mlx_lm_says_the_same(mlx_server, said):
    asked = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 64}
    headers = {"Content-Type": "application/json"}
    request = Request(f"{mlx_server}/chat/completions", json.dumps(asked).encode(), headers)
    reply = json.load(urlopen(request, timeout=60))["choices"][0]["message"]
    assert (reply.get("reasoning") or "").strip() == (said.thought or "").strip()
    assert (reply.get("content") or "").strip() == said.answer_text.strip()


@pytest.mark.slow
def test_the_chat_and_the_page_talk_to_that_server(trained, mlx_server, said):
    folder, thought = str(trained[2]), (said.thought or "").strip()
    answer = (said.answer or said.answer_text).strip()
    asked = ["--engine_url", mlx_server, "--max_completion_tokens", 64, "--question", QUESTION]
    told = run_python("inference.chat", "--model", folder, *asked)
    assert told.split() == f"{thought} {answer}".split()
    gr = pytest.importorskip("gradio", reason="the page needs gradio")
    from app import AppConfig, build_page, launch
    from page.shelf import Shelf

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        config = AppConfig(model=folder, engine_url=mlx_server, port=probe.getsockname()[1])
    shelf = Shelf([folder], lambda name: load_chat_model(name, engine_url=mlx_server))
    page = build_page(shelf, config)
    assert isinstance(page, gr.Blocks)
    try:
        from gradio_client import Client

        client = Client(launch(page, config, auth=None), verbose=False, analytics_enabled=False)
        reply = client.predict(QUESTION, max_completion_tokens=64, api_name="/ask")
        client.close()
    finally:
        page.close(verbose=False)
    assert (reply["thought"] or "").strip() == thought
    assert reply["answer"] == answer
    model = shelf.first
    votes = list(model.stream_votes([Turn(QUESTION)], 3, SamplingParams(64, temperature=1.0), (0,)))[-1]
    assert len(votes) == 3
    assert {vote.finish_reason for vote in votes} <= {"stop", "length"}
