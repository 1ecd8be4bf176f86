"""The built-in model and its tokenizer: small enough to be trained from nothing on a laptop."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2Tokenizer

import prompts

TINY = "tiny"  # its name wherever a model is asked for
# What tells its folders from those of all other models.
SHAPE = {"vocab_size": 320, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 4}


def is_tiny(name: str) -> bool:
    """Is it the built-in model: by name, by the folder that a run left, or that of an adapter to one?"""
    if name == TINY:
        return True
    adapter, whole = Path(name) / "adapter_config.json", Path(name) / "config.json"
    if adapter.is_file():
        base = json.loads(adapter.read_text())["base_model_name_or_path"]
        return base is not None and is_tiny(base)
    return whole.is_file() and SHAPE.items() <= json.loads(whole.read_text()).items()


def build_tiny_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer of 275 tokens: one a byte, so that digits stand alone; operators with spaces; the tags.

    It is Qwen2's own class without a single merge, because transformers gives every Qwen2 model that class,
    whatever its folder says: any other kind would read differently once it is loaded.
    """
    special = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    operators = [form for op in "+-*/=" for form in (f" {op} ", f" {op}")]
    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *prompts.TAGS, *operators, *alphabet])}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[],
        unk_token=None,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=special[2:],
    )
    # Whole tokens, but not special ones: decoding keeps them, and the reader needs them.
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in [*prompts.TAGS, *operators]])
    # It learns the form from examples; a system prompt that it cannot read would only lengthen every prompt.
    tokenizer.chat_template = prompts.PREPARED_MARK + (
        "{%- for message in messages -%}"
        "{{ '<|' + message.role + '|>' + message.content + '<|end|>' }}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
    )
    return tokenizer


def build_tiny(seed: int) -> tuple[Any, PreTrainedTokenizerBase]:
    """The built-in model with fresh weights: Qwen2's architecture,
    0.44 M parameters, trained from nothing in minutes.

    Args:
        seed: of the weights; the global random state is left as it was.
    """
    import torch  # the tokenizer above needs none
    from transformers import Qwen2ForCausalLM

    tokenizer = build_tiny_tokenizer()
    # The vocabulary is the tokenizer's 275, rounded up: kernels like multiples of 64. Depth, not width: with
    # 2 layers of 384 instead, luck decides when sums are understood.
    config = Qwen2Config(
        **SHAPE,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    return model, tokenizer
