"""Feature files of one's own: into a folder by the command, to a WAF by DVC, and the errors on the way."""

import csv
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_pipeline import Repository, new_repository

from stages.commands import import_features as importing
from stages.commands.import_features import STAGES, Request, import_features, make_pipeline
from stages.commands.npy import NOTHING
from stages.engine.errors import PipelineError
from stages.engine.manifest import read_manifest
from stages.engine.params import load_fusion
from stages.engine.store import Store
from stages.engine.yaml_file import read_yaml

ROOT = Path(__file__).parent.parent
CLASSES = ["angry", "happy", "neutral", "sad"]
CLIPS = {"train": 60, "test": 20, "": 20}  # the last in no label file


def make_features(root: Path, noise: float = 0.7) -> list[tuple[str, str, str]]:
    """voice-UTT (12,) and face-FRA (frames, 7) for CLIPS, labels.csv; returns (name, class, split) of every clip."""
    generator = np.random.default_rng(0)
    splits = [split for split, count in CLIPS.items() for _ in range(count)]
    clips = [(f"Ses01.{i:03d}", CLASSES[i % 4], split) for i, split in enumerate(splits)]
    for folder, size in (("voice-UTT", 12), ("face-FRA", 7)):
        (root / folder).mkdir(parents=True)
        centres = dict(zip(CLASSES, generator.normal(size=(4, size)), strict=True))
        for name, label, _ in clips:
            shape = (int(generator.integers(1, 5)), size) if folder == "face-FRA" else (size,)
            features = centres[label] + noise * generator.normal(size=shape)
            np.save(root / folder / f"{name}.npy", features.astype(np.float32))
    table(root / "labels.csv", ("name", "label", "split"), [clip for clip in clips if clip[2]])
    return clips


def table(path: Path, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


# ---------------------------------------------------------------- through DVC


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    folder = tmp_path_factory.mktemp("imported")
    make_features(folder / "mine")
    (folder / "mine/voice-UTT/Ses01.003.npy").unlink()
    np.save(folder / "mine/face-FRA/Ses01.061.npy", np.zeros((1, 7)))
    repository = new_repository(folder)
    run_import(repository)
    small = {"folds.count": 3, "fusion.seeds": [0, 1], "fusion.epochs": 8, "fusion.batch_size": 8, "fusion.hidden": 32,
             "fusion.learning_rate": 0.003, "self_training.rounds": 1, "self_training.k": 2}
    for key, value in small.items():
        repository.set(key, value, "iemocap/params.yaml")
    return repository


def run_import(repository: Repository) -> str:
    return repository.run("python", "-m", "stages.commands.import_features", "iemocap", "voice=mine/voice-UTT",
                          "face=mine/face-FRA", "--labels", "mine/labels.csv", "--unlisted", "unlabelled")


def repro(repository: Repository) -> list[str]:
    """Sorted, since DVC may take two stages that do not need each other in either order."""
    output = repository.run("dvc", "repro", "iemocap/dvc.yaml")
    return sorted(line.split(":")[-1] for line in repository.stages_run(output))


def test_from_files_and_four_classes_to_a_waf_without_any_clip(repository: Repository) -> None:
    assert repro(repository) == sorted(STAGES)
    metrics = read_yaml(repository.folder / "iemocap/reports/metrics.json")
    assert metrics["test"] > 60 and metrics["best"] > 60 and metrics["LR"] > 60  # guessing gives 25
    details = read_yaml(repository.folder / "iemocap/reports/details.json")
    assert details["clips"] == {"labelled": 60, "unlabelled": 20, "test": 20}
    assert list(details["final"]["test"]["per_class"]) == CLASSES and details["final"]["test"]["clips"] == 20
    assert details["pseudo_labels"]["count"] > 0 and details["leaky"] is False
    submission = repository.rows("iemocap/reports/submission.csv")
    assert len(submission) == 20 and {row["discrete"] for row in submission} <= set(CLASSES)
    skipped = [(row["clip_id"], row["stage"], row["present"]) for row in repository.rows("iemocap/reports/skipped.csv")]
    assert skipped == [("Ses01.003", "import@voice", "false"), ("Ses01.061", "import@face", "false")]
    assert repository.rows("iemocap/reports/robustness.csv")[1]["kept"] == "face"
    assert "<html" in (repository.folder / "iemocap/reports/report.html").read_text()


def test_nothing_reruns_until_a_file_changes_and_params_are_kept(repository: Repository) -> None:
    assert repro(repository) == []
    run_import(repository)
    assert repro(repository) == []
    path = repository.folder / "mine/voice-UTT/Ses01.000.npy"
    np.save(path, np.load(path, allow_pickle=False) + 1)
    run_import(repository)
    status = repository.run("dvc", "status", "iemocap/dvc.yaml")
    assert "gather_features" in status and "features" in status and "split_folds" not in status
    assert load_fusion(repository.folder / "iemocap/params.yaml").fusion.epochs == 8


def test_the_repository_keeps_its_own_pipeline(repository: Repository) -> None:
    listed = {line.split()[0] for line in repository.run("dvc", "stage", "list").splitlines()}
    assert "extract_audio" in listed and not any("iemocap" in name for name in listed)
    assert "iemocap/features" not in repository.run("git", "status", "--short", "-uall")


# ---------------------------------------------------------------- the command alone


@pytest.fixture
def request_(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Request:
    """A request whose repository is tmp_path."""
    make_features(tmp_path / "mine")
    for name in ("params.yaml", "dvc.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setattr(importing, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    return Request(Path("meld"), {"voice": Path("mine/voice-UTT"), "face": Path("mine/face-FRA")},
                   Path("mine/labels.csv"), None, "ignore", 0.1, False)


def test_stores_hold_the_files_pooled_over_time(request_: Request) -> None:
    import_features(request_)
    clips = read_manifest("meld/data/manifest.csv")
    assert [clip.split for clip in clips] == ["labelled"] * 60 + ["test"] * 20
    assert all((clip.label in CLASSES) == (clip.split == "labelled") for clip in clips)
    voice, face = Store("meld/features/voice"), Store("meld/features/face")
    assert voice.clip_ids == face.clip_ids == [clip.clip_id for clip in clips]
    for row in (0, 37, 79):
        one, many = (np.load(path / f"{clips[row].clip_id}.npy") for path in request_.features.values())
        np.testing.assert_array_equal(voice.mean[row], one)
        np.testing.assert_allclose(face.mean[row], many.mean(axis=0), rtol=1e-6)
        assert face.var is not None
        np.testing.assert_allclose(face.var[row], many.var(axis=0), rtol=1e-5, atol=1e-7)
    assert voice.var is None and voice.present.all() and face.present.all()
    p = load_fusion("meld/params.yaml")
    assert p.corpus.labels == CLASSES and p.fusion.modalities == ["voice", "face"]
    assert p.self_training.rounds == 0  # there are no unlabelled clips


def test_frames_are_kept_where_asked_for(request_: Request) -> None:
    import_features(replace(request_, keep_frames=True))
    voice, face = Store("meld/features/voice"), Store("meld/features/face")
    assert (voice.keeps_frames, face.keeps_frames) == (False, True)
    for clip_id, found in zip(face.clip_ids, face.frames(), strict=True):
        np.testing.assert_array_equal(found, np.load(f"mine/face-FRA/{clip_id}.npy"))


def test_a_second_file_gives_the_test_clips_and_mers_columns_are_known(request_: Request) -> None:
    rows = [(f"Ses01.{i:03d}", CLASSES[i % 4], "0.5") for i in range(60)]
    table(Path("mine/labels.csv"), ("name", "discrete", "valence"), rows)
    table(Path("mine/test.csv"), ("name",), [(f"Ses01.{i:03d}",) for i in range(60, 80)])
    import_features(replace(request_, test=Path("mine/test.csv")))
    clips = read_manifest("meld/data/manifest.csv")
    assert [clip.split for clip in clips] == ["labelled"] * 60 + ["test"] * 20
    assert Path("meld/data/truth.csv").read_text() == "clip_id,label\n"


def test_the_pipeline_is_the_repositorys_from_the_folds_on() -> None:
    values = read_yaml(ROOT / "dvc.yaml")
    made = make_pipeline(read_yaml(ROOT / "dvc.yaml"), "..")
    outs = {next(iter(out)) if isinstance(out, dict) else out for stage in made["stages"].values()
            for kind in ("outs", "metrics", "plots") for out in stage.get(kind, [])}
    assert list(made["stages"]) == list(STAGES)
    for name, stage in made["stages"].items():
        code = [dep.removeprefix("../") for dep in stage["deps"] if dep.startswith("../")]
        assert code == [dep for dep in values["stages"][name]["deps"] if dep.startswith("stages/")]
        data = {dep for dep in stage["deps"] if not dep.startswith("../")}
        assert data and data <= outs | set(importing.WRITTEN)
        assert stage["params"] == values["stages"][name]["params"]
    assert "models/emovclip/curves.csv" not in str(made["plots"]) and len(made["plots"]) == len(values["plots"]) - 1


def spoil(name: str, array: Any, folder: str = "voice-UTT") -> None:
    np.save(f"mine/{folder}/Ses01.{name}.npy", array, allow_pickle=True)


def labels(*lines: str) -> None:
    good = Path("mine/labels.csv").read_text().splitlines()
    Path("mine/labels.csv").write_text("\n".join([*good, *lines]) + "\n")


BROKEN: dict[str, tuple[Any, str]] = {
    "NaN": (lambda: spoil("004", np.full(12, np.nan)), r"voice-UTT/Ses01\.004\.npy: holds NaN or infinite values"),
    "infinite": (lambda: spoil("004", np.full(12, np.inf)), r"Ses01\.004\.npy: holds NaN or infinite values"),
    "too large": (lambda: spoil("004", np.full(12, 1e300)), r"Ses01\.004\.npy: .* too large for float32"),
    "wrong dimension": (lambda: spoil("000", np.ones(13)), r"Ses01\.000\.npy: found shape \(13,\), expected \(12,\)"),
    "wrong axes": (lambda: spoil("000", np.ones(7), "face-FRA"), r"shape \(7,\), expected \(frames, 7\)"),
    "pickled": (lambda: spoil("004", np.array([{}, None])), r"Ses01\.004\.npy: not a \.npy array \(Object arrays"),
    "text": (lambda: spoil("004", np.array(["a"])), r"Ses01\.004\.npy: holds <U1, expected numbers"),
    "damaged": (lambda: Path("mine/voice-UTT/Ses01.004.npy").write_bytes(b"\x93NUMPY"), r"not a \.npy array"),
    "no features": (lambda: [path.unlink() for path in Path("mine/face-FRA").iterdir()], r"face-FRA: no \.npy files"),
    "archives": (lambda: [path.rename(path.with_suffix(".npz")) for path in Path("mine/face-FRA").iterdir()],
                 r"face-FRA: no \.npy files \(found \.npz\); expected one per clip"),
    "a file in capitals too": (lambda: Path("mine/voice-UTT/Ses01.004.NPY").touch(),
                               r"Ses01\.004\.npy: Ses01\.004\.NPY is there too; expected one file a clip"),
    "a pipe": (lambda: (Path("mine/voice-UTT/Ses01.004.npy").unlink(), os.mkfifo("mine/voice-UTT/Ses01.004.npy")),
               r"Ses01\.004\.npy: a pipe, expected a file"),
    "a name with and without its extension": (lambda: labels("Ses01.000.mp4,sad,train"),
                                              r"the clip Ses01\.000 occurs twice, with and without an extension"),
    "clips without features": (
        lambda: labels(*(f"dia{i}.mp4,sad,train" for i in range(10))),
        r"10 of 90 clips have no file \('dia0.mp4', .*more than --max-missing 0.1 allows; .* has 'Ses01.000.npy'"),
    "a name twice": (lambda: labels("Ses01.000,sad,train"), r"labels\.csv: line 82: name 'Ses01\.000' occurs twice"),
    "no label": (lambda: labels("Ses01.090,,train"), r"Ses01\.090: a clip to train on without a label"),
    "validation split": (lambda: labels("Ses01.090,sad,dev"), r"found split 'dev', expected train, test or unlabelled"),
    "no columns": (lambda: Path("mine/labels.csv").write_text("clip,emotion\na,sad\n"), r"found columns .*'clip'"),
    "no label column": (lambda: Path("mine/labels.csv").write_text("name,emotion\na,sad\n"), r"expected name and lab"),
    "one class": (lambda: Path("mine/labels.csv").write_text("name,label\nSes01.000,sad\n"), r"classes \['sad'\], exp"),
    "two columns of labels": (lambda: Path("mine/labels.csv").write_text("name,discrete,label\na,sad,0\n"),
                              r"labels\.csv: line 1: found both columns label and discrete"),
    "a scale": (lambda: Path("mine/labels.csv").write_text("name,label\nSes01.000,0.1\nSes01.001,-1.5\n"),
                r"labels\.csv: the labels are numbers on a scale"),
    "nan": (lambda: labels("Ses01.090,nan,train"), r"Ses01\.090: a clip to train on without a label"),
    "an open quote": (lambda: labels('Ses01.090,"sad,train'), r"labels\.csv: line 82: a quote opens in this row"),
    "a foreign folder": (lambda: (Path("meld").mkdir(), Path("meld/notes").touch()), r"meld: holds files"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_bad_input_is_one_line_and_leaves_no_features(request_: Request, name: str) -> None:
    breakage, message = BROKEN[name]
    breakage()
    with pytest.raises(PipelineError, match=message) as error:
        import_features(request_)
    assert "\n" not in str(error.value)
    assert not Path("meld/features").exists() and not Path("meld/params.yaml").exists()


def test_clips_that_the_labels_lack_need_a_decision(request_: Request) -> None:
    with pytest.raises(PipelineError, match=r"labels\.csv: lacks 20 clips that have features: 'Ses01\.080'"):
        import_features(replace(request_, unlisted="error"))
    import_features(replace(request_, unlisted="unlabelled"))
    assert [clip.split for clip in read_manifest("meld/data/manifest.csv")].count("unlabelled") == 20
    assert load_fusion("meld/params.yaml").self_training.rounds == 10


def test_a_clip_absent_everywhere_stays_with_a_warning(request_: Request, capsys: pytest.CaptureFixture[str]) -> None:
    labels("nowhere,sad,train")
    spoil("005", np.zeros((0, 7)), "face-FRA")
    import_features(request_)
    assert "1 clips are absent from every modality, and can only be guessed: 'nowhere'" in capsys.readouterr().err
    face = Store("meld/features/face")
    reasons = dict(zip(face.clip_ids, face.reasons, strict=True))
    assert reasons["nowhere"] == "no feature file" and reasons["Ses01.005"] == NOTHING


def test_names_of_clip_files_and_files_in_capitals_are_the_clips(request_: Request) -> None:
    lines = Path("mine/labels.csv").read_text().splitlines()
    named = [line.replace(",", ".MP4,", 1) if i % 2 else line.replace("train", "Train").replace("test", "TEST")
             for i, line in enumerate(lines[1:])]
    Path("mine/labels.csv").write_text("\n".join([lines[0], *named]) + "\n")
    Path("mine/face-FRA/Ses01.000.npy").rename("mine/face-FRA/Ses01.000.NPY")
    import_features(request_)
    assert [clip.clip_id for clip in read_manifest("meld/data/manifest.csv")] == [f"Ses01.{i:03d}" for i in range(80)]
    assert Store("meld/features/face").present.all()


def test_spellings_are_merged_over_both_files(request_: Request, capsys: pytest.CaptureFixture[str]) -> None:
    odd = {1: "xxx", 65: "nan", **dict.fromkeys(range(0, 80, 3), "Happy")}
    spelled = [odd.get(i, CLASSES[i % 4]) for i in range(80)]
    rows = [(f"Ses01.{i:03d}", label) for i, label in enumerate(spelled)]
    table(Path("mine/labels.csv"), ("name", "label"), rows[:60])
    table(Path("mine/test.csv"), ("name", "label"), rows[60:])
    import_features(replace(request_, test=Path("mine/test.csv")))
    assert load_fusion("meld/params.yaml").corpus.labels == ["Happy", "angry", "neutral", "sad", "xxx"]
    truth = dict(line.split(",") for line in Path("meld/data/truth.csv").read_text().splitlines())
    assert len(truth) == 20 and "Ses01.065" not in truth and truth["Ses01.061"] == "Happy"
    warning = capsys.readouterr().err
    assert "warning: mine/labels.csv: merged as 'Happy': 'Happy' (27), 'happy' (12); looks like no class:" in warning
    assert "taken as no label: 'nan' (1)" in warning


def test_labels_outside_the_params_are_refused_the_second_time(request_: Request) -> None:
    import_features(request_)
    labels("Ses01.090,bored,train")
    with pytest.raises(PipelineError, match=r"Ses01\.090: found label 'bored', expected one of corpus\.labels"):
        import_features(request_)


@pytest.mark.parametrize("folder", [".", "stages/corpus", "features/mine", "..", "/tmp"])
def test_folders_that_are_not_the_users_are_refused(request_: Request, folder: str) -> None:
    with pytest.raises(PipelineError, match="expected a new folder in"):
        import_features(replace(request_, folder=Path(folder)))


@pytest.mark.parametrize("pair", ["voice", "=x", "Voice=x", "emovclip=x", "../up=x"])
def test_modalities_need_a_name_and_a_folder(pair: str) -> None:
    with pytest.raises(PipelineError, match="expected NAME=FOLDER"):
        importing.main(["meld", pair, "--labels", "x.csv"])
