"""Clips that are segments of longer files, as IEMOCAP and MOSEI have them."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_corpus import ROOT, Repository, table
from test_folders import write_sound

from stages.corpora import csv_file
from stages.engine.errors import PipelineError
from stages.engine.manifest import Clip, read_manifest, write_manifest
from stages.engine.store import Store
from stages.media.audio import load_audio

HEADER = "path,split,label,start,end"

REFUSED = {
    "an end before its start": ("d.wav,labelled,joy,2.5,1.5", "found start '2.5' and end '1.5', expected an end after"),
    "no length": ("d.wav,labelled,joy,2,2.0", "found start '2' and end '2.0', expected an end after"),
    "an end at the start of the file": ("d.wav,labelled,joy,,0", "found start '' and end '0', expected an end after"),
    "before the file": ("d.wav,labelled,joy,-1,2", "found start '-1', expected seconds from the file's start"),
    "minutes": ("d.wav,labelled,joy,0:00:01,0:00:02", "found start '0:00:01', expected seconds"),
    "a decimal comma": ('d.wav,labelled,joy,"1,5","2,5"', "found start '1,5', expected seconds"),
    "no number": ("d.wav,labelled,joy,1,nan", "found end 'nan', expected seconds"),
    "the same segment twice": ("d.wav,labelled,joy,0,1", "clip name 'd_0-1' occurs twice, first in line 2"),
    "endless": ("d.wav,labelled,joy,1,inf", "found end 'inf', expected seconds"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_segment_that_is_none_is_refused_with_its_line(tmp_path: Path, case: str) -> None:
    row, fault = REFUSED[case]
    (tmp_path / "d.wav").touch()
    table(tmp_path / "clips.csv", HEADER, "d.wav,labelled,joy,0,1", row)
    with pytest.raises(PipelineError) as caught:
        csv_file.read(tmp_path, ["joy"])
    assert str(caught.value).startswith(f"{tmp_path}/clips.csv: line 3: d.wav: {fault}")


def test_several_clips_of_one_file_have_names_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "d.wav").touch()
    table(tmp_path / "clips.csv", HEADER + ",name", "d.wav,labelled,joy,0,1.50,", "d.wav,labelled,joy,1.50,,",
          "d.wav,labelled,joy,,0.5,", "d.wav,test,joy,,,", "d.wav,test,joy,3,4,Ses01F_impro01_F000")
    assert [(entry.clip_id, entry.start, entry.end) for entry in csv_file.read(tmp_path, ["joy"])] == [
        ("d_0-1.50", 0, 1.5), ("d_1.50-end", 1.5, None), ("d_0-0.5", None, 0.5), ("d", None, None),
        ("Ses01F_impro01_F000", 3, 4)]


def test_the_manifest_of_a_corpus_of_segments(tmp_path: Path) -> None:
    write_sound(tmp_path / "corpus/d.wav", seconds=4.0)
    write_sound(tmp_path / "corpus/e.wav", seconds=2.0, pitch=500)
    table(tmp_path / "corpus/clips.csv", HEADER, "d.wav,labelled,joy,0.0,1.5", "d.wav,labelled,fear,1.5,",
          "d.wav,test,joy,3.5,9", "e.wav,labelled,fear,,", "e.wav,test,joy,0,0.5")
    repository = Repository(tmp_path, adapter="csv", path="corpus", truth=None, labels=["joy", "fear"])
    said = repository.run("corpus")
    assert "warning: corpus: 1 segments reach beyond the end of their files: 'd_3.5-9'" in said
    clips = {clip.clip_id: clip for clip in read_manifest(tmp_path / "data/manifest.csv")}
    assert {name: (c.path, c.start, c.end, c.duration) for name, c in clips.items()} == {
        "d_0.0-1.5": ("d.wav", 0.0, 1.5, 1.5), "d_1.5-end": ("d.wav", 1.5, None, 2.5),
        "d_3.5-9": ("d.wav", 3.5, 9, 0.5), "e": ("e.wav", None, None, 2.0), "e_0-0.5": ("e.wav", 0.0, 0.5, 0.5)}
    assert len({clip.digest for clip in clips.values()}) == 5
    whole = hashlib.sha256((tmp_path / "corpus/d.wav").read_bytes()).hexdigest()
    assert clips["d_0.0-1.5"].digest == hashlib.sha256(f"{whole} 0.0 1.5".encode()).hexdigest()
    assert clips["e"].digest == hashlib.sha256((tmp_path / "corpus/e.wav").read_bytes()).hexdigest()
    assert clips["d_0.0-1.5"].bytes == (tmp_path / "corpus/d.wav").stat().st_size


def test_the_media_stages_store_each_segments_own_sound(tmp_path: Path) -> None:
    write_sound(tmp_path / "corpus/d.wav", seconds=4.0, rate=24000)
    table(tmp_path / "corpus/clips.csv", HEADER, "d.wav,labelled,joy,0.5,1.5", "d.wav,labelled,fear,3.25,")
    repository = Repository(tmp_path, adapter="csv", path="corpus", truth=None, labels=["joy", "fear"])
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    (tmp_path / "stages").symlink_to(ROOT / "stages")
    repository.run("corpus")
    repository.run("extract_audio")
    store = Store(tmp_path / "data/audio")
    whole, _ = load_audio(tmp_path / "corpus/d.wav", 24000)
    assert store.clip_ids == ["d_0.5-1.5", "d_3.25-end"] and not any(store.reasons)
    np.testing.assert_array_equal(store.read("d_0.5-1.5"), whole[12000:36000])
    np.testing.assert_array_equal(store.read("d_3.25-end"), whole[78000:])


def test_a_manifest_without_segments_has_no_columns_for_them(tmp_path: Path) -> None:
    whole = Clip("a", "a.wav", "test", "", "", "", 1.0, 1, "00")
    write_manifest([whole], tmp_path / "manifest.csv")
    assert (tmp_path / "manifest.csv").read_text().splitlines()[0].endswith(",bytes,digest")
    assert read_manifest(tmp_path / "manifest.csv") == [whole]
    part = Clip("b", "a.wav", "test", "", "", "", 1.0, 1, "00", 0.25, None)
    write_manifest([whole, part], tmp_path / "manifest.csv")
    assert read_manifest(tmp_path / "manifest.csv") == [whole, part]
