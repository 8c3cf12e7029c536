"""The figures of reports/metrics.json and the tables beside it, from a Run; pure, and all in percent.

With several seeds a figure is the mean over them, and `..._std` the sample deviation. What each one is:

cv.waf_best_epoch    each fold's validation WAF at the epoch that is best on that same validation part, mean
                     over folds: the Train&Val score of the paper and the MER2024 baseline. Optimistic.
cv.waf_last_epoch    the same at the last epoch: no epoch was picked.
cv.out_of_fold_waf   WAF of all labelled clips at once, each predicted by its own fold's model at the last
                     epoch. cv.interval, cv.accuracy and cv.per_class belong to these predictions.
test.waf             each fold's model at its best epoch, the equal-weight mean of the folds' softmaxes [choice:
                     the baseline averages their logits], over the test clips whose truth is known (test.clips of
                     them), with test.interval.
test.ensemble_waf    the seeds' softmaxes averaged too: what predictions.csv and submission.csv hold.
unlabelled           like test, over the unlabelled clips whose truth is known.
round0               the same figures before self-training. From round 1 on, cv is a little optimistic: the
                     pseudo-labels come from an ensemble whose other folds have seen this fold's labels.
pseudo_labels        accuracy over those whose truth is known; count per seed and model, mean.
"""

from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from stages.engine.params import Evaluate
from stages.evaluation import metrics
from stages.evaluation.artefacts import Predictions, Run

SHOWN = 5  # examples in a warning
SUBMISSION_NAMES = {"anger": "angry", "happiness": "happy", "sadness": "sad", "worry": "worried"}  # MER's spelling


def headline(run: Run, p: Evaluate) -> dict[str, Any]:
    """The content of metrics.json. Blocks without any known truth are left out."""
    figures: dict[str, Any] = {"cv": cross_validation(run, run.final), "round0": {"cv": brief_cv(run, run.round0)}}
    called = run.final.last.argmax(-1)
    figures["cv"]["interval"] = list(
        metrics.bootstrap_interval(run.actual, called, len(run.labels), p.bootstrap, p.seed))
    for split in ("test", "unlabelled"):
        known = run.known(split)
        if known.size:
            figures[split] = ensemble_scores(run, run.final, known)
            called = run.final.by_seed[:, known].argmax(-1)
            figures[split]["interval"] = list(
                metrics.bootstrap_interval(run.truth[known], called, len(run.labels), p.bootstrap, p.seed))
            before = ensemble_scores(run, run.round0, known)
            figures["round0"][split] = {key: before[key] for key in ("waf", "waf_std", "ensemble_waf", "accuracy")}
    figures["pseudo_labels"] = pseudo_label_scores(run)
    figures["leaky"] = run.leaky
    figures["seeds"], figures["folds"] = run.final.votes.shape[:2]
    figures["clips"] = {split: int((run.manifest["split"] == split).sum())
                        for split in ("labelled", "unlabelled", "test")}
    return rounded(figures)


def brief_cv(run: Run, predictions: Predictions) -> dict[str, float]:
    """The three cross-validated WAFs and their deviations over seeds."""
    classes, figures = len(run.labels), {}
    best, last = predictions.best.argmax(-1), predictions.last.argmax(-1)
    for name, values in (
        ("waf_best_epoch", metrics.waf_by_fold(run.actual, best, run.folds, classes)),
        ("waf_last_epoch", metrics.waf_by_fold(run.actual, last, run.folds, classes)),
        ("out_of_fold_waf", metrics.waf(run.actual, last, classes)),
    ):
        figures[name], figures[f"{name}_std"] = metrics.mean_and_deviation(values)
    return figures


def cross_validation(run: Run, predictions: Predictions) -> dict[str, Any]:
    """brief_cv, and accuracy and per-class scores of the out-of-fold predictions of the last epoch."""
    counts = metrics.confusion_counts(run.actual, predictions.last.argmax(-1), len(run.labels))
    return {**brief_cv(run, predictions), "accuracy": float(metrics.accuracy_of_counts(counts).mean()),
            "per_class": metrics.per_class(counts, run.labels)}


def ensemble_scores(run: Run, predictions: Predictions, known: np.ndarray) -> dict[str, Any]:
    """WAF, accuracy and per-class scores at the positions `known` of the unlabelled or test clips."""
    counts = metrics.confusion_counts(run.truth[known], predictions.by_seed[:, known].argmax(-1), len(run.labels))
    mean, deviation = metrics.mean_and_deviation(metrics.waf_of_counts(counts))
    ensemble = metrics.waf(run.truth[known], predictions.ensemble[known].argmax(-1), len(run.labels))
    return {"waf": mean, "waf_std": deviation, "ensemble_waf": float(ensemble),
            "accuracy": float(metrics.accuracy_of_counts(counts).mean()),
            "per_class": metrics.per_class(counts, run.labels), "clips": int(known.size)}


def pseudo_label_correct(run: Run) -> pd.Series:
    """1 or 0 per row of pseudo_labels.csv as the label is right or wrong, NaN where the truth is not known."""
    truth = dict(zip(run.final.others, run.truth, strict=True))
    names = dict(enumerate(run.labels))
    actual = run.pseudo_labels["clip_id"].map(truth).map(names)
    return (actual == run.pseudo_labels["label"]).astype(float).where(actual.notna())


def pseudo_label_scores(run: Run) -> dict[str, Any]:
    """Mean count per seed and model, and accuracy where the truth is known of any."""
    correct = pseudo_label_correct(run)
    seeds, folds = run.final.votes.shape[:2]
    scores = {"count": len(correct) / (seeds * (folds if (run.pseudo_labels["fold"] != "").any() else 1))}
    return {**scores, "accuracy": 100 * float(correct.mean())} if correct.notna().any() else scores


def prediction_table(run: Run) -> pd.DataFrame:
    """One row per clip in manifest order: clip_id, split, prediction, prob_<label>, confidence, votes.

    Labelled clips: the seeds' mean out-of-fold softmax at the last epoch; votes: how many seeds agree.
    Others: the equal-weight mean of all fold models' softmaxes; votes: how many of the S x F models agree.
    """
    probabilities = np.concatenate([run.final.last.mean(axis=0), run.final.ensemble])
    called = probabilities.argmax(-1)
    agree = [(run.final.last.argmax(-1) == called[: len(run.actual)]).sum(axis=0),
             (run.final.votes.argmax(-1) == called[len(run.actual):]).sum(axis=(0, 1))]
    table = pd.DataFrame(probabilities, columns=[f"prob_{label}" for label in run.labels])
    table.insert(0, "clip_id", run.final.labelled + run.final.others)
    table.insert(1, "split", run.manifest.loc[table["clip_id"], "split"].to_numpy())
    table.insert(2, "prediction", np.array(run.labels)[called])
    table["confidence"] = probabilities.max(axis=-1)
    table["votes"] = np.concatenate(agree)
    return table.set_index("clip_id").loc[run.manifest.index].reset_index()


def submission_table(predictions: pd.DataFrame, adapter: str) -> pd.DataFrame:
    """name,discrete of the test clips; MER's labels in the challenge's spelling, those of any other corpus as
    corpus.labels has them."""
    test = predictions[predictions["split"] == "test"]
    spelling = SUBMISSION_NAMES if adapter == "demo" or adapter.startswith("mer") else {}
    return pd.DataFrame({"name": test["clip_id"], "discrete": test["prediction"].replace(spelling)})


def confusion_table(run: Run, predictions: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    """(which clips, actual and predicted of each): the test clips, or the labelled ones without a test truth."""
    known = run.known("test")
    split, actual = ("test", run.truth[known]) if known.size else ("labelled", run.actual)
    clips = [run.final.others[i] for i in known] if known.size else run.final.labelled
    predicted = predictions.set_index("clip_id").loc[clips, "prediction"].to_numpy()
    return split, pd.DataFrame({"actual": np.array(run.labels)[actual], "predicted": predicted})


def rounds_table(run: Run) -> pd.DataFrame:
    """reports/rounds.csv with test_waf and the accuracy of the pseudo-labels that the round added, where known."""
    table = run.rounds.copy()
    known = run.known("test")
    if known.size:
        of_test = np.searchsorted(run.split("test"), known)
        called = run.round_probabilities[:, :, of_test].argmax(-1)
        by_round = metrics.waf(run.truth[known], called, len(run.labels)).mean(axis=1)
        table["test_waf"] = by_round[table["round"].to_numpy()]
    correct = 100 * pseudo_label_correct(run).groupby(run.pseudo_labels["round"]).mean()
    if correct.notna().any():
        table["pseudo_label_accuracy"] = table["round"].map(correct)
    return table


def curves_table(run: Run) -> pd.DataFrame:
    """epoch, train_loss, valid_loss, valid_waf of round 0, mean over seeds and folds."""
    round0 = run.curves[run.curves["round"] == 0]
    return round0.groupby("epoch")[["train_loss", "valid_loss", "valid_waf"]].mean().reset_index()


def removals(modalities: list[str]) -> Iterator[frozenset[str]]:
    """Every set of modalities that can be taken away, none at all first, leaving at least one."""
    for count in range(len(modalities)):
        yield from (frozenset(names) for names in combinations(modalities, count))


def robustness_table(run: Run, predict: Callable[[frozenset[str]], tuple[np.ndarray, np.ndarray]]) -> pd.DataFrame:
    """WAF of the trained models with each set of modalities absent from every clip.

    predict(removed) -> out-of-fold softmax (S, labelled, L) at the best epochs, and (S, others, L). Columns:
    removed, kept, cv_waf, cv_waf_std (as cv.waf_best_epoch) and, where known, test_waf, test_waf_std.
    """
    classes, known, rows = len(run.labels), run.known("test"), []
    for removed in removals(run.modalities):
        labelled, others = predict(removed)
        row: dict[str, Any] = {"removed": "+".join(m for m in run.modalities if m in removed) or "none",
                               "kept": "+".join(m for m in run.modalities if m not in removed)}
        by_fold = metrics.waf_by_fold(run.actual, labelled.argmax(-1), run.folds, classes)
        row["cv_waf"], row["cv_waf_std"] = metrics.mean_and_deviation(by_fold)
        if known.size:
            test = metrics.waf(run.truth[known], others[:, known].argmax(-1), classes)
            row["test_waf"], row["test_waf_std"] = metrics.mean_and_deviation(test)
        rows.append(row)
    return pd.DataFrame(rows)


def warnings(run: Run, rounds_asked: int, k: int) -> list[str]:
    """What a reader must know before trusting the figures: fallbacks that were taken, and too few clips."""
    found = duplicate_warnings(run.duplicates)
    counts = run.manifest["split"].value_counts()
    if rounds_asked and not counts.get("unlabelled", 0):
        found.append("The corpus has no unlabelled clips.")
    last = int(run.rounds["round"].max())
    if last < rounds_asked:
        found.append(f"Self-training stopped after round {last} of {rounds_asked}: no candidate was left.")
    for label in run.labels:
        added = run.rounds.loc[run.rounds["round"] > 0, f"added_{label}"]
        if (short := int((added < k).sum())):
            found.append(f"{short} of {len(added)} rounds added fewer than k = {k} clips of {label}.")
    for split in ("test", "unlabelled"):
        known, total = run.known(split).size, run.split(split).size
        if 0 < known < total:
            found.append(f"The truth of {known} of {total} {split} clips is known; the others are not scored.")
    scored = run.truth[run.known("test")]
    if scored.size:
        absent = [label for position, label in enumerate(run.labels) if not (scored == position).any()]
        if absent:
            found.append(f"No scored test clip is labelled {', '.join(absent)}.")
    return found


def duplicate_warnings(duplicates: pd.DataFrame) -> list[str]:
    """One line per problem of data/duplicates.csv, with examples."""
    found = []
    for problem, text in (("train and test", "in training and in test: the test figures are too high"),
                          ("two labels", "under two labels: one of them is wrong")):
        rows = duplicates[duplicates["problem"].str.contains(problem, regex=False)]
        groups = [" = ".join(group) for _, group in rows.groupby("digest", sort=False)["clip_id"]]
        if groups:
            shown = ", ".join(groups[:SHOWN]) + (" ..." if len(groups) > SHOWN else "")
            found.append(f"{len(groups)} clip{'s' * (len(groups) > 1)} with the same bytes {text} ({shown}; all in "
                         f"data/duplicates.csv).")
    return found


def rounded(value: Any) -> Any:
    """Every float to 4 decimals of a percent, through dicts and lists."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


