"""The chat-completions server with the Files and Batch API on top, as OpenAI documents them, for the tests.

A batch is run when it is created; `polls` says after how many polls it is finished. The server can kill its client,
before or after it has served a given step: the only way to stop a process exactly between two of its requests.
"""

import email
import json
import os
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any
from urllib.parse import parse_qs, urlsplit

from chat_server import TOKENS_IN, TOKENS_OUT, Handler, Plan, Server, completion, ranking_of, transcript_of

Outcome = Callable[[str], dict[str, Any]]  # transcript -> what stands in its line of the output or error file
STEPS = ["upload", "create", "poll", "output"]


def good(transcript: str) -> dict[str, Any]:
    return said(json.dumps({"ranking": ranking_of(transcript)}))(transcript)


def said(content: str | None, **options: Any) -> Outcome:
    body = json.loads(completion(content, **options))
    return lambda transcript: {"response": {"status_code": 200, "request_id": "r", "body": body}, "error": None}


def http_error(status: int, message: str) -> Outcome:
    body = {"error": {"message": message, "type": "x", "param": None, "code": None}}
    return lambda transcript: {"response": {"status_code": status, "request_id": "r", "body": body}, "error": None}


def not_run(code: str) -> Outcome:
    error = {"code": code, "message": "This request could not be executed before the completion window expired."}
    return lambda transcript: {"response": None, "error": error}


class BatchHandler(Handler):
    server: "BatchServer"

    def do_GET(self) -> None:
        if self.path.startswith("/v1/models/"):
            return super().do_GET()
        self._serve(b"")

    def do_POST(self) -> None:
        if self.path == "/v1/chat/completions":
            return super().do_POST()
        self._serve(self.rfile.read(int(self.headers["Content-Length"])))

    def _serve(self, content: bytes) -> None:
        step, serve = self._route(content)
        server = self.server
        with server.lock:
            server.steps.append(step)
            plan = server.faults[step].pop(0) if server.faults[step] else None
        if not self.authorized():
            return self.send(401, b'{"error": {"message": "Incorrect API key", "code": "invalid_api_key"}}')
        if server.kill_client(step, "before"):
            self.close_connection = True
            return None
        if plan is not None:
            return plan(self, {})
        with server.lock:
            status, body = serve()
        lost = bool(server.lose[step]) and server.lose[step].pop()
        server.kill_client(step, "after")
        if lost:
            self.connection.close()
            self.close_connection = True
        else:
            self.send(status, body if isinstance(body, bytes) else json.dumps(body).encode())

    def _route(self, content: bytes) -> tuple[str, Callable[[], tuple[int, Any]]]:
        url = urlsplit(self.path)
        parts, server = url.path.removeprefix("/v1/").split("/"), self.server
        match (self.command, *parts):
            case ("POST", "files"):
                return "upload", lambda: server.upload(self.headers["Content-Type"], content)
            case ("POST", "batches"):
                return "create", lambda: server.create(json.loads(content))
            case ("GET", "batches"):
                return "list", lambda: server.list(parse_qs(url.query))
            case ("GET", "batches", batch_id):
                return "poll", lambda: server.poll(batch_id)
            case ("GET", "files", file_id, "content"):
                name = server.files.get(file_id, ("", b""))[0]
                return name or "output", lambda: server.content(file_id)
        return "unknown", lambda: (404, {"error": {"message": f"Invalid URL ({self.path})", "code": None}})


class BatchServer(Server):
    """`outcomes` are played per transcript, then `good`; `ends` per batch, then "completed".

    `ran` counts what was run, so paid for, per transcript. An end other than "completed" comes after `share` of the
    requests; one that begins with "failed " has that error code, and nothing was run.
    """

    def __init__(self) -> None:
        super().__init__(BatchHandler)
        self.files: dict[str, tuple[str, bytes]] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.ran: Counter[str] = Counter()
        self.outcomes: dict[str, list[Outcome]] = {}
        self.ends: list[str] = []
        self.share = 0.5
        self.polls = 2
        self.steps: list[str] = []
        self.faults: dict[str, list[Plan]] = defaultdict(list)
        self.lose: dict[str, list[bool]] = defaultdict(list)  # replies that never arrive, of steps that were served
        self.hidden = 0  # how many requests for the list are answered without the newest batch
        self.largest = 50_000
        self.kill: tuple[str, str] | None = None
        self.victim: SimpleQueue[int | None] = SimpleQueue()  # the client's process

    def kill_client(self, step: str, when: str) -> bool:
        if self.kill != (step, when):
            return False
        self.kill = None
        os.kill(self.victim.get(), signal.SIGKILL)
        return True

    # ------------------------------------------------------------ the API; each returns status and body

    def upload(self, content_type: str, content: bytes) -> tuple[int, Any]:
        message = email.message_from_bytes(b"Content-Type: " + content_type.encode() + b"\r\n\r\n" + content)
        parts = {part.get_param("name", header="Content-Disposition"): part for part in message.get_payload()}  # type: ignore
        assert parts["purpose"].get_payload(decode=True) == b"batch"  # type: ignore
        file_id = self._store("input", parts["file"].get_payload(decode=True))  # type: ignore
        return 200, {"id": file_id, "object": "file", "bytes": len(content), "created_at": int(time.time()),
                     "filename": parts["file"].get_filename(), "purpose": "batch", "status": "processed"}  # type: ignore

    def _store(self, kind: str, content: bytes) -> str:
        file_id = f"file-{len(self.files)}"
        self.files[file_id] = kind, content
        return file_id

    def create(self, request: dict[str, Any]) -> tuple[int, Any]:
        assert request["endpoint"] == "/v1/chat/completions" and request["completion_window"] == "24h"
        assert all(len(key) <= 64 and len(value) <= 512 for key, value in request["metadata"].items())
        if request["input_file_id"] not in self.files:
            return 404, {"error": {"message": f"Cannot find file {request['input_file_id']}", "code": None}}
        lines = [json.loads(line) for line in self.files[request["input_file_id"]][1].splitlines()]
        batch_id, now = f"batch_{len(self.batches)}", int(time.time())
        end = self.ends.pop(0) if self.ends else "completed"
        if len(lines) > self.largest or len({line["custom_id"] for line in lines}) < len(lines):
            end = "failed invalid_batch"
        batch = {"id": batch_id, "object": "batch", "endpoint": request["endpoint"], "completion_window": "24h",
                 "created_at": now, "input_file_id": request["input_file_id"], "metadata": request["metadata"],
                 "status": "validating", "polls": self.polls}
        batch["end"] = self._run(lines, end)
        self.batches[batch_id] = batch
        return 200, self._shown(batch)

    def _run(self, lines: list[dict[str, Any]], end: str) -> dict[str, Any]:
        """Run the requests; how the batch will look when it is over."""
        if end.startswith("failed"):
            error = {"code": end.removeprefix("failed "), "message": "It can't be run.", "line": None, "param": None}
            return {"status": "failed", "errors": {"object": "list", "data": [error]}}
        count = len(lines) if end == "completed" else int(len(lines) * self.share)
        files: dict[str, list[str]] = {"output": [], "errors": []}
        for number, line in enumerate(lines):
            assert line["method"] == "POST" and line["url"] == "/v1/chat/completions" and line["body"]["model"]
            transcript = transcript_of(line["body"])
            script = self.outcomes.get(transcript, [])
            outcome = (script.pop(0) if script else good) if number < count else not_run(f"batch_{end}")
            result = outcome(transcript)
            ok = bool(result["response"]) and result["response"]["status_code"] == 200
            self.ran[transcript] += ok
            entry = {"id": f"batch_req_{number}", "custom_id": line["custom_id"]} | result
            files["output" if ok else "errors"].append(json.dumps(entry, ensure_ascii=False))
        files["output"].reverse()  # the order of the lines is not promised
        ids = {kind: self._store(kind, "\n".join(found).encode()) for kind, found in files.items() if found}
        return {"status": end, "output_file_id": ids.get("output"), "error_file_id": ids.get("errors"),
                "request_counts": {"total": len(lines), "completed": len(files["output"]),
                                   "failed": len(files["errors"])}}

    def _shown(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in batch.items() if name not in ("polls", "end")}

    def poll(self, batch_id: str) -> tuple[int, Any]:
        if batch_id not in self.batches:
            return 404, {"error": {"message": f"No batch found with id '{batch_id}'.", "code": None}}
        batch = self.batches[batch_id]
        batch["polls"] -= 1
        batch |= batch["end"] if batch["polls"] <= 0 else {"status": "in_progress"}
        return 200, self._shown(batch)

    def list(self, query: dict[str, list[str]]) -> tuple[int, Any]:
        shown = [self._shown(batch) for batch in reversed(self.batches.values())]
        if self.hidden:
            self.hidden -= 1
            shown = shown[1:]
        if after := query.get("after"):
            shown = shown[[batch["id"] for batch in shown].index(after[0]) + 1 :]
        page = shown[:2]  # small pages, so that the client has to ask for more than one
        return 200, {"object": "list", "data": page, "has_more": len(page) < len(shown)}

    def content(self, file_id: str) -> tuple[int, Any]:
        if file_id not in self.files:
            return 404, {"error": {"message": "No such File object", "code": None}}
        return 200, self.files[file_id][1]

    # ------------------------------------------------------------ what the tests ask

    @property
    def paid(self) -> Counter[str]:
        """How often each transcript was answered, in batches or directly."""
        return self.ran + self.answered

    @property
    def bill(self) -> float:
        """USD at prices of 2.5 and 10 per million tokens, batches at half."""
        usd = (TOKENS_IN * 2.5 + TOKENS_OUT * 10.0) / 1e6
        return usd * (self.answered.total() + self.ran.total() / 2)
