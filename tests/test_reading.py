"""A completion as it is read while it streams: thought and answer, whole characters."""

import random

import pytest
from scripted import ByteTokenizer

import prompts
from inference.reading import CompletionReader, ThoughtSplitter, TokenDecoder

TEXTS = [
    "<think>12 + 34 = 46</think><answer>46</answer>",
    "<think>still going",
    "lost its tag</think><answer>1</answer>",
    "<answer>2</answer> too early</think> then 3",
    "<think>a</think>b<think>c</think>d",
    "<think>a</think>b<think>c",
    "<think>a<think>b</think>c</think>d",
    "<think>an <answer>0</answer> inside</think><answer>1</answer>",
    "no tags at all, 1 < 2 and <b>",
    "cut in a tag <thi",
    "<think>x</think><answ",
    "<think></think>",
    "",
    "<think>héllo 🧮 世界</think>\n\n**√2** ≈ 1,41 €",
    "<<think>>x<</think>>y</answer</answer>",
]


def one_shot(text):
    """What the reader should end with, from the parser that scores completions."""
    parsed = prompts.parse_completion(text)
    answer = parsed.answer_text.replace(prompts.ANSWER_OPEN, "").replace(prompts.ANSWER_CLOSE, "")
    return parsed.thought, answer, parsed.thought_open


def split_reading(pieces):
    splitter = ThoughtSplitter()
    for piece in pieces:
        splitter.feed(piece)
    splitter.finish()
    return splitter.thought, splitter.answer, splitter.thinking


def read(tokenizer, token_ids, prefix="", clock=None):
    reader = CompletionReader(tokenizer, prefix, **({"clock": clock} if clock else {}))
    readings = []
    for token_id in token_ids:
        reader.push(token_id)
        readings.append(reader.reading())
    reader.finish("stop")
    return [*readings, reader.reading()]


# ------------------------------------------------------------------------------------------------------------
# From text to thought and answer


@pytest.mark.parametrize("text", TEXTS)
def test_every_split_gives_what_the_one_shot_parse_gives(text):
    expected = one_shot(text)
    assert split_reading([text]) == expected
    assert split_reading(text) == expected
    for cut in range(len(text) + 1):
        for second in range(cut, min(cut + 12, len(text)) + 1):
            assert split_reading([text[:cut], text[cut:second], text[second:]]) == expected


def test_random_tag_soup_is_read_as_the_one_shot_parse_reads_it():
    random_ = random.Random(0)
    # No "answer>" by itself: the oracle would see a tag where a thought was taken out between "<" and it.
    parts = [*prompts.TAGS, "a", " ", "\n", "<", "</", ">", "think>", "<ans", "é"]
    for _ in range(2000):
        text = "".join(random_.choices(parts, k=random_.randrange(12)))
        pieces, rest = [], text
        while rest:
            size = random_.randrange(1, 9)
            pieces.append(rest[:size])
            rest = rest[size:]
        assert split_reading(pieces) == one_shot(text), (text, pieces)


@pytest.mark.parametrize("text", TEXTS)
def test_while_it_streams_everything_shows_but_what_may_become_a_tag(text):
    splitter = ThoughtSplitter()
    for end, character in enumerate(text, start=1):
        splitter.feed(character)
        starts = {tag[:size] for tag in prompts.TAGS for size in range(1, len(tag))}
        held = max((len(start) for start in starts if text[:end].endswith(start)), default=0)
        assert (splitter.thought, splitter.answer, splitter.thinking) == one_shot(text[: end - held])


def test_tags_in_a_code_fence_of_the_answer_are_text():
    code = "```xml\n<think>not a thought</think>\n<answer>1</answer>\n```\n"
    text = f"<think>hm</think>Write:\n{code}<answer>2</answer>"
    for pieces in ([text], text):
        assert split_reading(pieces) == ("hm", f"Write:\n{code}2", False)


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        ("~~~\n<think>\n~~~\n<answer>1</answer>", "~~~\n<think>\n~~~\n1"),
        ("````\n```\n<answer>\n````\n<answer>1</answer>", "````\n```\n<answer>\n````\n1"),
        ("```\nx\n```<answer>1</answer>", "```\nx\n```1"),
        ("a ``` b <answer>1</answer>", "a ``` b 1"),
        ("```inline``` <answer>1</answer>", "```inline``` 1"),
        ("```\n<answer>never closed", "```\n<answer>never closed"),
    ],
)
def test_code_fences_open_and_close_as_markdown_has_it(answer, shown):
    for pieces in ([f"<think></think>{answer}"], f"<think></think>{answer}"):
        assert split_reading(pieces) == ("", shown, False)


def test_a_code_fence_in_the_thought_does_not_keep_the_thought_open():
    assert split_reading("<think>```python\nx = 1</think>done") == ("```python\nx = 1", "done", False)


# ------------------------------------------------------------------------------------------------------------
# From token ids to text


@pytest.mark.parametrize("text", [*TEXTS, "🧮" * 20, "e\u0301", "👩‍👩‍👧‍👦 family"])
def test_characters_of_several_tokens_appear_whole(text):
    decoder = TokenDecoder(ByteTokenizer())
    pieces = [decoder.push(token_id) for token_id in text.encode()]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert "".join(pieces) + decoder.flush() == text


def test_bytes_that_are_no_text_neither_wait_for_ever_nor_break_what_follows():
    random_ = random.Random(0)
    for _ in range(300):
        token_ids = [random_.choice([0xFF, 0x80, 0xE2, 0xF0, *"é€🧮a".encode()]) for _ in range(60)]
        token_ids += [*"end €".encode()]
        decoder = TokenDecoder(ByteTokenizer())
        pieces = [decoder.push(token_id) for token_id in token_ids]
        assert "".join(pieces) + decoder.flush() == ByteTokenizer().decode(token_ids)
    decoder = TokenDecoder(ByteTokenizer())
    assert "".join(decoder.push(0xFF) for _ in range(40)), "garbage has to show at some point"


def test_a_long_stream_decodes_a_bounded_window_for_each_token():
    class Counting(ByteTokenizer):
        longest = 0

        def decode(self, token_ids, **options):
            Counting.longest = max(Counting.longest, len(token_ids))
            return super().decode(token_ids, **options)

    for token_ids in ("naïve ∑ ".encode() * 500, [0xFF] * 3000):
        decoder = TokenDecoder(Counting())
        for token_id in token_ids:
            decoder.push(token_id)
    assert Counting.longest <= 24


def test_the_built_in_tokenizer_streams_what_it_decodes_at_once():
    tiny = pytest.importorskip("tiny", reason="needs torch")
    tokenizer = tiny.build_tiny_tokenizer()
    for text in [*TEXTS, "12 + 34 = 46\n√2 🧮"]:
        token_ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        last = read(tokenizer, token_ids)[-1]
        assert last.text == text
        assert (last.thought, last.answer, last.thinking) == one_shot(text)
