"""The engine for servers: any that speak OpenAI's protocol (vLLM, SGLang, llama.cpp, Ollama, `transformers serve`).

Who repeats what: the ``openai`` client asks a server again, ``retries`` times, after time-outs, broken connections
and the statuses 408, 409, 429 and 5xx, with jittered exponential backoff, or after as long as ``Retry-After`` says
(at most two minutes). ``tenacity`` repeats, as often, what the client takes for a reply and isn't (garbage, a cut
body), and where there are several servers it leaves one that stayed out for the next.

A forced choice is answered in the best of three ways that the servers offer; ``finish_reason`` says which:

- ``scored``: ``/completions`` echoes log P of every option's tokens (vLLM, SGLang), as `TransformersEngine` has it.
  The chat is rendered and tokenised here, so the engine needs to be told the ``tokenizer``.
- ``first_token``: the chat is answered under a JSON schema; log P of the first token that tells the options apart.
- ``sampled:<reason>``: the text of that chat. There are no probabilities, and text that is no option is invalid.
"""

import json
import math
import os
import re
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any
from urllib.parse import urlsplit

import openai
import tenacity
from anyio.from_thread import BlockingPortal, start_blocking_portal

from atp_utils.engine import Reply, Request, Sampling, collapse, drawn

WAIT = tenacity.wait_random_exponential(multiplier=0.5, max=30)
# Not every server takes these; one that a server refuses by name is left out, if the request can do without it.
OPTIONAL = {"top_k", "generation_config", "chat_template_kwargs", "response_format", "logprobs", "top_logprobs"}
NO_SCORING = {400, 404, 405, 415, 422, 501}
PROBE = Request("probe", ({"role": "user", "content": "Yes or no?"},), 0, ("Yes", "No"))
# Probability that other ways of writing the options may have before the first token counts as ambiguous.
NEGLIGIBLE = 1e-3
# What accessing a field of garbage raises; the client's types are built without validation.
MALFORMED = (AttributeError, IndexError, KeyError, TypeError, ValueError)


class Unusable(ConnectionError):
    """What a server sent is no reply."""


@dataclass
class _Server:
    url: str
    client: openai.AsyncOpenAI
    failures: int = 0
    in_flight: int = 0


class OpenAIEngine:
    """Answers `Request`s with ``model`` on the servers at ``urls``, ``concurrency`` at a time over all of them.

    The key is read from the environment variable ``key_variable`` whenever it is needed. ``timeout`` is in seconds
    without a byte from the server. The servers are asked at once what they serve, which costs no token: raises
    ValueError for a wrong address or another model, PermissionError for a refused key, ConnectionError for a server
    that can't be reached. With the ``identity`` of an earlier run they are asked only once a reply is needed, so
    that a finished run is replayed without them. ``answered`` counts replies, ``retried`` repeated requests.
    """

    def __init__(
        self,
        model: str,
        urls: str | Sequence[str],
        *,
        tokenizer: str | None = None,
        key_variable: str = "OPENAI_API_KEY",
        concurrency: int = 32,
        timeout: float = 600.0,
        retries: int = 5,
        identity: str | None = None,
    ):
        if concurrency < 1 or retries < 0 or not timeout > 0:
            raise ValueError(f"concurrency {concurrency}, retries {retries} or timeout {timeout} is out of range")
        self.model, self.tokenizer, self.key_variable = model, tokenizer, key_variable
        self.concurrency, self.timeout, self.retries = concurrency, timeout, retries
        self.urls = [_checked(url) for url in ([urls] if isinstance(urls, str) else urls)]
        if not self.urls:
            raise ValueError("urls is empty: name at least one server, such as http://127.0.0.1:8000/v1")
        self.answered = self.retried = 0
        self._refused: set[str] = set()
        self._scores = None if tokenizer else False
        self._asked = identity is None
        self.identity = self._described() if identity is None else identity

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        """Yield ``(index, reply)`` as replies arrive; forced choices of equal content share one that has scores.

        Once a request has failed for good no other is sent; those under way are waited for and yielded, then the
        error is raised: ConnectionError, PermissionError, or ValueError for what the servers refuse.
        """
        if not self._asked and (found := self._described()) != self.identity:
            raise ValueError(f"the servers have {found!r}, the replies before came from {self.identity!r}")
        self._asked = True
        # A loop in a thread of its own, because Jupyter's is already running.
        with start_blocking_portal() as portal, portal.wrap_async_context_manager(self._connected()) as servers:
            if self._scores is None and any(request.options for request in requests):
                self._scores = portal.call(self._probe, servers)
            yield from self._answer(portal, servers, requests)

    def _answer(
        self, portal: BlockingPortal, servers: list[_Server], requests: Sequence[Request]
    ) -> Iterator[tuple[int, Reply]]:
        groups, running, failure = deque(collapse(requests)), {}, None
        done: SimpleQueue[Future] = SimpleQueue()
        try:
            while running or (groups and failure is None):
                while groups and failure is None and len(running) < self.concurrency:
                    group = groups.popleft()
                    future = portal.start_task_soon(self._ask, servers, requests[group[0]])
                    running[future] = group
                    future.add_done_callback(done.put)
                future = done.get()
                group = running.pop(future)
                if error := future.exception():
                    failure = failure or error
                    continue
                outcome = future.result()
                self.answered += 1
                if requests[group[0]].options and outcome.logprobs is None:
                    # Sampled text answers one request, by its seed; the others need their own.
                    groups.extendleft([index] for index in reversed(group[1:]))
                    group = group[:1]
                for index in group:
                    yield index, drawn(requests[index], outcome)
        finally:
            for future in running:
                future.cancel()
        if failure is not None:
            raise failure

    async def _ask(self, servers: list[_Server], request: Request) -> Reply:
        async for attempt in tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(Unusable if len(servers) == 1 else ConnectionError),
            stop=tenacity.stop_after_attempt(max(self.retries + 1, len(servers))),
            wait=WAIT,
            reraise=True,
        ):
            with attempt:
                self.retried += attempt.retry_state.attempt_number > 1
                return await self._attempt(min(servers, key=lambda s: (s.failures, s.in_flight)), request)

    async def _attempt(self, server: _Server, request: Request) -> Reply:
        server.in_flight += 1
        try:
            reply = await (self._score if request.options and self._scores else self._chat)(server, request)
            server.failures = 0
            return reply
        except (openai.APIError, Unusable) as error:
            server.failures += 1
            raise self._explained(server.url, error, request.key) from None
        finally:
            server.in_flight -= 1

    async def _probe(self, servers: list[_Server]) -> bool:
        """Whether every server scores options: what a reply means must not depend on which one gave it."""
        for server in servers:
            try:
                await self._score(server, PROBE)
            except Unusable:
                return False
            except openai.APIError as error:
                if getattr(error, "status_code", None) in NO_SCORING:
                    return False
                raise self._explained(server.url, error, PROBE.key) from None
        return True

    async def _score(self, server: _Server, request: Request) -> Reply:
        """log P of every option's complete answer; all options in one request, as token ids."""
        prompt, options = self._tokenised(request)
        sent = [prompt + option for option in options]
        raw = await server.client.completions.with_raw_response.create(
            model=self.model, prompt=sent, echo=True, logprobs=1, max_tokens=1, temperature=0
        )
        self.retried += raw.retries_taken
        try:
            choices = sorted(raw.parse().choices, key=lambda choice: choice.index)
            rows = [choice.logprobs.token_logprobs for choice in choices]
            # llama.cpp takes the request, ignores `echo` and scores its new token alone: only the count tells.
            whole = all(len(row) - len(ids) in (0, 1) for row, ids in zip(rows, sent, strict=True))
            scores = tuple(sum(row[len(prompt) : len(ids)]) for row, ids in zip(rows, sent, strict=True))
        except MALFORMED:
            whole = False
        if not whole or not all(map(math.isfinite, scores)):
            raise Unusable(f"the options' tokens are not all scored: {self._redacted(raw.text, 80)!r}")
        return Reply("", len(prompt), max(map(len, options)), "scored", scores)

    def _tokenised(self, request: Request) -> tuple[list[int], list[list[int]]]:
        # Imported here, because it takes seconds and only scoring needs it.
        from atp_utils.models import load_tokenizer

        tokenizer = load_tokenizer(self.tokenizer)
        prompt = tokenizer.apply_chat_template(
            list(request.messages), tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, *request.options)]
        return ids[0], ids[1:]

    async def _chat(self, server: _Server, request: Request) -> Reply:
        while True:
            body = _body(request, self._refused)
            try:
                raw = await server.client.chat.completions.with_raw_response.create(
                    model=self.model, messages=list(request.messages), extra_body=body
                )
                break
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                named = {name for name in OPTIONAL & body.keys() if re.search(rf"\b{name}\b", error.response.text)}
                if not named:
                    raise
                self._refused |= named
        self.retried += raw.retries_taken
        try:
            return _reply(raw.parse(), request)
        except MALFORMED:
            raise Unusable(f"no chat completion: {self._redacted(raw.text, 80)!r}") from None

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[list[_Server]]:
        async with AsyncExitStack() as stack:
            clients = [openai.AsyncOpenAI(base_url=url, **self._settings()) for url in self.urls]
            entered = [await stack.enter_async_context(client) for client in clients]
            yield [_Server(url, client) for url, client in zip(self.urls, entered, strict=True)]

    def _settings(self) -> dict[str, Any]:
        key = os.environ.get(self.key_variable, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise ValueError(f"the environment variable {self.key_variable} holds characters that no key has")
        # A server without keys is sent a header that means nothing.
        timeout = openai.Timeout(self.timeout, connect=min(10, self.timeout))
        return {"api_key": key or "none", "timeout": timeout, "max_retries": self.retries}

    def _described(self) -> str:
        """The model and what all servers say of it; raises ValueError if they don't say the same."""
        facts = {url: self._listed(url) for url in self.urls}
        if len(set(facts.values())) > 1:
            raise ValueError(f"the servers have different models by the name {self.model!r}: {facts}")
        rendered = f"tokenizer={_name(self.tokenizer)}" if self.tokenizer else ""
        return "|".join(filter(None, [_name(self.model), facts[self.urls[0]], rendered]))

    def _listed(self, url: str) -> str:
        with openai.OpenAI(base_url=url, **self._settings()) as client:
            asking = client.with_options(timeout=min(30, self.timeout), max_retries=min(2, self.retries))
            try:
                found = {entry.id: entry for entry in asking.models.list().data}
            except openai.APIError as error:
                if not isinstance(error, openai.InternalServerError) or not _lists_its_cache(asking, url):
                    raise self._explained(url, error) from None
                found = {}
            except MALFORMED:
                raise ValueError(f"{url} is no OpenAI-compatible server; an address ends in /v1 as a rule") from None
            if self.model not in found and found and not _lists_its_cache(asking, url):
                raise ValueError(
                    f"{url} serves {', '.join(map(repr, found))}, not {self.model!r}: name what it serves as the "
                    "model, or start the server with the model that you want"
                )
        return _facts(found[self.model]) if self.model in found else ""

    def _redacted(self, text: str, length: int) -> str:
        """The beginning of what a server said; it may have quoted the key."""
        secret = os.environ.get(self.key_variable, "").strip()
        return (text.replace(secret, "***") if secret else text)[:length]

    def _explained(self, url: str, error: Exception, key: str = "") -> Exception:
        """An error that says what to do; ``key`` is the request's, empty while none was sent."""
        status, words = getattr(error, "status_code", 0), self._redacted(str(error), 300)
        if isinstance(error, openai.APIStatusError):
            # The client's own message leaves out what a server says outside of the protocol.
            words = f"status {status}, {self._redacted(error.response.text, 300)}"
        kept = "; the replies before are kept, run again to go on" if key else ""
        if isinstance(error, Unusable):
            return Unusable(f"{url} sends what is no reply: {words}{kept}")
        if status in (401, 403):
            state = "holds none of its keys" if os.environ.get(self.key_variable) else "is not set"
            return PermissionError(f"{url} refuses the key: the variable {self.key_variable} {state}; set it{kept}")
        if status == 404 and not key:
            return ValueError(f"{url} lists no models (404): is the address right? It ends in /v1 as a rule")
        if status in (408, 409, 429) or status >= 500:
            return ConnectionError(f"{url} still fails after {self.retries} retries: {words}{kept}")
        if status:
            return ValueError(f"{url} refuses {key or 'to list its models'}: {words}{kept}")
        if isinstance(error, openai.APITimeoutError):
            advice = f"did not answer within {self.timeout:g} s: raise timeout, or lower concurrency"
        else:
            advice = "can't be reached: is the server running, and the address right?"
        return ConnectionError(f"{url} {advice}{kept}")


def _checked(url: str) -> str:
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query:
        raise ValueError("a server's address holds a user, password or query: keys come from the environment alone")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is no server's address, such as http://127.0.0.1:8000/v1")
    return url.rstrip("/")


def _name(path: str) -> str:
    """A model's name, or the end of its path: the folders above differ between equal servers."""
    return "/".join(path.split("/")[-2:])


def _facts(entry: Any) -> str:
    """Weights, parent and size, as far as told; nothing that differs between equal servers, such as dates."""
    told = entry.model_extra or {}
    named = {name: _name(told[name]) for name in ("root", "parent") if told.get(name)}
    sized = {name: told["meta"][name] for name in ("n_params", "size") if name in (told.get("meta") or {})}
    return ",".join(f"{name}={value}" for name, value in (named | sized).items())


def _lists_its_cache(client: openai.OpenAI, url: str) -> bool:
    """Whether this is `transformers serve`: it lists the hub's cache, not what it serves, or fails without one."""
    try:
        described = client.with_options(base_url=url.removesuffix("/v1")).get("/openapi.json", cast_to=object)
        return "/load_model" in described["paths"]
    except (openai.APIError, *MALFORMED):
        return False


def _body(request: Request, refused: set[str]) -> dict[str, Any]:
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
        "chat_template_kwargs": {"enable_thinking": sampling.thinking},
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


def _reply(chat: Any, request: Request) -> Reply:
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
