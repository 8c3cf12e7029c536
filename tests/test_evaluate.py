"""From feature stores to metrics.json and the report: the stages from gather_features on, one after the other."""

import html
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fusion_data
import pandas as pd
import pytest
from fusion_data import ROOT, make_inputs, recipe, rounds, write_params, write_run

from stages import baselines, evaluate, gather_features, self_train, train_fusion
from stages.engine.files import write_rows
from stages.fusion.features import Modality

STAGES = ("gather_features", "train_fusion", "baselines", "self_train", "evaluate")
LABELS = {
    2: ("no", "yes"),
    4: fusion_data.LABELS,
    7: ("neutral", "joy", "sadness", "anger", "surprise", "fear", "disgust"),
}
Prepare = Callable[..., None]


@pytest.fixture
def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepare:
    """A function that writes the features, labels, truth and params of a run to tmp_path, the current folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("dvc.yaml", "stages"):
        (tmp_path / name).symlink_to(ROOT / name)

    def write(labels: int = 4, wide: int = 1, self_training: dict | None = None, **clips: int) -> None:
        monkeypatch.setattr(fusion_data, "LABELS", LABELS[labels])
        inputs, truth = make_inputs(**clips)
        inputs = replace(inputs, modalities=tuple(widened(m, wide) for m in inputs.modalities))
        write_run(tmp_path, inputs)
        rows = [(inputs.clip_ids[row], LABELS[labels][truth[row]]) for row in inputs.others]
        write_rows("data/truth.csv", ["clip_id", "label"], rows)
        write_params(recipe(), rounds(**(self_training or {})))

    return write


def widened(modality: Modality, times: int) -> Modality:
    """The same features several times over."""
    repeated = {name: getattr(modality, name).tile(times) for name in ("matrix", "centre", "spread")}
    return replace(modality, **repeated)


def run_all() -> dict:
    for stage in (gather_features, train_fusion, baselines, self_train, evaluate):
        stage.main()
    return json.loads(Path("reports/details.json").read_text())


def report_warnings() -> list[str]:
    section = re.search(r'<section class="warning">(.*?)</section>', Path("reports/report.html").read_text(), re.S)
    return re.findall(r"<li>(.*?)</li>", section.group(1)) if section else []


def test_two_runs_give_the_same_metrics_to_the_last_digit(prepare: Prepare) -> None:
    """In processes of their own, and wide enough for a matrix product to use several threads if it may."""
    prepare(wide=94, self_training={"rounds": 1})
    program = "import importlib\n" + "".join(f"importlib.import_module('stages.{s}').main()\n" for s in STAGES)
    threads = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}  # passive: spinning stalls a busy machine
    names = ("metrics.json", "details.json", "predictions.csv", "pseudo_labels.csv", "robustness.csv")
    paths = [f"reports/{name}" for name in names]
    results = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", program], env=os.environ | threads, check=True)
        results.append({path: Path(path).read_bytes() for path in paths})
        for path in paths:
            Path(path).unlink()
    assert results[0] == results[1]


@pytest.mark.parametrize("labels", LABELS)
def test_labels_are_a_parameter(prepare: Prepare, labels: int) -> None:
    prepare(labels, labelled=84)
    metrics = run_all()
    names = list(LABELS[labels])
    test = metrics["final"]["test"]
    assert 0 < test["waf"] <= 100 and list(test["per_class"]) == names
    predictions = pd.read_csv("reports/predictions.csv")
    assert [c for c in predictions if c.startswith("prob_")] == [f"prob_{name}" for name in names]
    assert [c for c in pd.read_csv("reports/rounds.csv") if c.startswith("added_")] == [f"added_{n}" for n in names]
    assert set(pd.read_csv("reports/plots/confusion.csv")["predicted"]) <= set(names)
    page = Path("reports/report.html").read_text()
    assert all(f">{name}</span>" in page for name in names)


def test_without_unlabelled_clips_the_report_says_so(prepare: Prepare) -> None:
    prepare(unlabelled=0, self_training={"include_test": False})
    metrics = run_all()
    assert metrics["pseudo_labels"] == {"count": 0.0}
    assert metrics["final"]["test"]["waf"] == metrics["round0"]["test"]["waf"]
    assert report_warnings()[-2:] == [
        "The corpus has no unlabelled clips.",
        "Self-training stopped after round 0 of 2: no candidate was left.",
    ]


def test_k_beyond_the_pool_takes_what_there_is_and_the_report_says_so(
    prepare: Prepare, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(self_training={"k": 500, "rounds": 3})
    assert run_all()["pseudo_labels"]["count"] == 44  # all unlabelled and test clips, for each seed
    found = report_warnings()
    assert any(re.fullmatch(r"Self-training stopped after round \d of 3: no candidate was left\.", w) for w in found)
    short = next(w for w in found if "rounds some added fewer than k = 500 clips of a class" in w)
    assert all(f"{name} in " in short for name in fusion_data.LABELS)
    assert any(w.startswith("Transductive: pseudo-labels put 14 of 14 test clips") for w in found)
    said = capsys.readouterr().err
    assert all(f"warning: evaluate: {html.unescape(w)}" in said for w in found)
