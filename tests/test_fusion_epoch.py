"""Which epoch's models the ensemble is made of: each fold's best, one that all folds of a seed share, the last."""

import json

import numpy as np
import pytest
import torch
from fusion_data import make_inputs, recipe, rounds, tiled

from stages.evaluation import metrics
from stages.fusion import ensemble as ensemble_module
from stages.fusion.ensemble import curve_table, load_outputs, save_outputs
from stages.fusion.features import Standardised, fold_statistics
from stages.fusion.self_training import self_train
from stages.fusion.training import Training, share_epoch, train

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = (2, 3)


def make(**changes):
    p = recipe(epochs=10, learning_rate=0.01, **changes)
    inputs, _ = make_inputs(noise=2.5)
    return inputs, p, tiled(inputs, p)


def trainings(inputs, p, labels):
    feeds = [Standardised(inputs, fold_statistics(inputs, p), fold) for fold in range(3)]
    return [Training(inputs, p, labels[s], feeds[fold], p.seeds[s], fold) for s, fold in np.ndindex(SHAPE)]


@pytest.fixture(scope="module")
def histories():
    """Per model, each alone, what it was like after every epoch: (weights, softmax of its validation part)."""
    found = []
    torch.set_num_threads(1)  # before one_thread, which is set up for every test
    inputs, p, labels = make()
    for model in trainings(inputs, p, labels):
        epochs = []
        for _ in range(p.epochs):
            model.run_epoch()
            epochs.append(({name: v.clone() for name, v in model.model.state_dict().items()}, model.softmax))
        found.append((model, epochs))
    return found


def expected_epochs(chosen, curves):
    waf = curves[..., 2].double().numpy()  # (S, F, epochs)
    if chosen == "best":
        return 1 + waf.argmax(axis=2)
    if chosen == "common":
        return 1 + np.repeat(waf.mean(axis=1).argmax(axis=1)[:, None], 3, axis=1)
    return np.full(SHAPE, waf.shape[2])


@pytest.mark.parametrize("cores", [1, 100])
@pytest.mark.parametrize("chosen", ["best", "common", "last"])
def test_models_are_those_of_the_chosen_epoch(chosen, cores, monkeypatch, tmp_path, histories):
    monkeypatch.setattr(ensemble_module, "cores", lambda: cores)
    inputs, p, labels = make(epoch=chosen)
    outputs = train(inputs, p, labels, "test")
    epochs = expected_epochs(chosen, outputs.curves)
    assert outputs.ensemble.epochs == epochs.tolist()
    position = {row: i for i, row in enumerate(inputs.labelled)}
    for (s, fold), (model, history) in zip(np.ndindex(SHAPE), histories, strict=True):
        weights, softmax = history[epochs[s, fold] - 1]
        assert all(torch.equal(outputs.ensemble.weights[name][s, fold], values) for name, values in weights.items())
        rows = [position[row] for row in model.valid.tolist()]
        assert torch.equal(outputs.out_of_fold[s, rows], softmax)
        assert torch.equal(outputs.out_of_fold_best[s, rows], model.best_softmax)
        assert torch.equal(outputs.out_of_fold_last[s, rows], history[-1][1])
    save_outputs(tmp_path / "m", inputs, outputs, curve_table(0, outputs))
    said = json.loads((tmp_path / "m/ensemble.json").read_text())["epoch"]
    assert said == {"chosen": chosen, "of_seed_and_fold": epochs.tolist()}
    assert load_outputs(tmp_path / "m").ensemble.epochs == epochs.tolist()


def test_the_three_differ_here():
    """Else the tests above would say little."""
    inputs, p, labels = make()
    curves = train(inputs, p, labels, "test").curves
    best, common, last = (expected_epochs(chosen, curves).tolist() for chosen in ("best", "common", "last"))
    assert best != common and common != last and common[0] != common[1]


def test_a_common_epoch_is_the_same_whichever_model_is_ahead():
    inputs, p, labels = make(epoch="common")
    expected = train(inputs, p, labels, "test").ensemble.epochs
    models = trainings(inputs, p, labels)
    for s in range(2):
        own = models[3 * s : 3 * s + 3]
        share_epoch(own)
        for model in own[::-1]:  # one after another, the last fold first
            for _ in range(p.epochs):
                model.run_epoch()
        assert [model.kept.epoch for model in own] == expected[s]
        assert not own[0].choice.pending and not own[0].choice.wafs


def test_models_in_step_keep_two_epochs_at_most():
    inputs, p, labels = make(epoch="common")
    own = trainings(inputs, p, labels)[:3]
    share_epoch(own)
    for _ in range(p.epochs):
        for model in own:
            assert len(own[0].choice.pending) <= 1  # the epoch under way, beside the one that is kept
            model.run_epoch()
        assert not own[0].choice.pending


def test_equal_epochs_give_the_earlier():
    inputs, p, labels = make(epoch="common")
    flat = p.model_copy(update={"learning_rate": 1e-12})  # every epoch calls the clips the same
    outputs = train(inputs, flat, labels, "test")
    assert len(np.unique(outputs.curves[0, 0, :, 2])) == 1 and outputs.ensemble.epochs == [[1, 1, 1]] * 2


def test_rounds_keep_their_own_epochs_when_resumed(tmp_path):
    inputs, p, labels = make(epoch="common")
    start = train(inputs, p, labels, "test")
    first, again = (list(self_train(inputs, p, rounds(), start, tmp_path)) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert one.outputs.ensemble.epochs == other.outputs.ensemble.epochs
        assert one.outputs.ensemble.epochs == expected_epochs("common", one.outputs.curves).tolist()
        assert torch.equal(one.outputs.out_of_fold, other.outputs.out_of_fold)
    assert first[1].outputs.ensemble.epochs != start.ensemble.epochs


def test_the_mean_over_folds_is_of_their_own_wafs():
    inputs, p, labels = make(epoch="common")
    outputs = train(inputs, p, labels, "test")
    actual, folds = inputs.labels[inputs.labelled], inputs.folds[inputs.labelled]
    waf = metrics.waf_by_fold(actual, outputs.out_of_fold.argmax(dim=-1), folds, len(inputs.label_names))
    assert waf == pytest.approx(outputs.curves[..., 2].mean(dim=1).max(dim=1).values.numpy(), abs=1e-4)
