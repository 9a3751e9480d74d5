"""How a server of OpenAI's protocol is reached, what it says it serves, and what to do when that fails."""

import os
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import openai

from atp_utils.engines import Servers, openai_wire
from atp_utils.evolution.requests import Reply
from atp_utils.support.text import inert

KEPT = "; the replies before are kept, run again to go on"
# What accessing a field of garbage raises; the client's types are built without validation.
MALFORMED = (AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError, RecursionError)


class Unusable(ConnectionError):
    """What a server sent is no reply."""


class Refused(ValueError):
    """A server doesn't take a request."""


class _Client(openai.OpenAI):
    @property
    def default_headers(self) -> dict[str, str | openai.Omit]:
        """None from the environment: no server gets what is meant for another."""
        return {"Accept": "application/json", "Content-Type": "application/json", "User-Agent": self.user_agent}


class Server:
    """A server at ``url``, asked for ``model``, the ``facts`` that it tells of it, and its ``maker`` where it says so.

    Raises what `OpenAIEngine` does, with the environment variables at fault.
    """

    def __init__(self, url: str, model: str, served: Servers):
        self.url, self.model, self.served = url, model, served
        variable, self._key = served.key_variable, os.environ.get(served.key_variable, "").strip()
        if variable and not self._key:
            raise PermissionError(f"the variable {variable} is not set: put the servers' key into it")
        if not (self._key.isascii() and self._key.isprintable()):
            raise ValueError(f"the environment variable {variable} holds characters that no key has")
        patience = openai.Timeout(served.timeout, connect=10)
        try:
            # A server without keys is sent one that means nothing.
            key = self._key or "none"
            plain = openai.DefaultHttpxClient(follow_redirects=False)
            settings = {"timeout": patience, "max_retries": served.retries, "http_client": plain}
            self._client = _Client(base_url=url, api_key=key, **settings)
        except (OSError, ValueError, ImportError) as error:
            # Certificates that can't be read, proxies that are no address; what is said of these may hold a password.
            names = ", ".join(name for name in os.environ if re.fullmatch("(?i)SSL_CERT_.+|.+_PROXY", name))
            raise ValueError(f"no connection ({type(error).__name__}): check the variables {names}") from None
        self.maker = ""
        self.facts, self._names = self._listed()

    def ask(self, asked: str, path: str, kind: type, body: dict[str, Any], read: Callable[[Any], Reply]) -> Reply:
        """What ``read`` makes of the answer to the request ``asked``, of the ``openai`` package's type ``kind``.

        Raises Refused, Unusable, another ConnectionError, PermissionError, or ValueError if another model answered.
        """
        answer = None
        try:
            answer = self._client.post(path, cast_to=kind, body={"model": self.model, **body})
            reply, told = read(answer), answer.model
            # A server that was given the key may put it anywhere, and the reply goes into the journal.
            known = {name: self._keyless(getattr(reply, name)) for name in ("text", "finish_reason")}
            reply, told = replace(reply, **known), self._keyless(str(told or ""))
        except openai.APIError as error:
            raise self._explained(error, asked) from None
        except MALFORMED as error:
            words = self._redacted(str(getattr(error, "doc", answer)))
            raise Unusable(f"{self.url} sends what is no reply ({error}): {words!r}{KEPT}") from None
        # A revision (`transformers serve`) or a dated snapshot (OpenAI) of what was asked for is the same model.
        same = re.escape(self.model) + r"(@.+|-\d[\d-]{3,})?"
        if told and told not in self._names and not re.fullmatch(same, told):
            advice = f"serve the model by that name, or put the one that answers under names{KEPT}"
            raise ValueError(f"{self.url} answers as {told!r}, asked for {self.model!r}: {advice}")
        return reply

    def _listed(self) -> tuple[str, frozenset[str]]:
        """See `openai_wire.listing`; raises ValueError for a wrong address or another model."""
        asking = self._client.with_options(timeout=30, max_retries=2)
        if _lists_its_cache(asking, self.url):
            return "", frozenset()
        try:
            found = {entry.id: entry for entry in asking.models.list().data}
        except openai.APIError as error:
            raise self._explained(error) from None
        except MALFORMED:
            raise ValueError(f"{self.url} is no OpenAI-compatible server; an address ends in /v1 as a rule") from None
        if self.model not in found:
            advice = "put one of these under names, or start the server with the model that you want"
            serves = self._redacted(", ".join(map(repr, found)))
            raise ValueError(f"{self.url} serves {serves}, not {self.model!r}: {advice}")
        self.maker = getattr(found[self.model], "owned_by", "")
        facts, names = openai_wire.listing(self.model, found)
        return inert(self._keyless(facts)), names

    def _keyless(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    def _redacted(self, text: str) -> str:
        """The beginning of what a server said, to be shown; it may have quoted the key."""
        return inert(self._keyless(text)[:500])

    def _explained(self, error: openai.APIError, asked: str = "") -> Exception:
        """An error that says what to do; ``asked`` is empty while no request was sent."""
        kind, variable = ConnectionError, self.served.key_variable
        told = error.response.text if isinstance(error, openai.APIStatusError) else error.__cause__ or error
        if isinstance(error, openai.APIStatusError) and error.response.is_redirect:
            kind, what = Refused, "sends elsewhere, which no request follows: name the address itself"
            told = error.response.headers.get("location", "")
        elif isinstance(error, openai.APITimeoutError):
            what = "did not answer in time: raise timeout, or lower concurrency"
        elif isinstance(error, openai.APIConnectionError):
            what = "can't be reached: is the server running?"
        elif isinstance(error, openai.RateLimitError | openai.ConflictError | openai.InternalServerError):
            what = f"still fails after {self.served.retries} retries"
        elif isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            held = f"refuses the key that the variable {variable} holds"
            kind, what = PermissionError, held if variable else "wants a key: name its variable by key_variable"
        else:
            listing = "lists no models: is the address right? It ends in /v1 as a rule"
            kind, what = Refused, f"refuses {asked}" if asked else listing
        return kind(f"{self.url} {what} ({self._redacted(str(told))}){KEPT if asked else ''}")


def _lists_its_cache(client: openai.OpenAI, url: str) -> bool:
    """Whether this is `transformers serve`: it lists the hub's cache, not what it serves, or fails without one."""
    try:
        return "/load_model" in client.get(url.removesuffix("/v1") + "/openapi.json", cast_to=object)["paths"]
    except (openai.APIError, *MALFORMED):
        return False
