"""The openai provider with rankings.batch, against a real server with the Files and Batch API that plays faults."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from batch_runs import RANKINGS, TRANSCRIPTS, ask, killed, nothing_under_way, rankings, store
from batch_server import STEPS, BatchServer, http_error, not_run, said
from chat_server import KEY, LABELS, QUESTION, drop, fail, ranking_of, raw, say, serving

from stages.engine.errors import PipelineError
from stages.rankings import openai_batch


@pytest.fixture
def server() -> Iterator[BatchServer]:
    with serving(BatchServer()) as running:
        yield running


def test_a_batch_ranks_every_transcript_at_half_price(
    server: BatchServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    batches = ask(server, tmp_path)
    assert rankings(tmp_path) == RANKINGS and nothing_under_way(tmp_path)
    assert len(server.batches) == 1 and server.paid == dict.fromkeys(TRANSCRIPTS, 1)
    assert server.answered.total() == 1  # the first, to see whether key, model and fields are right
    assert batches.spent == pytest.approx(server.bill) == store(tmp_path).spent(TRANSCRIPTS, (2.5, 10.0))
    lines = capsys.readouterr().out.splitlines()
    assert "7 transcripts to ask gpt-test" in lines[0] and "USD at half price" in lines[0]
    assert "6 transcripts ranked in batches, 1800 input and 240 output tokens at half price" in lines[-1]
    assert f"{server.bill:.4f} USD spent in all" in lines[-1]
    ask(server, tmp_path)
    assert len(server.batches) == 1


def test_a_batch_request_is_the_direct_request(server: BatchServer, tmp_path: Path) -> None:
    ask(server, tmp_path, TRANSCRIPTS[:2])
    (line,) = [json.loads(line) for line in server.files["file-0"][1].splitlines()]
    assert line["custom_id"] == QUESTION.custom_id(TRANSCRIPTS[1]) and len(line["custom_id"]) <= 64
    (direct,) = server.requests
    user = line["body"]["messages"].pop()
    assert user["content"] == f'Transcript: "{TRANSCRIPTS[1]}"'
    direct["messages"].pop()
    assert line["body"] == direct


def test_a_field_that_the_model_does_not_take_is_learned_before_the_batch(
    server: BatchServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.script = [fail(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")]
    ask(server, tmp_path)
    (*_, line) = [json.loads(line) for line in server.files["file-0"][1].splitlines()]
    assert "max_tokens" not in line["body"] and line["body"]["max_completion_tokens"] == 200
    assert "does not take max_tokens" in capsys.readouterr().err


@pytest.mark.parametrize("fault", [fail(401, f"Incorrect API key {KEY}"), fail(404, "no such model")])
def test_a_wrong_key_or_model_stops_before_anything_is_uploaded(server: BatchServer, tmp_path: Path, fault) -> None:
    server.default = fault
    with pytest.raises(PipelineError) as error:
        ask(server, tmp_path)
    assert not server.files and KEY not in str(error.value)


def test_many_transcripts_make_several_batches(
    server: BatchServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_batch, "MAX_REQUESTS", 2)
    server.largest = 2
    ask(server, tmp_path)
    assert len(server.batches) == 3 and server.paid == dict.fromkeys(TRANSCRIPTS, 1)
    monkeypatch.setattr(openai_batch, "MAX_REQUESTS", 50_000)
    size = max(len(content) for kind, content in server.files.values() if kind == "input")
    monkeypatch.setattr(openai_batch, "MAX_BYTES", size)  # two lines fit
    ask(server, tmp_path / "again")
    sizes = [len(content) for kind, content in server.files.values() if kind == "input"]
    assert len(server.batches) == 6 and max(sizes) <= size


FAULTS: dict[str, Any] = {
    "malformed": said('{"ranking": ["neutral"'),
    "no answer": said(None),
    "missing label": said(json.dumps({"ranking": LABELS[:5]})),
    "refusal": said(None, refusal="I can't help with that."),
    "truncated": said('{"ranking"', finish="length"),
    "refused": http_error(400, "Input data may contain inappropriate content."),
    "server error": http_error(500, "The server had an error."),
    "rate limit": http_error(429, "Rate limit reached."),
    "expired": not_run("batch_expired"),
    "no choice": lambda t: {"response": {"status_code": 200, "request_id": "r", "body": {"id": "x"}}, "error": None},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_one_request_is_overcome(server: BatchServer, tmp_path: Path, fault: str) -> None:
    server.outcomes[TRANSCRIPTS[3]] = [FAULTS[fault]]
    batches = ask(server, tmp_path)
    assert rankings(tmp_path) == RANKINGS and nothing_under_way(tmp_path)
    invalid = fault in ("malformed", "no answer", "missing label", "refusal", "truncated", "no choice")
    asked_again_in_a_batch = fault in ("server error", "rate limit", "expired")
    assert len(server.batches) == 1 + asked_again_in_a_batch
    assert server.paid == dict.fromkeys(TRANSCRIPTS, 1) | {TRANSCRIPTS[3]: 1 + invalid}
    if fault == "no choice":  # and no usage: its worst case is counted
        assert batches.spent > server.bill
    else:
        assert batches.spent == pytest.approx(server.bill)


def test_what_is_never_answered_is_recorded_with_the_reason(server: BatchServer, tmp_path: Path) -> None:
    server.outcomes[TRANSCRIPTS[3]] = [FAULTS["refusal"]]
    server.script = [say(json.dumps({"ranking": ranking_of(TRANSCRIPTS[0])}))]  # the first; then:
    server.default = say(None, refusal="No.")
    ask(server, tmp_path)
    answer = store(tmp_path).load(TRANSCRIPTS)[TRANSCRIPTS[3]]
    assert answer.ranking is None and answer.reason == "a refusal (No.)" and answer.input_tokens == 3 * 300


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("fault", ["429", "503", "dropped", "reply lost"])
def test_a_fault_of_the_line_at_any_step_is_overcome(
    server: BatchServer, tmp_path: Path, step: str, fault: str
) -> None:
    if fault == "reply lost":
        server.lose[step] = [True]
    else:
        server.faults[step] = [{"429": fail(429, Retry_After="0"), "503": fail(503), "dropped": drop}[fault]]
    ask(server, tmp_path)
    assert rankings(tmp_path) == RANKINGS and nothing_under_way(tmp_path)
    assert server.paid == dict.fromkeys(TRANSCRIPTS, 1)  # even where the reply to `create` was lost


def test_a_download_that_is_cut_off_is_repeated(server: BatchServer, tmp_path: Path) -> None:
    server.faults["output"] = [raw(b'{"id": "batch_req_0", "custom')]
    ask(server, tmp_path)
    assert rankings(tmp_path) == RANKINGS and server.paid == dict.fromkeys(TRANSCRIPTS, 1)


def test_a_batch_that_the_list_shows_late_is_not_created_twice(server: BatchServer, tmp_path: Path) -> None:
    server.lose["create"], server.hidden = [True], 2
    ask(server, tmp_path)
    assert server.steps.count("list") >= 3 and len(server.batches) == 1


def test_a_batch_behind_many_others_is_found(server: BatchServer, tmp_path: Path) -> None:
    server.kill = ("create", "after")
    killed(server, tmp_path)
    file_id = server._store("input", b"")
    for _ in range(5):  # of others in the organisation, since
        server.create({"endpoint": "/v1/chat/completions", "completion_window": "24h", "metadata": {"x": "y"},
                       "input_file_id": file_id})
    ask(server, tmp_path)
    assert len(server.batches) == 6 and server.paid == dict.fromkeys(TRANSCRIPTS, 1)


def test_an_expired_batch_is_collected_and_its_rest_asked_again(server: BatchServer, tmp_path: Path) -> None:
    server.ends = ["expired", "expired"]
    ask(server, tmp_path)
    assert len(server.batches) == 3 and server.paid == dict.fromkeys(TRANSCRIPTS, 1)
    assert rankings(tmp_path) == RANKINGS


def test_batches_that_bring_nothing_end_the_run(server: BatchServer, tmp_path: Path) -> None:
    server.ends, server.share = ["expired"] * 9, 0.0
    with pytest.raises(PipelineError, match="3 batches in a row brought no answer.*completion window expired"):
        ask(server, tmp_path)
    assert len(server.batches) == 3 and nothing_under_way(tmp_path)


def test_a_cancelled_batch_ends_the_run_and_its_answers_are_kept(server: BatchServer, tmp_path: Path) -> None:
    server.ends = ["cancelled"]
    with pytest.raises(PipelineError, match="batch_0 was cancelled; 3 answers came before; every answer is kept"):
        ask(server, tmp_path)
    assert len(rankings(tmp_path)) == 4
    ask(server, tmp_path)
    assert rankings(tmp_path) == RANKINGS and server.paid == dict.fromkeys(TRANSCRIPTS, 1)


def test_a_failed_batch_ends_the_run_with_the_reason(server: BatchServer, tmp_path: Path) -> None:
    server.ends = ["failed billing_hard_limit_reached"]
    with pytest.raises(PipelineError, match="batch_0 failed: billing_hard_limit_reached: It can't be run.; every"):
        ask(server, tmp_path)
    assert nothing_under_way(tmp_path)
    ask(server, tmp_path)
    assert server.paid == dict.fromkeys(TRANSCRIPTS, 1)


def test_batches_shrink_to_what_the_account_may_enqueue(
    server: BatchServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.ends = ["failed token_limit_exceeded"] * 2  # of 6 and 3
    ask(server, tmp_path)
    assert rankings(tmp_path) == RANKINGS and server.paid == dict.fromkeys(TRANSCRIPTS, 1)
    sizes = [len(content.splitlines()) for kind, content in server.files.values() if kind == "input"]
    assert sizes == [6, 3, 1, 1, 1, 1, 1, 1]
    monkeypatch.setattr(openai_batch, "MAX_REQUESTS", 3)
    server.files.clear()
    server.ends = ["completed", "failed token_limit_exceeded"]  # waits for the first, rather than shrink
    ask(server, tmp_path / "again")
    assert [len(content.splitlines()) for kind, content in server.files.values() if kind == "input"] == [3, 3, 3]
    server.ends = ["failed token_limit_exceeded"] * 9
    with pytest.raises(PipelineError, match="token_limit_exceeded"):
        ask(server, tmp_path / "never")


def test_the_cost_limit_holds_for_batches_too(server: BatchServer, tmp_path: Path) -> None:
    many = [f"第{i}句" for i in range(60)]
    with pytest.raises(PipelineError, match="rankings.max_cost_usd: found 0.03.*every answer is kept"):
        ask(server, tmp_path, many, max_cost_usd=0.03)
    assert 0.02 < server.bill <= 0.03 and len(server.batches) > 1  # what a batch leaves goes into the next
    assert len(rankings(tmp_path, many)) == server.paid.total()
    with pytest.raises(PipelineError, match="rankings.max_cost_usd"):  # the money of earlier runs counts, at half price
        ask(server, tmp_path, many, max_cost_usd=0.03)
    assert server.bill <= 0.03
    ask(server, tmp_path, many)
    assert server.paid == dict.fromkeys(many, 1)


def test_a_server_without_the_batch_api_is_named(server: BatchServer, tmp_path: Path) -> None:
    server.faults["upload"] = [fail(404, "Not Found")]
    with pytest.raises(PipelineError, match="rankings.batch: .*has no Batch API"):
        ask(server, tmp_path)

