"""WAF and other scores, all computed from confusion counts; every figure is in percent, as the paper prints it.

WAF (weighted average F-score, the metric of MER2024-SEMI) is scikit-learn's weighted F1 over the whole
label set: each class's F1 weighted by how many clips carry it, a class that is neither present nor
predicted counting as 0. Counts rather than clips, because every figure here is a function of them:
fold by fold, seed by seed and a thousand bootstrap resamples at once are one array expression.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def confusion_counts(actual: ArrayLike, predicted: ArrayLike, classes: int) -> IntArray:
    """Confusion counts: how many clips of each class were predicted as which class.

    actual: (N,) class indices. predicted: (..., N) class indices; leading dimensions (seeds, folds,
    rounds) are kept. Returns (..., classes, classes) int64, rows actual, columns predicted. Raises
    ValueError for an index outside the label set, a missing label's -1 above all.
    """
    actual, predicted = np.asarray(actual, np.int64), np.asarray(predicted, np.int64)
    if predicted.shape[-1:] != actual.shape:
        raise ValueError(f"{predicted.shape[-1:]} predictions for {actual.shape} labels")
    for name, values in (("actual", actual), ("predicted", predicted)):
        if values.size and not (values.min() >= 0 and values.max() < classes):
            raise ValueError(f"{name} classes {values.min()}..{values.max()}, expected 0..{classes - 1}")
    leading = predicted.shape[:-1]
    cells = actual * classes + predicted.reshape(-1, actual.size)
    cells += np.arange(len(cells))[:, None] * classes**2
    counts = np.bincount(cells.ravel(), minlength=len(cells) * classes**2)
    return counts.reshape(*leading, classes, classes)


def class_scores(counts: ArrayLike) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Precision, recall and F1 in percent, and support in clips, each (..., K), of counts (..., K, K).

    What would divide by zero is 0, like scikit-learn's zero_division=0.
    """
    counts = np.asarray(counts, np.float64)
    hits = np.diagonal(counts, axis1=-2, axis2=-1)
    support, called = counts.sum(-1), counts.sum(-2)
    precision = 100 * hits / np.maximum(called, 1)
    recall = 100 * hits / np.maximum(support, 1)
    f1 = 100 * 2 * hits / np.maximum(support + called, 1)
    return precision, recall, f1, support


def waf_of_counts(counts: ArrayLike) -> FloatArray:
    """WAF in percent, (...), of confusion counts (..., K, K); 0 where there is no clip."""
    _, _, f1, support = class_scores(counts)
    return (f1 * support).sum(-1) / np.maximum(support.sum(-1), 1)


def accuracy_of_counts(counts: ArrayLike) -> FloatArray:
    """Accuracy in percent, (...), of confusion counts (..., K, K); 0 where there is no clip."""
    counts = np.asarray(counts, np.float64)
    return 100 * np.trace(counts, axis1=-2, axis2=-1) / np.maximum(counts.sum((-2, -1)), 1)


def uar_of_counts(counts: ArrayLike) -> FloatArray:
    """Unweighted average recall in percent, (...): the mean recall over the classes that occur; 0 without a clip."""
    _, recall, _, support = class_scores(counts)
    return recall.sum(-1) / np.maximum((support > 0).sum(-1), 1)  # the recall of a class without a clip is 0


def waf(actual: ArrayLike, predicted: ArrayLike, classes: int) -> FloatArray:
    """WAF in percent of class indices actual (N,) and predicted (..., N): (...), a scalar for one row.

    Equals 100 * sklearn.metrics.f1_score(actual, predicted, labels=range(classes), average="weighted",
    zero_division=0).
    """
    return waf_of_counts(confusion_counts(actual, predicted, classes))


def waf_by_fold(actual: ArrayLike, predicted: ArrayLike, folds: ArrayLike, classes: int) -> FloatArray:
    """Mean over folds of each fold's own WAF: (...) for predicted (..., N), folds (N,) of 0..F-1.

    This, of every fold's best epoch, is what the MER2024 baseline and the paper call the Train&Val score.
    """
    actual, predicted, folds = np.asarray(actual), np.asarray(predicted), np.asarray(folds)
    rows = [np.flatnonzero(folds == fold) for fold in np.unique(folds)]
    return np.mean([waf(actual[r], predicted[..., r], classes) for r in rows], axis=0)


def bootstrap_interval(actual: ArrayLike, predicted: ArrayLike, classes: int, resamples: int, seed: int,
                       groups: ArrayLike | None = None) -> tuple[float, float]:
    """95 % percentile interval of WAF (the mean over seeds of it) under resampling of the clips, or of their groups.

    actual: (N,); predicted: (N,) or (S, N), whose rows are resampled together; groups: see resampled_waf.
    """
    rows = np.atleast_2d(np.asarray(predicted, np.int64))
    values = resampled_waf(actual, rows, classes, resamples, seed, groups).mean(axis=1)
    return percentile_interval(values)


def paired_interval(actual: ArrayLike, a: ArrayLike, b: ArrayLike, classes: int, resamples: int, seed: int,
                    groups: ArrayLike | None = None) -> tuple[float, float]:
    """95 % percentile interval of WAF of a minus WAF of b (means over seeds), two predictions of the same clips.

    actual: (N,); a, b: (N,) or (S, N), of as many seeds as each has. A resample draws the same clips (or groups,
    see resampled_waf) for both, so what makes a clip hard for both cancels: an interval that excludes 0 is a
    difference that another draw of clips would hardly turn round.
    """
    first, second = (np.atleast_2d(np.asarray(rows, np.int64)) for rows in (a, b))
    values = resampled_waf(actual, np.vstack([first, second]), classes, resamples, seed, groups)
    return percentile_interval(values[:, : len(first)].mean(axis=1) - values[:, len(first):].mean(axis=1))


def percentile_interval(values: FloatArray) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def cluster_count(groups: ArrayLike) -> int:
    """How many units resampled_waf draws: distinct groups, and each clip without one ("")."""
    names = np.asarray(groups, dtype=str)
    return len(np.unique(names[names != ""])) + int((names == "").sum())


def resampled_waf(actual: ArrayLike, predicted: ArrayLike, classes: int, resamples: int, seed: int,
                  groups: ArrayLike | None = None) -> FloatArray:
    """WAF in percent of every row of predictions in every resample: (resamples, R).

    actual: (N,); predicted: (R, N); groups: (N,) names, "" for a clip of none. What is drawn with replacement is a
    clip, or with groups a whole group (the cluster bootstrap: clips of one speaker are alike, so they are no
    independent evidence) and each clip of none. Where all clips are of one group nothing can be said about another:
    the clips are drawn then. A draw is a multinomial one over the distinct units: clips with the same outcome
    (actual class, each row's prediction) are one, so the cost hardly depends on N.
    """
    actual, predicted = np.asarray(actual, np.int64), np.asarray(predicted, np.int64)
    names = np.full(len(actual), "") if groups is None else np.asarray(groups, dtype=str)
    if cluster_count(names) == 1:
        names = np.full(len(actual), "")
    cells = actual * classes + predicted                              # (R, N) index into K x K
    alone = names == ""
    _, unit = np.unique(names, return_inverse=True)                   # a unit per group; "" sorts first, if it occurs
    outcomes, of_clip = np.unique(cells[:, alone], axis=1, return_inverse=True)
    unit[alone] = unit.max(initial=0) + 1 + of_clip.reshape(-1)       # and one per distinct outcome of the others
    _, unit = np.unique(unit, return_inverse=True)
    units, rows = int(unit.max(initial=0)) + 1, len(cells)
    places = (unit + units * np.arange(rows)[:, None]) * classes**2 + cells
    counts = np.bincount(places.ravel(), minlength=rows * units * classes**2).reshape(rows, units, classes**2)
    weights = np.ones(units)                                          # how many draws can give the unit
    weights[unit[alone]] = np.bincount(unit, minlength=units)[unit[alone]]
    per_draw = counts / weights[:, None]                              # confusion counts that one draw of it adds
    generator = np.random.default_rng(seed)
    chunk = max(1, 2**22 // units)                                    # bounds the draws to 32 MiB
    values = []
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        draws = generator.multinomial(int(weights.sum()), weights / weights.sum(), size=size).astype(np.float64)
        drawn = (draws @ per_draw).reshape(rows, size, classes, classes)
        values.append(waf_of_counts(drawn).T)
    return np.concatenate(values)


def per_class(counts: ArrayLike, labels: Sequence[str]) -> dict[str, dict[str, float]]:
    """{label: {f1, precision, recall, support}} of counts (K, K) or (S, K, K), averaged over seeds."""
    counts = np.asarray(counts).reshape(-1, len(labels), len(labels))
    precision, recall, f1, support = (values.mean(0) for values in class_scores(counts))
    return {label: {"f1": float(f1[k]), "precision": float(precision[k]), "recall": float(recall[k]),
                    "support": int(support[k])} for k, label in enumerate(labels)}


def mean_and_deviation(values: ArrayLike) -> tuple[float, float]:
    """Mean and sample deviation (n - 1) of one figure over seeds; the deviation of one seed is 0."""
    values = np.asarray(values, np.float64).ravel()
    return float(values.mean()), float(values.std(ddof=1)) if values.size > 1 else 0.0
