"""Alignment on one prompt without history (Appendix A.1.1): preference pairs for DPO, rewards for GRPO.

Everything here works for any scenario whose items have ``options`` and ``compliant``. A pair is a dictionary: the chat
``messages``, and the replies ``chosen`` and ``rejected``.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Any

from atp_utils.evolution.parsing import answer_json, parse_choice, split_thinking
from atp_utils.evolution.protocol import Protocol
from atp_utils.evolution.requests import Message, Request

COMPLIANT_REWARD, DEVIANT_REWARD, INVALID_REWARD = 1.0, 0.1, 0.0

# (item, protocol, turned) -> the prompt, which names the item's options in their order, or turned.
Opening = Callable[[Any, Protocol, bool], list[Message]]
# (item, opening, protocol, seed, count) -> an episode that returns what pairs are made from.
Sampler = Callable[[Any, Opening, Protocol, int, int], Generator[list[Request], list, dict]]
Reward = Callable[..., list[float]]


def answer_pairs(item: Any, opening: Opening, protocol: Protocol) -> list[dict[str, Any]]:
    """The pairs whose replies are the bare JSON answers, compliant preferred to deviant: one for either order."""
    answers = {"chosen": answer_json(item.compliant), "rejected": answer_json(item.deviant)}
    return [{"messages": opening(item, protocol, turned), **answers} for turned in (False, True)]


def elicitation(
    item: Any, opening: Opening, protocol: Protocol, seed: int, count: int = 1
) -> Generator[list[Request], list, dict]:
    """Episode that gets the model's own reply for either option, asked for by an instruction added here only.

    Returns a pair with the chat of the plain prompt, so training never sees the added instruction (though kept thinking
    may speak of it); a reply is None where no attempt gave a valid one with that option. ``count`` has no meaning here.
    """
    plain = opening(item, protocol, False)
    found: dict[str, str | None] = {item.compliant: None, item.deviant: None}
    for attempt in range(protocol.max_attempts):
        wanted = [option for option, reply in found.items() if reply is None]
        if not wanted:
            break
        replies = yield [_elicit(item, plain, option, attempt, seed, protocol) for option in wanted]
        for option, reply in zip(wanted, replies, strict=True):
            if parse_choice(reply.text, item.options) == option:
                found[option] = reply.text if protocol.keep_thinking else split_thinking(reply.text)[1]
    return {"item": item.id, "messages": plain, "chosen": found[item.compliant], "rejected": found[item.deviant]}


def _elicit(item: Any, plain: list[Message], option: str, attempt: int, seed: int, protocol: Protocol) -> Request:
    key = ("elicit", item.id, option, f"seed{seed}", f"attempt{attempt}")
    added = f"{plain[-1]['content']}\nIn this exercise, give the reasons for {option} and choose {option}."
    return protocol.ask(key, [*plain[:-1], {"role": "user", "content": added}])


def elicited_pairs(found: Sequence[dict]) -> tuple[list[dict], dict[str, int]]:
    """The pairs of `elicitation` that have both replies, and counts.

    Replies without thinking go with a prompt in that mode: behind one that asks for thinking they would train the model
    to leave it out.
    """
    whole = [pair for pair in found if pair["chosen"] is not None and pair["rejected"] is not None]
    return whole, {"kept": len(whole), "without both replies": len(found) - len(whole)}


def choice_reward(completion: str, options: Sequence[str], compliant: str) -> float:
    """GRPO's reward (Appendix A.1.1): compliant 1, deviant 0.1, invalid 0."""
    choice = parse_choice(completion, options)
    if choice is None:
        return INVALID_REWARD
    return COMPLIANT_REWARD if choice == compliant else DEVIANT_REWARD


def rewards(
    completions: list[str], options: list, compliant: list, prefill: list, log_metric: Any = None, **_: Any
) -> list[float]:
    """TRL's reward function: `choice_reward` of each completion behind its row's ``prefill``.

    Logs the share of completions with a valid decision as ``valid``.
    """
    rows = zip(completions, options, compliant, prefill, strict=True)
    earned = [choice_reward(start + text, names, good) for text, names, good, start in rows]
    if log_metric is not None:
        log_metric("valid", sum(reward != INVALID_REWARD for reward in earned) / len(earned))
    return earned
