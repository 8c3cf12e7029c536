"""The stage rank_emotions as a process: killed and started again, two at once, and the key in no file or message."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from chat_server import KEY, TOKENS_IN, TOKENS_OUT, Handler, Server, answer, fail, ranking_of, serving
from ruamel.yaml import YAML

from stages.engine.files import write_rows
from stages.engine.params import read_yaml

ROOT = Path(__file__).parents[1]
TRANSCRIPTS = [f"这是第{i}句话。" for i in range(120)]


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(Server()) as running:
        running.default = slow
        yield running


def slow(handler: Handler, request: dict[str, Any]) -> None:
    time.sleep(0.05)
    answer(handler, request)


@pytest.fixture
def house(tmp_path: Path, server: Server) -> Path:
    """A repository with params.yaml for the server, and transcripts."""
    values = read_yaml(ROOT / "params.yaml")
    values["rankings"] |= {"provider": "openai", "model": "gpt-test", "base_url": server.url, "max_cost_usd": 10.0}
    YAML().dump(values, tmp_path / "params.yaml")
    (tmp_path / "data").mkdir()
    rows = [(f"c{i}", transcript, "corpus") for i, transcript in enumerate(TRANSCRIPTS)]
    write_rows(tmp_path / "data/transcripts.csv", ["clip_id", "transcript", "source"], rows)
    return tmp_path


def start(house: Path, **variables: str) -> "subprocess.Popen[str]":
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OPENAI_API_KEY": KEY, "OPENAI_LOG": "debug"} | variables
    command = [sys.executable, "-m", "stages.rank_emotions"]
    return subprocess.Popen(
        command, cwd=house, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def stored(house: Path) -> set[str]:
    """The transcripts whose answers are on disk."""
    with closing(sqlite3.connect(house / ".cache/rankings/answers.sqlite")) as db:
        return {transcript for (transcript,) in db.execute("SELECT transcript FROM replies WHERE state = 'kept'")}


def assert_complete(house: Path) -> None:
    rows = [json.loads(line) for line in (house / "data/rankings.jsonl").read_text().splitlines()]
    assert {row["transcript"]: row["ranking"] for row in rows} == {t: ranking_of(t) for t in TRANSCRIPTS}


def test_killed_and_started_again_no_stored_answer_is_asked_for_twice(server: Server, house: Path) -> None:
    asked_before: set[str] = set()
    for enough in (20, 60):
        process = start(house)
        while len(server.answered) < enough:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        output = process.communicate()[0]
        assert KEY not in output
        asked_before = stored(house)
        assert asked_before and not (house / "data/rankings.jsonl").exists()
    counts = {transcript: server.answered[transcript] for transcript in asked_before}
    output = start(house).communicate()[0]
    assert_complete(house)
    assert {transcript: server.answered[transcript] for transcript in asked_before} == counts
    # Only what was under way at a kill, 16 at a time, may have been answered without being stored.
    assert server.answered.total() <= len(TRANSCRIPTS) + 2 * 16
    rest = len(TRANSCRIPTS) - len(asked_before)
    assert f"{rest} transcripts to ask gpt-test" in output and "estimate:" in output
    assert f"{rest} of {rest} transcripts ranked, {rest * TOKENS_IN} input and {rest * TOKENS_OUT} output" in output
    price = (TOKENS_IN * 2.5 + TOKENS_OUT * 10.0) / 1e6
    told = re.findall(r"([\d.]+) USD spent in all", output)
    most = (3000 * 2.5 + 200 * 10.0) / 1e6  # of a request whose reply a kill has lost
    assert len(TRANSCRIPTS) * price <= float(told[-1]) + 1e-4 <= len(TRANSCRIPTS) * price + 2 * 16 * most


def test_two_stages_at_once_pay_once(server: Server, house: Path) -> None:
    processes = [start(house), start(house)]
    for process in processes:
        output = process.communicate()[0]
        assert process.returncode == 0, output
    assert_complete(house)
    assert server.answered == dict.fromkeys(TRANSCRIPTS, 1)


def test_the_key_is_in_no_file_output_or_process_list(server: Server, house: Path) -> None:
    server.script = [fail(500, f"while handling Bearer {KEY}")] * 3
    process = start(house)
    while not server.answered:
        assert process.poll() is None
        time.sleep(0.005)
    lists = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if readable(path)]
    assert any(b"stages.rank_emotions" in line for line in lists)
    output = [process.communicate()[0]]
    server.key = "another"
    (house / "data/transcripts.csv").write_text("clip_id,transcript,source\nc,新的一句,corpus\n", encoding="utf-8")
    rejected = start(house)
    output += rejected.communicate()[0]
    assert rejected.returncode == 1 and "the key was not accepted" in "".join(output)
    files = [path.read_bytes() for path in house.rglob("*") if path.is_file()]
    assert len(files) > 3
    for place in [*lists, *files, "".join(output).encode()]:
        assert KEY.encode() not in place and b"0123456789" not in place


def readable(path: Path) -> bool:
    try:
        path.read_bytes()
    except OSError:  # ended since
        return False
    return True
