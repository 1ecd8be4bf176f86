"""Chains beyond the window: held to the library's own attention over a cache that is cut by hand."""

import copy
import gc
from types import SimpleNamespace

import pytest
import torch
from test_decoders import LEAN
from test_decoders import build as build_model
from transformers import DynamicCache

from inference import SamplingParams
from inference.decoders import WindowDecoder, make_decoder
from inference.engine import TorchEngine, cache_bytes

SINKS, KEPT = 2, 7  # the window has 5
TOKENIZER = SimpleNamespace(pad_token_id=0, eos_token_id=2)


class ExactAngles(torch.nn.Module):
    """A rotary embedding's angles in float64; the library's are float32, whatever the model is."""

    def __init__(self, rotary):
        super().__init__()
        self.inverse, self.attention_scaling = rotary.inv_freq.double(), rotary.attention_scaling

    def forward(self, like, position_ids):
        angle = torch.cat([position_ids[..., None].double() * self.inverse] * 2, -1)
        return angle.cos() * self.attention_scaling, angle.sin() * self.attention_scaling


def build(name, changes):
    model = build_model(name, changes)
    model.model.rotary_emb = ExactAngles(model.model.rotary_emb)
    return model


class Reference:
    """One text: the library's forward, and before each token the cache is cut and counted anew."""

    def __init__(self, model, prompt):
        self.model, self.cache = model, DynamicCache(config=model.config)
        self.logits = self.read(prompt, torch.arange(len(prompt)))

    def copy(self):
        other = copy.copy(self)
        other.cache = DynamicCache(config=self.model.config)
        for number, layer in enumerate(self.cache.layers):
            other.cache.update(layer.keys, layer.values, number)
        return other

    def read(self, tokens, positions):
        with torch.no_grad():
            ids = torch.tensor([tokens])
            output = self.model(ids, position_ids=positions[None], past_key_values=self.cache)
        return output.logits[0, -1]

    def advance(self, token):
        length = self.cache.get_seq_length()
        oldest = max(SINKS, length - (KEPT - 1 - SINKS))
        held = torch.tensor([*range(SINKS), *range(oldest, length)])[:length]
        for layer in self.cache.layers:
            layer.keys = self.turned(layer.keys[:, :, held], torch.arange(len(held)) - held)
            layer.values = layer.values[:, :, held]
        return self.read([token], torch.tensor([len(held)]))

    def turned(self, keys, shifts):
        """Keys `[1, heads, L, D]` moved by so many positions each."""
        angle = torch.cat([shifts[:, None] * self.model.model.rotary_emb.inverse] * 2, -1)
        left, right = keys.chunk(2, -1)
        return keys * angle.cos() + torch.cat([-right, left], -1) * angle.sin()


def follow(model, decoder):
    """Rows that begin short and long, grow past the window, join and leave, each held to its own text."""
    generator = torch.Generator().manual_seed(1)
    rows = []

    def admit(prompts, copies):
        new = [Reference(model, prompt) for prompt, n in zip(prompts, copies, strict=True) for _ in range(n)]
        expected = torch.stack([row.logits for row in new])
        torch.testing.assert_close(decoder.admit(prompts, copies), expected, rtol=0, atol=1e-9)
        rows.extend(new)

    def grow(steps):
        for _ in range(steps):
            tokens = torch.randint(3, 300, (len(rows),), generator=generator)
            expected = torch.stack([row.advance(int(token)) for row, token in zip(rows, tokens, strict=True)])
            torch.testing.assert_close(decoder.advance(tokens), expected, rtol=0, atol=1e-9)

    def leave(places):
        done = torch.zeros(len(rows), dtype=torch.bool)
        done[places] = True
        rows[:] = [rows[i] for i in decoder.leave(done).tolist()]

    def select(order):
        decoder.select(torch.tensor(order))
        rows[:] = [rows[i].copy() for i in order]

    admit([list(range(20, 31)), [11], list(range(40, 47))], [2, 1, 1])
    grow(3)
    select([3, 2, 1, 2])
    grow(2)
    leave([0])
    grow(4)
    admit([[5, 6, 7], list(range(60, 80))], [1, 1])
    grow(12)
    leave([1, 3])
    grow(9)


@pytest.mark.parametrize("name", LEAN)
def test_a_window_equals_the_librarys_attention_over_a_cut_cache(name):
    model = build(name, LEAN[name])
    decoder = make_decoder(model, 5, KEPT, SINKS)
    assert isinstance(decoder, WindowDecoder)
    follow(model, decoder)


def test_what_memory_held_before_is_never_read(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *shape: self.new_full(shape, torch.nan))
    model = build("qwen2", {})
    follow(model, make_decoder(model, 5, KEPT, SINKS))


def test_without_sinks_the_newest_positions_alone_are_kept():
    model = build("qwen2", {})
    long, short = make_decoder(model, 1, 4, 0), make_decoder(model, 1, 4, 0)
    long.admit([[5, 6]], [1])
    short.admit([list(range(60, 74))], [1])
    for token in range(10, 30):
        last = long.advance(torch.tensor([token]))
        if token >= 22:  # two layers see twice the window, and no further back
            expected = short.advance(torch.tensor([token]))
    torch.testing.assert_close(last, expected, rtol=0, atol=1e-9)


def test_up_to_the_window_the_bits_are_those_of_the_whole_cache():
    model = build_model("qwen2", {})
    whole, window = make_decoder(model, 3, 40), make_decoder(model, 3, 40, SINKS)
    logits = [decoder.admit([list(range(5, 25)), [11, 12]], [1, 2]) for decoder in (whole, window)]
    for token in range(20):
        assert torch.equal(*logits)
        tokens = torch.tensor([30 + token, 60, 61])
        logits = [decoder.advance(tokens) for decoder in (whole, window)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_engine_with_a_window_longer_than_the_text_changes_nothing(random_model, temperature):
    model, params = random_model("qwen2"), SamplingParams(30, temperature)
    prompts = [[5, 6, 7, 8, 9], [12, 13]]
    expected = TorchEngine(model, TOKENIZER).generate(prompts, 3, params, (0,))
    for window in (31, 1000):
        engine = TorchEngine(model, TOKENIZER, window=window, sinks=4)
        assert engine.generate(prompts, 3, params, (0,)) == expected
    narrow = TorchEngine(model, TOKENIZER, window=5, sinks=1)
    assert narrow.generate(prompts, 3, params, (0,)) != expected
    streamed = list(narrow.stream(prompts[0], params, (0,)))
    [[batched]] = narrow.generate(prompts[:1], 1, params, (0,))
    assert [token.token_id for token in streamed] == batched.token_ids


def test_the_budget_counts_what_a_window_keeps(random_model):
    engine = TorchEngine(random_model("qwen2"), TOKENIZER, max_cache_tokens=12, window=8, sinks=4)
    assert len(engine.generate([[5]], 3, SamplingParams(30), (0,))[0]) == 3
    engine.max_cache_tokens = 11
    with pytest.raises(ValueError, match="need 12 cache positions, and memory has 11; give a smaller window"):
        engine.generate([[5]], 3, SamplingParams(30), (0,))


@pytest.mark.parametrize("name", ["gpt2", "gemma3_text", "mistral"])
def test_a_window_is_refused_where_it_cannot_be_kept(random_model, name):
    with pytest.raises(ValueError, match=f"{name}.*got 8: it is for llama, mistral, qwen2, qwen3, without"):
        TorchEngine(random_model(name), TOKENIZER, window=8)


@pytest.mark.parametrize(("window", "sinks"), [(0, 4), (8, -1)])
def test_a_window_that_holds_nothing_is_refused(random_model, window, sinks):
    with pytest.raises(ValueError, match=f"got {window} and {sinks}"):
        TorchEngine(random_model("qwen2"), TOKENIZER, window=window, sinks=sinks)


@pytest.mark.slow
def test_memory_is_bounded_over_20_000_tokens():
    model = build_model("qwen2", {"num_hidden_layers": 1, "max_position_embeddings": 64}).float()
    engine = TorchEngine(model, TOKENIZER, window=60, sinks=4)
    engine.stop_token_ids = torch.tensor([-1])
    before, grown = bytes_of_tensors(), []
    stream = engine.stream([5, 6, 7], SamplingParams(20_000), (0,))
    for count, token in enumerate(stream, start=1):
        assert token.finish_reason == ("length" if count == 20_000 else None)
        if count in (100, 10_000, 19_999):
            grown.append(bytes_of_tensors() - before)
    assert count == 20_000
    # Twice the window, for what a step computes; and room, reserved at the start, for every token's number,
    # its random number and its log-probability.
    assert max(grown) < 2 * 64 * cache_bytes(model) + 20_000 * 3 * 8
    assert len(set(grown)) == 1


def bytes_of_tensors():
    gc.collect()
    storages = [o.untyped_storage() for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
