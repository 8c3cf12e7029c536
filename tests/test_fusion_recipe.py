"""What a model learns from besides the clips as they are: noise, mixtures, weights by class."""

import numpy as np
import pytest
import torch
from fusion_data import make_inputs, recipe, tiled
from torch.nn.functional import cross_entropy, one_hot

from stages.fusion.features import Standardised, fold_statistics
from stages.fusion.training import Training, train

pytestmark = pytest.mark.usefixtures("one_thread")


def one_model(inputs, **changes):
    """A model of fold 0 without dropout, and its feed."""
    p = recipe(dropout=0.0, modality_dropout=0.0, **changes)
    feed = Standardised(inputs, fold_statistics(inputs, p), 0)
    return Training(inputs, p, inputs.labels, feed, 3, 0), feed


def seen_by(model, feed, rows):
    """What the module is given for these rows in training, and the loss."""
    given = []
    hook = model.model.register_forward_pre_hook(lambda _, inputs: given.append(inputs))
    loss = model.train_loss(*feed(rows), model.classes[rows])
    hook.remove()
    return *given[0], loss


def test_noise_has_its_deviation_and_spares_absent_modalities():
    inputs, _ = make_inputs(labelled=2000, absent=0.3)
    model, feed = one_model(inputs, feature_noise=0.25)
    clean, present = feed(model.rows)
    first, shown, _ = seen_by(model, feed, model.rows)
    second, _, _ = seen_by(model, feed, model.rows)
    assert torch.equal(shown, present) and not present.all()
    for i, (x, y, again) in enumerate(zip(clean, first, second, strict=True)):
        here = present[:, i]
        assert not y[~here].any()
        noise = (y - x)[here]
        assert noise.std() == pytest.approx(0.25, rel=0.05) and abs(noise.mean()) < 0.01
        assert not torch.equal(y[here], again[here])  # drawn anew every time
    assert all(torch.equal(x, y) for x, y in zip(feed(model.rows)[0], clean, strict=True))  # left as they were


def test_validation_and_prediction_see_no_noise_or_mixture():
    inputs, _ = make_inputs()
    p = recipe(feature_noise=2.0, mixup=1.0)
    outputs = train(inputs, p, tiled(inputs, p), "test")
    again = outputs.ensemble.predict(inputs, inputs.labelled)
    for i, row in enumerate(inputs.labelled):
        assert (again[:, inputs.folds[row], i] - outputs.out_of_fold[:, i]).abs().max() < 1e-5


def test_mixup_mixes_features_presence_and_labels_by_one_share():
    inputs, _ = make_inputs(absent=0.3)
    model, feed = one_model(inputs, mixup=1.0)
    rows = model.rows[:16]
    draws = np.random.default_rng(int(np.random.SeedSequence(3, spawn_key=(0,)).generate_state(5)[4]))
    share, other = draws.beta(1.0, 1.0), draws.permutation(16)
    clean, present = feed(rows)
    features, shown, loss = seen_by(model, feed, rows)
    for x, y in zip(clean, features, strict=True):
        torch.testing.assert_close(y, share * x + (1 - share) * x[other], rtol=1e-4, atol=1e-5)
    assert torch.equal(shown, present | present[other])
    classes = one_hot(model.classes[rows], 4).double()
    with torch.no_grad():
        logits = model.model(features, shown)[0].double()
        expected = cross_entropy(logits, share * classes + (1 - share) * classes[other])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_small_alphas_hardly_mix():
    inputs, _ = make_inputs()
    model, feed = one_model(inputs, mixup=0.01)
    shares = [model.mixup[1].beta(0.01, 0.01) for _ in range(200)]
    assert np.mean([min(s, 1 - s) for s in shares]) < 0.02
    assert 0.3 < np.mean(shares) < 0.7  # the clip or the other, as often


def test_balanced_weights_call_rare_classes_more_often():
    inputs, _ = make_inputs(labelled=300, unlabelled=200, noise=3.0)
    rare = np.flatnonzero(inputs.labels == 2)[10:]  # all but ten of a class become unlabelled
    for array, value in ((inputs.splits, "unlabelled"), (inputs.labels, -1), (inputs.folds, -1)):
        array[rare] = value
    called = {}
    for weights in ("none", "balanced"):
        p = recipe(epochs=8, class_weights=weights)
        votes = train(inputs, p, tiled(inputs, p), "test").votes.mean(dim=(0, 1))
        called[weights] = int((votes.argmax(dim=1) == 2).sum())
    assert called["balanced"] > 3 * called["none"] + 10


def test_label_smoothing_makes_it_less_sure():
    inputs, _ = make_inputs()
    confidence = []
    for smoothing in (0.0, 0.3):
        p = recipe(epochs=20, label_smoothing=smoothing, dropout=0.0)
        confidence.append(float(train(inputs, p, tiled(inputs, p), "test").votes.max(dim=-1).values.mean()))
    assert confidence[1] < confidence[0] - 0.05
