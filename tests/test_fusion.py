"""The fusion: batched training against a plain loop over torch modules, dropout, standardisation."""

import dataclasses

import numpy as np
import pytest
import torch
from fusion_data import LABELS, make_inputs, raw_features, recipe, tiled
from sklearn.metrics import f1_score
from torch import nn

from stages.fusion import ensemble as ensemble_module
from stages.fusion import training
from stages.fusion.features import fold_statistics
from stages.fusion.masks import DROPOUT, INITIAL, ORDER, RandomBits, keep_modalities, stream, threshold
from stages.fusion.model import Architecture, initial_parameters
from stages.fusion.training import Feed, _word, batched_waf, fit, train

pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------- all at once = each alone


def test_all_at_once_equals_each_alone(monkeypatch):
    monkeypatch.setattr(training, "cores", lambda: 1)  # one batched model
    p = recipe(epochs=4)
    inputs, _ = make_inputs()
    labels, statistics = tiled(inputs, p), fold_statistics(inputs, p.standardize)
    models = list(np.ndindex(2, 3))
    steps = {-(-int((inputs.folds != fold)[inputs.labelled].sum()) // p.batch_size) for fold in range(3)}
    assert len(steps) > 1  # some models have fewer batches than others
    together = fit(inputs, p, labels, statistics, models, "test")
    for m, model in enumerate(models):
        alone = fit(inputs, p, labels, statistics, [model], "test")
        clips = int((inputs.folds == model[1]).sum())
        assert (together.parameters[m] - alone.parameters[0]).abs().max() < 1e-5
        for name in ("best", "last"):
            batched, single = getattr(together, name)[m, :clips], getattr(alone, name)[0, :clips]
            assert (batched - single).abs().max() < 1e-5
        torch.testing.assert_close(together.curves[m], alone.curves[0], rtol=1e-5, atol=1e-4)


class Encoder(nn.Module):
    def __init__(self, size, hidden):
        super().__init__()
        self.linear_1 = nn.Linear(size, hidden)
        self.linear_2 = nn.Linear(hidden, hidden)
        self.linear_3 = nn.Linear(hidden, hidden)

    def forward(self, x):
        return self.linear_3(self.linear_2(self.linear_1(x).relu()).relu()).relu()


class Plain(nn.Module):
    """The same model for one fold and seed in ordinary modules."""

    def __init__(self, modalities, hidden):
        super().__init__()
        self.encoders = nn.ModuleDict({m.name: Encoder(m.dimension, hidden) for m in modalities})
        self.attention = Encoder(len(modalities) * hidden, hidden)
        self.scores, self.classifier = nn.Linear(hidden, len(modalities)), nn.Linear(hidden, len(LABELS))

    def forward(self, clips, dropout=1.0):
        encodings = [encoder(x) for encoder, x in zip(self.encoders.values(), clips, strict=True)]
        weights = self.scores(self.attention(torch.cat(encodings, dim=1) * dropout))
        return self.classifier(sum(weights[:, i : i + 1] * e for i, e in enumerate(encodings)))


def plain_training(inputs, p, seed, fold):
    """One model trained by a plain loop, with the batches and the dropout that training.py documents."""
    torch.manual_seed(_word(stream(seed, fold, 0, INITIAL)))
    model = Plain(inputs.modalities, p.hidden)
    adam = torch.optim.Adam(model.parameters(), lr=p.learning_rate, weight_decay=p.weight_decay)
    learn = np.flatnonzero((inputs.folds >= 0) & (inputs.folds != fold))
    valid = np.flatnonzero(inputs.folds == fold)
    present, standardised = inputs.present.numpy(), []
    for i, modality in enumerate(inputs.modalities):
        raw = raw_features(modality, fold)
        seen = raw[learn[present[learn, i]]]
        values = (raw - seen.mean(axis=0)) / seen.std(axis=0) * present[:, i, None]
        standardised.append(torch.tensor(values, dtype=torch.float32))
    sizes = [p.batch_size * size for size in (3, *(m.dimension for m in inputs.modalities), 3 * p.hidden)]
    bits, history = RandomBits(1, sum(sizes), "cpu"), []
    for epoch in range(p.epochs):
        order = np.random.default_rng(stream(seed, fold, epoch, ORDER)).permutation(learn)
        keys = stream(seed, fold, epoch, DROPOUT).generate_state(-(-len(order) // p.batch_size), np.uint64)
        model.train()
        for start, key in zip(range(0, len(order), p.batch_size), keys.view(np.int64), strict=True):
            rows = torch.from_numpy(order[start : start + p.batch_size])
            drawn = bits.draw(torch.tensor([key]))[0].split(sizes)
            drawn = [d.view(p.batch_size, -1)[: len(rows)] for d in drawn]
            keep = keep_modalities(drawn[0], inputs.present[rows], p.modality_dropout, p.keep_one)
            limit, scale = threshold(1 - p.dropout), 1 / (1 - p.dropout)
            clips = [
                x[rows] * keep[:, i, None] * (drawn[i + 1] < limit) * scale for i, x in enumerate(standardised)
            ]
            adam.zero_grad()
            output = model(clips, (drawn[-1] < limit) * scale)
            nn.functional.cross_entropy(output, torch.from_numpy(inputs.labels)[rows]).backward()
            adam.step()
        with torch.no_grad():
            softmax = model([x[valid] for x in standardised]).softmax(dim=1)
        waf = 100 * f1_score(inputs.labels[valid], softmax.argmax(dim=1), average="weighted", zero_division=0)
        history.append((waf, softmax))
    return history


@pytest.mark.parametrize(
    "changes", [{}, {"weight_decay": 0.01, "keep_one": False, "modality_dropout": 0.6}, {"modality_dropout": 0.0}]
)
def test_equals_a_plain_torch_loop(changes):
    p = recipe(epochs=4, **changes)
    inputs, _ = make_inputs()
    outputs = train(inputs, p, tiled(inputs, p), "test")
    position = {row: i for i, row in enumerate(inputs.labelled)}
    for s, fold in np.ndindex(2, 3):
        history = plain_training(inputs, p, p.seeds[s], fold)
        rows = [position[row] for row in np.flatnonzero(inputs.folds == fold)]
        best = max(range(p.epochs), key=lambda epoch: history[epoch][0])  # the first of equals
        assert (outputs.out_of_fold_last[s, rows] - history[-1][1]).abs().max() < 1e-5
        assert (outputs.out_of_fold_best[s, rows] - history[best][1]).abs().max() < 1e-5
        assert outputs.curves[s, fold, :, 2].numpy() == pytest.approx([waf for waf, _ in history], abs=1e-3)


def test_initial_weights_are_torchs_own():
    architecture = Architecture(("a", "b"), (5, 3), 4, 6)
    flat = initial_parameters(architecture, [11, 12])
    torch.manual_seed(12)
    linear = nn.Linear(5, 4)
    ours = architecture.views(flat)
    torch.testing.assert_close(ours["encoders.a.linear_1.weight"][1], linear.weight.detach())
    torch.testing.assert_close(ours["encoders.a.linear_1.bias"][1], linear.bias.detach())
    assert torch.equal(initial_parameters(architecture, [12])[0], flat[1])


# ---------------------------------------------------------------- dropout


def uniform_bits(*shape):
    count = int(np.prod(shape))
    return RandomBits(1, count, "cpu").draw(torch.tensor([5])).view(shape).clone()


def test_random_bits_are_uniform_and_independent():
    bits = RandomBits(3, 100_001, "cpu").draw(torch.tensor([1, 2, -(2**62)])).double().clone()
    assert bits.shape == (3, 100_001)
    assert (bits.mean(dim=1) + 0.5).abs().max() < 200  # standard error 60
    assert (bits.std(dim=1) / (2**16 / 12**0.5) - 1).abs().max() < 0.01
    assert torch.corrcoef(torch.cat([bits, bits.roll(1, dims=1)])).fill_diagonal_(0).abs().max() < 0.015


@pytest.mark.parametrize("p", [0.15, 0.3, 0.5])
def test_modality_dropout_rate(p):
    keep = keep_modalities(uniform_bits(1, 20_000, 4), torch.ones(1, 20_000, 4, dtype=torch.bool), p, False)[0]
    assert (1 - keep.float().mean(dim=0)).tolist() == pytest.approx([p] * 4, abs=0.015)
    assert torch.corrcoef(keep.T.double()).fill_diagonal_(0).abs().max() < 0.03  # independent of each other
    assert (~keep).all(dim=1).double().mean() == pytest.approx(p**4, abs=0.01)


def test_keep_one_is_drawing_again():
    present = torch.tensor([True, False, True, True]).expand(1, 60_000, 4)
    keep = keep_modalities(uniform_bits(1, 60_000, 4), present, 0.6, True)[0]
    assert (keep & present[0]).any(dim=1).all()
    generator = np.random.default_rng(0)
    again = generator.random((200_000, 4)) >= 0.6
    again = again[(again & present[0, 0].numpy()).any(axis=1)]  # rejection: the definition
    patterns = 2 ** np.array([0, 2, 3])
    ours = np.bincount(keep.numpy()[:, [0, 2, 3]] @ patterns, minlength=14) / len(keep)
    expected = np.bincount(again[:, [0, 2, 3]] @ patterns, minlength=14) / len(again)
    assert np.abs(ours - expected).max() < 0.01


def make_feed(inputs, p, models=2):
    return Feed(inputs, p, fold_statistics(inputs, p.standardize), [0, 2][:models])


def test_dropped_and_absent_modalities_are_the_same_zeros():
    p = recipe(dropout=0.0, modality_dropout=0.5)
    inputs, _ = make_inputs()
    feed, rows = make_feed(inputs, p), torch.from_numpy(inputs.labelled[:16]).expand(2, 16)
    clean = [x.clone() for x in feed.clean(rows)]
    dropped, attention = feed.dropped(rows, torch.tensor([3, 4]))
    assert attention is None
    for i, (before, after) in enumerate(zip(clean, dropped, strict=True)):
        absent = ~inputs.present[rows, i]
        assert not before[absent].any() and not after[absent].any()
        gone = ~after.any(dim=-1)
        assert 0 < gone.sum() < gone.numel()
        assert torch.equal(after[~gone], before[~gone])  # nothing is scaled up for a dropped modality


def test_dropout_rate_and_scale():
    p = recipe(dropout=0.25, modality_dropout=0.0, hidden=256)
    inputs, _ = make_inputs(absent=0.0)
    feed, rows = make_feed(inputs, p), torch.from_numpy(inputs.labelled[:16]).expand(2, 16)
    clean = [x.clone() for x in feed.clean(rows)]
    gone = []
    for key in range(60):
        clips, attention = feed.dropped(rows, torch.tensor([key, -key]))
        for before, after in zip(clean, clips, strict=True):
            kept = after != 0
            torch.testing.assert_close(after[kept], before[kept] / 0.75)
            gone.append((~kept).float().mean().item())
        assert attention.unique().tolist() == pytest.approx([0, 1 / 0.75])
        gone.append((attention == 0).float().mean().item())
    assert np.mean(gone) == pytest.approx(0.25, abs=0.01)


def test_evaluation_never_drops():
    p = recipe(dropout=0.5, modality_dropout=0.9)
    inputs, _ = make_inputs(absent=0.0)
    outputs = train(inputs, p, tiled(inputs, p), "test")
    again = outputs.ensemble.predict(inputs, inputs.labelled)
    assert torch.equal(again, outputs.ensemble.predict(inputs, inputs.labelled))
    for i, row in enumerate(inputs.labelled):  # training's own evaluation and predict agree
        own = again[:, inputs.folds[row], i]
        assert (own - outputs.out_of_fold_best[:, i]).abs().max() < 1e-5


# ---------------------------------------------------------------- standardisation and prediction


def test_standardisation_sees_the_training_part_only():
    inputs, _ = make_inputs()
    before = fold_statistics(inputs, True)
    for modality in inputs.modalities:
        modality.matrix[:, inputs.folds == 0] += 100 * modality.present[inputs.folds == 0, None]
    after = fold_statistics(inputs, True)
    for name, (mean, scale) in before.items():
        assert torch.equal(mean[0], after[name][0][0]) and torch.equal(scale[0], after[name][1][0])
        assert not torch.equal(mean[1], after[name][0][1])


def test_standardised_inputs_have_mean_0_and_deviation_1_over_present_clips():
    p = recipe(batch_size=60)
    inputs, _ = make_inputs()
    rows = np.flatnonzero((inputs.folds >= 0) & (inputs.folds != 0))
    clean = make_feed(inputs, p, models=1).clean(torch.from_numpy(rows)[None])
    for i, x in enumerate(clean):
        seen = x[0, inputs.present[rows, i]]
        assert seen.mean(dim=0).abs().max() < 1e-5
        assert (seen.std(dim=0, correction=0) - 1).abs().max() < 1e-4


def test_without_standardize_inputs_are_raw():
    p = recipe(standardize=False)
    inputs, _ = make_inputs()
    rows = inputs.labelled[:16]
    for i, x in enumerate(make_feed(inputs, p).clean(torch.from_numpy(rows).expand(2, 16))):
        for model, fold in enumerate((0, 2)):
            expected = raw_features(inputs.modalities[i], fold)[rows] * inputs.present[rows, i, None].numpy()
            np.testing.assert_allclose(x[model], expected, atol=1e-5)


def test_constant_dimensions_do_no_harm():
    p = recipe()
    inputs, _ = make_inputs()
    for modality in inputs.modalities:
        modality.matrix[:, inputs.labelled, 0] = 0
    outputs = train(inputs, p, tiled(inputs, p), "test")
    assert torch.isfinite(outputs.votes).all()
    assert all((scale[:, 0] == 1).all() for _, scale in outputs.ensemble.statistics.values())


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
    assert (nothing - nothing[:, :, :1]).abs().max() < 1e-6  # no input: the same answer for every clip


def test_prediction_streams_in_chunks(monkeypatch):
    p = recipe()
    inputs, _ = make_inputs()
    ensemble = train(inputs, p, tiled(inputs, p), "test").ensemble
    whole = ensemble.predict(inputs, inputs.others)
    monkeypatch.setattr(ensemble_module, "PREDICT_ROWS", 7)
    assert (ensemble.predict(inputs, inputs.others) - whole).abs().max() < 1e-6
    assert ensemble.predict(inputs, inputs.others[:0]).shape == (2, 3, 0, len(LABELS))


# ---------------------------------------------------------------- what it learns


def test_waf_equals_scikit_learn():
    generator = np.random.default_rng(0)
    for classes in (2, 4, 6):
        actual, predicted = generator.integers(0, classes, (2, 5, 37))
        actual[1], predicted[2], actual[3] = 0, 1, classes - 1
        weights = np.ones((5, 37), np.float32)
        weights[4, 20:] = 0
        a, b, w = torch.from_numpy(actual), torch.from_numpy(predicted), torch.from_numpy(weights)
        ours = batched_waf(a, b, w, classes).tolist()
        rows = [37, 37, 37, 37, 20]
        expected = [
            100 * f1_score(a[:n], b[:n], labels=range(classes), average="weighted", zero_division=0)
            for a, b, n in zip(actual, predicted, rows, strict=True)
        ]
        assert ours == pytest.approx(expected, abs=1e-4)


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
    assert torch.equal(first.ensemble.parameters, second.ensemble.parameters)
    assert torch.equal(first.votes, second.votes) and torch.equal(first.curves, second.curves)
