"""OpenAI's protocol as servers really speak it: what a request becomes on the wire, and what a reply on it means.

Nothing here sends anything; that is `openai_engine`'s.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from atp_utils.evolution.parsing import defuse, encodable
from atp_utils.evolution.requests import DATE, Message, Reply, Request, Sampling
from atp_utils.support.code_digest import PACKAGE, code_of

PROBE = Request("probe", ({"role": "user", "content": "Yes or no?"},), 0, ("Yes", "No"))
# Where a request says nothing, servers take the model's own settings (generation_config.json, a GGUF's header) or
# those of their command line. vLLM and SGLang call the fourth repetition_penalty, llama.cpp repeat_penalty.
NEUTRAL = {
    "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "repeat_penalty": 1.0,
    "xtc_probability": 0.0, "mirostat": 0,
}  # fmt: skip
# Not every server takes these; one that a server refuses by name is left out, if the request can do without it.
OPTIONAL = NEUTRAL.keys() | {
    "seed", "max_tokens", "temperature", "top_p", "top_k", "generation_config", "chat_template_kwargs",
    "response_format", "logprobs", "top_logprobs",
}  # fmt: skip
# Probability that other ways of writing the options may have before the first token counts as ambiguous.
NEGLIGIBLE = 1e-3
# A bound on the options that weren't listed is worth recording up to this share of the likeliest option.
DECISIVE = 0.1
# Rounding of the probabilities that servers list: what is left beside them is known no better.
ROUNDING = 1e-6
# How servers say that a chat doesn't fit the context: OpenAI, vLLM, SGLang, llama.cpp, TGI, Mistral, Google, xAI.
TOO_LONG = re.compile(
    r"context[ _-]?(?:length|window|size)|maximum (?:model|prompt|allowed|input) length|prompt is too long"
    r"|inputs`? (?:tokens|must have less)|exceeds the maximum number of tokens",
    re.IGNORECASE,
)
CONTEXT = re.compile(r"(?:(?:context|model) (?:length|size|window)|n_ctx\W)\D{1,12}(\d+)", re.IGNORECASE)
CUT = re.compile(r"length|max\w*tokens|token_limit", re.IGNORECASE)
# What accessing a field of garbage raises; the client's types are built without validation.
MALFORMED = (AttributeError, IndexError, KeyError, TypeError, ValueError)


class Fault(ValueError):
    """A reply of the right form that a server must have made in error; the words say which."""


class NotEchoed(Exception):
    """A completion without the log-probabilities of the texts that were sent."""


@dataclass(frozen=True)
class Listing:
    """What a server said of the model: ``facts``, ``names`` that it also goes by, and the ids of ``others``."""

    facts: str = ""
    names: frozenset[str] = frozenset()
    others: frozenset[str] = frozenset()


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


def listing(model: str, found: Mapping[str, Any]) -> Listing:
    """What the entries of ``/models``, by id, say of ``model``, which is one of them."""
    told = found[model].model_extra or {}
    weights, facts = told.get("root"), _facts(found[model])
    same = {name for name, entry in found.items() if weights and (entry.model_extra or {}).get("root") == weights}
    names = frozenset({model, *same, *filter(None, [weights]), *(told.get("aliases") or ())})
    return Listing(facts, names, frozenset(found.keys() - names))


def _facts(entry: Any) -> str:
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
    # How long a chat may be decides which are answered at all.
    named |= {"max_model_len": told["max_model_len"]} if told.get("max_model_len") else {}
    sized = {name: told["meta"][name] for name in ("n_params", "size") if name in (told.get("meta") or {})}
    return encodable(",".join(f"{name}={value}" for name, value in (named | sized).items()))


def is_another(told: Any, asked: str, known: Listing) -> bool:
    """Whether a reply comes from another model than was ``asked``, by the name that it bears, if any.

    Servers name the same model by its id, its path, the first of several names, a file, a revision or a dated snapshot.
    """
    if not isinstance(told, str) or not told or told in {asked, *known.names}:
        return False
    if re.fullmatch(re.escape(asked) + r"(?:@.+|:latest|-\d[\d-]{3,})", told):
        return False
    return told in known.others or _plain_name(told) not in map(_plain_name, {asked, *known.names})


def _plain_name(name: str) -> str:
    name = name.rstrip("/").split("/")[-1].split("@")[0]
    return name.removesuffix(":latest").removesuffix(".gguf").casefold()


def form(rendered: Any = None) -> str:
    """Digest of what requests become on the wire, of the code that reads the replies, and of what was ``rendered``."""
    bodies = [chat_body(request, set()) for request in (PROBE, Request(PROBE.key, PROBE.messages, 0))]
    code = code_of(f"{PACKAGE}/engines/openai_engine.py")
    return hashlib.sha256(json.dumps([bodies, code, rendered]).encode()).hexdigest()[:8]


def sendable(messages: Sequence[Message]) -> list[Message]:
    """The chat as UTF-8 can carry it, and with text that no server takes for the end of a turn."""
    return [message | {"content": defuse(encodable(message["content"]))} for message in messages]


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
        **NEUTRAL,
    }
    if "max_tokens" in refused:
        body["max_completion_tokens"] = sampling.max_new_tokens
    if request.options:
        body |= {"logprobs": True, "top_logprobs": 20, **_constraint(request.options)}
    if "top_k" in refused:
        # `transformers serve` takes top_k only here, and is greedy at any temperature unless it is told to sample.
        body["generation_config"] = json.dumps({"do_sample": sampling.temperature > 0, "top_k": sampling.top_k})
    for name in refused & {"temperature", "top_p"}:
        if body[name] != 1:
            raise ValueError(f"the server takes no {name} (asked: {body[name]}): set {name} to 1 or use another server")
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


def refused_fields(words: str, body: Mapping[str, Any]) -> set[str]:
    """The fields of ``body`` that an error names and that a request may do without, or can send in another form."""

    def named(name: str) -> bool:
        # Words of plain English count where they stand as a name.
        before = "" if "_" in name or name == "logprobs" else r"(?:^|['\"`:,] ?|supports? |parameter |argument )"
        return re.search(rf"{before}\b{name}\b", words) is not None

    return {name for name in OPTIONAL & body.keys() if named(name)}


def is_too_long(status: int, words: str, max_tokens: int) -> bool:
    """Whether an error says that the chat doesn't fit the context; ValueError if none would beside ``max_tokens``."""
    if status not in (400, 413, 422, 500) or not TOO_LONG.search(words):
        return False
    limit = CONTEXT.search(words)
    if limit and int(limit[1]) <= max_tokens:
        raise ValueError(f"max_new_tokens {max_tokens} leaves no room for a chat in the server's context of {limit[1]}")
    return True


def chat_reply(chat: Any, request: Request) -> Reply:
    """The reply of a chat completion, thinking in front as `split_thinking` separates it; raises one of MALFORMED."""
    turn, usage = chat.choices[0], chat.usage
    told, (thought, text) = turn.message.model_extra or {}, _parts(turn.message.content)
    fields = (told.get(name) for name in ("reasoning_content", "reasoning", "reasoning_details"))
    thought = re.sub("</?think>", "", next(filter(None, map(_text, fields)), thought)).strip()
    text = encodable((f"<think>{thought}</think>" if thought else "") + (text or turn.message.refusal or ""))
    ending = _ending(turn.finish_reason)
    counts = (int(usage.prompt_tokens or 0), int(usage.completion_tokens or 0)) if usage else (0, 0)
    if not request.options:
        return Reply(text, *counts, ending)
    logprobs, bound = _first_token(_candidates(turn.logprobs), request.options)
    way = "first_token:bound" if bound else "first_token" if logprobs else f"sampled:{ending}"
    return Reply(text, *counts, way, logprobs)


def _parts(content: Any) -> tuple[str, str]:
    """(thinking, text) of a message's content, which is a text or a list of parts, each of its own type."""
    if not isinstance(content, list):
        return "", _text(content)
    parts = [part if isinstance(part, dict) else {"text": part} for part in content]
    marked = [(re.match("think|thought|reason", str(part.get("type"))) is not None, _text(part)) for part in parts]
    return tuple("".join(text for thinking, text in marked if thinking is kind) for kind in (True, False))


def _text(value: Any) -> str:
    """The words in a part of a message, however deep servers put them; raises TypeError for what holds none."""
    if isinstance(value, list):
        return "".join(map(_text, value))
    if isinstance(value, dict):
        names = ("text", "thinking", "reasoning", "summary", "content", "refusal")
        return next(filter(None, (_text(value.get(name)) for name in names)), "")
    if not isinstance(value, str | None):
        raise TypeError(f"no text: {type(value)}")
    return value or ""


def _ending(reason: Any) -> str:
    if not isinstance(reason, str) or reason.lower() in ("", "abort", "aborted", "cancelled", "error"):
        raise Fault("the server gave up in the middle")
    return "length" if CUT.search(reason) else encodable(reason)


def _candidates(logprobs: Any) -> list[tuple[str, dict[str, float]]]:
    """Each token with its candidates' probabilities, none where these are told in another form.

    Raises Fault for what is no log-probability.
    """
    try:
        rows = [(it.token, [(o.token, float(o.logprob)) for o in [*it.top_logprobs, it]]) for it in logprobs.content]
    except MALFORMED:
        return []
    if not all(logprob <= NEGLIGIBLE for _, row in rows for _, logprob in row):
        raise Fault("a log-probability is not a number, or above 0")
    tables = []
    for token, row in rows:
        # The drawn token, last, counts only if it isn't among the listed; several may have the same text.
        listed, table = (row[:-1] if token in dict(row[:-1]) else row), {}
        for text, logprob in listed:
            table[text] = table.get(text, 0.0) + math.exp(logprob)
        tables.append((token, table))
    return tables


def _first_token(
    tokens: Sequence[tuple[str, Mapping[str, float]]], options: Sequence[str]
) -> tuple[tuple[float, ...] | None, bool]:
    """log P of the first token that tells the options apart; None unless each such token belongs to one option.

    Options that aren't listed there share what the listed tokens leave: at most that is theirs. Then the second value
    is true. It is None all the same if what is left could change which option is the likely one.
    """
    shared, text = os.path.commonprefix(list(options)), ""
    for token, table in tokens:
        own, several = [0.0] * len(options), 0.0
        for other, probability in table.items():
            longer = text + other
            fits = [i for i, option in enumerate(options) if option.startswith(longer) or longer.startswith(option)]
            if len(fits) == 1:
                own[fits[0]] += probability
            elif fits:
                several += probability
        text += token
        if not shared.startswith(text):
            left = max(1 - sum(table.values()), ROUNDING)
            if several >= NEGLIGIBLE or (not all(own) and left > DECISIVE * max(own)):
                return None, False
            return tuple(math.log(p or left / own.count(0)) for p in own), not all(own)
        if sum(own) > NEGLIGIBLE:
            return None, False
    return None, False


def echoed_scores(completion: Any, prompt: int, sent: Sequence[Sequence[int]]) -> tuple[tuple[float, ...], float]:
    """log P of what follows the first ``prompt`` tokens of each sent text, and of what all of them share there.

    Raises NotEchoed if not all is told, one of MALFORMED for what is no completion. llama.cpp takes the request,
    ignores ``echo`` and scores its new token alone: only the count of tokens shows it.
    """
    choices = sorted(completion.choices, key=lambda choice: choice.index)
    try:
        rows = [choice.logprobs.token_logprobs for choice in choices]
        scores = tuple(sum(row[prompt : len(ids)]) for row, ids in zip(rows, sent, strict=True))
        whole = all(len(row) - len(ids) in (0, 1) for row, ids in zip(rows, sent, strict=True))
    except MALFORMED:
        whole = False
    if not whole:
        raise NotEchoed("the options' tokens are not all scored")
    if not all(map(math.isfinite, scores)):
        raise Fault("a log-probability is not a number")
    return scores, sum(rows[0][prompt : len(os.path.commonprefix(list(map(list, sent))))])
