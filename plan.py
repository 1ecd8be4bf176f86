"""What a step will hold in memory, by arithmetic: from the configuration and the shape of the model, before
any of its weights are loaded.

A step samples, learns, and moves the weights; what each of these needs besides the weights is gone before the
next begins. So there are three sums, and the largest is what has to fit. Activations are counted as
`llama.predicting_states` keeps them, to a few percent; of other architectures they are a rough guess.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from batches import token_budget
from fused_kernels import kernels_for
from inference.decoders import PREFILL_TOKENS
from inference.engine import MAX_ROWS, cache_bytes
from llama import fused_kernels, is_llama, without_adapter
from losses import MAX_CHUNK_LOGITS
from memory import free_memory
from models import QUANTIZED, add_adapter, compute_dtype
from optimizers import make_optimizer
from tiny import TINY, build_tiny
from tokenizer import ADAPTER

# Who runs the blocks in an update: we on packed tokens, by fused kernels or by torch, or the library.
Blocks = Literal["fused", "packed", "library"]
MIB = 2**20
# Of a parameter in nf4: half a byte, a scale of one byte for 64, and a scale of four for 256 of those.
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)
# Both moments of AdamW in 8 bits, with a scale of four bytes for 256; bitsandbytes keeps small tensors whole.
EIGHT_BIT_BYTES = 2 * (1 + 4 / 256)
EIGHT_BIT_FROM = 4096
# What the library's blocks keep, over what ours do: 1.0 to 1.3 on Gemma, Granite, Phi and Qwen2. Attention
# that keeps its weights, as GPT-2's with its dropout, takes more.
LIBRARY_FACTOR = 1.3
# Copies of all logits of a micro-batch, where they are not made in chunks: 5 on Granite and Phi, 6 on Gemma.
WHOLE_LOGITS = 6


@dataclass(frozen=True)
class Load:
    """What goes through the model in a step, on one process.

    Attributes:
        prompt: tokens of the longest prompt.
        completion: tokens of the longest completion that is learned from.
        limit: tokens of a completion that is sampled, at most.
        group_size: completions that share a prompt.
        rows: completions that are learned from in one update.
        sampled: completions that are sampled side by side, if there is room.
    """

    prompt: int
    completion: int
    limit: int
    group_size: int
    rows: int
    sampled: int


@dataclass(frozen=True)
class Part:
    """A line of the table: bytes while sampling, while learning and while the optimizer steps."""

    name: str
    note: str
    sampling: float = 0.0
    learning: float = 0.0
    stepping: float = 0.0

    @classmethod
    def always(cls, name: str, note: str, size: float) -> "Part":
        """What is held all the time."""
        return cls(name, note, size, size, size)


@dataclass(frozen=True)
class Plan:
    """The table.

    Attributes:
        parts: its lines.
        free: bytes that nothing uses now.
        device: where.
    """

    parts: list[Part]
    free: int
    device: torch.device

    @property
    def sums(self) -> tuple[float, float, float]:
        """Bytes while sampling, learning and stepping."""
        rows = [(part.sampling, part.learning, part.stepping) for part in self.parts]
        return tuple(map(sum, zip(*rows, strict=True)))

    @property
    def peak(self) -> float:
        """The most bytes of the three."""
        return max(self.sums)

    @property
    def held(self) -> float:
        """Bytes that no smaller batch makes less: weights, gradients, optimizer and the like."""
        return self.sums[2]

    def __str__(self) -> str:
        """MiB in aligned columns."""
        rows = [(part.name, part.note, part.sampling, part.learning, part.stepping) for part in self.parts]
        rows.append(("together", "", *self.sums))
        lines = [f"{'memory of a step, MiB':<58}{'sampling':>11}{'learning':>11}{'stepping':>11}"]
        for name, note, *sizes in rows:
            cells = "".join(f"{size / MIB:>11,.0f}" if size else f"{'-':>11}" for size in sizes)
            lines.append(f"  {name:<16}{note:<40}{cells}")
        lines.append(f"  {'free':<16}{f'on {self.device.type}':<40}{self.free / MIB:>11,.0f}")
        return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------
# The shape of a model


def empty_model(config: Any, source: str) -> nn.Module:
    """The model that `config.load_model` would load, shapes only: on the meta device, where nothing is held.

    Args:
        config: a `runs.training.TrainingConfig`.
        source: its model, or a checkpoint of it.

    Raises:
        FileNotFoundError: no such model.
    """
    model = _empty(source)
    if not config.lora_rank or hasattr(model, "peft_config") or source == TINY:  # which takes no adapter
        return model
    with torch.device("meta"):
        return add_adapter(model, config.lora_rank, config.seed, targets=config.lora_targets)


def _empty(name: str) -> nn.Module:
    if name == TINY:
        with torch.device("meta"):
            return build_tiny(0)[0]
    if (Path(name) / ADAPTER).is_file():
        from peft import PeftConfig, get_peft_model  # seconds, for those who need it

        adapter = PeftConfig.from_pretrained(name)
        adapter.inference_mode = False
        base = _empty(adapter.base_model_name_or_path)
        with torch.device("meta"):
            return get_peft_model(base, adapter)
    try:
        config = AutoConfig.from_pretrained(name)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"model {name!r} could not be loaded: {error}") from error


def is_held_in_4_bits(config: Any, source: str) -> bool:
    """By the configuration, or by the folder of the adapter that goes on."""
    quantized = Path(source) / QUANTIZED
    return config.quantize == "nf4" or (quantized.is_file() and json.loads(quantized.read_text()) == "nf4")


def weight_bytes(model: nn.Module, in_4_bits: bool) -> float:
    """Of a model in float32; with `in_4_bits` the frozen matrices of its layers in nf4."""
    packed = {id(p) for p in _matrices(model) if in_4_bits and not p.requires_grad}
    return sum(p.numel() * (NF4_BYTES if id(p) in packed else 4) for p in model.parameters())


def _matrices(model: nn.Module) -> list[nn.Parameter]:
    """Of the linear layers but the head."""
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return [module.weight for module in linear if module is not head]


def optimizer_bytes(model: nn.Module, name: str) -> float:
    """Of the states that an optimizer keeps of the trained parameters."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if name == "muon":
        muon, adamw = make_optimizer(model, name, 1.0, 0.0).parts
        return sum((4 if part is muon else 8) * p.numel() for part in (muon, adamw) for p in _of(part))
    if name == "adamw":
        return sum(8 * p.numel() for p in trained)
    return sum((EIGHT_BIT_BYTES if p.numel() >= EIGHT_BIT_FROM else 8) * p.numel() for p in trained)


def _of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _muon_workspace(model: nn.Module) -> float:
    """What Muon's products need while it steps: matrices of one shape go through together, as three copies
    of them and two of their squares.
    """
    muon = make_optimizer(model, "muon", 1.0, 0.0).parts[0]
    shapes = Counter(tuple(sorted(matrix.shape)) for matrix in _of(muon))
    sizes = [4 * count * rows * (3 * columns + 2 * rows) for (rows, columns), count in shapes.items()]
    return max(sizes, default=0)


# ------------------------------------------------------------------------------------------------------------
# The table


def plan_memory(
    config: Any,
    source: str,
    load: Load,
    device: torch.device,
    processes: int = 1,
    division: str | None = None,
) -> Plan:
    """The table of a run.

    Args:
        config: a `runs.training.TrainingConfig`.
        source: its model, or a checkpoint of it.
        load: of the step.
        device: to train on; what is free there bounds the cache.
        processes: of the run.
        division: what they share out, see `sharding.division_of`. Without one each holds everything, and of
            several the gradients a second time, to be exchanged.

    Raises:
        FileNotFoundError: no such model.
    """
    model = empty_model(config, source)
    is_half = device.type == "cuda" and compute_dtype() != torch.float32
    free = free_memory(device)
    in_4_bits = is_held_in_4_bits(config, source)
    case = Case(config, model, load, device, is_half, in_4_bits, processes, division)
    parts = _held(case) + _gathered(case)
    parts += _sampling(case, free - sum(part.sampling for part in parts))
    parts += _learning(case, token_budget(config.micro_batch_tokens, device))
    return Plan(parts, free, device)


@dataclass(frozen=True)
class Case:
    """What the lines are counted from.

    Attributes:
        config: of the script.
        model: its shapes.
        load: of a step.
        device: that computes it.
        is_half: products run in half precision, by autocast.
        in_4_bits: the frozen weights are held in nf4.
        processes: of the run.
        division: what they share out; None where each holds everything.
    """

    config: Any
    model: nn.Module
    load: Load
    device: torch.device
    is_half: bool
    in_4_bits: bool
    processes: int
    division: str | None

    @property
    def shares(self) -> int:
        """Into how many parts gradients and moments go, and weights unless it is zero2."""
        return self.processes if self.division else 1

    @property
    def critic(self) -> str | None:
        """Of the configuration, where it knows of any."""
        return getattr(self.config, "critic", None)

    def half_bytes(self, trained_only: bool) -> float:
        """Copies of matrices that autocast makes: of those that learn it keeps them, of others autograd."""
        matrices = [
            p for p in _matrices(self.model) if p.requires_grad or not (self.in_4_bits or trained_only)
        ]
        is_cast = self.is_half and self.division not in ("fsdp2", "fsdp2_zero2")  # which gather halves
        return is_cast * 2 * sum(p.numel() for p in [*matrices, self.head])

    @property
    def head(self) -> nn.Parameter:
        """The matrix that makes logits."""
        return self.model.get_output_embeddings().weight

    @property
    def unpacked(self) -> float:
        """The largest matrix held in 4 bits, written out for a product."""
        sizes = [p.numel() for p in _matrices(self.model) if self.in_4_bits and not p.requires_grad]
        return max(sizes, default=0) * (2 if self.is_half else 4)


def _held(case: Case) -> list[Part]:
    """Weights and what belongs to each of them."""
    config, model, shares = case.config, case.model, case.shares
    every = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    states = optimizer_bytes(model, config.optimizer)
    form = "nf4, the rest float32" if case.in_4_bits else "float32"
    over = f", over {shares} processes" if shares > 1 else ""
    whole = case.division == "zero2"
    size = weight_bytes(model, case.in_4_bits) / (1 if whole else shares)
    parts = [Part.always("weights", f"{_millions(every)}, {form}{'' if whole else over}", size)]
    if whole:
        parts.append(Part.always("moved weights", f"of {_millions(trained)}{over}", 4 * trained / shares))
    if case.critic == "separate":
        trunk = sum(p.numel() for p in model.get_decoder().parameters())
        parts.append(Part.always("critic", f"{_millions(trunk)}, float32", 4 * trunk))
        states += trunk * states / trained
        trained += trunk
    gradients = 4 * trained / shares
    parts.append(Part("gradients", f"of {_millions(trained)}{over}", 0, gradients, gradients))
    if case.processes > shares:
        parts.append(Part.always("exchange", f"gradients, between {case.processes} processes", gradients))
    parts.append(Part.always("optimizer", f"{config.optimizer}{over}", states / shares))
    if getattr(config, "kl_coef", 0.0):
        is_adapter = config.lora_rank and not (Path(config.model) / ADAPTER).is_file()
        note = "the model without its adapter" if is_adapter else "a frozen copy, float32"
        parts.append(Part.always("reference", note, 0 if is_adapter else 4 * every))
    if config.optimizer == "muon":
        parts.append(Part("workspace", "Muon's products", stepping=_muon_workspace(model)))
    return parts


def _gathered(case: Case) -> list[Part]:
    """Of weights that are shared out: all of them to sample from, and those that an update computes with."""
    if case.division in (None, "zero2"):
        return []
    every = sum(p.numel() for p in case.model.parameters())
    around = {case.model.get_input_embeddings().weight, case.head}
    blocks = every - sum(p.numel() for p in around)
    # One block computes and the next is on its way; what is around them stays.
    at_once = every - blocks + blocks * min(1, 2 / Shape.of(case.model).layers)
    half = 2 if case.is_half else 4
    in_update = {"fsdp2": half * at_once, "fsdp2_zero2": half * every, "zero3": 4 * at_once}
    return [Part("gathered", "all weights; in an update some", half * every, in_update[case.division])]


def _sampling(case: Case, room: float) -> list[Part]:
    """The cache, and what a token a row needs beside it."""
    load, shape, parts = case.load, Shape.of(case.model), []
    if case.is_half and case.division in (None, "zero2"):
        parts.append(Part("half precision", "copies of what learns", case.half_bytes(trained_only=True)))
    elif case.config.lora_rank and not case.in_4_bits:
        layers = [module for module in case.model.modules() if hasattr(module, "lora_A")]
        copied = sum(4 * layer.get_base_layer().weight.numel() for layer in layers)
        if 4 * copied < room:  # as the engine decides
            parts.append(Part("merged", "weights with their adapters", copied))
    position = cache_bytes(without_adapter(case.model))
    positions = load.prompt + load.limit
    rows = max(1, min(load.sampled, MAX_ROWS, int(room) // 2 // position // positions))
    note = f"{rows} rows of {load.prompt:,} + {load.limit:,} tokens"
    parts.append(Part("cache", note, rows * positions * position))
    # A prompt's tokens go through together, a completion's one by one.
    tokens = min(PREFILL_TOKENS, load.prompt * max(1, rows // load.group_size))
    through = tokens * (4 * (6 * shape.hidden + 3 * shape.inner) + position)
    choosing = rows * shape.vocabulary * (10 if case.is_half else 8)
    note = f"{rows} rows of {shape.vocabulary:,}"
    return [*parts, Part("logits", note, case.unpacked + max(through, choosing))]


def _learning(case: Case, budget: int) -> list[Part]:
    """What a micro-batch keeps between its two passes, and its logits."""
    config, load, shape = case.config, case.load, Shape.of(case.model)
    rows = max(1, min(load.rows, budget // (load.prompt + load.completion)))
    note = f"{rows} rows of {load.prompt:,} + {load.completion:,} tokens"
    is_ours = is_llama(without_adapter(case.model), load.prompt + load.completion)
    blocks: Blocks = "packed" if is_ours and not case.critic else "library"
    if blocks == "packed" and case.device.type == "cpu" and not config.torch_compile:
        blocks = "fused" if fused_kernels(without_adapter(case.model), torch.empty(0)) else "packed"
    is_checkpointed = config.gradient_checkpointing
    kept = shape.kept_bytes(load, rows, case.is_half, blocks, is_checkpointed, config.lora_dropout)
    kept += shape.backward_bytes(load, rows, case.is_half) + case.unpacked
    parts = [Part("activations", note, learning=kept * (1 + (case.critic == "separate")))]
    if copied := case.half_bytes(trained_only=is_checkpointed):
        parts.append(Part("half precision", "copies of matrices", learning=copied))
    return [*parts, _logits(case, rows * load.completion, shape.vocabulary, is_ours)]


def _logits(case: Case, tokens: int, vocabulary: int, in_chunks: bool) -> Part:
    """Of a micro-batch's tokens; where they may be more than a product, they are made all at once."""
    if not in_chunks:
        size = 4 * WHOLE_LOGITS * tokens * vocabulary
        return Part("logits", f"{tokens:,} tokens of {vocabulary:,}", learning=size)
    chunk = min(tokens, max(1, MAX_CHUNK_LOGITS // vocabulary))
    # Three copies going up, and going down two; by kernels one, whose place the gradient takes.
    is_fused = case.device.type == "cpu" and kernels_for(torch.empty(0))
    up, down = (4, 4) if is_fused else (12, 10 if case.is_half else 8)
    # The head's gradient before it is added to the others'.
    of_head = case.head.requires_grad * 8 * case.head.numel()
    size = max(up * chunk * vocabulary, down * chunk * vocabulary + of_head)
    return Part("logits", f"{chunk:,} tokens of {vocabulary:,}", learning=size)


@dataclass(frozen=True)
class Shape:
    """Numbers of a block of the model: widths of its states, its inner layer, its queries and keys."""

    layers: int
    hidden: int
    inner: int
    queries: int
    keys: int
    heads: int
    vocabulary: int
    norms_queries: bool

    @classmethod
    def of(cls, model: nn.Module) -> "Shape":
        """From a model's configuration."""
        config = without_adapter(model).config.get_text_config()
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            inner=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            queries=heads * size,
            keys=(getattr(config, "num_key_value_heads", None) or heads) * size,
            heads=heads,
            vocabulary=config.vocab_size,
            norms_queries=config.model_type == "qwen3",
        )

    def kept_bytes(
        self, load: Load, rows: int, half: bool, blocks: Blocks, is_checkpointed: bool, dropout: float
    ) -> float:
        """What autograd keeps of the blocks, and of the states that predict a token."""
        block = self.block_bytes(load, rows, half, blocks, dropout)
        every = self.layers * block
        if is_checkpointed:
            every = self.layers * 4 * self.hidden * self._tokens(load, rows, blocks) + block
        # Who may look where: our blocks share it, and the kernels need none of it.
        every += self._pair_bytes(load, rows, half) if blocks == "packed" else 0
        return every + 8 * self.hidden * rows * load.completion

    def block_bytes(self, load: Load, rows: int, half: bool, blocks: Blocks, dropout: float) -> float:
        """What autograd keeps of a block: inputs of its products, norms, attention."""
        width = 2 if half else 4
        tokens = self._tokens(load, rows, blocks)
        of_prompts = tokens - rows * (load.completion - 1)
        normed = 4 * 2 * self.hidden + width * (5 if half else 2) * self.hidden
        attended = width * 3 * self.queries + 4 * (self.heads + 2)
        attended += self.norms_queries * 8 * (self.queries + self.keys)
        dropped = 5 * (5 * self.hidden + self.queries + self.inner) if dropout else 0
        if blocks == "fused":
            attended = (2 + self.norms_queries) * (self.queries + self.keys) + self.heads
            return tokens * (4 * (3 * self.inner + attended) + normed + dropped)
        of_tokens = tokens * (width * 4 * self.inner + normed + attended + dropped)
        # Keys and values, once more for each completion of a prompt.
        repeats = self.queries // self.keys if half else 1
        span = load.prompt + load.completion - 1
        of_pairs = 2 * self.keys * (of_prompts if half else tokens)
        of_pairs += rows * span * 2 * self.keys * repeats
        every = of_tokens + width * of_pairs
        return every if blocks == "packed" else LIBRARY_FACTOR * (every + self._pair_bytes(load, rows, half))

    def backward_bytes(self, load: Load, rows: int, half: bool) -> float:
        """Gradients on their way down through a block."""
        tokens = self._tokens(load, rows, "packed")
        return (2 if half else 4) * tokens * (1.5 * self.inner + 2 * self.hidden)

    @staticmethod
    def _pair_bytes(load: Load, rows: int, half: bool) -> int:
        """What says who may look where: a number for each token of a completion and each before it."""
        span = load.prompt + load.completion - 1
        return (2 if half else 4) * rows * span * (load.completion - 1)

    @staticmethod
    def _tokens(load: Load, rows: int, blocks: Blocks) -> int:
        """That go through a block; packed, a prompt does once, and no completion's last token."""
        if blocks == "library":
            return rows * (load.prompt + load.completion)
        return math.ceil(rows / load.group_size) * load.prompt + rows * (load.completion - 1)


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M"
