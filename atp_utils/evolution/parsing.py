"""From a reply's text to its thinking, its answer, and the option that it chooses or *invalid*.

Invalid is a third outcome: it is counted and shown, and never turned into one of the options.
"""

import json
import re
import textwrap
from collections.abc import Sequence
from functools import cache
from typing import Any

_TAGS = ("think", "thinking", "thought", "thoughts", "reason", "reasoning", "reflection")
_TAGS += ("seed:think", "mm:think", "longcat_think")  # Seed-OSS, MiniMax M3, LongCat
# What opens and what closes a block of thinking, as chat templates write it; Hunyuan's tags carry a suffix.
THINKING = (
    *((rf"<{tag}(?::\w+)?\s?>", rf"</{tag}(?::\w+)?\s?>") for tag in _TAGS),
    (r"\[THINK\]", r"\[/THINK\]"),  # Mistral
    (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),
    (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),  # Cohere
    (r"<\|inner_prefix\|>", r"<\|inner_suffix\|>"),  # Apertus
    (r"<\|open\|>\s?think\s?<\|sep\|>", r"<\|close\|>\s?think\s?<\|sep\|>"),  # Kimi K3
    (r"◁think▷", r"◁/think▷"),  # Kimi VL
    (r"\[unused16\]", r"\[unused17\]"),  # Pangu
    (r"<\|channel>(?:thought\b)?", r"<channel\|>"),  # Gemma 4
    # Harmony (gpt-oss): what isn't in the final channel is no answer.
    (
        r"<\|channel\|>(?!\s*final\b)(?:[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>)?",
        r"<\|channel\|>\s*final\b[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>",
    ),
)
TOOL = (r"<tool\s?>", r"</tool\s?>")
_TAG = re.compile(r"<(/?)tool\s?>", re.IGNORECASE)
_FENCE = re.compile(r"\s*```\w*[ \t]*\n(.*?)\n?[ \t]*```\s*", re.DOTALL)
# Around messages and answers, these mark nothing that matters here.
_FRAME = r"<\|start\|>assistant|<\|(?:end|return|call)\|>|<\|(?:START|END)_(?:RESPONSE|TEXT)\|>"

# The marks of turns, tools and thinking that common chat formats have; none has a zero-width space (`defuse`).
_CONTROL = (
    r"<\|[^<>\s\u200b]{1,60}>|<[^<>\s\u200b]{1,60}\|>|<｜[^<>\s\u200b]{1,60}｜>",
    r"</?s>|<(?:bos|eos|pad|unk|mask)>|<</?SYS>>|<(?:start|end)_of_\w+>",
    r"\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_\w+|ARGS|CALL_ID|THINK)\]",
    r"</?(?:think|thinking|thoughts?|reason|reasoning|reflection|tool_call|tool_response|\w{1,20}:think|longcat_think)>",
)


def encodable(text: str) -> str:
    """``text`` with ``?`` for lone surrogates, which a server's JSON or a tool's output may hold and no file can."""
    return text.encode("utf-8", "replace").decode()


def defuse(text: str, marks: frozenset[str] = frozenset()) -> str:
    """``text`` in which no control token can be read as one: a zero-width space stands behind its first character.

    Those of common chat formats and ``marks``. Text that is defused already, or holds no mark, comes back as it is.
    """
    pattern, before = control(marks), None
    # Again, because a mark may lie inside another.
    while text != before:
        before, text = text, pattern.sub(lambda found: f"{found[0][0]}\u200b{found[0][1:]}", text)
    return text


@cache
def control(marks: frozenset[str]) -> re.Pattern[str]:
    """Any of ``marks`` or of the control tokens of common chat formats."""
    return re.compile("|".join([*map(re.escape, sorted(marks, key=len, reverse=True)), *_CONTROL]))


def _pattern(*pairs: tuple[str, str]) -> re.Pattern[str]:
    roles = [f"(?P<opens{i}>{opens})|(?P<closes{i}>{closes})" for i, (opens, closes) in enumerate(pairs)]
    # The look ahead only saves time where a text is full of brackets.
    return re.compile(
        rf"(?=</?(?:t[ho]|re|se|mm|lo)|<\|[bceiors]|<c|◁/?th|\[/?(?:th|un))(?:{'|'.join(roles)}|{_FRAME})",
        re.IGNORECASE,
    )


_MARKS, _MARKS_AND_TOOLS = _pattern(*THINKING), _pattern(*THINKING, TOOL)
_PROMPTED = re.compile(rf"(?:{'|'.join(opens for opens, _ in THINKING)})\s*\Z", re.IGNORECASE)


def divide(text: str, tools: bool = False) -> tuple[list[str], list[str], bool]:
    """``(hidden, said, open)``: the parts of a reply inside and outside of thinking, without marks, in order.

    An unclosed block swallows the rest, and the reply ends ``open``: it was cut off in its thoughts. Within a block,
    other marks have no meaning. All before a closing mark that closes nothing is thinking too: some chat templates open
    the block in the prompt, and Qwen3's takes everything before the mark for thinking when the reply returns in a later
    prompt. With ``tools``, what stands in ``<tool>`` tags is hidden as well; their stray closing ones mean nothing.
    """
    parts, inside, start, thought = [], "", 0, 0
    for mark in (_MARKS_AND_TOOLS if tools else _MARKS).finditer(text):
        parts.append((inside, text[start : mark.start()]))
        start = mark.end()
        role = mark.lastgroup or ""
        if role.startswith("opens"):
            inside = inside or role[5:]
        elif role and inside in ("", role[6:]):
            if not inside and role != f"closes{len(THINKING)}":
                thought = len(parts)
            inside = ""
    parts.append((inside, text[start:]))
    hidden = [part for place, (block, part) in enumerate(parts) if block or place < thought]
    return hidden, [part for block, part in parts[thought:] if not block], bool(inside)


def tool_blocks(text: str) -> tuple[list[tuple[str, int]], list[str]]:
    """(code, end) of every well-formed ``<tool>`` block of visible text, and the names of the faults."""
    blocks, faults = [], []
    depth, start, nested = 0, 0, False
    for tag in _TAG.finditer(text):
        if not tag[1]:
            start, nested = (start, True) if depth else (tag.end(), False)
            depth += 1
        elif depth == 0:
            faults.append("stray closing tag")
        elif depth == 1:
            depth = 0
            code = _code(text[start : tag.start()])
            if nested or not code:
                faults.append("nested tags" if nested else "empty call")
            else:
                blocks.append((code, tag.end()))
        else:
            depth -= 1
    if depth:
        faults.append("unclosed tag")
    return blocks, faults


def _code(block: str) -> str:
    """The Python of a block: a Markdown fence around it and a common indentation are wrapping."""
    fence = _FENCE.fullmatch(block)
    return textwrap.dedent(fence[1] if fence else block).strip()


def split_thinking(text: str) -> tuple[str, str]:
    """``(thinking, answer)`` of a reply (see `divide`); neither has marks of thinking."""
    hidden, said, _ = divide(text)
    return "".join(hidden).strip(), "".join(said).strip()


def marked_thinking(text: str) -> str:
    """What stands in front of a reply's answer: its thinking with its marks; "" where there is none."""
    return text[: max(text.rfind(split_thinking(text)[1]), 0)]


def ends_thinking(text: str) -> bool:
    """Whether a reply ends inside a thinking block: it was cut off there, and whatever it said is no answer."""
    return divide(text)[2]


def prompted_thinking(prompt: str) -> str:
    """The mark of thinking that a rendered prompt ends with and the reply therefore lacks; as a rule ""."""
    found = _PROMPTED.search(prompt[-200:])
    return found[0].strip() if found else ""


def answer_json(option: str) -> str:
    """The complete answer that stands for ``option``: what the prompts ask for and `parse_choice` reads."""
    return json.dumps({"choice": option}, ensure_ascii=False)


_STRING = r'"(?>(?:[^"\\]|\\.)*)"'
_VALUE = re.compile(rf"({_STRING}|[-+./\w]++)\s*+(?:\}}|,\s*+(?:\}}|{_STRING}\s*+:))", re.DOTALL)


def json_values(text: str, key: str) -> list[str | None]:
    """What the JSON objects in ``text`` say of ``key``, in order: a string in its quotes, or a bare word or number.

    ``key`` counts in any case and at any depth. None stands for a value of another kind, and for one that isn't whole:
    behind it the object must close or go on with a key, and some object must close. So a comma in front of the closing
    brace is forgiven, as is anything elsewhere in the object. A place left open (``...``, ``<...>``) says nothing: it
    is an echo of the instruction. Linear in the text's length.
    """
    start, end = text.find("{"), text.rfind("}")
    mark = re.compile(rf'[{{,]\s*"\s*{key}\s*"\s*:\s*+(?!\.\.|…|<)', re.IGNORECASE)
    marks = mark.finditer(text, start) if start >= 0 else ()
    values = [_VALUE.match(text, found.end()) for found in marks]
    return [value[1] if value and value.end() <= end + 1 else None for value in values]


def json_string(value: str | None) -> str | None:
    """The text of a string that `json_values` found; None for anything else, a bad escape included."""
    try:
        return json.loads(value, strict=False) if value and value.startswith('"') else None
    except ValueError:
        return None


def parse_choice(text: str, options: Sequence[str]) -> str | None:
    """The option that ``text`` answers with, or None when it is invalid.

    An answer is a JSON object whose ``choice`` is one of ``options`` (`json_values`); case and white space around words
    do not matter, nor does what stands around the object (prose, markdown fences). Text inside a thinking block
    is no answer, and a reply that ends inside one has none. Answers that contradict each other make the reply
    invalid: which of them was meant would be our guess. Raises ValueError if two options cannot be told apart.
    """
    names = {_plain(option): option for option in options}
    if len(names) < len(options):
        raise ValueError(f"options {list(options)} differ only in case or white space")
    _, said, cut = divide(text)
    found = {names.get(_plain(json_string(value))) for value in json_values("".join(said), "choice")}
    return found.pop() if len(found) == 1 and not cut else None


def _plain(value: Any) -> str:
    return " ".join(value.split()).casefold() if isinstance(value, str) else ""
