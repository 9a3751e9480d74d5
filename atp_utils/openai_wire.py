"""OpenAI's protocol as servers really speak it: what a request becomes on the wire, and what a reply on it means.

Nothing here sends anything; that is `openai_engine`'s.
"""

import json
import math
import os
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from atp_utils.engine import DATE, Message, Reply, Request, Sampling, encodable

# Not every server takes these; one that a server refuses by name is left out, if the request can do without it.
OPTIONAL = {"top_k", "generation_config", "chat_template_kwargs", "response_format", "logprobs", "top_logprobs"}
# Probability that other ways of writing the options may have before the first token counts as ambiguous.
NEGLIGIBLE = 1e-3
# What accessing a field of garbage raises; the client's types are built without validation.
MALFORMED = (AttributeError, IndexError, KeyError, TypeError, ValueError)


def checked_url(url: str) -> str:
    """``url`` without a slash at its end; raises ValueError for what is no address, or one that holds a key."""
    parts = urlsplit(url)
    if "@" in url or parts.query:
        raise ValueError("a server's address holds a user, password or query: keys come from the environment alone")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is no server's address, such as http://127.0.0.1:8000/v1")
    return url.rstrip("/")


def short_name(path: str) -> str:
    """A model's name, or the end of its path: the folders above differ between equal servers."""
    return "/".join(path.split("/")[-2:])


def facts(entry: Any) -> str:
    """Weights, parent and size, as far as told; nothing that differs between equal servers, such as dates.

    Raises ValueError for an adapter on SGLang, which lists it by its name and answers for that name with the base.
    """
    told = entry.model_extra or {}
    if told.get("parent") and getattr(entry, "owned_by", "") == "sglang":
        raise ValueError(
            f"SGLang lists the adapter {entry.id!r}, but asked for it by that name it answers with the base model: "
            "merge the adapter into the weights, and serve those by --served-model-name"
        )
    named = {name: short_name(told[name]) for name in ("root", "parent") if told.get(name)}
    sized = {name: told["meta"][name] for name in ("n_params", "size") if name in (told.get("meta") or {})}
    return ",".join(f"{name}={value}" for name, value in (named | sized).items())


def sendable(messages: Sequence[Message]) -> list[Message]:
    """The chat as UTF-8 can carry it."""
    return [{name: encodable(text) for name, text in message.items()} for message in messages]


def chat_body(request: Request, refused: set[str]) -> dict[str, Any]:
    """A chat request's fields besides model and messages; raises ValueError if it can't do without a refused one."""
    sampling = request.sampling
    if request.options:
        sampling = Sampling(max_new_tokens=max(len(text.encode()) for text in request.options) + 16, thinking=False)
    # 31 bits of seed are taken everywhere. top_k -1 is "off": vLLM would take generation_config.json's value instead.
    body = {
        "seed": request.seed % 2**31,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "chat_template_kwargs": {"enable_thinking": sampling.thinking, "date_string": DATE},
    }
    if request.options:
        body |= {"logprobs": True, "top_logprobs": 20, **_constraint(request.options)}
    if "top_k" in refused:
        # `transformers serve` takes top_k only here, and is greedy at any temperature unless it is told to sample.
        body["generation_config"] = json.dumps({"do_sample": sampling.temperature > 0, "top_k": sampling.top_k})
    if sampling.top_k and {"top_k", "generation_config"} <= refused:
        raise ValueError(f"the server takes no top_k (asked: {sampling.top_k}): set top_k to 0 or use another server")
    if "chat_template_kwargs" in refused and not sampling.thinking and not request.options:
        raise ValueError("the server can't switch thinking off: set thinking to true or use another server")
    return {name: value for name, value in body.items() if name not in refused}


def _constraint(options: Sequence[str]) -> dict[str, Any]:
    """``response_format`` that allows the options alone, where these are JSON objects of one and the same key."""
    try:
        answers = [json.loads(option) for option in options]
        [key] = {name for answer in answers for name in answer}
        fields = {"properties": {key: {"enum": [answer[key] for answer in answers]}}, "required": [key]}
    except MALFORMED:
        return {}
    schema = {"type": "object", "additionalProperties": False, **fields}
    named = {"name": "answer", "strict": True, "schema": schema}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def chat_reply(chat: Any, request: Request) -> Reply:
    """The reply of a chat completion, thinking in front as `split_thinking` separates it; raises one of MALFORMED."""
    turn, usage = chat.choices[0], chat.usage
    told = turn.message.model_extra
    thought = re.sub("</?think>", "", told.get("reasoning_content") or told.get("reasoning") or "").strip()
    text = (f"<think>{thought}</think>" if thought else "") + (turn.message.content or "")
    if not turn.finish_reason or turn.finish_reason in ("abort", "error"):
        raise ValueError("the server gave up in the middle")
    counts = (usage.prompt_tokens or 0, usage.completion_tokens or 0) if usage else (0, 0)
    if not request.options:
        return Reply(text, *counts, turn.finish_reason)
    try:
        logprobs = _first_token(turn.logprobs.content, request.options)
    except MALFORMED:
        # None, or given in some other form: the text is good all the same.
        logprobs = None
    return Reply(text, *counts, "first_token" if logprobs else f"sampled:{turn.finish_reason}", logprobs)


def _first_token(tokens: Sequence[Any], options: Sequence[str]) -> tuple[float, ...] | None:
    """log P of the first token that tells the options apart; None unless each such token belongs to one option."""
    shared, text = os.path.commonprefix(list(options)), ""
    for token in tokens:
        own, several = [0.0] * len(options), 0.0
        for other in token.top_logprobs:
            longer = text + other.token
            fits = [i for i, option in enumerate(options) if option.startswith(longer) or longer.startswith(option)]
            if len(fits) == 1:
                own[fits[0]] += math.exp(other.logprob)
            elif fits:
                several += math.exp(other.logprob)
        text += token.token
        if not shared.startswith(text):
            return tuple(map(math.log, own)) if all(own) and several < NEGLIGIBLE else None
        if sum(own) > NEGLIGIBLE:
            return None
    return None


def echoed_scores(completion: Any, prompt: int, sent: Sequence[Sequence[int]]) -> tuple[float, ...]:
    """log P of what follows the first ``prompt`` tokens of each sent text; raises one of MALFORMED if not all is told.

    llama.cpp takes the request, ignores ``echo`` and scores its new token alone: only the count of tokens shows it.
    """
    rows = [choice.logprobs.token_logprobs for choice in sorted(completion.choices, key=lambda choice: choice.index)]
    pairs = list(zip(rows, sent, strict=True))
    scores = tuple(sum(row[prompt : len(ids)]) for row, ids in pairs)
    if not all(len(row) - len(ids) in (0, 1) for row, ids in pairs) or not all(map(math.isfinite, scores)):
        raise ValueError("the texts were not echoed")
    return scores
