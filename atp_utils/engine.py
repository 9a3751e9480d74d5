"""What an episode asks of a language model, what it gets back, and the engines' common ground.

An engine has an ``identity`` (model, adapter, precision, code: everything but the request that a reply depends on)
and ``answer(requests)``, which yields ``(index, reply)`` as replies arrive, in any order, each index once.
"""

import hashlib
import json
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Protocol

Message = dict[str, str]

# The marks of turns, tools and thinking that common chat formats have.
_CONTROL = (
    r"<\|[^<>\s]{1,60}>|<[^<>\s]{1,60}\|>|<｜[^<>\s]{1,60}｜>",
    r"</?s>|<(?:bos|eos|pad|unk|mask)>|<</?SYS>>|<(?:start|end)_of_\w+>",
    r"\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_\w+|ARGS|CALL_ID|THINK)\]",
    r"</?(?:think|thinking|thoughts?|reason|reasoning|reflection|tool_call|tool_response|\w{1,20}:think|longcat_think)>",
)

# The default of Llama 3.1's chat template. Later ones of the family take today's date unless one is given.
DATE = "26 Jul 2024"


def derive_seed(*keys: str | int) -> int:
    """A 63-bit seed from stable keys by SHA-256: independent of batch order, interpreter and machine."""
    return int.from_bytes(hashlib.sha256(json.dumps(keys).encode()).digest()[:8]) >> 1


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
    """A chat to be answered: by one of ``options`` (complete answers, scored whole), else by free text.

    ``key`` names the decision for people (``role_play/test/baker-0/seed0/agent0/round3/attempt0``); ``seed``
    is derived from it.
    """

    key: str
    messages: Sequence[Message]
    seed: int
    options: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)

    def content(self) -> str:
        """All that a reply's distribution depends on; requests of equal content share one forward pass."""
        asked = {"options": self.options} if self.options else {"sampling": asdict(self.sampling)}
        return json.dumps({"messages": list(self.messages), **asked}, ensure_ascii=False)

    def digest(self, identity: str) -> str:
        """Content address of the reply in the journal (hex, 32 characters)."""
        text = "\n".join([identity, self.key, str(self.seed), self.content()])
        # A reply in the history may hold a lone surrogate, which a server's JSON can spell and UTF-8 can't.
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


@dataclass(frozen=True)
class Reply:
    """A raw reply. For a forced choice ``logprobs`` holds log P(option | chat) in the request's order."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str = "stop"
    logprobs: tuple[float, ...] | None = None


class Engine(Protocol):
    """Anything that answers chats; see the module's docstring."""

    identity: str

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]: ...


def normalise(logprobs: Sequence[float]) -> list[float]:
    """Probabilities of the options among themselves (a softmax); raises ValueError where none is possible."""
    top = max(logprobs)
    if not math.isfinite(top):
        raise ValueError(f"no option has a finite log-probability: {list(logprobs)}")
    weights = [math.exp(value - top) for value in logprobs]
    return [weight / sum(weights) for weight in weights]


def draw(logprobs: Sequence[float], seed: int) -> int:
    """Index of the option drawn from the normalised probabilities by the request's own seed."""
    point, total = random.Random(seed).random(), 0.0
    probabilities = normalise(logprobs)
    for index, probability in enumerate(probabilities):
        total += probability
        if point < total:
            return index
    return max(range(len(probabilities)), key=probabilities.__getitem__)


def drawn(request: Request, outcome: Reply) -> Reply:
    """``outcome`` with the option that ``request``'s own seed draws as its text; as it is without log-probabilities."""
    if outcome.logprobs is None:
        return outcome
    return replace(outcome, text=request.options[draw(outcome.logprobs, request.seed)])


def collapse(requests: Sequence[Request]) -> list[list[int]]:
    """Indices of the requests, grouped so that each group needs one answer of the model.

    Forced choices of equal content share a forward pass and draw separately; free text is drawn by the
    model itself, so there the seed must agree too.
    """
    groups: dict[tuple, list[int]] = {}
    for index, request in enumerate(requests):
        key = (request.content(), None if request.options else request.seed)
        groups.setdefault(key, []).append(index)
    return list(groups.values())


class ScriptedEngine:
    """Answers by a known rule: for tests worked out by hand and as a control in the theory.

    ``rule(request)`` returns the reply's text, or for a forced choice the options' probabilities.
    ``answered`` counts the requests of different content, as a model would pay for them.
    """

    def __init__(self, rule: Callable[[Request], str | Sequence[float]], identity: str = "scripted"):
        self.rule, self.identity, self.answered = rule, identity, 0

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        for group in collapse(requests):
            self.answered += 1
            for index in group:
                yield index, self._reply(requests[index])

    def _reply(self, request: Request) -> Reply:
        outcome = self.rule(request)
        if isinstance(outcome, str):
            return Reply(text=outcome)
        logprobs = tuple(math.log(p) if p > 0 else -math.inf for p in outcome)
        return Reply(text=request.options[draw(logprobs, request.seed)], logprobs=logprobs)
