"""Nested cross-validation: what a recipe is worth on clips that had no part in training, epochs or choosing the recipe.

For every outer fold f the labelled clips of the other folds are the corpus: they are folds 0..F-2 there, an ensemble is
trained on them as ever (stages/fusion/training.py), with an epoch chosen on its own validation parts, and predicts the
clips of fold f, whose labels it never sees. A recipe is chosen by the inner score, its worth read from the outer clips.

Features per fold (EmoVCLIP): with outer fold f all inner folds use the features of fold f, whose prompts were learned
on every fold but f: so the outer clips stay unseen. The prompts have seen the inner validation clips, so the inner
score is optimistic in that modality; prompts of their own for every pair of folds would be F (F - 1) / 2 trainings.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from stages.engine.errors import PipelineError
from stages.engine.params import Fusion
from stages.evaluation import metrics
from stages.fusion.features import Inputs, Modality
from stages.fusion.training import train

LEFT_OUT = "left out"  # a split that is neither labelled, unlabelled nor test


@dataclass(frozen=True)
class Nested:
    """Rows of the predictions follow Inputs.labelled."""

    probabilities: Tensor  # (S, labelled, L) softmax: mean over the models that never saw the clip's outer fold
    inner: np.ndarray  # (S, F) float64: WAF in percent at the ensembles' epochs, mean over the outer fold's inner folds

    def outer(self, inputs: Inputs) -> np.ndarray:
        """(S,) float64: WAF in percent of the nested predictions, mean over the outer folds."""
        return _waf(inputs, self.probabilities)


def nested(inputs: Inputs, recipe: Fusion, name: str = "nested") -> Nested:
    """Train the recipe once per outer fold, len(recipe.seeds) x F x (F - 1) models in all; no file is read or written.

    name: what the progress bar shows. Raises PipelineError for fewer than three folds.
    """
    count = inputs.fold_count
    if count < 3:
        raise PipelineError(f"folds.count: found {count}, expected at least 3: nested cross-validation trains without "
                            f"one fold, and validates on another")
    probabilities = torch.empty(len(recipe.seeds), len(inputs.labelled), len(inputs.label_names))
    inner = []
    for fold in range(count):
        part = without_fold(inputs, fold)
        labels = np.tile(part.labels, (len(recipe.seeds), 1))
        outputs = train(part, recipe, labels, f"{name} {fold + 1}/{count}")
        probabilities[:, inputs.folds[inputs.labelled] == fold] = outputs.votes.mean(dim=1)
        inner.append(_waf(part, outputs.out_of_fold))
    return Nested(probabilities, np.stack(inner, axis=1))


def without_fold(inputs: Inputs, fold: int) -> Inputs:
    """The corpus of an outer fold: its clips are test clips without labels, in manifest order the only ones; the other
    folds are 0..F-2. What was unlabelled or test is left out: nothing uses it. Features are shared, not copied.
    """
    outer, inner = inputs.folds == fold, (inputs.folds >= 0) & (inputs.folds != fold)
    return replace(
        inputs,
        splits=np.select([outer, inner], ["test", "labelled"], LEFT_OUT),
        labels=np.where(inner, inputs.labels, -1),
        folds=np.where(inner, inputs.folds - (inputs.folds > fold), -1),
        modalities=tuple(_of_fold(modality, fold) for modality in inputs.modalities),
    )


def _of_fold(modality: Modality, fold: int) -> Modality:
    if len(modality.matrix) == 1:
        return modality
    only = slice(fold, fold + 1)
    return replace(modality, matrix=modality.matrix[only], centre=modality.centre[only], spread=modality.spread[only])


def _waf(inputs: Inputs, probabilities: Tensor) -> np.ndarray:
    """(S,): WAF of the labelled clips, mean over folds."""
    rows = inputs.labelled
    called = probabilities.argmax(dim=-1).numpy()
    return metrics.waf_by_fold(inputs.labels[rows], called, inputs.folds[rows], len(inputs.label_names))
