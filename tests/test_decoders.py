"""The Llama family's decoder against the library's forward over the whole text, rows coming and going."""

import copy

import pytest
import torch
from conftest import SHAPE, needs_a_compiler
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from fused_blocks import are_plain
from inference import decoders
from inference.decoders import FusedDecoder, LibraryDecoder, LlamaDecoder, make_decoder
from llama import without_adapter

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LEAN = {
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "llama": {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True},
    "mistral": {"head_dim": 16, "sliding_window": None},
    "qwen2 with yarn": {"rope_parameters": YARN},
    "qwen2 with more heads": {"num_attention_heads": 8, "num_key_value_heads": 1},
}


ADAPTED = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)


def build(name, changes):
    config = AutoConfig.for_model(name.split()[0], **SHAPE | changes)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        parameters = dict(model.named_parameters())
        for parameter in (parameters[name] for name in parameters if name.endswith("bias")):
            parameter.normal_(std=0.1)
        for parameter in (parameters[name] for name in parameters if "norm" in name):
            parameter.uniform_(0.8, 1.2)
    return model.double().eval()


def held_to(expected, got):
    # What is fused computes in float32 alone, the others in float64 here; in float32 the library's own
    # logits of these models are up to 2e-5 away.
    bound = 5e-5 if got.dtype == torch.float32 else 1e-9
    torch.testing.assert_close(got, expected.to(got.dtype), rtol=0, atol=bound)


def follow(model, decoder):
    """Rows of several lengths that begin, grow, join and leave, each held to the model itself."""
    generator = torch.Generator().manual_seed(1)
    texts = []

    def admit(prompts, copies):
        texts.extend(list(p) for p, n in zip(prompts, copies, strict=True) for _ in range(n))
        return decoder.admit(prompts, copies)

    def check(logits):
        assert decoder.live == len(texts) == len(logits)
        for text, got in zip(texts, logits, strict=True):
            with torch.no_grad():
                expected = model(torch.tensor([text])).logits[0, -1]
            held_to(expected, got)

    def grow(logits):
        tokens = torch.randint(3, 300, (len(texts),), generator=generator)
        for text, token in zip(texts, tokens.tolist(), strict=True):
            text.append(token)
        logits = decoder.advance(tokens)
        check(logits)
        return logits

    def leave(places):
        done = torch.zeros(len(texts), dtype=torch.bool)
        done[places] = True
        order = decoder.leave(done).tolist()
        texts[:] = [texts[i] for i in order]
        return order

    logits = admit([[5, 6, 7, 8, 9, 10], [11], [12, 13]], [2, 1, 2])
    check(logits)
    for places, joins in (([], 0), ([0, 3], 0), ([], 2), ([4], 0), ([1, 2, 3], 3), ([0, 1, 2, 3], 0)):
        order = leave(places)
        if order:
            grow(logits[order])
        if joins and decoder.room():
            new = admit([[20 + joins, 21, 22], [23]], [joins - 1, 1])
            assert len(new) == joins
            logits = grow(new)
    return decoder


def branch(model, decoder):
    """Rows that go on from other rows, from the same one or from none, each held to the model itself."""
    decoder.admit([[5, 6, 7]], [1])
    texts = [[5, 6, 7]]
    for step, order in enumerate(([0, 0, 0], [2, 0, 0, 1], [3, 3], [1, 0, 0, 1, 1], [0, 1, 2, 3, 4], [4])):
        tokens = [20 + 7 * step + row for row in range(len(order))]
        texts = [[*texts[row], token] for row, token in zip(order, tokens, strict=True)]
        decoder.select(torch.tensor(order))
        assert decoder.live == len(texts)
        with torch.no_grad():
            expected = model(torch.tensor(texts)).logits[:, -1]
        held_to(expected, decoder.advance(torch.tensor(tokens)))


@pytest.mark.parametrize("name", ["qwen2", "mistral", "gpt2"])
def test_rows_go_on_from_any_row(random_model, name):
    model = random_model(name)
    branch(model, make_decoder(model, 5, 40))


@pytest.mark.parametrize("name", LEAN)
def test_every_row_has_the_logits_of_its_own_text(name):
    model = build(name, LEAN[name])
    decoder = make_decoder(model, 5, 40)
    assert isinstance(decoder, LlamaDecoder)
    follow(model, decoder)


@needs_a_compiler
@pytest.mark.parametrize("name", LEAN)
def test_what_is_fused_has_the_logits_of_every_rows_own_text(name):
    model = build(name, LEAN[name])
    decoder = make_decoder(copy.deepcopy(model).float(), 5, 40)
    assert isinstance(decoder, FusedDecoder)
    follow(model, decoder)
    branch(model, make_decoder(copy.deepcopy(model).float(), 5, 40))


@needs_a_compiler
@pytest.mark.parametrize("name", LEAN)
def test_all_blocks_in_one_call_give_the_bits_of_their_modules(name):
    models = [build(name, LEAN[name]).float() for _ in range(2)]
    called = []
    models[1].model.layers[1].mlp.down_proj.register_forward_hook(lambda *_: called.append(True))
    decoders = [make_decoder(model, 12, 40) for model in models]
    if not decoders[0].kernels.can_decode:
        pytest.skip("torch's linear layers call another library than its own")
    assert decoders[0].blocks
    assert decoders[1].blocks is None
    for decoder in decoders:
        decoder.admit([[5, 6, 7], [8] * 9, [9]], [1, 1, 1])
    for step in range(6):
        with torch.no_grad():
            for model in models:  # what an update does is read
                model.model.layers[0].mlp.up_proj.weight.mul_(1.1)
        tokens = torch.arange(decoders[0].live) + 10 + step
        assert torch.equal(*[decoder.advance(tokens) for decoder in decoders])
        for decoder in decoders:
            decoder.admit([[11 + step, 12]], [1])
    assert len(called) == 13  # and 7 times with prompts


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@needs_a_compiler
@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("rows", [1, 5])  # too few texts for packed attention, and enough
def test_several_threads_decode_and_write_nowhere_else(monkeypatch, rows):
    behind = []

    def guarded(self, *shape, **more):
        shape = shape if isinstance(shape[0], int) else shape[0]
        size = torch.Size(shape).numel()
        memory = self.new_full((size + 4096,), 7, **more)
        behind.append(memory[size:])
        return memory[:size].view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", guarded)
    model = build("qwen2", {"num_key_value_heads": 2})
    follow(model, make_decoder(copy.deepcopy(model).float(), 5, 40))
    texts = [[5 + row, 6, 7, 8][: 2 + row % 3] for row in range(rows)]
    decoder = make_decoder(copy.deepcopy(model).float(), rows, 900)
    logits = decoder.admit(texts, [1] * rows)
    for got, text in zip(logits, texts, strict=True):
        held_to(model(torch.tensor([text])).logits[0, -1].detach(), got)
    decoder.advance(torch.arange(rows) + 20)
    assert behind
    assert all((memory == 7).all() for memory in behind)


def test_many_prompts_are_read_in_parts(monkeypatch):
    texts = [[5 + row, 6, 7, 8][: 2 + row % 3] for row in range(7)]
    for model in (build("qwen2", {}), build("qwen2", {}).float()):
        whole = make_decoder(model, 7, 40).admit(texts, [1] * 7)
        with monkeypatch.context() as patch:
            patch.setattr(decoders, "PREFILL_TOKENS", 8)
            held_to(whole, make_decoder(model, 7, 40).admit(texts, [1] * 7))


@needs_a_compiler
def test_merged_adapters_are_plain():
    tuned = get_peft_model(build("qwen2", {}).float(), ADAPTED)
    layers = without_adapter(tuned).model.layers
    assert not are_plain(layers)
    tuned.merge_adapter()
    assert are_plain(layers)
    follow(copy.deepcopy(without_adapter(tuned)).double(), make_decoder(tuned, 5, 40))


def test_only_plain_linear_layers_are_taken_from_memory():
    layers = build("qwen2", {}).float().model.layers
    assert are_plain(layers)
    assert not are_plain(copy.deepcopy(layers).bfloat16())
    changed = [copy.deepcopy(layers) for _ in range(7)]
    changed[0][1].mlp.up_proj.register_forward_pre_hook(lambda *_: None)
    changed[1][0].self_attn.q_proj.weight = torch.nn.Parameter(torch.ones(32, 32).T[:, :8])
    changed[4][1].mlp.down_proj.forward = changed[4][1].mlp.down_proj.forward  # as some patch it
    changed[5][1].input_layernorm.variance_epsilon = 0.1
    pruned = torch.nn.Linear(32, layers[0].self_attn.head_dim)  # of its key heads one is left
    changed[6][1].self_attn.k_proj = changed[6][1].self_attn.v_proj = pruned
    quantized = type("Quantized", (torch.nn.Parameter,), {})
    changed[3][0].self_attn.k_proj.weight = quantized(layers[0].self_attn.k_proj.weight.data)
    changed[2][0].mlp.gate_proj.__class__ = type("Rounding", (torch.nn.Linear,), {})
    assert [are_plain(layers) for layers in changed] == [False] * 7


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_memory_held_before_is_never_read(monkeypatch, dtype):
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *shape: self.new_full(shape, torch.nan))
    model = build("qwen2", {}).to(dtype)
    follow(model, make_decoder(model, 5, 40))
    branch(model, make_decoder(model, 5, 40))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_longer_prompt_that_joins_leaves_what_others_wrote(dtype):
    model = build("qwen2", {}).to(dtype)
    decoder, text, joining = make_decoder(model, 3, 40), [5, 6, 7], list(range(30, 45))
    decoder.admit([text], [1])
    for token in range(50, 58):
        decoder.advance(torch.tensor([token]))
        text.append(token)
    decoder.admit([joining], [1])
    logits = decoder.advance(torch.tensor([60, 61]))
    for got, whole in zip(logits, ([*text, 60], [*joining, 61]), strict=True):
        with torch.no_grad():
            held_to(model(torch.tensor([whole])).logits[0, -1], got)


@needs_a_compiler
def test_a_row_without_room_is_refused_before_anything_is_written():
    decoder = make_decoder(build("qwen2", {}).float(), 1, 4)
    decoder.admit([[5, 6, 7]], [1])
    decoder.advance(torch.tensor([8]))
    with pytest.raises(IndexError, match="its 4 positions"):
        decoder.advance(torch.tensor([9]))


@needs_a_compiler
def test_only_what_is_the_same_is_fused():
    model = build("qwen2", {}).float()
    assert type(make_decoder(model, 5, 40)) is FusedDecoder
    with torch.autocast("cpu"):
        assert type(make_decoder(model, 5, 40)) is LlamaDecoder
    assert type(make_decoder(copy.deepcopy(model).bfloat16(), 5, 40)) is LlamaDecoder
    assert type(make_decoder(build("llama", {"hidden_act": "gelu"}).float(), 5, 40)) is LlamaDecoder


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_adapter_is_applied_as_it_is(dtype):
    model = build("qwen2", {})
    base = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tuned = get_peft_model(model, LoraConfig(r=2, lora_alpha=8, target_modules="all-linear"))
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    tuned = tuned.to(dtype).eval()
    decoder = make_decoder(tuned, 5, 40)
    assert isinstance(decoder, LlamaDecoder)
    follow(tuned, decoder)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert (tuned(ids).logits - base.to(dtype)(ids).logits).abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "changes", "positions"),
    [
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}, 40),
        ("gemma3_text", {"head_dim": 8}, 40),
        ("mistral", {"head_dim": 8, "sliding_window": 39}, 40),
        ("qwen2", {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}, 40),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, 40),
    ],
)
def test_what_the_lean_decoder_does_not_compute_is_left_to_the_library(name, changes, positions):
    assert isinstance(make_decoder(build(name, changes), 5, positions), LibraryDecoder)


def test_a_window_longer_than_the_text_hides_nothing():
    model = build("mistral", {"head_dim": 8, "sliding_window": 40})
    decoder = make_decoder(model, 5, 40)
    assert isinstance(decoder, LlamaDecoder)
    follow(model, decoder)
