"""The extraction engine: resumed equals uninterrupted, a bad clip costs itself alone, stale shards are not reused."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine import ROOT, contents, inputs, small_shards, target
from ruamel.yaml import YAML

from stages.engine import store
from stages.engine.devices import pick_devices
from stages.engine.errors import PipelineError, Skip, run_stage
from stages.engine.extraction import write_store
from stages.engine.fingerprint import checkpoint_digest, stage_fingerprint
from stages.engine.params import Params, load
from stages.engine.per_clip import PerClip
from stages.engine.store import Row, Store
from stages.engine.work import Input, Shard, cut, plan


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

    def shards(self, shards: Iterable[Shard]) -> Iterator[tuple[Shard, list[Row]]]:
        for shard in shards:
            yield shard, [self._row(clip) for clip in shard.clips]

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


def shard_names(count: int) -> list[list[str]]:
    """The clips of each of the first `count` clips' shards."""
    return [[clip.clip_id for clip in shard.clips] for shard in plan(target(), inputs(count), 4)]


@pytest.mark.parametrize("size", [1, 2, 7, 64])
@pytest.mark.parametrize("where", ["first", "second", "middle", "last", "all"])
def test_one_clip_more_or_less_changes_two_shards_at_most(size: int, where: str) -> None:
    clips = inputs(300)
    places = {"first": [0], "second": [1], "middle": [150], "last": [299], "all": range(0, 300, 7)}[where]
    before = cut(clips, size)
    assert [clip for run in before for clip in run] == clips and max(map(len, before)) <= size
    for place in places:
        fewer = cut(clips[:place] + clips[place + 1 :], size)
        kept = {run[0].clip_id: run for run in before}
        changed = [run for run in fewer if kept.get(run[0].clip_id) != run]  # as computed again after a removal
        assert sum(map(len, changed)) <= 2 * size
        added = [run for run in before if {run[0].clip_id: run for run in fewer}.get(run[0].clip_id) != run]
        assert sum(map(len, added)) <= 2 * size + 1  # and after an addition, the new clip among them


def test_adding_or_removing_a_clip_computes_no_other_shard_again(p: Params) -> None:
    log = Path("log")
    everything = inputs(40)
    write_store(target(), everything, Words(log), p, ["cpu"])
    computed(log)
    for place in (0, 20, 39):
        fewer = everything[:place] + everything[place + 1 :]
        write_store(target(), fewer, Words(log), p, ["cpu"])
        assert len(computed(log)) <= 8
        assert Store("out/some_stage").clip_ids == [clip.clip_id for clip in fewer]
        write_store(target(), everything, Words(log), p, ["cpu"])
        assert computed(log) == []


def run_and_die() -> None:
    write_store(target(), inputs(14), Words(Path("log"), die_at="c09"), load(), ["cpu"])


def test_killed_and_resumed_equals_uninterrupted(p: Params, tmp_path: Path) -> None:
    path = [str(ROOT), str(ROOT / "tests")]
    code = f"import sys; sys.path[:0] = {path}; import test_extraction as t; t.run_and_die()"
    killed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert not Path("out").exists()
    begun = computed(Path("log"))
    assert begun[-1] == "c09"
    write_store(target(), inputs(14), Words(Path("log")), p, ["cpu"])
    cut_short = next(s for s in plan(target(), inputs(14), 4) if "c09" in [clip.clip_id for clip in s.clips])
    assert computed(Path("log"))[0] == cut_short.clips[0].clip_id  # it begins anew; the shards before are kept
    assert len(begun) > 4
    resumed = contents(Path("out/some_stage"))

    fresh = tmp_path / "fresh"
    fresh.mkdir()
    os.chdir(fresh)
    write_store(target(), inputs(14), Words(Path("log")), p, ["cpu"])
    assert len(computed(Path("log"))) == 14
    assert contents(Path("out/some_stage")) == resumed
    assert Store("out/some_stage").read("c13") == "text 13"


def test_only_what_changed_is_computed(p: Params) -> None:
    log = Path("log")
    write_store(target(), inputs(8), Words(log), p, ["cpu"])
    computed(log)
    write_store(target(), inputs(8), Words(log), p, ["cpu"])
    assert computed(log) == []
    changed = inputs(8)
    changed[5] = Input("c05", 500, bytes(16))
    write_store(target(), changed, Words(log), p, ["cpu"])
    assert computed(log) == next(names for names in shard_names(8) if "c05" in names)
    write_store(target(fingerprint="other code"), inputs(8), Words(log), p, ["cpu"])
    assert len(computed(log)) == 8
    write_store(target(), inputs(8), Words(log), p, ["cpu"])  # back again: everything is still there
    assert computed(log) == []


@pytest.mark.parametrize("damage", ["flipped", "truncated", "foreign"])
def test_a_part_with_a_damaged_head_is_made_again(p: Params, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    log = Path("log")
    write_store(target(), inputs(12), Words(log), p, ["cpu"])
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
    write_store(target(), inputs(12), Words(log), p, ["cpu"])
    assert computed(log) == shard_names(12)[0]
    assert contents(Path("out/some_stage")) == whole
    assert "it is made again" in capsys.readouterr().err


def test_a_shard_that_can_not_be_read_now_is_kept(
    p: Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_store(target(), inputs(8), Words(Path("log")), p, ["cpu"])
    finished = {path: path.read_bytes() for path in Path(".cache/parts").rglob("*.h5")}

    def no_more_files(*_: Any, **__: Any) -> None:
        raise OSError(errno.EMFILE, "Unable to synchronously open file")

    with monkeypatch.context() as patch:
        patch.setattr(store.h5py, "File", no_more_files)
        with pytest.raises(SystemExit):
            run_stage(lambda: write_store(target(), inputs(8), Words(Path("log")), p, ["cpu"]))
    error = capsys.readouterr().err
    assert ".cache/parts/" in error and "Too many open files; raise the limit of open files" in error
    assert finished and {path: path.read_bytes() for path in Path(".cache/parts").rglob("*.h5")} == finished


def test_without_keep_parts_nothing_is_left_behind(p: Params) -> None:
    runtime = p.runtime.model_copy(update={"keep_parts": False})
    write_store(target(), inputs(8), Words(Path("log")), p.model_copy(update={"runtime": runtime}), ["cpu"])
    assert not list(Path(".cache/parts").rglob("*.h5"))
    assert len(Store("out/some_stage")) == 8


def test_finished_files_are_never_written_through_a_link(p: Params) -> None:
    write_store(target(), inputs(4), Words(Path("log")), p, ["cpu"])
    cached = Path("cached.h5")
    os.link("out/some_stage/shard-00000.h5", cached)  # as DVC's cache does
    before = cached.read_bytes()
    write_store(target(fingerprint="g"), [Input("c00", 7, b"x" * 16)], Words(Path("log")), p, ["cpu"])
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
    write_store(target(kind="audio"), inputs(20), PerClip(media, workers=2, timeout=3), p, ["cpu"])
    store = Store("out/some_stage")
    assert store.clip_ids == [f"c{i:02d}" for i in range(20)]
    assert np.flatnonzero(~store.present).tolist() == [1, 2, 3, 4]
    assert store.reasons[1] == "the decoder crashed (SIGSEGV)"  # with the hangs, more workers than there are
    hung = "stopped after 3 s (runtime.clip_timeout_seconds) without a result"
    assert store.reasons[2:5] == [hung, "no audio stream", hung]
    assert store.read("c19").tolist() == [19] * 19


def test_too_many_bad_clips_stop_the_stage_with_the_list(p: Params) -> None:
    expected = r"3 of 7 clips .*corpus\.max_bad_fraction = 0\.2 .*c01: the decoder crashed"  # c03 has no audio stream
    with pytest.raises(PipelineError, match=expected) as caught:
        write_store(target(kind="audio"), inputs(8), PerClip(media, workers=2, timeout=3), p, ["cpu"])
    assert "\n" not in str(caught.value)
    assert len(Path(".cache/skipped-some_stage.csv").read_text().splitlines()) == 4
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
    (checkpoint / "weights.bin").write_bytes(b"1")
    before = checkpoint_digest(str(checkpoint))
    (checkpoint / "README.md").write_text("not loaded")
    assert checkpoint_digest(str(checkpoint)) == before
    (checkpoint / "weights.bin").write_bytes(b"2")
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
