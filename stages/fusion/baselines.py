"""What the fusion is compared with, on its folds, features and clips: the majority class, and logistic regression.

Logistic regression sees all modalities side by side as the fusion's models of a fold are fed them. Its C is the one of
STRENGTHS with the best WAF of an inner cross-validation within the fold's training part, which a seed cuts; its models
predict like the fusion's: labelled clips out of fold, the others by the equal-weight mean over the folds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from stages.engine.params import Fusion
from stages.evaluation import metrics
from stages.fusion.features import Inputs, Standardised, fold_statistics, group_statistics
from stages.fusion.folds import inner_split
from stages.fusion.logistic_regression import Coordinates, Solution, coordinates, fit

STRENGTHS = tuple(10.0**power for power in range(-5, 2))  # of C, weakest features first
PATIENCE = 2  # values of C in a row without a better score that end the search: greater ones fit the clips more
INNER_FOLDS = 5
CHOOSING, FINAL = 1e-2, 1e-4  # gradients at which a fit ends: probabilities within 0.01, and within 0.001
PREDICT_ROWS = 4096  # bounds the memory of a prediction


@dataclass(frozen=True)
class Baselines:
    """Probabilities on the CPU; rows follow Inputs.labelled and Inputs.others."""

    majority: tuple[Tensor, Tensor]  # (S, labelled, L), (S, others, L): shares of the classes in the training part
    logistic_regression: tuple[Tensor, Tensor]  # the same shapes; a class that the training part lacks has 0
    chosen: list[list[float]]  # (S, F) C
    inner_waf: list[list[float]]  # (S, F) in percent, at that C


def baselines(inputs: Inputs, recipe: Fusion, groups: np.ndarray) -> Baselines:
    """Of recipe what decides the features, and the seeds. groups: (N,) str, every clip's, "" where it has none."""
    seeds, statistics = recipe.seeds, fold_statistics(inputs, recipe)
    transductive = group_statistics(inputs, recipe.by_group)
    classes, folds = len(inputs.label_names), inputs.folds[inputs.labelled]
    shapes = [(len(seeds), len(rows), classes) for rows in (inputs.labelled, inputs.others)]
    own, others = (torch.zeros(shape) for shape in shapes)
    prior_own, prior_others = (torch.zeros(shape) for shape in shapes)
    chosen, scores = [], []
    for fold in tqdm(range(inputs.fold_count), desc="baselines", unit="fold", leave=False):
        rows = np.flatnonzero((inputs.folds >= 0) & (inputs.folds != fold))
        feed = Standardised(inputs, statistics, fold, transductive)
        x, labels = coordinates(_together(feed, rows, inputs)), inputs.labels[rows]
        found = choose(x, labels, groups[rows].tolist(), seeds, classes)
        models = {c: fit(x, *_all(x, labels), classes, c, FINAL) for c in {c for c, _ in found}}
        weights, intercepts = _joined(x, [models[c] for c, _ in found])
        valid = torch.from_numpy(folds == fold)
        own[:, valid] = _predict(feed, inputs.labelled[folds == fold], inputs, weights, intercepts)
        others += _predict(feed, inputs.others, inputs, weights, intercepts) / inputs.fold_count
        shares = torch.from_numpy(np.bincount(labels, minlength=classes) / len(labels)).float()
        prior_own[:, valid] = shares
        prior_others += shares / inputs.fold_count
        chosen.append([c for c, _ in found])
        scores.append([score for _, score in found])
    by_seed = ([list(column) for column in zip(*values, strict=True)] for values in (chosen, scores))
    return Baselines((prior_own, prior_others), (own, others), *by_seed)


def choose(
    x: Coordinates, labels: np.ndarray, groups: Sequence[str], seeds: Sequence[int], classes: int
) -> list[tuple[float, float]]:
    """Per seed the C with the best inner WAF (the least of equals) and that WAF in percent. labels: (n,) int64."""
    splits = [inner_split(labels, groups, INNER_FOLDS, seed) for seed in seeds]
    distinct = {split.tobytes(): split for split in splits}  # by groups all seeds may cut alike: scored once
    used = np.concatenate([split != np.arange(split.max() + 1)[:, None] for split in distinct.values()])
    device = x.clips.device
    actual, masks = torch.from_numpy(labels).to(device), torch.from_numpy(used).to(device)
    best = dict.fromkeys(distinct, (0.0, -1.0))
    solution, since = None, 0
    for c in STRENGTHS:
        solution = fit(x, actual, masks, classes, c, CHOOSING, solution)
        called = solution.logits(x.clips).argmax(dim=-1).cpu().numpy()
        since, first = since + 1, 0
        for key, split in distinct.items():
            predicted = called[first + split, np.arange(len(split))]
            first += int(split.max()) + 1
            score = float(metrics.waf(labels, predicted, classes))
            if score > best[key][1]:
                best[key], since = (c, score), 0
        if since == PATIENCE:
            break
    return [best[split.tobytes()] for split in splits]


def _all(x: Coordinates, labels: np.ndarray) -> tuple[Tensor, Tensor]:
    device = x.clips.device
    return torch.from_numpy(labels).to(device), torch.ones(1, len(labels), dtype=torch.bool, device=device)


def _joined(x: Coordinates, models: Sequence[Solution]) -> tuple[Tensor, Tensor]:
    """The models of all seeds as weights of the features (D, S * L) and intercepts (S * L,)."""
    weights = x.weights(torch.cat([model.weights[0] for model in models], dim=1))
    return weights, torch.cat([model.intercepts[0] for model in models]) - x.mean @ weights


def _together(feed: Standardised, rows: np.ndarray, inputs: Inputs) -> Tensor:
    """(len(rows), D) float32, every modality's features side by side."""
    return torch.cat(feed(torch.from_numpy(rows).to(inputs.device))[0], dim=1)


def _predict(feed: Standardised, rows: np.ndarray, inputs: Inputs, weights: Tensor, intercepts: Tensor) -> Tensor:
    """(S, len(rows), L) softmax, on the CPU."""
    classes = len(inputs.label_names)
    output = torch.empty(len(intercepts) // classes, len(rows), classes)
    for start in range(0, len(rows), PREDICT_ROWS):
        part = slice(start, start + PREDICT_ROWS)
        logits = _together(feed, rows[part], inputs) @ weights + intercepts
        output[:, part] = logits.unflatten(1, (-1, classes)).softmax(dim=-1).transpose(0, 1).cpu()
    return output
