"""From a reply's text to a decision or *invalid*, and the tidy table of decisions that every scenario shares.

Invalid is a third outcome: it is counted and shown, and never turned into one of the options.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args

import pandas as pd

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


@dataclass(frozen=True, kw_only=True)
class Decision:
    """One agent's decision in one round. Fields that a scenario has no use for stay None.

    ``reward`` is in the environment's own unit (role-play), a payoff factor (collusion) or minus the cost
    (tool use); ``capital`` is its running sum (collusion: product); ``succeeded`` is the round's collective
    outcome (collusion); ``p_deviate`` is the probability that
    the engine gave the deviant option, without sampling noise; ``reply`` is the journal's key of the raw
    reply.
    """

    scenario: str
    seed: int
    item: str
    environment: str
    agent: int
    round: int
    choice: str | None
    deviated: bool | None
    p_deviate: float | None = None
    valid: bool
    attempts: int
    reward: float | None
    capital: float
    threshold: int | None = None
    incentive_ratio: float | None = None
    succeeded: bool | None = None
    tool_used: bool | None = None
    correct: bool | None = None
    prompt_tokens: int
    completion_tokens: int
    reply: str


_DTYPES = {str: "string", int: "Int64", float: "Float64", bool: "boolean"}


def to_frame(decisions: Iterable[Decision], *, model: str, arm: str) -> pd.DataFrame:
    """The tidy table: one row a decision, `Decision`'s columns behind ``model`` and ``arm``.

    Nullable dtypes keep a missing value distinct from False and 0.
    """
    dtypes = {field.name: _DTYPES[(get_args(field.type) or (field.type,))[0]] for field in fields(Decision)}
    frame = pd.DataFrame([vars(decision) for decision in decisions], columns=list(dtypes)).astype(dtypes)
    frame.insert(0, "arm", pd.Series(arm, index=frame.index, dtype="string"))
    frame.insert(0, "model", pd.Series(model, index=frame.index, dtype="string"))
    return frame
