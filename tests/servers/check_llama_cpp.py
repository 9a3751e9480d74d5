"""The engine for servers on llama.cpp: `make test-llama-cpp` (fetches the model's file once, 98 MB).

pytest doesn't collect this file by itself: the default suite fetches nothing. docs/servers.md has what was found out.
"""

import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import playing
import pytest
import tenacity
from fault_server import asking

from atp_utils import models, resolve
from atp_utils.engines.transformers_engine import TransformersEngine
from atp_utils.evolution import journal
from atp_utils.evolution.protocol import Protocol
from atp_utils.evolution.requests import Request, Sampling
from atp_utils.models import embedded
from atp_utils.scenarios import role_play

pytest.importorskip("xllamacpp", reason="needs xllamacpp: make test-llama-cpp")

NAME = models.EMBEDDED
KEPT = Path("runs/llama_cpp")


@pytest.fixture(scope="module")
def gguf():
    """The file that the embedded model is made from."""
    folder = resolve(KEPT)
    folder.mkdir(parents=True, exist_ok=True)
    return embedded._fetch(embedded.registry()[NAME], folder)


@pytest.fixture(scope="module")
def url(gguf, tmp_path_factory):
    """A server's address, once it is up; its output stands in the error if it doesn't come up."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    log, script = tmp_path_factory.mktemp("server") / "log", Path(__file__).with_name("llama_cpp.py")
    with pytest.MonkeyPatch.context() as patch, log.open("w") as output:
        patch.setenv("NO_PROXY", "127.0.0.1")
        command = [sys.executable, script, gguf, "--alias", NAME, "--port", port, "--threads", "1"]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)

        @tenacity.retry(retry=tenacity.retry_if_exception_type(OSError), wait=tenacity.wait_fixed(0.2))
        def wait():
            assert process.poll() is None, log.read_text()[-2000:]
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()

        try:
            wait()
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(30)


@pytest.mark.parametrize("name", ["reason", "choose"])
def test_an_evolution_runs_in_both_protocols_and_is_replayed_without_the_server(url, splits, tmp_path, name):
    how = Protocol(name, max_attempts=2, sampling=Sampling(max_new_tokens=16))

    def play(engine):
        return playing.play(tmp_path, role_play.SCENARIO, splits[1][:2], engine, protocol=how, rounds=2)

    engine = asking(url, model=NAME, concurrency=4)
    assert engine.identity.startswith(f"{NAME}|n_params=134515008,size=")
    rows, record = play(engine)
    replies = journal.read_record(tmp_path / journal.REPLIES).replies.values()
    reasons = {reply.finish_reason for reply in replies}
    if name == "choose":
        # Every reply has the options' probabilities: the grammar leaves no other text than theirs.
        assert reasons <= {"first_token", "first_token:bound"} and len(replies) == 8
        assert all(row.valid and 0 < row.p_deviate < 1 and 0 < row.mass <= 1 + 1e-6 for row in rows)
    else:
        assert reasons <= {"stop", "length"} and all(0 < reply.completion_tokens <= 16 for reply in replies)
        assert all(row.p_deviate is None and row.mass is None for row in rows)
    assert len(rows) == 4 and record.paid == engine.answered == len(replies)
    again, record = play(asking("http://127.0.0.1:9/v1", engine.identity, model=NAME))
    assert again == rows and record.paid == 0


def test_a_tokenizer_does_not_make_it_score_whole(url, embedded, ask):
    [(_, reply)] = asking(url, model=NAME, tokenizer=embedded).answer([ask("rain")])
    assert reply.finish_reason == "first_token"


def test_probabilities_are_near_those_of_this_process(url, embedded, splits):
    """Both have the weights of one file; here they are rounded to bfloat16, there activations to 8 bits."""
    asked = [
        request
        for item in splits[1][:4]
        for request in role_play.SCENARIO.episode(item, role_play.Evolution(rounds=1), Protocol(), 0).send(None)
    ]
    here, there = ([reply for _, reply in sorted(engine.answer(asked))] for engine in (
        TransformersEngine(embedded), asking(url, model=NAME, concurrency=4)
    ))  # fmt: skip

    def log_odds(reply):
        return reply.logprobs[0] - reply.logprobs[1]

    apart = [abs(log_odds(one) - log_odds(other)) for one, other in zip(here, there, strict=True)]
    assert sum(apart) / len(apart) < 1


def test_a_chat_too_long_is_an_invalid_reply(url):
    long = Request("long", [{"role": "user", "content": "rain " * 3000}], 0, ())
    [(_, reply)] = asking(url, model=NAME).answer([long])
    assert (reply.text, reply.finish_reason) == ("", "context")
