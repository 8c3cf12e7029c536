"""What a reader must know before trusting the figures, shown first in the report and on evaluate's stderr."""

from typing import Any

import pandas as pd

from stages.engine.params import FusionParams
from stages.evaluation import metrics
from stages.evaluation.artefacts import Run
from stages.evaluation.protocol import Protocol, protocol_of

SHOWN = 5          # examples in a warning
FEW_GROUPS = 10    # with fewer, an interval from resampled groups is rough
LAST_PART = 0.9    # of the epochs; models that are best after it were still improving
PLACES = {"test": "on the test clips", "out_of_fold": "out of fold"}
BASELINES = {"majority": "always calling the most frequent class", "logistic_regression": "logistic regression"}


def warnings(run: Run, p: FusionParams, figures: dict[str, Any]) -> list[str]:
    """All of them, the gravest first. figures: the content of details.json."""
    protocol = protocol_of(run, p)
    return [
        *below_a_baseline(figures, protocol),
        *disjoint(figures, protocol),
        *what_was_seen(figures, protocol),
        *duplicate_warnings(run.duplicates),
        *grouping(run),
        *still_rising(run.curves),
        *pseudo_labelling(run, p),
        *unknown_truth(run),
    ]


def below_a_baseline(figures: dict[str, Any], protocol: Protocol) -> list[str]:
    """The fusion against the baselines on the same clips, by predictions that mean something."""
    found = []
    for models, place in (("final", "test"), (protocol.honest, "out_of_fold")):
        block = figures[models].get(place)
        for baseline, name in BASELINES.items() if block else ():
            gain = block["over"][baseline]
            if gain["waf"] < 0:
                low, high = gain["interval"]
                sure = "" if high < 0 else ", so another draw of clips could turn it round"
                found.append(f"The fusion is below a baseline {PLACES[place]}: WAF {block['waf']:.1f} against "
                             f"{figures[baseline][place]['waf']:.1f} by {name} (difference {gain['waf']:.1f}, 95 % "
                             f"interval {low:.1f} to {high:.1f}{sure}).")
    return found


def disjoint(figures: dict[str, Any], protocol: Protocol) -> list[str]:
    """Cross-validation and test of the same models, where their intervals do not meet."""
    blocks = figures[protocol.honest]
    if "test" not in blocks:
        return []
    (cv_low, cv_high), (low, high) = blocks["out_of_fold"]["interval"], blocks["test"]["interval"]
    if cv_low <= high and low <= cv_high:
        return []
    why = ("the features may have seen these labels (an encoder that was tuned on them), or the folds let speakers "
           "leak from training to validation, or the test clips are of another kind" if cv_low > high else
           "the test clips may be easier, or the features or the training may have seen them")
    return [f"Out of fold ({blocks['out_of_fold']['waf']:.1f}, {cv_low:.1f} to {cv_high:.1f}) and test "
            f"({blocks['test']['waf']:.1f}, {low:.1f} to {high:.1f}) disagree beyond chance: {why}."]


def what_was_seen(figures: dict[str, Any], protocol: Protocol) -> list[str]:
    found = []
    if protocol.leaky:
        found.append("Leaky: EmoVCLIP's prompts were trained on every fold (emovclip.scope: all), validation parts "
                     "included: the cross-validated figures are too high. The test figures are not affected.")
    if protocol.void:
        honest = figures["round0"]["out_of_fold"]["waf"]
        found.append(f"Cross-validation after self-training is void: its pseudo-labels were voted for by models that "
                     f"had learned from the very clips that are scored, so it rises whether the models improve or not. "
                     f"Judge by the test, and by round 0 out of fold ({honest:.1f}); self_training.voters: fold makes "
                     f"it honest.")
    if protocol.transductive:
        found.append(f"Transductive: {'; '.join(protocol.transductive)}. The test figures hold for these clips, and "
                     f"may be too high for others.")
    return found


def grouping(run: Run) -> list[str]:
    """What the folds and the intervals can hide."""
    labelled, known = run.groups(run.final.labelled), run.known("test")
    test = run.groups([run.final.others[i] for i in known])
    nameless = int((labelled == "").sum())
    found = []
    if nameless:
        found.append(f"{nameless} of {len(labelled)} labelled clips have no group (the speaker or dialogue, in the "
                     f"corpus's column group): the same speaker may be in a fold's training and validation part, so "
                     f"the cross-validated figures can be too high for new speakers, and intervals from single clips "
                     f"too narrow.")
    shared = sorted((set(test) & set(labelled)) - {""})
    if shared:
        found.append(f"{len(shared)} of the test clips' {len(set(test) - {''})} groups are in training too "
                     f"({', '.join(shared[:SHOWN])}{' ...' if len(shared) > SHOWN else ''}): the test says nothing "
                     f"about new speakers.")
    for place, groups in (("test", test), ("out-of-fold", labelled)):
        count = metrics.cluster_count(groups)
        if 0 < count < FEW_GROUPS and (groups != "").all():
            drawn = "drawn from single clips, because one group has no spread" if count == 1 else "rough"
            found.append(f"The {place} clips are of {count} group{'s' * (count > 1)}: their interval is {drawn}.")
    return found


def still_rising(curves: pd.DataFrame) -> list[str]:
    """Whether round 0's models were best so late that more epochs may make them better."""
    round0 = curves[curves["round"] == 0].sort_values("epoch", kind="stable")
    epochs = round0["epoch"].nunique()
    best = round0.loc[round0.groupby(["seed", "fold"])["valid_waf"].idxmax(), "epoch"] - round0["epoch"].min() + 1
    if best.mean() <= LAST_PART * epochs:
        return []
    return [f"Still rising: the {len(best)} models' validation WAF is best at epoch {best.mean():.1f} of {epochs} on "
            f"average; more epochs (fusion.epochs) may make them better."]


def pseudo_labelling(run: Run, p: FusionParams) -> list[str]:
    asked, k, found = p.self_training.rounds, p.self_training.k, []
    if asked and not len(run.split("unlabelled")):
        found.append("The corpus has no unlabelled clips.")
    last = int(run.rounds["round"].max())
    if last < asked:
        found.append(f"Self-training stopped after round {last} of {asked}: no candidate was left.")
    added = run.rounds.loc[run.rounds["round"] > 0, [f"added_{label}" for label in run.labels]]
    short = (added < k).sum().tolist()
    if any(short):
        named = ", ".join(f"{label} in {count}" for label, count in zip(run.labels, short, strict=True) if count)
        found.append(f"Of {len(added)} rounds some added fewer than k = {k} clips of a class: {named}.")
    return found


def unknown_truth(run: Run) -> list[str]:
    found = []
    for split in ("test", "unlabelled"):
        known, total = run.known(split).size, run.split(split).size
        if 0 < known < total:
            found.append(f"The truth of {known} of {total} {split} clips is known; the others are not scored.")
    scored = run.truth[run.known("test")]
    absent = [label for position, label in enumerate(run.labels) if not (scored == position).any()]
    if scored.size and absent:
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
