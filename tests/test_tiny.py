import string
import unicodedata

import torch
from hypothesis import given
from hypothesis import strategies as st

import prompts
from tiny import build_tiny


@given(st.text())
def test_any_text_survives_the_tiny_tokenizer(tiny, text):
    _, tokenizer = tiny
    ids = tokenizer.encode(text, add_special_tokens=False)
    # Qwen2's class composes accents first, as it does for every Qwen2 model.
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)
    assert set(ids).isdisjoint(tokenizer.all_special_ids)
    assert max(ids, default=0) < len(tokenizer)


def test_digits_and_tags_are_tokens_of_their_own(tiny):
    _, tokenizer = tiny
    for digit in string.digits:
        assert len(tokenizer.encode(digit)) == 1
    assert len(tokenizer.encode("1234567890")) == 10
    for tag in prompts.TAGS:
        ids = tokenizer.encode(f"1{tag}2")
        assert len(ids) == 3
        assert tokenizer.decode(ids, skip_special_tokens=True) == f"1{tag}2"
    assert len(tokenizer.encode("1 + 2 = 3")) == 5


def test_the_tiny_tokenizer_pads_with_another_token_than_it_stops_with(tiny):
    model, tokenizer = tiny
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer) <= model.config.vocab_size
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id


def test_tiny_weights_depend_on_the_seed_alone():
    before = torch.get_rng_state()
    first, again, other = (build_tiny(seed)[0].state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    later = build_tiny(3)[0].state_dict()
    for name, weight in first.items():
        assert torch.equal(weight, again[name])
        assert torch.equal(weight, later[name])
    assert any(not torch.equal(weight, other[name]) for name, weight in first.items())
