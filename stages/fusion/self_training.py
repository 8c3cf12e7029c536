"""Self-training [paper 3.5]: rounds of pseudo-labels and retraining from scratch.

Round 0 is models/fusion. In round r each seed's ensemble of folds predicts the pool (the unlabelled clips and, as
the paper has it, the test clips without their labels); of the clips that it predicts as a class, the k with the highest
probability join the training part of every fold of that seed, never a validation part. Then all models start again from
their first weights (their encoders from the pre-trained ones, where there are).

pool: accumulate   the k are chosen among the clips not yet taken, and keep their label for good [paper]
      redraw       round r chooses r * k per class afresh from the whole pool, so that a wrong one can be dropped
agreement: n       a clip qualifies only if at least n unimodal classifiers call it what the ensemble calls it. They
                   are trained once, on one modality each and the labelled clips only: no pseudo-label has influenced
                   them. A classifier whose modality a clip lacks is not counted.

A class with fewer than k candidates adds what there is (rounds.csv shows it). The rounds end early when nothing new
is chosen. Every finished round is one file, so a killed run resumes after the last one, to the same bits.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor

from stages.engine.files import write_tensors
from stages.engine.params import Fusion, SelfTraining
from stages.fusion.ensemble import PREDICTIONS, Ensemble, Outputs, cross_validation
from stages.fusion.features import Inputs
from stages.fusion.pretrained import Pretrained
from stages.fusion.training import train

CHOSEN = {"seed": "int64", "row": "int64", "label": "int64", "confidence": "float32", "agreement": "int64"}


@dataclass(frozen=True)
class Round:
    """One round's pseudo-labels and the models trained with them."""

    number: int
    chosen: pd.DataFrame  # CHOSEN: position of the seed, row of Inputs, class, softmax, classifiers that agree or -1
    outputs: Outputs


def no_pseudo_labels() -> pd.DataFrame:
    """The pseudo-labels of round 0."""
    return pd.DataFrame({name: np.zeros(0, dtype) for name, dtype in CHOSEN.items()})


def self_train(
    inputs: Inputs, fusion: Fusion, p: SelfTraining, start: Outputs, folder: Path, pretrained: Pretrained | None = None
) -> Iterator[Round]:
    """Yield round 0, which `start` is, and the rounds after it, until p.rounds or until nothing new is chosen.

    folder: where finished rounds are kept and picked up; it must belong to these inputs and parameters alone.
    pretrained: what the encoders start from, in every round.
    """
    current, taken = Round(0, no_pseudo_labels(), start), no_pseudo_labels()
    yield current
    candidates = pool_rows(inputs, p.include_test)
    if p.rounds == 0 or not len(candidates):
        return
    opinions = _unimodal_opinions(inputs, fusion, folder, pretrained) if p.agreement else None
    for number in range(1, p.rounds + 1):
        path = folder / f"round-{number:02d}.safetensors"
        if path.exists():
            current = _read_round(path, number, start.ensemble)
        else:
            chosen = choose(inputs, candidates, current.outputs.votes, opinions, taken, number, p)
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


def choose(
    inputs: Inputs,
    candidates: np.ndarray,
    votes: Tensor,
    opinions: np.ndarray | None,
    taken: pd.DataFrame,
    number: int,
    p: SelfTraining,
) -> pd.DataFrame:
    """The pseudo-labels that round `number` draws: per seed and class the surest candidates; ties in manifest order.

    candidates: rows of the pool. votes: (S, F, others, L) of the round before. opinions: (S, modalities, others)
    classes, -1 where the modality is absent. taken: the pseudo-labels in use so far.
    """
    position = np.searchsorted(inputs.others, candidates)
    count = p.k if p.pool == "accumulate" else p.k * number
    tables = []
    for seed, probabilities in enumerate(votes.mean(dim=1)[:, position].numpy()):
        classes, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
        agreement = np.full(len(candidates), -1)
        free = np.ones(len(candidates), bool)
        if opinions is not None:
            agreement = (opinions[seed][:, position] == classes).sum(axis=0)
            free &= agreement >= p.agreement
        if p.pool == "accumulate":
            free &= ~np.isin(candidates, taken["row"][taken["seed"] == seed])
        for label in range(probabilities.shape[1]):
            found = np.flatnonzero(free & (classes == label))
            best = found[np.argsort(-confidence[found], kind="stable")[:count]]
            columns = (np.full(len(best), seed), candidates[best], np.full(len(best), label))
            values = (*columns, confidence[best], agreement[best])
            tables.append(pd.DataFrame(dict(zip(CHOSEN, values, strict=True))).astype(CHOSEN))
    return pd.concat(tables, ignore_index=True)


def pseudo_labels_in_use(p: SelfTraining, taken: pd.DataFrame, chosen: pd.DataFrame) -> pd.DataFrame:
    """What a round trains on: everything taken so far and what it chose, or with `redraw` the latter alone."""
    return pd.concat([taken, chosen], ignore_index=True) if p.pool == "accumulate" else chosen


def _same(chosen: pd.DataFrame, taken: pd.DataFrame) -> bool:
    one, other = (set(zip(table["seed"], table["row"], table["label"], strict=True)) for table in (chosen, taken))
    return one == other


def _train_round(
    inputs: Inputs, fusion: Fusion, p: SelfTraining, number: int, taken: pd.DataFrame, chosen: pd.DataFrame,
    pretrained: Pretrained | None,
) -> Round:
    labels = np.tile(inputs.labels, (len(fusion.seeds), 1))
    used = pseudo_labels_in_use(p, taken, chosen)
    labels[used["seed"], used["row"]] = used["label"]
    return Round(number, chosen, train(inputs, fusion, labels, f"self_train round {number}", pretrained))


def _unimodal_opinions(
    inputs: Inputs, fusion: Fusion, folder: Path, pretrained: Pretrained | None
) -> np.ndarray:
    """(S, modalities, others) int64: the class that each seed's unimodal classifier gives, -1 where it has no input."""
    path = folder / "unimodal.safetensors"
    if not path.exists():
        labels = np.tile(inputs.labels, (len(fusion.seeds), 1))
        recipe = fusion.model_copy(update={"modality_dropout": 0.0})  # it has only one modality
        opinions = []
        for modality in inputs.modalities:
            alone = inputs.select([modality.name])
            outputs = train(alone, recipe, labels, f"self_train {modality.name} alone", pretrained)
            classes = outputs.votes.mean(dim=1).argmax(dim=-1)
            opinions.append(torch.where(modality.present.cpu()[inputs.others], classes, -1))
        write_tensors(path, {"opinions": torch.stack(opinions, dim=1)})
    return load_file(path)["opinions"].numpy()


# ---------------------------------------------------------------- tables


def round_row(inputs: Inputs, p: SelfTraining, done: Round, in_use: pd.DataFrame) -> dict[str, float | int | None]:
    """One row of rounds.csv. Counts are per seed, means over seeds; waf_std is the best epochs' deviation over seeds.

    added: pseudo-labels that this round drew (with pool redraw: its whole set). pool_left: clips of the pool that it
    did not train on.
    """
    figures, seeds = cross_validation(inputs, done.outputs), len(done.outputs.votes)
    by_class = np.bincount(done.chosen["label"], minlength=len(inputs.label_names)) / seeds
    confidence = done.chosen["confidence"].astype(float).mean() if len(done.chosen) else None
    return {
        "round": done.number,
        "waf_best_epoch": round(figures["waf_best_epoch"], 4),
        "waf_last_epoch": round(figures["waf_last_epoch"], 4),
        "waf_std": round(figures["waf_best_epoch_std"], 4),
        "added": round(len(done.chosen) / seeds, 4),
        **{f"added_{name}": round(n, 4) for name, n in zip(inputs.label_names, by_class.tolist(), strict=True)},
        "mean_confidence": None if confidence is None else round(confidence, 6),
        "pool_left": round(len(pool_rows(inputs, p.include_test)) - len(in_use) / seeds, 4),
    }


def pseudo_label_table(inputs: Inputs, done: Round) -> pd.DataFrame:
    """The round's rows of pseudo_labels.csv; agreement is empty where it was not asked for."""
    chosen = done.chosen
    return pd.DataFrame(
        {
            "round": done.number,
            "clip_id": np.array(inputs.clip_ids, dtype=object)[chosen["row"]],
            "label": np.array(inputs.label_names, dtype=object)[chosen["label"]],
            "confidence": chosen["confidence"].astype(float).round(6),
            "agreement": chosen["agreement"].astype("Int64").mask(chosen["agreement"] < 0),
            "seed": np.array(done.outputs.ensemble.seeds)[chosen["seed"]],
        }
    )


# ---------------------------------------------------------------- finished rounds


def _write_round(path: Path, done: Round) -> None:
    tensors = {f"chosen.{name}": torch.from_numpy(done.chosen[name].to_numpy(copy=True)) for name in CHOSEN}
    tensors |= {name: getattr(done.outputs, name) for name in PREDICTIONS}
    weights = {f"weights.{name}": values for name, values in done.outputs.ensemble.weights.items()}
    write_tensors(path, {**tensors, **weights})  # its existence means done


def _read_round(path: Path, number: int, like: Ensemble) -> Round:
    """A finished round; `like` gives what all rounds share: architecture, seeds, the folds' standardisation."""
    tensors = load_file(path)
    chosen = pd.DataFrame({name: tensors[f"chosen.{name}"].numpy() for name in CHOSEN})
    ensemble = replace(like, weights={name: tensors[f"weights.{name}"] for name in like.weights})
    return Round(number, chosen, Outputs(ensemble, *(tensors[name] for name in PREDICTIONS)))
