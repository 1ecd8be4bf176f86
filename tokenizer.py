"""What can be known of a model without torch: whether there is one of that name, and its tokenizer."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AddedToken, AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

import prompts
from tiny import SHAPE, TINY, build_tiny_tokenizer

ADAPTER = "adapter_config.json"  # what makes a folder an adapter's


def asking(config: Any) -> dict[str, Any]:
    """What `load_tokenizer` takes of a script's configuration."""
    fields = ("system_prompt", "answer_style", "plain_template", "prefill_think", "trust_remote_code")
    return {name: getattr(config, name) for name in fields}


def load_tokenizer(
    name: str,
    system_prompt: str | None = None,
    *,
    tags_as_tokens: bool = False,
    trust_remote_code: bool = False,
    **how: Any,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or Hub name, its chat template prepared.

    Args:
        name: a folder, a Hub name, or `tiny`.
        system_prompt: as `prompts.prepare_tokenizer` takes it.
        tags_as_tokens: see `add_tags`; the model needs rows for them (`models.add_tag_rows`).
        trust_remote_code: run Python code that the model brings.
        how: what else `prompts.prepare_tokenizer` takes.

    Raises:
        FileNotFoundError: no such model, or a folder without a tokenizer.
        ValueError: a tokenizer that is not the model's, that never stops or that loses the tags; a chat
            template that cannot ask so; or code that is not trusted.
    """
    if name == TINY:
        tokenizer = build_tiny_tokenizer()
    else:
        require_model(name)
        tokenizer = load_any_tokenizer(name, trust_remote_code)
        _require_fit(name, tokenizer, trust_remote_code)
    if tokenizer.pad_token_id is None:
        # Only ever a filler: masks are built from lengths, so an EOS used as padding is still trained where
        # it counts.
        tokenizer.pad_token = tokenizer.eos_token
    set_system_prompt(tokenizer, system_prompt, name, **how)
    if tags_as_tokens:
        add_tags(tokenizer)
    return tokenizer


def set_system_prompt(
    tokenizer: PreTrainedTokenizerBase, system_prompt: str | None, name: str, **how: Any
) -> None:
    """Let a tokenizer's chat template ask with a system prompt (`prompts.prepare_tokenizer` has `how`).

    Raises:
        ValueError: the template of the model `name` refuses it, and stays as it was.
    """
    before = tokenizer.chat_template
    try:
        prompts.prepare_tokenizer(tokenizer, system_prompt, **how)
    except ValueError as error:
        tokenizer.chat_template = before
        raise ValueError(f"model {name!r} cannot be asked: {error}") from error


def add_tags(tokenizer: PreTrainedTokenizerBase) -> dict[int, list[int]]:
    """Make each of our tags one token, where the tokenizer writes it in pieces.

    Returns:
        The ids of the new tokens, each with those of the pieces that wrote it.
    """
    written = {tag: tokenizer.encode(tag, add_special_tokens=False) for tag in prompts.TAGS}
    pieces = {tag: ids for tag, ids in written.items() if len(ids) > 1}
    # Not special ones: decoding keeps them, and the reader needs them.
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in pieces])
    return {tokenizer.convert_tokens_to_ids(tag): ids for tag, ids in pieces.items()}


def load_any_tokenizer(name: str, trust_remote_code: bool = False, **sides: str) -> PreTrainedTokenizerBase:
    """A tokenizer as it was saved; see `load_tokenizer`, which asks as we do.

    Args:
        name: a folder or a Hub name.
        trust_remote_code: run Python code that it brings.
        sides: `padding_side` and `truncation_side`.
    """
    folder = Path(name)
    if folder.is_dir() and not any(folder.glob("tokenizer*")) and not any(folder.glob("*.model")):
        raise FileNotFoundError(
            f"model {name!r} has no tokenizer (no tokenizer.json or tokenizer.model in the folder); "
            "copy the tokenizer files of its base model into it"
        )
    with loading(f"the tokenizer of model {name!r}"):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **sides)


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Tell what could not be loaded.

    Raises:
        FileNotFoundError: why it could not.
        ValueError: it brings code, which nobody said to trust.
    """
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{what} brings Python code of its own, which would run with all your rights; read it, then "
                "give --trust_remote_code (trust_remote_code=true in the brackets of a reward)"
            ) from error
        raise FileNotFoundError(f"{what} could not be loaded: {error}") from error


def _require_fit(name: str, tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool) -> None:
    """Refuse a tokenizer that never stops, that loses our tags, or that is another model's."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of model {name!r} has no eos_token: set one in tokenizer_config.json"
        )
    tags = "".join(prompts.TAGS)
    told = tokenizer.decode(tokenizer.encode(tags, add_special_tokens=False), skip_special_tokens=True)
    for tag in prompts.TAGS:
        if tag not in told:
            raise ValueError(
                f"the tokenizer of model {name!r} loses {tag}: {tags!r} comes back as {told!r}; if it is a "
                "special token there, set its `special` to false in tokenizer.json and tokenizer_config.json"
            )
    if (Path(name) / ADAPTER).is_file():  # the model is another folder's, and may have been given more rows
        return
    with loading(f"model {name!r}"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code).get_text_config()
    rows = getattr(config, "vocab_size", None) or len(tokenizer)
    # Placeholders of images and the like may stand past the end (Gemma 3's does): no text becomes one.
    unread = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    unread -= {tokenizer.eos_token_id, tokenizer.pad_token_id}
    beyond = [token for token, i in tokenizer.get_vocab().items() if i >= rows and i not in unread]
    if beyond:
        raise ValueError(
            f"the tokenizer of model {name!r} has {len(beyond)} tokens, such as {beyond[0]!r}, past the "
            f"{rows} rows of the model's embedding; it is another model's, or tokens were added and the "
            "embedding was not resized: copy the model's own tokenizer files"
        )


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


def require_same_architecture(checkpoint: str, name: str, trust_remote_code: bool = False) -> None:
    """Refuse to go on from a checkpoint of another model than the one that is named.

    Raises:
        ValueError: both are at hand, and they differ in architecture or size.
    """
    theirs, ours = (_architecture(each, trust_remote_code) for each in (checkpoint, name))
    if theirs and ours and theirs != ours:
        raise ValueError(
            f"resume: {checkpoint!r} is a checkpoint of another model ({theirs}) than {name!r} ({ours}); "
            "give the --model that its run began with"
        )


def _architecture(name: str, trust_remote_code: bool) -> str:
    """What tells models apart, of a folder or of a Hub name that was loaded before; else the empty text."""
    adapter = Path(name) / ADAPTER
    if adapter.is_file():
        base = json.loads(adapter.read_text())["base_model_name_or_path"]
        return _architecture(base, trust_remote_code) if base else ""
    if name == TINY:
        told = {"model_type": "qwen2", **SHAPE}
    else:
        try:
            told = (
                AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=trust_remote_code)
                .get_text_config()
                .to_dict()
            )
        except OSError:  # not here: the Hub may not be within reach, and a checkpoint needs nothing of it
            return ""
    fields = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers")
    return ", ".join(f"{field} {told.get(field)}" for field in fields)
