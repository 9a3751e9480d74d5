"""How a decision is taken: both orders of a forced choice, worked out by hand, and which of them enters the history."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atp_utils.evolution.parsing import answer_json
from atp_utils.evolution.protocol import Choice, Protocol, Question, decide, orders, question
from atp_utils.evolution.requests import Reply

A, B = answer_json("A"), answer_json("B")
PAST = [{"role": "system", "content": "S"}]
NAMED = {False: [*PAST, {"role": "user", "content": "A or B?"}], True: [*PAST, {"role": "user", "content": "B or A?"}]}
# Where A is named first, an answer begins with probability .1 and the options have .6 and .3 of that; where B is named
# first it begins with .5, and B has .2 and A .6 of that.
SCORES = {
    (A, B): Reply("", 5, 2, logprobs=(math.log(0.06), math.log(0.03)), shared=math.log(0.1), digest="ab"),
    (B, A): Reply("", 7, 1, logprobs=(math.log(0.1), math.log(0.3)), shared=math.log(0.5), digest="ba"),
}


def ask(questions, replies, protocol):
    """(requests, choices): what `decide` asks at once, and what it makes of the replies to that."""
    deciding = decide(questions, protocol)
    requests = next(deciding)
    with pytest.raises(StopIteration) as stop:
        deciding.send([replies(request) for request in requests])
    return requests, stop.value.value


def asked(turned, key=("k",)):
    return question(key, ("A", "B"), NAMED.__getitem__, turned)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("opened", "mass"), [(True, 0.85), (False, 0.245)])
def test_both_orders_are_asked_and_averaged(turned, opened, mass):
    requests, [choice] = ask([asked(turned)], lambda r: SCORES[r.options], Protocol("choose", opened=opened))
    sent = [(tuple(NAMED[False]), (A, B)), (tuple(NAMED[True]), (B, A))]
    assert [(request.messages, request.options) for request in requests] == sent[:: -1 if turned else 1]
    assert requests[0].key == requests[1].key and requests[0].seed == requests[1].seed
    assert [request.extended for request in requests] == [True, False]
    # A: 2/3 where it is first, 3/4 where it is second; B: 1/4 and 1/3.
    expected = {"A": (17 / 24, (2 / 3, 3 / 4)), "B": (7 / 24, (1 / 4, 1 / 3))}
    assert choice.options == (("B", "A") if turned else ("A", "B"))
    assert choice.probabilities == pytest.approx([expected[option][0] for option in choice.options])
    for option, places in zip(choice.options, choice.by_place, strict=True):
        assert places == pytest.approx(expected[option][1])
    assert choice.mass == pytest.approx(mass)
    assert (choice.prompt_tokens, choice.completion_tokens, choice.attempts) == (12, 3, 1)
    assert choice.replies == (("ba", "ab") if turned else ("ab", "ba")) and choice.decided == choice.replies[0]
    assert choice.said == choice.turn == answer_json(choice.option)


def test_the_option_is_drawn_from_the_mean():
    """A model that always takes what is named first prefers neither: either is drawn in half, in whichever order."""
    first = Reply("", logprobs=(0.0, -math.inf))
    for turned in (False, True):
        _, choices = ask([asked(turned, ("k", n)) for n in range(1000)], lambda _: first, Protocol("choose"))
        assert {choice.probabilities for choice in choices} == {(0.5, 0.5)}
        assert {choice.by_place for choice in choices} == {((1.0, 0.0), (1.0, 0.0))}
        # Binomial(1000, 0.5): standard deviation 16; five of these either way.
        assert 420 < sum(choice.option == "A" for choice in choices) < 580


def test_a_question_without_another_order_is_asked_once():
    requests, [choice] = ask([Question(("k",), NAMED[False], ("A", "B"))], lambda r: SCORES[r.options], Protocol())
    assert len(requests) == 1 and choice.by_place is None
    assert choice.probabilities == pytest.approx((2 / 3, 1 / 3)) and choice.mass == pytest.approx(0.9)


def test_each_of_several_questions_gets_its_own_replies():
    other = Reply("", logprobs=(-math.inf, 0.0))
    certain = {(A, B): other, (B, A): Reply("", logprobs=(0.0, -math.inf))}
    answers = {"k0": SCORES, "k1": certain, "k2": SCORES}
    questions = [asked(turned, (f"k{n}",)) for n, turned in enumerate((False, True, True))]
    _, choices = ask(questions, lambda r: answers[r.key.split("/")[0]][r.options], Protocol())
    found = [dict(zip(choice.options, choice.probabilities, strict=True))["A"] for choice in choices]
    assert found == pytest.approx([17 / 24, 0, 17 / 24]) and choices[1].option == "B"


@pytest.mark.parametrize("lost", [(A, B), (B, A)])
def test_a_chat_too_long_in_one_of_its_orders_decides_nothing(lost):
    long = Reply("", 99, 0, "context", digest="lost")
    _, [choice] = ask([asked(False)], lambda r: long if r.options == lost else SCORES[r.options], Protocol())
    assert (choice.option, choice.fault, choice.attempts, choice.decided) == (None, "context", 1, "lost")
    assert choice.replies == (("lost", "ba") if lost == (A, B) else ("ab", "lost"))
    assert choice.probabilities is choice.by_place is choice.mass is None
    assert choice.prompt_tokens == 99 + (7 if lost == (A, B) else 5)


def test_where_answers_are_drawn_the_historys_order_decides():
    """A server that can't score draws an answer in either order; one is the agent's, both were paid for."""
    says = {
        (A, B): Reply(A, 5, 2, "sampled:stop", digest="ab"),
        (B, A): Reply(f"Hm. {B}", 7, 3, "sampled:stop", digest="ba"),
    }
    for turned in (False, True):
        _, [choice] = ask([asked(turned)], lambda r: says[r.options], Protocol())
        assert choice.option == "AB"[turned] and choice.options == (("B", "A") if turned else ("A", "B"))
        assert choice.probabilities is choice.by_place is choice.mass is choice.fault is None
        assert (choice.prompt_tokens, choice.completion_tokens) == (12, 5)
        assert choice.replies == (("ba", "ab") if turned else ("ab", "ba")) and choice.decided == choice.replies[0]


@pytest.mark.parametrize("turned", [False, True])
def test_where_the_other_order_alone_is_drawn_the_historys_scores_decide(turned):
    """A server may list the options' first tokens in one order and not in the other."""
    own, other = ((B, A), (A, B))[:: 1 if turned else -1]
    says = {own: SCORES[own], other: Reply(answer_json("AB"[not turned]), 9, 4, "sampled:stop", digest="drawn")}
    _, choices = ask([asked(turned, ("k", n)) for n in range(1000)], lambda r: says[r.options], Protocol())
    scored = SCORES[own]
    for choice in choices:
        assert choice.options == (("B", "A") if turned else ("A", "B")) and choice.said == answer_json(choice.option)
        assert (choice.replies, choice.decided) == ((scored.digest, "drawn"), scored.digest)
        # One order's probability would hold what the model owes to the place.
        assert choice.probabilities is choice.by_place is choice.fault is None
        assert choice.mass == pytest.approx(0.8 if turned else 0.9)
        assert choice.prompt_tokens == 9 + scored.prompt_tokens
        assert choice.completion_tokens == 4 + scored.completion_tokens
    # A has 2/3 where it is first and 3/4 where it is second: standard deviations 15 and 14; five of these either way.
    assert abs(sum(choice.option == "A" for choice in choices) - (750 if turned else 667)) < 75


@pytest.mark.parametrize("turned", [False, True])
def test_where_the_historys_order_is_drawn_the_others_scores_are_dropped(turned):
    own, other = ((B, A), (A, B))[:: 1 if turned else -1]
    says = {own: Reply(f"Hm. {B}", 9, 4, "sampled:stop", digest="drawn"), other: SCORES[other]}
    _, [choice] = ask([asked(turned)], lambda r: says[r.options], Protocol())
    assert (choice.option, choice.said) == ("B", f"Hm. {B}")
    assert choice.options == (("B", "A") if turned else ("A", "B"))
    assert (choice.replies, choice.decided) == (("drawn", SCORES[other].digest), "drawn")
    assert choice.probabilities is choice.by_place is choice.mass is choice.fault is None


@pytest.mark.parametrize("turned", [False, True])
def test_written_decisions_are_asked_in_the_historys_order_alone(turned):
    requests, [choice] = ask([asked(turned)], lambda _: Reply(f"I say {B}"), Protocol("reason"))
    assert [request.messages for request in requests] == [tuple(NAMED[turned])] and not requests[0].options
    assert choice == Choice(
        option="B", options=("B", "A") if turned else ("A", "B"), said=f"I say {B}", turn=f"I say {B}", replies=("",)
    )


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 20), st.integers(0, 10**6))
def test_either_order_stands_in_half_of_an_agents_rounds(rounds, seed):
    drawn = orders(rounds, "scenario", seed)
    assert len(drawn) == rounds and abs(2 * sum(drawn) - rounds) <= 1
    assert drawn == orders(rounds, "scenario", seed)


def test_orders_are_drawn_by_seed():
    for rounds in (3, 4):
        drawn = [orders(rounds, "scenario", seed) for seed in range(400)]
        assert len({tuple(one) for one in drawn}) == 6
        # Each round of 400 seeds: 200 with standard deviation 10; five of these either way.
        assert all(150 < sum(one[place] for one in drawn) < 250 for place in range(rounds))
    assert orders(12, "scenario", 0) != orders(12, "another", 0)
