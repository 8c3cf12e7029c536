"""Several voices, and a voice that is sent the clip, against a server on loopback that checks what arrives."""

import base64
import io
import json
import wave
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from batch_runs import HASTY
from batch_server import BatchServer
from chat_server import (
    KEY,
    LABELS,
    TOKENS_IN,
    TOKENS_OUT,
    Handler,
    Server,
    answer,
    pay_in_process,
    ranking_of,
    serving,
)
from clip_files import write_clip
from PIL import Image
from ruamel.yaml import YAML

from stages import rank_emotions
from stages.engine.errors import PipelineError
from stages.engine.files import file_digest, write_rows
from stages.engine.manifest import Clip, write_manifest
from stages.engine.params import load
from stages.engine.yaml_file import read_yaml
from stages.inference.texts import find_texts
from stages.rankings import openai_batch, openai_provider, providers
from stages.rankings.cache import Cache
from stages.rankings.clips import SAMPLE_RATE, item_of
from stages.rankings.providers import question, voices

ROOT = Path(__file__).parents[1]
WORDS = {"words": {"provider": "lexicon", "model": "DUTIR"}}
PRICE = (TOKENS_IN * 2.5 + TOKENS_OUT * 10.0) / 1e6


@pytest.fixture
def server() -> Iterator[BatchServer]:
    with serving(BatchServer()) as running:
        yield running


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five clips: two with the same words, one without words, one without sound, one that is no media file."""
    (tmp_path / "corpus").mkdir()
    (tmp_path / "data").mkdir()
    texts = {"a": "我很开心", "b": "我很开心", "c": "", "d": "气死我了", "e": "坏"}
    for name in "abc":
        write_clip(tmp_path / f"corpus/{name}.mp4", 1.0 + 0.2 * (name == "b"))
    write_clip(tmp_path / "corpus/d.mp4", 1.0, sound=False)
    (tmp_path / "corpus/e.mp4").write_text("no clip")
    paths = {name: tmp_path / f"corpus/{name}.mp4" for name in texts}
    write_manifest(
        [Clip(n, p.name, "unlabelled", "", texts[n], "", None, 1, file_digest(p)) for n, p in paths.items()],
        tmp_path / "data/manifest.csv",
    )
    rows = [(name, text, "corpus") for name, text in texts.items()]
    write_rows(tmp_path / "data/transcripts.csv", ["clip_id", "transcript", "source"], rows)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(providers, "pay", pay_in_process)
    monkeypatch.setattr(openai_provider, "Patience", lambda: HASTY)
    monkeypatch.setattr(openai_batch, "Patience", lambda: HASTY)
    return tmp_path


def set_params(server: Server, **changes: Any) -> None:
    values = read_yaml(ROOT / "params.yaml")
    values["corpus"] |= {"path": "corpus", "max_bad_fraction": 0.5}
    values["rankings"] |= {"provider": "openai", "model": "gpt-test", "base_url": server.url, "max_cost_usd": 1.0,
                           "frames": 3, "frame_side": 32} | changes
    YAML().dump(values, Path("params.yaml"))


def written() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("data/rankings.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- several voices


def test_each_voice_has_its_column(server: Server, house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = {"model": "gpt-other", "price_per_million": {"input": 0, "output": 0}}
    set_params(server, providers=WORDS | {"other": other})
    rank_emotions.main()
    rows = written()
    assert [(row["transcript"], row["clip_ids"]) for row in rows] == [
        ("我很开心", ["a", "b"]), ("气死我了", ["d"]), ("坏", ["e"])]
    asked = {name: question(p).digest for name, p in voices(load()).items()}
    assert len(set(asked.values())) == 3
    for row in rows:
        assert row["ranking"] == ranking_of(row["transcript"]) and row["question"] == asked["ranking"]
        assert list(row["voices"]) == ["words", "other"]
        assert row["voices"]["other"]["ranking"] == row["ranking"]
        assert {name: cell["question"] for name, cell in row["voices"].items()} == {
            "words": asked["words"], "other": asked["other"]}
    assert rows[1]["voices"]["words"]["ranking"][0] == "anger"
    assert rows[1]["voices"]["words"]["provider"] == "lexicon"
    assert [request["model"] for request in server.requests].count("gpt-other") == 3
    said = capsys.readouterr().out
    assert "3 distinct transcripts ranked by openai gpt-test, lexicon DUTIR, openai gpt-other" in said


def test_the_voices_share_one_limit(server: Server, house: Path) -> None:
    set_params(server, providers={"other": {"model": "gpt-other"}}, max_cost_usd=3 * PRICE + 0.005)
    with pytest.raises(PipelineError, match="rankings.max_cost_usd"):  # the first voice's three leave room for less
        rank_emotions.main()
    assert len(server.requests) <= 4
    set_params(server, providers={"other": {"model": "gpt-other"}})
    rank_emotions.main()
    assert len(server.requests) == 6


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"x": {"provider": "gpt"}}, "rankings.providers.x.provider: found 'gpt'"),
        ({"x": {"modle": "m"}}, "rankings.providers.x.modle: unknown parameter"),
        ({"x": {"max_cost_usd": 3}}, "rankings.providers.x.max_cost_usd: holds for all voices"),
        ({"x": {"provider": "lexicon", "input": "clip"}}, "rankings.providers.x.rankings.input: found 'clip'"),
        ({"ranking": {"model": "m"}}, "rankings.providers.ranking: the name is taken"),
        ({"X y": {"model": "m"}}, "rankings.providers.X y"),
    ],
)
def test_a_voice_that_is_not_whole_is_named(server: Server, house: Path, changes: Any, expected: str) -> None:
    set_params(server, providers=changes)
    with pytest.raises(PipelineError, match=expected):
        load()


# ---------------------------------------------------------------- the clip itself


def images_and_sound(request: dict[str, Any]) -> tuple[list[Image.Image], np.ndarray | None]:
    """What a request holds beside the words, decoded; raises where its form is not OpenAI's."""
    words, *media = request["messages"][1]["content"]
    assert set(words) == {"type", "text"} and words["type"] == "text"
    images, sound = [], None
    for part in media:
        assert set(part) == {"type", part["type"]}
        if part["type"] == "image_url":
            head, _, data = part["image_url"]["url"].partition(",")
            assert head == "data:image/jpeg;base64"
            images.append(Image.open(io.BytesIO(base64.b64decode(data, validate=True))))
        else:
            assert part["type"] == "input_audio" and part["input_audio"]["format"] == "wav" and sound is None
            with wave.open(io.BytesIO(base64.b64decode(part["input_audio"]["data"], validate=True))) as file:
                assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, SAMPLE_RATE)
                sound = np.frombuffer(file.readframes(file.getnframes()), np.int16)
    return images, sound


def test_a_clip_is_sent_with_its_frames_sound_and_words(server: BatchServer, house: Path) -> None:
    set_params(server, input="clip")
    rank_emotions.main()
    rows = {row["clip_ids"][0]: row for row in written()}
    assert list(rows) == list("abcde")  # a row each: two with the same words are different clips
    for name in "abcd":
        assert rows[name]["ranking"] == ranking_of(rows[name]["transcript"]), name
    assert rows["e"]["ranking"] is None
    assert rows["e"]["reason"].startswith("the clip can't be used (file can't be opened")
    assert len(server.requests) == 4 and "its sound, and the transcript" in server.requests[0]["messages"][0]["content"]
    for request in server.requests:
        images, sound = images_and_sound(request)
        assert [image.size for image in images] == [(43, 32)] * 3
        brightness = [np.asarray(image).mean() for image in images]
        assert brightness == sorted(brightness) and brightness[2] - brightness[0] > 40  # in order, all over the clip
        if "气死" in request["messages"][1]["content"][0]["text"]:
            assert sound is None
        else:
            assert sound is not None and 15_900 <= len(sound) <= 21_000
            assert 2000 < np.abs(sound.astype(int)).mean() < 8000

    before = len(server.requests)
    rank_emotions.main()
    assert len(server.requests) == before  # from the cache
    set_params(server, input="clip", frames=2)  # another question
    rank_emotions.main()
    assert len(server.requests) == before + 4
    set_params(server, input="clip")
    rank_emotions.main()
    assert len(server.requests) == before + 4


def test_a_clip_beside_a_first_voice_of_words(server: Server, house: Path) -> None:
    set_params(server, providers={"seen": {"input": "clip", "model": "omni"}})
    rank_emotions.main()
    rows = {row["clip_ids"][0]: row for row in written()}
    assert list(rows) == list("abcde")
    assert rows["c"]["ranking"] is None and rows["c"]["reason"] == "no words"
    assert rows["c"]["voices"]["seen"]["ranking"] == ranking_of("")
    assert rows["a"]["voices"]["seen"]["item"] == item_of(file_digest("corpus/a.mp4"), "我很开心")
    models = [request["model"] for request in server.requests]
    assert models.count("gpt-test") == 3 and models.count("omni") == 4  # words once per text, clips each


def test_a_clip_that_is_too_large_is_recorded_and_not_sent(server: Server, house: Path) -> None:
    set_params(server, input="clip", max_clip_mb=0.049)  # a second of sound takes 43 kB, b has 1.2 s
    rank_emotions.main()
    rows = {row["clip_ids"][0]: row for row in written()}
    assert "0.1 MB, more than rankings.max_clip_mb allows" in rows["b"]["reason"]
    assert rows["a"]["ranking"] and rows["d"]["ranking"]


def test_images_and_sound_count_towards_the_limit(server: Server, house: Path) -> None:
    """Not by their bytes, which would be a hundred times what any model makes of them."""

    def billed(handler: Handler, request: dict[str, Any]) -> None:
        images, sound = images_and_sound(request)
        body = {"choices": [{"message": {"content": json.dumps({"ranking": ranking_of("x")})}}]}
        handler.send(200, json.dumps(body).encode())

    server.default = billed
    set_params(server, input="clip", price_per_million={"input": 1.0, "output": 0.0}, max_cost_usd=100)
    rank_emotions.main()
    p = load()
    cache = Cache(question(p))
    item = item_of(file_digest("corpus/a.mp4"), "我很开心")
    text = len(json.dumps(server.requests[0] | {"messages": []}, ensure_ascii=False).encode())
    most = cache.spent([item], (1.0, 0.0)) * 1e6
    media = 3 * (4 * 3 + 64) + 50  # patches of 14 x 14 of 43 x 32, and a second of sound
    assert text + media < most < text + media + 1500
    assert most > cache.load([item])[item].input_tokens > 300


def test_clips_go_through_batches_too(server: BatchServer, house: Path) -> None:
    set_params(server, input="clip", batch=True)
    server.outcomes = {}
    rank_emotions.main()
    rows = {row["clip_ids"][0]: row for row in written()}
    assert all(rows[name]["ranking"] == ranking_of(rows[name]["transcript"]) for name in "abcd")
    assert rows["e"]["reason"].startswith("the clip can't be used")
    lines = [json.loads(line) for line in server.files["file-0"][1].splitlines()]
    assert len(lines) == 3 and all(images_and_sound(line["body"])[0] for line in lines)


def test_the_answers_of_all_voices_travel(server: Server, house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.rankings import earlier

    set_params(server, providers={"seen": {"input": "clip", "model": "omni"}})
    rank_emotions.main()
    values = read_yaml("params.yaml")
    entry = {"params": {"params.yaml": {"rankings": values["rankings"], "corpus.labels": LABELS}},
             "outs": [{"path": earlier.OUT, "md5": "0" * 32}]}
    Path("dvc.lock").write_text(json.dumps({"stages": {"rank_emotions": entry}}))
    monkeypatch.setattr(earlier, "cache_folder", lambda: house)
    kept = house / "files/md5/00" / ("0" * 30)
    kept.parent.mkdir(parents=True)
    Path("data/rankings.jsonl").rename(kept)
    Path(".cache/rankings/answers.sqlite").unlink()
    before = len(server.requests)
    rank_emotions.main()
    assert len(server.requests) == before
    again = {row["clip_ids"][0]: row for row in written()}
    assert again["c"]["voices"]["seen"]["ranking"] == ranking_of("") and again["a"]["ranking"]
    server.default = answer


def test_predict_sends_its_clips_too_and_knows_the_corpus(
    server: Server, house: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the process that pays, as users run it."""
    monkeypatch.undo()
    monkeypatch.chdir(house)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    set_params(server, input="clip")
    rank_emotions.main()
    before = len(server.requests)
    (house / "corpus/a.mp4").rename(house / "elsewhere.mp4")  # the same content under another name
    write_clip(house / "new.mp4", 1.0, brightness=-15)
    trained: Any = SimpleNamespace(reads_text=True, params=load(), media={"rankings.jsonl"})
    clips = [house / "elsewhere.mp4", house / "corpus/c.mp4", house / "new.mp4"]
    texts = find_texts(trained, clips, {clips[0]: "我很开心"}, None)  # type: ignore[arg-type]
    assert len(server.requests) == before + 1  # for the new one
    assert texts.item(clips[0], "rankings.jsonl")["ranking"] == ranking_of("我很开心")
    assert texts.item(clips[2], "rankings.jsonl") == {"transcript": "", "ranking": ranking_of(""), "reason": None}
    assert texts.item(clips[2], "transcripts.csv") == "" and texts.ranking(clips[1]) == ranking_of("")
