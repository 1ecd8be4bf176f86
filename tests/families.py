"""Small random models of the usual families, each in a folder as its maker ships one: the architecture, a
byte-level BPE tokenizer with the family's special tokens, the shape of its chat template, what stops it.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from conftest import SHAPE
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

CHATML = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{- '<|im_start|>system\n' + DEFAULT + '<|im_end|>\n' }}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' }}{%- endif -%}"
)
# Earlier thoughts are left out; the thought stays the model's to open, unless it is told not to think.
QWEN3 = (
    "{%- if messages[0].role == 'system' %}"
    "{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
    "{%- endif %}"
    "{%- set ns = namespace(last=0) %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}"
    "{%- endfor %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{%- elif message.role == 'assistant' %}"
    "{%- set content = message.content %}"
    "{%- if '</think>' in content and loop.index0 < ns.last %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}"
    "{%- endif %}"
    "{{- '<|im_start|>assistant\n' + content + '<|im_end|>\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
LLAMA3 = (
    "{{- bos_token }}"
    "{%- if not date_string is defined %}"
    "{%- if strftime_now is defined %}{%- set date_string = strftime_now('%d %b %Y') %}"
    "{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
    "{%- endif %}"
    "{%- if messages[0]['role'] == 'system' %}"
    "{%- set system_message = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}"
    "{%- else %}{%- set system_message = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{{- 'Cutting Knowledge Date: December 2023\n' }}{{- 'Today Date: ' + date_string + '\n\n' }}"
    "{{- system_message }}{{- '<|eot_id|>' }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
# Refuses a system message (2), or writes it before the first question (3).
GEMMA2 = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
GEMMA3 = (
    "{{ bos_token }}"
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}{%- set loop_messages = messages[1:] -%}"
    "{%- else -%}{%- set first_user_prefix = '' -%}{%- set loop_messages = messages -%}{%- endif -%}"
    "{%- for message in loop_messages -%}"
    "{%- if (message['role'] == 'assistant') -%}{%- set role = 'model' -%}"
    "{%- else -%}{%- set role = message['role'] -%}{%- endif -%}"
    "{{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else '') }}"
    "{{ message['content'] | trim }}{{ '<end_of_turn>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{'<start_of_turn>model\n'}}{%- endif -%}"
)
# The system prompt stands before the last question; nothing opens the model's turn.
MISTRAL = (
    "{%- if messages[0]['role'] == 'system' %}"
    "{%- set system_message = messages[0]['content'] %}{%- set loop_messages = messages[1:] %}"
    "{%- else %}{%- set loop_messages = messages %}{%- endif %}"
    "{{- bos_token }}"
    "{%- for message in loop_messages %}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('After the optional system message, roles must alternate') }}{%- endif %}"
    "{%- if message['role'] == 'user' %}"
    "{%- if loop.last and system_message is defined %}"
    "{{- '[INST] ' + system_message + '\n\n' + message['content'] + '[/INST]' }}"
    "{%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}"
    "{%- else %}{{- ' ' + message['content'] + eos_token }}{%- endif %}"
    "{%- endfor %}"
)


@dataclass(frozen=True)
class Family:
    """A family.

    Attributes:
        architecture: `model_type`.
        template: of its chats.
        bos: what a tokenizer of its puts before every text, None for nothing.
        eos: of the tokenizer.
        turn: the tokens around a turn.
        pad: None where the maker gives none.
        stops: what the generation config stops at besides.
        config: of the architecture.
    """

    architecture: str
    template: str
    bos: str | None
    eos: str
    turn: tuple[str, ...]
    pad: str | None = None
    stops: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)


QWEN = {"bos": None, "eos": "<|im_end|>", "turn": ("<|im_start|>",), "pad": "<|endoftext|>"}
GEMMA = {"bos": "<bos>", "eos": "<eos>", "turn": ("<start_of_turn>", "<end_of_turn>"), "pad": "<pad>"}
GEMMA |= {"stops": ("<end_of_turn>",)}
CAPPED = {"head_dim": 8, "sliding_window": 64, "final_logit_softcapping": 30.0}
FAMILIES = {
    "qwen2": Family(
        "qwen2",
        CHATML.replace("DEFAULT", "'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.'"),
        **QWEN,
        stops=("<|endoftext|>",),
        config={"tie_word_embeddings": True},
    ),
    "qwen3": Family("qwen3", QWEN3, **QWEN, config={"tie_word_embeddings": True, "head_dim": 8}),
    "llama": Family(
        "llama",
        LLAMA3,
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        turn=("<|start_header_id|>", "<|end_header_id|>"),
        stops=("<|end_of_text|>",),
        config={
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "smollm": Family(
        "llama",
        CHATML.replace("DEFAULT", "'You are a helpful AI assistant named SmolLM, trained by Hugging Face'"),
        bos=None,
        eos="<|im_end|>",
        turn=("<|im_start|>",),
        pad="<|im_end|>",
        config={"tie_word_embeddings": True},
    ),
    "gemma2": Family("gemma2", GEMMA2, **GEMMA, config={**CAPPED, "tie_word_embeddings": True}),
    "gemma3": Family("gemma3_text", GEMMA3, **GEMMA, config={**CAPPED, "tie_word_embeddings": True}),
    "mistral": Family("mistral", MISTRAL, "<s>", "</s>", ("[INST]", "[/INST]"), config={"head_dim": 8}),
}


def build_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that knows a few words and the family's special tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = dict.fromkeys([family.pad, family.bos, family.eos, *family.stops, *family.turn])
    trainer = trainers.BpeTrainer(
        vocab_size=310,
        special_tokens=[token for token in special if token],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["think thinking answer answer is 12 + 30 = 42, so the sum is 42"] * 2, trainer)
    if family.bos:
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, bpe.token_to_id(family.bos))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=family.bos, eos_token=family.eos, pad_token=family.pad
    )
    if family.architecture == "qwen3":  # whole tokens, but not special ones
        tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in ("<think>", "</think>")])
    tokenizer.chat_template = family.template
    return tokenizer


def write_folder(name: str, folder: Path) -> str:
    """Write a random model of a family to a folder."""
    family = FAMILIES[name]
    tokenizer = build_tokenizer(family)
    stops = [tokenizer.convert_tokens_to_ids(token) for token in (family.eos, *family.stops)]
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": stops,
        "pad_token_id": tokenizer.pad_token_id,
    }
    # Qwen's makers leave rows to spare, the others do not.
    rows = SHAPE["vocab_size"] if family.architecture.startswith("qwen") else len(tokenizer)
    small = {"initializer_range": 0.1, "max_position_embeddings": 512, "vocab_size": rows}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(family.architecture, **SHAPE | small | ids | family.config)
        model = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(**ids)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
