"""What lies in a folder beside clips: named, left out, and never opened blindly."""

import os
import socket
import sys
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from media_files import write_small_clip
from predict_runs import rows, run_predict
from test_corpus import Repository, table

from stages.commands.npy import feature_files
from stages.corpora import csv_file, mer2024
from stages.corpora.folders import MEDIA, SOUND, VIDEO, escaped, scan, what_is
from stages.corpora.layout import media_files
from stages.engine.errors import PipelineError
from stages.inference.clips import find_clips

GBK = os.fsdecode("你好.mp4".encode("gbk"))  # as unzip leaves a name on a UTF-8 machine


def listen(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = os.open(path.parent, os.O_RDONLY)
        server.bind(f"/proc/self/fd/{here}/{path.name}")  # a socket's own path may not be long
        os.close(here)


def write_sound(path: Path, seconds: float = 1.0, rate: int = 16000, pitch: float = 300.0) -> None:
    """A tone as mono 16 bit PCM."""
    tone = 9000 * np.sin(2 * np.pi * pitch * np.arange(int(seconds * rate)) / rate)
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(tone.astype("<i2").tobytes())


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "folder": (Path.mkdir, "folder"),
    "pipe": (os.mkfifo, "pipe"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "device"),
    "socket": (listen, "socket"),
    "link to nothing": (lambda path: path.symlink_to("gone.mp4"), "link to nothing"),
    "link to itself": (lambda path: path.symlink_to(path.name), "file that can't be reached"),
    "link to a pipe": (lambda path: (os.mkfifo(path.parents[1] / "pipe"), path.symlink_to("../pipe")), "pipe"),
}


@pytest.mark.parametrize("case", ODD)
def test_what_is_no_file_is_named_and_never_opened(tmp_path: Path, case: str,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    make, kind = ODD[case]
    touch(tmp_path / "video/good.mp4")
    make(tmp_path / "video/x.mp4")
    assert what_is(tmp_path / "video/x.mp4").startswith(kind)
    assert media_files(tmp_path, "video") == {"good": "video/good.mp4"}
    assert f"video: 1 clip; left out: 1 {kind}".removesuffix(" that can't be reached") in capsys.readouterr().err
    assert find_clips([str(tmp_path / "video")]) == [tmp_path / "video/good.mp4"]
    assert "(x.mp4)" in capsys.readouterr().err
    table(tmp_path / "clips.csv", "path,split,label", "video/x.mp4,labelled,sad")
    with pytest.raises(PipelineError, match=rf"clips\.csv: line 2: video/x\.mp4: a {kind}.* in {tmp_path}; exp"):
        csv_file.read(tmp_path, ["sad"])
    if kind != "folder":
        with pytest.raises(PipelineError, match=rf"video/x\.mp4: a {kind}.*; expected a clip or a folder of clips"):
            find_clips([str(tmp_path / "video/x.mp4")])
    (tmp_path / "video/x.mp4").rename(tmp_path / "video/x.npy")
    if case != "link to itself":
        with pytest.raises(PipelineError, match=rf"video/x\.npy: a {kind}"):
            feature_files(tmp_path / "video")


def test_sound_and_every_usual_container_count_whatever_their_case(tmp_path: Path) -> None:
    names = [f"{i:02d}{extension}" for i, extension in enumerate(sorted(MEDIA))]
    for name in [*names, "upper.FLAC", "upper2.MTS"]:
        touch(tmp_path / "c" / name)
    assert list(media_files(tmp_path, "c").values()) == [f"c/{name}" for name in [*names, "upper.FLAC", "upper2.MTS"]]
    assert {".ts", ".mts", ".m2ts", ".3gp", ".vob"} <= VIDEO and {".wav", ".flac", ".mp3", ".m4a", ".ogg"} <= SOUND


def test_what_is_left_out_is_counted_with_examples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.mp4", "a.wav", "b.wav", "labels.csv", "n.txt", "o.txt", "p.txt", ".DS_Store", "sub/c.flac",
                 "x.mp4/y.mkv"):
        touch(tmp_path / "c" / name)
    (tmp_path / "c/linked").symlink_to(tmp_path / "c/sub")
    assert list(media_files(tmp_path, "c")) == ["a", "b"]
    assert capsys.readouterr().err == (
        f"{tmp_path}/c: 2 clips; left out: 4 files of another kind (labels.csv, n.txt, o.txt ...), 1 file with a "
        f"hidden name (.DS_Store), 2 folders (sub, x.mp4), 1 link to a folder (linked), 1 sound beside a video of its "
        f"name (a.wav)\n")
    assert [str(path.relative_to(tmp_path / "c")) for path in find_clips([str(tmp_path / "c")])] == [
        "a.mp4", "b.wav", "sub/c.flac", "x.mp4/y.mkv"]
    warning = capsys.readouterr().err
    assert ": 4 clips; left out: 4 files of" in warning
    assert ", 1 folder (x.mp4), 1 link to a folder (linked), " in warning
    assert warning.count("\n") == 1


def test_a_folder_of_clips_alone_is_read_without_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.mp4", "b.wav"):
        touch(tmp_path / "c" / name)
    media_files(tmp_path, "c")
    find_clips([str(tmp_path / "c")])
    assert capsys.readouterr().err == ""


def test_a_csv_corpus_says_which_clips_its_table_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.wav", "s/b.wav", "s/c.flac", "readme.txt", "odd.bin"):
        touch(tmp_path / name)
    os.mkfifo(tmp_path / "s/pipe.mp4")
    table(tmp_path / "clips.csv", "path,split,label", "a.wav,labelled,sad", "odd.bin,labelled,sad")
    assert len(csv_file.read(tmp_path, ["sad"])) == 2
    assert capsys.readouterr().err == (f"{tmp_path}: 2 clips; left out: 2 files that clips.csv does not name (s/b.wav, "
                                       f"s/c.flac), 1 pipe (s/pipe.mp4)\n")


def test_two_clips_of_one_name_are_refused_but_for_a_videos_sound(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.wav", "a.flac"):
        touch(tmp_path / "c" / name)
    assert list(media_files(tmp_path, "c").values()) == ["c/a.mp4"]
    touch(tmp_path / "c/a.avi")
    with pytest.raises(PipelineError, match=r"clip name 'a' occurs twice \(c/a.avi and c/a.mp4\)"):
        media_files(tmp_path, "c")
    assert [path.name for path in scan(tmp_path / "c", deep=True).clips] == ["a.avi", "a.mp4"]  # predict takes both


@pytest.mark.parametrize("name", [GBK, os.fsdecode("caf\xe9.wav".encode("latin-1")), os.fsdecode(b"\xff\xfe.mkv"),
                                  os.fsdecode("日本.mov".encode("shift_jis")), os.fsdecode(b"\xed\xa0\x80.mp4"),
                                  "tab\there.mp4", "line\nbreak.mp4"])
def test_names_that_no_table_can_hold_are_one_clear_line(tmp_path: Path, name: str,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    shown = escaped(name)
    assert shown.encode().decode() == shown and "\n" not in shown and "\\" in shown
    touch(tmp_path / "c" / name)
    assert find_clips([str(tmp_path / "c")]) == [tmp_path / "c" / name]  # predict reads it, and escapes its name
    for argument in (str(tmp_path / "c" / name) + ".gone", str(tmp_path / "no" / name)):
        with pytest.raises(PipelineError) as caught:
            find_clips([argument])
        assert escaped(argument) in str(caught.value) and "\n" not in str(caught.value)
    table(tmp_path / "c/clips.csv", "path,split,label", "clips.csv,labelled,sad")
    csv_file.read(tmp_path / "c", ["sad"])
    assert shown in capsys.readouterr().err


def test_predict_gives_such_a_clip_its_row(trained_copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (trained_copy / "clips/c.mp4").rename(trained_copy / "clips" / GBK)
    write_sound(trained_copy / "clips/sound.wav")
    os.mkfifo(trained_copy / "clips/pipe.mp4")
    run_predict("clips", "--out", "out.csv")
    found = rows(Path("out.csv"))
    assert list(found) == ["clips/a.mp4", "clips/b.mkv", "clips/sound.wav", "clips/\\xc4\\xe3\\xba\\xc3.mp4"]
    assert all(row["prediction"] for row in found.values())
    assert found["clips/sound.wav"]["present_clip"] == "false" != found["clips/sound.wav"]["present_hubert"]
    assert "clips: 4 clips; left out: 1 pipe (pipe.mp4)" in capfd.readouterr().err


def test_the_corpus_stage_names_such_a_file_without_a_traceback(tmp_path: Path) -> None:
    root = tmp_path / "corpus"
    for name in ("a", "b"):
        (root / "video-labeled").mkdir(parents=True, exist_ok=True)
        write_small_clip(root / f"video-labeled/{name}.mp4")
    touch(root / "video-unlabeled-with-test2noise" / GBK)
    table(root / "label-disdim.csv", "name,discrete", "a,happy", "b,sad")
    table(root / "candidate_20000.csv", "name")
    assert GBK.removesuffix(".mp4") in [entry.clip_id for entry in mer2024.read(root, ["happy", "sad"])]
    error = Repository(tmp_path, adapter="mer2024", path="corpus", truth=None).run("corpus", code=1)
    assert error.splitlines() == [
        "error: corpus: file name video-unlabeled-with-test2noise/\\xc4\\xe3\\xba\\xc3.mp4 is not UTF-8, or holds "
        "control characters; rename it (convmv does, for files unpacked in another encoding)"]


@pytest.mark.parametrize(("path", "hint"), [("~/corpus", "~ is no folder here: write the whole path"),
                                            ("corpus/clips.csv", "that is a file: name the folder that it is in"),
                                            ("nowhere", "put or link it there, or change corpus.path")])
def test_a_path_that_is_no_folder_is_explained(tmp_path: Path, path: str, hint: str) -> None:
    touch(tmp_path / "corpus/clips.csv")
    (tmp_path / "models").mkdir()
    error = Repository(tmp_path, adapter="csv", path=path, truth=None).run("plan", code=1)
    assert f"corpus.path: found no folder {path}" in error and hint in error and len(error.splitlines()) == 1


@pytest.mark.skipif(os.geteuid() == 0 or sys.platform != "linux", reason="root may read every folder")
def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    touch(tmp_path / "c/a.mp4")
    touch(tmp_path / "c/locked/b.mp4")
    (tmp_path / "c/locked").chmod(0)
    assert len(find_clips([str(tmp_path / "c")])) == 1
    assert "1 folder that can't be read (locked)" in capsys.readouterr().err
