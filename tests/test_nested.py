"""Nested cross-validation: what an outer fold's models may see, and what comes out."""

import dataclasses

import numpy as np
import pytest
import torch
from fusion_data import LABELS, make_inputs, recipe
from sklearn.metrics import f1_score

from stages.engine.errors import PipelineError
from stages.fusion.features import Inputs, Modality
from stages.fusion.nested import nested, without_fold
from stages.fusion.training import train

pytestmark = pytest.mark.usefixtures("one_thread")


def rows_of(inputs: Inputs, fold: int) -> np.ndarray:
    return np.flatnonzero(inputs.folds[inputs.labelled] == fold)


def test_equals_a_corpus_without_the_outer_fold():
    """As if the clips of fold 1 had never been labelled and the others were all there is, with new row numbers."""
    p, (inputs, _) = recipe(epoch="common"), make_inputs(labelled=80, folds=4)
    found = nested(inputs, p)
    outer = inputs.folds == 1
    kept = np.concatenate([np.flatnonzero((inputs.folds >= 0) & ~outer), np.flatnonzero(outer)])
    modalities = []
    for m in inputs.modalities:
        own = slice(1, 2) if len(m.matrix) > 1 else slice(None)
        modalities.append(Modality(m.name, m.matrix[own, kept], m.centre[own], m.spread[own], m.present[kept]))
    inner = inputs.folds[kept] != 1
    small = Inputs(
        [inputs.clip_ids[row] for row in kept],
        np.where(inner, "labelled", "test"),
        np.where(inner, inputs.labels[kept], -1),
        np.where(inner, np.array([0, -1, 1, 2])[inputs.folds[kept]], -1),
        LABELS,
        tuple(modalities),
    )
    outputs = train(small, p, np.tile(small.labels, (2, 1)), "test")
    assert torch.equal(found.probabilities[:, rows_of(inputs, 1)], outputs.votes.mean(dim=1))
    assert found.inner.shape == (2, 4)
    for s in range(2):
        called, actual = outputs.out_of_fold[s].argmax(dim=1).numpy(), small.labels[small.labelled]
        folds = small.folds[small.labelled]
        scores = [f1_score(actual[folds == f], called[folds == f], average="weighted", labels=range(4), zero_division=0)
                  for f in range(3)]
        assert found.inner[s, 1] == pytest.approx(100 * np.mean(scores))


def test_outer_labels_change_nothing_in_what_predicts_them():
    p, (inputs, _) = recipe(), make_inputs()
    before = nested(inputs, p)
    for fold in range(3):
        labels = inputs.labels.copy()
        labels[inputs.folds == fold] = (labels[inputs.folds == fold] + 1) % len(LABELS)
        changed = dataclasses.replace(inputs, labels=labels)
        models = [train(without_fold(i, fold), p, np.tile(without_fold(i, fold).labels, (2, 1)), "test").ensemble
                  for i in (inputs, changed)]
        assert all(torch.equal(v, models[1].weights[name]) for name, v in models[0].weights.items())
        after = nested(changed, p)
        rows, others = rows_of(inputs, fold), np.flatnonzero(inputs.folds[inputs.labelled] != fold)
        assert torch.equal(after.probabilities[:, rows], before.probabilities[:, rows])
        assert (after.inner[:, fold] == before.inner[:, fold]).all()
        assert not torch.equal(after.probabilities[:, others], before.probabilities[:, others])  # who learn from them


def test_outer_clips_use_features_that_never_saw_them():
    inputs, _ = make_inputs()
    for fold in range(3):
        part = without_fold(inputs, fold)
        prompt = part.modalities[2]
        assert torch.equal(prompt.matrix, inputs.modalities[2].matrix[fold : fold + 1])
        assert prompt.matrix.data_ptr() == inputs.modalities[2].matrix[fold].data_ptr()  # shared, not copied
        assert part.others.tolist() == np.flatnonzero(inputs.folds == fold).tolist()
        assert set(part.folds[part.labelled]) == {0, 1} and (part.labels[part.others] == -1).all()
        assert not set(part.labelled) & set(part.others)


def test_learns_and_tells_a_good_recipe_from_a_bad_one():
    inputs, _ = make_inputs(labelled=120)
    good, bad = recipe(epochs=20, dropout=0.1, learning_rate=0.01), recipe(epochs=1)
    scores = [nested(inputs, p) for p in (good, bad)]
    assert scores[0].outer(inputs).min() > 70 > scores[1].outer(inputs).max()
    assert scores[0].inner.mean() > scores[1].inner.mean() + 10
    assert scores[0].outer(inputs).shape == (2,)


def test_two_folds_are_too_few():
    with pytest.raises(PipelineError, match=r"folds.count: found 2, expected at least 3"):
        nested(make_inputs(folds=2)[0], recipe())
