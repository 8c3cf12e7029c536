"""The corpus adapters on small folders in the official layouts, and the errors that participants meet."""

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from media_files import remux, write_small_clip
from ruamel.yaml import YAML

from stages.corpora import csv_file, mer2023, mer2024, mer2025
from stages.corpora.labels import known_label
from stages.corpora.layout import Entry
from stages.corpus import ADAPTERS
from stages.engine.errors import PipelineError
from stages.engine.manifest import read_manifest
from stages.engine.yaml_file import read_yaml

ROOT = Path(__file__).parent.parent
LABELS = ["neutral", "anger", "happiness", "sadness", "worry", "surprise"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_small_clip(path)
    return path


def table(path: Path, *lines: str) -> None:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def place(clip: Path, *paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(clip, path)


def make_mer2024(root: Path, clip: Path) -> None:
    place(clip, root / "video-labeled/a.mp4", root / "video-labeled/b.AVI", root / "video-labeled/名字 with.dots.mkv")
    place(clip, *(root / f"video-unlabeled-with-test2noise/{name}.mp4" for name in ("u1", "u2", "t1")))
    table(root / "label-disdim.csv", "name,discrete,valence", "a,happy,3", "b,worried,-2", "名字 with.dots,neutral,0")
    table(root / "label-transcription.csv", "name,chinese,english", 'a,"你好，世界",hello', "u2,再见,bye")
    table(root / "candidate_20000.csv", "name", "t1")


def make_mer2023(root: Path, clip: Path) -> None:
    place(clip, *(root / f"{folder}/{folder}_clip.mov" for folder in ("train", "test1", "test2", "test3")))
    table(root / "train-label.csv", "name,discrete,valence", "train_clip,angry,-3")


def make_mer2025(root: Path, clip: Path) -> None:
    place(clip, *(root / f"video/{name}.webm" for name in "abc"))
    table(root / "track1_train_disdim.csv", "name,discrete,valence", "a,sad,-3")
    table(root / "track_all_candidates.csv", "name", "a", "b")
    table(root / "subtitle_chieng.csv", "name,chinese,english", "b,啊,ah")


def make_csv(root: Path, clip: Path) -> None:
    place(clip, root / "x.mp4", root / "y.mp4")
    table(root / "clips.csv", "path,split,label", "x.mp4,labelled,happy", "y.mp4,unlabelled,")


MAKE = {"mer2024": make_mer2024, "mer2023": make_mer2023, "mer2025": make_mer2025, "csv": make_csv}


def by_name(entries: list[Entry]) -> dict[str, Entry]:
    return {entry.clip_id: entry for entry in entries}


def test_mer2024(tmp_path: Path, clip: Path) -> None:
    make_mer2024(tmp_path, clip)
    found = by_name(mer2024.read(tmp_path, LABELS))
    assert found["a"] == Entry("a", "video-labeled/a.mp4", "labelled", "happiness", "你好，世界")
    assert found["b"].path == "video-labeled/b.AVI" and found["b"].label == "worry"
    assert found["名字 with.dots"].split == "labelled"
    assert {name: entry.split for name, entry in found.items() if not entry.label} == {
        "u1": "unlabelled", "u2": "unlabelled", "t1": "test"}
    assert found["u2"].transcript == "再见" and found["u1"].transcript == ""


def test_mer2023(tmp_path: Path, clip: Path) -> None:
    make_mer2023(tmp_path, clip)
    found = by_name(mer2023.read(tmp_path, LABELS))
    assert {name: entry.split for name, entry in found.items()} == {
        "train_clip": "labelled", "test1_clip": "test", "test2_clip": "test", "test3_clip": "unlabelled"}
    assert found["train_clip"].label == "anger"


def test_mer2025(tmp_path: Path, clip: Path) -> None:
    make_mer2025(tmp_path, clip)
    found = by_name(mer2025.read(tmp_path, LABELS))
    assert {name: entry.split for name, entry in found.items()} == {"a": "labelled", "b": "test", "c": "unlabelled"}
    assert found["a"].label == "sadness" and found["b"].transcript == "啊"


def test_csv_with_its_own_labels(tmp_path: Path, clip: Path) -> None:
    place(clip, tmp_path / "s1/u 1.mp4", tmp_path / "s2/u 1.mp4", tmp_path / "x.mp4")
    table(tmp_path / "clips.csv", "path,split,label,name,group,transcript", "s1/u 1.mp4,labelled,joy,s1u1,s1,hi",
          "s2/u 1.mp4,test,fear,s2u1,s2,", "x.mp4,unlabelled,,,,")
    found = by_name(csv_file.read(tmp_path, ["joy", "fear"]))
    assert found["s1u1"] == Entry("s1u1", "s1/u 1.mp4", "labelled", "joy", "hi", "s1")
    assert found["s2u1"].label == "fear" and found["x"].split == "unlabelled"


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda r: shutil.rmtree(r / "video-labeled"), ["video-labeled: no such folder"]),
        (lambda r: [p.unlink() for p in (r / "video-labeled").iterdir()], ["video-labeled: no video files", ".mp4"]),
        (lambda r: (r / "candidate_20000.csv").unlink(), ["candidate_20000.csv: not found", "['name']"]),
        (lambda r: table(r / "label-disdim.csv", "id,emotion", "a,happy"),
         ["label-disdim.csv: found columns ['id', 'emotion']", "expected ['name', 'discrete']"]),
        (lambda r: table(r / "label-disdim.csv", "name,discrete", "a,happy", "b,glad", "名字 with.dots,sad"),
         ["label-disdim.csv: b", "'glad'", "'happiness'"]),
        (lambda r: table(r / "label-disdim.csv", "name,discrete", "a,happy", "a,sad"), ["line 3", "'a' occurs twice"]),
        (lambda r: table(r / "label-disdim.csv", "name,discrete", "a,happy"), ["2 clips without a row", "'b'"]),
        (lambda r: (r / "video-labeled/a.mp4").unlink(), ["1 names without a clip", "'a'"]),
        (lambda r: shutil.copy(r / "video-labeled/a.mp4", r / "video-labeled/a.mkv"),
         ["'a' occurs twice", "a.mkv", "a.mp4"]),
        (lambda r: (r / "label-disdim.csv").write_bytes("name,discrete\n名,happy\n".encode("gbk")), ["not UTF-8"]),
    ],
)
def test_faults_of_a_mer_folder_are_one_line(tmp_path: Path, clip: Path, damage, expected: list[str]) -> None:
    make_mer2024(tmp_path, clip)
    damage(tmp_path)
    with pytest.raises(PipelineError) as caught:
        mer2024.read(tmp_path, LABELS)
    for part in expected:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("../secret.mp4,labelled,joy", "leaves the corpus folder"),
        ("/etc/passwd,labelled,joy", "leaves the corpus folder"),
        ("x.mp4,train,joy", "found split 'train', expected one of ['labelled', 'unlabelled', 'test']"),
        ("x.mp4,labelled,", "a labelled clip without a label"),
        ("y.mp4,labelled,joy", "no such file"),
        ("x.mp4,labelled,joy\nsub/x.mp4,test,joy", "line 3: sub/x.mp4: clip name 'x' occurs twice, first in line 2"),
    ],
)
def test_faults_of_a_csv_corpus_name_the_row(tmp_path: Path, clip: Path, row: str, expected: str) -> None:
    place(clip, tmp_path / "corpus/x.mp4", tmp_path / "corpus/sub/x.mp4", tmp_path / "secret.mp4")
    table(tmp_path / "corpus/clips.csv", "path,split,label", row)
    with pytest.raises(PipelineError) as caught:
        csv_file.read(tmp_path / "corpus", ["joy"])
    assert expected in str(caught.value) and row.split(",")[0] in str(caught.value)


@pytest.mark.parametrize(
    ("adapter", "damage", "expected"),
    [
        ("mer2023", lambda r: shutil.rmtree(r / "test2"), ["test2: no such folder"]),
        ("mer2023", lambda r: (r / "train-label.csv").unlink(), ["train-label.csv: not found", "'discrete'"]),
        ("mer2023", lambda r: table(r / "train-label.csv", "file,emotion", "train_clip,happy"),
         ["found columns ['file', 'emotion'], expected ['name', 'discrete']"]),
        ("mer2023", lambda r: shutil.copy(r / "train/train_clip.mov", r / "train/other.mov"),
         ["1 clips without a row", "'other'"]),
        ("mer2023", lambda r: table(r / "train-label.csv", "name,discrete", "train_clip,sad", "gone,sad"),
         ["1 names without a clip", "'gone'"]),
        ("mer2025", lambda r: shutil.rmtree(r / "video"), ["video: no such folder"]),
        ("mer2025", lambda r: table(r / "track1_train_disdim.csv", "name,discrete", "a,sad", "z,sad"),
         ["track1_train_disdim.csv: 1 names without a clip", "'z'"]),
        ("mer2025", lambda r: table(r / "track_all_candidates.csv", "name", "b", "z"),
         ["track_all_candidates.csv: 1 names without a clip", "'z'"]),
        ("mer2025", lambda r: table(r / "track_all_candidates.csv", "names", "b"), ["found columns ['names']"]),
        ("mer2025", lambda r: table(r / "subtitle_chieng.csv", "name,text", "b,x"), ["expected ['name', 'chinese']"]),
        ("csv", lambda r: (r / "clips.csv").unlink(), ["clips.csv: not found", "'path', 'split', 'label'"]),
        ("csv", lambda r: table(r / "clips.csv", "file,label", "x.mp4,happy"), ["found columns ['file', 'label']"]),
        ("csv", lambda r: table(r / "clips.csv", "path;split;label", "x.mp4;labelled;sad"),
         ["found columns ['path;split;label']"]),
        ("csv", lambda r: table(r / "clips.csv", "split,label,path", "labelled,happy,"), ["line 2", "no path"]),
        ("csv", lambda r: table(r / "clips.csv", "path,split,label", "x" * 200_000),
         ["after line 1", "expected a CSV"]),
        ("csv", lambda r: table(r / "clips.csv", "path,split,label", "x" * 5000 + ",labelled,sad"), ["no such file"]),
        ("csv", lambda r: table(r / "clips.csv", "path,split,label,name", "x.mp4,labelled,sad,../x"),
         ["found name '../x', expected one without a slash"]),
    ],
)
def test_faults_of_the_other_layouts_are_one_line(
    tmp_path: Path, clip: Path, adapter: str, damage, expected: list[str]
) -> None:
    MAKE[adapter](tmp_path, clip)
    damage(tmp_path)
    with pytest.raises(PipelineError) as caught:
        ADAPTERS[adapter](tmp_path, LABELS)
    for part in expected:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("adapter", MAKE)
@pytest.mark.parametrize("lies_in", ["", "video-labeled"])
def test_a_wrong_folder_is_named(tmp_path: Path, clip: Path, adapter: str, lies_in: str) -> None:
    """The folder above the corpus, or one within another corpus."""
    MAKE[adapter](tmp_path / "corpus", clip)
    place(clip, tmp_path / "video-labeled/a.mp4")
    wrong = tmp_path / lies_in
    with pytest.raises(PipelineError) as caught:
        ADAPTERS[adapter](wrong, LABELS)
    assert str(wrong) in str(caught.value) and "expected" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("label", "expected"),
    [("angry", "anger"), ("happy", "happiness"), ("sad", "sadness"), ("worried", "worry"), ("Neutral", "neutral"),
     ("SURPRISE", "surprise"), ("Happy", "happiness"), ("anger", "anger")],
)
def test_label_spellings(label: str, expected: str) -> None:
    assert known_label(label, LABELS, "x") == expected


def test_a_label_set_of_ones_own_wins_over_the_spellings() -> None:
    assert known_label("happy", ["happy", "sad"], "x") == "happy"
    assert known_label("sad", ["Sad", "Happy"], "x") == "Sad"
    with pytest.raises(PipelineError, match="x: found label 'joy', expected one of corpus.labels"):
        known_label("joy", ["happy", "sad"], "x")


def test_a_csv_corpus_can_not_leave_its_folder_through_a_link(tmp_path: Path, clip: Path) -> None:
    root = tmp_path / "corpus"
    place(clip, root / "x.mp4", tmp_path / "outside/secret.mp4")
    (root / "file.mp4").symlink_to(tmp_path / "outside/secret.mp4")
    (root / "folder").symlink_to(tmp_path / "outside")
    (root / "inside.mp4").symlink_to(root / "x.mp4")
    for path in ("file.mp4", "folder/secret.mp4"):
        table(root / "clips.csv", "path,split,label", f"{path},labelled,sad")
        with pytest.raises(PipelineError, match=f"{path}: a link that leaves the corpus folder"):
            csv_file.read(root, LABELS)
    table(root / "clips.csv", "path,split,label", "inside.mp4,labelled,sad")
    (tmp_path / "link").symlink_to(root)  # corpus.path itself may be a link
    assert [entry.clip_id for entry in csv_file.read(tmp_path / "link", LABELS)] == ["inside"]


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret"])
def test_names_in_a_mer_csv_are_names_not_paths(tmp_path: Path, clip: Path, name: str) -> None:
    make_mer2024(tmp_path / "corpus", clip)
    place(clip, tmp_path / "secret.mp4")
    table(tmp_path / "corpus/candidate_20000.csv", "name", name)
    with pytest.raises(PipelineError, match="1 names without a clip"):
        mer2024.read(tmp_path / "corpus", LABELS)


class Repository:
    """A working directory with params.yaml in which stages run as processes."""

    def __init__(self, folder: Path, **corpus: object):
        self.folder = folder
        values = read_yaml(ROOT / "params.yaml")
        values["corpus"] |= corpus
        YAML().dump(values, folder / "params.yaml")
        (folder / "data").mkdir(exist_ok=True)

    def run(self, stage: str, code: int = 0) -> str:
        done = subprocess.run([sys.executable, "-m", f"stages.{stage}"], cwd=self.folder, text=True,
                              capture_output=True, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"})
        assert done.returncode == code, done.stderr
        return done.stderr

    def rows(self, name: str) -> list[list[str]]:
        with open(self.folder / name, encoding="utf-8", newline="") as file:
            return list(csv.reader(file))[1:]


def test_the_corpus_stage_keeps_the_truth_out_of_the_manifest(tmp_path: Path, clip: Path) -> None:
    root = tmp_path / "corpus"
    place(clip, *(root / f"{name}.mp4" for name in ("z", "a", "t", "u")))
    (root / "u.mp4").write_bytes(b"no video at all")
    table(root / "clips.csv", "path,split,label", "z.mp4,labelled,joy", "a.mp4,labelled,fear", "t.mp4,test,joy",
          "u.mp4,unlabelled,fear")
    repository = Repository(tmp_path, adapter="csv", path="corpus", truth=None, labels=["joy", "fear"])
    repository.run("corpus")
    clips = read_manifest(tmp_path / "data/manifest.csv")
    assert [(c.clip_id, c.split, c.label) for c in clips] == [
        ("a", "labelled", "fear"), ("z", "labelled", "joy"), ("t", "test", ""), ("u", "unlabelled", "")]
    assert repository.rows("data/truth.csv") == [["t", "joy"], ["u", "fear"]]
    assert clips[3].duration is None and clips[3].bytes == 15
    assert clips[0].duration == pytest.approx(1.0, abs=0.2)
    assert clips[0].digest == clips[2].digest != clips[3].digest


def test_a_truth_that_dvc_would_not_watch_is_refused(tmp_path: Path, clip: Path) -> None:
    root = tmp_path / "corpus"
    make_mer2024(root, clip)
    truth = "name,discrete\n" + "".join(f"{path.stem},happy\n" for path in root.glob("video-unl*/*"))
    for place_ in ("truth.csv", "data/truth.csv", "corpus/../truth.csv"):
        (tmp_path / place_).parent.mkdir(exist_ok=True)
        (tmp_path / place_).write_text(truth)
        error = Repository(tmp_path, adapter="mer2024", path="corpus", truth=place_).run("corpus", code=1)
        assert f"corpus.truth: {place_} lies where DVC would not notice" in error and len(error.splitlines()) == 1
    for place_ in ("data/truth/truth.csv", "corpus/truth.csv"):
        (tmp_path / place_).parent.mkdir(exist_ok=True)
        (tmp_path / place_).write_text(truth)
        repository = Repository(tmp_path, adapter="mer2024", path="corpus", truth=place_)
        repository.run("corpus")
        assert repository.rows("data/truth.csv")


def test_the_corpus_stage_in_one_line_when_there_is_no_corpus(tmp_path: Path) -> None:
    error = Repository(tmp_path, adapter="mer2024", path="nowhere", truth=None).run("corpus", code=1)
    assert error.strip() == "error: corpus.path: found no folder nowhere, expected the mer2024 corpus there"


def test_one_name_in_two_folders_is_refused(tmp_path: Path, clip: Path) -> None:
    root = tmp_path / "corpus"
    make_mer2024(root, clip)
    place(clip, root / "video-unlabeled-with-test2noise/a.mp4")
    error = Repository(tmp_path, adapter="mer2024", path="corpus", truth=None).run("corpus", code=1)
    assert "clip name 'a' occurs twice" in error and len(error.splitlines()) == 1


def test_containers_and_names_of_every_kind_are_read(tmp_path: Path, clip: Path) -> None:
    """Real avi, mkv, webm and mov files, upper-case extensions, names with spaces, Chinese characters and dots."""
    root, others = tmp_path / "corpus", "video-unlabeled-with-test2noise"
    names = ["a b.MP4", "名字.AVI", "with.dots.v2.mkv", "l'été (1).WebM", "#5%20&.mov", "-f.Mkv", "a:b.mov"]
    for name in names:
        remux(clip, root / "video-labeled" / name)
    place(clip, root / others / "u.mp4")
    stems = [Path(name).stem for name in names]
    table(root / "label-disdim.csv", "name,discrete", *(f"{stem},happy" for stem in stems))
    table(root / "candidate_20000.csv", "name", "u")
    Repository(tmp_path, adapter="mer2024", path="corpus", truth=None).run("corpus")
    clips = {clip.clip_id: clip for clip in read_manifest(tmp_path / "data/manifest.csv")}
    assert set(clips) == {*stems, "u"}
    for stem, name in zip(stems, names, strict=True):
        assert clips[stem].path == f"video-labeled/{name}"
        assert clips[stem].duration == pytest.approx(1.0, abs=0.2), name
