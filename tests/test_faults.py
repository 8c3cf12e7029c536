"""Whose fault it is: what the machine does to a clip is retried and never recorded; what a clip does is its own."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
from engine import ROOT, inputs, small_shards, target
from media_files import write_small_clip
from ruamel.yaml import YAML

from stages.commands import repair
from stages.engine import errors
from stages.engine.errors import PipelineError, Skip, run_stage
from stages.engine.extraction import write_store
from stages.engine.fingerprint import stage_fingerprint
from stages.engine.manifest import Clip, write_manifest
from stages.engine.params import Params, load
from stages.engine.per_clip import PerClip
from stages.engine.store import Row, Store, read_head
from stages.engine.work import part_fingerprint, plan
from stages.engine.yaml_file import read_yaml
from stages.media import clip as clip_module
from stages.media.audio import load_audio
from stages.media.clip import Reader, open_clip

MEDIA = {"extract_audio": "data/audio", "slice_frames": "data/frames", "crop_faces": "data/faces"}


@pytest.fixture
def p(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    """Params with shards of four clips, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    YAML().dump({"stages": {"some_stage": {"cmd": "true", "outs": ["out/some_stage"]}}}, tmp_path / "dvc.yaml")
    return small_shards(tmp_path)


def tries(clip_id: str) -> int:
    """Count this attempt at the clip, in the working directory; returns how many there were before."""
    with open(f"tries-{clip_id}", "a") as file:
        file.write("x")
        return file.tell() - 1


def unlucky(clip_id: str, item: int, victim: str, deaths: int, how: str) -> Row:
    """The victim's decoder is ended from outside, or hangs, in its first `deaths` attempts."""
    if clip_id == victim and tries(clip_id) < deaths:
        if how == "hangs":
            time.sleep(60)
        os.kill(os.getpid(), signal.SIGKILL)
    return Row(clip_id, values=np.full(3, item, np.int16))


def doomed(clip_id: str, item: int, deaths: int) -> Row:
    """Every clip's decoder is ended from outside in its first `deaths` attempts."""
    if tries(clip_id) < deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    return Row(clip_id, values=np.full(3, item, np.int16))


def exits(clip_id: str, item: int, code: int) -> Row:
    """What a clip may make a library do: end the process."""
    if clip_id == "c05":
        os._exit(code)
    return Row(clip_id, values=np.full(3, item, np.int16))


def faulty(clip_id: str, item: int, number: int, attempts: int) -> Row:
    """The machine's fault `number` (0: no memory) at clip c05, in the first attempts."""
    if clip_id == "c05" and tries(clip_id) < attempts:
        raise OSError(number, os.strerror(number), "clips/c05.mp4") if number else MemoryError()
    return Row(clip_id, values=np.full(3, item, np.int16))


def media_work(function: object, timeout: float = 30, workers: int = 2) -> PerClip:
    return PerClip(function, workers, timeout)  # type: ignore[arg-type]


def test_a_worker_killed_once_costs_nothing(p: Params) -> None:
    function = partial(unlucky, victim="c05", deaths=1, how="killed")
    write_store(target(kind="audio"), inputs(12), media_work(function), p, ["cpu"])
    assert Store("out/some_stage").present.all()
    assert len(Path("tries-c05").read_text()) == 2


def test_a_worker_killed_twice_is_the_clips_fault_and_may_be_tried_again(
    p: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    function = partial(unlucky, victim="c05", deaths=2, how="killed")
    write_store(target(kind="audio"), inputs(12), media_work(function), p, ["cpu"])
    store = Store("out/some_stage")
    assert np.flatnonzero(~store.present).tolist() == [5]
    assert store.reasons[5] == "the decoder crashed (SIGKILL, as when memory runs out)"
    assert "mer repair --retry out/some_stage" in capsys.readouterr().err
    whole = {path: path.read_bytes() for path in Path(".cache/parts").rglob("*.h5")}
    removed = repair.to_retry(Path("out/some_stage"), Path("no-cache"))
    assert {path.parent.parts[0] for path in removed} == {"out", ".cache"}
    for path in removed:
        path.unlink()
    left = set(Path(".cache/parts").rglob("*.h5"))
    assert len(left) == len(whole) - 1  # the shard of c05 alone
    write_store(target(kind="audio"), inputs(12), media_work(function), p, ["cpu"])
    assert Store("out/some_stage").present.all()


def test_too_many_dead_decoders_stop_the_stage_and_the_named_command_lets_them_be_tried_again(
    p: Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stage never got as far as its out, and DVC knows nothing of it yet."""
    function = partial(doomed, deaths=2)
    with pytest.raises(PipelineError, match=r"mer repair --retry out/some_stage.* lets 6 of them"):
        write_store(target(kind="audio"), inputs(6), media_work(function), p, ["cpu"])
    assert not Path("out").exists()
    with pytest.raises(PipelineError, match="6 of 6 clips can't be used"):  # nothing is tried again by itself
        write_store(target(kind="audio"), inputs(6), media_work(function), p, ["cpu"])
    monkeypatch.setattr(repair, "cache_folder", lambda: Path("no-cache"))
    repair.main(["--retry", "out/some_stage"])
    assert "with clips whose decoder died" in capsys.readouterr().out
    write_store(target(kind="audio"), inputs(6), media_work(function), p, ["cpu"])
    assert Store("out/some_stage").present.all()


@pytest.mark.parametrize("code", [1, 255])
def test_a_clip_that_ends_its_process_costs_itself_alone(p: Params, code: int) -> None:
    write_store(target(kind="audio"), inputs(12), media_work(partial(exits, code=code)), p, ["cpu"])
    store = Store("out/some_stage")
    assert np.flatnonzero(~store.present).tolist() == [5]
    assert store.reasons[5] == f"the decoder ended its process with exit code {code}"


def test_a_time_out_is_recorded_and_tried_again_with_a_larger_limit(p: Params) -> None:
    function = partial(unlucky, victim="c05", deaths=2, how="hangs")
    write_store(target(kind="audio"), inputs(8), media_work(function, timeout=2), p, ["cpu"])
    reasons = Store("out/some_stage").reasons
    assert reasons[5] == "stopped after 2 s (runtime.clip_timeout_seconds) without a result"
    write_store(target(kind="audio"), inputs(8), media_work(function, timeout=30), p, ["cpu"])
    assert not Store("out/some_stage").present.all()  # a limit alone computes nothing again
    for path in repair.to_retry(Path("out/some_stage"), Path("no-cache")):
        path.unlink()
    write_store(target(kind="audio"), inputs(8), media_work(function, timeout=30), p, ["cpu"])
    assert Store("out/some_stage").present.all()


FAULTS = [errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE, errno.ENOENT, errno.ENOTCONN, 0]


@pytest.mark.parametrize("number", FAULTS, ids=lambda number: errno.errorcode.get(number, "MemoryError"))
def test_a_fault_of_the_machine_is_retried_then_stops_the_stage(p: Params, number: int) -> None:
    lasting = partial(faulty, number=number, attempts=99)
    with pytest.raises(PipelineError, match=r"^clip c05: .*run it again \(what was finished is kept\)$") as caught:
        write_store(target(kind="audio"), inputs(12), media_work(lasting, workers=1), p, ["cpu"])
    assert "\n" not in str(caught.value) and not Path("out").exists()
    assert len(Path("tries-c05").read_text()) == errors.ATTEMPTS
    for shard in plan(target(kind="audio"), inputs(12), 4):
        if shard.part.exists():
            head = read_head(shard.part, part_fingerprint("f", shard.part))
            assert all(row.present for row in head.rows)
    Path("tries-c05").unlink()
    passing = partial(faulty, number=number, attempts=errors.ATTEMPTS - 1)
    write_store(target(kind="audio"), inputs(12), media_work(passing, workers=1), p, ["cpu"])  # the cause is gone
    assert Store("out/some_stage").present.all()


# ---------------------------------------------------------------- the media stages on real clips


@pytest.fixture
def corpus(p: Params, tmp_path: Path) -> Path:
    """Six clips and the files that a media stage reads; returns the clips' folder."""
    (tmp_path / "stages").symlink_to(ROOT / "stages")
    shutil.copyfile(ROOT / "dvc.yaml", "dvc.yaml")
    folder = Path(p.corpus.path)
    folder.mkdir(parents=True)
    for i in range(6):
        write_small_clip(folder / f"c{i}.mp4", 0.3)
    write_manifest(Clip(f"c{i}", f"c{i}.mp4", "unlabelled", "", "", "", 1.0, 1, f"{i:064x}") for i in range(6))
    return folder


def run(stage: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", f"stages.{stage}"], text=True, capture_output=True)


@pytest.mark.parametrize("stage", MEDIA)
def test_a_corpus_folder_that_is_away_is_never_recorded(corpus: Path, stage: str) -> None:
    away = corpus.rename("away")
    done = run(stage)
    lines = [line for line in done.stderr.splitlines() if "clip/s" not in line and line.strip()]
    assert done.returncode == 1 and len(lines) == 1, done.stderr
    assert "No such file or directory; bring the file or folder back" in lines[0]
    assert not list(Path(".cache/parts").rglob("*.h5")) and not Path(MEDIA[stage]).exists()
    away.rename(corpus)
    done = run(stage)
    if stage == "crop_faces":  # they show no face: that is the clips' own fault
        assert done.returncode == 1 and "6 of 6 clips can't be used" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert Store(MEDIA[stage]).present.all()


def test_one_clip_that_is_away_stops_the_stage_and_the_others_are_kept(corpus: Path) -> None:
    (corpus / "c5.mp4").rename("c5.mp4")
    done = run("extract_audio")
    assert done.returncode == 1 and "error: clip c5: " in done.stderr and "c5.mp4: No such file" in done.stderr
    Path("c5.mp4").rename(corpus / "c5.mp4")
    assert run("extract_audio").returncode == 0
    assert Store("data/audio").present.all()


@pytest.mark.parametrize("error", [av.error.PermissionError, av.error.FileNotFoundError, av.error.OSError])
@pytest.mark.parametrize("where", ["opening", "reading"])
def test_what_ffmpeg_could_not_read_for_a_moment_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[OSError], where: str
) -> None:
    """FFmpeg fails once, and the file reads well a moment later: neither a Skip nor half of the sound."""
    write_small_clip(tmp_path / "a.mp4", 1.0)
    whole, note = load_audio(tmp_path / "a.mp4", 16000)
    assert not note
    failed = []

    def fail_once(*arguments: object, **options: object) -> Iterator[object]:
        if not failed:
            failed.append(True)
            number = {av.error.PermissionError: errno.EACCES, av.error.FileNotFoundError: errno.ENOENT}.get(error)
            raise error(number or errno.EIO, os.strerror(number or errno.EIO))
        return original(*arguments, **options)

    if where == "opening":
        original = clip_module.av.open
        monkeypatch.setattr(clip_module.av, "open", fail_once)
    else:
        original = Reader.packets

        def packets(reader: Reader) -> Iterator[object]:
            for number, packet in enumerate(original(reader)):
                if number == 3 and not failed:
                    failed.append(True)
                    reader._count(error(errno.EIO, os.strerror(errno.EIO)))  # as its own except clause does
                    return
                yield packet

        monkeypatch.setattr(Reader, "packets", packets)
    samples, note = errors.insist(lambda: load_audio(tmp_path / "a.mp4", 16000))
    assert failed and not note and np.array_equal(samples, whole)


def test_an_error_that_stays_while_the_file_reads_well_is_the_clips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_small_clip(tmp_path / "a.mp4", 1.0)
    tried = []

    def fail(*_: object, **__: object) -> None:
        tried.append(True)
        raise av.error.OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(clip_module.av, "open", fail)
    with pytest.raises(Skip, match="can't be opened: Input/output error"):
        errors.insist(lambda: load_audio(tmp_path / "a.mp4", 16000))
    assert len(tried) >= errors.ATTEMPTS


def test_a_damaged_clip_is_still_its_own_fault(tmp_path: Path) -> None:
    write_small_clip(tmp_path / "a.mp4", 0.5)
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    (tmp_path / "no.mp4").write_bytes(b"no video")
    with pytest.raises(Skip, match="can't be opened"):
        open_clip(tmp_path / "no.mp4")
    content[len(content) // 3 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 3)
    (tmp_path / "scratched.mp4").write_bytes(content)
    with Reader(tmp_path / "scratched.mp4", "video") as reader:
        list(reader.frames())
    with pytest.raises(FileNotFoundError):
        open_clip(tmp_path / "nowhere.mp4")


# ---------------------------------------------------------------- locks


def test_a_shard_that_another_process_has_locked_is_read(p: Params, capsys: pytest.CaptureFixture[str]) -> None:
    write_store(target(kind="audio"), inputs(12), media_work(partial(unlucky, victim="", deaths=0, how="")), p, ["cpu"])
    shard = Path("out/some_stage/shard-00000.h5")
    with open(shard, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        store = Store("out/some_stage")
        assert store.read("c00").tolist() == [0, 0, 0]
        assert repair.damaged(Path("out/some_stage"), Path("no-cache")) == []
    assert shard.exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EAGAIN, errno.ENOTSUP, errno.EIO])
def test_what_can_not_be_opened_now_is_not_called_damaged(
    p: Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    from stages.engine import store

    write_store(target(kind="audio"), inputs(12), media_work(partial(unlucky, victim="", deaths=0, how="")), p, ["cpu"])
    before = {path: path.read_bytes() for path in Path().rglob("*.h5")}

    def fails(*_: object, **__: object) -> None:
        raise OSError(number, "Unable to synchronously open file")

    monkeypatch.setattr(store.h5py, "File", fails)
    for act in (lambda: Store("out/some_stage"), lambda: repair.damaged(Path("out/some_stage"), Path("no-cache"))):
        with pytest.raises(SystemExit):
            run_stage(act)
        said = capsys.readouterr().err
        assert os.strerror(number) in said and "damaged" not in said and "repair" not in said
    assert {path: path.read_bytes() for path in Path().rglob("*.h5")} == before


# ---------------------------------------------------------------- what is hashed, and a share of the work


@pytest.mark.parametrize("module", sorted(path.name for path in (ROOT / "stages/engine").glob("*.py")))
def test_a_comment_in_a_plumbing_module_changes_no_fingerprint(tmp_path: Path, module: str,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "stages", tmp_path / "stages", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    stages = [name for name, entry in read_yaml("dvc.yaml")["stages"].items() if "foreach" not in entry]
    stages += [f"extract@{name}" for name in load().extractors]
    before = {stage: stage_fingerprint(stage) for stage in stages}
    with open(tmp_path / "stages/engine" / module, "a") as code:
        code.write("# a comment\n")
    assert {stage: stage_fingerprint(stage) for stage in stages} == before
    for stage, entry in read_yaml("dvc.yaml")["stages"].items():
        deps = entry.get("deps") or entry["do"]["deps"]
        assert not [dep for dep in deps if dep.startswith("stages/engine")], stage


def test_ranks_share_the_work_and_a_plain_run_puts_it_together(
    p: Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    function = partial(unlucky, victim="", deaths=0, how="")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    write_store(target(kind="audio"), inputs(30), media_work(function), p, ["cpu"])
    shards = plan(target(kind="audio"), inputs(30), 4)
    done = [shard.part.exists() for shard in shards]
    assert done == [number % 2 == 1 for number in range(len(shards))] and not Path("out").exists()
    assert "rank 1 of 2" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "0")
    assert not write_store(target(kind="audio"), inputs(30), media_work(function), p, ["cpu"])
    assert all(shard.part.exists() for shard in shards) and not Path("out").exists()  # ranks never put it together
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    assert write_store(target(kind="audio"), inputs(30), media_work(function), p, ["cpu"])
    assert Store("out/some_stage").clip_ids == [clip.clip_id for clip in inputs(30)]
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PipelineError, match=r"RANK, WORLD_SIZE: found '2', '2'"):
        write_store(target(kind="audio"), inputs(30), media_work(function), p, ["cpu"])


def test_a_store_that_mixes_versions_says_so(
    p: Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from stages.engine import per_clip

    function = partial(unlucky, victim="", deaths=0, how="")
    write_store(target(kind="audio"), inputs(8), media_work(function), p, ["cpu"])
    assert "warning" not in capsys.readouterr().err
    monkeypatch.setattr(per_clip, "versions", lambda packages: '{"av": "0.1"}')
    write_store(target(kind="audio"), inputs(16), media_work(function), p, ["cpu"])
    said = capsys.readouterr().err
    assert "warning: out/some_stage: its shards were made with different versions" in said and '{"av": "0.1"}' in said
