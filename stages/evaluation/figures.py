"""The figures of reports/metrics.json and details.json and the tables beside them, from a Run; pure, all in percent.

details.json has a block per prediction and set of clips, each with the protocol that it was computed by:

final, round0        the fusion as it predicts, and as it was before self-training
majority, logistic_regression    the baselines on the same folds and clips
  .test, .unlabelled   the clips whose truth is known: waf (mean over seeds), waf_std (sample deviation over them),
                       interval, accuracy, uar, per_class; ensemble_waf: the seeds' probabilities averaged too, which is
                       what predictions.csv and submission.csv hold
  .out_of_fold         the same of all labelled clips at once
  .last_epoch, .best_epoch   mean over folds of each fold's own WAF
  .over                WAF minus a baseline's, with the interval of paired resamples
calibration          expected calibration error before and after the temperature
pseudo_labels        accuracy over those whose truth is known; count per seed and model, mean

metrics.json has what people compare of it, under short names, so that `dvc metrics show` fits a terminal.
"""

from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from stages.engine.params import Evaluate, FusionParams
from stages.evaluation import metrics
from stages.evaluation.artefacts import Baseline, Predictions, Run
from stages.evaluation.calibration import BINS, calibration_error, fit_temperature, tempered
from stages.evaluation.protocol import protocol_of, units, words
from stages.evaluation.warnings import warnings

SUBMISSION_NAMES = {"anger": "angry", "happiness": "happy", "sadness": "sad", "worry": "worried"}  # MER's spelling


def details(run: Run, p: FusionParams) -> dict[str, Any]:
    """The content of details.json. Blocks without any known truth are left out."""
    protocol = protocol_of(run, p)
    models, on = protocol.lead(run)
    figures: dict[str, Any] = {"lead": {"models": models, "on": on}}
    for name, predictions in (("final", run.final), ("round0", run.round0)):
        blocks = scores(run, predictions, p.evaluate)
        for block in blocks:
            blocks[block]["over"] = {
                baseline: difference(run, predictions, other, block, p.evaluate)
                for baseline, other in run.baselines.items()}
        for split in blocks.keys() - {"out_of_fold"}:
            called = predictions.ensemble[run.known(split)].argmax(-1)
            blocks[split]["ensemble_waf"] = float(metrics.waf(run.truth[run.known(split)], called, len(run.labels)))
        figures[name] = blocks | by_fold(run, predictions)
    for name, baseline in run.baselines.items():
        figures[name] = scores(run, baseline, p.evaluate)
    for name in ("final", "round0", *run.baselines):
        for block in figures[name]:
            figures[name][block]["protocol"] = words(run, p, protocol, name, block)
    figures["calibration"] = calibration(run, p.evaluate)
    figures["pseudo_labels"] = pseudo_label_scores(run)
    figures |= {"leaky": protocol.leaky, "void": protocol.void, "transductive": protocol.transductive}
    figures["seeds"], figures["folds"] = run.final.votes.shape[:2]
    figures["clips"] = {split: int((run.manifest["split"] == split).sum())
                        for split in ("labelled", "unlabelled", "test")}
    return rounded(figures) | {"warnings": warnings(run, p, figures)}


def headline(figures: dict[str, Any]) -> dict[str, Any]:
    """The content of metrics.json from that of details.json; what is not known is left out.

    Cross-validation is that of round 0 where after self-training it is void. WAF has two decimals, as the paper prints
    it; one of the others, and names of two to five letters, keep `dvc metrics show` within 100 columns.
    """
    lead = figures[figures["lead"]["models"]][figures["lead"]["on"]]
    cv = figures["round0" if figures["void"] else "final"]
    on = "test" if "test" in figures["final"] else "out_of_fold"
    found = {
        "test": figures["final"].get("test", {}).get("waf"),
        "lo": lead["interval"][0],
        "hi": lead["interval"][1],
        "acc": lead["accuracy"],
        "uar": lead["uar"],
        "last": cv["last_epoch"]["waf"],
        "oof": cv["out_of_fold"]["waf"],
        "best": cv["best_epoch"]["waf"],
        "r0": figures["round0"][on]["waf"],
        "LR": figures["logistic_regression"][on]["waf"],
    }
    short = {name: round(value, 1 if name in ("lo", "hi", "acc", "uar", "r0", "LR") else 2)
             for name, value in found.items() if value is not None}
    flags = {(False, False): "none", (True, False): "leaky", (False, True): "trans", (True, True): "both"}
    return {**{name: 100 if value == 100 else value for name, value in short.items()},  # 100.0 is wider than 99.9
            "flags": flags[figures["leaky"], bool(figures["transductive"])]}


def scored(run: Run, block: str) -> tuple[np.ndarray, list[str]]:
    """The classes and the ids of the clips that a block scores: out_of_fold, test or unlabelled."""
    if block == "out_of_fold":
        return run.actual, run.final.labelled
    known = run.known(block)
    return run.truth[known], [run.final.others[i] for i in known]


def called(run: Run, predictions: Predictions | Baseline, block: str) -> np.ndarray:
    """(S, N) the classes that each seed's models call the clips of a block."""
    if block == "out_of_fold":
        return predictions.out_of_fold.argmax(-1)
    return predictions.by_seed[:, run.known(block)].argmax(-1)


def scores(run: Run, predictions: Predictions | Baseline, p: Evaluate) -> dict[str, dict[str, Any]]:
    """The blocks out_of_fold, and test and unlabelled where the truth of a clip is known."""
    blocks = {}
    for block in ("test", "unlabelled", "out_of_fold"):
        actual, clips = scored(run, block)
        if not clips:
            continue
        rows, groups = called(run, predictions, block), run.groups(clips)
        counts = metrics.confusion_counts(actual, rows, len(run.labels))
        mean, deviation = metrics.mean_and_deviation(metrics.waf_of_counts(counts))
        interval = metrics.bootstrap_interval(actual, rows, len(run.labels), p.bootstrap, p.seed, groups)
        blocks[block] = {
            "waf": mean, "waf_std": deviation, "interval": list(interval), "resampled": units(groups),
            "accuracy": float(metrics.accuracy_of_counts(counts).mean()),
            "uar": float(metrics.uar_of_counts(counts).mean()), "clips": len(clips),
            "per_class": metrics.per_class(counts, run.labels),
        }
    return blocks


def difference(run: Run, predictions: Predictions, baseline: Baseline, block: str, p: Evaluate) -> dict[str, Any]:
    """WAF over a baseline's on the clips of a block, with the interval of paired resamples."""
    actual, clips = scored(run, block)
    ours, theirs = (called(run, rows, block) for rows in (predictions, baseline))
    gain = metrics.waf(actual, ours, len(run.labels)).mean() - metrics.waf(actual, theirs, len(run.labels)).mean()
    interval = metrics.paired_interval(actual, ours, theirs, len(run.labels), p.bootstrap, p.seed, run.groups(clips))
    return {"waf": float(gain), "interval": list(interval)}


def by_fold(run: Run, predictions: Predictions) -> dict[str, dict[str, Any]]:
    """The blocks last_epoch and best_epoch: mean over folds of each fold's own WAF, and its deviation over seeds."""
    blocks = {}
    for name, probabilities in (("last_epoch", predictions.last), ("best_epoch", predictions.best)):
        values = metrics.waf_by_fold(run.actual, probabilities.argmax(-1), run.folds, len(run.labels))
        mean, deviation = metrics.mean_and_deviation(values)
        blocks[name] = {"waf": mean, "waf_std": deviation}
    return blocks


def calibration_sets(run: Run) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(probabilities (N, L), classes) of the seeds' mean: out of fold at the ensemble's epoch, and known test clips."""
    sets = {"out_of_fold": (run.final.own.mean(axis=0), run.actual)}
    if (known := run.known("test")).size:
        sets["test"] = run.final.ensemble[known], run.truth[known]
    return sets


def calibration(run: Run, p: Evaluate) -> dict[str, Any]:
    """The temperature, and ECE of the ensemble's probabilities before and after it, where the truth is known."""
    sets = calibration_sets(run)
    temperature = fit_temperature(*sets["out_of_fold"]) if p.calibrate == "temperature" else 1.0
    errors = {name: {"before": calibration_error(probabilities, actual),
                     "after": calibration_error(tempered(probabilities, temperature), actual)}
              for name, (probabilities, actual) in sets.items()}
    return {"temperature": temperature, **errors,
            "protocol": f"expected calibration error in {BINS} bins of the probability of the label that is called, "
                        f"seeds averaged; the temperature is fitted on the out-of-fold probabilities, so only the "
                        f"test's `after` shows what it does for other clips."}


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


def prediction_table(run: Run, temperature: float) -> pd.DataFrame:
    """One row per clip in manifest order: clip_id, split, prediction, prob_<label>, confidence, votes.

    Labelled clips: the seeds' mean out-of-fold softmax; votes: how many seeds agree. Others: the equal-weight mean of
    all fold models' softmaxes; votes: how many of the S x F models agree. Both under the temperature.
    """
    raw = np.concatenate([run.final.out_of_fold.mean(axis=0), run.final.ensemble])
    chosen, probabilities = raw.argmax(-1), tempered(raw, temperature)
    agree = [(run.final.out_of_fold.argmax(-1) == chosen[: len(run.actual)]).sum(axis=0),
             (run.final.votes.argmax(-1) == chosen[len(run.actual):]).sum(axis=(0, 1))]
    table = pd.DataFrame(probabilities, columns=[f"prob_{label}" for label in run.labels])
    table.insert(0, "clip_id", run.final.labelled + run.final.others)
    table.insert(1, "split", run.manifest.loc[table["clip_id"], "split"].to_numpy())
    table.insert(2, "prediction", np.array(run.labels)[chosen])
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

    predict(removed) -> out-of-fold softmax (S, labelled, L) at the ensemble's epochs, and (S, others, L). Columns:
    removed, kept, cv_waf, cv_waf_std (mean over folds of each fold's own WAF) and, where known, test_waf, test_waf_std.
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


def rounded(value: Any) -> Any:
    """Every float to 4 decimals of a percent, through dicts and lists."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value
