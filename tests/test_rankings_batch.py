"""The openai provider with rankings.batch, against a real server with the Files and Batch API; kills included."""

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from batch_server import STEPS, BatchServer, http_error, not_run, said
from chat_server import KEY, LABELS, drop, fail, ranking_of, say, serving

from stages import rank_emotions
from stages.corpus.manifest import write_rows
from stages.errors import PipelineError
from stages.params import read_yaml
from stages.rankings import openai_batch
from stages.rankings.cache import Cache
from stages.rankings.chat import Chat, Patience
from stages.rankings.journal import Journal
from stages.rankings.openai_batch import Batches

ROOT = Path(__file__).parents[1]
HASTY = Patience(first_wait=0.005, longest_wait=0.02, timeout=20, first_poll=0.01, longest_poll=0.02, settle=0.2)
TRANSCRIPTS = [f"这是第{i}句话。" for i in range(7)]
RANKINGS = {transcript: ranking_of(transcript) for transcript in TRANSCRIPTS}
WORST = 0.0036  # USD, about what one request of these can cost in a batch


@pytest.fixture
def server() -> Iterator[BatchServer]:
    with serving(BatchServer()) as running:
        yield running


def store(folder: Path) -> Cache:
    return Cache("openai", "gpt-test", "v1", LABELS, folder)


def ask(server: BatchServer, folder: Path, transcripts: list[str] = TRANSCRIPTS, **options: Any) -> Batches:
    """Ask for what the cache in `folder` lacks, as the stage does."""
    cache = store(folder)
    defaults: dict[str, Any] = {"price": (2.5, 10.0), "max_cost_usd": 1000.0, "patience": HASTY}
    with cache.asking():
        known = cache.load(transcripts)
        spent = cache.spent(transcripts, (2.5, 10.0))
        chat = Chat("gpt-test", LABELS, "v1", server.url, KEY)
        batches = Batches(chat, cache, spent_usd=spent, **(defaults | options))
        wanted = [t for t in transcripts if t not in known or known[t].ranking is None]
        if wanted or batches.journal.jobs():
            batches.rank(wanted, cache.append)
    return batches


def rankings(folder: Path, transcripts: list[str] = TRANSCRIPTS) -> dict[str, list[str] | None]:
    return {transcript: answer.ranking for transcript, answer in store(folder).load(transcripts).items()}


def nothing_under_way(folder: Path) -> bool:
    return not list(Journal(store(folder)).folder.iterdir())


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
    assert line["custom_id"] == store(tmp_path).key(TRANSCRIPTS[1]) and len(line["custom_id"]) <= 64
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
    "no choices": lambda t: {"response": {"status_code": 200, "request_id": "r", "body": {"id": "x"}}, "error": None},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_one_request_is_overcome(server: BatchServer, tmp_path: Path, fault: str) -> None:
    server.outcomes[TRANSCRIPTS[3]] = [FAULTS[fault]]
    batches = ask(server, tmp_path)
    assert rankings(tmp_path) == RANKINGS and nothing_under_way(tmp_path)
    invalid = fault in ("malformed", "no answer", "missing label", "refusal", "truncated")
    asked_again_in_a_batch = fault in ("server error", "rate limit", "expired", "no choices")
    assert len(server.batches) == 1 + asked_again_in_a_batch
    assert server.paid == dict.fromkeys(TRANSCRIPTS, 1) | {TRANSCRIPTS[3]: 1 + (invalid or fault == "no choices")}
    if fault != "no choices":  # which the server counts as run
        assert batches.spent == pytest.approx(server.bill)


def test_what_is_never_answered_is_recorded_with_the_reason(server: BatchServer, tmp_path: Path) -> None:
    server.outcomes[TRANSCRIPTS[3]] = [FAULTS["refusal"]]
    server.script = [say(json.dumps({"ranking": ranking_of(TRANSCRIPTS[0])}))]  # the first; then:
    server.default = say(None, refusal="No.")
    ask(server, tmp_path)
    answer = store(tmp_path).load(TRANSCRIPTS)[TRANSCRIPTS[3]]
    assert answer.ranking is None and answer.reason == "a refusal (No.)" and answer.input_tokens == 4 * 300


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


# ---------------------------------------------------------------- kills


def killed(server: BatchServer, folder: Path, prepare: Callable[[], None] = lambda: None) -> int | None:
    """Ask in a process of its own, which something kills; its exit code."""

    def work() -> None:
        prepare()
        ask(server, folder)

    process = multiprocessing.get_context("fork").Process(target=work)
    server.victim = None
    process.start()
    server.victim = process.pid
    process.join(60)
    return process.exitcode


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", STEPS)
def test_killed_between_any_two_requests_nothing_is_paid_twice(
    server: BatchServer, tmp_path: Path, step: str, when: str
) -> None:
    server.kill = (step, when)
    assert killed(server, tmp_path) == -signal.SIGKILL
    assert server.kill is None
    ask(server, tmp_path)
    assert rankings(tmp_path) == RANKINGS and nothing_under_way(tmp_path)
    assert server.paid == dict.fromkeys(TRANSCRIPTS, 1)
    assert store(tmp_path).spent(TRANSCRIPTS, (2.5, 10.0)) == pytest.approx(server.bill)


FILE_EVENTS = ("open", "os.rename", "os.remove", "os.truncate")


def die_at(number: int, folder: Path) -> None:
    """Kill this process as it is about to touch a file below `folder` for the number-th time."""
    numbers = count(1)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        touches = event in FILE_EVENTS and str(arguments[0]).startswith(str(folder))
        if touches and next(numbers) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def test_killed_at_any_file_operation_nothing_is_paid_twice(server: BatchServer, tmp_path: Path) -> None:
    """Between any two steps that only the disk sees. One window can't be closed: a direct answer not yet stored."""
    for number in count(1):
        folder = tmp_path / str(number)
        for counter in (server.ran, server.answered):
            counter.clear()
        code = killed(server, folder, lambda n=number, f=folder: die_at(n, f))  # type: ignore[misc]
        assert code in (0, -signal.SIGKILL)
        if code == 0:
            break
        ask(server, folder)
        assert rankings(folder) == RANKINGS and nothing_under_way(folder), number
        assert server.ran.total() == len(server.ran), number
        assert server.paid.total() <= len(TRANSCRIPTS) + 1, number
    assert number > 20


def test_the_stage_collects_what_a_killed_run_left(
    server: BatchServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ruamel.yaml import YAML

    values = read_yaml(ROOT / "params.yaml")
    values["rankings"] |= {"provider": "openai", "model": "gpt-test", "base_url": server.url, "batch": True,
                           "max_cost_usd": 1.0}
    (tmp_path / "data").mkdir()
    rows = [(f"c{i}", transcript, "corpus") for i, transcript in enumerate(TRANSCRIPTS)]
    write_rows(tmp_path / "data/transcripts.csv", ["clip_id", "transcript", "source"], rows)
    YAML().dump(values, tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(openai_batch, "Patience", lambda: HASTY)
    server.kill = ("poll", "after")
    process = multiprocessing.get_context("fork").Process(target=rank_emotions.main)
    process.start()
    server.victim = process.pid
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    values["rankings"]["batch"] = False  # would pay again for what the batch has answered
    YAML().dump(values, tmp_path / "params.yaml")
    with pytest.raises(PipelineError, match="rankings.batch: found false, but 1 batches are under way"):
        rank_emotions.main()
    values["rankings"]["batch"] = True
    YAML().dump(values, tmp_path / "params.yaml")
    rank_emotions.main()
    written = [json.loads(line) for line in (tmp_path / "data/rankings.jsonl").read_text().splitlines()]
    assert {row["transcript"]: row["ranking"] for row in written} == RANKINGS
    assert server.paid == dict.fromkeys(TRANSCRIPTS, 1)
    assert all(KEY.encode() not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


# ---------------------------------------------------------------- an interrupted run under other circumstances


@pytest.fixture
def interrupted(server: BatchServer, tmp_path: Path) -> Path:
    """A batch under way, with nobody waiting for it."""
    server.kill = ("poll", "after")
    assert killed(server, tmp_path) == -signal.SIGKILL
    return tmp_path


def state(folder: Path) -> Path:
    (path,) = Journal(store(folder)).folder.glob("*.json")
    return path


def test_a_batch_of_another_server_or_key_is_not_lost(server: BatchServer, interrupted: Path) -> None:
    path = state(interrupted)
    content = path.read_text()
    path.write_text(content.replace(server.url, "https://elsewhere/v1"))
    with pytest.raises(PipelineError, match="under way at https://elsewhere/v1, but rankings.base_url is.*set it back"):
        ask(server, interrupted)
    path.write_text(content.replace("batch_0", "batch_9"))
    with pytest.raises(PipelineError, match="knows no batch batch_9; set back the key"):
        ask(server, interrupted)
    path.write_text(content)
    ask(server, interrupted)
    assert server.paid == dict.fromkeys(TRANSCRIPTS, 1)


def test_answers_that_the_server_has_deleted_and_a_damaged_job_are_named(
    server: BatchServer, interrupted: Path
) -> None:
    server.files.clear()
    with pytest.raises(PipelineError, match="deleted the answers of batch batch_0.*delete the file"):
        ask(server, interrupted)
    path = state(interrupted)
    path.write_text(path.read_text()[:50])
    with pytest.raises(PipelineError, match=f"{path}: damaged; .*mer_job = {path.stem}"):
        ask(server, interrupted)
    path.unlink()
    ask(server, interrupted)
    assert rankings(interrupted) == RANKINGS and nothing_under_way(interrupted)


def test_a_corpus_that_changed_meanwhile_still_gets_what_was_paid_for(server: BatchServer, interrupted: Path) -> None:
    server.outcomes[TRANSCRIPTS[2]] = [FAULTS["refusal"]]
    ask(server, interrupted, [*TRANSCRIPTS[4:], "新的一句"])
    assert rankings(interrupted) == RANKINGS
    assert server.paid == dict.fromkeys([*TRANSCRIPTS, "新的一句"], 1)


def test_an_upload_that_expired_is_repeated(server: BatchServer, tmp_path: Path) -> None:
    server.kill = ("create", "before")
    killed(server, tmp_path)
    server.files.clear()
    path = state(tmp_path)
    job = json.loads(path.read_text())
    path.write_text(json.dumps(job | {"created": job["created"] - 40 * 86_400, "creating": None}))
    ask(server, tmp_path)
    assert server.paid == dict.fromkeys(TRANSCRIPTS, 1) and nothing_under_way(tmp_path)


def test_a_full_disk_is_one_line_and_loses_no_batch(
    server: BatchServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **options: Any) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        saves = count()
        real = Journal.save
        # the fourth time is the id of the created batch
        patch.setattr(Journal, "save", lambda self, job: full_save(self, job) if next(saves) == 3 else real(self, job))

        def full_save(self: Journal, job: Any) -> None:
            with monkeypatch.context() as inner:
                inner.setattr("stages.rankings.journal.replacing", full)
                real(self, job)

        with pytest.raises(PipelineError, match="can't note a batch.*No space left"):
            ask(server, tmp_path)
    ask(server, tmp_path)
    assert len(server.batches) == 1 and server.paid == dict.fromkeys(TRANSCRIPTS, 1)
