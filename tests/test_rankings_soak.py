"""Runs that are interrupted and killed while a fifth of the replies has an odd shape."""

import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_server import KEY, LABELS, Handler, Server, completion, drop, fail, ranking_of, raw, serving, transcript_of
from reply_shapes import ANSWERS, REASONS, choice, message

from stages.engine.errors import PipelineError
from stages.rankings.cache import Cache, Question
from stages.rankings.chat import Chat, Patience
from stages.rankings.openai_provider import OpenAI

QUESTION = Question("openai", "gpt-test", "v1", tuple(LABELS))
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


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(Server()) as running:
        yield running


def ask_for_the_rest(url: str, folder: Path, transcripts: list[str]) -> None:
    """What run_until runs. Raises AssertionError where the run ended for another reason than the interrupt."""
    store = Cache(QUESTION, folder)
    known = store.load(transcripts)
    wanted = [t for t in transcripts if t not in known or known[t].ranking is None]
    patience = Patience(answers=9, first_wait=0.005, longest_wait=0.05, timeout=5)
    spent = store.spent(transcripts, PRICE)
    chat = Chat("gpt-test", LABELS, "v1", url, KEY)
    try:
        OpenAI(chat, store, price=PRICE, max_cost_usd=1000.0, spent_usd=spent, patience=patience).rank(wanted)
    except PipelineError as error:
        assert str(error).startswith("interrupted"), error


def run_until(server: Server, folder: Path, transcripts: list[str], number: int, enough: int) -> None:
    """Ask in a process that gets this signal once so many answers have been given.

    Spawned: a fork would inherit the locks that the server's threads hold.
    """
    enough = max(enough, len(server.answered) + 1)  # so that it has begun
    work = (server.url, folder, transcripts)
    process = multiprocessing.get_context("spawn").Process(target=ask_for_the_rest, args=work)
    process.start()
    while len(server.answered) < enough and process.is_alive():
        time.sleep(0.002)
    assert process.pid is not None
    if process.is_alive():
        os.kill(process.pid, number)
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)


def test_an_interrupt_loses_no_answer_and_pays_none_twice(server: Server, tmp_path: Path) -> None:
    transcripts = [f"第{i}句" for i in range(60)]
    for number, enough in ((signal.SIGINT, 10), (signal.SIGTERM, 30), (signal.SIGTERM, 1000)):
        run_until(server, tmp_path, transcripts, number, enough)
    assert server.answered == dict.fromkeys(transcripts, 1)
    price = (300 * 2.5 + 40 * 10.0) / 1e6
    assert Cache(QUESTION, tmp_path).spent(transcripts, PRICE) == pytest.approx(60 * price)


class Mixed:
    """Every odd shape in a fifth of the replies. Counts what it bills: tokens as told, or the most that they can be."""

    def __init__(self, server: Server) -> None:
        self.server, self.chance = server, random.Random(1)
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


def soak(server: Server, folder: Path, count: int, stops: int) -> None:
    """Interrupted `stops` times, and then to the end: each paid once, and the sum is the server's. Then with kills."""
    server.default = mixed = Mixed(server)
    transcripts, store = [f"这是第{i}句话。" for i in range(count)], Cache(QUESTION, folder)
    for i in range(stops):
        run_until(server, folder, transcripts, signal.SIGTERM, (i + 1) * count // (stops + 1))
    run_until(server, folder, transcripts, signal.SIGTERM, 10**9)
    assert {t: a.ranking for t, a in store.load(transcripts).items()} == {t: ranking_of(t) for t in transcripts}
    assert server.answered == dict.fromkeys(transcripts, 1)
    assert store.spent(transcripts, PRICE) == pytest.approx(mixed.bill)
    print(f"{len(server.requests)} requests ({dict(mixed.kinds)}), {stops} interrupts, lost: 0, paid twice: 0")

    server.answered.clear()
    server.default = mixed = Mixed(server)
    store = Cache(QUESTION, folder / "killed")
    for i in range(stops):
        run_until(server, folder / "killed", transcripts, signal.SIGKILL, (i + 1) * count // (stops + 1))
    run_until(server, folder / "killed", transcripts, signal.SIGTERM, 10**9)
    assert {t: a.ranking for t, a in store.load(transcripts).items()} == {t: ranking_of(t) for t in transcripts}
    twice = sum(n - 1 for n in server.answered.values())
    assert twice <= stops * 16  # what was under way at a kill
    assert mixed.bill <= store.spent(transcripts, PRICE) + 1e-9 <= mixed.bill + stops * 16 * 0.02
    print(f"{stops} kills, lost: 0, paid twice: {twice}")


def test_a_soak_of_odd_shapes_and_kills(server: Server, tmp_path: Path) -> None:
    soak(server, tmp_path, 120, stops=2)


@pytest.mark.slow
def test_a_long_soak_of_odd_shapes_and_kills(server: Server, tmp_path: Path) -> None:
    soak(server, tmp_path, 2000, stops=8)
