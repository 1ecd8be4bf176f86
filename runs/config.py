"""From a command line to a frozen dataclass, and from a user's mistake to exit code 2.

The dataclass is the command line: its fields are the flags, its types are checked, the text under a field is
its help. Precedence is flag > YAML > preset > default, wherever `--config` stands on the line.
"""

import dataclasses
import difflib
import errno
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

Config = TypeVar("Config")

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def build_parser(config_class: type) -> ArgumentParser:
    """A parser whose flags are the fields of a dataclass, and `--config` and `--print_config` beside them."""
    doc = (sys.modules[config_class.__module__].__doc__ or "").strip()
    # Its own --print_config prints before `__post_init__` has resolved anything; ours takes the name.
    parser = ArgumentParser(description=doc.partition("\n\n")[0], exit_on_error=False, print_config=None)
    parser.add_argument(
        "--config", metavar="FILE", help="a YAML file with any of the fields below; flags win over it"
    )
    parser.add_argument(
        "--print_config", action="store_true", help="print the resolved configuration as YAML and exit"
    )
    parser.add_class_arguments(config_class)
    return parser


def parse_config(config_class: type[Config], argv: list[str] | None = None) -> Config:
    """Read the command line into `config_class`.

    Args:
        config_class: a frozen dataclass; its `__post_init__` fills presets in and raises ValueError for
            impossible mixes.
        argv: the words after the program's name; None takes the real ones.

    Raises:
        ValueError: an unknown flag or key, a value of the wrong type, an impossible mix.
        FileNotFoundError: no such `--config` file.
    """
    parser = build_parser(config_class)
    argv, from_yaml = _take_config_file(sys.argv[1:] if argv is None else list(argv))
    types = get_type_hints(config_class)
    names = {field.name for field in dataclasses.fields(config_class)}
    for key, value in from_yaml.items():
        _require_known(str(key), names, "the --config file has an unknown key")
        if value is None and type(None) not in get_args(types[key]):
            raise ValueError(f"{key} has no value in the --config file; give one, or leave the line out")
    if "log_level" in names:
        argv = ["--log_level=quiet" if word == "--quiet" else word for word in argv]
    for word in argv:
        if word.startswith("--"):
            flag = word[2:].partition("=")[0].partition(".")[0]
            _require_known(flag, names | {"print_config", "help"}, "unknown flag", dashes="--")
    # A switch needs no value: --merge is --merge true.
    switches = {f"--{name}" for name in names if bool in (types[name], *get_args(types[name]))}
    argv = [
        f"{word}=true" if word in switches and following.startswith("--") else word
        for word, following in itertools.pairwise([*argv, "--"])
    ]
    try:
        # The file is read as flags before the flags: checked the same way, overruled by whoever comes later.
        from_file = [f"--{key}={_as_flag(value)}" for key, value in from_yaml.items()]
        values = parser.parse_args([*from_file, *argv]).as_dict()
    except ArgumentError as error:
        raise ValueError(" ".join(str(error).split())) from error
    config = config_class(**{name: values[name] for name in names})
    if values["print_config"]:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def _as_flag(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def to_yaml(config: Any) -> str:
    """The configuration as YAML that gives the same run again."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


# ------------------------------------------------------------------------------------------------------------
# Mistakes


def require(config: Any, *names: str, at_least: float | None = None, above: float | None = None) -> None:
    """Refuse a number under its bound, naming the field."""
    for name in names:
        value = getattr(config, name)
        if at_least is not None and value < at_least:
            raise ValueError(f"{name} must be >= {at_least}, got {value}")
        if above is not None and value <= above:
            raise ValueError(f"{name} must be > {above}, got {value}")


class UserError(ValueError):
    """A mistake in what the user gave; the message says what was got, what is allowed and what to do."""


class RunStopped(Exception):
    """A run that cannot go on; the message says why and what to do, and where it knows, what is saved."""


@contextmanager
def at_the_door() -> Iterator[None]:
    """Mark what is raised while input is checked as the user's
    mistake, so that it ends in a message, not a traceback.
    """
    try:
        yield
    except (ValueError, FileNotFoundError, ConnectionError) as error:
        raise UserError(str(error)) from error


def run_script(main: Callable[[Any], int | None], parse: Callable[[], Any]) -> None:
    """Parse and run. A `UserError` prints one message and exits 2; a `RunStopped`, a server that is gone
    (`ConnectionError`) or a disk that is full one and exits 1; Ctrl-C where nothing is to be saved exits 130.
    Anything else that is raised is a bug of ours and shows itself.

    Args:
        main: takes the configuration and returns the exit code (None is 0).
        parse: returns the configuration.
    """
    try:
        with at_the_door():
            config = parse()
        code = main(config)
    except (UserError, RunStopped, ConnectionError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, UserError) else 1) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        print(
            f"{Path(sys.argv[0]).name}: error: {error}; free some space, or give another folder",
            file=sys.stderr,
        )
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(f"\n{Path(sys.argv[0]).name}: stopped", file=sys.stderr)
        raise SystemExit(130) from None
    raise SystemExit(code or 0)


# ------------------------------------------------------------------------------------------------------------


def _take_config_file(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Take `--config FILE` out of the words and read it, so that its place among the flags means nothing."""
    words, values = [], {}
    position = 0
    while position < len(argv):
        word = argv[position]
        if word == "--config" or word.startswith("--config="):
            path = word.partition("=")[2]
            if not path:
                position += 1
                path = argv[position] if position < len(argv) else ""
            if not Path(path).is_file():
                raise FileNotFoundError(
                    f"--config {path!r} is not there; give a YAML file, such as one of configs/"
                )
            values = _read_yaml(path)
            if not isinstance(values, dict):
                raise ValueError(
                    f"--config {path!r} must hold `field: value` lines, got {type(values).__name__}"
                )
        else:
            words.append(word)
        position += 1
    return words, values


def _read_yaml(path: str) -> Any:
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path!r} is no YAML: {' '.join(str(error).split())}") from error


def _require_known(name: str, allowed: set[str], what: str, dashes: str = "") -> None:
    if name in allowed:
        return
    near = difflib.get_close_matches(name, allowed, n=1)
    hint = f"did you mean {dashes}{near[0]}?" if near else "see --help for all of them"
    raise ValueError(f"{what}: {dashes}{name}; {hint}")
