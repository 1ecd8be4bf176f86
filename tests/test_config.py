"""The command line: what wins, what is refused, and how a mistake is told."""

import dataclasses
import errno
import os
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from runs.config import UserError, at_the_door, parse_config, require, run_script, to_yaml


@dataclass(frozen=True)
class Settings:
    """A configuration like the scripts'."""

    output: str = "outputs/x"
    """The folder."""
    learning_rate: float = 1e-4
    """The highest."""
    total_steps: int = 10
    """Steps."""
    algo: Literal["plain", "clipped"] = "plain"
    """Fills `clip` in."""
    clip: float | None = None
    """None takes the algorithm's."""
    limit: int | None = None
    """At most so many."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of the task."""
    merge: bool = False
    """A switch."""
    log_level: Literal["quiet", "info"] = "info"
    """How much is told."""
    dynamic: bool | None = None
    """A switch that a preset may set."""

    def __post_init__(self) -> None:
        if self.clip is None:
            object.__setattr__(self, "clip", {"plain": 0.0, "clipped": 0.2}[self.algo])
        require(self, "total_steps", at_least=1)
        require(self, "learning_rate", above=0)


@pytest.fixture
def config_file(tmp_path):
    def write(text):
        (tmp_path / "c.yaml").write_text(text)
        return str(tmp_path / "c.yaml")

    return write


def parse(*argv):
    return parse_config(Settings, list(argv))


# ------------------------------------------------------------------------------------------------------------
# What wins


def test_defaults_stand_where_nothing_is_said():
    assert parse() == Settings()


def test_flag_wins_over_yaml_and_yaml_over_default_wherever_the_file_stands(config_file):
    path = config_file("total_steps: 20\nlearning_rate: 0.5\n")
    expected = Settings(total_steps=30, learning_rate=0.5)
    assert parse("--config", path, "--total_steps", "30") == expected
    assert parse("--total_steps", "30", "--config", path) == expected
    assert parse("--total_steps=30", f"--config={path}") == expected


def test_flag_and_yaml_win_over_the_preset_and_the_preset_over_the_default(config_file):
    assert parse("--algo", "clipped").clip == 0.2
    assert parse("--algo", "clipped", "--config", config_file("clip: 0.3")).clip == 0.3
    assert parse("--algo", "clipped", "--config", config_file("clip: 0.3"), "--clip", "0.4").clip == 0.4
    assert parse("--config", config_file("algo: clipped")).clip == 0.2


@pytest.mark.parametrize("name", ["merge", "dynamic"])
def test_a_switch_needs_no_value_and_takes_one(name, config_file):
    for argv in ([f"--{name}"], [f"--{name}", "--limit", "3"], [f"--{name}", "true"], [f"--{name}=true"]):
        assert getattr(parse(*argv), name) is True
    assert getattr(parse(f"--{name}", "false", "--config", config_file(f"{name}: true")), name) is False
    with pytest.raises(ValueError, match=name):
        parse(f"--{name}", "perhaps")


def test_quiet_is_short_for_the_quiet_level(config_file):
    assert parse_config(Settings, ["--quiet", "--total_steps", "3"]).log_level == "quiet"
    file = config_file("log_level: info")
    assert parse_config(Settings, ["--quiet", "--config", file]).log_level == "quiet"
    with pytest.raises(ValueError, match="unknown flag: --quiet"):
        parse_config(dataclasses.make_dataclass("Loud", [("seed", int, 0)], frozen=True), ["--quiet"])


def test_an_empty_file_changes_nothing(config_file):
    assert parse("--config", config_file("# nothing yet\n")) == Settings()


def test_a_dict_is_replaced_by_a_flag_and_one_key_of_it_is_added(config_file):
    path = config_file("options: {high: 9}")
    assert parse("--config", path).options == {"high": 9}
    assert parse("--config", path, "--options", "{low: 1}").options == {"low": 1}
    assert parse("--config", path, "--options.low", "1").options == {"high": 9, "low": 1}


def test_yaml_takes_the_exponents_that_people_write(config_file):
    # YAML 1.1 reads 1e-5, without a point, as a string.
    assert parse("--config", config_file("learning_rate: 1e-5")).learning_rate == 1e-5


# ------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--lerning_rate", "1"], r"unknown flag: --lerning_rate; did you mean --learning_rate\?"),
        (["--total_step=3"], r"unknown flag: --total_step; did you mean --total_steps\?"),
        (["--qqqq"], r"unknown flag: --qqqq; see --help"),
        (["--total_steps", "1.5"], r'"total_steps".*int.*1\.5'),
        (["--total_steps", "many"], r'"total_steps".*int.*many'),
        (["--algo", "cliped"], r'"algo".*plain.*clipped.*cliped'),
        (["--limit"], r"--limit: expected one argument"),
        (["word"], r"unrecognized arguments: word"),
        (["--total_steps", "0"], r"total_steps must be >= 1, got 0"),
        (["--learning_rate", "-1"], r"learning_rate must be > 0, got -1"),
    ],
)
def test_a_wrong_flag_is_refused_with_its_name_and_what_is_allowed(argv, told):
    with pytest.raises(ValueError, match=told):
        parse(*argv)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("lerning_rate: 1", r"unknown key: lerning_rate; did you mean learning_rate\?"),
        ("config: other.yaml", r"unknown key: config"),
        ("print_config: true", r"unknown key: print_config"),
        ("1: 2", r"unknown key: 1"),
        ("total_steps: many", r'"total_steps".*int.*many'),
        ("total_steps: 1.5", r'"total_steps".*int.*1\.5'),
        ("total_steps:", r"total_steps has no value"),
        ("algo: cliped", r'"algo".*plain.*cliped'),
        ("- total_steps", r"must hold `field: value` lines, got list"),
        ("total_steps: [1", r"is no YAML: .*line 1"),
        ("total_steps: 0", r"total_steps must be >= 1, got 0"),
    ],
)
def test_a_wrong_file_is_refused_as_flags_are(config_file, text, told):
    with pytest.raises(ValueError, match=told):
        parse("--config", config_file(text))


@pytest.mark.parametrize("argv", [["--config", "nowhere.yaml"], ["--config=nowhere.yaml"], ["--config"]])
def test_a_missing_file_is_told(argv):
    with pytest.raises(FileNotFoundError, match=r"--config '(nowhere\.yaml)?' is not there"):
        parse(*argv)


# ------------------------------------------------------------------------------------------------------------
# Printing it


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--algo", "clipped", "--learning_rate", "1e-5", "--output", "a: b # c"],
        ["--limit", "3", "--options", "{text: 'yes', number: 1e-7, nested: {list: [1, null]}}"],
        ["--output", "1e5"],
        ["--output", "größer\n0x1F"],
    ],
)
def test_printed_configuration_gives_the_same_one_again(argv, capsys, config_file):
    with pytest.raises(SystemExit) as stop:
        parse(*argv, "--print_config")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert parse("--config", config_file(printed)) == parse(*argv)
    # A run keeps this text as its config.yaml: resolved, every field in it.
    assert printed == to_yaml(parse(*argv))
    assert list(yaml.safe_load(printed)) == [item.name for item in dataclasses.fields(Settings)]


def test_help_tells_every_field_with_its_text(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    for item in dataclasses.fields(Settings):
        assert f"--{item.name}" in told
    assert "None takes the algorithm's." in told


# ------------------------------------------------------------------------------------------------------------
# How it ends


def run(main, parse_settings=Settings):
    with pytest.raises(SystemExit) as stop:
        run_script(main, parse_settings)
    return stop.value.code


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (130, 130)])
def test_the_exit_code_is_what_main_returns(returned, code):
    assert run(lambda config: returned) == code


def test_mistakes_at_the_door_end_in_one_line_and_exit_code_2(monkeypatch, capsys):
    def main(config):
        with at_the_door():
            raise FileNotFoundError("data 'x' is not there; give a file")

    monkeypatch.setattr("sys.argv", ["/somewhere/train_x.py"])
    assert run(main) == 2
    assert capsys.readouterr().err == "train_x.py: error: data 'x' is not there; give a file\n"
    for argv in (["--total_steps", "x"], ["--nonsense"], ["--config", "nowhere.yaml"]):
        assert run(lambda config: None, lambda argv=argv: parse(*argv)) == 2
        told = capsys.readouterr()
        assert told.err.startswith("train_x.py: error: ")
        assert told.err.count("\n") == 1
        assert told.out == ""


@pytest.mark.parametrize(("is_at_the_door", "code"), [(True, 2), (False, 1)])
def test_a_server_that_does_not_answer_is_one_line(is_at_the_door, code, capsys):
    def main(config):
        with at_the_door() if is_at_the_door else nullcontext():
            raise ConnectionError("http://127.0.0.1:9/v1 gave no answer")

    assert run(main) == code
    assert capsys.readouterr().err.endswith("error: http://127.0.0.1:9/v1 gave no answer\n")


@pytest.mark.parametrize(
    ("number", "is_told"), [(errno.ENOSPC, True), (errno.EROFS, True), (errno.EIO, False)]
)
def test_a_full_disk_is_one_line(number, is_told, capsys):
    def main(config):
        raise OSError(number, os.strerror(number), "outputs/report.html")

    if not is_told:
        with pytest.raises(OSError, match=os.strerror(number)):
            run_script(main, Settings)
        return
    assert run(main) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.endswith("'outputs/report.html'; free some space, or give another folder\n")


def test_ctrl_c_where_nothing_is_to_be_saved_is_one_line(monkeypatch, capsys):
    def main(config):
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["/somewhere/train_x.py"])
    assert run(main) == 130
    assert capsys.readouterr().err == "\ntrain_x.py: stopped\n"


@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError, ZeroDivisionError])
def test_a_bug_behind_the_door_shows_itself(kind):
    def main(config):
        raise kind("a bug")

    with pytest.raises(kind, match="a bug"):
        run_script(main, Settings)


def test_the_door_lets_bugs_pass_and_keeps_where_a_mistake_came_from():
    with pytest.raises(KeyError), at_the_door():
        raise KeyError("a bug")
    with pytest.raises(UserError) as caught, at_the_door():
        Path("nowhere").read_text()
    assert isinstance(caught.value.__cause__, FileNotFoundError)
