r"""The numeric answer in a model's reply, and whether it is right (paper, Appendix A.1.2).

The paper compares the reply's number with the ground truth by exact match within +-0.001, and doesn't say how the
number is found. The rules here never guess: a reply that marks no readable answer is *invalid* (`None`), an outcome of
its own for the caller to count.

1. What stands inside thinking (`parsing.THINKING`) and `<tool>...</tool>` is ignored. An unclosed tag hides everything
   after it; a closing mark of thinking that was never opened hides everything before it (some chat templates open it in
   the prompt).
2. An answer is marked by, in this order: `\boxed{...}`, or `\boxed` and a number without braces; JSON
   `{"answer": ...}`; `Answer: ...`, a heading `### Answer` or `**Answer**` above the number, a line `#### ...` or the
   phrase `answer is ...`. A weaker mark counts only where no stronger one occurs.
3. Of several marks of one kind the last one counts. If it can't be read as one number, the reply is invalid: an earlier
   mark isn't fallen back on. An empty `\boxed{}` (an echo of the instruction), a heading `#### Step` or `#### 2. Step`
   and prose such as `the answer is simple` mark nothing.

Numbers are exact fractions. A per cent sign is a *unit* and changes nothing: "25%" is 25, because questions that ask
for a percentage have the truth 25 and not 0.25; the price is that it isn't accepted where the truth is 0.25. Units are
not compared. Whatever could alter the value ("5 or 6", "5!", "5 dozen", "2\sqrt{3}", "5-6") makes the text unreadable.
"""

import re
from decimal import Decimal
from fractions import Fraction

from atp_utils.evolution.parsing import divide, json_string, json_values

MAX_CHARS = 400  # a longer text isn't a number; this also bounds the work spent on one mark
MAX_EXPONENT = 400  # 1e999999 would build a million digits
TOLERANCE = Fraction(1, 1000)

_BREAK = "\x1f"  # stands for removed mark-up, so that the digits on its two sides never join
_MIXED = "\x1e"  # stands between a whole number and the fraction behind it
_SPACES = "\u2009\u202f\u00a0"  # thin, narrow and ordinary no-break space
_MINUS = str.maketrans(dict.fromkeys("\u2212\u2010\u2011\u2013\ufe63\uff0d", "-"))
_SUPERSCRIPT = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")

_SIGN = re.compile(r"[-+]?\s*(?:(?:US)?[$€£¥₹₩]|USD\b|EUR\b|GBP\b)?\s*[-+]?\s*")
_GROUPED = re.compile(rf"(?<![\d.,])[1-9]\d{{0,2}}([, {_SPACES}])\d{{3}}(?:\1\d{{3}})*(?!\d|\1\d)", re.ASCII)
_PLAIN = r"(?:\d+(?:\.\d+)?|\.\d+)"
_PART = rf"(?:(\d)|\{{\s*(-?{_PLAIN})\s*\}})"
_LATEX_FRACTION = re.compile(rf"(?<!\.)\\[dtc]?frac\s*{_PART}\s*{_PART}", re.ASCII)
_POWER_OF_TEN = re.compile(
    rf"(?:({_PLAIN})\s*(?:[×*x·]|\\times|\\cdot)\s*)?(?<![\d.,])10"
    r"(?:(?:\^|\*\*)\s*(?:\{\s*([-+]?\d+)\s*\}|([-+]?\d+))|(⁻?[⁰¹²³⁴⁵⁶⁷⁸⁹]+))",
    re.ASCII,
)
_VALUE = re.compile(
    rf"(?:(?P<whole>\d+)(?:{_MIXED}|\s+)(?=\d+\s*/))?"
    rf"(?P<n>{_PLAIN})(?:\s*/\s*(?P<d>-?{_PLAIN})|[eE](?P<e>[-+]?\d+))?",
    re.ASCII,
)
_DIGIT = re.compile("[0-9]")

_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALE = re.compile(rf"[\s{_BREAK}]*({'|'.join(_SCALES)})s?\b", re.IGNORECASE)
_LETTER = r"[^\W\d_²³]"
# One character at a time and no two alternatives alike: nothing to backtrack into.
_UNITS = re.compile(
    rf"(?:{_LETTER}|[\s{_BREAK},.;:()\"°%$€£¥₹₩·]|\^\{{?\\circ\}}?|\^?\{{?\\(?:text)?degree(?![a-zA-Z^²³])\}}?|/(?=\s?{_LETTER})"
    rf"|(?<={_LETTER})(?:[-'’](?={_LETTER})|[²³]|\^[23](?!\d)|\^\{{[23]\}}))*"
)
_UNIT_LETTERS = frozenset("msghLlJNWVACF")  # any other letter may be a variable or a factor
# Words behind a number that change its value or take it back.
_ALTERING = frozenset(
    """
    or and to plus minus times over by half halves third thirds quarter quarters hundred hundreds thousand million
    billion trillion dozen dozens score tens squared cubed factorial pi sqrt root roots log ln sin cos tan exp mod
    modulo modulus power remainder choose zero one two three four five six seven eight nine ten eleven twelve point not
    no wrong incorrect false maybe perhaps possibly either less more fewer least most above below between inf infinity
    infty nan bn mn mln than except unless""".split()
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
_LIST = re.compile(r"[-+*•]\s|\d+[.)][ \t]+\S|[^\n]*\n[ \t]*(?:[-+*•]\s|[-+*$]*\d|\S{1,3}\s?=)")
_MARK = re.compile(
    r"(?P<heading>^[ \t]*(?:#{1,6}[ \t]*(?:\*\*|__)?|\*\*|__)(?:the\s)?(?:final\s)?answer(?:\*\*|__)?[ \t]*#*[ \t\r]*$)"
    r"|(?P<line>(?:\b|_)answer[*_`\"]{0,3}\s?[:=])|(?P<phrase>\banswer\sis\b\s?:?)"
    r"|(?P<hash>^####(?=[ \t]*(?!\d+[.)][ \t])\S))",
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


def _plain_notation(text: str) -> str:
    r"""`text` with its numbers as digits: 1,234 as 1234, `2\frac{3}{4}` as 2 and 3/4, 1.5 x 10^3 as 1.5e3."""
    text = _GROUPED.sub(lambda m: m[0].replace(m[1], ""), text)
    text = re.sub(r"(?<=\d) ?(?=\\[dtc]?frac)", _MIXED, text)
    text = _LATEX_FRACTION.sub(lambda m: f"{m[1] or m[2]}/{m[3] or m[4]}{_BREAK}", text)
    return _POWER_OF_TEN.sub(lambda m: f"{m[1] or 1}e{m[2] or m[3] or m[4].translate(_SUPERSCRIPT)}{_BREAK}", text)


def _exact(found: re.Match) -> Fraction | None:
    """The number that `_VALUE` found; `None` for "1/0", "3 5/4" and exponents out of range."""
    whole, top, bottom = int(found["whole"] or 0), Fraction(found["n"]), Fraction(found["d"] or 1)
    exponent = int(found["e"] or 0)
    if bottom == 0 or abs(exponent) > MAX_EXPONENT or (found["whole"] and not top < bottom):
        return None
    return whole + top / bottom * Fraction(10) ** exponent


def _only_units(rest: str) -> bool:
    """Is the text behind a number nothing but units and punctuation?"""
    if re.match(r"\s*[.:;)]\s*[^\W_]", rest):  # "1. First", "2) Then": a list, not a number with its unit
        return False
    if not _UNITS.fullmatch(rest) or any(c.isnumeric() and c not in "²³23" for c in rest):
        return False
    words = re.findall(rf"{_LETTER}+", rest)
    return len(words) <= 12 and all(w in _UNIT_LETTERS if len(w) == 1 else w.lower() not in _ALTERING for w in words)


def parse_number(text: str) -> Fraction | None:
    r"""The one number that a short text states, exactly; `None` if it states none, several, a formula.

    Read: 42, -3.5, +7, .5; groups of three by comma, space or thin space; 3/4, 3 1/2, `\frac{3}{4}`, `2\dfrac34`;
    1.5e3, 1.5 x 10^3, 10^3; unicode minus; currency signs; per cent (a unit); "5 million"; units, a final period,
    emphasis, LaTeX wrappers; "x = 7", "10 - 3 = 7". Up to 400 characters and exponents up to +-400. Never raises.
    """
    if len(text) > MAX_CHARS or not _DIGIT.search(text):  # most marks in prose: told at once
        return None
    text = _strip_markup(_right_hand_side(_strip_markup(text)))
    text = re.sub(r"^(?:approximately|approx\.?|about|around|roughly)\s", "", text, flags=re.IGNORECASE)
    if re.search(r"\b\d{1,3}\s+\d{3}\s*/\s*\d", text):  # "1 250/300": a mixed number, or 1250/300?
        return None
    text = _plain_notation(text)
    sign = _SIGN.match(text)
    found = _VALUE.match(text, sign.end())
    value = _exact(found) if found else None
    if value is None or sign[0].count("-") + sign[0].count("+") > 1 or (value < 0 and "-" in sign[0]):
        return None
    rest = text[found.end() :]
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
        return parse_number(boxes[-1] or "")
    if values := json_values(text, "answer"):
        return parse_number(json_string(values[-1]) or values[-1] or "")
    return _last_line_mark(text)


def is_correct(value: Fraction | None, truth: str) -> bool:
    """Is `value` within +-0.001 of the number in `truth`, the bound included (Appendix A.1.2)? `None` never is."""
    return value is not None and abs(value - parse_number(truth)) <= TOLERANCE


def canonical(value: Fraction) -> str:
    """Exact text of a rational: "42", "-0.125", or "1/3" where decimals don't end. `parse_number` reads it"""
    decimal = Decimal(value.numerator) / value.denominator
    return f"{decimal:f}" if Fraction(decimal) == value else str(value)
