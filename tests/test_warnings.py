"""Every warning of the report on a run that is made to trigger it; without that the same run has none."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fabricated_run import LABELS, SEEDS, fabricate
from safetensors.numpy import load_file, save_file
from yaml_values import set_value

from stages.engine.params import load
from stages.evaluation import figures
from stages.evaluation.artefacts import read_run

FUSION, FINAL, BASELINES = (Path("models") / name for name in ("fusion", "self_training", "baselines"))
KEYS = {"labelled": ("out_of_fold_best", "out_of_fold_last", "out_of_fold"), "others": ("votes",)}


@pytest.fixture
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run without self-training, by twelve speakers per split, better than its baselines, whose curves have bent."""
    fabricate(tmp_path, frames=False)
    monkeypatch.chdir(tmp_path)
    name_groups(lambda split, i: f"{split}-{i % 12}")
    change_curves([10.0, 80.0, 70.0, 60.0])
    rounds = pd.read_csv("reports/rounds.csv")
    rounds[rounds["round"] == 0].to_csv("reports/rounds.csv", index=False)
    pd.read_csv("reports/pseudo_labels.csv").iloc[:0].to_csv("reports/pseudo_labels.csv", index=False)
    set_value(Path("params.yaml"), "self_training.rounds", 0)
    for rows in KEYS:
        predict(FUSION, rows, right=0.9)
        predict(BASELINES, rows, right=0.5)
    shutil.copytree(FUSION, FINAL, dirs_exist_ok=True)


def name_groups(group: Callable[[str, int], str]) -> None:
    """The manifest's groups, by split and position in it."""
    manifest = pd.read_csv("data/manifest.csv", dtype=str, keep_default_na=False)
    positions = manifest.groupby("split").cumcount()
    manifest["group"] = [group(split, i) for split, i in zip(manifest["split"], positions, strict=True)]
    manifest.to_csv("data/manifest.csv", index=False)


def change_curves(by_epoch: list[float]) -> None:
    curves = pd.read_csv(FUSION / "curves.csv")
    curves["valid_waf"] = curves["epoch"].map(dict(enumerate(by_epoch)))
    curves.to_csv(FUSION / "curves.csv", index=False)


def predict(folder: Path, rows: str, right: float) -> None:
    """Let all models be right of about a share `right` of the labelled clips, or of the others."""
    clips = pd.read_csv(folder / "clips.csv", dtype=str)
    chosen = (clips["split"] == "labelled") == (rows == "labelled")
    manifest = pd.read_csv("data/manifest.csv", dtype=str, keep_default_na=False).set_index("clip_id")
    truth = pd.read_csv("data/truth.csv").set_index("clip_id")["label"]
    names = manifest["label"].where(manifest["label"] != "", truth).loc[clips["clip_id"][chosen]]
    actual = np.array([LABELS.index(name) for name in names])
    wrong = np.arange(len(actual)) % 20 >= 20 * right
    called = np.where(wrong, (actual + 1) % 6, actual)
    tensors = load_file(folder / "predictions.safetensors")
    keys = KEYS[rows] if folder != BASELINES else (
        f"logistic_regression.{'out_of_fold' if rows == 'labelled' else 'others'}",)
    for key in keys:
        tensors[key] = np.broadcast_to(np.eye(6, dtype=np.float32)[called], tensors[key].shape).copy()
    save_file(tensors, folder / "predictions.safetensors")


def warnings() -> list[str]:
    return figures.details(read_run(LABELS), load())["warnings"]


def no_unlabelled_truth() -> None:
    truth = pd.read_csv("data/truth.csv")
    truth[truth["clip_id"].str.startswith("test")].iloc[1:].to_csv("data/truth.csv", index=False)


def fusion_as_right_as(labelled: float, others: float) -> None:
    for folder in (FUSION, FINAL):
        predict(folder, "labelled", labelled)
        predict(folder, "others", others)


def leak() -> None:
    entries = json.loads(Path("data/modalities.json").read_text())
    entries["modalities"][1]["leaky"] = True
    Path("data/modalities.json").write_text(json.dumps(entries))


def self_train(clip_id: str) -> None:
    """One round that gives the clip a pseudo-label in every seed, and models that differ from round 0's."""
    rounds = pd.read_csv("reports/rounds.csv")
    more = rounds.assign(round=1, **{f"added_{label}": 10 for label in LABELS})
    pd.concat([rounds, more]).to_csv("reports/rounds.csv", index=False)
    pd.DataFrame([(1, clip_id, "anger", 0.9, 0, s, None) for s in range(SEEDS)],
                 columns=["round", "clip_id", "label", "confidence", "agreement", "seed", "fold"]).to_csv(
        "reports/pseudo_labels.csv", index=False)
    set_value(Path("params.yaml"), "self_training.rounds", 1)
    predict(FINAL, "others", 0.95)


def duplicate() -> None:
    pd.DataFrame([("d", "labelled_000", "labelled", "train and test"), ("d", "test_000", "test", "train and test")],
                 columns=["digest", "clip_id", "split", "problem"]).to_csv("data/duplicates.csv", index=False)


CASES: dict[str, tuple[Callable[[], object], list[str]]] = {
    "below regression": (
        lambda: [predict(BASELINES, rows, right=1) for rows in KEYS],
        ["The fusion is below a baseline on the test clips: WAF 93.3 against 100.0 by logistic regression (difference "
         "-6.7, 95 % interval -", "The fusion is below a baseline out of fold: WAF "]),
    "below regression, perhaps": (lambda: predict(BASELINES, "others", right=0.95),
                                  ["could turn it round)."]),
    "below the majority": (
        lambda: [fusion_as_right_as(0, 0), *(predict(BASELINES, rows, right=0) for rows in KEYS)],
        ["on the test clips: WAF 0.0 against 4.8 by always calling the most frequent class", "out of fold: WAF 0.0"]),
    "cross-validation above the test": (
        lambda: [fusion_as_right_as(1, 0.5), predict(BASELINES, "others", 0.3)],
        ["disagree beyond chance: the features may have seen these labels"]),
    "test above cross-validation": (lambda: [fusion_as_right_as(0.6, 1)],
                                    ["disagree beyond chance: the test clips may be easier"]),
    "leaky": (leak, ["Leaky: EmoVCLIP's prompts were trained on every fold"]),
    "self-trained": (lambda: self_train("unlabelled_003"), ["Cross-validation after self-training is void"]),
    "self-trained on test clips": (
        lambda: self_train("test_003"),
        ["Cross-validation after self-training is void", "Transductive: pseudo-labels put 1 of 30 test clips"]),
    "duplicates": (duplicate, ["1 clip with the same bytes in training and in test"]),
    "no groups": (lambda: name_groups(lambda split, i: ""), ["60 of 60 labelled clips have no group"]),
    "some without a group": (lambda: name_groups(lambda split, i: f"{split}-{i % 12}" if i else ""),
                             ["1 of 60 labelled clips have no group"]),
    "speakers in both": (lambda: name_groups(lambda split, i: f"speaker-{i % 15}" if split != "unlabelled" else ""),
                         ["15 of the test clips' 15 groups are in training too (speaker-0, speaker-1"]),
    "few speakers": (lambda: name_groups(lambda split, i: f"{split}-{i % (3 if split == 'test' else 12)}"),
                     ["The test clips are of 3 groups: their interval is rough."]),
    "one speaker": (lambda: name_groups(lambda split, i: f"{split}-{i % (1 if split == 'test' else 12)}"),
                    ["The test clips are of 1 group: their interval is drawn from single clips"]),
    "still rising": (lambda: change_curves([10.0, 20.0, 30.0, 40.0]),
                     ["Still rising: the 10 models' validation WAF is best at epoch 4.0 of 4 on average"]),
    "some truth": (no_unlabelled_truth, ["The truth of 29 of 30 test clips is known"]),
}


@pytest.mark.usefixtures("quiet")
def test_nothing_is_said_without_a_reason() -> None:
    assert warnings() == []


@pytest.mark.usefixtures("quiet")
def test_cross_validation_holds_where_each_fold_votes_for_itself() -> None:
    self_train("unlabelled_003")
    set_value(Path("params.yaml"), "self_training.voters", "fold")
    assert warnings() == []


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("case", CASES)
def test_each_speaks_where_it_should_and_alone(case: str) -> None:
    trigger, expected = CASES[case]
    trigger()
    found = warnings()
    assert len(found) == len(expected), found
    for text, line in zip(expected, found, strict=True):
        assert text in line and line.endswith(".")
