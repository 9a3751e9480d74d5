import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from atp_utils.parsing import answer_json, parse_choice, split_thinking

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


@given(st.text())
def test_no_text_crashes_the_parser(text):
    assert parse_choice(text, OPTIONS) in (*OPTIONS, None)


def test_options_that_differ_only_in_case_are_refused():
    with pytest.raises(ValueError, match="case or white space"):
        parse_choice("", ("Oak", "OAK "))


def test_thinking_is_kept_apart():
    assert split_thinking("<think>a b</think>\nc") == ("a b", "c")
    assert split_thinking("no tags") == ("", "no tags")
    assert split_thinking("begun in the prompt</think>c") == ("begun in the prompt", "c")
    assert split_thinking("<think>never closed") == ("never closed", "")


def test_answer_json_is_json():
    assert json.loads(answer_json('a "quoted" café')) == {"choice": 'a "quoted" café'}
