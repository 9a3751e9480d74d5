"""How a decision is taken from a model: the two protocols, one sub-generator for every scenario.

- ``choose``: the engine scores the complete JSON answer of every option, and one is drawn from the normalised
  probabilities by the request's seed. P(deviate) is recorded, so its mean has no sampling noise.
- ``reason``: the model writes freely, thinking included, and ends with the JSON answer (the paper's protocol).
  An invalid reply is asked again, with a new seed, up to ``max_attempts``; then the decision is invalid.
"""

import math
import random
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from atp_utils.evolution.parsing import answer_json, parse_choice, split_thinking
from atp_utils.evolution.requests import Message, Reply, Request, Sampling, derive_seed

Name = Literal["choose", "reason"]
# Why a decision is invalid: no readable answer, cut off by the token limit, or a chat too long for the model.
FAULTS = ("unreadable", "cut", "context")


@dataclass(frozen=True)
class Protocol:
    """Protocol ``name``, the attempts before a ``reason`` decision is invalid, and how text is sampled.

    ``keep_thinking``: whether an agent finds the thinking of its earlier replies in its chat; by default only the
    answers. ``opened``: whether scored answers count as opened for the model: what all options begin with is given.
    """

    name: Name = "choose"
    max_attempts: int = 3
    sampling: Sampling = field(default_factory=Sampling)
    keep_thinking: bool = False
    opened: bool = True

    def __post_init__(self):
        if self.name not in get_args(Name):
            raise ValueError(f"protocol must be one of {', '.join(get_args(Name))}, got {self.name!r}")
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts must be at least 1, got {self.max_attempts}")

    def turn(self, thinking: str, said: str) -> str:
        """A reply as its author's own earlier message.

        Kept thinking stands there as plain words: chat templates such as Qwen3's delete it where it is marked.
        """
        return f"{thinking}\n\n{said}" if self.keep_thinking and thinking else said

    def instruction(self, options: Sequence[str]) -> str:
        """The end of a prompt: in which form to answer, the options in the order in which they were named."""
        forms = " or ".join(answer_json(option) for option in options)
        if self.name == "choose":
            return f"Answer in JSON: {forms}"
        return f"Think it through in a few sentences, then end with your answer in JSON: {forms}"


@dataclass(frozen=True)
class Question:
    """One decision to be taken: ``key`` names it, ``messages`` lead up to it, ``options`` can be chosen."""

    key: tuple[str | int, ...]
    messages: Sequence[Message]
    options: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What came of a question. ``option`` is None when invalid, and ``fault`` says why (`FAULTS`).

    ``mass`` is the probability of all options together, on which ``probabilities`` condition. ``said`` is the reply
    without its thinking, ``turn`` what enters the agent's own chat (`Protocol.turn`); ``replies`` are the journal's
    keys of all replies it rests on, ``decided`` that of the one that decides.
    """

    option: str | None
    said: str = ""
    turn: str = ""
    probabilities: tuple[float, ...] | None = None
    mass: float | None = None
    attempts: int = 1
    prompt_tokens: int = 0
    completion_tokens: int = 0
    replies: tuple[str, ...] = ()
    decided: str = ""
    fault: str | None = None


def decide(questions: Sequence[Question], protocol: Protocol) -> Generator[list[Request], list, list[Choice]]:
    """Ask all ``questions`` at once, the invalid ones again; to be used by episodes with ``yield from``.

    A chat that is too long for the model is not asked again. Token counts add up over the attempts.
    """
    choices: dict[int, Choice] = {}
    pending = list(range(len(questions)))
    for attempt in range(1 if protocol.name == "choose" else protocol.max_attempts):
        requests = [_request(questions[number], protocol, attempt) for number in pending]
        replies = yield requests
        for number, request, reply in zip(pending, requests, replies, strict=True):
            choices[number] = _choice(questions[number], request, reply, protocol, choices.get(number))
        pending = [number for number in pending if choices[number].fault not in (None, "context")]
        if not pending:
            break
    return [choices[number] for number in range(len(questions))]


def _request(question: Question, protocol: Protocol, attempt: int) -> Request:
    key = (*question.key, f"attempt{attempt}")
    forced = tuple(map(answer_json, question.options)) if protocol.name == "choose" else ()
    return Request("/".join(map(str, key)), tuple(question.messages), derive_seed(*key), forced, protocol.sampling)


def normalise(logprobs: Sequence[float]) -> tuple[float, ...]:
    """Probabilities of the options among themselves (a softmax); raises ValueError where none is possible."""
    top = max(logprobs)
    if not math.isfinite(top):
        raise ValueError(f"no option has a finite log-probability: {list(logprobs)}")
    weights = [math.exp(value - top) for value in logprobs]
    return tuple(weight / sum(weights) for weight in weights)


def draw(probabilities: Sequence[float], seed: int) -> int:
    """Index of the option drawn by a request's own seed."""
    point, total = random.Random(seed).random(), 0.0
    for index, probability in enumerate(probabilities):
        total += probability
        if point < total:
            return index
    return max(range(len(probabilities)), key=probabilities.__getitem__)


def fault_of(reply: Reply) -> str:
    """Why a reply without a decision has none, one of `FAULTS`."""
    return {"length": "cut", "context": "context"}.get(reply.finish_reason.removeprefix("sampled:"), "unreadable")


def _choice(question: Question, request: Request, reply: Reply, protocol: Protocol, before: Choice | None) -> Choice:
    if reply.logprobs is None:
        probabilities, mass, option = None, None, parse_choice(reply.text, question.options)
        thinking, said = split_thinking(reply.text)
    else:
        probabilities = normalise(reply.logprobs)
        given = reply.shared if protocol.opened and reply.shared is not None else 0.0
        mass = sum(math.exp(logprob - given) for logprob in reply.logprobs)
        option = question.options[draw(probabilities, request.seed)]
        thinking, said = "", answer_json(option)
    before = before or Choice(option=None, attempts=0)
    return Choice(
        option=option,
        said=said,
        turn=protocol.turn(thinking, said),
        probabilities=probabilities,
        mass=mass,
        attempts=1 + before.attempts,
        prompt_tokens=reply.prompt_tokens + before.prompt_tokens,
        completion_tokens=reply.completion_tokens + before.completion_tokens,
        replies=(*before.replies, reply.digest),
        decided=reply.digest,
        fault=fault_of(reply) if option is None else None,
    )
