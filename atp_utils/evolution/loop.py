"""The one loop that runs episodes of any scenario in lock-step (Algorithms 1 and 2 of the paper).

An episode is a generator: it yields the list of chats that it needs answered now, receives their replies in
the same order, and returns its decisions. It knows nothing of models, batches or files.
"""

from collections.abc import Generator, Mapping, Sequence
from typing import Any

from atp_utils.evolution.decisions import Decision
from atp_utils.evolution.journal import Journal
from atp_utils.evolution.requests import Engine, Reply, Request

Episode = Generator[Sequence[Request], Sequence[Reply], list[Decision]]


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

    def advance(number: int, replies: Sequence[Reply] | None) -> None:
        try:
            waiting[number] = episodes[number].send(replies)
        except StopIteration as stop:
            waiting.pop(number, None)
            returned[number] = stop.value

    for number in range(len(episodes)):
        advance(number, None)
    while waiting:
        asked = dict(waiting)
        replies = _answer(asked, engine, journal, progress)
        for number in asked:
            advance(number, replies[number])
    return [returned[number] for number in range(len(episodes))]


def alone(episode: Generator, engine: Engine, journal: Journal) -> list[tuple[Sequence[Request], Sequence[Reply]]]:
    """Play one ``episode`` by itself: what it asked in each step, and the replies, journalled as in `run_all`."""
    steps: list[tuple[Sequence[Request], Sequence[Reply]]] = []
    replies = None
    while True:
        try:
            asked = episode.send(replies)
        except StopIteration:
            return steps
        replies = _answer({0: asked}, engine, journal, None)[0]
        steps.append((asked, replies))


def _answer(
    asked: Mapping[int, Sequence[Request]], engine: Engine, journal: Journal, progress: Any
) -> dict[int, list[Reply]]:
    """Replies to one step's requests, from the journal where it has them, else from one engine call."""
    requests = {(number, place): request for number, own in asked.items() for place, request in enumerate(own)}
    replies = {slot: journal.find(request, engine.identity) for slot, request in requests.items()}
    missing = [slot for slot, reply in replies.items() if reply is None]
    if progress is not None:
        progress.update(len(requests) - len(missing))
    for index, reply in engine.answer([requests[slot] for slot in missing]) if missing else ():
        slot = missing[index]
        replies[slot] = journal.put(requests[slot], engine.identity, reply)
        if progress is not None:
            progress.update(1)
    journal.sync()
    return {number: [replies[number, place] for place in range(len(own))] for number, own in asked.items()}
