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

import os
import re
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import openai
import tenacity
from anyio.from_thread import BlockingPortal, start_blocking_portal

from atp_utils import openai_wire as wire
from atp_utils.engine import Reply, Request, collapse, drawn, render

WAIT = tenacity.wait_random_exponential(multiplier=0.5, max=30)
NO_SCORING = {400, 404, 405, 415, 422, 501}
PROBE = Request("probe", ({"role": "user", "content": "Yes or no?"},), 0, ("Yes", "No"))


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

    The key is read from the environment variable ``key_variable`` whenever it is needed; the default is for servers
    without keys. ``timeout`` is in seconds without a byte from the server. The servers are asked at once what they
    serve, which costs no token: raises ValueError for a wrong address or another model, PermissionError for a refused
    or missing key, ConnectionError for a server that can't be reached. With the ``identity`` of an earlier run they
    are asked only once a reply is needed, so that a finished run is replayed without them. ``answered`` counts
    replies, ``retried`` repeated requests.
    """

    def __init__(
        self,
        model: str,
        urls: str | Sequence[str],
        *,
        tokenizer: str | None = None,
        key_variable: str = "",
        concurrency: int = 32,
        timeout: float = 600.0,
        retries: int = 5,
        identity: str | None = None,
    ):
        if concurrency < 1 or retries < 0 or not timeout > 0:
            raise ValueError(f"concurrency {concurrency}, retries {retries} or timeout {timeout} is out of range")
        self.model, self.tokenizer, self.key_variable = model, tokenizer, key_variable
        self.concurrency, self.timeout, self.retries = concurrency, timeout, retries
        self.urls = [wire.checked_url(url) for url in ([urls] if isinstance(urls, str) else urls)]
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
            before = f"the replies before came from {self.identity!r}: serve that again, or use another folder (out)"
            raise ValueError(f"the servers have {found!r}, {before}")
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
            scores = wire.echoed_scores(raw.parse(), len(prompt), sent)
        except wire.MALFORMED:
            raise Unusable(f"the options' tokens are not all scored: {self._redacted(raw.text, 80)!r}") from None
        return Reply("", len(prompt), max(map(len, options)), "scored", scores)

    def _tokenised(self, request: Request) -> tuple[list[int], list[list[int]]]:
        # Imported here, because it takes seconds and only scoring needs it.
        from atp_utils.models import load_tokenizer

        tokenizer = load_tokenizer(self.tokenizer)
        prompt = render(tokenizer, wire.sendable(request.messages))
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, *request.options)]
        return ids[0], ids[1:]

    async def _chat(self, server: _Server, request: Request) -> Reply:
        while True:
            body = wire.chat_body(request, self._refused)
            try:
                raw = await server.client.chat.completions.with_raw_response.create(
                    model=self.model, messages=wire.sendable(request.messages), extra_body=body
                )
                break
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                named = {name for name in wire.OPTIONAL & body.keys() if re.search(rf"\b{name}\b", error.response.text)}
                if not named:
                    raise
                self._refused |= named
        self.retried += raw.retries_taken
        try:
            return wire.chat_reply(raw.parse(), request)
        except wire.MALFORMED:
            raise Unusable(f"no chat completion: {self._redacted(raw.text, 80)!r}") from None

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[list[_Server]]:
        async with AsyncExitStack() as stack:
            clients = [openai.AsyncOpenAI(base_url=url, **self._settings()) for url in self.urls]
            entered = [await stack.enter_async_context(client) for client in clients]
            yield [_Server(url, client) for url, client in zip(self.urls, entered, strict=True)]

    def _settings(self) -> dict[str, Any]:
        key = self._key()
        if self.key_variable and not key:
            raise PermissionError(f"the variable {self.key_variable} is not set: put the servers' key into it")
        if not (key.isascii() and key.isprintable()):
            raise ValueError(f"the environment variable {self.key_variable} holds characters that no key has")
        # A server without keys is sent a header that means nothing.
        timeout = openai.Timeout(self.timeout, connect=min(10, self.timeout))
        return {"api_key": key or "none", "timeout": timeout, "max_retries": self.retries}

    def _key(self) -> str:
        return os.environ.get(self.key_variable, "").strip()

    def _described(self) -> str:
        """The model and what all servers say of it; raises ValueError if they don't say the same."""
        told = {url: self._listed(url) for url in self.urls}
        if len(set(told.values())) > 1:
            raise ValueError(f"the servers have different models by the name {self.model!r}: {told}")
        rendered = f"tokenizer={wire.short_name(self.tokenizer)}" if self.tokenizer else ""
        return "|".join(filter(None, [wire.short_name(self.model), told[self.urls[0]], rendered]))

    def _listed(self, url: str) -> str:
        with openai.OpenAI(base_url=url, **self._settings()) as client:
            asking = client.with_options(timeout=min(30, self.timeout), max_retries=min(2, self.retries))
            try:
                found = {entry.id: entry for entry in asking.models.list().data}
            except openai.APIError as error:
                if not isinstance(error, openai.InternalServerError) or not _lists_its_cache(asking, url):
                    raise self._explained(url, error) from None
                found = {}
            except wire.MALFORMED:
                raise ValueError(f"{url} is no OpenAI-compatible server; an address ends in /v1 as a rule") from None
            if self.model not in found and found and not _lists_its_cache(asking, url):
                raise ValueError(
                    f"{url} serves {', '.join(map(repr, found))}, not {self.model!r}: ask for one of these "
                    "(in a notebook: served_name), or start the server with the model that you want"
                )
        return wire.facts(found[self.model]) if self.model in found else ""

    def _redacted(self, text: str, length: int) -> str:
        """The beginning of what a server said; it may have quoted the key."""
        secret = self._key()
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
            if self.key_variable:
                return PermissionError(f"{url} refuses the key that the variable {self.key_variable} holds{kept}")
            return PermissionError(f"{url} wants a key: name its environment variable by key_variable{kept}")
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


def _lists_its_cache(client: openai.OpenAI, url: str) -> bool:
    """Whether this is `transformers serve`: it lists the hub's cache, not what it serves, or fails without one."""
    try:
        described = client.with_options(base_url=url.removesuffix("/v1")).get("/openapi.json", cast_to=object)
        return "/load_model" in described["paths"]
    except (openai.APIError, *wire.MALFORMED):
        return False
