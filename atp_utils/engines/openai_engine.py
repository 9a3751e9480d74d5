"""The engine for servers: any that speak OpenAI's protocol (vLLM, SGLang, llama.cpp, Ollama, `transformers serve`).

Who repeats what: the ``openai`` client asks a server again, ``retries`` times, after time-outs, broken connections
and the statuses 408, 409, 429 and 5xx, with jittered exponential backoff, or after as long as ``Retry-After`` says
(at most two minutes). ``tenacity`` repeats, as often, what the client takes for a reply and isn't (garbage, a cut
body), and where there are several servers it leaves one that stayed out for the next.

A forced choice is answered in the best of three ways that the servers offer; ``finish_reason`` says which:

- ``scored``: ``/completions`` echoes log P of every option's tokens (vLLM, SGLang), as `TransformersEngine` has it.
  The chat is rendered and tokenised here, so the engine needs to be told the ``tokenizer``.
- ``first_token``: the chat is answered under a JSON schema; log P of the first token that tells the options apart.
  ``first_token:bound`` where an option is so unlikely that the server doesn't list it: at most what is left is its.
- ``sampled:<reason>``: the text of that chat. There are no probabilities, and text that is no option is invalid.

A chat that is too long for the model is answered with no text and the finish reason ``context``.
"""

from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import openai
import tenacity
from anyio.from_thread import BlockingPortal, start_blocking_portal

from atp_utils.engines import openai_wire as wire
from atp_utils.engines.openai_servers import Connection, Unusable
from atp_utils.evolution.requests import Reply, Request, collapse

WAIT = tenacity.wait_random_exponential(multiplier=0.5, max=30)
NO_SCORING = {400, 404, 405, 415, 422, 501}
TOO_LONG = Reply("", 0, 0, "context")


@dataclass
class _Server:
    url: str
    client: openai.AsyncOpenAI
    known: wire.Listing
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
        self.model, self.tokenizer, self.concurrency, self.retries = model, tokenizer, concurrency, retries
        self._connection = Connection(key_variable, timeout, retries)
        self.urls = [wire.checked_url(url) for url in ([urls] if isinstance(urls, str) else urls)]
        if not self.urls:
            raise ValueError("urls is empty: name at least one server, such as http://127.0.0.1:8000/v1")
        self.answered = self.retried = 0
        self._refused: set[str] = set()
        self._known: dict[str, wire.Listing] = {}
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
            raise ValueError(f"the servers have {found!r} (sent= is how they are asked), {before}")
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
                if requests[group[0]].options and outcome.logprobs is None and outcome is not TOO_LONG:
                    # Sampled text answers one request, by its seed; the others need their own.
                    groups.extendleft([index] for index in reversed(group[1:]))
                    group = group[:1]
                for index in group:
                    yield index, outcome
        finally:
            for future in running:
                future.cancel()
        if failure is not None:
            raise failure

    async def _ask(self, servers: list[_Server], request: Request) -> Reply:
        async def attempt() -> Reply:
            return await self._attempt(min(servers, key=lambda s: (s.failures, s.in_flight)), request)

        return await self._retrying(Unusable if len(servers) == 1 else ConnectionError, len(servers))(attempt)

    def _retrying(self, kind: type[Exception], least: int = 1) -> tenacity.AsyncRetrying:
        def count(_: tenacity.RetryCallState) -> None:
            self.retried += 1

        return tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(kind),
            stop=tenacity.stop_after_attempt(max(self.retries + 1, least)),
            wait=WAIT,
            before_sleep=count,
            reraise=True,
        )

    async def _attempt(self, server: _Server, request: Request) -> Reply:
        server.in_flight += 1
        try:
            reply = await (self._score if request.options and self._scores else self._chat)(server, request)
            server.failures = 0
            return reply
        except (openai.APIError, Unusable, wire.NotEchoed) as error:
            server.failures += 1
            raise self._connection.explained(server.url, error, request.key) from None
        finally:
            server.in_flight -= 1

    async def _probe(self, servers: list[_Server]) -> bool:
        """Whether every server scores options: what a reply means must not depend on which one gave it."""
        for server in servers:
            try:
                await self._retrying(Unusable)(self._score, server, wire.PROBE)
            except (Unusable, wire.NotEchoed):
                return False
            except openai.APIError as error:
                if getattr(error, "status_code", None) in NO_SCORING:
                    return False
                raise self._connection.explained(server.url, error, wire.PROBE.key) from None
        return True

    async def _score(self, server: _Server, request: Request) -> Reply:
        """log P of every option's complete answer; all options in one request, as token ids."""
        prompt, options = self._tokenised(request)
        texts = [prompt + option for option in options]
        try:
            raw = await server.client.completions.with_raw_response.create(
                model=self.model, prompt=texts, echo=True, logprobs=1, max_tokens=1, temperature=0
            )
        except openai.APIStatusError as error:
            if wire.is_too_long(error.status_code, error.response.text, 1):
                return TOO_LONG
            raise
        scores, shared = self._read(server, raw, lambda completion: wire.echoed_scores(completion, len(prompt), texts))
        return Reply("", len(prompt), max(map(len, options)), "scored", scores, shared)

    def _tokenised(self, request: Request) -> tuple[list[int], list[list[int]]]:
        # Imported here, because it takes seconds and only scoring needs it.
        from atp_utils.models import load_tokenizer
        from atp_utils.models.chat_template import tokenised

        return tokenised(load_tokenizer(self.tokenizer), wire.sendable(request.messages), request.options)

    async def _chat(self, server: _Server, request: Request) -> Reply:
        while True:
            body = wire.chat_body(request, self._refused)
            try:
                raw = await server.client.chat.completions.with_raw_response.create(
                    model=self.model, messages=wire.sendable(request.messages), extra_body=body
                )
            except openai.APIStatusError as error:
                asked = body.get("max_tokens") or body["max_completion_tokens"]
                if wire.is_too_long(error.status_code, error.response.text, asked):
                    return TOO_LONG
                named = wire.refused_fields(error.response.text, body) if error.status_code in (400, 422) else set()
                if not named:
                    raise
                self._refused |= named
            else:
                return self._read(server, raw, lambda chat: wire.chat_reply(chat, request))

    def _read(self, server: _Server, raw: openai.APIResponse, reader: Callable[[Any], Any]) -> Any:
        """What ``reader`` makes of a response; raises Unusable for none, ValueError for one of another model."""
        self.retried += raw.retries_taken
        try:
            response = raw.parse()
            read, told = reader(response), response.model
        except wire.MALFORMED as error:
            what = error if isinstance(error, wire.Fault) else "no completion"
            raise Unusable(f"{what}: {self._connection.redacted(raw.text, 80)!r}") from None
        if wire.is_another(told, self.model, server.known):
            raise ValueError(
                f"{server.url} answers as {told!r}, asked for {self.model!r}: serve the model by that name, or ask for "
                "the one that answers (in a notebook: served_name); the replies before are kept, run again to go on"
            )
        return read

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[list[_Server]]:
        async with AsyncExitStack() as stack:
            clients = [self._connection.open(openai.AsyncOpenAI, url) for url in self.urls]
            entered = [await stack.enter_async_context(client) for client in clients]
            servers = zip(self.urls, entered, strict=True)
            yield [_Server(url, client, self._known[url]) for url, client in servers]

    def _described(self) -> str:
        """The model, what all servers say of it and how they are asked; raises ValueError if they differ."""
        self._known = {url: self._connection.listed(self.model, url) for url in self.urls}
        told = {url: known.facts for url, known in self._known.items()}
        if len(set(told.values())) > 1:
            raise ValueError(f"the servers have different models by the name {self.model!r}: {told}")
        parts = [wire.short_name(self.model), told[self.urls[0]], f"sent={sent(self.tokenizer)}"]
        if self.tokenizer:
            parts.append(f"tokenizer={wire.short_name(self.tokenizer)}")
        return "|".join(filter(None, parts))


def sent(tokenizer: str | None) -> str:
    """Digest of how chats are asked: the wire's form, and what the tokenizer's folder says besides its name."""
    if not tokenizer:
        return wire.form()
    from atp_utils.models import load_tokenizer
    from atp_utils.models.chat_template import fingerprint, tokenised

    loaded = load_tokenizer(tokenizer)
    return wire.form([fingerprint(loaded), tokenised(loaded, wire.PROBE.messages, wire.PROBE.options)])
