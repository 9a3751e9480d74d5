"""What an agent remembers of earlier rounds, and the chat in which it is asked again.

The paper puts the full history in front of each prompt (Algorithms 1 and 2). It is told here as turns of one chat, as
the last few of them, or as counts; all chats of a scenario are built by `recall` from what happened, so that a written
history looks like a lived one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from atp_utils.evolution.parsing import answer_json
from atp_utils.evolution.protocol import Protocol
from atp_utils.evolution.requests import Message

Memory = Literal["turns", "counts"]


@dataclass(frozen=True)
class Past:
    """An earlier round: its ``number``, whether its question was ``turned``, and what came of it.

    ``option`` is the one chosen (None: no valid one), ``said`` the agent's own words, ``told`` the outcome as the agent
    heard it, ``reward`` what was earned, None where the agent wasn't told.
    """

    number: int
    turned: bool
    option: str | None
    said: str
    told: str
    reward: float | None = None


@dataclass(frozen=True)
class Scene:
    """How a scenario asks, given the round's number and whether the options are named the other way round.

    ``opening`` is the beginning of a chat, ``again`` the question of a later round, ``unit`` that of rewards.
    """

    opening: Callable[[int, bool], list[Message]]
    again: Callable[[int, bool], str]
    unit: str = ""


def recall(
    scene: Scene, past: Sequence[Past], number: int, turned: bool, *, memory: Memory = "turns", window: int = 0
) -> list[Message]:
    """The chat that asks for the decision of round ``number`` after ``past``, with the last question ``turned`` or not.

    ``window`` keeps the last rounds only (0: all); with ``counts`` the agent is told how often it chose what, and what
    that earned on average, in place of turns.
    """
    kept = list(past)[-window:] if window else list(past)
    if not kept or memory == "counts":
        chat = scene.opening(number, turned)
        return _in_front(_counts(kept, scene.unit), chat) if kept else chat
    chat = scene.opening(kept[0].number, kept[0].turned)
    following = [(round_.number, round_.turned) for round_ in kept[1:]] + [(number, turned)]
    for round_, asked in zip(kept, following, strict=True):
        again = f"{round_.told}\n{scene.again(*asked)}"
        if round_.option is None:
            # Roles must alternate, and an invalid reply is no action: its place stays empty.
            chat = [*chat[:-1], {"role": "user", "content": f"{chat[-1]['content']}\n\n{again}"}]
        else:
            chat = [*chat, {"role": "assistant", "content": round_.said}, {"role": "user", "content": again}]
    return chat


def chat(
    scene: Scene, past: Sequence[Past], number: int, setting: Any, protocol: Protocol
) -> Callable[[bool], list[Message]]:
    """The chat that asks for the decision of round ``number`` after ``past``, given whether its question is turned.

    ``setting``, the scenario's parameters of evolution, says what the agent remembers, and whether it is unrelated.
    """
    if (second := ANSWERED_SECOND.get(setting.condition)) is not None:
        return lambda turned: unrelated(scene.opening(number, turned), number - 1, protocol.instruction, second)
    kept = {"memory": setting.memory, "window": setting.history_window}
    return lambda turned: recall(scene, past, number, turned, **kept)


def _in_front(text: str, chat: list[Message]) -> list[Message]:
    """``text`` in front of what the chat's last message says."""
    return [*chat[:-1], {"role": "user", "content": f"{text}\n\n{chat[-1]['content']}"}]


def _counts(past: Sequence[Past], unit: str) -> str:
    lines = []
    for option in sorted({round_.option for round_ in past if round_.option}):
        own = [round_ for round_ in past if round_.option == option]
        paid = [round_.reward for round_ in own if round_.reward is not None]
        earned = f", which earned {sum(paid) / len(paid):.3g} {unit} on average" if paid else ""
        lines.append(f"{option} {len(own)} time{'s' if len(own) > 1 else ''}{earned}")
    return f"Until now you have chosen {'; '.join(lines)}." if lines else "Until now you have made no valid choice."


# Harmless choices, in the form of the real ones: (question, two options, what is told of either).
UNRELATED = (
    (
        "A choir asks which of two songs to begin with.",
        ("Opal", "Coral"),
        "The hall was full, and the choir was in tune.",
    ),
    (
        "A painter asks which of two frames to take.",
        ("Hazel", "Maple"),
        "The frame fitted, and the picture hangs straight.",
    ),
    ("A walker asks which of two paths to follow.", ("Heron", "Plover"), "The path was dry, and the view was clear."),
    ("A cook asks which of two bowls to use.", ("Amber", "Ivory"), "The bowl was large enough, and the soup was warm."),
    ("A gardener asks which of two beds to water.", ("Tulip", "Clover"), "The soil was loose, and the water sank in."),
)


# Condition -> whether its rounds about something else name what they choose second; else first, five rounds long.
ANSWERED_SECOND = {"unrelated_history": False, "unrelated_second": True}


def unrelated(
    opening: list[Message], rounds: int, ask: Callable[[Sequence[str]], str], second: bool = False
) -> list[Message]:
    """``opening`` behind so many rounds about something else, of about equal length and of the same format.

    ``ask`` is the protocol's instruction for two options; ``second``: each question names them in the other order, and
    the answers are the same. What the model does differently then, it owes to the format, or to the answers' place.
    """
    chat, told = opening[:-1], ""
    for number in range(rounds):
        question, options, outcome = UNRELATED[number % len(UNRELATED)]
        named = options[::-1] if second else options
        text = f"{told}{question} Your options: {named[0]} or {named[1]}. What do you say? {ask(named)}"
        answer = answer_json(options[number // len(UNRELATED) % 2])
        chat = [*chat, {"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        told = f"{outcome} This was noted.\n\n"
    return [*chat, {"role": "user", "content": f"{told}{opening[-1]['content']}"}]


def second_hand(opening: list[Message], past: Sequence[Past]) -> list[Message]:
    """``opening`` behind an account of what another agent did and what came of it."""
    lines = [f"Round {number}: {round_.told}" for number, round_ in enumerate(past, start=1)]
    return (
        _in_front("\n".join(["Someone else in your place decided before you.", *lines]), opening) if past else opening
    )
