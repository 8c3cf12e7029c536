"""Seeded stratified folds in which clips of one group stay together: the corpus's, and those within a training part."""

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


def split(labels: Sequence[Any], groups: Sequence[str], count: int, seed: int) -> np.ndarray:
    """The fold 0..count - 1 of each of N clips, (N,) int64; none of them is empty.

    Stratified by label as far as the groups allow ("" is a clip without one, a group of its own); with as many groups
    as folds each is one (leave one speaker out), whatever classes it lacks. A class may have fewer clips than there
    are folds; clips, and groups where there are any, may not be fewer.
    """
    from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold

    stratified = max(Counter(labels).values()) >= count  # what the stratifying splitters ask for
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a class with fewer clips than folds
        if not any(groups):
            splitter = (StratifiedKFold if stratified else KFold)(count, shuffle=True, random_state=seed)
            return _folds(splitter.split(labels, labels), len(labels))
        own = [group or f"{row} alone" for row, group in enumerate(groups)]
        if stratified and len(set(own)) > count:
            by_label = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
            folds = _folds(by_label.split(labels, labels, own), len(labels))
            if len(set(folds)) == count:
                return folds
    # Stratifying can put all groups of a class into few folds and leave others empty; by size none is
    return _folds(GroupKFold(count).split(labels, labels, own), len(labels))


def inner_split(labels: np.ndarray, groups: Sequence[str], count: int, seed: int) -> np.ndarray:
    """Folds within a training part, (N,) int64: as many as asked for, or as the part has clips or groups. A part of
    one single group is cut through, there being no other way."""
    distinct = len(set(groups)) if all(groups) else len(groups)
    if distinct == 1:
        groups, distinct = [""] * len(groups), len(groups)
    return split(labels.tolist(), groups, min(count, distinct), seed)


def _folds(parts: Iterable[tuple[Any, Any]], clips: int) -> np.ndarray:
    folds = np.zeros(clips, np.int64)
    for fold, (_, validation) in enumerate(parts):
        folds[validation] = fold
    return folds
