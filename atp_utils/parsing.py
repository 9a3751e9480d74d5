"""From a reply's text to its thinking, its answer, and the option that it chooses or *invalid*.

Invalid is a third outcome: it is counted and shown, and never turned into one of the options.
"""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

_THINKING = re.compile(r"</think>|<think>.*?(?:</think>|\Z)", re.DOTALL | re.IGNORECASE)


def split_thinking(text: str) -> tuple[str, str]:
    """``(thinking, answer)`` of a reply; an unclosed thinking block swallows the rest of the reply.

    All before a closing mark that closes nothing is thinking too: some chat templates open the block in the prompt, and
    Qwen3's takes everything before the mark for thinking when the reply returns in a later prompt. Neither part has
    marks.
    """
    strays = [found.end() for found in _THINKING.finditer(text) if found.group().startswith("</")]
    start = strays[-1] if strays else 0
    thinking = text[:start] + "".join(_THINKING.findall(text[start:]))
    return re.sub(r"</?think>", "", thinking, flags=re.IGNORECASE).strip(), _THINKING.sub("", text[start:]).strip()


def ends_thinking(text: str) -> bool:
    """Whether a reply ends inside a thinking block: it was cut off there, and whatever it said is no answer."""
    return text.lower().rfind("<think>") > text.lower().rfind("</think>")


def answer_json(option: str) -> str:
    """The complete answer that stands for ``option``: what the prompts ask for and `parse_choice` reads."""
    return json.dumps({"choice": option}, ensure_ascii=False)


def parse_choice(text: str, options: Sequence[str]) -> str | None:
    """The option that ``text`` answers with, or None when it is invalid.

    An answer is a JSON object whose ``choice`` is one of ``options``; case and white space around words do
    not matter, nor does what stands around the object (prose, markdown fences). Text inside a thinking block
    is no answer, and a reply that ends inside one has none. Answers that contradict each other make the reply
    invalid: which of them was meant would be our guess. Raises ValueError if two options cannot be told apart.
    """
    names = {_plain(option): option for option in options}
    if len(names) < len(options):
        raise ValueError(f"options {list(options)} differ only in case or white space")
    if ends_thinking(text):
        return None
    _, answer = split_thinking(text)
    found = {names.get(_plain(value)) for value in _choices(answer)}
    return found.pop() if len(found) == 1 else None


def _plain(value: Any) -> str:
    return " ".join(value.split()).casefold() if isinstance(value, str) else ""


def _choices(text: str) -> Iterable[Any]:
    """Every value of a ``choice`` key in the JSON objects of ``text``, nested ones included."""
    decoder = json.JSONDecoder()
    start = text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except (json.JSONDecodeError, RecursionError):
            end = start + 1
        else:
            yield from _nested_choices(value)
        start = text.find("{", end)


def _nested_choices(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if _plain(key) == "choice":
                yield inner
            else:
                yield from _nested_choices(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _nested_choices(inner)
