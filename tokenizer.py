"""What can be known of a model without torch: whether there is one of that name, and its tokenizer."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

import prompts
from tiny import TINY, build_tiny_tokenizer

ADAPTER = "adapter_config.json"  # what makes a folder an adapter's


def asking(config: Any) -> dict[str, Any]:
    """What `load_tokenizer` takes of a script's configuration."""
    fields = ("system_prompt", "answer_style", "plain_template", "prefill_think")
    return {name: getattr(config, name) for name in fields}


def load_tokenizer(name: str, system_prompt: str | None = None, **how: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or Hub name, its chat template prepared.

    Args:
        name: a folder, a Hub name, or `tiny`.
        system_prompt: as `prompts.prepare_tokenizer` takes it.
        how: what else that takes.

    Raises:
        FileNotFoundError: no such model, or a folder without a tokenizer.
        ValueError: a tokenizer without an end-of-sequence token: nothing would ever stop; or a chat template
            that cannot ask so.
    """
    if name == TINY:
        tokenizer = build_tiny_tokenizer()
    else:
        require_model(name)
        tokenizer = load_any_tokenizer(name)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of model {name!r} has no eos_token: set one in tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        # Only ever a filler: masks are built from lengths, so an EOS used as padding is still trained where
        # it counts.
        tokenizer.pad_token = tokenizer.eos_token
    try:
        prompts.prepare_tokenizer(tokenizer, system_prompt, **how)
    except ValueError as error:
        raise ValueError(f"model {name!r} cannot be asked: {error}") from error
    return tokenizer


def load_any_tokenizer(name: str, **sides: str) -> PreTrainedTokenizerBase:
    """A tokenizer as it was saved; see `load_tokenizer`, which asks as we do.

    Args:
        name: a folder or a Hub name.
        sides: `padding_side` and `truncation_side`.
    """
    folder = Path(name)
    if folder.is_dir() and not any(folder.glob("tokenizer*")) and not any(folder.glob("*.model")):
        raise FileNotFoundError(
            f"model {name!r} has no tokenizer (no tokenizer.json or tokenizer.model in the folder); "
            "copy the tokenizer files of its base model into it"
        )
    try:
        return AutoTokenizer.from_pretrained(name, **sides)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"the tokenizer of model {name!r} could not be loaded: {error}") from error


def require_model(name: str) -> None:
    """Refuse a path that is not there before the Hub is asked for it."""
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file() and not (folder / ADAPTER).is_file():
            raise FileNotFoundError(
                f"model {name!r} is a folder without a config.json; give a Hugging Face model folder"
            )
    elif name.count("/") != 1 or name.startswith((".", "/", "~", "outputs/")):
        raise FileNotFoundError(
            f"model {name!r} is not there; give a folder, a Hub name such as Qwen/Qwen2.5-0.5B-Instruct, "
            f"or {TINY!r}"
        )
