"""Text that others wrote (models, their code, servers), shown so that it does nothing to what shows it."""

import re
from collections.abc import Mapping, Sequence

# Control characters but for tab and line feed, marks that turn the direction of writing, and lone surrogates.
_ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def inert(text: str) -> str:
    """``text`` with what a terminal or a page would act on spelled out: an escape character becomes ``\\x1b``.

    Line ends become line feeds; all else stays as it is.
    """
    return _ACTING.sub(lambda found: ascii(found[0])[1:-1], text.replace("\r\n", "\n"))


def chat_text(messages: Sequence[Mapping[str, str]]) -> str:
    """A chat as a person reads it, `inert`: each message's role on a line, then what it says."""
    return "\n".join(f"[{message['role']}]\n{inert(message['content'])}\n" for message in messages)
