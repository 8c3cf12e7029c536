"""The extraction engine: resumed equals uninterrupted, a bad clip costs itself alone, stale shards are not reused."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine import ROOT, contents, inputs, small_shards, stage
from ruamel.yaml import YAML

from stages.engine import store
from stages.engine.devices import pick_devices
from stages.engine.errors import PipelineError, Skip, run_stage
from stages.engine.extraction import Input, extract
from stages.engine.fingerprint import checkpoint_digest, stage_fingerprint
from stages.engine.params import Params, load
from stages.engine.per_clip import PerClip
from stages.engine.store import Row, Store


@pytest.fixture
def p(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    """Params with small shards, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    return small_shards(tmp_path)


class Words:
    """A text for every clip; notes which clips it computed, and may be killed at one."""

    attributes: dict[str, Any] = {}

    def __init__(self, log: Path, die_at: str = ""):
        self.log, self.die_at = log, die_at

    def open(self, device: str, workers: int | None = None) -> None: ...

    def close(self) -> None: ...

    def shards(self, chunks: Iterable[Sequence[Input]]) -> Iterator[list[Row]]:
        for chunk in chunks:
            yield [self._row(clip) for clip in chunk]

    def _row(self, clip: Input) -> Row:
        with open(self.log, "a") as log:
            log.write(clip.clip_id + "\n")
        if clip.clip_id == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return Row(clip.clip_id, values=f"text {clip.item}")


def computed(log: Path) -> list[str]:
    names = log.read_text().split() if log.exists() else []
    log.unlink(missing_ok=True)
    return names


def run_and_die() -> None:
    extract(stage(), inputs(14), Words(Path("log"), die_at="c09"), load(), ["cpu"])


def test_killed_and_resumed_equals_uninterrupted(p: Params, tmp_path: Path) -> None:
    path = [str(ROOT), str(ROOT / "tests")]
    code = f"import sys; sys.path[:0] = {path}; import test_extraction as t; t.run_and_die()"
    killed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert not Path("out").exists()
    assert computed(Path("log"))[-1] == "c09"
    extract(stage(), inputs(14), Words(Path("log")), p, ["cpu"])
    assert computed(Path("log"))[0] == "c08"  # the shard that was cut begins anew; the two before are kept
    resumed = contents(Path("out/some_stage"))

    fresh = tmp_path / "fresh"
    fresh.mkdir()
    os.chdir(fresh)
    extract(stage(), inputs(14), Words(Path("log")), p, ["cpu"])
    assert len(computed(Path("log"))) == 14
    assert contents(Path("out/some_stage")) == resumed
    assert Store("out/some_stage").read("c13") == "text 13"


def test_only_what_changed_is_computed(p: Params) -> None:
    log = Path("log")
    extract(stage(), inputs(8), Words(log), p, ["cpu"])
    computed(log)
    extract(stage(), inputs(8), Words(log), p, ["cpu"])
    assert computed(log) == []
    extract(stage(), inputs(10), Words(log), p, ["cpu"])  # the corpus grew at its end
    assert computed(log) == ["c08", "c09"]
    changed = inputs(8)
    changed[5] = Input("c05", 500, bytes(16))
    extract(stage(), changed, Words(log), p, ["cpu"])
    assert computed(log) == ["c04", "c05", "c06", "c07"]
    extract(stage(fingerprint="other code"), inputs(8), Words(log), p, ["cpu"])
    assert len(computed(log)) == 8
    extract(stage(), inputs(8), Words(log), p, ["cpu"])  # back again: everything is still there
    assert computed(log) == []


@pytest.mark.parametrize("damage", ["flipped", "truncated", "foreign"])
def test_a_part_with_a_damaged_head_is_made_again(p: Params, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    log = Path("log")
    extract(stage(), inputs(12), Words(log), p, ["cpu"])
    whole = contents(Path("out/some_stage"))
    computed(log)
    shard = Path("out/some_stage/shard-00000.h5")
    content = bytearray(shard.read_bytes())
    if damage == "flipped":
        content[content.index(b"c00")] ^= 1
    elif damage == "truncated":
        del content[2000:]
    else:
        content = bytearray(Path("out/some_stage/shard-00001.h5").read_bytes())
    shard.write_bytes(content)  # in place: the out and the part are one file
    extract(stage(), inputs(12), Words(log), p, ["cpu"])
    assert computed(log) == ["c00", "c01", "c02", "c03"]
    assert contents(Path("out/some_stage")) == whole
    assert "it is made again" in capsys.readouterr().err


def test_a_shard_that_can_not_be_read_now_is_kept(
    p: Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    extract(stage(), inputs(8), Words(Path("log")), p, ["cpu"])
    finished = {path: path.read_bytes() for path in Path(".cache/parts").rglob("*.h5")}

    def no_more_files(*_: Any) -> None:
        raise OSError(errno.EMFILE, "Unable to synchronously open file")

    with monkeypatch.context() as patch:
        patch.setattr(store.h5py, "File", no_more_files)
        with pytest.raises(SystemExit):
            run_stage(lambda: extract(stage(), inputs(8), Words(Path("log")), p, ["cpu"]))
    error = capsys.readouterr().err
    assert ".cache/parts/" in error and "Too many open files; raise the limit of open files" in error
    assert finished and {path: path.read_bytes() for path in Path(".cache/parts").rglob("*.h5")} == finished


def test_without_keep_parts_nothing_is_left_behind(p: Params) -> None:
    runtime = p.runtime.model_copy(update={"keep_parts": False})
    extract(stage(), inputs(8), Words(Path("log")), p.model_copy(update={"runtime": runtime}), ["cpu"])
    assert not list(Path(".cache/parts").rglob("*.h5"))
    assert len(Store("out/some_stage")) == 8


def test_finished_files_are_never_written_through_a_link(p: Params) -> None:
    extract(stage(), inputs(4), Words(Path("log")), p, ["cpu"])
    cached = Path("cached.h5")
    os.link("out/some_stage/shard-00000.h5", cached)  # as DVC's cache does
    before = cached.read_bytes()
    extract(stage(fingerprint="g"), [Input("c00", 7, b"x" * 16)], Words(Path("log")), p, ["cpu"])
    assert cached.read_bytes() == before


def media(clip_id: str, item: int) -> Row:
    if item == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    if item in (2, 4):
        if item == 4:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
    if item == 3:
        raise Skip("no audio stream")
    return Row(clip_id, values=np.full(item, item, np.int16))


def test_a_crash_a_hang_and_a_skip_cost_one_clip_each(p: Params) -> None:
    start = time.monotonic()
    extract(stage(kind="audio"), inputs(20), PerClip(media, workers=2, timeout=3), p, ["cpu"])
    assert time.monotonic() - start < 30
    store = Store("out/some_stage")
    assert store.clip_ids == [f"c{i:02d}" for i in range(20)]
    assert np.flatnonzero(~store.present).tolist() == [1, 2, 3, 4]
    assert "crashed" in store.reasons[1]  # with the hangs, more workers than there are: dead ones are replaced
    assert store.reasons[2:5] == ["stopped after 3 s without a result", "no audio stream", store.reasons[2]]
    assert store.read("c19").tolist() == [19] * 19


def test_too_many_bad_clips_stop_the_stage_with_the_list(p: Params) -> None:
    expected = r"4 of 8 clips .*corpus\.max_bad_fraction = 0\.2 .*c03: no audio stream"
    with pytest.raises(PipelineError, match=expected) as caught:
        extract(stage(kind="audio"), inputs(8), PerClip(media, workers=2, timeout=3), p, ["cpu"])
    assert "\n" not in str(caught.value)
    assert len(Path(".cache/skipped-some_stage.csv").read_text().splitlines()) == 5
    assert not Path("out").exists()


def test_fingerprint_follows_params_code_and_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code_a.py").write_text("a")
    (tmp_path / "code_b.py").write_text("b")
    values = {"rows": {"a": {"code": "code_a", "x": 1}, "b": {"code": "code_b", "x": 1}}, "runtime": {"device": "cpu"}}
    dvc = {"stages": {"extract": {"foreach": "${rows}", "do": {
        "deps": ["${item.code}.py", "data/${key}"], "params": ["rows.${key}"]}}}}

    def fingerprints(extra: bytes = b"") -> list[str]:
        YAML().dump(values, tmp_path / "params.yaml")
        YAML().dump(dvc, tmp_path / "dvc.yaml")
        return [stage_fingerprint("extract@a", extra), stage_fingerprint("extract@b", extra)]

    first = fingerprints()
    assert first[0] != first[1]
    values["rows"]["a"]["x"] = 2
    assert fingerprints()[0] != first[0] and fingerprints()[1] == first[1]
    values["rows"]["a"]["x"] = 1
    values["runtime"]["device"] = "cuda"
    assert fingerprints() == first
    (tmp_path / "code_b.py").write_text("changed")
    assert fingerprints()[0] == first[0] and fingerprints()[1] != first[1]
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "weights").write_bytes(b"1")
    before = checkpoint_digest(str(checkpoint))
    (checkpoint / "weights").write_bytes(b"2")
    assert checkpoint_digest(str(checkpoint)) != before
    assert checkpoint_digest("some/published-name") == b""
    with pytest.raises(PipelineError, match="no stage 'nonsense'"):
        stage_fingerprint("nonsense")


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_devices("cpu") == ["cpu"] == pick_devices("auto")
    expected = r"runtime\.device: found cuda, but this machine has 0 .*expected auto, cpu"
    with pytest.raises(PipelineError, match=expected):
        pick_devices("cuda")
