"""mer search: what it draws, how it chooses, and a small one on a real repository with DVC."""

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_import_features import make_features
from test_pipeline import ROOT, Repository, new_repository

from stages.commands.search import Labelled, Range, Trial, draw, honest, main, read_space, render
from stages.engine.errors import PipelineError
from stages.engine.params import load_fusion
from stages.engine.yaml_file import read_yaml
from stages.evaluation import metrics

PARAMS: dict[str, Any] = read_yaml(ROOT / "params.yaml")


def space(tmp_path: Path, text: str) -> Any:
    (tmp_path / "search.yaml").write_text(text)
    return read_space(tmp_path / "search.yaml", PARAMS)


def test_draws_are_seeded_distinct_and_within_what_is_declared(tmp_path: Path) -> None:
    declared = space(tmp_path, "search:\n  fusion.hidden: {low: 16, high: 256, log: true}\n"
                               "  fusion.learning_rate: {low: 1e-4, high: 1e-2, log: true}\n"
                               "  fusion.dropout: {low: 0.0, high: 0.5}\n  fusion.epoch: [best, common]\n")
    drawn = draw(declared, 60, 0, PARAMS)
    assert drawn == draw(declared, 60, 0, PARAMS) != draw(declared, 60, 1, PARAMS)
    assert len({repr(one) for one in drawn}) == 60
    rates = np.array([one["fusion.learning_rate"] for one in drawn])
    assert rates.min() >= 1e-4 and rates.max() <= 1e-2 and 0.25 < (rates < 1e-3).mean() < 0.75  # by logarithms
    assert all(isinstance(one["fusion.hidden"], int) and 16 <= one["fusion.hidden"] <= 256 for one in drawn)
    assert {one["fusion.epoch"] for one in drawn} == {"best", "common"}
    few = draw(space(tmp_path, "search: {fusion.hidden: [64, 128]}"), 20, 0, PARAMS)
    assert [one["fusion.hidden"] for one in few] == [64]  # 128 is what params.yaml says
    assert {Range(low=1, high=3).draw(random.Random(i)) for i in range(40)} == {1, 2, 3}


@pytest.mark.parametrize(("text", "told"), [
    ("fusion: {hidden: [1]}", "expected a section search"),
    ("search: {self_training.k: [1, 2]}", "search.self_training.k: expected params of fusion other than seeds"),
    ("search: {fusion.seeds: [[1], [2]]}", "search.fusion.seeds: expected params of fusion"),
    ("search: {fusion.hiden: [1, 2]}", "search.fusion.hiden: expected params of fusion"),
    ("search: {fusion.hidden: 64}", r"search.fusion.hidden: expected a list, or \{low, high, log\}"),
    ("search: {fusion.hidden: {low: 3, high: 2}}", "found low 3 and high 2, expected low < high"),
    ("search: {fusion.dropout: {low: 0.0, high: 0.5, log: true}}", "above 0 with log"),
    ("search: {fusion.hidden: {low: 1, high: 2, lg: true}}", "lg: unknown parameter"),
])
def test_a_slip_in_the_file_is_one_line(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(PipelineError, match=told) as caught:
        space(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_a_value_that_params_may_not_have_stops_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"search: dropout 1\.\d+: fusion.dropout: found 1\."):
        draw(space(tmp_path, "search: {fusion.dropout: {low: 1.0, high: 2.0}}"), 3, 0, PARAMS)


def made_up() -> tuple[list[Trial], Labelled]:
    """Three trials of two seeds on 90 clips in three folds: the second is best by inner scores in fold 0 and overall,
    the third in folds 1 and 2, though it is in truth the worst there."""
    generator = np.random.default_rng(0)
    actual, folds = generator.integers(0, 3, 90), np.arange(90) % 3
    trials = []
    for right, inner in ((0.5, [40, 40, 40]), (0.8, [90, 50, 50]), (0.3, [10, 60, 60])):
        called = np.where(generator.random((2, 90)) < right, actual, (actual + 1) % 3)
        trials.append(Trial({"fusion.hidden": int(100 * right)} if trials else {}, called, np.array([inner, inner])))
    return trials, Labelled(actual, folds, np.full(90, ""), 3)


def test_each_outer_fold_is_predicted_by_the_trial_that_the_others_chose() -> None:
    trials, clips = made_up()
    called, chosen = honest(trials, clips)
    assert chosen == [1, 2, 2]
    for fold, trial in enumerate(chosen):
        np.testing.assert_array_equal(called[:, clips.folds == fold], trials[trial].called[:, clips.folds == fold])


def test_the_page_tells_the_searchs_own_worth_and_orders_trials_by_inner_score() -> None:
    trials, clips = made_up()
    p = load_fusion(ROOT / "params.yaml")
    page = render(trials, clips, p, "search.yaml")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")][2:]
    assert [row[0].removeprefix("| ") for row in rows] == ["hidden 80", "hidden 30", "params.yaml"]
    assert [row[1] for row in rows] == ["63.33", "43.33", "40.00"]
    assert [row[4].removesuffix(" |") for row in rows] == ["1", "2", "0"]
    called, _ = honest(trials, clips)
    own, shipped = (float(metrics.waf(clips.actual, c, 3).mean()) for c in (called, trials[0].called))
    low, high = metrics.paired_interval(clips.actual, called, trials[0].called, 3, 1000, 0)
    worth = re.search(r"worth ([\d.]+) .*: ([+-][\d.]+) \(([+-][\d.]+) to ([+-][\d.]+)\) against", page)
    assert worth and [float(value) for value in worth.groups()] == pytest.approx(
        [own, own - shipped, low, high], abs=0.006)
    assert "`dvc exp run -S fusion.hidden=80`" in page


def test_a_search_on_dvc_resumes_and_leaves_the_workspace_alone(tmp_path: Path) -> None:
    make_features(tmp_path / "mine")
    repository = new_repository(tmp_path)
    imported(repository)
    folder = Repository(tmp_path / "iemocap")
    (folder.folder / "search.yaml").write_text("search: {fusion.hidden: [8, 16, 24], fusion.epochs: [2]}\n")
    before = (folder.folder / "params.yaml").read_bytes()
    command = ("env", "PYTHONPATH=..", "python", "-m", "stages.commands.main", "search", "search.yaml", "--trials", "2")
    output = folder.run(*command)
    page = (folder.folder / "reports/search.md").read_text()
    assert page in output and page.count("\n| ") == 5 and "2 trials and params.yaml as it stands" in page
    assert (folder.folder / "params.yaml").read_bytes() == before
    assert read_yaml(folder.folder / "models/nested/nested.json") == {}  # off, as params.yaml says
    assert folder.run("dvc", "exp", "list", "--name-only").count("search-") == 3
    output = folder.run(*command)
    assert "Running stage" not in output and "exp run --name" not in output
    assert (folder.folder / "reports/search.md").read_text() == page


def imported(repository: Repository) -> None:
    repository.run("python", "-m", "stages.commands.main", "import-features", "iemocap", "voice=mine/voice-UTT",
                   "--labels", "mine/labels.csv", "--unlisted", "ignore")
    for key, value in {"folds.count": 3, "fusion.seeds": [0], "fusion.epochs": 2, "fusion.hidden": 8}.items():
        repository.set(key, value, "iemocap/params.yaml")


def test_the_number_of_trials_is_checked() -> None:
    with pytest.raises(PipelineError, match="--trials: found 0, expected 1 or more"):
        main(["search.yaml", "--trials", "0"])
