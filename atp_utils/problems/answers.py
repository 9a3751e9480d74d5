r"""The numeric answer in a model's reply, and whether it is right (paper, Appendix A.1.2).

The paper compares the reply's number with the ground truth by exact match within +-0.001, and doesn't
say how the number is found. The rules here never guess: a reply that marks no readable answer is
*invalid* (`None`), an outcome of its own for the caller to count.

1. What stands inside thinking (`parsing.THINKING`) and `<tool>...</tool>` is ignored. An unclosed tag
   hides everything after it; a closing mark of thinking that was never opened hides everything before
   it (some chat templates open it in the prompt).
2. An answer is marked by, in this order: `\boxed{...}`, or `\boxed` and a number without braces; JSON
   `{"answer": ...}`; `Answer: ...`, a heading `### Answer` or `**Answer**` above the number, a line
   `#### ...` or the phrase `answer is ...`. A weaker mark counts only where no stronger one occurs.
3. Of several marks of one kind the last one counts. If it can't be read as one number, the reply is
   invalid: an earlier mark isn't fallen back on. An empty `\boxed{}` (an echo of the instruction), a
   heading `#### Step` and prose such as `the answer is simple` mark nothing.

Numbers are exact fractions, so nan and infinity can't occur. A per cent sign is a *unit* and changes
nothing: "25%" is 25, because questions that ask for a percentage have the truth 25 and not 0.25 (none of
GSM8K's truths carries a sign). The price: "25%" isn't accepted where the truth is 0.25. Units are not
compared. Whatever could alter the value ("5 or 6", "5!", "5 dozen", "2\sqrt{3}", "5-6", "5 and a half")
makes the text unreadable.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from numbers import Integral, Rational

from atp_utils.evolution.parsing import divide, json_string, json_values

MAX_CHARS = 400  # a longer text isn't a number; this also bounds the work spent on one mark
MAX_EXPONENT = 400  # 1e999999 would build a million digits
TOLERANCE = 1e-3

_BREAK = "\x1f"  # stands for removed mark-up, so that the digits on its two sides never join
_SPACES = "\u2009\u202f\u00a0"  # thin, narrow and ordinary no-break space
_MINUS = str.maketrans(dict.fromkeys("\u2212\u2010\u2011\u2013\ufe63\uff0d", "-"))
_SUPERSCRIPT = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")


def _number(name: str) -> str:
    """Pattern of an unsigned number: grouped in threes by one separator throughout, or plain."""
    grouped = rf"[1-9]\d{{0,2}}(?P<{name}>[, {_SPACES}])\d{{3}}(?:(?P={name})\d{{3}})*(?:\.\d+)?(?!\d)"
    return rf"(?:{grouped}|\d+(?:\.\d+)?|\.\d+)"


_SIGN = re.compile(r"[-+]?\s*(?:(?:US)?[$€£¥₹₩]|USD\b|EUR\b|GBP\b)?\s*[-+]?\s*")
_LATEX_FRACTION = re.compile(
    rf"(?:(?P<whole>\d+)\s*)?\\[dtc]?frac\s*(?:(?P<n1>\d)|\{{\s*(?P<n>-?{_number('s1')})\s*\}})"
    rf"\s*(?:(?P<d1>\d)|\{{\s*(?P<d>-?{_number('s2')})\s*\}})",
    re.ASCII,
)
_SCIENTIFIC = re.compile(
    rf"(?P<n>{_number('s1')})[eE](?P<e>[-+]?\d+)|(?:(?P<f>{_number('s2')})\s*(?:[×*x·]|\\times|\\cdot)\s*)?10"
    r"(?:(?:\^|\*\*)\s*(?:\{\s*(?P<b>[-+]?\d+)\s*\}|(?P<p>[-+]?\d+))|(?P<u>⁻?[⁰¹²³⁴⁵⁶⁷⁸⁹]+))",
    re.ASCII,
)
_MIXED = re.compile(r"(?P<whole>\d+)\s+(?P<n>\d+)\s*/\s*(?P<d>\d+)", re.ASCII)
_SLASH = re.compile(rf"(?P<n>{_number('s1')})\s*/\s*(?P<d>-?{_number('s2')})", re.ASCII)
_PLAIN = re.compile(_number("s1"), re.ASCII)
_DIGIT = re.compile("[0-9]")

_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALE = re.compile(rf"[\s{_BREAK}]*({'|'.join(_SCALES)})s?\b", re.IGNORECASE)
_LETTER = r"[^\W\d_²³]"
# One character at a time and no two alternatives alike: nothing to backtrack into.
_UNITS = re.compile(
    rf"(?:{_LETTER}|[\s{_BREAK},.;:()\"°%$€£¥₹₩·]|\^\{{?\\circ\}}?|\^?\{{?\\(?:text)?degree(?![a-zA-Z^²³])\}}?|/(?=\s?{_LETTER})"
    rf"|(?<={_LETTER})(?:[-'’](?={_LETTER})|[²³]|\^[23](?!\d)|\^\{{[23]\}}))*"
)
_WORDS = re.compile(rf"{_LETTER}+")
_UNIT_LETTERS = frozenset("msghLlJNWVACF")  # any other letter may be a variable or a factor
# Words behind a number that change its value or take it back.
_ALTERING = frozenset(
    """
    or and to plus minus times over by half halves third thirds quarter quarters hundred hundreds thousand
    million billion trillion dozen dozens score tens squared cubed factorial pi sqrt root roots log ln sin
    cos tan exp mod modulo modulus power remainder choose zero one two three four five six seven eight nine
    ten eleven twelve point not no wrong incorrect false maybe perhaps possibly either less more fewer
    least most above below between inf infinity infty nan bn mn mln than except unless""".split()
)

_BRACE = re.compile(r"\\boxed\s*\{|\\boxed[ \t]*(?=[-+]?\s?(?:\.?\d|\\(?!boxed)[a-zA-Z$]))|\\[{}]|[{}]")
# What an unbraced box holds ends with the formula, line or sentence, and has no words: those are prose around a mention
# of the command. "1. First" begins a list. (An atomic group: possessive ones err in Python before 3.11.5.)
_UNBRACED = re.compile(
    r"(?!1\.\s+\S)(?>(?:[^{}$\n\\.a-zA-Z]|[a-zA-Z](?![a-zA-Z])|\.(?!\s|\Z)|\\(?!boxed)(?:[a-zA-Z]+|[^)\]\na-zA-Z])"
    r"|\{[^{}]*\})*)(?=[$}\n.]|\\[)\]]|\\boxed|\Z)"
)
# Below a heading: a formula or code on lines of its own; an item of a list, or the first of several lines of numbers.
_BLOCK = re.compile(r"(?:\$\$|\\\[|```\w*\n)([^$`]*?)(?:\$\$|\\\]|```)[ \t.]*(?:\Z|\n(?!\s*(?:\$\$|\\\[)))")
_LIST = re.compile(r"[-+*•]\s|[^\n]*\n[ \t]*(?:[-+*•]\s|[-+*$]*\d|\S{1,3}\s?=)")
_MARK = re.compile(
    r"(?P<heading>^[ \t]*(?:#{1,6}[ \t]*(?:\*\*|__)?|\*\*|__)(?:the\s)?(?:final\s)?answer(?:\*\*|__)?[ \t]*#*[ \t\r]*$)"
    r"|(?P<line>(?:\b|_)answer[*_`\"]{0,3}\s?[:=])|(?P<phrase>\banswer\sis\b\s?:?)|(?P<hash>^####)",
    re.IGNORECASE | re.MULTILINE,
)


def visible(reply: str) -> str:
    """The reply without its thinking and its tool calls (rule 1 above)."""
    return "\n".join(divide(reply, tools=True)[1])


def boxed(text: str) -> list[str | None]:
    r"""What each `\boxed{...}` or `\boxed 5` holds, in order of its start; `None` for one whose end can't be told.

    Content beyond what `parse_number` would read is cut off, so that nested boxes stay linear.
    """
    stack: list[int | None] = []
    spans: list[tuple[int, int | None]] = []
    for token in _BRACE.finditer(text):
        if token[0].startswith("\\boxed") and token[0][-1] != "{":
            held = _UNBRACED.match(text, token.end())
            spans.append((token.end(), held and held.end()))
        elif token[0].startswith("\\boxed"):
            stack.append(len(spans))
            spans.append((token.end(), None))
        elif token[0] == "{":
            stack.append(None)
        elif token[0] == "}" and stack and (index := stack.pop()) is not None:
            spans[index] = (spans[index][0], token.start())
    return [None if end is None else text[start : min(end, start + MAX_CHARS + 1)] for start, end in spans]


def _strip_markup(text: str) -> str:
    """`text` without LaTeX and Markdown wrappers; what is left reads as it would be rendered."""
    text = text.translate(_MINUS).strip()
    text = text.replace("{,}", ",").replace("\\!", "").replace("\\%", "%").replace("\\$", "$")
    text = re.sub(r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf|it)|mbox)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[,;: ]|~", "\u2009", text)
    text = re.sub(r"\\[()\[\]]|\\(?:left|right|displaystyle)\b|\$\$", _BREAK, text)
    if emphasis := re.match(r"\*{1,3}|_{1,3}|`{1,3}", text):
        text = text[emphasis.end() :].replace(emphasis[0], _BREAK, 1)
    text = text.rstrip("*_`").strip(f" \t\r\n{_BREAK}{_SPACES}")
    for left, right in ("$$", "()", "{}"):
        if len(text) > 2 and text[0] == left and text[-1] == right:
            text = text[1:-1].strip()
    return text


def _right_hand_side(text: str) -> str:
    """What follows "x =" or "10 - 3 ="; the whole text if there is no such beginning."""
    left, sign, right = re.sub(r"\\approx|≈", "=", text).rpartition("=")
    arithmetic = re.fullmatch(r"(?:[-+*/×÷^{}().\s\d=$]|,(?=\d{3})|\\times|\\cdot|\\div|\\?b?mod\b)*", left)
    named = re.fullmatch(r"\s*\\?[^\W\d_][^\\=<>!,;≤≥]{0,60}", left)
    if sign and (arithmetic or (named and not re.search(r"\b(?:or|and|not|if)\b", left))):
        return right
    return text


def _decimal(digits: str) -> Fraction:
    return Fraction(re.sub(rf"[, {_SPACES}]", "", digits))


def _ratio(numerator: str, denominator: str, whole: str | None = None) -> Fraction | None:
    top, bottom = _decimal(numerator), _decimal(denominator)
    if bottom == 0 or (whole and not 0 <= top < bottom):
        return None
    return top / bottom + int(whole or 0)


def _leading_number(text: str) -> tuple[Fraction | None, int]:
    """The unsigned number that `text` begins with, and where it ends; `None` if there is none."""
    if m := _LATEX_FRACTION.match(text):
        return _ratio(m["n"] or m["n1"], m["d"] or m["d1"], m["whole"]), m.end()
    if m := _SCIENTIFIC.match(text):
        exponent = m["e"] or m["b"] or m["p"] or m["u"].translate(_SUPERSCRIPT)
        if len(exponent) > 5 or abs(int(exponent)) > MAX_EXPONENT:
            return None, 0
        return _decimal(m["n"] or m["f"] or "1") * Fraction(10) ** int(exponent), m.end()
    if m := _MIXED.match(text):
        if len(m["n"]) == 3 and len(m["whole"]) <= 3:  # "1 250/300": a mixed number, or 1250/300?
            return None, 0
        return _ratio(m["n"], m["d"], m["whole"]), m.end()
    if m := _SLASH.match(text):
        return _ratio(m["n"], m["d"]), m.end()
    if m := _PLAIN.match(text):
        return _decimal(m[0]), m.end()
    return None, 0


def _only_units(rest: str) -> bool:
    """Is the text behind a number nothing but units and punctuation?"""
    if re.match(r"\s*[.:;)]\s*[^\W_]", rest):  # "1. First", "2) Then": a list, not a number with its unit
        return False
    if not _UNITS.fullmatch(rest) or any(c.isnumeric() and c not in "²³23" for c in rest):
        return False
    words = _WORDS.findall(rest)
    return len(words) <= 12 and all(w in _UNIT_LETTERS if len(w) == 1 else w.lower() not in _ALTERING for w in words)


def parse_number(text: str) -> Fraction | None:
    r"""The one number that a short text states, exactly; `None` if it states none, several, a formula.

    Read: 42, -3.5, +7, .5; groups of three by comma, space or thin space; 3/4, 3 1/2, `\frac{3}{4}`,
    `2\dfrac34`; 1.5e3, 1.5 x 10^3, 10^3; unicode minus; currency signs; per cent (a unit); "5 million"; units, a
    final period, emphasis, LaTeX wrappers; "x = 7", "10 - 3 = 7". Up to 400 characters and exponents up to
    +-400. Never raises on a string.
    """
    if len(text) > MAX_CHARS or not _DIGIT.search(text):  # most marks in prose: told at once
        return None
    text = _strip_markup(_right_hand_side(_strip_markup(text)))
    text = re.sub(r"^(?:approximately|approx\.?|about|around|roughly)\s", "", text, flags=re.IGNORECASE)
    sign = _SIGN.match(text)
    if sign[0].count("-") + sign[0].count("+") > 1:
        return None
    value, end = _leading_number(text[sign.end() :])
    if value is None or (value < 0 and "-" in sign[0]):
        return None
    rest = text[sign.end() + end :]
    if scale := _SCALE.match(rest):
        value, rest = value * 10 ** _SCALES[scale[1].lower()], rest[scale.end() :]
    if not _only_units(rest):
        return None
    return -value if "-" in sign[0] else value


def _statement(text: str, start: int) -> str | None:
    """What is said from `start` to the end of the sentence or line; `None` if it is too long to read."""
    cut = start + MAX_CHARS < len(text)
    window = text[start : start + MAX_CHARS] + ("…" if cut else "")  # a cut end must not look like an end
    window = re.sub(r"^[*_`\"]{0,3}(?=\s|$)", "", window)
    body = window.lstrip()
    if re.match(r"1\.\s+\S", body):  # the first item of a list, not the answer 1
        return None
    if "\n" in window[: len(window) - len(body)]:
        if block := _BLOCK.match(body):
            return block[1]
        if _LIST.match(body):
            return None
    end = re.search(r"\n|\.[*_`\")]{0,3}(?:\s|$)|;\s|,?\s(?:because|since)\b", body)
    if cut and not end:
        return None
    return body[: end.start()] if end else body


def _last_line_mark(text: str) -> Fraction | None:
    """The number behind the last of `Answer:`, `####` and `answer is` (the latter two: if one follows)."""
    for mark in reversed(list(_MARK.finditer(text))):
        if mark.lastgroup == "hash":
            value = parse_number(text[mark.end() : mark.end() + MAX_CHARS + 1].partition("\n")[0])
        else:
            said = _DIGIT.search(text, mark.end(), mark.end() + MAX_CHARS) and _statement(text, mark.end())
            value = parse_number(said or "")
        if value is not None or mark.lastgroup in ("line", "heading"):
            return value
    return None


def extract_answer(reply: str) -> Fraction | None:
    """The number that a reply marks as its answer, or `None` if the reply is invalid (rules 1-3 above).

    Linear in the reply's length; never raises on a string. A reply that a token limit cut off may end in half
    a number: only the caller knows the finish reason.
    """
    text = visible(reply)
    boxes = [box for box in boxed(text) if box is None or box.strip()]
    if boxes:
        return None if boxes[-1] is None else parse_number(boxes[-1])
    if values := json_values(text, "answer"):
        value = values[-1] or ""
        return parse_number((json_string(value) or "") if value.startswith('"') else value)
    return _last_line_mark(text)


def exact(number: object) -> Fraction | None:
    """A finite number as a fraction (a float by its shortest decimal form); `None` for anything else."""
    if isinstance(number, bool):
        return None
    if isinstance(number, Integral):
        return Fraction(int(number))
    if isinstance(number, Rational):
        return Fraction(number)
    if isinstance(number, str):
        return parse_number(number)
    try:
        decimal = float(number)  # numpy's floats and Decimal too
    except (TypeError, ValueError, OverflowError):
        return None
    return Fraction(repr(decimal)) if math.isfinite(decimal) else None


def is_correct(value: object, truth: object, tolerance: float = TOLERANCE) -> bool:
    """Is `value` within +-`tolerance` of `truth`, the bound included (Appendix A.1.2)? `None` never is.

    Raises ValueError where the truth isn't a finite number or the tolerance is negative.
    """
    expected, allowed = exact(truth), exact(tolerance)
    if expected is None:
        raise ValueError(f"truth: expected a finite number, got {truth!r}")
    if allowed is None or allowed < 0:
        raise ValueError(f"tolerance: expected a number >= 0, got {tolerance!r}")
    found = exact(value)
    return found is not None and abs(found - expected) <= allowed


def canonical(value: Fraction) -> str:
    """Exact text of a rational: "42", "-0.125", or "1/3" where decimals don't end. `parse_number` reads it"""
    if value.denominator == 1:
        return str(value.numerator)
    places = next((p for p in range(1, 31) if 10**p % value.denominator == 0), None)
    if places is None:
        return f"{value.numerator}/{value.denominator}"
    digits = f"{abs(value.numerator) * 10**places // value.denominator:0{places + 1}d}"
    return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"
