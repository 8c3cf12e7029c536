"""Rankings travel with DVC: on a clone that has pulled them, a corpus that grew asks for its new transcripts only."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from chat_server import KEY, TOKENS_IN, Server, ranking_of
from ruamel.yaml import YAML

from stages.engine.files import replacing, write_rows
from stages.engine.manifest import write_manifest

ROOT = Path(__file__).parent.parent
IDENTITY = {f"GIT_{who}_{what}": "test" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
ENVIRONMENT = os.environ | IDENTITY | {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1", "OPENAI_API_KEY": KEY}
TRANSCRIPTS = [f"这是第{i}句话。" for i in range(30)]


def run(folder: Path, command: str, expect: int = 0) -> str:
    done = subprocess.run(command, shell=True, cwd=folder, env=ENVIRONMENT, text=True, capture_output=True)
    assert done.returncode == expect, f"{command}:\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def write_transcripts(folder: Path, transcripts: list[str]) -> None:
    rows = [(f"c{i}", text, "corpus") for i, text in enumerate(transcripts)]
    write_rows(folder / "data/transcripts.csv", ["clip_id", "transcript", "source"], rows)
    write_manifest([], folder / "data/manifest.csv")  # read for clips that are sent, and none is
    with replacing(folder / "data/plan/rankings.jsonl") as file:
        file.write("made\n")  # as the stage plan says it


def set_params(folder: Path, **changes: object) -> None:
    values = YAML().load(folder / "params.yaml")
    values["rankings"] |= changes
    YAML().dump(values, folder / "params.yaml")


@pytest.fixture
def paid(tmp_path: Path, server: Server) -> Path:
    """A repository whose rankings were paid for and pushed to a remote."""
    folder = tmp_path / "paid"
    folder.mkdir()
    for name in ("dvc.yaml", "params.yaml", ".gitignore"):
        shutil.copyfile(ROOT / name, folder / name)
    shutil.copytree(ROOT / "stages", folder / "stages", ignore=shutil.ignore_patterns("__pycache__"))
    set_params(folder, provider="openai", model="gpt-test", base_url=server.url, max_cost_usd=10.0)
    write_transcripts(folder, TRANSCRIPTS)
    run(folder, f"git init -q && dvc init -q && dvc remote add -q -d store {tmp_path}/remote")
    run(folder, "dvc repro -q -s rank_emotions && git add -A && git commit -qm paid")
    run(folder, "dvc push -q data/rankings.jsonl")
    assert server.answered.total() == len(TRANSCRIPTS)
    server.answered.clear()
    return folder


def test_a_clone_asks_for_what_is_new_only(paid: Path, server: Server, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    run(tmp_path, f"git clone -q {paid} {clone}")
    (clone / "data").mkdir(exist_ok=True)
    new = ["一句新的话", "又一句"]
    write_transcripts(clone, TRANSCRIPTS[4:] + new)
    output = run(clone, "dvc repro -s rank_emotions", expect=255)  # nothing pulled yet: not paid for again unasked
    assert "error: data/rankings.jsonl: 28 transcripts are not ranked" in output and "dvc pull" in output
    assert not server.answered
    run(clone, "dvc pull -q data/rankings.jsonl")
    output = run(clone, "dvc repro -s rank_emotions")
    assert server.answered == dict.fromkeys(new, 1)
    rows = [json.loads(line) for line in (clone / "data/rankings.jsonl").read_text().splitlines()]
    assert {row["transcript"]: row["ranking"] for row in rows} == {t: ranking_of(t) for t in TRANSCRIPTS[4:] + new}
    assert all(row["input_tokens"] == TOKENS_IN for row in rows)
    price = (TOKENS_IN * 2.5 + 40 * 10.0) / 1e6
    assert f"{28 * price:.4f} USD spent in all" in output  # rankings.max_cost_usd counts what others have paid

    set_params(clone, model="gpt-other")  # another model's answers are not its own
    run(clone, "dvc repro -q -s rank_emotions")
    assert server.answered.total() == 2 + 28
