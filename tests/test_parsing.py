import json
import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from atp_utils.evolution.parsing import (
    THINKING,
    answer_json,
    divide,
    ends_thinking,
    json_string,
    json_values,
    parse_choice,
    prompted_thinking,
    split_thinking,
)
from atp_utils.scenarios.tool_use.calls import read_call

OPTIONS = ("Green Gate", "Red Gate")


@pytest.mark.parametrize(
    "text",
    [
        '{"choice": "Green Gate"}',
        'The rule says so, therefore\n{"choice": "Green Gate"}',
        '```json\n{"choice": "Green Gate"}\n```',
        '{"CHOICE": "green  gate"}',
        '{"Choice" : "\\tGREEN GATE\\n"}',
        '{"reason": "it {is} fine", "choice": "Green Gate"}',
        '{"answer": {"choice": "Green Gate"}}',
        '[{"choice": "Green Gate"}]',
        'I weigh {both} options. {"choice": "Green Gate"} And that is it.',
        '{"choice": "Green Gate"} So, once more: {"choice": "Green Gate"}',
        '<think>{"choice": "Red Gate"}</think>{"choice": "Green Gate"}',
        'the template opened it: {"choice": "Red Gate"}</think>\n{"choice": "Green Gate"}',
        '{"choice": "Green \\u0047ate"}',
        '{"choice": "Green Gate",}',
        '{"choice": "Green Gate" , \n}',
        '{"choice": "Green Gate", "others": ["Red Gate",],}',
        '{"reason": "two\nlines, \\(2\\) and "quotes"", "choice": "Green Gate"}',
        '{{"choice": "Green Gate"}}',
        'I shall write {"choice": ...} or {"choice": <name>}: {"choice": "Green Gate"}',
        '[THINK]{"choice": "Red Gate"}[/THINK]{"choice": "Green Gate"}',
        '<|channel|>analysis<|message|>Not {"choice": "Red Gate"}<|end|><|start|>assistant<|channel|>final'
        '<|message|>{"choice": "Green Gate"}<|return|>',
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final <|constrain|>JSON<|message|>"
        '{"choice": "Green Gate"}',
        'hm<|end|><|start|>assistant<|channel|>final<|message|>{"choice": "Green Gate"}',
    ],
)
def test_an_answer_is_found(text):
    assert parse_choice(text, OPTIONS) == "Green Gate"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   \n",
        "Green Gate",
        "choice: Green Gate",
        '{"choice": "Blue Gate"}',
        '{"choice": "Green"}',
        '{"choice": ["Green Gate"]}',
        '{"choice": null}',
        '{"choice": 1}',
        '{"choice": "Green Gate"',
        "{'choice': 'Green Gate'}",
        '{"choice": "Green Gate"} or {"choice": "Red Gate"}',
        '{"choice": "Green Gate"} or {"choice": "Blue Gate"}',
        '<think>surely {"choice": "Green Gate"}',
        '<think>hm</think><think>{"choice": "Green Gate"}</think>',
        '{"choice": "Green Gate <or> Red Gate"}',
        '{"choice": "Green Gate", "choice": "Red Gate"}',
        '{"choice": "Red Gate", "Choice": "Green Gate"}',
        '{"choice": "Green Gate", "then": [{"choice": "Red Gate"}]}',
        '{"choice": "Green Gate", "choice": null}',
        '{"choice": "Green Gate", "Red Gate"}',
        '{"choice": "Green Gate",, }',
        '{"choice": "Green Gate",',
        '{"choice": "Green Gate", "reason": "cut off',
        '{"choice": "Green Gate"} or {"choice": "Red',
        '{"choice": Green}',
        '"choice": "Green Gate"}',
        '{"choice": "\\Green Gate"}',
        '[THINK]{"choice": "Green Gate"} or',
        '<think>{"choice": "Green Gate"}</thinking>{"choice": "Green Gate"}',
        '{"choice": "Green Gate"}<reasoning>or rather',
        '<|channel|>analysis<|message|>{"choice": "Green Gate"}',
        '<|channel|>analysis<|message|>{"choice": "Green Gate"}<|end|>',
        '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"choice": "Green Gate"}<|call|>',
        "{" * 100_000,
        '{"a":' * 20_000,
        '["' * 50_000,
        "x" * 100_000,
    ],
    ids=lambda text: text[:40],
)
def test_anything_else_is_invalid(text):
    assert parse_choice(text, OPTIONS) is None


def test_an_answer_behind_100_kb_of_noise_is_found():
    assert parse_choice("{noise} " * 12_500 + answer_json("Red Gate"), OPTIONS) == "Red Gate"


@given(
    st.lists(st.text(min_size=1), min_size=2, max_size=4),
    st.integers(0, 3),
    st.text(alphabet=st.characters(exclude_characters="{}<>", exclude_categories=["Cs"])),
)
def test_a_reply_made_from_an_option_parses_to_it(options, pick, noise):
    folded = [" ".join(option.split()).casefold() for option in options]
    assume(all(folded) and len(set(folded)) == len(options) and "think>" not in "".join(folded))
    option = options[pick % len(options)]
    assert parse_choice(noise + answer_json(option) + noise, options) == option


ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=8)  # lone surrogates too
PIECES = st.sampled_from(
    ['{"choice":', '"', "Green Gate", "{", "}", ",", "\\", "\ud83d", "<think>", "</think>", "[THINK]", "<|channel|>"]
    + ["final<|message|>", "<channel|>", "<tool>", "</tool>", "print(1)", "\n"]
)


@given(st.lists(PIECES | ANY_TEXT, max_size=30).map("".join))
def test_no_text_crashes_the_parser(text):
    assert parse_choice(text, OPTIONS) in (*OPTIONS, None)
    thinking, answer = split_thinking(text)
    assert len(thinking) + len(answer) <= len(text)
    assert read_call(text).said is not None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=8), JSON, max_size=4), st.sampled_from(OPTIONS), st.sampled_from([None, 2]))
def test_a_lone_valid_object_is_read(fields, option, indent):
    text = json.dumps(fields | {"choice": option}, indent=indent, ensure_ascii=False)
    assume(text.casefold().count('"choice"') == 1 and not divide(text)[0])
    assert parse_choice(text, OPTIONS) == option


def test_options_that_differ_only_in_case_are_refused():
    with pytest.raises(ValueError, match="case or white space"):
        parse_choice("", ("Oak", "OAK "))


def test_thinking_is_kept_apart():
    assert split_thinking("<think>a b</think>\nc") == ("a b", "c")
    assert split_thinking("no tags") == ("", "no tags")
    assert split_thinking("begun in the prompt</think>c") == ("begun in the prompt", "c")
    assert split_thinking("<think>never closed") == ("never closed", "")


MARKS = [
    ("<think>", "</think>"),
    ("<Thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning >", "</reasoning>"),
    ("<reason>", "</reason>"),
    ("<reflection>", "</reflection>"),
    ("<seed:think>", "</seed:think>"),
    ("<think:6124c78e>", "</think:6124c78e>"),
    ("[THINK]", "[/THINK]"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<|open|>think<|sep|>", "<|close|>think<|sep|>"),
    ("◁think▷", "◁/think▷"),
    ("[unused16]", "[unused17]"),
    ("<|channel>thought\n", "<channel|>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
]


@pytest.mark.parametrize(("opens", "closes"), MARKS)
def test_thinking_is_known_by_its_marks(opens, closes):
    assert split_thinking(f"{opens}a b{closes}\nc") == ("a b", "c")
    assert split_thinking(f"a b{closes}c") == ("a b", "c")
    assert split_thinking(f"{opens}a{opens.strip()} b</tool>{closes}c") == ("a b</tool>", "c")
    assert split_thinking(f"c{opens}a b") == ("a b", "c")
    assert ends_thinking(f"c{opens}a b") and not ends_thinking(f"c{opens}a b{closes}d")
    assert parse_choice(f'{opens}{{"choice": "A"}} or', ("A", "B")) is None
    assert parse_choice(f'{opens}{{"choice": "B"}}{closes}{{"choice": "A"}}', ("A", "B")) == "A"
    assert prompted_thinking(f"<|im_start|>assistant\n{opens}\n") == opens.strip()
    assert prompted_thinking(f"{opens}\n\n{closes}\n\n") == ""


def test_every_mark_is_tried():
    tried = "".join(opens + closes for opens, closes in MARKS)
    untried = [pair for pair in THINKING for mark in pair if not re.search(mark, tried, re.IGNORECASE)]
    assert {opens.split("(")[0] for opens, _ in untried} == {"<thoughts", "<mm:think", "<longcat_think"}


def test_blocks_of_different_marks_dont_mix():
    assert divide("a<think>b[THINK]c</thought>d</think>e") == (["b", "c", "d"], ["a", "e"], False)
    assert divide("<tool>a<think>b</tool>c", tools=True) == (["a", "b"], ["", "c"], False)


def test_values_are_told_apart_by_kind():
    text = '{"a": "x", "b": {"A" : 3/4}, "c": [{"a": null}], "a": [1], "a": "cut'
    assert json_values(text, "a") == ['"x"', "3/4", "null", None, None]
    assert json_string('"x"') == "x" and json_string("3/4") is None and json_string('"\\q"') is None


def test_answer_json_is_json():
    assert json.loads(answer_json('a "quoted" café')) == {"choice": 'a "quoted" café'}
