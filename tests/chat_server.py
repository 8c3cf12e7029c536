"""A chat-completions server on loopback that plays faults from a script, for the tests of the openai provider."""

import hashlib
import json
import socket
import struct
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar
from urllib.parse import unquote

from stages.engine.params import Params
from stages.rankings import providers
from stages.rankings.cache import Cache, Question

LABELS = ["neutral", "anger", "happiness", "sadness", "worry", "surprise"]
KEY = "lab-0123456789-secret"  # without the vendor's prefix, by which a filter could recognise a key
QUESTION = Question("openai", "gpt-test", "v1", tuple(LABELS))
TOKENS_IN, TOKENS_OUT = 300, 40  # what the server says that a request took

S = TypeVar("S", bound="Server")
Plan = Callable[["Handler", dict[str, Any]], None]


def ranking_of(transcript: str) -> list[str]:
    """The server's answer: fixed for a transcript, and different between transcripts."""
    start = hashlib.sha256(transcript.encode()).digest()[0] % len(LABELS)
    return LABELS[start:] + LABELS[:start]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        content = self.rfile.read(length)
        if len(content) < length:  # the client was killed
            self.close_connection = True
            return
        request = json.loads(content)
        with self.server.lock:
            self.server.requests.append(request)
            plan = self.server.script.pop(0) if self.server.script else self.server.default
        if not self.authorized():
            plan = fail(401, f"Incorrect API key provided: {self.headers['Authorization']}", "invalid_api_key")
        if self.path != "/v1/chat/completions":
            plan = fail(404, "no such path")
        plan(self, request)

    def do_GET(self) -> None:
        """The look-up of a model, where the server knows models; not counted as a request."""
        name = unquote(self.path.removeprefix("/v1/models/"))
        self.server.looked_up.append(name)
        if self.server.models is None:
            return self.send(404, b'{"detail": "Not Found"}')
        if name in self.server.models:
            return self.send(200, json.dumps({"id": name, "object": "model"} | self.server.models[name]).encode())
        error = {"message": f"The model '{name}' does not exist", "code": "model_not_found", "param": "model"}
        self.send(404, json.dumps({"error": error}).encode())

    def authorized(self) -> bool:
        return self.headers["Authorization"] == f"Bearer {self.server.key}"

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        return


class Server(ThreadingHTTPServer):
    """Plays `script` request by request, then `default`. `answered` counts the valid answers per transcript."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, handler: type[Handler] = Handler) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.lock = threading.Lock()
        self.requests: list[dict[str, Any]] = []
        self.script: list[Plan] = []
        self.default: Plan = answer
        self.answered: Counter[str] = Counter()
        self.key = KEY
        self.models: dict[str, dict[str, Any]] | None = None  # what it says of each model; None: it has no such page
        self.looked_up: list[str] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that the test killed
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


def transcript_of(request: dict[str, Any]) -> str:
    content = request["messages"][1]["content"]
    if isinstance(content, list):  # with a clip
        content = content[0]["text"]
    return json.loads(content.removeprefix("Transcript: "))


def completion(
    content: str | None,
    finish: str = "stop",
    refusal: str | None = None,
    tokens: tuple[int, int] = (TOKENS_IN, TOKENS_OUT),
) -> bytes:
    message = {"role": "assistant", "content": content, "refusal": refusal}
    choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
    usage = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)}
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
    return json.dumps(body).encode()


def answer(handler: Handler, request: dict[str, Any]) -> None:
    transcript = transcript_of(request)
    with handler.server.lock:
        handler.server.answered[transcript] += 1
    handler.send(200, completion(json.dumps({"ranking": ranking_of(transcript)})))


class Held:
    """Plays `plan` at once for the first requests, and holds the others until `open` is set."""

    def __init__(self, free: int = 1, count: int = 16, plan: Plan | None = None) -> None:
        self.free, self.count, self.plan = free, count, plan or answer
        self.full, self.open = threading.Event(), threading.Event()  # full: `count` requests are held
        self._seen, self._lock = 0, threading.Lock()

    def __call__(self, handler: Handler, request: dict[str, Any]) -> None:
        with self._lock:
            self._seen += 1
            seen = self._seen
        if seen == self.free + self.count:
            self.full.set()
        if seen > self.free:
            self.open.wait()
        self.plan(handler, request)


def pay_in_process(p: Params, items: Sequence[str], clips: Any, spent_usd: float, lock: int) -> None:
    """In place of providers.pay, where a test replaces what another process would not see."""
    providers.openai(p, Cache(providers.question(p)), spent_usd, clips).rank(items)


def say(content: str | None, **options: Any) -> Plan:
    return lambda handler, request: handler.send(200, completion(content, **options))


def fail(status: int, message: str = "try later", code: str | None = None, **headers: str) -> Plan:
    body = json.dumps({"error": {"message": message, "code": code, "param": None, "type": "x"}}).encode()
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, request: handler.send(status, body, names)


def drop(handler: Handler, request: dict[str, Any]) -> None:
    """Reset the connection instead of an answer."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True


def raw(body: bytes, content_type: str = "application/json") -> Plan:
    return lambda handler, request: handler.send(200, body, {"Content-Type": content_type})


@contextmanager
def serving(server: S) -> Iterator[S]:
    """Run the server in a thread for as long as the block lasts."""
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
