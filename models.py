"""Models and tokenizers: any Hugging Face causal language model, and the policy that trains.

A model folder is an ordinary Hugging Face folder: safetensors, config, generation config, tokenizer with its
chat template. Whatever is saved here loads in plain transformers.
"""

import copy
import importlib.util
import json
import os
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_flash_attn_2_available, logging

from fused_kernels import kernels_for
from llama import LLAMA_FAMILY, compile_blocks, is_llama, predicting_states, without_adapter
from losses import token_logprobs
from sharding import read_plan, shard_on_cpu
from tiny import TINY, build_tiny
from tokenizer import ADAPTER, add_tags, load_any_tokenizer, loading, require_model
from zero import kept_from_accelerate

# A bar for every file that is read or written is noise among a run's lines; the Hub's own bars stay.
logging.set_tqdm_hook(lambda make, args, kwargs: make(*args, **kwargs | {"disable": True}))

QUANTIZED = "base_quantization.json"  # beside an adapter whose base was held in 4 bits
Quantization = Literal["none", "nf4"]

# ------------------------------------------------------------------------------------------------------------
# Loading and saving


def load_model(
    name: str,
    seed: int = 0,
    device: str | torch.device | None = None,
    quantize: Quantization = "none",
    trust_remote_code: bool = False,
) -> nn.Module:
    """A causal language model in float32, by Hub name or folder, or `tiny` with fresh weights.

    Float32 because updates of 1e-6 vanish in bfloat16 weights; on a GPU the scripts compute in bfloat16 under
    autocast.

    Args:
        name: `tiny`, a folder (of a model, or of an adapter to the model that it names), or a Hub name.
        seed: of the fresh weights of `tiny`.
        device: moved there; None leaves it on the CPU.
        quantize: "nf4" holds the linear layers but the head in 4 bits, doubly quantised (QLoRA, arXiv
            2305.14314); only an adapter can be trained on them. The folder of an adapter that was trained so
            says it itself.
        trust_remote_code: run Python code that the model brings.

    Raises:
        FileNotFoundError: no such model, or weights that cannot be read.
        ValueError: `tiny` in 4 bits, or code that is not trusted.
    """
    if name == TINY:
        if quantize != "none":
            raise ValueError(f"quantize needs a model folder or a Hub name, not {TINY!r}; give --model")
        model = build_tiny(seed)[0]
    elif (Path(name) / ADAPTER).is_file():
        model = _load_adapter(name, trust_remote_code)
    else:
        require_model(name)
        options = {"quantization_config": _four_bits()} if quantize == "nf4" else {}
        with loading(f"model {name!r}"):
            model = AutoModelForCausalLM.from_pretrained(
                name, dtype=torch.float32, trust_remote_code=trust_remote_code, **options
            )
        for layer in model.modules():
            # Some processors make bitsandbytes pack weights anew for inference, in bfloat16: what samples
            # would no longer be what learns.
            if hasattr(layer, "support_avx512bf16_for_cpu"):
                layer.support_avx512bf16_for_cpu = False
    return model.to(device) if device is not None else model


def _four_bits() -> Any:
    """What transformers is told to hold weights in 4 bits.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            'quantize "nf4" needs bitsandbytes, which is not installed; pip install bitsandbytes'
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype(),
    )


def is_quantized(model: nn.Module) -> bool:
    """Are a model's own weights, or those under its adapter, held in 4 bits?"""
    return getattr(without_adapter(model), "quantization_method", None) is not None


def compute_dtype() -> torch.dtype:
    """What matrix products run in: bfloat16 on a GPU that has it, float16 on one that has not."""
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def attend_fast(model: nn.Module) -> None:
    """Let flash-attention 2 attend where it is installed, the GPU is made for it and the library runs the
    blocks; everywhere else torch's own kernels (sdpa) do, as they do where `llama.py` runs the blocks.

    It takes half precision alone: call this once the model is on its GPU, and the model under autocast.
    """
    inner = without_adapter(model)
    has_kernels = is_flash_attn_2_available() and compute_dtype() == torch.bfloat16
    if has_kernels and inner._supports_flash_attn and inner.config.model_type not in LLAMA_FAMILY:
        inner.set_attn_implementation("flash_attention_2")


def checkpoint_activations(model: nn.Module) -> None:
    """Keep one state a block between the passes and compute the rest again: less memory, more time."""
    model.activation_checkpointing_enable()


def compile_updates(model: nn.Module) -> None:
    """Run a model's blocks through `torch.compile` where a policy scores completions, and nowhere else.

    Raises:
        ValueError: the library runs this model's blocks, or there is no compiler.
    """
    if not is_llama(without_adapter(model), positions=1):
        raise ValueError(
            f"torch_compile is for models of the types {', '.join(LLAMA_FAMILY)}, got "
            f"{model.config.model_type}; leave it out"
        )
    compiler = shlex.split(os.environ.get("CXX") or "g++")[0]  # of "ccache g++" the first
    if shutil.which(compiler) is None:
        raise ValueError(f"torch_compile needs a C++ compiler, and {compiler} is not there; leave it out")
    compile_blocks(model)


@torch.no_grad()
def add_tag_rows(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Make room for the tags as tokens: a row each in embedding and head, the mean of its pieces' rows.

    Args:
        model: from `load_model`.
        tokenizer: the model's, as it was saved with it; the tags are made tokens of it.

    Returns:
        The ids of the new tokens; none where the tags were tokens already.
    """
    pieces = add_tags(tokenizer)
    embedding = model.get_input_embeddings()
    if pieces and max(pieces) >= embedding.num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tables = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    bias = getattr(model.get_output_embeddings(), "bias", None)
    for table in [*tables[: 1 if tables[0] is tables[1] else 2], *([] if bias is None else [bias])]:
        for token, of in pieces.items():
            table[token] = table[of].mean(0)
    return sorted(pieces)


def add_adapter(
    model: nn.Module,
    rank: int,
    seed: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
    tokens: Sequence[int] = (),
) -> nn.Module:
    """Freeze a model and put a LoRA adapter on its linear layers (arXiv 2106.09685).

    Args:
        model: from `load_model`; one that has an adapter of this rank already is returned as it is.
        rank: of the adapter; what it adds is zero at first.
        seed: of its weights; the global random state is left as it was.
        alpha: what the adapter adds is scaled by alpha / rank; None scales by 1.
        dropout: of what the adapter reads, in updates alone.
        targets: names of linear layers, such as q_proj; None takes all but the head.
        tokens: whose rows in embedding and head are trained, too.

    Raises:
        ValueError: the weights came from nowhere, and nobody could load them again; the model has an
            adapter of another rank, or without the tokens; or it has none of the targets.
    """
    from peft import LoraConfig, PeftModel, get_peft_model  # seconds, for those who need it

    if isinstance(model, PeftModel):
        has = model.peft_config[model.active_adapter].r
        if has != rank:
            raise ValueError(f"lora_rank must be {has}, the rank of the adapter that goes on, got {rank}")
        if tokens:
            raise ValueError(
                "tags_as_tokens needs a new adapter: the one that goes on has no rows for tokens"
            )
        return model
    if not model.name_or_path:
        raise ValueError("lora_rank needs a model folder or a Hub name, not fresh weights; give --model")
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=list(targets) if targets else "all-linear",
        task_type="CAUSAL_LM",
        trainable_token_indices=dict.fromkeys(_tables(model), list(tokens)) if tokens else None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def _tables(model: nn.Module) -> list[str]:
    """The names of what has a row a token: the embedding, and the head where it has weights of its own."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows = [embedding] if head.weight is embedding.weight else [embedding, head]
    return [name.rpartition(".")[2] for name, module in model.named_modules() if module in rows]


def load_merged(folder: str, trust_remote_code: bool = False) -> nn.Module:
    """The model of an adapter's folder with the adapter added to its weights, in float32.

    A base in 4 bits is first written out in float32, as it was in training: merged into 4 bits, most of what
    was learned would be rounded away, and into the original weights, it would be another model.
    """
    from peft import PeftModel

    base = _load_base(folder, trust_remote_code)
    if is_quantized(base):
        base = base.dequantize()
    return PeftModel.from_pretrained(base.float(), folder).merge_and_unload(safe_merge=True)


def _load_adapter(folder: str, trust_remote_code: bool) -> nn.Module:
    """The adapter of a folder on the model that its configuration names, ready to be trained on."""
    from peft import PeftModel

    base = _load_base(folder, trust_remote_code)
    try:
        return PeftModel.from_pretrained(base, folder, is_trainable=True)
    except (RuntimeError, ValueError) as error:  # of a size, or of names, that the model does not have
        raise ValueError(
            f"the adapter {folder!r} does not fit {base.name_or_path!r}, the model that it names: {error}"
        ) from error


def _load_base(folder: str, trust_remote_code: bool) -> nn.Module:
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(folder)
    name, file = config.base_model_name_or_path, Path(folder) / QUANTIZED
    quantize = json.loads(file.read_text()) if file.is_file() else "none"
    base = load_model(name, quantize=quantize, trust_remote_code=trust_remote_code)
    if getattr(config, "trainable_token_indices", None):  # trained with the tags as tokens
        add_tag_rows(base, load_any_tokenizer(name, trust_remote_code))
    return base


def save_model(folder: str | os.PathLike, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save an ordinary Hugging Face folder; its generation config stops where the tokenizer's turn ends."""
    stop = model.generation_config.eos_token_id
    stop = stop if isinstance(stop, list) else [stop]
    stop = sorted({tokenizer.eos_token_id, *stop} - {None})
    model.generation_config = GenerationConfig(
        eos_token_id=stop if len(stop) > 1 else stop[0],
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    # Of an adapter never the whole embedding, which PEFT would add where it has been given more rows.
    model.save_pretrained(
        folder, **({"save_embedding_layers": False} if hasattr(model, "peft_config") else {})
    )
    tokenizer.save_pretrained(folder)
    if is_quantized(model):
        (Path(folder) / QUANTIZED).write_text(json.dumps("nf4") + "\n")
    _say_rotary_base(Path(folder) / "config.json")


def _say_rotary_base(file: Path) -> None:
    """Repeat in a saved configuration what transformers 5 keeps in `rope_parameters` alone.

    mlx-lm 0.32 reads `rope_theta` and `rope_scaling`, and without them takes a base of its own: the model
    would load without a word and answer nonsense.
    """
    if not file.is_file():  # an adapter's folder
        return
    config = json.loads(file.read_text())
    rotary = config.get("rope_parameters") or {}
    if "rope_theta" in rotary:  # else one for each kind of layer, which has readers of its own
        config["rope_theta"] = rotary["rope_theta"]
        if rotary.get("rope_type", "default") != "default":
            config["rope_scaling"] = rotary
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


# ------------------------------------------------------------------------------------------------------------
# A model that rewards


def load_reward_model(
    name: str,
    device: str | torch.device,
    *,
    batch_size: int = 16,
    max_tokens: int = 2048,
    trust_remote_code: bool = False,
) -> Callable[..., list[float]]:
    """A sequence-classification model of one output as a reward function: the reward is its logit.

    It reads the question and the whole completion, thought included, as a conversation in the chat template
    of its own tokenizer, or one after the other where that has none.

    Args:
        name: a folder or a Hub name.
        device: where it is held.
        batch_size: completions that are scored together; equal lengths side by side.
        max_tokens: of a conversation; of a longer one the beginning is left out, as the end has the answer.
        trust_remote_code: run Python code that the model brings.

    Raises:
        FileNotFoundError: no such model, or one without a tokenizer.
        ValueError: code that is not trusted; a model without a trained head, or with several outputs.
    """
    if batch_size < 1 or max_tokens < 1:
        raise ValueError(f"batch_size and max_tokens must be >= 1, got {batch_size} and {max_tokens}")
    require_model(name)
    # Not float16, which the states of many models overflow.
    has_bf16 = torch.device(device).type == "cuda" and compute_dtype() == torch.bfloat16
    dtype = torch.bfloat16 if has_bf16 else torch.float32
    with loading(f"reward model {name!r}"):
        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=dtype, output_loading_info=True, trust_remote_code=trust_remote_code
        )
    tokenizer = load_any_tokenizer(name, trust_remote_code, truncation_side="left", padding_side="right")
    if loaded["missing_keys"]:
        missing = ", ".join(sorted(loaded["missing_keys"]))
        raise ValueError(
            f"reward model {name!r} has no trained weights for {missing}: it is not a reward model; give one "
            "that was trained for sequence classification"
        )
    if model.config.num_labels != 1:
        raise ValueError(f"reward model {name!r} must have one output, got {model.config.num_labels}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.eval().requires_grad_(False).to(device)

    def encode(question: str, completion: str) -> list[int]:
        if tokenizer.chat_template is None:
            return tokenizer.encode(f"{question}\n{completion}", truncation=True, max_length=max_tokens)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": completion}]
        return tokenizer.apply_chat_template(
            messages, truncation=True, max_length=max_tokens, return_dict=False
        )

    @torch.inference_mode()
    def reward(completions: list[str], questions: list[str]) -> list[float]:
        rows = [encode(*pair) for pair in zip(questions, completions, strict=True)]
        by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        values = [0.0] * len(rows)
        for start in range(0, len(rows), batch_size):
            chosen = by_length[start : start + batch_size]
            inputs = tokenizer.pad({"input_ids": [rows[i] for i in chosen]}, return_tensors="pt").to(device)
            logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
            for i, value in zip(chosen, logits[:, 0].tolist(), strict=True):
                values[i] = value
        return values

    return reward


# ------------------------------------------------------------------------------------------------------------
# What trains


def require_gpus() -> None:
    """Refuse to run on the processor in place of GPUs that were asked for.

    Raises:
        ValueError: CUDA_VISIBLE_DEVICES names more than there are; or more processes were launched than that.
    """
    asked, there = os.environ.get("CUDA_VISIBLE_DEVICES", ""), torch.cuda.device_count()
    named = [name for name in asked.split(",") if name.strip().isdigit() or name.startswith(("GPU-", "MIG-"))]
    if len(named) > there:
        raise ValueError(
            f"CUDA_VISIBLE_DEVICES={asked!r} asks for {len(named)} GPUs, and torch finds {there} of them; "
            "name those that nvidia-smi lists, or unset it to run on what is there"
        )
    process = int(os.environ.get("LOCAL_RANK", "0"))
    if there and process >= there and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        raise ValueError(
            f"process {process + 1} on this machine has no GPU, of which there are {there}; give accelerate "
            f"launch --num_processes {there}"
        )


def make_accelerator(tracker: str = "none", folder: str | None = None) -> Accelerator:
    """Accelerate as the machine allows: bfloat16 autocast on a GPU that has it, float16 with a scaler on one
    that has not, float32 on an Apple GPU (MPS) and on a processor. ACCELERATE_USE_CPU=1 keeps to the latter.

    Args:
        tracker: "none", or a tracker that Accelerate knows.
        folder: where trackers that write files put them.

    Raises:
        ValueError: the tracker is not installed, a GPU that was asked for is not there, or sharding was asked
            for in a way that cannot be done.
    """
    require_gpus()
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        raise ValueError(
            f"tracker {tracker!r} is not installed; pip install {tracker}, or give --tracker none"
        )
    precision = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}
    plan = read_plan(compute_dtype())
    with kept_from_accelerate():
        accelerator = Accelerator(
            mixed_precision=precision[compute_dtype()],
            log_with=None if tracker == "none" else tracker,
            project_dir=folder,
            fsdp_plugin=plan,
        )
    shard_on_cpu(accelerator, plan)
    return accelerator


class Critic(nn.Module):
    """A value for every state: what reward a completion will earn from here on.

    Attributes:
        trunk: its own copy of the policy's decoder, or None where it reads the policy's states.
        head: from a state to its value; zero at first, so that the first advantages are plain rewards.
    """

    def __init__(self, model: nn.Module, kind: Literal["shared", "separate"]) -> None:
        """Build it beside a causal language model."""
        super().__init__()
        decoder = model.get_decoder()
        self.trunk = copy.deepcopy(decoder).requires_grad_(True) if kind == "separate" else None
        self.head = nn.Linear(model.get_output_embeddings().in_features, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.to(next(decoder.parameters()).device)

    def forward(self, states: Tensor | None, inputs: dict[str, Tensor]) -> Tensor:
        """Values `[B, P+T]` of the policy's states `[B, P+T, H]`, or of its own trunk's."""
        if self.trunk is not None:
            states = self.trunk(**inputs).last_hidden_state
        return self.head(states.to(self.head.weight.dtype)).squeeze(-1).float()


class Policy(nn.Module):
    """The one module given to `accelerator.prepare`: log-probabilities of completions under the model, and
    with a critic the values of the states they passed through.

    Calling a backbone and a head apart would go around the hooks of DDP and leave gradients unreduced; here
    all are called inside one forward.
    """

    def __init__(self, model: nn.Module, critic: Literal["shared", "separate"] | None = None) -> None:
        """Wrap a Hugging Face causal language model."""
        super().__init__()
        self.model = model
        self.critic = Critic(model, critic) if critic else None
        self.has_plain_head = _has_plain_head(model)
        self._no_split_modules = model._no_split_modules  # what Accelerate shards apart: the blocks

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Score the completions of a batch laid out by `pad_batch`.

        Args:
            input_ids: `[B, P+T]`.
            attention_mask: `[B, P+T]`.
            completion_mask: `[B, T]`, True counts.
            temperature: of sampling; the logits are divided by it.

        Returns:
            logprobs and entropy of each token, and the value of the state before it (None without a critic),
            `[B, T]` float32; outside the mask they mean nothing.
        """
        length = completion_mask.shape[1]
        targets = input_ids[:, -length:]
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": (attention_mask.cumsum(-1) - 1).clamp(min=0),
            "use_cache": False,
        }
        # What stands at a position predicts the next token, hence one more and all but the last.
        before = slice(-length - 1, -1)
        if self.has_plain_head:
            # The head reads the states that predict a completion's token, and no padding.
            if self._skips_padding(input_ids.shape[1]):
                inner = without_adapter(self.model)
                read = predicting_states(inner, input_ids, attention_mask, completion_mask)
            else:
                states = self.model.get_decoder()(**inputs).last_hidden_state
                read = states[:, before][completion_mask]
            head = self.model.get_output_embeddings().weight
            counted = targets[completion_mask]
            figures = token_logprobs(read, head, counted, temperature, kernels=kernels_for(read))
            logprobs, entropy = (
                values.new_zeros(targets.shape).masked_scatter(completion_mask, values) for values in figures
            )
        else:
            # All logits at once, `[B, T, V]`: more memory, but whatever the library does to them is in them.
            keeps_states = self.critic is not None
            output = self.model(**inputs, logits_to_keep=length + 1, output_hidden_states=keeps_states)
            states = output.hidden_states[-1] if keeps_states else None
            logits = output.logits[:, before]
            logits = logits if logits.dtype == torch.float64 else logits.float()
            all_logprobs = (logits / temperature).log_softmax(-1)
            entropy = -torch.linalg.vecdot(all_logprobs.exp(), all_logprobs)
            logprobs = all_logprobs.gather(-1, targets[..., None]).squeeze(-1)
        values = self.critic(states, inputs)[:, before] if self.critic is not None else None
        return logprobs, entropy, values

    def _skips_padding(self, positions: int) -> bool:
        """Can the blocks be run part by part? Not where the library does more between them than they say."""
        model = without_adapter(self.model)
        config = model.config
        return (
            self.critic is None  # which reads padded rows
            and is_llama(model, positions)
            and not config.attention_dropout
            and config._attn_implementation in ("sdpa", "eager")
        )


class WithoutAdapter(nn.Module):
    """A LoRA policy as it was before: the reference that costs no second model."""

    def __init__(self, policy: Policy) -> None:
        """Look at a policy whose model has an adapter."""
        super().__init__()
        self.policy = policy

    def forward(self, **inputs: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `Policy.forward`, with the adapter off."""
        with self.policy.model.disable_adapter():
            return self.policy(**inputs)


@torch.no_grad()
def _has_plain_head(model: nn.Module) -> bool:
    """Whether the logits are `hidden @ head.weight.T` and nothing else.

    Gemma caps them, Granite and Cohere scale them, Phi adds a bias. No list of these could be complete, so
    two tokens are run and the head says large numbers on the way: a cap does nothing to the small ones of
    fresh weights.
    """
    head, decoder = model.get_output_embeddings(), model.get_decoder()
    linear = getattr(head, "original_module", head)  # under PEFT's rows of single tokens
    if type(linear) is not nn.Linear or linear.bias is not None:
        return False
    said = torch.linspace(-100, 100, linear.out_features, dtype=head.weight.dtype, device=head.weight.device)
    seen: dict[str, Tensor] = {}
    hooks = [
        decoder.register_forward_hook(lambda module, inputs, output: seen.update(hidden=output[0])),
        head.register_forward_pre_hook(lambda module, inputs: seen.update(read=inputs[0])),
        head.register_forward_hook(lambda module, inputs, output: said.expand_as(output)),
    ]
    try:
        ids = torch.zeros(1, 2, dtype=torch.long, device=head.weight.device)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return torch.equal(seen["read"], seen["hidden"]) and torch.equal(logits, said.expand_as(logits))
