"""Fused kernels for a processor, in C: what decoding and an update
compute between their matrix products, each in one pass; and a step of decoding as a whole.

torch calls ten operations for each of them, which takes a small model more time than its matrix products.
A system's C compiler makes them of fused_kernels.c when they are first asked for, within a second. Without
one, and on other systems than Linux, torch's own operations compute the same.
"""

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from ctypes import c_double, c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("fused_kernels.c")
# Sums may be taken in the order that fills a vector; what is no number stays none.
FLAGS = "-O3 -march=native -fno-math-errno -fno-trapping-math -fassociative-math -fno-signed-zeros"
FLAGS += " -fopenmp -fPIC -shared"
COMPILE_SECONDS = 60  # a second is usual
NORM_CHUNK, TILE, LANES = 64, 4, 16  # as in fused_kernels.c
ARGUMENTS = {
    "add_norm": [c_void_p, c_void_p, c_void_p, c_double, c_void_p, c_int64, c_int64, c_int],
    "norm_backward": [c_void_p, c_void_p, c_void_p, c_double, c_void_p, c_void_p, c_int64, c_int64, c_int],
    "silu_multiply": [*[c_void_p] * 3, c_int64, c_int],
    "silu_multiply_backward": [*[c_void_p] * 5, c_int64, c_int],
    "turn_heads": [c_void_p, c_void_p, c_void_p, c_double, c_void_p, c_int64, c_int64, c_int64, c_int],
    "attend_packed": [*[c_void_p] * 7, *[c_int64] * 6, c_int],
    "attend_packed_backward": [*[c_void_p] * 12, *[c_int64] * 7, c_int],
    "attend": [*[c_void_p] * 10, *[c_int64] * 5, c_double, c_int],
    "decode": [*[c_void_p] * 9, *[c_int64] * 9, c_double, c_double, c_int],
    "score": [c_void_p, c_double, *[c_void_p] * 4, c_int64, c_int64, c_int],
    "score_backward": [c_void_p, c_double, *[c_void_p] * 5, c_int64, c_int64, c_int],
    "sample": [c_void_p, c_double, *[c_void_p] * 3, c_int64, c_int64, c_int],
}


def kernels_for(tensor: Tensor) -> "Kernels | None":
    """The kernels for numbers like these, float32 on the CPU; None where torch has to compute."""
    is_ours = tensor.device.type == "cpu" and tensor.dtype == torch.float32 and sys.platform == "linux"
    return _load() if is_ours else None


@functools.cache
def _load() -> "Kernels | None":
    asked = os.environ.get("CC", "").strip() or "cc"
    try:
        compiler = shlex.split(asked)
        if shutil.which(compiler[0]):
            return Kernels(_compile(compiler))
        if asked in ("cc", "none"):  # nobody has asked for one, or for none
            return None
        raise FileNotFoundError(f"there is no {compiler[0]!r}")
    except (subprocess.SubprocessError, OSError, ValueError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        # What a compiler complains of first, the others follow from.
        told = next((line for line in lines if "error" in line), (lines or [type(error).__name__])[-1])
        warnings.warn(
            "torch's own operations compute in place of fused_kernels.c, in up to twice the time: "
            f"{asked}, or what loads its work, failed: {told.strip()}; CC can name another compiler",
            stacklevel=2,
        )
        return None


def _compile(compiler: list[str]) -> ctypes.CDLL:
    """fused_kernels.c as a library of this process; nothing stays on disk."""
    # A library that is in use may keep its name on some network disks.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        library = Path(folder) / "kernels.so"
        command = [*compiler, *FLAGS.split(), str(SOURCE), "-o", str(library), "-lm"]
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=COMPILE_SECONDS
        )
        done.check_returncode()
        # Its OpenMP is the one that torch has loaded, so both share their threads.
        return ctypes.CDLL(str(library))


def _matrix_product() -> int | None:
    """Where the `sgemm` that torch's linear layers call begins; None where they do not, as on ARM."""
    if not torch.backends.mkl.is_available():
        return None
    try:
        of_torch = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"))
        return ctypes.cast(of_torch.sgemm_, c_void_p).value
    except (OSError, AttributeError):
        return None


class Kernels:
    """The functions of fused_kernels.c on tensors: on the CPU, float32, contiguous, without gradients.

    Raises:
        TypeError: tensors of another kind, whose memory means something else.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        """Take a compiled fused_kernels.c."""
        for name, arguments in ARGUMENTS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
        self._library = library
        self._matrix_product = _matrix_product()

    def addresses(self, *tensors: Tensor | None) -> list[int]:
        """Where the numbers of tensors begin; 0 for None."""
        for tensor in tensors:
            if tensor is None:
                continue
            is_ours = tensor.dtype == torch.float32 and tensor.device.type == "cpu"
            if not is_ours or not tensor.is_contiguous():
                kind = "contiguous" if tensor.is_contiguous() else "strided"
                got = f"{kind} {tensor.dtype} on {tensor.device}"
                raise TypeError(f"kernels take contiguous float32 on the CPU, got {got}")
        return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]

    def add_norm(self, states: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """Add to `states` `[N, H]` in place; returns their RMS norm, times `weight` `[H]`."""
        out = torch.empty_like(states)
        *read, to = self.addresses(states, added, weight, out)
        self._library.add_norm(*read, eps, to, *states.shape, torch.get_num_threads())
        return out

    def norm_backward(
        self, grad: Tensor, states: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Gradients of states `[N, H]` and of the weight, from that of their norm."""
        rows, width = states.shape
        of_states, of_weight = torch.empty_like(states), states.new_empty(-(-rows // NORM_CHUNK), width)
        read = self.addresses(grad, states, weight)
        written = self.addresses(of_states, of_weight)
        self._library.norm_backward(*read, eps, *written, rows, width, torch.get_num_threads())
        return of_states, of_weight.sum(0)

    def silu_multiply(self, gate: Tensor, up: Tensor, out: Tensor) -> Tensor:
        """`silu(gate) * up`, into `out`, which may be one of them."""
        self._library.silu_multiply(*self.addresses(gate, up, out), gate.numel(), torch.get_num_threads())
        return out

    def silu_multiply_backward(self, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of gate and up, from that of `silu(gate) * up`."""
        given = torch.empty_like(gate), torch.empty_like(up)
        tensors = self.addresses(grad, gate, up, *given)
        self._library.silu_multiply_backward(*tensors, gate.numel(), torch.get_num_threads())
        return given

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cos: Tensor,
        sin: Tensor,
        lengths: Tensor,
        keys: Tensor,
        values: Tensor,
        scaling: float,
    ) -> Tensor:
        """Attention of one new position a row, whose key and value join the cache.

        Args:
            query: `[rows, query heads x D]`, not turned yet.
            key: `[rows, heads x D]`, not turned yet.
            value: likewise.
            cos: `[positions, 1, D]`; see `llama.angles`.
            sin: likewise.
            lengths: `[rows]` positions before the new one.
            keys: `[slots, heads, positions, D]`, of the rows in its first slots; written to.
            values: likewise.
            scaling: of the scores.

        Returns:
            `[rows, query heads x D]`.
        """
        _, heads, positions, size = keys.shape
        rows, query_heads = len(query), query.shape[1] // size
        out = torch.empty_like(query)
        threads = torch.get_num_threads()
        scratch = query.new_empty(threads, query_heads // heads, positions)
        read = self.addresses(query, key, value, cos, sin)
        written = self.addresses(keys, values, out, scratch)
        sizes = (rows, query_heads, heads, size, positions)
        self._library.attend(*read, lengths.data_ptr(), *written, *sizes, scaling, threads)
        return out

    @property
    def can_decode(self) -> bool:
        """Is there what `decode` takes matrix products from?"""
        return self._matrix_product is not None

    def decode(
        self,
        blocks: Tensor,
        states: Tensor,
        cos: Tensor,
        sin: Tensor,
        lengths: Tensor,
        cache: Tensor,
        query_heads: int,
        inner: int,
        eps: float,
        scaling: float,
    ) -> Tensor:
        """One new position a row through all blocks.

        Args:
            blocks: `[layers, 18]` int64, where their weights begin: `block` of fused_kernels.c.
            states: `[rows, H]`; what the last block adds to afterwards.
            cos: as for `attend`, and likewise `sin`, `lengths` and `scaling`.
            sin: see there.
            lengths: see there.
            cache: `[layers, 2, slots, heads, positions, D]`; written to.
            query_heads: of a block.
            inner: numbers of its MLP.
            eps: of its norms.
            scaling: see `attend`.

        Returns:
            What the last block adds, `[rows, H]`.
        """
        layers, _, slots, heads, positions, size = cache.shape
        rows, width = states.shape
        threads = torch.get_num_threads()
        added = torch.empty_like(states)
        a_row = width + 2 * (query_heads + heads) * size + 2 * inner
        scratch = states.new_empty(rows * a_row + threads * query_heads // heads * positions)
        written = self.addresses(states, added, cos, sin)
        more = (lengths.data_ptr(), *self.addresses(cache, scratch))
        sizes = (layers, rows, width, inner, query_heads, heads, size, slots, positions)
        where = (self._matrix_product, blocks.data_ptr(), *written, *more)
        self._library.decode(*where, *sizes, eps, scaling, threads)
        return added

    def turn(self, tokens: Tensor, cos: Tensor, sin: Tensor, scale: float = 1.0) -> Tensor:
        """Heads `[N, heads x D]` turned by angles `[N, 1, D]`, as `llama.turn` does, and scaled."""
        out = torch.empty_like(tokens)
        count, size = len(tokens), cos.shape[-1]
        read, written = self.addresses(tokens, cos, sin), self.addresses(out)
        heads = tokens.shape[1] // size
        self._library.turn_heads(*read, scale, *written, count, heads, size, torch.get_num_threads())
        return out

    def attend_packed(
        self, query: Tensor, key: Tensor, value: Tensor, size: int, segments: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Causal attention of packed texts.

        Args:
            query: `[N, query heads x D]`, turned and scaled.
            key: `[N, heads x D]`, turned.
            value: `[N, heads x D]`.
            size: of a head, D.
            segments: `[S, 4]` int64 on prompts and completions: the first token, the one behind the last, and
                those of the prompt before it, equal where it is a prompt itself.

        Returns:
            `[N, query heads x D]`, and what the backward pass needs, `[N, query heads]`.
        """
        heads, query_heads = key.shape[1] // size, query.shape[1] // size
        out, logsumexp = torch.empty_like(query), query.new_empty(len(query), query_heads)
        stride, threads = _longest(segments), torch.get_num_threads()
        width = _round_up(size)
        room = (width + size + TILE) * stride + TILE * width
        scratch = query.new_empty(threads, room)
        read, written = self.addresses(query, key, value), self.addresses(out, logsumexp, scratch)
        sizes = (room, len(segments), query_heads, heads, size, stride)
        self._library.attend_packed(*read, segments.data_ptr(), *written, *sizes, threads)
        return out, logsumexp

    def attend_packed_backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        size: int,
        segments: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value; the arguments are those of `attend_packed` and what it gave."""
        heads, query_heads = key.shape[1] // size, query.shape[1] // size
        given = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        stride, threads = _longest(segments), torch.get_num_threads()
        longest = int((segments[:, 3] - segments[:, 2]).max())
        of_prompts = query.new_empty(2, len(segments), heads, longest, size)
        width = _round_up(size)
        room = (3 * width + 2 * size + 2 * TILE) * stride + 3 * TILE * width
        scratch = query.new_empty(threads, room)
        read = self.addresses(grad, query, key, value, out, logsumexp)
        written = self.addresses(*given, of_prompts, scratch)
        sizes = (room, len(segments), longest, query_heads, heads, size, stride)
        self._library.attend_packed_backward(*read, segments.data_ptr(), *written, *sizes, threads)
        return given

    def sample(self, logits: Tensor, temperature: float, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens `[B]` and their log-probabilities `[B]`; see `inference.sampling.choose`."""
        tokens, logprobs = torch.empty(len(logits), dtype=torch.long), logits.new_empty(len(logits))
        read, told = self.addresses(logits, logprobs)
        uniforms = uniforms.to("cpu", torch.float64).contiguous()
        where = (read, temperature, uniforms.data_ptr(), tokens.data_ptr(), told)
        self._library.sample(*where, *logits.shape, torch.get_num_threads())
        return tokens, logprobs

    def score(self, logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """Score targets `[N]` under logits `[N, V]`; see `losses.token_logprobs`.

        Returns:
            Log-probabilities, entropies, and the logarithms of what the weights of a row add up to, the
            likeliest having 1; `[N]` each.
        """
        told = tuple(logits.new_empty(len(logits)) for _ in range(3))
        at, *written = self.addresses(logits, *told)
        chosen = _targets(targets, logits)
        self._library.score(
            at, temperature, chosen.data_ptr(), *written, *logits.shape, torch.get_num_threads()
        )
        return told

    def score_backward(
        self,
        logits: Tensor,
        targets: Tensor,
        temperature: float,
        entropy: Tensor,
        log_sums: Tensor,
        pull: Tensor,
        spread: Tensor | None,
    ) -> Tensor:
        """The gradient of logits `[N, V]`, in their place.

        Args:
            logits: as `score` read them, and likewise targets and temperature.
            targets: see there.
            temperature: see there.
            entropy: as `score` told it, and likewise `log_sums`.
            log_sums: see there.
            pull: `[N]`, the gradient of the log-probabilities over the temperature.
            spread: that of the entropies, or None.
        """
        chosen = _targets(targets, logits)
        at, *read = self.addresses(logits, entropy, log_sums, pull, spread)
        where = (at, temperature, chosen.data_ptr(), *read)
        self._library.score_backward(*where, *logits.shape, torch.get_num_threads())
        return logits


def _targets(targets: Tensor, logits: Tensor) -> Tensor:
    """Targets `[N]`, checked: C reads and writes where they point to."""
    if targets.dtype != torch.int64 or targets.device.type != "cpu" or targets.shape != logits.shape[:1]:
        got = f"{targets.dtype} {list(targets.shape)} on {targets.device}"
        raise TypeError(f"targets of {len(logits)} rows must be int64 [{len(logits)}] on the CPU, got {got}")
    lowest, highest = targets.aminmax() if len(targets) else (0, 0)
    if lowest < 0 or highest >= logits.shape[1]:
        raise IndexError(f"targets must be in [0, {logits.shape[1]}), got {int(lowest)} to {int(highest)}")
    return targets.contiguous()


def _longest(segments: Tensor) -> int:
    """Keys that the last token of the longest text reads, up to a multiple of what is taken at once."""
    return _round_up(int((segments[:, 1] - segments[:, 0] + segments[:, 3] - segments[:, 2]).max()))


def _round_up(count: int) -> int:
    return -(-count // LANES) * LANES
