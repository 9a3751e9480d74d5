"""From a chat to the text and the tokens that a model continues, the same for training, scoring and generation.

A model's chat template comes with its tokenizer. What is added here: a fixed date, contents that stay contents, a
system message for templates that have none, and an answer that begins behind the template's own opening.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from datetime import date
from functools import lru_cache
from typing import Any

import jinja2

from atp_utils.evolution.parsing import THINKING, control, defuse, marked_thinking, prompted_thinking
from atp_utils.evolution.requests import DATE, Message

# transformers hands a template its own clock and no function of ours, so that the fixed one is written in Jinja.
_DIRECTIVES = ("%-d", "%-m", "%d", "%e", "%b", "%B", "%m", "%Y", "%y", "%a", "%A", "%j", "%H", "%I", "%M", "%S", "%p")
_CLOCK = "{%- macro strftime_now(format) -%}{{- format" + "".join(
    f"|replace('{each}', '{date(2024, 7, 26).strftime(each)}')" for each in _DIRECTIVES
)
_CLOCK += " -}}{%- endmacro +%}"

# Words that no template writes itself: what stands between them in a rendered chat is the template's.
_SAID = ("Zyxwsystem", "Zyxwuser", "Zyxwassistant", "Zyxwagain")
_PROBE = tuple(
    {"role": role, "content": said} for role, said in zip(("system", "user", "assistant", "user"), _SAID, strict=True)
)
# What is kept of generated special tokens: marks of thinking, and the pieces that some of these are put together from.
_MARKS = [mark for pair in THINKING for mark in pair]
_PIECES = "".join(_MARKS).replace("\\", "") + "<|start|><|end|>"
_MARK = re.compile("|".join(_MARKS), re.IGNORECASE)


def render(tokenizer: Any, messages: Sequence[Message], thinking: bool = False) -> str:
    """A chat as the text that the model continues, special tokens included: tokenise it without adding any.

    The text doesn't depend on the day. Control tokens in a content stay text (`defuse`). Where the template takes no
    system message, it goes in front of the first user's. Without ``thinking`` the text ends where an answer begins,
    behind the opening of an answer's channel where the template has channels.

    Raises ValueError when the template refuses the chat, or when ``thinking`` is off and the template opens a thinking
    block all the same: an option would be scored as a thought.
    """
    template = tokenizer.get_chat_template()
    chat = [{**message, "content": as_text(tokenizer, message["content"])} for message in messages]
    if not _takes_system(tokenizer, template):
        chat = _folded(chat)
    text = _applied(tokenizer, chat, thinking)
    if thinking:
        return text
    if prompted_thinking(text):
        raise ValueError(
            f"{tokenizer.name_or_path}: its chat template can't switch thinking off; "
            "take protocol reason with thinking true, or another model"
        )
    text += _answer_opening(tokenizer, template)
    if "<|channel|>" in template and not text.endswith("<|message|>"):
        raise ValueError(f"{tokenizer.name_or_path}: its chat template has channels, but not where an answer begins")
    return text


def as_text(tokenizer: Any, said: str) -> str:
    """What was ``said`` so that ``tokenizer`` reads no control token in it, nor the template's marks (`defuse`)."""
    return defuse(said, _marks(tokenizer, tokenizer.get_chat_template()))


def as_reply(tokenizer: Any, written: str) -> str:
    """A reply as it is trained on: `as_text` but for the marks of its own thinking, if it has any."""
    thought = marked_thinking(written)
    parts = zip(_MARK.split(thought), [*_MARK.findall(thought), ""], strict=True)
    marked = "".join(as_text(tokenizer, part) + mark for part, mark in parts)
    return marked + as_text(tokenizer, written[len(thought) :])


def tokenised(tokenizer: Any, messages: Sequence[Message], options: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """Token ids of a chat's prompt, and of each option behind it: prompt and option are tokenised as one text.

    A token that holds the prompt's end and an option's beginning belongs to the options, of which each then begins
    with the same end of the prompt.
    """
    prompt = render(tokenizer, messages)
    alone, *joint = (encode(tokenizer, prompt + option) for option in ("", *options))
    start = common_prefix([alone, *joint])
    return alone[:start], [ids[start:] for ids in joint]


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of rendered text, which has its special tokens already."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of generated tokens without special ones; the marks of thinking stay, special or not."""
    special = _special_ids(tokenizer)
    kept = [i for i in ids if i not in special or _marks_thinking(tokenizer.convert_ids_to_tokens(i))]
    return tokenizer.decode(kept, skip_special_tokens=False)


@lru_cache(maxsize=64)
def _special_ids(tokenizer: Any) -> frozenset[int]:
    """Those with a name (``eos_token``) and those that are only marked as special."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(tokenizer.all_special_ids) | {i for i, token in added if token.special}


def _marks_thinking(token: str) -> bool:
    return bool(_MARK.fullmatch(token)) or (len(token) > 2 and token in _PIECES)


def turn_end(tokenizer: Any) -> int:
    """Id of the token that ends an assistant's turn: the first special one that the template writes behind an answer.

    The tokenizer's own end token where it writes none.
    """
    behind = _applied(tokenizer, _PROBE[1:3], False, prompt=False).partition(_SAID[2])[2]
    ends = (token for token in encode(tokenizer, behind) if token in _special_ids(tokenizer))
    return next(ends, tokenizer.eos_token_id)


def fingerprint(tokenizer: Any) -> str:
    """SHA-256 (hexadecimal) of the template and of what it makes of a chat, the fixed date included."""
    template = tokenizer.get_chat_template()
    chat = _PROBE if _takes_system(tokenizer, template) else _folded(_PROBE)
    text = json.dumps([template, DATE, _applied(tokenizer, chat, True)])
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the beginning that all sequences share."""
    return len(os.path.commonprefix([list(sequence) for sequence in sequences]))


def _applied(tokenizer: Any, chat: Sequence[Message], thinking: bool, prompt: bool = True) -> str:
    template = tokenizer.get_chat_template()
    settings = {"tokenize": False, "add_generation_prompt": prompt, "enable_thinking": thinking, "date_string": DATE}
    clock = _CLOCK if "strftime_now" in template else ""
    try:
        return tokenizer.apply_chat_template(list(chat), chat_template=clock + template, **settings)
    except jinja2.TemplateError as error:
        raise ValueError(f"{tokenizer.name_or_path}: its chat template refuses the chat: {error}") from error


@lru_cache(maxsize=64)
def _takes_system(tokenizer: Any, template: str) -> bool:
    """Whether a system message is in the rendered text; some templates raise (Gemma), some leave it out."""
    try:
        return _SAID[0] in _applied(tokenizer, _PROBE[:2], False)
    except ValueError:
        return False


def _folded(chat: Sequence[Message]) -> list[Message]:
    if chat[0]["role"] != "system" or len(chat) < 2:
        return list(chat)
    return [{**chat[1], "content": f"{chat[0]['content']}\n\n{chat[1]['content']}"}, *chat[2:]]


@lru_cache(maxsize=64)
def _marks(tokenizer: Any, template: str) -> frozenset[str]:
    """What a content must not hold: added tokens, and what the template writes around contents to tell roles apart."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    # A plain word is no mark without what surrounds it, and one character can't be broken up.
    added = frozenset(mark for mark in added if len(mark) > 1 and re.search(r"[^\w\s▁]", mark))
    chat = _PROBE if _takes_system(tokenizer, template) else _folded(_PROBE)
    text = _applied(tokenizer, chat, False)
    if not all(said in text for said in _SAID):
        raise ValueError(f"{tokenizer.name_or_path}: its chat template leaves out what is said; take a text model")
    known = re.compile(rf"{control(added).pattern}|\n")
    before, *between = ([part.strip() for part in known.split(gap)] for gap in re.split("|".join(_SAID), text))
    # In front of the first content may stand a system message of the template's own: only its end is a mark.
    written = set([part for part in before if part][-1:]).union(*between)
    return added | {mark for mark in written if len(mark) > 2 and re.search(r"[^\w\s]", mark)}


@lru_cache(maxsize=64)
def _answer_opening(tokenizer: Any, template: str) -> str:
    """What the template writes between the prompt's end and an answer without thinking: a channel's opening."""
    prompt = _applied(tokenizer, _PROBE[1:2], False)
    answered = _applied(tokenizer, _PROBE[1:3], False, prompt=False)
    between = answered.removeprefix(prompt).partition(_SAID[2])[0] if answered.startswith(prompt) else ""
    return between if between.strip() else ""
