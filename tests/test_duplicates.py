"""The same bytes twice: in training and in test, or under two labels."""

import csv
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_corpus import Repository, table
from test_folders import write_sound
from test_import_features import request_  # noqa: F401  # a fixture

from stages.commands.import_features import Request, import_features
from stages.corpora.duplicates import COLUMNS, find_duplicates, report_duplicates
from stages.engine.manifest import Clip, Split
from stages.evaluation.warnings import duplicate_warnings


def clip(name: str, digest: str, split: Split, label: str = "") -> Clip:
    return Clip(name, f"{name}.wav", split, label, "", "", 1.0, 1, digest)


# clips as (digest, split, label), the truth of the others by position, the problem of each clip that is listed
CASES: dict[str, tuple[list[tuple[str, Split, str]], dict[int, str], dict[int, str]]] = {
    "nothing twice": ([("a", "labelled", "sad"), ("b", "test", ""), ("c", "unlabelled", "")], {1: "joy"}, {}),
    "train and test": ([("a", "labelled", "sad"), ("b", "labelled", "joy"), ("a", "test", "")], {},
                       {0: "train and test", 2: "train and test"}),
    "two labels": ([("a", "labelled", "sad"), ("a", "labelled", "joy"), ("b", "test", "")], {},
                   {0: "two labels", 1: "two labels"}),
    "both": ([("a", "labelled", "sad"), ("a", "test", "")], {1: "joy"},
             dict.fromkeys((0, 1), "train and test; two labels")),
    "the same label twice": ([("a", "labelled", "sad"), ("a", "labelled", "sad")], {}, {}),
    "two labels in test": ([("a", "test", ""), ("a", "test", "")], {0: "sad", 1: "joy"},
                           {0: "two labels", 1: "two labels"}),
    "unlabelled and test": ([("a", "unlabelled", ""), ("a", "test", "")], {1: "joy"}, {}),
    "unlabelled with another truth": ([("a", "unlabelled", ""), ("a", "labelled", "joy")], {0: "sad"},
                                      {0: "two labels", 1: "two labels"}),
    "three": ([("a", "labelled", "sad"), ("a", "labelled", "sad"), ("a", "test", "")], {2: "sad"},
              dict.fromkeys(range(3), "train and test")),
    "without a digest": ([("", "labelled", "sad"), ("", "test", "")], {1: "joy"}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_a_problem(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, truth, problems = CASES[case]
    clips = [clip(str(i), digest, split, label) for i, (digest, split, label) in enumerate(rows)]
    found = find_duplicates(clips, {str(i): label for i, label in truth.items()})
    assert {int(row.clip_id): row.problem for row in found} == problems
    report_duplicates(Path("corpus"), found, tmp_path / "duplicates.csv")
    assert len(capsys.readouterr().err.splitlines()) == len({p for row in found for p in row.problem.split("; ")})
    shown = duplicate_warnings(pd.read_csv(tmp_path / "duplicates.csv", dtype=str, keep_default_na=False))
    assert len(shown) == len({p for row in found for p in row.problem.split("; ")})
    assert all(f"{' = '.join(row.clip_id for row in found)}; all in data/duplicates.csv" in line for line in shown)


def test_the_corpus_stage_names_them_and_keeps_the_truth_to_itself(tmp_path: Path) -> None:
    for pitch, name in enumerate("abcd"):
        write_sound(tmp_path / f"corpus/{name}.wav", pitch=200 + 50 * pitch)
    shutil.copy(tmp_path / "corpus/a.wav", tmp_path / "corpus/a_again.wav")
    shutil.copy(tmp_path / "corpus/b.wav", tmp_path / "corpus/other_label.wav")
    table(tmp_path / "corpus/clips.csv", "path,split,label", "a.wav,labelled,joy", "b.wav,labelled,fear",
          "c.wav,labelled,joy", "d.wav,labelled,fear", "a_again.wav,test,joy", "other_label.wav,labelled,joy")
    repository = Repository(tmp_path, adapter="csv", path="corpus", truth=None, labels=["joy", "fear"])
    lines = repository.run("corpus").replace("\r", "\n").splitlines()
    for warning in ("in train and test: 'a = a_again'", "under two labels: 'b = other_label'"):
        assert f"warning: corpus: 1 clip with the same bytes {warning}; all in data/duplicates.csv" in lines
    with open(tmp_path / "data/duplicates.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == COLUMNS
    assert sorted((row["clip_id"], row["split"], row["problem"]) for row in found) == [
        ("a", "labelled", "train and test"), ("a_again", "test", "train and test"),
        ("b", "labelled", "two labels"), ("other_label", "labelled", "two labels")]


def test_imported_features_are_compared_too(request_: Request, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    for folder in ("voice-UTT", "face-FRA"):
        shutil.copy(f"mine/{folder}/Ses01.000.npy", f"mine/{folder}/Ses01.064.npy")
    shutil.copy("mine/voice-UTT/Ses01.002.npy", "mine/voice-UTT/Ses01.066.npy")  # the face differs
    for name in ("Ses01.004", "Ses01.068"):  # absent from both: nothing to compare
        np.save(f"mine/voice-UTT/{name}.npy", np.zeros(12))
        np.save(f"mine/face-FRA/{name}.npy", np.zeros((1, 7)))
    import_features(replace(request_, max_missing=1.0))
    found = Path("meld/data/duplicates.csv").read_text().splitlines()
    assert [line.split(",")[1:] for line in found[1:]] == [["Ses01.000", "labelled", "train and test"],
                                                           ["Ses01.064", "test", "train and test"]]
    assert "1 clip with the same bytes in train and test: 'Ses01.000 = Ses01.064'" in capsys.readouterr().err
