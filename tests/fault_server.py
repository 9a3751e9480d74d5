"""A server of OpenAI's protocol on loopback that fails in every way that servers do."""

import json
import math
import threading
import time
from collections import deque
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai._base_client
import tenacity

from atp_utils.engines import Servers, openai_engine
from atp_utils.evolution.requests import Request, Sampling

KEY = "sk-very-secret-0123456789"
YES, NO = '{"choice": "Yes"}', '{"choice": "No"}'


class Server(ThreadingHTTPServer):
    """Answers by ``rule(body)``; ``faults`` are used up first, one a POST, and ``broken`` is one that never ends.

    With a ``key``, requests without it are refused.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, rule):
        super().__init__(("127.0.0.1", 0), Handler)
        self.rule, self.faults, self.broken, self.key = rule, deque(), None, None
        self.models = {
            "data": [{"id": "toy", "object": "model", "created": int(time.time()), "root": "/weights/a/toy"}]
        }
        self.posts, self.served, self.times = [], [], []
        self.lock, self.closing = threading.Lock(), threading.Event()
        self.parallel = self.most_parallel = 0
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass  # clients that gave up


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def send(self, status, body, *, length=None, kind="application/json", **headers):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length != 0:
            self.send_header("Content-Length", str(length or len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def admitted(self):
        return self.server.key is None or self.headers["Authorization"] == f"Bearer {self.server.key}"

    def do_GET(self):
        refused = self.server.broken == "401" or not self.admitted()
        found = self.path == "/v1/models"
        self.send(401 if refused else 200 if found else 404, self.server.models if found and not refused else {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.posts.append(self.path)
            self.server.times.append(time.monotonic())
            fault = self.server.broken or (self.server.faults.popleft() if self.server.faults else None)
            self.server.parallel += 1
            self.server.most_parallel = max(self.server.most_parallel, self.server.parallel)
        try:
            if fault or not self.admitted():
                return self.fail(fault or "401", body)
            answer = self.server.rule(body)
            status = answer.pop("status", 200)
            with self.server.lock:
                self.server.parallel -= 1
                self.server.served += [body] if status == 200 else []
            self.send(status, answer)
        finally:
            if fault or not self.admitted():
                self.server.parallel -= 1

    def fail(self, fault, body):
        whole = json.dumps(self.server.rule(body)).encode()
        if fault == "silence":
            self.server.closing.wait(20)
        elif fault == "307":
            self.send(307, {}, location="http://127.0.0.1:9/v1/chat/completions")
        elif fault.isdigit():
            # It asks for haste, so that the client's own waits don't make tests slow.
            self.send(int(fault), {"error": {"message": f"no, {self.headers['Authorization']}"}}, retry_after_ms="1")
        elif fault == "slow down":
            self.send(429, {}, retry_after_ms="400")
        elif fault == "half":
            self.send(200, whole[: len(whole) // 2], length=len(whole))
        elif fault == "cut":
            self.send(200, whole[: len(whole) // 2], length=0)
        elif fault == "garbage":
            self.send(200, b"<html>\xff\x00 502 Bad Gateway", kind="text/html")
        elif fault == "wrong":
            self.send(200, {"object": "chat.completion", "choices": [{"message": "hello"}]})
        elif fault == "abort":
            self.send(200, chat("so far, I", finish_reason="abort"))
        self.close_connection = True


def chat(content, finish_reason="stop", logprobs=None, **message):
    turn = {"index": 0, "message": {"role": "assistant", "content": content, **message}, "finish_reason": finish_reason}
    usage = {"prompt_tokens": 7, "completion_tokens": 2}
    return {"object": "chat.completion", "choices": [turn | {"logprobs": logprobs}], "usage": usage}


def said(body):
    return f"{body['messages'][-1]['content']} {body['seed']}"


def choice(messages, seed):
    """Some option that follows from the chat and the seed."""
    prompt = next(message["content"] for message in messages if '"choice": ' in message["content"])
    option = prompt.split('"choice": ')[1:][(seed + len(messages)) % 2].split("}")[0]
    return f'Well, {{"choice": {option}}}'


@contextmanager
def running(monkeypatch):
    """``make(rule)`` starts a server, which ends with the context; nobody waits before asking again."""
    monkeypatch.setenv("TEST_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr(openai_engine, "WAIT", tenacity.wait_none())
    servers = []

    def make(rule=lambda body: chat(said(body))):
        servers.append(Server(rule))
        return servers[-1]

    yield make
    for server in servers:
        server.closing.set()
        server.shutdown()
        server.server_close()


def free(number, **sampling):
    return Request(f"test/{number}", [{"role": "user", "content": f"Say {number}."}], number, (), Sampling(**sampling))


def forced(seed=0, options=(YES, NO)):
    return Request(f"test/{seed}", [{"role": "user", "content": "Do you like rain?"}], seed, options)


def asking(urls, identity=None, model="toy", **settings):
    """The engine for ``model`` on the servers at ``urls``, one address or a list."""
    served = Servers(urls=[urls] if isinstance(urls, str) else urls, **settings)
    return openai_engine.OpenAIEngine(model, served, identity)


def answers(engine, requests):
    replies = list(engine.answer(requests))
    assert sorted(index for index, _ in replies) == list(range(len(requests)))
    return [reply for _, reply in sorted(replies)]


class Letters:
    """A tokenizer with a token a character."""

    name_or_path, added_tokens_decoder, all_special_tokens = "letters", {}, ()

    def __init__(self, template="letters"):
        self.template = template

    def get_chat_template(self):
        return self.template

    def apply_chat_template(self, messages, *, add_generation_prompt, tokenize, date_string, **settings):
        assert not tokenize and date_string and settings["chat_template"] == self.template
        said = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
        return said + "assistant: " * add_generation_prompt

    def __call__(self, text, add_special_tokens):
        return {"input_ids": list(map(ord, text))}


def echo(body):
    """log P = -1 a token of the prompt, -0.1 a token of the option; none of the first."""
    choices = []
    for index, ids in enumerate(body["prompt"]):
        assert "".join(map(chr, ids)).startswith("user: ") and body["echo"] and body["max_tokens"] == 1
        prompt = "".join(map(chr, ids)).index("assistant: ") + len("assistant: ")
        row = [None] + [-1.0] * (prompt - 1) + [-0.1] * (len(ids) - prompt) + [-5.0]
        choices.insert(0, {"index": index, "text": "", "finish_reason": "length", "logprobs": {"token_logprobs": row}})
    return {"object": "text_completion", "choices": choices}


def tops(*positions):
    """``logprobs`` of a chat: at each position the token, then the probabilities of all candidates."""

    def log(probability):
        return math.log(probability) if probability else -9999.0

    entries = [
        {"token": token, "logprob": log(table[token]),
         "top_logprobs": [{"token": other, "logprob": log(p)} for other, p in table.items()]}
        for token, table in positions
    ]  # fmt: skip
    return {"content": entries}


PREFIX = (('{"', {'{"': 0.9, "{": 0.1}), ('choice": "', {'choice": "': 1.0}))
