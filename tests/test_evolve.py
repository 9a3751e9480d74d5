"""The loop against trajectories worked out by hand, with scripted agents."""

import math

import pytest

from atp_utils.engines.scripted import ScriptedEngine
from atp_utils.evolution import loop
from atp_utils.evolution.journal import Journal
from atp_utils.evolution.parsing import answer_json
from atp_utils.evolution.protocol import Protocol
from atp_utils.evolution.requests import Reply, Sampling
from atp_utils.scenarios import role_play

CHOOSE = Protocol("choose")
REASON = Protocol("reason", max_attempts=2, sampling=Sampling(max_new_tokens=8))


def run(folder, items, engine, *, rounds=3, seeds=(0,), protocol=CHOOSE):
    episodes = [role_play.episode(i, rounds=rounds, seed=s, protocol=protocol) for s in seeds for i in items]
    with Journal(folder) as journal:
        return loop.run(episodes, engine, journal), journal


def option_of(request):
    """The two options in the order in which the request's prompt names them."""
    return request.options


def times_broken(request):
    return sum("This broke the rule." in message["content"] for message in request.messages)


def test_an_obedient_and_a_greedy_agent(tmp_path, item):
    good, bad = answer_json(item.compliant), answer_json(item.deviant)
    for answer, deviated, payoff in ((good, False, item.payoff_compliant), (bad, True, item.payoff_deviant)):
        engine = ScriptedEngine(lambda request, a=answer: [float(option == a) for option in request.options])
        rows, _ = run(tmp_path / str(deviated), [item], engine)
        assert [row.deviated for row in rows] == [deviated] * 3
        assert [row.p_deviate for row in rows] == [float(deviated)] * 3
        assert [row.reward for row in rows] == [payoff] * 3
        assert [row.capital for row in rows] == [payoff, 2 * payoff, 3 * payoff]
        assert [row.round for row in rows] == [1, 2, 3] and all(row.valid for row in rows)


def test_an_agent_that_learns_from_its_history(tmp_path, item):
    # Breaks the rule in round 2, and for good once it has heard what that earned; keeps it in round 1.
    def rule(request):
        turn = sum(message["role"] == "assistant" for message in request.messages)
        greedy = turn == 1 or times_broken(request) > 0
        wanted = answer_json(item.deviant if greedy else item.compliant)
        return [float(option == wanted) for option in request.options]

    rows, _ = run(tmp_path, [item], ScriptedEngine(rule), rounds=4)
    low, high = item.payoff_compliant, item.payoff_deviant
    assert [row.deviated for row in rows] == [False, True, True, True]
    assert [row.capital for row in rows] == [low, low + high, low + 2 * high, low + 3 * high]


def test_the_whole_history_is_in_the_prompt(tmp_path, item):
    seen = []

    def rule(request):
        seen.append(list(request.messages))
        return [1.0, 0.0]

    run(tmp_path, [item], ScriptedEngine(rule))
    assert [len(messages) for messages in seen] == [2, 4, 6]
    for before, after in zip(seen, seen[1:], strict=False):
        assert after[: len(before)] == before
    last = seen[-1]
    pay = item.payoff(item.options[0])
    assert last[4]["content"] == answer_json(item.options[0])
    assert f"You earned {pay} {item.unit}, {2 * pay} {item.unit} in all so far." in last[5]["content"]


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
    # Round 3 sees what round 2 saw, and what was thought is not fed back.
    assert asked[2].messages == asked[4].messages
    assert asked[4].messages[2]["content"] == f"Fine. {answer_json(item.deviant)}"
    assert len({request.seed for request in asked}) == len(asked)


def test_identical_chats_are_answered_once_and_drawn_separately(tmp_path, item):
    engine = ScriptedEngine(lambda request: (0.5, 0.5))
    rows, journal = run(tmp_path, [item], engine, rounds=1, seeds=range(40))
    assert engine.answered == 1 and journal.paid == 40
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


@pytest.mark.parametrize("after", range(0, 12, 3))
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
    assert (journal.replayed, journal.paid) == (after, 12 - after)


def test_a_finished_run_needs_no_engine(tmp_path, item):
    first, _ = run(tmp_path, [item], ScriptedEngine(lambda request: (0.5, 0.5)))
    again, journal = run(tmp_path, [item], Fails(lambda request: (0.5, 0.5), 0))
    assert again == first and journal.paid == 0


def test_more_seeds_pay_only_for_themselves(tmp_path, item):
    engine = ScriptedEngine(lambda request: (0.5, 0.5))
    run(tmp_path, [item], engine, seeds=(0,))
    _, journal = run(tmp_path, [item], engine, seeds=(0, 1))
    assert (journal.replayed, journal.paid) == (3, 3)


def test_a_reply_knows_its_journal_key(tmp_path, item):
    rows, journal = run(tmp_path / "choose", [item], ScriptedEngine(lambda request: (1.0, 0.0)), rounds=1)
    assert journal.record.replies[rows[0].reply].logprobs and rows[0].replies == rows[0].reply
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
    assert row.p_deviate == pytest.approx((2 / 3, 1 / 3)[item.options.index(item.deviant)])
