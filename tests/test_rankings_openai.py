"""The openai provider against a real HTTP server on loopback that plays faults from a script."""

import email.utils
import json
import logging
import multiprocessing
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
from chat_server import (
    KEY,
    LABELS,
    QUESTION,
    TOKENS_IN,
    TOKENS_OUT,
    Handler,
    Held,
    Plan,
    Server,
    answer,
    completion,
    drop,
    fail,
    ranking_of,
    raw,
    say,
    transcript_of,
)

from stages.engine.errors import PipelineError
from stages.rankings import openai_provider
from stages.rankings.cache import Answer, Cache
from stages.rankings.chat import OUTPUT_TOKENS, Chat, Patience, estimate_tokens, parse_retry_after
from stages.rankings.openai_provider import OpenAI

HASTY = Patience(attempts=8, answers=3, first_wait=0.0)


def provider(url: str, store: Cache, **options: Any) -> OpenAI:
    defaults: dict[str, Any] = {"price": (2.5, 10.0), "max_cost_usd": 1000.0, "concurrency": 4, "patience": HASTY}
    return OpenAI(Chat("gpt-test", LABELS, "v1", url, KEY), store, **(defaults | options))


def ask(url: str, store: Cache, transcripts: list[str], **options: Any) -> list[Answer]:
    provider(url, store, **options).rank(transcripts)
    answers = store.load(transcripts)
    return [answers[transcript] for transcript in transcripts]


def test_a_request_carries_the_prompt_the_schema_and_no_randomness(server: Server, store: Cache) -> None:
    assert ask(server.url, store, ["你好"]) == [Answer("你好", ranking_of("你好"), TOKENS_IN, TOKENS_OUT)]
    (request,) = server.requests
    assert request["model"] == "gpt-test" and request["temperature"] == 0
    system = request["messages"][0]["content"]
    assert all(label in system for label in LABELS) and "中性" in system
    schema = request["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["ranking"]["items"]["enum"] == LABELS


FAULTS: dict[str, list[Plan]] = {
    "429": [fail(429)] * 3,
    "429 with Retry-After": [fail(429, Retry_After="0")],
    "500": [fail(500)],
    "503": [fail(503), fail(503)],
    "dropped connection": [drop, drop],
    "body is no JSON": [raw(b'{"id": "x", "choi')],
    "body is HTML": [raw(b"<html>gateway</html>", "text/html")],
    "no choices": [raw(b'{"id": "x", "object": "chat.completion", "choices": []}')],
    "malformed answer": [say('{"ranking": ["neutral", "ang')],
    "no answer": [say(None)],
    "missing label": [say(json.dumps({"ranking": LABELS[:5]}))],
    "doubled label": [say(json.dumps({"ranking": LABELS[:5] + ["anger"]}))],
    "misspelt label": [say(json.dumps({"ranking": LABELS[:5] + ["suprise"]}))],
    "not a list": [say('{"ranking": "neutral"}')],
    "refusal": [say(None, refusal="I can't help with that.")],
    "content filter": [say("", finish="content_filter")],
    "truncated": [say('{"ranking": ["neutral"', finish="length")],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_overcome(server: Server, store: Cache, fault: str) -> None:
    server.script = list(FAULTS[fault])
    (result,) = ask(server.url, store, ["没想到你会来"])
    assert result.ranking == ranking_of("没想到你会来")
    assert len(server.requests) == len(FAULTS[fault]) + 1
    assert server.answered == {"没想到你会来": 1}


def test_an_invalid_answer_is_sent_back_with_the_reason_and_paid_for(server: Server, store: Cache) -> None:
    wrong = json.dumps({"ranking": LABELS[:4] + ["anger", "suprise"]})
    server.script = [say(wrong)]
    (result,) = ask(server.url, store, ["唉"])
    assert result.input_tokens == 2 * TOKENS_IN and result.output_tokens == 2 * TOKENS_OUT
    follow_up = server.requests[1]["messages"]
    assert follow_up[2] == {"role": "assistant", "content": wrong}
    assert "unknown: suprise; missing: worry, surprise; more than once: anger" in follow_up[3]["content"]


def test_a_cut_off_answer_gets_more_room(server: Server, store: Cache) -> None:
    server.script = [say("<think> well,", finish="length")]
    ask(server.url, store, ["唉"])
    assert server.requests[1]["max_tokens"] > server.requests[0]["max_tokens"]


def test_a_transcript_that_is_never_answered_is_reported_and_others_are_ranked(server: Server, store: Cache) -> None:
    def stubborn(handler: Handler, request: dict[str, Any]) -> None:
        plan = say(None, refusal="No.") if transcript_of(request) == "坏" else answer
        plan(handler, request)

    server.default = stubborn
    answers = {a.transcript: a for a in ask(server.url, store, ["好", "坏", "行"])}
    assert answers["坏"] == Answer("坏", None, 3 * TOKENS_IN, 3 * TOKENS_OUT, "a refusal (No.)")
    assert answers["好"].ranking and answers["行"].ranking


def test_the_refusal_of_one_request_costs_one_transcript(server: Server, store: Cache) -> None:
    server.script = [fail(400, "Input data may contain inappropriate content.", "data_inspection_failed")]
    answers = ask(server.url, store, ["坏", "好"], concurrency=1)
    assert [a.ranking is None for a in answers] == [True, False]
    assert "inappropriate content" in answers[0].reason


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits that the provider asked for, none of which is waited."""
    waits: list[float] = []

    async def sleep(self: OpenAI, seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(OpenAI, "_sleep", sleep)
    return waits


@pytest.mark.parametrize("form", ["seconds", "milliseconds", "date"])
def test_retry_after_is_honoured(server: Server, store: Cache, slept: list[float], form: str) -> None:
    headers = {
        "seconds": {"Retry_After": "500"},
        "milliseconds": {"Retry_After_Ms": "500000"},
        "date": {"Retry_After": email.utils.formatdate(time.time() + 500, usegmt=True)},
    }[form]
    server.script = [fail(429, **headers)]
    ask(server.url, store, ["好"])
    assert len(slept) == 1 and 480 < slept[0] < 502


def test_retry_after_that_makes_no_sense_is_ignored() -> None:
    assert parse_retry_after({"retry-after": "soon"}) is None
    assert parse_retry_after({"retry-after": "-5"}) is None
    assert parse_retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert parse_retry_after({}) is None


def test_waits_grow_and_differ(server: Server, store: Cache, slept: list[float]) -> None:
    server.script = [fail(503)] * 6
    ask(server.url, store, ["好"], patience=Patience(first_wait=1.0, longest_wait=8.0))
    assert len(slept) == 6 and max(slept) <= 8 and len({round(wait, 4) for wait in slept}) > 1
    assert all(wait <= 2**number for number, wait in enumerate(slept))


def test_a_stall_past_the_time_out_is_tried_again(
    server: Server, store: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    send, allowed = httpx2.AsyncHTTPTransport.handle_async_request, []

    async def stall(self: httpx2.AsyncHTTPTransport, request: httpx2.Request) -> httpx2.Response:
        response = await send(self, request)
        allowed.append(request.extensions["timeout"]["read"])
        if len(allowed) == 1:  # served, but the reply takes longer than that
            raise httpx2.ReadTimeout("", request=request)
        return response

    monkeypatch.setattr(httpx2.AsyncHTTPTransport, "handle_async_request", stall)
    (result,) = ask(server.url, store, ["好"], patience=Patience(first_wait=0.0, timeout=77.0))
    assert result.ranking == ranking_of("好") and len(server.requests) == 2 and allowed == [77.0, 77.0]
    assert store.spent(["好"], (2.5, 10.0)) > 2 * (TOKENS_IN * 2.5 + TOKENS_OUT * 10.0) / 1e6  # its worst case


STOPPERS = {
    "bad key": (fail(401, f"Incorrect API key provided: {KEY}"), "rankings.api_key_env"),
    "no access": (fail(403, "country not supported"), "country not supported"),
    "unknown model": (fail(404, "The model `gpt-test` does not exist"), "rankings.model: gpt-test"),
    "unknown model, with 400": (fail(400, "Model Not Exist", "model_not_found"), "rankings.model: gpt-test"),
    "no credit": (fail(429, "You exceeded your current quota", "insufficient_quota"), "no credit"),
    "daily limit": (fail(429, "daily limit", Retry_After="40000"), "wait for 40000 s"),
}


@pytest.mark.parametrize("name", STOPPERS)
def test_what_makes_every_request_pointless_stops_at_once(server: Server, store: Cache, name: str) -> None:
    server.default, expected = STOPPERS[name]
    with pytest.raises(PipelineError, match=expected) as error:
        ask(server.url, store, [f"第{i}句" for i in range(50)])
    assert len(server.requests) <= 4  # one per worker
    assert "\n" not in str(error.value) and KEY not in str(error.value)


def test_a_server_that_stays_down_is_given_up_and_the_answers_so_far_are_kept(
    server: Server, store: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_provider, "GIVE_UP_AFTER", 5)
    server.script, server.default = [answer] * 10, fail(503, "down for maintenance")
    patience = Patience(attempts=2, first_wait=0.0)
    asked = [f"第{i}句" for i in range(100)]
    with pytest.raises(PipelineError, match="5 transcripts in a row.*down for maintenance.*10 of 100.*run again"):
        ask(server.url, store, asked, patience=patience)
    assert sum(a.ranking is not None for a in store.load(asked).values()) == 10
    assert len(server.requests) <= 10 + 2 * (5 + 4)


def test_transcripts_that_could_not_be_asked_fail_the_stage_however_few(server: Server, store: Cache) -> None:
    server.script = [fail(500)] * 2
    with pytest.raises(PipelineError, match="1 transcripts could not be asked.*2 of 3"):
        ask(server.url, store, ["一", "二", "三"], concurrency=1, patience=Patience(attempts=2, first_wait=0.0))
    assert server.answered == {"二": 1, "三": 1}


@pytest.mark.parametrize("form", ["OpenAI", "FastAPI"])
@pytest.mark.parametrize("field", ["temperature", "response_format", "max_tokens"])
def test_a_request_field_that_the_server_does_not_know_is_left_out(
    server: Server, store: Cache, field: str, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fastapi(handler: Handler, request: dict[str, Any]) -> None:
        handler.send(422, json.dumps({"detail": f"Unexpected fields in the request: {{'{field}'}}"}).encode())

    refusal = fastapi if form == "FastAPI" else fail(400, f"Unsupported parameter: '{field}'.")

    def picky(handler: Handler, request: dict[str, Any]) -> None:
        (refusal if field in request else answer)(handler, request)

    server.default = picky
    answers = ask(server.url, store, ["一", "二", "三", "四", "五"])
    assert all(a.ranking for a in answers)
    assert field not in server.requests[-1]
    assert "max_tokens" in server.requests[-1] or "max_completion_tokens" in server.requests[-1]
    assert capsys.readouterr().err.count(f"does not take {field} (Un") == 1


def test_the_cost_limit_is_never_passed(server: Server, store: Cache, capsys: pytest.CaptureFixture[str]) -> None:
    cost = (TOKENS_IN * 2.5 + TOKENS_OUT * 10.0) / 1e6
    asker, asked = provider(server.url, store, max_cost_usd=0.05, spent_usd=0.01), [f"第{i}句" for i in range(200)]
    with pytest.raises(PipelineError, match=r"rankings.max_cost_usd: found 0.05.*every answer is kept"):
        asker.rank(asked)
    answers = store.load(asked)
    spent = 0.01 + len(server.requests) * cost
    assert 0.04 < spent <= 0.05  # most of it is used, nothing beyond
    assert asker.budget.spent == pytest.approx(spent)
    assert len(answers) == len(server.requests)
    said = capsys.readouterr().out
    first, *_, last = said.splitlines()
    assert "200 transcripts to ask" in first and "estimate:" in first and "rankings.max_cost_usd: 0.05" in first
    count = len(answers)
    assert f"{count} of 200 transcripts ranked, {count * TOKENS_IN} input and {count * TOKENS_OUT} output" in last
    assert f"{spent:.4f} USD spent in all" in last


def test_requests_under_way_count_with_their_worst_case(server: Server, store: Cache) -> None:
    """A server that bills nearly all it may, and answers late: many requests are under way near the limit."""

    def greedy(handler: Handler, request: dict[str, Any]) -> None:
        sent = len(json.dumps(request["messages"], ensure_ascii=False).encode())
        content = json.dumps({"ranking": LABELS})
        handler.send(200, completion(content, tokens=(sent, OUTPUT_TOKENS)))

    server.default = held = Held(free=1, count=10, plan=greedy)
    threading.Thread(target=lambda: (held.full.wait(), held.open.set()), daemon=True).start()
    asker = provider(server.url, store, max_cost_usd=0.1, concurrency=16)
    with pytest.raises(PipelineError, match="rankings.max_cost_usd: found 0.1"):
        asker.rank([f"第{i}句" for i in range(60)])
    assert 0.08 < asker.budget.spent <= 0.1 and len(server.requests) > 10


def test_a_limit_of_zero_asks_nothing_but_a_free_server(server: Server, store: Cache) -> None:
    with pytest.raises(PipelineError, match="rankings.max_cost_usd: found 0"):
        ask(server.url, store, ["好"], max_cost_usd=0.0)
    assert not server.requests
    assert ask(server.url, store, ["好"], max_cost_usd=0.0, price=(0.0, 0.0))


def test_a_lost_answer_counts_as_paid_in_every_later_run(server: Server, store: Cache) -> None:
    server.script = [drop]
    asker = provider(server.url, store)
    asker.rank(["好"])
    assert asker.budget.spent > 2 * (TOKENS_IN * 2.5 + TOKENS_OUT * 10.0) / 1e6
    assert store.spent(["好"], (2.5, 10.0)) == pytest.approx(asker.budget.spent)
    assert store.load(["好"])["好"] == Answer("好", ranking_of("好"), TOKENS_IN, TOKENS_OUT)


def test_the_estimate_is_near_for_chinese_and_english() -> None:
    assert estimate_tokens([{"role": "user", "content": "我今天很开心"}]) == 6 + 4
    assert estimate_tokens([{"role": "user", "content": "a" * 400}]) == 100 + 4


def test_the_key_is_nowhere(
    server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    echo = fail(500, f"internal error while handling {KEY} and Bearer {KEY}")
    server.script = [echo, say(f"{KEY}"), answer, fail(400, f"no, {KEY}")]
    store = Cache(QUESTION, tmp_path)
    provider(server.url, store, concurrency=1).rank(["一", "二", "三"])
    server.key = "another"
    with pytest.raises(PipelineError, match="not accepted") as error:
        provider(server.url, store).rank(["四"])
    texts = [str(error.value), repr(error.value), caplog.text, *capfd.readouterr()]
    texts += [path.read_bytes().decode(errors="replace") for path in tmp_path.iterdir()]
    assert all(KEY not in text and "0123456789" not in text for text in texts)
    assert "***" in str(error.value)


def _ask_in_a_process(url: str, transcripts: list[str], folder: Path) -> None:
    store = Cache(QUESTION, folder)
    with store.asking():
        known = store.load(transcripts)
        provider(url, store, concurrency=2).rank([t for t in transcripts if t not in known])


def test_of_a_process_that_asks_and_is_killed_only_what_was_under_way_is_asked_again(
    server: Server, tmp_path: Path
) -> None:
    server.default = held = Held(free=15, count=2)
    transcripts = [f"第{i}句" for i in range(30)]
    work = (server.url, transcripts, tmp_path)
    # Spawned: a fork has tqdm's lock in common with this process, and killed while it holds that would stop both
    process = multiprocessing.get_context("spawn").Process(target=_ask_in_a_process, args=work)
    process.start()
    held.full.wait()
    process.kill()
    process.join()
    held.open.set()
    _ask_in_a_process(*work)
    store = Cache(QUESTION, tmp_path)
    assert {t: a.ranking for t, a in store.load(transcripts).items()} == {t: ranking_of(t) for t in transcripts}
    twice = [t for t, count in server.answered.items() if count == 2]
    assert len(twice) <= 2 and server.answered.total() == len(transcripts) + len(twice)
    most = (3000 * 2.5 + OUTPUT_TOKENS * 10.0) / 1e6
    price = (TOKENS_IN * 2.5 + TOKENS_OUT * 10.0) / 1e6
    assert 2 * price < store.spent(transcripts, (2.5, 10.0)) - len(transcripts) * price < 2 * most
