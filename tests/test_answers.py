"""Answers: every supported style is read, nothing else is guessed, and no reply breaks or stalls the parser."""

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atp_utils.problems.answers import canonical, extract_answer, is_correct, parse_number, visible
from atp_utils.scenarios.tool_use.calls import read_answer

READ = {
    "42": 42,
    "-3.5": "-3.5",
    "+7": 7,
    ".5": "0.5",
    "5.": 5,
    "0": 0,
    "1,234,567": 1234567,
    "1 234 567": 1234567,
    "1\u202f234.5": "1234.5",
    "1{,}234": 1234,
    r"1\,234": 1234,
    "3/4": "3/4",
    "-3 / 4": "-3/4",
    "3/-4": "-3/4",
    "3 1/2": "7/2",
    "-3 1/2": "-7/2",
    r"\frac{3}{4}": "3/4",
    r"-\dfrac{3}{4}": "-3/4",
    r"\frac{-3}{4}": "-3/4",
    r"2\tfrac34": "11/4",
    "1.5e3": 1500,
    "1.5E-3": "0.0015",
    r"1.5 \times 10^{3}": 1500,
    "2 x 10⁻³": "0.002",
    "6*10**4": 60000,
    "10^3": 1000,
    "10^{6}": 1000000,
    "-10**2": -100,
    "10⁻³ m": "0.001",
    "x = 10^{-2}": "0.01",
    "10^2 km": 100,
    "\u22125": -5,
    "\u20135": -5,
    "$1,234.50": "1234.5",
    "-$5": -5,
    "$-5": -5,
    "5 €": 5,
    "25%": 25,
    r"25\%": 25,
    "5 million": 5000000,
    "5 km/h": 5,
    "1 250/day": 1250,
    r"1,234\frac{3}{4}": "1234.75",
    "5 cm²": 5,
    r"5\text{ cm}^2": 5,
    r"60^\circ": 60,
    r"90\degree": 90,
    r"90^{\degree} C": 90,
    r"30.5 \textdegree": "30.5",
    "42 apples.": 42,
    "**42**": 42,
    "**42** apples": 42,
    "$5$ apples": 5,
    r"\(\frac{1}{2}\)": "1/2",
    "(5)": 5,
    "x = 7": 7,
    "10 - 3 = 7": 7,
    r"\approx 3.14": "3.14",
    r"\text{Total} = \$7": 7,
}

UNREADABLE = (
    r"""
nan|inf|-inf|Infinity|1e999999|1e-999999|1/0|\frac{1}{0}|3 5/4|3/4/5|1.2.3|1,2345|3,4|3, 4|0,123|1 250/300
.\frac{3}{4}|1.5\frac{1}{2}|\frac345
5 or 6|5 and a half|5!|5²|5½|5 x 10|5k|5x|5i|5\pi|2\sqrt{3}|5-6|5 dozen|5 forty-two|5 apples a day|five
--5|±5|[1,2]|(1,2)|12:30|0x10|1_000|٣|**1**2|**1**234|\(1\)2|5$6|5^2|5 + 3|7 (mod 11)|5?|5 is wrong|5 not
x = 3, y = 4|x >= 5|5 != 7|x \ne 5|1. First|2) Then|\frac{\frac{1}{2}}{3}|\frac{1+2}{3}|5 because 2+2
10^|10^x|10^{|10^{6|10^6.5|10^6^2|10^{1,2}|10^6/2|10^1/2|10^6!|10^6+1|2 10^6|1.10^3|210^6|10.5^2|100^2|2^10|10^999
10^{2}3|10^6 or 7|10^(6)|10**6**2|10⁶5|5 + 10^6|10^6 x 10^2|10\circ|90\degrees|90\degreex|90\degree 30|90\degree + 5
\degree|90\degree or 80|90\degree^2
e|-|.|,|$|%|{}|about|\boxed{5}
""".strip()
    .replace("\n", "|")
    .split("|")
)


@pytest.mark.parametrize("text", READ)
def test_each_style_is_read_exactly(text):
    assert parse_number(text) == Fraction(str(READ[text]))


@pytest.mark.parametrize("text", [*UNREADABLE, "", " ", "5\x005", "5\n6", "9" * 401])
def test_what_is_not_one_number_is_not_read(text):
    assert parse_number(text) is None


REPLIES = {
    "I think it is 42": None,  # not marked: never guessed
    r"So \boxed{5}.": 5,
    r"\boxed{\frac{3}{4}}": "3/4",
    r"\boxed{\text{\$5}}": 5,
    r"first \boxed{5}, no: \boxed{6}": 6,  # the last of several counts
    r"\boxed{5} then \boxed{\text{unknown}}": None,  # and isn't replaced by an earlier one
    r"\boxed{5} then \boxed{6": None,
    r"write it in \boxed{}: \boxed{5}, in \boxed{}": 5,
    r"\boxed{\boxed{5}}": 5,
    r"\boxed{7} Answer: 8": 7,  # the stronger mark counts
    r"So \boxed 5": 5,
    r"So $\boxed 42$ apples": 42,
    r"**\boxed 42**": 42,
    r"\boxed5.": 5,
    r"\[\boxed -3.5\]": "-3.5",
    r"\boxed\frac{3}{4}": "3/4",
    r"{\boxed 5}": 5,
    r"\boxed{4}, no: \boxed 5": 5,
    r"\boxed 4 \boxed{5}": 5,
    r"\boxed{5}, as \boxed wants": 5,  # no number: prose
    r"\boxed{5} in \(\boxed\)": 5,
    r"\boxed{4} then \boxed\text{unknown}": None,
    r"\boxed{4} then \boxed 5 + 3": None,
    r"\boxed 5 or 6": None,
    r"\boxed 5, 6": None,
    r"\boxed 5{": None,
    r"\boxed 5\sqrt{2}": None,
    r"\boxed 5!": None,
    r"\boxed 1. First": None,
    r"\boxedx 5": None,
    r"I used \boxed 2 ways.": None,
    r"$\boxed 5 \text{ apples}$": 5,
    r"\boxed{10^6}": 10**6,
    r"\boxed{10^{-1}}": "0.1",
    r"\boxed{2^{10}}": None,
    '{"answer": 5}': 5,
    '{"answer": 42,}': 42,
    '{"Answer": "42" , }': 42,
    '{"steps": "\\(2+3\\)\nso", "answer": 5}': 5,
    '{"answer": 5, 6}': None,
    '{"answer": 5,, }': None,
    '{"answer": 5, "sure": tr': None,  # cut off
    '{"answer": ...} means {"answer": 5}': 5,
    '{"answer": 4} or {"answer": $5}': None,
    "{'answer': 5}": None,
    '```json\n{"steps": "2+3", "answer": "3/4"}\n```': "3/4",
    '{"answer": "\\\\frac{1}{2}"}': "1/2",
    '{"answer": 5} {"answer": 6, "sure": true}': 6,
    '{"answer": 1,234}': None,
    '{"answer": 12': None,  # cut off: it may have been 123
    '{"answer": NaN}': None,
    '{"answer": true}': None,
    '{"answer": [5]}': None,
    '{"answer": "\\q5"}': None,
    "Answer: 42": 42,
    "**Answer:** 42 apples": 42,
    "**Final answer: 42**": 42,
    "Answer:\n\n42\n": 42,
    "Answer: 1,234.5": "1234.5",
    "Answer: 5. Check: 2 + 3 = 5": 5,
    "Answer: 5 because 2 + 3 = 5": 5,
    "Answer: 1. First we add": None,  # a list
    "Answer: 5 or 6": None,
    "Answer: 5\nAnswer: unknown": None,
    "The answer is **42**.": 42,
    "The answer is 5. The answer is obvious.": 5,
    "The answer is not 5": None,
    "The answer is simple: 5": None,
    "### Answer\n42": 42,
    "## Final Answer\n\n**42** apples.\n\nWe have 6 times 7.": 42,
    "**Final Answer**\n42": 42,
    "# __The answer__ #\r\n42": 42,
    "#### Answer\n$$\nx = 42\n$$\nby 6 and 7": 42,
    "### Answer\n```\n42\n```": 42,
    "Answer:\n\\[\n42\n\\]": 42,
    "Answer: 4\n### Answer\n5": 5,
    "Answer: 4\n### Answer\n5 or 6": None,
    "Answer: 4\n### Answer": None,
    "### Answer\nfive": None,
    "### Answer\n- 5 apples\n- 6 pears": None,  # a list; nor is its dash a minus
    "### Answer\n* 5 apples": None,
    "### Answer\n1. First": None,
    "### Answer\n5 apples\n6 pears": None,
    "### Answer\n5\n- 6": None,
    "### Answer\n$$5$$ $$6$$": None,
    "### Answer\n$$\n5\n$$\n\n$$6$$": None,
    "### Answer\n**5**\n**6**": None,
    "### Answer\nx = 5\ny = 6": None,
    "### Answer\n(a) 5\n(b) 6": None,
    "### Answer 2\n42": None,
    "### Wrong answer\n42": None,
    "### Answer to the first part\n42": None,
    "My answer\n42": None,
    "some steps\n#### 42": 42,
    "#### 42\n#### Conclusion": 42,
    "#### 1. First": None,
    "#### 2. Compute\n6 times 7": None,
    "#### 42\n#### 3) Conclusion": 42,
    "Answer: 42\n#### 3. Conclusion\nSo we get 42.": 42,
    "#### 42.5 apples": "42.5",
    "#### 42.": 42,
    "Answer:\n2. Compute the sum": None,
    "### Answer\n2) Compute the sum": None,
    "### Answer\n42.\nThat is all.": 42,
    "<think>Answer: 5</think>Answer: 6": 6,
    r"<think>\boxed{5}": None,
    r"[THINK]\boxed{5}": None,
    r"[THINK]\boxed{4}[/THINK]\boxed{5}": 5,
    r"<thought>\boxed{4}</thought >Answer: 5": 5,
    "<|channel|>analysis<|message|>Answer: 4<|end|><|start|>assistant<|channel|>final<|message|>Answer: 5": 5,
    "<tool>[THINK]</tool>Answer: 5": 5,
    "<think><tool></think>Answer: 5": 5,
    "</tool>Answer: 5": 5,
    r"opened in the prompt \boxed{4}</think>Answer: 6": 6,
    r"<think>a<think>b</think>\boxed{5}</think>Answer: 6": 6,
    r"\boxed{3}<think>no, \boxed{4}</think>": 3,
    "<tool>print('Answer: 5')</tool>": None,
    "<tool>print('<think>')</tool>Answer: 5": 5,
    "Answer: 5 <tool>print('Answer: 6')": 5,
    "Answer: 4<tool>x</tool>2": 4,
    "Answer: 3" + " " * 395 + "4": None,
    "Answer: " + " " * 391 + "3.14159": "3.14159",
    "": None,
}


@pytest.mark.parametrize("reply", REPLIES)
def test_marked_answers(reply):
    expected = REPLIES[reply]
    assert extract_answer(reply) == (None if expected is None else Fraction(str(expected)))


def test_a_box_that_the_end_of_a_cut_reply_closes_may_hold_half_a_number():
    for reply in (r"\boxed{5}, no: \boxed 6", r"\boxed 6", r"\boxed 6."):
        assert read_answer(reply, cut=False) == 6 and read_answer(reply, cut=True) is None
    assert read_answer(r"$\boxed 6$ and", cut=True) == read_answer(r"\boxed{6} and", cut=True) == 6


def test_hidden_text_never_joins_what_stands_around_it():
    assert visible("4<tool>x</tool>2<think>y</think>3") == "4\n2\n3"


def test_tolerance_is_inclusive_and_exact():
    assert is_correct(Fraction(1001, 1000), "1") and is_correct(Fraction(4999, 1000), "5")
    assert not is_correct(Fraction("1.0010001"), "1") and not is_correct(Fraction(2), "1")
    assert is_correct(Fraction(1, 3), "0.333") and is_correct(parse_number("1/3"), "0.3333")
    assert not is_correct(None, "1")


def test_exact_text_of_a_number():
    texts = {"-1/8": "-0.125", "1/3": "1/3", "100": "100", "2/4": "0.5", "-7": "-7", "1/1000": "0.001"}
    assert {text: canonical(Fraction(text)) for text in texts} == texts
    for value in (Fraction(10**40 + 1), Fraction(1, 2**70), Fraction(-(10**40), 3)):  # beyond decimal's 28 digits
        assert parse_number(canonical(value)) == value


def test_a_percentage_keeps_the_number_that_is_written():
    assert is_correct(extract_answer("Answer: 25%"), "25")
    assert not is_correct(extract_answer("Answer: 25%"), "0.25")


N = 100_000
FLOODS = {
    "unclosed boxes": "\\boxed{" * (N // 7),
    "nested boxes": "\\boxed{" * (N // 14) + "}" * (N // 14),
    "braces": "{" * N + "}" * N,
    "think tags": "<think>" * (N // 7),
    "closing tags": "</think>" * (N // 8),
    "tool pairs": "<tool></tool>" * (N // 13),
    "json keys": '{"answer":' * (N // 10),
    "json blanks": '{"answer"' + " " * N + ": 5",
    "json without end": '{"answer":1,' * (N // 12),
    "boxes without braces": "\\boxed 5{" * (N // 9),
    "boxed brackets": "\\boxed 5[" * (N // 9),
    "blank heading": "### Answer\n" + " " * N,
    "spaces of headings": "\n" + " " * N + "### Answer",
    "formulas": "### Answer\n$$ " * (N // 14),
    "marks": "<t[t◁t<|c" * (N // 9),
    "json escapes": '{"answer": "' + "\\" * N,
    "brackets": "[[[[" * (N // 4),
    "digits": "Answer: " + "9" * N,
    "box of digits": "\\boxed{" + "9" * N + "}",
    "prose marks": "answer is the " * (N // 14),
    "long prose marks": ("answer is 5 " + "a" * 380 + "! ") * (N // 395),
    "line marks": "answer: " * (N // 8),
    "headings": "####\n" * (N // 5),
    "grouped": "Answer: 1" + ",234" * (N // 4),
    "blank lines": "answer:" + "\n" * N,
    "hyphens": "Answer: 5 " + "a-" * 190 + "!",
    "emphasis": "answer is " + "_*" * (N // 2),
}


@pytest.mark.parametrize("name", FLOODS)
def test_hostile_replies_are_invalid_within_a_second(name):
    start = time.perf_counter()
    assert extract_answer(FLOODS[name]) is None
    assert time.perf_counter() - start < 1


# --- properties ------------------------------------------------------------------------------------------

steady = settings(deadline=None, derandomize=True, max_examples=200)  # the same examples on every machine

integers = st.integers(-(10**12), 10**12)
rationals = st.fractions(min_value=-(10**6), max_value=10**6, max_denominator=10**4)
WRAPPERS = [
    "{}", " {} ", "{}.", "${}$", r"\({}\)", "**{}**", "`{}`", "{} apples", "{} km/h", "{}%", r"{}\%", "x = {}",
    "{} €", r"{}\text{{ cm}}^2", "about {}", "({})", r"{}\degree",
]  # fmt: skip
MARKS = [
    r"so \boxed{{{}}}", '{{"answer": "{}"}}', "Answer: {}", "**Answer:** {}", "the answer is {}.", "#### {}",
    r"$\boxed {}$", "### Answer\n{}", '{{"answer": "{}",}}', "[THINK]Answer: 0[/THINK]**Answer**\n\n{}\n",
    "<think>Answer: 0</think>Answer: {}", "<tool>x</tool>\nAnswer: {}\nDone.",
]  # fmt: skip


def grouped(value: int, separator: str) -> str:
    return f"{value:,}".replace(",", separator)


@steady
@given(integers, st.sampled_from([",", " ", "\u2009", "\u202f", "\u00a0", "{,}", r"\,"]), st.sampled_from(WRAPPERS))
def test_grouped_integers_parse_back(value, separator, wrapper):
    assert parse_number(wrapper.format(grouped(value, separator))) == value


@steady
@given(rationals, st.sampled_from(WRAPPERS))
def test_fractions_parse_back(value, wrapper):
    top, bottom = abs(value.numerator), value.denominator
    sign = "-" if value < 0 else ""
    whole, rest = divmod(top, bottom)
    forms = [f"{sign}{top}/{bottom}", f"{sign}\\frac{{{top}}}{{{bottom}}}", f"\\dfrac{{{sign}{top}}}{{{bottom}}}"]
    if whole and rest:
        forms.append(f"{sign}{whole}\\frac{{{rest}}}{{{bottom}}}")
        if rest < 100:
            forms.append(f"{sign}{whole} {rest}/{bottom}")
    for form in forms:
        assert parse_number(wrapper.format(form)) == value, form


@steady
@given(st.decimals(-(10**9), 10**9, places=4), st.integers(-300, 300), st.sampled_from(["e", "E"]))
def test_scientific_notation_parses_back(value, power, letter):
    expected = Fraction(value) * Fraction(10) ** power
    digits = f"{value:f}"
    for form in (f"{digits}{letter}{power}", rf"{digits} \times 10^{{{power}}}", f"{digits} × 10^{power}"):
        assert parse_number(form) == parse_number(form.replace("-", "\u2212")) == expected


@steady
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_parses_back_from_its_repr(value):
    assert parse_number(repr(value)) == Fraction(repr(value))


@steady
@given(rationals, st.sampled_from(MARKS))
def test_marked_canonical_numbers_come_back(value, mark):
    assert extract_answer(mark.format(canonical(value))) == value


@steady
@given(integers, integers, st.sampled_from(MARKS))
def test_the_last_of_two_marks_of_one_kind_counts(first, last, mark):
    assert extract_answer(f"{mark.format(first)}\n{mark.format(last)}") == last


@steady
@given(st.integers(-300, 300), st.sampled_from(["10^{}", "10^{{{}}}", "10**{}", r"1 \times 10^{}"]))
def test_powers_of_ten_parse_back(power, form):
    assert (
        parse_number(form.format(power)) == extract_answer(rf"\boxed{{{form.format(power)}}}") == Fraction(10) ** power
    )


PIECES = st.sampled_from([
    "\\boxed{", "\\boxed", "10^", "\\degree", "### Answer\n", "[THINK]", "<|channel|>", "\ud83d", "$",
    "}", "{", '{"answer":', '"', "Answer:", "answer is", "####", "<think>", "</think>", "<tool>",
    "</tool>", "\\frac{", "1", "23", ",", ".", "/", "-", "e9", "^", "%", "$", "*", " ", "\n", "\\", "=", "nan", "½",
])  # fmt: skip


@steady
@given(st.lists(PIECES | st.text(st.characters(exclude_categories=()), max_size=5), max_size=40).map("".join))
def test_no_text_crashes(text):
    for found in (extract_answer(text), parse_number(text)):
        assert found is None or isinstance(found, Fraction)


@steady
@given(st.text())
def test_text_without_a_mark_is_invalid(text):
    if not any(mark in text.casefold() for mark in ("answer", "boxed", "####")):
        assert extract_answer(text) is None
