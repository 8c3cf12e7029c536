"""What each figure of a run was computed from, and what the models had seen of the clips that it scores, in words."""

from dataclasses import dataclass
from typing import Any

from stages.engine.params import FusionParams
from stages.evaluation import metrics
from stages.evaluation.artefacts import Run

EPOCHS = {
    "best": "at the epoch that is best on its own validation part",
    "common": "at the one epoch that is best for all folds together",
    "last": "at the last epoch",
}
STANDARDS = {
    "none": "not standardised",
    "fold": "standardised by each fold's training part",
    "group": "standardised by the clips of each group (speaker), test clips among them",
}
BASELINES = {
    "majority": "the most frequent class of the fold's training part",
    "logistic_regression": "logistic regression on the concatenated features of the same folds, its C by an inner "
                           "cross-validation within the fold's training part",
}


@dataclass(frozen=True)
class Protocol:
    """What holds for the figures of one run."""

    leaky: bool              # an encoder has learned from the labels of every fold: cross-validation is too high
    void: bool               # so is cross-validation after self-training, by the votes behind the pseudo-labels
    transductive: list[str]  # how training has used the test clips (never their labels); empty where it has not

    @property
    def honest(self) -> str:
        """The models whose cross-validation says something: `final`, or before self-training, `round0`."""
        return "round0" if self.void else "final"

    def lead(self, run: Run) -> tuple[str, str]:
        """Which models on which clips the report begins with: the test where its truth is known."""
        return ("final", "test") if run.known("test").size else (self.honest, "out_of_fold")


def protocol_of(run: Run, p: FusionParams) -> Protocol:
    voters = p.self_training.voters
    transductive = []
    taught = set(run.pseudo_labels["clip_id"]) & {run.final.others[i] for i in run.split("test")}
    if taught and run.self_trained:
        transductive.append(f"pseudo-labels put {len(taught)} of {run.split('test').size} test clips, without their "
                            f"labels, into training (self_training.include_test)")
    if run.by_group and run.split("test").size:
        transductive.append(f"{', '.join(run.by_group)}: features are standardised by group, with the other test clips "
                            f"of a clip's group (fusion.standardize: group)")
    return Protocol(run.leaky, run.self_trained and voters == "ensemble", transductive)


def standardisation(run: Run, p: FusionParams) -> str:
    """How the features are standardised, in words."""
    asked = {name: p.fusion.standardized_by(name) for name in run.modalities}
    asked |= {name: "fold" for name, how in asked.items() if how == "group" and name not in run.by_group}  # no groups
    if len(set(asked.values())) == 1:
        return STANDARDS[asked[run.modalities[0]]]
    return "; ".join(f"{name}: {STANDARDS[how]}" for name, how in asked.items())


def units(groups: Any) -> str:
    """What the bootstrap draws: `60 clips`, `3 groups`, `3 groups and 4 clips without one`."""
    alone = int((groups == "").sum())
    named = metrics.cluster_count(groups) - alone
    if named == 0 or metrics.cluster_count(groups) == 1:
        return f"{len(groups)} clips"
    return f"{named} groups" + (f" and {alone} clips without one" if alone else "")


def words(run: Run, p: FusionParams, found: Protocol, models: str, what: str) -> str:
    """The protocol of one block of details.json.

    models: final, round0 or one of BASELINES. what: test, unlabelled, out_of_fold, last_epoch or best_epoch.
    """
    seeds, folds = run.final.votes.shape[:2]
    over = f"{seeds} seed{'s' * (seeds > 1)}"
    model = BASELINES.get(models, "each fold's model")
    when = f" {EPOCHS[run.final.epoch]}" if models not in BASELINES else ""
    scored = "" if models in BASELINES else f", {EPOCHS['last' if run.final.epoch == 'best' else run.final.epoch]}"
    if what in ("test", "unlabelled"):
        text = f"{run.known(what).size} {what} clips; {model}{when}, the {folds} folds' probabilities averaged; "
        text += f"mean over {over}."
        if models in BASELINES:
            return f"{text} It has seen nothing of them."
        if what == "test":
            seen = [reason for reason in found.transductive if models == "final" or "group" in reason]
            return f"{text} " + (f"Transductive: {'; '.join(seen)}." if seen else "Training has seen nothing of them.")
        taught = models == "final" and run.self_trained
        return text + (" Some of them were trained on, with pseudo-labels." if taught else "")
    text = {
        "out_of_fold": f"{len(run.actual)} labelled clips at once, each by the model of its own fold, which has not "
                       f"trained on it{scored or f': {model}'}; mean over {over}.",
        "last_epoch": f"each fold's WAF on its validation part at the last epoch, mean over folds and {over}; no epoch "
                      f"was picked.",
        "best_epoch": f"each fold's WAF on its validation part at the epoch that is best on that same part, mean over "
                      f"folds and {over}: optimistic. The paper's Train&Val.",
    }[what]
    if found.leaky:
        text += " Leaky: an encoder has learned from these clips' labels."
    if models == "final" and found.void:
        text += " Void: the pseudo-labels were voted for by models that had learned from these clips' labels."
    return text
