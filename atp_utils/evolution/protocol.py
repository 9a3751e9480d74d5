"""How a decision is taken from a model: the two protocols, one sub-generator for every scenario.

- ``choose``: the engine scores the complete JSON answer of every option, with the options named in either order; one is
  drawn from the mean of the two normalised probabilities by the request's seed. P(deviate) is recorded, so its mean
  has no sampling noise, and what the model owes to the place of an option is told apart from what it prefers.
- ``reason``: the model writes freely, thinking included, and ends with the JSON answer (the paper's protocol).
  An invalid reply is asked again, with a new seed, up to ``max_attempts``; then the decision is invalid.
"""

import math
import random
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from atp_utils.evolution.parsing import answer_json, parse_choice, split_thinking
from atp_utils.evolution.requests import Message, Reply, Request, Sampling, derive_seed

Name = Literal["choose", "reason"]
# Why a decision is invalid: no readable answer, cut off by the token limit, or a chat too long for the model.
FAULTS = ("unreadable", "cut", "context")


@dataclass(frozen=True)
class Protocol:
    """Protocol ``name``, the attempts before a ``reason`` decision is invalid, how text is sampled and its choice read.

    ``keep_thinking``: whether an agent finds the thinking of its earlier replies in its chat, and a trained text has
    it; by default only the answers. ``opened``: whether scored answers count as opened for the model: what all options
    begin with is given.
    """

    name: Name = "choose"
    max_attempts: int = 3
    sampling: Sampling = field(default_factory=Sampling)
    keep_thinking: bool = False
    opened: bool = True
    parse: Callable[[str, Sequence[str]], str | None] = parse_choice

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

    def ask(self, key: Sequence[str | int], messages: Sequence[Message]) -> Request:
        """The request for a free reply to ``messages``; the parts of its ``key`` give it its seed."""
        return Request("/".join(map(str, key)), tuple(messages), derive_seed(*key), sampling=self.sampling)

    def instruction(self, options: Sequence[str]) -> str:
        """The end of a prompt: in which form to answer, the options in the order in which they were named."""
        forms = " or ".join(answer_json(option) for option in options)
        if self.name == "choose":
            return f"Answer in JSON: {forms}"
        return f"Think it through in a few sentences, then end with your answer in JSON: {forms}"


@dataclass(frozen=True)
class Question:
    """One decision to be taken: ``key`` names it, ``messages`` lead up to it and name ``options`` in their order.

    ``turned`` is the same chat but for its last question, which names the options in the other order.
    """

    key: tuple[str | int, ...]
    messages: Sequence[Message]
    options: tuple[str, ...]
    turned: Sequence[Message] | None = None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What came of a question. ``option`` is None when invalid, and ``fault`` says why (`FAULTS`).

    ``options`` are in the order in which the chat that goes on names them. ``by_place`` holds each option's probability
    where it is named first, and where it is named second; ``probabilities`` are the means of these two, and ``mass`` is
    the probability of all options together, on which they condition. ``said`` is the reply without its thinking,
    ``turn`` what enters the agent's own chat (`Protocol.turn`); ``replies`` are the journal's keys of all replies that
    were paid for it, in either order, ``decided`` that of the one that decides.
    """

    option: str | None
    options: tuple[str, ...] = ()
    said: str = ""
    turn: str = ""
    probabilities: tuple[float, ...] | None = None
    by_place: tuple[tuple[float, float], ...] | None = None
    mass: float | None = None
    attempts: int = 1
    prompt_tokens: int = 0
    completion_tokens: int = 0
    replies: tuple[str, ...] = ()
    decided: str = ""
    fault: str | None = None

    def counting(self, reply: Reply) -> "Choice":
        """This choice, resting on one more reply."""
        return replace(
            self,
            prompt_tokens=self.prompt_tokens + reply.prompt_tokens,
            completion_tokens=self.completion_tokens + reply.completion_tokens,
            replies=(*self.replies, reply.digest),
        )


def orders(rounds: int, *key: str | int) -> list[bool]:
    """Whether the options are turned in the history of each round: in half of the rounds, drawn by ``key``."""
    rng = random.Random(derive_seed("orders", *key))
    first = rng.randrange(2)
    drawn = [(number + first) % 2 == 1 for number in range(rounds)]
    rng.shuffle(drawn)
    return drawn


def question(
    key: tuple[str | int, ...], options: tuple[str, ...], chat: Callable[[bool], Sequence[Message]], turned: bool
) -> Question:
    """The question whose ``chat`` names ``options`` in their order, or ``turned``; that order enters the history."""
    return Question(key, chat(turned), options[::-1] if turned else options, chat(not turned))


def decide(questions: Sequence[Question], protocol: Protocol) -> Generator[list[Request], list, list[Choice]]:
    """Ask all ``questions`` at once, unreadable ones again; to be used by episodes with ``yield from``.

    A chat that is too long for the model is not asked again. Token counts add up over orders and attempts.
    """
    if protocol.name == "choose":
        asked = [_both_orders(question, protocol) for question in questions]
        replies = iter((yield [request for requests in asked for request in requests]))
        return [
            _scored(question, requests, [next(replies) for _ in requests], protocol)
            for question, requests in zip(questions, asked, strict=True)
        ]
    choices: dict[int, Choice] = {}
    pending = list(range(len(questions)))
    for attempt in range(protocol.max_attempts):
        replies = yield [_request(questions[number], protocol, attempt) for number in pending]
        for number, reply in zip(pending, replies, strict=True):
            choices[number] = _written(questions[number], reply, protocol, choices.get(number))
        pending = [number for number in pending if choices[number].fault not in (None, "context")]
        if not pending:
            break
    return [choices[number] for number in range(len(questions))]


def _request(question: Question, protocol: Protocol, attempt: int) -> Request:
    return protocol.ask((*question.key, f"attempt{attempt}"), question.messages)


def _both_orders(question: Question, protocol: Protocol) -> list[Request]:
    answers = tuple(map(answer_json, question.options))
    asked = replace(_request(question, protocol, 0), options=answers)
    if question.turned is None:
        return [asked]
    # Histories go on in the first order alone.
    return [asked, replace(asked, messages=tuple(question.turned), options=answers[::-1], extended=False)]


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


def _scored(question: Question, requests: Sequence[Request], replies: Sequence[Reply], protocol: Protocol) -> Choice:
    """The choice of a forced question from its replies in either order, or in the one that was asked.

    Servers that can't score give an answer that was drawn. Where a reply is of that kind the history's order decides,
    by its text or its scores, and there are no probabilities: one order's would hold what is owed to the place.
    """
    scored = [reply for reply in replies if reply.logprobs is not None]
    lost = next((reply for reply in replies if reply.logprobs is None), None)
    # A chat that is too long in one of its orders decides nothing.
    if lost is not None and (lost is replies[0] or fault_of(lost) == "context"):
        return replace(_written(question, lost, protocol, None), **_paid(replies))
    named = [normalise(reply.logprobs) for reply in scored]
    turned = named[-1][::-1] if len(named) > 1 else named[0]
    probabilities = tuple((one + other) / 2 for one, other in zip(named[0], turned, strict=True))
    shared = [reply.shared if protocol.opened and reply.shared is not None else 0.0 for reply in scored]
    masses = [
        sum(math.exp(value - given) for value in reply.logprobs) for reply, given in zip(scored, shared, strict=True)
    ]
    option = question.options[draw(probabilities, requests[0].seed)]
    return Choice(
        option=option,
        options=question.options,
        said=answer_json(option),
        turn=protocol.turn("", answer_json(option)),
        probabilities=probabilities if lost is None else None,
        by_place=((named[0][0], turned[0]), (turned[1], named[0][1])) if len(named) > 1 else None,
        mass=sum(masses) / len(masses),
        **_paid(replies),
        decided=replies[0].digest,
    )


def _paid(replies: Sequence[Reply]) -> dict[str, Any]:
    tokens = {name: sum(getattr(reply, name) for reply in replies) for name in ("prompt_tokens", "completion_tokens")}
    return tokens | {"replies": tuple(reply.digest for reply in replies)}


def _written(question: Question, reply: Reply, protocol: Protocol, before: Choice | None) -> Choice:
    option = protocol.parse(reply.text, question.options)
    thinking, said = split_thinking(reply.text)
    before = before or Choice(option=None, options=question.options, attempts=0)
    return replace(
        before.counting(reply),
        option=option,
        said=said,
        turn=protocol.turn(thinking, said),
        attempts=1 + before.attempts,
        decided=reply.digest,
        fault=fault_of(reply) if option is None else None,
    )
