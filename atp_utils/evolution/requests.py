"""What an episode asks of a language model, what it gets back, and what every engine offers.

An engine has an ``identity`` (model, adapter, precision, code: everything but the request that a reply depends on)
and ``answer(requests)``, which yields ``(index, reply)`` as replies arrive, in any order, each index once.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Protocol

Message = dict[str, str]
# The day on which every chat takes place: the default of Llama 3.1's chat template, whose later ones take today's.
DATE = "26 Jul 2024"


def derive_seed(*keys: str | int) -> int:
    """A 63-bit seed from stable keys by SHA-256: independent of batch order, interpreter and machine."""
    return int.from_bytes(hashlib.sha256(json.dumps(keys).encode()).digest()[:8]) >> 1


@dataclass(frozen=True)
class Sampling:
    """How free text is drawn: at most ``max_new_tokens`` tokens; ``top_k`` 0 and ``top_p`` 1 switch these off."""

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    thinking: bool = True

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature <= 10:
            raise ValueError(f"temperature must lie in [0, 10], got {self.temperature}")
        if not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(f"top_p must lie in (0, 1] and top_k be >= 0, got {self.top_p} and {self.top_k}")


@dataclass(frozen=True)
class Request:
    """A chat to be answered: by one of ``options`` (complete answers, each scored whole), else by free text.

    ``key`` names the decision for people (``role_play/test/baker-0/seed0/agent0/round3/attempt0``); ``seed``
    is derived from it. ``extended``: whether a later chat may go on from this one, whose keys and values are then worth
    keeping; no reply depends on it.
    """

    key: str
    messages: Sequence[Message]
    seed: int
    options: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    extended: bool = field(default=True, compare=False)

    def form(self) -> dict:
        """How the chat is to be answered: the options, or how text is sampled."""
        return {"options": list(self.options)} if self.options else {"sampling": asdict(self.sampling)}

    @cached_property
    def content(self) -> str:
        """All that a reply's distribution depends on; requests of equal content share one forward pass."""
        return json.dumps({"messages": list(self.messages), **self.form()}, ensure_ascii=False)

    def digest(self, identity: str) -> str:
        """Content address of the reply in the journal (hex, 32 characters)."""
        text = "\n".join([identity, self.key, str(self.seed), self.content])
        # A reply in the history may hold a lone surrogate, which a server's JSON can spell and UTF-8 can't.
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


@dataclass(frozen=True)
class Reply:
    """A raw reply. To a forced choice ``logprobs`` holds log P(option | chat) in the request's order, where known.

    ``shared`` is the part of these that all options have in common: log P of their first tokens, such as
    ``{"choice": "``; None where it isn't known. ``text`` is what was written, if anything was. ``digest`` is the key in
    the journal, "" until it is there. Raises ValueError for a field of another kind: replies come from
    servers and files, and one that was kept would fail the run at every replay.
    """

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str = "stop"
    logprobs: tuple[float, ...] | None = None
    shared: float | None = None
    digest: str = ""

    def __post_init__(self):
        scores = [*(self.logprobs or ()), self.shared or 0.0]
        counts = (self.prompt_tokens, self.completion_tokens)
        texts = (self.text, self.finish_reason, self.digest)
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("a reply's text and finish reason must be text")
        if not all(isinstance(count, int) and count >= 0 for count in counts):
            raise ValueError("a reply's counts of tokens must be whole numbers from 0 up")
        if not all(isinstance(score, int | float) for score in scores):
            raise ValueError("a reply's log-probabilities must be numbers")


class Engine(Protocol):
    """Anything that answers chats; see the module's docstring."""

    identity: str

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]: ...


def collapse(requests: Sequence[Request]) -> list[list[int]]:
    """Indices of the requests, grouped so that each group needs one answer of the model.

    Forced choices of equal content share their log-probabilities; free text is drawn by the model itself, so there
    the seed must agree too.
    """
    groups: dict[tuple, list[int]] = {}
    for index, request in enumerate(requests):
        key = (request.content, None if request.options else request.seed)
        groups.setdefault(key, []).append(index)
    return list(groups.values())
