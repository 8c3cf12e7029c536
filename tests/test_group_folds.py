"""One fold per group where groups lack classes: from the folds to the report, stage by stage."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fusion_data import LABELS, ROOT, make_inputs, recipe, rounds, write_params, write_run
from safetensors.numpy import load_file
from sklearn.metrics import f1_score
from yaml_values import set_value

from stages import baselines, evaluate, gather_features, self_train, split_folds, train_fusion
from stages.engine.files import write_rows
from stages.engine.manifest import read_folds, read_manifest, write_manifest

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_class_of_one_group_alone_and_a_group_without_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All clips of the last class are of speaker a, whose fold so is trained without it; c lacks the second, too."""
    monkeypatch.chdir(tmp_path)
    for name in ("dvc.yaml", "stages"):
        (tmp_path / name).symlink_to(ROOT / name)
    inputs, truth = make_inputs(labelled=80, noise=0.5)
    inputs = replace(inputs, modalities=inputs.modalities[:2])  # the third is of three folds
    write_run(tmp_path, inputs)
    write_rows("data/truth.csv", ["clip_id", "label"], [(inputs.clip_ids[row], LABELS[truth[row]])
                                                        for row in inputs.others])
    speakers = np.array(["b", "c", "d"])[np.arange(len(truth)) // 9 % 3]
    speakers[(speakers == "c") & (truth == 1)] = "b"
    speakers[truth == 3] = "a"
    write_manifest([replace(clip, group=str(group)) for clip, group in zip(read_manifest(), speakers, strict=True)])
    write_params(recipe(modalities=["sound", "face"], epochs=8), rounds(rounds=1))
    set_value(tmp_path / "params.yaml", "folds.count", "groups")
    for stage in (split_folds, gather_features, train_fusion, baselines, self_train, evaluate):
        stage.main()
    assert "all clips of class 'sadness' are in one fold, which is trained without it" in capsys.readouterr().err
    folds = read_folds()
    assert len(set(folds.values())) == 4
    own = np.array([folds[inputs.clip_ids[row]] for row in inputs.labelled])
    actual = truth[inputs.labelled]
    without = own == own[actual == 3][0]
    assert (actual[without] == 3).all()
    figures = json.loads(Path("reports/details.json").read_text())
    assert figures["final"]["test"]["waf"] > 60 and 0 < figures["final"]["last_epoch"]["waf"] < 100
    last = load_file("models/fusion/predictions.safetensors")["out_of_fold_last"].argmax(-1)
    by_fold = [[100 * f1_score(actual[own == f], seed[own == f], average="weighted", zero_division=0)
                for f in range(4)] for seed in last]
    written = json.loads(Path("reports/details.json").read_text())["round0"]["last_epoch"]["waf"]
    assert written == pytest.approx(np.mean(by_fold), abs=1e-3)
    linear = load_file("models/baselines/predictions.safetensors")["logistic_regression.out_of_fold"]
    assert not linear[:, without, 3].any() and np.isfinite(linear).all()
    assert "<html" in Path("reports/report.html").read_text()
