"""The stage rank_emotions as a process, for the tests that kill it."""

import json
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from chat_server import KEY
from ruamel.yaml import YAML

from stages.engine.files import write_rows
from stages.engine.yaml_file import read_yaml

ROOT = Path(__file__).parents[1]
TRANSCRIPTS = [f"这是第{i}句话。" for i in range(40)]


def make_house(folder: Path, url: str, transcripts: Sequence[str] = TRANSCRIPTS) -> Path:
    """A repository with params.yaml for the server, and transcripts."""
    values = read_yaml(ROOT / "params.yaml")
    values["rankings"] |= {"provider": "openai", "model": "gpt-test", "base_url": url, "max_cost_usd": 1000.0}
    (folder / "data").mkdir(parents=True)
    YAML().dump(values, folder / "params.yaml")
    rows = [(f"c{i}", transcript, "corpus") for i, transcript in enumerate(transcripts)]
    write_rows(folder / "data/transcripts.csv", ["clip_id", "transcript", "source"], rows)
    return folder


def start(house: Path, module: str = "stages.rank_emotions", **variables: str) -> "subprocess.Popen[str]":
    """In a process group of its own, as a terminal starts it."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    environment = os.environ | {"PYTHONPATH": path, "OPENAI_API_KEY": KEY, "OPENAI_LOG": "debug"} | variables
    return subprocess.Popen([sys.executable, "-m", module], cwd=house, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


def stored(house: Path) -> set[str]:
    """The transcripts whose answers are on disk."""
    with closing(sqlite3.connect(house / ".cache/rankings/answers.sqlite")) as db:
        return {transcript for (transcript,) in db.execute("SELECT transcript FROM replies WHERE state = 'kept'")}


def ranked(house: Path) -> dict[str, list[str] | None]:
    rows = [json.loads(line) for line in (house / "data/rankings.jsonl").read_text().splitlines()]
    return {row["transcript"]: row["ranking"] for row in rows}


def spent(output: str) -> float:
    """USD in all, as the stage says."""
    return float(re.findall(r"([\d.]+) USD spent in all", output)[-1])
