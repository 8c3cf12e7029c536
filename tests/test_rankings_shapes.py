"""Replies of every shape, what a model teaches once, and what a server says before it is paid.

The handed cases 03, 05, 06, 08 and 34, against a server on loopback.
"""

import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from batch_runs import ask as ask_in_batches
from batch_runs import store as batch_store
from batch_server import BatchServer
from chat_server import (
    KEY,
    LABELS,
    Handler,
    Server,
    answer,
    completion,
    fail,
    ranking_of,
    raw,
    serving,
    transcript_of,
)
from reply_shapes import ANSWERS, REASONS, choice, shaped

from stages.engine.errors import PipelineError
from stages.rankings import openai_batch, replies
from stages.rankings.cache import Cache
from stages.rankings.chat import Chat, Patience
from stages.rankings.openai_provider import OpenAI
from stages.rankings.server import connect, look_up

HASTY = Patience(first_wait=0.0)
PRICE = (2.5, 10.0)


def ask(server: Server, store: Cache, transcripts: list[str], **options: Any) -> OpenAI:
    chat_options = {name: options.pop(name) for name in ("max_output_tokens", "reasoning_effort") if name in options}
    chat = Chat("gpt-test", LABELS, "v1", server.url, KEY, **chat_options)
    defaults: dict[str, Any] = {"price": PRICE, "max_cost_usd": 1000.0, "patience": HASTY}
    provider = OpenAI(chat, store, spent_usd=store.spent(transcripts, PRICE), **(defaults | options))
    provider.rank(transcripts)
    return provider


@pytest.mark.parametrize("shape", ANSWERS)
def test_an_answer_of_an_odd_shape_is_an_answer(server: Server, store: Cache, shape: str) -> None:
    server.default = shaped(ANSWERS[shape])
    ask(server, store, ["一", "二"])
    assert {t: a.ranking for t, a in store.load(["一", "二"]).items()} == {t: ranking_of(t) for t in ["一", "二"]}
    assert len(server.requests) == 2
    billed = store.spent(["一", "二"], PRICE)
    told = "usage" not in shape and shape != "only what is needed"
    assert (billed == pytest.approx(2 * (300 * 2.5 + 40 * 10.0) / 1e6)) == told and billed >= 2 * 300 * 2.5 / 1e6


@pytest.mark.parametrize("shape", REASONS)
def test_a_reply_that_is_none_is_recorded_for_that_transcript_alone(server: Server, store: Cache, shape: str) -> None:
    change, reason = REASONS[shape]

    def one(handler: Handler, request: dict[str, Any]) -> None:
        (shaped(change) if transcript_of(request) == "坏" else answer)(handler, request)

    server.default = one
    transcripts = ["一", "坏", "二", "三"]
    ask(server, store, transcripts)
    answers = store.load(transcripts)
    assert answers["坏"].ranking is None and answers["坏"].reason == reason
    assert all(answers[t].ranking == ranking_of(t) for t in "一二三")
    asked = Counter(map(transcript_of, server.requests))
    assert asked["坏"] <= 3 and asked["一"] == asked["二"] == asked["三"] == 1


@pytest.mark.parametrize("shape", [*ANSWERS, *REASONS])
def test_the_same_shapes_in_a_batch(tmp_path: Path, shape: str) -> None:
    change = ANSWERS[shape] if shape in ANSWERS else REASONS[shape][0]

    def odd(transcript: str) -> dict[str, Any]:
        body = json.loads(completion(json.dumps({"ranking": ranking_of(transcript)})))
        return {"response": {"status_code": 200, "body": change(body) or body}}

    with serving(BatchServer()) as batches:
        transcripts = ["一", "二", "三"]
        batches.outcomes["二"] = [odd]
        ask_in_batches(batches, tmp_path, transcripts)
        assert {t: a.ranking for t, a in batch_store(tmp_path).load(transcripts).items()} == {
            t: ranking_of(t) for t in transcripts}
        assert batches.paid["二"] == 1 + (shape in REASONS)


@pytest.mark.parametrize("body", [b"[]", b"null", b'"text"', b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b""])
def test_a_body_that_is_no_object_is_a_fault_of_the_line(server: Server, store: Cache, body: bytes) -> None:
    server.script = [raw(body)]
    ask(server, store, ["一"])
    assert store.load(["一"])["一"].ranking == ranking_of("一") and len(server.requests) == 2


def test_an_error_body_that_is_a_list_is_read(server: Server, store: Cache) -> None:
    error = [{"error": {"code": 400, "message": "Prohibited", "status": "INVALID_ARGUMENT"}}]
    server.script = [lambda handler, request: handler.send(400, json.dumps(error).encode())]
    ask(server, store, ["一", "二"])
    assert store.load(["一"])["一"].reason == "a refusal (Prohibited)" and store.load(["二"])["二"].ranking


def test_thinking_that_only_the_total_counts_is_output() -> None:
    reply = replies.read({"usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 515}, "choices": []})
    assert (reply.tokens_in, reply.tokens_out) == (10, 505)


# ---------------------------------------------------------------- what ends a run, and what a run costs


def test_a_transcript_that_had_three_replies_is_not_asked_again(server: Server, store: Cache) -> None:
    server.default = shaped(choice(message=None))
    for _ in range(2):
        ask(server, store, ["坏"])
    assert len(server.requests) == 3


def test_what_is_under_way_when_the_run_ends_is_awaited_stored_and_counted(server: Server, store: Cache) -> None:
    """One request is told that there is no credit left while 15 others wait for their answers."""
    transcripts = [f"第{i}句" for i in range(40)]

    def one_ends_it(handler: Handler, request: dict[str, Any]) -> None:
        if transcript_of(request) == "第5句":
            for _ in range(15):
                under_way.acquire()
            fail(429, "no credit", "insufficient_quota")(handler, request)
        elif transcript_of(request) != "第0句":
            under_way.release()
            stopped.wait()
            answer(handler, request)
        else:
            answer(handler, request)

    under_way, stopped = threading.Semaphore(0), threading.Event()
    server.default = one_ends_it
    provider = OpenAI(
        Chat("gpt-test", LABELS, "v1", server.url, KEY), store, price=PRICE, max_cost_usd=10.0, patience=HASTY)
    end = provider._end
    provider._end = lambda reason: (end(reason), stopped.set())[0]  # type: ignore[method-assign]
    with pytest.raises(PipelineError, match="no credit left"):
        provider.rank(transcripts)
    assert server.answered.total() == 16 == sum(a.ranking is not None for a in store.load(transcripts).values())
    price = (300 * 2.5 + 40 * 10.0) / 1e6
    assert store.spent(transcripts, PRICE) == pytest.approx(16 * price) == provider.budget.spent


# ---------------------------------------------------------------- learned once


def test_a_model_that_thinks_is_asked_with_the_long_allowance_from_then_on(server: Server, store: Cache) -> None:
    """Case 08: no max_tokens, no temperature, and 600 tokens of thought before the answer."""

    def thinking(handler: Handler, request: dict[str, Any]) -> None:
        if "max_tokens" in request:
            fail(400, "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
                      "'max_completion_tokens' instead.", "unsupported_parameter")(handler, request)
        elif "temperature" in request:
            fail(400, "Unsupported value: 'temperature' does not support 0 with this model.")(handler, request)
        elif request["max_completion_tokens"] < 640:
            handler.send(200, completion("", "length", tokens=(100, request["max_completion_tokens"])))
        else:
            answer(handler, request)

    server.default = thinking
    ask(server, store, [f"第{i}句" for i in range(20)])
    assert len(server.requests) == 3 + 20
    assert {request.get("max_completion_tokens") for request in server.requests[4:]} == {4096}


def test_an_allowance_that_is_too_large_is_no_refusal_of_the_field(server: Server, store: Cache) -> None:
    """Case 06: a window of 2,048 tokens, max_tokens alone, and a first transcript that makes the model ramble."""

    def small_window(handler: Handler, request: dict[str, Any]) -> None:
        if "max_completion_tokens" in request:
            fail(400, "Unrecognized request argument supplied: max_completion_tokens")(handler, request)
        elif request["max_tokens"] > 1800:
            fail(400, f"'max_tokens' is too large: {request['max_tokens']}. This model's maximum context length is "
                      f"2048 tokens and your request has 248 input tokens.")(handler, request)
        elif transcript_of(request) == "ramble":
            handler.send(200, completion("let me think", "length"))
        else:
            answer(handler, request)

    server.default = small_window
    transcripts = ["ramble", *(f"word{i}" for i in range(40))]
    ask(server, store, transcripts)
    answers = store.load(transcripts)
    assert [t for t in transcripts if answers[t].ranking is None] == ["ramble"]
    assert answers["ramble"].reason == "an answer that was cut off at 1024 tokens"
    assert len(server.requests) == 4 + 40 and all("max_tokens" in request for request in server.requests)


def test_one_request_too_long_for_the_window_leaves_the_others_their_allowance(server: Server, store: Cache) -> None:
    def thinking(handler: Handler, request: dict[str, Any]) -> None:
        allowance, long = request["max_tokens"], transcript_of(request) == "long"
        if long and allowance > 300:
            fail(400, "This model's maximum context length is 8192 tokens. However, you requested 9000 tokens. Please "
                      "reduce the length of the messages or completion.")(handler, request)
        elif allowance < 640:
            handler.send(200, completion("", "length", tokens=(100, allowance)))
        else:
            answer(handler, request)

    server.default = thinking
    transcripts = ["一", "long", "二", "三"]
    ask(server, store, transcripts)
    answers = store.load(transcripts)
    assert answers["long"].ranking is None and all(answers[t].ranking for t in "一二三")
    assert {r["max_tokens"] for r in server.requests[2:] if transcript_of(r) != "long"} == {4096}


def test_the_params_of_thinking_are_sent_and_estimated(
    server: Server, store: Cache, capsys: pytest.CaptureFixture[str]
) -> None:
    ask(server, store, ["一", "二"], reasoning_effort="low", max_output_tokens=900)
    assert {(r["reasoning_effort"], r["max_tokens"]) for r in server.requests} == {("low", 900)}
    said = capsys.readouterr().out
    assert "and 2048 output tokens" in said.splitlines()[0]  # 1,000 of thought each
    assert "after the first answer, estimate for the rest: 221 input and 40 output tokens" in said
    server.default = fail(400, "Unsupported value: 'reasoning_effort' does not support 'low'.")
    with pytest.raises(PipelineError, match="rankings.reasoning_effort: .*does not take it.*set null"):
        ask(server, store, ["三"], reasoning_effort="low")


def test_a_batch_after_a_probe_that_was_cut_off_has_the_long_allowance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def thinking(handler: Handler, request: dict[str, Any]) -> None:
        if request["max_tokens"] < 640:
            handler.send(200, completion("", "length", tokens=(300, request["max_tokens"])))
        else:
            ranking = json.dumps({"ranking": ranking_of(transcript_of(request))})
            handler.send(200, completion(ranking, tokens=(300, 640)))

    with serving(BatchServer()) as server:
        server.default = thinking
        ask_in_batches(server, tmp_path)
        lines = [json.loads(line) for line in server.files["file-0"][1].splitlines()]
        assert {line["body"]["max_tokens"] for line in lines} == {4096}
        assert "6 transcripts to ask gpt-test" in (said := capsys.readouterr().out)
        assert f"and {6 * 640} output tokens" in said  # the estimate of the batch knows of the thinking


def test_without_a_ranking_among_the_first_no_batch_is_sent(tmp_path: Path) -> None:
    with serving(BatchServer()) as server:
        server.default = lambda handler, request: handler.send(200, completion("hm", "length"))
        with pytest.raises(PipelineError, match="none of the first 3 .*cut off at 4096 tokens; no batch was sent"):
            ask_in_batches(server, tmp_path)
        assert not server.files
        assert openai_batch.PROBES * HASTY.answers == len(server.requests)


def test_batches_within_the_limit_count_thinking_as_the_worst_case(tmp_path: Path) -> None:
    with serving(BatchServer()) as server:
        server.script = [lambda handler, request: handler.send(200, completion("", "length"))]
        ask_in_batches(server, tmp_path, max_cost_usd=0.06)
        sizes = [len(content.splitlines()) for kind, content in server.files.values() if kind == "input"]
        assert sizes == [2, 2, 2]  # 4,096 tokens each at half price: no more than two fit into what is left


# ---------------------------------------------------------------- before the first paid request


def chat(url: str, model: str = "gpt-test") -> Chat:
    return Chat(model, LABELS, "v1", url, KEY)


def test_the_end_of_a_model_is_shown_before_it_is_asked(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.models = {"gpt-test": {"shutdown_date": "2027-01-14"}, "lab/new": {"shutdown_date": None}}
    look_up(chat(server.url))
    assert "says of gpt-test: shutdown_date: 2027-01-14;" in capsys.readouterr().err
    look_up(chat(server.url, "lab/new"))
    assert server.looked_up == ["gpt-test", "lab/new"] and capsys.readouterr().err == ""


def test_an_unknown_model_is_one_line_and_nothing_is_asked(server: Server) -> None:
    server.models = {}
    with pytest.raises(PipelineError, match="gpt-test was not found there: .*nothing was asked") as error:
        look_up(chat(server.url))
    assert "\n" not in str(error.value)


def test_a_server_that_tells_nothing_of_models_is_asked_all_the_same(server: Server) -> None:
    look_up(chat(server.url))
    look_up(chat("http://127.0.0.1:9/v1"))  # nobody there: the first request will say so
    assert server.looked_up == ["gpt-test"]


@pytest.mark.parametrize("proxy", ["socks://127.0.0.1:7890/", "socks5://user:secret@127.0.0.1:7890", "ftp://x"])
@pytest.mark.parametrize("name", ["ALL_PROXY", "all_proxy", "HTTPS_PROXY"])
def test_a_proxy_that_can_not_be_used_is_one_line(
    server: Server, monkeypatch: pytest.MonkeyPatch, proxy: str, name: str
) -> None:
    """Case 03."""
    import openai

    for other in ("HTTP", "HTTPS", "ALL", "NO"):
        monkeypatch.delenv(f"{other}_PROXY", raising=False)
        monkeypatch.delenv(f"{other}_PROXY".lower(), raising=False)
    monkeypatch.setenv(name, proxy)
    with pytest.raises(PipelineError) as error:
        connect(openai.OpenAI, chat(server.url), 1.0)
    scheme = proxy.split(":")[0]
    assert str(error.value).startswith(f"{name.upper()} ({scheme}://): ") and "unset the variable" in str(error.value)
    assert "secret" not in str(error.value) and "\n" not in str(error.value)
    monkeypatch.setenv("NO_PROXY", "*")
    connect(openai.OpenAI, chat(server.url), 1.0).close()


def test_a_server_that_answers_nobody_is_given_up_early(server: Server, store: Cache) -> None:
    server.default = raw(b"<html>log in to the network</html>", "text/html")
    with pytest.raises(PipelineError, match="no reply to 2 transcripts and none to any before, .*no JSON; 0 of 50"):
        ask(server, store, [f"第{i}句" for i in range(50)], patience=Patience(attempts=3, first_wait=0.0))
    assert len(server.requests) <= 16 * 3
