"""How servers of OpenAI's protocol are reached, what they say they serve, and what to do when that fails."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import openai

from atp_utils.engines import openai_wire as wire
from atp_utils.evolution.parsing import encodable

Client = TypeVar("Client", openai.OpenAI, openai.AsyncOpenAI)
CERTIFICATES = {"SSL_CERT_FILE": os.path.isfile, "SSL_CERT_DIR": os.path.isdir}


class Unusable(ConnectionError):
    """What a server sent is no reply."""


@dataclass(frozen=True)
class Connection:
    """Key and patience. ``timeout`` is in seconds without a byte from the server; see `OpenAIEngine`."""

    key_variable: str
    timeout: float
    retries: int

    def open(self, kind: type[Client], url: str) -> Client:
        """A client for one server; raises PermissionError or ValueError naming the environment variable at fault."""
        key = self._key()
        if self.key_variable and not key:
            raise PermissionError(f"the variable {self.key_variable} is not set: put the servers' key into it")
        if not (key.isascii() and key.isprintable()):
            raise ValueError(f"the environment variable {self.key_variable} holds characters that no key has")
        for name, exists in CERTIFICATES.items():
            if (path := os.environ.get(name)) and not exists(path):
                raise ValueError(
                    f"the environment variable {name} names {path}, which isn't there: correct or unset it"
                )
        timeout = openai.Timeout(self.timeout, connect=min(10, self.timeout))
        # A server without keys is sent one that means nothing.
        settings = {"api_key": key or "none", "timeout": timeout, "max_retries": self.retries}
        try:
            return kind(base_url=url, default_headers=_headers(settings["api_key"]), **settings)
        except (OSError, ValueError, ImportError) as error:
            # Certificates that can't be read, proxies that are no address or of an unknown kind.
            variables = ", ".join(
                name for name in os.environ if name in CERTIFICATES or name.lower().endswith("_proxy")
            )
            # A proxy's address may hold a password, and so may what is said of it.
            words = str(error) if isinstance(error, OSError) else type(error).__name__
            raise ValueError(f"no connection can be set up ({words}): check the variables {variables}") from None

    def _key(self) -> str:
        return os.environ.get(self.key_variable, "").strip()

    def listed(self, model: str, url: str) -> wire.Listing:
        """What the server says of ``model``; raises ValueError for a wrong address or another model."""
        with self.open(openai.OpenAI, url) as client:
            asking = client.with_options(timeout=min(30, self.timeout), max_retries=min(2, self.retries))
            try:
                found = {entry.id: entry for entry in asking.models.list().data}
            except openai.APIError as error:
                if not isinstance(error, openai.InternalServerError) or not _lists_its_cache(asking, url):
                    raise self.explained(url, error) from None
                found = {}
            except wire.MALFORMED:
                raise ValueError(f"{url} is no OpenAI-compatible server; an address ends in /v1 as a rule") from None
            if model in found:
                return wire.listing(model, found)
            if found and not _lists_its_cache(asking, url):
                raise ValueError(
                    f"{url} serves {', '.join(map(repr, found))}, not {model!r}: ask for one of these "
                    "(in a notebook: served_name), or start the server with the model that you want"
                )
        return wire.Listing()

    def redacted(self, text: str, length: int) -> str:
        """The beginning of what a server said; it may have quoted the key."""
        secret = self._key()
        return encodable((text.replace(secret, "***") if secret else text)[:length])

    def explained(self, url: str, error: Exception, key: str = "") -> Exception:
        """An error that says what to do; ``key`` is the request's, empty while none was sent."""
        status, words = getattr(error, "status_code", 0), self.redacted(str(error), 300)
        if isinstance(error, openai.APIStatusError):
            # The client's own message leaves out what a server says outside of the protocol.
            words = f"status {status}, {self.redacted(error.response.text, 300)}"
        kept = "; the replies before are kept, run again to go on" if key else ""
        if isinstance(error, (Unusable, wire.NotEchoed)):
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
            cause = self.redacted(str(error.__cause__ or error), 200)
            advice = f"can't be reached ({cause}): is the server running, and the address right?"
        return ConnectionError(f"{url} {advice}{kept}")


def _headers(key: str) -> Mapping[str, Any]:
    """Headers that undo what the client takes from the environment: no server gets what wasn't meant for it."""
    # The variables are OPENAI_CUSTOM_HEADERS, OPENAI_ORG_ID and OPENAI_PROJECT_ID.
    lines = os.environ.get("OPENAI_CUSTOM_HEADERS", "").split("\n")
    names = {line.partition(":")[0].strip() for line in lines} | {"OpenAI-Organization", "OpenAI-Project"}
    own = {"accept": "application/json", "content-type": "application/json"}
    undone = {name: own.get(name.lower(), openai.omit) for name in names if name.lower() != "authorization"}
    return undone | {"Authorization": f"Bearer {key}"}


def _lists_its_cache(client: openai.OpenAI, url: str) -> bool:
    """Whether this is `transformers serve`: it lists the hub's cache, not what it serves, or fails without one."""
    try:
        described = client.with_options(base_url=url.removesuffix("/v1")).get("/openapi.json", cast_to=object)
        return "/load_model" in described["paths"]
    except (openai.APIError, *wire.MALFORMED):
        return False
