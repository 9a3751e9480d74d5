"""OpenAI's protocol as servers speak it: what a request becomes on the wire, and what a reply on it means.

Nothing here sends anything; that is `openai_servers`'.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionTokenLogprob

from atp_utils.evolution.parsing import defuse, encodable
from atp_utils.evolution.requests import DATE, Message, Reply, Request, Sampling

# Where a request says nothing, servers take the model's own settings (generation_config.json, a GGUF's header) or
# those of their command line. vLLM and SGLang call the fourth repetition_penalty, llama.cpp repeat_penalty.
NEUTRAL = {
    "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "repeat_penalty": 1.0,
    "xtc_probability": 0.0, "mirostat": 0,
}  # fmt: skip
# The fields without which a setting can only be the default.
CARRIERS = {
    "temperature": "temperature", "top_p": "top_p", "top_k": "generation_config", "thinking": "chat_template_kwargs",
}  # fmt: skip
# What bounds a reply's length: the newer name is OpenAI's own.
LIMITS = ("max_tokens", "max_completion_tokens")
# Probability that other ways of writing the options may have before the first token counts as ambiguous.
NEGLIGIBLE = 1e-3
# A bound on the options that weren't listed is worth recording up to this share of the likeliest option.
DECISIVE = 0.1
# Characters of a reply; a longer one is none, whatever number of tokens was asked for.
LONGEST = 1 << 22
# Rounding of the probabilities that servers list: what is left beside them is known no better.
ROUNDING = 1e-6
# How OpenAI, vLLM, SGLang and llama.cpp say that a chat doesn't fit the context.
TOO_LONG = re.compile(r"context[ _](?:length|window|size)|maximum (?:model|allowed) length", re.IGNORECASE)


def short_name(path: str) -> str:
    """A model's name, or the end of its path: the folders above differ between equal servers."""
    return "/".join(path.split("/")[-2:])


def listing(model: str, found: Mapping[str, Model]) -> tuple[str, frozenset[str]]:
    """``(facts, names)``: what the entries of ``/models``, by id, say of ``model``, which is one of them.

    Facts are weights, parent, context and size, as far as told; nothing that differs between equal servers. Names are
    those of the same weights. Raises ValueError for an adapter on SGLang, which lists it by its name and answers for
    that name with the base model.
    """
    told = {name: entry.model_extra or {} for name, entry in found.items()}
    own, root = told[model], told[model].get("root")
    if own.get("parent") and found[model].owned_by == "sglang":
        raise ValueError(
            f"SGLang lists the adapter {model!r}, but asked for it by that name it answers with the base model: "
            "merge the adapter into the weights, and serve those by --served-model-name"
        )
    # llama.cpp tells the size of its weights in a table of its own.
    known = own | (own.get("meta") or {})
    facts = {name: known.get(name) for name in ("root", "parent", "max_model_len", "n_params", "size")}
    shown = ",".join(f"{name}={short_name(str(value))}" for name, value in facts.items() if value)
    same = {name for name in told if told[name].get("root") == root}
    return shown, frozenset({root, *same} if root else {model})


def sendable(messages: Sequence[Message]) -> list[Message]:
    """The chat as UTF-8 can carry it, and with text that no server takes for the end of a turn."""
    return [message | {"content": defuse(encodable(message["content"]))} for message in messages]


def chat_fields(request: Request, refused: set[str], maker: str = "") -> dict[str, Any]:
    """A chat request's fields besides model and messages; raises ValueError if it can't do without a refused one.

    ``maker`` is what the server says of itself, its ``owned_by``.
    """
    sampling = request.sampling
    if request.options:
        sampling = Sampling(max_new_tokens=max(len(text.encode()) for text in request.options) + 16, thinking=False)
    for name, carrier in CARRIERS.items():
        asked, default = getattr(sampling, name), getattr(Sampling, name)
        if carrier in refused and asked != default and not request.options:
            advice = f"set {name} to {json.dumps(default)} or use another server"
            raise ValueError(f"the server takes no {name} (asked: {json.dumps(asked)}): {advice}")
    # 31 bits of seed are taken everywhere. top_k -1 is "off": vLLM would take generation_config.json's value instead.
    fields = {
        "seed": request.seed % 2**31,
        "max_completion_tokens" if "max_tokens" in refused else "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "chat_template_kwargs": {"enable_thinking": sampling.thinking, "date_string": DATE},
        # `transformers serve` takes top_k only here, and is greedy at any temperature unless it is told to sample.
        "generation_config": json.dumps({"do_sample": sampling.temperature > 0, "top_k": sampling.top_k}),
        **NEUTRAL,
    }
    if request.options:
        fields |= {"logprobs": True, "top_logprobs": 20, **_constraint(request.options, maker)}
    return {name: value for name, value in fields.items() if name not in refused}


def _constraint(options: Sequence[str], maker: str) -> dict[str, Any]:
    """The field that allows the options alone, each a JSON object with the one key ``choice``."""
    if maker == "llamacpp":
        # What it makes of a schema allows line breaks that no option has, and then nothing tells the options apart.
        return {"grammar": "root ::= " + " | ".join(json.dumps(option, ensure_ascii=False) for option in options)}
    choices = [json.loads(option)["choice"] for option in options]
    schema = {"type": "object", "properties": {"choice": {"enum": choices}}, "required": ["choice"]}
    named = {"name": "answer", "strict": True, "schema": schema | {"additionalProperties": False}}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def refused_fields(words: str, fields: Iterable[str]) -> set[str]:
    """The ``fields`` that an error names, and that a request may do without or can send in another form."""

    def named(name: str) -> bool:
        # Words of plain English count where they stand as a name.
        before = r"\b" if "_" in name or name == "logprobs" else r"['\"`:,] ?"
        return re.search(rf"{before}{name}\b", words) is not None

    return set() if TOO_LONG.search(words) else set(filter(named, fields)) - {"max_completion_tokens"}


def chat_reply(request: Request, chat: ChatCompletion) -> Reply:
    """The reply of a chat completion, thinking in front as `split_thinking` separates it."""
    turn, usage = chat.choices[0], chat.usage
    if turn.finish_reason in (None, "", "abort", "error"):
        raise ValueError("the server gave up in the middle")
    told = turn.message.model_extra or {}
    thought = told.get("reasoning") or told.get("reasoning_content")
    text = f"<think>{thought}</think>" if thought else ""
    text = encodable(text + (turn.message.content or turn.message.refusal or ""))
    if len(text) > LONGEST:
        raise ValueError(f"more than {LONGEST} characters")
    counts = (usage.prompt_tokens or 0, usage.completion_tokens or 0) if usage else (0, 0)
    if not request.options:
        return Reply(text, *counts, turn.finish_reason)
    tokens = turn.logprobs.content if turn.logprobs else None
    logprobs, bound = _first_token(tokens or [], request.options)
    way = "first_token:bound" if bound else "first_token" if logprobs else f"sampled:{turn.finish_reason}"
    return Reply(text, *counts, way, logprobs)


def _first_token(
    tokens: Sequence[ChatCompletionTokenLogprob], options: Sequence[str]
) -> tuple[tuple[float, ...] | None, bool]:
    """log P of the first token that tells the options apart; None unless each such token belongs to one option.

    Options that aren't listed there share what the listed tokens leave: at most that is theirs. Then the second value
    is true. It is None all the same if what is left could change which option is the likely one.
    """
    shared, text = os.path.commonprefix(list(options)), ""
    for token in tokens:
        # The drawn token counts where it isn't listed.
        table = {other.token: other.logprob for other in [token, *token.top_logprobs]}
        if not all(logprob <= NEGLIGIBLE for logprob in table.values()):
            raise ValueError("a log-probability is not a number, or above 0")
        own, several = [0.0] * len(options), 0.0
        for other, logprob in table.items():
            longer = text + other
            fits = [i for i, option in enumerate(options) if option.startswith(longer) or longer.startswith(option)]
            # llama.cpp lists control tokens without a text: these begin no answer.
            fits = fits if other else []
            if len(fits) == 1:
                own[fits[0]] += math.exp(logprob)
            elif fits:
                several += math.exp(logprob)
        text += token.token
        if not shared.startswith(text):
            left = max(1 - sum(map(math.exp, table.values())), ROUNDING)
            if several >= NEGLIGIBLE or (not all(own) and left > DECISIVE * max(own)):
                return None, False
            return tuple(math.log(p or left / own.count(0)) for p in own), not all(own)
        if sum(own) > NEGLIGIBLE:
            return None, False
    return None, False


def echoed_reply(prompt: Sequence[int], options: Sequence[Sequence[int]], completion: Completion) -> Reply:
    """The scores of a completion that echoes all options' tokens, each behind the prompt's.

    Raises NotImplementedError if not all is told. A server may take the request, ignore ``echo`` and score its new
    token alone, in this form or a chat's: only the count of tokens shows it.
    """
    choices = sorted(completion.choices, key=lambda choice: choice.index)
    told = [choice.logprobs.token_logprobs if choice.logprobs else None for choice in choices]
    rows = [(row or [])[len(prompt) :] for row in told]
    if [len(row) for row in rows] not in ([len(option) + new for option in options] for new in (0, 1)):
        raise NotImplementedError("the server doesn't tell the log-probabilities of all tokens of the options")
    scores = tuple(sum(row[: len(option)]) for row, option in zip(rows, options, strict=True))
    if not all(map(math.isfinite, scores)):
        raise ValueError("a log-probability is not a number")
    shared = sum(rows[0][: len(os.path.commonprefix(list(options)))])
    return Reply("", len(prompt), max(map(len, options)), "scored", scores, shared)
