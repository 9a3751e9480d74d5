"""The chat in which an agent is asked again: properties of any past, and what it says, by hand."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atp_utils.evolution.history import UNRELATED, Past, Scene, recall, second_hand, unrelated
from atp_utils.evolution.parsing import answer_json

ORDER = {False: "X or Y?", True: "Y or X?"}
SCENE = Scene(
    lambda number, turned: [
        {"role": "system", "content": "S"},
        {"role": "user", "content": f"Opening {number}. {ORDER[turned]}"},
    ],
    lambda number, turned: f"Again {number}. {ORDER[turned]}",
    "euros",
)


def a_past(turns, options, rewards=None):
    rounds = zip(turns, options, rewards or [1.0] * len(options), strict=True)
    return [
        Past(number, turned, option, f"I say {option}.", f"Told {number}.", reward if option else None)
        for number, (turned, option, reward) in enumerate(rounds, start=1)
    ]


pasts = st.lists(st.tuples(st.booleans(), st.sampled_from(["X", "Y", None])), max_size=6).map(
    lambda rounds: a_past(*([list(part) for part in zip(*rounds, strict=True)] or ([], [])))
)


@settings(max_examples=200, deadline=None)
@given(pasts, st.booleans(), st.integers(0, 7))
def test_a_chat_alternates_and_ends_in_the_order_that_is_asked(past, turned, window):
    number, kept = len(past) + 1, past[len(past) - window if 0 < window < len(past) else 0 :]
    chat = recall(SCENE, past, number, turned, window=window)
    valid = [round_ for round_ in kept if round_.option]
    assert [message["role"] for message in chat] == ["system", "user", *["assistant", "user"] * len(valid)]
    assert chat[-1]["content"].endswith(f" {number}. {ORDER[turned]}")
    assert [message["content"] for message in chat[2::2]] == [round_.said for round_ in valid]
    # What was heard, in its order, and each question as it was named.
    text = "\n".join(message["content"] for message in chat if message["role"] == "user")
    places = [text.index(round_.told) for round_ in kept]
    assert places == sorted(places) and all(text.count(round_.told) == 1 for round_ in kept)
    for round_ in kept:
        assert f" {round_.number}. {ORDER[round_.turned]}" in text
    assert not any(round_.told in text for round_ in past[: len(past) - len(kept)])


@settings(max_examples=100, deadline=None)
@given(pasts, st.sampled_from(["turns", "counts"]), st.integers(0, 7))
def test_the_two_orders_of_a_question_differ_in_its_last_words_alone(past, memory, window):
    one, other = (recall(SCENE, past, len(past) + 1, t, memory=memory, window=window) for t in (False, True))
    assert one[:-1] == other[:-1] and one != other
    assert one[-1]["content"].removesuffix(ORDER[False]) == other[-1]["content"].removesuffix(ORDER[True])


@settings(max_examples=100, deadline=None)
@given(pasts, st.booleans(), st.sampled_from(["X", "Y"]))
def test_a_longer_history_extends_the_shorter_one(past, turned, option):
    number = len(past) + 1
    shorter = recall(SCENE, past, number, turned)
    longer = [*past, Past(number, turned, option, "I say it.", "Told.")]
    for last in (False, True):
        chat = recall(SCENE, longer, number + 1, last)
        assert chat[: len(shorter)] == shorter and len(chat) == len(shorter) + 2


TWO_AND_ONE = a_past([False, True, False, True], ["X", "Y", None, "X"], [24, 60, 0, 25])


@pytest.mark.parametrize(
    ("past", "window", "counts"),
    [
        (TWO_AND_ONE, 0, "X 2 times, which earned 24.5 euros on average; Y 1 time, which earned 60 euros on average."),
        (TWO_AND_ONE, 2, "X 1 time, which earned 25 euros on average."),
        ([replace(round_, reward=None) for round_ in TWO_AND_ONE], 0, "X 2 times; Y 1 time."),
        # What was told of earnings is what they are averaged over.
        ([TWO_AND_ONE[0], replace(TWO_AND_ONE[3], reward=None)], 0, "X 2 times, which earned 24 euros on average."),
        (TWO_AND_ONE[2:3], 0, None),
    ],
)
def test_counts_in_place_of_turns(past, window, counts):
    chat = recall(SCENE, past, 5, True, memory="counts", window=window)
    said = f"Until now you have chosen {counts}" if counts else "Until now you have made no valid choice."
    assert [message["content"] for message in chat] == ["S", f"{said}\n\nOpening 5. Y or X?"]


def test_a_first_round_has_nothing_to_tell():
    for memory in ("turns", "counts"):
        assert recall(SCENE, [], 1, True, memory=memory) == SCENE.opening(1, True)


def test_an_unrelated_history_has_the_form_of_one_and_nothing_of_it():
    opening = SCENE.opening(7, False)
    assert unrelated(opening, 0, " or ".join) == opening
    chat = unrelated(opening, 6, lambda options: f"Answer {' or '.join(options)}.")
    assert [message["role"] for message in chat] == ["system", "user", *["assistant", "user"] * 6]
    assert chat[1]["content"] == (
        "A choir asks which of two songs to begin with. Your options: Opal or Coral. What do you say? "
        "Answer Opal or Coral."
    )
    assert chat[2]["content"] == answer_json("Opal") and chat[12]["content"] == answer_json("Coral")
    assert chat[3]["content"].startswith("The hall was full, and the choir was in tune. This was noted.\n\nA painter")
    assert chat[-1]["content"].endswith(f"This was noted.\n\n{opening[-1]['content']}")
    assert chat[0] == opening[0] and not any("Opening" in message["content"] for message in chat[:-1])
    turned = unrelated(opening, 6, lambda options: f"Answer {' or '.join(options)}.", second=True)
    assert turned[1]["content"] == (
        "A choir asks which of two songs to begin with. Your options: Coral or Opal. What do you say? "
        "Answer Coral or Opal."
    )
    assert [message for message in turned if message["role"] == "assistant"] == chat[2::2]
    assert len({option for _, options, _ in UNRELATED for option in options}) == 2 * len(UNRELATED)


def test_what_another_did_is_told_in_front_of_the_question():
    opening = SCENE.opening(3, True)
    assert second_hand(opening, []) == opening
    chat = second_hand(opening, a_past([False, True], ["X", "Y"]))
    assert chat == [
        opening[0],
        {
            "role": "user",
            "content": "Someone else in your place decided before you.\nRound 1: Told 1.\nRound 2: Told 2.\n\n"
            "Opening 3. Y or X?",
        },
    ]
