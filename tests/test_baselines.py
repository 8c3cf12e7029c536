"""The baselines against scikit-learn on the same clips and features, and what the stage writes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from fusion_data import LABELS, make_inputs, raw_features, recipe, rounds, write_params, write_run
from safetensors.numpy import load_file
from sklearn.linear_model import LogisticRegression

from stages import baselines as stage
from stages.evaluation import metrics
from stages.fusion import baselines as module
from stages.fusion.baselines import FINAL, INNER_FOLDS, STRENGTHS, Baselines, baselines, choose
from stages.fusion.features import Inputs, number_groups
from stages.fusion.folds import inner_split
from stages.fusion.logistic_regression import Solution, coordinates, fit

pytestmark = pytest.mark.usefixtures("one_thread")


def clips(count: int, dimensions: int, classes: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features (count, dimensions) float32 of overlapping classes, unequal in scale and centre; labels."""
    generator = np.random.default_rng(seed)
    labels = generator.choice(classes, count, p=np.arange(1, classes + 1) / sum(range(1, classes + 1)))
    scales = 10 ** generator.uniform(-1, 1, dimensions)
    features = 0.3 * generator.normal(size=(classes, dimensions))[labels] + generator.normal(size=(count, dimensions))
    return (5 + scales * features).astype(np.float32), labels


def plain(features: np.ndarray, labels: np.ndarray, c: float) -> LogisticRegression:
    return LogisticRegression(C=c, tol=1e-8, max_iter=20000).fit(features.astype(np.float64), labels)


def softmax(logits: torch.Tensor) -> np.ndarray:
    return logits.softmax(dim=-1).numpy()


@pytest.mark.parametrize("dimensions", [12, 300])
@pytest.mark.parametrize("c", [1e-4, 1e-3, 1e-2, 0.1])
def test_a_fit_is_scikit_learns(dimensions: int, c: float) -> None:
    features, labels = clips(90, dimensions)
    fresh, _ = clips(40, dimensions, seed=1)
    x = coordinates(torch.from_numpy(features))
    assert x.clips.shape[1] <= min(90, dimensions)
    found = fit(x, torch.from_numpy(labels), torch.ones(1, 90, dtype=torch.bool), 4, c, FINAL)
    expected = plain(features, labels, c)
    np.testing.assert_allclose(softmax(found.logits(x.clips))[0], expected.predict_proba(features), atol=2e-3)
    weights = x.weights(found.weights[0])
    logits = (torch.from_numpy(fresh) - x.mean) @ weights + found.intercepts[0]
    np.testing.assert_allclose(softmax(logits), expected.predict_proba(fresh), atol=2e-3)


def test_problems_side_by_side_are_those_alone_also_from_a_warm_start() -> None:
    features, labels = clips(80, 200)
    x, classes = coordinates(torch.from_numpy(features)), torch.from_numpy(labels)
    used = torch.from_numpy(np.arange(80) % 3 != np.arange(3)[:, None])
    together = fit(x, classes, used, 4, 0.1, FINAL, fit(x, classes, used, 4, 0.001, FINAL))
    for problem in range(3):
        own = np.flatnonzero(used[problem].numpy())
        expected = plain(features[own], labels[own], 0.1).predict_proba(features)
        np.testing.assert_allclose(softmax(together.logits(x.clips))[problem], expected, atol=2e-3)


def test_a_class_that_a_problem_lacks_has_no_probability() -> None:
    features, labels = clips(80, 200)
    x, classes = coordinates(torch.from_numpy(features)), torch.from_numpy(labels)
    used = torch.from_numpy(np.stack([labels != 2, labels == 1, labels >= 0]))
    found = softmax(fit(x, classes, used, 4, 0.01, FINAL).logits(x.clips))
    expected = plain(features[labels != 2], labels[labels != 2], 0.01).predict_proba(features)
    np.testing.assert_allclose(found[0][:, [0, 1, 3]], expected, atol=2e-3)
    assert not found[0][:, 2].any()
    np.testing.assert_array_equal(found[1], np.tile([0, 1, 0, 0], (80, 1)))  # one class alone
    assert found[2].min() > 0


def test_two_classes_are_scikit_learns_at_twice_the_c() -> None:
    features, labels = clips(60, 20, classes=2)
    x = coordinates(torch.from_numpy(features))
    found = fit(x, torch.from_numpy(labels), torch.ones(1, 60, dtype=torch.bool), 2, 0.05, FINAL)
    expected = plain(features, labels, 0.1).predict_proba(features)
    np.testing.assert_allclose(softmax(found.logits(x.clips))[0], expected, atol=2e-3)


def test_c_is_what_scikit_learn_and_the_same_folds_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = clips(120, 30)
    features = (features - features.mean(axis=0)) / features.std(axis=0)
    monkeypatch.setattr(module, "PATIENCE", len(STRENGTHS))
    chosen = choose(coordinates(torch.from_numpy(features)), labels, [""] * 120, [0, 1, 0], 4)
    assert chosen[0] == chosen[2]
    for seed, (c, score) in enumerate(chosen[:2]):
        split = inner_split(labels, [""] * 120, INNER_FOLDS, seed)
        expected = []
        for strength in STRENGTHS:
            called = np.zeros(120, int)
            for fold in range(INNER_FOLDS):
                model = plain(features[split != fold], labels[split != fold], strength)
                called[split == fold] = model.predict(features[split == fold])
            expected.append(float(metrics.waf(labels, called, 4)))
        assert score == pytest.approx(max(expected), abs=1.7)  # two clips near a border
        assert expected[STRENGTHS.index(c)] == pytest.approx(max(expected), abs=1.7)


def test_the_search_stops_where_greater_c_are_no_better(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def counting(x, labels, used, classes, c, gradient, start) -> Solution:
        asked.append(c)
        return fit(x, labels, used, classes, c, gradient, start)

    monkeypatch.setattr(module, "fit", counting)
    features, labels = clips(100, 200)
    [(c, _)] = choose(coordinates(torch.from_numpy(features)), labels, [""] * 100, [3], 4)
    assert asked == list(STRENGTHS[: len(asked)]) and len(asked) == min(STRENGTHS.index(c) + 3, len(STRENGTHS))


def test_inner_folds_keep_groups_together() -> None:
    labels = np.arange(60) % 3
    groups = [f"g{i // 10}" for i in range(60)]
    split = inner_split(labels, groups, 5, seed=0)
    assert set(split) == set(range(5)) and all(len(set(split[i:i + 10])) == 1 for i in range(0, 60, 10))
    assert len(set(inner_split(labels, groups, 10, seed=0))) == 6  # as many as there are groups
    assert len(set(inner_split(labels, ["one"] * 60, 5, seed=0))) == 5
    assert len(set(inner_split(np.array([0, 1, 2]), [""] * 3, 5, seed=0))) == 3


def found(inputs: Inputs, groups: np.ndarray | None = None, **changes: Any) -> Baselines:
    groups = np.full(len(inputs.clip_ids), "") if groups is None else groups
    return baselines(inputs, recipe(seeds=[0, 1], **changes), groups)


def test_predictions_are_scikit_learns_on_the_concatenated_standardised_features() -> None:
    inputs, _ = make_inputs()
    result = found(inputs)
    own, others = result.logistic_regression
    assert own.shape == (2, 60, 4) and others.shape == (2, 44, 4)
    expected_others = np.zeros(others.shape)
    for fold in range(inputs.fold_count):
        train = (inputs.folds >= 0) & (inputs.folds != fold)
        columns = []
        for modality in inputs.modalities:
            raw, there = raw_features(modality, fold), modality.present.numpy()
            seen = raw[train & there]
            columns.append((raw - seen.mean(axis=0)) / seen.std(axis=0) * there[:, None])
        x = np.concatenate(columns, axis=1)
        for s in range(2):
            model = plain(x[train], inputs.labels[train], result.chosen[s][fold])
            valid = inputs.folds[inputs.labelled] == fold
            np.testing.assert_allclose(own[s][valid], model.predict_proba(x[inputs.folds == fold]), atol=3e-3)
            expected_others[s] += model.predict_proba(x[inputs.others]) / inputs.fold_count
        shares = np.bincount(inputs.labels[train], minlength=4) / train.sum()
        np.testing.assert_allclose(result.majority[0][:, valid], np.tile(shares, (2, valid.sum(), 1)), rtol=1e-6)
    np.testing.assert_allclose(others, expected_others, atol=3e-3)


def test_a_fold_that_is_trained_without_a_class_gives_it_no_probability() -> None:
    inputs, truth = make_inputs()
    labelled = inputs.labels >= 0
    folds = np.where(labelled & (truth == 3), 0, np.where(labelled, 1 + np.arange(len(truth)) % 2, -1))
    inputs = replace(inputs, folds=folds)
    groups = np.where(truth % 2 == 0, "even", "odd")
    result = found(inputs, groups)
    without = folds[inputs.labelled] == 0
    for own, others in (result.majority, result.logistic_regression):
        assert not own[:, without, 3].any() and own[:, ~without, 3].min() > 0
        torch.testing.assert_close(own.sum(dim=-1), torch.ones(own.shape[:-1]))
        torch.testing.assert_close(others.sum(dim=-1), torch.ones(others.shape[:-1]))


def test_features_standardised_by_group_are_those_of_the_fusion() -> None:
    """Groups that lie far apart hide the classes from features by fold, and not from those by group."""
    inputs, truth = make_inputs(noise=0.5)
    groups = np.where(np.arange(len(truth)) % 3 > 0, "a", "b")
    moved = []
    for modality in inputs.modalities:
        apart = torch.from_numpy(20.0 * (groups == "a")).float()[:, None] * modality.present[:, None]
        moved.append(replace(modality, matrix=modality.matrix * 0.02 + apart))
    inputs = replace(inputs, modalities=tuple(moved), groups=number_groups(groups.tolist()))
    right = {kind: (found(inputs, groups, standardize=kind).logistic_regression[1].argmax(-1).numpy()
                    == truth[inputs.others]).mean() for kind in ("fold", "group")}
    assert right["group"] > 0.8 and right["group"] > right["fold"]


def test_the_stage_writes_predictions_clips_and_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    inputs, truth = make_inputs()
    write_run(tmp_path, inputs)
    write_params(recipe(), rounds())
    stage.main()
    tensors = load_file("models/baselines/predictions.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        f"{name}.{part}": (2, size, len(LABELS)) for name in ("majority", "logistic_regression")
        for part, size in (("out_of_fold", 60), ("others", 44))}
    assert all(tensor.dtype == np.float32 for tensor in tensors.values())
    written = pd.read_csv("models/baselines/clips.csv")
    rows = [*inputs.labelled, *inputs.others]
    assert written["clip_id"].tolist() == [inputs.clip_ids[row] for row in rows]
    called = tensors["logistic_regression.others"].argmax(-1)
    assert (called == truth[inputs.others]).mean() > 0.8 > (tensors["majority.others"].argmax(-1)
                                                            == truth[inputs.others]).mean()
    chosen = json.loads(Path("models/baselines/chosen.json").read_text())
    assert [(row["seed"], row["fold"]) for row in chosen] == [(seed, fold) for seed in (0, 7) for fold in range(3)]
    assert {row["C"] for row in chosen} <= set(STRENGTHS) and all(0 < row["inner_waf"] <= 100 for row in chosen)
