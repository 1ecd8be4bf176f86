"""Flash-attention where it is installed: plain arithmetic plays its kernels, all else is the library's."""

import copy

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash
from transformers import PreTrainedModel

import models
from batches import pad_batch
from inference import SamplingParams
from inference.engine import TorchEngine

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15]]
COMPLETIONS = [[20, 21], [30, 31, 32, 33, 34, 35, 36], [40]]


def plain_attention(
    q, k, v, causal=False, softmax_scale=None, window_size=(-1, -1), softcap=0.0, dropout_p=0.0
):
    """`[length, heads, D]` of one text; queries stand at its end."""
    assert q.dtype in (torch.bfloat16, torch.float16), "flash-attention takes half precision alone"
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * (softmax_scale or q.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    distance = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
    seen = (distance >= 0) if causal else torch.ones_like(distance, dtype=torch.bool)
    seen &= (distance <= window_size[0]) if window_size[0] >= 0 else True
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v.float()).to(q.dtype)


def flash_attn_func(q, k, v, **how):
    return torch.stack([plain_attention(*row, **how) for row in zip(q, k, v, strict=True)])


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
    causal=False, window_size=(-1, -1), softcap=0.0,
):  # fmt: skip
    of_q, of_k = (cu.diff().tolist() for cu in (cu_seqlens_q, cu_seqlens_k))
    rows = zip(q.split(of_q), k.split(of_k), v.split(of_k), strict=True)
    how = {"causal": causal, "softmax_scale": softmax_scale, "window_size": window_size, "softcap": softcap}
    return torch.cat([plain_attention(*row, **how) for row in rows])


@pytest.fixture
def installed(monkeypatch):
    """A machine with flash-attention and a GPU that is made for it, as far as the library can tell."""
    functions = (flash_attn_func, flash_attn_varlen_func, None, flash._pad_input, flash._unpad_input)
    monkeypatch.setattr(flash, "_lazy_imports", lambda *args, **how: functions)
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    monkeypatch.setattr(
        PreTrainedModel, "_flash_attn_can_dispatch", lambda self, flash_attn_version, is_init_check: True
    )
    monkeypatch.setattr(models, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(models, "compute_dtype", lambda: torch.bfloat16)


@pytest.fixture(params=["gemma3_text", "gemma2", "granite", "phi"])
def model(request, random_model):
    return copy.deepcopy(random_model(request.param)).float()


def score(model):
    batch = pad_batch(PROMPTS, COMPLETIONS, pad_token_id=0)
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, _, _ = models.Policy(model)(**batch)
    return logprobs[batch["completion_mask"]]


def test_flash_attention_scores_as_sdpa_does_and_samples_what_it_scores(model, installed):
    plain = score(model)
    assert model.config._attn_implementation in ("sdpa", "eager")
    policy = models.Policy(model)  # before it moves to the GPU
    models.attend_fast(model)
    assert model.config._attn_implementation == "flash_attention_2"
    batch = pad_batch(PROMPTS, COMPLETIONS, pad_token_id=0)
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, _, _ = policy(**batch)
    logprobs = logprobs[batch["completion_mask"]]
    # Both round to bfloat16, each in places of its own.
    assert (logprobs - plain).abs().mean() < 0.1
    logprobs.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

    engine = TorchEngine(model, type("Tokenizer", (), {"eos_token_id": 2}))
    with torch.autocast("cpu", torch.bfloat16):
        groups = engine.generate(PROMPTS, 2, SamplingParams(6), (0,))
    rows = [(prompt, c) for prompt, group in zip(PROMPTS, groups, strict=True) for c in group]
    batch = pad_batch([prompt for prompt, _ in rows], [c.token_ids for _, c in rows], 0)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        logprobs, _, _ = policy(**batch)
    sampled = torch.tensor([value for _, c in rows for value in c.logprobs])
    assert (logprobs[batch["completion_mask"]] - sampled).abs().mean() < 0.1


def test_the_llama_family_and_other_machines_keep_to_torchs_kernels(random_model, installed, monkeypatch):
    adapted = copy.deepcopy(random_model("qwen2")).float()
    models.attend_fast(adapted)
    assert adapted.config._attn_implementation == "sdpa"
    monkeypatch.setattr(models, "compute_dtype", lambda: torch.float16)  # a T4
    other = copy.deepcopy(random_model("gemma3_text")).float()
    models.attend_fast(other)
    assert other.config._attn_implementation == "sdpa"
    monkeypatch.undo()
    models.attend_fast(other)
    assert other.config._attn_implementation == "sdpa"
