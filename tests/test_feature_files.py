"""Features and face crops that come and go as MERTools' files."""

import csv
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from test_folders import write_sound
from test_pipeline import new_repository

from stages.commands import compare_features, export_features, import_faces
from stages.commands.import_faces import crops_row
from stages.commands.npy import feature_files, read_array, write_features
from stages.encoders.pooling import pooled_row
from stages.engine.errors import PipelineError, Skip
from stages.engine.store import Row, Store, write_index, write_shard

CLIPS = {"a b": (3, 4), "名字": (1, 4), "Ses01.001": (7, 4)}  # frames, features


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in CLIPS.items()}


def make_store(name: str, keep_frames: bool = True, folds: int = 1, absent: str = "none") -> None:
    rows = [pooled_row(clip, np.tile(array, (1, folds)), keep_frames, True) for clip, array in arrays().items()]
    rows.append(Row(absent, reason="no sound"))
    write_shard(Path(f"features/{name}/shard-00000.h5"), "features", rows, {
        "extractor": name, "encoder": "hubert", "dimension": 4, "folds": folds, "variance": True, "leaky": False,
        "fingerprint": "f"})
    write_index(Path("features") / name, ["shard-00000.h5"])


# ---------------------------------------------------------------- export


def test_exported_features_are_mertools_files_and_come_back_as_they_were(capsys: pytest.CaptureFixture[str]) -> None:
    make_store("hubert")
    export_features.main(["hubert", "out/hubert-UTT"])
    assert "4 clips of hubert in out/hubert-UTT; 1 without features hold zeros" in capsys.readouterr().out
    files = feature_files(Path("out/hubert-UTT"))
    assert set(files) == {*CLIPS, "none"} and sorted(os.listdir("out")) == ["hubert-UTT"]
    for clip, array in arrays().items():
        exported = read_array(files[clip])
        assert exported.dtype == np.float32 and exported.shape == (4,)
        np.testing.assert_allclose(exported, array.mean(axis=0), rtol=1e-6)
    assert read_array(files["none"]).tolist() == [0, 0, 0, 0]
    names = Store("features/hubert").clip_ids
    assert write_features(Path("back"), "hubert", names, files) == ["none"]
    np.testing.assert_array_equal(Store("back").mean, Store("features/hubert").mean)


def test_sequences_are_exported_where_they_were_kept() -> None:
    make_store("hubert")
    export_features.main(["hubert", "frames", "--frames"])
    for clip, array in arrays().items():
        np.testing.assert_array_equal(np.load(f"frames/{clip}.npy"), array)
    assert np.load("frames/none.npy").shape == (1, 4)
    make_store("pooled", keep_frames=False)
    with pytest.raises(PipelineError, match="frames were not kept; set keep_frames: true"):
        export_features.main(["pooled", "out", "--frames"])
    assert not Path("out").exists() and len(list(Path().glob(".out*"))) == 0


def test_features_per_fold_have_a_folder_each() -> None:
    make_store("emovclip", folds=2)
    export_features.main(["emovclip", "out"])
    assert sorted(path.name for path in Path("out").iterdir()) == ["fold-0", "fold-1"]
    assert np.load("out/fold-1/a b.npy").shape == (4,)
    with pytest.raises(PipelineError, match="--frames: features/emovclip has 2 sets of features"):
        export_features.main(["emovclip", "out2", "--frames"])


@pytest.mark.parametrize(("arguments", "fault"), [
    (["nothing", "out"], "features/nothing: not found; expected one of hubert"),
    (["hubert", "full"], "full: is not an empty folder"),
    (["hubert", "full/file.txt"], "full/file.txt: is not an empty folder"),
    (["../features/hubert/..", "full"], "not found|not an empty folder"),
    (["hubert", "features"], "features: is not an empty folder"),
])
def test_export_refuses_what_it_can_not_do(arguments: list[str], fault: str) -> None:
    make_store("hubert")
    Path("full").mkdir()
    Path("full/file.txt").touch()
    with pytest.raises(PipelineError, match=fault):
        export_features.main(arguments)
    assert os.listdir("full") == ["file.txt"]


# ---------------------------------------------------------------- compare


def save(folder: str, features: dict[str, np.ndarray]) -> str:
    Path(folder).mkdir()
    for clip, array in features.items():
        np.save(f"{folder}/{clip}.npy", array)
    return folder


def test_the_cosine_of_every_clip_and_its_quantiles(capsys: pytest.CaptureFixture[str]) -> None:
    make_store("hubert")
    theirs = {clip: array.mean(axis=0) for clip, array in arrays().items()}
    theirs["a b"] = theirs["a b"] * 3.0                                 # the same direction
    theirs["名字"] = -theirs["名字"]
    theirs["none"], theirs["more"], theirs["zeros"] = np.ones(4), np.ones(4), np.zeros(4)
    compare_features.main(["features/hubert", save("theirs", theirs)])
    out, err = capsys.readouterr()
    rows = list(csv.reader(out.splitlines()))
    assert rows[0] == ["clip", "cosine"] and rows[1] == ["名字", "-1.000000"]
    assert sorted(rows[2:]) == [["Ses01.001", "1.000000"], ["a b", "1.000000"]]
    assert "2 clips have features in theirs alone: 'more', 'none'" in err
    assert "cosine of 3 clips, quantiles: 0 %: -1.000000" in err and "100 %: 1.000000" in err


def test_sequences_are_compared_by_their_means_whatever_their_type(capsys: pytest.CaptureFixture[str]) -> None:
    a = save("a", arrays())
    b = save("b", {clip: array.mean(axis=0).astype(np.float16) for clip, array in arrays().items()})
    compare_features.main([a, b])
    cosines = [float(row["cosine"]) for row in csv.DictReader(capsys.readouterr().out.splitlines())]
    assert len(cosines) == 3 and min(cosines) > 0.9999


COMPARED: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "another dimension": ({"a b": np.ones(5)}, "a b: 4 features in features/hubert, 5 in theirs"),
    "other names": ({"x": np.ones(4)}, "no clip has features in both"),
    "only zeros": ({"a b": np.zeros(4)}, "no clip has features in both"),
    "three axes": ({"a b": np.ones((1, 2, 4))}, r"theirs/a b\.npy: found shape \(1, 2, 4\)"),
    "NaN": ({"a b": np.full(4, np.nan)}, r"theirs/a b\.npy: holds NaN"),
    "nothing": ({}, r"theirs: no \.npy files"),
    "text": ({"a b": np.array(["x"])}, r"theirs/a b\.npy: holds <U1, expected numbers"),
}


@pytest.mark.parametrize("case", COMPARED)
def test_what_can_not_be_compared_is_one_line(case: str) -> None:
    features, fault = COMPARED[case]
    make_store("hubert")
    with pytest.raises(PipelineError, match=fault) as caught:
        compare_features.main(["features/hubert", save("theirs", features)])
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- face crops


def crops(frames: int, side: int = 112) -> np.ndarray:
    """Blue faces in OpenCV's order of colours, brighter from frame to frame."""
    array = np.zeros((frames, side, side, 3), np.uint8)
    array[..., 0] = 100 + 10 * np.arange(frames)[:, None, None]
    return array


def test_crops_are_taken_every_stride_th_in_their_own_colours() -> None:
    np.save("a.npy", crops(7))
    row = crops_row("a", "a.npy", stride=3, size=64, quality=95)
    assert row.items["frame"] == [0, 3, 6] and row.items["confidence"] == [1.0] * 3
    images = [cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR) for image in row.values]
    assert {image.shape for image in images} == {(64, 64, 3)}
    assert [round(image[..., 0].mean() / 10) for image in images] == [10, 13, 16]  # still blue
    assert all(image[..., 2].mean() < 10 for image in images)


def test_black_crops_are_what_openface_did_not_find() -> None:
    array = crops(4)
    array[1:3] = 0
    np.save("a.npy", array)
    assert crops_row("a", "a.npy", 1, 128, 95).items["frame"] == [0, 3]


NO_CROPS: dict[str, tuple[Any, str]] = {
    "nothing found": (np.zeros((0,)), "is empty: no face was found"),
    "black": (np.zeros((3, 8, 8, 3), np.uint8), "no face in 3 frames"),
    "floats": (np.ones((3, 8, 8, 3), np.float32), r"holds float32 \(3, 8, 8, 3\), expected uint8"),
    "grey": (np.ones((3, 8, 8), np.uint8), r"holds uint8 \(3, 8, 8\), expected uint8 \(frames, height, width, 3\)"),
    "one image": (np.ones((8, 8, 3), np.uint8), r"holds uint8 \(8, 8, 3\)"),
    "four channels": (np.ones((3, 8, 8, 4), np.uint8), r"holds uint8 \(3, 8, 8, 4\)"),
    "a pickle": (np.array([{}, None]), "is no .npy array"),
}


@pytest.mark.parametrize("case", NO_CROPS)
def test_a_file_without_crops_costs_its_clip_alone(case: str) -> None:
    array, reason = NO_CROPS[case]
    np.save("a.npy", array, allow_pickle=True)
    with pytest.raises(Skip, match=reason):
        crops_row("a", "a.npy", 1, 128, 95)
    Path("b.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(Skip, match="is no .npy array"):
        crops_row("b", "b.npy", 1, 128, 95)
    with pytest.raises(Skip, match="no file of face crops"):
        crops_row("c", "", 1, 128, 95)


ODD_PLACES: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "as MERTools": (lambda path: np.save(path, crops(1)), "a/a.npy"),
    "flat": (lambda path: np.save(path.parents[1] / "a.npy", crops(1)), "a.npy"),
    "nowhere": (lambda path: None, None),
    "a dead link": (lambda path: path.symlink_to("gone"), "link to nothing"),
    "a pipe": (os.mkfifo, "pipe"),
    "a folder": (Path.mkdir, "folder"),
}


@pytest.mark.parametrize("case", ODD_PLACES)
def test_where_a_clips_crops_may_lie(case: str) -> None:
    make, expected = ODD_PLACES[case]
    Path("faces/a").mkdir(parents=True)
    make(Path("faces/a/a.npy"))
    if case in ("a dead link", "a pipe", "a folder"):
        with pytest.raises(PipelineError, match=rf"faces/a/a\.npy: a {expected}, expected a file"):
            import_faces.crop_file(Path("faces"), "a")
    else:
        assert import_faces.crop_file(Path("faces"), "a") == (Path("faces") / expected if expected else None)


def test_imported_crops_stand_in_for_the_stage(tmp_path: Path) -> None:
    repository = new_repository(tmp_path / "repository")
    for name in "abcd":
        write_sound(repository.folder / f"mine/{name}.wav", pitch=200 + 50 * ord(name))
    (repository.folder / "mine/clips.csv").write_text("path,split,label\n" + "".join(
        f"{name}.wav,labelled,{'joy' if name in 'ab' else 'fear'}\n" for name in "abcd"))
    for key, value in {"adapter": "csv", "path": "mine", "truth": None, "labels": ["joy", "fear"],
                       "max_bad_fraction": 0.5}.items():
        repository.set(f"corpus.{key}", value)
    repository.set("faces.stride", 2)
    repository.set("fusion.modalities", ["clip"])  # crops are needed; the checkpoint is not, until it is loaded
    repository.set("extractors.clip.checkpoint", "models/mini")
    (repository.folder / "models/mini").mkdir()
    for name in ("open_clip_config.json", "open_clip_model.safetensors"):
        (repository.folder / "models/mini" / name).write_text("{}")
    repository.run("dvc", "repro", "corpus")
    command = ("python", "-m", "stages.commands.main", "import-faces", "crops")
    assert "crops: no such folder" in repository.run(*command, expect=1)
    (repository.folder / "crops/other").mkdir(parents=True)
    assert "has crops of none of the 4 clips" in repository.run(*command, expect=1)
    for name in "abc":
        (repository.folder / f"crops/{name}").mkdir()
        np.save(repository.folder / f"crops/{name}/{name}.npy", crops(5))
    assert "Now: dvc repro" in repository.run(*command)
    store = Store(repository.folder / "data/faces")
    assert store.clip_ids == list("abcd") and store.present.tolist() == [True, True, True, False]
    assert store.read_items("b", "frame").tolist() == [0, 2, 4] and store.reasons[3] == "no file of face crops"
    assert "crop_faces" not in repository.stages_run(repository.run("dvc", "repro", "crop_faces"))
    shutil.rmtree(repository.folder / "data/faces")
    repository.run("dvc", "checkout", "crop_faces")
    assert Store(repository.folder / "data/faces").digest == store.digest
