"""Runs that are interrupted and killed while a fifth of the replies has an odd shape."""

import json
import os
import random
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_server import LABELS, Handler, Server, completion, drop, fail, ranking_of, raw, transcript_of
from reply_shapes import ANSWERS, REASONS, choice, message
from stage_runs import make_house, ranked, spent, start

from stages.engine.params import load
from stages.rankings.cache import FOLDER, MOST_REPLIES, Cache
from stages.rankings.providers import question

PRICE = (2.5, 10.0)
INVALID: list[Callable[[dict[str, Any]], Any]] = [
    message(content='{"ranking": ["neutral", "ang'),
    message(content=None),
    message(content=json.dumps({"ranking": LABELS[:5]})),
    message(content=json.dumps({"ranking": [*LABELS[:5], "anger"]})),
    message(content=None, refusal="I can't help with that."),
    choice(finish_reason="length", message={"content": "Let me think"}),
    choice(finish_reason="content_filter", message={"content": ""}),
]


class Mixed:
    """Every odd shape in a fifth of the replies. Counts what it bills: tokens as told, or the most that they can be."""

    def __init__(self, server: Server) -> None:
        self.server, self.chance = server, random.Random(1)
        self.when: tuple[int, Callable[[], None]] | None = None  # how many answers, and what is done then
        self.invalid: Counter[str] = Counter()
        self.tokens_in = self.tokens_out = 0
        self.kinds: Counter[str] = Counter()
        none = [change for change, _ in REASONS.values()] + INVALID
        self.shapes = {"odd": list(ANSWERS.values()), "none": none, "good": [lambda body: None]}
        self.free = [fail(429), fail(503), raw(b'{"error": "overloaded"}')]
        self.lost = [drop, raw(b"<html>"), raw(b"{")]

    def __call__(self, handler: Handler, request: dict[str, Any]) -> None:
        transcript = transcript_of(request)
        with self.server.lock:
            odd = self.chance.random() < 0.2
            kind = self.chance.choice(("odd", "none", "free", "lost")) if odd else "good"
            self.invalid[transcript] += kind == "none"
            if self.invalid[transcript] == MOST_REPLIES:  # no more: each transcript is to be answerable
                self.invalid[transcript], kind = MOST_REPLIES - 1, "good"
            self.kinds[kind] += 1
            if kind == "free":
                return self.chance.choice(self.free)(handler, request)
            if kind == "lost":
                self.count({}, request)
                return self.chance.choice(self.lost)(handler, request)
            body = json.loads(completion(json.dumps({"ranking": ranking_of(transcript)})))
            body = self.chance.choice(self.shapes[kind])(body) or body
            if "error" not in body:
                self.count(body.get("usage"), request)
            self.server.answered[transcript] += kind != "none"
            if self.when is not None and self.server.answered.total() >= self.when[0]:
                self.when = self.when[1]()
        handler.send(200, json.dumps(body).encode())

    def count(self, usage: Any, request: dict[str, Any]) -> None:
        used = usage if isinstance(usage, dict) else {}
        told = [used.get("prompt_tokens"), used.get("completion_tokens")]
        most = len(json.dumps(request, ensure_ascii=False).encode()) + 64, request["max_tokens"]
        known = [n if isinstance(n, int) and n >= 0 else m for n, m in zip(told, most, strict=True)]
        self.tokens_in += known[0]
        self.tokens_out += known[1]

    @property
    def bill(self) -> float:
        return (self.tokens_in * PRICE[0] + self.tokens_out * PRICE[1]) / 1e6


def run(server: Server, mixed: Mixed, house: Path, stop: Callable[[int], None] | None = None, enough: int = 0) -> str:
    """Run the stage, which gets `stop` once so many answers have been given; what it printed."""
    process = start(house, "hasty_stage")
    if stop is not None:
        with server.lock:  # at least one more, so that it has begun
            mixed.when = max(enough, server.answered.total() + 1), lambda: stop(process.pid)
    output = process.communicate()[0]
    assert process.returncode in ((1, -signal.SIGTERM, -signal.SIGKILL) if stop else (0,)), output
    return output


STOPS: list[Callable[[int], None]] = [
    lambda pid: os.kill(pid, signal.SIGKILL),
    lambda pid: os.kill(pid, signal.SIGTERM),
    lambda pid: os.killpg(pid, signal.SIGKILL),
    lambda pid: os.killpg(pid, signal.SIGINT),
]


def soak(server: Server, folder: Path, count: int, stops: int) -> None:
    """Killed and interrupted `stops` times, and then to the end: each paid once, and the sum is the server's."""
    transcripts = [f"这是第{i}句话。" for i in range(count)]
    house = make_house(folder / "house", server.url, transcripts)
    server.default = mixed = Mixed(server)
    for i in range(stops):
        run(server, mixed, house, STOPS[i % len(STOPS)], (i + 1) * count // (stops + 1))
    output = run(server, mixed, house)
    assert ranked(house) == {t: ranking_of(t) for t in transcripts}
    assert server.answered == dict.fromkeys(transcripts, 1)
    told = Cache(question(load(house / "params.yaml")), house / FOLDER).spent(transcripts, PRICE)
    assert told == pytest.approx(mixed.bill, rel=1e-9) and spent(output) == pytest.approx(mixed.bill, abs=1e-4)
    print(f"{len(server.requests)} requests ({dict(mixed.kinds)}), {stops} stops, half of them kills: lost 0, paid "
          f"twice 0; {told:.4f} USD here, {mixed.bill:.4f} at the server")


def test_a_soak_of_odd_shapes_and_kills(server: Server, tmp_path: Path) -> None:
    soak(server, tmp_path, 60, stops=2)


@pytest.mark.slow
def test_a_long_soak_of_odd_shapes_and_kills(server: Server, tmp_path: Path) -> None:
    soak(server, tmp_path, 2000, stops=16)
