"""Convert a model's folder for mlx-lm, held to what was trained; no torch is needed.

    python export.py --run outputs/grpo --to exported                 # where torch is
    python -m inference.convert_mlx --model exported --quantize 4     # on the Mac: writes exported-mlx

The converted folder is read again from disk, and its answers and logits are compared with those in the
parity.json of export.py; where they differ by more than the weights' precision explains, nothing is left
behind and the exit code is 1. A folder without a parity.json, such as a run's own `final/`, is compared with
what mlx-lm makes of it before the conversion.
"""

import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from inference import SamplingParams
from inference.formats import is_mlx, require_mlx, require_whole
from prompts import encode_prompt
from runs.config import RunStopped, at_the_door, parse_config, run_script

if TYPE_CHECKING:
    from inference.mlx_engine import MLXEngine

PARITY = "parity.json"
# Where there is no parity.json:
QUESTIONS = tuple(f"{7 * i + 11} + {3 * i + 5} = ?" for i in range(20))
ANSWER_TOKENS = 64
TOP_LOGITS = 20

TIE = 1e-3  # nats; which of two tokens this close comes first, rounding decides


@dataclass(frozen=True)
class Limits:
    """What a precision explains.

    Attributes:
        difference: between log-probabilities at most, in nats.
        tokens: of the answers that have to be the first choice again, at least; a share.
        answers: that have to be the same when the model goes on from its own tokens, at least; a share.
    """

    difference: float
    tokens: float
    answers: float


# In float32 the built-in model differs by 1e-5, and by 2e-3 (median) where the sign of one weight is flipped.
# llama.cpp's 4-bit formats change 6 % of a language model's first choices on Wikipedia's text, its 3-bit ones
# 8 to 11 % (figures of its authors); a model is surer of its own text. In 8 bits 0 to 1.1 % changed here.
LIMITS = {
    "float32": Limits(1e-3, 1.0, 1.0),
    "float16": Limits(0.1, 0.98, 0.0),
    "bfloat16": Limits(1.0, 0.95, 0.0),
    "8 bits": Limits(math.inf, 0.98, 0.0),
    "4 bits": Limits(math.inf, 0.90, 0.0),
}


@dataclass(frozen=True)
class ConvertConfig:
    """Every field is a flag of the same name."""

    model: str
    """A model's folder: from export.py, or a run's final/."""
    quantize: Literal[4, 8] | None = None
    """Hold the weights in this many bits; they keep their precision if not given."""
    to: str | None = None
    """The folder to write, not there yet, or empty; the model's name with -mlx behind it if not given."""


# ------------------------------------------------------------------------------------------------------------
# Parity


@dataclass(frozen=True)
class Parity:
    """How far a converted model is from the reference.

    Attributes:
        difference: largest one between recorded log-probabilities, in nats.
        same_tokens: share of the answers' tokens that are its first choice too.
        same_answers: how many it gives itself.
        answers: how many there are.
    """

    difference: float
    same_tokens: float
    same_answers: int
    answers: int

    def __str__(self) -> str:
        """What was measured, in words."""
        return (
            f"{self.same_answers} of {self.answers} greedy answers and {self.same_tokens:.1%} of their "
            f"tokens are the same, log-probabilities differ by {self.difference:.2g} nats at most"
        )


def answer_logprobs(engine: "MLXEngine", prompt: list[int], answer: list[int]) -> np.ndarray:
    """Log-probabilities `[answer, V]` float32 at each token of an answer."""
    import mlx.core as mx

    from inference.mlx_engine import log_softmax

    logits = engine.model(mx.array([[*prompt, *answer]]))[0, len(prompt) - 1 : -1]
    return np.array(log_softmax(logits.astype(mx.float32)))


def greedy_answers(engine: "MLXEngine", prompts: list[list[int]], limit: int) -> list[list[int]]:
    """What a model answers where it always takes the likeliest token."""
    groups = engine.generate(prompts, 1, SamplingParams(limit, temperature=0.0), (0,))
    return [group[0].token_ids for group in groups]


def make_reference(folder: Path) -> list[dict[str, Any]]:
    """The rows of a parity.json, by mlx-lm as it reads a folder that is not yet converted."""
    from inference.mlx_engine import load_engine
    from tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(folder))
    engine, _ = load_engine(str(folder), tokenizer)
    prompts = [encode_prompt(tokenizer, question) for question in QUESTIONS]
    rows = []
    for prompt, answer in zip(prompts, greedy_answers(engine, prompts, ANSWER_TOKENS), strict=True):
        logprobs = answer_logprobs(engine, prompt, answer)[0]
        top = logprobs.argsort()[: -TOP_LOGITS - 1 : -1]
        first = {"token_ids": top.tolist(), "logprobs": logprobs[top].tolist()}
        rows.append({"prompt_ids": prompt, "answer_ids": answer, "first_token": first})
    return rows


def measure_parity(engine: "MLXEngine", rows: list[dict[str, Any]]) -> Parity:
    """Compare a model with the rows of a parity.json."""
    limit = max(len(row["answer_ids"]) for row in rows)
    given = greedy_answers(engine, [row["prompt_ids"] for row in rows], limit)
    differences, same_tokens, same_answers = [], [], 0
    for row, again in zip(rows, given, strict=True):
        answer, first = np.array(row["answer_ids"]), row["first_token"]
        logprobs = answer_logprobs(engine, row["prompt_ids"], row["answer_ids"])
        differences.append(np.abs(logprobs[0][first["token_ids"]] - np.array(first["logprobs"])).max())
        same_tokens.append(logprobs.max(-1) - logprobs[range(len(answer)), answer] <= TIE)
        same_answers += is_same_answer(row["answer_ids"], again, logprobs)
    return Parity(
        difference=float(np.max(differences)),  # a NaN stays one
        same_tokens=float(np.concatenate(same_tokens).mean()),
        same_answers=same_answers,
        answers=len(rows),
    )


def is_same_answer(answer: list[int], again: list[int], logprobs: np.ndarray) -> bool:
    """Is it the answer, or does it part from it at a tie?"""
    for place, (one, other) in enumerate(zip(answer, again, strict=False)):
        if one != other:
            return bool(abs(logprobs[place, one] - logprobs[place, other]) <= TIE)
    return len(answer) == len(again)


def check_parity(parity: Parity, precision: str) -> None:
    """Refuse a conversion that does not answer as the reference.

    Raises:
        RunStopped: it differs by more than `precision` explains.
    """
    limits = LIMITS[precision]
    # Not "larger than": a NaN is larger than nothing.
    is_close = parity.difference <= limits.difference
    same_answers = parity.same_answers / parity.answers
    if not is_close or parity.same_tokens < limits.tokens or same_answers < limits.answers:
        asked = [f"{limits.tokens:.0%} of the tokens have to be the same"]
        if limits.answers:
            asked.append(f"{limits.answers:.0%} of the answers too")
        if math.isfinite(limits.difference):
            asked.append(f"and log-probabilities may differ by {limits.difference:g}")
        raise RunStopped(
            f"the converted model is not what was trained: {parity}. In {precision}, {', '.join(asked)}. "
            "Nothing was written"
            + (": give more bits, or leave --quantize out" if "bits" in precision else "")
        )


def precision_of(engine: "MLXEngine", quantize: int | None) -> str:
    """The coarsest in which the weights are held; a row of `LIMITS`."""
    if quantize:
        return f"{quantize} bits"
    from mlx.utils import tree_flatten

    weights = tree_flatten(engine.model.parameters())
    held = {str(weight.dtype).removeprefix("mlx.core.") for _, weight in weights}
    return next(name for name in ("bfloat16", "float16", "float32") if name in held)


# ------------------------------------------------------------------------------------------------------------
# The folder


def check_folders(source: Path, target: Path) -> None:
    """Refuse what cannot be converted, and to overwrite anything."""
    from tokenizer import require_model

    require_mlx("convert_mlx")
    if not source.is_dir():
        raise FileNotFoundError(f"model {str(source)!r} is no folder; give a model's folder")
    require_model(str(source))
    require_whole(str(source))
    if is_mlx(str(source)):
        raise ValueError(f"model {str(source)!r} is one for mlx-lm already; give the folder it was made from")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"to {str(target)!r} is there already; give another folder, or delete it")


def read_reference(source: Path) -> list[dict[str, Any]]:
    """What the converted model has to answer."""
    if (source / PARITY).is_file():
        return json.loads((source / PARITY).read_text())["rows"]
    print(
        f"{source} has no {PARITY}, so the conversion is compared with what mlx-lm makes of it now, not with "
        "what was trained; python export.py, where torch is, writes a folder that has one"
    )
    return make_reference(source)


def main(config: ConvertConfig) -> int:
    """Convert; returns the exit code."""
    source, target = Path(config.model), Path(config.to or f"{Path(config.model)}-mlx")
    # Apple's newest processors multiply float32 with the precision of half of it, unless told otherwise.
    os.environ["MLX_ENABLE_TF32"] = "0"
    with at_the_door():
        check_folders(source, target)
        rows = read_reference(source)
    from mlx_lm.convert import convert

    from inference.mlx_engine import load_engine
    from tokenizer import load_tokenizer

    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with at_the_door():
            convert(str(source), str(temporary), quantize=bool(config.quantize), q_bits=config.quantize)
        engine, _ = load_engine(str(temporary), load_tokenizer(str(temporary)))
        parity = measure_parity(engine, rows)
        check_parity(parity, precision_of(engine, config.quantize))
        os.replace(temporary, target)
    except OSError as error:
        raise RunStopped(
            f"{target} could not be written: {error}; make room, or give another --to"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"converted to {target}: {parity}")
    return 0


if __name__ == "__main__":
    run_script(main, lambda: parse_config(ConvertConfig))
