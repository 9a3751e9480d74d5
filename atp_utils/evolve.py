"""The one loop that runs episodes of any scenario in lock-step (Algorithms 1 and 2 of the paper).

An episode is a generator: it yields the list of chats that it needs answered now, receives their replies in
the same order, and returns its decisions. It knows nothing of models, batches or files.
"""

from collections.abc import Generator, Mapping, Sequence
from hashlib import sha256
from typing import Any

from atp_utils.decisions import Decision
from atp_utils.engine import Engine, Reply, Request
from atp_utils.journal import Journal


class Answered(Reply):
    """A reply together with ``digest``, its key in the journal."""

    def __init__(self, reply: Reply, digest: str):
        super().__init__(**vars(reply))
        object.__setattr__(self, "digest", digest)


Episode = Generator[Sequence[Request], Sequence[Answered], list[Decision]]


def run(episodes: Sequence[Episode], engine: Engine, journal: Journal, progress: Any = None) -> list[Decision]:
    """Decisions of all ``episodes``, in their order; see `run_all`."""
    return [decision for rows in run_all(episodes, engine, journal, progress) for decision in rows]


def run_all(episodes: Sequence[Generator], engine: Engine, journal: Journal, progress: Any = None) -> list:
    """Advance all ``episodes`` together until each has returned; what they returned, in their order.

    Every step gathers the pending requests of all episodes, answers those that the journal doesn't hold in
    one engine call, journals the replies as they arrive and hands them back. ``progress`` is a tqdm bar that
    moves by one a reply. An error of the engine passes through; what was answered before is journalled.
    """
    returned: dict[int, Any] = {}
    waiting: dict[int, Sequence[Request]] = {}

    def advance(number: int, replies: Sequence[Answered] | None) -> None:
        try:
            waiting[number] = episodes[number].send(replies)
        except StopIteration as stop:
            waiting.pop(number, None)
            returned[number] = stop.value

    for number in range(len(episodes)):
        advance(number, None)
    while waiting:
        asked = dict(waiting)
        replies = answer(asked, engine, journal, progress)
        for number in asked:
            advance(number, replies[number])
    return [returned[number] for number in range(len(episodes))]


def answer(
    asked: Mapping[int, Sequence[Request]], engine: Engine, journal: Journal, progress: Any = None
) -> dict[int, list[Answered]]:
    """Replies to one step's requests, from the journal where it has them, else from one engine call."""
    slots = [(number, place) for number, requests in asked.items() for place in range(len(requests))]
    requests = {slot: asked[slot[0]][slot[1]] for slot in slots}
    digests = {slot: requests[slot].digest(engine.identity) for slot in slots}
    journal.chats.update(
        sha256(request.content().encode("utf-8", "surrogatepass")).digest() for request in requests.values()
    )
    replies = {slot: journal.get(digests[slot]) for slot in slots}
    missing = [slot for slot in slots if replies[slot] is None]
    if progress is not None:
        progress.update(len(slots) - len(missing))
    for index, reply in engine.answer([requests[slot] for slot in missing]) if missing else ():
        slot = missing[index]
        journal.put(digests[slot], requests[slot], reply)
        replies[slot] = reply
        if progress is not None:
            progress.update(1)
    journal.sync()
    return {
        number: [Answered(replies[number, place], digests[number, place]) for place in range(len(asked[number]))]
        for number in asked
    }
