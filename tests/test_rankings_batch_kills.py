"""rankings.batch when the process is killed, and when an interrupted run is taken up under other circumstances."""

import json
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from batch_runs import HASTY, RANKINGS, TRANSCRIPTS, ask, killed, nothing_under_way, rankings, store
from batch_server import STEPS, BatchServer, said
from chat_server import KEY, QUESTION, pay_in_process, serving

from stages import rank_emotions
from stages.engine.errors import PipelineError
from stages.engine.files import write_rows
from stages.engine.yaml_file import read_yaml
from stages.rankings import openai_batch, providers
from stages.rankings.cache import FOLDER, Cache, Job, giving_up

ROOT = Path(__file__).parents[1]


@pytest.fixture
def server() -> Iterator[BatchServer]:
    with serving(BatchServer()) as running:
        yield running


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


def die_at(number: int) -> None:
    """Kill this process as SQLite is about to run the number-th statement that changes the database.

    Python's audit hooks do not see SQLite's own file operations. That a kill within a commit leaves all or nothing is
    SQLite's promise; test_rankings.py kills writers at random moments.
    """
    numbers = count(1)

    def connect(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connection = real(*arguments, **options)
        connection.set_trace_callback(statement)
        return connection

    def statement(sql: str) -> None:
        if sql.startswith(("BEGIN IMMEDIATE", "INSERT", "DELETE", "COMMIT")) and next(numbers) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    real, sqlite3.connect = sqlite3.connect, connect  # type: ignore[assignment]


def test_killed_at_any_statement_nothing_is_paid_twice(server: BatchServer, tmp_path: Path) -> None:
    """Between any two steps that only the disk sees. One window can't be closed: a direct answer not yet stored."""
    for number in count(1):
        folder = tmp_path / str(number)
        for counter in (server.ran, server.answered):
            counter.clear()
        code = killed(server, folder, lambda n=number: die_at(n))  # type: ignore[misc]
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
    monkeypatch.setattr(providers, "pay", pay_in_process)
    server.kill = ("poll", "after")
    process = multiprocessing.get_context("fork").Process(target=rank_emotions.main, daemon=True)
    process.start()
    server.victim.put(process.pid)
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
    """A batch under way, for which no process waits."""
    server.kill = ("poll", "after")
    assert killed(server, tmp_path) == -signal.SIGKILL
    return tmp_path


def change_job(folder: Path, **changes: Any) -> Job:
    (job,) = store(folder).jobs()
    job = replace(job, **changes)
    store(folder).save(job)
    return job


def test_a_batch_of_another_server_or_key_is_not_lost(server: BatchServer, interrupted: Path) -> None:
    elsewhere = Cache(replace(QUESTION, base_url="https://elsewhere/v1"), interrupted)
    assert not elsewhere.jobs()  # that server would be asked anew, and this batch waits for base_url to be set back
    change_job(interrupted, batch_id="batch_9")
    with pytest.raises(PipelineError, match="knows no batch batch_9; set back the key"):
        ask(server, interrupted)
    change_job(interrupted, batch_id="batch_0")
    ask(server, interrupted)
    assert server.paid == dict.fromkeys(TRANSCRIPTS, 1)


def test_a_batch_whose_answers_the_server_has_deleted_is_named_and_can_be_given_up(
    server: BatchServer, interrupted: Path
) -> None:
    server.files.clear()
    with pytest.raises(PipelineError, match="deleted the answers of batch batch_0.*stages.rankings.cache") as error:
        ask(server, interrupted)
    (job,) = store(interrupted).jobs()
    command = giving_up(job)
    assert command in str(error.value)
    (interrupted / FOLDER.parent).mkdir()
    (interrupted / FOLDER).symlink_to(interrupted)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command.split()[1:]], cwd=interrupted, env=environment, text=True, capture_output=True
    )
    assert done.stdout == "1 entries changed\n"
    ask(server, interrupted)
    assert rankings(interrupted) == RANKINGS and nothing_under_way(interrupted)


def test_a_corpus_that_changed_meanwhile_still_gets_what_was_paid_for(server: BatchServer, interrupted: Path) -> None:
    server.outcomes[TRANSCRIPTS[2]] = [said(None, refusal="No.")]
    ask(server, interrupted, [*TRANSCRIPTS[4:], "新的一句"])
    assert rankings(interrupted) == RANKINGS
    assert server.paid == dict.fromkeys([*TRANSCRIPTS, "新的一句"], 1)


def test_a_limit_that_the_batch_under_way_uses_up_does_not_keep_it_from_being_collected(
    server: BatchServer, tmp_path: Path
) -> None:
    many = [f"第{i}句" for i in range(60)]
    server.kill = ("poll", "after")
    assert killed(server, tmp_path, transcripts=many, max_cost_usd=0.03) == -signal.SIGKILL
    under_way = sum(len(content.splitlines()) for kind, content in server.files.values() if kind == "input")
    assert 0 < under_way < 59
    with pytest.raises(PipelineError, match="rankings.max_cost_usd: found 0.03"):
        ask(server, tmp_path, many, max_cost_usd=0.03)
    assert len(rankings(tmp_path, many)) == server.paid.total() > under_way and 0.02 < server.bill <= 0.03
    ask(server, tmp_path, many)
    assert server.paid == dict.fromkeys(many, 1)


def test_an_upload_that_expired_is_repeated(server: BatchServer, tmp_path: Path) -> None:
    server.kill = ("create", "before")
    killed(server, tmp_path)
    server.files.clear()
    (job,) = store(tmp_path).jobs()
    change_job(tmp_path, created=job.created - 40 * 86_400, creating=None)
    ask(server, tmp_path)
    assert server.paid == dict.fromkeys(TRANSCRIPTS, 1) and nothing_under_way(tmp_path)


def test_a_full_disk_is_one_line_and_loses_no_batch(
    server: BatchServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves, save = count(), Cache._save

    def full(self: Cache, db: sqlite3.Connection, question: str, job: Job) -> None:
        save(self, db, question, job)
        if next(saves) == 3:  # the id of the batch that was just created
            db.execute("PRAGMA max_page_count = 1")  # as SQLite reports a full disk
            db.execute("INSERT INTO questions VALUES ('q', hex(zeroblob(1000000)))")

    monkeypatch.setattr(Cache, "_save", full)
    with pytest.raises(PipelineError, match="answers.sqlite: can't be used: database or disk is full; make room"):
        ask(server, tmp_path)
    ask(server, tmp_path)
    assert len(server.batches) == 1 and server.paid == dict.fromkeys(TRANSCRIPTS, 1)
