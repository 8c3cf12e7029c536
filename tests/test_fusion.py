"""The fusion: each model alone and among others, beside a plain loop; architectures and dropout; standardisation."""

import dataclasses
import threading

import numpy as np
import pytest
import torch
from fusion_data import LABELS, make_inputs, raw_features, recipe, tiled
from sklearn.metrics import f1_score
from sklearn.utils.class_weight import compute_class_weight

from stages import fusion
from stages.fusion import ensemble as ensemble_module
from stages.fusion import training
from stages.fusion.architectures import Architecture, Dropout, keep_modalities
from stages.fusion.features import Standardised, fold_statistics
from stages.fusion.training import Training, fit, train

pytestmark = pytest.mark.usefixtures("one_thread")


def feeds_of(inputs, **changes):
    statistics = fold_statistics(inputs, recipe(**changes))
    return [Standardised(inputs, statistics, fold) for fold in range(3)]


# ---------------------------------------------------------------- models never meet


@pytest.mark.parametrize(("cores", "changes"), [(1, {}), (2, {}), (100, {}), (2, {"feature_noise": 0.2, "mixup": 0.4})])
def test_a_model_among_others_equals_itself_alone(cores, changes, monkeypatch):
    monkeypatch.setattr(ensemble_module, "cores", lambda: cores)
    p = recipe(epochs=4, **changes)
    inputs, _ = make_inputs()  # folds of unequal size: some models have fewer batches than others
    labels, feeds = tiled(inputs, p), feeds_of(inputs)
    models = list(np.ndindex(2, 3))
    together = fit(inputs, p, labels, feeds, models, "test")
    assert len({len(model.rows) for model in together}) > 1
    for model, (s, fold) in zip(together, models, strict=True):
        torch.rand(17)  # nor does torch's own generator matter
        alone = Training(inputs, p, labels[s], feeds[fold], p.seeds[s], fold)
        for _ in range(p.epochs):
            alone.run_epoch()
        assert all(torch.equal(model.kept.weights[name], alone.kept.weights[name]) for name in alone.kept.weights)
        assert torch.equal(model.softmax, alone.softmax) and model.curve == alone.curve


def plain_training(inputs, p, seed, fold):
    """One model trained as a textbook does it, on features standardised by numpy in float64."""
    initial, order, dropout = (int(word) for word in np.random.SeedSequence(seed, spawn_key=(fold,)).generate_state(3))
    torch.manual_seed(initial)
    model = training.architecture_of(inputs, p).build(torch.Generator().manual_seed(dropout))
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[p.optimizer]
    optimizer, weights = kind(model.parameters(), lr=p.learning_rate, weight_decay=p.weight_decay), None
    learn = np.flatnonzero((inputs.folds >= 0) & (inputs.folds != fold))
    if p.class_weights == "balanced":
        balance = compute_class_weight("balanced", classes=np.arange(len(LABELS)), y=inputs.labels[learn])
        weights = torch.tensor(balance, dtype=torch.float32)
    valid, present, features = np.flatnonzero(inputs.folds == fold), inputs.present.numpy(), []
    for i, modality in enumerate(inputs.modalities):
        raw = raw_features(modality, fold)
        seen = raw[learn[present[learn, i]]]
        values = (raw - seen.mean(axis=0)) / seen.std(axis=0) * present[:, i, None]
        features.append(torch.tensor(values, dtype=torch.float32))
    generator, history = torch.Generator().manual_seed(order), []
    for _ in range(p.epochs):
        shuffled = learn[torch.randperm(len(learn), generator=generator)]
        model.train()
        for start in range(0, len(shuffled), p.batch_size):
            rows = shuffled[start : start + p.batch_size]
            logits, _ = model([x[rows] for x in features], inputs.present[rows])
            loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(inputs.labels)[rows], weights,
                                                     label_smoothing=p.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            history.append(model.eval()([x[valid] for x in features], inputs.present[valid])[0].softmax(dim=1))
    return history


@pytest.mark.parametrize("changes", [
    {}, {"weight_decay": 0.1, "keep_one": False, "modality_dropout": 0.6},
    {"weight_decay": 0.5, "optimizer": "adamw", "class_weights": "balanced", "label_smoothing": 0.2},
])
def test_equals_a_plain_torch_loop(changes):
    p = recipe(epochs=4, **changes)
    inputs, _ = make_inputs()
    outputs = train(inputs, p, tiled(inputs, p), "test")
    for s, fold in np.ndindex(2, 3):
        history = plain_training(inputs, p, p.seeds[s], fold)
        rows = np.flatnonzero(inputs.folds[inputs.labelled] == fold)
        assert (outputs.out_of_fold_last[s, rows] - history[-1]).abs().max() < 1e-5
        best = outputs.curves[s, fold, :, 2].argmax()  # the first of equals
        assert (outputs.out_of_fold_best[s, rows] - history[best]).abs().max() < 1e-5


def test_seeds_and_folds_differ_in_weights_order_and_dropout():
    p = recipe(learning_rate=1e-9)
    inputs, _ = make_inputs()
    outputs = train(inputs, p, tiled(inputs, p), "test")
    weights = outputs.ensemble.weights["classifier.weight"].flatten(0, 1)
    assert len({row.numpy().tobytes() for row in weights}) == 6
    feed = feeds_of(inputs)[0]
    one, other = (Training(inputs, p, inputs.labels, feed, seed, 0) for seed in (0, 7))
    orders = [torch.randperm(40, generator=model.order).tolist() for model in (one, other)]
    x = torch.ones(1, 64)
    masks = [model.model.attention.dropout(x).tolist() for model in (one, other)]
    assert orders[0] != orders[1] and masks[0] != masks[1]


def test_best_epoch_is_the_first_of_equals_and_its_weights_are_kept():
    p = recipe(epochs=12, learning_rate=0.01)
    inputs, _ = make_inputs()
    feed = feeds_of(inputs)[1]
    model, history = Training(inputs, p, inputs.labels, feed, 0, 1), []
    for _ in range(p.epochs):
        model.run_epoch()
        weights = {name: values.clone() for name, values in model.model.state_dict().items()}
        actual, called = inputs.labels[model.valid], model.softmax.argmax(dim=1)
        waf = 100 * f1_score(actual, called, average="weighted", zero_division=0)
        loss = float(torch.nn.functional.nll_loss(model.softmax.log(), torch.from_numpy(actual)))
        assert model.curve[-1][1:] == pytest.approx((loss, waf), rel=1e-4)
        history.append((waf, weights, model.softmax))
    waf, weights, softmax = max(history, key=lambda epoch: epoch[0])  # the first of equals
    assert sum(epoch[0] == waf for epoch in history) > 1  # there are equals
    assert model.best_waf == pytest.approx(waf) and torch.equal(model.best_softmax, softmax)
    assert all(torch.equal(model.kept.weights[name], values) for name, values in weights.items())


def test_a_model_that_fails_ends_the_others(monkeypatch):
    monkeypatch.setattr(ensemble_module, "cores", lambda: 2)
    epochs, failed, real = [], threading.Event(), Training._validate

    def broken(self):
        epochs.append(threading.get_ident())
        if len(epochs) == 1:
            failed.set()
            raise ArithmeticError("the first model")
        failed.wait()
        return real(self)

    monkeypatch.setattr(Training, "_validate", broken)
    p = recipe(epochs=200)
    inputs, _ = make_inputs()
    with pytest.raises(ArithmeticError, match="the first model"):
        fit(inputs, p, tiled(inputs, p), feeds_of(inputs), list(np.ndindex(2, 3)), "test")
    assert len(epochs) < 6 * p.epochs / 2


# ---------------------------------------------------------------- the module and its dropout


def attention(generator=None, **changes):
    small = {"dropout": 0.3, "modality_dropout": 0.3, "keep_one": True, **changes}
    architecture = Architecture("attention", ("a", "b", "c"), (40, 30, 20), 4, 8, **small)
    return architecture.build(generator or torch.Generator().manual_seed(5))


def clips(count):
    return [1 + torch.rand(count, width) for width in (40, 30, 20)], torch.ones(count, 3, dtype=torch.bool)


def encoded(model, features, present):
    """What the encoders get to see, by modality, in training mode."""
    seen = []
    hooks = [e.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for e in model.encoders]
    model.train()(features, present)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("p", [0.15, 0.3, 0.5])
def test_modality_dropout_zeroes_whole_modalities_at_its_rate(p):
    features, present = clips(20_000)
    seen = encoded(attention(modality_dropout=p, keep_one=False), features, present)
    kept = torch.stack([x.any(dim=1) for x in seen], dim=1)
    for before, after, keep in zip(features, seen, kept.T, strict=True):
        assert torch.equal(after[keep], before[keep])  # nothing is scaled up for a dropped modality
    assert (1 - kept.float().mean(dim=0)).tolist() == pytest.approx([p] * 3, abs=0.015)
    assert torch.corrcoef(kept.T.double()).fill_diagonal_(0).abs().max() < 0.03  # independent of each other
    assert (~kept).all(dim=1).double().mean() == pytest.approx(p**3, abs=0.01)


def test_keep_one_is_drawing_again():
    present = torch.tensor([True, False, True, True]).expand(60_000, 4)
    architecture = dataclasses.replace(attention().architecture, modality_dropout=0.6)
    keep = keep_modalities(present, architecture, torch.Generator().manual_seed(1))
    assert (keep & present[0]).any(dim=1).all()
    generator = np.random.default_rng(0)
    again = generator.random((200_000, 4)) >= 0.6
    again = again[(again & present[0].numpy()).any(axis=1)]  # rejection: the definition
    patterns = 2 ** np.array([0, 2, 3])
    ours = np.bincount(keep.numpy()[:, [0, 2, 3]] @ patterns, minlength=14) / len(keep)
    expected = np.bincount(again[:, [0, 2, 3]] @ patterns, minlength=14) / len(again)
    assert np.abs(ours - expected).max() < 0.01


@pytest.mark.parametrize("p", [0.0, 1e-6, 0.25, 0.5, 0.9])
def test_dropout_rate_scale_and_independence(p):
    dropout, x = Dropout(p, torch.Generator().manual_seed(3)).train(), 1 + torch.rand(300, 1001)
    first, second = dropout(x), dropout(x)
    kept = first != 0
    torch.testing.assert_close(first[kept], x[kept] / (1 - p))
    assert (~kept).float().mean() == pytest.approx(p, abs=0.003)
    columns = torch.stack([kept, kept.roll(1, dims=1), kept.roll(4, dims=1), second != 0]).flatten(1).double()
    if p > 0.1:
        assert torch.corrcoef(columns).fill_diagonal_(0).abs().max() < 0.01
    assert torch.equal(dropout.eval()(x), x)


def test_dropout_stands_before_every_encoder_and_gradients_pass_it():
    model = attention(dropout=0.5, modality_dropout=0.0)
    features, present = clips(64)
    model.train()
    before, _ = model(features, present)
    after, scores = model(features, present)
    assert not torch.equal(before, after) and scores.shape == (64, 3)
    after.sum().backward()
    assert all(q.grad is not None and q.grad.abs().sum() > 0 for q in model.parameters())
    found = [m for m in model.modules() if isinstance(m, Dropout)]
    assert len(found) == 4 and all(m.p == 0.5 and m.generator is model.generator for m in found)


# ---------------------------------------------------------------- standardisation and prediction


def test_evaluation_never_drops():
    p = recipe(dropout=0.5, modality_dropout=0.9)
    inputs, _ = make_inputs(absent=0.0)
    outputs = train(inputs, p, tiled(inputs, p), "test")
    again = outputs.ensemble.predict(inputs, inputs.labelled)
    assert torch.equal(again, outputs.ensemble.predict(inputs, inputs.labelled))
    for i, row in enumerate(inputs.labelled):  # training's own evaluation and predict agree
        own = again[:, inputs.folds[row], i]
        assert (own - outputs.out_of_fold_best[:, i]).abs().max() < 1e-5


def test_prediction_is_the_same_on_any_number_of_cores(monkeypatch):
    p = recipe(epochs=1)
    inputs, _ = make_inputs()
    monkeypatch.setattr(ensemble_module, "PREDICT_ROWS", 7)
    ensemble, found = train(inputs, p, tiled(inputs, p), "test").ensemble, []
    for count in (1, 3):
        monkeypatch.setattr(ensemble_module, "cores", lambda count=count: count)
        found.append(ensemble.predict_with_attention(inputs, inputs.others))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert not found[0][1].isnan().any()


CONCATENATION = """
import torch
from torch import nn
from stages.fusion.architectures import Dropout

class Model(nn.Module):
    def __init__(self, architecture, generator=None):
        super().__init__()
        self.dropout = Dropout(architecture.dropout, generator)
        self.linear = nn.Linear(sum(architecture.dimensions), architecture.labels)

    def forward(self, features, present):
        return self.linear(self.dropout(torch.cat(features, dim=1))), None
"""


def test_another_architecture_is_one_file_and_its_name(tmp_path, monkeypatch):
    (tmp_path / "concatenation.py").write_text(CONCATENATION)
    monkeypatch.setattr("stages.fusion.__path__", [*fusion.__path__, str(tmp_path)])
    p = recipe(architecture="concatenation", epochs=20, learning_rate=0.03)
    inputs, truth = make_inputs()
    outputs = train(inputs, p, tiled(inputs, p), "test")
    called = outputs.votes.mean(dim=(0, 1)).argmax(dim=1).numpy()
    assert (called == truth[inputs.others]).mean() > 0.8
    outputs.ensemble.save(tmp_path / "models")
    loaded = ensemble_module.load_ensemble(tmp_path / "models")
    softmax, attention = loaded.predict_with_attention(inputs, inputs.others)
    assert torch.equal(softmax, outputs.votes)
    assert attention.shape == (2, 3, len(inputs.others), 3) and attention.isnan().all()  # it has none


def test_standardisation_sees_the_training_part_only():
    inputs, _ = make_inputs()
    before = fold_statistics(inputs, recipe())
    for modality in inputs.modalities:
        modality.matrix[:, inputs.folds == 0] += 100 * modality.present[inputs.folds == 0, None]
    after = fold_statistics(inputs, recipe())
    for name, (mean, scale) in before.items():
        assert torch.equal(mean[0], after[name][0][0]) and torch.equal(scale[0], after[name][1][0])
        assert not torch.equal(mean[1], after[name][0][1])


def test_standardised_inputs_have_mean_0_and_deviation_1_over_present_clips():
    inputs, _ = make_inputs()
    rows = np.flatnonzero((inputs.folds >= 0) & (inputs.folds != 0))
    features, present = feeds_of(inputs)[0](torch.from_numpy(rows))
    assert torch.equal(present, inputs.present[rows]) and not present.all()
    for i, x in enumerate(features):
        assert not x[~present[:, i]].any()  # absent is zeros, the average clip
        seen = x[present[:, i]]
        assert seen.mean(dim=0).abs().max() < 1e-5
        assert (seen.std(dim=0, correction=0) - 1).abs().max() < 1e-4


def test_without_standardize_inputs_are_raw():
    inputs, _ = make_inputs()
    rows = inputs.labelled[:16]
    for fold in (0, 2):
        features, _ = feeds_of(inputs, standardize="none")[fold](torch.from_numpy(rows))
        for i, x in enumerate(features):
            expected = raw_features(inputs.modalities[i], fold)[rows] * inputs.present[rows, i, None].numpy()
            np.testing.assert_allclose(x, expected, atol=1e-5)


def test_constant_dimensions_do_no_harm():
    p = recipe()
    inputs, _ = make_inputs()
    for modality in inputs.modalities:
        modality.matrix[:, inputs.labelled, 0] = 0
    modality.centre[:, 0] = 0  # one of them zeros throughout
    outputs = train(inputs, p, tiled(inputs, p), "test")
    assert torch.isfinite(outputs.votes).all()
    for modality, (mean, scale) in zip(inputs.modalities, outputs.ensemble.statistics.values(), strict=True):
        expected = torch.where(modality.centre[:, 0] == 0, 1, modality.centre[:, 0].abs())
        torch.testing.assert_close(scale[:, 0], expected.expand(3))
        torch.testing.assert_close(mean[:, 0], modality.centre[:, 0].expand(3))


def test_removed_modality_is_an_absent_one():
    p = recipe()
    inputs, _ = make_inputs()
    ensemble = train(inputs, p, tiled(inputs, p), "test").ensemble
    without = ensemble.predict(inputs, inputs.others, frozenset({"face"}))
    blind = [
        dataclasses.replace(m, present=torch.zeros_like(m.present), matrix=torch.zeros_like(m.matrix))
        if m.name == "face"
        else m
        for m in inputs.modalities
    ]
    absent = ensemble.predict(dataclasses.replace(inputs, modalities=tuple(blind)), inputs.others)
    assert (without - absent).abs().max() < 1e-6
    assert (without - ensemble.predict(inputs, inputs.others)).abs().max() > 0.01
    nothing = ensemble.predict(inputs, inputs.others, frozenset({"sound", "face", "prompt"}))
    assert (nothing - nothing[:, :, :1]).abs().max() < 1e-6  # knows nothing: the same answer for every clip


def test_prediction_streams_in_chunks(monkeypatch):
    p = recipe()
    inputs, _ = make_inputs()
    ensemble = train(inputs, p, tiled(inputs, p), "test").ensemble
    whole = ensemble.predict(inputs, inputs.others)
    monkeypatch.setattr(ensemble_module, "PREDICT_ROWS", 7)
    assert (ensemble.predict(inputs, inputs.others) - whole).abs().max() < 1e-6
    assert ensemble.predict(inputs, inputs.others[:0]).shape == (2, 3, 0, len(LABELS))


# ---------------------------------------------------------------- what it learns


def test_learns_and_every_modality_helps():
    p = recipe(epochs=25, batch_size=16, dropout=0.1)
    inputs, truth = make_inputs(labelled=120, unlabelled=60, noise=1.6)

    def waf(chosen):
        votes = train(chosen, p, tiled(chosen, p), "test").votes.mean(dim=1)
        return np.mean([100 * f1_score(truth[inputs.others], v.argmax(dim=1), average="weighted") for v in votes])

    together = waf(inputs)
    alone = [waf(inputs.select([name])) for name in p.modalities]
    assert together > 85
    assert all(30 < figure < together for figure in alone), alone


def test_two_runs_give_the_same_bits():
    p = recipe()
    inputs, _ = make_inputs()
    first, second = (train(inputs, p, tiled(inputs, p), "test") for _ in range(2))
    assert all(torch.equal(v, second.ensemble.weights[name]) for name, v in first.ensemble.weights.items())
    assert torch.equal(first.votes, second.votes) and torch.equal(first.curves, second.curves)
