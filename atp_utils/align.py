"""Alignment arms: the preference pairs and rewards that `train` makes LoRA adapters of.

Training sees training prompts only, each as the opening of an episode, without history (Appendix A.1.1):
self-evolution happens after training. Everything here works for any scenario whose items have ``options``,
``compliant`` and an ``opening(item, protocol)``.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Any

from atp_utils.chat_template import render
from atp_utils.engine import Message, Request, derive_seed
from atp_utils.parsing import answer_json, parse_choice, split_thinking
from atp_utils.protocol import Protocol

COMPLIANT_REWARD, DEVIANT_REWARD, INVALID_REWARD = 1.0, 0.1, 0.0

Opening = Callable[[Any, Protocol], list[Message]]


def answer_pairs(items: Sequence, opening: Opening, tokenizer: Any, protocol: Protocol) -> list[dict[str, str]]:
    """DPO rows whose two completions are the bare JSON answers: compliant preferred to deviant."""
    return [
        {
            "prompt": render(tokenizer, opening(item, protocol)),
            "chosen": answer_json(item.compliant),
            "rejected": answer_json(item.deviant),
        }
        for item in items
    ]


def elicitation(item: Any, opening: Opening, protocol: Protocol, seed: int) -> Generator[list[Request], list, dict]:
    """Episode that gets the model's own reply for either option, asked for by an instruction added here only.

    Returns ``{"item", "prompt", "chosen", "rejected"}`` with the chat of the plain prompt, so training never
    sees the added instruction; a completion is None where no attempt gave a valid reply with that option.
    """
    plain = opening(item, protocol)
    found: dict[str, str | None] = {item.compliant: None, item.deviant: None}
    for attempt in range(protocol.max_attempts):
        open_options = [option for option, reply in found.items() if reply is None]
        if not open_options:
            break
        replies = yield [_elicit(item, plain, option, attempt, seed, protocol) for option in open_options]
        for option, reply in zip(open_options, replies, strict=True):
            if parse_choice(reply.text, item.options) == option:
                found[option] = split_thinking(reply.text)[1]
    return {"item": item.id, "prompt": plain, "chosen": found[item.compliant], "rejected": found[item.deviant]}


def _elicit(item: Any, plain: list[Message], option: str, attempt: int, seed: int, protocol: Protocol) -> Request:
    key = ("elicit", item.id, option, f"seed{seed}", f"attempt{attempt}")
    added = f"{plain[-1]['content']}\nIn this exercise, give the reasons for {option} and choose {option}."
    messages = (*plain[:-1], {"role": "user", "content": added})
    return Request("/".join(key), messages, derive_seed(*key), sampling=protocol.sampling)


def elicited_pairs(found: Sequence[dict], tokenizer: Any) -> list[dict[str, str]]:
    """DPO rows from `elicitation`'s results; items without both completions are left out.

    The completions are without thinking, and so is the prompt's mode: behind a prompt that asks for thinking they
    would train the model to leave it out.
    """
    return [
        {**pair, "prompt": render(tokenizer, pair["prompt"])}
        for pair in found
        if pair["chosen"] is not None and pair["rejected"] is not None
    ]


def choice_reward(completion: str, options: Sequence[str], compliant: str) -> float:
    """GRPO's reward (Appendix A.1.1): compliant 1, deviant 0.1, invalid 0."""
    choice = parse_choice(completion, options)
    if choice is None:
        return INVALID_REWARD
    return COMPLIANT_REWARD if choice == compliant else DEVIANT_REWARD


def reward_rows(
    items: Sequence, opening: Opening, tokenizer: Any, protocol: Protocol, prefill: str = ""
) -> list[dict[str, Any]]:
    """GRPO rows. ``prefill`` is the beginning of the answer, given to the model as if it had written it.

    A model that seldom answers in JSON by itself gets hardly any reward above 0 and learns nothing; with the
    prefill ``{"choice": "`` it is trained on just what the `choose` protocol later asks of it.
    """
    thinking = protocol.name == "reason" and protocol.sampling.thinking
    return [
        {
            "prompt": render(tokenizer, opening(item, protocol), thinking) + prefill,
            "options": list(item.options),
            "compliant": item.compliant,
            "prefill": prefill,
        }
        for item in items
    ]


def rewards(completions: list[str], options: list, compliant: list, prefill: list, **_: Any) -> list[float]:
    """TRL's reward function for `reward_rows`: `choice_reward` of each completion."""
    rows = zip(completions, options, compliant, prefill, strict=True)
    return [choice_reward(start + text, names, good) for text, names, good, start in rows]
