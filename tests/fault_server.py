"""A server of OpenAI's protocol on loopback that fails in every way that servers do."""

import json
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-very-secret-0123456789"


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
