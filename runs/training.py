"""What every training script can be told, whatever it
learns from: the fields that its own configuration inherits.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from models import (
    Quantization,
    add_adapter,
    add_tag_rows,
    checkpoint_activations,
    compile_updates,
    load_model,
)
from optimizers import OptimizerName
from prompts import AnswerStyle
from runs.config import require
from runs.console import LogLevel
from tiny import TINY, is_tiny
from tokenizer import (
    ADAPTER,
    asking,
    load_any_tokenizer,
    load_tokenizer,
    require_same_architecture,
)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The fields that the training scripts share; a script's own defaults replace those given here."""

    # The learning rates where none is given: of all weights, and of adapters. These want ten times as much
    # (Schulman et al. 2025, "LoRA Without Regret"), and the built-in model's do too: with rank 16, GRPO's
    # validation accuracy after 25 steps is 92.0 % at 4e-4, 96.5 % at 1e-3, and 98.5 % at 4e-3.
    tiny_rates: ClassVar[tuple[float, float]]
    pretrained_rates: ClassVar[tuple[float, float]]

    model: str
    """A model folder, or a name on the Hugging Face Hub."""
    data: str = "arithmetic"
    """A task (arithmetic, word_problems, countdown), gsm8k, math, openr1-math, a Hub name or a path."""
    output: str
    """The run's folder."""
    seed: int = 0
    """Of fresh weights, of generated problems, of their order and of sampling."""

    data_options: dict[str, Any] = field(default_factory=dict)
    """Options of a built-in task, such as '{high: 999}'."""
    question_column: str | None = None
    """The data's column with the question; guessed from the usual names if not given."""
    answer_column: str | None = None
    """The data's column with the answer; guessed from the usual names if not given."""
    limit: int | None = None
    """Train on at most this many problems."""
    max_prompt_tokens: int = 1024
    """A longer prompt, system prompt and template included, is dealt with by on_long_prompt."""
    on_long_prompt: Literal["drop", "cut", "stop"] = "drop"
    """Leave such problems out, and say how many; cut the beginning of their question, whose end mostly asks,
    and say of how many; or stop."""
    system_prompt: str | None = None
    """Replaces the system prompt that the model's chat template gets from us; the empty text for none."""
    answer_style: AnswerStyle | None = None
    """Which of our system prompts asks: tags for `<answer>…</answer>`, boxed for LaTeX's box, which models
    for mathematics know. If not given: as the model's folder does, and tags where it does not."""
    plain_template: bool = False
    """Ask in R1-Zero's plain `User: … Assistant: `: for base models whose tokenizer has a chat template."""
    prefill_think: bool | None = None
    """Begin every completion with `<think>`, which the model then need not find."""

    tags_as_tokens: bool = False
    """Give each tag a token of its own, where it is written in pieces: its embedding begins as their mean. An
    adapter trains these rows too, and vLLM then takes it merged only."""
    trust_remote_code: bool = False
    """Run Python code that the model brings. Read it first."""

    lora_rank: int = 0
    """Above 0: LoRA adapters of this rank learn, and the weights stay as they are."""
    lora_alpha: float | None = None
    """What the adapters add is scaled by this over the rank; if not given, by 1."""
    lora_dropout: float = 0.0
    """Of what the adapters read, in updates alone."""
    lora_targets: list[str] | None = None
    """Names of the linear layers that get adapters, such as '[q_proj, v_proj]'; if not given, all of them."""
    quantize: Quantization = "none"
    """nf4: the weights under the adapters are held in 4 bits (QLoRA); needs bitsandbytes."""
    gradient_checkpointing: bool = False
    """Keep one state a block and compute the rest again: less memory for activations, a third more time."""
    torch_compile: bool = False
    """Compile the blocks for updates: a minute or more at the start, for fewer kernels and fewer bytes moved
    between them. For GPUs: on a processor it replaces the fused kernels, which are faster. Llama family."""
    total_steps: int
    """How long to train."""
    optimizer: OptimizerName = "adamw"
    """muon learns a model from nothing in far fewer steps; adamw suits a pretrained one, adamw_8bit takes a
    quarter of its memory, and paged_adamw_8bit moves that out of a GPU's memory where it runs out."""
    learning_rate: float | None = None
    """The highest of the schedule."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How the learning rate falls after the warm-up."""
    warmup_steps: int = 0
    """Optimizer steps in which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """Of matrices; norms and biases are left alone."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    max_bad_updates: int = 5
    """An update whose loss or gradient is not finite is left out; after so many in a row the run has
    diverged (see max_rollbacks)."""
    max_rollbacks: int = 2
    """A run that diverges (too many bad updates; entropy, KL or length running away) goes back to a good
    checkpoint at half the learning rate, at most so often; then it stops."""
    micro_batch_tokens: int | None = None
    """Tokens (padding included) that go through the model at once; if not given, 4,096 on a CPU and 16,384 on
    a GPU. Where memory runs out they are halved and the update is done again; the gradient stays."""

    eval_every: int
    """Steps between evaluations on the validation split; 0 for none."""
    eval_limit: int = 200
    """Validation problems in an evaluation."""
    target_accuracy: float | None = None
    """The run ends as soon as an evaluation reaches this, in [0, 1]."""
    patience: int = 0
    """Above 0: the run ends after so many evaluations in a row that are no better than the best; best/ has
    that one's model."""
    save_every: int
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """How many of them stay."""
    resume: str = "auto"
    """auto: go on if the run's folder has a checkpoint; never: start over; or a checkpoint's folder: there
    learning_rate and entropy_coef may be others than its run's."""
    tracker: Literal["none", "wandb", "tensorboard", "trackio"] = "none"
    """Where metrics go besides `metrics.jsonl`; install its package. WANDB_MODE=offline keeps W&B offline."""
    log_level: LogLevel = "info"
    """quiet (or just --quiet): what goes wrong, and how it ends; info: also evaluations, and a line for each
    twentieth of the run or, where steps are slow, for each step; debug: a line a step."""
    dry_run: bool = False
    """Rehearse and end: memory, accuracy, time and cost, and what would keep the run from learning."""
    price_per_hour: float = 0.0
    """Of the machine, in whatever currency: what a dry run counts the cost by."""

    @property
    def trains_tiny(self) -> bool:
        """Is it the built-in model that trains? It is what a cold start yet to come will leave, too."""
        is_to_come = self.model == getattr(type(self), "model", None) and not Path(self.model).exists()
        return is_to_come or is_tiny(self.model)

    @property
    def trains_adapter(self) -> bool:
        """Is it an adapter that trains, a new one or one that goes on?"""
        return bool(self.lora_rank) or (Path(self.model) / ADAPTER).is_file()

    def __post_init__(self) -> None:
        """Fill the learning rate in, then refuse what cannot train."""
        if self.learning_rate is None:
            of_weights, of_adapter = self.tiny_rates if self.trains_tiny else self.pretrained_rates
            object.__setattr__(self, "learning_rate", of_adapter if self.trains_adapter else of_weights)
        require(self, "total_steps", "max_prompt_tokens", "max_bad_updates", at_least=1)
        if self.micro_batch_tokens is not None:
            require(self, "micro_batch_tokens", at_least=1)
        require(self, "eval_limit", "save_every", "keep_checkpoints", at_least=1)
        require(self, "seed", "eval_every", "warmup_steps", "weight_decay", "lora_rank", at_least=0)
        require(self, "max_rollbacks", "patience", "price_per_hour", at_least=0)
        if self.target_accuracy is not None and not 0 <= self.target_accuracy <= 1:
            raise ValueError(f"target_accuracy must be in [0, 1], got {self.target_accuracy}")
        for name in ("target_accuracy", "patience"):
            if getattr(self, name) and not self.eval_every:
                raise ValueError(f"{name} needs evaluations, got eval_every 0; give --eval_every 25")
        require(self, "learning_rate", "max_grad_norm", above=0)
        if self.lora_alpha is not None:
            require(self, "lora_alpha", above=0)
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {self.lora_dropout}")
        of_adapter = {"lora_alpha": None, "lora_dropout": 0.0, "lora_targets": None, "quantize": "none"}
        for name, off in of_adapter.items():
            if not self.lora_rank and getattr(self, name) != off:
                raise ValueError(f"{name} needs adapters, got lora_rank 0; give --lora_rank 16")

    def load_tokenizer(self, source: str) -> Any:
        """The tokenizer of `model` or of a checkpoint, which asks as it is told to here."""
        return load_tokenizer(source, tags_as_tokens=self.tags_as_tokens, **asking(self))

    def load_model(self, source: str) -> Any:
        """The model to train, from `model` or a checkpoint of it.

        Raises:
            ValueError: the checkpoint is of another one.
        """
        if source != self.model:
            require_same_architecture(source, self.model, self.trust_remote_code)
        model, tokens = self.load_weights(source, self.quantize)
        if self.gradient_checkpointing:
            checkpoint_activations(model)
        if self.lora_rank:
            options = (self.lora_alpha, self.lora_dropout, self.lora_targets, tokens)
            model = add_adapter(model, self.lora_rank, self.seed, *options)
        if self.torch_compile:
            compile_updates(model)
        return model

    def load_weights(self, source: str, quantize: Quantization = "none") -> tuple[Any, list[int]]:
        """A model as `load_tokenizer`'s tokens need it, and which of these are new to it."""
        trust = self.trust_remote_code
        model = load_model(source, self.seed, quantize=quantize, trust_remote_code=trust)
        if not self.tags_as_tokens or source == TINY:  # whose tags are tokens
            return model, []
        return model, add_tag_rows(model, load_any_tokenizer(source, trust))

    def data_arguments(self) -> dict[str, Any]:
        """What `data.load_problems` is given for every split."""
        columns = {"question_column": self.question_column, "answer_column": self.answer_column}
        return {"seed": self.seed, "options": self.data_options, **columns}
