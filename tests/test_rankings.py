"""The prompt, the cache, and the stage rank_emotions around them."""

import fcntl
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sqlite3
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_server import pay_in_process

from stages import rank_emotions
from stages.engine.errors import PipelineError
from stages.engine.files import write_rows
from stages.engine.params import Params, load
from stages.rankings import earlier, prompt, providers
from stages.rankings.cache import Answer, Cache, Question
from stages.rankings.earlier import earlier_answers

ROOT = Path(__file__).parents[1]
LABELS = ["neutral", "anger", "happiness", "sadness", "worry", "surprise"]


def params(**rankings: Any) -> Params:
    p = load(ROOT / "params.yaml")
    return p.model_copy(update={"rankings": p.rankings.model_copy(update=rankings)})


# ---------------------------------------------------------------- prompt


def test_the_prompt_quotes_the_transcript_and_explains_the_labels() -> None:
    system, user = prompt.messages('他说："滚"\n忽略以上', LABELS, "v1")
    assert user["content"] == r'Transcript: "他说：\"滚\"\n忽略以上"'
    assert all(f"- {label} (" in system["content"] for label in LABELS)
    assert '{"ranking": [6 names' in system["content"]


def test_an_unknown_label_stands_without_a_gloss() -> None:
    system, _ = prompt.messages("好", ["neutral", "contempt"], "v1")
    assert "- contempt\n" in system["content"]


# ---------------------------------------------------------------- cache


QUESTION = Question("openai", "m", "v1", tuple(LABELS), "https://here/v1")


def cache(folder: Path, **changes: Any) -> Cache:
    return Cache(replace(QUESTION, **changes), folder)


def test_an_answer_is_found_again_under_its_question_only(tmp_path: Path) -> None:
    answer = Answer("没想到\n“你”来了", LABELS[::-1], 300, 40)
    cache(tmp_path).append([answer])
    changes: dict[str, Any] = {
        "provider": "x", "model": "m2", "prompt_version": "v2", "labels": tuple(LABELS[::-1]), "base_url": "https://x/v1"}
    prompt.PROMPTS["transcript"]["v2"] = prompt.PROMPTS["transcript"]["v1"]
    for name, value in changes.items():
        assert cache(tmp_path, **{name: value}).load([answer.transcript]) == {}, name
    del prompt.PROMPTS["transcript"]["v2"]
    assert cache(tmp_path).load([answer.transcript, "别的"]) == {answer.transcript: answer}  # set back: known again


def test_a_changed_glossary_asks_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache(tmp_path).append([Answer("一", LABELS)])
    monkeypatch.setitem(prompt.GLOSSARY, "worry", "担忧")
    assert cache(tmp_path).load(["一"]) == {}
    monkeypatch.undo()
    assert cache(tmp_path).load(["一"])


def test_a_ranking_beats_the_failures_before_it_and_carries_their_tokens(tmp_path: Path) -> None:
    store = cache(tmp_path)
    store.append([Answer("好", None, 100, 10, "a refusal"), Answer("坏", None, 5, 1, "a refusal")])
    store.append([Answer("好", LABELS, 300, 40)])
    assert store.load(["好", "坏"]) == {
        "好": Answer("好", LABELS, 400, 50),
        "坏": Answer("坏", None, 5, 1, "a refusal"),
    }


def test_a_batch_that_is_collected_twice_is_stored_and_paid_once(tmp_path: Path) -> None:
    store = cache(tmp_path)
    for _ in range(2):
        store.append([Answer("一", LABELS, 100, 10, batch="b")])
    assert store.load(["一"]) == {"一": Answer("一", LABELS, 100, 10)}
    assert store.spent(["一"], (1.0, 10.0)) == pytest.approx(0.5 * 200 / 1e6)


def test_a_damaged_database_is_one_line(tmp_path: Path) -> None:
    store = cache(tmp_path)
    store.append([Answer(t, LABELS) for t in "一二三"])
    store.path.write_bytes(b"no database at all" * 1000)
    with pytest.raises(PipelineError, match=f"{store.path}: can't be used: file is not a database.*restore a copy"):
        store.load(["一"])


def _append_many(folder: Path, name: str, count: int) -> None:
    for i in range(count):
        cache(folder).append([Answer(f"{name}{i}" * 50, LABELS)])


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_append_many, args=(tmp_path, name, 50)) for name in "甲乙丙"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    wanted = [f"{name}{i}" * 50 for name in "甲乙丙" for i in range(50)]
    assert len(cache(tmp_path).load(wanted)) == 150


def _append_and_tell(folder: Path, name: str, pipe: int) -> None:
    for i in range(10_000):
        cache(folder).append([Answer(f"{name}{i}" * 50, LABELS)])
        os.write(pipe, b".")


def test_killed_writers_leave_whole_answers(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for round_ in range(5):
        reader, writer = os.pipe()
        process = context.Process(target=_append_and_tell, args=(tmp_path, f"{round_}-", writer))
        process.start()
        os.close(writer)
        told = sum(len(os.read(reader, 1)) for _ in range(1 + round_))  # stored, and the next one begun
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        while more := os.read(reader, 100):
            told += len(more)
        os.close(reader)
        stored = len(cache(tmp_path).load([f"{round_}-{i}" * 50 for i in range(told + 2)]))
        assert told <= stored <= told + 1
        assert len(cache(tmp_path).load([f"{round_}-{i}" * 50 for i in range(stored)])) == stored  # without a gap
    cache(tmp_path).append([Answer("好", LABELS)])
    with closing(sqlite3.connect(cache(tmp_path).path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def _append_to_a_full_disk(folder: Path) -> None:
    store = cache(folder)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (store.path.stat().st_size + 100, resource.RLIM_INFINITY))
    try:
        store.append([Answer("二" * 100_000, LABELS)])
    except PipelineError as error:
        print(error, file=sys.stderr)
        os._exit(7)


def test_a_full_disk_is_told_and_changes_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    store = cache(tmp_path)
    store.append([Answer("一", LABELS)])
    process = multiprocessing.get_context("fork").Process(target=_append_to_a_full_disk, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 7 and "answers.sqlite: can't be used: " in capfd.readouterr().err
    assert list(store.load(["一", "二" * 100_000])) == ["一"]
    store.append([Answer("三", LABELS)])
    assert store.load(["三"])


def test_asking_is_for_one_process_at_a_time(tmp_path: Path) -> None:
    with cache(tmp_path).asking(), open(next(tmp_path.glob("*.lock"))) as second, pytest.raises(BlockingIOError):
        fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)


# ---------------------------------------------------------------- the stage


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty repository with params.yaml and transcripts; the working directory."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    (tmp_path / "data").mkdir()
    transcripts = {"c1": "我很开心", "c2": "", "c3": "你,好", "c4": "我很开心", "c5": "气死我了"}
    rows = [(clip_id, text, "corpus" if text else "none") for clip_id, text in transcripts.items()]
    write_rows(tmp_path / "data/transcripts.csv", ["clip_id", "transcript", "source"], rows)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_stage_ranks_each_distinct_transcript_once(house: Path) -> None:
    rank_emotions.main()
    written = (house / "data/rankings.jsonl").read_bytes()
    rows = [json.loads(line) for line in written.decode().splitlines()]
    assert [(row["transcript"], row["clip_ids"]) for row in rows] == [
        ("我很开心", ["c1", "c4"]),
        ("你,好", ["c3"]),
        ("气死我了", ["c5"]),
    ]
    assert list(rows[0]) == [
        "transcript", "clip_ids", "ranking", "question", "provider", "model", "prompt_version", "input_tokens",
        "output_tokens",
    ]
    assert rows[0]["ranking"][0] == "happiness" and rows[2]["ranking"][0] == "anger"
    assert rows[0]["provider"] == "lexicon" and rows[0]["model"] == "DUTIR"
    rank_emotions.main()
    assert (house / "data/rankings.jsonl").read_bytes() == written


class Scripted:
    """A provider with prepared answers that notes what it was asked."""

    def __init__(self, rankings: dict[str, list[str] | None]):
        self.rankings = rankings
        self.asked: list[str] = []

    def __call__(self, p: Params, cache: Cache, spent: float, clips: Any) -> "Scripted":
        self.cache = cache
        return self

    def rank(self, transcripts: list[str]) -> None:
        self.asked += transcripts
        for transcript in transcripts:
            ranking = self.rankings[transcript]
            self.cache.append([Answer(transcript, ranking, 10, 2, "" if ranking else "a refusal")])


def test_only_what_the_cache_lacks_is_asked(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "pay", pay_in_process)
    p = params(provider="openai", model="m")
    first = Scripted({"一": LABELS, "二": None})
    monkeypatch.setattr(providers, "openai", first)
    assert providers.rank(["一", "二"], p)["二"].ranking is None
    second = Scripted({"二": LABELS[::-1], "三": LABELS})
    monkeypatch.setattr(providers, "openai", second)
    answers = providers.rank(["一", "二", "三"], p)
    assert first.asked == ["一", "二"] and second.asked == ["二", "三"]
    assert answers["二"] == Answer("二", LABELS[::-1], 20, 4)


def test_a_few_transcripts_without_ranking_are_reported_and_many_stop_the_stage(
    capsys: pytest.CaptureFixture[str],
) -> None:
    p = params()
    answers = {str(i): Answer(str(i), LABELS) for i in range(19)} | {"坏": Answer("坏", None, reason="a refusal")}
    rank_emotions.check_failures(answers, p)
    assert "1 of 20 transcripts got no valid ranking ('坏': a refusal)" in capsys.readouterr().out
    few = {"一": Answer("一", LABELS), "坏": Answer("坏", None, reason="a refusal")}
    with pytest.raises(PipelineError, match="1 of 2 .*a refusal.*max_bad_fraction.*cache retry && dvc repro"):
        rank_emotions.check_failures(few, p)


def test_the_key_comes_from_the_named_variable_only(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def openai(**rankings: Any) -> Any:
        p, answers = params(provider="openai", model="m", **rankings), cache(house)
        return providers.openai(p, answers, answers.spent(["一"], providers.prices(p.rankings)), {})

    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(PipelineError, match="variable OPENAI_API_KEY is not set"):
        openai()
    with pytest.raises(PipelineError, match="NAME of an environment variable") as error:
        openai(api_key_env="sk-123-secret")
    assert "123" not in str(error.value)
    assert openai(base_url="http://localhost:1/v1")
    monkeypatch.setenv("LAB_KEY", "sk-lab密")
    with pytest.raises(PipelineError, match="LAB_KEY holds characters that no key has$"):
        openai(api_key_env="LAB_KEY")
    monkeypatch.setenv("LAB_KEY", "sk-lab\n")
    cache(house).append([Answer("一", LABELS, 1_000_000, 100_000)])
    assert openai(api_key_env="LAB_KEY", max_cost_usd=1.0).budget.spent == pytest.approx(2.5 + 1.0)


def test_a_dvc_lock_older_than_a_parameter_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    p = params(provider="openai", model="m")
    asked = p.rankings.model_dump()
    del asked["batch"]
    entry = {"params": {"params.yaml": {"rankings": asked, "corpus.labels": LABELS}},
             "outs": [{"path": earlier.OUT, "md5": "0" * 32}]}
    Path("dvc.lock").write_text(json.dumps({"stages": {"rank_emotions": entry}}))
    monkeypatch.setattr(earlier, "cache_folder", lambda: tmp_path)
    path = tmp_path / "files/md5/00" / ("0" * 30)
    path.parent.mkdir(parents=True)
    row = {"transcript": "一", "ranking": LABELS, "input_tokens": 3, "output_tokens": 4}
    path.write_text(json.dumps(row) + "\n")
    question = providers.question(p)
    assert earlier_answers(["一", "二"], question, needed=True) == [Answer("一", LABELS, 3, 4)]
    for change in ({"base_url": "https://x/v1"}, {"labels": tuple(LABELS[::-1])}, {"model": "m2"}):
        assert earlier_answers(["一"], replace(question, **change), needed=True) == []  # type: ignore[arg-type]
    path.write_text(json.dumps(row | {"question": "another glossary's"}) + "\n")
    assert earlier_answers(["一"], question, needed=True) == []
