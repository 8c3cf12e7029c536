"""WAF against scikit-learn and hand-made counts; the bootstrap against the plain loop over clips."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support, recall_score

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
    recall = recall_score(actual, predicted, labels=np.unique(actual), average="macro", zero_division=0)
    assert metrics.uar_of_counts(counts) == pytest.approx(100 * recall)
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


def plain_loop(actual, rows, groups, resamples):
    """WAF of each row in each resample, by drawing group after group: (resamples, R)."""
    members = [np.flatnonzero(groups == name) for name in np.unique(groups)]
    generator = np.random.default_rng(5)
    drawn = [np.concatenate([members[i] for i in generator.integers(0, len(members), len(members))])
             for _ in range(resamples)]
    return np.stack([metrics.waf(actual[clips], rows[:, clips], 6) for clips in drawn])


def near(plain):
    """The interval of the plain loop, to four deviations of a 2.5 % quantile of n draws (2.7 spread / sqrt(n))."""
    assert plain.std() > 1
    return pytest.approx(tuple(np.percentile(plain, [2.5, 97.5])), abs=4 * 2.7 * plain.std() / np.sqrt(len(plain)))


def by_speaker(seed, clips, speakers):
    """Labels, two predictions that are better for some speakers than for others, and who speaks."""
    generator = np.random.default_rng(seed)
    actual, speaker = generator.integers(0, 6, clips), generator.integers(0, speakers, clips)
    skill = np.linspace(0.2, 0.95, speakers)[speaker]
    rows = [np.where(generator.random(clips) < skill, actual, generator.integers(0, 6, clips)) for _ in range(2)]
    return actual, np.stack(rows), speaker


def test_bootstrap_equals_the_plain_loop():
    """Same distribution, so the ends of the two intervals differ by Monte Carlo noise only."""
    actual, first = draw(1, 300, 6)
    second = np.where(np.arange(300) % 3 == 0, draw(2, 300, 6)[1], first)
    predicted = np.stack([first, second])
    plain = plain_loop(actual, predicted, np.arange(300), 4000).mean(axis=1)
    low, high = metrics.bootstrap_interval(actual, predicted, 6, 20000, seed=0)
    assert (low, high) == near(plain)
    assert low < metrics.waf(actual, predicted, 6).mean() < high


def test_groups_are_drawn_whole():
    actual, rows, speaker = by_speaker(0, 300, 12)
    plain = plain_loop(actual, rows, speaker, 4000).mean(axis=1)
    names = np.char.add("speaker ", speaker.astype(str))
    low, high = metrics.bootstrap_interval(actual, rows, 6, 20000, seed=0, groups=names)
    assert (low, high) == near(plain)
    blind = metrics.bootstrap_interval(actual, rows, 6, 20000, seed=0)
    assert high - low > 1.5 * (blind[1] - blind[0])  # clips alone hide how much speakers differ


def test_a_clip_without_a_group_is_one_of_its_own():
    actual, rows, speaker = by_speaker(1, 300, 12)
    names = np.where(speaker < 6, speaker.astype(str), "")
    own = np.where(speaker < 6, speaker, 100 + np.arange(300))
    plain = plain_loop(actual, rows, own, 4000).mean(axis=1)
    assert metrics.bootstrap_interval(actual, rows, 6, 20000, seed=0, groups=names) == near(plain)
    assert metrics.cluster_count(names) == 6 + (names == "").sum()
    nobody = [""] * 300
    assert metrics.bootstrap_interval(actual, rows, 6, 500, 0, nobody) == metrics.bootstrap_interval(
        actual, rows, 6, 500, 0)


def test_one_group_alone_is_drawn_clip_by_clip():
    """A bootstrap of one speaker would say that another draw changes nothing."""
    actual, rows, _ = by_speaker(2, 100, 5)
    assert metrics.bootstrap_interval(actual, rows, 6, 500, 0, ["one"] * 100) == metrics.bootstrap_interval(
        actual, rows, 6, 500, 0)


@pytest.mark.parametrize("grouped", [False, True])
def test_paired_differences_equal_the_plain_loop(grouped):
    actual, rows, speaker = by_speaker(3, 300, 12)
    a = np.where(draw(7, 300, 6)[0] < 1, actual, rows)  # right where rows may be wrong, and the same elsewhere
    clusters = speaker if grouped else np.arange(300)
    plain = plain_loop(actual, np.vstack([a, rows[:1]]), clusters, 4000)
    plain = plain[:, :2].mean(axis=1) - plain[:, 2]     # two seeds against one
    groups = speaker.astype(str) if grouped else None
    low, high = metrics.paired_interval(actual, a, rows[0], 6, 20000, 0, groups)
    assert (low, high) == near(plain)
    turned = metrics.paired_interval(actual, rows[0], a, 6, 20000, 0, groups)
    assert turned == pytest.approx((-high, -low), abs=0.5)
    assert metrics.paired_interval(actual, a, a[::-1], 6, 200, 0, groups) == pytest.approx((0, 0), abs=1e-9)


def test_bootstrap_is_deterministic():
    actual, predicted = draw(4, 200, 6)
    once = metrics.bootstrap_interval(actual, predicted, 6, 500, seed=7)
    assert metrics.bootstrap_interval(actual, predicted, 6, 500, seed=7) == once
    assert metrics.bootstrap_interval(actual, predicted, 6, 500, seed=8) != once
    assert metrics.bootstrap_interval(actual, actual, 6, 100, seed=0) == (100, 100)


@pytest.mark.parametrize("groups", [0, 300, 60_000])
def test_a_whole_corpus_is_resampled_without_a_loop_over_clips(groups):
    """MER2024's 120,625 clips, three seeds, 1000 resamples: seconds, where the plain loop takes minutes."""
    generator = np.random.default_rng(0)
    actual, first = draw(1, 120_625, 6)
    predicted = np.stack([first, draw(2, 120_625, 6)[1], draw(3, 120_625, 6)[1]])
    names = generator.integers(1, groups, 120_625).astype(str) if groups else None
    low, high = metrics.bootstrap_interval(actual, predicted, 6, 1000, seed=0, groups=names)
    assert 0 < high - low < 1


def test_deviation_over_seeds():
    assert metrics.mean_and_deviation([80, 82, 84]) == (82, 2)
    assert metrics.mean_and_deviation([80]) == (80, 0)
