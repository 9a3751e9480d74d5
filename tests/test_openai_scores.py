"""Forced choices on servers: the best that each offers, and no probability that it didn't tell."""

import math

import pytest
from fault_server import NO, PREFIX, YES, Letters, answers, asking, chat, echo, forced, free, running, tops

from atp_utils import models
from atp_utils.engines import openai_wire
from atp_utils.evolution.parsing import answer_json
from atp_utils.evolution.protocol import normalise


@pytest.fixture
def start(monkeypatch):
    with running(monkeypatch) as make:
        yield make


def test_options_are_scored_whole_where_the_server_echoes(start, monkeypatch):
    monkeypatch.setattr(models, "load_tokenizer", lambda name: Letters())
    server = start(echo)
    engine = asking(server.url, tokenizer="letters")
    replies = answers(engine, [forced(seed) for seed in range(30)])
    assert len({reply.logprobs for reply in replies}) == 1
    assert replies[0].logprobs == pytest.approx((-0.1 * len(YES), -0.1 * len(NO)))
    assert {(reply.text, reply.finish_reason) for reply in replies} == {("", "scored")}
    assert replies[0].shared == pytest.approx(-0.1 * len('{"choice": "'))
    assert replies[0].prompt_tokens == len("user: Do you like rain?\nassistant: ")
    assert len(server.served) == 2 and engine.answered == 1  # the probe and one request
    assert "|tokenizer=letters:" in engine.identity


@pytest.mark.parametrize("kind", ["new token only", "a chat's form", "refused", "none"])
def test_the_first_differing_token_stands_in_where_nothing_is_echoed(start, monkeypatch, kind):
    monkeypatch.setattr(models, "load_tokenizer", lambda name: Letters())

    def rule(body):
        if "prompt" not in body:
            return chat(NO, logprobs=tops(*PREFIX, ("No", {"No": 0.3, "Yes": 0.5, "Y": 0.1, "Maybe": 0.1})))
        told = {"new token only": {"token_logprobs": [-0.5]}, "a chat's form": {"content": [{"logprob": -0.5}]}}
        short = {"index": 0, "logprobs": told.get(kind)}
        return {"status": 400, "error": "no"} if kind == "refused" else {"choices": [short, short | {"index": 1}]}

    server = start(rule)
    replies = answers(asking(server.url, tokenizer="letters"), [forced(seed) for seed in range(20)])
    assert normalise(replies[0].logprobs) == pytest.approx([2 / 3, 1 / 3])
    assert {reply.finish_reason for reply in replies} == {"first_token"}
    assert server.posts.count("/v1/chat/completions") == 1
    schema = server.served[-1]["response_format"]["json_schema"]["schema"]
    assert schema["properties"] == {"choice": {"enum": ["Yes", "No"]}} and server.served[-1]["temperature"] == 1


def test_llama_cpp_is_sent_the_answers_letter_by_letter(start, monkeypatch):
    monkeypatch.setattr(models, "load_tokenizer", lambda name: Letters())
    said, options = tops(*PREFIX, ("No", {"No": 0.6, "Yes": 0.3})), ('{"choice": "Café \\"A\\""}', NO)
    server = start(lambda body: chat(NO, logprobs=said))
    server.models = {"data": [{"id": "toy", "owned_by": "llamacpp"}]}
    engine = asking(server.url, tokenizer="letters")
    answers(engine, [forced(options=options), forced(seed=1), free(2)])
    bodies = sorted(server.served, key=lambda body: body["seed"])
    assert bodies[0]["grammar"] == r'root ::= "{\"choice\": \"Café \\\"A\\\"\"}" | "{\"choice\": \"No\"}"'
    assert bodies[1]["grammar"].startswith(r'root ::= "{\"choice\": \"Yes\"}" | ')
    # It isn't asked to score whole, and free text is free.
    assert set(server.posts) == {"/v1/chat/completions"} and "grammar" not in bodies[2]
    assert not any("response_format" in body for body in bodies)


@pytest.mark.parametrize(
    "logprobs",
    [
        None,
        tops(*PREFIX, ("No", {"No": 0.6, "Maybe": 0.2})),  # "Yes" is not among them, and 0.2 might be its
        tops(*PREFIX, ("Maybe", {"Maybe": 1.0})),  # neither is
        tops(),
        tops(("Sure", {"Sure": 0.8, "{": 0.2})),  # the text is another
        tops(('{"', {'{"': 0.9, '{"choice": "N': 0.1}), *PREFIX[1:], ("No", {"No": 0.5, "Yes": 0.5})),  # two ways to No
    ],
)
def test_without_clear_log_probabilities_every_request_gets_its_own_text(start, logprobs):
    server = start(lambda body: chat((YES, NO, "Rain is wet.")[body["seed"] % 3], logprobs=logprobs))
    replies = answers(asking(server.url), [forced(seed) for seed in range(9)])
    assert [reply.text for reply in replies] == [YES, NO, "Rain is wet."] * 3
    assert {(reply.logprobs, reply.finish_reason) for reply in replies} == {(None, "sampled:stop")}
    assert sorted(body["seed"] for body in server.served) == list(range(9))


def test_a_token_that_begins_several_options_is_ambiguous(start):
    options = tuple(answer_json(name) for name in ("Green Gate", "Green Door", "Red Gate"))
    clear = {"Green G": 0.3, "Green D": 0.3, "Red": 0.4}
    for table, reason in ((clear, "first_token"), (clear | {"Green": 0.2}, "sampled:stop")):
        server = start(lambda body, table=table: chat(options[2], logprobs=tops(*PREFIX, ("Red", table))))
        [reply] = answers(asking(server.url), [forced(options=options)])
        assert reply.finish_reason == reason


def test_a_token_without_text_begins_no_option(start):
    table = {"No": 0.5, "Yes": 0.25, "": 0.2}
    [reply] = answers(asking(start(lambda body: chat(NO, logprobs=tops(*PREFIX, ("No", table)))).url), [forced()])
    assert reply.finish_reason == "first_token" and [math.exp(p) for p in reply.logprobs] == pytest.approx([0.25, 0.5])


LISTED = tuple((name, 0.0001) for name in map(str, range(18)))


@pytest.mark.parametrize(
    ("table", "most"),
    [
        ({"No": 0.99, "Yes": 0.0}, 0.01),  # -9999
        ({"No": 0.99, "Nope": 0.005, **dict(LISTED)}, 0.005 - 18 * 0.0001),  # outside of the list
        ({"No": 1.0}, openai_wire.ROUNDING),
    ],
)
def test_an_option_too_unlikely_to_be_listed_has_what_is_left_at_most(start, table, most):
    server = start(lambda body: chat(NO, logprobs=tops(*PREFIX, ("No", table))))
    replies = answers(asking(server.url), [forced(seed) for seed in range(4)])
    assert {reply.finish_reason for reply in replies} == {"first_token:bound"} and len(server.served) == 1
    yes, no = map(math.exp, replies[0].logprobs)
    assert no == pytest.approx(0.99 if most > 1e-5 else 1.0) and yes == pytest.approx(most)


def test_options_that_are_not_listed_share_what_is_left_and_the_drawn_token_counts(start):
    options = tuple(map(answer_json, ("Red", "Green", "Blue")))
    server = start(lambda body: chat(options[0], logprobs=tops(*PREFIX, ("Red", {"Red": 0.96}))))
    [reply] = answers(asking(server.url), [forced(options=options)])
    assert [math.exp(value) for value in reply.logprobs] == pytest.approx([0.96, 0.02, 0.02])
    drawn = tops(*PREFIX, ("Yes", {"Yes": 0.01, "No": 0.9}))
    drawn["content"][-1]["top_logprobs"].pop(0)
    [reply] = answers(asking(start(lambda body: chat(YES, logprobs=drawn)).url), [forced()])
    assert normalise(reply.logprobs) == pytest.approx([1 / 91, 90 / 91]) and reply.finish_reason == "first_token"


@pytest.mark.parametrize("value", [math.nan, math.inf, 3.0])
def test_what_is_no_log_probability_is_the_servers_fault(start, monkeypatch, value):
    monkeypatch.setattr(models, "load_tokenizer", lambda name: Letters())
    wrong = tops(*PREFIX, ("No", {"No": 0.3, "Yes": 0.5}))
    wrong["content"][-1]["top_logprobs"][0]["logprob"] = value
    right = tops(*PREFIX, ("No", {"No": 0.3, "Yes": 0.5}))
    server = start(lambda body: chat(NO, logprobs=right if len(server.posts) > 2 else wrong))
    engine = asking(server.url, retries=2)
    [reply] = answers(engine, [forced()])
    assert normalise(reply.logprobs) == pytest.approx([5 / 8, 3 / 8]) and len(server.posts) == 3
    server.rule = lambda body: chat(NO, logprobs=wrong)
    with pytest.raises(ConnectionError, match="sends what is no reply .a log-probability is not a number"):
        answers(engine, [forced()])


def test_a_fault_does_not_change_how_options_are_scored(start, monkeypatch):
    monkeypatch.setattr(models, "load_tokenizer", lambda name: Letters())

    def rule(body):
        answer = echo(body)
        if len(server.posts) in (1, 4):
            answer["choices"][0]["logprobs"]["token_logprobs"][-2] = math.nan
        return answer

    server = start(rule)
    server.faults.extend([None, "garbage"])
    [reply] = answers(asking(server.url, tokenizer="letters"), [forced()])
    assert (reply.finish_reason, len(server.posts)) == ("scored", 5)
    assert reply.logprobs == pytest.approx((-0.1 * len(YES), -0.1 * len(NO)))
