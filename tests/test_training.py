"""What the training scripts fill in by what trains."""

import pytest
import yaml

from models import add_adapter, load_model, save_model
from runs.config import parse_config
from tiny import build_tiny
from train_grpo import GRPOConfig
from train_sft import SFTConfig

QWEN = "Qwen/Qwen2.5-0.5B-Instruct"


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "final"
    save_model(folder, *build_tiny(0))
    return str(folder)


@pytest.fixture(scope="module")
def adapter_folder(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter") / "final"
    save_model(folder, add_adapter(load_model(tiny_folder), 4, seed=0), build_tiny(0)[1])
    return str(folder)


@pytest.mark.parametrize(
    ("model", "rank", "of_sft", "of_grpo"),
    [
        ("tiny", 0, 5e-3, 4e-4),
        ("tiny_folder", 0, 5e-3, 4e-4),
        ("tiny_folder", 4, 4e-3, 4e-3),
        ("adapter_folder", 0, 4e-3, 4e-3),
        ("adapter_folder", 4, 4e-3, 4e-3),
        (QWEN, 0, 1e-5, 1e-6),
        (QWEN, 16, 1e-4, 1e-5),
    ],
)
def test_the_learning_rate_is_that_of_what_trains(request, model, rank, of_sft, of_grpo):
    model = request.getfixturevalue(model) if model.endswith("_folder") else model
    for config_class, rate in ((SFTConfig, of_sft), (GRPOConfig, of_grpo)):
        config = config_class(model=model, lora_rank=rank)
        assert config.learning_rate == rate
        assert config_class(model=model, lora_rank=rank, learning_rate=0.5).learning_rate == 0.5
    is_tiny_whole = model != QWEN and config.learning_rate == 4e-4
    assert SFTConfig(model=model, lora_rank=rank).optimizer == ("muon" if is_tiny_whole else "adamw")
    assert SFTConfig(model=model, lora_rank=rank, optimizer="muon").optimizer == "muon"


def test_an_adapter_that_names_no_model_is_an_adapter_all_the_same(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": null}')
    assert GRPOConfig(model=str(tmp_path)).learning_rate == 1e-5


def test_what_the_cold_start_will_leave_is_the_built_in_model(tmp_path, monkeypatch, random_model):
    monkeypatch.chdir(tmp_path)
    assert GRPOConfig().learning_rate == 4e-4  # nothing is there yet
    random_model("llama").save_pretrained(tmp_path / GRPOConfig.model)
    assert GRPOConfig().learning_rate == 1e-6  # another model's cold start


def test_a_separate_critic_learns_at_the_rate_that_was_filled_in():
    assert GRPOConfig(model=QWEN, algo="ppo", critic="separate").critic_learning_rate == 1e-6


def test_the_printed_configuration_says_what_was_filled_in(capsys, tmp_path):
    for config_class in (SFTConfig, GRPOConfig):
        with pytest.raises(SystemExit):
            parse_config(config_class, ["--model", QWEN, "--print_config"])
        printed = tmp_path / "printed.yaml"
        printed.write_text(capsys.readouterr().out)
        config = config_class(model=QWEN)
        assert parse_config(config_class, ["--config", str(printed)]) == config
        assert yaml.safe_load(printed.read_text())["learning_rate"] == config.learning_rate


def test_a_checkpoint_of_another_model_is_refused(tiny_folder, adapter_folder, random_model, tmp_path):
    other = tmp_path / "other"
    random_model("qwen2").save_pretrained(other)
    for checkpoint in (tiny_folder, adapter_folder):
        with pytest.raises(
            ValueError, match=r"is a checkpoint of another model \(.*hidden_size 128.* give the"
        ):
            GRPOConfig(model=str(other)).load_model(checkpoint)
    with pytest.raises(ValueError, match="'tiny'"):
        SFTConfig().load_model(str(other))
    # One that is not at hand cannot be compared, and is not needed.
    for model in ("tiny", tiny_folder, QWEN):
        assert SFTConfig(model=model).load_model(tiny_folder).config.hidden_size == 128
