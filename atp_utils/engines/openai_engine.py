"""The engine for servers that speak OpenAI's protocol: vLLM, SGLang, llama.cpp, `transformers serve`, OpenAI's own.

Who repeats what: the ``openai`` client asks a server again after time-outs, broken connections and the statuses 408,
409, 429 and 5xx, with growing waits or after as long as ``Retry-After`` says. ``tenacity`` repeats what the client
takes for a reply and isn't, and where there are several servers it leaves one that stayed out for the next.

A forced choice is answered in the best way that the servers offer, which ``finish_reason`` names (docs/servers.md). A
reply ends with the model's context where ``max_new_tokens`` would go beyond it; a chat that is itself too long is
answered with no text and the finish reason ``context``.
"""

import hashlib
import itertools
import json
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from typing import Any

import tenacity
from openai.types import Completion
from openai.types.chat import ChatCompletion

from atp_utils.engines import Servers, openai_wire
from atp_utils.engines.openai_servers import Refused, Server, Unusable
from atp_utils.evolution.requests import Reply, Request, collapse
from atp_utils.support.code_digest import PACKAGE, code_of

WAIT = tenacity.wait_random_exponential(multiplier=0.5, max=30)
PROBE = Request("probe", ({"role": "user", "content": "Yes or no?"},), 0, ("Yes", "No"))


class OpenAIEngine:
    """Answers `Request`s with ``model``, as the servers call it.

    The servers are asked at once what they serve, which costs no token: raises ValueError for a wrong address or
    another model, PermissionError for a refused or missing key, ConnectionError for a server that can't be reached.
    With the ``identity`` of an earlier run they are asked only once a reply is needed, so that a finished run is
    replayed without them. ``answered`` counts replies.
    """

    def __init__(self, model: str, served: Servers, identity: str | None = None):
        self.model, self.served, self.identity = model, served, identity
        self.answered = 0
        self._servers: list[Server] = []
        self._refused: set[str] = set()
        self._scores: bool | None = None if served.tokenizer else False
        self._thread = threading.local()
        if identity is None:
            self._connect()

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        """Yield ``(index, reply)`` as replies arrive; forced choices of equal content share one that has scores.

        Once a request has failed for good no other is sent; those under way are waited for and yielded, then the
        error is raised: ConnectionError, PermissionError, ValueError for what the servers refuse, or
        NotImplementedError where one no longer scores options.
        """
        if not self._servers:
            self._connect()
        if self._scores is None and any(request.options for request in requests):
            self._scores = self._can_score()
        # Threads, because Jupyter has an event loop running already. Each keeps to one server, and goes on to the next
        # where that stays out.
        groups, places = collapse(requests), itertools.count()
        pool = ThreadPoolExecutor(self.served.concurrency, initializer=lambda: self._begin(next(places)))
        try:
            while groups:
                groups = yield from self._answer_each(pool, requests, groups)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _answer_each(
        self, pool: ThreadPoolExecutor, requests: Sequence[Request], groups: list[list[int]]
    ) -> Generator[tuple[int, Reply], None, list[list[int]]]:
        """Ask once for each group; returns what is left where sampled text, by its seed, answered one of several."""
        asked = {pool.submit(self._retry, self._attempt, requests[group[0]]): group for group in groups}
        left, failure = [], None
        for future in as_completed(list(asked)):
            group = asked.pop(future)
            if future.cancelled():
                continue
            if error := future.exception():
                failure = failure or error
                for other in asked:
                    other.cancel()
                continue
            reply = future.result()
            self.answered += 1
            shares = len(group) if not reply.finish_reason.startswith("sampled:") else 1
            left += [[index] for index in group[shares:]]
            for index in group[:shares]:
                yield index, reply
        if failure is not None:
            raise failure
        return left

    def _begin(self, place: int) -> None:
        self._thread.place = place

    def _retry(self, call: Callable[..., Reply], *given: Any) -> Reply:
        """What ``call`` returns, tried again after what is no reply, and wherever another server may stand in."""
        kind = Unusable if len(self._servers) == 1 else ConnectionError
        stop = tenacity.stop_after_attempt(max(self.served.retries + 1, len(self._servers)))
        retrying = tenacity.Retrying(retry=tenacity.retry_if_exception_type(kind), stop=stop, wait=WAIT, reraise=True)
        return retrying(call, *given)

    def _attempt(self, request: Request) -> Reply:
        server = self._servers[self._thread.place % len(self._servers)]
        try:
            return (self._score if request.options and self._scores else self._chat)(server, request)
        except ConnectionError:
            self._thread.place += 1
            raise
        except Refused as error:
            if not openai_wire.TOO_LONG.search(str(error)):
                raise
            return self._unlimited(server, request)

    def _unlimited(self, server: Server, request: Request) -> Reply:
        """The reply to a chat that fills the context with ``max_new_tokens`` more: of whatever length is left."""
        try:
            if not request.options:
                return self._chat(server, request, limited=False)
        except Refused as error:
            if not openai_wire.TOO_LONG.search(str(error)):
                raise
        return Reply("", 0, 0, "context")

    def _can_score(self) -> bool:
        """Whether every server scores options: what a reply means must not depend on which one gave it.

        llama.cpp isn't asked: by its version it ignores ``echo`` or fails on it.
        """
        if any(server.maker == "llamacpp" for server in self._servers):
            return False
        try:
            for server in self._servers:
                self._retry(self._score, server, PROBE)
        except (Refused, NotImplementedError):
            return False
        return True

    def _score(self, server: Server, request: Request) -> Reply:
        """log P of every option's complete answer; all options in one request, as token ids."""
        # Imported here, because it takes seconds and only scoring needs it.
        from atp_utils.models import chat_template, load_tokenizer

        messages = openai_wire.sendable(request.messages)
        prompt, options = chat_template.tokenised(load_tokenizer(self.served.tokenizer), messages, request.options)
        texts = [prompt + option for option in options]
        body = {"prompt": texts, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
        read = partial(openai_wire.echoed_reply, prompt, options)
        return server.ask(request.key, "/completions", Completion, body, read)

    def _chat(self, server: Server, request: Request, limited: bool = True) -> Reply:
        """A chat's reply, asked for again without the fields that the server refuses by name.

        Where it isn't ``limited`` the server ends it with its context.
        """
        messages, read = openai_wire.sendable(request.messages), partial(openai_wire.chat_reply, request)
        while True:
            fields = openai_wire.chat_fields(request, self._refused, server.maker)
            if not limited:
                fields = {name: value for name, value in fields.items() if name not in openai_wire.LIMITS}
            try:
                body = {"messages": messages, **fields}
                return server.ask(request.key, "/chat/completions", ChatCompletion, body, read)
            except Refused as error:
                named = openai_wire.refused_fields(str(error), fields)
                if not named:
                    raise
                self._refused |= named

    def _connect(self) -> None:
        """Ask the servers what they serve; raises ValueError where that isn't one model or not that of ``identity``."""
        servers = [Server(url, self.model, self.served) for url in self.served.urls]
        told = {server.url: server.facts for server in servers}
        if len(set(told.values())) > 1:
            raise ValueError(f"the servers have different models by the name {self.model!r}: {told}")
        parts = [openai_wire.short_name(self.model), servers[0].facts, sent(self.served.tokenizer)]
        found = "|".join(filter(None, parts))
        if self.identity not in (None, found):
            before = f"the replies before came from {self.identity!r}: serve that again, or use another folder (out)"
            raise ValueError(f"the servers have {found!r}, {before}")
        self.identity, self._servers = found, servers


def sent(tokenizer: str) -> str:
    """How chats are asked, as a part of identities: this code, and the tokenizer with what it makes of a chat."""
    code = f"code={code_of(f'{PACKAGE}/engines/openai_engine.py')[:16]}"
    if not tokenizer:
        return code
    from atp_utils.models import chat_template, load_tokenizer

    loaded = load_tokenizer(tokenizer)
    made = [chat_template.fingerprint(loaded)[:16], chat_template.tokenised(loaded, PROBE.messages, PROBE.options)]
    digest = hashlib.sha256(json.dumps(made).encode()).hexdigest()[:8]
    return f"{code}|tokenizer={openai_wire.short_name(tokenizer)}:{digest}"
