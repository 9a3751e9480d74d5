"""The engine for servers, against a server that fails in every way that servers do."""

import asyncio
import json
import logging
import random
import threading
import time
from collections import Counter
from dataclasses import replace

import pytest
from fault_server import KEY, Handler, answers, asking, chat, choice, free, running, said

from atp_utils.engines import openai_engine
from atp_utils.engines.scripted import ScriptedEngine
from atp_utils.evolution import decisions, journal, loop
from atp_utils.evolution.protocol import Protocol
from atp_utils.evolution.requests import Sampling
from atp_utils.scenarios import role_play

SENT = openai_engine.sent("")
PASSING = ("429", "500", "503", "half", "cut", "garbage", "wrong", "abort", "nothing", "silence")


@pytest.fixture
def start(monkeypatch):
    with running(monkeypatch) as make:
        yield make


@pytest.mark.parametrize("fault", PASSING)
def test_no_fault_loses_a_reply_or_counts_one_twice(start, fault):
    server = start()
    engine = asking(server.url, timeout=1.5 if fault == "silence" else 20)
    server.faults.extend([fault] * 3)
    replies = answers(engine, [free(number) for number in range(12)])
    assert [reply.text for reply in replies] == [f"Say {number}. {number}" for number in range(12)]
    assert {(reply.prompt_tokens, reply.completion_tokens, reply.finish_reason) for reply in replies} == {
        (7, 2, "stop")
    }
    assert len(server.posts) == 15 and engine.answered == 12


def play(folder, items, engine):
    how = Protocol("reason", sampling=Sampling(max_new_tokens=8))
    given = role_play.Evolution(rounds=3)
    episodes = [role_play.SCENARIO.episode(item, given, how, 0) for item in items]
    with journal.Journal(folder) as record:
        rows = loop.run(episodes, engine, record)
        record.finish(decisions.to_frame(rows, model="toy", arm="base"), {}, engine.identity)
    return rows


def test_a_run_over_faults_is_the_run_without_them(start, tmp_path, splits):
    server = start(lambda body: chat(choice(body["messages"], body["seed"])))
    server.faults.extend(random.Random(0).choices([*PASSING[:-1], *[None] * 9], k=80))
    engine = asking(server.url, concurrency=8, retries=9)
    rows = play(tmp_path / "served", splits[1][:16], engine)
    script = ScriptedEngine(lambda request: choice(request.messages, request.seed % 2**31), engine.identity)
    expected = play(tmp_path / "scripted", splits[1][:16], script)
    assert [replace(row, prompt_tokens=0, completion_tokens=0) for row in rows] == expected
    lines = (tmp_path / "served" / journal.REPLIES).read_text().splitlines()
    digests = [json.loads(line)["digest"] for line in lines if '"digest"' in line]
    assert len(digests) == len(set(digests)) == 48 == engine.answered


def test_a_run_goes_on_where_its_server_broke_down(start, tmp_path, splits):
    def rule(body):
        if len(server.served) == 20:
            server.broken = "500"
        return chat(choice(body["messages"], body["seed"]))

    server = start(rule)
    with pytest.raises(ConnectionError, match="still fails after 1 retries.*run again to go on"):
        play(tmp_path, splits[1][:16], asking(server.url, concurrency=1, retries=1))
    kept = journal.read_record(tmp_path / journal.REPLIES).replies
    assert len(kept) == len(server.served) == 21
    server.broken, server.rule = None, lambda body: chat(choice(body["messages"], body["seed"]))
    play(tmp_path, splits[1][:16], asking(server.url, concurrency=1))
    assert set(Counter(json.dumps(body) for body in server.served).values()) == {1} and len(server.served) == 48
    server.broken = "500"
    play(tmp_path, splits[1][:16], asking("http://127.0.0.1:9/v1", identity=f"toy|root=a/toy|{SENT}"))


def test_replies_under_way_are_kept_when_another_request_fails(start):
    failed = threading.Event()

    def rule(body):
        if "Say 0." in said(body):
            failed.set()
            return {"status": 400, "error": {"message": f"the chat is too long for {KEY}"}}
        failed.wait(20)
        time.sleep(0.1)
        return chat(said(body))

    server, got = start(rule), []
    engine = asking(server.url, concurrency=3, key_variable="TEST_KEY")
    with pytest.raises(ValueError, match=r"refuses test/0 .*too long for \*\*\*.*run again"):
        for index, _ in engine.answer([free(n) for n in range(9)]):
            got.append(index)
    assert sorted(got) == sorted(body["seed"] for body in server.served) and 2 <= len(got) < 8


def test_a_run_finishes_although_a_chat_is_too_long(start, tmp_path, splits):
    full = "This model's maximum context length is 4096 tokens. However, you requested 4100 tokens."
    long, *others = {item.environment: item for item in splits[1]}.values()
    items = [others[0], long, others[1]]

    def rule(body):
        if len(body["messages"]) > 2 and body["messages"][0]["content"].startswith(long.system):
            return {"status": 400, "error": {"message": full, "code": 400}}
        return chat(choice(body["messages"], body["seed"]))

    rows = play(tmp_path, items, asking(start(rule).url, concurrency=2))
    assert [(row.item, row.round, row.fault) for row in rows if not row.valid] == [
        (long.id, 2, "context"), (long.id, 3, "context"),
    ]  # fmt: skip
    away = asking("http://127.0.0.1:9/v1", identity=f"toy|root=a/toy|{SENT}")
    assert len(rows) == 9 and play(tmp_path, items, away) == rows


def test_retry_after_is_honoured(start):
    server = start()
    server.faults.append("slow down")
    answers(asking(server.url), [free(1)])
    assert server.times[1] - server.times[0] >= 0.4


def test_several_servers_share_the_load_and_one_that_stays_out_is_left(start):
    meeting = threading.Barrier(4, timeout=20)

    def rule(body):
        meeting.wait()
        time.sleep(0.1)  # a fifth request would come now
        return chat(said(body))

    first, second = start(rule), start(rule)
    engine = asking([first.url, second.url + "/"], concurrency=4, retries=1)
    answers(engine, [free(number) for number in range(8)])
    assert len(first.served) == len(second.served) == 4
    assert first.most_parallel == second.most_parallel == 2
    first.rule = second.rule = lambda body: chat(said(body))
    first.broken = "nothing"
    assert [reply.text[-2:] for reply in answers(engine, [free(number) for number in range(10, 40)])] == [
        str(number) for number in range(10, 40)
    ]
    assert len(first.served) == 4 and len(second.served) == 34
    second.broken = "503"
    with pytest.raises(ConnectionError, match="run again"):
        answers(engine, [free(1)])


def test_bad_servers_are_refused_before_a_token_is_paid_for(start):
    server, other = start(), start()
    other.models = {"data": [{"id": "toy", "root": "another/toy"}]}
    for url, model, error, advice in (
        (server.url.removesuffix("/v1"), "toy", ValueError, "ends in /v1"),
        ("http://127.0.0.1:9/v1", "toy", ConnectionError, "is the server running"),
        (server.url, "gpt", ValueError, "serves 'toy', not 'gpt'"),
        ([server.url, other.url], "toy", ValueError, "different models"),
    ):
        with pytest.raises(error, match=advice) as caught:
            asking(url, model=model)
        assert KEY not in str(caught.value)
    with pytest.raises(ValueError, match="the replies before came from 'toy|root=b/toy'"):
        list(asking(server.url, identity="toy|root=b/toy").answer([free(1)]))
    other.models = {"data": [{"id": "toy", "root": "/adapters/toy", "parent": "base", "owned_by": "sglang"}]}
    with pytest.raises(ValueError, match="SGLang lists the adapter 'toy', but .* answers with the base model"):
        asking(other.url)
    other.models["data"][0]["owned_by"] = "vllm"
    assert asking(other.url).identity == f"toy|root=adapters/toy,parent=base|{SENT}"
    server.models = b"<html>"
    with pytest.raises(ValueError, match="no OpenAI-compatible server"):
        asking(server.url)
    server.broken = "401"
    for variable, advice in (
        ("TEST_KEY", "refuses the key that the variable TEST_KEY holds"),
        ("OTHER_KEY", "variable OTHER_KEY is not set: put the servers' key into it"),
        ("", "wants a key: name its variable by key_variable"),
    ):
        with pytest.raises(PermissionError, match=advice):
            asking(server.url, key_variable=variable)
    assert server.posts == other.posts == []


def test_the_key_is_sent_and_appears_nowhere(start, caplog, tmp_path, splits, monkeypatch):
    caplog.set_level(logging.DEBUG)
    keys = []
    server = start(lambda body: chat(choice(body["messages"], body["seed"])))
    monkeypatch.setattr(
        Handler, "do_GET", lambda self: keys.append(self.headers["Authorization"]) or self.send(200, server.models)
    )
    server.faults.extend(["500", "garbage", "429"])
    engine = asking(server.url, retries=3, key_variable="TEST_KEY")
    play(tmp_path, splits[1][:2], engine)
    shown = [caplog.text, repr(vars(engine)), *(path.read_bytes().decode("latin-1") for path in tmp_path.iterdir())]
    for server.broken in ("400", "403", "500", "garbage", "404"):
        with pytest.raises((ConnectionError, PermissionError, ValueError)) as caught:
            answers(engine, [free(1)])
        shown += [str(caught.value), repr(caught.value.__cause__), str(caught.getrepr(chain=True, showlocals=False))]
    monkeypatch.setenv("TEST_KEY", f"{KEY}\nX-More: 1")
    with pytest.raises(ValueError, match="TEST_KEY holds characters") as caught:
        asking(server.url, key_variable="TEST_KEY")
    assert set(keys) == {f"Bearer {KEY}"}
    assert not any(KEY in text for text in [*shown, caplog.text, str(caught.value)])


def test_a_key_that_was_not_named_is_not_sent(start, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = start()
    server.key = KEY
    with pytest.raises(PermissionError, match="wants a key"):
        asking(server.url)
    assert answers(asking(server.url, key_variable="OPENAI_API_KEY"), [free(1)])


def test_a_lone_surrogate_in_the_history_can_be_sent_and_journalled(start, tmp_path):
    server = start(lambda body: chat("broken \ud83d half"))
    engine = asking(server.url)
    [first] = answers(engine, [free(1)])
    history = [{"role": "user", "content": "?"}, {"role": "assistant", "content": first.text}]
    request = replace(free(2), messages=history)
    answers(engine, [request])
    with journal.Journal(tmp_path) as record:
        kept = record.put(request, engine.identity, first)
    read = journal.read_record(tmp_path / journal.REPLIES)
    assert list(read.replies.values()) == [kept] and read.request(kept.digest).messages == tuple(history)
    assert server.served[1]["messages"][1]["content"] == "broken ? half"


def test_it_runs_inside_a_running_loop_and_can_be_left_early(start):
    server = start(lambda body: time.sleep(0.05) or chat(said(body)))
    engine = asking(server.url, concurrency=2)

    async def cell():
        return answers(engine, [free(1)])

    assert asyncio.run(cell())[0].text == "Say 1. 1"
    before = threading.active_count()
    stream = engine.answer([replace(free(n), seed=n) for n in range(50)])
    next(stream)
    stream.close()
    until = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.01)
    # Those under way end by themselves; no other is asked.
    assert threading.active_count() <= before and engine.answered == 2 and len(server.posts) < 20
