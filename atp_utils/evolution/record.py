"""What a journal's file holds, line by line, and how it is packed to be published.

A packed journal lacks what follows from the rest: addresses of messages and digests of replies, which xz can't make
smaller. Its first line names the engine's ``identity``; a message's ``before`` and a reply's ``chat`` say how many
messages ago in the file that message stood, 0 for none. Reading it computes the others again, so that a decision finds
its reply only while the request is the recorded one, to the letter.
"""

import hashlib
import json
import lzma
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atp_utils.evolution.requests import Message, Reply, Request, Sampling
from atp_utils.support import files

ROLES = {"system", "user", "assistant"}
_REQUEST = ("key", "seed", "options", "sampling", "chat")


@dataclass
class Record:
    """The lines of a journal: ``replies`` by digest, what they were ``asked``, ``messages`` and tools' ``results``."""

    replies: dict[str, Reply] = field(default_factory=dict)
    asked: dict[str, dict[str, Any]] = field(default_factory=dict)
    messages: dict[str, tuple[str, Message]] = field(default_factory=dict)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    def request(self, digest: str) -> Request:
        """The request that a reply answers; raises ValueError where the journal doesn't hold it whole."""
        asked = self.asked[digest]
        if "chat" not in asked:
            raise ValueError(f"the reply {digest} was recorded without its request")
        try:
            return self.requested(asked)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the request of the reply {digest} isn't whole: {error}") from None

    def requested(self, asked: dict[str, Any]) -> Request:
        """The request that a reply's line tells of; raises KeyError, TypeError or ValueError where it isn't whole."""
        place, chat = asked["chat"], []
        while place:
            place, message = self.messages[place]
            chat.append(message)
            if len(chat) > len(self.messages):
                raise ValueError("a message stands before itself")
        sampling = Sampling(**asked["sampling"]) if "sampling" in asked else Sampling()
        return Request(asked["key"], tuple(chat[::-1]), asked["seed"], tuple(asked.get("options", ())), sampling)

    def add(self, line: bytes) -> None:
        """Take in a line of JSON; raises KeyError, TypeError or ValueError for one that is no journal's."""
        self.take(_parsed(line))

    def take(self, entry: dict[str, Any]) -> None:
        """`add`, of a line that has been parsed."""
        if "message" in entry:
            if entry["role"] not in ROLES or not isinstance(entry["content"], str):
                raise ValueError("a message needs a known role and a text")
            self.messages[entry["message"]] = entry["before"], {name: entry[name] for name in ("role", "content")}
        elif "tool" in entry:
            self.results[entry["tool"]] = dict(entry["result"])
        else:
            digest = entry["digest"]
            self.asked[digest] = {name: entry.pop(name) for name in _REQUEST if name in entry}
            if entry.get("logprobs") is not None:
                entry["logprobs"] = tuple(entry["logprobs"])
            self.replies[digest] = Reply(**entry)


def address(kind: str, asked: str) -> str:
    """The journal's key of what a tool was asked."""
    return hashlib.sha256(f"{kind}\n{asked}".encode("utf-8", "surrogatepass")).hexdigest()[:32]


def place_of(before: str, role: str, content: str) -> str:
    """The address of a message: it depends on all messages ``before`` it."""
    return hashlib.sha256(json.dumps([before, role, content]).encode()).hexdigest()[:32]


class Unpacking:
    """Takes the lines of a packed journal into ``record``, in order; an address that a line does have is kept."""

    def __init__(self, record: Record):
        self.record = record
        self.identity: str | None = None
        self.places: list[str] = []

    def add(self, line: bytes) -> None:
        """What `Record.add` is for a journal's line, with its errors."""
        entry = _parsed(line)
        if "identity" in entry:
            self.identity = entry["identity"]
            return
        for name in {"before", "chat"} & set(entry):
            entry[name] = self._place(entry[name])
        if "role" in entry:
            place = entry.setdefault("message", place_of(entry["before"], entry["role"], entry["content"]))
            if place not in self.record.messages:
                self.places.append(place)
        elif "tool" not in entry and "digest" not in entry:
            if self.identity is None:
                raise ValueError("a reply without its digest, and no line before names the engine's identity")
            entry["digest"] = self.record.requested(entry).digest(self.identity)
        self.record.take(entry)

    def _place(self, ago: int | str) -> str:
        if isinstance(ago, str):
            return ago
        if not 0 <= ago <= len(self.places):
            raise ValueError(f"a message {ago} messages ago, where {len(self.places)} are known")
        return self.places[-ago] if ago else ""


def pack(path: Path, identity: str) -> bytes:
    """The packed form of the journal in ``path``, of a run whose engine has this ``identity``.

    Raises ValueError naming a line that is damaged.
    """
    record = Record()
    places: dict[str, int] = {}

    def short(line: bytes) -> dict[str, Any]:
        entry = _parsed(line)
        record.take(dict(entry))
        if "chat" in entry and record.request(entry["digest"]).digest(identity) == entry["digest"]:
            del entry["digest"]
        place = entry.get("message")
        if place is not None and place == place_of(entry["before"], entry["role"], entry["content"]):
            del entry["message"]
        for name in {"before", "chat"} & set(entry):
            entry[name] = len(places) - places[entry[name]] if entry[name] else 0
        if place is not None:
            places.setdefault(place, len(places))
        return entry

    lines = [{"identity": identity}, *(entry for _, entry in files.each_line(path, path.read_bytes(), short))]
    text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in lines)
    return lzma.compress(text.encode("utf-8", "surrogatepass"))


def _parsed(line: bytes) -> Any:
    return json.loads(line.decode("utf-8", "surrogatepass"))
