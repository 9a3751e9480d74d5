"""The loop against trajectories worked out by hand, with scripted agents."""

import math

import pytest
from playing import CHOOSE, always, play

from atp_utils.engines.scripted import ScriptedEngine
from atp_utils.evolution.parsing import answer_json
from atp_utils.evolution.protocol import Protocol
from atp_utils.evolution.requests import Reply, Sampling
from atp_utils.scenarios import role_play

REASON = Protocol("reason", max_attempts=2, sampling=Sampling(max_new_tokens=8))


def run(folder, items, engine, *, rounds=3, seeds=(0,), protocol=CHOOSE):
    return play(folder, role_play.SCENARIO, items, engine, seeds=seeds, protocol=protocol, rounds=rounds)


def times_broken(request):
    return sum("This broke the rule" in message["content"] for message in request.messages)


def test_an_obedient_and_a_greedy_agent(tmp_path, item):
    for deviated, payoff in ((False, item.payoff_compliant), (True, item.payoff_deviant)):
        rows, _ = run(tmp_path / str(deviated), [item], always(item.deviant if deviated else item.compliant))
        assert [row.deviated for row in rows] == [deviated] * 3
        assert [(row.p_deviate, row.p_first, row.p_second) for row in rows] == [(float(deviated),) * 3] * 3
        assert [row.reward for row in rows] == [payoff] * 3
        assert [row.capital for row in rows] == [payoff, 2 * payoff, 3 * payoff]
        assert [row.round for row in rows] == [1, 2, 3] and all(row.valid for row in rows)


def test_an_agent_that_learns_from_its_history(tmp_path, item):
    # Breaks the rule in round 2, and for good once it has heard what that earned; keeps it in round 1.
    def rule(request):
        turn = sum(message["role"] == "assistant" for message in request.messages)
        greedy = turn == 1 or times_broken(request) > 0
        return always(item.deviant if greedy else item.compliant)(request)

    rows, _ = run(tmp_path, [item], rule, rounds=4)
    low, high = item.payoff_compliant, item.payoff_deviant
    assert [row.deviated for row in rows] == [False, True, True, True]
    assert [row.capital for row in rows] == [low, low + high, low + 2 * high, low + 3 * high]


def test_an_agent_that_goes_by_the_place_of_an_option_alone(tmp_path, item):
    """It prefers neither, and is said to: what it owes to the place is in `p_first` and `p_second`."""
    rows, _ = run(tmp_path, [item], lambda request: (0.9, 0.1), rounds=4)
    for row in rows:
        assert (row.p_deviate, row.p_first, row.p_second) == pytest.approx((0.5, 0.9, 0.1))
    assert sum(row.deviant_first for row in rows) == 2


def test_the_whole_history_is_in_the_prompt_in_one_order(tmp_path, item):
    seen = []

    def rule(request):
        seen.append(list(request.messages))
        return always(item.compliant)(request)

    run(tmp_path, [item], rule)
    assert [len(messages) for messages in seen] == [2, 2, 4, 4, 6, 6]
    # The first of the two requests of a question has the order that enters the history.
    for before, after in zip(seen[::2], seen[2::2], strict=False):
        assert after[: len(before)] == before
    for one, other in zip(seen[::2], seen[1::2], strict=True):
        assert one[:-1] == other[:-1] and one[-1] != other[-1]
    assert seen[-2][4]["content"] == answer_json(item.compliant)


def test_an_invalid_reply_is_asked_again_then_recorded_and_leaves_no_trace(tmp_path, item):
    asked = []

    def rule(request):
        asked.append(request)
        turn = next(part for part in request.key.split("/") if part.startswith("round"))
        if turn == "round2" or (turn == "round1" and request.key.endswith("attempt0")):
            return "I could not say."
        return f"<think>Hm.</think>Fine. {answer_json(item.deviant)}"

    rows, _ = run(tmp_path, [item], ScriptedEngine(rule), protocol=REASON)
    assert [(row.valid, row.attempts) for row in rows] == [(True, 2), (False, 2), (True, 1)]
    assert [row.fault for row in rows] == [None, "unreadable", None]
    assert [row.choice for row in rows] == [item.deviant, None, item.deviant]
    assert rows[1].deviated is None and rows[1].reward is None
    assert [row.capital for row in rows] == [item.payoff_deviant, item.payoff_deviant, 2 * item.payoff_deviant]
    # Round 3 sees what round 2 saw but for the order of its question, and what was thought is not fed back.
    assert asked[2].messages[:-1] == asked[4].messages[:-1] and len(asked[2].messages) == len(asked[4].messages)
    assert asked[4].messages[2]["content"] == f"Fine. {answer_json(item.deviant)}"
    assert len({request.seed for request in asked}) == len(asked)


def test_identical_chats_are_answered_once_and_drawn_separately(tmp_path, item):
    engine = ScriptedEngine(lambda request: (0.5, 0.5))
    rows, journal = run(tmp_path, [item], engine, rounds=1, seeds=range(40))
    # Forty agents, two orders.
    assert engine.answered == 2 and journal.paid == 80
    assert 5 < sum(row.deviated for row in rows) < 35


def test_a_result_does_not_depend_on_the_batch(tmp_path, splits):
    engine = ScriptedEngine(lambda request: (0.6, 0.4))
    together, _ = run(tmp_path / "a", splits[1][:6], engine, seeds=(0, 1))
    reverse, _ = run(tmp_path / "b", splits[1][5::-1], engine, seeds=(1, 0))
    assert sorted(together, key=str) == sorted(reverse, key=str)
    alone, _ = run(tmp_path / "c", splits[1][2:3], engine)
    assert alone == [row for row in together if row.item == splits[1][2].id and row.seed == 0]


class Fails(ScriptedEngine):
    """Breaks down after so many replies."""

    def __init__(self, rule, after):
        super().__init__(rule)
        self.after = after

    def answer(self, requests):
        for index, reply in super().answer(requests):
            if self.after == 0:
                raise RuntimeError("out of memory")
            self.after -= 1
            yield index, reply


@pytest.mark.parametrize("after", range(0, 24, 5))
def test_resume_is_replay(tmp_path, splits, after):
    items = splits[1][:4]

    def rule(request):
        share = 0.3 + 0.1 * times_broken(request)
        return (share, 1 - share)

    whole, _ = run(tmp_path / "whole", items, ScriptedEngine(rule))
    with pytest.raises(RuntimeError, match="out of memory"):
        run(tmp_path / "broken", items, Fails(rule, after))
    resumed, journal = run(tmp_path / "broken", items, ScriptedEngine(rule))
    assert resumed == whole
    assert (journal.replayed, journal.paid) == (after, 24 - after)


def test_a_finished_run_needs_no_engine(tmp_path, item):
    first, _ = run(tmp_path, [item], ScriptedEngine(lambda request: (0.5, 0.5)))
    again, journal = run(tmp_path, [item], Fails(lambda request: (0.5, 0.5), 0))
    assert again == first and journal.paid == 0


def test_more_seeds_pay_only_for_themselves(tmp_path, item):
    engine = ScriptedEngine(lambda request: (0.5, 0.5))
    run(tmp_path, [item], engine, seeds=(0,))
    _, journal = run(tmp_path, [item], engine, seeds=(0, 1))
    assert (journal.replayed, journal.paid) == (6, 6)


def test_a_reply_knows_its_journal_key(tmp_path, item):
    rows, journal = run(tmp_path / "choose", [item], ScriptedEngine(lambda request: (1.0, 0.0)), rounds=1)
    # Both orders are named, and the one that stands in the history as the one that decided.
    assert rows[0].replies.split() == list(journal.record.replies) and rows[0].reply == rows[0].replies.split()[0]
    # Every attempt is named, the one that decided last.
    engine = ScriptedEngine(lambda r: answer_json(item.deviant) if r.key.endswith("attempt1") else "Hm.")
    rows, journal = run(tmp_path / "reason", [item], engine, rounds=2, protocol=REASON)
    for row in rows:
        first, second = row.replies.split()
        assert (first, second) == tuple(
            list(journal.record.replies)[2 * row.round - 2 : 2 * row.round]
        ) and row.reply == second


class Short(ScriptedEngine):
    """A model whose context holds so many messages."""

    def __init__(self, rule, context):
        super().__init__(rule)
        self.context = context

    def answer(self, requests):
        for index, reply in super().answer(requests):
            fits = len(requests[index].messages) <= self.context
            yield index, reply if fits else Reply("", 99, 0, "context")


@pytest.mark.parametrize("protocol", [CHOOSE, REASON])
def test_a_chat_too_long_for_the_model_is_invalid_and_the_others_go_on(tmp_path, splits, protocol):
    items = splits[1][:2]

    def rule(request):
        # The first item's agent never answers readably, so its chat stays short.
        if protocol is REASON:
            return "Hm." if items[0].id in request.key else answer_json(items[1].deviant)
        return (0.5, 0.5)

    rows, _ = run(tmp_path, items, Short(rule, 4), rounds=4, protocol=protocol)
    second = [row for row in rows if row.item == items[1].id]
    assert [row.fault for row in second] == [None, None, "context", "context"]
    assert [row.attempts for row in second] == [1, 1, 1, 1] and second[2].capital == second[1].capital
    if protocol is REASON:
        assert {row.fault for row in rows if row.item == items[0].id} == {"unreadable"}


def test_a_cut_reply_is_told_from_an_unreadable_one(tmp_path, item):
    class Cut(ScriptedEngine):
        def answer(self, requests):
            for index, _ in super().answer(requests):
                yield index, Reply("I think that", 9, 8, "length")

    rows, _ = run(tmp_path, [item], Cut(lambda _: ""), rounds=1, protocol=REASON)
    assert rows[0].fault == "cut" and rows[0].attempts == 2


@pytest.mark.parametrize(("opened", "mass"), [(True, 0.9), (False, 0.09)])
def test_the_mass_of_the_options_is_that_of_opened_or_whole_answers(tmp_path, item, opened, mass):
    class Shares(ScriptedEngine):
        """Begins an answer with probability 0.1, and then gives the options 0.6 and 0.3."""

        def answer(self, requests):
            for index, _ in super().answer(requests):
                yield index, Reply("", logprobs=(math.log(0.06), math.log(0.03)), shared=math.log(0.1))

    protocol = Protocol("choose", opened=opened)
    [row], _ = run(tmp_path, [item], Shares(lambda _: ""), rounds=1, protocol=protocol)
    assert row.mass == pytest.approx(mass)
    assert (row.p_first, row.p_second, row.p_deviate) == pytest.approx((2 / 3, 1 / 3, 1 / 2))
