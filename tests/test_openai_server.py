"""The engine for servers on a real one: `transformers serve` on loopback with the embedded model."""

import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import playing
import pytest
from fault_server import asking
from transformers.utils.import_utils import is_serve_available

from atp_utils import models
from atp_utils.engines import openai_engine
from atp_utils.evolution import journal
from atp_utils.evolution.protocol import Protocol
from atp_utils.evolution.requests import Request, Sampling
from atp_utils.scenarios import role_play

pytestmark = pytest.mark.skipif(
    not is_serve_available(), reason="transformers serve needs fastapi and uvicorn: pip install 'transformers[serving]'"
)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def folder(embedded):
    return models.locate(embedded)


@pytest.fixture(scope="module")
def url(folder, tmp_path_factory):
    """A server's address, once it is up; its output stands in the error if it doesn't come up."""
    scratch, port = tmp_path_factory.mktemp("server"), free_port()
    command = [Path(sys.executable).parent / "transformers", "serve", "--host", "127.0.0.1", "--port", str(port)]
    log = scratch / "log"
    with pytest.MonkeyPatch.context() as patch, log.open("w") as output:
        patch.setenv("HF_HOME", str(scratch))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setenv("OMP_NUM_THREADS", "1")
        process = subprocess.Popen([*command, "--device", "cpu", folder], stdout=output, stderr=subprocess.STDOUT)
        try:
            while not up(f"http://127.0.0.1:{port}/health"):
                assert process.poll() is None, log.read_text()[-2000:]
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(30)


def up(address):
    try:
        return urllib.request.urlopen(address, timeout=5).status == 200
    except OSError:
        return False


def ask(seed, **sampling):
    messages = [{"role": "user", "content": "Name an animal."}]
    return Request(f"test/{seed}", messages, seed, (), Sampling(max_new_tokens=12, **sampling))


def answers(engine, requests):
    return [reply for _, reply in sorted(engine.answer(requests))]


def test_text_follows_from_seed_and_temperature(url, folder):
    # One at a time: this server has one random generator for all requests.
    engine = asking(url, model=folder, concurrency=1)
    assert engine.identity == f"models/smollm2-135m|{openai_engine.sent('')}"
    drawn = answers(engine, [ask(1), ask(2), ask(3)])
    assert len({reply.text for reply in drawn}) == 3
    assert answers(engine, [ask(3), ask(1)]) == [drawn[2], drawn[0]]
    greedy = answers(engine, [ask(1, temperature=0.0), ask(2, temperature=0.0), ask(3, top_k=1)])
    assert len({reply.text for reply in greedy}) == 1
    rendered = models.load_tokenizer(folder).apply_chat_template(
        list(ask(1).messages), add_generation_prompt=True, return_dict=True
    )
    assert {reply.prompt_tokens for reply in drawn} == {len(rendered["input_ids"])}
    assert all(0 < reply.completion_tokens <= 12 for reply in [*drawn, *greedy])


@pytest.mark.parametrize("name", ["reason", "choose"])
def test_an_evolution_runs_in_both_protocols_and_is_replayed_without_the_server(url, folder, splits, tmp_path, name):
    how = Protocol(name, max_attempts=2, sampling=Sampling(max_new_tokens=12))

    def play(engine):
        return playing.play(tmp_path, role_play.SCENARIO, splits[1][:2], engine, protocol=how, rounds=2)

    engine = asking(url, model=folder, tokenizer=folder, concurrency=4)
    rows, record = play(engine)
    # Two attempts at most, or both orders.
    assert len(rows) == 4 and 4 * (1 + (name == "choose")) <= record.paid == len(record.used) == engine.answered <= 8
    replies = journal.read_record(tmp_path / journal.REPLIES).replies.values()
    # This server echoes nothing and offers no log-probabilities; the replies say what was done instead.
    reasons = {reply.finish_reason for reply in replies}
    assert reasons <= ({"stop", "length"} if name == "reason" else {"sampled:stop", "sampled:length"})
    again, record = play(asking("http://127.0.0.1:9/v1", engine.identity, model=folder))
    assert again == rows and record.paid == 0


def test_another_model_is_refused_before_a_token_is_paid_for(url):
    with pytest.raises(ValueError, match="pinned to .*run again"):
        answers(asking(url, model="someone/else"), [ask(1)])
