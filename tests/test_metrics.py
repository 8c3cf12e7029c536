"""WAF against scikit-learn and hand-made counts; the bootstrap against the plain loop over clips."""

import time

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support

from stages.evaluation import metrics


def draw(seed, clips, classes, correct=0.6):
    """Unbalanced labels and predictions that are right in a share `correct` of the clips."""
    generator = np.random.default_rng(seed)
    shares = np.arange(1, classes + 1) / np.arange(1, classes + 1).sum()
    actual = generator.choice(classes, clips, p=shares)
    predicted = np.where(generator.random(clips) < correct, actual, generator.integers(0, classes, clips))
    return actual, predicted


def test_waf_by_hand():
    # neutral: 2 clips, both found, 1 false call: F1 = 4/5. anger: 2 clips, 1 found: F1 = 2/3. worry: none.
    actual, predicted = [0, 0, 1, 1], [0, 0, 0, 1]
    assert metrics.waf(actual, predicted, 3) == pytest.approx(100 * (2 * 4 / 5 + 2 * 2 / 3) / 4)


@pytest.mark.parametrize("seed", range(20))
def test_equals_scikit_learn(seed):
    classes = 2 + seed % 7
    actual, predicted = draw(seed, 1 + 7 * seed, classes)
    labels = list(range(classes))
    expected = f1_score(actual, predicted, labels=labels, average="weighted", zero_division=0)
    assert metrics.waf(actual, predicted, classes) == pytest.approx(100 * expected, abs=1e-9)
    counts = metrics.confusion_counts(actual, predicted, classes)
    assert metrics.accuracy_of_counts(counts) == pytest.approx(100 * accuracy_score(actual, predicted))
    ours = metrics.class_scores(counts)
    theirs = precision_recall_fscore_support(actual, predicted, labels=labels, zero_division=0)
    for mine, reference, scale in zip(ours, theirs, (100, 100, 100, 1), strict=True):
        np.testing.assert_allclose(mine, scale * reference, atol=1e-9)


def test_absent_class_counts_as_zero():
    actual, predicted = [0, 0, 1], [0, 0, 2]     # class 1 never found, class 2 without a clip, class 3 nowhere
    assert metrics.waf(actual, predicted, 4) == pytest.approx(100 * 2 / 3)
    scores = metrics.per_class(metrics.confusion_counts(actual, predicted, 4), list("abcd"))
    assert [scores[label]["f1"] for label in "abcd"] == [100, 0, 0, 0]
    assert [scores[label]["support"] for label in "abcd"] == [2, 1, 0, 0]


def test_leading_dimensions_are_separate_predictions():
    rows = [draw(seed, 50, 6)[1] for seed in range(6)]
    actual = draw(0, 50, 6)[0]
    together = metrics.waf(actual, np.array(rows).reshape(2, 3, 50), 6)
    assert together.shape == (2, 3)
    np.testing.assert_array_equal(together.ravel(), [metrics.waf(actual, row, 6) for row in rows])


def test_mean_over_folds_is_not_the_pooled_waf():
    actual, predicted = draw(3, 90, 4)
    folds = np.arange(90) % 5
    single = [metrics.waf(actual[folds == f], predicted[folds == f], 4) for f in range(5)]
    assert metrics.waf_by_fold(actual, predicted, folds, 4) == pytest.approx(np.mean(single))
    assert metrics.waf_by_fold(actual, predicted, folds, 4) != pytest.approx(metrics.waf(actual, predicted, 4))


def test_a_missing_label_is_refused():
    with pytest.raises(ValueError, match="-1..1, expected 0..5"):
        metrics.confusion_counts([0, -1, 1], [0, 1, 1], 6)
    with pytest.raises(ValueError, match="predictions for"):
        metrics.confusion_counts([0, 1], [0, 1, 1], 6)


def test_bootstrap_equals_the_plain_loop():
    """Same distribution, so the ends of the two intervals differ by Monte Carlo noise only."""
    actual, first = draw(1, 300, 6)
    second = np.where(np.arange(300) % 3 == 0, draw(2, 300, 6)[1], first)
    predicted = np.stack([first, second])
    generator = np.random.default_rng(5)
    plain = []
    for _ in range(4000):
        rows = generator.integers(0, 300, 300)
        plain.append(metrics.waf(actual[rows], predicted[:, rows], 6).mean())
    low, high = metrics.bootstrap_interval(actual, predicted, 6, 20000, seed=0)
    spread = np.std(plain)
    assert spread > 1
    # the deviation of a 2.5 % quantile of n draws is about 2.7 spread / sqrt(n): four of them
    noise = 4 * 2.7 * spread / np.sqrt(4000)
    assert (low, high) == pytest.approx(tuple(np.percentile(plain, [2.5, 97.5])), abs=noise)
    assert low < metrics.waf(actual, predicted, 6).mean() < high


def test_bootstrap_is_deterministic():
    actual, predicted = draw(4, 200, 6)
    once = metrics.bootstrap_interval(actual, predicted, 6, 500, seed=7)
    assert metrics.bootstrap_interval(actual, predicted, 6, 500, seed=7) == once
    assert metrics.bootstrap_interval(actual, predicted, 6, 500, seed=8) != once
    assert metrics.bootstrap_interval(actual, actual, 6, 100, seed=0) == (100, 100)


def test_bootstrap_is_fast():
    """20,000 clips, three seeds, 1000 resamples: the plain loop takes half a minute."""
    actual, first = draw(1, 20_000, 6)
    predicted = np.stack([first, draw(2, 20_000, 6)[1], draw(3, 20_000, 6)[1]])
    start = time.perf_counter()
    low, high = metrics.bootstrap_interval(actual, predicted, 6, 1000, seed=0)
    assert time.perf_counter() - start < 5
    assert 0 < high - low < 2


def test_deviation_over_seeds():
    assert metrics.mean_and_deviation([80, 82, 84]) == (82, 2)
    assert metrics.mean_and_deviation([80]) == (80, 0)
