"""Self-training [paper 3.5]: rounds of pseudo-labels and retraining from scratch.

Round 0 is models/fusion. In round r the voters predict the pool (the unlabelled clips and, as the paper has it, the
test clips without their labels); of the clips that they predict as a class, the k with the highest probability join
the training part, never a validation part. Then all models start again from their first weights (their encoders from
the pre-trained ones, where there are).

voters: ensemble   a seed's ensemble of folds chooses, for every fold of that seed [paper]. The other folds' models have
                   learned from a fold's validation clips, and through the pseudo-labels so do the fold's own: from
                   round 1 on cross-validation is void
        fold       a fold's model chooses by itself, and it alone learns from what it chose. Its last epoch votes, since
                   an earlier one is picked by validation: nothing that it learns from was touched by the labels of
                   its validation clips. So cross-validation of the last epoch holds in every round
pool: accumulate   the k are chosen among the clips not yet taken, and keep their label for good [paper]
      redraw       round r chooses r * k per class afresh from the whole pool, so that a wrong one can be dropped
agreement: n       a clip qualifies only if at least n unimodal classifiers call it what the voters call it. They
                   are trained once, on one modality each and the labelled clips only: no pseudo-label has influenced
                   them. A classifier whose modality a clip lacks is not counted. They vote as `voters` says. Each of
                   self_training.voices, which learn from no label, counts like one of them where it ranked the clip
threshold          a clip qualifies only with at least this probability, of all classes or by class

A class with fewer than k candidates adds what there is (rounds.csv shows it). The rounds end early when nothing new
is chosen. Every finished round is one file, so a killed run resumes after the last one, to the same bits.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor

from stages.engine.errors import PipelineError
from stages.engine.files import read_rows, write_tensors
from stages.engine.params import Fusion, SelfTraining
from stages.fusion.ensemble import PREDICTIONS, Ensemble, Outputs, cross_validation
from stages.fusion.features import Inputs
from stages.fusion.pretrained import Pretrained
from stages.fusion.training import train

CHOSEN = {"seed": "int64", "fold": "int64", "row": "int64", "label": "int64", "confidence": "float32",
          "agreement": "int64"}
VOICES = Path("data/voices.csv")  # of gather_features: what the voices that self_training.voices names rank first


@dataclass(frozen=True)
class Round:
    """One round's pseudo-labels and the models trained with them."""

    number: int
    chosen: pd.DataFrame  # CHOSEN: position of the seed; fold, or -1 for all of them; row of Inputs; class; softmax;
    # classifiers and voices that agree, or -1
    outputs: Outputs


def no_pseudo_labels() -> pd.DataFrame:
    """The pseudo-labels of round 0."""
    return pd.DataFrame({name: np.zeros(0, dtype) for name, dtype in CHOSEN.items()})


def self_train(
    inputs: Inputs, fusion: Fusion, p: SelfTraining, candidates: np.ndarray, start: Outputs, folder: Path,
    pretrained: Pretrained | None = None,
) -> Iterator[Round]:
    """Yield round 0, which `start` is, and the rounds after it, until p.rounds or until nothing new is chosen.

    candidates: rows of the pool. folder: where finished rounds are kept and picked up; it must belong to these inputs
    and parameters alone. pretrained: what the encoders start from, in every round.
    """
    current, taken = Round(0, no_pseudo_labels(), start), no_pseudo_labels()
    yield current
    if p.rounds == 0 or not len(candidates):
        return
    opinions = _opinions(inputs, fusion, p, folder, pretrained) if p.agreement else None
    for number in range(1, p.rounds + 1):
        path = folder / f"round-{number:02d}.safetensors"
        if path.exists():
            current = _read_round(path, number, start.ensemble)
        else:
            chosen = choose(inputs, candidates, voters(current.outputs, p), opinions, taken, number, p)
            if _same(chosen, taken) or not len(chosen):
                return
            current = _train_round(inputs, fusion, p, number, taken, chosen, pretrained)
            _write_round(path, current)
        taken = pseudo_labels_in_use(p, taken, current.chosen)
        yield current


def pool_rows(inputs: Inputs, include_test: bool) -> np.ndarray:
    """Rows of the clips that may get a pseudo-label: those with at least one modality."""
    pool = (inputs.splits == "unlabelled") | (include_test & (inputs.splits == "test"))
    return np.flatnonzero(pool & inputs.present.any(dim=1).cpu().numpy())


def voters(outputs: Outputs, p: SelfTraining) -> Tensor:
    """What the voters say, (S, V, others, L) softmax: V is 1, the ensemble of folds, or every fold by itself."""
    return outputs.votes.mean(dim=1, keepdim=True) if p.voters == "ensemble" else outputs.votes_last


def choose(
    inputs: Inputs,
    candidates: np.ndarray,
    votes: Tensor,
    opinions: np.ndarray | None,
    taken: pd.DataFrame,
    number: int,
    p: SelfTraining,
) -> pd.DataFrame:
    """The pseudo-labels that round `number` draws: per voter and class the surest candidates; ties in manifest order.

    candidates: rows of the pool. votes: (S, V, others, L) of the round before, as `voters` gives them. opinions:
    (S, V, opinions, others) classes, -1 where there is none. taken: the pseudo-labels in use so far.
    """
    position = np.searchsorted(inputs.others, candidates)
    thresholds = np.array([p.threshold_of(label) for label in inputs.label_names], np.float32)
    count = p.k if p.pool == "accumulate" else p.k * number
    tables = []
    for seed, voter in np.ndindex(*votes.shape[:2]):
        fold = voter if p.voters == "fold" else -1
        probabilities = votes[seed, voter, position].numpy()
        classes, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
        agreement = np.full(len(candidates), -1)
        free = confidence >= thresholds[classes]
        if opinions is not None:
            agreement = (opinions[seed, voter][:, position] == classes).sum(axis=0)
            free &= agreement >= p.agreement
        if p.pool == "accumulate":
            free &= ~np.isin(candidates, taken["row"][(taken["seed"] == seed) & (taken["fold"] == fold)])
        for label in range(probabilities.shape[1]):
            found = np.flatnonzero(free & (classes == label))
            best = found[np.argsort(-confidence[found], kind="stable")[:count]]
            values = (seed, fold, candidates[best], label, confidence[best], agreement[best])
            tables.append(pd.DataFrame(dict(zip(CHOSEN, values, strict=True))).astype(CHOSEN))
    return pd.concat(tables, ignore_index=True)


def pseudo_labels_in_use(p: SelfTraining, taken: pd.DataFrame, chosen: pd.DataFrame) -> pd.DataFrame:
    """What a round trains on: everything taken so far and what it chose, or with `redraw` the latter alone."""
    return pd.concat([taken, chosen], ignore_index=True) if p.pool == "accumulate" else chosen


def _same(chosen: pd.DataFrame, taken: pd.DataFrame) -> bool:
    one, other = (set(table[["seed", "fold", "row", "label"]].itertuples(index=False)) for table in (chosen, taken))
    return one == other


def _train_round(
    inputs: Inputs, fusion: Fusion, p: SelfTraining, number: int, taken: pd.DataFrame, chosen: pd.DataFrame,
    pretrained: Pretrained | None,
) -> Round:
    labels = np.tile(inputs.labels, (len(fusion.seeds), inputs.fold_count, 1))
    used = pseudo_labels_in_use(p, taken, chosen)
    for fold in range(inputs.fold_count):
        mine = used[used["fold"].isin([fold, -1])]
        labels[mine["seed"], fold, mine["row"]] = mine["label"]
    outputs = train(inputs, fusion, labels, f"self_train round {number}", p.voters == "fold", pretrained)
    return Round(number, chosen, outputs)


def _opinions(
    inputs: Inputs, fusion: Fusion, p: SelfTraining, folder: Path, pretrained: Pretrained | None
) -> np.ndarray:
    """(S, V, modalities + p.voices, others) int64: the classes that count in agreement, -1 where there is none."""
    unimodal = _unimodal_opinions(inputs, fusion, p, folder, pretrained)
    voices = voice_opinions(inputs, p.voices)
    return np.concatenate([unimodal, np.broadcast_to(voices, (*unimodal.shape[:2], *voices.shape))], axis=2)


def voice_opinions(inputs: Inputs, names: Sequence[str]) -> np.ndarray:
    """(names, others) int64: the class that each of these voices ranks first, -1 for a clip that it did not rank.

    Raises PipelineError for a label that is none of the inputs'.
    """
    position = {inputs.clip_ids[row]: i for i, row in enumerate(inputs.others)}
    opinions = np.full((len(names), len(position)), -1)
    for row in read_rows(VOICES, ("clip_id", "voice", "label")) if names else ():
        if row["label"] not in inputs.label_names:
            raise PipelineError(f"{VOICES}: clip {row['clip_id']}: label {row['label']!r}, expected one of "
                                f"{list(inputs.label_names)}")
        if row["clip_id"] in position and row["voice"] in names:
            opinions[names.index(row["voice"]), position[row["clip_id"]]] = inputs.label_names.index(row["label"])
    return opinions


def _unimodal_opinions(
    inputs: Inputs, fusion: Fusion, p: SelfTraining, folder: Path, pretrained: Pretrained | None
) -> np.ndarray:
    """(S, V, modalities, others) int64: the class that each voter's unimodal classifier gives, -1 without an input."""
    path = folder / "unimodal.safetensors"
    if not path.exists():
        labels = np.tile(inputs.labels, (len(fusion.seeds), inputs.fold_count, 1))
        recipe = fusion.model_copy(update={"modality_dropout": 0.0})  # it has only one modality
        opinions = []
        for modality in inputs.modalities:
            alone = inputs.select([modality.name])
            outputs = train(alone, recipe, labels, f"self_train {modality.name} alone", p.voters == "fold", pretrained)
            classes = voters(outputs, p).argmax(dim=-1)
            opinions.append(torch.where(modality.present.cpu()[inputs.others], classes, -1))
        write_tensors(path, {"opinions": torch.stack(opinions, dim=2)})
    return load_file(path)["opinions"].numpy()


# ---------------------------------------------------------------- tables


def round_row(
    inputs: Inputs, p: SelfTraining, candidates: np.ndarray, done: Round, in_use: pd.DataFrame
) -> dict[str, float | int | None]:
    """One row of rounds.csv. Counts are per seed and model, means over them; waf_std is the best epochs' deviation over
    seeds.

    added: pseudo-labels that this round drew (with pool redraw: its whole set). pool_left: clips of the pool that it
    did not train on.
    """
    figures, sets = cross_validation(inputs, done.outputs), math.prod(voters(done.outputs, p).shape[:2])
    by_class = np.bincount(done.chosen["label"], minlength=len(inputs.label_names)) / sets
    confidence = done.chosen["confidence"].astype(float).mean() if len(done.chosen) else None
    return {
        "round": done.number,
        "waf_best_epoch": round(figures["waf_best_epoch"], 4),
        "waf_last_epoch": round(figures["waf_last_epoch"], 4),
        "waf_std": round(figures["waf_best_epoch_std"], 4),
        "added": round(len(done.chosen) / sets, 4),
        **{f"added_{name}": round(n, 4) for name, n in zip(inputs.label_names, by_class.tolist(), strict=True)},
        "mean_confidence": None if confidence is None else round(confidence, 6),
        "pool_left": round(len(candidates) - len(in_use) / sets, 4),
    }


def pseudo_label_table(inputs: Inputs, done: Round) -> pd.DataFrame:
    """The round's rows of pseudo_labels.csv; agreement is empty where it was not asked for, fold where the ensemble of
    all folds has chosen, for all of them."""
    chosen = done.chosen
    return pd.DataFrame(
        {
            "round": done.number,
            "clip_id": np.array(inputs.clip_ids, dtype=object)[chosen["row"]],
            "label": np.array(inputs.label_names, dtype=object)[chosen["label"]],
            "confidence": chosen["confidence"].astype(float).round(6),
            "agreement": chosen["agreement"].astype("Int64").mask(chosen["agreement"] < 0),
            "seed": np.array(done.outputs.ensemble.seeds)[chosen["seed"]],
            "fold": chosen["fold"].astype("Int64").mask(chosen["fold"] < 0),
        }
    )


# ---------------------------------------------------------------- finished rounds


def _write_round(path: Path, done: Round) -> None:
    tensors = {f"chosen.{name}": torch.from_numpy(done.chosen[name].to_numpy(copy=True)) for name in CHOSEN}
    tensors |= {name: getattr(done.outputs, name) for name in PREDICTIONS}
    ensemble = done.outputs.ensemble
    tensors |= {f"weights.{name}": values for name, values in ensemble.weights.items()}
    write_tensors(path, {**tensors, "epochs": torch.tensor(ensemble.epochs)})  # its existence means done


def _read_round(path: Path, number: int, like: Ensemble) -> Round:
    """A finished round; `like` gives what all rounds share: architecture, seeds, the folds' standardisation."""
    tensors = load_file(path)
    chosen = pd.DataFrame({name: tensors[f"chosen.{name}"].numpy() for name in CHOSEN})
    weights = {name: tensors[f"weights.{name}"] for name in like.weights}
    ensemble = replace(like, weights=weights, epochs=tensors["epochs"].tolist())
    return Round(number, chosen, Outputs(ensemble, *(tensors[name] for name in PREDICTIONS)))
