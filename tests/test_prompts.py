import copy
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

import prompts
from prompts import ParsedCompletion, completion_prefix, parse_completion, prepare_tokenizer, render_prompt

ASKED = "<|im_start|>user\nhow many?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def tokenizer(chat_tokenizer):
    return copy.deepcopy(chat_tokenizer)


def system(text):
    return f"<|im_start|>system\n{text}<|im_end|>\n"


# ------------------------------------------------------------------------------------------------------------
# Asking


def test_preparing_adds_the_system_prompt_once(tokenizer):
    prepare_tokenizer(tokenizer)
    once = tokenizer.chat_template
    prepare_tokenizer(tokenizer)
    assert tokenizer.chat_template == once
    assert render_prompt(tokenizer, "how many?") == system(prompts.SYSTEM_PROMPT) + ASKED


def test_a_system_message_of_the_users_own_stands_alone(tokenizer):
    prepare_tokenizer(tokenizer)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "how many?"}]
    assert render_prompt(tokenizer, messages) == system("be brief") + ASKED


def test_a_conversation_has_the_system_prompt_before_its_first_turn_only(tokenizer):
    prepare_tokenizer(tokenizer, "think")
    turns = [("user", "a"), ("assistant", "b"), ("user", "how many?")]
    rendered = render_prompt(tokenizer, [{"role": role, "content": text} for role, text in turns])
    assert rendered == (
        system("think") + "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n" + ASKED
    )


def test_a_given_system_prompt_replaces_and_an_empty_one_removes(tokenizer):
    prepare_tokenizer(tokenizer)
    prepare_tokenizer(tokenizer, "first")
    prepare_tokenizer(tokenizer, "second")
    assert render_prompt(tokenizer, "how many?") == system("second") + ASKED
    prepare_tokenizer(tokenizer)  # None keeps it
    assert render_prompt(tokenizer, "how many?") == system("second") + ASKED
    prepare_tokenizer(tokenizer, "")
    assert render_prompt(tokenizer, "how many?") == ASKED
    prepare_tokenizer(tokenizer)  # removed on purpose, so None keeps that too
    assert render_prompt(tokenizer, "how many?") == ASKED


@pytest.mark.parametrize(
    "text",
    [
        "an emoji 😀, é, 数学",
        "quotes ' \" and a \\ backslash \\n",
        "two\nlines\tand a tab",
        "{{ 7 * 7 }} {% if x %} {# note #} %} }} #}",
        "{#- asked by ponder -#}",
        "</s><|im_end|>",
    ],
)
def test_any_system_prompt_arrives_as_it_was_written(tokenizer, text):
    prepare_tokenizer(tokenizer, text)
    assert render_prompt(tokenizer, "how many?") == system(text) + ASKED
    prepare_tokenizer(tokenizer, "another")
    assert render_prompt(tokenizer, "how many?") == system("another") + ASKED


def test_a_tokenizer_without_a_template_gets_a_plain_one(tokenizer):
    tokenizer.chat_template = None
    prepare_tokenizer(tokenizer, "think")
    assert render_prompt(tokenizer, "how many?") == "think\n\nUser: how many?\nAssistant: "
    turns = [("user", "a"), ("assistant", "b"), ("user", "c")]
    rendered = render_prompt(tokenizer, [{"role": role, "content": text} for role, text in turns])
    assert rendered == "think\n\nUser: a\nAssistant: b<|im_end|>\nUser: c\nAssistant: "


def test_a_plain_template_takes_the_place_of_the_tokenizers_own(tokenizer):
    prepare_tokenizer(tokenizer, "think", plain_template=True)
    assert render_prompt(tokenizer, "how many?") == "think\n\nUser: how many?\nAssistant: "
    prepare_tokenizer(tokenizer)
    prepare_tokenizer(tokenizer, plain_template=True)
    assert render_prompt(tokenizer, "how many?") == "think\n\nUser: how many?\nAssistant: "


REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
FORGETS = "{% set messages = messages | selectattr('role', 'ne', 'system') | list %}"


@pytest.mark.parametrize("without_system", [REFUSES, FORGETS])
def test_a_template_without_system_messages_asks_before_the_first_question(tokenizer, without_system):
    tokenizer.chat_template = without_system + tokenizer.chat_template
    prepare_tokenizer(tokenizer, "think")
    first = "<|im_start|>user\nthink\n\na<|im_end|>\n"
    turns = [("user", "a"), ("assistant", "b"), ("user", "how many?")]
    rendered = render_prompt(tokenizer, [{"role": role, "content": text} for role, text in turns])
    assert rendered == first + "<|im_start|>assistant\nb<|im_end|>\n" + ASKED
    once = tokenizer.chat_template
    prepare_tokenizer(tokenizer)
    assert tokenizer.chat_template == once
    prepare_tokenizer(tokenizer, "")
    assert render_prompt(tokenizer, "how many?") == ASKED


def test_a_template_that_takes_no_system_prompt_at_all_is_refused(tokenizer):
    tokenizer.chat_template = "always the same"
    with pytest.raises(ValueError, match="leaves the system prompt out; give an empty system_prompt"):
        prepare_tokenizer(tokenizer)
    tokenizer.chat_template = "{{ raise_exception('not like this') }}"
    with pytest.raises(ValueError, match="not like this"):
        prepare_tokenizer(tokenizer)


def test_a_template_that_tells_the_date_asks_the_same_every_day(tokenizer):
    tokenizer.chat_template = "{{- 'Today: ' + strftime_now( '%d %b %Y' ) }}\n" + tokenizer.chat_template
    assert "26 Jul 2024" not in render_prompt(tokenizer, "how many?")
    prepare_tokenizer(tokenizer, "think")
    assert render_prompt(tokenizer, "how many?").startswith("Today: 26 Jul 2024")


def test_a_thought_is_opened_once_kept_and_left_alone_again(tokenizer):
    prepare_tokenizer(tokenizer, "think", prefill_think=True)
    for prefill in (None, True):
        prepare_tokenizer(tokenizer, prefill_think=prefill)
        assert render_prompt(tokenizer, "how many?") == system("think") + ASKED + "<think>"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert "<think>" not in tokenizer.apply_chat_template(turns, tokenize=False)
    prepare_tokenizer(tokenizer, "other")
    assert render_prompt(tokenizer, "how many?") == system("other") + ASKED + "<think>"
    prepare_tokenizer(tokenizer, prefill_think=False)
    assert render_prompt(tokenizer, "how many?") == system("other") + ASKED
    # One that opens it itself, as R1's distilled models do.
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}"
    prepare_tokenizer(tokenizer, prefill_think=True)
    assert render_prompt(tokenizer, "how many?") == system("other") + ASKED + "<think>\n"


def test_the_style_of_the_answer_is_asked_for_and_read_from_the_prompt(tokenizer):
    for style in ("tags", "boxed", "tags"):
        prepare_tokenizer(tokenizer, answer_style=style)
        prompt = render_prompt(tokenizer, "how many?")
        assert prompt == system(prompts.SYSTEM_PROMPTS[style]) + ASKED
        assert prompts.answer_style(prompt) == style
    prepare_tokenizer(tokenizer, answer_style="boxed")
    prepare_tokenizer(tokenizer)  # None keeps it
    assert prompts.answer_style(render_prompt(tokenizer, "how many?")) == "boxed"
    with pytest.raises(ValueError, match=r"answer_style 'boxed' .* system_prompt"):
        prepare_tokenizer(tokenizer, "my own", answer_style="boxed")
    # In the user's words, and with a box in a question.
    prepare_tokenizer(tokenizer, "Put the answer in \\boxed{}.")
    assert prompts.answer_style(render_prompt(tokenizer, "how many?")) == "boxed"
    prepare_tokenizer(tokenizer, answer_style="tags")
    assert prompts.answer_style(render_prompt(tokenizer, "what is in \\boxed{4}?")) == "tags"


def test_of_several_templates_the_default_is_prepared(tokenizer):
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "tools"}
    prepare_tokenizer(tokenizer, "think")
    assert render_prompt(tokenizer, "how many?") == system("think") + ASKED


def test_a_saved_tokenizer_asks_with_the_same_bytes(tokenizer, tmp_path):
    prepare_tokenizer(tokenizer, "think 😀")
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for question in ("how many?", "  é\n<think>x</think> 12 apples", ""):
        assert render_prompt(loaded, question) == render_prompt(tokenizer, question)
        assert prompts.encode_prompt(loaded, question) == prompts.encode_prompt(tokenizer, question)
    prepare_tokenizer(loaded)
    assert loaded.chat_template == tokenizer.chat_template


def test_encoding_a_prompt_adds_no_special_token_of_its_own(tokenizer):
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    assert tokenizer.encode("x")[0] == 0
    ids = prompts.encode_prompt(tokenizer, "how many?")
    assert tokenizer.decode(ids) == ASKED
    assert 0 not in ids


@pytest.mark.parametrize(
    ("prompt", "prefix"),
    [
        ("Assistant: <think>", "<think>"),
        ("<|im_start|>assistant\n<think>\n", "<think>"),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", ""),
        ("say <think><|im_end|>\n<|im_start|>assistant\n", ""),
        ("", ""),
    ],
)
def test_the_prefix_is_what_the_template_already_opened(prompt, prefix):
    assert completion_prefix(prompt) == prefix


# ------------------------------------------------------------------------------------------------------------
# Reading


@pytest.mark.parametrize(
    ("text", "thought", "answer_text", "answer", "thought_open", "well_formed"),
    [
        # as asked
        ("<think>t</think><answer>a</answer>", "t", "<answer>a</answer>", "a", False, True),
        (
            " <think>\nt\n</think>\n\n<answer> a </answer>\n",
            "\nt\n",
            " \n\n<answer> a </answer>\n",
            "a",
            False,
            True,
        ),
        # something is missing
        ("", None, "", None, False, False),
        ("42", None, "42", None, False, False),
        ("<answer>a</answer>", None, "<answer>a</answer>", "a", False, False),
        ("<think>t</think>42", "t", "42", None, False, False),
        ("<think>t</think><answer>a", "t", "<answer>a", None, False, False),
        ("<think>t</think>a</answer>", "t", "a</answer>", None, False, False),
        ("<think> </think><answer>a</answer>", " ", "<answer>a</answer>", "a", False, False),
        ("<think>t</think><answer> </answer>", "t", "<answer> </answer>", "", False, False),
        # something is too much
        ("x<think>t</think><answer>a</answer>", "t", "x<answer>a</answer>", "a", False, False),
        ("<think>t</think>x<answer>a</answer>", "t", "x<answer>a</answer>", "a", False, False),
        ("<think>t</think><answer>a</answer>x", "t", "<answer>a</answer>x", "a", False, False),
        ("<answer>a</answer><think>t</think>", "t", "<answer>a</answer>", "a", False, False),
        # repeated, nested: the last block, from its first opening tag
        (
            "<think>t</think><answer>a</answer><answer>b</answer>",
            "t",
            "<answer>a</answer><answer>b</answer>",
            "b",
            False,
            False,
        ),
        (
            "<think>t</think><answer>a<answer>b</answer></answer>",
            "t",
            "<answer>a<answer>b</answer></answer>",
            "a<answer>b",
            False,
            False,
        ),
        ("<think>t</think><think>u</think><answer>a</answer>", "tu", "<answer>a</answer>", "a", False, False),
        ("<think>t<think>u</think><answer>a</answer>", "tu", "<answer>a</answer>", "a", False, False),
        ("<think>t</think></think><answer>a</answer>", "t", "<answer>a</answer>", "a", False, False),
        # an answer inside a thought is none
        ("<think>t<answer>a</answer></think>", "t<answer>a</answer>", "", None, False, False),
        (
            "<think>t<answer>a</answer></think><answer>b</answer>",
            "t<answer>a</answer>",
            "<answer>b</answer>",
            "b",
            False,
            False,
        ),
        ("<answer>a<think>t</think></answer>", "t", "<answer>a</answer>", "a", False, False),
        # an open thought voids what stands outside
        ("<think>t<answer>a</answer>", "t<answer>a</answer>", "", None, True, False),
        ("<think>t</think><answer>a</answer><think>", "t", "", None, True, False),
        # the tag that opens got lost
        ("t</think><answer>a</answer>", "t", "<answer>a</answer>", "a", False, False),
        ("</think><answer>a</answer>", "", "<answer>a</answer>", "a", False, False),
        # not our tags
        (
            "<THINK>t</THINK><Answer>a</Answer>",
            None,
            "<THINK>t</THINK><Answer>a</Answer>",
            None,
            False,
            False,
        ),
        ("<think >t</ think>", None, "<think >t</ think>", None, False, False),
    ],
)
def test_parse_table(text, thought, answer_text, answer, thought_open, well_formed):
    assert parse_completion(text) == ParsedCompletion(thought, answer_text, answer, thought_open, well_formed)


@pytest.mark.parametrize(
    ("text", "answer", "well_formed"),
    [
        (r"<think>t</think>\boxed{4}", "4", True),
        (r"<think>t</think>\boxed{ \frac{1}{2} }", r"\frac{1}{2}", True),
        ("<think>t</think>\n\nThe answer is $\\boxed{4}$.\n", "4", True),
        (r"<think>t</think>\[ \boxed{4} \]", "4", True),
        (r"<think>t \boxed{3}</think>\boxed{4}", "4", True),
        (r"<think>t</think>\boxed{3}\boxed{4}", "4", False),
        (r"<think>t</think>\boxed{4} apples", "4", False),
        (r"<think>t</think>\boxed{4}, no", "4", False),
        (r"<think>t</think>\boxed{ }", "", False),
        (r"<think>t</think>\boxed{4", None, False),
        (r"<think>t</think>4", None, False),
        (r"<think>t \boxed{4}</think>", None, False),
        (r"<think>t \boxed{4}", None, False),
        (r"\boxed{4}", "4", False),
        (r"<think> </think>\boxed{4}", "4", False),
        (r"x<think>t</think>\boxed{4}", "4", False),
        (r"<think>t</think><answer>4</answer>", None, False),
        (r"<think>t</think><answer>\boxed{4}</answer>", "4", False),
    ],
)
def test_parse_table_of_boxes(text, answer, well_formed):
    parsed = parse_completion(text, "boxed")
    assert (parsed.answer, parsed.well_formed) == (answer, well_formed)


@pytest.mark.parametrize("style", ["tags", "boxed"])
@pytest.mark.parametrize(
    "text",
    [
        *(tag * (1_000_000 // len(tag)) for tag in prompts.TAGS),
        "<think></think>" * 66_666,
        "</think><think>" * 66_666,
        "<answer></answer>" * 58_823,
        "</answer><answer>" * 58_823,
        "<answer>" * 60_000 + "</answer>" * 60_000,
        "<" * 1_000_000,
        "</think" * 140_000,
        " " * 1_000_000,
        "<think>t</think>" + r"\boxed{" * 140_000,
        r"<think>t</think>\boxed{4}" + "$." * 500_000 + "x",
    ],
    ids=lambda text: text[:20].strip() or "spaces",
)
def test_a_megabyte_of_tags_is_read_in_linear_time(text, style):
    began = time.process_time()
    parse_completion(text, style)
    # It takes 0.1 s; a search that starts again at every tag takes hours.
    assert time.process_time() - began < 2.0


def without(*tags):
    return st.text().filter(lambda text: not any(tag in text for tag in tags))


@given(without(prompts.THINK_OPEN, prompts.THINK_CLOSE), without(*prompts.TAGS))
def test_what_was_formatted_is_read_back(thought, answer):
    parsed = parse_completion(prompts.format_completion(thought, answer))
    assert parsed.thought == thought
    assert parsed.answer == answer.strip()
    assert not parsed.thought_open
    has_answer_tags = prompts.ANSWER_OPEN in thought or prompts.ANSWER_CLOSE in thought
    assert parsed.well_formed == bool(thought.strip() and answer.strip() and not has_answer_tags)


@given(without(*prompts.TAGS), st.text(alphabet="-0123456789a/.,^ "))
def test_a_worked_completion_comes_in_the_style_that_is_asked_for(thought, answer):
    tags, boxed = (prompts.format_completion(thought, answer.strip(), style) for style in ("tags", "boxed"))
    if thought.strip() and answer.strip():
        for text in (tags, boxed):
            assert prompts.in_style(text, "tags") == tags
            assert prompts.in_style(text, "boxed") == boxed
            assert parse_completion(prompts.in_style(text, "boxed"), "boxed").answer == answer.strip()
    else:
        assert prompts.in_style(tags, "boxed") == tags
    assert prompts.in_style("whatever else", "boxed") == "whatever else"


@given(st.lists(st.sampled_from([*prompts.TAGS, "1", " ", "\n", "x"]), max_size=12).map("".join))
def test_any_soup_of_tags_is_read_by_the_rules(text):
    parsed = parse_completion(text)
    blocks = re.findall("<answer>(.*?)</answer>", parsed.answer_text, re.DOTALL)
    assert parsed.answer == (blocks[-1].strip() if blocks else None)
    assert parsed.thought_open == (text.rfind("<think>") > text.rfind("</think>"))
    assert (parsed.thought is None) == ("<think>" not in text and "</think>" not in text)
    # What is outside the tags is either thought or answer text, but for what an open thought voids.
    if not parsed.thought_open:
        both = (parsed.thought or "") + parsed.answer_text
        assert sorted(both) == sorted(text.replace("<think>", "").replace("</think>", ""))
    words = r"((?:(?!</?think>|</?answer>).)*)"
    shape = rf"\s*<think>{words}</think>\s*<answer>{words}</answer>\s*"
    match = re.fullmatch(shape, text, re.DOTALL)
    assert parsed.well_formed == bool(match and all(group.strip() for group in match.groups()))
