"""Rankings from a model on one's own machine: `transformers serve`, as the README says, with a miniature chat model.

The server is the real one and decodes freely: it takes no JSON schema. The model is trained to give these answers:
valid rankings, one that doubles a label until it is told so, and one that is never a ranking.
"""

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_server import LABELS, ranking_of
from miniature_chat import save_chat_model
from ruamel.yaml import YAML

from stages import rank_emotions
from stages.engine.errors import PipelineError
from stages.engine.files import write_rows
from stages.engine.yaml_file import read_yaml
from stages.rankings import parse, prompt

ROOT = Path(__file__).parents[1]
GOOD = ["我很开心", "气死我了", "没想到你会来"]
CORRECTED, NEVER = "算了吧", "你猜"


def follow_up(transcript: str, answer: str) -> list[dict[str, str]]:
    """The conversation after an invalid answer, as the provider goes on with it."""
    with pytest.raises(parse.InvalidAnswer) as invalid:
        parse.parse(answer, LABELS)
    return prompt.messages(transcript, LABELS, "v1") + prompt.correction(answer, str(invalid.value))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def right(transcript: str) -> str:
        return json.dumps({"ranking": ranking_of(transcript)})

    doubled, silent = json.dumps({"ranking": [*LABELS[:5], "anger"]}), "I'd rather not say."
    conversations = [(prompt.messages(transcript, LABELS, "v1"), right(transcript)) for transcript in GOOD]
    conversations += [(prompt.messages(CORRECTED, LABELS, "v1"), doubled)]
    conversations += [(follow_up(CORRECTED, doubled), right(CORRECTED))]
    conversations += [(prompt.messages(NEVER, LABELS, "v1"), silent), (follow_up(NEVER, silent), silent)]
    folder = tmp_path_factory.mktemp("miniature")
    save_chat_model(folder, conversations)
    return folder


@pytest.fixture(scope="module")
def url(model: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", model, "--host", "127.0.0.1", "--port", port]
    process = subprocess.Popen([*map(str, command), "--device", "cpu"], text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if "startup complete" in line:
            break
    else:
        raise AssertionError("".join(said))
    threading.Thread(target=process.stdout.read, daemon=True).start()  # so that it never waits for a reader
    yield f"http://127.0.0.1:{port}/v1"
    process.terminate()
    process.wait(30)


def house(folder: Path, transcripts: list[str], **rankings: Any) -> None:
    """A working directory with params.yaml and transcripts."""
    values = read_yaml(ROOT / "params.yaml")
    values["rankings"] |= {"provider": "openai", "price_per_million": {"input": 0, "output": 0}} | rankings
    values["corpus"]["max_bad_fraction"] = 0.5
    YAML().dump(values, folder / "params.yaml")
    (folder / "data").mkdir()
    rows = [(f"c{i}", transcript, "corpus") for i, transcript in enumerate(transcripts)]
    write_rows(folder / "data/transcripts.csv", ["clip_id", "transcript", "source"], rows)


def test_a_lab_ranks_on_its_own_machine_without_a_key(
    url: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    house(tmp_path, [*GOOD, CORRECTED, NEVER], model=str(model), base_url=url)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    rank_emotions.main()
    rows = {row["transcript"]: row for row in map(json.loads, (tmp_path / "data/rankings.jsonl").open())}
    for transcript in [*GOOD, CORRECTED]:
        assert rows[transcript]["ranking"] == ranking_of(transcript), transcript
    once = [rows[transcript]["output_tokens"] for transcript in GOOD]
    assert rows[CORRECTED]["output_tokens"] > max(once)  # asked twice
    assert rows[NEVER]["ranking"] is None
    assert rows[NEVER]["reason"] == 'an invalid answer (it is no JSON object with the key "ranking")'
    assert "4 of 5 transcripts ranked" in capsys.readouterr().out


def test_the_wrong_model_is_named_at_once(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    house(tmp_path, GOOD, model="Qwen/Qwen3-8B", base_url=url)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PipelineError, match="rankings.model: Qwen/Qwen3-8B was not found there") as error:
        rank_emotions.main()
    assert "0 of 3 transcripts" in str(error.value) and "\n" not in str(error.value)
